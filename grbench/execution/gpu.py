"""NVML's view of the GPUs: names for the record, power and memory beside a measurement.

Nothing here runs in a timed region. Without a GPU, its driver or nvidia-ml-py, and where NVML refuses (as it may for a
part of a card, MIG), the results are empty, without an error.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


def describe_gpus() -> list[dict[str, Any]]:
    """Return the name, driver and memory of each GPU."""
    with _nvml() as nvml:
        if nvml is None:
            return []
        try:
            driver = nvml.nvmlSystemGetDriverVersion()
            handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
            return [
                {
                    "name": nvml.nvmlDeviceGetName(h),
                    "driver": driver,
                    "memory_mib": _memory_mib(nvml, h),
                }
                for h in handles
            ]
        except nvml.NVMLError:
            return []


def visible_gpus() -> list[str]:
    """Return the GPUs that engines may use, each as a value of CUDA_VISIBLE_DEVICES."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is None:
        return [str(i) for i in range(len(describe_gpus()))]
    there = len(describe_gpus())
    found: list[str] = []
    for name in (part.strip() for part in allowed.split(",")):
        if not (name.startswith(("GPU-", "MIG-")) or (name.isdecimal() and int(name) < there)):
            break  # CUDA stops at the first that is not there, too
        found.append(name)
    return list(dict.fromkeys(found)) if there else []


def _memory_mib(nvml: Any, handle: Any) -> int | None:
    """Return None for a card that does not report it, such as a part of one, or one that shares the host's memory."""
    try:
        return int(nvml.nvmlDeviceGetMemoryInfo(handle).total // 2**20)
    except nvml.NVMLError:
        return None


def sample_gpu() -> dict[str, float]:
    """Return metrics of the GPU that engines use, now: power, memory in use, utilisation, clock, temperature."""
    with _nvml() as nvml:
        h = _used_by_engines(nvml)
        if h is None:
            return {}
        readings: dict[str, Callable[[], float]] = {
            "gpu/power_w": lambda: nvml.nvmlDeviceGetPowerUsage(h) / 1e3,
            "gpu/memory_mib": lambda: nvml.nvmlDeviceGetMemoryInfo(h).used / 2**20,
            "gpu/utilisation_percent": lambda: float(nvml.nvmlDeviceGetUtilizationRates(h).gpu),
            "gpu/sm_clock_mhz": lambda: float(nvml.nvmlDeviceGetClockInfo(h, nvml.NVML_CLOCK_SM)),
            "gpu/temperature_c": lambda: float(nvml.nvmlDeviceGetTemperature(h, nvml.NVML_TEMPERATURE_GPU)),
        }
        sampled = {}
        for name, read in readings.items():
            with contextlib.suppress(nvml.NVMLError):  # not every card reports all of them
                sampled[name] = read()
        return sampled


@dataclass(frozen=True)
class GpuUse:
    """Use of a GPU: its compute processes, and the share of the last moment (up to a second) in which it was busy."""

    processes: int
    utilisation_percent: float


def gpu_use() -> GpuUse | None:
    """Return the use of the GPU of engines now, or None where it is not known.

    Containers may hide each other's processes.
    """
    with _nvml() as nvml:
        if (handle := _used_by_engines(nvml)) is None:  # a library that is asked about no card ends the process
            return None
        try:
            processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            return GpuUse(len(processes), float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu))
        except Exception:  # no GPU, or one that reports neither (NVMLError is a class of pynvml, which may be absent)
            return None


@contextlib.contextmanager
def joule_counter(gpus: int = 1) -> Iterator[Callable[[], float | None]]:
    """Yield a function that returns the joules of the GPUs of engines from now on, or None where they are not known.

    A card without a counter keeps its last samples of power. They count if they reach back to the beginning.
    """
    with _nvml() as nvml:
        handles = [_used_by_engines(nvml, place) for place in range(gpus)]
        begun_us, before = time.time_ns() // 1000, [_millijoules(nvml, handle) for handle in handles]

        def of(handle: Any, at_first: int | None) -> float | None:
            after = _millijoules(nvml, handle)
            if at_first is not None and after is not None:
                return (after - at_first) / 1e3
            return _of_samples(nvml, handle, begun_us)

        def since() -> float | None:
            found = [of(handle, at_first) for handle, at_first in zip(handles, before, strict=True)]
            known = [joules for joules in found if joules is not None]
            return sum(known) if len(known) == len(found) else None

        yield since


def _millijoules(nvml: Any, handle: Any) -> int | None:
    if handle is None:
        return None
    try:
        return int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
    except nvml.NVMLError:  # cards before Volta, and parts of a card (MIG)
        return None


def _of_samples(nvml: Any, handle: Any, begun_us: int) -> float | None:
    """Return the joules since a time (microseconds since 1970) by the samples of power that the driver kept."""
    if handle is None:
        return None
    try:
        kind, found = nvml.nvmlDeviceGetSamples(handle, nvml.NVML_TOTAL_POWER_SAMPLES, 0)
    except nvml.NVMLError:
        return None
    times_s = [(sample.timeStamp - begun_us) / 1e6 for sample in found]
    watts = [sample.sampleValue.uiVal / 1e3 for sample in found]
    if kind != nvml.NVML_VALUE_TYPE_UNSIGNED_INT or not times_s or times_s[0] > 0:
        return None
    now_s = time.time_ns() / 1e9 - begun_us / 1e6
    ends_s = [*times_s[1:], max(now_s, times_s[-1])]  # each sample holds until the next one
    steps_s = [max(end, 0.0) - max(start, 0.0) for start, end in zip(times_s, ends_s, strict=True)]
    return float(sum(power * step for power, step in zip(watts, steps_s, strict=True)))


def _used_by_engines(nvml: Any, place: int = 0) -> Any:
    """Return the handle of the GPU that engines use: of CUDA_VISIBLE_DEVICES the one at this place.

    None: that is none, or NVML is absent or does not find it, such as a part of a card that was made anew.
    NVML takes no notice of that variable. Its numbers are CUDA's on a machine with one kind of GPU; CUDA_DEVICE_ORDER=
    PCI_BUS_ID makes them so on others.
    """
    if nvml is None:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(place)] * (place + 1) if visible is None else visible.split(",")
    name = names[place].strip() if place < len(names) else ""
    try:
        if name.startswith("MIG-"):
            return nvml.nvmlDeviceGetHandleByUUID(name)
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        if name.isdecimal():
            return handles[int(name)] if int(name) < len(handles) else None
        # CUDA takes the beginning of a UUID, too.
        return next((h for h in handles if name and nvml.nvmlDeviceGetUUID(h).startswith(name)), None)
    except nvml.NVMLError:
        return None


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """Yield pynvml, initialised, or None if it is not available."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, driver or permission: there is no GPU to describe
        yield None
        return
    try:
        yield pynvml
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
