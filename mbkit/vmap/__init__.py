"""What an operator does when M models call it at once, wherever `torch.vmap` alone is wrong, slow or silent.

`Interception` sees every call before vmap does and looks it up in one table of rules, a file a family: linear layers,
losses, convolution, randomness, recurrent kernels, embedding, and reads of Python values. `model_by_model` is the rule
of last resort: exact for any operator, at the speed of a loop.
"""

from .errors import BatchingError, module_path, running_modules
from .gradients import mark_rows, models_with_gradient, note_models_with_gradient, separate_gradients, watch_backward
from .layer_loop import Failure, call_in_turn, loop_inside, tensors_in
from .mode import Interception
from .module_copy import (
    HOOKS,
    OUTPUT,
    PerModelValue,
    State,
    copy_module,
    flattened,
    is_leaf,
    materialize,
    merge,
    mix,
    named_modules,
    outcome,
    read_state,
    write_state,
)
from .per_model import PerModel
from .rules.convolution import LayoutMatters, is_folded
from .snapshot import has_grad_hooks, place, version
from .streams import SharedDraw, Streams
from .unwrap import stack_alike

__all__ = [
    "HOOKS",
    "OUTPUT",
    "BatchingError",
    "Failure",
    "Interception",
    "LayoutMatters",
    "PerModel",
    "PerModelValue",
    "SharedDraw",
    "State",
    "Streams",
    "call_in_turn",
    "copy_module",
    "flattened",
    "has_grad_hooks",
    "is_folded",
    "is_leaf",
    "loop_inside",
    "mark_rows",
    "materialize",
    "merge",
    "mix",
    "models_with_gradient",
    "module_path",
    "named_modules",
    "note_models_with_gradient",
    "outcome",
    "place",
    "read_state",
    "running_modules",
    "separate_gradients",
    "stack_alike",
    "tensors_in",
    "version",
    "watch_backward",
    "write_state",
]
