"""The picture of `benchmarks.growth`: time against size, one panel per axis, both logarithmic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Colours that stay apart for colour-blind eyes (Okabe and Ito); markers for prints without colour.
STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"))


def draw(studies: list[dict[str, Any]], path: Path) -> None:
    """Write the SVG: small multiples in two columns, exponents in the legends."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    axes = list(dict.fromkeys(study["axis"] for study in studies))
    rows = -(-len(axes) // 2)
    # Text as text is small and can be searched; a fixed salt gives the same numbers the same file.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "growth", "font.size": 9}):
        figure = Figure(figsize=(9, 3.4 * rows), layout="constrained")
        panels = figure.subplots(rows, 2, squeeze=False).flat
        for axis, panel in zip(axes, panels, strict=False):
            _panel(panel, axis, [study for study in studies if study["axis"] == axis])
        for panel in list(panels):  # those that are left
            panel.set_visible(False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _panel(panel: Any, axis: str, studies: list[dict[str, Any]]) -> None:
    for study, (colour, marker) in zip(studies, STYLES, strict=False):
        points = study["points"]
        panel.plot(
            [p["size"] for p in points],
            [1000 * p["minimum"] for p in points],
            color=colour,
            marker=marker,
            markersize=4,
            label=f"{study['name']}: size^{study['exponent']:.2f}",
        )
    panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms")
    panel.grid(visible=True, which="major", linewidth=0.4, alpha=0.6)
    panel.legend(frameon=False, fontsize=8)
