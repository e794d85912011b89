"""A batch behaves as any module does: moving, casting, modes, state_dict, copies and pickles."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from oracle import NETS, SEEDS, M, assert_same_models, assert_unchanged, batches, build, close, snapshot, train_batch
from torch import Tensor, nn

from mbkit import ModelBatch


def saved_and_loaded(state: dict) -> dict:
    """What a file makes of a state, with nothing but weights allowed."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ------------------------------------------------------------------ casting and modes
@pytest.mark.parametrize("name", NETS)
def test_casting_keeps_the_parameters_and_changes_their_dtype(name: str) -> None:
    models = build(name)
    batch = ModelBatch(models)
    parameters = list(batch.parameters())
    for cast in (nn.Module.float, nn.Module.double, nn.Module.bfloat16, lambda m: m.to(torch.float32), nn.Module.half):
        assert cast(batch) is batch
        for model in models:
            cast(model)
        assert all(p is q for p, q in zip(batch.parameters(), parameters, strict=True))
        assert_same_models(batch, models, 0)
        assert [t.dtype for t in batch.state_dict().values()] == [t.dtype for t in models[0].state_dict().values()]
        assert [p.dtype for p in batch[1].parameters()] == [p.dtype for p in models[1].parameters()]


def test_to_takes_what_torchs_own_takes() -> None:
    batch = ModelBatch(build("mlp"))
    assert batch.to("cpu").to(torch.device("cpu"), torch.float32).to(torch.zeros(1).double()) is batch
    assert batch.stacked_params["0.weight"].dtype == torch.float64
    with pytest.raises(TypeError, match=r"nn.Module.to only accepts floating point or complex dtypes"):
        batch.to(torch.int64)
    meta = ModelBatch(build("mlp")).to("meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert meta.to_empty(device="cpu").stacked_params["0.weight"].shape == (M, 4, 3)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_memory_format_is_each_models_own(when: str) -> None:
    """Masks are drawn in memory order, so the order must be the one that the model has alone."""
    models = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.Conv2d(4, 2, 3)) for _ in range(M)]
    x = torch.randn(2, 3, 8, 8)
    batch = ModelBatch(models, seeds=SEEDS).to(memory_format=torch.channels_last) if when == "after" else None
    for model in models:
        model.to(memory_format=torch.channels_last)
    batch = batch or ModelBatch(models, seeds=SEEDS)
    assert batch.stacked_params["0.weight"][1].is_contiguous(memory_format=torch.channels_last)
    assert batch[1][0].weight.stride() == models[1][0].weight.stride()
    got = batch(x)
    for m, model in enumerate(models):
        torch.manual_seed(SEEDS[m])
        close(got[m], model(x), 1e-5)


def test_train_and_eval_reach_every_layer() -> None:
    batch = ModelBatch(build("batchnorm"))
    assert batch.eval() is batch
    assert not any(module.training for module in batch.modules())
    assert not any(module.training for module in batch[2].modules())
    assert batch.train() is batch
    assert all(module.training for module in batch.modules())
    getattr(batch, "1").eval()  # as one freezes the statistics of one layer
    before = batch.stacked_buffers["1.running_mean"].clone()
    batch(batches(own=False)[0][0])
    assert torch.equal(batch.stacked_buffers["1.running_mean"], before)
    assert [module.training for module in batch[0].modules()] == [True, True, False, True, True]
    holder = nn.Sequential(batch)
    assert not holder.eval()[0][0].training


def test_requires_grad_follows_into_the_models_taken_out() -> None:
    batch = ModelBatch(build("mlp"))
    getattr(batch, "0").requires_grad_(False)
    assert [p.requires_grad for p in batch.parameters()] == [False, False, True, True]
    assert [p.requires_grad for p in batch[1].parameters()] == [False, False, True, True]


# ------------------------------------------------------------------ state_dict
@pytest.mark.parametrize("name", [*NETS, "a layer"])
def test_the_state_has_the_users_names_and_the_layers_versions(name: str) -> None:
    """torch loads a state of an older version of a layer in another way, also where the layer is the whole model."""
    models = [nn.BatchNorm1d(3) for _ in range(M)] if name == "a layer" else build(name)
    state = ModelBatch(models).state_dict()
    lone = models[0].state_dict()
    assert list(state) == list(lone)
    assert [tuple(t.shape) for t in state.values()] == [(M, *t.shape) for t in lone.values()]
    assert state._metadata == lone._metadata


@pytest.mark.parametrize("name", NETS)
def test_training_resumes_to_the_same_bits(name: str) -> None:
    data = batches(own=False)
    batch = ModelBatch(build(name), seeds=SEEDS)
    train_batch(batch, data[:2])
    state = saved_and_loaded(batch.state_dict())
    resumed = ModelBatch(build(name), seeds=range(100, 100 + M))  # other weights, other seeds
    assert str(resumed.load_state_dict(state)) == "<All keys matched successfully>"
    losses = [train_batch(each, data[2:]) for each in (batch, resumed)]
    assert torch.equal(*losses)
    for key, tensor in batch.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[key]), key


def test_a_state_goes_back_in_time() -> None:
    """Also to before the first draw, when there are no streams to be saved yet."""
    batch, x = ModelBatch(build("dropout"), seeds=SEEDS), torch.randn(5, 3, dtype=torch.float64)
    start, first = copy.deepcopy(batch.state_dict()), batch(x)
    later, second = copy.deepcopy(batch.state_dict()), batch(x)
    assert not torch.equal(first, second)
    batch.load_state_dict(start)
    assert torch.equal(batch(x), first)
    batch(x), batch.load_state_dict(later)
    assert torch.equal(batch(x), second)
    assert torch.equal(batch.state_dict()["mbkit_streams.seeds"], torch.tensor(SEEDS))
    other = ModelBatch(build("dropout"), seeds=[1, 2, 3, 4])
    other.load_state_dict(later)
    assert other.seeds == SEEDS


def test_weights_alone_leave_the_streams_where_they_are() -> None:
    batch, x = ModelBatch(build("dropout"), seeds=SEEDS), torch.randn(5, 3, dtype=torch.float64)
    reference = copy.deepcopy(batch)
    reference(x), batch(x)
    weights = {key: value for key, value in batch.state_dict().items() if key == "0.weight"}
    missing = batch.load_state_dict(weights, strict=False).missing_keys
    assert "0.bias" in missing
    assert torch.equal(batch(x), reference(x))


def test_a_batch_inside_a_module() -> None:
    holder = nn.ModuleDict({"batch": ModelBatch(build("dropout"), seeds=SEEDS), "head": nn.Linear(2, 1)}).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    holder["batch"](x)
    state = saved_and_loaded(holder.state_dict())
    expected = holder["batch"](x)
    assert str(holder.load_state_dict(state)) == "<All keys matched successfully>"
    assert torch.equal(holder["batch"](x), expected)
    assert "batch.4.bias" in dict(holder.named_parameters())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"0.bias": None}, r'Missing key\(s\) in state_dict: "0.bias"'),
        ({"more": torch.zeros(M)}, r'Unexpected key\(s\) in state_dict: "more"'),
        ({"0.bias": torch.zeros(M, 7)}, "size mismatch for 0.bias"),
        (
            {"mbkit_streams.cpu": torch.zeros(M + 1, 5056, dtype=torch.uint8)},
            f"expected the random streams of {M} models",
        ),
    ],
)
def test_a_wrong_state_is_torchs_error(change: dict, text: str) -> None:
    batch, x = ModelBatch(build("dropout"), seeds=SEEDS), torch.randn(5, 3, dtype=torch.float64)
    batch(x)
    state = copy.deepcopy(batch.state_dict()) | change
    reference = copy.deepcopy(batch)
    with pytest.raises(RuntimeError, match=text):
        batch.load_state_dict({key: value for key, value in state.items() if value is not None})
    assert torch.equal(batch(x), reference(x))  # the streams included


# ------------------------------------------------------------------ copies
def copies(batch: ModelBatch) -> list[ModelBatch]:
    file = io.BytesIO()
    torch.save(batch, file)
    file.seek(0)
    return [copy.deepcopy(batch), pickle.loads(pickle.dumps(batch)), torch.load(file, weights_only=False)]


@pytest.mark.parametrize("name", ["dropout", "batchnorm", "tied", "taken names", "frozen"])
def test_copies_and_pickles_go_on_alike_and_apart(name: str) -> None:
    batch, data = ModelBatch(build(name), seeds=SEEDS), batches(own=False)
    train_batch(batch, data[:2])
    twins = copies(batch)
    before = snapshot(batch)
    losses = [train_batch(twin, data[2:]) for twin in twins]
    assert_unchanged(batch, before)
    reference = train_batch(batch, data[2:])
    for twin, loss in zip(twins, losses, strict=True):
        assert torch.equal(loss, reference)
        assert isinstance(twin, ModelBatch)
        assert list(twin.stacked_params) == list(batch.stacked_params)
        for key, p in batch.named_parameters():
            assert torch.equal(twin.stacked_params[key], p)
            assert torch.equal(twin[1].get_parameter(key), batch[1].get_parameter(key))


def test_a_copy_of_an_lstm_after_a_call() -> None:
    """torch keeps a second list of an RNN's weights; no tensor of the call may be left in it."""
    models, x = [nn.LSTM(3, 4, num_layers=2, dropout=0.3).double() for _ in range(M)], torch.randn(5, 2, 3).double()
    batch = ModelBatch(models, seeds=SEEDS)
    batch(x)
    twins = copies(batch)
    expected: Tensor = batch(x)[0]
    for twin in twins:
        assert torch.equal(twin(x)[0], expected)
    model = batch[1]
    assert all(w is p for w, p in zip(model._flat_weights, model.parameters(), strict=True))


def test_a_copy_forgets_what_was_learnt_about_the_original() -> None:
    def branches(out: Tensor, y: Tensor) -> Tensor:
        return (out - y).abs().mean() if out.sum() > y.sum() else (out - y).square().mean()

    batch, (x, y) = ModelBatch(build("mlp")), batches(own=False)[0]
    with pytest.warns(UserWarning, match="The loss function runs model by model"):
        expected = batch.compute_loss(batch(x), y, branches)
    for twin in copies(batch):
        with pytest.warns(UserWarning, match="The loss function runs model by model"):
            assert torch.equal(twin.compute_loss(twin(x), y, branches), expected)
