"""Records, samples and figures of earlier runs.

    python -m grbench report outputs --out report.html

`load_frame` and `load_samples` return records and raw samples as pandas frames. `group_cells` returns groups of
comparable cells, and `charts` the figures of one group. The report, the terminal table and the notebooks use these
functions.
"""

from grbench.report.chart import Chart
from grbench.report.charts import charts
from grbench.report.findings import Finding, findings, limit_verdict
from grbench.report.frame import (
    ReportError,
    cells_frame,
    load_frame,
    load_samples,
    read_cells,
    time_parts,
)
from grbench.report.groups import Group, Row, group_cells
from grbench.report.write import write_report

__all__ = [
    "Chart",
    "Finding",
    "Group",
    "ReportError",
    "Row",
    "cells_frame",
    "charts",
    "findings",
    "group_cells",
    "limit_verdict",
    "load_frame",
    "load_samples",
    "read_cells",
    "time_parts",
    "write_report",
]
