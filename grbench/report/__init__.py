"""Records, samples and figures of earlier runs.

    python -m grbench report outputs --out report.md

`load_frame` and `load_samples` return records and raw samples as pandas frames, and the `plot_*` functions draw them.
The report page, the terminal table and notebooks/compare_runs.ipynb use these functions.
"""

from grbench.report.findings import Finding, findings
from grbench.report.frame import (
    ReportError,
    cells_frame,
    load_frame,
    load_samples,
    read_cells,
    time_parts,
    within_limit,
)
from grbench.report.plots import Plot, plot_hit_mix, plot_latency_cdf, plot_throughput_latency, plot_time_shares

__all__ = [
    "Finding",
    "Plot",
    "ReportError",
    "cells_frame",
    "findings",
    "load_frame",
    "load_samples",
    "plot_hit_mix",
    "plot_latency_cdf",
    "plot_throughput_latency",
    "plot_time_shares",
    "read_cells",
    "time_parts",
    "within_limit",
]
