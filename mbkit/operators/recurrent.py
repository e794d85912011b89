"""Recurrent kernels, which vmap has no rule for: the fused kernel of each model, one after the other."""

from __future__ import annotations

import torch

from .model_by_model import model_by_model

__all__ = ["RULES"]

# As exact as can be (bit for bit, dropout between the layers included) and no faster than a loop.
_NAMES = "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell".split()
RULES = {getattr(torch, name): model_by_model for name in _NAMES}
