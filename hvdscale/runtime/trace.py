"""Reading timelines back: also those of ranks that were killed. Merging them, and what the time went into."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdscale.errors import StateError

__all__ = ["Spent", "merge", "read", "spent"]

Event = dict[str, Any]


def read(path: Path) -> list[Event]:
    """The events of a trace. The list's end, or the last event's, may be missing: its rank was killed.

    Raises:
        StateError: it is no trace.
    """
    text = path.read_text(errors="replace")
    try:
        whole = json.loads(text)
    except ValueError:
        whole = _unfinished(text)
    events = whole.get("traceEvents") if isinstance(whole, dict) else whole
    if not isinstance(events, list) or not all(isinstance(e, dict) and "ph" in e and "pid" in e for e in events):
        raise StateError(f"{str(path)!r} is no Chrome trace: a list of events with 'ph' and 'pid'. Name a timeline.")
    return events


def _unfinished(text: str) -> Any:
    """Events as far as whole lines go."""
    lines = text.splitlines()
    if not lines or lines[0].strip() != "[":
        return None
    events = []
    for line in lines[1:]:
        try:
            events.append(json.loads(line.rstrip().rstrip(",")))
        except ValueError:  # cut in the middle
            break
    return events


def merge(paths: Sequence[Path]) -> list[Event]:
    """All events of several ranks, in the order of time.

    Raises:
        StateError: no trace among them, or two of the same rank.
    """
    events: list[Event] = []
    owners: dict[int, Path] = {}
    for path in paths:
        mine = read(path)
        for rank in {event["pid"] for event in mine}:
            if rank in owners:
                raise StateError(f"{str(owners[rank])!r} and {str(path)!r} both hold rank {rank}. Give each rank once.")
            owners[rank] = path
        events += mine
    return sorted(events, key=lambda event: event.get("ts", float("-inf")))  # equal times keep their order


@dataclass
class Spent:
    """Seconds of one rank.

    Args:
        computing: in training steps, the first left out: it begins with whatever a script does before it.
        rounds: of the training thread, in rounds: at work for them or waiting.
        under_way: while something of this rank's was on its way.
        hidden: the part of ``under_way`` during which training computed.
    """

    computing: float = 0.0
    rounds: float = 0.0
    under_way: float = 0.0
    hidden: float = 0.0


def spent(events: Iterable[Event]) -> dict[int, Spent]:
    """What each rank's time went into, by rank. A span that never ended counts to its rank's last event."""
    found: dict[int, Spent] = {}
    by_rank: dict[int, list[Event]] = {}
    for event in events:
        if event["ph"] in "BE":
            by_rank.setdefault(event["pid"], []).append(event)
    for rank, mine in sorted(by_rank.items()):
        total, open_spans = Spent(), {0: [], 1: []}  # type: ignore[var-annotated]
        before = mine[0]["ts"]
        for event in mine:
            seconds = (event["ts"] - before) / 1e6
            before = event["ts"]
            training, under_way = open_spans[0], bool(open_spans[1])
            computing = training == ["compute"]
            total.computing += seconds * computing
            total.rounds += seconds * (bool(training) and training not in (["compute"], ["start"]))
            total.under_way += seconds * under_way
            total.hidden += seconds * (under_way and computing)
            spans = open_spans[event["tid"]]
            if event["ph"] == "B":
                spans.append(event["name"])
            elif spans:
                spans.pop()
        found[rank] = total
    return found
