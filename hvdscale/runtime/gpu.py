"""How tensors on GPUs travel: handed to Horovod where it takes them, else through the host's memory."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping

from hvdscale.errors import WorldError
from hvdscale.runtime.host import host_number
from hvdscale.runtime.settings import Setting
from hvdscale.runtime.transport import Transport

__all__ = ["WAY", "choose_way", "sharing_ranks"]

WAY = "HVDSCALE_GPU"
"""``direct`` or ``host``: the user's choice."""

_REBUILD = "hvdscale build-horovod --frameworks torch --gpu nccl --install --force"


def choose_way(built: bool, nccl: bool, shared: int, env: Mapping[str, str] | None = None) -> Setting:
    """The way of tensors on GPUs, ``"direct"`` or ``"host"``, with its reason.

    Args:
        built: whether Horovod was built for GPUs.
        nccl: whether by NCCL.
        shared: the most ranks that one GPU has to serve.

    Raises:
        WorldError: the user asks for what this Horovod cannot do, or for what is no way.
    """
    asked = (os.environ if env is None else env).get(WAY, "")
    if asked not in ("", "direct", "host"):
        raise WorldError(f"{WAY} is direct or host, not {asked!r}. Leave it unset to let hvdscale choose.")
    if asked == "direct" and not built:
        raise WorldError(
            f"{WAY}=direct hands tensors on GPUs to Horovod, and the one installed was built without GPUs. "
            f"Run `{_REBUILD}`, or leave {WAY} unset: they then travel through the host's memory."
        )
    if asked:
        return Setting(WAY, asked, "set by you", "user")
    if not nccl:
        return Setting(WAY, "host", f"Horovod was built without NCCL (`{_REBUILD}`): tensors on GPUs are copied")
    if shared > 1:
        return Setting(WAY, "host", f"{shared} ranks share a GPU, which NCCL refuses: tensors on GPUs are copied")
    return Setting(WAY, "direct", "Horovod takes tensors on GPUs, by NCCL")


def sharing_ranks(transport: Transport, gpus: int, visible: str) -> int:
    """The most ranks that one GPU has to serve, as far as their number says: 1 where each can have its own. Collective.

    Args:
        gpus: how many this rank sees.
        visible: which, as the launcher or the user told it; ranks that see the same share them.
    """
    mine = json.dumps([host_number(), visible, gpus]).encode()
    everyone = [tuple(json.loads(data)) for data in transport.allgather(mine)]
    return max(-(-ranks // gpus) if gpus else 1 for (_, _, gpus), ranks in Counter(everyone).items())
