"""diagnose's experiments on what passes from one model to another: change some models, and watch the others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from .experiment import SMALL, Case
from .measure import apart, quiet
from .report import Finding, finding


def settings(case: Case) -> Finding:
    """Give each model model 0's value: where that changes nothing, but model 0's value does, it had it already."""
    checked, found = [], None
    for label, values, change in _settings(case):
        others = [m for m, value in enumerate(values) if value != values[0]]
        if not others:
            continue
        checked.append(label)
        changes = [change(v) for v in (values, [values[0]] * len(values), [values[others[0]], *values[1:]])]
        plain, same, swapped = (case.run(1.0, 0.0, **each) for each in changes)
        for m in others:
            own, firsts = (case.way_alone(m, **each) for each in changes[:2])
            alone = max(apart(own[n], firsts[n]) for n in own)
            ours, theirs = (case.moved(plain, run, m, 1)[0] for run in (same, swapped))
            if alone > case.tolerance and ours < 1e-3 * alone and theirs > case.tolerance:
                found = found or (label, m, alone, theirs)
                # The lone models follow, so that the gradient can be judged.
                case.models = changes[1].get("models", case.models)
                case.quiet = [quiet(model) for model in case.models]
    if not found:
        text = f"{', '.join(checked)}: model 0's rules no other model" if checked else "all settings are alike"
        return finding("setting-of-model-0", False, text)
    name, m, alone, theirs = found
    text = f"model {m} stays the same with model 0's {name} (alone it changes by {alone:.1e}), but changes by "
    text += f"{theirs:.1e} when only model 0's is changed"
    return finding("setting-of-model-0", True, text, model=m, parameter=name, step=1, size=alone)


# A setting: its name, M values, and what gives other values to a run.
Setting = tuple[str, list[Any], Callable[[Sequence[Any]], dict[str, list[Any]]]]


def _settings(case: Case) -> Iterator[Setting]:
    """Yield the hyperparameters, and the numbers that layers have as attributes."""

    def of_config(name: str, values: Sequence[Any]) -> dict[str, list[Any]]:
        return {"configs": [{**config, name: value} for config, value in zip(case.configs, values, strict=True)]}

    def of_layer(path: str, name: str, values: Sequence[Any]) -> dict[str, list[Any]]:
        models = copy.deepcopy(case.models)
        for model, value in zip(models, values, strict=True):
            setattr(model.get_submodule(path), name, value)
        return {"models": models}

    for name in [name for name in case.settings[0] if name != "params"]:
        yield name, [group[name] for group in case.settings], partial(of_config, name)
    for path, module in case.models[0].named_modules():
        for name, value in vars(module).items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and not name.startswith("_"):
                values = [getattr(model.get_submodule(path), name, value) for model in case.models]
                yield f"{path}.{name}", values, partial(of_layer, path, name)


def states(case: Case) -> list[Finding]:
    """Change some models' parameters: the other models' gradients and states must stay what they were."""
    spared, found, bled = set().union(*case.blurred.values()), None, None
    for group in case.groups():
        models = case.perturbed(group, spared)
        run = case.run(SMALL, 0.0, models=models, configs=case.calm)
        if not any(apart(run.start[m][n], case.base.start[m][n]) for m in group for n in case.names):
            continue  # it starts from what it likes
        untouched = set()
        for m in set(range(case.num_models)) - group:
            gradients, states = (case.changes(kind, run, m) for kind in ("gradients", "states"))
            if gradients and not case.guilty("wrong-gradient"):
                bled = max(bled or (0.0,), (*max(gradients), m, group))
            elif states and not gradients:
                found = max(found or (0.0,), (*max(states), m, group))
            elif not gradients:
                untouched.add(m)
        case.trials.append((group, run, untouched))
    remembered = _remembered(case, found)
    if bled is None:
        return [remembered]
    gap, name, m, group = bled
    text = f"the gradient of {name} of model {m} changes by {gap:.1e} when {_are(group)} changed"
    return [finding("wrong-gradient", True, text, model=m, parameter=name, step=1, size=gap), remembered]


def _remembered(case: Case, found: tuple[float, tuple[str, str], int, set[int]] | None) -> Finding:
    if not any(case.base.states[-1]):
        text = "the optimizer's state cannot be read" if case.remembers() else "the optimizer remembers nothing"
        return finding("shared-optimizer-state", None if case.remembers() else False, text)
    if not case.trials and case.num_models > 1:
        return finding("shared-optimizer-state", None, "the batch does not start from the models it is given")
    if not found:
        text = "it stays the same to the last digits when other models are changed"
        return finding("shared-optimizer-state", False, text)
    gap, name, m, group = found
    text = f"{name[1]} of {name[0]} of model {m} changes by {gap:.1e} when {_are(group)} changed, "
    text += "though its gradient stays the same"
    return finding("shared-optimizer-state", True, text, model=m, parameter=name[0], step=1, size=gap)


def leak(case: Case) -> Finding:
    """Double some models' learning rates: gradients and states stay, so nothing else may move the other models."""
    able, found = case.num_models == 1, [(0.0, "", 0, set(), "")]
    for group in () if case.guilty("setting-of-model-0") else case.groups():
        rates = [own["lr"] * (2.0 if m in group else 1.0) for m, own in enumerate(case.settings)]
        run = case.run(1.0, configs=[{**own, "lr": rate} for own, rate in zip(case.configs, rates, strict=True)])
        able |= any(case.moved(case.plain, run, m, 0)[0] for m in group)
        others = set(range(case.num_models)) - group
        found += [(*case.moved(case.plain, run, m, 0), m, group, "made twice as fast") for m in others]
    if not able:  # where learning rates are not obeyed, other parameters make other updates, too
        able = bool(case.trials)
        for group, run, untouched in case.trials:
            found += [(*case.moved(case.base, run, m, 0), m, group, "changed") for m in untouched]
    if not able:
        return finding("leaking-update", None, "neither learning rates nor parameters can be changed")
    gap, name, m, group, how = max(found, key=lambda each: each[:3])
    if gap <= 1e-3 * case.tolerance:
        return finding("leaking-update", False, "no model moves differently when others move differently")
    text = f"{name} of model {m} takes another step, by {gap:.1e} of it, when {_are(group)} {how}"
    return finding("leaking-update", True, text, model=m, parameter=name, step=1, size=gap)


def schedule(case: Case) -> Finding:
    """Step both until the learning rates would differ if the batch stepped M times."""
    suspect, num, most = "schedule-stepped-M-times", case.num_models, len(case.data)
    if case.recipe.scheduler is None or num == 1:
        why = "there is no schedule" if case.recipe.scheduler is None else "there is one model"
        return finding(suspect, False, why)
    if case.base.rates[0] is None:
        return finding(suspect, None, "the batch does not tell its learning rates")
    alone = [case.rates_alone(config, num * most) for config in case.configs]
    steps = next((n for n in range(1, most + 1) if any(not _near(r[n], r[num * n]) for r in alone)), None)
    if steps is None:
        return finding(suspect, False, f"in {most} steps it moves no learning rate")
    read = case.run(*[0.0] * steps).rates
    for m in range(num):
        own = alone[m] if _near(read[0][m], alone[m][0]) else alone[0]  # model 0's, where settings are
        if not _near(read[steps][m], own[steps]):
            times = next((k for k, rate in enumerate(own) if _near(rate, read[steps][m])), None)
            text = f"after {steps} step(s) model {m}'s learning rate is {read[steps][m]:.4g}, alone "
            text += f"{own[steps]:.4g}" + ("" if times is None else f"; alone it is there after {times}")
            size = abs(read[steps][m] / own[steps] - 1) if own[steps] else 1.0
            return finding(suspect, True, text, model=m, parameter="lr", step=steps, size=size)
    return finding(suspect, False, f"after {steps} step(s) the learning rates are those of the lone models")


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-6 * max(abs(a), abs(b))


def _are(group: set[int]) -> str:
    return f"models {', '.join(map(str, sorted(group)))} are" if len(group) > 1 else f"model {min(group)} is"
