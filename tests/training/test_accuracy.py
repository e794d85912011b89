"""Accuracy against counting one by one; evaluate leaves no trace."""

import pytest
import torch
from torch import nn

from mbkit.batch.call import call_models as plain
from mbkit.batch.model_batch import ModelBatch
from mbkit.training.evaluation import batch_accuracy, evaluate

M, B, T, K = 3, 6, 4, 5


def slowly(outputs, labels):
    """Share of rows whose largest output is the label's, in plain Python; outputs [N, K], labels [N]."""
    right = [max(range(len(row)), key=row.__getitem__) == label for row, label in zip(outputs, labels, strict=True)]
    return sum(right) / len(right)


def test_a_batchs_accuracy_is_the_share_counted_one_by_one():
    out, y = torch.randn(M, B, T, K), torch.randint(K, (B, T))
    expected = [slowly(o.reshape(-1, K).tolist(), y.flatten().tolist()) for o in out]
    assert batch_accuracy(out, y).tolist() == pytest.approx(expected)
    assert batch_accuracy(out.transpose(2, 3), y).tolist() == pytest.approx(expected)  # cross_entropy's own order
    assert batch_accuracy(out, y.expand(M, B, T)).tolist() == pytest.approx(expected)
    out, y = torch.randn(M, B, K), torch.randint(K, (M, B))  # labels of each model's own
    assert batch_accuracy(out, y).tolist() == pytest.approx([slowly(out[m].tolist(), y[m].tolist()) for m in range(M)])
    ignored = torch.tensor([0, 1, -100, 0])
    assert batch_accuracy(torch.eye(4).expand(2, 4, 4), ignored).tolist() == pytest.approx([2 / 3] * 2)


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [
        ((torch.randn(M, B, K),), torch.zeros(B, dtype=torch.int64)),
        (torch.randn(M, B, K), torch.zeros(B)),
        (torch.randn(M, B, K), torch.zeros(B, dtype=torch.bool)),
        (torch.zeros(M, B, K, dtype=torch.int64), torch.zeros(B, dtype=torch.int64)),
        (torch.randn(M, B), torch.zeros(B, dtype=torch.int64)),
        (torch.randn(M, B, 1), torch.zeros(B, dtype=torch.int64)),  # a count to be predicted, not a class
        (torch.randn(M, B, K, K), torch.zeros(B, K, dtype=torch.int64)),  # either order of dimensions would fit
        (torch.randn(M, B, K), torch.zeros(B, K, dtype=torch.int64)),
    ],
    ids=["nested", "float targets", "yes or no", "whole outputs", "no classes", "one class", "either order", "one-hot"],
)
def test_undefined(outputs, targets):
    assert batch_accuracy(outputs, targets) is None


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.9), nn.Sequential(nn.Linear(8, K)))


@pytest.fixture
def case():
    torch.manual_seed(0)
    models = [net() for _ in range(M)]
    pairs = [(torch.randn(n, 4), torch.randint(K, (n,))) for n in (B, B, 2)]
    expected = []
    for model in models:
        model.eval()
        with torch.no_grad():
            out = torch.cat([model(x) for x, _ in pairs])
        expected.append(slowly(out.tolist(), torch.cat([y for _, y in pairs]).tolist()))
        model.train()
    return models, pairs, expected


def test_every_form_of_models(case):
    models, pairs, expected = case
    assert evaluate(models, pairs).tolist() == pytest.approx(expected, abs=0)
    assert evaluate(ModelBatch(models), pairs).tolist() == pytest.approx(expected, abs=0)
    assert evaluate(models[1], iter(pairs)).tolist() == pytest.approx(expected[1:2], abs=0)
    each = [(x.expand(M, *x.shape), y) for x, y in pairs]
    assert evaluate(models, each, shared_input=False).tolist() == pytest.approx(expected, abs=0)
    assert evaluate(ModelBatch(models, shared_input=False), each).tolist() == pytest.approx(expected, abs=0)
    own_data = ModelBatch(models, shared_input=False)  # and one test set for all
    assert evaluate(own_data, pairs, shared_input=True).tolist() == pytest.approx(expected, abs=0)
    assert not own_data.shared_input
    assert evaluate(ModelBatch(models), each, shared_input=False).tolist() == pytest.approx(expected, abs=0)


class Counting(nn.Module):
    """Assigns a buffer anew in every call, and draws."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, K)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.seen = self.seen + x.sum() * self.layer.bias[0]
        return self.layer(nn.functional.dropout(x)) + self.seen


@pytest.mark.parametrize("shared", [True, False])
def test_chunks_of_models_where_all_do_not_fit(monkeypatch, shared):
    torch.manual_seed(0)
    models = [Counting() for _ in range(10)]
    pairs = [(torch.randn(n, 4), torch.randint(K, (n,))) for n in (B, B, 2)]
    if not shared:
        pairs = [(x * torch.rand(10, 1, 1), y.repeat(10, 1)) for x, y in pairs]
    batch = ModelBatch(models, shared, seeds=range(10))
    expected = []
    for m, model in enumerate(models):
        torch.manual_seed(m)
        with torch.no_grad():
            out = torch.cat([model.eval()(x if shared else x[m]) for x, _ in pairs])
        expected.append(slowly(out.tolist(), torch.cat([y if shared else y[m] for _, y in pairs]).tolist()))
    sizes = []
    monkeypatch.setattr("mbkit.training.chunks.free_memory", lambda device: 2 * 3.5 * weight)
    for place in ("mbkit.training.chunks", "mbkit.batch.model_batch"):
        counting = lambda *call: sizes.append(call[0].num_models) or plain(*call)  # noqa: E731
        monkeypatch.setattr(f"{place}.call_models", counting)
    # a call makes the mask, which is 1 byte each before it is scaled, the dropped input, the products and sums
    weight = 2 * B * 4 * 4 + 2 * B * K * 4
    assert evaluate(batch, pairs).tolist() == pytest.approx(expected, abs=0)
    assert sizes[0] == 4  # the first ones are weighed
    assert 1 <= sizes[1] <= 3
    torch.testing.assert_close(batch.seen, torch.stack([model.seen for model in models]))
    sizes.clear()
    monkeypatch.setattr("mbkit.training.chunks.free_memory", lambda device: 1 << 30)
    evaluate(batch, pairs)
    assert sizes == [4, 6, 10, 10]


class OwnMode(nn.Module):
    """Reads its own flag, so a stale one would show."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, K)

    def forward(self, x):
        return self.layer(x) + (1.0 if self.training else 0.0)


@pytest.mark.parametrize("wrap", [lambda models: models, ModelBatch], ids=["list", "batch"])
@pytest.mark.parametrize("error", [False, True])
def test_no_trace_is_left(case, wrap, error):
    models, pairs, _ = case
    for model in models:
        model[1].eval()
        model[3].eval()
        model[3][0].train()
    subject = wrap(models)
    modules = [subject] if isinstance(subject, nn.Module) else subject
    modes = [part.training for module in modules for part in module.modules()]
    state = [t.clone() for module in modules for t in (*module.parameters(), *module.buffers())]
    random, graphs = torch.get_rng_state(), []
    models[0][0].register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    if error:
        with pytest.raises(ValueError, match="got outputs"):
            evaluate(subject, [(pairs[0][0], torch.zeros(B))])
    else:
        evaluate(subject, pairs)
    assert torch.is_grad_enabled()
    assert not any(graphs)
    assert graphs or wrap is ModelBatch
    assert [part.training for module in modules for part in module.modules()] == modes
    after = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    assert all(map(torch.equal, state, after))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for module in modules for p in module.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_a_batch_is_back_in_its_own_mode_as_a_whole(training):
    torch.manual_seed(0)
    batch = ModelBatch([OwnMode() for _ in range(M)]).train(training)
    x = torch.randn(B, 4)
    before = batch(x)
    evaluate(batch, [(x, torch.zeros(B, dtype=torch.int64))])
    assert torch.equal(batch(x), before)


@pytest.mark.parametrize(
    ("models", "batches", "error", "text"),
    [
        ([], [], ValueError, "a list of modules"),
        ([1], [], TypeError, "a list of modules"),
        (nn.Linear(4, K), [], ValueError, "at least one batch"),
        (nn.Linear(4, K), 3, TypeError, "iterable"),
        (nn.Linear(4, K), [torch.randn(B, 4)], TypeError, "pair"),
        (
            nn.Linear(4, K),
            [(torch.randn(B, 4), torch.randn(B, K))],
            ValueError,
            r"float32 \[1, 6, 5\] and labels float32",
        ),
        (nn.LSTM(4, K), [(torch.randn(B, 4), torch.zeros(B).long())], ValueError, "no single tensor"),
    ],
)
def test_bad_input_is_refused(models, batches, error, text):
    with pytest.raises(error, match=text):
        evaluate(models, batches)


def test_inside_one_autocast_the_weights_are_those_of_now():
    model, x, y = nn.Linear(4, 2), torch.randn(6, 4), torch.zeros(6, dtype=torch.int64)
    nn.init.zeros_(model.weight)
    with torch.autocast("cpu", torch.bfloat16):
        for winner in (0, 1):
            with torch.no_grad():
                model.bias.copy_(torch.nn.functional.one_hot(torch.tensor(winner), 2))
            assert evaluate(model, [(x, y)]).item() == 1.0 - winner
        model(x).sum().backward()  # casts made without gradients must not be used again
    assert model.weight.grad is not None
    assert model.bias.grad is not None


class RSquared:
    """A metric that is no mean over batches, in torchmetrics' form."""

    def __init__(self):
        self.seen = []

    def update(self, outputs, targets):
        self.seen.append((outputs, targets))

    def compute(self):
        out, y = (torch.cat(column) for column in zip(*self.seen, strict=True))
        return 1 - (out - y).square().sum() / (y - y.mean(0)).square().sum()


def share_of_positive(outputs, targets):
    positive = targets > 0
    return ((outputs > 0) & positive).sum(), positive.sum()


METRICS = {
    "a mean": (nn.functional.mse_loss, lambda out, y: nn.functional.mse_loss(out, y)),
    "a python number": (lambda out, y: (out - y).abs().mean().item(), lambda out, y: (out - y).abs().mean()),
    "total and count": (share_of_positive, lambda out, y: ((out > 0) & (y > 0)).sum() / (y > 0).sum().double()),
    "an object": (RSquared(), lambda out, y: 1 - (out - y).square().sum() / (y - y.mean(0)).square().sum()),
}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("wrap", [lambda models, _: models, ModelBatch], ids=["list", "batch"])
@pytest.mark.parametrize("name", METRICS)
def test_any_metric(name, wrap, shared):
    metric, over_all = METRICS[name]
    models = [net().double() for _ in range(M)]
    lead = () if shared else (M,)
    pairs = [(torch.randn(*lead, n, 4).double(), torch.randn(*lead, n, K).double()) for n in (B, B, 3)]
    got = evaluate(wrap(models, shared), pairs, metric=metric, shared_input=shared)
    expected = []
    for m, model in enumerate(models):
        own = pairs if shared else [(x[m], y[m]) for x, y in pairs]
        with torch.no_grad():
            out = torch.cat([model.eval()(x) for x, _ in own])
        expected.append(over_all(out, torch.cat([y for _, y in own])).item())
        model.train()
    assert got.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("metric", "error", "text"),
    [(3, TypeError, "Expected metric"), (lambda out, y: out, ValueError, "returns one number, or .total, count., got")],
)
def test_what_is_no_metric(metric, error, text):
    with pytest.raises(error, match=text):
        evaluate(nn.Linear(4, K), [(torch.randn(B, 4), torch.zeros(B))], metric=metric)
