"""Where the files lie that ship with mbkit."""

from __future__ import annotations

from pathlib import Path

IN_WHEEL = Path(__file__).parents[1] / "shipped"  # an installed wheel has the files here, a checkout in data/
IN_CHECKOUT = Path(__file__).parents[2] / "data"


def is_installed() -> bool:
    """Say whether this is an installed package, without a checkout around it."""
    return IN_WHEEL.is_dir()


def shipped(name: str) -> Path:
    """Return the path of a file or folder that ships with mbkit, in a checkout or in an installed package.

    Args:
        name: as it is called in the checkout's `data` folder, such as "digits.npz" or "benchmarks/suite".

    Raises:
        FileNotFoundError: there is none of this name.

    Example:
        >>> shipped("digits.npz").name
        'digits.npz'
    """
    path = (IN_WHEEL if is_installed() else IN_CHECKOUT) / name
    if not path.exists():
        raise FileNotFoundError(f"Expected a file that ships with mbkit, got {name!r}: {path} does not exist.")
    return path
