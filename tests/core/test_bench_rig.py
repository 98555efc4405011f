"""The multi-host rig: what it refuses, and the commands it makes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from ci.rig import Rig, RigError, Traffic, hosts, missing


@pytest.mark.parametrize(
    ("arguments", "says"), [((0,), "1 to 200 hosts"), ((4, 0), "positive"), ((4, -1.0), "positive")]
)
def test_what_is_no_rig_is_refused(arguments: tuple[float, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Rig(*arguments)  # type: ignore[arg-type]


def test_ranks_are_dealt_evenly() -> None:
    with pytest.raises(ValueError, match="6 ranks on 4 hosts"):
        Rig(4).mpirun(6, ["true"])


def test_mpirun_keeps_to_the_links_and_passes_variables_on() -> None:
    command, env = Rig(4).mpirun(8, ["python", "x.py"], {"A": "1"}, forward=["B"])
    text = " ".join(command)
    assert "-H 10.77.0.1:2,10.77.0.2:2,10.77.0.3:2,10.77.0.4:2" in text
    assert "--mca btl tcp,self --mca btl_tcp_if_include 10.77.0.0/24" in text
    assert [b for a, b in pairwise(command) if a == "-x"] == ["PATH", "PYTHONPATH", "B", "A"]
    assert (command[-2:], env) == (("python", "x.py"), {"A": "1"})


def test_without_root_or_tools_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hosts.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(hosts, "_PATH", str(tmp_path))
    lack = missing()
    assert lack is not None
    assert "root" in lack
    assert "apt-get install iproute2 openssh-server openssh-client util-linux" in lack
    with pytest.raises(RigError, match="apt-get install"), Rig():
        raise AssertionError("the rig was entered")


def test_traffic_is_read_from_the_kernels_table() -> None:
    table = (
        "Inter-|   Receive                            |  Transmit\n"
        "    lo: 1 2 0 0 0 0 0 0 3 4 0 0 0 0 0 0\n"
        "  eth0: 700 7 0 0 0 0 0 0 900 9 0 0 0 0 0 0\n"
    )
    sent = Traffic.sent(table)
    assert sent == Traffic(900, 9)
    assert sent.data_bytes == 900 - 9 * (14 + 20 + 32)
    assert Traffic(5000, 10).since(sent) == Traffic(4100, 1)
    assert Traffic.sent(table.replace("eth0", "wlan0")) == Traffic(0, 0)
