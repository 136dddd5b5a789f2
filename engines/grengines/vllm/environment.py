"""The process around vLLM: its environment variables, and what it replaces in PyTorch. No vLLM import."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

# Variables that vLLM and its libraries read. Nothing is reported, downloaded, or reachable from other hosts.
SETTINGS = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the core runs in this process: hidden states stay on the device
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the runner that pools in all tested versions
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
# CUDA graphs without torch.compile, so that our kernels are not replaced. A piecewise capture breaks at attention. vLLM
# reads this when it is imported.
DEFAULTS = {"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"}


@contextmanager
def environment(more: Mapping[str, str] = {}) -> Iterator[None]:
    """Set the variables for vLLM. Afterwards restore all variables, also those that vLLM set itself."""
    before = dict(os.environ)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.update({**SETTINGS, **more})
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def unchanged_process(more: Mapping[str, str] = {}) -> Iterator[None]:
    """Enter `environment` with further variables, and restore torch.set_num_threads.

    vLLM replaces that on CPUs by a function that does nothing.
    """
    set_num_threads = torch.set_num_threads
    with environment(more):
        try:
            yield
        finally:
            torch.set_num_threads = set_num_threads
