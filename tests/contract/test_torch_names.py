"""Every public name of ``horovod.torch`` is here, and can be called the same way."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType
from typing import Any

import horovod.torch
import pytest

import hvdscale.torch

MODULES = ["", ".elastic", ".mpi_ops", ".compression", ".functions", ".optimizer", ".sync_batch_norm"]

# Modules whose every name a script may take; of the others, only what they define.
GATHERING = ("horovod.torch", "horovod.torch.elastic", "horovod.torch.mpi_ops")
WIRING = {
    "check_extension",
    "check_installed_version",
    "get_average_backwards_compatibility_fun",
    "gpu_available",
    "handle_average_backwards_compatibility",
    "mpi_lib",
    "mpi_lib_v2",
    "num_rank_is_power_2",
    "run_fn",
}


def public(module: ModuleType) -> dict[str, Any]:
    def counts(value: Any) -> bool:
        if inspect.ismodule(value):
            return module is horovod.torch and value.__name__.startswith("horovod.torch")
        return module.__name__ in GATHERING or getattr(value, "__module__", None) == module.__name__

    return {n: v for n, v in vars(module).items() if not n.startswith("_") and n not in WIRING and counts(v)}


NAMES = [(m, n) for m in MODULES for n in sorted(public(importlib.import_module(f"horovod.torch{m}")))]


def test_the_list_is_horovods() -> None:
    names = {name for module, name in NAMES if not module}
    assert {"DistributedOptimizer", "allreduce", "elastic", "rank", "Average", "SyncBatchNorm"} <= names


@pytest.mark.parametrize(("module", "name"), NAMES, ids=lambda value: value or "horovod.torch")
def test_name_and_signature(module: str, name: str) -> None:
    theirs = getattr(importlib.import_module(f"horovod.torch{module}"), name)
    ours = getattr(importlib.import_module(f"hvdscale.torch{module}"), name)
    if not callable(theirs) or (inspect.isclass(theirs) and issubclass(theirs, Exception)):
        assert type(ours) is type(theirs)
        return
    wanted = [
        p
        for p in inspect.signature(theirs).parameters.values()
        if p.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    ]
    given = list(inspect.signature(ours).parameters.values())
    assert [(p.name, p.default) for p in wanted] == [(p.name, p.default) for p in given[: len(wanted)]]
    for extra in given[len(wanted) :]:
        assert extra.default is not inspect.Parameter.empty or extra.kind in (
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        )


def test_all_lists_every_name() -> None:
    assert {name for module, name in NAMES if not module} <= set(hvdscale.torch.__all__)
    assert len(set(hvdscale.torch.__all__)) == len(hvdscale.torch.__all__)
    assert all(hasattr(hvdscale.torch, name) for name in hvdscale.torch.__all__)
