"""Energy of a run: NVML's counter, samples of power, and RAPL's counters."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from helpers.sleepy_engine import SleepyEngine, make_requests

from grbench.config.compose import compose_spec
from grbench.execution import cell, energy, gpu
from grbench.execution.energy import Energy, metered
from grbench.execution.records import Outcome
from grbench.gate.measured import MeasuredAnswers
from grbench.scenarios.batcher import unwatched
from grbench.scenarios.config import ClosedLoopConfig
from grengines.api import RankResult, Request, Setup
from grengines.cache.config import CacheConfig
from grengines.remote.config import RemoteConfig
from grengines.remote.engine import RemoteRanker


class NotSupportedError(Exception):
    """NVMLError of a card that lacks a reading."""


def card(**readings: Any) -> SimpleNamespace:
    """Return an NVML of one card. A reading that is not given raises NVMLError."""

    def unsupported(*_: object) -> Any:
        raise NotSupportedError

    functions = {"nvmlDeviceGetTotalEnergyConsumption": unsupported, "nvmlDeviceGetSamples": unsupported, **readings}
    return SimpleNamespace(
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        NVMLError=NotSupportedError,
        NVML_TOTAL_POWER_SAMPLES=0,
        NVML_VALUE_TYPE_UNSIGNED_INT=1,
        **functions,
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time that a test moves: `clock.s` seconds since 1970."""
    clock = SimpleNamespace(s=1_000_000.0)
    fake = SimpleNamespace(monotonic=lambda: clock.s, time_ns=lambda: int(clock.s * 1e9))
    monkeypatch.setattr(energy, "time", fake)
    monkeypatch.setattr(gpu, "time", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return clock


def use(monkeypatch: pytest.MonkeyPatch, nvml: Any) -> None:
    @contextmanager
    def opened() -> Iterator[Any]:
        yield nvml

    monkeypatch.setattr(gpu, "_nvml", opened)


def test_the_counter_of_a_gpu_is_read_at_both_ends(monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace) -> None:
    counter = iter([5_000, 605_000])  # millijoules
    use(monkeypatch, card(nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counter)))
    with metered("cuda") as spent:
        clock.s += 2
        assert spent.metrics(100) == {}  # not before the end
    assert spent.joules == 600
    assert spent.metrics(300) == {"energy_joules_per_request": 2.0}


def test_energy_of_several_gpus_adds_up(monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace) -> None:
    joules = {5: [100, 400], 7: [1000, 1050]}
    two = card(nvmlDeviceGetTotalEnergyConsumption=lambda handle: 1e3 * joules[handle].pop(0))
    two.nvmlDeviceGetCount = lambda: 8
    use(monkeypatch, two)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    with metered("cuda", gpus=2) as spent:
        clock.s += 2
    assert spent.joules == 350
    joules.update({5: [1, 2], 7: [1, 2]})
    with metered("cuda", gpus=3) as spent:  # there is no third
        clock.s += 2
    assert spent.joules is None


def test_a_card_without_a_counter_is_measured_by_its_samples_of_power(
    monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace
) -> None:
    begun = clock.s

    def samples(*times_and_watts: tuple[float, float]) -> Any:
        kept = [
            SimpleNamespace(timeStamp=round((begun + t) * 1e6), sampleValue=SimpleNamespace(uiVal=round(w * 1000)))
            for t, w in times_and_watts
        ]
        return lambda handle, kind, since: (1, kept)

    # 100 W for half a second, 200 W for one, 300 W for half; the first sample is from before.
    use(monkeypatch, card(nvmlDeviceGetSamples=samples((-1, 100), (0.5, 200), (1.5, 300))))
    with metered("cuda") as spent:
        clock.s = begun + 2
    assert spent.joules == pytest.approx(50 + 200 + 150)
    # The driver kept none of the first half second: that would be a guess.
    use(monkeypatch, card(nvmlDeviceGetSamples=samples((0.5, 200), (1.5, 300))))
    clock.s = begun
    with metered("cuda") as spent:
        clock.s = begun + 2
    assert spent.joules is None and spent.metrics(1) == {}


@pytest.mark.parametrize("nvml", [None, card()], ids=["no NVML", "a card that reports nothing"])
def test_where_a_gpu_reports_nothing_there_is_no_figure(
    monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace, nvml: Any
) -> None:
    use(monkeypatch, nvml)
    with metered("cuda") as spent:
        clock.s += 5
    assert spent.joules is None and spent.metrics(10) == {}


@pytest.mark.parametrize("visible", ["MIG-of-yesterday", "GPU-1", "0"])
@pytest.mark.parametrize("failing", ["nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetUUID"])
def test_no_error_of_nvml_reaches_the_cell(
    failing: str, visible: str, monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace
) -> None:
    def refuse(*_: object) -> Any:
        raise NotSupportedError

    names = ("DeviceGetHandleByUUID", "DeviceGetUUID", "DeviceGetName", "SystemGetDriverVersion", "DeviceGetMemoryInfo")
    refusing = {f"nvml{name}": refuse for name in names}
    readings = ("PowerUsage", "UtilizationRates", "ClockInfo", "Temperature")
    nvml = card(**refusing, **{f"nvmlDeviceGet{name}": refuse for name in readings}, NVML_CLOCK_SM=0)
    nvml.NVML_TEMPERATURE_GPU = 0
    setattr(nvml, failing, refuse)
    nvml.nvmlInit, nvml.nvmlShutdown = lambda: None, refuse
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with metered("cuda") as spent:
        clock.s += 5
    assert spent.joules is None and spent.metrics(10) == {}
    assert gpu.sample_gpu() == {} and gpu.describe_gpus() == [] and gpu.gpu_use() is None


def zone(folder: Path, name: str, microjoules: int, most: int = 262_143_328_850) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{most}\n")
    return folder


def test_packages_of_a_processor_add_up_and_their_counters_may_overflow(tmp_path: Path, clock: SimpleNamespace) -> None:
    first = zone(tmp_path / "intel-rapl:0", "package-0", 1_000_000)
    second = zone(tmp_path / "intel-rapl:1", "package-1", 262_143_000_000)
    zone(tmp_path / "intel-rapl:0:0", "core", 5)  # a part of the first package
    zone(tmp_path / "intel-rapl:2", "psys", 7)  # the whole machine
    with metered("cpu", tmp_path) as spent:
        clock.s += 3
        zone(first, "package-0", 4_000_000)
        zone(second, "package-1", 1_671_149)
    assert spent.joules == pytest.approx(3 + 2)
    assert spent.metrics(10)["energy_joules_per_request"] == pytest.approx(0.5)


def test_a_processor_without_readable_counters_has_no_figure(tmp_path: Path, clock: SimpleNamespace) -> None:
    def spent_in(folder: Path, seconds: float) -> Energy:
        with metered("cpu", folder) as spent:
            clock.s += seconds
        return spent

    assert spent_in(tmp_path / "absent", 2).joules is None
    package = zone(tmp_path / "rapl" / "intel-rapl:0", "package-0", 1)
    assert spent_in(tmp_path / "rapl", 2).joules == 0.0
    assert spent_in(tmp_path / "rapl", 500).joules is None  # the counter may have overflown twice
    (package / "energy_uj").unlink()
    (package / "energy_uj").mkdir()  # as unreadable as root's file, for root too
    assert spent_in(tmp_path / "rapl", 2).joules is None


REMOTE = RemoteRanker(RemoteConfig(), cast(Setup, SimpleNamespace(cache=CacheConfig())))
REMOTE._status = {"version": "1", "model": {}, "limits": {}, "strategies": []}


@pytest.mark.parametrize(
    "actual, known",
    [({"device": "cpu"}, True), (REMOTE.actual(), False), ({"device": "cpu", "rank": REMOTE.actual()}, False)],
    ids=["here", "remote", "remote stage"],
)
def test_a_server_takes_energy_that_this_machine_can_not_read(
    actual: dict[str, Any], known: bool, tmp_path: Path, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone(tmp_path / "rapl" / "intel-rapl:0", "package-0", 1)
    monkeypatch.setattr(cell, "metered", lambda device, gpus: metered(device, tmp_path / "rapl"))

    class Engine(SleepyEngine):
        def rank(self, requests: Sequence[Request]) -> RankResult:
            clock.s += 1
            return super().rank(requests)

    spec = dataclasses.replace(compose_spec([])[0], task="rank", scenario=ClosedLoopConfig(queries=4, clients=1))
    outcome = Outcome(actual=actual)
    answers = cast(MeasuredAnswers, SimpleNamespace(watch=unwatched))
    measurement = cell.Cell(spec, tmp_path, outcome, lambda message: None)._measure(Engine(), make_requests(4), answers)
    assert len(measurement.samples["request_id"]) == 4
    assert (energy.METRIC in measurement.metrics) == known


def test_a_run_of_less_than_a_second_has_no_joules() -> None:
    assert Energy(joules=10.0, seconds=0.9).metrics(10) == {}
    assert Energy(joules=10.0, seconds=1.0).metrics(10) == {"energy_joules_per_request": 1.0}
