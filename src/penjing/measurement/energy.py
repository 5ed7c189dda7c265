"""Energy of the processor package, where the machine tells it (Linux powercap, "RAPL")."""

from __future__ import annotations

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Counts energy from its making on.

    The counters are of whole processors, other programs included; they start anew when full, which is allowed
    for once between two readings, a matter of an hour at the least.

    >>> EnergyMeter(Path("no such folder")).joules() is None
    True
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        self._zones = sorted(root.glob("*-rapl:?")) if root.is_dir() else []
        self._start = self._read()

    def joules(self) -> float | None:
        """Return the energy used since the start in joules, or None where it is not measured."""
        now = self._read()
        if self._start is None or now is None:
            return None
        used = 0.0
        for (before, _), (after, full) in zip(self._start, now, strict=True):
            used += after - before if after >= before else after - before + full
        return used / 1e6

    def _read(self) -> list[tuple[int, int]] | None:
        try:
            found = [
                (int((zone / "energy_uj").read_text()), int((zone / "max_energy_range_uj").read_text()))
                for zone in self._zones
            ]
        except (OSError, ValueError):
            return None
        return found or None
