"""Reasons why an engine can't have what is asked for, whatever the machine and the data. No torch import here.

The config module of an engine has a function `contradiction`, which its EngineSpec names, and which uses these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from grengines.cache.config import CacheConfig, PagedCacheConfig, stored
from grengines.models.decoder.config import DecoderConfig
from grengines.models.hstu.config import HSTUConfig
from grengines.options import GraphOptions
from grkernels.families import AUTO


@dataclass(frozen=True)
class Asked:
    """Options beside an engine's own, and the task, by which it may be refused."""

    task: str
    model: HSTUConfig | DecoderConfig
    kernels: Mapping[str, str]  # the variant of each operator family
    cache: CacheConfig | PagedCacheConfig
    beam_tokens: int = 0  # codes that a search encodes behind its prompt, as far as the options say it


def cache_of_ranking(asked: Asked) -> str | None:
    """Return None, or why an engine that generates can't have the cache."""
    if isinstance(asked.cache, PagedCacheConfig) or asked.cache.item_memory_gb:
        pages = "; engine=vllm has engine.kv_cache_precision for its pages" if stored(asked.cache) else ""
        return f"cache={asked.cache.name}: the cache group serves ranking only; set cache=none{pages}"
    return None


def whole_histories(asked: Asked, engine: str) -> str | None:
    """Return None, or why an engine that computes whole histories can't have the cache."""
    if isinstance(asked.cache, PagedCacheConfig):
        return f"cache={asked.cache.name}: engine={engine} computes whole histories; set cache=none"
    if asked.cache.item_memory_gb:
        return (
            f"cache.item_memory_gb={asked.cache.item_memory_gb:g}: engine={engine} has the whole table on its device; "
            "set cache.item_memory_gb=0"
        )
    return None


def own_kernels(asked: Asked, engine: str, hint: str = "") -> str | None:
    """Return None, or why an engine with kernels of its own can't have the kernel variants."""
    if other := sorted(set(asked.kernels.values()) - {AUTO, "torch"}):
        return f"kernel={other[0]}: engine={engine} runs its own kernels; set kernel=auto{hint}"
    return None


def attention_of_ranking(asked: Asked) -> str | None:
    """Return None, or why an engine that generates can't have the variant of attention."""
    if asked.kernels.get("hstu_attention") == "fp8":
        return (
            "kernel.hstu_attention=fp8: engines that search can't have it; use engine=hstu with task=rank, or set "
            "kernel.hstu_attention=auto"
        )
    return None


def heads_over_ranks(ranks: int, model: HSTUConfig | DecoderConfig) -> str | None:
    """Return None, or why the heads of a model can't be shared by this number of processes."""
    counts = {"model.heads": model.heads}
    if isinstance(model, DecoderConfig):
        counts["model.kv_heads"] = model.kv_heads
    if wrong := [f"{name}={n}" for name, n in counts.items() if n % ranks]:
        fit = [n for n in range(1, model.heads + 1) if not any(count % n for count in counts.values())]
        return f"engine.tensor_parallel={ranks} and {', '.join(wrong)}: allowed are {', '.join(map(str, fit))}"
    return None


def graphs_on_cpu(options: GraphOptions) -> str | None:
    """Return None, or why a CPU that is asked for can't have the CUDA graphs that are."""
    if options.device == "cpu" and options.cuda_graphs == "true":
        return (
            "engine.cuda_graphs=true and engine.device=cpu: a CPU has no CUDA graphs; set engine.cuda_graphs=false, or "
            "engine.device=cuda"
        )
    return None
