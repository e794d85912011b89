"""Matrices, drawn: a stacked tensor as sheets behind each other, and strips of what changes from step to step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from .curves import Picture

OFFSET = 0.55  # of a cell: how far each sheet lies behind the one before


def stacked_tensor(matrices: Mapping[str, Tensor], title: str = "stacked") -> Picture:
    """Draw matrices of one shape side by side, and stacked: what `torch.stack` does to them.

    Args:
        matrices: label to [rows, columns], one per model.
        title: over the stacked ones.

    Example:
        >>> import torch
        >>> len(stacked_tensor({"a": torch.eye(2), "b": torch.eye(2)}).axes)
        3
    """
    arrays = {name: matrix.detach().cpu().numpy() for name, matrix in matrices.items()}
    top = max(abs(array).max() for array in arrays.values())
    picture = Picture(8.0, 2.6)
    *singles, last = picture.subplots(1, len(arrays) + 1, width_ratios=[2] * len(arrays) + [3])
    for axes, (name, array) in zip(singles, arrays.items(), strict=True):
        _sheet(axes, array, top, 0)
        _frame(axes, f"{name}  [{array.shape[0]}, {array.shape[1]}]")
    for m, array in reversed(list(enumerate(arrays.values()))):  # the first model's sheet lies in front
        _sheet(last, array, top, m)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        last.text(m * OFFSET + 0.06, 0.06 - m * OFFSET, f"model {m}", fontsize=8, va="top", zorder=20, bbox=box)
    rows, columns = array.shape
    _frame(last, f"{title}  [{len(arrays)}, {rows}, {columns}]")
    return picture


def _sheet(axes: Axes, array: np.ndarray, top: float, m: int) -> None:
    """Draw a matrix as a sheet of colored cells, `m` places behind the first."""
    rows, columns = array.shape
    x, y = np.arange(columns + 1) + m * OFFSET, np.arange(rows + 1) - m * OFFSET
    axes.pcolormesh(x, y, array, cmap="PuOr", vmin=-top, vmax=top, edgecolors="white", linewidth=1.5, zorder=9 - m)


def _frame(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.axis("off")


def strips(rows: Mapping[str, Sequence[Tensor]], columns: Sequence[str]) -> Picture:
    """Draw rows of matrices in one scale of colors: how something changes from step to step.

    Args:
        rows: label to the matrices [rows, columns] of one strip.
        columns: a title for each column.

    Example:
        >>> import torch
        >>> len(strips({"kept": [torch.eye(2)] * 3, "cleared": [torch.zeros(2, 2)] * 3}, ["1", "2", "3"]).axes)
        6
    """
    arrays = {name: [matrix.detach().cpu().numpy() for matrix in strip] for name, strip in rows.items()}
    top = max(abs(array).max() for strip in arrays.values() for array in strip) or 1.0
    picture = Picture(8.6, 1.0 + 0.9 * len(arrays))
    panels = picture.subplots(len(arrays), len(columns), squeeze=False)
    for row, (line, (name, strip)) in enumerate(zip(panels, arrays.items(), strict=True)):
        for axes, array, title in zip(line, strip, columns, strict=True):
            _sheet(axes, array, top, 0)
            _frame(axes, title if row == 0 else "")
        line[0].text(-0.05, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=10)
    return picture
