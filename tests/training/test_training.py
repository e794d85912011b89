"""fit and fit_alone against loops written out by hand, in float64 to 1e-10: room for rounding in another order."""

import copy
import signal

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from training_by_hand import (
    CONFIGS,
    RATES,
    SEEDS,
    SGD,
    M,
    assert_same_parameters,
    batched,
    build,
    by_hand,
    points,
)

from mbkit.training import fit, fit_alone, train_steps


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)  # conftest.py puts it back


SETTINGS = {
    "plain": {},
    "adam": {"optimizer_cls": torch.optim.Adam},
    "clipped": {"max_norm": 0.3},
    "a schedule of epochs": {"schedule": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5)},
    "a schedule of steps": {"schedule": lambda o: torch.optim.lr_scheduler.StepLR(o, 3), "every": "step"},
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_both_loops_equal_the_loop_by_hand(setting):
    models, pairs = build(), points()
    expected, losses, hits = by_hand(models, [pairs] * 2, **setting)
    options = {"max_norm": setting.get("max_norm"), "scheduler": setting.get("schedule")}
    options["scheduler_every"] = setting.get("every", "epoch")
    optimizer_cls = setting.get("optimizer_cls", SGD)

    batch, optimizer = batched(models, optimizer_cls)
    together = fit(batch, optimizer, pairs, cross_entropy, 2, **options)
    alone = fit_alone(models, optimizer_cls, CONFIGS, pairs, cross_entropy, 2, seeds=SEEDS, **options)

    assert_same_parameters(batch.models, expected)
    assert_same_parameters(models, expected, atol=0)  # the reference is the very same arithmetic
    for history in (together, alone):
        torch.testing.assert_close(history.loss, losses, rtol=0, atol=1e-10)
        torch.testing.assert_close(history.accuracy.double(), hits, rtol=0, atol=1e-6)  # counted in float32 at most
        assert history.epoch.tolist() == [0] * 4 + [1] * 4
        assert history.steps_done == [8] * M
        assert not history.interrupted
        assert 0 < history.step_seconds.sum() <= history.seconds
    assert together.step_seconds.shape == (8,)
    assert alone.step_seconds.shape == (8, M)


def test_a_ready_scheduler_and_one_for_each_model():
    models, pairs = build(), points()
    make = [lambda o, g=g: torch.optim.lr_scheduler.ExponentialLR(o, g) for g in (0.5, 0.9, 0.1, 0.7)]
    batch, optimizer = batched(models)
    fit(batch, optimizer, pairs, cross_entropy, 2, scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.25 * lr for lr in RATES])
    expected = [by_hand(models, [pairs] * 2, schedule=make[m])[0][m] for m in range(M)]
    fit_alone(models, SGD, CONFIGS, pairs, cross_entropy, 2, seeds=SEEDS, scheduler=make)
    assert_same_parameters(models, expected, atol=0)


def test_going_on_with_the_next_epoch():
    class Orders:
        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            return iter(pairs[self.epoch :] + pairs[: self.epoch])

    models, pairs = build(), points()
    whole, optimizer = batched(models)
    fit(whole, optimizer, Orders(), cross_entropy, 3)
    parts, optimizer = batched(models)
    fit(parts, optimizer, Orders(), cross_entropy, 1)
    history = fit(parts, optimizer, Orders(), cross_entropy, 2, first_epoch=1)
    assert_same_parameters(parts.models, whole.models, atol=0)
    assert_same_parameters(whole.models, by_hand(models, [pairs[e:] + pairs[:e] for e in range(3)])[0])
    assert (history.epochs, history.epoch.unique().tolist()) == (2, [1, 2])


# ------------------------------------------------------------------ modes


def test_parts_in_eval_mode_stay_so_and_the_rest_trains():
    models = build()
    for model in models:
        model[2].eval()  # a frozen dropout, on purpose
    batch, optimizer = batched(models)
    pairs = points()
    fit(batch, optimizer, pairs, cross_entropy)
    expected = by_hand([nn.Sequential(*model[:2], nn.Identity(), model[3]) for model in models], [pairs])[0]
    fit_alone(models, SGD, CONFIGS, pairs, cross_entropy, seeds=SEEDS)
    assert_same_parameters(models, expected, atol=0)
    assert_same_parameters(batch.models, expected)
    assert not models[0][2].training


def test_a_model_in_eval_mode_is_put_into_train_mode():
    models, pairs = [model.eval() for model in build()], points()
    expected = by_hand(models, [pairs])[0]
    batch, optimizer = batched(models)
    fit(batch, optimizer, pairs, cross_entropy)
    fit_alone(models, SGD, CONFIGS, pairs, cross_entropy, seeds=SEEDS)
    assert_same_parameters(batch.models, expected)
    assert_same_parameters(models, expected, atol=0)


# ------------------------------------------------------------------ callbacks, stopping, losing nothing


def both(models, pairs, **options):
    """Train copies both ways; return [(the models afterwards, the History), ...]."""
    batch, optimizer = batched(models)
    together = fit(batch, optimizer, pairs, cross_entropy, 2, **options)
    alone = copy.deepcopy(models)
    after = fit_alone(alone, SGD, CONFIGS, pairs, cross_entropy, 2, seeds=SEEDS, **options)
    return [(batch.models, together), (alone, after)]


def test_the_callback_sees_each_step_and_can_end_the_run():
    models, pairs, seen = build(), points(), []

    def callback(step):
        seen.append(step)
        return False if step.index == 5 else None  # None and True go on

    expected = by_hand(models, [pairs, pairs[:2]])[0]
    for trained, history in both(models, pairs, callback=callback):
        assert_same_parameters(trained, expected)
        assert (history.steps, history.steps_done, history.interrupted) == (6, [6] * M, False)
        steps = seen[: 6 if history.step_seconds.ndim == 1 else 6 * M]
        del seen[: len(steps)]
        assert [step.index for step in steps] == list(range(6)) * (len(steps) // 6)
        assert [step.epoch for step in steps[:6]] == [0, 0, 0, 0, 1, 1]
        together = steps[0].model is None
        assert [step.model for step in steps] == ([None] * 6 if together else [m for m in range(M) for _ in range(6)])
        rows = torch.stack([step.losses for step in steps])
        torch.testing.assert_close(rows if together else rows.view(M, 6).T, history.loss, rtol=0, atol=0)
    assert not seen


def test_a_model_stopped_early_leaves_nan_where_it_made_no_step():
    models, pairs = build(), points()
    history = fit_alone(
        models, SGD, CONFIGS, pairs, cross_entropy, seeds=SEEDS, callback=lambda s: not (s.model == 1 and s.index == 1)
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
    models = build()
    data = Breaks(KeyboardInterrupt())
    (together, first), (alone, second) = both(models, data)
    expected = by_hand(models, [data.pairs[:3]])[0]
    assert_same_parameters(together, expected)
    assert_same_parameters(alone, [expected[0], *models[1:]], atol=0)
    assert (first.interrupted, first.steps_done) == (True, [3] * M)
    assert (second.interrupted, second.steps_done) == (True, [3, 0, 0, 0])
    assert second.final()["loss"].isnan().tolist() == [False, True, True, True]
    assert "interrupted" in repr(first)


def test_an_exception_carries_what_was_trained():
    models = build()
    batch, optimizer = batched(models)
    data = Breaks(OSError("the disk is gone"))
    with pytest.raises(OSError, match="the disk is gone") as caught:
        fit(batch, optimizer, data, cross_entropy)
    assert caught.value.history.steps_done == [3] * M
    assert_same_parameters(batch.models, by_hand(models, [data.pairs[:3]])[0])
    with pytest.raises(OSError, match="the disk is gone") as caught:
        fit_alone(models, SGD, CONFIGS, data, cross_entropy)
    assert caught.value.history.steps_done == [3, 0, 0, 0]
    with pytest.raises(OSError, match="gone") as caught:
        fit(batch, optimizer, Breaks(OSError("gone"), after=0), cross_entropy)
    assert caught.value.history.loss.shape == (0, M)


def test_a_signal_waits_for_the_end_of_the_step():
    models, pairs, calls = build(), points(), []
    expected = by_hand(models, [pairs[:2]])[0]

    def loss_fn(outputs, targets):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return cross_entropy(outputs, targets)

    handler = signal.getsignal(signal.SIGINT)
    history = fit_alone(models, SGD, CONFIGS, pairs, loss_fn, seeds=SEEDS)
    assert (history.interrupted, history.steps_done) == (True, [2, 0, 0, 0])
    assert_same_parameters(models[:1], expected[:1], atol=0)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_signal_does_not_wait():
    models, pairs = build(dropout=0.0), points()
    before = copy.deepcopy(models)

    def loss_fn(outputs, targets):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return cross_entropy(outputs, targets)

    history = fit_alone(models, SGD, CONFIGS, pairs, loss_fn)
    assert (history.interrupted, history.steps) == (True, 0)
    assert_same_parameters(models, before, atol=0)


def test_train_steps_can_be_paused_between_updates():
    models, pairs = build(), points()
    batch, optimizer = batched(models)
    steps = train_steps(batch, optimizer, pairs, cross_entropy)
    assert_same_parameters(batch.models, models, atol=0)
    for done in (1, 2):
        step = next(steps)
        assert_same_parameters(batch.models, by_hand(models, [pairs[:done]])[0])
    assert (step.index, step.losses.requires_grad) == (1, False)


def test_nothing_is_written_where_nobody_watches(capfd):
    both(build(), points(), progress=True)
    assert capfd.readouterr() == ("", "")
