"""Options of the engine that generates through vLLM. No vLLM or torch import here: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.cache.config import EIGHT_BITS
from grengines.models.decoder.config import DecoderConfig
from grengines.models.hstu.config import HSTUConfig
from grengines.options import GRAPHS, TENSOR_PARALLEL, WITH_GRAPHS, GraphOptions, option
from grengines.refusals import Asked, attention_of_ranking, graphs_on_cpu, heads_over_ranks


@dataclass
class VLLMEngineConfig(GraphOptions):
    """vLLM's scheduler, paged cache and prefix caching over HSTU or a decoder; in the worker's own process."""

    name: str = option("vllm", "name of the engine")
    tensor_parallel: int = option(1, TENSOR_PARALLEL, ge=1, le=64)
    gpu_memory_utilization: float = option(
        0.8, "share of the GPU for weights and pages; the reference and other engines need the rest", gt=0, le=1,
        only_with={"device": ("auto", "cuda")},
    )  # fmt: skip
    kv_cache_gb: float = option(
        1.0, "memory for pages on a CPU, 10^9 bytes", gt=0, only_with={"device": ("auto", "cpu")}
    )
    kv_cache_precision: str = option(
        "engine", "keys and values in pages: as the engine computes them, or for HSTU 8 bits with a scale for each "
        "token and head; int8 is the more exact of the two", choices=["engine", *EIGHT_BITS],
    )  # fmt: skip
    kv_blocks: int = option(0, "pages; 0: as many as fit the memory", ge=0)
    block_size: int = option(64, "tokens of a page, a power of two; a prefix hits in whole pages", ge=16, le=256)
    max_num_seqs: int = option(0, "searches in flight, for which a captured step has room; 0: scenario.max_batch", ge=0)
    max_num_batched_tokens: int = option(
        0,
        "most tokens of a step; longer prompts are read in chunks; 0: 8192, and on cuda room for half a batch of the "
        "longest prompts, at least 8192 and at most 32768",
        ge=0,
    )
    async_scheduling: bool = option(
        True, "prepare a step while the device computes the one before; tensor_parallel above 1 never does"
    )
    prefix_caching: bool = option(True, "find the pages of a prompt that earlier requests began with")
    chunked_prefill: bool = option(True, "read a prompt in several steps if one has no room for it")
    cuda_graphs: str = option(
        "auto",
        "graphs of steps of prompts, and of all levels of a search; auto: on cuda with one rank, where the kernels can "
        "be captured (hstu_attention: triton or cutlass)",
        choices=GRAPHS,
    )
    graph_tokens: list[int] = option(
        [], "sizes of steps to capture, in tokens; empty: 16 to 2048, and with HSTU up to 8192 for a batch of prompts "
        "of median length, as the memory allows", ge=1, only_with=WITH_GRAPHS,
    )  # fmt: skip


def stored(options: VLLMEngineConfig) -> str:
    """Return int8 or fp8 for pages in 8 bits, and "" for pages in the engine's precision."""
    return options.kv_cache_precision if options.kv_cache_precision in EIGHT_BITS else ""


def contradiction(options: VLLMEngineConfig, asked: Asked) -> str | None:
    """Return None, or which options of the engine and the model exclude each other."""
    model = asked.model
    if options.block_size & (options.block_size - 1):
        return f"engine.block_size={options.block_size}: must be a power of two"
    if isinstance(model, HSTUConfig) and model.qk_dim != model.v_dim:
        return (
            f"model.qk_dim={model.qk_dim}, model.v_dim={model.v_dim}: engine vllm needs them equal, "
            "because a page holds both in rows of one size; set both to one value"
        )
    if stored(options) and isinstance(model, DecoderConfig):
        return (
            f"engine.kv_cache_precision={options.kv_cache_precision} and model={model.name}: the attention of decoders "
            "reads no scales of pages; set engine.kv_cache_precision=engine, or a model of HSTU"
        )
    if problem := graphs_on_cpu(options) or attention_of_ranking(asked) or _short_steps(options, asked):
        return problem
    return _over_ranks(options, asked) if options.tensor_parallel > 1 else None


def _short_steps(options: VLLMEngineConfig, asked: Asked) -> str | None:
    """Return None, or why a step can't have a search whole, whose prompt has at least one token.

    The engine knows the longest prompt of the workload, and asks for more.
    """
    tokens, beams = options.max_num_batched_tokens, asked.beam_tokens if isinstance(asked.model, DecoderConfig) else 0
    if options.chunked_prefill or not 0 < tokens < beams + 2:
        return None
    return (
        f"engine.max_num_batched_tokens={tokens} and engine.chunked_prefill=false: a step holds a whole search, so "
        f"the least value is {beams + 2}, and more for longer prompts; set it to 0, or engine.chunked_prefill=true"
    )


def _over_ranks(options: VLLMEngineConfig, asked: Asked) -> str | None:
    """Return None, or why the model can't be on several ranks."""
    over = f"engine.tensor_parallel={options.tensor_parallel}"
    if isinstance(asked.model, HSTUConfig):
        return f"{over} and model={asked.model.name}: engine vllm shares decoders only; set engine=hstu for this model"
    if options.cuda_graphs == "true":
        return f"engine.cuda_graphs=true and {over}: ranks launch kernels one by one; set engine.cuda_graphs=false"
    return heads_over_ranks(options.tensor_parallel, asked.model)
