"""Options of the native engine. No torch import here: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.cache.config import CacheConfig, PagedCacheConfig
from grengines.last_layer import LastLayer
from grengines.models.hstu.config import HSTUConfig
from grengines.options import TENSOR_PARALLEL, BucketOptions, option
from grengines.refusals import Asked, attention_of_ranking, graphs_on_cpu, heads_over_ranks

FP8_STEP = 16  # as grkernels.fp8.STEP
ROW_STEP = 8  # numbers of half precision in a piece of grkernels.parts


@dataclass
class HSTUEngineConfig(BucketOptions):
    """The native engine: HSTU in PyTorch with the kernel variants that the `kernel` group names."""

    name: str = option("hstu", "name of the engine")
    precision: str = option(
        "auto",
        "auto: bf16 on cuda, fp32 on cpu; fp8: products in e4m3, all else in bf16; a cpu emulates it, slowly",
        choices=["auto", "fp32", "fp16", "bf16", "fp8"],
    )
    tensor_parallel: int = option(1, TENSOR_PARALLEL, ge=1, le=64)
    item_shards: int = option(
        1, "GPUs, from the engine's on, that share the rows of the token table; all but the first only hold them; a "
        "CPU only checks answers", ge=1, le=64,
    )  # fmt: skip
    candidate_microbatch: int = option(
        0, "M-FALCON: prefill once, then rank this many candidates at a time; 0: all in one pass", ge=0
    )


def contradiction(options: HSTUEngineConfig, asked: Asked) -> str | None:
    """Return None, or which options of the engine, the model and the cache exclude each other."""
    size, cache, model = options.candidate_microbatch, asked.cache, asked.model
    assert isinstance(model, HSTUConfig), "the registry refuses other models"
    if problem := graphs_on_cpu(options):
        return problem
    if options.precision == "fp8" and (problem := without_fp8(asked.task, model)):
        return problem
    if options.tensor_parallel > 1 and (
        problem := heads_over_ranks(options.tensor_parallel, model) or _one_rank_only(options, cache)
    ):
        return problem
    if options.item_shards > 1 and (problem := _whole_table(options, asked.task, model)):
        return problem
    if asked.task == "generate":
        if size:
            return f"engine.candidate_microbatch={size} is for ranking; set it to 0"
        return attention_of_ranking(asked)
    if options.cuda_graphs == "true" and size:
        return (
            f"engine.cuda_graphs=true and engine.candidate_microbatch={size}: graphs hold one pass over all "
            "candidates; set cuda_graphs=false or candidate_microbatch=0"
        )
    choices = model.choices
    if size and choices.time_bias:
        return (
            f"engine.candidate_microbatch={size} and model.time_bias={choices.time_bias}: kept keys have no times; "
            "set engine.candidate_microbatch=0"
        )
    if size % choices.target_group_size:
        return (
            f"engine.candidate_microbatch={size} would split groups of model.target_group_size="
            f"{choices.target_group_size} candidates; allowed are its multiples"
        )
    if cache.item_memory_gb and choices.item_tower == "table":
        return (
            f"cache.item_memory_gb={cache.item_memory_gb:g} and model.item_tower=table: both tables are on the device; "
            "set cache.item_memory_gb=0"
        )
    return None


def last_layer(options: HSTUEngineConfig, task: str) -> LastLayer:
    """Return the rows that the last layer computes. In slices the history has none, and all other rows are read."""
    return LastLayer.READ if task == "generate" or options.candidate_microbatch else LastLayer.HALF


def graphs_asked(options: HSTUEngineConfig) -> str:
    """Return true, false or auto for the CUDA graphs of a GPU: several ranks have none unless they are named."""
    asked = options.cuda_graphs
    return "false" if asked == "auto" and options.tensor_parallel > 1 else asked


def _one_rank_only(options: HSTUEngineConfig, cache: CacheConfig | PagedCacheConfig) -> str | None:
    """Return None, or which options an engine of several ranks lacks."""
    asked = f"engine.tensor_parallel={options.tensor_parallel}"
    if options.precision == "fp8":
        return f"engine.precision=fp8 and {asked}: norms over several ranks write no e4m3; set engine.precision=bf16"
    if cache.item_memory_gb:
        return f"cache.item_memory_gb={cache.item_memory_gb:g} and {asked}: each rank has all item vectors; set it to 0"
    if isinstance(cache, PagedCacheConfig) and cache.host_gb:
        return f"cache.host_gb={cache.host_gb:g} and {asked}: pages of several ranks have no host tier; set it to 0"
    return None


def _whole_table(options: HSTUEngineConfig, task: str, model: HSTUConfig) -> str | None:
    """Return None, or which options need the whole token table on the engine's GPU."""
    asked = f"engine.item_shards={options.item_shards}"
    if task == "generate":
        return f"{asked} is for ranking: a search reads its token table as a matrix; set it to 1"
    if options.tensor_parallel > 1:
        return (
            f"{asked} and engine.tensor_parallel={options.tensor_parallel}: each rank has all item vectors; set one of "
            "them to 1"
        )
    if model.choices.item_tower == "table":
        return f"{asked} and model.item_tower=table: only the token table is shared; set engine.item_shards=1"
    if model.embedding_dim % ROW_STEP:
        return (
            f"{asked} and model.embedding_dim={model.embedding_dim}: allowed are multiples of {ROW_STEP}; set "
            "engine.item_shards=1"
        )
    return None


def without_fp8(task: str, model: HSTUConfig, flag: str = "engine.precision=") -> str | None:
    """Return None, or why the engine can't have products in fp8. flag: how the user writes a precision."""
    if task == "generate":
        return f"{flag}fp8 is for ranking; set {flag}bf16, or task=rank"
    widths = {
        "model.embedding_dim": model.embedding_dim,
        "model.heads x model.v_dim": model.heads * model.v_dim,
        "model.heads x model.qk_dim": model.heads * model.qk_dim,
        "model.head_dim": model.head_dim,
    }
    if wrong := [f"{name}={width}" for name, width in widths.items() if width % FP8_STEP]:
        return (
            f"{flag}fp8 and {', '.join(wrong)}: allowed are multiples of {FP8_STEP}, which the products of "
            f"tensor cores take; set {flag}bf16"
        )
    return None
