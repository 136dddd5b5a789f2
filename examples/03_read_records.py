"""Read the records of earlier runs into pandas.

    python examples/03_read_records.py [FOLDER ...]

Without a folder it reads ./outputs, where `python -m grbench` and the other examples write.
"""

from __future__ import annotations

import sys

import grbench


def main(folders: list[str]) -> None:
    """Print each cell's rate and latency, and every failure with its reason."""
    cells = grbench.frame(*(folders or ["outputs"]))
    ok = cells[cells.status == "OK"]
    print(ok[["cell", "throughput_rps", "latency_ms/p50", "latency_ms/p90"]].round(2).to_string(index=False))
    for cell in cells[cells.status != "OK"].itertuples():
        print(f"{cell.cell}: {cell.status}: {cell.error}")


if __name__ == "__main__":
    main(sys.argv[1:])
