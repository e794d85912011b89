"""Tables can be printed wherever standard output goes."""

from __future__ import annotations

import io
import sys

import pytest

from mbkit.common.tables import Tables, printable


class Marks(Tables):
    def _tables(self) -> list:
        return [("✗ guilty, ✓ cleared, ≈ all there is …", [["model", "loss × 2"], ["✗", "é 日"]])]


@pytest.mark.parametrize(
    ("encoding", "title", "row"),
    [
        ("utf-8", "✗ guilty, ✓ cleared, ≈ all there is …", "✗           é 日"),
        ("cp1252", "x guilty, v cleared, ~ all there is ~", "x           é ?"),
        ("ascii", "x guilty, v cleared, ~ all there is ~", "x           ? ?"),
    ],
)
def test_signs_that_an_encoding_lacks_become_plain_ones(
    encoding: str, title: str, row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding, newline="\n"))
    print(Marks(), flush=True)
    lines = out.getvalue().decode(encoding).splitlines()
    assert (lines[0], lines[2]) == (title, row)
    assert len({len(line) for line in lines[1:]}) == 1  # still aligned


def test_without_a_standard_output_nothing_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert printable("✗") == "✗"
