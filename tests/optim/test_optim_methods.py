"""Optimizers with steps in two halves, with closures or with modes, against M lone runs in plain PyTorch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from oracle import SEEDS, assert_same_models, batches, seed_all
from torch import Tensor, nn, optim

from mbkit import ModelBatch, OptimizerFactory, fit

MSE = nn.functional.mse_loss
RATES = [0.1, 0.03, 0.01, 0.05]


class SAM(optim.Optimizer):
    """Sharpness-aware minimization, as its most used implementation writes it."""

    def __init__(self, params: Any, base_optimizer: type, rho: float = 0.05, **kwargs: Any) -> None:
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        norm = torch.stack([p.grad.norm() for p in self.param_groups[0]["params"]]).norm()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old_p"] = p.data.clone()
                p.add_(p.grad * (group["rho"] / (norm + 1e-12)))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old_p"]  # back to w
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        assert closure is not None, "SAM needs a closure"
        closure = torch.enable_grad()(closure)
        self.first_step(zero_grad=True)
        closure()
        self.second_step()


class ScheduleFree(optim.Optimizer):
    """SGD of y between a fast point z and an average x; `eval` moves the weights from y to x, `train` back."""

    def __init__(self, params: Any, lr: float, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "train_mode": False, "weight_sum": 0.0})

    @torch.no_grad()
    def eval(self) -> None:
        self._move(False, lambda beta: 1 - 1 / beta)

    @torch.no_grad()
    def train(self) -> None:
        self._move(True, lambda beta: 1 - beta)

    def _move(self, train: bool, weight: Callable) -> None:
        for group in self.param_groups:
            if group["train_mode"] is not train:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], weight(group["beta"]))
                group["train_mode"] = train

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        if not self.param_groups[0]["train_mode"]:
            raise RuntimeError("call train() first")
        for group in self.param_groups:
            group["k"] += 1
            group["weight_sum"] += group["lr"] ** 2
            part = group["lr"] ** 2 / group["weight_sum"]
            for p in group["params"]:
                if "z" not in self.state[p]:
                    self.state[p]["z"] = p.detach().clone()
                z = self.state[p]["z"]
                p.lerp_(z, part).add_(p.grad, alpha=group["lr"] * (group["beta"] * (1 - part) - 1))
                z.sub_(p.grad, alpha=group["lr"])


class Polyak(optim.SGD):
    """Its step size is the loss over the gradient's squared norm."""

    @torch.no_grad()
    def step(self, closure: Callable) -> Tensor:
        loss = torch.enable_grad()(closure)()
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        size = loss / torch.stack([g.square().sum() for g in grads]).sum()
        for group in self.param_groups:
            for p in group["params"]:
                p.data = p.data - group["lr"] * size * p.grad
        return loss


def build() -> list[nn.Module]:
    torch.manual_seed(0)
    nets = [
        nn.Sequential(nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 2))
        for _ in RATES
    ]
    return [net.double() for net in nets]


Loop = Callable[[Callable[[], Any], Any, Any], None]


def in_halves(evaluate: Callable[[], Any], optimizer: Any, model: Any) -> None:
    evaluate()
    optimizer.first_step(zero_grad=True)
    evaluate()
    optimizer.second_step(zero_grad=True)


def after_a_first_pass(evaluate: Callable[[], Any], optimizer: Any, model: Any) -> None:
    evaluate()
    optimizer.step(evaluate)
    optimizer.zero_grad()


def by_closure(evaluate: Callable[[], Any], optimizer: Any, model: Any) -> None:
    def closure() -> Any:
        optimizer.zero_grad()
        return evaluate()

    optimizer.step(closure)


def in_modes(evaluate: Callable[[], Any], optimizer: Any, model: Any) -> None:
    optimizer.train()
    optimizer.zero_grad()
    evaluate()
    optimizer.step()
    optimizer.eval()


CASES: dict[str, tuple[Loop, type, dict]] = {
    "SAM in two halves": (in_halves, SAM, {"base_optimizer": optim.SGD, "momentum": 0.9, "rho": [0.05, 0.5, 0.1, 0.2]}),
    "SAM by a closure": (after_a_first_pass, SAM, {"base_optimizer": optim.Adam}),
    "schedule-free": (in_modes, ScheduleFree, {"beta": [0.9, 0.8, 0.95, 0.9]}),
    "LBFGS": (by_closure, optim.LBFGS, {"max_iter": [4, 2, 3, 1]}),
    "LBFGS, line search": (by_closure, optim.LBFGS, {"max_iter": 3, "line_search_fn": "strong_wolfe"}),
    "Polyak": (by_closure, Polyak, {}),
    "Rprop by a closure": (by_closure, optim.Rprop, {}),
    "Adam by a closure": (by_closure, optim.Adam, {}),
}


def train(
    loop: Loop, cls: type, config: dict, frozen: Sequence[int] = ()
) -> tuple[ModelBatch, list[nn.Module], Any, list[Any]]:
    """Train four models in a batch and alone; the frozen ones only up to the second step."""
    data = batches(own=False)
    lone, batch = build(), ModelBatch(build(), seeds=SEEDS)
    optimizer = OptimizerFactory(cls).create_optimizer(batch, lr=RATES, **config)
    lones = []
    for step, (x, y) in enumerate(data):
        if step == 2:
            batch.freeze(frozen)

        def evaluate(x: Tensor = x, y: Tensor = y) -> Tensor:
            losses = batch.compute_loss(batch(x), y, MSE, reduction="none")
            losses.sum().backward()
            return losses

        loop(evaluate, optimizer, batch)
    for m, model in enumerate(lone):
        seed_all(SEEDS[m])
        own = {name: value[m] if isinstance(value, list) else value for name, value in config.items()}
        lones.append(cls(model.parameters(), lr=RATES[m], **own))
        for x, y in data[: 2 if m in frozen else None]:

            def evaluate_alone(model: nn.Module = model, x: Tensor = x, y: Tensor = y) -> Tensor:
                loss = MSE(model(x), y)
                loss.backward()
                return loss

            loop(evaluate_alone, lones[m], model)
    return batch, lone, optimizer, lones


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("frozen", [(), (1,)], ids=["all", "one frozen"])
def test_each_model_is_trained_as_alone(case: tuple[Loop, type, dict], frozen: tuple[int, ...]) -> None:
    """Weights, buffers, and the random streams that dropout draws from, however often a model's closure was called."""
    batch, lone, *_ = train(*case, frozen=frozen)
    batch.zero_grad()
    for model in lone:
        model.zero_grad()
    assert_same_models(batch, lone)
    assert all(not torch.equal(model[0].weight, start[0].weight) for model, start in zip(lone, build(), strict=True))


def test_the_loss_that_a_class_reads_is_each_models_own() -> None:
    """A sum over the models may pass through a step, which only returns it; to read it is refused."""
    x, y = batches(own=False)[0]
    for cls, config in ((optim.Rprop, {}), (SAM, {"base_optimizer": optim.SGD}), (Polyak, {}), (optim.LBFGS, {})):
        batch = ModelBatch(build(), seeds=SEEDS)
        optimizer = OptimizerFactory(cls).create_optimizer(batch, lr=0.1, **config)

        def closure(batch: ModelBatch = batch) -> Tensor:
            loss = batch.compute_loss(batch(x), y, MSE)
            loss.backward()
            return loss

        closure()
        if cls in (Polyak, optim.LBFGS):
            with pytest.raises(TypeError, match="needs each model's own: return the M losses"):
                optimizer.step(closure)
        else:
            result = optimizer.step(closure)
            assert result is None if cls is SAM else result.shape == ()


def test_an_error_in_the_middle_of_a_step_is_raised_where_it_was_called() -> None:
    batch = ModelBatch(build())
    optimizer = OptimizerFactory(optim.LBFGS).create_optimizer(batch, max_iter=3)
    calls: list[int] = []

    def closure() -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise ArithmeticError("mine")
        losses = torch.stack([p.square().flatten(1).sum(1) for p in batch.parameters()]).sum(0)
        losses.sum().backward()
        return losses

    before = threading.active_count()
    with pytest.raises(ArithmeticError, match="mine"):
        optimizer.step(closure)
    assert threading.active_count() == before


class Counting(optim.SGD):
    """Has methods of its own."""

    def norms(self, scale: float = 1.0) -> Tensor:
        return scale * torch.stack([p.norm() for p in self.param_groups[0]["params"]]).norm()

    def rate(self) -> float:
        return self.param_groups[0]["lr"]

    def select(self) -> None:
        raise AssertionError("the batch's optimizer has this name itself")


def test_methods_return_what_each_models_own_returns() -> None:
    batch = ModelBatch(build())
    optimizer = OptimizerFactory(Counting).create_optimizer(batch, lr=RATES)
    norms = [2 * torch.stack([p.norm() for p in model.parameters()]).norm() for model in batch]
    torch.testing.assert_close(optimizer.norms(scale=2.0), torch.stack(norms))
    assert optimizer.rate() == RATES
    assert optimizer.select([1], batch.select([1])).rate() == [RATES[1]]
    batch.freeze(2)
    assert optimizer.rate() == [0.1, 0.03, None, 0.05]
    for name in ("rates", "_private", "defaults_of"):
        with pytest.raises(AttributeError, match=f"of Counting has no attribute '{name}'"):
            getattr(optimizer, name)


def test_fit_says_what_a_class_needs() -> None:
    for cls, config in ((optim.LBFGS, {}), (SAM, {"base_optimizer": optim.SGD, "lr": 0.1})):
        batch = ModelBatch(build())
        optimizer = OptimizerFactory(cls).create_optimizer(batch, **config)
        with pytest.raises((TypeError, AssertionError), match="needs a closure"):
            fit(batch, optimizer, batches(own=False), MSE, progress=False)
