"""Jobs whose ranks come and go: states that are saved, restored and given to newcomers, and ``run``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from horovod.common.elastic import ObjectState, run_fn
from horovod.common.exceptions import HorovodInternalError
from horovod.tensorflow.functions import broadcast_object
from horovod.tensorflow.mpi_ops import rank

from hvdscale.errors import PlanError
from hvdscale.tensorflow.broadcast import broadcast_object_fn, broadcast_variables
from hvdscale.tensorflow.runtime import init, shutdown

__all__ = ["TensorFlowKerasState", "TensorFlowState", "run"]


def run(func: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a training function ``func(state, ...)``: it is started again when ranks join, leave or fail.

    Before every start the state is given to all ranks; after a failure it goes back to the last ``commit()``.
    No collective may be called outside the function.
    """

    @functools.wraps(func)
    def guarded(state: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return func(state, *args, **kwargs)
        except (tf.errors.UnknownError, tf.errors.AbortedError) as error:
            if "Horovod" in error.message:  # a collective failed because a peer left
                raise HorovodInternalError(error.message) from error
            raise

    return run_fn(guarded, _reset)


def _reset() -> None:
    shutdown()
    init()


class TensorFlowKerasState(ObjectState):
    """The state of a Keras model and its optimizer, and any further values given by name.

    Args:
        model: a built Keras model.
        optimizer: its optimizer; by default the one it was compiled with.
        backend: accepted for Horovod's sake; TensorFlow 2 needs none.
        kwargs: more values to keep, such as ``epoch=0``; they become attributes.

    Raises:
        PlanError: the model has no weights yet, or there is no optimizer.
    """

    def __init__(self, model: Any, optimizer: Any = None, backend: Any = None, **kwargs: Any) -> None:
        if not getattr(model, "built", True):
            raise PlanError("The model has no weights yet. Call model.build(input_shape) first.")
        self.model = model
        self.optimizer = optimizer or getattr(model, "optimizer", None)
        if self.optimizer is None:
            raise PlanError("There is no optimizer. Pass optimizer=..., or compile the model with one first.")
        self.backend = backend
        if not self.optimizer.built:
            self.optimizer.build(model.trainable_variables)
        self._saved: list[np.ndarray] = []
        self._save_model()
        super().__init__(bcast_object=broadcast_object, get_rank=rank, **kwargs)

    def _tracked(self) -> list[Any]:
        return [*self.model.variables, *self.optimizer.variables]

    def save(self) -> None:
        """Remember weights, optimizer state and values in host memory."""
        self._save_model()
        super().save()

    def restore(self) -> None:
        """Go back to what was remembered last."""
        for variable, value in zip(self._tracked(), self._saved, strict=True):
            variable.assign(value)
        super().restore()

    def sync(self) -> None:
        """Take over everything from rank 0, and remember it."""
        broadcast_variables(self._tracked(), root_rank=0)
        self._save_model()
        super().sync()

    def _save_model(self) -> None:
        self._saved = [tf.convert_to_tensor(v).numpy().copy() for v in self._tracked()]


class TensorFlowState(ObjectState):
    """The state of a list of variables, and any further values given by name.

    Args:
        variables: ``tf.Variable`` or Keras variables; by default all global variables of the graph.
        session: the session that holds them, in a TensorFlow 1 graph.
        kwargs: more values to keep; they become attributes.

    Raises:
        PlanError: in eager mode without ``variables``.
    """

    def __init__(self, variables: Sequence[Any] | None = None, session: Any = None, **kwargs: Any) -> None:
        if not variables:
            if tf.executing_eagerly():
                raise PlanError("Pass variables=[...]: eager mode keeps no list of all variables.")
            variables = tf.compat.v1.global_variables()
        self.variables = list(variables)
        self.session = session or (None if tf.executing_eagerly() else tf.compat.v1.get_default_session())
        self._broadcast = None if tf.executing_eagerly() else broadcast_variables(self.variables, root_rank=0)
        self._saved: list[np.ndarray] = []
        self._save_model()
        bcast = broadcast_object if self.session is None else broadcast_object_fn(session=self.session)
        super().__init__(bcast_object=bcast, get_rank=rank, **kwargs)

    def save(self) -> None:
        """Remember variables and values in host memory."""
        self._save_model()
        super().save()

    def restore(self) -> None:
        """Go back to what was remembered last."""
        for variable, value in zip(self.variables, self._saved, strict=True):
            if self.session is None:
                variable.assign(value)
            else:
                variable.load(value, self.session)
        super().restore()

    def sync(self) -> None:
        """Take over everything from rank 0, and remember it."""
        if self.session is None:
            broadcast_variables(self.variables, root_rank=0)
        else:
            self.session.run(self._broadcast)
        self._save_model()
        super().sync()

    def _save_model(self) -> None:
        if self.session is None:
            self._saved = [tf.convert_to_tensor(v).numpy().copy() for v in self.variables]
        else:
            self._saved = self.session.run(self.variables)
