"""Comparison of what a server serves, as its status says, with what is asked of it."""

from __future__ import annotations

from typing import Any

from grengines.api import RANDOM

PARTS = {"rank": ["model"], "generate": ["retrieval"], "recommend": ["retrieval", "model"]}  # whose weights a task has
Difference = tuple[str, list[str]]  # what is asked, and the overrides that ask for the server's instead


def differences(
    status: dict[str, Any], task: str, items: int | None, seed: int, model: Any, retrieval: Any
) -> list[Difference]:
    """Return what is asked and is not the server's. The gate compares the answers.

    items: of the workload; None: not known yet. model: has a name and weights. retrieval: has weights.
    """
    found: list[Difference] = []
    if status["task"] != task:
        found.append((f"task={task}", [f"task={status['task']}"]))
    if items not in (None, status["items"]):
        found.append((f"a workload of {items} items", status["workload_overrides"]))
    models = sorted({strategy.get("model", model.name) for strategy in status["strategies"]})
    if model.name not in models:
        found.append((f"model={model.name}", [f"model={models[0]}"]))
    theirs = sorted({one for strategy in status["strategies"] if (one := strategy["weights"])})
    parts = PARTS[status["task"]]
    given = {"model": getattr(model, "weights", None), "retrieval": getattr(retrieval, "weights", None)}
    own = "; ".join(dict.fromkeys(given[part] or f"{RANDOM}{seed}" for part in parts))
    if theirs and _random(own) not in map(_random, theirs):
        found.append((f"weights: {own}", _weights(theirs[0], parts, given)))
    return found


def refusal(url: str, status: dict[str, Any], asked: list[Difference]) -> str:
    """Return what a server serves and what is asked instead, in one line that ends with what was asked."""
    weights = "; ".join(dict.fromkeys(one for strategy in status["strategies"] if (one := strategy["weights"])))
    what = f"task={status['task']} on workload={status['workload']} with {status['items']} items: {strategies(status)}"
    return f"{url} serves {what}{', weights: ' if weights else ''}{weights}. Asked was {', '.join(a for a, _ in asked)}"


def strategies(status: dict[str, Any]) -> str:
    """Return the strategies that a server serves, in words."""
    return ", ".join(
        f"{s['name']} ({s['engine']}, {s['precision']}) of {status['model']}" for s in status["strategies"]
    )


def _weights(theirs: str, parts: list[str], given: dict[str, str | None]) -> list[str]:
    """Return the overrides that ask for these weights. Parts with the same have them once."""
    words: list[str] = []
    each = theirs.split("; ")
    for part, its in zip(parts, each if len(each) == len(parts) else each[:1] * len(parts), strict=True):
        if not its.startswith(RANDOM):
            words.append(f"{part}.weights={its}")
            continue
        words += [f"seed={its.removeprefix(RANDOM)}", *([f"{part}.weights=null"] if given[part] else [])]
    return list(dict.fromkeys(words))


def _random(weights: str) -> set[str]:
    """Return the random ones of a strategy's weights, by their seeds. A file may have another path there."""
    return {its for its in weights.split("; ") if its.startswith(RANDOM)}
