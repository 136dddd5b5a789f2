"""Links and paths in Markdown files: they name files of the checkout, and anchors name headings."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from helpers.checkout import ROOT, files

_LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(<?([^)\s>]+)>?[^)]*\)|(?:src|href)=\"([^\"]+)\"")
_PATH = re.compile(
    r"(?<![\w/:.-])((?:conf|docs|engines|examples|experiments|grbench|grengines|grkernels|kernels|notebooks|reports|tests)"
    r"/[\w./-]+\.(?:py|sh|yaml|md|ipynb))(?!\w)"
)
_FOLDERS = {"grengines": "engines/grengines", "grkernels": "kernels/grkernels"}
_CODE = re.compile(r"^(```|~~~).*?^\1|^    .*?$|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """Anchors that GitHub gives the headings of a page."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#+ +(.*?) *#*$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        count = found[slug] = found.get(slug, -1) + 1
        names.add(f"{slug}-{count}" if count else slug)
    return names


def broken_links(page: Path) -> list[str]:
    faults = []
    for link, reference in _LINK.findall(_CODE.sub("", page.read_text())):
        target, _, anchor = unquote(link or reference).partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / target).resolve() if target else page
        if not file.exists():
            faults.append(f"{link or reference}: no such file")
        elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text()):
            faults.append(f"{link or reference}: no such heading")
    return faults


def missing_files(text: str) -> list[str]:
    """Paths in a text that no file has. A revision's files, as in `git show REV:PATH`, are not looked up."""
    return [
        path
        for path in _PATH.findall(text)
        if not (ROOT / _FOLDERS.get(folder := path.partition("/")[0], folder) / path.partition("/")[2]).exists()
    ]


def test_paths_name_files() -> None:
    faults = [
        f"{path}: {name}: no such file" for path in files("*.md") for name in missing_files((ROOT / path).read_text())
    ]
    assert not faults, "\n".join(faults)


def test_the_check_finds_missing_files() -> None:
    text = "`grengines/vllm/core.py`, `experiments/none.sh`, `git show abc:reports/none.md`, `grkernels/none.py`\n"
    assert missing_files(text) == ["experiments/none.sh", "grkernels/none.py"]


def test_relative_links_resolve() -> None:
    faults = [f"{path}: {fault}" for path in files("*.md") for fault in broken_links(ROOT / path)]
    assert not faults, "\n".join(faults)


def called_not_measured(text: str) -> list[str]:
    """Return the links "not measured" of a page to its own sections that have measured figures."""
    sections = {min(anchors(part)): part for part in re.split(r"^(?=#+ )", text, flags=re.M) if anchors(part)}
    links = re.findall(r"\[not measured\]\(#([^)]+)\)", text)
    return [link for link in links if "*Measured" in sections.get(link, "")]


def test_what_is_measured_is_not_called_not_measured() -> None:
    faults = [
        f"{path}: #{link} has measured figures"
        for path in files("*.md")
        for link in called_not_measured((ROOT / path).read_text())
    ]
    assert not faults, "\n".join(faults)
    page = "# A\n\n[not measured](#b), [not measured](#c)\n\n## B\n\n*Measured.*\n\n### C\n\nNothing.\n"
    assert called_not_measured(page) == ["b"]


def test_the_check_finds_broken_links(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A title, with `code`\n\n## Twice\n\n## Twice\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#a-title-with-code) [c](other.md#twice-1) [d](https://a.org/x) ![e](none.png)\n"
        '[f](other.md#nowhere) `[g](code.md)` <img src="none.svg">\n\n    [h](code.md)\n\n[i](#here)\n'
    )
    assert broken_links(page) == [
        "none.png: no such file",
        "other.md#nowhere: no such heading",
        "none.svg: no such file",
        "#here: no such heading",
    ]
