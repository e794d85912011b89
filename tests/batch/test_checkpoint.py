"""States in memory and on disk: what is saved loads into lone models, and whatever goes wrong loses nothing."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
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


WRONG_STATES: dict[str, tuple[Callable, str]] = {
    "too few": (
        lambda: [good(0)] * (M - 1),
        rf"Expected {M} states \(one per model\), got {M - 1}: pass a list of {M}",
    ),
    "one for all": (lambda: good(0), rf"Expected {M} states \(one per model\), got one dict: pass a list of {M} dicts"),
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
}


@pytest.mark.parametrize("case", WRONG_STATES)
def test_a_wrong_state_loses_nothing(case: str) -> None:
    batch, (make, text) = trained(), WRONG_STATES[case]
    before, states = snapshot(batch), make()
    with pytest.raises(ValueError, match=text):
        batch.load_model_states(states)
    assert_unchanged(batch, before)


# ------------------------------------------------------------------ on disk
@pytest.mark.parametrize("name", NETS)
def test_files_bring_everything_back(name: str, tmp_path: Path) -> None:
    batch = trained(name)
    batch.save_all(tmp_path / "new" / "folder")
    batch.save_all(str(tmp_path / "new" / "folder"))  # over itself, and by name
    assert list(contents(tmp_path / "new" / "folder")) == [f"model_{m}.pt" for m in range(M)]
    other = ModelBatch(build(name), seeds=SEEDS)
    other.load_all(str(tmp_path / "new" / "folder"))
    for key, tensor in batch.stacked_params.items():
        assert torch.equal(other.stacked_params[key], tensor), key
    for key, tensor in batch.stacked_buffers.items():
        assert torch.equal(other.stacked_buffers[key], tensor), key
    lone = build(name, 1)[0]
    lone.load_state_dict(torch.load(tmp_path / "new" / "folder" / "model_2.pt", weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(lone.parameters(), batch[2].parameters(), strict=True))


class Evil:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple:
        return os.mkdir, (os.environ["MBKIT_TEST_TRACE"],)


def truncate(share: float) -> Callable[[Path], None]:
    def spoil(file: Path) -> None:
        data = file.read_bytes()
        file.write_bytes(data[: int(len(data) * share)])

    return spoil


NO_WEIGHTS = r"model_2\.pt is not a file of weights that save_all\(\) wrote: \S"
SPOILED: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "missing": (
        lambda f: f.unlink(),
        FileNotFoundError,
        "Expected 4 files in .*, missing 'model_2.pt': give the folder",
    ),
    "a folder": (lambda f: (f.unlink(), f.mkdir()), FileNotFoundError, "missing 'model_2.pt'"),
    "empty": (truncate(0), ValueError, NO_WEIGHTS),
    "cut early": (truncate(0.05), ValueError, NO_WEIGHTS),
    "cut in the middle": (truncate(0.5), ValueError, NO_WEIGHTS),
    "cut late": (truncate(0.99), ValueError, NO_WEIGHTS),
    "noise": (lambda f: f.write_bytes(bytes(range(256)) * 9), ValueError, NO_WEIGHTS),
    "text": (lambda f: f.write_text("weights"), ValueError, NO_WEIGHTS),
    "code": (lambda f: f.write_bytes(pickle.dumps(Evil())), ValueError, NO_WEIGHTS),
    "code in a torch file": (lambda f: torch.save({"0.weight": Evil()}, f), ValueError, NO_WEIGHTS),
    "a whole module": (lambda f: torch.save(nn.Linear(3, 2), f), ValueError, NO_WEIGHTS),
    "a tensor": (lambda f: torch.save(torch.zeros(3), f), ValueError, "state dict for model 2, got Tensor"),
    "a number": (lambda f: torch.save(3, f), ValueError, "state dict for model 2, got int"),
    "another architecture": (
        lambda f: torch.save(nn.Linear(3, 2).state_dict(), f),
        ValueError,
        "The state of model 2 belongs to another architecture: missing '0.weight'",
    ),
    "more models": (
        lambda f: f.with_name(f"model_{M}.pt").write_bytes(f.read_bytes()),
        ValueError,
        f"holds more than {M} models: load it into a batch of as many",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_file_loses_nothing(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil, kind, text = SPOILED[case]
    monkeypatch.setenv("MBKIT_TEST_TRACE", str(tmp_path / "trace"))
    folder = tmp_path / "saved"
    ModelBatch(build("batchnorm")).save_all(folder)
    spoil(folder / "model_2.pt")
    batch = trained()
    before = snapshot(batch)
    with pytest.raises(kind, match=text):
        batch.load_all(folder)
    assert_unchanged(batch, before)
    assert not (tmp_path / "trace").exists()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"missing 'model_0\.pt', 'model_1\.pt', 'model_2\.pt' and 1 more: give the"
    ):
        trained().load_all(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        trained().save_all(tmp_path / "file")


def test_a_folder_of_more_models_is_not_mixed_with_fewer(tmp_path: Path) -> None:
    trained().save_all(tmp_path)
    before = contents(tmp_path)
    small = ModelBatch(build("batchnorm", 2))
    said = re.escape(f"{tmp_path} holds a batch of more than 2 models (there is a model_2.pt): choose another folder")
    with pytest.raises(ValueError, match=said):
        small.save_all(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_a_save_that_fails_half_way_keeps_the_old_files(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained().save_all(tmp_path)
    before, save = contents(tmp_path), torch.save

    def fails_at_the_third(state: dict, file: Path) -> None:
        if "model_2" in str(file):
            Path(file).write_bytes(b"half")
            raise error
        save(state, file)

    monkeypatch.setattr(torch, "save", fails_at_the_third)
    with pytest.raises(type(error)):
        ModelBatch(build("batchnorm")).save_all(tmp_path)
    assert contents(tmp_path) == before
