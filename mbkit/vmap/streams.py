"""Model m's own random numbers: streams that draw the very bits that it draws when it is trained alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..common.random_streams import GENERATOR, PYTHON_GENERATORS, PythonGenerator, generator_marks, moved_generators
from .default_generator import DEFAULT, refused
from .errors import BatchingError, WholeInTurn
from .per_model import PerModel


def _named(generators: Collection[str]) -> str:
    names = {"random": "Python's random", "numpy.random": "numpy.random"}
    return " and ".join(name for key, name in names.items() if key in generators)


def rows_like(like: Tensor, count: int) -> Tensor:
    """Return `[count, ...]`, not filled, each row of which lies in memory as `like` does."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
    strides = (span if like.numel() else 0, *like.stride())
    return torch.empty_strided((count, *like.shape), strides, dtype=like.dtype, device=like.device)


def _draw_mask(mask: Tensor, rate: float, generator: torch.Generator) -> None:
    if rate == 0:
        mask.fill_(1)  # torch draws nothing here, and nothing for a rate of 1
    elif rate == 1:
        mask.zero_()
    else:
        mask.bernoulli_(1 - rate, generator=generator).div_(1 - rate)


def _draw_fused_mask(mask: Tensor, rate: float, generator: torch.Generator) -> None:
    """Draw what CUDA's kernel for dropout draws, which knows the default generator alone."""
    if not 0 < rate < 1:
        return _draw_mask(mask, rate, generator)
    default = torch.cuda.default_generators[mask.device.index]
    with GENERATOR:
        before = default.get_state()
        default.set_state(generator.get_state())
        mask.copy_(torch.dropout(torch.ones_like(mask), rate, True))
        generator.set_state(default.get_state())
        default.set_state(before)


class SharedDraw(WholeInTurn):
    """All models at once have drawn one and the same number from Python's or numpy's generator."""


class Streams:
    """M random generators, the m-th in the state that `torch.manual_seed(seeds[m])` gives.

    The bits are those of a lone run, on a CPU and on CUDA, where each model has a generator of the device as well.

    Models that draw from Python's `random` or from `numpy.random` get a generator each there too, in the state that
    `random.seed(seeds[m])` and `numpy.random.seed(seeds[m] % 2**32)` give.

    Args:
        seeds: M integers.

    Example:
        >>> streams = Streams([3, 4])
        >>> _ = torch.manual_seed(4)
        >>> torch.equal(torch.rand(2, generator=streams.on("cpu")[1]), torch.rand(2))
        True
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = list(seeds)
        self._whole, self._rows = self, slice(None)  # see `part`
        self._generators: dict[torch.device | str, list[Any]] = {}
        self.from_python: bool | None = None  # whether calls draw from Python's generators; None while not known
        self._met: set[Any] = set()
        self._all_at_once = False  # whether a call is under way that can be made again

    def on(self, device: torch.device | str) -> list[Any]:
        """Return the M generators of a device, or of one of Python's generators, seeded at their first use."""
        python = device in PYTHON_GENERATORS
        device = device if python else torch.device(device)
        if device not in self._whole._generators:
            make = PythonGenerator if python else torch.Generator
            self._whole._generators[device] = [make(device).manual_seed(seed) for seed in self._whole.seeds]
        return self._whole._generators[device][self._rows]

    def part(self, start: int, stop: int) -> Streams:
        """Return the streams of models start to stop - 1: the very same, so that to draw there is to draw here."""
        part = Streams(self.seeds[start:stop])
        part._whole, part._rows = self, slice(start, stop)
        return part

    def meet(self, caller: Any) -> None:
        """Look anew at whether calls draw from Python's generators when somebody, such as a loss, calls first."""
        whole = self._whole
        if caller not in whole._met:
            whole._met.add(caller)
            whole.from_python = whole.from_python or None

    @contextmanager
    def take_turns(self, device: torch.device, part: Callable = nullcontext) -> Iterator[Iterator[int]]:
        """Give out 0 … M-1, in a `with` block of `part(m)`; meanwhile the default generators are model m's streams.

        Warns once, as soon as a model draws from Python's or numpy's generators.
        """
        defaults: dict[Any, Any] = {torch.device("cpu"): DEFAULT}
        if device.type == "cuda":
            defaults[device] = torch.cuda.default_generators[device.index or 0]
        if self._whole.from_python is not False:
            defaults |= PYTHON_GENERATORS
        moved: set[str] = set()

        def turns() -> Iterator[int]:
            for m in range(len(self.seeds)):
                for place, default in defaults.items():
                    default.set_state(self.on(place)[m].get_state())
                start = generator_marks()
                with part(m):
                    yield m
                moved.update(moved_generators(start))
                for place, default in defaults.items():
                    self.on(place)[m].set_state(default.get_state())

        with GENERATOR, refused(False):
            before = {place: default.get_state() for place, default in defaults.items()}
            try:
                yield turns()
            finally:
                for place, default in defaults.items():
                    default.set_state(before[place])
        if not self._whole.from_python:
            self._learn(moved)

    def _learn(self, moved: Collection[str]) -> None:
        """Note whether the models drew from Python's generators."""
        whole, late = self._whole, self._whole.from_python is False
        if late and self._all_at_once:
            return  # the whole call is made again
        whole.from_python = bool(moved)
        if not moved:
            for name in PYTHON_GENERATORS:
                whole._generators.pop(name, None)
            return
        warnings.warn(
            f"The models draw from {_named(moved)}, which torch.manual_seed does not seed. "
            f"{'From the next call on model' if late else 'Model'} m draws from a generator of its own, which starts "
            "as random.seed(seeds[m]) and numpy.random.seed(seeds[m] % 2**32) leave it, and the models run one after "
            "the other, no faster than alone: torch's own random functions, such as torch.rand(()), need neither.",
            stacklevel=2,
        )

    @contextmanager
    def shared_draws_refused(self) -> Iterator[None]:
        """Let all models run at once in a `with` block, where a number from Python's generators would be one for all.

        Raises:
            SharedDraw: a generator has moved. In a first call it is put back to where it was.
        """
        whole, before = self._whole, generator_marks()
        expected = whole.from_python is not False
        states = {name: generator.get_state() for name, generator in PYTHON_GENERATORS.items()} if expected else {}
        self._all_at_once = True
        try:
            with refused():
                yield
        finally:
            self._all_at_once = False
        moved = moved_generators(before)
        if states:  # they tell, too, of a normal number that numpy had in store from an earlier draw
            bits = {name: (was, PYTHON_GENERATORS[name].get_state()) for name, was in states.items()}
            moved = [name for name, (was, now) in bits.items() if was.numpy().tobytes() != now.numpy().tobytes()]
        for name in moved if states else ():
            PYTHON_GENERATORS[name].set_state(states[name])
        if moved:
            whole.from_python = whole.from_python or None
            raise SharedDraw(f"it draws from {_named(moved)}, whose numbers would be the same for all models")
        whole.from_python = bool(whole.from_python)

    @property
    def in_use(self) -> bool:
        """Whether a call may have drawn from the streams."""
        return bool(self._whole._generators)

    def fill(self, method: Callable, like: Tensor, *settings: Any) -> Tensor:
        """Draw `[M, ...]`, each model's numbers from its own stream.

        Args:
            method: fills a tensor, such as `Tensor.normal_`; gets the settings, and the stream as `generator`.
            like: one model's tensor, whose memory order decides which number meets which bit.
            settings: of the method; a `PerModel` gives each model its own.
        """
        drawn = rows_like(like, len(self.seeds))
        for m, (row, generator) in enumerate(zip(drawn, self.on(like.device), strict=True)):
            own = [value.values[m] if isinstance(value, PerModel) else value for value in settings]
            method(row, *own, generator=generator)
        return drawn

    def dropout_masks(self, like: Tensor, rates: Sequence[float], fused: bool = False) -> Tensor:
        """Draw a mask per rate, `[M, ...]`, as torch does: 0, or 1 / (1 - rate) where a number is kept."""
        return self.fill(_draw_fused_mask if fused else _draw_mask, like, PerModel(rates))

    def remember(self) -> Callable[..., None]:
        """Return a function that puts the streams back where they are now: all, or those of the models it gets."""
        states = {device: [g.get_state() for g in self.on(device)] for device in self._whole._generators}

        def restore(models: Sequence[int] | None = None) -> None:
            for device in list(self._whole._generators):
                for m, generator in enumerate(self.on(device)):
                    if models is not None and m not in models:
                        continue
                    if device in states:
                        generator.set_state(states[device][m])
                    else:
                        generator.manual_seed(self.seeds[m])

        return restore

    def state(self) -> dict[str, Tensor]:
        """Return the state of every stream in use: device name to bytes `[M, ...]`; empty before the first draw."""
        return {str(d): torch.stack([g.get_state() for g in gs]) for d, gs in self._generators.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put the streams where `state()` found them; those it does not name start again from their seeds."""
        self._generators.clear()
        self.from_python = bool(PYTHON_GENERATORS.keys() & state.keys()) or None
        for device, states in state.items():
            for generator, row in zip(self.on(device), states, strict=True):
                generator.set_state(row.cpu().clone())

    def __getstate__(self) -> dict:
        return {"seeds": self.seeds, "state": self.state()}

    def __setstate__(self, saved: dict) -> None:
        self.__init__(saved["seeds"])
        self.load_state(saved["state"])


class TracedStreams(Streams):
    """Stands for the models' streams while a step is traced: notes what is drawn, and hands out stand-ins.

    Args:
        num_models: M.
        ready: the stand-ins, in the order in which they are asked for; when they run out, new ones are made.

    Attributes:
        wanted: arguments of `Streams.fill` before each step.
        assumed: conditions `[...]` that the graph takes for true.
    """

    def __init__(self, num_models: int, ready: Iterator[Tensor]) -> None:
        self._num_models, self._ready = num_models, ready
        self.wanted: list[tuple] = []
        self.assumed: list[Tensor] = []

    def fill(self, method: Callable, like: Tensor, *settings: Any) -> Tensor:
        self.wanted.append((method, like, *settings))
        ready = next(self._ready, None)
        return rows_like(like, self._num_models) if ready is None else ready

    def assume(self, condition: Tensor) -> bool:
        self.assumed.append(condition.detach())
        return True

    def remember(self) -> Callable[[], None]:
        return lambda: None

    def meet(self, caller: Any) -> None:
        pass

    def take_turns(self, *args: Any) -> Any:
        raise BatchingError("an operator runs model by model")

    on = take_turns

    def shared_draws_refused(self) -> Any:
        return refused()  # and the guards refuse those of Python's
