"""Lines of progress are values: shown by their kind, whatever their words are."""

import pytest

from penjing.cli.show import Reporter
from penjing.core.progress import Kind, Line


@pytest.mark.parametrize("kind", list(Kind))
def test_every_kind_has_a_maker_and_survives_json_and_a_name_in_front(kind):
    line = getattr(Line, kind.value)("a text")
    assert line == Line(kind=kind, text="a text")
    assert Line.model_validate_json(line.model_dump_json()) == line
    assert line.under("Distill") == Line(kind=kind, text="Distill: a text")
    assert str(line) == "a text"


SHOWN = {
    Kind.PHASE: "stage",
    Kind.STEP: "detail",
    Kind.TRAINING: "detail",
    Kind.TRIAL: "say",
    Kind.NOTE: "say",
    Kind.WARNING: "say",
}


@pytest.mark.parametrize("kind", list(Kind))
def test_how_a_line_is_shown_follows_from_its_kind_alone(kind):
    called = []

    class Recorder:
        def __getattr__(self, name):
            return lambda text: called.append((name, text))

    reporter = Reporter(quiet=True)
    reporter._progress = Recorder()
    for text in ("trying: epoch 1", "certifying", "done"):
        reporter(Line(kind=kind, text=text))
    assert {name for name, _ in called} == {SHOWN[kind]}
    assert [text for _, text in called] == ["trying: epoch 1", "certifying", "done"]
