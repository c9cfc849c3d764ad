"""Pictures of the pages: two axes side by side, as SVG that is the same whenever it is drawn of the same numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


def draw_two(path: Path, fill: Callable[[Any, Any], None], size: tuple[float, float]) -> None:
    """`fill` draws on both axes; they get their legends here."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: Any = {
        "svg.hashsalt": path.parent.name,
        "svg.fonttype": "none",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(1, 2, figsize=size, layout="constrained")
        fill(*axes)
        for each in axes:
            each.legend(frameon=False, fontsize=8)
            each.margins(y=0.08)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
