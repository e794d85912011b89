"""Mixed precision: under `torch.autocast` each operator gets the dtype that it gets for a model alone.

torch casts below vmap, after vmap has taken operators apart: a convolution or a bias then stays in float32. So the
casts are made here, above vmap, by torch's own lists, and the operator runs with autocast off. On a CPU this is tested
for every kind of layer with bfloat16; the casts of CUDA follow the same lists and have not been run.

One dtype differs: alone, encoder layers take a fused path in eval without gradients, whose output is bfloat16; a batch
takes the other path, whose output is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

# Operators that run in the low precision; all others that torch registers for autocast run in float32.
_LOW = """_addmm_activation _convolution _native_multi_head_attention addbmm addmm addmv addr baddbmm bmm chain_matmul
    conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d convolution einsum
    linalg_multi_dot linalg_vecdot linear matmul mm mv prelu scaled_dot_product_attention""".split()
# Those that only bring their arguments together, as vmap does anyway, or that have kernels of their own.
_OTHERS = """addcdiv addcmul atan2 bilinear cat cross dot grid_sampler index_copy index_put mkldnn_rnn_layer scatter_add
    stack tensordot vdot""".split()
_NAMES = {"nll_loss_nd": "nll_loss", "rpow": "pow", "rmatmul": "matmul", "special_expm1": "expm1"}
# Their CPU kernels take an activation in low precision with a float32 weight and return the activation's dtype.
_MIXED = ("batch_norm", "group_norm", "instance_norm", "layer_norm", "native_batch_norm", "native_layer_norm")


@cache
def _registered(device: str) -> frozenset[str]:
    key = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}.get(device)
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = (name for name in torch._C._dispatch_get_all_op_names() if key and name.startswith("aten::"))
    return frozenset(name[6:].split(".")[0] for name in names if has(name, key))


@cache
def _policy(function: Callable, device: str) -> str | None:
    name = getattr(function, "__name__", "").strip("_")
    name = _NAMES.get(name, name)
    if name not in _registered(device):
        return "mixed" if name in _MIXED else None
    return "low" if name in _LOW else None if name in _OTHERS else "full"


def call_cast(device: str, run: Callable[..., Any], function: Callable, args: tuple, kwargs: dict) -> Any:
    """Call `run(function, args, kwargs)` with the arguments cast as `torch.autocast` casts them for one model.

    Args:
        device: the device type whose autocast is on.
        run: calls the operator.
        function: the operator.
        args, kwargs: its arguments.
    """
    policy = _policy(function, device)
    if policy is None:
        return run(function, args, kwargs)
    low = torch.get_autocast_dtype(device)
    if policy == "mixed":
        with autocast_off(device):
            return _mixed(run, function, args, kwargs, low)
    dtype = low if policy == "low" else torch.float32

    def cast(t: Tensor) -> Tensor:
        right_place = t.is_floating_point() and t.device.type == device and t.dtype != torch.float64
        return t.to(dtype) if right_place else t

    args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
    with autocast_off(device):
        return run(function, args, kwargs)


def _mixed(run: Callable[..., Any], function: Callable, args: tuple, kwargs: dict, low: torch.dtype) -> Any:
    """Run a normalisation in float32 and return the activation's dtype, where that is a low one."""
    x = args[0] if args else kwargs.get("input")
    if not isinstance(x, Tensor) or x.dtype != low:
        return run(function, args, kwargs)
    args, kwargs = tree_map_only(Tensor, lambda t: t.float() if t.dtype == low else t, (args, kwargs))
    return tree_map_only(Tensor, lambda t: t.to(low), run(function, args, kwargs))


def check_autocast(dtype: Any) -> None:
    """Refuse what models cannot be trained in by `torch.autocast` alone (TypeError, ValueError); None is allowed."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"Expected autocast as a dtype or None, got {dtype!r}: pass torch.bfloat16.")
    if dtype not in (None, torch.bfloat16):
        raise ValueError(
            f"Expected autocast as torch.bfloat16 or None, got {dtype}: float16 needs a scaler of the losses, so "
            "write that loop yourself, with torch.autocast and mbkit.GradScaler."
        )


def autocast_to(dtype: torch.dtype | None, model: nn.Module) -> AbstractContextManager:
    """Return a block under `torch.autocast` of a model's device, to enter as often as you like; for None, of no effect.

    Raises:
        TypeError, ValueError: as `check_autocast`.
    """
    check_autocast(dtype)
    kind = next((p.device.type for p in model.parameters()), "cpu")
    return nullcontext() if dtype is None else torch.autocast(kind, dtype)


def autocast_off(device: str) -> AbstractContextManager:
    """Return a block without autocast for a device type: what follows the loss runs outside it, as torch advises."""
    is_on = torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device)
    return _off(device) if is_on else nullcontext()


@contextmanager
def _off(device: str) -> Iterator[None]:
    torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, True)
