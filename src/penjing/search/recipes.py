"""Which precision recipes are faster than float for a model on this machine: a short probe, kept."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
from pydantic import ValidationError

from penjing.core.cache import keep, recall
from penjing.core.errors import Refused
from penjing.core.executor import candidate_seed
from penjing.core.measurement import Estimate
from penjing.core.plan import Plan, digest, plan_to_json
from penjing.core.progress import Line
from penjing.core.system import system_fault
from penjing.core.trial import Trial
from penjing.measurement.side_by_side import ratios
from penjing.planners.candidates import (
    PAYS,
    Candidate,
    Probed,
    get_ratio,
    limits_bytes,
    list_recipes,
    order_recipes,
)
from penjing.planners.recipes import choose_recipes_by_rule
from penjing.run.folder import describe_environment
from penjing.search.evaluate import REFERENCE
from penjing.search.finished import stop_on_fault
from penjing.search.recipes_job import NO_TIME, deliver_recipes
from penjing.search.resources import limit_candidate
from penjing.search.session import Session
from penjing.search.values import RecipeChoice, Survey
from penjing.targets.graph_shape import digest_graph

KIND = "recipes"
"""Folder of the cache."""

LEAST_S, MOST_S = 15.0, 60.0
"""Bounds on the seconds of a probe. Writing files may take half of them, timing the rest; an export that is
needed, and starting the process that writes, come on top. Small models take less."""

SHARE, LEAST_SHARE = 0.05, 0.1
"""It may take this share of the time that a run has; where `LEAST_S` is more than a tenth, rules decide."""

LEAST_ROUNDS, ROUND_S, START_S = 6, 0.06, 1.0
"""Rounds of every file, the seconds of one where calls are short, and the start of its process."""

PROCESS_BYTES = 250_000_000
"""Resident memory of a process that has loaded a runtime and no model."""


@dataclass(frozen=True)
class ChosenRecipes:
    """What the planner gets.

    Attributes:
        plans: to try, in this order.
        measured: whether the order was measured, so that the first that keeps quality is the fastest.
        found: by the probe.
    """

    plans: tuple[Plan, ...]
    measured: bool
    found: RecipeChoice


def choose_recipes(session: Session, survey: Survey, start: Trial) -> ChosenRecipes:
    """Measure the latency of every legal recipe beside float, unless the cache or the ledger has it.

    Without the time, the memory or a call short enough for it the recipes are those of fixed rules.

    Args:
        session: with the target in which the trials run.
        survey: of the original.
        start: the float model there.
    """
    legal = list_recipes(survey.kinds, survey.operations.by_layer, session.target)
    if not legal:
        return ChosenRecipes((), False, RecipeChoice())
    content = [session.target.label, *(plan_to_json(candidate.plan) for candidate in legal)]
    found = session.once(KIND, content, RecipeChoice, partial(_known_or_probed, session, legal, start))
    for line in found.words:
        session.say(Line.note(line))
    if not any(row.ratio is not None for row in found.rows):
        return ChosenRecipes(choose_recipes_by_rule(survey.kinds.values(), session.target), False, found)
    return ChosenRecipes(order_recipes(found.rows, session.budget), True, found)


def _known_or_probed(session: Session, legal: tuple[Candidate, ...], start: Trial) -> RecipeChoice:
    """Return what the cache has, and what a probe of the rest found where there is time for one."""
    reference = _float_folder(session, start)
    key = _key(session, reference, legal)
    known, note = _recalled(key)
    notes = tuple(filter(None, [note]))
    names = {row.name for row in known}
    unknown = tuple(candidate for candidate in legal if candidate.name not in names)
    if not unknown:
        return RecipeChoice(words=_words(session, known, " (from the cache)"), rows=known, cached=True)
    needed = _bytes(reference) * (len(unknown) + 1)
    reason = explain_no_probe(session.budget.time, start.latency_ms, needed)
    seconds: dict[str, float] = {}
    if not reason:
        session.say(Line.phase(f"comparing precision recipes: {', '.join(c.name for c in unknown)}"))
        try:
            rows, seconds = _probe(session, unknown, start, reference)
            known = (*known, *rows)
        except Refused as refusal:
            if system_fault(refusal):
                raise
            reason = str(refusal)
    if not any(row.ratio is not None for row in known):
        notes = (*notes, f"precision recipes go by rules, not measured: {reason or 'none could be timed'}")
        return RecipeChoice(words=notes, rows=known, notes=notes, seconds=seconds)
    lasting = [row.model_dump(mode="json") for row in known if row.reason != NO_TIME]
    notes = tuple(filter(None, [*notes, reason or keep(KIND, key, {"rows": lasting})]))
    words = (*_words(session, known), *notes)
    return RecipeChoice(words=words, rows=known, notes=notes, seconds=seconds)


def limit_probe_seconds(limit: float | None) -> float:
    """Return the seconds that a probe may take in a run with this limit on its own."""
    return MOST_S if limit is None else min(MOST_S, max(LEAST_S, SHARE * limit))


def explain_no_probe(limit: float | None, call_ms: float | None, needed_bytes: int) -> str:
    """Say why a probe is not worth its cost; nothing where it is.

    Args:
        limit: seconds of the whole run; None for no limit.
        call_ms: of the float model.
        needed_bytes: estimate of the memory of all processes.
    """
    if limit is not None and LEAST_SHARE * limit < LEAST_S:
        return f"a probe may take {LEAST_S:g} s, more than a tenth of the run's {limit:g} s"
    if call_ms is None:
        return "the latency of the float model was not measured"
    if _fitting(limit_probe_seconds(limit) / 2, call_ms) < 1:
        return f"a call takes {call_ms:.3g} ms, too long for a short probe"
    if needed_bytes > psutil.virtual_memory().available / 2:
        return f"the processes would need about {needed_bytes / 1e9:.2g} GB of memory"
    return ""


def _fitting(seconds: float, call_ms: float) -> int:
    """Return how many artefacts, the float model not counted, can be timed in some seconds."""
    one = START_S + LEAST_ROUNDS * max(ROUND_S, 2 * call_ms / 1e3)
    return int(seconds / one) - 1


def _float_folder(session: Session, start: Trial) -> Path:
    """Return the artefact of the float model in the session's target."""
    where = "float/target" if start.folder == "float" else f"{start.folder}/artefact"
    return session.path(where)


def _bytes(folder: Path) -> int:
    return PROCESS_BYTES + 2 * sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _key(session: Session, reference: Path, legal: tuple[Candidate, ...]) -> str:
    here = describe_environment()
    plans = [plan_to_json(candidate.plan) for candidate in legal]
    inputs = [[list(x.shape[1:]), str(x.dtype)] for x in session.task.valid.example()]
    machine = [here["processor"], here["cores"], here["packages"], here["python"]]
    target = session.target.model_dump(mode="json")
    return digest([digest_graph(reference), target, plans, inputs, machine])


def _recalled(key: str) -> tuple[tuple[Probed, ...], str]:
    cached = recall(KIND, key)
    if cached.content is None:
        return (), cached.note
    try:
        return tuple(Probed.model_validate(row) for row in cached.content["rows"]), ""
    except (ValidationError, KeyError, TypeError):
        return (), f"the cache file {key}.json was not used: it is of another form"


def _probe(
    session: Session, legal: tuple[Candidate, ...], start: Trial, reference: Path
) -> tuple[tuple[Probed, ...], dict[str, float]]:
    """Return a row for each recipe and the seconds by activity; the files are removed again."""
    folder = session.path(KIND)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        made = _made(session, legal, folder)
        left = limit_probe_seconds(session.budget.time) - made.seconds["compression"]
        timing = time.perf_counter()
        found, reasons = _timed(session, {REFERENCE: reference} | made.folders, left, start)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    reasons |= made.refused
    rows = tuple(
        Probed(
            name=c.name,
            plan=plan_to_json(c.plan),
            loss=c.loss,
            ratio=found.get(name),
            float_layers=tuple(made.left.get(name, ())),
            layers=made.layers,
            reason=reasons.get(name, ""),
        )
        for name, c in zip(_numbered(legal), legal, strict=True)
    )
    return rows, made.seconds | {"measurement": time.perf_counter() - timing}


@dataclass(frozen=True)
class _Made:
    """The files of recipes: folders, layers left float and reasons for there being none, by number."""

    folders: dict[str, Path]
    left: dict[str, list[str]]
    refused: dict[str, str]
    layers: int
    seconds: dict[str, float]


def _numbered(legal: tuple[Candidate, ...]) -> list[str]:
    return [f"recipe{number}" for number in range(len(legal))]


def _made(session: Session, legal: tuple[Candidate, ...], folder: Path) -> _Made:
    seconds = limit_probe_seconds(session.budget.time) / 2
    plans = {name: plan_to_json(c.plan) for name, c in zip(_numbered(legal), legal, strict=True)}
    finished = session.executor.run(
        deliver_recipes,
        plans,
        session.target,
        folder,
        candidate_seed(session.seed, KIND),
        seconds,
        session.path("float", "target", "model.onnx"),
        limits=limit_candidate(session.budget.time),
        name=KIND,
        say=session.say,
    )
    found = stop_on_fault(finished, KIND).value
    if found is None:
        raise Refused(
            "the precision recipes must be written before they are timed",
            value=f"{finished.status}: {finished.reason}",
            place=KIND,
            fix="none is needed: rules choose instead",
        )
    folders = {name: folder / name for name in found["float"]}
    return _Made(folders, found["float"], found["refused"], found["layers"], found["seconds"])


def _timed(
    session: Session, folders: dict[str, Path], seconds: float, start: Trial
) -> tuple[dict[str, Estimate], dict[str, str]]:
    """Return the ratios of as many artefacts as the seconds allow, and why there is none for the others."""
    if len(folders) < 2:
        return {}, {}
    most = 1 + max(1, _fitting(seconds, start.latency_ms or 0.0))
    names = list(folders)
    rest = max(0.0, seconds - START_S * len(names[:most]))
    inputs = session.task.valid.arrays()[0]
    timed = {name: folders[name] for name in names[:most]}
    found, failures = ratios(timed, REFERENCE, session.target, inputs, rest)
    return found, failures | dict.fromkeys(names[most:], NO_TIME)


def _words(session: Session, rows: tuple[Probed, ...], source: str = "") -> tuple[str, ...]:
    """Return what was found, a line for each recipe, the fastest first, and a last one if none pays."""
    measured = sorted((row for row in rows if row.ratio is not None), key=get_ratio)
    lines = [f"precision recipes, latency over that of float{source}:"]
    for row in measured:
        assert row.ratio is not None
        low, high = row.ratio.low, row.ratio.high
        words = f"{row.name}: {row.ratio.value:.2f} times float [{low:.2f}, {high:.2f}]"
        stays = f", {len(row.float_layers)} of {row.layers} layers float" if row.float_layers else ""
        slower = "" if row.ratio.value < PAYS else "; it does not pay here"
        lines.append(f"{words}{stays}{slower}")
    lines += [f"{row.name} was not measured: {row.reason}" for row in rows if row.ratio is None]
    if measured and get_ratio(measured[0]) >= PAYS:
        kept = "tried for its size alone" if limits_bytes(session.budget) else "float is kept"
        lines.append(f"lower precision does not pay here: {get_ratio(measured[0]):.2f} times float; {kept}")
    return tuple(lines)
