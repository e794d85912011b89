"""States in memory and on disk: what is saved loads into lone models, and whatever goes wrong loses nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from oracle import NETS, SEEDS, M, assert_unchanged, batches, build, snapshot, train_batch
from torch import nn

from mbkit import ModelBatch


def trained(name: str = "batchnorm") -> ModelBatch:
    batch = ModelBatch(build(name), seeds=SEEDS)
    train_batch(batch, batches(own=False)[:2])
    return batch


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


# ------------------------------------------------------------------ in memory
@pytest.mark.parametrize("name", NETS)
def test_states_are_those_of_lone_models(name: str) -> None:
    batch = trained(name)
    states = batch.get_model_states()
    assert len(states) == M
    for m, lone in enumerate(build(name)):
        assert list(states[m]) == list(lone.state_dict())
        assert states[m]._metadata == lone.state_dict()._metadata
        assert str(lone.load_state_dict(states[m])) == "<All keys matched successfully>"
        for key, tensor in states[m].items():
            assert torch.equal(tensor, {**batch.stacked_params, **batch.stacked_buffers, **batch.state_dict()}[key][m])


def test_states_are_copies() -> None:
    batch = trained()
    before = snapshot(batch)
    for state in batch.get_model_states():
        for tensor in state.values():
            tensor.zero_()
    assert_unchanged(batch, before)


@pytest.mark.parametrize("name", NETS)
def test_states_of_lone_models_go_into_the_batch(name: str) -> None:
    batch, lone = trained(name), build(name)
    parameters, optimizer = list(batch.parameters()), torch.optim.SGD(batch.parameters(), lr=0.1)
    assert batch.load_model_states([model.state_dict() for model in lone]) is None
    assert all(p is q for p, q in zip(batch.parameters(), parameters, strict=True))  # the optimizer's own still
    assert optimizer.param_groups[0]["params"] == parameters
    for m, model in enumerate(lone):
        for key, tensor in model.state_dict().items():
            assert torch.equal(batch.get_model_states()[m][key], tensor), key


def test_states_may_come_from_a_generator_and_in_another_dtype() -> None:
    batch, lone = trained("mlp"), build("mlp", dtype=torch.float32)
    batch.load_model_states(model.state_dict() for model in lone)
    assert batch.stacked_params["0.weight"].dtype == torch.float64
    assert torch.equal(batch.stacked_params["0.weight"][3], lone[3][0].weight.double())


def good(m: int) -> dict:
    return build("batchnorm", 1)[0].state_dict()


def unfit(spoil: Callable, text: str, dtype: torch.dtype = torch.float64) -> tuple[Callable, str]:
    """Return states of which one holds a tensor whose numbers do not fit, and what is said of it."""

    def states() -> list[dict]:
        weight = build("batchnorm", 1, dtype=torch.float32)[0].state_dict()["3.weight"]
        return [good(0), {**good(0), "3.weight": spoil(weight)}, good(0), good(0)]

    wanted = f"Expected '3.weight' of model 1 as dense numbers that fit {str(dtype)[6:]}, got "
    return states, wanted + text


WRONG_STATES: dict[str, tuple[Callable, str]] = {
    "too few": (
        lambda: [good(0)] * (M - 1),
        rf"Expected {M} states \(one per model\), got {M - 1}: pass a list of {M}",
    ),
    "one for all": (lambda: good(0), rf"Expected {M} states \(one per model\), got 1: pass a list of {M} dicts"),
    "no dict": (
        lambda: [good(0)] * (M - 1) + [torch.zeros(3)],
        "Expected a state dict for model 3, got Tensor: pass model.state_dict()",
    ),
    "another architecture": (
        lambda: [good(0), nn.Linear(3, 2).state_dict(), good(0), good(0)],
        r"The state of model 1 belongs to another architecture: missing '0.weight', '1.bias', '1.num_batches_tracked' "
        r"and 5 more, unexpected 'bias', 'weight'; build the batch from models like the ones that were saved",
    ),
    "one name less": (
        lambda: [good(0)] * 3 + [{k: v for k, v in good(0).items() if k != "3.bias"}],
        "model 3 belongs to another architecture: missing '3.bias', unexpected nothing",
    ),
    "a name that is no word": (lambda: [good(0)] * 3 + [{**good(0), 7: torch.zeros(1)}], "unexpected '7'"),
    "another shape": (
        lambda: [good(0)] * 2 + [{**good(0), "0.weight": torch.zeros(4, 9)}] * 2,
        r"Expected '0.weight' of model 2 as \[4, 3\], got \[4, 9\]",
    ),
    "a number": (lambda: [{**good(0), "3.bias": 3.0}] * M, r"Expected '3.bias' of model 0 as \[2\], got float"),
    "the whole batch's": (lambda: [trained().state_dict()] * M, r"as \[4, 3\], got \[4, 4, 3\]"),
    "sparse": unfit(lambda t: t.to_sparse(), "a tensor of the layout sparse_coo: convert it first"),
    "csr": unfit(lambda t: t.to_sparse_csr(), "a tensor of the layout sparse_csr"),
    "meta": unfit(lambda t: t.to("meta"), "a tensor on the meta device, without numbers"),
    "quantized": unfit(lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "a quantized tensor of qint8"),
    "complex": unfit(lambda t: t * 1j, "a tensor of complex64"),
    "too large": unfit(lambda t: t.double() * 0 + 1e300, r"1e\+300: build the models in another dtype", torch.float32),
}


@pytest.mark.parametrize("case", WRONG_STATES)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.filterwarnings("ignore:.*[qQ]uantiz")
def test_a_wrong_state_loses_nothing(case: str) -> None:
    make, text = WRONG_STATES[case]
    states = make()
    dtype = torch.float32 if "float32" in text else torch.float64
    batch = ModelBatch(build("batchnorm", dtype=dtype), seeds=SEEDS)
    before = snapshot(batch)
    with pytest.raises(ValueError, match=text):
        batch.load_model_states(states)
    assert_unchanged(batch, before)


# ------------------------------------------------------------------ on disk
@pytest.mark.parametrize("name", NETS)
def test_files_bring_everything_back(name: str, tmp_path: Path) -> None:
    batch, folder = trained(name), tmp_path / "new" / "folder"
    batch.save_all(folder)
    batch.save_all(str(folder))  # over itself, and by name
    assert list(contents(folder)) == ["models.safetensors"]
    other = ModelBatch(build(name), seeds=SEEDS)
    other.load_all(str(folder))
    for key, tensor in (*batch.stacked_params.items(), *batch.stacked_buffers.items()):
        assert torch.equal({**other.stacked_params, **other.stacked_buffers}[key], tensor), key
    lone, rows = build(name, 1)[0], safetensors.torch.load_file(folder / "models.safetensors")
    lone.load_state_dict({key: tensor[2] for key, tensor in rows.items()})
    assert all(torch.equal(a, b) for a, b in zip(lone.parameters(), batch[2].parameters(), strict=True))


def truncate(share: float) -> Callable[[Path], None]:
    def spoil(file: Path) -> None:
        data = file.read_bytes()
        file.write_bytes(data[: int(len(data) * share)])

    return spoil


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-20] ^= 4
    file.write_bytes(data)


def save_another(name: str, count: int = M) -> Callable[[Path], None]:
    return lambda file: ModelBatch(build(name, count)).save_all(file.parent)


NOT_SAVED = r"Expected .*models\.safetensors as it was saved \(mbkit-1 models\), got: \S"
NO_FILE = "Expected a file .*models.safetensors, got none: give the folder that was saved into"
SPOILED: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "missing": (lambda f: f.unlink(), FileNotFoundError, NO_FILE),
    "a folder": (lambda f: (f.unlink(), f.mkdir()), FileNotFoundError, NO_FILE),
    "a pipe": (lambda f: (f.unlink(), os.mkfifo(f)), FileNotFoundError, NO_FILE),
    "empty": (truncate(0), ValueError, NOT_SAVED),
    "cut early": (truncate(0.05), ValueError, NOT_SAVED),
    "cut in the middle": (truncate(0.5), ValueError, NOT_SAVED + ".*header"),
    "cut late": (truncate(0.99), ValueError, NOT_SAVED + ".*header"),
    "60 GB of nothing": (lambda f: os.truncate(f, 60 << 30), ValueError, NOT_SAVED + ".*header"),
    "one bit": (flip_a_bit, ValueError, NOT_SAVED + ".*checksum"),
    "noise": (lambda f: f.write_bytes(bytes(range(256)) * 9), ValueError, NOT_SAVED),
    "text": (lambda f: f.write_text("weights"), ValueError, NOT_SAVED),
    "a torch file": (lambda f: torch.save(nn.Linear(3, 2).state_dict(), f), ValueError, NOT_SAVED),
    "somebody else's": (
        lambda f: safetensors.torch.save_file({"weight": torch.zeros(4, 2, 3)}, f),
        ValueError,
        NOT_SAVED,
    ),
    "another architecture": (
        save_another("linear"),
        ValueError,
        "The state of model 0 belongs to another architecture: missing '0.weight'",
    ),
    "more models": (save_another("batchnorm", 6), ValueError, f"Expected {M} models in .*, got 6: load them"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_file_loses_nothing(case: str, tmp_path: Path) -> None:
    spoil, kind, text = SPOILED[case]
    ModelBatch(build("batchnorm")).save_all(tmp_path)
    spoil(tmp_path / "models.safetensors")
    batch = trained()
    before = snapshot(batch)
    with pytest.raises(kind, match=text):
        batch.load_all(tmp_path)
    assert_unchanged(batch, before)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Expected to write .*file.models.safetensors, got"):
        trained().save_all(tmp_path / "file")


SPOILED_STATES: dict[str, Callable[[dict], dict]] = {
    "one more": lambda state: {**state, "foreign": torch.zeros(4)},
    "another shape": lambda state: {**state, "4.bias": torch.zeros(4, 7)},
    "broken streams": lambda state: {k: t[:, :9] if k.startswith("mbkit_streams.cpu") else t for k, t in state.items()},
    "a weight less": lambda state: {key: t for key, t in state.items() if key != "4.weight"},
}


@pytest.mark.parametrize("case", SPOILED_STATES)
def test_a_refused_state_dict_leaves_tensors_streams_and_seeds(case: str) -> None:
    batch, other = trained("dropout"), ModelBatch(build("dropout"), seeds=range(M))
    other.freeze(1)
    train_batch(other, batches(own=False)[:1])
    before, streams = snapshot(batch), batch.streams.state()
    with pytest.raises(RuntimeError):
        batch.load_state_dict(SPOILED_STATES[case](other.state_dict()))
    assert_unchanged(batch, before)
    assert (batch.seeds, batch.frozen) == (SEEDS, [])
    assert all(torch.equal(batch.streams.state()[device], rows) for device, rows in streams.items())
