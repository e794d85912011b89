"""What is changed in a traced step before inductor compiles it: the same numbers to rounding, in faster loops."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten
_OF_MEMORY = {aten.as_strided.default, aten.as_strided_.default, aten.as_strided_scatter.default}


def improve(graph: Graph) -> None:
    """Change the graph of a step in place, for speed; leave it as it is where the order in memory may count."""
    _keep_what_is_read_often(graph)
    if _minds_memory(graph):
        return
    for node in graph.find_nodes(op="call_function", target=aten.clone.default):
        if _is_turned(node.args[0]):
            node.replace_all_uses_with(node.args[0])
    for node in graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default  # for what lies in another order now


def _minds_memory(graph: Graph) -> bool:
    """Say whether something is read by its strides, or edited in place in one shape and read in another."""
    seen: dict[Node, tuple[Node, Node | None]] = {}  # what a node is a view of, and through which change of shape
    edited: dict[Node, Node | None] = {}
    for node in graph.nodes:
        seen[node] = node, None
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target in _OF_MEMORY:
            return True
        arguments = [(v, a.alias_info) for v, a in zip(node.args, node.target._schema.arguments, strict=False)]
        written = [v for v, alias in arguments if alias is not None and alias.is_write and isinstance(v, Node)]
        edited |= {origin: shape for origin, shape in map(seen.get, written) if origin.op != "placeholder"}
        if any(edited.get(origin, shape) is not shape for origin, shape in map(seen.get, node.all_input_nodes)):
            return True
        if written or node.target.is_view:
            origin, shape = seen[(written or node.args)[0]]
            seen[node] = origin, shape or (node if node.target is aten.view.default else None)
    return False


def _keep_what_is_read_often(graph: Graph) -> None:
    """Return some small things beside the results, so that they are computed once, and not anew by all that use them.

    These are the models' hyperparameters, rounded (a million weights would each work out a bias correction anew), and
    the places that pooling looks up.
    """
    (output,) = graph.find_nodes(op="output")
    for node in graph.find_nodes(op="call_function", target=aten._to_copy.default):
        source = node.args[0].meta["val"].dtype if isinstance(node.args[0], Node) else None
        if source is torch.float64 or node.meta["val"].dtype is torch.int8:
            output.args = ([*output.args[0], node],)


def _is_turned(node: Node) -> bool:
    """Say whether a node is a linear layer's output before it is copied to the order that it has alone.

    Without the copy, activations lie feature by feature, `[M, K, B]`, which makes the products with few features
    faster, such as logits.
    """
    steps = []
    while node.target in (aten.transpose.int, aten.add.Tensor) and len(node.users) == 1:
        steps.append(node.target)
        node = node.args[0]
    return steps == [aten.transpose.int, aten.add.Tensor] and node.target is aten.bmm.default
