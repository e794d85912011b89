"""Explorers: sliders over the same pure functions as the static figures. Only this room knows ipywidgets."""

from .explorer import live_curves
from .faults import FaultExplorer, explore_faults
from .rates import ConsistencyExplorer, LearningRateExplorer, explore_consistency, explore_learning_rates
from .trainability import TrainabilityExplorer, explore_trainability

__all__ = [
    "ConsistencyExplorer", "FaultExplorer", "LearningRateExplorer", "TrainabilityExplorer", "explore_consistency",
    "explore_faults", "explore_learning_rates", "explore_trainability", "live_curves",
]  # fmt: skip
