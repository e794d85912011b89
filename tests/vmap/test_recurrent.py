"""The batched cell of recurrent layers: chosen where it is meant to be, and equal to the lone layers."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import close
from torch import nn

from mbkit import ModelBatch
from mbkit.vmap.rules import recurrent

T, B, WIDTH, H, M = 6, 4, 3, 5, 16
KINDS = {
    "RNN": lambda **k: nn.RNN(WIDTH, H, **k),
    "RNN relu": lambda **k: nn.RNN(WIDTH, H, nonlinearity="relu", **k),
    "LSTM": lambda **k: nn.LSTM(WIDTH, H, **k),
    "LSTM proj": lambda **k: nn.LSTM(WIDTH, H, proj_size=2, **k),
    "GRU": lambda **k: nn.GRU(WIDTH, H, **k),
}
VARIANTS = {
    "plain": {},
    "no bias": {"bias": False},
    "deep": {"num_layers": 3, "bidirectional": True, "dropout": 0.4},
    "batch first": {"num_layers": 2, "batch_first": True, "dropout": 0.4},
}


@pytest.fixture
def only_batched(monkeypatch):
    def fail(*_):
        raise AssertionError("ran model by model")

    monkeypatch.setattr(recurrent, "model_by_model", fail)


def tensors(result):
    outputs, state = result
    return [outputs, *(state if isinstance(state, tuple) else (state,))]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # the lone layer's own
@pytest.mark.usefixtures("only_batched")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["f64", "f32"])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_variant_as_alone(kind, variant, own, dtype, tolerance):
    models = [KINDS[kind](**VARIANTS[variant]).to(dtype) for _ in range(M)]
    batch = ModelBatch(copy.deepcopy(models), shared_input=not own, seeds=range(M))
    lead = (M,) if own else ()
    x = torch.randn(*lead, *((B, T, WIDTH) if "first" in variant else (T, B, WIDTH)), dtype=dtype, requires_grad=True)
    got = [tensors(batch(x)) for _ in range(2)]
    sum(t.square().sum() for t in (*got[0], *got[1])).backward()
    input_grad, x.grad = x.grad, None
    for m, model in enumerate(models):
        torch.manual_seed(m)
        mine = x[m] if own else x
        expected = [tensors(model(mine)) for _ in range(2)]
        sum(t.square().sum() for t in (*expected[0], *expected[1])).backward()
        for a, b in zip((*got[0], *got[1]), (*expected[0], *expected[1]), strict=True):
            close(a[m], b, tolerance)
            assert a[m].stride() == b.stride()  # the order in which a later dropout draws its mask
        for name, p in model.named_parameters():
            close(batch.stacked_params[name].grad[m], p.grad, 10 * tolerance * (1 + p.grad.abs().max().item()), name)
        assert (
            torch.equal(batch.streams.on("cpu")[m].get_state(), torch.get_rng_state())
            or "dropout" not in VARIANTS[variant]
        )
    close(input_grad, x.grad, 100 * tolerance)


@pytest.mark.usefixtures("only_batched")
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_initial_states_without_a_batch_and_without_gradients(kind):
    models = [KINDS[kind](num_layers=2).double() for _ in range(M)]
    batch, x = ModelBatch(models), torch.randn(T, WIDTH, dtype=torch.float64)
    hx = torch.randn(2, H, dtype=torch.float64)
    hx = (hx, hx.flip(0)) if kind == "LSTM" else hx
    with torch.no_grad():
        got = tensors(batch(x, hx))
    for m, model in enumerate(models):
        for a, b in zip(got, tensors(model(x, hx)), strict=True):
            close(a[m], b, 1e-12)


@pytest.mark.parametrize(
    ("make", "count", "fused"),
    [
        (lambda: nn.GRU(WIDTH, 129), 2, True),
        (lambda: nn.GRU(WIDTH, 128), 2, False),
        (lambda: nn.LSTM(WIDTH, H), 15, True),
        (lambda: nn.LSTM(WIDTH, H), 16, False),
        (lambda: nn.LSTM(WIDTH, H, proj_size=2), 2, False),
        (lambda: nn.LSTM(WIDTH, H).double(), 2, False),
    ],
)
def test_the_faster_way_is_chosen(make, count, fused, monkeypatch):
    seen, plain = [], recurrent.model_by_model
    monkeypatch.setattr(recurrent, "model_by_model", lambda *a: seen.append(True) or plain(*a))
    models = [make() for _ in range(count)]
    x = torch.randn(T, B, WIDTH, dtype=next(models[0].parameters()).dtype)
    outputs = ModelBatch(models)(x)[0]
    assert bool(seen) == fused
    if fused:
        assert torch.equal(outputs[1], models[1](x)[0])


class Packed(nn.Module):
    """Packs sequences of several lengths, as is the custom, or gets them packed."""

    def __init__(self, kind: str, sort: bool) -> None:
        super().__init__()
        self.first, self.sort = nn.Linear(WIDTH, WIDTH), sort
        self.rnn = KINDS[kind](batch_first=True, num_layers=2, bidirectional=True)
        self.last = nn.Linear(2 * H, 3)

    def forward(self, x, lengths=None):
        packed = x
        if lengths is not None:
            packed = nn.utils.rnn.pack_padded_sequence(self.first(x), lengths, True, enforce_sorted=not self.sort)
        out, total = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True, padding_value=0.5)
        return self.last(out).sum(1) / total[:, None]


@pytest.mark.filterwarnings("ignore:'rnn' .* runs model by model")
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("kind", "sort"), [("LSTM", True), ("GRU", False)])
def test_packed_sequences(kind, sort, own):
    """Packing, padding and what is around them run for all models at once, where the lengths are one for all."""
    models = [Packed(kind, sort).double() for _ in range(M)]
    lengths = torch.tensor([2, T, 1, T - 1] if sort else [T, T, 2, 1])
    x = torch.randn(*([M] if own else []), 4, T, WIDTH, dtype=torch.float64)
    batch = ModelBatch(models, shared_input=not own)
    got = batch(x, lengths.expand(M, 4) if own else lengths)
    assert batch.model_by_model == ({"rnn"} if own else set())
    got.square().sum().backward()
    for m, model in enumerate(models):
        expected = model(x[m] if own else x, lengths)
        close(got[m], expected, 1e-12)
        expected.square().sum().backward()
        for name, p in model.named_parameters():
            close(batch.stacked_params[name].grad[m], p.grad, 1e-10, name)


def test_a_packed_sequence_is_an_input():
    models = [Packed("GRU", True).double() for _ in range(M)]
    lengths, x = torch.tensor([2, T, 1, T - 1]), torch.randn(4, T, WIDTH, dtype=torch.float64)
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, True, enforce_sorted=False)
    batch = ModelBatch(models)
    got = batch(packed)
    assert batch.model_by_model == set()
    for m, model in enumerate(models):
        close(got[m], model(packed), 1e-12)
