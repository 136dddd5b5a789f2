"""Decoders over several GPUs: vLLM's tensor parallelism with one engine core in each process.

vLLM calls this an external launcher: every rank has a scheduler of its own, and all see the same requests in the same
order, so that they run the same steps. Rank 0 sends the others what it does itself, and vLLM's own collectives join
them within a step. With vLLM's workers the model would be out of this process, and so would the search over its levels.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from grengines.api import Int64Array
from grengines.runtime.group import Group
from grengines.runtime.team import Calls
from grengines.semantic.trie import Trie


def arguments_of(ranks: int) -> dict[str, Any]:
    """Return the arguments of vLLM's EngineArgs for this number of ranks."""
    if ranks == 1:
        return {}
    return {"tensor_parallel_size": ranks, "distributed_executor_backend": "external_launcher"}


def free_port() -> int:
    """Return a port of this machine where nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return the environment that vLLM's external launcher reads. port: at which rank 0 waits for the others."""
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in found.items()}


def follow(
    group: Group, device: torch.device, *, arguments: Mapping[str, Any], port: int, trie: Trie, width: int, k: int
) -> Calls:
    """Start the core of a rank. arguments: of EngineArgs. port: as of `variables`. trie, width, k: of the search."""
    from grengines.vllm.core import VLLMCore
    from grengines.vllm.levels import Levels
    from grengines.vllm.searches import Searches

    core = VLLMCore(dict(arguments), variables(group.rank, group.size, port))
    core.model.pooler.levels = Levels(core.model, trie.on(device), width=width, k=k)
    searches = Searches(core)

    def admit(inputs: Sequence[Any], key: int, prompt: Int64Array) -> None:
        searches.admit(key, prompt)

    return {
        "admit": admit,
        "step": lambda inputs: searches.step(),
        "reset": lambda inputs: core.reset_prefix_cache(),
        "close": core.close,
    }
