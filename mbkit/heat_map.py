"""The picture of a comparison: which parameter of which model is off, from which step on."""

from __future__ import annotations

import math
from typing import Any

from .curves import RAISED, RIGHT, WRONG, Picture

__all__ = ["heat_map"]


def heat_map(report: Any) -> Picture:
    """Draw how far each parameter of each model is from the same model alone, step by step: one panel a model.

    Args:
        report: from `compare`; what its noise floors explain is white or light, what they don't is dark.

    Example:
        >>> import torch
        >>> from mbkit import compare
        >>> models = [torch.nn.Linear(2, 2) for _ in range(3)]
        >>> data = [(torch.randn(4, 2), torch.randn(4, 2))]
        >>> report = compare(models, torch.optim.SGD, {"lr": 0.1}, data, torch.nn.functional.mse_loss)
        >>> len(heat_map(report).axes)  # three models and a color bar
        4
    """
    steps, num_models, num_parameters = report.relative.shape
    columns = min(num_models, 4)
    rows = math.ceil(num_models / columns)
    picture = Picture(8.6, rows * min(6.0, 0.9 + 0.24 * num_parameters) + 0.3, dpi=100)
    panels = picture.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    low = -8 if report.tolerance > 1e-6 else -16  # where rounding begins, in float32 and in float64
    values = report.relative.nan_to_num(nan=math.inf).clamp(1e-17, 1e3).log10()
    look = {"aspect": "auto", "cmap": "OrRd", "vmin": low, "vmax": 1, "interpolation": "nearest"}
    rounding = report.relative <= report.allowed
    for m, axes in enumerate(panels.flat):
        if m >= num_models:
            axes.set_visible(False)
            continue
        image = axes.imshow(values[:, m].T.numpy(), **look)
        lost = (~rounding[:, m]).any(1).nonzero()
        since = f"differs from step {lost[0].item() + 1}" if len(lost) else "rounding"
        axes.set_title(f"model {m}: {since}", fontsize=9, color=WRONG if len(lost) else RIGHT)
        axes.set_yticks(range(num_parameters), report.parameters, fontsize=7)
        every = max(1, math.ceil(steps / 8))
        axes.set_xticks(range(0, steps, every), [str(step + 1) for step in range(0, steps, every)], fontsize=8)
        axes.spines[:].set_visible(False)
    picture.supxlabel("step", fontsize=9)
    ticks = range(low, 2, 3 if low == -8 else 4)
    bar = picture.colorbar(image, ax=panels, ticks=ticks, pad=0.01, extend="both")
    bar.ax.set_yticklabels(["10" + str(tick).translate(RAISED) for tick in ticks], fontsize=8)
    bar.set_label("difference / way come", fontsize=8)
    return picture
