"""The certificate in words: two sentences, its facts and the sequence of tests."""

from __future__ import annotations

from typing import Any

from penjing.core.measurement import Estimate
from penjing.core.verdict import Certificate, WorstClass
from penjing.report import words
from penjing.report.words import RECALL, clean, number, percent


def describe_certificate(found: Certificate | None, metric: str) -> dict[str, Any] | None:
    """Return the certificate as two sentences, its facts and the rows of its sequence of tests."""
    if found is None:
        return None
    rows = [
        (
            step.name,
            words.drop(step.drop, metric, signed=True),
            words.drop(step.upper, metric, signed=True),
            number(step.p_value),
            "certified" if step.certified else "not certified",
            step.reason,
        )
        for step in found.sequence
    ]
    return {"sentences": _sentences(found, metric), "rows": rows, "facts": _facts(found, metric)}


def _sentences(found: Certificate, metric: str) -> tuple[str, str]:
    each = f"each bound at {percent(found.confidence)} confidence"
    bound = "an indication, no bound" if found.no_bound else each
    groups = f" in {found.groups:,} groups" if found.groups else ""
    first = (
        f"On {found.n:,} test examples{groups} that the search never saw, compared one by one with the "
        f"baseline, the drop in {clean(metric, 60)} is {words.drop(found.drop.value, metric)} "
        f"({_interval(found.drop, metric)}, {bound})."
    )
    return first, _second_sentence(found, metric, percent(round(1 - found.confidence, 6)))


def _second_sentence(found: Certificate, metric: str, risk: str) -> str:
    method, limit = clean(found.method or "paired test", 160), found.max_drop
    name = clean(found.candidate or "the result", 160)
    most = "the limit" if limit is None else words.drop(limit, metric)
    if found.no_bound:
        return f"Nothing was certified: no bound on the metric is known; {clean(found.no_bound, 240)}."
    if any(step.certified and step.name == found.candidate for step in found.sequence):
        return (
            f"A drop of more than {most} is ruled out for {name} ({method}): were the true drop that large, "
            f"this test would pass in at most {risk} of all samples, however many candidates were tried."
        )
    if limit is None:
        return f"No limit on the drop was set, so nothing was tested; the bounds come from: {method}."
    text = f"A drop of more than {most} could not be ruled out for {name} ({method}, risk of error {risk})"
    smallest, needed = found.smallest_certifiable_drop, found.needed_n
    if smallest is not None:
        text += f": {found.n:,} examples certify about {words.drop(smallest, metric)} at the least"
    return text + (f"; {needed:,.0f} examples would do." if needed and needed > found.n else ".")


def _interval(found: Estimate | WorstClass, metric: str) -> str:
    return words.between(words.drop(found.low, metric), words.drop(found.high, metric))


def _facts(found: Certificate, metric: str) -> list[tuple[str, str]]:
    facts = [("Examples", f"{found.n:,}"), ("Confidence", percent(found.confidence))]
    if found.flips is not None:
        flips = found.flips
        changed = (
            f"{flips.total:,}: {flips.correct_to_wrong:,} from right to wrong, "
            f"{flips.wrong_to_correct:,} from wrong to right"
        )
        facts.append(("Predictions that changed", changed))
    if found.worst_class is not None:
        worst = found.worst_class
        lost = (
            f"{clean(worst.label, 80)}: recall drops by {words.drop(worst.drop, RECALL)} "
            f"({_interval(worst, RECALL)}, {worst.n:,} examples)"
        )
        facts.append(("Worst class", lost))
    if found.smallest_certifiable_drop is not None:
        smallest = words.drop(found.smallest_certifiable_drop, metric)
        facts.append(("Smallest drop that these examples can certify", smallest))
    if found.needed_n:
        facts.append(("Examples needed for the limit", f"{found.needed_n:,.0f}"))
    return facts
