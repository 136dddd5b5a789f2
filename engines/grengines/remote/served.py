"""Comparison of what a server serves, as its status says, with what is asked of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grengines.api import RANDOM, Catalogue
from grengines.overrides import override

PARTS = {"rank": ["model"], "generate": ["retrieval"], "recommend": ["retrieval", "model"]}  # whose weights a task has
SIZES = ("items", "actions")  # of a catalogue that have to be the server's, as its status names them
Difference = tuple[str, list[str]]  # what is asked, and the overrides that ask for the server's instead


def differences(
    status: dict[str, Any], task: str, catalogue: Catalogue | None, longest: int, seed: int, model: Any, retrieval: Any
) -> list[Difference]:
    """Return what is asked and is not the server's. The gate compares the answers.

    catalogue: of the workload; None: not known yet. longest: the most events of a history. model: has a name, weights
    and, if it ranks, tasks. retrieval: has weights.
    status: may lack what servers of older versions do not say.
    """
    found: list[Difference] = []
    if status["task"] != task:
        found.append((f"task={task}", [f"task={status['task']}"]))
    if sizes := _other_sizes(status, catalogue):
        its = status.get("workload_overrides", [f"workload={status['workload']}"])
        found.append((f"a workload of {' and '.join(sizes)}", its))
    if (most := status.get("max_history")) and longest > most:
        # The overrides of another workload have its histories.
        found.append((f"histories of up to {longest} events", [] if sizes else [f"workload.max_history={most}"]))
    theirs = sorted({one for strategy in status["strategies"] if (one := strategy["weights"])})
    parts = PARTS[status["task"]]
    given = {"model": getattr(model, "weights", None), "retrieval": getattr(retrieval, "weights", None)}
    own = "; ".join(dict.fromkeys(given[part] or f"{RANDOM}{seed}" for part in parts))
    weights = _weights(theirs[0], parts, given) if theirs else []
    models = sorted({strategy.get("model", model.name) for strategy in status["strategies"]})
    columns = [f"model.tasks=[{','.join(status['tasks'])}]"] if status.get("tasks") else []
    if model.name not in models:  # the weights and the tasks of the one that was asked for do not fit
        file = [word for word in weights if word.startswith("model.")]
        found.append((f"model={model.name}", [f"model={models[0]}", *columns, *file]))
    elif columns and status["tasks"] != (tasks := list(getattr(model, "tasks", []))):
        found.append((f"model.tasks=[{','.join(tasks)}]", columns))
    if theirs and _random(own) not in map(_random, theirs):
        found.append((f"weights: {own}", weights))
    return found


def overrides(asked: Sequence[Difference]) -> list[str]:
    """Return the overrides that ask for what the server has, each once."""
    return list(dict.fromkeys(word for _, its in asked for word in its))


def refusal(url: str, status: dict[str, Any], asked: list[Difference]) -> str:
    """Return what a server serves and what is asked instead, in one line that ends with what was asked."""
    weights = "; ".join(dict.fromkeys(one for strategy in status["strategies"] if (one := strategy["weights"])))
    sizes = " and ".join(f"{status[name]} {name}" for name in SIZES if name in status)
    what = f"task={status['task']} on workload={status['workload']} with {sizes}: {strategies(status)}"
    return f"{url} serves {what}{', weights: ' if weights else ''}{weights}. Asked was {', '.join(a for a, _ in asked)}"


def strategies(status: dict[str, Any]) -> str:
    """Return the strategies that a server serves, in words."""
    return ", ".join(
        f"{s['name']} ({s['engine']}, {s['precision']}) of {status['model']}" for s in status["strategies"]
    )


def _other_sizes(status: dict[str, Any], catalogue: Catalogue | None) -> list[str]:
    """Return the sizes of a catalogue that are not the server's, in words."""
    if catalogue is None:
        return []
    own = {name: getattr(catalogue, f"num_{name}") for name in SIZES}
    return [f"{count} {name}" for name, count in own.items() if count != status.get(name, count)]


def _weights(theirs: str, parts: list[str], given: dict[str, str | None]) -> list[str]:
    """Return the overrides that ask for these weights. Parts with the same have them once."""
    words: list[str] = []
    each = theirs.split("; ")
    for part, its in zip(parts, each if len(each) == len(parts) else each[:1] * len(parts), strict=True):
        if not its.startswith(RANDOM):
            words.append(override(f"{part}.weights", its))
            continue
        words += [f"seed={its.removeprefix(RANDOM)}", *([f"{part}.weights=null"] if given[part] else [])]
    return list(dict.fromkeys(words))


def _random(weights: str) -> set[str]:
    """Return the random ones of a strategy's weights, by their seeds. A file may have another path there."""
    return {its for its in weights.split("; ") if its.startswith(RANDOM)}
