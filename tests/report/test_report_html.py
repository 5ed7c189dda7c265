"""The HTML report: complete, self-contained, and harmless whatever the record says."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from penjing.core.errors import Exit, Refused
from penjing.report.charts import dump_script_json
from penjing.report.html import render as render_record
from penjing.report.html import write_report
from penjing.report.record import Record, check_schema
from penjing.run.reading import read_record

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    '"><img src=x onerror=alert(3)>',
    "' onmouseover='alert(4)",
    "\x1b[31mred\x1b[0m\x1b]0;title\x07",
    "{{7*7}}{% raw %}",
    "line\nbreak\r\x00\u2028next",
    "=cmd|' /C calc'!A0",
    "\u202egnp.exe",
    "<!--<script>",
    "lone \ud800 surrogate",
    "javascript:alert(5)",
    "x" * 5000,
]


def render(record: dict[str, Any]) -> str:
    return render_record(Record.model_validate(record))


class Page(HTMLParser):
    """Elements, attributes and texts of a page."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self._inside = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


def test_every_part_of_the_record_is_shown(record: dict[str, Any]) -> None:
    page = Page(render(record))
    for words in (
        "All 3 limits are reached",
        "Quality drop",
        "measured 0.34 points (-0.21 to 0.89 points)",
        "float model in PyTorch eager",
        "float model in the target",
        "runner-up",
        "5.0 times faster than PyTorch eager",
        "On 899 test examples that the search never saw",
        "A drop of more than 1.00 points is ruled out",
        "11: 7 from right to wrong, 4 from wrong to right",
        "the worker was killed (signal 9, probably out of memory)",
        "What each step bought",
        "Every method is a step of its own, repair too",
        "ReestimateBatchNorm() 93.00",
        "Int8Static() on conv*",
        "the classes are the output",
        "Example CPU",
        "Time spent: 54 s",
        "import penjing as pj",
        "trials/5/artefact')",
        "test was made from half of valid",
        "not measured",
        "the process ended before its peak was read",
        "0.87× (slower)",
    ):
        assert words in page.text, words


def test_charts_carry_the_numbers_of_the_record(record: dict[str, Any]) -> None:
    data = Page(render(record)).data()
    assert set(data) == {"pareto", "ablation-latency", "ablation-quality", "distribution", "classes"}
    points = data["pareto"]["points"]
    assert (len(points["feasible"]), len(points["infeasible"]), len(points["result"])) == (4, 4, 1)
    assert points["result"][0]["x"] == record["result"]["latency"]["p50_ms"]["value"]
    assert points["result"][0]["y"] == pytest.approx(97.83)
    assert [p["x"] for p in points["front"]] == sorted(p["x"] for p in points["front"])
    assert [line["role"] for line in data["distribution"]] == ["eager", "baseline", "result"]
    assert data["ablation-quality"]["points"][1] == pytest.approx([41.0, 38.0, 44.0])
    assert data["classes"]["labels"] == list("0123456789")


def test_the_page_is_self_contained(record: dict[str, Any]) -> None:
    text = render(record)
    page = Page(text)
    assert len(text.encode()) < 2_000_000
    loading = {"src", "href", "srcset", "data", "action", "formaction", "poster"}
    assert not [(tag, attrs) for tag, attrs in page.tags if loading & set(attrs)]
    assert not {tag for tag, _ in page.tags} & {"iframe", "object", "embed", "link", "base", "form", "img"}
    assert "@import" not in text
    assert "url(" not in re.search(r"<style>(.*?)</style>", text, re.S).group(1)  # type: ignore[union-attr]
    assert "sourceMappingURL" not in text


def test_the_policy_names_exactly_the_two_scripts(record: dict[str, Any]) -> None:
    page = Page(render(record))
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith(
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'sha256-"
    )
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in page.scripts[1:]]
    assert re.findall(r"'sha256-([^']+)'", policy) == digests
    assert len(digests) == 2


def poison(value: Any, text: str) -> Any:
    """Put a text into every free string of a record: names, labels, reasons, keys of free mappings."""
    kept = {"kind", "status", "runtime", "mode", "device", "precision"}
    if isinstance(value, dict):
        free = "cpu" in value or "0" in value or "channels_before" in value or "accuracy" in value
        return {
            (f"{k}{text}" if free else k): (v if k in kept else poison(v, text)) for k, v in value.items()
        }
    if isinstance(value, list):
        return [poison(v, text) for v in value]
    return f"{value}{text}" if isinstance(value, str) and value else value


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: repr(t[:14]))
def test_hostile_strings_are_only_text(record: dict[str, Any], text: str) -> None:
    clean_page = Page(render(record))
    page = Page(render(poison(record, text)))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in clean_page.tags]
    assert [sorted(a) for _, a in page.tags] == [sorted(a) for _, a in clean_page.tags]
    assert page.scripts[1:] == clean_page.scripts[1:]
    assert len(page.scripts) == 3
    assert page.data().keys() == clean_page.data().keys()
    shown = page.text + json.dumps(page.data(), ensure_ascii=False)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", shown)
    if "{{" in text:
        assert "{{7*7}}" in page.text
    if text == HOSTILE[0]:
        assert HOSTILE[0] in page.text


def test_script_json_survives_the_parser() -> None:
    data = {"</script>": "<!-- & \u2028 \u2029 ]]>", "nan": float("nan"), "deep": [{"x": (1, 2.5, None)}]}
    text = dump_script_json(data)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {"</script>": "<!-- & ]]>", "nan": None, "deep": [{"x": [1, 2.5, None]}]}


@pytest.mark.parametrize(
    ("status", "word", "mark"), [("not_reached", "not reached", "✗"), ("inconclusive", "inconclusive", "?")]
)
def test_status_is_said_in_words_and_with_a_mark(
    record: dict[str, Any], status: str, word: str, mark: str
) -> None:
    record["verdict"]["status"] = record["verdict"]["limits"]["latency"]["status"] = status
    page = Page(render(record))
    assert f"{mark} {word} Latency" in page.text
    assert f"1 of 3 limits {word}" in page.text


def test_a_limit_that_was_not_measured_says_so(record: dict[str, Any]) -> None:
    record["verdict"]["limits"]["memory"] = {
        "status": "inconclusive",
        "limit": 1e6,
        "measured": None,
        "low": None,
        "high": None,
        "baseline": None,
        "unit": "bytes",
        "reason": "the worker has no peak",
    }
    text = Page(render(record)).text
    assert "not measured; the limit is 1 MB" in text
    assert "the worker has no peak" in text


def test_failures_are_grouped_and_a_run_without_a_limit_has_no_certificate(record: dict[str, Any]) -> None:
    for trial in record["trials"]:
        trial.update(
            status="failed", reason="the metric raised", measurement=None, feasible=False, pareto=False
        )
    record.update(runners_up=[], plan=[], changes=[], ablation=[])
    record["verdict"].update(status="not_reached", certificate=None)
    page = Page(render(record))
    assert "10 the metric raised" in page.text
    assert "this run has no certificate" in page.text
    assert "The delivered plan is empty" in page.text


def test_an_uncertified_drop_says_what_would_do(record: dict[str, Any]) -> None:
    certificate = record["verdict"]["certificate"]
    certificate.update(n=200, max_drop=0.005, needed_n=4100, smallest_certifiable_drop=0.021, sequence=[])
    text = Page(render(record)).text
    assert "A drop of more than 0.50 points could not be ruled out" in text
    assert "200 examples certify about 2.10 points at the least; 4,100 examples would do." in text


def test_uncounted_operations_make_a_lower_bound(record: dict[str, Any]) -> None:
    record["result"]["operations"]["uncounted"] = ["CustomOp", "Einsum"]
    text = Page(render(record)).text
    assert "≥ 1.19 M" in text
    assert "2 not counted: CustomOp, Einsum" in text


@pytest.mark.parametrize("missing", ["result", "artefact", "baselines", "spent"])
def test_a_record_without_a_part_is_refused_by_its_name(
    record: dict[str, Any], tmp_path: Path, missing: str
) -> None:
    del record[missing]
    (tmp_path / "record.json").write_text(json.dumps(record), "utf-8")
    with pytest.raises(Refused, match=missing):
        read_record(tmp_path)


def test_what_is_read_is_what_was_written(record: dict[str, Any], tmp_path: Path) -> None:
    """Every field comes back as it was, those that a later version added too."""
    record["later"] = {"added": [1, 2.5, "x"]}
    record["spent"]["later"] = None
    (tmp_path / "record.json").write_text(json.dumps(record), "utf-8")
    again = read_record(tmp_path).to_json()
    assert {key: again[key] for key in record} == record
    assert Record.model_validate(again) == read_record(tmp_path)


def test_huge_records_stay_below_two_megabytes_and_say_what_was_cut(record: dict[str, Any]) -> None:
    record["changes"] = [
        {**record["changes"][0], "layer": f"{i}<&>" * 40, "reason": "<" * 400} for i in range(9000)
    ]
    record["trials"] = [{**record["trials"][0], "name": f"{i}" + "'" * 300} for i in range(600)]
    record["baselines"]["target"]["per_class"] = {f"class {i}": 1.0 for i in range(1000)}
    record["result"]["per_class"] = {f"class {i}": 1 - i / 1000 for i in range(1000)}
    text = render(record)
    assert len(text.encode()) < 2_000_000
    page = Page(text)
    assert "of 9000 shown; all are in record.json" in page.text
    assert "600 trials" in page.text
    assert "first 500 trials are drawn" in page.text
    assert len(page.data()["classes"]["labels"]) == 40
    assert page.data()["classes"]["after"][0] == pytest.approx(0.1)


@pytest.mark.parametrize("bad", [None, [], {}, {"schema": 1}])
def test_what_is_no_record_is_refused(bad: Any) -> None:
    with pytest.raises(Refused, match=r"record\.json must have a verdict"):
        check_schema(bad)


def test_a_newer_schema_is_refused(record: dict[str, Any]) -> None:
    record["schema"] = 2
    with pytest.raises(Refused, match="schema of at most 1, got 2") as error:
        check_schema(record)
    assert error.value.code == Exit.ENVIRONMENT


def test_the_report_is_written_and_names_the_artefact_from_the_run_directory(
    record: dict[str, Any], tmp_path: Path
) -> None:
    record["artefact"]["path"] = "trials/7/artefact"
    path = write_report(Record.model_validate(record), tmp_path / "report 报告.html")
    page = Page(path.read_text("utf-8"))
    assert repr(str(tmp_path / "trials/7/artefact")) in page.text
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_rendering_leaves_the_record_as_it_was(record: dict[str, Any]) -> None:
    before = json.dumps(record)
    assert render(record) == render(record)
    assert json.dumps(record) == before


def test_a_slower_result_is_called_slower(record: dict[str, Any]) -> None:
    record["result"] = record["runners_up"][1]
    assert "the result is slower, only 0.87 times as fast (0.85 to 0.89)" in Page(render(record)).text


def test_a_loss_is_not_written_as_a_percentage(record: dict[str, Any]) -> None:
    for m in (*record["baselines"].values(), record["result"], *record["runners_up"]):
        m["metric"] = "rmse"
    record["verdict"]["certificate"]["metric"] = "rmse"
    text = Page(render(record)).text
    assert "measured 0.0034 (-0.0021 to 0.0089)" in text
    assert "0.9783 0.9673 to 0.9893" in text
