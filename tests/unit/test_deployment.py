"""Deployment files: they are read as they were written, and wrong ones are refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from grbench.config.schema import ConfigError
from grbench.deployment import Certified, Deployment, Figure, Serves, Step, Strategy, load, save

WHOLE = Deployment(
    version=1,
    task="rank",
    limits={"latency_ms.p99": 80.0, "quality.auc_loss_pct": 0.1, "memory_gb": 60.0},
    strategies=[
        Strategy(
            "graphs",
            ["engine=hstu", "workload=synthetic", "scenario.max_batch=16"],
            Certified(1490.0, {"p99": Figure(71.5, 69.0, 74.5)}, {"auc_loss_pct": 0.02}, 12.5, "outputs/1/record.json"),
            Serves(min_history=0, max_history=4096, max_candidates=2048),
        ),
        Strategy("eager", ["engine=hstu", "workload=synthetic", "kernel=torch"]),
    ],
    degrade=[
        Step("half the candidates", max_candidates=1024, loss={"auc_loss_pct": 0.3}),
        Step("last state", stale_state=True),
        Step("eager kernels", strategy="eager"),
    ],
)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    save(WHOLE, tmp_path / "best.yaml")
    assert load(tmp_path / "best.yaml") == WHOLE


def test_a_figure_of_0_is_kept(tmp_path: Path) -> None:
    step = Step("short", max_history=8, loss={"auc_loss": 0.0}, intervals={"auc_loss": [0.0, 0.0]})
    strategy = Strategy("a", ["engine=hstu"], Certified(quality={"auc_loss_pct": 0.0}))
    whole = Deployment(1, "rank", strategies=[strategy], degrade=[step])
    save(whole, tmp_path / "best.yaml")
    assert load(tmp_path / "best.yaml") == whole


def test_every_strategy_is_composed() -> None:
    specs = WHOLE.specs()
    assert list(specs) == ["graphs", "eager"]
    assert specs["graphs"].scenario.max_batch == 16
    assert specs["eager"].kernel.name == "torch"
    assert {spec.task for spec in specs.values()} == {"rank"}


def changed(**values: Any) -> dict[str, Any]:
    simple: dict[str, Any] = {"version": 1, "task": "rank", "strategies": [{"name": "a", "overrides": ["engine=hstu"]}]}
    return simple | values


@pytest.mark.parametrize(
    "content, words",
    [
        (changed(version=2), "version=2: allowed is int >= 1 and <= 1"),
        ({"task": "rank"}, "version: a value is needed"),
        (changed(task="score"), "task=score: allowed is one of rank, generate, recommend"),
        (changed(limit={}), "limit: no such key; nearest: limits"),
        (changed(limits={"p99": 80}), "limits.p99: no such limit; allowed are such as latency_ms.p99"),
        (changed(limits={"latency_ms.p99": -1}), "limits.latency_ms.p99=-1.0: allowed is float > 0"),
        (changed(limits={"latency_ms.p99": "fast"}), "fast"),
        (changed(strategies=[]), "strategies: none; at least one is needed"),
        (changed(strategies=[{"name": "a"}]), "strategies[0].overrides: none"),
        (changed(strategies=[{"overrides": ["engine=hstu"]}]), "strategies[0].name: a value is needed"),
        (changed(strategies=2 * [{"name": "a", "overrides": ["engine=hstu"]}]), "two have the name a"),
        (changed(strategies=[{"name": "a", "overrides": ["engine=hstu"], "serves": {"max_history": -1}}]),
         "strategies[0].serves.max_history=-1: allowed is int or null >= 0"),
        (changed(strategies=[{"name": "a", "overrides": ["task=rank"]}]), "task= is the deployment's own key"),
        (changed(degrade=[{"name": "x"}]), "degrade[0]: no change; a step has one of max_candidates"),
        (changed(degrade=[{"name": "x", "strategy": "b"}]), "degrade[0].strategy=b: allowed are a"),
        (changed(degrade=[{"name": "x", "max_history": 5, "max_candidates": 5}]), "max_candidates and max_history"),
        (changed(config_dir="own"), "config_dir=own: allowed is the absolute path of a folder that exists"),
        (changed(config_dir="/no/such/folder"), "config_dir=/no/such/folder: allowed is the absolute path of a folder"),
        (["engine=hstu"], "not a deployment; it is a mapping with the keys version, task, limits"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, content: Any, words: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as refused:
        load(path)
    assert words in str(refused.value)
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["engine=hstuu"], "strategies[1].overrides: engine=hstuu: no such option; nearest: hstu; allowed: "),
        (["engine=hf"], "strategies[1].overrides: task=rank: engine hf can't"),
        (["engine=hstu", "scenario.max_batch=0"], "scenario.max_batch=0: allowed is int >= 1"),
        (["engine=hstu", "workload=synthetic"], "the workload differs from that of strategy a"),
        (["engine=hstu", "model.tasks=[liked]"], "model.tasks=[liked] differs from that of strategy a"),
    ],
)
def test_wrong_overrides_name_the_strategy(overrides: list[str], words: str) -> None:
    two = Deployment(1, "rank", strategies=[Strategy("a", ["engine=hstu"]), Strategy("b", overrides)])
    with pytest.raises(ConfigError) as refused:
        two.specs("best.yaml")
    assert words in str(refused.value)
    assert str(refused.value).startswith("best.yaml: ")


@pytest.mark.parametrize("text", ["a: [", "\x00", "!!python/object/apply:os.getcwd []"])
def test_text_that_is_no_safe_yaml_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ConfigError, match="not YAML"):
        load(tmp_path / "wrong.yaml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file or directory; give a deployment file"):
        load(tmp_path / "none.yaml")


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="strategies: none"):
        save(Deployment(1, "rank"), tmp_path / "best.yaml")
    assert not list(tmp_path.iterdir())
