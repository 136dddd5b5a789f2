"""Commands that the documentation shows: their settings compose, and their flags exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from helpers.checkout import ROOT

from grbench import cli
from grbench.cachesim import config as cachesim
from grbench.config.compose import compose_cells, compose_jobs
from grbench.kernelbench import config as kernels
from grbench.serve.load import as_run
from grbench.serve.options import parse
from grbench.subcommands import SUBCOMMANDS
from grbench.training import config as training
from grbench.tune import config as tune

PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "experiments/README.md",
    *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
]
NATIVE = {"overhead", "export", "build-plan"}  # commands whose settings are those of the native engine
CONFIGS = {"kernels": (kernels, "kernelbench"), "cachesim": (cachesim, "cachesim"), "train": (training, "train")}
_COMMAND = re.compile(r"^ {4}((?:python -m )?grbench(?: .*)?)$|`((?:python -m )?grbench [^`\n]+)`", re.MULTILINE)
_FILE = re.compile(r"=[\w./-]+\.(csv|txt|inter|parquet|safetensors)$")


def commands(text: str) -> list[tuple[str, ...]]:
    """Words behind `grbench` of each command in a page. Commands with a placeholder are left out."""
    lines = [block or span for block, span in _COMMAND.findall(text.replace("\\\n", " "))]
    words = [shlex.split(line, comments=True) for line in lines if not re.search(r"\.\.\.|NAME|grbench: ", line)]
    return [tuple(line[line.index("grbench") + 1 :]) for line in words]


def first_of(overrides: list[str]) -> list[str]:
    """Return the overrides of a sweep's first cell. test_studies.py composes all cells of studies."""
    one_cell = ["hydra.mode=RUN"] if any(word.startswith("study=") for word in overrides) else []
    return [*(word if re.search(r"[\[(]", word) else word.partition(",")[0] for word in overrides), *one_cell]


def check(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Raise an error unless grbench accepts the command: of a sweep, its first cell is composed.

    The files that it names are made in the current folder.
    """
    name, rest = (words[0], words[1:]) if words and words[0] in SUBCOMMANDS else ("", words)
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    flags = {word for word in rest if re.match(r"-+[a-z]", word)}
    for file in (Path(word.partition("=")[2]) for word in overrides if _FILE.search(word)):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    if name == "serve":
        overrides = parse(overrides)[2]
    elif name == "load":
        overrides = as_run(overrides)
    if name in CONFIGS:
        module, config = CONFIGS[name]
        module.register_schemas()
        compose_jobs(config, module.to_config, first_of(overrides))
    elif name == "tune":
        tune.declare(overrides)
    elif overrides:
        compose_cells(first_of(["engine=hstu", *overrides] if name in NATIVE else overrides))
    if own := flags - {"-m", "--cfg", "--help"}:
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        unknown = own - set(re.findall(r"(?<![\w-])--?[\w-]+", capsys.readouterr().out))
        assert not unknown, f"no such flags: {unknown}"


def test_the_commands_of_the_documentation_are_accepted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pages = {words: page for page in PAGES for words in commands((ROOT / page).read_text())}
    assert len(pages) > 20
    for words, page in pages.items():
        try:
            check(words, capsys)
        except (AssertionError, ValueError) as e:
            raise AssertionError(f"{page}: grbench {' '.join(words)}: {e}") from e


def test_wrong_commands_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        "    python -m grbench -m engine=hstu,hf   # two\n\n`grbench report outputs --outt x`, `grbench`\n\n"
        "    $ grbench engine=none\n    grbench: engine=none: no such\n\n    grbench kernels \\\n     dtype=fp7\n"
    )
    found = commands(text)
    assert found[0] == ("-m", "engine=hstu,hf")
    assert found[1:] == [("report", "outputs", "--outt", "x"), ("kernels", "dtype=fp7")]
    check(found[0], capsys)
    with pytest.raises(AssertionError, match="--outt"):
        check(found[1], capsys)
    with pytest.raises(ValueError, match="fp7"):
        check(found[2], capsys)
