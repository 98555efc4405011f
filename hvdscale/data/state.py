"""Saved states of readers: plain JSON values, checked field by field before anything is made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from hvdscale.data.certificate import REMEMBERED_EPOCHS, add_sums
from hvdscale.data.checks import differ, integer, one_of, shares_from, shortened, states_of_all
from hvdscale.data.format import EVEN_FORMAT, FORMAT, fingerprint
from hvdscale.data.interruption import Interruption, Leg
from hvdscale.data.position import Position
from hvdscale.data.types import Int64s, Keys, PolicyName, Share, TailName
from hvdscale.errors import PlanError, StateError

if TYPE_CHECKING:
    from hvdscale.data.plan import ShardPlan

__all__ = ["Past", "check_own_state", "make_state", "merge_states"]

_FURTHEST_AHEAD = 4096  # epochs that one reader may be ahead of another
_LARGEST_BATCH = 2**62


@dataclass(frozen=True)
class Past:
    """An interrupted run: its plan, and the positions of all its readers by shard."""

    n: int
    policy: PolicyName
    seed: int
    tail: TailName
    shares: tuple[Share, ...]
    keys_digest: str
    even: bool
    interrupted: tuple[Interruption, ...]
    positions: tuple[Position, ...]

    @property
    def first_epoch(self) -> int:
        """The epoch of the slowest reader."""
        return min(position.epoch for position in self.positions)

    def check_epochs(self) -> None:
        """Raises PlanError where epochs lie so far apart that no run can have left them."""
        last = max([*(position.epoch for position in self.positions), *(each.epoch for each in self.interrupted)])
        if last - self.first_epoch > _FURTHEST_AHEAD:
            raise PlanError(
                f"the epochs of one run lie at most {_FURTHEST_AHEAD} apart; these go from {self.first_epoch} to {last}"
            )

    def interruptions(self, sizes_in: Callable[[int], Int64s]) -> tuple[Interruption, ...]:
        """Every epoch that some reader has begun and not all have ended, with what was read of it.

        ``sizes_in(epoch)`` gives the sizes of this run's shards: int64[shards].
        """
        last = max(position.epoch for position in self.positions)
        earlier = {each.epoch: each for each in self.interrupted}
        found = []
        for epoch in range(self.first_epoch, last + 1):
            leg = Leg(self.shares, self._delivered(epoch, sizes_in(epoch)))
            past = earlier.get(epoch, Interruption(epoch, (), 0))
            legs = _joined(past.legs, leg) if any(leg.delivered) else past.legs
            if legs:
                found.append(Interruption(epoch, legs, self._certificate(past)))
        return (*found, *(each for each in self.interrupted if each.epoch > last))

    def checked_keys(self, keys: Keys | None) -> Keys | None:
        """The keys to make the plan of.

        Raises:
            StateError: the interrupted plan had keys and none are given, or the other way round.
        """
        if (keys is None) != (not self.keys_digest):
            had, give = ("had keys", "Pass keys=") if self.keys_digest else ("had no keys", "Leave out keys=")
            raise StateError(f"A run goes on with the keys it had; the saved plan {had}. {give}.")
        return keys

    def check_digest(self, digest: str) -> None:
        """Raises StateError where the keys are not those of the saved plan."""
        if digest != self.keys_digest:
            raise StateError(f"The keys are not those of the saved plan: digest {digest}, saved {self.keys_digest}.")

    def _delivered(self, epoch: int, sizes: Int64s) -> tuple[int, ...]:
        for at in self.positions:
            if at.epoch == epoch:
                at.check(sizes, self.tail)
        counts = (
            int(sizes[at.shard]) if at.epoch > epoch else at.delivered if at.epoch == epoch else 0
            for at in self.positions
        )
        return tuple(counts)

    def _certificate(self, past: Interruption) -> int | None:
        parts = [past.certificate, *(self._sum(at, past.epoch) for at in self.positions)]
        known = [part for part in parts if part is not None]
        return add_sums(known) if len(known) == len(parts) else None

    def _sum(self, at: Position, epoch: int) -> int | None:
        return None if epoch < at.epoch - REMEMBERED_EPOCHS else at.sums.get(epoch, 0)


def _joined(legs: tuple[Leg, ...], leg: Leg) -> tuple[Leg, ...]:
    """The legs with one more; one by the same shards as the last only lengthens it."""
    if legs and legs[-1].shares == leg.shares:
        both = tuple(a + b for a, b in zip(legs[-1].delivered, leg.delivered, strict=True))
        return (*legs[:-1], Leg(leg.shares, both))
    return (*legs, leg)


def make_state(plan: ShardPlan, position: Position) -> dict[str, Any]:
    """What a reader saves: lists, dicts, strings, integers and floats only."""
    return {
        "format": FORMAT,
        "fingerprint": fingerprint(),
        "plan": _plan_facts(plan),
        "shard": position.shard,
        "batch_size": position.batch_size,
        "epoch": position.epoch,
        "step": position.step,
        "delivered": position.delivered,
        "sums": {str(epoch): f"{value:016x}" for epoch, value in position.sums.items()},
    }


def _plan_facts(plan: ShardPlan) -> dict[str, Any]:
    return {
        "n": plan.n,
        "policy": plan.policy,
        "seed": plan.seed,
        "tail": plan.tail,
        "shares": _shares_to_json(plan.shares),
        "keys_digest": plan.keys_digest,
        **({"even": EVEN_FORMAT} if plan.even else {}),  # left out where it is not, as in older states
        "interrupted": [
            {
                "epoch": each.epoch,
                "certificate": None if each.certificate is None else f"{each.certificate:016x}",
                "legs": [{"shares": _shares_to_json(g.shares), "delivered": list(g.delivered)} for g in each.legs],
            }
            for each in plan.interrupted
        ],
    }


def check_own_state(state: Mapping[str, Any], plan: ShardPlan, shard: int, batch_size: int) -> Position:
    """The position in a state that a reader of this plan, shard and batch size may load.

    Raises:
        StateError: it is damaged, or of another plan, shard, batch size or format.
    """
    position = _position(state)
    _same_plan("This reader's plan", _plan_facts(plan), "the state's", state["plan"])
    for name, own, saved in (("shard", shard, position.shard), ("batch_size", batch_size, position.batch_size)):
        if own != saved:
            raise StateError(
                f"A reader loads the state of its own {name}; that is {own}, the state's {saved}. "
                "ShardPlan.resume takes states of any shards and batch sizes."
            )
    if position.epoch < plan.first_epoch:
        raise StateError(f"The plan starts in epoch {plan.first_epoch}; the state is of epoch {position.epoch}.")
    position.check(plan.sizes(position.epoch), plan.tail)
    return position


def merge_states(states: Sequence[Mapping[str, Any]]) -> Past:
    """The run that left these states.

    Raises:
        StateError: a state that is damaged or of another format; states of different plans; shards that are
            missing or come twice.
    """
    states = states_of_all(states)
    positions = sorted((_position(state) for state in states), key=lambda at: at.shard)
    for i, state in enumerate(states):
        _same_plan("The first state's plan", states[0]["plan"], f"state {i}'s", state["plan"])
    plan = states[0]["plan"]
    try:
        one_of("policy", plan["policy"], get_args(PolicyName))
        one_of("tail", plan["tail"], get_args(TailName))
        shares = _shares(plan["shares"])
        past = Past(
            integer("n", plan["n"], 0),
            plan["policy"],
            integer("seed", plan["seed"], 0),
            plan["tail"],
            shares,
            str(plan["keys_digest"]),
            _even(plan.get("even")),
            tuple(_interruption(each) for each in plan["interrupted"]),
            tuple(positions),
        )
        past.check_epochs()
        epochs = [each.epoch for each in past.interrupted]
        if len(set(epochs)) < len(epochs):
            raise PlanError(f"an epoch is interrupted once, by all its legs; these are {epochs!s:.80}")
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise StateError(f"The plan in the states is damaged: {_said(error)}") from error
    shards = shares[-1][0]
    have = [at.shard for at in positions]
    if have != list(range(shards)):
        missing = sorted(set(range(shards)) - set(have))
        twice = sorted({shard for shard in have if have.count(shard) > 1})
        raise StateError(
            f"resume takes one state of each of the {shards} shards; there are {len(have)} states"
            + (f", none of shards {missing[:8]}" if missing else "")
            + (f", several of shards {twice[:8]}" if twice else "")
            + "."
        )
    return past


def _position(state: Mapping[str, Any]) -> Position:
    if not isinstance(state, Mapping) or "format" not in state:
        raise StateError(f"A state is what reader.state_dict() returned; this is {str(state)[:80]!r}.")
    if differ(state["format"], FORMAT):
        raise StateError(f"This version reads states of format {FORMAT!r}; this one is {state['format']!r}.")
    if differ(state.get("fingerprint"), fingerprint()):
        raise StateError(
            f"The build that saved this state places samples differently: its fingerprint is "
            f"{state.get('fingerprint')!r}, here {fingerprint()!r}. Resume with the version that saved it."
        )
    try:
        position = Position(
            integer("shard", state["shard"], 0),
            integer("batch_size", state["batch_size"], 1, _LARGEST_BATCH),
            integer("epoch", state["epoch"], 0),
            integer("step", state["step"], 0),
            integer("delivered", state["delivered"], 0),
            {integer("epoch of a sum", int(epoch), 0): _sum(value) for epoch, value in state["sums"].items()},
        )
        if not isinstance(state["plan"], Mapping):
            raise TypeError("plan is no table")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StateError(f"This state is damaged: {_said(error)}") from error
    return position


def _same_plan(one: str, a: Mapping[str, Any], other: str, b: Mapping[str, Any]) -> None:
    for name in a.keys() | b.keys():
        if differ(a.get(name), b.get(name)):
            raise StateError(
                f"States belong to one plan; {name} differs: {one} has {shortened(a.get(name))}, {other} "
                f"{shortened(b.get(name))}."
            )


def _said(error: Exception) -> str:
    return f"{error.args[0]!r} is missing." if isinstance(error, KeyError) else str(error)


def _interruption(saved: Mapping[str, Any]) -> Interruption:
    legs = []
    for leg in saved["legs"]:
        shares = _shares(leg["shares"])
        delivered = tuple(integer("delivered", count, 0) for count in leg["delivered"])
        if len(delivered) != shares[-1][0]:
            raise PlanError(f"a leg of {shares[-1][0]} shards has {len(delivered)} counts")
        legs.append(Leg(shares, delivered))
    if not legs:
        raise PlanError("an interrupted epoch has no legs")
    certificate = None if saved["certificate"] is None else _sum(saved["certificate"])
    return Interruption(integer("epoch", saved["epoch"], 0), tuple(legs), certificate)


def _even(saved: object) -> bool:
    if saved is not None and differ(saved, EVEN_FORMAT):
        raise PlanError(f"even shards are made as {EVEN_FORMAT!r} here; this state's as {saved!r}.")
    return saved is not None


def _sum(text: str) -> int:
    return integer("a sum", int(text, 16), 0, 2**64 - 1)


def _shares_to_json(shares: Sequence[Share]) -> list[list[Any]]:
    return [[shards, None if weights is None else list(weights)] for shards, weights in shares]


def _shares(saved: Sequence[Sequence[Any]]) -> tuple[Share, ...]:
    found = shares_from(saved)
    if not found:
        raise PlanError("it has no shards")
    return found
