"""Options of the pipeline. No torch import here: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grengines.options import option


@dataclass
class PipelineConfig:
    """Retrieve with one engine, rank with another. `retrieve` and `rank` are options of engines that can."""

    name: str = option("pipeline", "name of the engine", choices=["pipeline"])
    retrieve: Any = option(None, "options of the engine that retrieves: engine@engine.retrieve=hstu takes another")
    rank: Any = option(None, "options of the engine that ranks: engine@engine.rank=aoti takes another")
    if_missing: str | None = option(
        "hstu", "engine that retrieves if the package of retrieve's engine is not installed; the record reports it",
        choices=["hstu"],
    )  # fmt: skip


STAGES = {"retrieve": "generate", "rank": "rank"}  # the task that each stage's engine must have
