"""Explorers: sliders over the same pure functions as the static figures. Only this room knows ipywidgets.

An explorer is a widget: the last line of a cell shows it. Its callbacks only post wishes to a `Worker`, whose thread
trains and draws; so a slider never hangs, and of many values the newest wins. A cell that runs again closes the one
that it made before. On a page without a kernel the picture stays, as a PNG. In notebooks leave a core to the browser:
`torch.set_num_threads(max(1, os.cpu_count() - 1))`.
"""

from .consistency import ConsistencyExplorer, explore_consistency
from .explorer import live_curves
from .faults import FaultExplorer, explore_faults
from .learning_rates import LearningRateExplorer, explore_learning_rates
from .trainability import TrainabilityExplorer, explore_trainability

__all__ = [
    "ConsistencyExplorer", "FaultExplorer", "LearningRateExplorer", "TrainabilityExplorer", "explore_consistency",
    "explore_faults", "explore_learning_rates", "explore_trainability", "live_curves",
]  # fmt: skip
