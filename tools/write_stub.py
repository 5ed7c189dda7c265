"""Write `src/penjing/__init__.pyi` from the one list of public names: `python tools/write_stub.py`."""

from pathlib import Path

from penjing.core.names import NAMES

STUB = Path(__file__).parents[1] / "src" / "penjing" / "__init__.pyi"


def text() -> str:
    """Return the stub: what type checkers see of the names that are loaded when they are first used."""
    lines = sorted(f"from {module} import {name} as {name}" for name, module in NAMES.items())
    return "\n".join([*lines, "", "__version__: str", "__all__: list[str]", ""])


if __name__ == "__main__":
    STUB.write_text(text(), encoding="utf-8")
