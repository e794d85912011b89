"""Trains M models alone with plain PyTorch, then in a batch, and says where the two differ."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from exactness_cases import Case
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from mbkit import ModelBatch
from mbkit.vmap import models_with_gradient

M, STEPS, LEARNING_RATE = 3, 5, 0.05
SEEDS = [11, 5, 2**40]


def build(case: Case) -> list[nn.Module]:
    models = []
    for m in range(M):
        torch.manual_seed(100 + m)
        model = case.build(m)
        models.append(model.eval() if case.evaluate else model)
    return models


def inputs(case: Case, step: int, m: int, dtype: torch.dtype) -> list[Any]:
    g = torch.Generator().manual_seed(1000 * step + m)
    made = [
        shape(g) if callable(shape) else torch.randn(shape, generator=g, dtype=torch.float64) for shape in case.inputs
    ]
    return [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in made]


def loss_of(outputs: Any, _: Any = None) -> Tensor:
    """One number from whatever a model returns; every element counts differently."""
    total = torch.zeros(())
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
            value = leaf.abs() if leaf.is_complex() else leaf
            weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
            total = total + (value * weights + 0.1 * value**2).sum() / max(value.numel(), 1)
    return total


def run_alone(case: Case, shared: bool, dtype: torch.dtype = torch.float64) -> list[list[Any]]:
    """Return for each model its trace: everything that training shows, step by step."""
    traces = []
    for m, model in enumerate(build(case)):
        torch.manual_seed(SEEDS[m])
        trace: list[Any] = []
        for step in range(STEPS):
            x = inputs(case, step, 0 if shared else m, dtype)
            leaves = [t.requires_grad_() for t in x if case.grad and isinstance(t, Tensor) and t.is_floating_point()]
            with torch.set_grad_enabled(case.grad):
                outputs = model(*(t.clone() if isinstance(t, Tensor) else t for t in x))
                loss = loss_of(outputs)
            if loss.requires_grad:
                loss.backward()
            trace.append(("outputs", tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, outputs)))
            trace.append(("loss", loss.detach().clone()))
            trace.append(("input grads", [None if t.grad is None else t.grad.clone() for t in leaves]))
            trace.append(("grads", {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
            update(model.parameters())
            trace.append(("state", {n: t.detach().clone() for n, t in model.state_dict().items()}))
        trace.append(("stream", torch.get_rng_state()))
        model.eval()
        with torch.set_grad_enabled(case.trains_in_eval):
            outputs = model(*inputs(case, STEPS, 0 if shared else m, dtype))
        trace.append(("outputs in eval", outputs))
        traces.append(trace)
    return traces


def run_batched(case: Case, shared: bool, dtype: torch.dtype = torch.float64) -> list[list[Any]]:
    """The same from a batch, each trace as model m sees it."""
    batch = ModelBatch(build(case), shared_input=shared, seeds=SEEDS)
    traces: list[list[Any]] = [[] for _ in range(M)]

    def note(what: str, of_model: Callable[[int], Any]) -> None:
        for m in range(M):
            traces[m].append((what, of_model(m)))

    def sliced(tree: Any, m: int) -> Any:
        return tree_map(lambda t: t.detach()[m].clone() if isinstance(t, Tensor) else t, tree)

    for step in range(STEPS):
        x = batch_inputs(case, shared, step, dtype)
        leaves = [t.requires_grad_() for t in x if case.grad and isinstance(t, Tensor) and t.is_floating_point()]
        with torch.set_grad_enabled(case.grad):
            outputs = batch(*(t.clone() if isinstance(t, Tensor) else t for t in x))
            losses = batch.compute_loss(outputs, torch.zeros(()), loss_of, reduction="none")
        if losses.requires_grad:
            losses.sum().backward()
        note("outputs", lambda m, o=outputs: sliced(o, m))
        note("loss", lambda m, v=losses: v.detach()[m].clone())
        note(
            "input grads", lambda m, t=leaves: [None if v.grad is None else v.grad if shared else v.grad[m] for v in t]
        )
        grads = [gradients(batch, m) for m in range(M)]
        note("grads", lambda m, g=grads: g[m])
        update(batch.parameters())
        states = batch.get_model_states()
        note("state", lambda m, s=states: s[m])
    note("stream", lambda m: batch.streams.on("cpu")[m].get_state())
    batch.eval()
    with torch.set_grad_enabled(case.trains_in_eval):
        outputs = batch(*batch_inputs(case, shared, STEPS, dtype))
    note("outputs in eval", lambda m: sliced(outputs, m))
    for m in range(M):  # the stand-alone module goes on where the batch stopped
        batch[m]
    return traces


def gradients(batch: ModelBatch, m: int) -> dict[str, Tensor]:
    """Return copies of the gradients that model m has; a parameter without one alone must have none here."""
    found = {}
    for name, p in batch.named_parameters():
        models = None if p.grad is None else models_with_gradient(p.grad, M)
        if p.grad is not None and (models is None or models[m]):
            found[name] = p.grad[m].clone()
    return found


def batch_inputs(case: Case, shared: bool, step: int, dtype: torch.dtype) -> list[Any]:
    rows = [inputs(case, step, 0 if shared else m, dtype) for m in range(M)]
    if shared:
        return rows[0]
    return [torch.stack(column) if isinstance(column[0], Tensor) else column[0] for column in zip(*rows, strict=True)]


def update(parameters: Sequence[nn.Parameter]) -> None:
    for p in parameters:
        if p.grad is not None:
            with torch.no_grad():
                p.sub_(p.grad, alpha=LEARNING_RATE)
            p.grad = None


def difference(alone: list[list[Any]], batched: list[list[Any]], shared: bool, tolerance: float) -> str | None:
    """Return the first difference above the tolerance in words, or None."""
    for i in range(len(alone[0])):
        what = alone[0][i][0]
        if what == "input grads" and shared:  # one input for all gets the sum of what it gets alone
            rows = [trace[i][1] for trace in alone]
            total = [None if column[0] is None else sum(column) for column in zip(*rows, strict=True)]
            pairs = [(0, total, batched[0][i][1])]
        else:
            pairs = [(m, alone[m][i][1], batched[m][i][1]) for m in range(M)]
        for m, expected, got in pairs:
            problem = unlike(expected, got, 0.0 if what == "stream" else tolerance)
            if problem:
                return f"model {m}, step {i // 5}, {what}: {problem}"
    return None


def unlike(expected: Any, got: Any, tolerance: float) -> str | None:
    if isinstance(expected, dict) and isinstance(got, dict):
        if expected.keys() != got.keys():
            return f"{sorted(got)} instead of {sorted(expected)}"
        for key in expected:
            problem = unlike(expected[key], got[key], tolerance)
            if problem:
                return f"{key}: {problem}"
        return None
    a, b = tree_leaves(expected), tree_leaves(got)
    if len(a) != len(b):
        return f"{len(b)} tensors instead of {len(a)}"
    for x, y in zip(a, b, strict=True):
        if not isinstance(x, Tensor):
            if x is not y and x != y:
                return f"{y} instead of {x}"
            continue
        if x.shape != y.shape or x.dtype != y.dtype:
            return f"{list(y.shape)} {y.dtype} instead of {list(x.shape)} {x.dtype}"
        if not torch.allclose(x, y, rtol=tolerance, atol=tolerance, equal_nan=True):
            return f"off by {(x - y).abs().max().item():.1e}" if x.dtype != torch.bool else "other booleans"
    return None


def verdict(case: Case, shared: bool, dtype: torch.dtype = torch.float64) -> tuple[str, str]:
    """Return "exact", "refused" or "wrong", and why."""
    torch.set_default_dtype(dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about what the rows do; ours have tests of their own
            return _verdict(case, shared, dtype)
    finally:
        torch.set_default_dtype(torch.float32)


def _verdict(case: Case, shared: bool, dtype: torch.dtype) -> tuple[str, str]:
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    alone = run_alone(case, shared, dtype)
    try:
        batched = run_batched(case, shared, dtype)
    except Exception as error:  # any kind: what it says is judged by the caller
        return "refused", f"{type(error).__name__}: {error}"
    problem = difference(alone, batched, shared, tolerance)
    return ("wrong", problem) if problem else ("exact", "")
