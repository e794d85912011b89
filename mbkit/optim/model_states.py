"""Single models' states: taken out of one optimizer and put into another, to select, merge and save models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ..common.checks import model_numbers
from .hyperparameters import numbers_of, plain


class CanSelect:
    """The part of an optimizer of a batch that takes single models out of it, and puts them in."""

    def get_model_states(self, models: Iterable[int] | None = None) -> list[dict[str, Any]]:
        """Return each model's share of the optimizer: all that its further updates depend on.

        Args:
            models: the models' numbers, in the order wanted; None for all.

        Returns:
            A flat dict per model: "state/0.weight/exp_avg" is a tensor (a copy) of the parameter "0.weight" (a step
            count has no dimension), "param_groups/0/lr" a hyperparameter as it is now. The tensors can be saved under
            these names, and the rest as JSON (which turns tuples into lists; they may be loaded as such).

        Raises:
            TypeError, IndexError: models that are not whole numbers, or that are not there.

        Example:
            >>> import torch
            >>> from mbkit import ModelBatch, OptimizerFactory
            >>> batch = ModelBatch([torch.nn.Linear(3, 1) for _ in range(2)])
            >>> optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=[0.1, 0.2], momentum=0.9)
            >>> batch(torch.ones(4, 3)).sum().backward()
            >>> optimizer.step()
            >>> (state,) = optimizer.get_model_states([1])
            >>> state["param_groups/0/lr"], state["state/bias/momentum_buffer"]
            (0.2, tensor([4.]))
        """
        packed, names, size = self.state_dict(), self.parameter_names, len(self._names)
        states = []
        for m in range(self.num_models) if models is None else model_numbers(models, self.num_models):
            own = self._model_state(packed["state"], m)
            flat = {name: value for name, value in own.items() if name != "state"}  # what a class of one's own adds
            for g, group in enumerate(packed["param_groups"][m * size : (m + 1) * size]):
                flat |= {f"param_groups/{g}/{name}": value for name, value in numbers_of(group).items()}
            for key, kept in own["state"].items():
                path = f"state/{names[key] if isinstance(key, int) else key}"
                flat |= {f"{path}/{n}": v for n, v in kept.items()} if isinstance(kept, dict) else {path: kept}
            states.append({name: v.detach().clone() if isinstance(v, Tensor) else v for name, v in flat.items()})
        return states

    def load_model_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Load M models' shares, of one optimizer or of several; each model goes on as it would have there.

        Make schedulers before: a new one changes learning rates.

        Args:
            states: M dicts from `get_model_states()`, of optimizers of this class over this architecture and dtype.

        Raises:
            ValueError: another number of states than models, or states of another class or architecture; nothing has
                changed then.
        """
        if len(states) != self.num_models:
            raise ValueError(f"Expected {self.num_models} states (one per model), got {len(states)}.")
        order, size = {name: i for i, name in enumerate(self.parameter_names)}, len(self._names)
        models: list[dict[str, Any]] = [{"state": {}} for _ in states]
        groups = [{"params": group["params"]} for group in self.state_dict()["param_groups"]]
        for m, flat in enumerate(states):
            for path, value in flat.items():
                kind, _, rest = path.partition("/")
                owner, _, name = rest.rpartition("/")
                if kind == "param_groups" and owner in map(str, range(size)):
                    groups[m * size + int(owner)][name] = plain(value)
                elif kind == "state" and owner in order:
                    models[m]["state"].setdefault(order[owner], {})[name] = value
                elif not owner and kind != "param_groups":
                    (models[m]["state"] if kind == "state" else models[m])[name or kind] = value
                else:
                    raise self._foreign(f"{', '.join(order)} in {size} group(s)", f"{path!r} of model {m}")
        self.load_state_dict({"state": self._state_from(models, self._whole(groups)), "param_groups": groups})

    def select(self, models: Iterable[int], batch: Any) -> Any:
        """Return an optimizer for some of the models, which go on to the bits that they would have had here.

        Hooks of this optimizer are not taken over. `select_scheduler` and `GradScaler.select` do the rest.

        Args:
            models: the models' numbers, in the order in which they are in `batch`.
            batch: the smaller `ModelBatch`, from `batch.select(models)`.

        Returns:
            An optimizer of the same kind, with copies of the models' state and hyperparameters as they are now.

        Raises:
            TypeError, IndexError: models that are not whole numbers, or that are not there.
            ValueError: a batch of another number of models, or of another architecture.

        Example:
            >>> import torch
            >>> from mbkit import ModelBatch, OptimizerFactory
            >>> batch = ModelBatch([torch.nn.Linear(3, 1) for _ in range(4)])
            >>> optimizer = OptimizerFactory(torch.optim.Adam).create_optimizer(batch, lr=[0.1, 0.2, 0.3, 0.4])
            >>> [group["lr"] for group in optimizer.select([3, 1], batch.select([3, 1])).param_groups]
            [0.4, 0.2]
        """
        return _made_from([(self, model_numbers(models, self.num_models))], batch)

    @staticmethod
    def merge(optimizers: Sequence[Any], batch: Any) -> Any:
        """Return one optimizer for the models of several batches of one architecture, each going on as before.

        Where Adam updated small models of one batch by torch's fused kernel, which is for at most three of them, and
        those of another by its rule, all go on by the rule, to rounding.

        Args:
            optimizers: of one class, with the same groups of parameters.
            batch: `ModelBatch.merge(batches)`, the batches in the order of the optimizers.

        Raises:
            ValueError: no optimizers, unlike ones, or a batch of other models.
        """
        return _made_from([(optimizer, range(optimizer.num_models)) for optimizer in optimizers], batch)

    @property
    def parameter_names(self) -> list[str]:
        """The parameters' names, in the order in which the groups hold them."""
        return [name for group in self._names for name in group]


def _made_from(parts: Sequence[tuple[Any, Sequence[int]]], batch: Any) -> Any:
    """Return an optimizer for `batch`, with the chosen models of each optimizer one after the other."""
    described = [(one.optimizer_cls.__name__, one.parameter_names, shapes_in(one.batch)) for one, _ in parts]
    count, shapes = sum(len(models) for _, models in parts), shapes_in(batch)
    if not parts or (batch.num_models, shapes) != (count, described[0][2]):
        expected = f"a batch of {count} models" + (f" with {described[0][2]}" if parts else "")
        raise ValueError(f"Expected {expected}, got one of {batch.num_models} models with {shapes}.")
    if any(one != described[0] for one in described):
        raise ValueError(f"Expected optimizers of one class and architecture, got {described}.")
    first = parts[0][0]
    configs = [one._configs[m] for one, models in parts for m in models]
    made = type(first)(batch, first.optimizer_cls, configs, first._names)
    made.load_model_states([state for one, models in parts for state in one.get_model_states(models)])
    if any(getattr(one, "_opt_called", False) for one, _ in parts):
        made.note_step()
    return made


def shapes_in(batch: Any) -> str:
    """Return the names and shapes of a lone model's parameters, in words."""
    return ", ".join(f"{name} {tuple(p.shape[1:])}" for name, p in batch.stacked_params.items())
