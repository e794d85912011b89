"""What may go into a batch and come out of it, and what its errors say."""

from __future__ import annotations

import copy
import re
from functools import partial
from typing import Any

import pytest
import torch
from oracle import SEEDS, M, build, close
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from mbkit import BatchingError, ModelBatch
from mbkit.training.chunks import Chunks


class Many(nn.Module):
    """Takes tensors from everywhere, and returns them from everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(3, 2), nn.Dropout(0.5)

    def forward(self, x: Tensor, pair: Any = (), *, more: dict | None = None, flag: str = "+", scale: float = 1) -> Any:
        y = self.drop(self.fc(x)) * scale
        for other in pair:
            y = y + self.fc(other)
        for deep in (more or {}).get("deep", [{}])[0].values():
            y = y - self.fc(deep)
        sign = 1 if flag == "+" else -1
        return {"y": sign * y, "none": None, "list": [y.sum(), (y.argmax(1), None)], "x": x}


def everywhere(own: bool) -> tuple[tuple, dict]:
    lead = (M,) if own else ()

    def one() -> Tensor:
        return torch.randn(*lead, 4, 3)

    return (one(), [one(), one()]), {"more": {"deep": [{"a": one(), "b": one()}], "n": 3}, "flag": "-", "scale": 0.5}


def slice_of(tree: Any, m: int) -> Any:
    return torch.utils._pytree.tree_map(lambda leaf: leaf[m] if isinstance(leaf, Tensor) else leaf, tree)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "per-model"])
def test_tensors_may_stand_anywhere(own: bool) -> None:
    models = [Many() for _ in range(M)]
    batch = ModelBatch(models, shared_input=not own, seeds=SEEDS)
    args, kwargs = everywhere(own)
    got = batch(*args, **kwargs)
    for m, model in enumerate(models):
        torch.manual_seed(SEEDS[m])
        my_args, my_kwargs = (slice_of(args, m), slice_of(kwargs, m)) if own else (args, kwargs)
        expected, structure = tree_flatten(model(*my_args, **my_kwargs))
        leaves, got_structure = tree_flatten(slice_of(got, m))
        assert got_structure == structure
        for leaf, reference in zip(leaves, expected, strict=True):
            if reference is None:
                assert leaf is None
            else:
                assert leaf.dtype == reference.dtype
                torch.testing.assert_close(leaf, reference)  # relative: a few of float32's last bits, of 3.9 too


def test_shared_input_holds_for_one_call() -> None:
    models = build("mlp")
    batch = ModelBatch(models)
    x = torch.randn(M, 5, 3, dtype=torch.float64)
    each = batch(x, shared_input=False)
    for m, model in enumerate(models):
        close(each[m], model(x[m]))
        close(batch(x[0])[m], model(x[0]))
        close(batch(x)[m], model(x))  # [M, 5, 3] is one input for all again
    own = ModelBatch(models, shared_input=False)
    close(own(x), each)
    close(own(x[0], shared_input=True), batch(x[0]))


@pytest.mark.parametrize("shape", [(M + 1, 5, 3), (5, 3), ()])
def test_a_per_model_input_has_one_slice_a_model(shape: tuple) -> None:
    batch = ModelBatch([Many() for _ in range(M)], shared_input=False)
    said = f"Expected per-model input [{M}, B, …] (one slice per model), got {list(shape)}: stack one input per model"
    with pytest.raises(ValueError, match=re.escape(said)):
        batch(torch.zeros(shape))
    good = torch.zeros(M, 4, 3)
    with pytest.raises(ValueError, match=r"pass shared_input=True for one input to all\."):
        batch(good, more={"deep": [{"a": torch.zeros(shape)}]})


def test_an_input_needs_no_gradient_and_may_have_one() -> None:
    models = build("mlp")
    batch = ModelBatch(models)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    batch(x).square().sum().backward()
    got, x.grad = x.grad, None
    for model in models:
        model(x).square().sum().backward()
    close(got, x.grad)


def test_no_grad_and_inference_mode() -> None:
    models, x = build("dropout", dtype=torch.float32), torch.randn(4, 3)
    expected = ModelBatch(models, seeds=SEEDS)(x)
    for context in (torch.no_grad(), torch.inference_mode()):
        batch = ModelBatch(models, seeds=SEEDS)
        with context:
            out = batch(x)
        assert not out.requires_grad
        assert torch.equal(out, expected)


def test_empty_batches_and_no_inputs_at_all() -> None:
    batch = ModelBatch(build("mlp"))
    assert batch(torch.zeros(0, 3, dtype=torch.float64)).shape == (M, 0, 2)

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(2))

        def forward(self) -> Tensor:
            return self.w * 2

    models = [Constant() for _ in range(M)]
    assert torch.equal(ModelBatch(models)(), torch.stack([model() for model in models]))


# ------------------------------------------------------------------ errors
class Returns(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value, self.fc = value, nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Any:
        y = self.fc(x)
        return {"number": 3.0, "nothing": None, "many words": {"y": ["abc" * 1000]}}[self.value] if y.dim() else y


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("number", "Expected Returns to return at least one tensor .*, got 3.0: return a tensor"),
        ("nothing", "Expected Returns to return at least one tensor .*, got None: return a tensor"),
        ("many words", "got {'y': .{1,80}…: return a tensor"),
    ],
)
def test_a_model_that_returns_no_tensors(value: str, text: str) -> None:
    batch = ModelBatch([Returns(value) for _ in range(M)])
    with pytest.raises(TypeError, match=text):
        batch(torch.zeros(4, 3))


class Inner(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error, self.w = error, nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


def nest(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"deep": layer})["deep"])


def test_an_error_class_of_the_users_own_passes() -> None:
    class Mine(Exception):
        def __init__(self, code: int, why: str) -> None:
            super().__init__(code, why)

    error = Mine(3, "why")
    batch = ModelBatch([nest(Inner(error)) for _ in range(M)])
    with pytest.raises(Mine) as caught:
        batch(torch.zeros(4, 3))
    assert caught.value.args == (3, "why")


KINDS = (ValueError, TypeError, IndexError, KeyError, AssertionError, RuntimeError)


@pytest.mark.parametrize(
    ("layer", "x", "kind", "text"),
    [
        *((partial(Inner, kind("boom")), torch.zeros(4, 3), kind, r"'1' \(Inner\).*boom") for kind in KINDS),
        (partial(nn.Linear, 5, 2), torch.zeros(4, 3), RuntimeError, r"'1' \(Linear\): .*4x3 and 5x2"),
        (partial(nn.BatchNorm1d, 3), torch.zeros(1, 3), ValueError, r"'1' \(BatchNorm1d\): .*more than 1 value"),
        (partial(nn.Conv2d, 1, 1, 3), torch.zeros(4, 3), RuntimeError, r"'1' \(Conv2d\): "),
    ],
)
def test_an_error_inside_a_layer_names_the_layer(layer: Any, x: Tensor, kind: type[Exception], text: str) -> None:
    batch = ModelBatch([nest(layer()) for _ in range(M)])
    with pytest.raises(kind, match=text):
        batch(x)


def test_wrong_arguments_are_named_as_python_does() -> None:
    batch = ModelBatch([nn.Linear(3, 2) for _ in range(M)])
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'input'"):
        batch()
    with pytest.raises(TypeError, match="unexpected keyword argument 'inputs'"):
        batch(torch.zeros(4, 3), inputs=1)
    with pytest.raises(RuntimeError, match=r"\(Linear\): mat1 and mat2 must have the same dtype"):
        batch(torch.zeros(4, 3, dtype=torch.float64))


def test_an_error_of_the_users_own_leaves_what_it_leaves_alone() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop, self.fail = nn.BatchNorm1d(3), nn.Dropout(0.5), True
            self.register_buffer("calls", torch.zeros(()))
            self.last = None

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            self.last = self.drop(self.norm(x))
            if self.fail and x.shape[0] == 5:
                raise ValueError("five")
            return self.last

    models = [Fails() for _ in range(M)]
    alone = copy.deepcopy(models)
    batch, x, bad = ModelBatch(models, seeds=SEEDS), torch.randn(4, 3), torch.randn(5, 3)
    for _ in range(2):
        with pytest.raises(ValueError, match="five"):
            batch(bad)
    out = batch(x)
    for m, model in enumerate(alone):
        torch.manual_seed(SEEDS[m])
        for _ in range(2):
            with pytest.raises(ValueError, match="five"):
                model(bad)
        torch.testing.assert_close(out[m], model(x), rtol=1e-5, atol=1e-6)
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(batch.stacked_buffers[name][m], buffer, rtol=1e-5, atol=1e-6)


class Late(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.fc, self.error = nn.Linear(3, 2), error
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, late: bool = False) -> Tensor:
        if late:
            self.calls += 1
            raise self.error
        return self.fc(x)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        # What torch.vmap says of what it cannot run is a RuntimeError too, and there is no copy to start again from.
        (RuntimeError("late"), r"had changed 'calls', which earlier calls did not change.*by_model=\[''\]"),
        (ValueError("late"), r"the model itself \(Late\): late"),  # the user's own, so what happens alone happens here
    ],
)
def test_an_error_after_an_edit_of_what_no_call_before_has_edited(error: Exception, text: str) -> None:
    models = [Late(error) for _ in range(M)]
    batch, x = ModelBatch(models), torch.randn(4, 3)
    batch(x), batch(x)
    with pytest.raises(type(error), match=text):
        batch(x, late=True)
    assert torch.equal(batch.stacked_buffers["calls"], torch.ones(M))
    close(batch(x)[1], models[1](x), 1e-6)


def test_sparse_and_meta_tensors() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)
            self.register_buffer("edges", torch.eye(4).to_sparse())

        def forward(self, x: Tensor) -> Tensor:
            return torch.sparse.mm(self.edges, self.fc(x))

    models, x = [Graph() for _ in range(M)], torch.randn(4, 3)
    batch = ModelBatch(models)
    for _ in range(2):
        close(batch(x), torch.stack([model(x) for model in models]), 1e-6)
    assert ModelBatch([nn.Linear(3, 2, device="meta") for _ in range(M)])(x.to("meta")).shape == (M, 4, 2)


def test_what_cannot_be_done_for_many_models_is_a_batching_error() -> None:
    """Not with words about batching dimensions, but with the place, and before anything goes wrong in silence."""

    class Builds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = None

        def forward(self, x: Tensor) -> Tensor:
            self.fc = self.fc or nn.Linear(3, 2)
            return self.fc(x)

    batch = ModelBatch([nn.Sequential(Builds()) for _ in range(M)])
    with pytest.raises(BatchingError, match=r"0\.fc"):
        batch(torch.zeros(4, 3))
    assert list(batch.named_parameters()) == []


class Watching(nn.Module):
    """Collects hidden states by hooks that it puts on for the time of a call, and does what vmap cannot do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        seen: list[Tensor] = []
        layers = (self.first, self.second)
        handles = [layer.register_forward_hook(lambda layer, given, out: seen.append(out)) for layer in layers]
        out = self.second(self.first(x))
        largest = float(out.detach().numpy().max())
        for handle in handles:
            handle.remove()
        return (out / largest, *seen)


@pytest.mark.filterwarnings("ignore:.*model by model")
def test_an_attempt_that_failed_leaves_no_hooks_behind():
    models, x = [Watching().double() for _ in range(M)], torch.randn(5, 3, dtype=torch.float64)
    batch = ModelBatch(models)
    for _ in range(3):
        outputs = batch(x)
        for m, model in enumerate(models):
            for got, expected in zip(outputs, model(x), strict=True):
                close(got[m], expected)
    assert not any(module._forward_hooks for module in batch.modules())


class Forgets(nn.Module):
    """Deletes an attribute at its first call, or at the first whose outputs add up to less than zero."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.fc, self.always, self.note, self.calls = nn.Linear(3, 2), always, 1.0, 0

    def forward(self, x: Tensor) -> Tensor:
        y, self.calls = self.fc(x), self.calls + 1
        if hasattr(self, "note") and (self.always or y.sum().item() < 0):
            del self.note
        return y + self.note if hasattr(self, "note") else y


@pytest.mark.parametrize("size", [M, 2], ids="{} at once".format)
@pytest.mark.parametrize("always", [True, False], ids=["all models", "some models"])
def test_an_attribute_that_calls_delete_is_gone_for_the_models_that_do(always: bool, size: int) -> None:
    models = [Forgets(always) for _ in range(M)]
    for m, model in enumerate(models):
        nn.init.constant_(model.fc.bias, (-1) ** m * 9.0)
    batch, alone = ModelBatch(models, model_by_model=() if always else [""]), copy.deepcopy(models)
    for _ in range(2):
        x = torch.randn(4, 3)
        close(Chunks(batch, size).call(x, True), torch.stack([model(x) for model in alone]), 1e-6)
    notes = [(hasattr(model, "note"), model.calls) for model in alone]
    assert [(hasattr(model, "note"), model.calls) for model in batch] == notes
    assert {has for has, _ in notes} == ({False} if always else {True, False})
