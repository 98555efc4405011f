"""How tensors on GPUs travel: handed to Horovod where it takes them, else through the host's memory."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

from hvdscale.errors import WorldError
from hvdscale.runtime.host import host_number
from hvdscale.runtime.settings import Setting
from hvdscale.runtime.transport import Transport

__all__ = ["WAY", "Sight", "agree_on_way", "choose_way", "look"]

WAY = "HVDSCALE_GPU"
"""``direct`` or ``host``: the user's choice. It may reach one rank only, and then counts for all."""

_REBUILD = "hvdscale build-horovod --frameworks torch --gpu nccl --install --force"


@dataclass(frozen=True)
class Sight:
    """What one rank sees.

    Attributes:
        host: a number of its host.
        gpus: how many GPUs it sees.
        visible: which, as the launcher or the user told it; ranks of a host that see the same share them.
        built: whether its Horovod was built for GPUs.
        nccl: whether by NCCL.
        asked: the user's choice, or nothing.
    """

    host: float
    gpus: int
    visible: str
    built: bool
    nccl: bool
    asked: str


def look(gpus: int, built: bool, nccl: bool, env: Mapping[str, str] | None = None) -> Sight:
    """What this rank sees; the framework says how many GPUs, Horovod what it was built for."""
    env = os.environ if env is None else env
    visible = ",".join(env.get(name, "") for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"))
    return Sight(host_number(), gpus, visible, built, nccl, env.get(WAY, ""))


def agree_on_way(mine: Sight, transport: Transport) -> Setting:
    """The way of tensors on GPUs, the same on every rank. Collective; raises as ``choose_way``, on every rank."""
    return choose_way([Sight(*json.loads(data)) for data in transport.allgather(json.dumps(astuple(mine)).encode())])


def choose_way(ranks: Sequence[Sight]) -> Setting:
    """``"direct"`` or ``"host"``, with its reason.

    Raises:
        WorldError: the user asks for what this Horovod cannot do, for what is no way, or for two ways.
    """
    asked = sorted({rank.asked for rank in ranks if rank.asked})
    if len(asked) > 1 or not set(asked) <= {"direct", "host"}:
        raise WorldError(
            f"{WAY} is direct or host, the same on every rank; it is {' and '.join(asked)}. "
            "Leave it unset to let hvdscale choose."
        )
    if asked == ["direct"] and not all(rank.built for rank in ranks):
        raise WorldError(
            f"{WAY}=direct hands tensors on GPUs to Horovod, and the one installed was built without GPUs. "
            f"Run `{_REBUILD}`, or leave {WAY} unset: they then travel through the host's memory."
        )
    if asked:
        return Setting(WAY, asked[0], "set by you", "user")
    if not all(rank.nccl for rank in ranks):
        return Setting(WAY, "host", f"Horovod was built without NCCL (`{_REBUILD}`): tensors on GPUs are copied")
    shared = _shared(ranks)
    if shared > 1:
        return Setting(WAY, "host", f"{shared} ranks share a GPU, which NCCL refuses: tensors on GPUs are copied")
    return Setting(WAY, "direct", "Horovod takes tensors on GPUs, by NCCL")


def _shared(ranks: Sequence[Sight]) -> int:
    """The most ranks that one GPU has to serve, as far as their number says: 1 where each can have its own."""
    places = Counter((rank.host, rank.visible, rank.gpus) for rank in ranks)
    return max(-(-count // gpus) if gpus else 1 for (_, _, gpus), count in places.items())
