"""fit and fit_alone against loops written out by hand, in float64 to 1e-10: room for rounding in another order."""

import copy
import random
import signal

import numpy
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

from mbkit.model_batch import ModelBatch
from mbkit.optim import OptimizerFactory
from mbkit.training import fit, fit_alone, train_steps

M, B, SEEDS, RATES = 3, 5, [11, 22, 33], [0.1, 0.05, 0.2]
CONFIGS = [{"lr": lr} for lr in RATES]
SGD = torch.optim.SGD


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def build(dropout=0.5):
    return [nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)) for _ in range(M)]


def points(batches=4):
    return [(torch.randn(B, 4), torch.randint(3, (B,))) for _ in range(batches)]


def loader(**kwargs):
    data = TensorDataset(torch.randn(22, 4), torch.randint(3, (22,)))
    return DataLoader(data, batch_size=B, **({"shuffle": True} | kwargs))


def by_hand(models, epochs_of_pairs, optimizer_cls=SGD, schedule=None, every="epoch", max_norm=None):
    """Train copies of the models by the plainest loop; return them, their losses and their accuracies [steps, M]."""
    models, losses, hits = copy.deepcopy(models), [], []
    for m, model in enumerate(models):
        torch.manual_seed(SEEDS[m])
        optimizer = optimizer_cls(model.parameters(), lr=RATES[m])
        scheduler = schedule(optimizer) if schedule else None
        model.train()
        losses.append([])
        hits.append([])
        for pairs in epochs_of_pairs:
            for x, y in pairs:
                optimizer.zero_grad()
                out = model(x)
                loss = cross_entropy(out, y)
                loss.backward()
                if max_norm:
                    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
                optimizer.step()
                losses[m].append(loss.item())
                hits[m].append((out.argmax(1) == y).double().mean().item())
                if scheduler and every == "step":
                    scheduler.step()
            if scheduler and every == "epoch":
                scheduler.step()
    return models, torch.tensor(losses).T, torch.tensor(hits).T


def batched(models, optimizer_cls=SGD, **kwargs):
    batch = ModelBatch(models, seeds=SEEDS, **kwargs)
    return batch, OptimizerFactory(optimizer_cls).create_optimizer(batch, CONFIGS)


def assert_same_parameters(got, expected, atol=1e-10):
    for one, other in zip(got, expected, strict=True):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=atol)


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
    make = [lambda o, g=g: torch.optim.lr_scheduler.ExponentialLR(o, g) for g in (0.5, 0.9, 0.1)]
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


# ------------------------------------------------------------------ the same data for all


class Augmented(Dataset):
    """Draws from every global generator there is, as augmentations do."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        noise = torch.rand(()).item() + random.random() + numpy.random.rand()
        return torch.full((4,), i + noise), i % 3


LOADERS = {
    "shuffle": lambda: loader(),
    "a generator": lambda: loader(generator=torch.Generator().manual_seed(5)),
    "a sampler's generator": lambda: loader(
        shuffle=False, sampler=RandomSampler(range(22), generator=torch.Generator().manual_seed(5))
    ),
    "a batch sampler": lambda: DataLoader(
        TensorDataset(torch.randn(22, 4), torch.randint(3, (22,))),
        batch_sampler=BatchSampler(RandomSampler(range(22)), B, drop_last=False),
    ),
    "augmentation": lambda: DataLoader(Augmented(), batch_size=4, shuffle=True),
}


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_random_draws_of_models_and_data_leave_each_other_alone(make):
    def start():
        torch.manual_seed(1)
        random.seed(1)
        numpy.random.seed(1)

    def state():
        return torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist(), torch.rand(3)

    models = build(dropout=0.5)
    torch.manual_seed(9)
    data = make()
    start()
    epochs = [list(data) for _ in range(2)]  # what anybody who walks through the loader twice gets to see
    after = state()
    expected, losses, _ = by_hand(models, epochs)

    torch.manual_seed(9)
    data = make()
    batch, optimizer = batched(models)
    start()
    history = fit(batch, optimizer, data, cross_entropy, 2)
    assert_same_parameters(batch.models, expected)
    torch.testing.assert_close(history.loss, losses, rtol=0, atol=1e-10)
    now = state()
    assert torch.equal(now[0], after[0])
    assert now[1:3] == after[1:3]

    torch.manual_seed(9)
    data = make()
    start()
    history = fit_alone(models, SGD, CONFIGS, data, cross_entropy, 2, seeds=SEEDS)
    assert_same_parameters(models, expected, atol=0)
    now = state()
    assert torch.equal(now[0], after[0])
    assert now[1:3] == after[1:3]
    assert torch.equal(now[3], after[3])


def test_seeds_are_drawn_as_the_batch_draws_them():
    models, data = build(), loader()
    torch.manual_seed(3)
    batch = ModelBatch(models)
    fit(batch, OptimizerFactory(SGD).create_optimizer(batch, CONFIGS), data, cross_entropy)
    torch.manual_seed(3)
    fit_alone(models, SGD, CONFIGS, data, cross_entropy)
    assert_same_parameters(batch.models, models)


def test_what_a_callback_draws_changes_the_data_alike_and_no_mask():
    models, data = build(), loader()

    def callback(step):
        torch.rand(7)

    batch, optimizer = batched(models)
    torch.manual_seed(3)
    fit(batch, optimizer, data, cross_entropy, 2, callback=callback)
    torch.manual_seed(3)
    fit_alone(models, SGD, CONFIGS, data, cross_entropy, 2, seeds=SEEDS, callback=callback)
    assert_same_parameters(batch.models, models)


def test_data_that_cannot_be_drawn_again_is_refused():
    class Unknown:
        source = numpy.random.default_rng(0)

        def __iter__(self):
            yield torch.from_numpy(self.source.random((B, 4))), torch.zeros(B, dtype=torch.int64)

    with pytest.raises(ValueError, match="another first batch") as caught:
        fit_alone(build(), SGD, CONFIGS, Unknown(), cross_entropy, seeds=SEEDS)
    assert caught.value.history.steps_done == [1, 0, 0]


@pytest.mark.parametrize("each_targets", [False, True])
@pytest.mark.parametrize("each_input", [False, True])
def test_batches_for_all_models_or_for_each(each_input, each_targets):
    models = build(dropout=0.0)
    xs, ys = torch.randn(4, M, B, 4), torch.randint(3, (4, M, B))
    pairs = [(x if each_input else x[0], y if each_targets else y[0]) for x, y in zip(xs, ys, strict=True)]
    expected = []
    for m in range(M):
        own = [(x[m if each_input else 0], y[m if each_targets else 0]) for x, y in zip(xs, ys, strict=True)]
        expected.append(by_hand(models, [own])[0][m])
    batch, optimizer = batched(models, shared_input=not each_input)
    together = fit(batch, optimizer, pairs, cross_entropy)
    alone = fit_alone(models, SGD, CONFIGS, pairs, cross_entropy, seeds=SEEDS, shared_input=not each_input)
    assert_same_parameters(batch.models, expected)
    assert_same_parameters(models, expected, atol=0)
    assert torch.equal(together.accuracy, alone.accuracy)


def test_targets_that_could_be_either_have_to_be_named():
    models, x, y = [nn.Linear(4, M) for _ in range(M)], torch.randn(M, 4), torch.randn(M, M)

    def error(outputs, targets):
        return (outputs - targets).square().mean()

    with pytest.raises(ValueError, match="shared_targets"):
        fit_alone(models, SGD, CONFIGS, [(x, y)], error)
    for shared in (True, False):
        expected = torch.stack([error(model(x), y if shared else y[m]).detach() for m, model in enumerate(models)])
        batch, optimizer = batched(models)
        together = fit(batch, optimizer, [(x, y)], error, shared_targets=shared)
        alone = fit_alone(copy.deepcopy(models), SGD, CONFIGS, [(x, y)], error, shared_targets=shared)
        torch.testing.assert_close(together.loss[0], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(alone.loss[0], expected, rtol=0, atol=1e-12)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, shift):
        return self.layer(x) + shift, x.sum()


@pytest.mark.parametrize("pack", [lambda x, s: (x, s), lambda x, s: [x, s], lambda x, s: {"x": x, "shift": s}])
def test_several_inputs_and_nested_outputs(pack):
    models = [TwoInputs() for _ in range(M)]
    x, shift, y = torch.randn(B, 4), torch.randn(B, 1), torch.randn(B, 3)
    first = torch.stack([mse_loss(model(x, shift)[0], y) for model in models]).detach()

    def loss_fn(outputs, target):
        return mse_loss(outputs[0], target) + 0 * outputs[1]

    batch, optimizer = batched(models)
    together = fit(batch, optimizer, [(pack(x, shift), y)] * 3, loss_fn)
    alone = fit_alone(models, SGD, CONFIGS, [(pack(x, shift), y)] * 3, loss_fn)
    assert_same_parameters(batch.models, models)
    torch.testing.assert_close(together.loss, alone.loss, rtol=0, atol=1e-10)
    torch.testing.assert_close(alone.loss[0], first, rtol=0, atol=1e-12)
    assert together.accuracy is None
    assert alone.accuracy is None


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
        assert [step.model for step in steps] == ([None] * 6 if together else [0] * 6 + [1] * 6 + [2] * 6)
        rows = torch.stack([step.losses for step in steps])
        torch.testing.assert_close(rows if together else rows.view(M, 6).T, history.loss, rtol=0, atol=0)
    assert not seen


def test_a_model_stopped_early_leaves_nan_where_it_made_no_step():
    models, pairs = build(), points()
    history = fit_alone(
        models, SGD, CONFIGS, pairs, cross_entropy, seeds=SEEDS, callback=lambda s: not (s.model == 1 and s.index == 1)
    )
    assert history.steps_done == [4, 2, 4]
    assert history.loss.isnan().sum(0).tolist() == [0, 2, 0]
    assert history.step_seconds.isnan().sum(0).tolist() == [0, 2, 0]
    assert history.final()["loss"].tolist() == [history.loss[last, m].item() for m, last in enumerate((3, 1, 3))]


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
    assert_same_parameters(alone, [expected[0], models[1], models[2]], atol=0)
    assert (first.interrupted, first.steps_done) == (True, [3] * M)
    assert (second.interrupted, second.steps_done) == (True, [3, 0, 0])
    assert second.final()["loss"].isnan().tolist() == [False, True, True]
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
    assert caught.value.history.steps_done == [3, 0, 0]
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
    assert (history.interrupted, history.steps_done) == (True, [2, 0, 0])
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


# ------------------------------------------------------------------ input that is refused


def _plateau(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


# What is wrong -> (error, what it says, what to pass instead of the right thing).
REFUSED_BY_BOTH = {
    "no epochs": (ValueError, "at least 1 epoch", lambda: {"epochs": 0}),
    "half an epoch": (TypeError, "whole number of epochs", lambda: {"epochs": 1.5}),
    "no batch": (ValueError, "at least one batch", lambda: {"batches": []}),
    "no iterable": (TypeError, "iterable of", lambda: {"batches": 5}),
    "a used-up iterator": (TypeError, "used up", lambda: {"batches": iter(points()), "epochs": 2}),
    "a generator": (TypeError, "used up", lambda: {"batches": (pair for pair in points()), "epochs": 2}),
    "no pairs": (TypeError, r"pair \(inputs, targets\), got a Tensor", lambda: {"batches": torch.randn(3, 2)}),
    "three things": (TypeError, "got a tuple of 3", lambda: {"batches": [(1, 2, 3)]}),
    "no loss": (TypeError, "loss_fn", lambda: {"loss_fn": None}),
    "another rhythm": (ValueError, "scheduler_every", lambda: {"scheduler_every": "batch"}),
    "no scheduler": (TypeError, "callable that makes", lambda: {"scheduler": 0.1}),
    "a callable of something else": (TypeError, "callable that makes", lambda: {"scheduler": lambda optimizer: 0.1}),
    "a plateau": (TypeError, "ReduceLROnPlateau", lambda: {"scheduler": _plateau}),
}
REFUSED_BY_FIT = {
    "no batch of models": (TypeError, "Expected a ModelBatch, got Sequential", lambda: {"batch": build()[0]}),
    "a class": (TypeError, "create one by OptimizerFactory", lambda: {"optimizer": SGD}),
    "a factory": (TypeError, "create one by OptimizerFactory", lambda: {"optimizer": OptimizerFactory(SGD)}),
}
REFUSED_BY_FIT_ALONE = {
    "no models": (ValueError, "one or more modules", lambda: {"models": []}),
    "one model": (TypeError, r"pass \[model\]", lambda: {"models": build()[0]}),
    "no modules": (TypeError, "one or more modules, got .'int'", lambda: {"models": [1]}),
    "too few configs": (ValueError, r"3 configs \(one per model\), got 2", lambda: {"configs": CONFIGS[:2]}),
    "too few seeds": (ValueError, "3 seeds", lambda: {"seeds": [1, 2]}),
    "too few schedulers": (ValueError, "3 schedulers", lambda: {"scheduler": [None]}),
    "an iterator for three": (TypeError, "used up", lambda: {"batches": iter(points())}),
    "a ready scheduler": (TypeError, "callable that makes", lambda: {"scheduler": _ready_scheduler()}),
}


def _ready_scheduler():
    return torch.optim.lr_scheduler.StepLR(SGD(build()[0].parameters(), 0.1), 1)


@pytest.mark.parametrize("case", [*REFUSED_BY_BOTH, *REFUSED_BY_FIT])
def test_fit_refuses(case):
    error, text, changes = (REFUSED_BY_BOTH | REFUSED_BY_FIT)[case]
    batch, optimizer = batched(build())
    right = {"batch": batch, "optimizer": optimizer, "batches": points(), "loss_fn": cross_entropy}
    with pytest.raises(error, match=text):
        fit(**(right | changes()))


@pytest.mark.parametrize("case", [*REFUSED_BY_BOTH, *REFUSED_BY_FIT_ALONE])
def test_fit_alone_refuses(case):
    error, text, changes = (REFUSED_BY_BOTH | REFUSED_BY_FIT_ALONE)[case]
    right = {"models": build(), "optimizer_cls": SGD, "configs": CONFIGS, "batches": points(), "loss_fn": cross_entropy}
    with pytest.raises(error, match=text):
        fit_alone(**(right | changes()))


def test_an_iterator_is_enough_where_it_is_needed_once():
    models, pairs = build(), points()
    batch, optimizer = batched(models)
    assert fit(batch, optimizer, iter(pairs), cross_entropy).steps == 4
    assert fit_alone(models[:1], SGD, {"lr": 0.1}, iter(pairs), cross_entropy).steps == 4


def test_a_loader_that_starts_again_by_itself_is_accepted():
    class Again:
        def __iter__(self):
            self.left = list(pairs)
            return self

        def __next__(self):
            if not self.left:
                raise StopIteration
            return self.left.pop(0)

        def __len__(self):
            return len(pairs)

    models, pairs = build(), points()
    expected = by_hand(models, [pairs] * 2)[0]
    fit_alone(models, SGD, CONFIGS, Again(), cross_entropy, 2, seeds=SEEDS)
    assert_same_parameters(models, expected, atol=0)
