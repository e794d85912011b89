"""What fit and fit_alone refuse, and what they only seem to have to."""

import copy
from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
from oracle import (
    CONFIGS,
    SEEDS,
    M,
    assert_same_parameters,
    batched,
    classifiers,
    points,
    trained_alone,
)
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from mbkit.optim import OptimizerFactory
from mbkit.training import fit, fit_alone


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)  # conftest.py puts it back


def _plateau(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


class Short(list):
    """Batches that understate their number."""

    def __len__(self):
        return 2


def _halving(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


# What is wrong -> (error, what it says, what to pass instead of the right thing).
REFUSED_BY_BOTH = {
    "no epochs": (ValueError, "at least 1 as epochs", lambda: {"epochs": 0}),
    "half an epoch": (TypeError, "whole number as epochs", lambda: {"epochs": 1.5}),
    "no batch": (ValueError, "at least one batch", lambda: {"batches": []}),
    "no iterable": (TypeError, "iterable of", lambda: {"batches": 5}),
    "a used-up iterator": (TypeError, "used up", lambda: {"batches": iter(points()), "epochs": 2}),
    "a generator": (TypeError, "used up", lambda: {"batches": (pair for pair in points()), "epochs": 2}),
    "no pairs": (TypeError, r"pair \(inputs, targets\), got a Tensor", lambda: {"batches": torch.randn(3, 2)}),
    "one thing": (TypeError, r"got a list of 1: give .* \(input, another, targets\)", lambda: {"batches": [[1]]}),
    "no targets": (TypeError, "got a dict of x: .* one of labels, label", lambda: {"batches": [{"x": 1}]}),
    "two targets": (TypeError, "got a dict with labels and y", lambda: {"batches": [{"x": 1, "y": 2, "labels": 3}]}),
    "no loss": (TypeError, "loss_fn", lambda: {"loss_fn": None}),
    "another rhythm": (ValueError, "scheduler_every", lambda: {"scheduler_every": "batch"}),
    "no scheduler": (TypeError, "callable that makes", lambda: {"scheduler": 0.1}),
    "a callable of something else": (TypeError, "callable that makes", lambda: {"scheduler": lambda optimizer: 0.1}),
    "a length that is too short": (
        ValueError,
        r"Expected 2 batches in epoch 0, as len\(batches\) says, got 4",
        lambda: {"batches": Short(points()), "scheduler": _halving},
    ),
    "a plateau": (TypeError, "ReduceLROnPlateau", lambda: {"scheduler": _plateau}),
}
REFUSED_BY_FIT = {
    "no batch of models": (TypeError, "Expected a ModelBatch, got Sequential", lambda: {"batch": classifiers()[0]}),
    "a class": (TypeError, "create one by OptimizerFactory", lambda: {"optimizer": SGD}),
    "a factory": (
        TypeError,
        "create one by OptimizerFactory",
        lambda: {"optimizer": OptimizerFactory(SGD)},
    ),
}
REFUSED_BY_FIT_ALONE = {
    "no models": (ValueError, "at least one model", lambda: {"models": []}),
    "one model": (TypeError, "got one Sequential", lambda: {"models": classifiers()[0]}),
    "no modules": (TypeError, "got int as model 0", lambda: {"models": [1]}),
    "too few configs": (ValueError, r"4 configs \(one per model\), got 2", lambda: {"configs": CONFIGS[:2]}),
    "too few seeds": (ValueError, "4 seeds", lambda: {"seeds": [1, 2]}),
    "too few schedulers": (ValueError, "4 schedulers", lambda: {"scheduler": [None]}),
    "no configs": (TypeError, "Expected configs as a dict", lambda: {"configs": None}),
    "configs that are no dicts": (TypeError, "Expected configs as a dict", lambda: {"configs": [0.1] * M}),
    "a norm below zero": (ValueError, "positive", lambda: {"max_norm": -1.0}),
    "a norm of zero": (ValueError, "positive", lambda: {"max_norm": [1.0, 1.0, 0.0, 1.0]}),
    "a norm that is no number": (ValueError, "positive", lambda: {"max_norm": float("nan")}),
    "a norm in words": (TypeError, "number as max_norm", lambda: {"max_norm": "1"}),
    "loss settings in a list": (TypeError, "loss_settings as a dict", lambda: {"loss_settings": [0.1] * M}),
    "too few loss settings": (
        ValueError,
        r"4 values \(one per model\) as 'label_smoothing' in loss_settings, got 2",
        lambda: {"loss_settings": {"label_smoothing": [0.1, 0.2]}},
    ),
    "one model given often": (
        ValueError,
        "'0.weight' of model 1 in model 0",
        lambda: {"models": classifiers()[:1] * M},
    ),
    "a layer in two models": (ValueError, "'0.weight' of model 3 in model 2", lambda: {"models": _one_layer_in_two()}),
    "numbers that are not there": (ValueError, "'0.weight' of model 0 on the meta", lambda: {"models": _on_meta()}),
    "a ready scheduler": (TypeError, "callable that makes", lambda: {"scheduler": _ready_scheduler()}),
}


def _ready_scheduler():
    return torch.optim.lr_scheduler.StepLR(SGD(classifiers()[0].parameters(), 0.1), 1)


def _one_layer_in_two():
    models = classifiers()
    models[3][0] = models[2][0]
    return models


def _on_meta():
    return [model.to("meta") for model in classifiers()]


@pytest.mark.filterwarnings("ignore:ReduceLROnPlateau gets one number")
@pytest.mark.parametrize("case", [*REFUSED_BY_BOTH, *REFUSED_BY_FIT])
def test_fit_refuses(case):
    error, text, changes = (REFUSED_BY_BOTH | REFUSED_BY_FIT)[case]
    batch, optimizer = batched(classifiers())
    right = {"batch": batch, "optimizer": optimizer, "batches": points(), "loss_fn": cross_entropy}
    with pytest.raises(error, match=text):
        fit(**(right | changes()))


@pytest.mark.parametrize("case", [*REFUSED_BY_BOTH, *REFUSED_BY_FIT_ALONE])
def test_fit_alone_refuses(case):
    error, text, changes = (REFUSED_BY_BOTH | REFUSED_BY_FIT_ALONE)[case]
    right = {
        "models": classifiers(),
        "optimizer_cls": SGD,
        "configs": CONFIGS,
        "batches": points(),
        "loss_fn": cross_entropy,
    }
    with pytest.raises(error, match=text):
        fit_alone(**(right | changes()))


def test_an_iterator_is_enough_where_it_is_needed_once():
    models, pairs = classifiers(), points()
    batch, optimizer = batched(models)
    assert fit(batch, optimizer, iter(pairs), cross_entropy).steps == 4
    assert fit_alone(models, SGD, {"lr": 0.1}, iter(pairs), cross_entropy).steps == 4


def test_a_loader_that_starts_again_by_itself_is_accepted():
    class Again:
        def __iter__(self):
            self.left = list(pairs)
            return self

        def __next__(self):
            if not self.left:
                raise StopIteration
            return self.left.pop(0)

        def __len__(self):
            return len(pairs)

    models, pairs = classifiers(), points()
    expected = trained_alone(models, pairs * 2, loss_fn=cross_entropy, configs=CONFIGS)
    fit_alone(models, SGD, CONFIGS, Again(), cross_entropy, 2, seeds=SEEDS)
    assert_same_parameters(models, expected)


# ------------------------------------------------------------------ what a batch may look like
class Masked(nn.Module):
    """Takes a mask, or the targets, as the libraries' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 5)

    def forward(self, x, mask=None):
        return self.fc(x if mask is None else x * mask)


class OwnLoss(Masked):
    def forward(self, x, mask=None, labels=None):
        out = super().forward(x, mask)
        return {"loss": None if labels is None else cross_entropy(out, labels), "logits": out}


class OfAnything(OwnLoss):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class OfGraphs(Masked):
    def forward(self, graph):
        return super().forward(graph.x, graph.mask)


def _own(out, y):
    return out["loss"]


def _logits(out, y):
    return cross_entropy(out["logits"], y)


# How a batch of x, mask and y looks -> (the model, the batch, the loss).
BATCHES = {
    "a triple": (Masked, lambda x, mask, y: (x, mask, y), cross_entropy),
    "a list": (Masked, lambda x, mask, y: [x, mask, y], cross_entropy),
    "a pair with a tuple": (Masked, lambda x, mask, y: ((x, mask), y), cross_entropy),
    "a dict": (Masked, lambda x, mask, y: {"x": x, "y": y, "mask": mask}, cross_entropy),
    "a mapping": (Masked, lambda x, mask, y: UserDict(x=x, target=y, mask=mask), cross_entropy),
    "its own loss": (OwnLoss, lambda x, mask, y: {"x": x, "mask": mask, "labels": y}, _own),
    "its own loss, wrapped": (OfAnything, lambda x, mask, y: UserDict(x=x, mask=mask, labels=y), _own),
    "its loss not used": (OwnLoss, lambda x, mask, y: {"x": x, "mask": mask, "labels": y}, _logits),
    "an object": (OfGraphs, lambda x, mask, y: SimpleNamespace(x=x, mask=mask, y=y), cross_entropy),
}


@pytest.mark.parametrize("chunk_size", [None, 2, 1])
@pytest.mark.parametrize("form", BATCHES)
def test_what_a_batch_may_look_like(form, chunk_size):
    make, formed, loss_fn = BATCHES[form]
    models = [make() for _ in range(M)]
    parts = [(x, torch.rand(len(x), 1), y) for x, y in points()]
    batch, optimizer = batched(models)
    fit(batch, optimizer, [formed(*each) for each in parts], loss_fn, chunk_size=chunk_size)
    lone = copy.deepcopy(models)
    fit_alone(lone, SGD, CONFIGS, [formed(*each) for each in parts], loss_fn)
    for model, config in zip(models, CONFIGS, strict=True):
        own = SGD(model.parameters(), **config)
        for x, mask, y in parts:
            own.zero_grad()
            cross_entropy(model.fc(x * mask), y).backward()
            own.step()
    assert_same_parameters(list(batch), models)
    assert_same_parameters(lone, models)
