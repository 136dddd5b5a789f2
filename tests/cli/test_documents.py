"""Commands and programs that the documentation and --help show: they are accepted, and what they name exists."""

from __future__ import annotations

import importlib
import itertools
import re
import shlex
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import beauty
from helpers.cells import write_cell
from helpers.checkout import ROOT, files

import grbench
from grbench import cli
from grbench.cachesim import config as cachesim
from grbench.completion import HYDRA
from grbench.config.arguments import CommandError
from grbench.config.compose import compose_jobs, compose_spec, prepare_hydra
from grbench.config.schema import to_spec
from grbench.config.unread import unread
from grbench.kernelbench import config as kernels
from grbench.quality import trained
from grbench.serve import load
from grbench.serve.options import parse
from grbench.subcommands import SUBCOMMANDS
from grbench.training import config as training
from grbench.tune import config as tune

# Pages of kept reports have the commands of their records, which an earlier version took.
PAGES = [path for path in files("*.md") if not re.fullmatch(r"CHANGELOG\.md|reports/\w+/README\.md", path)]
NATIVE = {"overhead", "export", "build-plan"}  # commands whose settings are those of the native engine
CONFIGS = {"kernels": (kernels, "kernelbench"), "cachesim": (cachesim, "cachesim"), "train": (training, "train")}
RECBOLE = "user_id:token\titem_id:token\ttimestamp:float\n"  # the head of a file
_COMMAND = re.compile(r"^ {4}((?:python -m )?grbench(?: .*)?)$|`((?:python -m )?grbench [^`\n]+)`", re.MULTILINE)
_PROGRAM = re.compile(r"(?:^ {4}|`)python (experiments/\w+\.py)\b([^`#\n]*)", re.MULTILINE)
_PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"=([\w./-]+\.(csv|txt|inter|parquet|safetensors)|FILE)$")


def commands(text: str) -> list[tuple[str, ...]]:
    """Words behind `grbench` of each command in a page. Names in a sentence, and placeholders, are left out."""
    found = _COMMAND.findall(text.replace("\\\n", " "))
    lines = [block or span for block, span in found if block or not re.fullmatch(r".*grbench [a-z-]+", span)]
    words = [
        shlex.split(line, comments=True)
        for line in lines
        if not re.search(r"\.\.\.|NAME|SUBCOMMAND|grbench: |->|\w\|", line)
    ]
    return [tuple(line[line.index("grbench") + 1 :]) for line in words]


def first_of(overrides: list[str]) -> list[str]:
    """Return the overrides of a sweep's first cell. test_studies.py composes all cells of studies."""
    one_cell = ["hydra.mode=RUN"] if any(word.startswith("study=") for word in overrides) else []
    return [*(word if re.search(r"[\[(]", word) else word.partition(",")[0] for word in overrides), *one_cell]


def check(words: Sequence[str]) -> None:
    """Raise an error unless grbench accepts the command: of a sweep, its first cell is composed.

    The files that it names are made in the current folder.
    """
    name, rest = (words[0], words[1:]) if words and words[0] in SUBCOMMANDS else ("", words)
    if name and name not in HYDRA:
        module, _, function = SUBCOMMANDS[name].target.partition(":")
        parser = getattr(
            importlib.import_module(module), "parser" if function == "main" else f"{function.rstrip('_')}_parser"
        )()
        if "--help" in rest:
            return
        rest = getattr(parser.parse_intermixed_args(rest), "overrides", [])
    given = [word for word in rest if word not in ("-m", "--help", "--cfg", "job", "--version")]
    for i in [i for i, word in enumerate(given) if word == "--config-dir"]:
        Path(given[i + 1]).mkdir(exist_ok=True)
    overrides = [word for word in given if "=" in word]
    stray = [word for word in given if "=" not in word and word != "--config-dir" and not Path(word).is_dir()]
    assert not stray, f"{stray}: neither flags nor KEY=VALUE"
    for file in (Path(word.partition("=")[2]) for word in overrides if _FILE.search(word)):
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists() or file.suffix == ".csv":
            named = [word.partition("=")[2] for word in overrides if "_column=" in word]
            head = ",".join(["userId", "movieId", "rating", "timestamp", *named])
            file.write_text(RECBOLE if file.suffix == ".inter" else f"{head}\n")
    if name == "serve":
        overrides = parse(overrides)[2]
    elif name == "load":
        overrides = load.as_run(overrides)
    elif name == "evaluate":
        overrides, _ = trained.as_run(overrides)
    if name in CONFIGS:
        module, config = CONFIGS[name]
        module.register_schemas()
        compose_jobs(config, module.to_config, first_of(overrides))
    elif name == "tune":
        tune.declare(overrides)
    elif overrides:
        compose_spec(first_of(["engine=hstu", *overrides] if name in NATIVE else overrides), refuse_unread=True)


def check_all(pages: dict[tuple[str, ...], str]) -> None:
    """Raise an AssertionError that names the page and the command of the first one that is not accepted."""
    for words, page in pages.items():
        try:
            check(words)
        except (AssertionError, ValueError) as e:
            raise AssertionError(f"{page}: grbench {' '.join(words)}: {e}") from e


def test_the_commands_of_the_documentation_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    beauty.stand_ins(tmp_path)
    pages = {words: page for page in PAGES for words in commands((ROOT / page).read_text())}
    assert len(pages) > 80 and {"deployment/README.md", "README.md", "docs/TUNING.md"} <= set(PAGES)
    check_all(pages)


def test_the_examples_of_every_help_are_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    examples = {}
    for name in SUBCOMMANDS:
        try:
            assert cli.main([name, "--help"]) == 0
        except SystemExit as ended:
            assert ended.code == 0
        lines = re.findall(r"^ *(python -m grbench\b.*)", capsys.readouterr().out, re.MULTILINE)
        # Hydra's help has the meaning of a command behind it, after spaces.
        lines = [re.sub(r" {2,}.*", "", line) if name in HYDRA else line for line in lines]
        examples |= {words: f"{name} --help" for line in lines for words in commands(f"    {line}")}
    assert set(SUBCOMMANDS) - {"run"} <= {words[0] for words in examples if words}
    check_all(examples)


def test_wrong_commands_are_found() -> None:
    text = (
        "    python -m grbench -m engine=hstu,hf   # two\n\n`grbench report outputs --outt x`, `grbench`\n\n"
        "    $ grbench engine=none\n    grbench: engine=none: no such\n\n    grbench kernels \\\n     dtype=fp7\n"
        "    grbench engine=hstu   one run\n    grbench tune   on this machine\n"
    )
    found = commands(text)
    assert found[0] == ("-m", "engine=hstu,hf")
    assert found[1:3] == [("report", "outputs", "--outt", "x"), ("kernels", "dtype=fp7")]
    check(found[0])
    with pytest.raises(CommandError, match="--outt"):
        check(found[1])
    with pytest.raises(ValueError, match="fp7"):
        check(found[2])
    with pytest.raises(AssertionError, match="'one', 'run'"):
        check(found[3])
    with pytest.raises(AssertionError, match="'this', 'machine'"):
        check(found[4])


def test_programs_know_the_flags_that_the_documentation_gives_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """experiments/README.md has all programs; test_studies.py composes what it gives them."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    calls = {call: page for page in PAGES for call in _PROGRAM.findall((ROOT / page).read_text())}
    assert len(calls) > 10
    for (path, arguments), page in calls.items():
        with pytest.raises(SystemExit):
            importlib.import_module(Path(path).stem).main(["--help"])
        known = set(re.findall(r"(?<![\w-])--[\w-]+", capsys.readouterr().out))
        assert set(re.findall(r"(?<!\S)--[\w-]+", arguments)) <= known, f"{page}: python {path}{arguments}"


def test_targets_of_make_and_extras_of_pip_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    found = {"make": set[str](), "pip": set[str]()}
    for path in files("*.md", "*.py", "*.ipynb", "*.yaml", "*.yml"):
        text = (ROOT / path).read_text()
        named = set(re.findall(r"`make ([a-z][a-z-]*)", text))
        named |= set(re.findall(r"^ {4}make ([a-z][a-z-]*)", text, re.MULTILINE)) if path in PAGES else set()
        wanted = set(re.findall(r"(?<![\w.])grbench\[([\w,]+)\]", text))
        assert named <= targets, f"{path}: no target {named - targets} in the Makefile"
        assert {extra for each in wanted for extra in each.split(",")} <= extras, f"{path}: {wanted}"
        found["make"] |= named
        found["pip"] |= wanted
    assert len(found["make"]) > 8 and len(found["pip"]) > 2


def test_the_programs_of_the_documentation_are_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Programs with the Python API run: their cells are composed, and have the records of other cells."""
    monkeypatch.chdir(tmp_path)
    numbers = itertools.count()
    prepare_hydra()

    def run(overrides: Sequence[str], *, sweep: bool = False) -> list[grbench.RunRecord]:
        folders = (
            tmp_path / "outputs" / str(next(numbers))
            for _ in compose_jobs("config", to_spec, overrides, sweep, unread=unread)
        )
        return [write_cell(folder, f"seed={folder.name}") for folder in folders]

    monkeypatch.setattr(grbench, "run", run)
    ran = 0
    for page in PAGES:
        for text in _PYTHON.findall((ROOT / page).read_text()):
            program = compile(text, page, "exec")
            if "grbench.run(" in text:
                names: dict[str, Any] = {}
                exec(program, names)
                assert len(names.get("frame", names.get("cells"))) >= 1
                ran += 1
    assert ran == 2 and capsys.readouterr().out.startswith("OK ")
