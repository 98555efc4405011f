"""Every public name of ``horovod.torch`` is here, and can be called the same way."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType
from typing import Any

import pytest

import hvdscale.torch

MODULES = ["", ".elastic", ".mpi_ops", ".compression", ".functions", ".optimizer", ".sync_batch_norm"]

# What a script may take from each of Horovod's modules: what it defines or passes on, not what it imports for itself.
FOREIGN = ("torch", "warnings", "contextlib", "collections", "packaging", "os", "io", "cloudpickle", "typing")
OWN_WIRING = {
    "check_extension",
    "check_installed_version",
    "get_average_backwards_compatibility_fun",
    "gpu_available",
    "handle_average_backwards_compatibility",
    "mpi_lib",
    "num_rank_is_power_2",
    "run_fn",
    "split_list",
    "mpi_lib_v2",
}


def public(module: ModuleType) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and name not in OWN_WIRING
        and not (inspect.ismodule(value) and not value.__name__.startswith("horovod.torch"))
        and not (getattr(value, "__module__", None) or "").startswith(FOREIGN)
    }


NAMES = [(m, n) for m in MODULES for n in sorted(public(importlib.import_module(f"horovod.torch{m}")))]


def test_the_list_is_horovods() -> None:
    names = {name for module, name in NAMES if not module}
    assert {"DistributedOptimizer", "allreduce", "elastic", "rank", "Average", "SyncBatchNorm"} <= names


@pytest.mark.parametrize(("module", "name"), NAMES, ids=lambda value: value or "horovod.torch")
def test_name_and_signature(module: str, name: str) -> None:
    theirs = getattr(importlib.import_module(f"horovod.torch{module}"), name)
    ours = getattr(importlib.import_module(f"hvdscale.torch{module}"), name)
    if not callable(theirs):
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
    assert {n for m, n in NAMES if not m} <= set(hvdscale.torch.__all__) | {m[1:] for m in MODULES}
    assert sorted(hvdscale.torch.__all__) == hvdscale.torch.__all__
