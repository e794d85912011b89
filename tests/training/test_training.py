"""fit and fit_alone against loops written out by hand, in float64 to 1e-10: room for rounding in another order."""

import copy
import functools

import pytest
import torch
from oracle import (
    CONFIGS,
    RATES,
    SEEDS,
    M,
    assert_same_parameters,
    batched,
    classifiers,
    close,
    points,
    train_alone,
    trained_alone,
)
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from mbkit.training import fit, fit_alone, train_steps

by_hand = functools.partial(trained_alone, loss_fn=cross_entropy, configs=CONFIGS)


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)  # conftest.py puts it back


SETTINGS = {
    "plain": {},
    "adam": {"optimizer_cls": torch.optim.Adam},
    "clipped": {"max_norm": 0.3},
    "a schedule of epochs": {"schedule": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5), "every": 4},
    "a schedule of steps": {"schedule": lambda o: torch.optim.lr_scheduler.StepLR(o, 3), "every": 1},
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_both_loops_equal_the_loop_by_hand(setting):
    models, pairs, hits = classifiers(), points(), []

    def loss_fn(outputs, targets):
        hits.append((outputs.argmax(1) == targets).double().mean().item())
        return cross_entropy(outputs, targets)

    expected = copy.deepcopy(models)
    losses = train_alone(expected, pairs * 2, loss_fn=loss_fn, configs=CONFIGS, **setting)
    hits = torch.tensor(hits).view(M, 8).T
    options = {"max_norm": setting.get("max_norm"), "scheduler": setting.get("schedule")}
    options["scheduler_every"] = "step" if setting.get("every") == 1 else "epoch"
    optimizer_cls = setting.get("optimizer_cls", SGD)

    batch, optimizer = batched(models, optimizer_cls)
    together = fit(batch, optimizer, pairs, cross_entropy, 2, **options)
    alone = fit_alone(models, optimizer_cls, CONFIGS, pairs, cross_entropy, 2, seeds=SEEDS, **options)

    assert_same_parameters(batch.models, expected)
    assert_same_parameters(models, expected, tolerance=1e-13)  # the reference is the very same arithmetic
    for history in (together, alone):
        close(history.loss, losses)
        close(history.accuracy.double(), hits, 1e-6)  # counted in float32 at most
        assert history.epoch.tolist() == [0] * 4 + [1] * 4
        assert history.steps_done == [8] * M
        assert not history.interrupted
        assert 0 < history.step_seconds.sum() <= history.seconds
    assert together.step_seconds.shape == (8,)
    assert alone.step_seconds.shape == (8, M)


@pytest.mark.parametrize("betas", [[0.1, 1.0, 4.0, 0.0], torch.rand(M, 3), 0.5], ids=["numbers", "tensors", "one"])
def test_each_model_alone_has_its_own_settings_of_the_loss(betas):
    def loss_fn(outputs, targets, beta, smoothing):
        return cross_entropy(outputs, targets, label_smoothing=smoothing) + (beta * outputs.square()).mean()

    models, pairs, expected = classifiers(), points(), []
    for m in range(M):
        beta = betas if isinstance(betas, float) else betas[m]
        own = functools.partial(loss_fn, beta=beta, smoothing=0.2)
        trained = trained_alone(models[m : m + 1], pairs, loss_fn=own, seeds=SEEDS[m : m + 1], configs=CONFIGS[m])
        expected += trained
    settings = {"beta": betas, "smoothing": 0.2}
    fit_alone(models, SGD, CONFIGS, pairs, loss_fn, seeds=SEEDS, loss_settings=settings)
    assert_same_parameters(models, expected, tolerance=0)


def test_inside_one_autocast_all_is_as_with_an_autocast_per_step():
    torch.set_default_dtype(torch.float32)
    models, pairs = classifiers(), points(6)
    expected = copy.deepcopy(models)
    for m, model in enumerate(expected):
        torch.manual_seed(SEEDS[m])
        optimizer = torch.optim.Adam(model.parameters(), lr=RATES[m])
        for x, y in pairs:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
    with torch.autocast("cpu", torch.bfloat16):
        fit_alone(models, torch.optim.Adam, CONFIGS, pairs, cross_entropy, seeds=SEEDS)
        after = [model.eval()(pairs[0][0]) for model in models]  # not with the casts of an earlier step
    # The very same arithmetic, so far nearer than bfloat16's 4e-3; stale casts are off by 0.2.
    assert_same_parameters(models, expected, 1e-5)
    for outputs, model in zip(after, expected, strict=True):
        close(outputs.float(), model.eval()(pairs[0][0]), 3e-2)  # rounded to bfloat16


def test_a_ready_scheduler_and_one_for_each_model():
    models, pairs = classifiers(), points()
    make = [lambda o, g=g: torch.optim.lr_scheduler.ExponentialLR(o, g) for g in (0.5, 0.9, 0.1, 0.7)]
    batch, optimizer = batched(models)
    fit(batch, optimizer, pairs, cross_entropy, 2, scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.25 * lr for lr in RATES])
    expected = by_hand(models, pairs * 2, schedule=make, every=4)
    fit_alone(models, SGD, CONFIGS, pairs, cross_entropy, 2, seeds=SEEDS, scheduler=make)
    assert_same_parameters(models, expected)


def test_going_on_with_the_next_epoch():
    class Orders:
        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            return iter(pairs[self.epoch :] + pairs[: self.epoch])

    models, pairs = classifiers(), points()
    whole, optimizer = batched(models)
    fit(whole, optimizer, Orders(), cross_entropy, 3)
    parts, optimizer = batched(models)
    fit(parts, optimizer, Orders(), cross_entropy, 1)
    history = fit(parts, optimizer, Orders(), cross_entropy, 2, first_epoch=1)
    assert_same_parameters(parts.models, whole.models)
    assert_same_parameters(whole.models, by_hand(models, pairs + pairs[1:] + pairs[:1] + pairs[2:] + pairs[:2]))
    assert (history.epochs, history.epoch.unique().tolist()) == (2, [1, 2])


# ------------------------------------------------------------------ modes


@pytest.mark.parametrize("part", ["a dropout", "all"])
def test_a_model_in_eval_mode_trains_and_its_parts_in_eval_mode_stay_so(part):
    models, pairs = classifiers(), points()
    alike = models
    if part == "all":
        models = alike = [model.eval() for model in models]
    else:
        for model in models:
            model[2].eval()  # a frozen dropout, on purpose
        alike = [nn.Sequential(*model[:2], nn.Identity(), model[3]) for model in models]
    batch, optimizer = batched(models)
    expected = by_hand(alike, pairs)
    fit(batch, optimizer, pairs, cross_entropy)
    fit_alone(models, SGD, CONFIGS, pairs, cross_entropy, seeds=SEEDS)
    assert_same_parameters(models, expected)
    assert_same_parameters(batch.models, expected)
    assert models[0][2].training == (part == "all")


# ------------------------------------------------------------------ callbacks, stopping, losing nothing


def both(models, pairs, **options):
    """Train copies both ways; return [(the models afterwards, the History), ...]."""
    batch, optimizer = batched(models)
    together = fit(batch, optimizer, pairs, cross_entropy, 2, **options)
    alone = copy.deepcopy(models)
    after = fit_alone(alone, SGD, CONFIGS, pairs, cross_entropy, 2, seeds=SEEDS, **options)
    return [(batch.models, together), (alone, after)]


def test_the_callback_sees_each_step_and_can_end_the_run():
    models, pairs, seen = classifiers(), points(), []

    def callback(step):
        seen.append(step)
        return False if step.index == 5 else None  # None and True go on

    expected = by_hand(models, pairs + pairs[:2])
    for trained, history in both(models, pairs, callback=callback):
        assert_same_parameters(trained, expected)
        assert (history.steps, history.steps_done, history.interrupted) == (6, [6] * M, False)
        steps = seen[: 6 if history.step_seconds.ndim == 1 else 6 * M]
        del seen[: len(steps)]
        turns = len(steps) // 6  # alone the models take turns: each step is shown once per model
        assert [step.index for step in steps] == [index for index in range(6) for _ in range(turns)]
        assert [step.epoch for step in steps[::turns]] == [0, 0, 0, 0, 1, 1]
        assert [step.model for step in steps] == ([None] if turns == 1 else list(range(M))) * 6
        rows = torch.stack([step.losses for step in steps])
        torch.testing.assert_close(rows.view(6, M), history.loss, rtol=0, atol=0)
    assert not seen


def test_a_model_stopped_early_leaves_nan_where_it_made_no_step():
    models, pairs = classifiers(), points()
    history = fit_alone(
        models,
        SGD,
        CONFIGS,
        pairs,
        cross_entropy,
        seeds=SEEDS,
        callback=lambda s: not (s.model == 1 and s.index == 1),
    )
    assert history.steps_done == [4, 2, 4, 4]
    assert history.loss.isnan().sum(0).tolist() == [0, 2, 0, 0]
    assert history.step_seconds.isnan().sum(0).tolist() == [0, 2, 0, 0]
    assert history.final()["loss"].tolist() == [history.loss[last, m].item() for m, last in enumerate((3, 1, 3, 3))]


class Breaks:
    """Batches that raise after some steps of the first walk."""

    def __init__(self, error, after=3):
        self.pairs, self.error, self.after = points(), error, after

    def __iter__(self):
        yield from self.pairs[: self.after]
        raise self.error


def test_ctrl_c_keeps_what_was_trained():
    models = classifiers()
    data = Breaks(KeyboardInterrupt())
    (together, first), (alone, second) = both(models, data)
    expected = by_hand(models, data.pairs[:3])
    assert_same_parameters(together, expected)
    assert_same_parameters(alone, expected)
    for history in (first, second):
        assert (history.interrupted, history.steps_done) == (True, [3] * M)
    assert "interrupted" in repr(first)


def test_an_exception_carries_what_was_trained():
    models = classifiers()
    batch, optimizer = batched(models)
    data = Breaks(OSError("the disk is gone"))
    with pytest.raises(OSError, match="the disk is gone") as caught:
        fit(batch, optimizer, data, cross_entropy)
    assert caught.value.history.steps_done == [3] * M
    assert_same_parameters(batch.models, by_hand(models, data.pairs[:3]))
    with pytest.raises(OSError, match="the disk is gone") as caught:
        fit_alone(models, SGD, CONFIGS, data, cross_entropy)
    assert caught.value.history.steps_done == [3] * M
    with pytest.raises(OSError, match="gone") as caught:
        fit(batch, optimizer, Breaks(OSError("gone"), after=0), cross_entropy)
    assert caught.value.history.loss.shape == (0, M)


def test_train_steps_can_be_paused_between_updates():
    models, pairs = classifiers(), points()
    batch, optimizer = batched(models)
    steps = train_steps(batch, optimizer, pairs, cross_entropy)
    assert_same_parameters(batch.models, models, tolerance=0)
    for done in (1, 2):
        step = next(steps)
        assert_same_parameters(batch.models, by_hand(models, pairs[:done]))
    assert (step.index, step.losses.requires_grad) == (1, False)


def test_nothing_is_written_where_nobody_watches(capfd):
    both(classifiers(), points(), progress=True)
    assert capfd.readouterr() == ("", "")
