"""Tables of strings, for a terminal and for a notebook, and plain numbers, for JSON."""

from __future__ import annotations

import html
import math
import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

Rows = Sequence[Sequence[str]]

_PLAIN_SIGNS = str.maketrans("✗✓≈×·–—→…", "xv~x.-->~")


class Tables:
    """What shows itself as tables, in a terminal and in a notebook; a subclass gives `_tables()`, titles and rows."""

    _left = 1  # how many columns of a table are aligned to the left

    def _tables(self) -> list[tuple[str, Rows]]:
        """Return pairs of a title, which may be empty, and rows, of which there may be none."""
        raise NotImplementedError

    def __repr__(self) -> str:
        parts = ([title] * bool(title) + [text_table(rows, self._left)] * bool(rows) for title, rows in self._tables())
        return printable("\n\n".join(map("\n".join, parts)))

    def _repr_html_(self) -> str:
        return "".join(html_table(rows, title) for title, rows in self._tables())


def printable(text: str) -> str:
    """Return `text` in the characters that standard output has: a Windows code page has no ✗, and printing it raises.

    A sign becomes one that looks like it and is as wide, so that tables stay aligned; others become a question mark.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_PLAIN_SIGNS).encode(encoding, "replace").decode(encoding)
    return text


def text_table(rows: Rows, left: int = 1) -> str:
    """Return rows of equal length as aligned text: the first columns to the left, numbers to the right.

    Example:
        >>> print(text_table([["model", "loss"], ["0", "12.5"]]))
        model  loss
        0      12.5
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[*map(str.ljust, row[:left], widths), *map(str.rjust, row[left:], widths[left:])] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def html_table(rows: Rows, title: str = "") -> str:
    """Return rows of equal length, the first of them the header, as an HTML table under its title.

    Example:
        >>> html_table([["a"], ["<1"]], "t")
        '<p>t</p><table><tr><th>a</th></tr><tr><td>&lt;1</td></tr></table>'
    """
    parts = [f"<p>{html.escape(title)}</p>".replace("\n", "<br>")] if title else []
    if rows:
        tags = ["th", *["td"] * (len(rows) - 1)]
        lines = [
            f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in row)}</tr>"
            for tag, row in zip(tags, rows, strict=True)
        ]
        parts.append(f"<table>{''.join(lines)}</table>")
    return "".join(parts)


def plain(value: Any) -> Any:
    """Return dicts and lists with the numbers of all tensors in them, None for those that JSON has no word for.

    Example:
        >>> import torch
        >>> plain({"loss": torch.tensor([[1.0, float("nan")]]), "steps": 2})
        {'loss': [[1.0, None]], 'steps': 2}
    """
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {name: plain(own) for name, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
