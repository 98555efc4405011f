"""A Keras model of which each rank holds a part: what every kind of sharding has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from hvdscale.errors import PlanError
from hvdscale.keras.backend import verbs
from hvdscale.keras.names import renumbered
from hvdscale.keras.optimizer_state import load_optimizer, save_optimizer
from hvdscale.model.layout import Layout
from hvdscale.model.mesh import Mesh
from hvdscale.model.whole import gather_whole

__all__ = ["ShardedModel", "check_optimizer", "clip_gradients"]


class ShardedModel(ABC):
    """A model spread over ``mesh``. Names, and the whole state, are those of the model nobody has sharded.

    Attributes:
        mesh: the ranks as a grid.
        layout: where each variable of the whole model lies; names are the variables' paths.
        model: what this rank holds.
        data_ranks: the process set of the ranks that hold the same part as this one, on other data.
        rank: this one's number.
    """

    def __init__(self, mesh: Mesh, layout: Layout, model: Any, local: Mapping[str, Any]) -> None:
        """``local``: this rank's variables by their names in the whole model. Collective over all ranks."""
        self.mesh = mesh
        self.layout = layout
        self.model = model
        self.data_ranks = verbs.data_ranks(mesh)
        self._local = dict(local)
        self._names = {id(variable): name for name, variable in self._local.items()}
        self._copy = verbs.team_along(mesh, "pp", "tp")  # the ranks that hold one whole model
        self.rank = verbs.world().rank

    @abstractmethod
    def train_step(self, x: Any, y: Any) -> tuple[Any, list[Any]]:
        """The loss on one batch and the gradients of ``trainable_variables``; nothing is updated."""

    @abstractmethod
    def eval_step(self, x: Any, y: Any) -> Any:
        """The loss on one batch, on every rank."""

    @abstractmethod
    def describe(self) -> str:
        """A table of what lies where."""

    @property
    def trainable_variables(self) -> list[Any]:
        """This rank's: what its optimizer takes."""
        return list(self.model.trainable_variables)

    def name_of(self, variable: Any) -> str | None:
        """The whole model's name of a variable; ``None`` where it is none of this rank's."""
        return self._names.get(id(variable))

    def speaks(self, variable: Any) -> bool:
        """Whether this rank's part of a variable counts where the whole model's are added up."""
        name = self.name_of(variable)
        return name is not None and self.layout.speaks(name, self.rank)

    def state_dict(self, root: int | None = None) -> dict[str, np.ndarray]:
        """The whole model's variables by path, as they were before it was sharded, bit-equal. Collective.

        A model in one process takes them by ``model.set_weights([state[v.path] for v in model.weights])``.

        Args:
            root: the one rank that gets it, where not every rank has room for it; others get ``{}``.

        Raises:
            PlanError: no such rank.
        """
        if root is not None:
            self.mesh.coordinates(root)
        whole = {}
        with verbs.eager():
            for name in self.layout.names:
                variable = self._local.get(name)
                dtype = np.dtype(keras.backend.standardize_dtype(self.layout[name].dtype))
                own = (
                    np.empty(0, dtype) if variable is None else np.asarray(ops.convert_to_numpy(variable)).astype(dtype)
                )
                joined = self.join(name, own, root)
                if joined is not None:
                    whole[name] = np.array(joined)
        return whole

    def join(self, name: str, own: np.ndarray, root: int | None = None) -> np.ndarray | None:
        """A whole variable, or what is kept beside one, from its parts. Collective over the ranks of one copy.

        Args:
            own: this rank's part; empty where it has none.
            root: the one rank that gets it; others get ``None``.
        """
        return gather_whole(self.layout, name, own, self._copy, self.rank, root)

    def load_state_dict(self, whole: Mapping[str, Any]) -> None:
        """Take this rank's part of the whole model, in place. Nothing is sent: every rank reads the same state.

        Paths may differ in the counters that Keras puts behind the names of layers.

        Raises:
            StateError: other names or shapes than the whole model's.
        """
        names = self.layout.names
        if set(whole) != set(names) and sorted(renumbered(whole)) == sorted(renumbered(names)):
            theirs = dict(zip(renumbered(whole), whole.values(), strict=True))
            whole = {name: theirs[plain] for name, plain in zip(names, renumbered(names), strict=True)}
        self.layout.check_names(whole)
        with verbs.eager():
            for name, variable in self._local.items():
                variable.assign(self.layout.cut(name, np.asarray(whole[name]), self.rank))

    def optimizer_state_dict(self, optimizer: Any, root: int | None = None) -> dict[str, np.ndarray]:
        """``optimizer.variables`` as they would be over the whole model, by path, bit-equal. Collective.

        One process takes them, after ``optimizer.build(model.trainable_variables)``, by
        ``for v, value in zip(optimizer.variables, state.values()): v.assign(value)``.

        Args:
            optimizer: over this rank's ``trainable_variables``, distributed or not; it is built if it is not yet.
            root: the one rank that gets it; others get ``{}``.

        Raises:
            StateError: variables of another model.
            PlanError: no such rank.
        """
        if root is not None:
            self.mesh.coordinates(root)
        return save_optimizer(self, optimizer, root)

    def load_optimizer_state_dict(self, optimizer: Any, whole: Mapping[str, Any]) -> None:
        """Take this rank's part of what ``optimizer_state_dict`` gave on any mesh. Collective.

        Or of what one process saved: ``{v.path: ops.convert_to_numpy(v) for v in optimizer.variables}``. The order
        counts, since paths hold the counters that Keras puts behind names.

        Raises:
            StateError: variables of another model, or another number or other shapes of state.
        """
        load_optimizer(self, optimizer, whole)

    def count(self) -> tuple[int, int]:
        """How many numbers the whole model's trainable variables are, and how many of them this rank holds."""
        names = [self._names[id(v)] for v in self.trainable_variables]
        whole = sum(int(np.prod(self.layout[name].shape)) for name in names)
        return whole, sum(int(np.prod(v.shape)) for v in self.trainable_variables)

    def global_norm(self, gradients: Sequence[Any], variables: Sequence[Any]) -> Any:
        """The norm of the gradients of the whole model, a float32 tensor; what several ranks hold counts once."""
        total = ops.zeros((), "float32")
        for gradient, variable in zip(gradients, variables, strict=True):
            if gradient is not None and self.speaks(variable):
                total = total + ops.sum(ops.square(ops.cast(verbs.as_dense(gradient), "float32")))
        return ops.sqrt(self.sum_of_copy(total))

    def sum_of_copy(self, value: Any) -> Any:
        """The sum of a float tensor over the ranks that hold one copy of the model. Collective over them."""
        return verbs.sum_over(value, self._copy) if self._copy.size > 1 else value


def clip_gradients(model: ShardedModel, gradients: Sequence[Any], variables: Sequence[Any], limit: float) -> list[Any]:
    """Gradients scaled down so that their norm over the whole model is at most ``limit``. Collective over one copy."""
    norm = model.global_norm(gradients, variables)
    scale = ops.where(norm > limit, limit / norm, 1.0)
    return [None if g is None else verbs.as_dense(g) * ops.cast(scale, g.dtype) for g in gradients]


def check_optimizer(optimizer: Any) -> None:
    """Raises PlanError where an optimizer looks at more of a variable than one number at a time."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    looks = [c.__name__ for c in type(inner).__mro__ if c.__name__.lower() in ("adafactor", "lamb", "lars", "muon")]
    if looks:
        raise PlanError(
            f"{looks[0]} looks at whole variables, and each rank holds parts. Use one that looks at each number for "
            "itself: SGD, Adam, AdamW, Lion and others."
        )
    if inner.clipnorm is not None:
        raise PlanError(
            f"clipnorm={inner.clipnorm} looks at whole variables, and each rank holds parts. Use global_clipnorm, "
            "which is the whole model's here, or clipvalue."
        )
