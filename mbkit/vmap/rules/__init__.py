"""What single operators do when M models call them at once: one file a family, each of which registers its rules."""

from . import (
    activations,
    arithmetic,
    autograd,
    convolution,
    data_dependent,
    embedding,
    linear,
    losses,
    normalization,
    pooling,
    randomness,
    recurrent,
    sparse,
)

__all__ = [
    "activations", "arithmetic", "autograd", "convolution", "data_dependent", "embedding", "linear", "losses",
    "normalization", "pooling", "randomness", "recurrent", "sparse",
]  # fmt: skip
