"""The rules for all-reduces, followed by a real Open MPI."""

from __future__ import annotations

import json

import pytest

from hvdscale.runtime import rules
from tests.launcher import launch

USE_RULES = "OMPI_MCA_coll_tuned_use_dynamic_rules"


@pytest.mark.parametrize("user", [{}, {USE_RULES: "0"}], ids=["our rules", "rules off"])
def test_open_mpi_follows_the_rules(user: dict[str, str]) -> None:
    """Recursive doubling of four ranks sends a message twice, the others one and a half times: count what is sent."""
    wire = {"OMPI_MCA_btl": "tcp,self", "OMPI_MCA_btl_tcp_if_include": "127.0.0.0/8", "OMPI_MCA_pml": "ob1"}
    report = launch(["-c", COUNT_SENT], ranks=4, deadline_seconds=60, env=wire | user, launcher="mpirun").check()
    sent = json.loads(next(line for line in report.splitlines() if line.startswith("[")))
    if user:
        assert sent != pytest.approx([2.0, 1.5, 1.5, 1.5], rel=0.05), "the rules made no difference"
    else:
        assert sent == pytest.approx([2.0, 1.5, 1.5, 1.5], rel=0.05)


COUNT_SENT = f"""
from hvdscale.runtime.session import prepare
prepare()
from mpi4py import MPI
import json, numpy as np

def written():
    return int(next(line.split()[1] for line in open("/proc/self/io") if line.startswith("wchar")))

sent = []
for size in (16 * 1024, 64 * 1024, {rules.ring_from_bytes(4)}, 4_000_000):
    ones, total = np.ones(size // 4, np.float32), np.zeros(size // 4, np.float32)
    before = written()
    for _ in range(10):
        MPI.COMM_WORLD.Allreduce(ones, total)
    sent.append((written() - before) / size / 10)
    assert (total == 4).all()
if MPI.COMM_WORLD.rank == 0:
    print(json.dumps(sent))
"""
