"""A stacked tensor, drawn: the models' own matrices, and the same as sheets behind each other."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from .curves import Picture

__all__ = ["stacked_tensor"]

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
