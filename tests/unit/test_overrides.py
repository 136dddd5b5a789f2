"""Overrides that are offered to a person: the shell and Hydra read from them what was meant."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from grbench import deployment
from grbench.config.compose import compose_many, compose_spec, plan_jobs
from grbench.config.schema import to_spec
from grbench.importing import output
from grbench.importing.parts import Imported
from grbench.report.frame import ReportError, read_cells
from grbench.training.session import _command
from grbench.tune import deploy
from grengines.models.hstu.config import HSTUConfig
from grengines.overrides import override, quoted
from grengines.remote.served import differences, overrides

ODD = 'a b, c=[1]{2}(3), it\'s "new" ${seed}\\${seed}\\'


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in a folder with an odd name, below the working folder."""
    monkeypatch.chdir(tmp_path)
    file = Path(ODD, "weights.safetensors")
    file.parent.mkdir()
    file.touch()
    return file


def typed_again(words: list[str]) -> list[str]:
    """Return words as they arrive when someone copies them to a shell."""
    return shlex.split(shlex.join(words))


@pytest.mark.parametrize(
    "text",
    [
        ODD,
        "w.safetensors",
        "../out/w",
        "",
        " a ",
        "a:b",
        "~/w",
        "null",
        "Inf",
        "12",
        "1e3",
        ".5",
        "\\",
        'a\\"',
        "ü",
        "'",
        "${seed}",
        "${",
        "$${seed}$",
        "\\\\${seed",
        '${seed}"\\',
    ],
)
def test_an_override_gives_the_text(text: str) -> None:
    [found] = compose_many([typed_again([override("model.weights", text)])])
    assert not isinstance(found, str), found
    assert found.model.weights == text


def test_a_run_keeps_its_overrides_as_they_were_typed() -> None:
    typed = ["engine=hstu", override("runner.output_root", "/o ${z}"), "seed=${warmup_batches}"]
    [job] = plan_jobs("config", to_spec, typed)[1]
    assert list(job.overrides) == typed and job.config[1].runner.output_root == "/o ${z}"


def test_a_usual_path_has_no_quotes() -> None:
    for path in ("outputs/ranker/weights.safetensors", "/a/b-c_1.0+2@x.parquet", "weights.safetensors", "./w", "nano"):
        assert quoted(path) == path


def test_weights_of_a_server_are_asked_for_whatever_their_path(weights: Path) -> None:
    spec, _ = compose_spec([])
    strategy = {"weights": str(weights), "model": spec.model.name}
    status: dict[str, Any] = {"task": "rank", "workload": "synthetic", "strategies": [strategy]}
    asked = differences(status, "rank", None, 0, spec.seed, spec.model, spec.retrieval)
    again, _ = compose_spec(typed_again(overrides(asked)))
    assert cast(HSTUConfig, again.model).weights == str(weights)


def test_the_command_of_a_training_runs_what_it_wrote_wherever_that_is(weights: Path) -> None:
    config = SimpleNamespace(model=HSTUConfig(), task="rank")
    job = SimpleNamespace(overrides=["workload=synthetic", 'model.name="a b"'])
    words = shlex.split(_command(cast(Any, config), cast(Any, job), weights.parent, None))
    assert words[:3] == ["python", "-m", "grbench"]
    spec, _ = compose_spec(words[3:])
    assert (spec.model.name, cast(HSTUConfig, spec.model).weights) == ("a b", str(weights))


def test_the_command_of_a_report_writes_where_records_are_looked_for(weights: Path) -> None:
    folder = weights.parent / "none"
    with pytest.raises(ReportError, match="no such folder") as refused:
        read_cells([folder])
    _, run = compose_spec(shlex.split(str(refused.value).split("`")[1])[3:])
    assert run.runner.output_root == str(folder)


def test_a_deployment_has_the_files_of_its_search_wherever_they_are(weights: Path) -> None:
    declared = cast(Any, SimpleNamespace(task="rank", config_dir=None))
    words = deploy._from_anywhere(["engine=hstu", override("model.weights", str(weights))], declared)
    file = weights.parent / "best.yaml"
    made = deployment.Strategy("ranker", words)
    step = deployment.Step("short", max_history=8, loss={"auc_loss": 0.1}, record=str(weights.parent.absolute()))
    deployment.save(deployment.Deployment(1, "rank", {}, [made], [step]), file)
    found = deployment.load(file)
    spec, _ = compose_spec(found.strategies[0].overrides)
    assert cast(HSTUConfig, spec.model).weights == str(weights.absolute())
    assert found.degrade == [step]


def test_imported_weights_are_found_wherever_they_are(weights: Path) -> None:
    """The command of an import has their name, and a YAML file beside them their path."""
    (weights.parent / "model").mkdir()
    made = output.write(Imported({}, {}, "hstu"), weights)
    spec, _ = compose_spec([f"model={made.stem}"], str(weights.parent))
    assert cast(HSTUConfig, spec.model).weights == str(weights.absolute())
