"""The judgement of an artefact against a budget: a status for each limit, and the certificate."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from penjing.core.budget import say
from penjing.core.measurement import Estimate, NotMeasured
from penjing.core.value import Value

Status = Literal["reached", "not_reached", "inconclusive"]
_SHARE = re.compile(r"^(accuracy|top_?\d+|(precision|recall|f1)_(micro|macro|weighted))$")


class LimitVerdict(Value):
    """One limit judged: the bound, what was measured with its interval, and the baseline, all in `unit`."""

    status: Status
    limit: float
    measured: float | None = None
    low: float | None = None
    high: float | None = None
    baseline: float | None = None
    unit: str = ""
    reason: str = ""


class Flips(Value):
    """How many predictions changed; `total` also counts changes from one wrong class to another."""

    total: int
    correct_to_wrong: int
    wrong_to_correct: int


class WorstClass(Value):
    """The class that lost most recall, among all classes of the data.

    `low` and `high` hold for all classes at once (Bonferroni); `p_holm` is the exact p-value of McNemar's
    test of "this class lost nothing", corrected by Holm's method.
    """

    label: str
    drop: float
    low: float
    high: float
    n: int
    p_holm: float


class Step(Value):
    """One candidate of the sequence: its drop, the one-sided upper bound and whether it was certified.

    `p_value` is None where no test was made: no limit was set, or the sequence had stopped before.
    """

    name: str
    drop: float
    upper: float
    p_value: float | None
    certified: bool
    reason: str = ""


class Certificate(Value):
    """What the unseen split says about the quality of one candidate, compared example by example.

    Attributes:
        candidate, position: the candidate that the numbers below describe, and its place in the sequence.
        metric, max_drop: what was tested; no limit: intervals only.
        n, confidence: examples, and the one-sided confidence of each bound and of the whole sequence.
        groups: how many groups of examples were taken as independent; None where each example was.
        no_bound: why no bound on the metric is known, and what would give one; nothing is certified then and
            the interval of `drop` is an indication. Empty where there is a bound.
        method: the test, in words.
        drop: loss of the metric (an increase where smaller is better) with its two one-sided bounds.
        flips, worst_class: None where the outputs are no class scores; the worst class also where examples
            come in groups.
        smallest_certifiable_drop: what n examples with these changes certify with 80% power, were the true
            drop 0 (approximate but for shares); None where there is no bound.
        needed_n: examples that would certify `max_drop` with 80% power if the true drop were the measured
            one; None where it is not below the limit.
        sequence: the candidates in the fixed order of testing; testing stops at the first that fails.
    """

    candidate: str
    position: int = 0
    metric: str
    max_drop: float | None = None
    n: int
    groups: int | None = None
    confidence: float
    method: str
    no_bound: str = ""
    drop: Estimate
    flips: Flips | None = None
    worst_class: WorstClass | None = None
    smallest_certifiable_drop: float | None = None
    needed_n: int | None = None
    sequence: tuple[Step, ...] = ()

    @property
    def certified(self) -> bool:
        """Whether the described candidate was certified."""
        return bool(self.sequence) and self.sequence[self.position].certified

    def judge(self, max_drop: float, baseline: Estimate | NotMeasured | None = None) -> LimitVerdict:
        """Judge the limit on quality; `baseline` is the reference's quality, for the table."""
        return judge_drop(self, max_drop, baseline.value if isinstance(baseline, Estimate) else None)


class Verdict(Value):
    """All limits together: reached if each is, not reached if any is not, else inconclusive."""

    status: Status
    limits: dict[str, LimitVerdict] = Field(default_factory=dict)
    certificate: Certificate | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        limits: Mapping[str, LimitVerdict],
        certificate: Certificate | None = None,
        notes: tuple[str, ...] = (),
    ) -> Verdict:
        """Join judged limits into a verdict."""
        found = {limit.status for limit in limits.values()}
        status: Status = "reached"
        if "not_reached" in found:
            status = "not_reached"
        elif "inconclusive" in found:
            status = "inconclusive"
        return cls(status=status, limits=dict(limits), certificate=certificate, notes=notes)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("limit", "status", "at most", "measured", "interval", "baseline")]
        rows += [_row(name, limit, self._metric) for name, limit in self.limits.items()]
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        lines = [f"Verdict: {_words(self.status)}"]
        if self.limits:
            lines += [
                "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
                for row in rows
            ]
        lines += [f"  {name}: {limit.reason}" for name, limit in self.limits.items() if limit.reason]
        if self.certificate is not None:
            lines += [f"  {line}" for line in _explain(self.certificate)]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    @property
    def _metric(self) -> str:
        return "" if self.certificate is None else self.certificate.metric


def judge_upper(
    limit: float, estimate: Estimate, baseline: float | None = None, unit: str = ""
) -> LimitVerdict:
    """Judge an upper bound on a cost: reached and not reached only where the whole interval says so."""
    status: Status = "inconclusive"
    if estimate.high <= limit:
        status = "reached"
    elif estimate.low > limit:
        status = "not_reached"
    reason = "the interval contains the limit; measure more rounds" if status == "inconclusive" else ""
    return LimitVerdict(
        status=status,
        limit=limit,
        measured=estimate.value,
        low=estimate.low,
        reason=reason,
        high=estimate.high,
        baseline=baseline,
        unit=unit or estimate.unit,
    )


def judge_drop(certificate: Certificate, max_drop: float, baseline: float | None = None) -> LimitVerdict:
    """Judge the limit on quality: reached if certified, not reached if even the lower bound exceeds it.

    A limit other than the one that was tested is judged by the upper bound; that is valid for the first
    candidate of a sequence and for one that was certified.
    """
    drop = certificate.drop
    tested = certificate.max_drop is not None and certificate.max_drop == max_drop
    status: Status = "inconclusive"
    if certificate.no_bound:
        pass
    elif certificate.certified if tested else drop.high <= max_drop:
        status = "reached"
    elif drop.low > max_drop:
        status = "not_reached"
    reason = _missing(certificate, max_drop) if status == "inconclusive" else ""
    unit = "share" if is_share(certificate.metric) else ""
    return LimitVerdict(
        status=status,
        limit=max_drop,
        measured=drop.value,
        low=drop.low,
        high=drop.high,
        baseline=baseline,
        unit=unit,
        reason=reason,
    )


def is_share(metric: str) -> bool:
    """Tell whether a metric by this name is a share between 0 and 1.

    >>> is_share("f1_macro"), is_share("rmse")
    (True, False)
    """
    return _SHARE.match(metric) is not None


def drop_in_words(value: float, metric: str) -> str:
    """Write a difference of the metric: percent points for a share.

    >>> drop_in_words(0.005, "accuracy"), drop_in_words(0.25, "rmse")
    ('0.5%', '0.25')
    """
    return f"{value * 100:.3g}%" if is_share(metric) else f"{value:.3g}"


def _missing(certificate: Certificate, max_drop: float) -> str:
    if certificate.no_bound:
        return f"no bound on the metric: {certificate.no_bound}"
    text = (
        f"cannot certify a drop of at most {drop_in_words(max_drop, certificate.metric)} "
        f"with {certificate.n:,} examples"
    )
    if certificate.drop.value >= max_drop:
        return f"{text}; the measured drop is not below it"
    if certificate.needed_n is not None and certificate.needed_n > certificate.n:
        return f"{text}; {_round_up(certificate.needed_n):,} would do"
    return text


def _round_up(n: int) -> int:
    step: int = 10 ** max(0, len(str(n)) - 2)
    return -(-n // step) * step


def _words(status: str) -> str:
    return status.replace("_", " ")


def _row(name: str, limit: LimitVerdict, metric: str) -> tuple[str, ...]:
    def write(value: float | None) -> str:
        if value is None:
            return "-"
        if name == "max_drop":
            return drop_in_words(value, metric)
        return say(value, limit.unit).strip() if limit.unit else f"{value:.4g}"

    exact = limit.low is None or limit.low == limit.high
    interval = "" if exact else f"{write(limit.low)} to {write(limit.high)}"
    baseline = write(limit.baseline)
    if name == "max_drop" and limit.baseline is not None:
        baseline = f"{metric} {limit.baseline:.4g}".strip()
    return name, _words(limit.status), write(limit.limit), write(limit.measured), interval, baseline


def _explain(certificate: Certificate) -> list[str]:
    drop = certificate.drop
    low, high = (drop_in_words(x, certificate.metric) for x in (drop.low, drop.high))
    bound = (
        "an indication, no bound"
        if certificate.no_bound
        else f"each bound at {certificate.confidence * 100:g}%"
    )
    groups = "" if certificate.groups is None else f" in {certificate.groups:,} groups"
    lines = [
        f"certificate: {certificate.candidate}: {certificate.metric} drops by "
        f"{drop_in_words(drop.value, certificate.metric)} (between {low} and {high}, {bound}) "
        f"on {certificate.n:,} unseen examples{groups}; {certificate.method}"
    ]
    if certificate.flips is not None:
        flips = certificate.flips
        lines.append(
            f"changed predictions: {flips.total} ({flips.correct_to_wrong} right to wrong, "
            f"{flips.wrong_to_correct} wrong to right)"
        )
    if certificate.smallest_certifiable_drop is not None:
        smallest = drop_in_words(certificate.smallest_certifiable_drop, certificate.metric)
        lines.append(f"smallest drop that {certificate.n:,} examples certify with 80% power: {smallest}")
    return lines
