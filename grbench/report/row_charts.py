"""Charts of results files: kernels under the roofline, and misses of cache policies by size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grbench.report.cells import figure
from grbench.report.chart import Chart, Series

RULES = {"belady": "Belady's rule", "limit": "no policy is below"}  # bounds that are drawn without a marker


def roofline(family: str, rows: Sequence[dict[str, Any]], ceilings: dict[str, Any]) -> Chart | None:
    """Achieved TFLOP/s over arithmetic intensity, under the ceilings: a colour for each variant, a point a shape.

    rows, ceilings: of a results file of `grbench kernels`. None if no row of the family is OK or none has FLOPs.
    """
    drawn = [row for row in rows if row["family"] == family and row["status"] == "OK" and row["flops"] and row["bytes"]]
    if not drawn:
        return None
    tbps = ceilings["tbps"]
    peaks = sorted({ceilings["tflops"], *(row["metrics"].get("ceiling_tflops", ceilings["tflops"]) for row in drawn)})
    bends = [*(row["flops"] / row["bytes"] for row in drawn), *(peak / tbps for peak in peaks)]
    low, high = min(bends) / 3, max(bends) * 3
    series = [
        Series(
            f"matmul {figure(peak)} TFLOP/s, copy {figure(tbps)} TB/s",
            [low, peak / tbps, high],
            [low * tbps, peak, peak],
            mode="line",
        )
        for peak in peaks
    ]
    for i, variant in enumerate(dict.fromkeys(row["variant"] for row in drawn)):
        points = [row for row in drawn if row["variant"] == variant]
        series.append(
            Series(
                variant,
                [row["flops"] / row["bytes"] for row in points],
                [row["metrics"]["tflops"] for row in points],
                hover=[row["shape"] for row in points],
                colour=i,
            )
        )
    return Chart(
        f"roofline_{family}",
        f"{family}, {ceilings['dtype']}",
        "arithmetic intensity, FLOP/byte (log)",
        "achieved TFLOP/s (log)",
        series,
        log_x=True,
        log_y=True,
    )


def misses(title: str, rows: Sequence[dict[str, Any]]) -> Chart | None:
    """The miss ratio against the cache's size, a curve for each policy.

    rows: of a results file of `grbench cachesim`. None for a single size.
    """
    if len({row["gb"] for row in rows}) < 2:
        return None
    series = []
    for i, policy in enumerate(dict.fromkeys(row["policy"] for row in rows)):
        points = [row for row in rows if row["policy"] == policy]
        series.append(
            Series(
                RULES.get(policy, policy),
                [row["gb"] for row in points],
                [100 * (1 - row["metrics"]["hit_rate"]) for row in points],
                colour=None if policy in RULES else i,
                mode="line" if policy in RULES else "line+points",
            )
        )
    return Chart("misses", title, "cache size, GB (log)", "requests without usable state, %", series, log_x=True)
