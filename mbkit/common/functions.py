"""What a function of the user's is made of: the objects that it has at hand, and the names in its code."""

from __future__ import annotations

import dis
import sys
from functools import cache, cached_property, partial
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

_TRUSTED = {*sys.stdlib_module_names, "torch", "numpy", "mbkit"} - {"__main__"}  # they keep nothing of the user's
_MADE_OF_PARTS = (MethodType, BuiltinFunctionType, partial, property, cached_property, staticmethod, classmethod)
_PARTS = ("__self__", "__func__", "func", "args", "keywords", "fget", "fset")
DYNAMIC = {"setattr", "vars", "__dict__", "__setattr__"}  # code that names these may store under any name


def parts_of(value: Any) -> tuple | frozenset | None:
    """Return what a value that cannot be changed is made of, such as a tuple's or a bound method's; None for others."""
    if isinstance(value, (tuple, frozenset)):
        return value
    if isinstance(value, _MADE_OF_PARTS):
        return tuple(getattr(value, part, None) for part in _PARTS)
    return None


def at_hand(function: Any) -> tuple:
    """Return the objects that a function has at hand."""
    if isinstance(function, FunctionType):
        cells = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
        return (*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    return ()


def user_made(value: Any) -> bool:
    """Say whether a function, class or Python module is the user's, and not torch's, numpy's or Python's own."""
    module = value.__globals__.get("__name__") if isinstance(value, FunctionType) else None
    module = module or (value.__name__ if isinstance(value, ModuleType) else value.__module__)
    return str(module).partition(".")[0] not in _TRUSTED


@cache
def names_in(code: CodeType) -> tuple[set[str], set[str], set[str], set[str]]:
    """Return the globals that a code reads and assigns, and the attributes that it may read and assigns."""
    found: dict[str, set[str]] = {}
    for instruction in dis.get_instructions(code):
        found.setdefault(instruction.opname, set()).add(instruction.argval)
    read = found.get("LOAD_GLOBAL", set()) | found.get("IMPORT_NAME", set())
    named = [names for kind, names in found.items() if kind.endswith(("_ATTR", "_METHOD", "IMPORT_FROM"))]
    names = (read & DYNAMIC) | {c for c in code.co_consts if isinstance(c, str) and c.isidentifier()}  # of getattr
    own = read, found.get("STORE_GLOBAL", set()), names.union(*named), found.get("STORE_ATTR", set())
    inner = [names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return tuple(set().union(*column) for column in zip(own, *inner, strict=True))


def depth_of_user() -> int:
    """Return the `stacklevel` by which the caller's warning shows the user's line, past torch's and constructors."""
    frame, depth, ours = sys._getframe(1), 1, ("mbkit.", "torch.")
    while frame.f_back and (frame.f_code.co_name == "__init__" or frame.f_globals.get("__name__", "").startswith(ours)):
        frame, depth = frame.f_back, depth + 1
    return depth
