"""Every kind of layer and habit, in a batch as alone: exact, or refused by name; never silently wrong."""

from __future__ import annotations

import pytest
import torch
from exactness_check import HABITS, PLAIN, SEEDS, compare
from exactness_habits import CASES
from torch import nn

from mbkit import ModelBatch
from mbkit.vmap import BatchingError

# What no batch can do, and words that the error says: the place and the reason.
REFUSED = {
    "Embedding(sparse)": "sparse gradients",
    "frozen parameters that differ across models": "'0.weight' frozen",
    "per-model training flag": "another mode at '0'",
    "per-model number of heads": "at 'inner'",
    "per-model activation function": "another 'inner'",
    "unregistered layer in a list": "another 'hidden'",
    "lambda over self": "'act'",
    "jit.script submodule": "'1' is a ScriptModule",
    "tensor in an object of the user's": "'note'",
    "tensor in an object of the user's, below": "'1.note'",
    "generator as attribute": "'g'",
    "generator as attribute, below": "'g'",
}
# What a call keeps has no form in which one of the models could keep it unchanged: to freeze models is refused by name.
ONE_FOR_ALL = """buffer that grows (cat); plain tensor attribute, growing; list of tensors that grows; Python counter;
    Python state before a branch""".replace("\n    ", " ").split("; ")
NAMED = {"LSTM", "RNN(relu)", "GRUCell", "PReLU", "PReLU per channel", "parameter hook (doubles grad)"}
CELLS = [(name, shared) for name in CASES for shared in (True, False)]
# Of the others a sample with either input; all run in the slow tests.
FAST = {cell for i, cell in enumerate(CELLS) if i % 18 in (0, 11) or cell[0] in REFUSED}
FAST |= {(name, True) for name in NAMED} | {("in-place edit of the input (x += w)", False)}


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        pytest.param(
            *cell, id=f"{cell[0]} {'shared' if cell[1] else 'own'}", marks=() if cell in FAST else pytest.mark.slow
        )
        for cell in CELLS
    ],
)
def test_every_habit_as_alone(name, shared):
    habits = [habit for habit in HABITS if shared or habit != "compiled"]  # to trace a step takes as long as the rest
    if name in REFUSED:
        with pytest.raises(Exception, match=": ") as refused:  # the reason, then what to do
            compare(CASES[name], shared, PLAIN)
        assert REFUSED[name] in str(refused.value)
        return
    if name.removesuffix(", below") in ONE_FOR_ALL:
        with pytest.raises(BatchingError, match="one value for all models, so frozen ones cannot keep it"):
            compare(CASES[name], shared, ["plain", "frozen"])
        habits.remove("frozen")
    compare(CASES[name], shared, habits)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("name", [name for name in CASES if name not in REFUSED and CASES[name].float32])
def test_as_alone_in_float32(name, shared):
    compare(CASES[name], shared, PLAIN, torch.float32)


class Branches(nn.Module):
    """Looks at its activations, so that vmap cannot run it."""

    def forward(self, x):
        return x * 2 if x.sum() > 0 else x - 1


class TestModelByModel:
    def models(self):
        return [nn.Sequential(nn.Linear(3, 3), Branches(), nn.Dropout(), nn.Linear(3, 2)) for _ in range(3)]

    def test_only_the_layer_that_needs_it_and_one_warning(self):
        batch = ModelBatch(self.models(), seeds=SEEDS)
        with pytest.warns(UserWarning, match=r"'1' \(Branches\) runs model by model") as caught:
            batch(torch.randn(4, 3))
        assert len(caught) == 1
        assert batch.model_by_model == {"1"}
        batch(torch.randn(4, 3))  # silent from now on: a warning would be an error here

    def test_named_beforehand_it_does_not_warn(self):
        models = self.models()
        batch = ModelBatch(models, seeds=SEEDS, model_by_model=["1"])
        x = torch.randn(4, 3)
        outputs = batch(x)
        for m, model in enumerate(models):
            torch.manual_seed(SEEDS[m])
            assert torch.allclose(outputs[m], model(x), atol=1e-6)

    def test_whole_model(self):
        models = self.models()
        outputs = ModelBatch(models, seeds=SEEDS, model_by_model=[""])(x := torch.randn(4, 3))
        for m, model in enumerate(models):
            torch.manual_seed(SEEDS[m])
            assert torch.equal(outputs[m], model(x))

    def test_a_path_that_leads_nowhere(self):
        with pytest.raises(ValueError, match=r"dotted path, got 'branch'"):
            ModelBatch(self.models(), model_by_model=["branch"])

    def test_an_error_of_the_users_own_is_raised_as_plain_torch_raises_it(self):
        batch = ModelBatch([nn.Sequential(nn.Linear(3, 3), nn.Linear(4, 2)) for _ in range(3)])
        with pytest.raises(RuntimeError, match=r"^'1' \(Linear\): mat1 and mat2 shapes .* \(5x3 and 4x2\)"):
            batch(torch.randn(5, 3))
        assert batch.model_by_model == set()

    def test_outputs_of_other_shapes(self):
        class Selects(nn.Module):
            def forward(self, x):
                return x[x > 0]

        batch = ModelBatch([nn.Sequential(nn.Linear(3, 3), Selects()) for _ in range(3)])
        with pytest.raises(
            BatchingError, match=r"output is a tensor \[\d+\] for model 0 and a tensor \[\d+\] for model"
        ):
            batch(torch.randn(5, 3))


def test_a_loss_that_branches_runs_model_by_model():
    def loss_fn(output, target):
        error = (output - target).square()
        return error[error > 0.1].sum() if error.sum() > 0 else error.sum()

    models = [nn.Linear(3, 2).double() for _ in range(3)]
    batch = ModelBatch(models)
    x, y = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    with pytest.warns(UserWarning, match="loss function runs model by model"):
        losses = batch.compute_loss(batch(x), y, loss_fn, reduction="none")
    losses.sum().backward()
    batch.compute_loss(batch(x), y, loss_fn)  # silent
    for m, model in enumerate(models):
        loss = loss_fn(model(x), y)
        loss.backward()
        assert torch.allclose(losses[m], loss, atol=1e-12)
        assert torch.allclose(batch.weight.grad[m], model.weight.grad, atol=1e-12)
