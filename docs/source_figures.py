"""Figures of the source code at given commits, for DEVELOPMENT.md: `python docs/source_figures.py COMMIT ...`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PRODUCT = ("grbench/", "engines/", "kernels/")
LONG = 50  # lines


class Definition(NamedTuple):
    """A function or a class, by its length in lines."""

    lines: int
    name: str


def git(*words: str) -> str:
    """Return the output of a command of git in the checkout. Raises CalledProcessError."""
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout


def sources(revision: str) -> dict[str, str]:
    """Python files of a commit, by path."""
    paths = git("ls-tree", "-r", "--name-only", revision).splitlines()
    return {path: git("show", f"{revision}:{path}") for path in paths if path.endswith(".py")}


def definitions(files: dict[str, str], *kinds: type[ast.stmt]) -> list[Definition]:
    """Return the definitions of these kinds in grbench, engines and kernels, the longest first."""
    found = [
        Definition((node.end_lineno or node.lineno) - node.lineno + 1, f"{'/'.join(path.split('/')[-2:])} {node.name}")
        for path, text in files.items()
        if path.startswith(PRODUCT)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, kinds) and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]
    return sorted(found, key=lambda one: (-one.lines, one.name))


def figures(revision: str) -> str:
    """Return the figures of a commit as Markdown: packages, long functions, the longest of them, README."""
    files = sources(revision)
    functions = definitions(files, ast.FunctionDef, ast.AsyncFunctionDef)
    rows = []
    for folder in (*PRODUCT, "tests/"):
        texts = [text for path, text in files.items() if path.startswith(folder)]
        rows.append(f"| `{folder}` | {len(texts)} files, {sum(len(text.splitlines()) for text in texts):,} lines |")
    rows.append(f"| long functions | {sum(f.lines > LONG for f in functions)} of {len(functions):,} |")
    rows.append(
        f"| longest classes | {', '.join(f'`{c.name}` {c.lines}' for c in definitions(files, ast.ClassDef)[:3])} |"
    )
    rows.append(f"| README | {len(git('show', f'{revision}:README.md').split()):,} words |")
    longest = [f"| `{function.name}` | {function.lines} |" for function in functions[:10]]
    head = f"{git('rev-parse', '--short=7', revision).strip()}"
    return "\n".join(
        [f"| {head} | |\n| --- | --- |", *rows, f"\n| function at {head} | lines |\n| --- | --- |", *longest]
    )


if __name__ == "__main__":
    if not sys.argv[1:] or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        print("\n\n".join(figures(revision) for revision in sys.argv[1:]))
    except subprocess.CalledProcessError as e:
        sys.exit(e.stderr.strip())
