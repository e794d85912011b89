"""Ctrl-C and SIGTERM, pressed where it matters: inside a forward, in a callback, and in the last moments of a run."""

from __future__ import annotations

import copy
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import CONFIGS, SEEDS, M, assert_same_parameters, batched, classifiers, points, trained_alone
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from mbkit.training import fit, fit_alone, recorder

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def handlers_are_put_back() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


def press(*numbers: int) -> None:
    for number in numbers:
        signal.raise_signal(number)


def pressing_loss(at: int, *numbers: int) -> Callable[..., torch.Tensor]:
    """A loss that is pressed in the middle of the `at`-th call."""
    calls: list[int] = []

    def loss_fn(outputs: Any, targets: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == at:
            press(*numbers)
        return cross_entropy(outputs, targets)

    return loss_fn


def pressing_callback(at: int, *numbers: int) -> Callable[..., None]:
    def callback(step: Any) -> None:
        if step.index == at:
            press(*numbers)

    return callback


@pytest.mark.parametrize("number", SIGNALS)
def test_one_press_ends_after_the_step_under_way(number: int) -> None:
    models, pairs = classifiers(), points()
    batch, optimizer = batched(models)
    history = fit(batch, optimizer, pairs, pressing_loss(2, number), 2, chunk_size=None)
    assert history.interrupted
    assert 1 <= history.steps <= 2  # vmap calls a loss once per step, or once more where it looks for its form
    expected = trained_alone(models, pairs[: history.steps], loss_fn=cross_entropy, configs=CONFIGS)
    assert_same_parameters(batch.models, expected)


@pytest.mark.parametrize("number", SIGNALS)
def test_one_press_in_a_callback_is_saved_and_gone_on_from(number: int, tmp_path: Path) -> None:
    models, pairs = classifiers(), points()
    whole, optimizer = batched(models)
    expected = fit(whole, optimizer, pairs, cross_entropy, 2)
    batch, optimizer = batched(models)
    saved = {"checkpoint": tmp_path}
    history = fit(batch, optimizer, pairs, cross_entropy, 2, callback=pressing_callback(4, number), **saved)
    assert (history.interrupted, history.steps) == (True, 5)
    batch, optimizer = batched(models)
    history = fit(batch, optimizer, pairs, cross_entropy, 2, **saved)
    assert torch.equal(history.loss, expected.loss)
    assert all(map(torch.equal, batch.parameters(), whole.parameters()))
    assert not history.interrupted


class PressedAtTheEnd(list):
    """Batches during whose winding up somebody presses."""

    def __iter__(self) -> Iterator[Any]:
        yield from list.__iter__(self)
        press(signal.SIGINT)


def test_a_press_after_the_last_step_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, optimizer = batched(classifiers())
    history = fit(batch, optimizer, PressedAtTheEnd(points()), cross_entropy)
    assert (history.interrupted, history.steps) == (True, 4)
    real = recorder.Recording._history

    def pressed_meanwhile(run: Any) -> Any:
        press(signal.SIGINT)
        return real(run)

    monkeypatch.setattr(recorder.Recording, "_history", pressed_meanwhile)
    history = fit(batch, optimizer, points(), cross_entropy)
    assert (history.interrupted, history.steps) == (True, 4)


@pytest.mark.parametrize("where", ["forward", "callback"])
def test_two_presses_end_at_once_with_an_exception(where: str) -> None:
    batch, optimizer = batched(classifiers())
    twice = (signal.SIGINT, signal.SIGINT)
    if where == "forward":
        with pytest.raises(KeyboardInterrupt, match="may be half updated: go on from a checkpoint") as caught:
            fit(batch, optimizer, points(), pressing_loss(1, *twice))
    else:
        with pytest.raises(KeyboardInterrupt, match="Ctrl-C was pressed twice") as caught:
            fit(batch, optimizer, points(), cross_entropy, callback=pressing_callback(1, *twice))
        assert caught.value.history.steps == 2
    assert caught.value.history.interrupted


def test_two_presses_in_an_update_alone_end_with_an_exception_too() -> None:
    models = classifiers(dropout=0.0)
    before = copy.deepcopy(models)
    loss_fn = pressing_loss(1, signal.SIGINT, signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="half updated") as caught:
        fit_alone(models, SGD, CONFIGS, points(), loss_fn, seeds=SEEDS)
    assert (caught.value.history.interrupted, caught.value.history.steps) == (True, 0)
    assert_same_parameters(models, before, tolerance=0)


def test_one_press_ends_training_alone() -> None:
    models, pairs = classifiers(), points()
    twice, once = (trained_alone(models, pairs[:n], loss_fn=cross_entropy, configs=CONFIGS) for n in (2, 1))
    history = fit_alone(models, SGD, CONFIGS, pairs, pressing_loss(M + 2, signal.SIGTERM), seeds=SEEDS)
    assert (history.interrupted, history.steps_done) == (True, [2, 2, 1, 1])
    assert_same_parameters(models, [*twice[:2], *once[2:]])


def test_worker_threads_train_without_handlers() -> None:
    batch, optimizer = batched(classifiers())
    seen: list[Any] = []

    def callback(step: Any) -> None:
        seen.append([signal.getsignal(number) for number in SIGNALS])

    before = [signal.getsignal(number) for number in SIGNALS]
    thread = threading.Thread(target=lambda: fit(batch, optimizer, points(), cross_entropy, callback=callback))
    thread.start()
    thread.join()
    assert seen == [before] * 4


def test_a_handler_of_ones_own_is_respected() -> None:
    def own(number: int, frame: Any) -> None:
        pass

    before = signal.signal(signal.SIGINT, own)
    try:
        with recorder.Recording(1, None):
            assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)
