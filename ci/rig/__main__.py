"""``python -m ci.rig check | run [--hosts N] [--rate MBIT] [--mtu BYTES] COMMAND ... | down``"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys

from ci.rig.hosts import Rig, RigError, missing, tear_down


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ci.rig", description="Several hosts on one machine.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("check", help="say whether the rig can run here")
    verbs.add_parser("down", help="remove every rig that was left behind")
    run = verbs.add_parser("run", help="run a command under mpirun, one rank per host, then remove the rig")
    run.add_argument("--hosts", type=int, default=4)
    run.add_argument("--rate", type=float, default=200, help="Mbit/s of each link (%(default)s)")
    run.add_argument("--mtu", type=int, default=1500, help="bytes of a packet, 9000 for jumbo frames (%(default)s)")
    run.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()

    lack = missing()
    if lack:
        print(lack, file=sys.stderr)
        return 2
    if options.verb == "check":
        print("The rig can run here.")
        return 0
    if options.verb == "down":
        print("removed: " + (", ".join(tear_down()) or "nothing was there"))
        return 0
    if not options.command:
        parser.error("run needs a command")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the rig is removed
    try:
        with Rig(options.hosts, options.rate, options.mtu) as rig:
            command, env = rig.mpirun(options.hosts, options.command)
            allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
            return subprocess.run(command, env={"PYTHONPATH": "", **os.environ, **allowed, **env}).returncode
    except RigError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
