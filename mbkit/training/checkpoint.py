"""A whole run in one file: saved at any step, and restored to the same bits; a refused one changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

from ..batch.whole_state import load_whole, save_whole, snapshot
from ..common.checks import whole_number
from ..common.files import read_tree, write_tree
from ..common.tables import plain
from .history import Step
from .loop import Pairs, count_steps
from .options import StepOptions
from .position import PositionedBatches
from .recorder import Recording

_FILE = "run.safetensors"


def save_run(
    folder: str | Path,
    batch: Any,
    optimizer: Any,
    *,
    scheduler: Any = None,
    scaler: Any = None,
    batches: Any = None,
    notes: Any = None,
) -> None:
    """Save all that a run's further course depends on as one file, `folder/run.safetensors`, for `load_run`.

    `fit(..., checkpoint=folder)` does this by itself; call it in a training loop of your own. Saved are the models with
    their random streams and which are frozen, the optimizer, the scheduler, the scaler, and the global random
    generators of torch, Python and NumPy. The file replaces an older one in one move: a process killed at any moment
    leaves the old run or the new one. It is written without pickle, with a checksum.

    Args:
        folder: created if it does not exist.
        batch, optimizer: the ModelBatch and its optimizer.
        scheduler, scaler: saved by their state_dict(); None for none.
        batches: a `PositionedBatches` to go on with in the middle of an epoch; without it, save between epochs.
        notes: numbers, texts and tensors of your own, in lists and dicts, that `load_run` returns: the epoch, say.

    Raises:
        TypeError: a state holds something else than tensors, numbers and texts; the error names it.
        OSError: the folder cannot be written, or the disk is full; an older file stays as it was.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from mbkit import ModelBatch, OptimizerFactory
        >>> batch = ModelBatch([nn.Linear(4, 2) for _ in range(3)])
        >>> optimizer = OptimizerFactory(torch.optim.Adam).create_optimizer(batch, lr=0.1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_run(folder, batch, optimizer, notes={"epoch": 3})
        ...     load_run(folder, batch, optimizer)
        {'epoch': 3}
    """
    parts = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    tree = {
        "kinds": {name: _kind(part) for name, part in parts.items()},
        "batch": save_whole(batch),
        "parts": {name: part.state_dict() for name, part in parts.items() if part is not None},
        "data": (PositionedBatches(()) if batches is None else batches).state(),
        "notes": notes,
    }
    write_tree(Path(folder) / _FILE, tree, "run")


def load_run(
    folder: str | Path, batch: Any, optimizer: Any, *, scheduler: Any = None, scaler: Any = None, batches: Any = None
) -> Any:
    """Restore what `save_run` saved, to the same bits, into a batch, optimizer and so on that were made the same way.

    Everything is checked first; a run that is refused changes nothing.

    Args: as for `save_run`.

    Returns:
        The notes that were saved.

    Raises:
        FileNotFoundError: there is no run in the folder.
        ValueError: a file that has changed since it was saved, or a run of other models, another optimizer or data.
    """
    parts = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    position = PositionedBatches(()) if batches is None else batches
    return _restore(read_tree(Path(folder) / _FILE, "run"), folder, batch, parts, position)


def _restore(saved: Mapping[str, Any], folder: Any, batch: Any, parts: Mapping[str, Any], position: Any) -> Any:
    for name, part in parts.items():
        if saved["kinds"][name] != _kind(part):
            told = f"Expected the {name} {saved['kinds'][name]}, as in the run saved in {folder}, got {_kind(part)}"
            raise ValueError(f"{told}: make the same one, or choose another folder.")
    restore, data = snapshot(batch), position.state()
    before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items() if part is not None}

    def load(states: Mapping[str, Any], data: dict[str, Any]) -> None:
        for name, state in states.items():
            parts[name].load_state_dict(state)
        position.load_state(data)

    try:
        load_whole(batch, saved["batch"])
        load(saved["parts"], saved["data"])
    except BaseException as error:
        restore()
        load(before, data)
        if isinstance(error, (RuntimeError, KeyError, TypeError)):
            told = f"Expected the state of this run in {folder}, got one that does not fit: {error}"
            raise ValueError(f"{told}. Make the same batch and optimizer, or choose another folder.") from error
        raise
    return saved["notes"]


def _kind(part: Any) -> str:
    """Return what a part is, in words: its class, and the classes of what it is made for or of."""
    of = getattr(part, "optimizer_cls", None)
    inner = sorted({type(one).__name__ for one in part}) if isinstance(part, list) else [of.__name__] if of else []
    name = "None" if part is None else type(part).__name__
    return f"{name} of {', '.join(inner)}" if inner else name


class Checkpoint(PositionedBatches):
    """The data of a run of `fit` that is saved as it goes, and taken up again from what is in its folder.

    Args:
        folder: where the run is, or will be.
        every: how many steps there are from one save to the next, or "epoch".
        batch, optimizer, scheduler: what is trained and by what.
        batches: the data; walk through this object instead.
        options: what the steps have in common.
        settings: what else the run's course depends on, by name, such as "first_epoch": to go on with other settings
            or options is refused.

    Attributes:
        steps: the Steps made so far. seconds: how long they took.
    """

    def __init__(
        self,
        folder: str | Path,
        every: int | str,
        batch: Any,
        optimizer: Any,
        scheduler: Any,
        batches: Pairs,
        options: StepOptions,
        settings: Mapping[str, Any],
    ) -> None:
        if every != "epoch":
            whole_number(every, "checkpoint_every (or 'epoch')")
        super().__init__(batches)
        self.epoch = settings["first_epoch"]
        self._folder, self._every, self._batch = folder, every, batch
        self._parts = {"optimizer": optimizer, "scheduler": scheduler, "scaler": None}
        self._settings = {
            **settings,
            "max_norm": repr(options.max_norm),
            "on_nonfinite": options.on_nonfinite,
            "autocast": options.autocast and str(options.autocast),
            "loss_settings": _of_loss(options, batch.num_models),
            "len(batches)": count_steps(batches, 1),
            "hyperparameters": repr(getattr(optimizer, "configs", getattr(optimizer, "defaults", None))),
        }
        self.steps: list[Step] = []
        self.seconds = 0.0
        if Path(folder, _FILE).exists():
            self._take_up(read_tree(Path(folder, _FILE), "run"))
        self._saved_at = len(self.steps)

    def _take_up(self, saved: Mapping[str, Any]) -> None:
        notes = saved["notes"]
        if not isinstance(notes, dict) or "settings" not in notes:
            raise ValueError(f"Expected a run of fit in {self._folder}, got one of save_run: use load_run for it.")
        for name, value in self._settings.items():
            known = notes["settings"].get(name)
            if known != value:
                told = f"Expected {name}={known}, as in the run saved in {self._folder}, got {value}"
                raise ValueError(f"{told}: call fit as before, or choose another folder for another run.")
        _restore(saved, self._folder, self._batch, self._parts, self)
        self.chunk_size, self.seconds = notes["chunk_size"], notes["seconds"]
        self.steps = _steps(notes["steps"], next(self._batch.parameters()).device)

    def watch(self, run: Recording, end: int) -> None:
        """Save what a Recording holds from now on, at the end of each epoch or of the last one, before epoch `end`."""
        self._run, self._end = run, end

    def at_end(self) -> None:
        """Save if an epoch's end is the time to do it."""
        if self._every == "epoch" or self.epoch >= self._end:
            self._save()

    def after_step(self, go_on: bool) -> None:
        """Save if it is time, or if the run ends here."""
        due = self._every != "epoch" and len(self._run.steps) - self._saved_at >= self._every
        if due or not go_on:
            self._save()

    def _save(self) -> None:
        if len(self._run.steps) > self._saved_at:
            notes = {"settings": self._settings, "steps": _columns(self._run.steps), "seconds": self._run.seconds}
            notes["chunk_size"] = self.chunk_size
            save_run(self._folder, self._batch, **self._parts, batches=self, notes=notes)
            self._saved_at = len(self._run.steps)


def _of_loss(options: StepOptions, num_models: int) -> dict[str, list[Any]]:
    """Return the loss function's settings, one per model, as plain numbers and texts; of other objects their kind."""
    settings = options.settings_of(num_models)
    each = [settings.of_model(m) for m in range(num_models)]
    known = (bool, int, float, str, type(None))
    return {
        name: [tree_map(lambda v: v if isinstance(v, known) else type(v).__name__, plain(own[name])) for own in each]
        for name in each[0]
    }


def _columns(steps: Sequence[Step]) -> dict[str, Any]:
    """Return Steps as columns; what some of them lack is left out, as a History leaves it out."""
    none_frozen = torch.zeros(len(steps[0].losses), dtype=torch.bool, device=steps[0].losses.device)
    accuracy = [step.accuracy for step in steps if step.accuracy is not None]
    return {
        "epoch": [step.epoch for step in steps],
        "seconds": [step.seconds for step in steps],
        "how": [step.how for step in steps],
        "losses": torch.stack([step.losses for step in steps]),
        "accuracy": torch.stack(accuracy) if len(accuracy) == len(steps) else None,
        "frozen": torch.stack([none_frozen if step.frozen is None else step.frozen for step in steps]),
    }


def _steps(columns: Mapping[str, Any], device: torch.device) -> list[Step]:
    losses, frozen = columns["losses"].to(device), columns["frozen"].to(device)
    accuracy = repeat(None) if columns["accuracy"] is None else columns["accuracy"].to(device)
    each = zip(columns["epoch"], losses, accuracy, columns["seconds"], repeat(None), frozen, columns["how"])
    return [Step(i, *values) for i, values in enumerate(each)]
