"""The house keeps its shape: imports run one way, files stay short, and no room uses another room's private names.

The graph is drawn from the source, so imports inside functions and for annotations only are arrows like any other. What
is still wrong stands in a list here, and may only get shorter.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import mbkit

PACKAGE = Path(mbkit.__file__).parent
ENTRIES, FILE_LINES, PACKAGE_LINES = 15, 300, 22_298

# From the top down: a room may import from the rooms after it. `mbkit` is the front door, `__init__.py`.
FLOORS = [
    {"__main__"},
    {"mbkit"},
    {"widgets"},
    {"lessons"},
    {"benchmark"},
    {"verify"},
    {"sweep"},
    {"figures"},
    {"training"},
    {"optim"},
    {"batch"},
    {"vmap"},
    {"data", "models"},
    {"common"},
]
KNOWN_ARROWS: set[str] = set()
RULES = "convolution data_dependent embedding linear losses randomness recurrent".split()
KNOWN_CIRCLES: list[set[str]] = []
KNOWN_PRIVATE: dict[str, set[str]] = {}


def name_of(file: Path) -> str:
    """Return a file's module, such as "optim.rules"; a room's `__init__.py` is the room, the package's is "mbkit"."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "mbkit"


FILES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}
TREES = {module: ast.parse(file.read_text(encoding="utf-8")) for module, file in FILES.items()}


def room(module: str) -> str:
    return module.split(".")[0]


def imported(module: str, tree: ast.AST, modules: Iterable[str]) -> Iterator[str]:
    """Yield the modules of the package that one of them imports anywhere in its source."""
    is_room = module == "mbkit" or FILES[module].name == "__init__.py"
    here = [] if module == "mbkit" else module.split(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name.split(".")[1:] for alias in node.names if alias.name.split(".")[0] == "mbkit"]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                away = node.level - (1 if is_room else 0)
                base = here[: len(here) - away]
            elif (node.module or "").split(".")[0] == "mbkit":
                base = []
            else:
                continue
            rest = (node.module or "").split(".") if node.level else node.module.split(".")[1:]
            base = [*base, *filter(None, rest)]
            found = [[*base, alias.name] if ".".join([*base, alias.name]) in modules else base for alias in node.names]
        else:
            continue
        yield from (".".join(parts) or "mbkit" for parts in found)


def graph() -> dict[str, set[str]]:
    return {module: set(imported(module, tree, FILES)) - {module} for module, tree in TREES.items()}


def circles(arrows: dict[str, set[str]]) -> list[set[str]]:
    """Return the sets of nodes that can all reach each other."""

    def reached(node: str) -> set[str]:
        seen, left = set(), [node]
        while left:
            new = arrows.get(left.pop(), set()) - seen
            seen |= new
            left += new
        return seen

    reach = {node: reached(node) for node in arrows}
    found: list[set[str]] = []
    for node in arrows:
        circle = {other for other in reach[node] if node in reach.get(other, set())}
        if node in circle and circle not in found:
            found.append(circle)
    return found


def test_imports_run_one_way_between_the_rooms():
    floor = {name: n for n, names in enumerate(FLOORS) for name in names}
    assert {room(module) for module in FILES} <= set(floor)
    upward = {
        f"{module} > {other}"
        for module, others in graph().items()
        for other in others
        if room(module) != room(other) and floor[room(module)] >= floor[room(other)]
    }
    assert upward - KNOWN_ARROWS == set()


def test_no_files_import_each_other_in_a_circle():
    new = [circle for circle in circles(graph()) if not any(circle <= known for known in KNOWN_CIRCLES)]
    assert new == []


def test_rooms_and_files_are_few_and_short():
    entries = [entry.name for entry in PACKAGE.iterdir() if entry.name != "__pycache__"]
    assert len(entries) <= ENTRIES, entries
    lines = {module: len(file.read_text(encoding="utf-8").splitlines()) for module, file in FILES.items()}
    assert {module: count for module, count in lines.items() if count > FILE_LINES} == {}
    assert sum(lines.values()) <= PACKAGE_LINES


# Private names


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


OWNERS = {"batch": "batch", "chunk": "batch", "optimizer": "optim"}  # what variables of these names hold, everywhere
TORCHS = set(dir(torch.Tensor)) | set(vars(nn.Module())) | set(dir(nn.Module))


def own_names(tree: ast.AST) -> set[str]:
    """Return the private names that a file gives to functions, classes, attributes of self, of classes and the file."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            found.add(node.attr)
        if isinstance(node, (ast.ClassDef, ast.Module)):
            for line in node.body:
                targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
                found |= {
                    name.id for target in targets if target for name in ast.walk(target) if type(name) is ast.Name
                }
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "__setattr__" and is_self(node.args[0]):
            found |= {arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)}
        if isinstance(node, ast.AugAssign) and ast.unparse(node.target) == "self.__dict__":
            found |= {key.value for key in getattr(node.value, "keys", []) if isinstance(key, ast.Constant)}
    return set(filter(is_private, found))


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def used_names(tree: ast.AST) -> set[tuple[str, str]]:
    """Return whose private names a file reads, writes or imports, getattr and the like included.

    Each is a pair: the name of the variable, or of the last attribute before the name, "" if it has none; and the name.
    """
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add((holder(node.value), node.attr))
        elif isinstance(node, ast.ImportFrom):
            found |= {("", alias.name) for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "getattr",
            "setattr",
            "hasattr",
            "delattr",
        ):
            found |= {(holder(node.args[0]), arg.value) for arg in node.args[1:2] if isinstance(arg, ast.Constant)}
        elif isinstance(node, ast.Subscript) and getattr(node.value, "attr", "") == "__dict__":
            found |= {(holder(node.value.value), node.slice.value)} if isinstance(node.slice, ast.Constant) else set()
    return {(of, name) for of, name in found if is_private(name)}


def holder(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def private_uses() -> dict[str, set[str]]:
    """Return each file's uses of private names of another room.

    Whose a name is, is told by the variable where that is a batch or an optimizer; else a name that the file's own room
    defines is taken for its own, and one that no room defines, or that torch's tensors and modules have, for torch's.
    So this finds less than there may be, and nothing that is not.
    """
    names: dict[str, set[str]] = {}
    for module, tree in TREES.items():
        names.setdefault(room(module), set()).update(own_names(tree))
    uses: dict[str, set[str]] = {}
    for module, tree in TREES.items():
        for of, name in used_names(tree):
            rooms = {OWNERS[of]} if of in OWNERS else set(names)
            owners = {owner for owner in rooms if name in names.get(owner, ())}
            if owners and room(module) not in owners and name not in TORCHS:
                uses.setdefault(module, set()).add(f"{of}.{name}")
    return uses


def test_no_room_uses_another_rooms_private_names():
    new = {module: names - KNOWN_PRIVATE.get(module, set()) for module, names in private_uses().items()}
    assert {module: names for module, names in new.items() if names} == {}


# The tests' own eyes


def test_a_circle_and_an_import_inside_a_function_are_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == [{"a", "b", "c"}]
    source = "if TYPE_CHECKING:\n    from ..optim import rules\n"
    source += "def f():\n    from .step import X\n    import mbkit.data.load"
    found = set(imported("training.batched", ast.parse(source), FILES))
    assert found == {"optim.rules", "training.step", "data.load"}


@pytest.mark.parametrize(
    "source",
    ["x._hidden", "x._hidden = 1", "from .a import _hidden", "getattr(x, '_hidden')", "x.__dict__['_hidden'] = 1"],
)
def test_private_names_are_seen(source):
    assert {name for _, name in used_names(ast.parse(source))} == {"_hidden"}
    assert own_names(ast.parse(source)) == set()


@pytest.mark.parametrize(
    "source",
    [
        "_hidden = 1",
        "def _hidden(): ...",
        "class A:\n    _hidden: int = 1",
        "class A:\n    def f(self):\n        self._hidden = 1",
        "object.__setattr__(self, '_hidden', 1)",
        "self.__dict__ |= {'_hidden': 1}",
    ],
)
def test_definitions_of_private_names_are_seen(source):
    assert own_names(ast.parse(source)) == {"_hidden"}
