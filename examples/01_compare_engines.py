"""Compare two engines on the same requests.

    python examples/01_compare_engines.py [KEY=VALUE ...]

Each engine runs in a process of its own, and its answers pass the gate before anything is measured.
Settings on the command line apply to both, for example scenario.target_qps=100.
"""

from __future__ import annotations

import sys

import grbench


def main(settings: list[str]) -> None:
    """Measure both engines as a server, and print a line for each."""
    records = grbench.run(
        ["engine=hstu,onnxruntime", "scenario=server", "tracking=none", *settings],
        sweep=True,
        output_root="outputs/compare_engines",
        progress=True,
    )
    for record in records:
        engine = record.spec["engine"]["name"]
        if record.status is not grbench.Status.OK:
            print(f"{engine:12} {record.status}: {record.error}")
            continue
        p50 = record.metrics["latency_ms/p50"]
        interval = record.intervals.get("latency_ms/p50")  # None if there are too few independent samples
        text = f" (95% interval {interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
        print(f"{engine:12} p50 {p50:.2f} ms{text}, device {record.actual['device']}")


if __name__ == "__main__":
    main(sys.argv[1:])
