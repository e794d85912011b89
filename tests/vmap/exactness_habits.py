"""The matrix as data, second part: random numbers, and the habits that users' own modules have."""

# ruff: noqa: B008, E731 (one row a line, each with its own values as defaults)

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from exactness_cases import CASES, IMAGES, PADDING, SEQ, Calls, Scaled, V, add, function, integers, plain
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

__all__ = ["CASES"]

# ---------------------------------------------------------------------------------------------- random numbers
plain(
    V,
    Dropout=nn.Dropout,
    AlphaDropout=nn.AlphaDropout,
    FeatureAlphaDropout=nn.FeatureAlphaDropout,
    RReLU=nn.RReLU,
    **{
        "Dropout(p=0)": lambda: nn.Dropout(0.0),
        "Dropout(p=1)": lambda: nn.Dropout(1.0),
        "Dropout(inplace)": lambda: nn.Dropout(0.5, inplace=True),
        "RReLU(inplace)": lambda: nn.RReLU(inplace=True),
        "Dropout twice": lambda: nn.Sequential(nn.Dropout(0.3), nn.Dropout(0.4)),
    },
)
for d in (1, 2, 3):
    add(f"Dropout{d}d", lambda m, k=getattr(nn, f"Dropout{d}d"): Scaled(k()), IMAGES[d])
add("RReLU eval", lambda m: Scaled(nn.RReLU()), V, evaluate=True)
function("F.dropout in eval, training=True", lambda x: F.dropout(x, 0.3), V)
function("Dropout of channels_last", lambda x: F.dropout(x.contiguous(memory_format=torch.channels_last)), IMAGES[2])
function("Dropout of a transpose", lambda x: F.dropout(x.t()), V)
function("Dropout of a permutation", lambda x: F.dropout(x.permute(0, 2, 3, 1)), IMAGES[2])
function("Dropout of an expanded tensor", lambda x: F.dropout(x[:, :1].expand(4, 6)), V)
function("Dropout of a slice", lambda x: F.dropout(x[:, ::2]), V)
function(
    "rand_like of channels_last", lambda x: x * torch.rand_like(x.to(memory_format=torch.channels_last)), IMAGES[2]
)
function("alpha_dropout of a transpose", lambda x: F.alpha_dropout(x.t(), 0.4, True), V)
function("gumbel_softmax", F.gumbel_softmax, V)
function("gumbel_softmax(hard)", lambda x: F.gumbel_softmax(x, hard=True), V)
function("x + randn_like(x)", lambda x: x + torch.randn_like(x), V)
function("x + torch.randn(x.shape)", lambda x: x + torch.randn(x.shape), V)
function("x * torch.bernoulli(sigmoid(x))", lambda x: x * torch.bernoulli(x.sigmoid()), V)
function("x * empty_like(x).bernoulli_(.5)", lambda x: x * torch.empty_like(x).bernoulli_(0.5), V)
function("x + torch.normal(0, 1, shape)", lambda x: x + torch.normal(0.0, 1.0, x.shape), V)
function("torch.normal(x, 1)", lambda x: torch.normal(x, 1.0), V)
function("x.new_empty(..).uniform_()", lambda x: x + x.new_empty(x.shape).uniform_(), V)
function("x + torch.empty(..).exponential_()", lambda x: x + torch.empty(6).exponential_(), V)
function("x[:, torch.randperm(6)]", lambda x: x[:, torch.randperm(6)], V)
function("x[torch.randint(..)]", lambda x: x[torch.randint(0, 4, (3,))], V)
function("torch.multinomial(softmax(x))", lambda x: x.gather(1, torch.multinomial(x.softmax(-1), 2)), V)
function("torch.poisson", lambda x: x * torch.poisson(x.exp()), V)
function("Normal.rsample", lambda x: torch.distributions.Normal(x, 1.0, validate_args=False).rsample(), V)
function("Normal.rsample(validate_args)", lambda x: torch.distributions.Normal(x, x.exp()).rsample(), V)
function("Categorical.sample", lambda x: x * torch.distributions.Categorical(logits=x).sample().unsqueeze(-1), V)
function("Gamma.rsample", lambda x: torch.distributions.Gamma(x.exp(), x.exp()).rsample(), V)
function("Dirichlet.rsample", lambda x: torch.distributions.Dirichlet(x.exp()).rsample(), V)
function("Beta.rsample", lambda x: torch.distributions.Beta(x.exp(), x.exp()).rsample(), V)
function("stochastic depth: if torch.rand(()) < .5", lambda x: x * 3 if torch.rand(()) < 0.5 else x, V)
function(
    "noise of a generator of the model's own",
    lambda x: x + torch.randn(6, generator=torch.Generator().manual_seed(3)),
    V,
)


class Module(nn.Module):
    """A user's module with one weight and what `prepare` adds to it; `step(self, x)` is its forward."""

    def __init__(self, step: Callable, prepare: Callable | None = None) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6) * 0.5)
        self.step = step
        if prepare:
            prepare(self)

    def forward(self, *x: Tensor) -> Any:
        return self.step(self, *x)


def habit(name: str, step: Callable, prepare: Callable | None = None, *inputs: Any, **options: Any) -> None:
    """A habit at the top of a model; below another layer it must hold just as well, so it gets a second row."""
    inputs = inputs or (V,)
    add(name, lambda m: Module(step, prepare), *inputs, **options)
    if inputs == (V,):
        add(f"{name}, below", lambda m: nn.Sequential(nn.Linear(6, 6), Module(step, prepare), nn.Tanh()), V, **options)


# ---------------------------------------------------------------------------------------------- parameters
weight_norm, parametrizations = nn.utils.weight_norm, nn.utils.parametrizations
add("weight_norm", lambda m: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 5))), V)
add("weight_norm at the top", lambda m: parametrizations.weight_norm(nn.Linear(6, 5)), V)
add("orthogonal", lambda m: nn.Sequential(parametrizations.orthogonal(nn.Linear(6, 6))), V)
add("spectral_norm train", lambda m: nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 5))), V)
add("spectral_norm eval", lambda m: nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 5))), V, evaluate=True)
add("old spectral_norm train", lambda m: nn.utils.spectral_norm(nn.Linear(6, 5)), V)


def old(module: nn.Module) -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return weight_norm(module)


add("old weight_norm", lambda m: old(nn.Linear(6, 5)), V)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


add("tied weights", lambda m: Tied(), V)


def twice(m: int) -> nn.Module:
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.Tanh(), layer)


add("the same submodule twice", twice, V)
habit(
    "complex parameters",
    lambda self, x: (x * self.c).abs() + self.w,
    lambda self: setattr(self, "c", nn.Parameter(torch.randn(6, dtype=torch.complex128))),
    float32=False,
)


def frozen(m: int) -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5))
    net[0].weight.requires_grad_(False)
    return net


add("frozen parameters", frozen, V)
add(
    "frozen parameters that differ across models",
    lambda m: frozen(m) if m else nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5)),
    V,
)
add(
    "ParameterList",
    lambda m: Module(
        lambda self, x: x * self.l[0] + self.l[1],
        lambda self: setattr(self, "l", nn.ParameterList([torch.randn(6), torch.randn(6)])),
    ),
    V,
)
add(
    "ParameterDict",
    lambda m: Module(
        lambda self, x: x * self.l["a"], lambda self: setattr(self, "l", nn.ParameterDict({"a": torch.randn(6)}))
    ),
    V,
)


def pruned(m: int) -> nn.Module:
    layer = nn.Linear(6, 5)
    prune.l1_unstructured(layer, "weight", 0.3)
    return layer


add("pruned", pruned, V)

# ---------------------------------------------------------------------------------------------- buffers and attributes
buffer = lambda name, value: lambda self: self.register_buffer(name, value.clone())


def count(self, x):
    self.n += 1
    return x * self.w / self.n


def average(self, x):
    self.mean.mul_(0.9).add_(x.detach().mean(0) * self.w.detach(), alpha=0.1)
    return x * self.w + self.mean


def reassign(self, x):
    self.mean = 0.9 * self.mean + 0.1 * (x * self.w).detach().mean(0)
    return x * self.w + self.mean


def grow(self, x):
    self.seen = torch.cat([self.seen, (x * self.w).detach()])
    return x * self.w + self.seen.mean(0)


def first_seen(self, x):
    if self.seen is None:
        self.seen = (x * self.w).detach().mean(0)
    return x * self.w + self.seen


def replace_row(self, x):
    self.mean[0] = (x * self.w).detach().mean()
    return x * self.w + self.mean


habit("int buffer counted in place", count, buffer("n", torch.tensor(0)))
habit("buffer averaged in place", average, buffer("mean", torch.zeros(6)))
habit("buffer re-assigned", reassign, buffer("mean", torch.zeros(6)))
habit("buffer that grows (cat)", grow, buffer("seen", torch.zeros(1, 6)))
habit("buffer that starts as None", first_seen, lambda self: self.register_buffer("seen", None))
habit("non-persistent buffer", average, lambda self: self.register_buffer("mean", torch.zeros(6), persistent=False))
habit("row of a buffer", replace_row, buffer("mean", torch.zeros(6)))
habit("plain tensor attribute re-assigned", reassign, lambda self: setattr(self, "mean", torch.zeros(6)))
habit("plain tensor attribute in place", average, lambda self: setattr(self, "mean", torch.zeros(6)))
habit("plain tensor attribute, growing", grow, lambda self: setattr(self, "seen", torch.zeros(1, 6)))
habit("plain tensor attribute from None", first_seen, lambda self: setattr(self, "seen", None))
habit("plain tensor attribute that differs", reassign, lambda self: setattr(self, "mean", torch.randn(6)))


def remember(self, x):
    self.history.append((x * self.w).detach().mean(0))
    return x * self.w + sum(self.history)


def remember_in_dict(self, x):
    self.cache["last"] = (x * self.w).detach().mean(0) + self.cache.get("last", 0)
    return x * self.w + self.cache["last"]


def python_count(self, x):
    self.steps += 1
    return x * self.w / self.steps


def python_value(self, x):
    self.scale = 0.5 * self.scale + (x * self.w).mean().item()
    return x * self.w * self.scale


class Note:
    def __init__(self) -> None:
        self.value = 0.0


def note(self, x):
    self.note.value = (x * self.w).detach().mean() + self.note.value
    return x * self.w + self.note.value


habit("list of tensors that grows", remember, lambda self: setattr(self, "history", []))
habit("dict of tensors", remember_in_dict, lambda self: setattr(self, "cache", {}))
habit("Python counter", python_count, lambda self: setattr(self, "steps", 0))
habit("Python float from .item()", python_value, lambda self: setattr(self, "scale", 1.0))
habit("tensor in an object of the user's", note, lambda self: setattr(self, "note", Note()))


class Asks(nn.Module):
    """Reads what its child kept from its last call, as mixtures of experts keep their balancing loss."""

    def __init__(self, inner: nn.Module, name: str) -> None:
        super().__init__()
        self.inner, self.name = inner, name

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + getattr(self.inner, self.name)


def keep_activation(self, x):
    self.kept = (x * self.w).mean()
    return x * self.w


add("attribute of a child read by its parent", lambda m: Asks(Module(keep_activation), "kept"), V)
add(
    "Python float of a child read by its parent",
    lambda m: Asks(Module(python_value, lambda self: setattr(self, "scale", 1.0)), "scale"),
    V,
)


def buffer_then_branch(self, x):
    self.mean.add_((x * self.w).detach().mean(0))
    noise = torch.randn(6)
    return x * self.w + self.mean + noise if (x * self.w).sum() > 0 else -x * self.w


habit("buffer and noise before a branch", buffer_then_branch, buffer("mean", torch.zeros(6)))


def counted_branch(self, x):
    self.steps += 1
    self.history.append(self.steps)
    return x * self.w * len(self.history) if (x * self.w).sum() > 0 else -x * self.w * self.steps


def prepare_counted(self):
    self.steps, self.history = 0, []


habit("Python state before a branch", counted_branch, prepare_counted)


def clip_weight(self, x):
    self.w.data.clamp_(-0.3, 0.3)
    return x * self.w


def clip_weight_no_grad(self, x):
    with torch.no_grad():
        self.w.clamp_(-0.3, 0.3)
    return x * self.w


def set_data(self, x):
    self.w.data = self.w.data.clamp(-0.3, 0.3)
    return x * self.w


habit("weight clipping (w.data.clamp_)", clip_weight)
habit("weight clipping under no_grad", clip_weight_no_grad)
habit("weight clipping (w.data = ...)", set_data)

# ---------------------------------------------------------------------------------------------- settings that differ
add("per-model LeakyReLU slope", lambda m: Scaled(nn.LeakyReLU(0.1 * (m + 1))), V)
add("per-model Dropout p", lambda m: Scaled(nn.Dropout(0.2 * (m + 1))), V)
add("per-model Dropout p of 0 and 1", lambda m: Scaled(nn.Dropout(m / 2)), V)
add("per-model AlphaDropout p", lambda m: Scaled(nn.AlphaDropout(0.2 * (m + 1))), V)
add("per-model Dropout2d p", lambda m: Scaled(nn.Dropout2d(0.2 * (m + 1))), IMAGES[2])
add("per-model BatchNorm momentum, eps", lambda m: nn.BatchNorm1d(6, momentum=0.1 * (m + 1), eps=10.0 ** -(m + 2)), V)
add("per-model LayerNorm eps", lambda m: nn.LayerNorm(6, eps=0.1 * (m + 1)), V)
add("per-model GroupNorm eps", lambda m: nn.GroupNorm(2, 4, eps=0.1 * (m + 1)), IMAGES[2])
add("per-model RMSNorm eps", lambda m: nn.RMSNorm(6, eps=0.1 * (m + 1)), V)
add("per-model ELU alpha", lambda m: Scaled(nn.ELU(0.5 * (m + 1))), V)
add("per-model Threshold", lambda m: Scaled(nn.Threshold(0.1 * m, 1.0 + m)), V)
add(
    "per-model attention dropout",
    lambda m: Calls(nn.MultiheadAttention(6, 2, dropout=0.2 * (m + 1)), lambda f, x: f(x, x, x)),
    SEQ,
)
add("per-model LSTM dropout", lambda m: nn.LSTM(6, 5, 2, dropout=0.2 * (m + 1)), SEQ)
add("per-model label smoothing", lambda m: Scaled(nn.CrossEntropyLoss(label_smoothing=0.1 * m)), V, integers(6, 4))
add("per-model training flag", lambda m: nn.Sequential(Scaled(nn.Dropout()).train(m == 1)), V)
add(
    "per-model float of the user's class",
    lambda m: Module(lambda self, x: x * self.w * self.k, lambda self: setattr(self, "k", 0.5 + m)),
    V,
)
add("per-model number of heads", lambda m: Calls(nn.MultiheadAttention(6, 1 + m), lambda f, x: f(x, x, x)), SEQ)
add("per-model activation function", lambda m: Scaled([torch.relu, torch.tanh, torch.sigmoid][m]), V)


class Unregistered(nn.Module):
    """Keeps a layer in a plain list, so that nobody trains it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.hidden = [nn.Linear(6, 6)]

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden[0](self.layer(x))


add("unregistered layer in a list", lambda m: Unregistered(), V)


class Lambda(nn.Module):
    """Refers to itself from a function that no copy of the module can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6))
        self.act = lambda x: x * self.w

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


class Method(Lambda):
    def __init__(self) -> None:
        super().__init__()
        self.act = self.scale

    def scale(self, x: Tensor) -> Tensor:
        return (x * self.w).masked_select(x == x).reshape(x.shape)


add("lambda over self", lambda m: Lambda(), V)
add("own method as attribute", lambda m: Method(), V)

# ---------------------------------------------------------------------------------------------- control flow
habit("if x.sum() > 0", lambda self, x: x * self.w if (x * self.w).sum() > 0 else x - self.w)
habit(".item() on an activation", lambda self, x: x * self.w * (x * self.w).mean().item())
habit("float() and int() of an activation", lambda self, x: x * self.w * float((x * self.w).mean()) + int(self.w.sum()))
habit("if x.requires_grad", lambda self, x: x * self.w if (x * self.w).requires_grad else x + self.w)
habit("if w.requires_grad", lambda self, x: x * self.w if self.w.requires_grad else x + self.w)
habit("if y.grad_fn", lambda self, x: x * self.w if (x * self.w).grad_fn is not None else x + self.w)
habit("if w.is_leaf is not looked at", lambda self, x: x * self.w if not (x * self.w).is_leaf else x + self.w)
habit("x.detach().numpy()", lambda self, x: x * self.w + torch.from_numpy((x * self.w).detach().numpy().mean(0)))
habit("boolean mask x[x > 0]", lambda self, x: (lambda y: y[y > 0].sum() + y.mean(0))(x * self.w))


def mask_assign(self, x):
    y = x * self.w
    y[y > 0] = 0
    return y


def index_put(self, x):
    y = x.new_zeros(4, 6)
    y[torch.arange(4), torch.tensor([0, 2, 1, 3])] = (x * self.w)[:, 0]
    return y


def in_place(self, x):
    x += self.w
    return x * self.w


habit("boolean mask assign x[x > 0] = 0", mask_assign)
habit("index_put into new zeros", index_put)
habit("nonzero", lambda self, x: x * self.w + len((x * self.w > 0).nonzero()))
habit("unique", lambda self, x: x * self.w + len((x * self.w).round().unique()))
habit("in-place edit of the input (x += w)", in_place)
habit(
    "topk, sort, scatter, where",
    lambda self, x: torch.where(x > 0, (x * self.w).sort(1).values, 0.0).scatter(
        1, (x * self.w).topk(2, 1).indices, 1.0
    ),
)
habit("linalg", lambda self, x: torch.linalg.solve(x.t() @ x + torch.eye(6).to(x.dtype), self.w))
habit("for over a tensor", lambda self, x: sum(row * self.w * i for i, row in enumerate(x)))
habit("a list of rows", lambda self, x: torch.stack([row * self.w for row in x.unbind()]))
habit("torch.func.grad inside", lambda self, x: torch.func.grad(lambda z: (z * self.w).sin().sum())(x))
habit("torch.vmap inside", lambda self, x: torch.vmap(lambda row: (row * self.w).sin())(x))
habit(
    "dropout in torch.vmap inside",
    lambda self, x: torch.vmap(lambda row: F.dropout(row * self.w), randomness="different")(x),
)
habit(
    "autograd.grad inside (create_graph)",
    lambda self, x: torch.autograd.grad((x * self.w).sin().sum(), self.w, create_graph=True)[0],
    trains_in_eval=True,
)
habit("checkpoint (non-reentrant)", lambda self, x: checkpoint(lambda z: (z * self.w).sin(), x, use_reentrant=False))
habit(
    "checkpoint (reentrant)", lambda self, x: checkpoint(lambda z: (z * self.w).sin(), x * self.w, use_reentrant=True)
)
habit(
    "checkpoint with dropout",
    lambda self, x: checkpoint(lambda z: F.dropout((z * self.w).sin()), x, use_reentrant=False),
)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 6))
        self.first, self.reentrant = nn.Linear(6, 6), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, self.first(x), use_reentrant=self.reentrant)


add("checkpointed block (non-reentrant)", lambda m: Checkpointed(False), V)
add("checkpointed block (reentrant)", lambda m: Checkpointed(True), V)


class Cube(torch.autograd.Function):
    """The old style: no setup_context, no vmap."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


habit("autograd.Function (old style)", lambda self, x: Cube.apply(x * self.w))
add("jit.script submodule", lambda m: nn.Sequential(nn.Linear(6, 6), torch.jit.script(nn.Linear(6, 5))), V)


# ---------------------------------------------------------------------------------------------- hooks
def hooked(register: Callable) -> Callable[[int], nn.Module]:
    def build(m: int) -> nn.Module:
        net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 5))
        register(net)
        return net

    return build


add("forward hook", hooked(lambda net: net[0].register_forward_hook(lambda module, x, y: y * 2 + module.bias)), V)
add("forward pre-hook", hooked(lambda net: net[0].register_forward_pre_hook(lambda module, x: (x[0] * 2,))), V)
add(
    "full backward hook (doubles grad)",
    hooked(lambda net: net[1].register_full_backward_hook(lambda module, gi, go: (gi[0] * 2,))),
    V,
)
add(
    "full backward hook at the top",
    hooked(
        lambda net: net.register_full_backward_hook(
            lambda module, gi, go: tuple(None if g is None else g * 2 for g in gi)
        )
    ),
    V,
)
add(
    "full backward pre-hook",
    hooked(lambda net: net[2].register_full_backward_pre_hook(lambda module, go: (go[0] * module.bias.detach(),))),
    V,
)
add("parameter hook (doubles grad)", hooked(lambda net: net[0].weight.register_hook(lambda g: g * 2)), V)
habit(
    "tensor hook on an activation",
    lambda self, x: (lambda y: (y.register_hook(lambda g: g * 2), y)[1])(x * self.w),
    trains_in_eval=True,
)
habit(
    "retain_grad on an activation", lambda self, x: (lambda y: (y.retain_grad(), y)[1])(x * self.w), trains_in_eval=True
)

# ---------------------------------------------------------------------------------------------- several at once
add(
    "branch, dropout and BatchNorm",
    lambda m: nn.Sequential(
        nn.Linear(6, 6),
        nn.BatchNorm1d(6),
        nn.Dropout(0.2 * (m + 1)),
        Module(lambda self, x: F.dropout(x * self.w, 0.3) if (x * self.w).sum() > 0 else x - self.w),
        nn.Dropout(0.4),
        nn.BatchNorm1d(6),
    ),
    V,
)
add(
    "model in a model",
    lambda m: nn.Sequential(nn.Sequential(nn.Linear(6, 6), copy.deepcopy(nn.Tanh())), nn.Dropout()),
    V,
)
add(
    "padding mask as input",
    lambda m: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True),
    SEQ,
    lambda g: None,
    lambda g: PADDING.clone(),
)
habit(
    "generator as attribute",
    lambda self, x: x * self.w + torch.randn(6, generator=self.g),
    lambda self: setattr(self, "g", torch.Generator().manual_seed(3)),
    (4, 6),
)
