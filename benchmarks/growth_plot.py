"""The figure of `benchmarks.growth`: time and memory against size, a row per axis, logarithmic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LEAST = 0.01  # drawn instead of 0, which has no logarithm
# Colours for colour-blind readers (Okabe and Ito); markers for prints without colour.
STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"))
LEGEND = {
    "frameon": False,
    "fontsize": 7,
    "columnspacing": 0.8,
    "handlelength": 1.5,
    "borderpad": 0,
}


def draw(studies: list[dict[str, Any]], path: Path) -> None:
    """Write the SVG: a row for each axis, time on the left with exponents in the legend, memory on the right."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    axes = list(dict.fromkeys(study["axis"] for study in studies))
    # Text stays text (small, searchable); a fixed salt makes the file reproducible.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "growth", "font.size": 9}):
        figure = Figure(figsize=(9, 3 * len(axes)), layout="constrained")
        rows = figure.subplots(len(axes), 2, squeeze=False)
        for axis, (time, memory) in zip(axes, rows, strict=True):
            of_axis = [study for study in studies if study["axis"] == axis]
            _panel(time, of_axis, "minimum", 1000.0)
            time.set(xlabel=axis, ylabel="ms")
            # Above the panel, where no line crosses it.
            time.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, **LEGEND)
            _panel(memory, of_axis, "extra_mib", 1.0)
            memory.set(xlabel=axis, ylabel="MiB beyond the inputs")
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _panel(panel: Any, studies: list[dict[str, Any]], measure: str, unit: float) -> None:
    from matplotlib.ticker import LogFormatter, StrMethodFormatter

    for study, (colour, marker) in zip(studies, STYLES, strict=False):
        panel.plot(
            [point["size"] for point in study["points"]],
            [max(LEAST, unit * point[measure]) for point in study["points"]],
            color=colour,
            marker=marker,
            markersize=4,
            label=f"{study['name']}: size^{study['exponent']:.2f}",
        )
    panel.set(xscale="log", yscale="log")
    if max(panel.get_ylim()) < 100 * min(
        panel.get_ylim()
    ):  # few powers of ten: plain numbers between them
        panel.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.grid(visible=True, which="major", linewidth=0.4, alpha=0.6)
