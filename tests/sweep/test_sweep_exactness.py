"""A swept trial is the one that plain PyTorch trains alone: weights, buffers, scores, and so who goes on."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from oracle import close
from sweep_cases import CONFIGS, DOUBLE, FACTOR, RUNGS, SEEDS, Net, alone, data, standard, valid, valid_loss
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, SequentialLR
from torch.utils.data import DataLoader, TensorDataset

from mbkit import Batches, grid


def assert_same(module: nn.Module, expected: nn.Module, what: str) -> None:
    found = dict(module.named_parameters()) | dict(module.named_buffers())
    own = dict(expected.named_parameters()) | dict(expected.named_buffers())
    assert found.keys() == own.keys()
    for name, tensor in own.items():
        close(found[name], tensor, 1e-9, f"{name} of {what}")


def test_every_trial_at_every_rung_and_who_goes_on() -> None:
    result = standard(None)
    going, scores = list(range(len(CONFIGS))), {}
    for rung, epochs in enumerate(RUNGS):
        for t in going:
            config, seed = CONFIGS[t], SEEDS[t]
            model, loss = alone(
                partial(Net, config["width"], config["dropout"]),
                seed,
                lone_optimizer(torch.optim.Adam, {"lr": config["lr"], "betas": config["betas"]}),
                epochs,
            )
            trial = result.trials[t]
            assert_same(result.load(t, rung), model, f"trial {t} at rung {rung}")
            scores[t] = -valid_loss(model)
            assert math.isclose(trial.scores[rung], scores[t], rel_tol=1e-9)
            assert math.isclose(trial.losses[rung], loss, rel_tol=1e-9)
            assert result.load(t, rung).body[2].p == config["dropout"]
        assert [trial.number for trial in result.trials if len(trial.rungs) > rung] == going
        going = sorted(sorted(going, key=lambda t: -scores[t])[: len(going) // FACTOR])
    assert result.best.score == max(trial.score for trial in result.trials)
    assert result.best.number in [trial.number for trial in result.ranked[:1]]


def exponential(optimizer: Any) -> Any:
    return ExponentialLR(optimizer, 0.7)


def sequential(optimizer: Any) -> Any:
    parts = [LambdaLR(optimizer, lambda epoch: 0.5 + epoch), ExponentialLR(optimizer, 0.5)]
    return SequentialLR(optimizer, parts, milestones=[2])


SETUPS: dict[str, tuple[type, dict[str, list[Any]], dict[str, Any], Callable | None]] = {
    "momentum or none": (torch.optim.SGD, {"lr": [0.1, 0.2], "momentum": [0.0, 0.0, 0.9], "seed": [1, 2]}, {}, None),
    "centered or not": (torch.optim.RMSprop, {"lr": [0.01, 0.02], "centered": [False, True], "seed": [3]}, {}, None),
    "amsgrad": (torch.optim.AdamW, {"lr": [0.01, 0.02], "amsgrad": [False, False, True]}, {}, None),
    "model by model": (torch.optim.Rprop, {"lr": [0.01, 0.02, 0.03], "etas": [(0.5, 1.2), (0.4, 1.3)]}, {}, None),
    "per group": (torch.optim.Adam, {"lr": [0.01, 0.02], "lr@head": [0.1, 0.2], "eps@*.bias": [1e-3, 1e-4]}, {}, None),
    "clipped": (torch.optim.SGD, {"lr": [0.1, 0.3], "max_norm": [0.1, 0.5, 1.0]}, {}, None),
    "schedule": (torch.optim.Adam, {"lr": [0.01, 0.1], "seed": [1, 2, 3]}, {"scheduler": exponential}, exponential),
    "warm-up": (torch.optim.SGD, {"lr": [0.01, 0.1], "momentum": [0.5, 0.9]}, {"scheduler": sequential}, sequential),
    "schedule of groups": (
        torch.optim.SGD,
        {"lr": [0.01, 0.1], "lr@head": [0.2, 0.3]},
        {"scheduler": exponential},
        exponential,
    ),
}


def lone_optimizer(cls: type, config: dict[str, Any]) -> Callable[[nn.Module], torch.optim.Optimizer]:
    plain = {name: value for name, value in config.items() if "@" not in name and name not in ("seed", "max_norm")}

    def make(model: nn.Module) -> torch.optim.Optimizer:
        if not any("@" in name for name in config):
            return cls(model.parameters(), **plain)
        groups: dict[str, list[nn.Parameter]] = {"head": [], "bias": [], "rest": []}
        for name, p in model.named_parameters():
            asked = name.startswith("head") and "lr@head" in config
            groups["head" if asked else "bias" if name.endswith("bias") and "eps@*.bias" in config else "rest"].append(
                p
            )
        own = {"head": {"lr": config.get("lr@head")}, "bias": {"eps": config.get("eps@*.bias")}, "rest": {}}
        return cls([{"params": ps, **own[name]} for name, ps in groups.items() if ps], **plain)

    return make


@pytest.mark.parametrize("name", SETUPS)
def test_optimizers_groups_clipping_and_schedules_go_on_from_rung_to_rung(name: str) -> None:
    cls, space, settings, schedule_of = SETUPS[name]
    configs = grid(space)
    result = standard(
        None, optimizer_cls=cls, configs=configs, build=partial(Net, 4), seeds=None, rungs=(1, 3), **settings
    )
    finalists = [trial for trial in result.trials if trial.epochs == 3]
    assert 2 <= len(finalists) < len(configs)
    for trial in finalists:
        model, _ = alone(
            partial(Net, 4), trial.seed, lone_optimizer(cls, trial.config), 3, schedule_of=schedule_of,
            max_norm=trial.config.get("max_norm"),
        )  # fmt: skip
        assert_same(result.load(trial, 1), model, f"trial {trial.number}")


def everything() -> tuple[Tensor, Tensor]:
    return tuple(torch.cat(column) for column in zip(*data(), strict=True))


FOLDS = torch.arange(20).view(4, 5)
KEPT = torch.stack([torch.cat([*FOLDS[:k], *FOLDS[k + 1 :]]) for k in range(4)])


def folded(fold: list[int], order: list[int]) -> Batches:
    return Batches(*everything(), 8, seed=order, subsets=KEPT[fold])


def left_out(fold: list[int]) -> list[tuple[Tensor, Tensor]]:
    x, y = everything()
    return [(x[FOLDS[fold]], y[FOLDS[fold]])]


def test_folds_and_orders_are_those_of_each_fold_trained_alone_and_folds_go_on_together() -> None:
    configs = grid(lr=[0.3, 0.01, 0.1, 0.001], data_fold=[0, 1, 2, 3], data_order=[5])
    changes = {"configs": configs, "build": partial(Net, 4), "data": folded, "valid": left_out, "groups": "data_fold"}
    result = standard(None, seeds=range(16), rungs=(1, 2), **changes)
    means = {lr: [] for lr in (0.3, 0.01, 0.1, 0.001)}
    for trial in result.trials:
        fold, x, y = trial.config["data_fold"], *everything()
        batches = Batches(x[KEPT[fold]], y[KEPT[fold]], 8, seed=5)
        make = lone_optimizer(torch.optim.Adam, {"lr": trial.config["lr"]})
        model, _ = alone(partial(Net, 4), trial.seed, make, trial.epochs, batches=batches)
        assert_same(result.load(trial, len(trial.rungs) - 1), model, f"trial {trial.number}")
        model.eval()
        score = -nn.functional.cross_entropy(model(x[FOLDS[fold]]), y[FOLDS[fold]]).item()
        assert math.isclose(trial.scores[-1], score, rel_tol=1e-9)
        means[trial.config["lr"]].append(trial.scores[0])
    best = sorted(means, key=lambda lr: -sum(means[lr]))[:2]
    assert {trial.config["lr"] for trial in result.trials if trial.epochs == 2} == set(best)
    assert all(len({t.epochs for t in result.trials if t.config["lr"] == lr}) == 1 for lr in means)
    assert "group score" in repr(result)


def test_a_shuffling_loader_shows_every_batch_the_same_order_and_the_callers_generator_stays() -> None:
    seen: dict[str, list[Any]] = {}

    def loader() -> DataLoader:
        def collate(rows: list[Any]) -> Any:
            x, y = map(torch.stack, zip(*rows, strict=True))
            seen.setdefault("orders", []).append(y.tolist())
            return x + torch.rand(1), y

        return DataLoader(TensorDataset(*everything()), batch_size=20, shuffle=True, collate_fn=collate)

    before = torch.get_rng_state()
    result = standard(None, configs=grid(lr=[0.1, 0.2, 0.3, 0.4]), build=partial(Net, 4), seeds=range(4), rungs=(2,),
                      data=loader)  # fmt: skip
    assert torch.equal(torch.get_rng_state(), before)
    assert seen["orders"][:2] == seen["orders"][2:]  # two batches of trials, two epochs each
    assert seen["orders"][0] != seen["orders"][1]
    torch.manual_seed(3)
    model = Net(4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.4)
    masks = torch.Generator().manual_seed(3)
    batches = []
    for epoch in range(2):
        torch.manual_seed(epoch)
        batches += list(loader())
    torch.set_rng_state(masks.get_state())
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert_same(result.load(3), model, "trial 3")


def linear(spoiled: bool = False) -> nn.Module:
    net = nn.Linear(4, 3, **DOUBLE)
    with torch.no_grad():
        net.bias[0] += math.nan if spoiled else 0
    return net


def test_nan_is_a_result_ranked_last_and_changes_no_neighbour() -> None:
    def run(spoiled: bool) -> Any:
        configs = [{"lr": lr, "spoiled": spoiled and lr == 0.05} for lr in (0.1, 0.05, 0.2, 0.3)]
        return standard(None, configs=configs, build=linear, optimizer_cls=torch.optim.SGD, seeds=[1, 2, 3, 4])

    broken, whole = run(True), run(False)
    assert math.isnan(broken.trials[1].scores[0])
    assert broken.ranked[-1].number == 1
    assert broken.trials[1].epochs == 1
    for t in (0, 2, 3):
        assert broken.trials[t].scores[0] == whole.trials[t].scores[0]
        assert_same(broken.load(t, 0), whole.load(t, 0), f"trial {t}")


def test_all_nan_and_ties_go_by_number() -> None:
    same = {"build": linear, "optimizer_cls": torch.optim.SGD}
    result = standard(None, **same, configs=grid(lr=[0.1] * 4, spoiled=[True]), seeds=range(4))
    assert [trial.epochs for trial in result.trials] == [4, 2, 1, 1]
    assert [trial.number for trial in result.ranked] == [0, 1, 2, 3]
    tied = standard(None, **same, configs=grid(lr=[0.1] * 4), seeds=[3] * 4)
    assert [trial.epochs for trial in tied.trials] == [4, 2, 1, 1]
    assert tied.best.number == 0


def test_patience_stops_each_trial_by_its_own_course() -> None:
    courses = {0: [1, 2, 3, 4, 5], 1: [3, 2, 1, 0, 0], 2: [1, 5, 4, 4, 6], 3: [2, 2, 2, 2, 2]}
    asked = iter(range(5))

    def score(batch: Any, valid: Any) -> list[float]:
        rung = next(asked)
        return [courses[seed][rung] for seed in batch.seeds]

    result = standard(None, configs=grid(lr=[0.1] * 4), build=partial(Net, 4), seeds=range(4), rungs=(1, 2, 3, 4, 5),
                      reduction_factor=None, patience=2, score=score, valid=None, models_per_batch=4)  # fmt: skip
    assert [trial.epochs for trial in result.trials] == [5, 3, 4, 3]
    assert [trial.score for trial in result.trials] == [5, 3, 5, 2]
    assert result.best.number == 0
    model, _ = alone(partial(Net, 4), 2, lone_optimizer(torch.optim.Adam, {"lr": 0.1}), 2)
    assert_same(result.load(2), model, "trial 2 as it was at its best")


def test_accuracy_and_training_loss_as_scores() -> None:
    result = standard(None, score="accuracy")
    ((x, y),) = valid()
    best = result.load(result.best).eval()
    assert math.isclose((best(x).argmax(1) == y).double().mean().item(), result.best.score)
    plain = standard(None, valid=None, score="accuracy")
    assert [trial.scores for trial in plain.trials] == [[-loss for loss in trial.losses] for trial in plain.trials]


def test_dtype_and_threads_are_the_sweeps_own(tmp_path: Any) -> None:
    torch.set_default_dtype(torch.float64)
    settings = {"configs": grid(lr=[0.1, 0.2]), "build": partial(nn.Linear, 4, 3), "seeds": [0, 1], "score": "loss"}
    first = standard(tmp_path, **settings)
    torch.set_default_dtype(torch.float32)
    again = standard(tmp_path, **settings)
    assert again.load(0).weight.dtype == torch.float64
    assert repr(first) == repr(again)
    assert torch.get_default_dtype() == torch.float32


def smoothed(outputs: Tensor, y: Tensor, smoothing: float, scale: float = 1.0) -> Tensor:
    return scale * nn.functional.cross_entropy(outputs, y, label_smoothing=smoothing)


def test_the_losss_settings_are_each_trials_own() -> None:
    configs = grid(lr=[0.1], loss_smoothing=[0.0, 0.1, 0.3], loss_scale=[0.5, 2.0])
    result = standard(None, configs=configs, build=partial(Net, 4), seeds=range(6), loss_fn=smoothed, rungs=(1, 2))
    make = lone_optimizer(torch.optim.Adam, {"lr": 0.1})
    for trial in result.trials:
        own = partial(smoothed, smoothing=trial.config["loss_smoothing"], scale=trial.config["loss_scale"])
        model, loss = alone(partial(Net, 4), trial.seed, make, trial.epochs, loss_fn=own)
        assert_same(result.load(trial, len(trial.rungs) - 1), model, f"trial {trial.number}")
        assert math.isclose(trial.losses[-1], loss, rel_tol=1e-9)
        assert math.isclose(trial.scores[-1], -valid_loss(model, own), rel_tol=1e-9)


def test_out_of_memory_goes_on_in_chunks_of_half_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from mbkit.sweep import worker

    asked, train_steps = [], worker.train_steps

    def hungry(*args: Any, chunk_size: Any, **options: Any) -> Any:
        asked.append(chunk_size)
        if chunk_size == "auto" or chunk_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return train_steps(*args, chunk_size=chunk_size, **options)

    monkeypatch.setattr(worker, "train_steps", hungry)
    settings = {"configs": grid(lr=[0.1, 0.2, 0.3]), "build": partial(Net, 4), "seeds": range(3), "rungs": 1}
    result = standard(None, **settings)
    assert asked == ["auto", 2, 1]
    model, _ = alone(partial(Net, 4), 2, lone_optimizer(torch.optim.Adam, {"lr": 0.3}), 1)
    assert_same(result.load(2), model, "trial 2")
