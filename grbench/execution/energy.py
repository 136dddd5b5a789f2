"""Energy that a cell's devices take while a scenario runs, read before and after the timed region.

On a GPU it is NVML's counter of the card; a card without one keeps samples of its power for some seconds. On a CPU it
is RAPL's counter of each package, which Linux shows to root alone unless its files are opened to others. Both count
what other processes use and what an idle device takes. Where nothing can be read there is no figure.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from grbench.execution.gpu import joule_counter
from grbench.execution.stats import SHORTEST_S  # NVML's counters change every tenth of a second

METRIC = "energy_joules_per_request"
POWERCAP = Path("/sys/class/powercap")
MOST_WATTS = 1000.0  # of one package: a counter that can overflow twice at this power does not count

Joules = Callable[[], float | None]  # since an earlier moment; None: not known


@dataclass
class Energy:
    """Energy of the devices between the two ends of `metered`."""

    joules: float | None = None
    seconds: float = 0.0

    def metrics(self, answers: int) -> dict[str, float]:
        """Return joules a request, or nothing where they are not known or the time was too short to tell."""
        if self.joules is None or self.seconds < SHORTEST_S:
            return {}
        return {METRIC: self.joules / answers}


@contextlib.contextmanager
def metered(device: str | None, powercap: Path = POWERCAP, gpus: int = 1) -> Iterator[Energy]:
    """Yield an Energy that is filled at the end.

    device: cuda or cpu; None: of another machine, without a figure. gpus: how many of them the engine uses.
    """
    energy = Energy()
    with _counter(device, powercap, gpus) as since:
        begun = time.monotonic()
        yield energy
        energy.seconds = time.monotonic() - begun
        energy.joules = since()


def _counter(device: str | None, powercap: Path, gpus: int) -> contextlib.AbstractContextManager[Joules]:
    if device is None:
        return contextlib.nullcontext(lambda: None)
    return joule_counter(gpus) if device == "cuda" else _packages(powercap)


@contextlib.contextmanager
def _packages(powercap: Path) -> Iterator[Joules]:
    """Yield what all packages of the processor have taken from now on."""
    zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if _is_package(zone)]
    begun, before = time.monotonic(), _counters(zones)

    def since() -> float | None:
        after, seconds = _counters(zones), time.monotonic() - begun
        if before is None or after is None:
            return None
        if any(limit < MOST_WATTS * 1e6 * seconds for _, limit in after):
            return None
        return sum((end - start) % (limit + 1) for (start, _), (end, limit) in zip(before, after, strict=True)) / 1e6

    yield since


def _is_package(zone: Path) -> bool:
    """Return True for a package; its parts (intel-rapl:0:0) and the whole machine (psys) would count twice."""
    try:
        return (zone / "name").read_text().startswith("package")
    except OSError:
        return False


def _counters(zones: list[Path]) -> list[tuple[int, int]] | None:
    """Return each zone's counter and its largest value in microjoules, or None if there is one that can't be read."""
    try:
        return [
            (int((zone / "energy_uj").read_text()), int((zone / "max_energy_range_uj").read_text())) for zone in zones
        ] or None
    except (OSError, ValueError):
        return None
