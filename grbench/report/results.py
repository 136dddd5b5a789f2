"""The sections of a page that shows results files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from grbench.report.cells import MISSING, figure
from grbench.report.markdown import bullets, table

Row = dict[str, Any]  # of a results file


def results_sections(name: str, results: dict[str, Any]) -> list[str]:
    """The sections of one results file: its command, its rows as tables, why rows have no result. name: its heading."""
    kind = KINDS.get(results.get("kind", ""), _any_rows)
    title = [results["title"] + "."] if "title" in results else []
    return [f"## {name}", f"`{results['command']}`", *title, *kind(results)]


def _any_rows(results: dict[str, Any]) -> list[str]:
    """A column for each scalar of the rows, headed by its key."""
    rows = results["rows"]
    done = [row for row in rows if row.get("status", "OK") == "OK"]
    keys = dict.fromkeys(key for row in done for key, value in row.items() if not isinstance(value, list | dict))
    keys.pop("status", None)
    cells = [[_shown(row.get(key)) for key in keys] for row in done]
    return [*([table([key.replace("_", " ") for key in keys], cells)] if done else []), *_failures(rows)]


def _kernel_rows(results: dict[str, Any]) -> list[str]:
    """A table for each family, under the ceilings that shares refer to."""
    from grbench.kernelbench.output import COLUMNS

    rows, roofs = results["rows"], results["ceilings"]
    sections = [
        f"Ceilings of this process, {roofs['dtype']}: {figure(roofs['tflops'])} TFLOP/s "
        f"({roofs['matmul_size']}^3 product), {figure(roofs['tbps'])} TB/s (copy, read and written)."
    ]
    heads = ["shape", "dtype", "variant", *(heading.replace("\n", " ") for heading in COLUMNS)]
    for family in dict.fromkeys(row["family"] for row in rows):
        done = [row for row in rows if row["family"] == family and row["status"] == "OK"]
        cells = [
            [row["shape"], row["dtype"], row["variant"]]
            + [_scaled(row["metrics"].get(metric), factor, figure) for metric, factor in COLUMNS.values()]
            for row in done
        ]
        sections += [f"### {family}", table(heads, cells)] if done else []
    return sections + _failures(rows)


def _policy_rows(results: dict[str, Any]) -> list[str]:
    """A row for each policy at each cache size."""
    from grbench.cachesim.output import COLUMNS

    heads = ["size, GB", "of all states, %", "policy", *(heading.replace("\n", " ") for heading in COLUMNS)]
    cells = [
        [f"{row['gb']:.3g}", f"{100 * row['share']:.3g}", row["policy"]]
        + [
            _scaled(row["metrics"].get(metric), factor, f"{{:{form}}}".format)
            for metric, factor, form in COLUMNS.values()
        ]
        for row in results["rows"]
    ]
    return [table(heads, cells)]


KINDS: dict[str, Callable[[dict[str, Any]], list[str]]] = {"kernels": _kernel_rows, "cachesim": _policy_rows}


def _failures(rows: Sequence[Row]) -> list[str]:
    """Each reason once, after the rows that it holds for."""
    places: dict[str, list[str]] = {}
    for row in rows:
        if row.get("status", "OK") != "OK":
            names = [str(v) for k, v in row.items() if k not in ("status", "reason") and isinstance(v, str | int)]
            places.setdefault(f"{row['status']}: {row.get('reason') or 'no reason was recorded'}", []).append(
                " ".join(names)
            )
    return bullets([f"{reason} ({'; '.join(which)})" for reason, which in places.items()])


def _scaled(value: float | None, factor: float, shown: Callable[[float], str]) -> str:
    return MISSING if value is None else shown(factor * value)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return figure(value) if isinstance(value, float) or value is None else str(value)
