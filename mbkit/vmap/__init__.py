"""What an operator does when M models call it at once, wherever `torch.vmap` alone is wrong, slow or silent.

`Interception` sees every call before vmap does and looks it up in one table of rules, a file a family: linear layers,
losses, convolution, randomness, recurrent kernels, embedding, and reads of Python values. `model_by_model` is the rule
of last resort: exact for any operator, at the speed of a loop.
"""

from .errors import BatchingError, module_path, running_modules
from .layer_loop import call_in_turn, loop_inside, tensors_in
from .mode import Interception
from .module_copy import (
    HOOKS,
    OUTPUT,
    Own,
    State,
    fill,
    flattened,
    is_leaf,
    merge,
    mix,
    named_modules,
    outcome,
    read_state,
    replica,
    write_state,
)
from .per_model import PerModel
from .rules.convolution import LayoutMatters, is_folded
from .rules.randomness import Streams
from .snapshot import Look, is_watched, place
from .unwrap import stack_alike
from .used_gradients import mark_rows, note_reached, reached_models, watch

__all__ = [
    "HOOKS",
    "OUTPUT",
    "BatchingError",
    "Interception",
    "LayoutMatters",
    "Look",
    "Own",
    "PerModel",
    "State",
    "Streams",
    "call_in_turn",
    "fill",
    "flattened",
    "is_folded",
    "is_leaf",
    "is_watched",
    "loop_inside",
    "mark_rows",
    "merge",
    "mix",
    "module_path",
    "named_modules",
    "note_reached",
    "outcome",
    "place",
    "reached_models",
    "read_state",
    "replica",
    "running_modules",
    "stack_alike",
    "tensors_in",
    "watch",
    "write_state",
]
