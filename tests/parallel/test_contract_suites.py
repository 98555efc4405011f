"""The contract suite on real ranks: every adapter, both launchers, both controllers."""

from __future__ import annotations

import re
from enum import Enum

import pytest

from tests.launcher import launch

TORCH = {"HVDSCALE_ADAPTER": "torch"}
TENSORFLOW = {"HVDSCALE_ADAPTER": "tensorflow"}
KERAS_TENSORFLOW = {"HVDSCALE_ADAPTER": "keras", "KERAS_BACKEND": "tensorflow"}
KERAS_TORCH = {"HVDSCALE_ADAPTER": "keras", "KERAS_BACKEND": "torch"}


# Servers, pipelines, placed updates and split layers bring their own messages: under mpirun, and dear.
_GRADIENTS_ONLY = "not (asynchronous or pipeline or updates or features or split_stages)"


class Part(Enum):
    """Which tests of the suite a row runs; the value selects them by name, as ``pytest -k`` does.

    Each adapter and backend runs everything once, on two ranks under mpirun, and torch much of it on four. What another
    launcher or controller changes is how ranks find each other and how bytes travel: those rows run what depends on
    it. Everything everywhere would take most of the time of the whole gate.
    """

    EVERYTHING = ""
    EXCHANGES = f"(training or collectives or broadcast or desync or agree or differ) and {_GRADIENTS_ONLY}"
    PROCESS_SETS = "process_set"  # on 3 ranks the set of the even ones has two members, and one rank is outside
    GRADIENTS_AND_ROUNDS = _GRADIENTS_ONLY
    # Two copies of a pipeline of two stages are four ranks, and so are two stages that are split over two. What loaders
    # read is the plan's, which the core shows for any number of ranks; that they follow it, two ranks show.
    ON_FOUR_RANKS = f"({_GRADIENTS_ONLY} and not torch_data) or meet_in_rounds or pipeline_state or split_stages"
    ON_EIGHT_RANKS = "copies_of_split_stages"  # two copies of two stages over two ranks
    FOUR_STAGES = "four_stages or split_stages or (meet_in_rounds and pipeline)"
    WITH_UPDATES = "not (asynchronous or pipeline or features)"
    # One process differs in how steps are made, too.
    ALONE = f"(training or optimizer or collectives or broadcast) and {_GRADIENTS_ONLY}"


TABLE = [
    # adapter, launcher, ranks, part
    (TORCH, "mpirun", 2, Part.EVERYTHING),
    (TORCH, "horovodrun", 2, Part.EXCHANGES),
    (TORCH, "horovodrun-gloo", 2, Part.EXCHANGES),
    (TORCH, "mpirun", 4, Part.ON_FOUR_RANKS),
    (TORCH, "mpirun", 8, Part.ON_EIGHT_RANKS),
    (TORCH, "alone", 1, Part.WITH_UPDATES),
    (TENSORFLOW, "mpirun", 2, Part.EVERYTHING),
    (TENSORFLOW, "mpirun", 3, Part.PROCESS_SETS),
    (TENSORFLOW, "horovodrun", 2, Part.EXCHANGES),
    (TENSORFLOW, "horovodrun-gloo", 2, Part.EXCHANGES),
    (TENSORFLOW, "alone", 1, Part.ALONE),
    (KERAS_TENSORFLOW, "mpirun", 2, Part.EVERYTHING),
    (KERAS_TENSORFLOW, "mpirun", 3, Part.PROCESS_SETS),
    (KERAS_TENSORFLOW, "mpirun", 4, Part.FOUR_STAGES),
    (KERAS_TENSORFLOW, "horovodrun-gloo", 2, Part.EXCHANGES),
    (KERAS_TENSORFLOW, "alone", 1, Part.ALONE),
    (KERAS_TORCH, "mpirun", 2, Part.EVERYTHING),
    (KERAS_TORCH, "mpirun", 3, Part.PROCESS_SETS),
    (KERAS_TORCH, "mpirun", 4, Part.FOUR_STAGES),
    (KERAS_TORCH, "mpirun", 8, Part.ON_EIGHT_RANKS),
    (KERAS_TORCH, "horovodrun-gloo", 2, Part.EXCHANGES),
    (KERAS_TORCH, "alone", 1, Part.GRADIENTS_AND_ROUNDS),
]


def _name(value: object) -> str:
    if isinstance(value, Part):
        return value.name.lower()
    return "-".join(value.values()) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("env", "launcher", "ranks", "part"), TABLE, ids=_name)
def test_contract(env: dict[str, str], launcher: str, ranks: int, part: Part) -> None:
    suite = ["-m", "pytest", "tests/contract", "-q", "--color=no", "-p", "no:cacheprovider", "-k", part.value]
    output = launch(suite, ranks=ranks, launcher=launcher, env=env, deadline_seconds=1800).check()
    assert len(re.findall(r"\d+ passed", output)) == ranks, output
