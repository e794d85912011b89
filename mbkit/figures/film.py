"""Pictures in motion."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

__all__ = ["save_film"]


def save_film(pictures: Iterable[bytes], path: str | Path, seconds: float = 0.1, rest: float = 2.0) -> None:
    """Save PNGs of one size as a GIF that starts again and again.

    Args:
        pictures: PNGs in the order in which they are shown.
        path: of the GIF.
        seconds: for which each picture is shown. rest: for which the last one is.

    Example:
        >>> import tempfile, torch
        >>> from mbkit.figures import plots
        >>> frames = [plots.differences({"a": torch.rand(3)}).frame() for _ in range(2)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_film(frames, f"{folder}/film.gif")
        ...     with Image.open(f"{folder}/film.gif") as film:
        ...         film.n_frames
        2
    """
    frames = [Image.open(io.BytesIO(png)).convert("RGB").quantize(64, dither=Image.Dither.NONE) for png in pictures]
    times = [round(1000 * seconds)] * (len(frames) - 1) + [round(1000 * rest)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0, optimize=True)
