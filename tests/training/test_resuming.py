"""A run that was cut off goes on to the bits of the run that was not; what is refused changes nothing."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import assert_unchanged, next_draws, seed_all, snapshot
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from mbkit import Batches, GradScaler, ModelBatch, OptimizerFactory, fit, fit_alone, load_run, save_run
from mbkit.training import PositionedBatches

M, EPOCHS, STEPS = 4, 3, 5  # steps in an epoch
X, Y = torch.randn(38, 6, generator=torch.Generator().manual_seed(1)), torch.arange(38) % 3


class Net(nn.Module):
    """All that has to be saved: dropout, a buffer that is not persistent, a number and a tensor as plain attributes."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.Dropout(0.3), nn.Linear(width, 3))
        self.register_buffer("mean", torch.zeros(3), persistent=False)
        self.memory = torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x + 0.1 * self.memory.sum())
        self.mean = 0.9 * self.mean + 0.1 * out.detach().mean(0)
        self.memory = self.memory + 0.01 * self.mean
        return out + self.mean


class Augmented(Dataset):
    """Draws from the global generators of torch, Python and NumPy, and from two of its own."""

    def __init__(self) -> None:
        self.own, self.numpy = random.Random(4), np.random.default_rng(5)

    def __len__(self) -> int:
        return 38

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        noise = random.random() + np.random.rand() + self.own.random() + self.numpy.random()
        return X[i] + noise + torch.rand(6), Y[i]


class Endless(IterableDataset):
    """Knows no length."""

    def __iter__(self) -> Any:
        return iter(zip(X, Y, strict=True))


DATA: dict[str, Callable[[], Any]] = {
    "batches": lambda: Batches(X, Y, 8, seed=3),
    "another order": lambda: Batches(X, Y, 8, seed=4),
    "a loader": lambda: DataLoader(TensorDataset(X, Y), 8, shuffle=True),
    "a loader's generator": lambda: DataLoader(
        TensorDataset(X, Y), 8, shuffle=True, generator=torch.Generator().manual_seed(2)
    ),
    "augmented": lambda: DataLoader(Augmented(), 8, shuffle=True),
    "no length": lambda: DataLoader(Endless(), 8),
}
LR = torch.optim.lr_scheduler
SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adam, a schedule of epochs": {"cls": torch.optim.Adam, "scheduler": lambda o: LR.ExponentialLR(o, 0.5)},
    "rmsprop, a schedule of steps": {
        "cls": torch.optim.RMSprop,
        "scheduler": lambda o: LR.MultiStepLR(o, [2, 7]),
        "scheduler_every": "step",
    },
    "views, a chain": {
        "cls": torch.optim.ASGD,
        "scheduler": lambda o: LR.SequentialLR(o, [LR.ConstantLR(o, 0.1), LR.ExponentialLR(o, 0.9)], [2]),
    },
}


class Run:
    """A run as a script makes it, from the same seeds every time."""

    def __init__(self, data: str = "batches", setting: str = "sgd", **changed: Any) -> None:
        seed_all(0)
        options = {**SETTINGS[setting], **changed}
        self.seen: list[Any] = []
        width, count, seeds = options.pop("width", 8), options.pop("count", M), options.pop("seeds", None)
        self.batch = ModelBatch([Net(width) for _ in range(count)], seeds=seeds)
        factory = OptimizerFactory(options.pop("cls", torch.optim.SGD))
        self.optimizer = factory.create_optimizer(self.batch, lr=options.pop("lr", 0.05))
        self.data, self.options = DATA[data](), options

    def fit(self, folder: Path | None = None, stop: int | None = None, epochs: int = EPOCHS, **options: Any) -> Any:
        def callback(step: Any) -> bool:
            next_draws()  # between the data's own
            self.seen.append((step.index, step.epoch, [group["lr"] for group in self.optimizer.param_groups]))
            return step.index != stop

        options = {"checkpoint": folder, "callback": callback, "progress": False, **self.options, **options}
        return fit(self.batch, self.optimizer, self.data, cross_entropy, epochs, **options)

    def facts(self, history: Any) -> dict[str, Any]:
        """Return all that two equal runs have in common."""
        tensors = [*self.batch.parameters(), *self.batch.buffers(), *(m.memory for m in self.batch.models)]
        state = [torch.as_tensor(v) for s in self.optimizer.state_dict()["state"].values() for v in _numbers(s)]
        return {
            "tensors": [t.detach().clone() for t in (*tensors, *state, history.loss, history.epoch)],
            "lr": [group["lr"] for group in self.optimizer.param_groups],
            "draws": next_draws(),
            "streams": list(self.batch.streams.state().values()),
        }


def _numbers(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for name, value in tree.items() if name != "param_groups" for leaf in _numbers(value)]
    if isinstance(tree, list):
        return [leaf for value in tree for leaf in _numbers(value)]
    return [tree] if isinstance(tree, (Tensor, int, float)) else []


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    for name in ("tensors", "streams"):
        assert len(a[name]) == len(b[name])
        assert all(torch.equal(x, y) for x, y in zip(a[name], b[name], strict=True)), name
    assert (a["lr"], a["draws"]) == (b["lr"], b["draws"])


CASES = [(data, "sgd") for data in DATA if data != "another order"]
CASES += [("batches", setting) for setting in SETTINGS if setting != "sgd"]


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")  # torch 2.8 itself
@pytest.mark.parametrize(("data", "setting"), CASES)
@pytest.mark.parametrize("stop", [2, STEPS - 1, STEPS + 1])  # within an epoch, at its end, within the next
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(data: str, setting: str, stop: int, tmp_path: Path) -> None:
    whole = Run(data, setting)
    expected = whole.facts(whole.fit())
    first = Run(data, setting)
    first.fit(tmp_path, stop)
    again = Run(data, setting)
    torch.manual_seed(99)  # another process, and the data has been looked at
    if data != "augmented":
        next(iter(again.data))
    history = again.fit(tmp_path)
    assert_same(again.facts(history), expected)
    assert [*first.seen, *again.seen] == whole.seen  # indices, epochs and learning rates at each callback
    assert (history.steps, history.interrupted) == (EPOCHS * STEPS, False)
    done = Run(data, setting)
    assert_same(done.facts(done.fit(tmp_path)), expected)
    assert done.seen == []


def test_chunks_are_as_they_were_chosen_in_the_first_step(tmp_path: Path) -> None:
    ways: list[str] = []

    def callback(stop: int | None) -> Callable[..., bool]:
        return lambda step: bool(ways.append(step.how)) or step.index != stop

    Run(count=6).fit(callback=callback(None))
    expected, ways = ways, []
    Run(count=6).fit(tmp_path, callback=callback(3))
    Run(count=6).fit(tmp_path, callback=callback(None))
    assert ways == expected
    assert len(set(ways)) == 2  # the first step finds out how large chunks may be


def test_without_seeds_the_random_streams_are_the_saved_ones(tmp_path: Path) -> None:
    whole = Run()
    expected = whole.facts(whole.fit(tmp_path / "other", stop=-1))
    Run().fit(tmp_path, epochs=1)
    again = Run(seeds=range(M))  # as another process would draw others
    assert_same(again.facts(again.fit(tmp_path)), expected)
    assert again.batch.seeds == whole.batch.seeds


def test_frozen_models_stay_frozen(tmp_path: Path) -> None:
    def trained(stop: int | None) -> Run:
        run = Run(setting="adam, a schedule of epochs")
        run.batch.freeze(1)
        run.fit(tmp_path, stop)
        return run

    trained(3)
    again = Run(setting="adam, a schedule of epochs")
    history = again.fit(tmp_path)
    assert again.batch.frozen == [1]
    assert history.frozen == [None, 0, None, None]


def test_it_is_saved_every_so_many_steps_and_after_an_exception_it_goes_on(tmp_path: Path) -> None:
    whole = Run()
    expected = whole.facts(whole.fit())
    broken = Run()

    def fails(step: Any) -> None:
        next_draws()  # as the other runs' callback does
        if step.index == 8:
            raise OSError("the network is gone")

    with pytest.raises(OSError, match="network") as caught:
        broken.fit(tmp_path, callback=fails, checkpoint_every=3)
    assert caught.value.history.steps == 9
    again = Run()
    assert_same(again.facts(again.fit(tmp_path, checkpoint_every=3)), expected)
    assert again.seen[0][0] == 6


def test_a_loop_by_hand_with_a_scaler(tmp_path: Path) -> None:
    def parts() -> tuple[Any, ...]:
        torch.manual_seed(0)
        batch = ModelBatch([Net() for _ in range(M)])
        optimizer = OptimizerFactory(torch.optim.Adam).create_optimizer(batch, lr=0.05)
        scaler = GradScaler(init_scale=4.0, growth_interval=2)
        return batch, optimizer, scaler, PositionedBatches(DataLoader(TensorDataset(X, Y), 8, shuffle=True))

    def train(batch: Any, optimizer: Any, scaler: Any, data: Any, most: int) -> int:
        done = 0
        while data.epoch < EPOCHS:
            for x, y in data:
                optimizer.zero_grad()
                scaler.scale(batch.compute_loss(batch(x), y, cross_entropy, reduction="none")).sum().backward()
                scaler.step(optimizer)
                scaler.update()
                done += 1
                if done == most:
                    return done
        return done

    whole = parts()
    assert train(*whole, most=99) == EPOCHS * STEPS
    first = parts()
    train(*first, most=7)
    save_run(tmp_path, first[0], first[1], scaler=first[2], batches=first[3], notes={"mine": [7, torch.ones(2)]})
    again = parts()
    train(*again, most=1)
    torch.manual_seed(99)
    notes = load_run(tmp_path, again[0], again[1], scaler=again[2], batches=again[3])
    assert notes["mine"][0] == 7
    assert train(*again, most=99) == EPOCHS * STEPS - 7
    assert all(map(torch.equal, again[0].state_dict().values(), whole[0].state_dict().values()))
    assert again[2].get_scale() == whole[2].get_scale()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another learning rate": (
        {"lr": 0.06},
        r"Expected hyperparameters=.*0\.05.*, got .*0\.06.*: call fit as before, or",
    ),
    "another optimizer": ({"cls": torch.optim.Adam}, "Expected the optimizer .*SGD.* got .*Adam|hyperparameters"),
    "more models": ({"count": 5}, "hyperparameters|Expected a run of 5 models, got one of 4"),
    "a scheduler": ({"scheduler": lambda o: LR.ExponentialLR(o, 0.5)}, "Expected the scheduler None, .* got Exp"),
    "clipping": ({"max_norm": 1.0}, "Expected max_norm=None, as in the run saved in .*, got 1.0: call fit as before"),
    "the loss": (
        {"loss_settings": {"label_smoothing": [0.1, 0.0, 0.0, 0.0], "weight": torch.ones(3)}},
        r"Expected loss_settings=\{\}, as in the run saved in .*, got \{'label_smoothing': \[0.1, 0.0, 0.0, 0.0\], ",
    ),
    "other data": ({"data": "augmented"}, "generators"),
    "another order": (
        {"data": "another order"},
        "Expected batch 3 of epoch 0 as in the saved run, got other numbers: pass the same",
    ),
    "another architecture": (
        {"width": 9},
        r"Expected 'body.0.weight' as float32 \[4, 9, 6\], got float32 \[4, 8, 6\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_runs_folder_is_refused_and_changes_nothing(case: str, tmp_path: Path) -> None:
    changed, text = REFUSED[case]
    Run().fit(tmp_path, stop=2)
    run = Run(**changed)
    before, states = snapshot(run.batch), torch.get_rng_state()
    with pytest.raises(ValueError, match=text):
        run.fit(tmp_path)
    assert run.seen == []
    if case != "another order":  # which is met when the data is drawn, before a step is made
        assert_unchanged(run.batch, before)
        assert torch.equal(torch.get_rng_state(), states)


def test_a_callable_in_a_state_is_refused_by_name(tmp_path: Path) -> None:
    class Warm:
        def __init__(self) -> None:
            self.rule = print

        def __call__(self, epoch: int) -> float:
            return 1.0

    run = Run(scheduler=lambda o: LR.LambdaLR(o, Warm()))
    with pytest.raises(TypeError, match=r"got builtin_function_or_method as parts/scheduler/lr_lambdas/0/rule"):
        run.fit(tmp_path)


def test_a_run_that_was_saved_by_hand_is_not_taken_up_by_fit(tmp_path: Path) -> None:
    run = Run()
    save_run(tmp_path, run.batch, run.optimizer)
    with pytest.raises(ValueError, match=r"Expected a run of fit in .*, got one of save_run: use load_run for it"):
        run.fit(tmp_path)


@pytest.mark.parametrize("train", ["fit", "fit_alone"])
@pytest.mark.parametrize("every", ["epoch", "step"])
def test_a_callback_sees_the_schedulers_step_done(train: str, every: str) -> None:
    model = nn.Linear(6, 3)
    lone = torch.optim.SGD(model.parameters(), lr=0.05)
    schedule, expected, made, seen = LR.ExponentialLR(lone, 0.5), [], [], []
    for step in range(1, 2 * STEPS + 1):  # as people write it: the scheduler's step, then what they want to know
        lone.step()
        if every == "step" or step % STEPS == 0:
            schedule.step()
        expected.append(lone.param_groups[0]["lr"])

    def make(optimizer: Any) -> Any:
        made.append(optimizer)
        return LR.ExponentialLR(optimizer, 0.5)

    options = {"scheduler": make, "scheduler_every": every, "progress": False}
    options["callback"] = lambda step: seen.append(made[0].param_groups[0]["lr"])
    if train == "fit":
        batch = ModelBatch([model])
        optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=0.05)
        fit(batch, optimizer, Batches(X, Y, 8), cross_entropy, 2, **options)
    else:
        fit_alone([model], torch.optim.SGD, {"lr": 0.05}, Batches(X, Y, 8), cross_entropy, 2, **options)
    assert seen == expected


HARNESS = """
import hashlib, itertools, json, os, random, signal, sys, time
sys.path[:0] = sys.argv[1:3]
import torch
import test_resuming as own

torch.set_num_threads(1)
folder, kills = own.Path(sys.argv[3]), int(sys.argv[4])
draws = random.Random(7)

def fork(work):  # this process never runs a backward pass, so its children may
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return child

def train(checkpoint, output=None):
    run = own.Run("augmented", "adam, a schedule of epochs")
    facts = run.facts(run.fit(checkpoint, epochs=5, checkpoint_every=2))
    if output:
        numbers = b"".join(t.contiguous().numpy().tobytes() for t in (*facts["tensors"], *facts["streams"]))
        output.write_text(hashlib.sha256(numbers).hexdigest() + repr((facts["lr"], facts["draws"])))

def finished(checkpoint, name):
    assert os.waitpid(fork(lambda: train(checkpoint, folder / name)), 0)[1] == 0
    return (folder / name).read_text()

warm = own.Run()
warm.batch.compute_loss(warm.batch(own.X), own.Y, own.cross_entropy)  # what torch imports at the first call
start = time.monotonic()
digests = [finished(None, "whole"), finished(folder / "saved", "unharmed")]
seconds, cut = (time.monotonic() - start) / 2, 0
for kill in range(kills):
    checkpoint = folder / str(kill)
    for again in range(1 + kill % 2):  # killed, every other time taken up and killed again
        child = fork(lambda: train(checkpoint))
        time.sleep(draws.uniform(0, 0.6 * seconds))
        os.kill(child, signal.SIGKILL)
        cut += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    digests.append(finished(checkpoint, f"resumed {kill}"))
print(json.dumps([digests, cut, sorted({n for k in range(kills) for n in os.listdir(folder / str(k))})]))
"""


@pytest.mark.parametrize("kills", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments_resumes_to_the_same_bits(kills: int, tmp_path: Path) -> None:
    here = Path(__file__).parent
    arguments = [sys.executable, "-c", HARNESS, str(here), str(here.parent), str(tmp_path), str(kills)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    digests, cut, names = json.loads(done.stdout)
    assert len(digests) == kills + 2
    assert len(set(digests)) == 1
    assert cut >= kills  # at least that many were killed before they were done
    assert names == ["run.safetensors"]
