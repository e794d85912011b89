"""Trains one kind of layer with one habit after the other, alone in plain PyTorch and in a batch, and compares.

A habit is what people do around the forward pass: two backward passes before an update, clipping, a scaler, gradients
that are kept as zeros, a gradient penalty, edits of gradients in place, an evaluation between updates, models that are
stopped, chunks, a compiled step (its traced graph, which is not handed to the compiler). All run in a row on the same
models, so that what one leaves behind meets the next.
"""

from __future__ import annotations

import warnings
from typing import Any
from unittest import mock

import torch
import torch._inductor
from exactness_cases import Case
from exactness_check import SEEDS, M, batch_inputs, build, gradients, inputs, loss_of, unlike
from torch import Tensor, nn

from mbkit import GradScaler, ModelBatch, OptimizerFactory, fit

HABITS = "two passes,edited,clipped,scaled,kept as zeros,penalty,evaluated,frozen,chunks,one by one,compiled".split(",")
RATE, NORM, FROZEN, TOLERANCE = 0.05, 0.3, 1, 1e-10


class Side:
    """One side of the comparison: what all habits do, in terms of what the two sides do differently."""

    case: Case
    scaler: Any
    optimizer: Any
    module: nn.Module

    def losses(self, step: int) -> Tensor:
        raise NotImplementedError

    def backward(self, step: int) -> None:
        losses = self.losses(step)
        if losses.requires_grad:
            losses.sum().backward()

    def run(self, habit: str, step: int) -> None:
        """Make one update."""
        if habit == "kept as zeros":
            self.optimizer.zero_grad(set_to_none=False)
        else:
            self.optimizer.zero_grad()
        if habit == "scaled":
            losses = self.losses(step)
            if losses.requires_grad:
                self.scaler.scale(losses).sum().backward()
                self.scaler.unscale_(self.optimizer)
                self.clip()
                self.scaler.step(self.optimizer)
                self.scaler.update()
            return
        if habit == "penalty":
            self.penalized(step)
        else:
            self.backward(step)
        if habit == "two passes":
            self.backward(step + 100)
        elif habit == "edited":
            for i, gradient in enumerate(p.grad for p in self.module.parameters()):
                if gradient is not None:
                    gradient.mul_(0.5 + 0.1 * i)
        elif habit == "clipped":
            self.clip()
        elif habit == "evaluated":
            self.module.eval()
            with torch.set_grad_enabled(self.case.trains_in_eval):
                self.losses(step + 200)
            self.module.train()
        self.optimizer.step()

    def penalized(self, step: int) -> None:
        """Add the squared gradients to the loss, which takes a second derivative."""
        losses = self.losses(step)
        trained = [p for p in self.module.parameters() if p.requires_grad]
        if losses.requires_grad:
            first = torch.autograd.grad(losses.sum(), trained, create_graph=True, allow_unused=True)
            penalty = sum(g.abs().square().sum() for g in first if g is not None)
            (losses.sum() + 0.1 * penalty).backward()

    def clip(self) -> None:
        raise NotImplementedError


class Alone(Side):
    def __init__(self, case: Case, model: nn.Module, m: int, shared: bool) -> None:
        self.case, self.module, self.m = case, model, 0 if shared else m
        self.optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def losses(self, step: int) -> Tensor:
        return loss_of(self.module(*inputs(self.case, step, self.m, torch.float64)))

    def clip(self) -> None:
        nn.utils.clip_grad_norm_(self.module.parameters(), NORM)


class Together(Side):
    def __init__(self, case: Case, models: list[nn.Module], shared: bool) -> None:
        self.case, self.shared = case, shared
        self.module = ModelBatch(models, shared_input=shared, seeds=SEEDS)
        self.optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(self.module, lr=RATE)
        self.scaler = GradScaler(init_scale=8.0)

    def losses(self, step: int) -> Tensor:
        x = batch_inputs(self.case, self.shared, step, torch.float64)
        return self.module.compute_loss(self.module(*x), torch.zeros(()), loss_of, reduction="none")

    def clip(self) -> None:
        self.module.clip_grad_norm_(NORM)

    def run(self, habit: str, step: int) -> None:
        if habit == "frozen":
            self.module.freeze(FROZEN)
            super().run(habit, step)
            self.module.unfreeze(FROZEN)
        elif habit in ("chunks", "one by one"):
            x = batch_inputs(self.case, self.shared, step, torch.float64)
            size = 2 if habit == "chunks" else 1
            pair = (tuple(x), torch.zeros(()))
            fit(self.module, self.optimizer, [pair], loss_of, chunk_size=size, shared_targets=True, progress=False)
        elif habit == "compiled":
            pair = (tuple(batch_inputs(self.case, self.shared, step, torch.float64)), torch.zeros(()))
            with mock.patch("torch._inductor.compile", lambda graph, *_, **__: graph):
                fit(self.module, self.optimizer, [pair], loss_of, compile=True, shared_targets=True, progress=False)
        else:
            super().run(habit, step)


def problem(case: Case, shared: bool, without: str = "") -> str:
    """Return the first difference between the two sides in words, or ""; `without` leaves a habit out."""
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about what the rows do; ours have tests of their own
            return _problem(case, shared, without)
    finally:
        torch.set_default_dtype(torch.float32)


def _problem(case: Case, shared: bool, without: str) -> str:
    models = [Alone(case, model, m, shared) for m, model in enumerate(build(case))]
    left_out = {without}
    if case.evaluate:
        left_out |= {"evaluated", "chunks", "one by one", "compiled"}  # these put the models into train mode
    if any(p.is_complex() for model in models for p in model.module.parameters()):
        left_out.add("scaled")  # torch's own scaler has no kernel for them
    if not _differentiable_twice(case, shared):
        left_out.add("penalty")
    habits = [habit for habit in HABITS if habit not in left_out]
    expected: dict[tuple[str, int], tuple[dict, dict]] = {}
    for m, side in enumerate(models):
        torch.manual_seed(SEEDS[m])
        for step, habit in enumerate(habits):
            if (habit, m) != ("frozen", FROZEN):
                side.run(habit, step)
            grads = {n: p.grad.clone() for n, p in side.module.named_parameters() if p.grad is not None}
            expected[habit, m] = grads, {n: t.clone() for n, t in side.module.state_dict().items()}
    together = Together(case, build(case), shared)
    for step, habit in enumerate(habits):
        try:
            together.run(habit, step)
        except Exception as error:
            return f"{habit}: {type(error).__name__}: {error}"
        states = together.module.get_model_states()
        for m in range(M):
            grads, state = expected[habit, m]
            found = unlike(state, states[m], TOLERANCE)
            # A gradient that waits for a frozen model is not applied, and a compiled step leaves none behind.
            if not found and habit not in ("frozen", "compiled"):
                found = unlike(grads, gradients(together.module, m), TOLERANCE)
            if found:
                return f"{habit}: model {m}: {found}"
    return ""


def _differentiable_twice(case: Case, shared: bool) -> bool:
    try:
        Alone(case, build(case)[0], 0, shared).penalized(0)
    except (RuntimeError, NotImplementedError):
        return False
    return True
