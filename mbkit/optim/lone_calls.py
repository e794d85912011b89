"""Calls of M lone optimizers: in turn, or in lockstep where their steps ask for losses, as SAM's and LBFGS's do.

A closure computes all models' losses, so one call of it serves every model that waits for one. Each step that may ask
runs in a thread of its own, but only one of all threads runs at a time: nothing here depends on a clock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..batch.context import context_of
from ..batch.freeze import rows_where
from ..batch.select import has_gradient
from ..vmap import note_models_with_gradient

_NEVER = object()  # in place of a loss


class CanCallEach:
    """The part of an optimizer with M lone ones, `lone`, that calls these."""

    def __getattr__(self, name: str) -> Any:
        """Return a method of the user's class, to be called on each model's optimizer."""
        cls = self.__dict__.get("optimizer_cls")
        if name.startswith("_") or not callable(getattr(cls, name, None)):
            raise AttributeError(f"{type(self).__name__} of {getattr(cls, '__name__', cls)} has no attribute {name!r}")
        return lambda *args, **kwargs: self.in_turn(lambda m: getattr(self.lone[m], name)(*args, **kwargs))

    def going(self) -> list[int]:
        """Return the models that take part in what is called."""
        stopped = self._stopped()
        return [m for m in range(self.num_models) if stopped is None or not stopped[m]]

    def in_turn(self, call: Callable[[int], Any], models: Sequence[int] | None = None) -> Any:
        """Make a call for each of some models, with its gradients and its random stream in place.

        What a call does to its gradients (`zero_grad`, `p.grad = …`) and to its weights (`p.data = …`) is taken over.

        Args:
            call: gets the model's number.
            models: their numbers; None for all that are not stopped.

        Returns:
            What the calls returned: None if all did, a tensor `[M, ...]` of tensors, else a list of M.
        """
        models, params = self.going() if models is None else models, self._params()
        self._follow(params)
        has, changed, results = [has_gradient(param, self.num_models) for param in params], set(), {}
        with context_of(self.batch).streams.take_turns(params[0].device) as turns:
            for m in turns:
                if m not in models:
                    continue
                views = [view for group in self.lone[m].param_groups for view in group["params"]]
                given = [param.grad[m] if own[m] else None for param, own in zip(params, has, strict=True)]
                for view, grad in zip(views, given, strict=True):
                    view.grad = grad
                try:
                    results[m] = call(m)
                finally:
                    for i, (view, param) in enumerate(zip(views, params, strict=True)):
                        if view.grad is not given[i]:
                            changed.add(i)
                            has[i][m] = view.grad is not None
                            param.grad = torch.zeros_like(param) if param.grad is None else param.grad
                            param.grad[m] = 0 if view.grad is None else view.grad
                        view.grad, row = None, param.detach()[m]
                        if place_of(view) != place_of(row):
                            row.copy_(view.detach())
                            view.data = row
        self._read_back()
        for i in changed:
            if not any(has[i][m] for m in models):
                params[i].grad = None
            elif params[i].grad is not None:
                note_models_with_gradient(params[i].grad, has[i])
        return _gathered([results.get(m) for m in range(self.num_models)])

    def in_lockstep(self, closure: Callable[[], Any]) -> Any:
        """Make the models' steps up to where each calls its closure, call it once for all of these, and so on."""
        waiting, num_models, losses = self.going(), self.num_models, None
        steps = {m: _SuspendedStep(self.lone[m].step) for m in waiting}

        def go_on(m: int) -> None:
            own = isinstance(losses, Tensor) and losses.shape == (num_models,)
            steps[m].go_on(losses[m] if own else None if losses is None else _SumOfLosses())

        try:
            while waiting:
                self.in_turn(go_on, waiting)
                waiting = [m for m in waiting if not steps[m].done]
                if waiting:
                    losses = self._evaluate(closure, waiting)
        finally:
            for step in steps.values():
                step.give_up()
        results = [steps[m].result if m in steps else None for m in range(num_models)]
        return losses if any(isinstance(result, _SumOfLosses) for result in results) else _gathered(results)

    def _evaluate(self, closure: Callable[[], Any], models: Sequence[int]) -> Any:
        """Call a closure for some models; of the others nothing changes, their gradients included."""
        context, params = context_of(self.batch), self._params()
        others = torch.tensor([m not in models for m in range(self.num_models)])
        before, frozen = [None if p.grad is None else p.grad.clone() for p in params], context.frozen
        context.frozen = others if others.any() else None
        try:
            with torch.enable_grad():
                losses = closure()
        finally:
            context.frozen = frozen
        for param, grad in zip(params, before, strict=True):
            if others.any() and param.grad is not None:
                param.grad.copy_(rows_where(others, torch.zeros_like(param.grad) if grad is None else grad, param.grad))
        return losses


class _SuspendedStep:
    """A lone optimizer's step that stops where it calls its closure, and goes on when it gets the loss."""

    def __init__(self, step: Callable[[Callable[[], Any]], Any]) -> None:
        self._step, self._thread = step, threading.Thread(target=self._run, daemon=True)
        self._losses, self._errors = SimpleQueue(), SimpleQueue()  # each get() waits for the other thread's put()
        self.result, self.done = None, False

    def go_on(self, loss: Any) -> None:
        """Run the step up to its next call of the closure, or to its end; an error of it is raised here."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._losses.put(loss)
        error = self._errors.get()
        if error is not None:
            raise error

    def give_up(self) -> None:
        """End a step that waits for a loss which never comes."""
        if self._thread.ident is not None and not self.done:
            self._losses.put(_NEVER)
            self._thread.join()

    def _run(self) -> None:
        failed = None
        try:
            with torch.no_grad():  # each thread has a switch of its own
                self.result = self._step(self._ask)
        except BaseException as error:
            failed = error
        self.done = True
        self._errors.put(failed)

    def _ask(self) -> Any:
        self._errors.put(None)
        loss = self._losses.get()
        if loss is _NEVER:
            raise SystemExit
        return loss


class _SumOfLosses:
    """What a lone step gets where the closure returned one number for all models: it can be returned, but not read."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        told = "The optimizer reads the loss that its closure returns, and needs each model's own: return the M losses"
        raise TypeError(f"{told}, from compute_loss(..., reduction='none'), after the backward pass of their sum.")

    __float__ = __bool__ = __add__ = __sub__ = __mul__ = __truediv__ = __radd__ = __rsub__ = __rmul__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __neg__ = __abs__ = __getattr__ = __torch_function__ = _refuse


def _gathered(results: list[Any]) -> Any:
    if all(result is None for result in results):
        return None
    alike = all(isinstance(one, Tensor) for one in results) and len({one.shape for one in results}) == 1
    return torch.stack(results) if alike else results


def place_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return where a tensor's numbers are in memory, and how."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
