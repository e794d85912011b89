"""What the tests of diagnose share: small models, their data, and two batches that mbkit did not write."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from mbkit.verify.subject import BatchRecipe

M = 3
RATES = (0.001, 0.01, 0.1)
OPTIMIZERS = (torch.optim.SGD, torch.optim.Adam)
KINDS = ("mlp", "convolution")


def schedule(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def build_model(kind, dropout=0.3):
    if kind == "mlp":
        return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(dropout), nn.Linear(12, 3))
    layers = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(dropout), nn.Linear(36, 3)]
    return nn.Sequential(*layers)


def case(kind="mlp", optimizer_cls=torch.optim.Adam, rate=0.01, seed=1, max_norm=0.5, dropout=0.3):
    """Return the arguments of diagnose, its keywords, and the recipe of a batch without a fault."""
    torch.manual_seed(seed)
    models = [build_model(kind, dropout) for _ in range(M)]
    shape = (16, 6) if kind == "mlp" else (16, 2, 8, 8)
    data = [(torch.randn(shape), torch.randint(3, (16,))) for _ in range(4)]
    more = {"momentum": 0.9} if optimizer_cls is torch.optim.SGD else {}
    configs = [{"lr": rate * 2**m, **more} for m in range(M)]
    keywords = {"steps": 4, "seeds": range(seed, seed + M), "max_norm": max_norm, "scheduler": schedule}
    arguments = models, optimizer_cls, configs, data, F.cross_entropy
    return arguments, keywords, BatchRecipe(optimizer_cls, max_norm, schedule)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 3, dtype=torch.complex64))

    def forward(self, x):
        return (x.to(self.w.dtype) @ self.w).abs()


class Bare:
    """A batch in bare torch.func: vmap of grad, and SGD with momentum by hand, on plain dicts of tensors."""

    def __init__(self, models, configs, seeds):
        self.params, _ = stack_module_state(models)
        self.params = {name: p.detach() for name, p in self.params.items()}
        self.momenta = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.rates = torch.tensor([config["lr"] for config in configs], dtype=torch.float64)
        self.model, self.momentum, self.grads = copy.deepcopy(models[0]), configs[0]["momentum"], {}

    def step(self, inputs, targets, loss_fn):
        def loss(params):
            return loss_fn(functional_call(self.model, params, (inputs,)), targets)

        self.grads, losses = vmap(grad_and_value(loss), randomness="different")(self.params)
        self.change_gradients()
        for name, gradient in self.grads.items():
            self.momenta[name] = self.momentum * self.momenta[name] + gradient
            rates = self.rates.to(gradient).view(-1, *[1] * (gradient.dim() - 1))
            self.params[name] = self.params[name] - rates * self.momenta[name]
        return losses.detach()

    def change_gradients(self):
        pass

    def parameters(self, m):
        return {name: p[m] for name, p in self.params.items()}

    def gradients(self, m):
        return {name: g[m] for name, g in self.grads.items()}

    def optimizer_state(self, m):
        return {name: {"momentum": momentum[m]} for name, momentum in self.momenta.items()}


class Library:
    """The library modelbatch 0.1.0, as its documentation uses it."""

    def __init__(self, models, configs, seeds, optimizer_cls=torch.optim.Adam, reduction="sum", schedulers=False):
        from modelbatch import ModelBatch
        from modelbatch.optimizer import OptimizerFactory

        self.batch, self.reduction = ModelBatch(models), reduction
        factory = OptimizerFactory(optimizer_cls, {"lr": 0.1})
        self.optimizer = factory.create_optimizer(self.batch, [dict(config) for config in configs])
        self.schedulers = []
        if schedulers:
            scheduler_cls = torch.optim.lr_scheduler.ExponentialLR
            self.schedulers = factory.create_lr_scheduler(self.optimizer, scheduler_cls, [{"gamma": 0.9}] * len(models))

    def step(self, inputs, targets, loss_fn):
        self.optimizer.zero_grad()
        self.batch.compute_loss(self.batch(inputs), targets, loss_fn, self.reduction).backward()
        self.optimizer.step()
        for scheduler in self.schedulers:
            scheduler.step()
        return self.batch.latest_losses

    def _views(self, m):
        return dict(zip(self.batch.stacked_params, self.optimizer.param_groups[m]["params"], strict=True))

    def parameters(self, m):
        return {name: p.detach()[m] for name, p in self.batch.stacked_params.items()}

    def gradients(self, m):
        return {name: view.grad for name, view in self._views(m).items()}

    def optimizer_state(self, m):
        return {name: self.optimizer.state[view] for name, view in self._views(m).items()}

    def learning_rate(self, m):
        return self.optimizer.param_groups[m]["lr"]
