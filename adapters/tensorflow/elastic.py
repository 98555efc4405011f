"""Jobs whose ranks come and go: states that are saved, restored and given to newcomers, and ``run``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf
from horovod.common.elastic import ObjectState, run_fn
from horovod.common.exceptions import HorovodInternalError
from horovod.tensorflow.mpi_ops import rank

from hvdscale.errors import PlanError
from hvdscale.runtime.values import ExactValues
from hvdscale.tensorflow.broadcast import broadcast_variables
from hvdscale.tensorflow.runtime import control, init, shutdown

if TYPE_CHECKING:
    from hvdscale.tensorflow.keras.elastic import TensorFlowKerasState

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
        except tf.errors.OpError as error:
            if "Horovod" in str(error):  # a collective failed because a peer left
                raise HorovodInternalError(str(error)) from error
            raise

    return run_fn(guarded, _reset)


def _reset() -> None:
    shutdown()
    init()


def __getattr__(name: str) -> Any:
    """The state of a Keras model comes from the Keras adapter, which imports this one."""
    if name == "TensorFlowKerasState":
        from hvdscale.tensorflow.keras.elastic import TensorFlowKerasState

        return TensorFlowKerasState
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class TensorFlowState(ExactValues, ObjectState):  # type: ignore[misc]
    """The state of a list of variables, and any further values given by name.

    Args:
        variables: ``tf.Variable`` or Keras variables; by default all global variables of the graph.
        session: the session that holds them, in a TensorFlow 1 graph.
        kwargs: more values to keep, as in ``TensorFlowKerasState``; they become attributes.

    Raises:
        PlanError: in eager mode without ``variables``.
        StateError: a value of another kind, when it is given and at each commit.
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
        super().__init__(control, rank, **kwargs)

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
