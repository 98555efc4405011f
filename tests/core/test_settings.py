"""Settings: what a launch gets by default, that anything the user chose wins, and what comes too late."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from hvdscale.runtime import cores, rules, session
from hvdscale.runtime.command import Job, compose
from hvdscale.runtime.cores import bound_by_default, cores_in_quota
from hvdscale.runtime.inspection import local_settings
from hvdscale.runtime.launch import Launch, read_launch
from hvdscale.runtime.settings import FRONT, Setting, apply_settings, choose_settings, put_in_force

YIELD = "OMPI_MCA_mpi_yield_when_idle"
CYCLES = "HVDSCALE_CYCLES"
USE_RULES = "OMPI_MCA_coll_tuned_use_dynamic_rules"
RULES_FILE = "OMPI_MCA_coll_tuned_dynamic_rules_filename"
THREADS = {"OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"}
MALLOC = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}  # told to this process, not to its environment
MPI = {YIELD, USE_RULES, RULES_FILE}

ALONE = Launch("none", "single")
TWO_HERE = Launch("mpirun (Open MPI)", "mpi", 0, 2, 0, 2)
ONE_BY_MPIRUN = Launch("mpirun (Open MPI)", "mpi")
ONE_PER_HOST = Launch("mpirun (Open MPI)", "mpi", 0, 4, 0, 1)
TWO_BY_GLOO = Launch("horovodrun --gloo", "gloo", 0, 2, 0, 2)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and a cache of the test's own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return tmp_path


def by_name(settings: tuple[Setting, ...]) -> dict[str, Setting]:
    return {setting.name: setting for setting in settings}


@pytest.mark.parametrize(
    ("job", "names"),
    [
        (ALONE, {"HOROVOD_CONTROLLER", "HOROVOD_CPU_OPERATIONS"}),
        (ONE_BY_MPIRUN, set()),
        (TWO_HERE, THREADS | MPI | {CYCLES}),
        (ONE_PER_HOST, MPI | {CYCLES}),
        (TWO_BY_GLOO, THREADS),
    ],
    ids=["alone", "one-rank", "two-here", "four-hosts", "gloo"],
)
def test_what_a_launch_gets(job: Launch, names: set[str]) -> None:
    chosen = by_name(choose_settings(job, cores=4))
    assert set(chosen) == names
    assert all(setting.reason and setting.origin == "hvdscale" for setting in chosen.values())


@pytest.mark.parametrize(
    ("local_size", "cores", "own", "threads"),
    [(2, 2, None, "1"), (2, 16, None, "8"), (3, 8, None, "2"), (4, 2, None, "1"), (2, 16, 1, "1"), (2, 16, 16, "8")],
)
def test_ranks_of_a_host_share_its_cores(local_size: int, cores: int, own: int | None, threads: str) -> None:
    job = Launch("mpirun (Open MPI)", "mpi", 0, local_size, 0, local_size)
    chosen = by_name(choose_settings(job, cores, own))
    assert {chosen[name].value for name in THREADS} == {threads}


def test_settings_are_written_for_this_process() -> None:
    env = {"HOME": os.environ["HOME"]}
    settled = put_in_force(TWO_HERE, env, mpi_running=False)
    assert {name: s.value for name, s in by_name(settled).items() if name not in MALLOC}.items() <= env.items()
    assert Path(env[RULES_FILE]).read_text() == rules.rules_text()


@pytest.mark.parametrize(
    "env",
    [
        {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072:glibc.malloc.trim_threshold=131072"},
    ],
    ids=["variables", "tunables"],
)
def test_what_the_user_told_malloc_stays(env: dict[str, str]) -> None:
    settled = by_name(put_in_force(TWO_HERE, {"HOME": os.environ["HOME"], **env}, mpi_running=False))
    assert {(settled[name].value, settled[name].origin) for name in MALLOC} == {("131072", "user")}


def test_looking_at_the_settings_writes_nothing(home: Path) -> None:
    """As ``hvdscale run --dry-run`` and ``hvdscale doctor`` do."""
    compose(Job(2, ("train.py",)), {"PATH": f"{Path(sys.executable).parent}", "HOME": str(home)})
    local_settings(2, {"HOME": str(home)})
    assert [path for path in home.rglob("*") if path.is_file()] == []


def test_rules_that_cannot_be_written_leave_the_choice_to_open_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    def write_rules(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rules, "write_rules", write_rules)
    env: dict[str, str] = {}
    settled = by_name(put_in_force(ONE_PER_HOST, env, mpi_running=False))
    assert set(env) == {YIELD, CYCLES, FRONT}
    assert env[FRONT] == f"{CYCLES},{YIELD}"
    for name in (USE_RULES, RULES_FILE):
        assert settled[name].origin == "failed"
        assert "No space left on device" in settled[name].reason


@pytest.mark.parametrize("name", sorted(THREADS | {YIELD, USE_RULES, RULES_FILE}))
def test_the_user_wins(name: str) -> None:
    env = {name: "7"}
    settled = by_name(apply_settings(choose_settings(TWO_HERE, 4), env, mpi_running=False))
    assert env[name] == "7"
    assert (settled[name].value, settled[name].origin, settled[name].reason) == ("7", "user", "set by you")


@pytest.mark.parametrize(
    "name",
    [USE_RULES, RULES_FILE, "OMPI_MCA_coll_tuned_allreduce_algorithm", "OMPI_MCA_coll_tuned_allreduce_tree_fanout"],
)
def test_who_chose_the_all_reduce_does_not_meet_our_rules(name: str) -> None:
    """Open MPI would prefer our file to a forced algorithm."""
    env = {name: "3"}
    settled = apply_settings(choose_settings(ONE_PER_HOST, 4), env, mpi_running=False)
    assert {setting.name for setting in settled if setting.origin == "hvdscale"} == {YIELD, CYCLES}
    assert set(env) == {name, YIELD, CYCLES, FRONT}


def test_a_parameter_in_the_users_file_wins(home: Path) -> None:
    (home / ".openmpi").mkdir()
    (home / ".openmpi" / "mca-params.conf").write_text("# mine\nmpi_yield_when_idle = 0  # spin\n")
    env = {"HOME": str(home)}
    settled = by_name(apply_settings(choose_settings(TWO_HERE, 4), env, mpi_running=False))
    assert (settled[YIELD].value, settled[YIELD].origin) == ("0", "user")
    assert YIELD not in env


def test_mpi_settings_come_too_late_once_mpi_runs() -> None:
    env: dict[str, str] = {}
    settled = by_name(apply_settings(choose_settings(TWO_HERE, 4), env, mpi_running=True))
    assert {name for name, setting in settled.items() if setting.origin == "late"} == MPI
    assert all("call init() first" in settled[name].reason for name in MPI)
    assert set(env) == {*THREADS, CYCLES, FRONT}


def test_what_the_front_has_set_is_not_the_users(home: Path) -> None:
    """... and the rules file is this host's own, not the path of the host the job was started on."""
    env = {FRONT: f"{YIELD},{USE_RULES},{RULES_FILE}", YIELD: "1", USE_RULES: "1", RULES_FILE: "/elsewhere/rules"}
    settled = by_name(apply_settings(choose_settings(ONE_PER_HOST, 4), env, mpi_running=False))
    assert {setting.origin for setting in settled.values()} == {"hvdscale"}
    assert Path(env[RULES_FILE]) == home / ".cache" / "hvdscale" / "allreduce-rules.conf"


def test_a_second_init_knows_its_own_settings() -> None:
    env = {YIELD: "0"}
    first = apply_settings(choose_settings(TWO_HERE, 4), env, mpi_running=False)
    assert apply_settings(choose_settings(TWO_HERE, 4), env, mpi_running=True) == first


def test_settings_of_another_launch_are_taken_back() -> None:
    env: dict[str, str] = {}
    apply_settings(choose_settings(ALONE, 4), env, mpi_running=False)
    assert env["HOROVOD_CONTROLLER"] == "gloo"
    apply_settings(choose_settings(TWO_HERE, 4), env, mpi_running=False)
    assert "HOROVOD_CONTROLLER" not in env


def test_rules_lie_in_a_folder_only_the_user_writes(home: Path) -> None:
    path = rules.rules_path({"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")})
    assert path.parent == home / "cache" / "hvdscale"
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_rules_leave_a_folder_others_may_write(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules.tempfile, "tempdir", str(home / "tmp"))
    (home / "tmp").mkdir()
    shared = home / ".cache" / "hvdscale"
    shared.mkdir(parents=True)
    shared.chmod(0o777)
    path = rules.rules_path({"HOME": str(home)})
    assert path.parent == home / "tmp" / f"hvdscale-{os.getuid()}"
    path.parent.chmod(0o777)
    other = rules.rules_path({"HOME": str(home)}).parent
    assert other.parent == home / "tmp"
    assert stat.S_IMODE(other.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("text", "cores"),
    [("200000 100000\n", 2), ("150000 100000\n", 2), ("50000 100000\n", 1), ("max 100000\n", 1 << 20)],
)
def test_a_containers_quota_limits_the_cores(text: str, cores: int) -> None:
    assert cores_in_quota(text) == cores


MASKS = {"SLURM_CPU_BIND_TYPE": "mask_cpu:", "SLURM_CPU_BIND_LIST": "0x3,0xC"}


@pytest.mark.parametrize(
    ("env", "bound"),
    [
        (MASKS, True),
        ({"SLURM_CPU_BIND_TYPE": "map_cpu:", "SLURM_CPU_BIND_LIST": "0,1"}, True),
        (MASKS | {"SLURM_CPU_BIND_LIST": "0xF,0xF"}, False),
        (MASKS | {"SLURM_CPU_BIND_TYPE": "none"}, False),
        ({}, False),
    ],
    ids=["masks", "cores", "one mask for all", "none", "unsaid"],
)
def test_a_task_of_slurm_computes_on_all_of_its_own_cores(
    env: dict[str, str], bound: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tasks on a node of four cores: each sees two, or all four."""
    task = {"PMIX_RANK": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "2"}
    for name, value in (task | env).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cores, "_affinity", lambda process=0: frozenset(range(2 if bound else 4)))
    monkeypatch.setattr(cores.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(cores, "cores_in_quota", lambda: 1 << 20)
    settled = by_name(put_in_force(read_launch(), {}, mpi_running=False))
    assert {settled[name].value for name in THREADS} == {"2"}


def test_where_the_ranks_of_this_host_are_not_known_threads_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # A dictionary of its own, because settings are written into it.
    monkeypatch.setattr(os, "environ", {"HOME": os.environ["HOME"], "PMI_RANK": "0", "PMI_SIZE": "4"})
    monkeypatch.setattr(session, "_import_mpi", lambda: None)
    preparation = session.prepare()
    settled = by_name(preparation.settings)
    assert not THREADS & set(settled)
    assert preparation.threads == 0
    assert "does not say how many ranks share this host" in settled["thread counts"].reason


def test_only_a_binding_nobody_asked_for_is_undone() -> None:
    bound = {"OMPI_MCA_orte_bound_at_launch": "1"}
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(mine)})
    try:
        narrower = mine > os.sched_getaffinity(0)
        assert bound_by_default(bound) == narrower
        assert not bound_by_default(bound | {"OMPI_MCA_hwloc_base_binding_policy": "core"})
        assert not bound_by_default({})
        settled = put_in_force(TWO_HERE, dict(bound), mpi_running=False)
        assert os.sched_getaffinity(0) == mine
        assert ("CPU binding" in by_name(settled)) == narrower
    finally:
        os.sched_setaffinity(0, mine)


def tables(text: str) -> dict[int, list[tuple[int, int]]]:
    """Rules as Open MPI reads them: number of ranks -> (from bytes, algorithm)."""
    numbers = iter(map(int, text.split()))
    collectives, all_reduce, sizes = next(numbers), next(numbers), next(numbers)
    assert (collectives, all_reduce) == (1, 2)
    found = {}
    for _ in range(sizes):
        ranks, lines = next(numbers), next(numbers)
        rows = [(next(numbers), next(numbers), next(numbers), next(numbers)) for _ in range(lines)]
        assert all(row[2:] == (0, 0) for row in rows)
        found[ranks] = [row[:2] for row in rows]
    assert next(numbers, None) is None
    return found


def test_the_rules_cover_every_message_and_end_on_the_ring() -> None:
    for ranks, rows in tables(rules.rules_text()).items():
        sizes = [size for size, _ in rows]
        assert sizes[0] == 0, ranks
        assert sizes == sorted(set(sizes)), ranks
        assert rows[-1] == (rules.ring_from_bytes(ranks), 4), ranks
        assert all(algorithm != 4 for _, algorithm in rows[:-1]), ranks


def test_a_larger_job_goes_round_the_ring_later() -> None:
    """... because the ring takes 2(n-1) messages: each must be worth sending."""
    starts = {ranks: rows[-1][0] for ranks, rows in tables(rules.rules_text()).items()}
    assert list(starts) == sorted(starts)
    assert list(starts.values()) == sorted(set(starts.values()))
    assert min(size / ranks for ranks, size in starts.items()) >= 4096
