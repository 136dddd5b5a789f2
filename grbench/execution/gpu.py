"""NVML's view of the GPUs: names for the record, power and memory beside a measurement.

Nothing here runs in a timed region. Without a GPU, its driver or nvidia-ml-py the results are empty, without an error.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


def describe_gpus() -> list[dict[str, Any]]:
    """Return the name, driver and memory of each GPU."""
    with _nvml() as nvml:
        if nvml is None:
            return []
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


def _memory_mib(nvml: Any, handle: Any) -> int | None:
    """Return None for a card that does not report it, such as one that shares the host's memory."""
    try:
        return int(nvml.nvmlDeviceGetMemoryInfo(handle).total // 2**20)
    except nvml.NVMLError_NotSupported:
        return None


def sample_gpu() -> dict[str, float]:
    """Return metrics of the GPU that engines use, now: power, memory in use, utilisation, clock, temperature."""
    with _nvml() as nvml:
        h = nvml and _used_by_engines(nvml)
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
        try:
            handle = _used_by_engines(nvml)
            processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            return GpuUse(len(processes), float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu))
        except Exception:  # no GPU, or one that reports neither (NVMLError is a class of pynvml, which may be absent)
            return None


def _used_by_engines(nvml: Any) -> Any:
    """Return the handle of the GPU that engines use: the first of CUDA_VISIBLE_DEVICES, or None if that is none.

    NVML takes no notice of that variable. Its numbers are CUDA's on a machine with one kind of GPU; CUDA_DEVICE_ORDER=
    PCI_BUS_ID makes them so on others.
    """
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip()
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    if first.isdecimal():
        return handles[int(first)] if int(first) < len(handles) else None
    if first.startswith("MIG-"):
        return nvml.nvmlDeviceGetHandleByUUID(first)
    # CUDA takes the beginning of a UUID, too.
    return next((h for h in handles if first and nvml.nvmlDeviceGetUUID(h).startswith(first)), None)


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
        pynvml.nvmlShutdown()
