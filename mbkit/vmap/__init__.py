"""What M models do when they are called at once, wherever `torch.vmap` alone is wrong, slow or silent.

`RuleMode` sees every operator before vmap does and looks it up among the rules, which `rules` holds, one file a family
of layers. `in_turn` is the way of last resort: exact whatever is called, at the speed of a loop.
"""

from ..common.objects import PerModelValue
from . import rules
from .autocast import autocast_off, autocast_to, check_autocast
from .errors import (  # fmt: skip
    BatchingError,
    ClosedOutput,
    SharedInput,
    WholeInTurn,
    call_named,
    has_method,
    module_path,
    running_modules,
)
from .gradients import (
    graph_nodes,
    mark_rows,
    models_with_gradient,
    note_models_with_gradient,
    separate_gradients,
    watch_backward,
)
from .in_turn import Failure, call_in_turn, loop_inside
from .layout import LayoutMatters, is_channels_last, is_folded
from .mode import RuleMode
from .module_copy import ModuleCopy, copy_module, materialize, merge
from .per_model import PerModel
from .registry import Pass
from .rules.rectified import show_gradient
from .shared_objects import SharedObjects
from .snapshot import has_grad_hooks, place, version
from .state import (
    HOOKS,
    OUTPUT,
    Absent,
    OnStack,
    State,
    keep_hooks,
    modules_of,
    new_hooks,
    tensors_in,
    write_changes,
    write_state,
)  # fmt: skip
from .streams import SharedDraw, Streams, TracedStreams, rows_like
from .unwrap import as_one_model_sees, as_stacked, given_to_models, memory_order, own_rows, stack_alike

__all__ = [
    "HOOKS", "OUTPUT", "Absent", "BatchingError", "ClosedOutput", "Failure", "LayoutMatters", "ModuleCopy", "OnStack",
    "Pass", "PerModel", "PerModelValue", "RuleMode", "SharedDraw", "SharedInput", "SharedObjects", "State", "Streams",
    "TracedStreams", "WholeInTurn", "as_one_model_sees", "as_stacked", "autocast_off", "autocast_to", "call_in_turn",
    "call_named", "check_autocast", "copy_module", "given_to_models", "graph_nodes", "has_grad_hooks", "has_method",
    "is_channels_last", "is_folded", "keep_hooks", "loop_inside", "mark_rows", "materialize", "memory_order", "merge",
    "models_with_gradient", "module_path", "modules_of", "new_hooks", "note_models_with_gradient", "own_rows",
    "place", "rows_like", "rules", "running_modules", "separate_gradients", "show_gradient", "stack_alike",
    "tensors_in", "version", "watch_backward", "write_changes", "write_state",
]  # fmt: skip
