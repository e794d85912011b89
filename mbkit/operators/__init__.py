"""What an operator does when M models call it at once, wherever `torch.vmap` alone is wrong, slow or silent.

`Interception` sees every call before vmap does and looks it up in one table of rules, a file a family:
randomness, recurrent kernels, embedding, and reads of Python values. `model_by_model` is the rule of last
resort: exact for any operator, at the speed of a loop.
"""

from .convolution import LayoutMatters, is_folded
from .interception import Interception
from .locate import BatchingError, module_path
from .randomness import Streams
from .settings import PerModel

__all__ = ["BatchingError", "Interception", "LayoutMatters", "PerModel", "Streams", "is_folded", "module_path"]
