"""Promises of the package: the wheel holds what it should, and works from an environment that has only the wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from hvdscale import __version__

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = ("hvdscale", "adapters", "tests", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources with a sub-package added to one adapter."""
    folder = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SOURCES:
        path = REPOSITORY / name
        if path.is_dir():
            shutil.copytree(path, folder / name, ignore=ignore)
        else:
            shutil.copy(path, folder / name)
    (folder / "adapters/torch/inner/deeper").mkdir(parents=True)
    for package in ("inner", "inner/deeper"):
        (folder / "adapters/torch" / package / "__init__.py").write_text("here = True\n")
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder / "dist"),
        str(folder),
    ]
    built = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = (folder / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a clean environment that has the wheel, and this environment's other packages to depend on."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    )
    # A plain path line: it adds the packages, but runs none of their .pth files, so the editable install stays out.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    installed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    return python


def run(python: Path, code: str, folder: Path) -> str:
    shown = subprocess.run(
        [python, "-c", code], cwd=folder, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=120
    )
    assert shown.returncode == 0, shown.stderr
    return shown.stdout.strip()


def read_info(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(f"hvdscale-{__version__}.dist-info/{name}").decode()


def modules_of(folder: Path, package: str) -> set[str]:
    return {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for path in folder.rglob("*.py")
        if "__pycache__" not in path.parts
    }


def test_every_module_of_the_core_is_in_the_wheel(contents: set[str]) -> None:
    assert modules_of(REPOSITORY / "hvdscale", "hvdscale") <= contents


@pytest.mark.parametrize(
    ("folder", "package"),
    [
        ("torch", "hvdscale/torch"),
        ("tensorflow", "hvdscale/tensorflow"),
        ("keras", "hvdscale/keras"),
        ("tensorflow_keras", "hvdscale/tensorflow/keras"),
    ],
)
def test_every_module_of_an_adapter_is_in_the_wheel(contents: set[str], folder: str, package: str) -> None:
    expected = modules_of(REPOSITORY / "adapters" / folder, package)
    assert f"{package}/__init__.py" in expected
    assert expected <= contents


def test_sub_packages_of_an_adapter_are_in_the_wheel(contents: set[str]) -> None:
    assert {"hvdscale/torch/inner/__init__.py", "hvdscale/torch/inner/deeper/__init__.py"} <= contents


def test_the_wheel_is_typed_and_licensed(contents: set[str]) -> None:
    assert "hvdscale/py.typed" in contents
    assert any(name.endswith("licenses/LICENSE") for name in contents)


def test_nothing_else_is_in_the_wheel(contents: set[str]) -> None:
    tops = {name.split("/")[0] for name in contents}
    assert tops == {"hvdscale", f"hvdscale-{__version__}.dist-info"}
    assert not any("test" in name or "example" in name for name in contents)


@pytest.mark.parametrize("folder", sorted((REPOSITORY / "adapters").iterdir()), ids=lambda folder: folder.name)
def test_every_folder_of_adapters_is_packaged(wheel: Path, folder: Path) -> None:
    """One that setup.py does not name would be missing from the wheel only, under whatever name."""
    with zipfile.ZipFile(wheel) as archive:
        packaged = {archive.read(name) for name in archive.namelist()}
    modules = [path for path in folder.rglob("*.py") if "__pycache__" not in path.parts]
    assert modules
    assert all(path.read_bytes() in packaged for path in modules)


def test_the_extras_and_the_command_are_declared(wheel: Path) -> None:
    metadata = Parser().parsestr(read_info(wheel, "METADATA"))
    assert {"torch", "tensorflow", "keras", "mpi", "viz", "dev", "build"} == set(metadata.get_all("Provides-Extra"))
    assert metadata["Requires-Python"] == ">=3.10"
    assert not any("horovod" in needed.lower() for needed in metadata.get_all("Requires-Dist"))
    assert "hvdscale = hvdscale.cli.main:main" in read_info(wheel, "entry_points.txt")


def test_the_wheel_is_imported_from_elsewhere(elsewhere: Path, tmp_path: Path) -> None:
    shown = run(elsewhere, "import hvdscale; print(hvdscale.__version__, hvdscale.__file__)", tmp_path)
    version, file = shown.split()
    assert version == __version__
    assert Path(file).is_relative_to(elsewhere.parents[1])


def test_an_adapter_of_the_wheel_is_imported_from_elsewhere(elsewhere: Path, tmp_path: Path) -> None:
    code = "import hvdscale.torch as hvd, hvdscale.torch.inner.deeper as d; print(hvd.__file__, d.here, hvd.size)"
    file, here, *_ = run(elsewhere, code, tmp_path).split()
    assert Path(file).is_relative_to(elsewhere.parents[1])
    assert here == "True"


def test_the_command_of_the_wheel_works_elsewhere(elsewhere: Path, tmp_path: Path) -> None:
    command = [elsewhere.parent / "hvdscale", "--version"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=180, check=True)
    assert shown.stdout.strip() == f"hvdscale {__version__}"


def test_the_pins_satisfy_what_the_package_asks_for(wheel: Path) -> None:
    """ci/requirements.txt and pyproject.toml must not contradict each other."""
    from packaging.requirements import Requirement

    asked = Parser().parsestr(read_info(wheel, "METADATA")).get_all("Requires-Dist")
    lines = (REPOSITORY / "ci" / "requirements.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for requirement in map(Requirement, asked):
        matching = [pin for pin in pins if pin.name.lower() == requirement.name.lower()]
        assert matching, f"{requirement.name} is not pinned"
        for pin in matching:
            (specifier,) = pin.specifier
            assert specifier.operator == "=="
            assert requirement.specifier.contains(specifier.version), f"{pin} against {requirement}"
