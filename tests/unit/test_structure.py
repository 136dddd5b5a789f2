"""Checks of the structure: layers, import cycles, and modules that must stay light."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import packages_distributions

import pytest
from helpers import kept
from helpers.checkout import ROOT, files
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from grbench.execution.environment import MEASURING

LAYERS = ("grkernels", "grengines", "grbench")  # each imports itself and those before it
FOLDERS = {"grkernels": "kernels/", "grengines": "engines/", "grbench": ""}


def modules() -> dict[str, ast.Module]:
    """The modules of the three packages, parsed, by their import names."""
    found = {}
    for layer in LAYERS:
        for path in files(f"{FOLDERS[layer]}{layer}/*.py"):
            name = path.removeprefix(FOLDERS[layer]).removesuffix(".py").replace("/", ".").removesuffix(".__init__")
            found[name] = ast.parse((ROOT / path).read_text(), path)
    return found


def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements anywhere in a module, also within functions, but for those that only type checkers run."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        else:
            yield from statements(child)


def imports(trees: Mapping[str, ast.Module]) -> dict[str, set[str]]:
    """Return for each module the others that it imports."""
    graph = {}
    for name, tree in trees.items():
        named: set[str] = set()
        for statement in statements(tree):
            if isinstance(statement, ast.Import):
                named |= {alias.name for alias in statement.names}
            else:
                module = statement.module or ""
                inner = {f"{module}.{alias.name}" for alias in statement.names}
                named |= inner & trees.keys() or {module}
        graph[name] = named & trees.keys() - {name}
    return graph


def cycles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other."""
    reach = {name: {name} for name in graph}
    changed = True
    while changed:
        changed = False
        for name, targets in graph.items():
            more = set[str]().union(*(reach[t] for t in targets)) - reach[name]
            reach[name] |= more
            changed = changed or bool(more)
    groups = {frozenset(m for m in reach[name] if name in reach[m]) for name in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


@cache
def graph() -> dict[str, set[str]]:
    """The imports of all modules. Parsing them takes two seconds, which no other worker needs to spend."""
    return imports(modules())


def test_no_import_cycles() -> None:
    assert len(graph()) > 100
    assert not cycles(graph())


def test_packages_import_downwards_only() -> None:
    upward = [
        f"{name} imports {target}"
        for name, targets in graph().items()
        for target in targets
        if LAYERS.index(target.partition(".")[0]) > LAYERS.index(name.partition(".")[0])
    ]
    assert not upward, "\n".join(upward)


def test_the_runtime_of_engines_knows_no_row_of_an_engine() -> None:
    high = {"grengines.registry", "grengines.base", "grengines.spec"}
    runtime = {name: targets & high for name, targets in graph().items() if name.startswith("grengines.runtime.")}
    assert len(runtime) > 5
    assert not {name: targets for name, targets in runtime.items() if targets}


@pytest.mark.parametrize("module", ["grbench.config", "grengines.registry", "grkernels.registry"])
def test_composing_stays_light(module: str) -> None:
    """Composing and --help import no framework and no engine."""
    every = [name for name in graph() if name == module or name.startswith(f"{module}.")]
    code = f"import sys, json, {', '.join(every)}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout)
    heavy = {"torch", "mlflow", "vllm", "transformers", "onnxruntime", "tensorrt", "triton", "pandas"}
    assert module in loaded
    assert not [name for name in loaded if name in heavy or name.endswith(".engine") or name == "grengines.base"]


def test_code_that_an_answer_or_a_figure_depends_on_is_in_the_digest() -> None:
    """A record of other code is not kept. Configuration is no part: a record has its values."""

    def within(module: str, packages: Sequence[str]) -> bool:
        return any(f"{module}.".startswith(f"{package}.") for package in packages)

    measures = (
        "grbench.gate",
        "grbench.scenarios",
        "grbench.workloads",
        "grbench.execution.cell",
        "grbench.execution.measure",
    )
    outside = {
        (name, target)
        for name, targets in graph().items()
        for target in targets
        if within(name, measures) and not within(target, (*MEASURING, "grbench.config", "grbench.streams"))
    }
    assert not outside


IMPORTED_AS = {
    "cutlass": "nvidia-cutlass-dsl",
    "tensorrt": "tensorrt-cu13",
    "vllm": "vllm",
}  # not installed, or on GPUs
BROUGHT = {"cuda", "ml_dtypes", "onnx_ir", "sqlalchemy"}  # by packages that are never without them


def test_a_user_gets_every_package_that_is_imported() -> None:
    """An extra installs it, and not only the development tools."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [names for extra, names in project["optional-dependencies"].items() if extra != "dev"]
    declared = {canonicalize_name(Requirement(name).name) for name in sum(extras, project["dependencies"])}
    of, lacking = packages_distributions(), {}
    for module, tree in modules().items():
        for statement in statements(tree):
            its = (
                [statement.module or ""] if isinstance(statement, ast.ImportFrom) else [n.name for n in statement.names]
            )
            for top in {name.partition(".")[0] for name in its} - {*LAYERS, *sys.stdlib_module_names, *BROUGHT}:
                found = [*of.get(top, []), IMPORTED_AS.get(top, top)]
                if not declared & set(map(canonicalize_name, found)):
                    lacking[top] = module
    assert not lacking


def test_the_map_names_every_folder() -> None:
    page = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    named = set(re.findall(r"\w+", page[page.index("## Packages") : page.index("## One run")]))
    folders = {path.split("/")[0] for path in files() if "/" in path and not path.startswith(".")}
    packages = [re.fullmatch(r"(?:grbench|engines/grengines)/(\w+)/__init__\.py", path) for path in files("*.py")]
    folders |= {package[1] for package in packages if package}
    assert {"tools", "remote", "conf"} <= folders
    assert not folders - named


def test_tests_share_helpers_only() -> None:
    """No test file imports another, nor does code that a test runs in a process."""
    found = {path: re.findall(r"^ *(?:from|import) (?:test_|conftest).*", (ROOT / path).read_text(), re.M)
             for path in files("tests/*.py")}  # fmt: skip
    assert len(found) > 40
    assert not {path: lines for path, lines in found.items() if lines}


def private_names(tree: ast.Module) -> list[str]:
    """Private names of others that a module uses, each with its line: attributes, imports, and names to patch."""
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(LAYERS):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls", "super()"):
            names = [node.attr]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")).endswith("attr"):
            names = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        found += [f"{node.lineno}: {name}" for name in names if re.match(r"_[^_]", name)]
    return found


def test_tests_of_engines_use_no_private_names() -> None:
    """Those tests go by what an engine does, not by how."""
    paths = files("tests/engines/*.py", "tests/unit/test_engine_base.py", "tests/unit/test_pool.py")
    faults = [f"{path}:{name}" for path in paths for name in private_names(ast.parse((ROOT / path).read_text(), path))]
    assert len(paths) > 10
    assert not faults, "\n".join(faults)


def test_importing_a_module_changes_no_environment_variable() -> None:
    """PyTorch's compiler and scikit-learn set variables when they are imported; so does vLLM, which is undone."""
    every = [name for name in graph() if not name.endswith("__main__")]
    code = f"""
import importlib, os, sklearn, torch._inductor.compile_fx
before = dict(os.environ)
for name in {every}:
    importlib.import_module(name)
    print(name, dict(os.environ) == before)
"""
    sources = ("grbench/**/*.py", "engines/**/*.py", "kernels/**/*.py")
    folder = kept.output_of("imports", code, sources, forked=False)
    printed = (folder / kept.OUTPUT).read_text().splitlines()
    assert [line for line in printed if line.endswith(" False")] == []
    assert {f"{name} True" for name in every} <= set(printed)


def test_the_checks_find_faults() -> None:
    trees = {
        "grengines.a": ast.parse("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import grengines.c"),
        "grengines.b": ast.parse("def f():\n    from grengines import c"),
        "grengines.c": ast.parse("from grengines.b import f\nimport grengines.a"),
    }
    graph = imports(trees)
    assert graph == {
        "grengines.a": set(),
        "grengines.b": {"grengines.c"},
        "grengines.c": {"grengines.a", "grengines.b"},
    }
    assert cycles(graph) == [["grengines.b", "grengines.c"]]
    source = "from grengines.a import _f\nself._x = engine._x\npatch.setattr(engine, '_y', 1)\nengine.__class__\n"
    assert private_names(ast.parse(source)) == ["1: _f", "2: _x", "3: _y"]
