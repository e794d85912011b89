"""Methods and submodules of the models, called for all of them, as each model does it alone."""

from __future__ import annotations

import copy
import pickle
import random
import re
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import SEEDS, B, M, assert_same_models, assert_same_parameters, close, seed_all
from torch import Tensor, nn

from mbkit.batch.context import context_of
from mbkit.batch.model_batch import ModelBatch

OUTSIDE: dict[str, Any] = {"count": 0}


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop, self.norm = nn.Linear(3, 4), nn.Dropout(0.4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.drop(self.fc(x)))

    def pooled(self, x: Tensor) -> Tensor:
        return self.fc(x).mean(0)

    def scaled(self, x: Tensor) -> Tensor:
        """Calls no layer, so that only the weight's shape would tell that it is not one model's."""
        return x.sum(-1, keepdim=True) * self.fc.bias


class Agent(nn.Module):
    """A model with every kind of method that people write."""

    kind = "agent"

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.target = Encoder(), Encoder().requires_grad_(False)
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
        self.log_std = nn.Parameter(torch.zeros(2))
        self.register_buffer("seen", torch.zeros(()))
        self.temperature, self.calls, self.kept = 0.5 + torch.rand(()).item(), 0, []

    @property
    def device(self) -> torch.device:
        return self.log_std.device

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.encoder(x))

    def encode(self, x: Tensor) -> Tensor:
        self.seen += x.sum()
        return self.encoder(x) / self.temperature

    @torch.no_grad()
    def act(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        mean = self(x)
        return {"action": mean + scale * self.log_std.exp() * torch.randn_like(mean), "mean": (mean, None)}

    def count(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.kept.append(x.mean())
        OUTSIDE["count"] += 1
        return x * self.calls * self.log_std.sum()

    def predict(self, x: Tensor) -> Tensor:
        self.eval()
        return self(x)

    def halve(self, x: Tensor) -> Tensor:
        h = self.encoder(x)
        while h.abs().max().item() > 0.5:
            h = h / 2
        return h

    def roll(self, x: Tensor) -> Tensor:
        return x.roll(random.randrange(3), -1) * self.log_std.sum()

    @torch.no_grad()
    def update_target(self, rate: float = 0.9) -> None:
        for q, p in zip(self.target.parameters(), self.encoder.parameters(), strict=True):
            q.mul_(rate).add_(p, alpha=1 - rate)

    def generate(self, x: Tensor, steps: int) -> Tensor:
        tokens = x[:, :1].abs().long() % 3
        for _ in range(steps):
            weights = self.encoder.fc.weight[tokens[:, -1]].softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(weights, 1) % 3], 1)
            tokens = tokens.flip(0) if tokens.sum().item() % 2 else tokens
        return tokens

    @staticmethod
    def twice(x: Tensor) -> Tensor:
        return x * 2

    def freeze(self, x: Tensor) -> Tensor:
        return self.encoder.fc(x)

    def embedding(self) -> nn.Module:
        self.calls += 1
        return self.encoder.fc

    def reset(self) -> Agent:
        self.seen += 1
        return self

    def size(self) -> int:
        return self.log_std.numel()

    def best(self, x: Tensor) -> list[int]:
        return self.encoder.fc(x).argmax(-1).tolist()

    def freeze_encoder(self) -> None:
        for parameter in self.encoder.parameters():
            parameter.requires_grad = False

    def fails(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.net[0](x)

    def fails_here(self, x: Tensor) -> Tensor:
        self.seen += 1
        return x @ x


METHODS: dict[str, tuple] = {
    "encode": (),
    "act": (0.7,),
    "count": (),
    "predict": (),
    "halve": (),
    "roll": (),
    "update_target": (),
    "generate": (3,),
    "twice": (),
    "freeze": (),
    "encoder": (),
    "encoder.pooled": (),
    "net.1": (),
    "forward": (),
}
IN_TURN = {"halve", "roll", "generate"}


def agents() -> list[nn.Module]:
    torch.manual_seed(3)
    return [Agent().double() for _ in range(M)]


def named(model: nn.Module, name: str) -> Callable:
    for part in name.split("."):
        model = getattr(model, part)
    return model


def alone(models: list[nn.Module], calls: list[tuple[str, tuple, dict]], own: bool) -> list[list[Any]]:
    """Make the calls with each model, from its own seed on; with `own` model m gets its slice of the tensors."""
    outputs = []
    for m, model in enumerate(models):
        seed_all(SEEDS[m])
        mine = [tuple(v[m] if own and isinstance(v, Tensor) else v for v in args) for _, args, _ in calls]
        outputs.append([named(model, name)(*a, **kwargs) for (name, _, kwargs), a in zip(calls, mine, strict=True)])
    return outputs


def assert_same_outputs(got: Any, expected: list[Any]) -> None:
    for m, one in enumerate(expected):
        if isinstance(one, Tensor):
            close(got[m], one)
        elif isinstance(one, dict):
            assert one.keys() == got.keys()
            for key in one:
                assert_same_outputs(got[key], [each[key] for each in expected])
        elif isinstance(one, tuple):
            for i in range(len(one)):
                assert_same_outputs(got[i], [each[i] for each in expected])
        else:
            assert (got, one) == (None, None)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_does_for_each_model_what_it_does_alone(name: str, own: bool) -> None:
    models, args = agents(), METHODS[name]
    batch = ModelBatch(models, shared_input=not own, seeds=SEEDS)
    lead = (M,) if own else ()
    width = 4 if name.startswith("net") else 3
    xs = [torch.randn(*lead, B, width, dtype=torch.float64) for _ in range(3)]
    calls = [(name, (x, *args) if name != "update_target" else args, {}) for x in xs]
    calls.insert(1, ("forward", (xs[0][..., :3].expand(*lead, B, 3),), {}) if width == 3 else calls[0])
    OUTSIDE["count"] = 0
    expected = alone(models, calls, own)
    counted, OUTSIDE["count"] = OUTSIDE["count"] // M, 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = [batch.call(name, *inputs) for name, inputs, _ in calls]
    told = [str(w.message) for w in caught]
    assert all(w.filename == __file__ for w in caught if "model by model" in str(w.message))
    assert any("one after the other" in t or f"'{name}()' runs model by model" in t for t in told) == (name in IN_TURN)
    assert len(told) <= 1
    for i, output in enumerate(got):
        assert_same_outputs(output, [outputs[i] for outputs in expected])
    assert_same_models(batch, models)
    assert OUTSIDE["count"] == counted
    assert batch.training is models[0].training
    for m, model in enumerate(models):
        mine = batch[m]
        assert mine.calls == model.calls
        assert [part.training for part in mine.modules()] == [part.training for part in model.modules()]
        for kept, one in zip(mine.kept, model.kept, strict=True):
            close(kept, one)


@pytest.mark.parametrize("slow", [(), ("",), ("encoder",), ("encode()",)], ids=str)
def test_training_through_methods(slow: tuple) -> None:
    models, x = agents(), torch.randn(B, 3, dtype=torch.float64)
    batch = ModelBatch(models, seeds=SEEDS, model_by_model=slow)
    y = torch.randn(B, 2, dtype=torch.float64)
    optimizer = torch.optim.SGD([p for p in batch.parameters() if p.requires_grad], 0.1)
    batch.register_forward_hook(pytest.fail)
    for _ in range(3):
        optimizer.zero_grad()
        outputs = batch.net(batch.encode(x), shared_input=False)
        batch.compute_loss(outputs, y, nn.functional.mse_loss).backward()
        optimizer.step()
        batch.update_target()
    for m, model in enumerate(models):
        seed_all(SEEDS[m])
        lone = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        for _ in range(3):
            lone.zero_grad()
            nn.functional.mse_loss(model.net(model.encode(x)), y).backward()
            lone.step()
            model.update_target()
    assert_same_models(batch, models)


def test_submodules_are_called_by_attribute_and_by_index() -> None:
    models, x = agents(), torch.randn(B, 4, dtype=torch.float64)
    for batch in (
        ModelBatch(models),
        copy.deepcopy(ModelBatch(models)),
        pickle.loads(pickle.dumps(ModelBatch(models))),
    ):
        own = batch.net[0](x)
        assert_same_outputs(own, [model.net[0](x) for model in models])
        assert_same_outputs(batch.net(x), [model.net(x) for model in models])
        assert_same_outputs(batch.net[2](own, shared_input=False), [model.net[2](model.net[0](x)) for model in models])
        few = batch.select([3, 1])
        assert_same_outputs(few.net[0](x), [models[m].net[0](x) for m in (3, 1)])
        assert_same_outputs(batch[1].net[0](x), list(models[1].net[0](x)))
    seen: list[Tensor] = []
    batch.net[1].register_forward_hook(lambda module, inputs, output: output + 1)
    assert_same_outputs(batch.net(x), [model.net[2](model.net[1](model.net[0](x)) + 1) for model in models])
    assert not seen


def test_what_a_call_has_returned_is_not_taken_for_one_input_of_all_models() -> None:
    models, x = agents(), torch.randn(B, 3, dtype=torch.float64)
    batch = ModelBatch(models)
    with pytest.raises(ValueError, match=r"'net' gets an input .*shared_input=False"):
        batch.net(batch.encode(x) * 2)
    with torch.no_grad():
        h = batch.encoder(x)
        with pytest.raises(ValueError, match="shared_input=False"):
            batch.net[0](h)
    whole = batch.net(batch.encode(x), shared_input=True)
    assert whole.shape == (M, M, B, 2)


@pytest.mark.parametrize("name", ["pooled", "scaled", "forward"])
def test_methods_of_parts_run_for_all_models(name: str) -> None:
    models, x = [agent.eval() for agent in agents()], torch.randn(B, 3, dtype=torch.float64)
    for batch in (ModelBatch(models), copy.deepcopy(ModelBatch(models))):
        assert_same_outputs(getattr(batch.encoder, name)(x), [getattr(model.encoder, name)(x) for model in models])


def test_frozen_models_keep_what_methods_would_change() -> None:
    models, x = agents(), torch.randn(B, 3, dtype=torch.float64)
    batch = ModelBatch(models, seeds=SEEDS)
    batch.freeze([1, 2])
    for _ in range(2):
        batch.encode(x)
        batch.update_target()
    alone([models[m] for m in (0,)], [("encode", (x,), {}), ("update_target", (), {})] * 2, own=False)
    seed_all(SEEDS[3])
    for _ in range(2):
        models[3].encode(x)
        models[3].update_target()
    assert_same_models(batch, models)


@pytest.mark.parametrize("name", ["fails", "fails_here"])
def test_an_error_in_a_method_names_the_layer_and_leaves_what_it_leaves_alone(name: str) -> None:
    models, x = agents(), torch.randn(B, 3, dtype=torch.float64)
    batch = ModelBatch(models, seeds=SEEDS)
    batch.encode(x)
    alone(models, [("encode", (x,), {})], own=False)
    with pytest.raises(
        RuntimeError, match=r"'net\.0' \(Linear\)" if name == "fails" else r"the model itself \(Agent\)"
    ):
        getattr(batch, name)(x)
    for model in models:
        with pytest.raises(RuntimeError):
            named(model, name)(x)
    assert batch.model_by_model == set()
    assert_same_models(batch, models)


def test_a_method_that_cannot_be_run_at_once_leaves_forward_as_it_was() -> None:
    batch, x = ModelBatch(agents()), torch.randn(B, 3, dtype=torch.float64)
    with pytest.warns(UserWarning, match="ModelBatch\\(..., model_by_model=\\['halve\\(\\)'\\]\\)"):
        batch.halve(x)
    batch(x), batch.halve(x), copy.deepcopy(batch).halve(x)
    said = ModelBatch(agents(), model_by_model=["halve()"])
    said.halve(x)
    assert said.model_by_model == batch.model_by_model == {"halve()"}
    with pytest.raises(ValueError, match="Expected a submodule's dotted path, got 'halv\\(\\)'"):
        ModelBatch(agents(), model_by_model=["halv()"])


class Cached(nn.Module):
    """Steps through a layer that looks at its numbers, and that keeps what it has seen in an object."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = CachingLayer()

    def generate(self, x: Tensor) -> Tensor:
        cache = SimpleNamespace(seen=[])
        return torch.stack([self.layer(x * step, cache) for step in range(3)])


class CachingLayer(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)

    def forward(self, x: Tensor, cache: SimpleNamespace) -> Tensor:
        cache.seen.append(super().forward(x))
        return sum(cache.seen) * (2 if cache.seen[-1].sum().item() > 0 else 1)


def test_models_do_not_share_an_object_in_which_a_layer_keeps_something() -> None:
    models, x = [Cached().double() for _ in range(M)], torch.randn(B, 3, dtype=torch.float64)
    with pytest.warns(UserWarning, match="runs model by model"):
        got = ModelBatch(models).generate(x)
    assert_same_outputs(got, [model.generate(x) for model in models])


@pytest.mark.parametrize("slow", ["best()", ""])
def test_methods_that_return_no_tensors(slow: str) -> None:
    models, x = agents(), torch.randn(B, 3, dtype=torch.float64)
    batch = ModelBatch(models, model_by_model=[slow])
    assert batch.embedding() is batch.encoder.fc
    assert batch.reset().reset() is batch
    assert batch.size() == 2
    columns = [getattr(number, "values", [number] * M) for number in batch.best(x)]
    assert [list(row) for row in zip(*columns, strict=True)] == [model.best(x) for model in models]
    assert batch[1].calls == 1
    assert batch.stacked_buffers["seen"].tolist() == [2] * M
    if slow:
        batch.freeze_encoder()
        assert [p.requires_grad for p in batch.encoder.parameters()] == [False] * 4
        assert [p.requires_grad for p in batch[1].net.parameters()] == [True] * 4
    else:
        with pytest.raises(RuntimeError, match="requires_grad"):
            batch.freeze_encoder()


def test_names() -> None:
    models = agents()
    batch, x = ModelBatch(models), torch.randn(B, 3, dtype=torch.float64)
    assert hasattr(batch, "encode")
    assert not hasattr(batch, "decode")
    batch.freeze([1])  # its own
    assert batch.frozen == [1]
    with pytest.raises(AttributeError, match="'Agent' object has no attribute 'decode'"):
        batch.call("decode", x)
    with pytest.raises(AttributeError, match="'ModelBatch' object has no attribute 'decode'"):
        batch.decode(x)
    for name in ("temperature", "device", "kind"):
        with pytest.raises(AttributeError, match=re.escape(f"use batch[m].{name}")):
            getattr(batch, name)
    with pytest.raises(AttributeError, match="neither a method nor a submodule"):
        batch.call("temperature", x)
    assert not hasattr(ModelBatch.__new__(ModelBatch), "encode")
    assert_same_parameters(list(batch), models)
    assert context_of(batch).template.encoder is batch.encoder
