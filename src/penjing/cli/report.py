"""`penjing report`: show a finished run again and write its report anew."""

from __future__ import annotations

from penjing.cli import options as o


def report(run: o.RunPath, json: o.Json = False) -> int:
    """Print the table of a finished run and write its HTML report anew."""
    from penjing.cli.main import emit
    from penjing.cli.show import show_record
    from penjing.report.html import write_report
    from penjing.search.result import open_result

    result = open_result(run)
    write_report(result.typed, result.report)
    emit(result.record, json, lambda _: show_record(result))
    return 0
