"""What a build does about GPUs: NCCL where the CUDA toolkit of torch's version is here, nothing otherwise.

Without NCCL tensors on GPUs travel through the host's memory, which needs nothing of the build (``runtime/gpu.py``).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from hvdscale.errors import BuildError

__all__ = ["CHOICES", "Choice", "Cuda", "choose_cuda", "gpu_environment", "torch_cuda"]

Choice = Literal["auto", "none", "nccl"]
CHOICES: tuple[Choice, ...] = get_args(Choice)

SYSTEM = (Path("/usr/local/cuda"), Path("/usr"))  # where a toolkit lies, and where packages of the system put theirs
_MULTIARCH = ("x86_64-linux-gnu", "aarch64-linux-gnu", "../lib64")
_OURS = (
    "HOROVOD_GPU",
    "HOROVOD_NCCL_",
    "HOROVOD_CUDA_HOME",
)  # what a choice settles; the user's would change it unseen


@dataclass(frozen=True)
class Cuda:
    """How a build meets a torch made for CUDA.

    Attributes:
        torch: the CUDA version torch was made for.
        toolkit: its folder, and NCCL's library and headers; ``None`` where NCCL is not built.
        nvcc: the release of the toolkit's compiler.
        nccl: NCCL's version.
        note: one line on why there is no NCCL, where nobody asked for that.
    """

    torch: str
    toolkit: tuple[Path, Path, Path] | None = None
    nvcc: str = ""
    nccl: str = ""
    note: str = ""

    @property
    def text(self) -> str:
        """What is recorded with the wheel."""
        return f"NCCL {self.nccl}, CUDA {self.nvcc}" if self.toolkit else "none"


def torch_cuda() -> str | None:
    """The CUDA version the installed torch was made for, read without importing it; ``None`` for a CPU build."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = _text(Path(spec.origin).with_name("version.py"))
    match = re.search(r"^cuda\b[^=\n]*=\s*['\"](\d+\.\d+)", text, re.MULTILINE)
    return match[1] if match else None


def choose_cuda(choice: str, frameworks: Sequence[str], env: Mapping[str, str]) -> Cuda | None:
    """What the build does about GPUs; ``None`` where torch is not built for or knows no CUDA, so there is no choice.

    Raises:
        BuildError: an unknown choice, or NCCL was asked for and cannot be; what is missing is named.
    """
    if choice not in CHOICES:
        raise BuildError(f"--gpu takes {', '.join(CHOICES)}, not {choice!r}.")
    version = torch_cuda() if "torch" in frameworks else None
    if version is None:
        if choice == "nccl":
            found = "the one installed here is not" if "torch" in frameworks else "torch is not among the frameworks"
            raise BuildError(
                f"--gpu nccl builds for a PyTorch made for CUDA; {found}. "
                "Install a CUDA build of torch first, or leave --gpu out."
            )
        return None
    if choice == "none":
        return Cuda(version)
    major, missing = version.split(".")[0], []
    if "tensorflow" in frameworks:
        missing.append("a build for torch alone (--frameworks torch): TensorFlow's part is built for the CPU only")
    nvcc, release = _nvcc(version, env)
    if nvcc is None:
        missing.append(f"the CUDA toolkit {major} ({release or 'no nvcc'}): install it, or set HOROVOD_CUDA_HOME to it")
    nccl = _nccl(env, nvcc)
    if nccl is None:
        missing.append(f"NCCL with its header: `pip install nvidia-nccl-cu{major}`")
    if nvcc is not None and nccl is not None and not missing:
        return Cuda(version, (nvcc, *nccl[:2]), release, nccl[2])
    if choice == "nccl":
        raise BuildError(
            f"Horovod cannot be built with NCCL for torch's CUDA {version}. Missing:\n"
            + "\n".join(f"  - {problem}" for problem in missing)
            + "\nNothing was changed. Without NCCL (--gpu none) tensors on GPUs travel through the host's memory."
        )
    return Cuda(version, note=f"GPU: through the host's memory, not by NCCL, which needs {'; '.join(missing)}.")


def gpu_environment(base: Mapping[str, str], cuda: Cuda | None, workspace: Path) -> dict[str, str]:
    """``base`` with the variables that make Horovod's build do what ``cuda`` says; libraries are linked from there."""
    if cuda is None:
        return dict(base)
    env = {key: value for key, value in base.items() if not key.startswith(_OURS)}
    env["HVDSCALE_GPU_RECORD"] = cuda.text
    if cuda.toolkit is None:
        return {**env, "HVDSCALE_GPU_NONE": "1"}
    home, library, headers = cuda.toolkit
    links = workspace / "nccl"
    links.mkdir(exist_ok=True)
    (links / "libnccl.so").symlink_to(library)  # pip's package has no such name, by which linkers look
    return {
        **env,
        "HOROVOD_GPU_OPERATIONS": "NCCL",
        "HOROVOD_CUDA_HOME": str(home),
        "CUDA_HOME": str(home),
        "HOROVOD_NCCL_INCLUDE": str(headers),
        "HOROVOD_NCCL_LIB": str(links),
        "HOROVOD_NCCL_LINK": "SHARED",
    }


def _nvcc(version: str, env: Mapping[str, str]) -> tuple[Path | None, str]:
    """The folder of a toolkit of torch's major version and its release; else what was found instead."""
    seen = []
    for home in _homes(env):
        nvcc = home / "bin" / "nvcc"
        release = _release(home / "include" / "cuda_runtime_api.h")
        if not (release and os.access(nvcc, os.X_OK)):
            continue  # nothing, or a script that calls the compiler of a toolkit elsewhere
        if release.split(".")[0] == version.split(".")[0]:
            return home, release
        seen.append(f"{nvcc} is {release}")
    return None, ", ".join(dict.fromkeys(seen))


def _release(header: Path) -> str:
    match = re.search(r"^#define\s+CUDART_VERSION\s+(\d+)", _text(header), re.MULTILINE)
    return f"{int(match[1]) // 1000}.{int(match[1]) % 1000 // 10}" if match else ""


def _homes(env: Mapping[str, str]) -> Iterator[Path]:
    for name in ("HOROVOD_CUDA_HOME", "CUDA_HOME", "CUDA_PATH"):
        if env.get(name):
            yield Path(env[name])
    found = shutil.which("nvcc", path=env.get("PATH", ""))
    if found:
        yield Path(found).resolve().parent.parent
    yield SYSTEM[0]


def _nccl(env: Mapping[str, str], toolkit: Path | None) -> tuple[Path, Path, str] | None:
    """NCCL's library, the folder of its header, and its version: the user's, pip's, or beside the toolkit's files."""
    places = []
    if env.get("HOROVOD_NCCL_HOME"):
        home = Path(env["HOROVOD_NCCL_HOME"])
        places.append((home / "include", home / "lib"))
    if env.get("HOROVOD_NCCL_INCLUDE") and env.get("HOROVOD_NCCL_LIB"):
        places.append((Path(env["HOROVOD_NCCL_INCLUDE"]), Path(env["HOROVOD_NCCL_LIB"])))
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        places.append((Path(folder, "nccl", "include"), Path(folder, "nccl", "lib")))
    if toolkit is not None:
        places.append((toolkit / "include", toolkit / "lib64"))
    places += [(SYSTEM[1] / "include", SYSTEM[1] / "lib" / machine) for machine in _MULTIARCH]
    for headers, libraries in places:
        library = next((p for name in ("libnccl.so.2", "libnccl.so") if (p := libraries / name).exists()), None)
        version = _nccl_version(headers / "nccl.h")
        if library is not None and version:
            return library.resolve(), headers, version
    return None


def _nccl_version(header: Path) -> str:
    text = _text(header)
    parts = [re.search(rf"^#define\s+NCCL_{part}\s+(\d+)", text, re.MULTILINE) for part in ("MAJOR", "MINOR", "PATCH")]
    return ".".join(part[1] for part in parts if part)


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
