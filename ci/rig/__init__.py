"""Several hosts on one machine: network namespaces on shaped links, each with its own sshd, for mpirun to use."""

from ci.rig.hosts import Rig, RigError, missing, tear_down

__all__ = ["Rig", "RigError", "missing", "tear_down"]
