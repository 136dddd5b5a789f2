"""The map from the rows of a model's `token_table` to the item ids of a workload, as a file beside the weights.

WEIGHTS.items.csv has a line `row,item` for each item. Row i of the table is the i-th item that the data file names.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

from grbench.workloads.events import DataError, Events
from grengines.runtime import atomic_io


def map_of(weights: Path) -> Path:
    """Return where the map of a weights file lies."""
    return weights.with_name(f"{weights.stem}.items.csv")


def save_items(events: Events, weights: Path) -> Path:
    """Write the map of recorded events beside a weights file. Returns its path."""
    path = map_of(weights)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["row", "item"])
    writer.writerows(enumerate(events.item_ids))
    atomic_io.write(path, text.getvalue().encode())
    return path


def check_items(events: Events, weights: Path) -> None:
    """Raise DataError if the weights have a map, and it names other items than the events or another order of them.

    A model would then look up the vectors of other items: its answers would be wrong, and no shape would differ.
    """
    path = map_of(weights)
    if not path.is_file() or not events.item_ids:
        return
    try:
        with path.open(newline="", encoding="utf-8") as f:
            header, *rows = csv.reader(f)
    except (ValueError, csv.Error) as e:  # no UTF-8, no row, or a NUL byte
        raise DataError(f"{path}: not readable as CSV ({e}); write the map again or remove it") from None
    if header != ["row", "item"]:
        raise DataError(f"{path}: row 1 is not the header row,item; write the map again or remove it")
    mapped = [row[-1] for row in rows if row]
    fix = "use the data that the weights were made for, or write the map again"
    for row, (theirs, ours) in enumerate(zip(mapped, events.item_ids, strict=False)):
        if theirs != ours:
            raise DataError(f"{path}: table row {row} is item {theirs!r}, in the workload it is {ours!r}; {fix}")
    if len(mapped) != len(events.item_ids):
        raise DataError(f"{path}: {len(mapped)} items, the workload has {len(events.item_ids)}; {fix}")
