"""``--sync`` and what goes with it: which plan of agreement the command line asks for.

A new plan is one more entry of ``CHOICES``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hvdscale.errors import PlanError
from hvdscale.sync import DiLoCo, EveryStep, Gossip, LocalSGD, ParameterServer, SlowMo, drift_target, post_local

__all__ = ["CHOICES", "add_plan_flags", "plan_of"]


@dataclass(frozen=True)
class Choice:
    """One value of ``--sync``.

    Args:
        make: the plan's class.
        help: half a line.
        takes: the flag of each argument of ``make`` that can be given, by the argument's name.
        given: arguments that ``make`` needs, where their flag is left out.
    """

    make: Callable[..., Any]
    help: str
    takes: Mapping[str, str]
    given: Mapping[str, Any]


_ROUNDS = {
    "every": "every",
    "warmup": "sync_warmup",
    "wire": "wire",
    "fragments": "fragments",
    "overlap": "overlap",
    "merge": "merge",
    "state": "state",
    "groups": "groups",
    "across": "across",
}
_GOSSIP = ("every", "warmup", "fragments", "overlap", "merge")
_SERVER = {
    "staleness": "staleness",
    "servers": "servers",
    "every": "every",
    "warmup": "sync_warmup",
    "outer_lr": "outer_lr",
    "outer_momentum": "outer_momentum",
}
_EVERY = {"every": 32}

CHOICES: dict[str, Choice] = {
    "every-step": Choice(EveryStep, "average gradients at every step", {"update": "update", "wire": "wire"}, {}),
    "local-sgd": Choice(LocalSGD, "average weights in rounds", _ROUNDS, _EVERY),
    "diloco": Choice(
        DiLoCo,
        "rounds with Nesterov momentum",
        {**_ROUNDS, "outer_lr": "outer_lr", "outer_momentum": "outer_momentum"},
        _EVERY,
    ),
    "slowmo": Choice(
        SlowMo, "rounds with slow momentum", {**_ROUNDS, "lr": "outer_lr", "momentum": "outer_momentum"}, _EVERY
    ),
    "gossip": Choice(
        Gossip, "mix weights with a few peers", {"peers": "peers", **{name: _ROUNDS[name] for name in _GOSSIP}}, {}
    ),
    "async": Choice(ParameterServer, "push to a parameter server, each at its own pace", _SERVER, {"staleness": None}),
}


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """The group "agreement". Every flag but ``--sync`` is ``None`` where it is left out: the plan then decides."""
    group = parser.add_argument_group("agreement", "\n".join(f"{name:<12} {c.help}" for name, c in CHOICES.items()))
    group.add_argument("--sync", choices=tuple(CHOICES), default="every-step", help="when and on what ranks agree")
    hide: dict[str, Any] = {"default": argparse.SUPPRESS}
    group.add_argument("--update", help="local, central or sharded; who applies the averaged gradients", **hide)
    group.add_argument(
        "--every",
        metavar="H",
        help="steps between rounds (left out: 32; of gossip and async 1); post-local:N,H is every step for N steps, "
        "then every H; drift:T makes periods that end with ranks about T apart",
        **hide,
    )
    group.add_argument("--sync-warmup", type=int, metavar="N", help="average gradients in the first N steps", **hide)
    group.add_argument("--wire", help="fp32, fp16, bf16, int8, int4 or topk:f", **hide)
    group.add_argument("--fragments", type=int, metavar="P", help="send the model in P parts that take turns", **hide)
    group.add_argument("--overlap", type=int, metavar="T", help="train on for T steps while a part travels", **hide)
    group.add_argument("--merge", help="adopt, mix or mix:a; what a rank does with the new shared weights", **hide)
    group.add_argument("--state", help="keep, average or reset; the moments after a round", **hide)
    group.add_argument("--groups", help="world, or node: hosts inside often, all hosts rarely", **hide)
    group.add_argument("--across", type=int, metavar="N", help="with node: every N-th round is of all hosts", **hide)
    group.add_argument("--peers", help="of gossip: ring, pairs or exponential", **hide)
    group.add_argument("--staleness", type=int, metavar="S", help="of async: pushes a rank may be ahead", **hide)
    group.add_argument("--servers", type=int, metavar="K", help="of async: ranks that share the weights out", **hide)
    group.add_argument("--outer-lr", type=float, metavar="LR", help="of diloco (0.7), slowmo and async (1)", **hide)
    group.add_argument(
        "--outer-momentum", type=float, metavar="M", help="of diloco (0.9), slowmo (0.5), async (0)", **hide
    )


def plan_of(flags: argparse.Namespace) -> Any:
    """The plan ``flags`` ask for.

    Raises:
        PlanError: a value that no plan has, or a flag that this plan does not know.
    """
    choice = CHOICES[flags.sync]
    every_flag = {flag for c in CHOICES.values() for flag in c.takes.values()}
    for flag in sorted(every_flag - set(choice.takes.values())):
        if hasattr(flags, flag):
            users = ", ".join(name for name, c in CHOICES.items() if flag in c.takes.values())
            raise PlanError(f"--{flag.replace('_', '-')} goes with --sync {users}; --sync is {flags.sync}.")
    said = {name: getattr(flags, flag) for name, flag in choice.takes.items() if hasattr(flags, flag)}
    if "every" in said:
        said["every"] = _every(said["every"])
    return choice.make(**{**choice.given, **said})


def _every(text: str) -> Any:
    """A number of steps, or a schedule; anything else as it is, for the plan to refuse."""
    name, colon, rest = text.partition(":")
    try:
        numbers = [float(number) if name == "drift" else int(number) for number in (rest if colon else text).split(",")]
    except ValueError:
        return text
    if name == "post-local" and len(numbers) == 2:
        return post_local(*numbers)
    if name == "drift" and len(numbers) == 1:
        return drift_target(*numbers)
    return text if colon or len(numbers) > 1 else numbers[0]
