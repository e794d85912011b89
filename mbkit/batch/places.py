"""Where Python values stand: places are read, compared and written."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat, starmap
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor

from ..vmap import PerModel

MARK = "mbkit_kept"  # on a tensor that is kept: its first dimension is the models'
_ABSENT = object()  # stands for what a dict has not got


class Place(NamedTuple):
    """Where values stand: all that a list, dict, set or deque holds, or what has one name in something else."""

    owner: Any  # the container; or a dict of names, a cell, an object, a function or a class
    key: str | None  # the name; None for all that a container holds
    name: str  # of what stands there, in words


def read(place: Place) -> list | dict | set:
    """Return what stands at a place: a copy of the container, or a list of the one value; empty where there is none."""
    owner, key, _ = place
    if isinstance(owner, dict) and key is None:
        return dict(dict.items(owner))  # past what a class of the user's makes of its items when they are asked for
    if key is None:
        return set(owner) if isinstance(owner, set) else list(owner)
    try:
        if isinstance(owner, (dict, type)):
            return [(owner if isinstance(owner, dict) else vars(owner))[key]]
        return [getattr(owner, key)]
    except (KeyError, AttributeError, ValueError):  # of an empty cell
        return []


def write(place: Place, contents: list | dict | set) -> None:
    """Put back what `read` has returned."""
    owner, key, _ = place
    if key is None and isinstance(owner, dict):
        for gone in owner.keys() - contents.keys():
            del owner[gone]
        owner.update(contents)
    elif key is None:
        owner.clear()
        (owner.update if isinstance(owner, set) else owner.extend)(contents)
    elif isinstance(owner, dict):
        owner.update({key: contents[0]}) if contents else owner.pop(key, None)
    elif contents:
        setattr(owner, key, contents[0])
    else:
        delattr(owner, key)


def unchanged(place: Place, contents: list | dict | set) -> bool:
    """Say whether the very same objects stand at a place as when its contents were read."""
    owner, key, _ = place
    return same(owner if key is None else read(place), contents)


def same(a: Any, b: Any) -> bool:
    """Say whether two contents hold the very same objects, under the same names in the same order."""
    if isinstance(a, set):
        return a == b
    alike = len(a) == len(b) and (not isinstance(a, dict) or list(a) == list(b))
    return alike and all(map(is_, *((a.values(), b.values()) if isinstance(a, dict) else (a, b))))


class Snapshot:
    """What stands at some places. Whether it still does is soon told: most have a name in a dict, or hold nothing.

    Attributes:
        contents: what `read` has returned for each place.
        leaves, has_rows: the tensors, and the numbers of each model's own, in them; whether some are for each model.
    """

    def __init__(self, places: list[Place]) -> None:
        self.places, self.contents = places, [read(place) for place in places]
        self.leaves = [leaf for contents in self.contents for leaf in _leaves(contents)]
        self.has_rows = any(isinstance(leaf, PerModel) or hasattr(leaf, MARK) for leaf in self.leaves)
        self._empty: list[Any] = []
        self._held: list[tuple[Place, Any]] = []
        self._owners, self._keys, self._values = [], [], []
        for place, contents in zip(places, self.contents, strict=True):
            if place.key is None and not contents:
                self._empty.append(place.owner)
            elif place.key is not None and isinstance(place.owner, dict):
                self._owners.append(place.owner)
                self._keys.append(place.key)
                self._values.append(contents[0] if contents else _ABSENT)
            else:
                self._held.append((place, contents))

    @property
    def holds(self) -> bool:
        """Whether the very same objects stand there now."""
        now = map(dict.get, self._owners, self._keys, repeat(_ABSENT))
        return not any(self._empty) and all(map(is_, now, self._values)) and all(starmap(unchanged, self._held))

    def put(self, contents: list[Any]) -> list[str]:
        """Write something else to the places, or these contents again; return the names of what that has changed."""
        if contents is self.contents and self.holds:
            return []
        changed = [pair for pair in zip(self.places, contents, strict=True) if not unchanged(*pair)]
        for place, wanted in changed:
            write(place, wanted)
        return [place.name for place, _ in changed]


def _leaves(contents: Any) -> Iterator[Any]:
    """Yield tensors, and numbers of each model's own; a list or dict inside is a place itself."""
    for value in contents.values() if isinstance(contents, dict) else contents:
        if isinstance(value, (Tensor, PerModel)):
            yield value
        elif isinstance(value, tuple):
            yield from _leaves(value)
