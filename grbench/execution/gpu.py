"""What NVML says of the GPUs: names for the record, power and memory beside a measurement.

Called outside timed regions only. Without a GPU, driver or nvidia-ml-py there is nothing to say, and no error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


def describe_gpus() -> list[dict[str, Any]]:
    """Name, driver and memory of each GPU; empty where NVML finds none."""
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
    """None where the card does not tell, such as one that shares the host's memory."""
    try:
        return int(nvml.nvmlDeviceGetMemoryInfo(handle).total // 2**20)
    except nvml.NVMLError_NotSupported:
        return None


def sample_gpu(index: int = 0) -> dict[str, float]:
    """Metrics of one GPU now: power, memory in use, utilisation, clock, temperature; empty where there is none."""
    with _nvml() as nvml:
        if nvml is None or index >= nvml.nvmlDeviceGetCount():
            return {}
        h = nvml.nvmlDeviceGetHandleByIndex(index)
        readings: dict[str, Callable[[], float]] = {
            "gpu/power_w": lambda: nvml.nvmlDeviceGetPowerUsage(h) / 1e3,
            "gpu/memory_mib": lambda: nvml.nvmlDeviceGetMemoryInfo(h).used / 2**20,
            "gpu/utilisation_percent": lambda: float(nvml.nvmlDeviceGetUtilizationRates(h).gpu),
            "gpu/sm_clock_mhz": lambda: float(nvml.nvmlDeviceGetClockInfo(h, nvml.NVML_CLOCK_SM)),
            "gpu/temperature_c": lambda: float(nvml.nvmlDeviceGetTemperature(h, nvml.NVML_TEMPERATURE_GPU)),
        }
        sampled = {}
        for name, read in readings.items():
            with contextlib.suppress(nvml.NVMLError):  # some cards do not tell some of them
                sampled[name] = read()
        return sampled


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """pynvml, initialised; None where there is nothing to ask."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, no permission: all mean that there is no GPU to describe
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()
