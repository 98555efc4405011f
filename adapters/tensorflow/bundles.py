"""Nested values of tensors, as stages give them to each other."""

from __future__ import annotations

import tensorflow as tf

from hvdscale.model.nests import Nests

__all__ = ["NESTS"]

NESTS: Nests[tf.Tensor] = Nests(tf.Tensor, lambda tensor: str(tensor.dtype.name))
