"""Rank with your own events.

    python examples/02_custom_workload.py [FILE.csv] [KEY=VALUE ...]

The file has the columns of MovieLens: userId,movieId,rating,timestamp (seconds since 1970).
Each user's events are split into visits, and each visit becomes a request with the history before it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import grbench

RATINGS = Path(__file__).with_name("ratings.csv")


def main(arguments: list[str]) -> None:
    """Measure the throughput of the native engine on the file, and print figures of the trace."""
    files = [argument for argument in arguments if "=" not in argument]
    [record] = grbench.run(
        [
            "engine=hstu",
            "workload=csv",
            f"workload.path='{files[0] if files else RATINGS}'",
            "workload.num_candidates=10",  # the file has 60 items
            "scenario=offline",
            "scenario.queries=200",
            "tracking=none",
            *(argument for argument in arguments if "=" in argument),
        ],
        output_root="outputs/custom_workload",
    )
    if record.status is not grbench.Status.OK:
        sys.exit(f"{record.status}: {record.error}")
    trace = {name: value for name, value in record.metrics.items() if name.startswith("workload/")}
    print("the trace:", ", ".join(f"{name.removeprefix('workload/')} {value:g}" for name, value in trace.items()))
    print(f"{record.metrics['throughput_rps']:.0f} requests/s on {record.actual['device']}")


if __name__ == "__main__":
    main(sys.argv[1:])
