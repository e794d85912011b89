"""The table of torch's private names holds all that the source uses, and a missing one is named at import."""

from __future__ import annotations

import ast
import functools
import importlib
from pathlib import Path

import pytest
import torch

import mbkit
from mbkit.common import torch_private
from mbkit.common.torch_private import PRIVATE, PRIVATE_OF_COMPILE, missing_names

FILES = sorted(Path(mbkit.__file__).parent.rglob("*.py"))


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


@functools.cache
def private_names(source: str) -> set[str]:
    """The dotted private names of torch that a source imports or reads."""
    tree, names, found = ast.parse(source), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or "torch": alias.name if alias.asname else "torch" for alias in node.names
                      if alias.name.split(".")[0] == "torch"}  # fmt: skip
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "torch":
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    read = {names[node.id] for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in names}
    for node in ast.walk(tree):
        parts, inner = [], node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name) and inner.id in names:
            found.add(".".join([names[inner.id], *reversed(parts)]))
    found |= {name for name in read if not any(longer.startswith(f"{name}.") for longer in found)}
    return {name for name in found if is_private(name)}


def listed(name: str) -> bool:
    table = {**PRIVATE, **PRIVATE_OF_COMPILE}
    return any(name == entry or name.startswith(f"{entry}.") or entry.startswith(f"{name}.") for entry in table)


def test_the_search_finds_each_way_to_use_a_name():
    source = """
import torch
from torch._C import _functorch as functorch
from torch.utils._pytree import tree_map
a = torch._foreach_add_, functorch._add_batch_dim(1), tree_map, torch.__version__, torch.nn.Module
"""
    expected = {"torch._foreach_add_", "torch._C._functorch._add_batch_dim", "torch.utils._pytree.tree_map"}
    assert private_names(source) == expected


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(FILES[0].parent)))
def test_each_private_name_stands_in_the_table(file):
    if file.name != "torch_private.py":
        assert [name for name in sorted(private_names(file.read_text())) if not listed(name)] == []


def test_the_table_holds_nothing_else():
    used = {name for file in FILES if file.name != "torch_private.py" for name in private_names(file.read_text())}
    table = [*PRIVATE, *PRIVATE_OF_COMPILE]
    assert [entry for entry in table if not any(f"{name}.".startswith(f"{entry}.") for name in used)] == []


def test_this_torch_has_them_all():
    import torch._inductor  # noqa: F401  as a compiled step does

    assert missing_names([*PRIVATE, *PRIVATE_OF_COMPILE]) == []


def test_a_missing_one_is_named_at_import_with_its_use(monkeypatch):
    monkeypatch.delattr(torch._C._functorch, "maybe_get_bdim")
    with pytest.raises(ImportError) as told:
        importlib.reload(mbkit)
    tested, name, what = str(told.value).splitlines()
    assert torch.__version__ in tested
    assert "torch._C._functorch.maybe_get_bdim (where the models' dimension is)" in name
    assert what == "Install a torch of that range."


def test_a_name_below_a_missing_one_is_missing_too(monkeypatch):
    assert missing_names(["torch._no_such_room.name", "torch.nn._no_such_name"]) == [
        "torch._no_such_room.name",
        "torch.nn._no_such_name",
    ]
    assert torch_private.missing_names(["torch.nn.Module"]) == []
