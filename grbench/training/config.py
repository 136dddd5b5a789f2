"""Configuration of a training. This module imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from grbench.config.schema import ConfigError, RetrievalConfig, checked
from grbench.config.schema import register_schemas as register_groups
from grbench.workloads.config import DrawnConfig
from grengines.models.decoder.config import DecoderConfig
from grengines.models.hstu.config import HSTUConfig, one_level_only, without_effect
from grengines.models.hstu.variant import DEFAULT, differing
from grengines.options import option

WEIGHTS, IDS = "weights.safetensors", "semantic_ids.safetensors"  # files of a training's folder


@dataclass
class TrainingConfig:
    """Options of the optimiser, the epochs and the choice of the best one."""

    epochs: int = option(40, "most passes over the training data", ge=1, le=100_000)
    patience: int = option(8, "validations without a better figure after which training stops", ge=1)
    minutes: float = option(
        0.0, "time for the epochs, the last one cut short, for their validations and for the test at the end, but at "
        "least one step; 0: no limit", ge=0,
    )  # fmt: skip
    validate_every: int = option(1, "epochs between two validations", ge=1)
    validation_users: int = option(5000, "users of a validation, to generate; 0: all", ge=0)
    batch: int = option(64, "users, or requests to rank, of a step", ge=1)
    rate: float = option(2e-3, "highest learning rate; it rises over the first twentieth and falls as a cosine", gt=0)
    weight_decay: float = option(0.05, "of AdamW", ge=0)
    dropout: float = option(0.2, "of the embeddings and of each layer's output", ge=0, le=0.95)
    smoothing: float = option(0.0, "share of a target that all codes of its level get, to generate", ge=0, le=0.9999)
    temperature: float = option(
        1.0, "divides the logits of the loss, to generate by item vectors; 0.05 suits model.item_norm", gt=0
    )
    average: float = option(
        0.0, "share that a moving average of the weights keeps at a step; 0: no average", ge=0, le=0.9999
    )
    crop: float = option(0.0, "share of an epoch's histories that begin at a random event, to generate", ge=0, le=1)
    blanks: float = option(0.0, "share of a history's items that are not read, to generate", ge=0, le=0.9999)
    teacher: str | None = option(
        None, "weights file of an HSTU of retrieval.levels=1; semantic IDs learn its probabilities of items beside the "
        "next item; null: none", file=True,
    )  # fmt: skip
    teacher_temperature: float = option(1.0, "divides the teacher's logits", gt=0)
    teacher_share: float = option(0.5, "share of the loss that follows the teacher", gt=0, le=1)
    negatives: int = option(
        0, "items drawn for the softmax of a step, to generate by item vectors; 0: the whole catalogue", ge=0
    )
    item_vectors: str | None = option(
        None, "weights file of retrieval.levels=1, whose item vectors make the semantic IDs; null: a truncated SVD of "
        "the training events", file=True,
    )  # fmt: skip

    @property
    def most_s(self) -> float:
        """The seconds of `minutes`, infinite without a limit."""
        return 60 * self.minutes or math.inf


@dataclass
class TrainConfig:
    """Root of the configuration. `python -m grbench train --cfg job` prints it."""

    model: Any = field(default_factory=dict)
    workload: Any = field(default_factory=dict)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    task: str = option("rank", "what the model learns", choices=["rank", "generate"])
    held_out: int = option(512, "to rank: last requests of the trace, which are not trained on", ge=1)
    device: str = option("auto", "auto: a GPU if there is one; a GPU computes in bf16", choices=["auto", "cuda", "cpu"])
    out: str | None = option(
        None, "folder for the weights; a training that was stopped goes on in it; null: a new folder in `output_root`"
    )
    seed: int = option(0, "seed of the weights, the trace and the order of the data", ge=0, le=2**31 - 1)
    tracking: Any = field(default_factory=dict)
    output_root: str = option("outputs", "folder for results and the MLflow database")


def register_schemas() -> None:
    """Register the dataclasses with Hydra. Safe to call twice."""
    register_groups()
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)


def to_config(cfg: DictConfig) -> TrainConfig:
    """Check a composed configuration. Raises as `checked`, and ConfigError for what cannot be trained."""
    config = checked(cfg, TrainConfig)
    if not isinstance(config.model, HSTUConfig) and (config.task == "rank" or config.retrieval.levels > 1):
        raise ConfigError(
            f"model={config.model.name}: a decoder learns task=generate retrieval.levels=1 only; set these, or use an "
            "HSTU model, such as model=hstu_tiny"
        )
    if isinstance(config.model, DecoderConfig) and config.model.vocabulary is not None:
        raise ConfigError(
            f"model.vocabulary={config.model.vocabulary}: training has a softmax over the codes of a level; allowed "
            "here is null"
        )
    if isinstance(config.model, HSTUConfig) and config.task == "rank" and (others := differing(config.model.choices)):
        raise ConfigError(
            f"{', '.join(others)}: rankers are trained as grbench's own HSTU only; set model.variant={DEFAULT}"
        )
    if isinstance(config.model, HSTUConfig) and config.task == "generate" and (idle := without_effect(config.model)):
        raise ConfigError(idle)
    if (
        isinstance(config.model, HSTUConfig)
        and config.task == "generate"
        and (problem := one_level_only(config.model, config.retrieval.levels))
    ):
        raise ConfigError(problem)
    if isinstance(config.workload, DrawnConfig):
        raise ConfigError(
            "workload=synthetic: its events are random, so there is nothing to learn; use ml_100k, csv or recbole"
        )
    if config.workload.stale_events:
        raise ConfigError(
            f"workload.stale_events={config.workload.stale_events}: training has every event before the one that it "
            "predicts; allowed here: 0"
        )
    if config.training.negatives and config.training.smoothing:
        raise ConfigError(
            f"training.negatives={config.training.negatives} and training.smoothing={config.training.smoothing}: a "
            "smooth target has a share of all items, not of drawn ones; set one of the two to 0"
        )
    return config


def unread(config: TrainConfig) -> dict[str, str]:
    """Return the options of the training that nothing reads, each with the reason and what changes it."""
    generates, levels = config.task == "generate", config.retrieval.levels
    return {
        f"training.{name}": f"it is for {where}; leave it out"
        for names, read, where in (
            (("smoothing", "crop", "blanks", "validation_users"), generates, "task=generate"),
            (("negatives", "temperature"), generates and levels == 1, "task=generate retrieval.levels=1"),
            (("item_vectors", "teacher"), generates and levels > 1, "task=generate with retrieval.levels above 1"),
            (("teacher_temperature", "teacher_share"), config.training.teacher is not None, "training.teacher=FILE"),
        )
        for name in names
        if not read
    }
