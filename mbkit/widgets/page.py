"""What a page does by itself, without the kernel: the explorers' look, their keys, and where a picture is clicked."""

from __future__ import annotations

import html

import ipywidgets as ipw

WIDTH = 860  # of a picture, in CSS pixels; on a narrower page it shrinks as a whole

STYLE = """
.mbkit-outdated { opacity: 0.35; }
.mbkit-click, .mbkit-dead { display: none; }
.mbkit-status code { user-select: all; overflow-wrap: anywhere; white-space: normal; }
.mbkit-explorer .widget-label { flex-shrink: 0; }
.mbkit-explorer .widget-readout { max-width: none; flex-shrink: 0; overflow: visible; }
.mbkit-explorer .slider-container { min-width: 6em; }
.jupyter-widgets-disconnected .mbkit-state { display: none; }
.jupyter-widgets-disconnected .mbkit-dead { display: inline; }
.jupyter-widgets-disconnected img { opacity: 0.35; }
"""

# The notebook would take the arrow keys from a slider, so it is told to leave them. A widget for a picture has no text
# for those who cannot see it, and no clicks: it is given the text, and a click is told by way of a hidden text field.
SCRIPT = """
const root = this.closest('.mbkit-explorer'), words = this.dataset.words;
root.addEventListener('focusin', event => { event.target.dataset.lmSuppressShortcuts = ''; });
const describe = () => root.querySelectorAll('img').forEach(image => { image.alt = words; });
new MutationObserver(describe).observe(root, {childList: true, subtree: true});
describe();
root.addEventListener('click', event => {
    if (!event.target.matches('img')) return;
    const box = event.target.getBoundingClientRect(), field = root.querySelector('.mbkit-click input');
    const place = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    field.value = [...place, Date.now()].join(' ');
    field.dispatchEvent(new Event('change', {bubbles: true}));
});
"""


def page(words: str, height: int) -> ipw.HTML:
    """Return what gives an explorer, a box of the class `mbkit-explorer`, its look and its keys.

    Args:
        words: what the picture shows.
        height: of the picture, in CSS pixels, where it is `WIDTH` wide.
    """
    shape = f".mbkit-{height} {{ aspect-ratio: {WIDTH} / {height}; }}"  # or the page jumps when the first picture comes
    return ipw.HTML(f'<style data-words="{html.escape(words)}" onload="{html.escape(SCRIPT)}">{STYLE}{shape}</style>')
