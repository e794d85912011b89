"""Every name of torch's that mbkit uses though torch does not promise it: why, and which public way was tried.

A release of torch can take such a name away. The check at import then says which ones are missing, once, instead of an
AttributeError somewhere in a training run. A test holds the table against the source.
"""

from __future__ import annotations

import pkgutil
from typing import Any

import torch

_TESTED = "2.9 to 2.14"

# name: what it is for; the public way that was tried, and what it lacks
PRIVATE = {
    "torch.utils._pytree": "tensors in nested arguments; there is no public walk, nn.Module's does not see arguments",
    "torch.utils._python_dispatch.TorchDispatchMode": "sizes of what is made; saved_tensors_hooks sees what is kept",
    "torch._C._functorch._add_batch_dim": "enter vmap with flat tensors; torch.vmap takes a tenth of a small step more",
    "torch._C._functorch._remove_batch_dim": "leave vmap likewise",
    "torch._C._functorch._vmap_increment_nesting": "enter vmap likewise",
    "torch._C._functorch._vmap_decrement_nesting": "leave vmap likewise",
    "torch._C._functorch._set_vmap_fallback_warning_enabled": "silence vmap on loops; warnings filters are everybody's",
    "torch._functorch.vmap.lazy_load_decompositions": "what torch.vmap does before its first call",
    "torch._C._functorch.get_unwrapped": "the stack that one model's tensor stands for; an autograd.Function with a "
    "vmap staticmethod gives it too, at six times the cost of a call",
    "torch._C._functorch.is_batchedtensor": "likewise",
    "torch._C._functorch.is_gradtrackingtensor": "tell a transform of the model's own; there is no public question",
    "torch._C._functorch.maybe_current_level": "likewise",
    "torch._C._functorch.maybe_get_bdim": "where the models' dimension is; likewise",
    "torch._C._functorch.pop_dynamic_layer_stack": "run a rule below vmap, the quick way",
    "torch._C._functorch.push_dynamic_layer_stack": "likewise",
    "torch._functorch.pyfunctorch.temporarily_pop_interpreter_stack": "likewise, where random numbers may be drawn",
    "torch._C._autograd._top_saved_tensors_default_hooks": "notice checkpointing in vmap; there is no public question",
    "torch._C._current_graph_task_id": "tell one backward pass from another; hooks are not told",
    "torch._C._current_autograd_node": "the node that a hook belongs to; likewise",
    "torch.autograd.Variable._execution_engine.queue_callback": "act at a backward pass's end; hooks need the leaves",
    "torch._C.DisableTorchFunction": "run a call with no mode on; torch.overrides has only the mode's own way out",
    "torch._C._is_any_autocast_enabled": "a quick question before the slow one for each device",
    "torch._C._dispatch_get_all_op_names": "which operators autocast casts; the list is only in the documentation",
    "torch._C._dispatch_has_kernel_for_dispatch_key": "likewise",
    "torch._C._nn": "functions that torch.nn.functional calls, under the names that a mode is given",
    "torch._fused_adam_": "the kernel of torch.optim.Adam(fused=True), per model; the class has one rate for a group",
    "torch._fused_adamw_": "likewise",
    **dict.fromkeys(
        [f"torch._foreach_{name}" for name in "add_ addcdiv_ addcmul_ div div_ lerp_ mul mul_ sqrt".split()],
        "one call for all parameters in an update; torch's own foreach optimizers have one learning rate a group",
    ),
    "torch._is_all_true": "a compiled step sees what torch.distributions checks; all() is also what models branch on",
    "torch._pack_padded_sequence": "the rule of what torch.nn.utils.rnn calls, which is this",
    "torch._pad_packed_sequence": "likewise",
    "torch._scaled_dot_product_attention_math": "attention with masks drawn before; the public function draws its own",
    "torch.autograd._profiler_enabled": "a step without its range where nobody measures; there is no public question",
    "torch.optim.optimizer._global_optimizer_post_hooks": "likewise where no hook of all optimizers looks on",
    "torch.optim.optimizer._global_optimizer_pre_hooks": "likewise",
    "torch.nn.modules.dropout._DropoutNd": "every dropout layer; the public classes have no public parent",
    "torch.nn.modules.module._global_backward_hooks": "notice hooks on all modules; there is no public question",
    "torch.nn.modules.module._global_backward_pre_hooks": "likewise",
}

# Needed by compile=True alone, and looked for when a step is first compiled.
PRIVATE_OF_COMPILE = {
    "torch._inductor.compile": "compile a graph that is traced already; torch.compile traces again, and stops at modes",
    "torch._guards.TracingContext": "let inductor keep a graph for other processes; torch.compile sets one itself",
    "torch._guards.tracing": "likewise",
    "torch._subclasses.FakeTensorMode": "likewise",
    "torch._ops.OpOverload": "read a traced graph; torch.fx names operators, and does not tell their schemas",
}


def missing_names(names: Any = tuple(PRIVATE)) -> list[str]:
    """Return those of some dotted names that the installed torch does not have."""
    missing = []
    for name in names:
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            missing.append(name)
    return missing


def check_torch() -> None:
    """Refuse a torch that lacks something that mbkit needs.

    Raises:
        ImportError: names what is missing, and what it is for.
    """
    missing = missing_names()
    if missing:
        told = "".join(f"\n  {name} ({PRIVATE[name].split(';')[0]})" for name in missing)
        tested = f"mbkit is tested with torch {_TESTED}, and torch {torch.__version__} has not all that it needs"
        raise ImportError(f"{tested}:{told}\nInstall a torch of that range.")
