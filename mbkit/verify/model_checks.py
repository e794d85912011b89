"""diagnose's experiments on what each model computes: each changes what only its own suspect answers to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..training.sequential import LoneTrainer
from .experiment import LARGE, SMALL, Case, Gap, Run
from .measure import alike
from .report import Finding, finding


def memory(case: Case) -> Finding:
    """Look at the addresses of all models' numbers."""
    for kind, name, _, _ in case.base.shared:
        case.blurred[kind].add(name.split(" ")[0])
    if not case.base.shared:
        return finding("shared-memory", False, "no two models' numbers have an address in common")
    kind, name, a, b = case.base.shared[0]
    text = f"{kind} of models {a} and {b} have memory in common, in {name}"
    return finding("shared-memory", True, text, model=b, parameter=name.split(" ")[0], step=0, size=1.0)


def weights(case: Case) -> Finding:
    """Read the parameters before the first step."""
    gaps = [gap for gap in case.base.unlike if gap[2] not in case.blurred["parameters"]]
    if not gaps or gaps[0][0] <= case.tolerance:
        return finding("other-weights", False, "before step 1 all parameters are those of the lone models")
    gap, m, name = gaps[0]
    text = f"before step 1 {name} of model {m} is {gap:.1e} of its length from the lone model's"
    return finding("other-weights", True, text, model=m, parameter=name, step=0, size=gap)


def order(case: Case) -> Finding:
    """Read the examples that the batch would train on; `gradient` looks for those that it does train on."""
    theirs = case.order()
    if theirs is None:
        return finding("other-order", False, "the batch trains on the batches that it is given")
    for step, pairs in enumerate(zip(case.given, theirs, strict=False), 1):
        ours, other = ([leaf for leaf in tree_leaves(pair) if isinstance(leaf, Tensor)] for pair in pairs)
        same = [leaf.shape for leaf in ours] == [leaf.shape for leaf in other]
        if not same or not all(alike(a, b.to(a)).all() for a, b in zip(ours, other, strict=True)):
            text = f"in step {step} the batch reads other examples than the models alone"
            return finding("other-order", True, text, step=step, size=1.0)
    return finding("other-order", False, f"in all {len(theirs)} steps it reads the lone models' examples")


def stale(case: Case) -> Finding:
    """A loss of zero has no gradient: what there is after the second step is left over from the first."""
    first, second = (case.lengths(case.base.gradients[step]) for step in (0, 1))
    left = [b / a if a else 0.0 for a, b in zip(first, second, strict=True)]
    m = max(range(len(left)), key=left.__getitem__)
    if left[m] <= case.tolerance:
        return finding("stale-gradients", False, "after a step whose loss is zero all gradients are zero")
    gaps = [(n, torch.linalg.vector_norm(g).item()) for n, g in case.base.gradients[1][m].items()]
    name = max(gaps, key=lambda gap: gap[1])[0]
    text = f"after a step whose loss is zero model {m} still has {left[m]:.1%} of the gradient of the step before"
    return finding("stale-gradients", True, text, model=m, parameter=name, step=2, size=left[m])


def gradient(case: Case) -> list[Finding]:
    """Compare with plain autograd at the same parameters, on the same examples, without random masks."""
    num, seen, choices = case.num_models, case.base.gradients[0], [(True, 0), (False, 0)]
    trials, found = [], []
    for training, k in [*choices, *((True, k) for k in range(1, min(8, len(case.data))))]:
        reference, drew = case.alone(case.quiet, training, k)
        factor, wrong = case.compared(reference, seen)
        trials.append((len(wrong), training, k, factor, wrong))
        if not wrong:
            break
    if drew and wrong:
        why = "the models draw random numbers that cannot be switched off"
        return [finding(suspect, None, why) for suspect in ("wrong-gradient", "mean-loss")]
    _, case.training, k, case.factor, wrong = min(trials, key=lambda trial: trial[0])
    case.wrong = {(m, name) for _, m, name in wrong}
    if k:
        text = f"given the examples of step 1, the batch computes the gradient of those of step {k + 1}"
        found.append(finding("other-order", True, text, step=1, size=1.0))
    if not case.training:
        found.append(_mode(case, trials[0][4]))
    alone = case.factor
    if num > 1 and abs(case.factor * num - 1) < 0.01:
        one = case.run(SMALL, models=case.quiet[:1], configs=case.calm[:1], seeds=case.seeds[:1])
        reference, _ = case.alone(case.quiet[:1], case.training, k)
        alone, _ = case.compared(reference, one.gradients[0])
    # Nearer to 1 than to the factor is enough: another fault beside this one may change the gradient itself a little.
    mean = num > 1 and abs(case.factor * num - 1) < 0.01 and abs(alone - 1) < abs(alone - case.factor) / 2
    text = f"gradients have {case.factor:.4g} of autograd's length"
    if mean:
        text += f", which is 1 / {num}; in a batch of one model they have {alone:.4g} of it"
    where = {"model": 0, "parameter": case.names[0], "step": 1, "size": abs(case.factor - 1)}
    found.append(finding("mean-loss", mean, text, **where))
    if not mean and abs(case.factor - 1) > case.tolerance:
        return [*found, finding("wrong-gradient", True, text, **where)]
    if not wrong:
        text = f"within {case.worst:.0e} of its length" if case.worst else "to the last bit"
        return [*found, finding("wrong-gradient", False, f"at the same parameters it is autograd's, {text}")]
    gap, m, name = max(wrong)
    text = f"at the same parameters the gradient of {name} of model {m} is off by {gap:.1e} of its length"
    return [*found, finding("wrong-gradient", True, text, model=m, parameter=name, step=1, size=gap)]


def masks(case: Case) -> list[Finding]:
    """Compare with plain autograd after the same seeds, dropout and all, where the gradient is otherwise right."""
    _, drew = case.alone(case.models, True)
    awake = finding("other-mode", False, "its gradient is that of train mode")
    if not drew:
        known = [] if "other-mode" in case.findings else [awake]
        return [finding("other-masks", False, "the models draw no random numbers"), *known]
    asleep = finding("other-masks", None, "in eval mode no masks are drawn")
    if not case.training:
        return [asleep]
    loud = case.run(SMALL, SMALL, models=case.models, configs=case.calm)
    judged = {(m, n) for m in range(case.num_models) for n in case.names} - case.wrong
    unlike_eval = _masked(case, case.lones(case.models, False), loud, 0, judged)
    lones = case.lones(case.models, True)
    for step in range(1 if case.guilty("stale-gradients") else 2):  # also whether every step has masks of its own
        wrong = _masked(case, lones, loud, step, judged)
        if wrong and not unlike_eval:
            return [_mode(case, wrong), asleep]
        if wrong:
            gap, m, name = max(wrong)
            text = f"without masks the gradient is right, with those of step {step + 1} that of {name} of model {m} "
            text += f"is off by {gap:.1e}"
            return [finding("other-masks", True, text, model=m, parameter=name, step=step + 1, size=gap), awake]
    what = "with the same seeds the gradient is that of the same masks" if judged else "without masks it is wrong, too"
    return [finding("other-masks", False if judged else None, what), awake]


def _masked(case: Case, lones: Sequence[LoneTrainer], loud: Run, step: int, judged: set[tuple[int, str]]) -> list[Gap]:
    """Return the gradients of a step that are not those of the lone models, who draw their next random numbers."""
    start = loud.parameters[step - 1] if step else loud.start
    wrong = case.compared(case.gradients(lones, step, start), loud.gradients[step], case.factor)[1]
    return [gap for gap in wrong if gap[1:] in judged]


def _mode(case: Case, wrong: Sequence[Gap]) -> Finding:
    gap, m, name = max(wrong)
    case.training = False
    text = f"the batch's gradient is the lone models' gradient in eval mode, and {gap:.1e} from that in train mode"
    return finding("other-mode", True, text, model=m, parameter=name, step=1, size=gap)


def clipping(case: Case) -> Finding:
    """Make the loss so large that every clipper clips, and see which models' gradients shrink by one factor."""
    large = case.run(LARGE, configs=case.calm)
    lengths = case.lengths(case.base.gradients[0])
    ends = case.lengths(large.gradients[0])
    shrunk = [b / a * SMALL / LARGE if a else 1.0 for a, b in zip(lengths, ends, strict=True)]
    same = max(shrunk) - min(shrunk) < 1e-3 * max(shrunk)
    alike = max(lengths) - min(lengths) < 1e-3 * max(lengths)
    where = {"model": 0, "parameter": case.names[0], "step": 1, "size": 1 - min(shrunk)}
    if len(shrunk) == 1 or alike:
        why = "there is one model" if len(shrunk) == 1 else "all models' gradients have the same length"
        return finding("clipped-across-models", False, f"{why}: a common norm would be its own")
    if same and min(shrunk) < 1 - 1e-3:
        text = f"a large gradient is shrunk to {shrunk[0]:.1e} of itself in every model, though "
        text += f"their lengths differ by {max(lengths) / (min(lengths) or 1):.3g}"
        return finding("clipped-across-models", True, text, **where)
    text = "no gradient is clipped" if same else "a large gradient is clipped in each model by its own factor"
    return finding("clipped-across-models", False, text)
