"""However a step is made (at once, in chunks, one by one, compiled), each model is the one trained alone."""

from __future__ import annotations

import copy
import importlib
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mbkit import ModelBatch, OptimizerFactory, fit
from mbkit.batch.call import call_models as plain
from mbkit.batch.context import context_of
from mbkit.training import train_steps
from mbkit.training.chunks import _ENOUGH, Chunks
from mbkit.training.compiled import CompiledStep
from mbkit.training.options import StepOptions
from mbkit.training.step import Stepper, make_update
from tests.oracle import assert_same_models, classifiers, points, train_alone

M, B, K, STEPS = 5, 8, 3, 4
RATES = [0.001 * (m + 1) for m in range(M)]


class Busy(nn.Module):
    """Convolution, BatchNorm, dropout at a rate of its own, a buffer assigned anew, a count in Python.

    A bias before BatchNorm has no gradient but rounding, which Adagrad would blow up.
    """

    def __init__(self, rate: float = 0.3) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Dropout(rate)
        self.out = nn.Linear(3 * 16, K)
        self.register_buffer("seen", torch.zeros(1))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + x.mean()
        self.calls += 1
        return self.out(self.drop(self.norm(self.conv(x)).relu()).flatten(1))


class Steady(Busy):
    """The same, editing its buffer in place: what one compiled graph can hold."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.mean()
        return self.out(self.drop(self.norm(self.conv(x)).relu()).flatten(1))


def models_of(cls: type[nn.Module], dtype: torch.dtype = torch.float64) -> list[nn.Module]:
    torch.manual_seed(0)
    return [cls(0.1 + 0.1 * m).to(dtype) for m in range(M)]


def data(each: bool = False, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    lead = (M,) if each else ()
    x = [torch.randn(*lead, B, 2, 6, 6, generator=generator, dtype=dtype) for _ in range(STEPS)]
    return [(x, torch.randint(K, (*lead, B), generator=generator)) for x in x]


def rates(lr: float | None = None, **settings) -> list[dict]:
    """Return each model's settings of the optimizer."""
    return [{"lr": rate if lr is None else lr, **settings} for rate in RATES]


def assert_states(batch: ModelBatch, models: list[nn.Module], atol: float = 1e-10) -> None:
    for m, model in enumerate(models):
        torch.testing.assert_close(batch[m].state_dict(), model.state_dict(), rtol=0, atol=atol)


def assert_as_plain(batch: ModelBatch, models: list, pairs: list, atol: float = 1e-10, cls=torch.optim.SGD) -> None:
    """Train the models in plain PyTorch, and compare."""
    train_alone(models, pairs, loss_fn=cross_entropy, seeds=range(M), optimizer_cls=cls, configs=rates())
    assert_states(batch, models, atol)


def train(cls: type[nn.Module], each: bool, optimizer_cls: type = torch.optim.Adam, settings=(), **how):
    """Train a batch clipped and scheduled, and compare it with the models trained alone so."""
    models, pairs = models_of(cls), data(each)
    batch = ModelBatch(models, not each, seeds=range(M))
    optimizer = OptimizerFactory(optimizer_cls).create_optimizer(batch, rates(**dict(settings)))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    rest = {"scheduler": schedule, "scheduler_every": "step", "max_norm": 0.4, "progress": False}
    history = fit(batch, optimizer, pairs, cross_entropy, **rest, **how)
    losses = train_alone(
        models, pairs, each, cross_entropy, 0.4, range(M), optimizer_cls, rates(**dict(settings)),
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
    )  # fmt: skip
    torch.testing.assert_close(history.loss.double(), losses, rtol=0, atol=1e-10)
    assert_states(batch, models)
    return history, batch


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4, M, None])
def test_chunks_change_no_result(size, each):
    history, _ = train(Busy, each, chunk_size=size)
    assert history.how == {1: "one by one", M: "all models at once", None: "all models at once"}.get(
        size, f"in chunks of {size}"
    )


class OnGraph(nn.Module):
    """Holds a sparse tensor, other edges in each model."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.out = nn.Linear(72, K)
        self.edges = torch.randn(B, B).double().relu().to_sparse()

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.edges, self.out(x.flatten(1)))


@pytest.mark.parametrize("size", [2, "auto"])
def test_chunks_of_models_with_a_sparse_constant(size):
    train(OnGraph, False, chunk_size=size)


def test_targets_for_all_and_one_a_model_in_one_step():
    torch.manual_seed(0)
    models = [nn.Linear(4, 2).double() for _ in range(M)]
    x, shared, own = torch.randn(B, 4).double(), torch.randn(B, 2).double(), torch.randn(M, B, 2).double()

    def loss_fn(outputs, targets):
        return ((outputs - targets[0]) ** 2 + (outputs - targets[1]) ** 3).mean()

    batch = ModelBatch(models)
    chunks = Chunks(batch, 2)
    losses, outputs = chunks.backward(x, (shared, own), StepOptions(loss_fn))
    for m, model in enumerate(models):
        loss = loss_fn(model(x), (shared, own[m]))
        torch.testing.assert_close(losses[m], loss.detach())
        torch.testing.assert_close(outputs[m], model(x).detach())
        (gradient,) = torch.autograd.grad(loss, [model.weight])
        torch.testing.assert_close(batch.stacked_params["weight"].grad[m], gradient)


def test_a_chunk_keeps_what_its_backward_needs_and_no_more():
    """A Linear layer keeps its input, 8 x 100 floats; its weight is no activation."""
    models = [nn.Sequential(nn.Tanh(), nn.Linear(100, 1)) for _ in range(4)]
    chunks = Chunks(ModelBatch(models, shared_input=False))
    chunks.backward(
        torch.randn(4, B, 100), torch.randn(4, B, 1), StepOptions(nn.functional.mse_loss, shared_targets=False)
    )
    assert 8 * 100 * 4 <= chunks.bytes_each <= 1.5 * 8 * 100 * 4


def test_hooks_on_stacked_parameters_keep_the_batch_whole():
    batch = ModelBatch(models_of(Busy))
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=0.1)
    seen = []
    next(batch.parameters()).register_hook(lambda gradient: seen.append(gradient.shape))
    fit(batch, optimizer, data(), cross_entropy, progress=False)
    assert seen == [(M, 3, 2, 3, 3)] * STEPS


@pytest.mark.parametrize(
    ("free", "enough", "how"), [(6.5, 10, "in chunks of 3, because memory is short"), (1000, 3.25, "in chunks of 3")]
)
def test_a_chunk_is_no_larger_than_pays_and_fits_into_half_of_the_free_memory(monkeypatch, free, enough, how):
    tried, each = [], B * 100 * 4  # bytes that Tanh keeps: what it has made; the batch's inputs are there anyway
    monkeypatch.setattr("mbkit.training.chunks.free_memory", lambda device: int(free * each))
    monkeypatch.setitem(_ENOUGH, "cpu", int(enough * each))
    monkeypatch.setattr(
        "mbkit.training.chunks.call_models", lambda *call: tried.append(call[0].num_models) or plain(*call)
    )
    models = [nn.Sequential(nn.Linear(100, 100, bias=False), nn.Tanh(), nn.Linear(100, 1)) for _ in range(10)]
    batch = ModelBatch(models, shared_input=False)
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=0.1)
    stepper = Stepper(batch, optimizer, StepOptions(nn.functional.mse_loss))
    ways = []
    for _ in range(2):
        stepper.step(torch.randn(10, B, 100), torch.randn(10, B, 1))
        ways.append(stepper.how)
    assert ways == ["in chunks", how]
    assert tried == [4, 3, 3, 3, 3, 3, 1]


@pytest.mark.parametrize("num_models", [1, 3, 9])
def test_two_equal_runs_end_in_the_same_bits(monkeypatch, num_models):
    """Whatever a clock says: this one is never the same twice."""
    ticks = iter(torch.rand(10_000).tolist())
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    monkeypatch.setitem(_ENOUGH, "cpu", 18_000)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        batch = ModelBatch([Busy().float() for _ in range(num_models)], seeds=range(num_models))
        optimizer = OptimizerFactory(torch.optim.Adam).create_optimizer(batch, lr=0.01)
        history = fit(batch, optimizer, data(dtype=torch.float32) * 3, cross_entropy, progress=False)
        runs.append((history.how, history.loss, batch.state_dict()))
    assert runs[0][0] == runs[1][0] == {1: "one by one", 3: "all models at once", 9: "in chunks of 2"}[num_models]
    torch.testing.assert_close(runs[0][1:], runs[1][1:], rtol=0, atol=0)


@pytest.mark.parametrize(("width", "rest", "size", "how"), [
    (128, 3, "auto", "one by one"), (128, 3, None, "all models at once"), (8, 3, "auto", "all models at once"),
    (128, 2000, "auto", "all models at once"),
])  # fmt: skip
def test_mostly_wide_convolutions_go_one_by_one_unless_it_is_said_otherwise(width, rest, size, how):
    torch.manual_seed(0)
    layers = lambda: (nn.Conv2d(width, width, 3), nn.Flatten(), nn.Linear(width, rest))  # noqa: E731
    models = [nn.Sequential(*layers()).double() for _ in range(2)]
    batch = ModelBatch(models)
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=0.01)
    pairs = [(torch.randn(2, width, 3, 3).double(), torch.tensor([0, 2])) for _ in range(2)]
    assert fit(batch, optimizer, pairs, cross_entropy, chunk_size=size).how == how
    train_alone(models, pairs, loss_fn=cross_entropy, configs={"lr": 0.01})
    assert_same_models(batch, models)


def test_no_step_is_chosen_by_a_clock():
    for module in ("chunks", "options", "saved_bytes", "step"):
        assert "time" not in vars(importlib.import_module(f"mbkit.training.{module}"))


@pytest.mark.parametrize("chunk_size", ["auto", 2, None])
def test_inputs_for_another_number_of_models_are_refused(chunk_size):
    batch = ModelBatch(models_of(Busy), shared_input=False)
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=0.1)
    (x, y), *_ = data(each=True)
    with pytest.raises(ValueError, match=r"per-model input \[5, B, …\].*got \[6, 8, 2, 6, 6\]"):
        fit(batch, optimizer, [(torch.cat([x, x[:1]]), y)], cross_entropy, chunk_size=chunk_size)


def test_models_without_parameters_are_refused():
    batch = ModelBatch([nn.ReLU() for _ in range(2)])
    optimizer = torch.optim.SGD([torch.zeros(1)])
    with pytest.raises(ValueError, match="Expected models with parameters"):
        train_steps(batch, optimizer, data(), cross_entropy)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)])
def test_what_is_no_chunk_size_is_refused(value, error):
    batch = ModelBatch(models_of(Busy))
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, lr=0.1)
    with pytest.raises(error, match="chunk_size"):
        fit(batch, optimizer, data(), cross_entropy, chunk_size=value)


# ------------------------------------------------------------------ compiled


@pytest.mark.parametrize(
    ("optimizer_cls", "settings", "each"),
    [
        (torch.optim.Adam, {"weight_decay": 0.01}, False),
        pytest.param(torch.optim.SGD, {"momentum": 0.9}, True, marks=pytest.mark.slow),
        pytest.param(torch.optim.AdamW, {"amsgrad": True}, True, marks=pytest.mark.slow),
        pytest.param(torch.optim.RMSprop, {}, False, marks=pytest.mark.slow),
        pytest.param(torch.optim.NAdam, {}, False, marks=pytest.mark.slow),
        pytest.param(torch.optim.Adagrad, {}, False, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_step_changes_no_result_and_is_compiled_once(monkeypatch, optimizer_cls, settings, each):
    made = []
    real = torch._inductor.compile
    monkeypatch.setattr("torch._inductor.compile", lambda *args, **rest: made.append(1) or real(*args, **rest))
    history, batch = train(Steady, each, optimizer_cls, settings, compile=True)
    assert history.how == "compiled"
    assert len(made) == 1  # though the rate has changed with every step
    lone = torch.nn.Dropout(0.3)
    torch.manual_seed(0)
    for _ in range(STEPS):  # model 0's stream stands where its own stands after as many masks
        lone(torch.empty((B, 3, 4, 4)).double())
    assert torch.equal(batch.streams.on("cpu")[0].get_state(), torch.get_rng_state())


def step_of(models: list, cls: type = torch.optim.SGD, **settings) -> tuple[ModelBatch, CompiledStep]:
    batch = ModelBatch(models, seeds=range(M))
    optimizer = OptimizerFactory(cls).create_optimizer(batch, rates(**settings))
    return batch, CompiledStep(batch, optimizer, StepOptions(cross_entropy))


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x) if x.sum() > 0 else self.out(-x)


def hooked() -> nn.Module:
    model = nn.Linear(4, K)
    model.register_forward_hook(lambda module, args, output: output * 2)
    return model


@pytest.mark.parametrize(
    ("build", "optimizer_cls", "reason"),
    [
        (Branch, torch.optim.SGD, "because"),
        (hooked, torch.optim.SGD, "has hooks"),
        (lambda: nn.Linear(4, K), torch.optim.ASGD, "ASGD has no stacked rule"),
        (lambda: nn.Sequential(nn.Linear(4, K), nn.RReLU()), torch.optim.SGD, "runs model by model"),
    ],
)
def test_what_cannot_be_compiled_warns_once_and_trains_as_alone(build, optimizer_cls, reason):
    models = [build().double() for _ in range(M)]
    batch = ModelBatch([copy.deepcopy(model) for model in models], seeds=range(M))
    optimizer = OptimizerFactory(optimizer_cls).create_optimizer(batch, lr=RATES)
    pairs = [(torch.randn(B, 4).double(), torch.randint(K, (B,))) for _ in range(2)] * 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = fit(batch, optimizer, pairs, cross_entropy, compile=True, progress=False)
    told = [str(w.message) for w in caught if "compile=True" in str(w.message)]
    assert len(told) == 1
    assert reason in told[0]
    assert history.how == "all models at once"
    assert_as_plain(batch, models, pairs, cls=optimizer_cls)


def test_without_a_compiler_the_steps_run_uncompiled(monkeypatch):
    def refuse(*args, **rest):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr("torch._inductor.compile", refuse)
    with pytest.warns(UserWarning, match="compile=True: the steps run uncompiled, because .*no C"):
        history, _ = train(Steady, False, compile=True)
    assert history.how == "all models at once"


def test_what_would_not_fit_into_memory_as_one_function_runs_in_chunks(monkeypatch, graphs):
    monkeypatch.setattr("mbkit.training.compilable.free_memory", lambda device: 2 * 110_000)
    history, _ = train(Steady, False, compile=True)
    assert history.how == "compiled"
    monkeypatch.setattr("mbkit.training.compilable.free_memory", lambda device: 2 * 80_000)
    with pytest.warns(UserWarning, match="run uncompiled, because it might take 0.10 MB at once, with 0.08 left"):
        history, _ = train(Steady, False, compile=True, chunk_size=2)
    assert history.how == "in chunks of 2"


def test_a_mode_that_changes_is_compiled_anew(graphs):
    """A graph takes training and eval mode for granted, and must notice when they change."""
    models, pairs, modes = models_of(Steady), data(), [True, False, False, True]
    batch, step = step_of(models)
    for (x, y), mode in zip(pairs, modes, strict=True):
        context_of(batch).template.norm.train(mode)
        assert step.attempt(x, y) is not None
    assert len(graphs) == 2
    for m, model in enumerate(models):
        torch.manual_seed(m)
        lone = torch.optim.SGD(model.parameters(), lr=RATES[m])
        for (x, y), mode in zip(pairs, modes, strict=True):
            model.norm.train(mode)
            lone.zero_grad()
            cross_entropy(model(x), y).backward()
            lone.step()
    assert_states(batch, models)


class Edits(nn.Module):
    """Edits an activation through a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(4, 6), nn.Linear(6, K)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h.view(-1).mul_(1.5)
        return self.out(h)


class Strided(Edits):
    """Reads an activation by its strides."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.out(h + h.as_strided((len(x), 6), (6, 1)))


def folded() -> nn.Module:
    """Its activations are flattened by a copy, whose memory a traced step does not have."""
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(3, K))


@pytest.mark.parametrize("build", [Edits, Strided, folded])
def test_a_compiled_model_may_mind_how_its_activations_lie_in_memory(graphs, build):
    models = [build().double() for _ in range(M)]
    x, y = torch.randn(B, 4).double(), torch.randint(K, (B,))
    batch, step = step_of(models)
    for _ in range(3):
        assert step.attempt(x, y) is not None, step.reason
    assert_as_plain(batch, models, [(x, y)] * 3)


def test_a_compiled_step_leaves_no_gradient_and_gives_way_to_who_watches_one(graphs):
    models = [nn.Linear(4, K).double() for _ in range(M)]
    x, y = torch.randn(B, 4).double(), torch.randint(K, (B,))
    batch, step = step_of(models)
    for _ in range(2):
        batch(x).sum().backward()  # gradients of the user's own, which the next step clears, as any does
        assert step.attempt(x, y) is not None, step.reason
        assert all(p.grad is None for p in batch.parameters())
    assert_as_plain(batch, models, [(x, y)] * 2)
    before = {name: p.detach().clone() for name, p in batch.named_parameters()}
    batch.stacked_params["bias"].register_hook(lambda gradient: None)
    assert step.attempt(x, y) is None
    assert step.reason == "a parameter has hooks"
    torch.testing.assert_close(dict(batch.named_parameters()), before, rtol=0, atol=0)


@pytest.mark.parametrize("change", ["load", "clear", "cast"])
def test_a_compiled_step_takes_the_optimizers_state_as_it_is(graphs, change):
    models = [nn.Linear(4, K).double() for _ in range(M)]
    pairs = [(torch.randn(B, 4).double(), torch.randint(K, (B,))) for _ in range(6)]
    settings, saved = {"momentum": 0.9}, {}
    batch, step = step_of(models, **settings)
    optimizer = step.optimizer

    def between(i: int, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
        if change == "load" and i == 2:
            saved[optimizer] = copy.deepcopy(optimizer.state_dict())
        if change == "load" and i == 4:
            optimizer.load_state_dict(saved[optimizer])
        if change == "clear" and i == 4:
            optimizer.state.clear()
        if change == "cast" and i in (2, 4):
            model.to(torch.float32 if i == 2 else torch.float64)
            for state in optimizer.state.values() if model is not batch else []:  # torch leaves them as they are
                state["momentum_buffer"] = state["momentum_buffer"].to(next(model.parameters()).dtype)
        return x.to(next(model.parameters()).dtype)

    for i, (x, y) in enumerate(pairs):
        assert step.attempt(between(i, batch, optimizer, x), y) is not None
    bound = 1e-6 if change == "cast" else 1e-10
    for m, model in enumerate(models):
        lone = torch.optim.SGD(model.parameters(), lr=RATES[m], **settings)
        for i, (x, y) in enumerate(pairs):
            x = between(i, model, lone, x)
            lone.zero_grad()
            cross_entropy(model(x), y).backward()
            lone.step()
        mine = optimizer.state[batch.stacked_params["weight"]]["momentum_buffer"][m]
        torch.testing.assert_close(mine, lone.state[model.weight]["momentum_buffer"], rtol=0, atol=bound)
    assert_states(batch, models, bound)


def test_a_compiled_weights_gradient_lies_in_memory_as_the_weight_does(graphs):
    """Else the update reads it number by number, across the rows. Nor is a bias's summed model by model."""
    aten = torch.ops.aten
    models = [nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, K)).double() for _ in range(M)]
    pairs = [(torch.randn(7, 6).double(), torch.randint(K, (7,))) for _ in range(3)]
    batch, step = step_of(models, torch.optim.Adam)
    for x, y in pairs:
        _, outputs = step.attempt(x, y)
    assert outputs.shape == (M, 7, K)
    products = graphs[0].graph.find_nodes(op="call_function", target=aten.bmm.default)
    shapes = [tuple(p.shape) for p in batch.parameters()]
    gradients = [product for product in products if tuple(product.meta["val"].shape) in shapes]
    assert (len(products), len(gradients)) == (5, 2)  # forward, backward, and two weights' gradients
    assert all(user.target is not aten.transpose.int for product in gradients for user in product.users)
    clones = graphs[0].graph.find_nodes(op="call_function", target=aten.clone.default)
    copied = [node.meta["val"].shape for node in clones if node.users]
    assert not [shape for shape in copied if len(shape) == 3 and shape[:2] == (M, 7)]  # the next layer reads no copy
    assert not graphs[0].graph.find_nodes(op="call_function", target=aten.baddbmm.default)
    sums = graphs[0].graph.find_nodes(op="call_function", target=aten.sum.dim_IntList)
    assert not [node for node in sums if "val" in node.args[0].meta and node.args[0].meta["val"].dim() == 3]
    assert_as_plain(batch, models, pairs, cls=torch.optim.Adam)


def test_a_compiled_adam_works_out_its_bias_corrections_once_and_not_for_each_weight(graphs):
    _, step = step_of([nn.Linear(6, K) for _ in range(M)], torch.optim.Adam)
    _, outputs = step.attempt(torch.randn(B, 6), torch.randint(K, (B,)))
    assert outputs.shape == (M, B, K)
    kept = [tuple(node.meta["val"].shape) for node in graphs[0].graph.find_nodes(op="output")[0].args[0][2:]]
    assert kept.count((2, M)) == 2  # of two parameters, for both averages


@pytest.mark.parametrize(("fit_at_once", "size"), [(13, 13), (5, 13), (4, 4), (3, 3), (2, 2), (1, 1)])
def test_chunks_are_as_even_as_can_be(fit_at_once, size, monkeypatch):
    """Thirteen models of which five fit stay whole; of which four fit they go by four, four, four and one."""
    chunks = Chunks(ModelBatch([nn.Linear(2, 1) for _ in range(13)]))
    monkeypatch.setattr("mbkit.training.chunks.free_memory", lambda device: 1 << 40)
    chunks.bytes_each = _ENOUGH["cpu"] // fit_at_once
    assert chunks.largest(torch.device("cpu")) == size


class NeverClears(torch.optim.SGD):
    def zero_grad(self, set_to_none=True):
        pass


@pytest.mark.parametrize(("count", "size"), [(1, 1), (4, 1), (4, 2), (4, 4)])
def test_gradients_add_up_where_nobody_clears_them(count, size):
    models, data = [model.double() for model in classifiers(0.0)[:count]], [(x.double(), y) for x, y in points(3)]
    batch = ModelBatch(models)
    optimizer, chunks = NeverClears(batch.parameters(), lr=0.1), Chunks(batch, size)
    for x, y in data:
        make_update(optimizer, chunks, x, y, StepOptions(cross_entropy))
    for model in models:
        alone = NeverClears(model.parameters(), lr=0.1)
        for x, y in data:
            cross_entropy(model(x), y).backward()
            alone.step()
    assert_same_models(batch, models)
