"""The multi-host rig: it either runs and leaves nothing behind, or says what it lacks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ci.rig import Rig, RigError, missing
from tests.launcher import REPOSITORY


def namespaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    return [line.split()[0] for line in listed.splitlines()]


SEND = """
import socket, time
link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(100):
    link.sendto(bytes(1000), ("10.77.0.2", 9))
    time.sleep(0.001)
"""


def use_and_leave() -> None:
    with Rig(hosts=2, rate_mbit=100, mtu=9000) as rig:
        assert rig.run(0, "hostname") != rig.run(1, "hostname")
        assert "mtu 9000" in rig.run(0, "ip", "link", "show", "eth0")
        rig.run(0, sys.executable, "-c", SEND)
        sent = rig.sent()[0]
        assert sent.total_bytes >= 100_000
        assert sent.packets >= 100
        raise KeyboardInterrupt


def test_a_rig_runs_and_is_gone_or_says_what_it_lacks() -> None:
    """The same promise with root and without; however the rig is left, nothing stays."""
    lack = missing()
    before = namespaces() if lack is None else []
    with pytest.raises(RigError if lack else KeyboardInterrupt, match=lack and re.escape(lack)):
        use_and_leave()
    assert before == (namespaces() if lack is None else [])


def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    """A machine whose tools cannot be found: no folder of this one is searched."""
    code = f"from ci.rig import hosts, __main__; hosts._PATH = {str(tmp_path)!r}; raise SystemExit(__main__.main())"
    said = subprocess.run([sys.executable, "-c", code, "check"], cwd=REPOSITORY, capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (2, "")
    assert "apt-get install iproute2 openssh-server" in said.stderr
