"""Checks of the project's language: words, the form of Markdown, the form of docstrings.

docs/DEVELOPMENT.md has the style guide that these checks keep. A failure names the file, the line and a better word.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.checkout import ROOT, files

TEXT = {".py", ".md", ".yaml", ".yml", ".ipynb", ".sh", ".toml", ".cff"}
PACKAGES = ("grbench/", "engines/grengines/", "kernels/grkernels/")

# Pattern: better words. Letters must not touch the match, so names such as `_mend` count too.
BANNED = {
    r"so many": "say N, or the number",
    r"whom": "reword with a noun as subject",
    r"mend(s|ed|ing)?": "fix",
    r"in (the )?place of": "instead of, for",
    r"at hand": "available, present",
    r"(can't|cannot|can|could) be had": "is (not) available",
    r"by hand": "manually, or name the tool",
    r"turn and turn about|turn by turn": "interleaved, in turn",
    r"told|tells|telling": "report, log, say, distinguish",
    # Release 0.1.0 had plain_error and error_plain, which CHANGELOG.md names.
    r"(?<!error_)plain(?!_error| (text|English|Python|numbers?|data|files?)\b)": "eager (PyTorch's), naive (a loop)",
    r"delta forms?|full forms?": "append, decode; prefill",
    r"who goes|which goes|goes first": "is evicted",
    r"the aims?|was aimed|the brief": "target: state it once, with its figure",
    r"worked off|works? off": "process",
    r"unto|thereof|whence|hence|whereby|wherein": "reword in everyday words",
    r"issue #?\d+": "link the public issue by its URL",
    r"<<<<<<<|>>>>>>>": "resolve the conflict",
}
_BANNED = [
    (re.compile(rf"(?<![a-z])({pattern})(?![a-z])", re.IGNORECASE), better) for pattern, better in BANNED.items()
]

NO_SUBJECT = {
    *("What", "Whatever", "Where", "Whether", "Why", "How", "Who", "Whoever", "Whom", "Whose", "Which", "When"),
    *("As", "Of", "Also", "Once", "Without"),
}
MAX_LINE = 240
# A sentence that ends within a line: a stop, a space, and a capital, a code span or a bracket.
_NEXT_SENTENCE = re.compile(r"[\w)`\]*\"”][.!?] +(?=[A-Z`*(\[])")
_ABBREVIATION = re.compile(r"\b(e\.g|i\.e|et al|vs|cf|approx|Fig|Sec|No)\. +")


def checked(*suffixes: str) -> list[str]:
    return [path for path in files() if Path(path).suffix in suffixes]


def markdown(path: str) -> str:
    """Text of a Markdown file, or of the Markdown cells of a notebook."""
    text = (ROOT / path).read_text()
    if not path.endswith(".ipynb"):
        return text
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Lines of Markdown with their numbers. Code, tables, headings and HTML come as empty lines."""
    fenced = comment = False
    for number, line in enumerate(text.splitlines(), 1):
        fence = line.lstrip().startswith(("```", "~~~"))
        comment = comment or "<!--" in line
        other = re.match(r"    |\t|#|\[[^\]]+\]: |\s*(\||<|\[?!\[)", line)
        yield number, "" if fenced or fence or comment or other else line
        fenced = fenced != fence
        comment = comment and "-->" not in line


def banned_words(text: str) -> list[str]:
    return [
        f"{number}: {found.group(1)!r}: {better}"
        for number, line in enumerate(text.splitlines(), 1)
        for pattern, better in _BANNED
        if (found := pattern.search(line))
    ]


def long_lines(text: str) -> list[str]:
    lengths = [(number, len(re.sub(r"\]\([^)]*\)", "]", line))) for number, line in prose(text)]
    return [f"{number}: {length} characters, allowed are {MAX_LINE}" for number, length in lengths if length > MAX_LINE]


def broken_sentences(text: str) -> list[str]:
    """Lines that hold more than one sentence, or that end within one."""
    faults = []
    lines = [*prose(text), (0, "")]
    for (number, line), (_, following) in itertools.pairwise(lines):
        bare = _ABBREVIATION.sub("", re.sub(r"`[^`]*`", "`x`", line))
        bare = re.sub(r"^\s*(\d+\.|[-*]) +", "", bare)
        if _NEXT_SENTENCE.search(bare):
            faults.append(f"{number}: a second sentence; begin a new line with it")
        continues = following.strip() and not re.match(r"\s*(\d+\.|[-*>]) +", following)
        if line.strip() and continues and not line.rstrip(" *_)").endswith((".", ":", "!", "?")):
            faults.append(f"{number}: the sentence goes on in the next line; join them")
    return faults


def docstring_faults(tree: ast.Module, public: bool) -> list[str]:
    """Docstrings whose first line is no sentence, a module without one, and its public names that have none."""
    faults = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        name, line = getattr(node, "name", "module"), getattr(node, "lineno", 1)
        if not (text := ast.get_docstring(node)):
            wanted = bool(tree.body) if node is tree else public and node in tree.body and not name.startswith("_")
            if wanted:
                faults.append(f"{line}: {name} has no docstring")
            continue
        first = text.splitlines()[0].rstrip()
        if first.partition(" ")[0].strip(",:") in NO_SUBJECT:
            faults.append(f"{line}: {name}: begin with an imperative or a noun, not {first.partition(' ')[0]!r}")
        if not first.endswith((".", "!", "?", ":")):
            faults.append(f"{line}: {name}: the first line is no whole sentence: {first!r}")
    return faults


def test_words() -> None:
    mine = Path(__file__).resolve().relative_to(ROOT).as_posix()
    paths = [*checked(*TEXT), "Makefile", "NOTICE"]
    faults = [f"{path}:{fault}" for path in paths if path != mine for fault in banned_words((ROOT / path).read_text())]
    assert not faults, "\n".join(faults)


def test_markdown_has_one_sentence_a_line() -> None:
    faults = []
    for path in checked(".md", ".ipynb"):
        if re.fullmatch(r"reports/[^/]+/README\.md", path):
            continue  # rebuilt from records
        text = markdown(path)
        faults += [f"{path}:{fault}" for fault in [*long_lines(text), *broken_sentences(text)]]
    assert not faults, "\n".join(faults)


def test_readme_stays_short() -> None:
    """Details belong to the pages of docs/."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_unreleased_changes_stay_short() -> None:
    """They say what differs from the last release, not what happened since: see CONTRIBUTING.md."""
    unreleased = re.split(r"(?m)^## ", (ROOT / "CHANGELOG.md").read_text())[1]
    assert len(unreleased.splitlines()) <= 150, "join or drop unreleased entries; did a merge keep old ones?"


def test_rows_of_tables_name_the_model_with_mlperfs_layers_as_like_it() -> None:
    faults = [
        f"{path}:{number}: say DLRM-v3-like where a row begins with dlrm_v3"
        for path in checked(".md")
        if path not in ("docs/WEIGHTS.md", "docs/CONFIG.md")  # a layout of MLPerf's own weights; every group's files
        for number, line in enumerate((ROOT / path).read_text().splitlines(), 1)
        if re.match(r"\| (?!`python)[^|]*dlrm_v3", line) and "DLRM-v3-like" not in line
    ]
    assert not faults, "\n".join(faults)


def test_docstrings_begin_with_an_imperative_or_a_noun() -> None:
    faults = []
    for path in checked(".py"):
        tree = ast.parse((ROOT / path).read_text(), path)
        faults += [f"{path}:{fault}" for fault in docstring_faults(tree, path.startswith(PACKAGES))]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "text", ["so many tokens", "it mends the file", "def _told(self):", "Plain PyTorch", "users whom"]
)
def test_the_check_finds_a_word(text: str) -> None:
    assert len(banned_words(f"fine\n{text}\nfine")) == 1


@pytest.mark.parametrize("text", ["recommended", "the foretold", "plain text", "explain this", "amend a commit"])
def test_the_check_leaves_other_words(text: str) -> None:
    assert banned_words(text) == []


def test_the_check_finds_sentences_that_share_a_line_or_span_two() -> None:
    assert broken_sentences("One fact. Another fact.\n") == ["1: a second sentence; begin a new line with it"]
    assert broken_sentences("`a.b` ends. `c` begins.\n") == ["1: a second sentence; begin a new line with it"]
    assert broken_sentences("One fact that\ngoes on.\n") == ["1: the sentence goes on in the next line; join them"]
    good = "One fact.\nSee Zhai et al. 2024, e.g. `Table 2. Rows`.\n\n- item\n- An item.\n  More.\n"
    good += "\n    code. Code\n    code\n\n| a. B |\n"
    assert broken_sentences(good) == []
    assert long_lines("x" * 241 + "\n| " + "x" * 300 + "\n[link](" + "x" * 300 + ")\n") == [
        "1: 241 characters, allowed are 240"
    ]


def test_the_check_finds_docstrings_in_another_form() -> None:
    source = (
        '"""Fine."""\ndef f():\n    """What f\n    does."""\ndef g(): pass\ndef _h(): pass\nclass C:\n    "A class."\n'
    )
    faults = docstring_faults(ast.parse(source), public=True)
    assert [fault.partition(":")[0] for fault in faults] == ["2", "2", "5"]
    assert docstring_faults(ast.parse(source), public=False) == faults[:2]
    assert docstring_faults(ast.parse("x = 1"), public=False) == ["1: module has no docstring"]
    assert docstring_faults(ast.parse(""), public=True) == []
