"""Every public name of ``horovod.tensorflow`` is here, and can be called in the same way."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import horovod.tensorflow
import horovod.tensorflow.elastic
import pytest
import tensorflow as tf

import hvdscale.tensorflow
import hvdscale.tensorflow.elastic

# Modules Horovod imports for itself, and helpers of its own start-up, are no names of its interface.
NOT_PUBLIC = {"check_extension", "split_list"}


def public(module: ModuleType) -> list[str]:
    listed = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    return sorted(n for n in listed if not isinstance(getattr(module, n), ModuleType) and n not in NOT_PUBLIC)


TABLE = [
    *((horovod.tensorflow, hvdscale.tensorflow, n) for n in public(horovod.tensorflow)),
    *((horovod.tensorflow.elastic, hvdscale.tensorflow.elastic, n) for n in public(horovod.tensorflow.elastic)),
]


@pytest.mark.parametrize(("theirs", "ours", "name"), TABLE, ids=lambda v: v if isinstance(v, str) else "")
def test_name_and_signature(theirs: ModuleType, ours: ModuleType, name: str) -> None:
    a, b = getattr(theirs, name), getattr(ours, name)
    assert name in ours.__all__
    assert callable(a) == callable(b)
    if callable(a):
        assert not missing(a, b)


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
