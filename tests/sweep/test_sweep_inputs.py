"""Configurations, what is refused and how it is said, the folder's owner, and the room that can be called."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sweep_cases import CONFIGS, data, killed, standard
from torch import nn

import mbkit
from mbkit import grid, sample
from mbkit.figures.sweeps import parallel_coordinates
from mbkit.sweep.configs import cut
from mbkit.sweep.folder import locked


def test_the_room_and_the_function_are_one_however_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    room = importlib.import_module("mbkit.sweep")
    assert mbkit.sweep is room is sys.modules["mbkit.sweep"]
    assert inspect.signature(mbkit.sweep) == inspect.signature(room.sweep)
    monkeypatch.delattr(mbkit, "sweep")  # as before the first use
    assert mbkit.sweep is room
    assert (mbkit.grid, mbkit.sample) == (room.grid, room.sample)


def test_samples_keep_to_their_ranges_and_their_seed() -> None:
    space = {"lr": (1e-4, 1e-1, "log"), "width": [8, 16], "layers": (1, 3), "units": (4, 256, "log"), "p": (0.0, 0.5)}
    got = sample(space, n=400, seed=1)
    assert got == sample(space, n=400, seed=1) != sample(space, n=400, seed=2)
    assert all(1e-4 <= one["lr"] <= 1e-1 and 0 <= one["p"] <= 0.5 and 4 <= one["units"] <= 256 for one in got)
    assert {one["layers"] for one in got} == {1, 2, 3}
    assert {one["width"] for one in got} == {8, 16}
    assert 150 < sum(one["lr"] < 10**-2.5 for one in got) < 250  # half of the chances below the middle of the decades
    assert 150 < sum(one["units"] < 32 for one in got) < 250


def test_batches_hold_alike_trials_in_the_order_of_their_numbers() -> None:
    assert cut([5, 3, 0, 4, 1, 2], [0, 1, 0, 1, 0, 0], 2) == [[0, 2], [4, 5], [1, 3]]


def test_architectures_are_told_apart_by_what_a_batch_refuses(tmp_path: Path) -> None:
    def build(act: str, width: int, slope: float = 0.1) -> nn.Module:
        acts = {"relu": nn.ReLU, "tanh": nn.Tanh, "leaky": partial(nn.LeakyReLU, slope)}
        return nn.Sequential(nn.Linear(4, width), acts[act](), nn.Linear(width, 3)).double()

    configs = [*grid(act=["relu", "tanh"], width=[3, 4]), *grid(act=["leaky"], width=[3], slope=[0.1, 0.2])]
    standard(tmp_path, build=build, configs=configs, seeds=None, rungs=1)
    assert json.loads((tmp_path / "sweep.json").read_text())["kinds"] == [0, 1, 2, 3, 4, 4]


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "nobody's name": ({"configs": [{"lr": 0.1, "widht": 3}]}, ValueError, r"'widht' of trial 0.*Did you mean 'width'"),
    "no configs": ({"configs": []}, ValueError, "at least one configuration"),
    "data settings, but no callable": (
        {"configs": [{"lr": 0.1, "data_fold": 1, "width": 3}], "data": [1]}, TypeError, "data as a callable"
    ),
    "rungs that fall": ({"rungs": (3, 1)}, ValueError, "ascending"),
    "a score of unknown name": ({"score": "f1"}, ValueError, "'accuracy', 'loss' or a function"),
    "seeds twice": ({"configs": [{"lr": 0.1, "width": 3, "seed": 1}], "seeds": [1]}, ValueError, "keep one of the two"),
    "too few seeds": ({"seeds": [1, 2]}, ValueError, "Expected 10 seeds"),
    "labels": ({"groups": [1, 2]}, ValueError, "Expected 10 labels"),
    "a group of no name": ({"groups": "fold"}, ValueError, "groups as names"),
    "a factor of one": ({"reduction_factor": 1}, ValueError, "at least 2 as reduction_factor"),
    "an object": ({"configs": [{"lr": 0.1, "width": object()}]}, TypeError, r"in a sweep's configurations.*width"),
    "scores of another form": ({"score": lambda batch, valid: [1.0, 2.0]}, ValueError, r"Expected 3 scores.*\[2\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_by_name(name: str, tmp_path: Path) -> None:
    changes, kind, words = REFUSED[name]
    if "configs" in changes and "seeds" not in changes:
        changes = {**changes, "seeds": None}
    with pytest.raises(kind, match=words):
        standard(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"configs": [{**CONFIGS[0], "lr": 0.7}, *CONFIGS[1:]]}, r"configs = .*0.1.*\(entry 0\).*got .*0.7"),
        ({"rungs": (1, 2, 8)}, r"rungs = \[1, 2, 4\]|rungs = 4 \(entry 2\)"),
        ({"models_per_batch": 4}, "models_per_batch = 3"),
        ({"seeds": range(10)}, "seeds = 7"),
        ({"optimizer_cls": torch.optim.AdamW}, "optimizer = 'torch.optim.adam.Adam'"),
        ({"score": "accuracy"}, "score = 'loss'"),
    ],
)
def test_another_sweeps_folder_is_refused_and_left_alone(changes: dict[str, Any], words: str, done: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in done.rglob("*")}
    with pytest.raises(ValueError, match=words):
        standard(done, **changes)
    assert {file: file.stat().st_mtime_ns for file in done.rglob("*")} == before


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("done")
    standard(folder)
    return folder


def test_a_second_driver_is_refused(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(RuntimeError, match="Another process is running the sweep"):
        standard(tmp_path)
    standard(tmp_path, rungs=1)


def test_spoiled_files_are_refused_by_name_and_trained_anew_once_removed(tmp_path: Path) -> None:
    first = repr(standard(tmp_path))
    file = tmp_path / "rung-2" / "batch-00000.safetensors"
    whole = file.read_bytes()
    for spoiled in (whole[:100], whole[:-1], b""):
        file.write_bytes(spoiled)
        with pytest.raises(ValueError, match=r"rung-2/batch-00000.*remove it"):
            standard(tmp_path)
    file.write_bytes(whole)
    assert repr(standard(tmp_path)) == first
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(ValueError, match=r"sweep\.json as a sweep wrote it"):
        standard(tmp_path)


def test_a_folder_that_cannot_be_written_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Expected a folder to write a sweep into"):
        standard(tmp_path / "file")


def test_a_folder_that_is_not_ones_own_is_an_error_of_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)

    def attempt() -> None:
        if os.getuid() == 0:
            os.setuid(65534)  # nobody: root may write anywhere
        with pytest.raises(PermissionError, match="Expected a folder to write a sweep into"):
            standard(tmp_path / "sweep")

    assert killed(attempt, -1)[0] == 0


def test_a_full_disk_at_every_write_leaves_no_half_file_and_goes_on_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, fsync = [1000], os.fsync

    def full(descriptor: int) -> None:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    settings = {"configs": CONFIGS[:4], "seeds": [1, 2, 3, 4], "rungs": (1, 2)}
    expected, failures = repr(standard(None, **settings)), 0
    for attempt in range(20):
        room[0] = 4 + attempt % 2  # two files more with their folders, or half of a third
        try:
            result = standard(tmp_path, **settings)
            break
        except OSError as error:
            failures += "No space left" in str(error)
        assert failures == attempt + 1
        assert not list(tmp_path.rglob("*.part"))
    assert failures >= 3  # sweep.json, two batches with their states, a batch of the next rung
    assert repr(result) == expected


def test_a_users_exception_comes_when_the_other_batches_are_done(tmp_path: Path) -> None:
    def broken(fold: list[int]) -> Any:
        if 0 in fold:
            raise RuntimeError("no such fold")
        return [(x.expand(len(fold), *x.shape), y.expand(len(fold), *y.shape)) for x, y in data()]

    configs = [{**config, "data_fold": t} for t, config in enumerate(CONFIGS)]
    with pytest.raises(RuntimeError, match="no such fold"):
        standard(tmp_path, configs=configs, data=broken)
    done = sorted(file.name for file in (tmp_path / "rung-0").glob("batch-?????.safetensors"))
    assert done == ["batch-00001.safetensors", "batch-00002.safetensors", "batch-00003.safetensors"]
    assert len(standard(tmp_path, configs=configs, data=partial(_mended, broken)).trials) == 10


def _mended(broken: Callable, fold: list[int]) -> Any:
    return broken([f + 1 for f in fold])


def test_the_result_shows_itself_and_becomes_a_data_frame(done: Path) -> None:
    result = standard(done)
    frame = result.to_pandas()
    assert list(frame.columns) == ["lr", "betas", "width", "dropout", "seed", "epochs", "score", "loss"]
    assert list(frame.index) == [trial.number for trial in result.ranked]
    assert frame.score.is_monotonic_decreasing
    assert "10 after 1, 5 after 2, 2 after 4" in repr(result)
    assert "<table>" in result._repr_html_()
    with pytest.raises(IndexError, match="trial from 0 to 9"):
        result.load(10)
    with pytest.raises(IndexError, match="as far as trial"):
        result.load(result.ranked[-1], 2)
    assert mbkit.sweep.SweepResult is type(result)


def test_the_picture_has_an_axis_for_each_setting_that_differs_and_for_each_rung(done: Path) -> None:
    result = standard(done)
    (axes,) = result.plot().axes
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "lr", "betas", "width", "dropout", "score\nafter 1", "score\nafter 2", "score\nafter 4"
    ]  # fmt: skip
    lines = [line.get_ydata() for line in axes.get_lines() if len(line.get_xdata()) == 7]
    assert len(lines) == 10
    assert sorted(int(torch.as_tensor(y.astype(float)).isfinite().sum()) for y in lines) == [5] * 5 + [6] * 3 + [7] * 2
    heights = {word.get_text(): word.get_position()[1] for word in axes.texts if word.get_position()[0] < 0.5}
    assert heights == {"0.01": 0.0, "0.02": 0.25, "0.03": 0.5, "0.1": 0.75, "0.3": 1.0}


def test_an_axis_of_many_values_has_a_step_for_each_and_five_words() -> None:
    configs = [{"lr": 10.0**-t, "kind": "a" if t % 2 else "b"} for t in range(13)]
    trials = [mbkit.sweep.Trial(t, config, t, [0.1 * t], [1.0], [1]) for t, config in enumerate(configs)]
    (axes,) = parallel_coordinates(SimpleNamespace(ranked=trials, names=["lr", "kind"])).axes
    places = [line.get_ydata()[0] for line in axes.get_lines() if len(line.get_xdata()) == 3]
    assert sorted(places) == pytest.approx([t / 12 for t in range(13)])
    words = {word.get_text(): word.get_position()[1] for word in axes.texts if word.get_position()[0] < 0.5}
    assert words == {"1e-12": 0.0, "1e-09": 0.25, "1e-06": 0.5, "0.001": 0.75, "1": 1.0}
