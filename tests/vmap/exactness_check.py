"""Trains one kind of layer with one habit after the other, alone in plain PyTorch and in a batch, and compares.

A habit is what people do around the forward pass: plain updates, two backward passes before an update, clipping, a
scaler, gradients that are kept as zeros, a gradient penalty, edits of gradients in place, an evaluation between
updates, models that are stopped, chunks, a compiled step (its traced graph, which is not handed to the compiler). All
run in a row on the same models, so that what one leaves behind meets the next.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
import torch._inductor
from exactness_cases import Case
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from mbkit import GradScaler, ModelBatch, OptimizerFactory, fit
from mbkit.vmap import models_with_gradient

M, SEEDS, RATE, NORM, FROZEN = 3, [11, 5, 2**40], 0.05, 0.3, 1
PLAIN = ["plain"] * 3
HABITS = [*PLAIN, "two passes", "edited", "clipped", "scaled", "kept as zeros", "penalty", "evaluated", "frozen"]
HABITS += ["chunks", "one by one", "selected and merged", "compiled"]
IN_TRAIN_MODE = {"evaluated", "chunks", "one by one", "compiled"}  # these put the models into it


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


def batch_inputs(case: Case, shared: bool, step: int, dtype: torch.dtype) -> list[Any]:
    rows = [inputs(case, step, 0 if shared else m, dtype) for m in range(M)]
    if shared:
        return rows[0]
    return [torch.stack(column) if isinstance(column[0], Tensor) else column[0] for column in zip(*rows, strict=True)]


def loss_of(outputs: Any, _: Any = None) -> Tensor:
    """One number from whatever a model returns; every element counts differently."""
    total = torch.zeros(())
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
            value = leaf.abs() if leaf.is_complex() else leaf
            weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
            total = total + (value * weights + 0.1 * value**2).sum() / max(value.numel(), 1)
    return total


class Side:
    """One side of the comparison: what all habits do, in terms of what the two sides do differently."""

    case: Case
    dtype: torch.dtype
    scaler: Any
    optimizer: Any
    module: nn.Module

    def inputs(self, step: int) -> list[Any]:
        raise NotImplementedError

    def loss(self, outputs: Any) -> Tensor:
        raise NotImplementedError

    def clip(self) -> None:
        raise NotImplementedError

    def losses(self, step: int, track: bool = False) -> Tensor:
        x = self.inputs(step)
        self.leaves = [t.requires_grad_() for t in x if track and isinstance(t, Tensor) and t.is_floating_point()]
        self.outputs = self.module(*(t.clone() if isinstance(t, Tensor) else t for t in x))
        return self.loss(self.outputs)

    def run(self, habit: str, step: int) -> None:
        """Make one update."""
        self.optimizer.zero_grad(set_to_none=habit != "kept as zeros")
        with torch.set_grad_enabled(self.case.grad):
            losses = self.latest = self.losses(step, track=habit == "plain" and self.case.grad)
        if losses.requires_grad:
            if habit == "scaled":
                self.scaler.scale(losses).sum().backward()
                self.scaler.unscale_(self.optimizer)
            elif habit == "penalty":
                self.penalize(losses.sum())
            else:
                losses.sum().backward()
        if habit == "two passes":
            more = self.losses(step + 100)
            if more.requires_grad:
                more.sum().backward()
        elif habit == "edited":
            for i, gradient in enumerate(p.grad for p in self.module.parameters()):
                if gradient is not None:
                    gradient.mul_(0.5 + 0.1 * i)
        elif habit == "evaluated":
            self.module.eval()
            with torch.set_grad_enabled(self.case.trains_in_eval):
                self.losses(step + 200)
            self.module.train()
        if habit in ("clipped", "scaled"):
            self.clip()
        if habit == "scaled" and losses.requires_grad:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()

    def penalize(self, loss: Tensor) -> None:
        """Add the squared gradients to the loss, which takes a second derivative."""
        trained = [p for p in self.module.parameters() if p.requires_grad]
        first = torch.autograd.grad(loss, trained, create_graph=True, allow_unused=True)
        (loss + 0.1 * sum(g.abs().square().sum() for g in first if g is not None)).backward()


class Alone(Side):
    def __init__(self, case: Case, model: nn.Module, m: int, dtype: torch.dtype) -> None:
        self.case, self.module, self.m, self.dtype = case, model, m, dtype
        self.optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def inputs(self, step: int) -> list[Any]:
        return inputs(self.case, step, self.m, self.dtype)

    def loss(self, outputs: Any) -> Tensor:
        return loss_of(outputs)

    def clip(self) -> None:
        nn.utils.clip_grad_norm_(self.module.parameters(), NORM)


class Together(Side):
    def __init__(self, case: Case, shared: bool, dtype: torch.dtype) -> None:
        self.case, self.shared, self.dtype = case, shared, dtype
        self.module = ModelBatch(build(case), shared_input=shared, seeds=SEEDS)
        self.optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(self.module, lr=RATE)
        self.scaler = GradScaler(init_scale=8.0)

    def inputs(self, step: int) -> list[Any]:
        return batch_inputs(self.case, self.shared, step, self.dtype)

    def loss(self, outputs: Any) -> Tensor:
        return self.module.compute_loss(outputs, torch.zeros(()), loss_of, reduction="none")

    def clip(self) -> None:
        self.module.clip_grad_norm_(NORM)

    def run(self, habit: str, step: int) -> None:
        ways = {"chunks": {"chunk_size": 2}, "one by one": {"chunk_size": 1}, "compiled": {"compile": True}}
        if habit == "frozen":
            self.module.freeze(FROZEN)
            super().run(habit, step)
            self.module.unfreeze(FROZEN)
        elif habit == "selected and merged":
            self.in_parts(step)
        elif habit in ways:
            data, options = [(tuple(self.inputs(step)), torch.zeros(()))], {"shared_targets": True, "progress": False}
            with mock.patch("torch._inductor.compile", lambda graph, *_, **__: graph):
                fit(self.module, self.optimizer, data, loss_of, **ways[habit], **options)
        else:
            super().run(habit, step)

    def in_parts(self, step: int) -> None:
        """Make the update with batches of some of the models, and put them together again."""
        whole, optimizer, x, parts = self.module, self.optimizer, self.inputs(step), []
        for models in ([0, 1], [2]):
            self.module = whole.select(models)
            self.optimizer = optimizer.select(models, self.module)
            self.optimizer.zero_grad()
            mine = [t if self.shared or not isinstance(t, Tensor) else t[models] for t in x]
            mine = [t.clone() if isinstance(t, Tensor) else t for t in mine]
            with torch.set_grad_enabled(self.case.grad):
                losses = self.loss(self.module(*mine))
            if losses.requires_grad:
                losses.sum().backward()
            self.optimizer.step()
            parts.append((self.module, self.optimizer))
        self.module = ModelBatch.merge([module for module, _ in parts])
        self.optimizer = type(optimizer).merge([one for _, one in parts], self.module)

    def gradients(self, m: int) -> dict[str, Tensor]:
        """Return copies of the gradients that model m has; a parameter without one alone must have none here."""
        found = {}
        for name, p in self.module.named_parameters():
            models = None if p.grad is None else models_with_gradient(p.grad, M)
            if p.grad is not None and (models is None or models[m]):
                found[name] = p.grad[m].clone()
        return found


def compare(case: Case, shared: bool, habits: Sequence[str] = HABITS, dtype: torch.dtype = torch.float64) -> None:
    """Train with one habit after the other, and assert after each that both sides show the same."""
    torch.set_default_dtype(dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about what the rows do; ours have tests of their own
            _compare(case, shared, habits, dtype)
    finally:
        torch.set_default_dtype(torch.float32)


def _compare(case: Case, shared: bool, habits: Sequence[str], dtype: torch.dtype) -> None:
    models = [Alone(case, model, 0 if shared else m, dtype) for m, model in enumerate(build(case))]
    left_out = set() if case.grad else {*HABITS} - {*PLAIN}
    left_out |= IN_TRAIN_MODE if case.evaluate else set()
    if any(p.is_complex() for model in models for p in model.module.parameters()):
        left_out.add("scaled")  # torch's own scaler has no kernel for them
    if "penalty" in habits and not _differentiable_twice(case, dtype):
        left_out.add("penalty")
    habits = [habit for habit in habits if habit not in left_out]
    expected = [_trace(side, m, habits) for m, side in enumerate(models)]
    together, tolerance = Together(case, shared, dtype), 1e-10 if dtype == torch.float64 else 1e-4
    for step, habit in enumerate(habits):
        together.run(habit, step)
        states = together.module.get_model_states()
        for m, (trace, _, _) in enumerate(expected):
            got = {"state": dict(states[m])}
            # A gradient that waits for a frozen model is not applied, and a compiled step leaves none behind.
            if habit not in ("frozen", "compiled"):
                got["grads"] = together.gradients(m)
            if habit == "plain":
                got |= {"outputs": sliced(together.outputs, m), "loss": together.latest[m]}
            for what, value in got.items():
                assert_alike(value, trace[step][what], tolerance, f"{habit}, step {step}, model {m}, {what}")
        if habit == "plain":  # one input for all gets the sum of what it gets alone
            columns = zip(*(trace[step]["input grads"] for trace, _, _ in expected), strict=True)
            for tensor, column in zip(together.leaves, columns, strict=True):
                grads = [sum(column)] if shared and column[0] is not None else column
                got = [tensor.grad] if shared or tensor.grad is None else tensor.grad
                for a, b in zip(got, grads, strict=False):
                    assert_alike(a, b, tolerance, f"gradient of the input, step {step}")
    together.module.eval()
    with torch.set_grad_enabled(case.trains_in_eval):
        together.losses(len(habits))
    for m, (_, stream, outputs) in enumerate(expected):
        assert_alike(sliced(together.outputs, m), outputs, tolerance, f"outputs in eval, model {m}")
        assert torch.equal(together.module.streams.on("cpu")[m].get_state(), stream), f"stream of model {m}"
        together.module[m]  # a stand-alone module can be taken out


def _trace(side: Alone, m: int, habits: list[str]) -> tuple[list[dict[str, Any]], Tensor, Any]:
    """Train model m alone; return what each step shows, its random stream, and its outputs in eval."""
    torch.manual_seed(SEEDS[m])
    trace = []
    for step, habit in enumerate(habits):
        if (habit, m) != ("frozen", FROZEN):
            side.run(habit, step)
        seen = {"grads": {n: p.grad.clone() for n, p in side.module.named_parameters() if p.grad is not None}}
        seen["state"] = {n: t.clone() for n, t in side.module.state_dict().items()}
        seen |= {"outputs": tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, side.outputs)}
        seen |= {"loss": side.latest.detach(), "input grads": [t.grad for t in side.leaves]}
        trace.append(seen)
    side.module.eval()
    with torch.set_grad_enabled(side.case.trains_in_eval):
        side.losses(len(habits))
    return trace, torch.get_rng_state(), side.outputs


def sliced(tree: Any, m: int) -> Any:
    return tree_map(lambda t: t.detach()[m].clone() if isinstance(t, Tensor) else t, tree)


def assert_alike(got: Any, expected: Any, tolerance: float, what: str) -> None:
    """Compare nested values: the same structure, dtypes and shapes, and numbers up to the tolerance."""
    (a, spec), (b, expected_spec) = tree_flatten(got), tree_flatten(expected)
    assert spec == expected_spec, f"{what}: {spec} instead of {expected_spec}"
    for x, y in zip(a, b, strict=True):
        if not isinstance(y, Tensor):
            assert x is y or x == y, what
            continue
        assert (x.shape, x.dtype) == (y.shape, y.dtype), what
        if not torch.allclose(x, y, rtol=tolerance, atol=tolerance, equal_nan=True):
            raise AssertionError(f"{what}: off by {(x - y).abs().max().item() if x.dtype != torch.bool else 1}")


def _differentiable_twice(case: Case, dtype: torch.dtype) -> bool:
    side = Alone(case, build(case)[0], 0, dtype)
    try:
        losses = side.losses(0)
        if losses.requires_grad:
            side.penalize(losses)
    except (RuntimeError, NotImplementedError):
        return False
    return True
