"""Equal weights before the first forward pass, also of a model whose first batch builds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keras.src.backend.common.stateless_scope import in_stateless_scope

from hvdscale.keras.backend import verbs
from hvdscale.keras.replicas import model_state

__all__ = ["has_weights", "when_built"]


def has_weights(model: Any) -> bool:
    """Whether the model has weights whose values can be read now."""
    return bool(model.built and model_state(model)) and verbs.initialised(model_state(model))


def when_built(model: Any, share: Callable[[], Any]) -> None:
    """Call ``share`` once, inside the first call of ``model`` in which it has weights, before anything is computed.

    Keras has no hook between building and calling, so this stands in for ``model._maybe_build`` until then. All
    ranks must make that call, as they do when they train.
    """
    build = model._maybe_build
    done = False

    def build_and_share(*call: Any) -> None:
        nonlocal done
        build(*call)
        # Keras also calls models on symbols, to see what they are made of: nothing has a value there.
        if done or in_stateless_scope() or not has_weights(model):
            return
        done = True
        if vars(model).get("_maybe_build") is build_and_share:
            object.__delattr__(model, "_maybe_build")
        with verbs.eager():
            share()

    object.__setattr__(model, "_maybe_build", build_and_share)
