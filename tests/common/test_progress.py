"""The bar draws where somebody watches, writes nothing elsewhere, and leaves nothing behind."""

import io
import sys
import types

import pytest

from mbkit.common import progress
from mbkit.common.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def _every_step_is_drawn(monkeypatch):
    monkeypatch.setattr(progress, "_REDRAW_SECONDS", -1.0)


@pytest.mark.parametrize("stream", [io.StringIO, lambda: None, Terminal])
def test_silence_where_nobody_watches_or_wants_it(monkeypatch, capfd, stream):
    stream = stream()
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(3, "training", enabled=not isinstance(stream, Terminal)) as bar:
        for _ in range(3):
            bar.advance(lambda: pytest.fail("nobody asked for a text"))
    assert bar.done == 3
    assert capfd.readouterr() == ("", "")
    assert stream is None or stream.getvalue() == ""


@pytest.mark.usefixtures("_every_step_is_drawn")
def test_a_terminal_gets_tqdm(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(2, "training") as bar:
        bar.advance(lambda: "median loss 0.5")
        bar.advance()
    bar.close()
    drawn = terminal.getvalue()
    assert "training" in drawn
    assert "1/2" in drawn
    assert "median loss 0.5" in drawn
    assert drawn.split("\r")[-2].strip() == ""  # the line is empty again


def test_the_text_is_made_only_when_it_is_drawn(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(progress, "_REDRAW_SECONDS", 0.2)
    asked = []
    with Progress(21) as bar:
        monkeypatch.setattr(bar._bar, "_time", lambda: now[0])
        now = [bar._bar.last_print_t]
        for step in range(21):
            now[0] += 0.03
            bar.advance(lambda step=step: asked.append(step) or "")
    assert asked == [6, 13, 20]  # each 0.21 s after the one before


@pytest.mark.usefixtures("_every_step_is_drawn")
@pytest.mark.parametrize("total", [4, None])
def test_a_kernel_gets_a_widget_that_goes(monkeypatch, total):
    display = pytest.importorskip("IPython.display")
    shown = []

    class Handle:
        def update(self, data, raw):
            assert raw
            shown.append(data)

    def show(box, display_id):
        shown.append(box)
        return Handle()

    monkeypatch.setattr(display, "display", show)
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: types.SimpleNamespace(kernel=object()))
    with Progress(total, "training") as bar:
        bar.advance(lambda: "median loss 0.5")
        label, inner, text = shown[0].children
        assert (inner.value, inner.max) == (1, total or 1)
        drawn = " ".join((label.value + text.value).split())
        assert "training" in drawn
        assert f"1/{total}" in drawn or total is None
        assert "median loss 0.5" in drawn
    assert shown[1] == {"text/html": "", "text/plain": ""}  # a saved notebook keeps an empty output, no frozen bar
    assert shown[0].comm is None  # closed
    assert len(shown) == 2
