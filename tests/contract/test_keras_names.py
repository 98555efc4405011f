"""Every public name of ``horovod.keras`` and ``horovod.tensorflow.keras`` is here, with its arguments.

Horovod's side is read from its source, so that neither backend has to import the other framework.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
from pathlib import Path
from typing import Any

import pytest

from tests.contract.keras_reference import BACKEND

FOLDER = Path(str(importlib.util.find_spec("horovod").origin)).parent  # type: ignore[union-attr]

# Horovod's module -> ours.
MODULES = {
    "keras/__init__": "hvdscale.keras",
    "keras/callbacks": "hvdscale.keras.callbacks",
    "keras/elastic": "hvdscale.keras.elastic",
    "tensorflow/keras/__init__": "hvdscale.keras",
    "tensorflow/keras/callbacks": "hvdscale.keras.callbacks",
    "tensorflow/keras/elastic": "hvdscale.keras.elastic",
}
if BACKEND == "tensorflow":
    MODULES |= {
        "tensorflow/keras/__init__ ": "hvdscale.tensorflow.keras",
        "tensorflow/keras/callbacks ": "hvdscale.tensorflow.keras.callbacks",
        "tensorflow/keras/elastic ": "hvdscale.tensorflow.keras.elastic",
    }
# Modules Horovod's files import for themselves.
NOT_PUBLIC = {"keras", "tf", "K", "warnings", "version", "inspect", "is_version_greater_equal_than"}
# What the two of Horovod's modules give differently; ours takes the later one's.
DIFFER = {("allreduce", "average")}


def _names(tree: ast.Module) -> set[str]:
    """``__all__`` where there is one; otherwise what is defined or imported."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
    return {name for name in found if not name.startswith("_")} - NOT_PUBLIC


def _functions(tree: ast.Module) -> list[tuple[str, ast.FunctionDef]]:
    found = [(node.name, node) for node in tree.body if isinstance(node, ast.FunctionDef)]
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found += [(node.name, f) for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
    return found


def _trees() -> list[tuple[str, str, ast.Module]]:
    return [(key, ours, ast.parse((FOLDER / f"{key.strip()}.py").read_text())) for key, ours in MODULES.items()]


NAMES = [(key.strip(), ours, name) for key, ours, tree in _trees() for name in sorted(_names(tree))]
FUNCTIONS = [(key.strip(), ours, name, f) for key, ours, tree in _trees() for name, f in _functions(tree)]


def test_horovods_names_were_found() -> None:
    assert len(NAMES) > 80
    assert {"DistributedOptimizer", "load_model", "KerasState", "BestModelCheckpoint"} <= {n for *_, n in NAMES}


@pytest.mark.parametrize(("theirs", "ours", "name"), NAMES, ids=lambda v: str(v))
def test_name(theirs: str, ours: str, name: str) -> None:
    assert hasattr(importlib.import_module(ours), name)


@pytest.mark.parametrize(
    ("theirs", "ours", "name", "function"), FUNCTIONS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_signature(theirs: str, ours: str, name: str, function: ast.FunctionDef) -> None:
    module = importlib.import_module(ours)
    parameters = inspect.signature(getattr(module, name)).parameters
    arguments = [a.arg for a in function.args.args if a.arg != "self"]
    shared = [p for p in parameters if p in arguments]
    positional = [p for p in shared if parameters[p].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert set(arguments) == set(shared)
    assert positional == [a for a in arguments if a in positional]
    if function.args.kwarg:
        assert any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    defaults = function.args.defaults
    for argument, default in zip(arguments[len(arguments) - len(defaults) :], defaults, strict=True):
        if (name, argument) in DIFFER and parameters[argument].default is None:
            continue
        assert parameters[argument].default == _value(default, module), argument


def _value(default: ast.expr, module: Any) -> Any:
    """``Compression.none``, ``Average`` and constants, looked up in our own module."""
    if isinstance(default, ast.Constant):
        return default.value
    if isinstance(default, ast.Attribute):
        return getattr(_value(default.value, module), default.attr)
    assert isinstance(default, ast.Name)
    return getattr(module, default.id)
