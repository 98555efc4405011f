"""The jobs ``hvdscale doctor`` really runs: two ranks under mpirun, each with a deadline."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from hvdscale.errors import WorldError
from hvdscale.runtime.command import Job, compose, run_here
from hvdscale.runtime.horovod import find_horovod, installed_version
from hvdscale.runtime.inspection import Finding

__all__ = ["DEADLINE_SECONDS", "RANKS", "Trial", "planned_trials", "run_trial"]

RANKS = 2
DEADLINE_SECONDS = 180.0
_SECTION = "Trials"
_SHOWN_LINES = 4


@dataclass(frozen=True)
class Trial:
    """One job: a module of ``hvdscale.cli.checks`` with its arguments and variables."""

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def program(self) -> tuple[str, ...]:
        return ("-m", f"hvdscale.cli.checks.{self.module}", *self.arguments)

    @property
    def repeat(self) -> str:
        """The command that runs it alone, with all its output."""
        assignments = [f"{name}={value}" for name, value in self.variables.items()]
        return " ".join([*assignments, "hvdscale run -np", str(RANKS), *self.program])


def planned_trials() -> Iterator[Trial]:
    """MPI first, then an all-reduce in each installed framework, then ``fit`` on each as Keras's backend."""
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3"}
    if installed_version("mpi4py"):
        yield Trial("mpirun with mpi4py", "mpi")
    if find_horovod() is None:
        return
    frameworks = [name for name in ("torch", "tensorflow") if installed_version(name)]
    for name in frameworks:
        yield Trial(f"all-reduce, {name}", "allreduce", (name,), quiet)
    if installed_version("keras"):
        for name in frameworks:
            yield Trial(f"Keras fit, {name}", "fit", (), {**quiet, "KERAS_BACKEND": name})


def run_trial(trial: Trial, deadline_seconds: float = DEADLINE_SECONDS) -> Finding:
    """Run it; the finding says what the job said, or shows the end of its output."""
    try:
        command = compose(Job(RANKS, trial.program))
        finished = run_here(command, trial.variables, deadline_seconds)
    except (OSError, WorldError) as error:
        return Finding(_SECTION, trial.name, str(error), "fail")
    said = _said(finished.output)
    if finished.returncode == 0 and said is not None:
        return Finding(_SECTION, trial.name, f"{said} ({finished.seconds:.0f} s in all)")
    if finished.returncode is None:
        what = f"not done after {deadline_seconds:.0f} s, ended"
    else:
        what = f"exit code {finished.returncode}" + ("" if finished.returncode else ", but no result")
    tail = "\n".join(line[:160] for line in finished.output.rstrip().splitlines()[-_SHOWN_LINES:])
    return Finding(_SECTION, trial.name, f"{what}\n{tail}".rstrip(), "fail", f"see it all: {trial.repeat}")


def _said(output: str) -> str | None:
    for line in reversed(output.splitlines()):
        if line.startswith('{"says": '):
            return str(json.loads(line)["says"])
    return None
