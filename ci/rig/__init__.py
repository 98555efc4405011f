"""Several hosts on one machine: network namespaces on shaped links, each with its own sshd, for mpirun to use."""

from ci.rig.hosts import Rig, RigError, missing, tear_down
from ci.rig.traffic import HEADER_BYTES, Traffic

__all__ = ["HEADER_BYTES", "Rig", "RigError", "Traffic", "missing", "tear_down"]
