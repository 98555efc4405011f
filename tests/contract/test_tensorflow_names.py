"""Every public name of ``horovod.tensorflow`` is here, and can be called in the same way."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType
from typing import Any

import horovod.tensorflow
import pytest
import tensorflow as tf

import hvdscale.tensorflow

MODULES = ["", ".elastic", ".mpi_ops", ".compression", ".functions", ".sync_batch_norm", ".gradient_aggregation"]

# Modules whose every name a script may take; of the others, only what they define.
GATHERING = ("horovod.tensorflow", "horovod.tensorflow.elastic", "horovod.tensorflow.mpi_ops")

# What Horovod needs to start up and to build.
WIRING = {
    "MPI_LIB",
    "check_extension",
    "check_installed_version",
    "get_average_backwards_compatibility_fun",
    "get_ext_suffix",
    "num_rank_is_power_2",
    "run_fn",
    "split_list",
}


def public(module: ModuleType) -> list[str]:
    """Names of a module that a script may use; objects of TensorFlow or of other parts of Horovod are none."""

    def counts(value: Any) -> bool:
        if inspect.ismodule(value):
            return False
        return module.__name__ in GATHERING or getattr(value, "__module__", None) == module.__name__

    listed = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    return sorted(n for n in listed if n not in WIRING and counts(getattr(module, n)))


TABLE = [(m, n) for m in MODULES for n in public(importlib.import_module(f"horovod.tensorflow{m}"))]


def test_the_list_is_horovods() -> None:
    names = {name for module, name in TABLE if not module}
    assert {"DistributedGradientTape", "allreduce", "rank_op", "Average", "SyncBatchNormalization"} <= names
    assert {("." + m.split(".")[1]) for m, _ in TABLE if m} == set(MODULES[1:])


@pytest.mark.parametrize(("module", "name"), TABLE, ids=lambda value: value or "horovod.tensorflow")
def test_name_and_signature(module: str, name: str) -> None:
    ours = importlib.import_module(f"hvdscale.tensorflow{module}")
    theirs = getattr(importlib.import_module(f"horovod.tensorflow{module}"), name)
    assert name in ours.__all__
    assert callable(theirs) == callable(getattr(ours, name))
    if callable(theirs):
        assert not missing(theirs, getattr(ours, name))


def test_submodules_are_attributes() -> None:
    assert all(inspect.ismodule(getattr(hvdscale.tensorflow, m[1:])) for m in MODULES[1:])
    assert sorted(hvdscale.tensorflow.__all__) == hvdscale.tensorflow.__all__


METHODS = ["gradient", "register_local_source", "get_local_and_global_gradients"]


@pytest.mark.parametrize("method", METHODS)
def test_methods_of_the_tape(method: str) -> None:
    theirs = horovod.tensorflow.DistributedGradientTape(tf.GradientTape())
    ours = hvdscale.tensorflow.DistributedGradientTape(tf.GradientTape())
    assert not missing(getattr(theirs, method), getattr(ours, method))


def test_hook_for_sessions_is_back() -> None:
    assert issubclass(hvdscale.tensorflow.BroadcastGlobalVariablesHook, tf.compat.v1.train.SessionRunHook)


def test_a_missing_parameter_would_be_seen() -> None:
    assert missing(lambda a, b=1: None, lambda a, b=2: None) == ["b=1"]
    assert missing(lambda a, b: None, lambda b, a: None) == ["a", "b"]
    assert missing(lambda a: None, lambda a, extra=0: None) == []


def missing(theirs: Any, ours: Any) -> list[str]:
    """Parameters of ``theirs`` that ``ours`` lacks at the same place with the same default."""
    expected = [p for p in parameters(theirs) if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    present = parameters(ours)
    return [
        str(p.replace(annotation=p.empty))
        for i, p in enumerate(expected)
        if i >= len(present) or present[i].name != p.name or not same_default(p.default, present[i].default)
    ]


def same_default(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and not inspect.isclass(a) and a == b)


def parameters(function: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())
