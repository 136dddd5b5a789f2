"""Options of the native engine. No torch import here: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.models.hstu.config import HSTUConfig
from grengines.options import GraphOptions, option
from grengines.refusals import Asked, graphs_on_cpu


@dataclass
class HSTUEngineConfig(GraphOptions):
    """The native engine: HSTU in PyTorch with the kernel variants that the `kernel` group names."""

    name: str = option("hstu", "name of the engine")
    candidate_microbatch: int = option(
        0, "M-FALCON: prefill once, then rank this many candidates at a time; 0: all in one pass", ge=0
    )


def contradiction(options: HSTUEngineConfig, asked: Asked) -> str | None:
    """Return None, or which options of the engine, the model and the cache exclude each other."""
    size, cache, model = options.candidate_microbatch, asked.cache, asked.model
    assert isinstance(model, HSTUConfig), "the registry refuses other models"
    if problem := graphs_on_cpu(options):
        return problem
    if asked.task == "generate":
        return f"engine.candidate_microbatch={size} is for ranking; set it to 0" if size else None
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
