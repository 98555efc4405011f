"""Schedules to look at: rows of ranks over time, as text and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hvdscale.errors import PlanError
from hvdscale.model.simulate import Event, Simulation

__all__ = ["as_picture", "as_text"]

_COLOURS = {"F": "#5b8ff9", "B": "#61d9a6", "I": "#61d9a6", "W": "#f6bd16", "C": "#b8c9f2", "T": "#e8684a"}
_NAMES = {
    "F": "forward",
    "B": "backward",
    "I": "backward, inputs",
    "W": "backward, weights",
    "C": "forward again",
    "T": "sum of a shared parameter",
}


def as_text(simulation: Simulation, width: int = 120) -> str:
    """One line a rank; an action begins where its name stands and dots are waiting.

    A unit of time is as wide as names need, and less where the line would be longer than ``width``.
    """
    shortest = min((e.end - e.start for row in simulation.events for e in row if e.end > e.start), default=1.0)
    longest = max((len(_label(e, simulation)) for row in simulation.events for e in row if _shown(e)), default=2)
    scale = (longest + 1) / shortest  # characters in a unit of time
    scale = min(scale, max(width - 10, 20) / max(simulation.makespan, 1e-12))
    lines = [str(simulation)]
    for rank, row in enumerate(simulation.events):
        line = ["."] * round(simulation.makespan * scale)
        for event in filter(_shown, row):
            start, end = round(event.start * scale), round(event.end * scale)
            label = _label(event, simulation)
            if len(label) > end - start:
                label = event.action.text(with_stage=False)[: end - start]
            line[start:end] = label.ljust(end - start, "-" if end - start > len(label) + 1 else " ")
        lines.append(f"rank {rank:<2} |{''.join(line)}|")
    return "\n".join(lines)


def as_picture(simulation: Simulation, path: str | Path, measured: Simulation | None = None, unit: str = "") -> None:
    """Write a picture of ``simulation`` to ``path`` (.png, .svg, .pdf); ``measured`` is drawn below it.

    Raises:
        PlanError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise PlanError(
            f"Pictures need matplotlib ({error}): pip install 'hvdscale[viz]', or leave --plot out."
        ) from error
    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    shown = [("", simulation)] if measured is None else [("predicted: ", simulation), ("measured: ", measured)]
    height = 0.45 * simulation.schedule.ranks * len(shown) + 1.2 * len(shown)
    figure, axes = pyplot.subplots(len(shown), 1, figsize=(12, height), squeeze=False, sharex=True)
    for (title, one), axis in zip(shown, axes[:, 0], strict=True):
        kinds = _draw(axis, one)
        axis.set_title(f"{title}{one}", fontsize=9)
        axis.set_xlabel(f"time{f' ({unit})' if unit else ''}")
    handles = [Patch(color=_COLOURS[kind]) for kind in kinds]
    figure.legend(handles, [_NAMES[kind] for kind in kinds], loc="lower right", ncols=len(kinds), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw(axis: Any, simulation: Simulation) -> list[str]:
    kinds: list[str] = []
    few = sum(map(len, simulation.events)) < 600
    for rank, row in enumerate(simulation.events):
        for event in filter(_shown, row):
            kind = event.action.kind
            kinds += [kind] if kind not in kinds else []
            axis.barh(rank, event.end - event.start, left=event.start, color=_COLOURS[kind], edgecolor="white", lw=0.5)
            if few:
                label = _label(event, simulation)
                axis.text((event.start + event.end) / 2, rank, label, ha="center", va="center", fontsize=6)
    axis.set_yticks(range(simulation.schedule.ranks), [f"rank {rank}" for rank in range(simulation.schedule.ranks)])
    axis.invert_yaxis()
    axis.set_xlim(0, simulation.makespan)
    return kinds


def _shown(event: Event) -> bool:
    return event.action.kind in _COLOURS and event.end > event.start


def _label(event: Event, simulation: Simulation) -> str:
    return event.action.text(with_stage=simulation.schedule.stages > simulation.schedule.ranks)
