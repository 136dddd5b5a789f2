"""Overrides that are offered to a person: the shell and Hydra read from them what was meant."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from grbench.config.compose import compose_spec
from grbench.training.session import _command
from grengines.models.hstu.config import HSTUConfig
from grengines.overrides import override, quoted
from grengines.remote.served import differences, overrides

ODD = 'a b, c=[1]{2}(3), it\'s "new"\\'


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
    ],
)
def test_an_override_gives_the_text(text: str) -> None:
    [word] = typed_again([override("model.weights", text)])
    assert OverridesParser.create().parse_override(word).value() == text


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
