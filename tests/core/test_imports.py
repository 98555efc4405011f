"""Promises of the imports: the core needs no framework, and each room imports only what CONTRIBUTING.md lets it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FRAMEWORKS = {"torch", "tensorflow", "keras", "horovod", "mpi4py"}

# A room may import itself and the rooms named here; `_version` and `errors` belong to everyone.
ROOMS: dict[str, set[str]] = {
    "_version": set(),
    "errors": set(),
    "__init__": set(),
    "__main__": {"cli"},
    "runtime": set(),
    "update": {"runtime"},
    "data": {"runtime", "update"},
    "model": {"runtime", "update"},
    "sync": {"runtime", "update"},
    "cli": {"runtime", "update", "data", "model", "sync"},
    "torch": {"runtime", "update", "data", "model", "sync"},
    "tensorflow": {"runtime", "update", "data", "model", "sync", "tensorflow_keras"},
    "keras": {"runtime", "update", "data", "model", "sync", "torch", "tensorflow"},
    "tensorflow_keras": {"runtime", "update", "data", "model", "sync", "keras"},
}
EVERYONES = {"_version", "errors"}
CORE = ("runtime", "update", "data", "model", "sync", "cli", "errors.py", "_version.py", "__init__.py", "__main__.py")
# Where the core may read the environment, the clock of the wall or a socket.
OUTSIDE_WORLD = {"os.environ", "os.getenv", "os.environb", "time.time", "socket"}


def modules(*folders: str) -> list[Path]:
    found = []
    for folder in folders:
        path = REPOSITORY / folder
        found += [path] if path.is_file() else sorted(path.rglob("*.py"))
    return found


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def room_of(path: Path) -> str:
    """``hvdscale/data/plan.py`` -> ``data``, ``adapters/torch/wire.py`` -> ``torch``."""
    return path.relative_to(REPOSITORY).parts[1].removesuffix(".py")


def imports(path: Path, *, at_import_time: bool) -> Iterator[str]:
    """Full names of what the module imports: all of them, or only those that run when it is imported."""
    yield from _imports(ast.parse(path.read_text()), at_import_time)


_LATER = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def _imports(node: ast.AST, at_import_time: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if at_import_time and (isinstance(child, _LATER) or _typing(child)):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        else:
            yield from _imports(child, at_import_time)


def _typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def rooms_imported(path: Path) -> set[str]:
    names = [name.split(".") for name in imports(path, at_import_time=False)]
    rooms = set()
    for name in names:
        if name[0] == "hvdscale" and len(name) > 1:
            rooms.add("tensorflow_keras" if name[1:3] == ["tensorflow", "keras"] else name[1])
    return rooms & set(ROOMS)


def test_every_room_is_in_the_table() -> None:
    folders = [path for root in ("hvdscale", "adapters") for path in (REPOSITORY / root).iterdir() if path.is_dir()]
    assert {path.name for path in folders} - {"__pycache__"} <= set(ROOMS)


@pytest.mark.parametrize("path", modules("hvdscale", "adapters"), ids=name_of)
def test_a_room_imports_only_what_it_may(path: Path) -> None:
    room = room_of(path)
    assert rooms_imported(path) <= ROOMS[room] | {room} | EVERYONES


@pytest.mark.parametrize("path", modules("hvdscale", "adapters"), ids=name_of)
def test_the_package_does_not_import_what_is_not_packaged(path: Path) -> None:
    outside = {"adapters", "examples", "lm", "tests", "ci"}
    assert not outside & {name.split(".")[0] for name in imports(path, at_import_time=False)}


@pytest.mark.parametrize("path", modules(*(f"hvdscale/{name}" for name in CORE)), ids=name_of)
def test_the_core_imports_no_framework_when_imported(path: Path) -> None:
    assert not FRAMEWORKS & {name.split(".")[0] for name in imports(path, at_import_time=True)}


@pytest.mark.parametrize("path", modules("hvdscale"), ids=name_of)
def test_only_runtime_touches_the_outside_world(path: Path) -> None:
    if room_of(path) == "runtime":
        return
    used = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    imported = set(imports(path, at_import_time=False))
    assert not OUTSIDE_WORLD & (used | imported)


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_an_adapter_names_no_other_framework(framework: str) -> None:
    others = {"torch", "tensorflow", "keras"} - {framework}
    # Keras variables are part of TensorFlow's own world.
    allowed = {"keras"} if framework == "tensorflow" else set()
    for path in modules(f"adapters/{framework}"):
        found = {name.split(".")[0] for name in imports(path, at_import_time=False)}
        assert not found & (others - allowed), path


def test_a_rule_that_is_broken_is_seen(tmp_path: Path) -> None:
    """The checks above read code as Python does: these are what they must find, and what they must not."""
    path = tmp_path / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "import torch.nn as nn\n"
        "if TYPE_CHECKING:\n    import keras\n"
        "try:\n    from hvdscale.sync import EveryStep\nexcept ImportError:\n    pass\n"
        "class A:\n    import mpi4py\n"
        "def f():\n    import tensorflow\n"
    )
    everything = {name.split(".")[0] for name in imports(path, at_import_time=False)}
    at_import = {name.split(".")[0] for name in imports(path, at_import_time=True)}
    assert everything == {"typing", "torch", "keras", "hvdscale", "mpi4py", "tensorflow"}
    assert at_import == {"typing", "torch", "hvdscale", "mpi4py"}
    assert rooms_imported(path) == {"sync"}
