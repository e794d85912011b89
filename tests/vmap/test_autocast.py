"""Under torch.autocast every layer of a batch has the dtype that it has alone, and its values up to bfloat16's own."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import pytest
import torch
from exactness_check import SEEDS, M, batch_inputs, build, inputs, loss_of
from exactness_habits import CASES
from test_exactness import REFUSED
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mbkit import ModelBatch
from mbkit.vmap.autocast import _policy

# torch takes a fused path for encoder layers in eval without gradients, whose output is bfloat16; a batch takes the
# other path, whose output is float32.
OTHER_DTYPE = {"TransformerEncoderLayer(p=0.0) eval, no_grad", "TransformerEncoderLayer(p=0.1) eval, no_grad"}
FAST = """Linear|Linear(bias=False)|Conv2d|BatchNorm2d train|GroupNorm|LayerNorm|MultiheadAttention(dropout=0.3)|GRU
    RNN|GRUCell|Softmax|Bilinear|Dropout|Embedding|SDPA|einsum|matmul|CrossEntropyLoss|MSELoss""".replace("\n", "|")
FAST = {name.strip() for name in FAST.split("|")} & CASES.keys()


class Run(NamedTuple):
    """Outputs with the loss, and gradients, of each model."""

    outputs: list[list[Tensor]]
    grads: list[dict[str, Tensor]]


def alone(case, shared: bool, autocast: bool = True) -> Run:
    run = Run([], [])
    for m, model in enumerate(build(case)):
        torch.manual_seed(SEEDS[m])
        x = inputs(case, 0, 0 if shared else m, torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.set_grad_enabled(case.grad):
            outputs = model(*x)
            loss = loss_of(outputs)
        if loss.requires_grad:
            loss.backward()
        run.outputs.append([t.detach() for t in (*tree_leaves(outputs), loss) if isinstance(t, Tensor)])
        run.grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    return run


def batched(case, shared: bool) -> Run:
    batch, run = ModelBatch(build(case), shared_input=shared, seeds=SEEDS), Run([], [])
    x = batch_inputs(case, shared, 0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(case.grad):
        outputs = batch(*x)
        losses = batch.compute_loss(outputs, torch.zeros(()), loss_of, reduction="none")
    if losses.requires_grad:
        losses.sum().backward()
    assert torch.is_autocast_enabled("cpu") is False
    for m in range(M):
        run.outputs.append([t.detach()[m] for t in (*tree_leaves(outputs), losses) if isinstance(t, Tensor)])
        run.grads.append({name: p.grad[m] for name, p in batch.named_parameters() if p.grad is not None})
    return run


def assert_within_the_noise(got: Tensor, expected: Tensor, exact: Tensor, size: float, what: str) -> None:
    """No further from alone than twice bfloat16's distance from float32, or two units of the largest's last place.

    The loss is a mean of terms of both signs, so the largest output counts there.
    """
    wide = torch.complex128 if got.is_complex() else torch.float64
    got, expected, exact = (t.to(wide) for t in (got, expected, exact))
    noise = (expected - exact).abs().max().item() if expected.numel() else 0.0
    if not noise < torch.inf:  # NaN or infinity: its place counts
        assert torch.equal(got.isfinite(), expected.isfinite()), what
        return
    difference = (got - expected).abs().max().item() if got.numel() else 0.0
    assert difference <= 2 * noise + 2 * size * 2**-8 + 1e-6, f"{what}: {difference:.1e}, noise {noise:.1e}"


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        pytest.param(
            name, shared, id=f"{name} {'shared' if shared else 'own'}", marks=() if name in FAST else pytest.mark.slow
        )
        for name in CASES
        if name not in REFUSED and not name.endswith(", below")
        for shared in (True, False)
    ],
)
def test_the_dtypes_and_values_that_it_has_alone(name, shared):
    case = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, and that a layer runs model by model
        try:
            expected = alone(case, shared)
        except RuntimeError as error:
            pytest.skip(f"alone, torch says: {error}")
        exact, got = alone(case, shared, autocast=False), batched(case, shared)
    for m in range(M):
        size = largest(expected.outputs[m])
        for i, (a, b, c) in enumerate(zip(got.outputs[m], expected.outputs[m], exact.outputs[m], strict=True)):
            assert a.dtype == b.dtype or name in OTHER_DTYPE
            if b.is_floating_point() or b.is_complex():
                assert_within_the_noise(a, b, c, size, f"output {i} of model {m}")
        size = largest(expected.grads[m].values())
        assert got.grads[m].keys() == expected.grads[m].keys()
        for key, b in expected.grads[m].items():
            a = got.grads[m][key]
            assert a.dtype == b.dtype
            assert_within_the_noise(a, b, exact.grads[m][key], size, f"gradient of {key} of model {m}")


def largest(tensors) -> float:
    """The largest absolute value that is finite."""
    sizes = [t.abs().nan_to_num(posinf=0.0).max().item() for t in tensors if t.is_floating_point() and t.numel()]
    return max(sizes, default=0.0)


LAYERS = {
    "linear": lambda: nn.Linear(8, 6, bias=False),
    "mean squared error": nn.Identity,
}


@pytest.mark.parametrize("layer", LAYERS)
def test_the_same_kernels_give_the_same_bits(layer):
    models = [LAYERS[layer]() for _ in range(M)]
    batch, x, y = ModelBatch(models), torch.randn(4, 8), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = batch(x)
        losses = batch.compute_loss(outputs, y[:, : outputs.shape[-1]], nn.functional.mse_loss, reduction="none")
        for m, model in enumerate(models):
            expected = model(x)
            loss = nn.functional.mse_loss(expected, y[:, : expected.shape[-1]])
            assert outputs.dtype == expected.dtype
            assert torch.equal(outputs[m], expected)
            assert (losses.dtype, losses[m].item()) == (loss.dtype, pytest.approx(loss.item(), rel=1e-6))


def test_switched_off_inside_the_model():
    class Careful(nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                y = super().forward(x)
            return y, super().forward(x)

    models = [Careful(3, 2) for _ in range(M)]
    batch, x = ModelBatch(models), torch.randn(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = batch(x)
    assert [t.dtype for t in outputs] == [torch.float32, torch.bfloat16]
    outputs = batch(x)  # and without
    assert [t.dtype for t in outputs] == [torch.float32, torch.float32]


def test_what_cuda_would_cast():
    """No GPU needed: the lists are torch's own, by the dispatcher."""
    expected = {torch.conv2d: "low", torch._C._nn.linear: "low", torch.Tensor.__matmul__: "low", torch.bmm: "low"}
    expected |= {torch.softmax: "full", torch.layer_norm: "full", torch.exp: "full", torch.Tensor.__pow__: "full"}
    expected |= {torch._C._nn.nll_loss_nd: "full", torch.relu: None, torch.cat: None, torch.Tensor.add: None}
    expected |= {torch.batch_norm: "mixed", torch._C._nn.scaled_dot_product_attention: "low"}
    assert {function: _policy(function, "cuda") for function in expected} == expected


@pytest.mark.parametrize(
    "norm", [lambda: nn.BatchNorm2d(4), lambda: nn.GroupNorm(2, 4), lambda: nn.InstanceNorm2d(4, affine=True)]
)
def test_normalisation_behind_a_convolution(norm):
    """In low precision its input and its weights have two dtypes; the running statistics stay in float32."""
    models = [nn.Sequential(nn.Conv2d(3, 4, 3), norm(), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)) for _ in range(M)]
    seen: dict[str, list[torch.dtype]] = {}

    def spy(where):
        return lambda module, inputs, output: seen.setdefault(where, []).append(output.dtype)

    batch, x = ModelBatch(models), torch.randn(6, 3, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        got = batch(x)
        for m, model in enumerate(models):
            handles = [layer.register_forward_hook(spy("alone")) for layer in model]
            expected = model(x)
            for handle in handles:
                handle.remove()
            assert got.dtype == expected.dtype
            assert torch.allclose(got[m], expected, rtol=3e-2, atol=3e-2)
            for name, value in model.named_buffers():
                other = batch.get_buffer(name)[m]
                assert other.dtype == value.dtype
                assert torch.allclose(other, value, rtol=1e-2, atol=1e-2)
        for i in range(1, 6):
            part = ModelBatch([model[:i] for model in models])
            seen.setdefault("batch", []).append(part(x).dtype)
    assert seen["batch"] == seen["alone"][:5]
