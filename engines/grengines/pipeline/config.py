"""Options of the pipeline. No torch import here: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grengines.options import option


@dataclass
class PipelineConfig:
    """Retrieve with one engine, rank with another. `retrieve` and `rank` are options of engines that can."""

    name: str = option("pipeline", choices=["pipeline"])
    retrieve: Any = None
    rank: Any = None
    if_missing: str | None = option("hstu", choices=["hstu"])  # retrieves where retrieve's package isn't installed


STAGES = {"retrieve": "generate", "rank": "rank"}  # the task that each stage's engine must have
