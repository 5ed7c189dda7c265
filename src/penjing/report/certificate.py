"""The certificate in words: two sentences, its facts and the sequence of tests."""

from __future__ import annotations

from typing import Any

from penjing.report import words
from penjing.report.words import RECALL, Json, clean, number, percent


def certificate(found: Json | None, metric: str) -> dict[str, Any] | None:
    """Return the certificate as two sentences, its facts and the rows of its sequence of tests."""
    if not found:
        return None
    rows = [
        (
            step.get("name", ""),
            words.drop(step.get("drop"), metric, signed=True),
            words.drop(step.get("upper"), metric, signed=True),
            number(step.get("p_value")),
            "certified" if step.get("certified") else "not certified",
            step.get("reason") or "",
        )
        for step in found.get("sequence") or ()
    ]
    return {"sentences": _sentences(found, metric), "rows": rows, "facts": _facts(found, metric)}


def _sentences(found: Json, metric: str) -> tuple[str, str]:
    d, confidence, n = found.get("drop") or {}, found.get("confidence") or 0.95, found.get("n") or 0
    bound = (
        "an indication, no bound"
        if found.get("no_bound")
        else f"each bound at {percent(confidence)} confidence"
    )
    groups = f" in {found['groups']:,} groups" if found.get("groups") else ""
    first = (
        f"On {n:,} test examples{groups} that the search never saw, compared one by one with the baseline, "
        f"the drop in {clean(metric, 60)} is {words.drop(d.get('value'), metric)} "
        f"({_drop_interval(d, metric)}, {bound})."
    )
    return first, _second_sentence(found, metric, n, percent(round(1 - confidence, 6)))


def _second_sentence(found: Json, metric: str, n: int, risk: str) -> str:
    method, limit = clean(found.get("method") or "paired test", 160), found.get("max_drop")
    name = clean(found.get("candidate") or "the result", 160)
    most = "the limit" if limit is None else words.drop(limit, metric)
    if found.get("no_bound"):
        return f"Nothing was certified: no bound on the metric is known; {clean(found['no_bound'], 240)}."
    if any(
        s.get("certified") and s.get("name") == found.get("candidate") for s in found.get("sequence") or ()
    ):
        return (
            f"A drop of more than {most} is ruled out for {name} ({method}): were the true drop that large, "
            f"this test would pass in at most {risk} of all samples, however many candidates were tried."
        )
    if limit is None:
        return f"No limit on the drop was set, so nothing was tested; the bounds come from: {method}."
    text = f"A drop of more than {most} could not be ruled out for {name} ({method}, risk of error {risk})"
    smallest, needed = found.get("smallest_certifiable_drop"), found.get("needed_n")
    if smallest is not None:
        text += f": {n:,} examples certify about {words.drop(smallest, metric)} at the least"
    return text + (f"; {needed:,.0f} examples would do." if needed and needed > n else ".")


def _drop_interval(found: Json, metric: str) -> str:
    return words.between(words.drop(found.get("low"), metric), words.drop(found.get("high"), metric))


def _facts(found: Json, metric: str) -> list[tuple[str, str]]:
    flips, worst = found.get("flips") or {}, found.get("worst_class")
    facts = [("Examples", f"{found.get('n') or 0:,}"), ("Confidence", percent(found.get("confidence") or 0))]
    if flips:
        facts.append(
            (
                "Predictions that changed",
                f"{flips.get('total', 0):,}: "
                f"{flips.get('correct_to_wrong', 0):,} from right to wrong, "
                f"{flips.get('wrong_to_correct', 0):,} from wrong to right",
            )
        )
    if worst:
        facts.append(
            (
                "Worst class",
                f"{clean(worst.get('label'), 80)}: recall drops by "
                f"{words.drop(worst.get('drop'), RECALL)} ({_drop_interval(worst, RECALL)}, "
                f"{worst.get('n') or 0:,} examples)",
            )
        )
    if found.get("smallest_certifiable_drop") is not None:
        smallest = words.drop(found["smallest_certifiable_drop"], metric)
        facts.append(("Smallest drop that these examples can certify", smallest))
    if found.get("needed_n"):
        facts.append(("Examples needed for the limit", f"{found['needed_n']:,.0f}"))
    return facts
