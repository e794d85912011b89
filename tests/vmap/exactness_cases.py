"""The matrix as data: every kind of layer, and how one model of it and its input are made.

`CASES[name]` is a `Case`. Layers without parameters are scaled by one first, so that gradients flow through them.
The habits of whole models (state, hooks, branches) are in `exactness_habits.py`.
"""

# ruff: noqa: B008, E731 (one row a line, each with its own values as defaults)

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

V, SEQ = (4, 6), (4, 5, 6)  # a batch of vectors, a batch of sequences
IMAGES = {1: (2, 4, 8), 2: (2, 4, 8, 8), 3: (2, 4, 4, 4, 4)}


class Case(NamedTuple):
    """How to make model m, and its inputs: one shape for each, or a function from a generator to tensors."""

    build: Callable[[int], nn.Module]
    inputs: tuple
    evaluate: bool = False  # models in eval()
    grad: bool = True  # False: under torch.no_grad()
    trains_in_eval: bool = False  # needs gradients in its forward, in eval() too
    float32: bool = True  # also worth a run in float32


class Scaled(nn.Module):
    """A layer or function behind one parameter, so that its gradient is seen."""

    def __init__(self, inner: Callable) -> None:
        super().__init__()
        self.s = nn.Parameter(1 + 0.1 * torch.rand(1))
        self.inner = inner

    def forward(self, x: Any, *others: Any) -> Any:
        return self.inner(x * self.s, *others)


class Calls(nn.Module):
    """A layer called in another way than with one tensor."""

    def __init__(self, inner: nn.Module, call: Callable) -> None:
        super().__init__()
        self.inner = inner
        self.call = call

    def forward(self, *x: Tensor) -> Any:
        return self.call(self.inner, *x)


CASES: dict[str, Case] = {}


def add(name: str, build: Callable[[int], nn.Module], *inputs: Any, **options: Any) -> None:
    assert name not in CASES, name
    CASES[name] = Case(build, inputs, **options)


def layers(shape: tuple, **built: Callable[[], nn.Module]) -> None:
    for name, make in built.items():
        add(name.replace("__", " "), lambda m, make=make: make(), shape)


def plain(shape: tuple, **made: Callable) -> None:
    """Layers and functions without parameters."""
    for name, make in made.items():
        add(name.replace("__", " "), lambda m, make=make: Scaled(make()), shape)


def function(name: str, compute: Callable, *inputs: Any) -> None:
    add(name, lambda m: Scaled(compute), *inputs)


def integers(high: int, *shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randint(high, shape, generator=g)


def classes(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randn(*shape, generator=g).softmax(-1)


# ---------------------------------------------------------------------------------------------- dense
layers(V, Linear=lambda: nn.Linear(6, 5), Linear__without__bias=lambda: nn.Linear(6, 5, bias=False))
add("Bilinear", lambda m: nn.Bilinear(6, 6, 3), V, V)
plain(V, Identity=nn.Identity)
plain(IMAGES[2], Flatten=nn.Flatten)
plain(V, Unflatten=lambda: nn.Unflatten(1, (2, 3)))

# ---------------------------------------------------------------------------------------------- convolution
for d in (1, 2, 3):
    shape = IMAGES[d]
    conv, transposed = getattr(nn, f"Conv{d}d"), getattr(nn, f"ConvTranspose{d}d")
    variants = {
        "": {},
        "(stride, padding, dilation)": {"stride": 2, "padding": 2, "dilation": 2},
        "(groups)": {"groups": 2},
        "(depthwise)": {"groups": 4},
        "(padding='same')": {"padding": "same"},
        "(circular)": {"padding": 1, "padding_mode": "circular"},
        "(reflect)": {"padding": 1, "padding_mode": "reflect"},
        "(replicate)": {"padding": 1, "padding_mode": "replicate"},
    }
    for label, options in variants.items():
        add(f"Conv{d}d{label}", lambda m, c=conv, o=options: c(4, 4, 3, **o), shape)
    add(f"Conv{d}d(unbatched input)", lambda m, c=conv: c(4, 4, 3), shape[1:])
    add(f"ConvTranspose{d}d", lambda m, c=transposed: c(4, 4, 3), shape)
    add(
        f"ConvTranspose{d}d(stride, output_padding)",
        lambda m, c=transposed: c(4, 4, 3, stride=2, padding=1, output_padding=1),
        shape,
    )
    add(f"ConvTranspose{d}d(groups)", lambda m, c=transposed: c(4, 4, 3, groups=2), shape)


def built_lazily(module: nn.Module, shape: tuple) -> nn.Module:
    module(torch.zeros(shape))
    return module


add("LazyLinear, built", lambda m: built_lazily(nn.LazyLinear(5), V), V)
add("LazyConv2d, built", lambda m: built_lazily(nn.LazyConv2d(4, 3), IMAGES[2]), IMAGES[2])

# ---------------------------------------------------------------------------------------------- pooling
for d in (1, 2, 3):
    shape = IMAGES[d]
    for kind in ("MaxPool", "AvgPool", "LPPool"):
        first = (2,) if kind == "LPPool" else ()
        add(f"{kind}{d}d", lambda m, k=getattr(nn, f"{kind}{d}d"), f=first: Scaled(k(*f, 2)), shape)
    for kind in ("AdaptiveAvgPool", "AdaptiveMaxPool"):
        add(f"{kind}{d}d", lambda m, k=getattr(nn, f"{kind}{d}d"): Scaled(k(3)), shape)

    def unpool(x, pool, back):
        y, where = pool(x)
        return back(y, where)

    pair = getattr(F, f"max_pool{d}d"), getattr(F, f"max_unpool{d}d")
    function(
        f"MaxUnpool{d}d",
        lambda x, f=unpool, p=pair: f(x, lambda x: p[0](x, 2, return_indices=True), lambda y, i: p[1](y, i, 2)),
        shape,
    )
plain(IMAGES[2], FractionalMaxPool2d=lambda: nn.FractionalMaxPool2d(2, output_size=3))
plain(IMAGES[3], FractionalMaxPool3d=lambda: nn.FractionalMaxPool3d(2, output_size=2))
plain(IMAGES[2], MaxPool2d__overlapping=lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True))

# ---------------------------------------------------------------------------------------------- normalization
for d in (1, 2, 3):
    shape = IMAGES[d]
    norm, instance = getattr(nn, f"BatchNorm{d}d"), getattr(nn, f"InstanceNorm{d}d")
    add(f"BatchNorm{d}d train", lambda m, n=norm: n(4), shape)
    add(f"BatchNorm{d}d eval", lambda m, n=norm: n(4), shape, evaluate=True)
    add(f"BatchNorm{d}d(track=False)", lambda m, n=norm: n(4, track_running_stats=False), shape)
    add(f"BatchNorm{d}d(affine=False)", lambda m, n=norm: Scaled(n(4, affine=False)), shape)
    add(f"BatchNorm{d}d(momentum=None) train", lambda m, n=norm: n(4, momentum=None), shape)
    add(f"InstanceNorm{d}d(affine)", lambda m, n=instance: n(4, affine=True), shape)
    tracking = {"affine": True, "track_running_stats": True}
    add(f"InstanceNorm{d}d(track) train", lambda m, n=instance, t=tracking: n(4, **t), shape)
    add(f"InstanceNorm{d}d(track) eval", lambda m, n=instance, t=tracking: n(4, **t), shape, evaluate=True)
layers(IMAGES[2], GroupNorm=lambda: nn.GroupNorm(2, 4), SyncBatchNorm__eval=lambda: nn.SyncBatchNorm(4).eval())
layers(
    V,
    LayerNorm=lambda: nn.LayerNorm(6),
    RMSNorm=lambda: nn.RMSNorm(6),
    BatchNorm1d__of__vectors=lambda: nn.BatchNorm1d(6),
)
plain(IMAGES[2], LocalResponseNorm=lambda: nn.LocalResponseNorm(2), CrossMapLRN2d=lambda: nn.CrossMapLRN2d(2))

# ---------------------------------------------------------------------------------------------- embedding
INDICES = integers(7, 4, 5)
add("Embedding", lambda m: nn.Embedding(7, 3), INDICES)
add("Embedding(padding_idx)", lambda m: nn.Embedding(7, 3, padding_idx=2), INDICES)
add("Embedding(max_norm)", lambda m: nn.Embedding(7, 3, max_norm=0.5), INDICES)
add("Embedding(scale_grad_by_freq)", lambda m: nn.Embedding(7, 3, scale_grad_by_freq=True), INDICES)
add("Embedding(sparse)", lambda m: nn.Embedding(7, 3, sparse=True), INDICES)
for how in ("sum", "mean", "max"):
    add(f"EmbeddingBag({how})", lambda m, how=how: nn.EmbeddingBag(7, 3, mode=how), INDICES)
add("EmbeddingBag(padding_idx)", lambda m: nn.EmbeddingBag(7, 3, padding_idx=2), INDICES)
add(
    "EmbeddingBag(offsets)",
    lambda m: Calls(nn.EmbeddingBag(7, 3), lambda bag, i: bag(i, torch.tensor([0, 3, 7]))),
    integers(7, 9),
)
add(
    "EmbeddingBag(per_sample_weights)",
    lambda m: Calls(nn.EmbeddingBag(7, 3, mode="sum"), lambda bag, i, w: bag(i, None, w)),
    INDICES,
    lambda g: torch.rand(4, 5, generator=g, dtype=torch.get_default_dtype()),
)

# ---------------------------------------------------------------------------------------------- recurrent
for kind in ("RNN", "LSTM", "GRU"):
    net = getattr(nn, kind)
    add(kind, lambda m, n=net: n(6, 5), SEQ)
    deep = {"num_layers": 2, "bidirectional": True, "batch_first": True}
    add(f"{kind}(2 layers, bidirectional, batch_first)", lambda m, n=net, o=deep: n(6, 5, **o), SEQ)
    add(f"{kind}(2 layers, dropout)", lambda m, n=net: n(6, 5, num_layers=2, dropout=0.5), SEQ)
    add(f"{kind}(eval, no_grad)", lambda m, n=net: n(6, 5), SEQ, evaluate=True, grad=False)
    add(f"{kind}Cell", lambda m, n=getattr(nn, f"{kind}Cell"): n(6, 5), V)
    add(f"{kind}(no bias, unbatched)", lambda m, n=net: n(6, 5, bias=False), (5, 6))
    batch_first = {"batch_first": True, "dropout": 0.5, "num_layers": 2}
    add(
        f"{kind}(batch_first) then Dropout",
        lambda m, n=net, o=batch_first: Calls(
            nn.ModuleList([n(6, 5, **o), nn.Dropout(0.5)]), lambda both, x: both[1](both[0](x)[0])
        ),
        SEQ,
    )
layers(
    SEQ,
    **{"RNN(relu)": lambda: nn.RNN(6, 5, nonlinearity="relu"), "LSTM(proj_size)": lambda: nn.LSTM(6, 5, proj_size=3)},
)
add("LSTM with (h0, c0)", lambda m: Calls(nn.LSTM(6, 5), lambda f, x, h, c: f(x, (h, c))), SEQ, (1, 5, 5), (1, 5, 5))
add("GRU with h0", lambda m: nn.GRU(6, 5), SEQ, (1, 5, 5))


def packed(net: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    sequence = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return nn.utils.rnn.pad_packed_sequence(net(sequence)[0], batch_first=True, total_length=5)[0]


for kind in ("LSTM", "GRU"):
    net = getattr(nn, kind)
    fixed = lambda net, x: packed(net, x, torch.tensor([5, 2, 3, 1]))
    add(f"{kind} on PackedSequence", lambda m, n=net, f=fixed: Calls(n(6, 5, batch_first=True), f), SEQ)
    add(
        f"{kind} on PackedSequence of given lengths",
        lambda m, n=net: Calls(n(6, 5, batch_first=True), packed),
        SEQ,
        lambda g: torch.randint(1, 6, (4,), generator=g),
    )


# ---------------------------------------------------------------------------------------------- attention
def attend(**options: Any) -> Callable:
    return lambda attention, x: attention(x, x, x, **options)


for label, options, call in [
    ("", {}, {}),
    ("need_weights=False", {}, {"need_weights": False}),
    ("batch_first", {"batch_first": True}, {}),
    ("bias_kv, zero_attn", {"add_bias_kv": True, "add_zero_attn": True}, {}),
    ("average=False", {}, {"average_attn_weights": False}),
    ("no bias", {"bias": False}, {}),
    ("dropout, need_weights", {"dropout": 0.3}, {}),
    ("dropout, need_weights=False", {"dropout": 0.3}, {"need_weights": False}),
]:
    add(
        f"MultiheadAttention({label})",
        lambda m, o=options, c=call: Calls(nn.MultiheadAttention(6, 2, **o), attend(**c)),
        SEQ,
    )
add(
    "MultiheadAttention(other kdim, vdim)",
    lambda m: nn.MultiheadAttention(6, 2, kdim=5, vdim=3),
    SEQ,
    (3, 5, 5),
    (3, 5, 3),
)
add(
    "MultiheadAttention(eval, no_grad)",
    lambda m: Calls(nn.MultiheadAttention(6, 2, batch_first=True), attend()),
    SEQ,
    evaluate=True,
    grad=False,
)
TRANSFORMER = {"d_model": 6, "nhead": 2, "dim_feedforward": 8, "batch_first": True}
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True], [False] * 5])
for p in (0.0, 0.1):
    encoder = lambda m, p=p: nn.TransformerEncoderLayer(dropout=p, **TRANSFORMER)
    add(f"TransformerEncoderLayer(p={p}) train", encoder, SEQ)
    add(f"TransformerEncoderLayer(p={p}) eval", encoder, SEQ, evaluate=True)
    add(f"TransformerEncoderLayer(p={p}) eval, no_grad", encoder, SEQ, evaluate=True, grad=False)
    add(
        f"TransformerDecoderLayer(p={p}) train",
        lambda m, p=p: nn.TransformerDecoderLayer(dropout=p, **TRANSFORMER),
        SEQ,
        SEQ,
    )
add(
    "TransformerEncoderLayer(norm_first, gelu)",
    lambda m: nn.TransformerEncoderLayer(norm_first=True, activation="gelu", **TRANSFORMER),
    SEQ,
)
for label, options in {
    "eval, no_grad": {"evaluate": True, "grad": False},
    "train": {},
    "eval": {"evaluate": True},
}.items():
    add(
        f"TransformerEncoder x2 {label}, src_key_padding_mask",
        lambda m: Calls(
            nn.TransformerEncoder(nn.TransformerEncoderLayer(**TRANSFORMER), 2),
            lambda f, x: f(x, src_key_padding_mask=PADDING),
        ),
        SEQ,
        **options,
    )
add("Transformer", lambda m: nn.Transformer(6, 2, 1, 1, 8, batch_first=True), SEQ, SEQ)
causal = lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True)
function("SDPA", lambda x: F.scaled_dot_product_attention(x, x, x), (2, 2, 5, 4))
function("SDPA causal", causal, (2, 2, 5, 4))
masked = lambda x: F.scaled_dot_product_attention(x, x, x, torch.ones(5, 5, dtype=torch.bool).tril())
function("SDPA mask", masked, (2, 2, 5, 4))
function("SDPA dropout_p=.3", lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.3), (2, 2, 5, 4))

# ---------------------------------------------------------------------------------------------- activations
for kind in """ELU Hardshrink Hardsigmoid Hardtanh Hardswish LeakyReLU LogSigmoid ReLU ReLU6 SELU CELU GELU Sigmoid SiLU
    Mish Softplus Softshrink Softsign Tanh Tanhshrink Softmin Softmax LogSoftmax GLU""".split():
    make = getattr(nn, kind)
    options = {"dim": 1} if kind in ("Softmin", "Softmax", "LogSoftmax") else {}
    add(kind, lambda m, k=make, o=options: Scaled(k(**o)), V)
plain(V, Threshold=lambda: nn.Threshold(0.1, 2.0), ReLU__inplace=lambda: nn.ReLU(inplace=True))
plain(IMAGES[2], Softmax2d=nn.Softmax2d)
layers(V, PReLU=nn.PReLU, PReLU__per__channel=lambda: nn.PReLU(6))

# ---------------------------------------------------------------------------------------------- shape
plain(
    IMAGES[2],
    PixelShuffle=lambda: nn.PixelShuffle(2),
    PixelUnshuffle=lambda: nn.PixelUnshuffle(2),
    ChannelShuffle=lambda: nn.ChannelShuffle(2),
    Unfold=lambda: nn.Unfold(3, padding=1),
    ReflectionPad2d=lambda: nn.ReflectionPad2d(1),
    ReplicationPad2d=lambda: nn.ReplicationPad2d(1),
    ZeroPad2d=lambda: nn.ZeroPad2d(1),
    ConstantPad2d=lambda: nn.ConstantPad2d(1, 0.5),
    CircularPad2d=lambda: nn.CircularPad2d(1),
    UpsamplingNearest2d=lambda: nn.UpsamplingNearest2d(scale_factor=2),
    UpsamplingBilinear2d=lambda: nn.UpsamplingBilinear2d(scale_factor=2),
)
plain((2, 8, 4), Fold=lambda: nn.Fold((3, 3), 2))
for how, d in {"nearest": 2, "bilinear": 2, "bicubic": 2, "linear": 1, "trilinear": 3}.items():
    add(f"Upsample({how})", lambda m, h=how: Scaled(nn.Upsample(scale_factor=2, mode=h)), IMAGES[d])
function("grid_sample", lambda x, grid: F.grid_sample(x, grid.tanh(), align_corners=False), IMAGES[2], (2, 3, 3, 2))
function("einsum", lambda x: torch.einsum("bi,bj->bij", x, x), V)
function("FFT", lambda x: torch.fft.rfft(x).abs(), V)

# ---------------------------------------------------------------------------------------------- distances and losses
add("CosineSimilarity", lambda m: Scaled(nn.CosineSimilarity()), V, V)
add("PairwiseDistance", lambda m: Scaled(nn.PairwiseDistance()), V, V)
LABELS, MANY = integers(6, 4), integers(2, 4, 6)
for kind, targets in {
    "L1Loss": (V,), "MSELoss": (V,), "SmoothL1Loss": (V,), "HuberLoss": (V,), "KLDivLoss": (classes(4, 6),),
    "BCEWithLogitsLoss": (classes(4, 6),), "PoissonNLLLoss": (classes(4, 6),), "CrossEntropyLoss": (LABELS,),
    "MultiMarginLoss": (LABELS,), "NLLLoss": (LABELS,), "MultiLabelMarginLoss": (MANY,),
    "GaussianNLLLoss": (V, classes(4, 6)),
}.items():  # fmt: skip
    add(kind, lambda m, k=getattr(nn, kind): Scaled(k()), V, *targets)
add("KLDivLoss(batchmean, log_target)", lambda m: Scaled(nn.KLDivLoss(reduction="batchmean", log_target=True)), V, V)
function("BCELoss", lambda x, t: F.binary_cross_entropy(x.sigmoid(), t), V, classes(4, 6))
function("SoftMarginLoss", lambda x, t: F.soft_margin_loss(x, 2.0 * t - 1), V, MANY)
function("MultiLabelSoftMarginLoss", lambda x, t: F.multilabel_soft_margin_loss(x, t.to(x.dtype)), V, MANY)
function("HingeEmbeddingLoss", lambda x, t: F.hinge_embedding_loss(x, 2 * t - 1), V, MANY)
function("CosineEmbeddingLoss", lambda x, y, t: F.cosine_embedding_loss(x, y, 2 * t - 1), V, V, integers(2, 4))
function("MarginRankingLoss", lambda x, y, t: F.margin_ranking_loss(x, y, 2 * t - 1), V, V, MANY)
add("TripletMarginLoss", lambda m: Scaled(nn.TripletMarginLoss()), V, V, V)
add("TripletMarginWithDistanceLoss", lambda m: Scaled(nn.TripletMarginWithDistanceLoss()), V, V, V)
for label, options in {
    "smoothing": {"label_smoothing": 0.1},
    "ignore_index": {"ignore_index": 2},
    "sum": {"reduction": "sum"},
}.items():
    add(f"CrossEntropyLoss({label})", lambda m, o=options: Scaled(nn.CrossEntropyLoss(**o)), V, LABELS)
add("CrossEntropyLoss(weight)", lambda m: Scaled(nn.CrossEntropyLoss(weight=torch.arange(1.0, 7.0))), V, LABELS)
add("CrossEntropyLoss(probabilities)", lambda m: Scaled(nn.CrossEntropyLoss()), V, classes(4, 6))


def ctc(x: Tensor, targets: Tensor) -> Tensor:
    sizes = torch.full((4,), 5), torch.full((4,), 2)
    return F.ctc_loss(x.transpose(0, 1).log_softmax(-1), targets + 1, *sizes)


function("CTCLoss", ctc, SEQ, integers(5, 4, 2))
add(
    "AdaptiveLogSoftmaxWithLoss",
    lambda m: Calls(nn.AdaptiveLogSoftmaxWithLoss(6, 10, [2, 5]), lambda f, x, t: tuple(f(x, t))),
    V,
    integers(10, 4),
)
