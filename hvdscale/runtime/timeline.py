"""What this rank does when: a Chrome trace of its computing, its waiting and its rounds, one file per rank.

``HVDSCALE_TIMELINE=trace.json`` makes ``trace.rank0.json``, ``trace.rank1.json``, ...; ``init()`` opens them. Perfetto
(https://ui.perfetto.dev) and chrome://tracing show each file, and what ``hvdscale timeline merge`` makes of all.

Every event is handed to the system the moment it happens, so the file of a rank that was killed ends with what it
was doing. Left out, the variable costs one comparison per call.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from hvdscale.errors import WorldError
from hvdscale.runtime.transport import Transport

__all__ = ["VARIABLE", "Timeline", "open_together", "path_of_rank", "span", "start", "step", "stop", "travel"]

VARIABLE = "HVDSCALE_TIMELINE"

_TRAINING, _NETWORK = 0, 1  # tracks of a rank
_TRACKS = {_TRAINING: "training", _NETWORK: "rounds under way"}
_ATTEMPTS = 8  # to meet at one moment

_OFF: AbstractContextManager[None] = nullcontext()
_current: Timeline | None = None


def path_of_rank(path: str, rank: int) -> Path:
    """``runs/trace.json`` -> ``runs/trace.rank3.json``."""
    whole = Path(path)
    return whole.with_name(f"{whole.stem}.rank{rank}{whole.suffix or '.json'}")


class Timeline:
    """The trace of one rank, open from now on.

    Args:
        path: the file; overwritten.
        rank: this rank, a process of the trace.
        origin_ns: ``time.perf_counter_ns()`` at the moment all ranks call zero.
        facts: what the reader should know, such as how well clocks are aligned.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, rank: int, origin_ns: int = 0, facts: Mapping[str, object] | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.rank = path, rank
        self.origin_ns = origin_ns
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._lock = threading.Lock()
        self._depth = 0  # spans of the training thread, one inside the other
        self._steps = 0
        os.write(self._file, b"[\n")
        about = [self._about("process_name", name=f"rank {rank}"), self._about("process_sort_index", sort_index=rank)]
        about += [{**self._about("thread_name", name=name), "tid": track} for track, name in _TRACKS.items()]
        self._write(*about, self._about("hvdscale", **(facts or {})), self._compute())

    def step(self) -> None:
        """One step of the optimizer is over."""
        self._steps += 1
        if not self._depth:
            self._write(self._end(_TRAINING), self._compute())

    @contextmanager
    def span(self, name: str, **about: object) -> Iterator[None]:
        """Inside, the training thread does not compute: it waits for others, or works for a round."""
        outer = not self._depth
        self._depth += 1
        self._write(*[self._end(_TRAINING)] * outer, self._begin(name, _TRAINING, **about))
        try:
            yield
        finally:
            self._depth -= 1
            ended = self._end(_TRAINING)
            self._write(ended, *[self._compute()] * outer)

    @contextmanager
    def travel(self, name: str, **about: object) -> Iterator[None]:
        """Inside, something is on its way, whether training waits for it or not."""
        self._write(self._begin(name, _NETWORK, **about))
        try:
            yield
        finally:
            self._write(self._end(_NETWORK))

    def close(self) -> None:
        """End the last span, and the list: the file is JSON to the last bracket."""
        with self._lock:
            if self._file >= 0:
                with suppress(OSError):
                    os.write(self._file, json.dumps(self._end(_TRAINING)).encode() + b"\n]\n")
                os.close(self._file)
                self._file = -1

    def _compute(self) -> dict[str, object]:
        # What comes before the end of the first step is also the reading of data, the building of a model, ...
        name = "compute" if self._steps else "start"
        return self._begin(name, _TRAINING, step=self._steps + 1)

    def _about(self, kind: str, **facts: object) -> dict[str, object]:
        return {"name": kind, "ph": "M", "pid": self.rank, "tid": _TRAINING, "args": facts}

    def _begin(self, name: str, track: int, **about: object) -> dict[str, object]:
        return {"name": name, "ph": "B", "ts": self._now(), "pid": self.rank, "tid": track, "args": about}

    def _end(self, track: int) -> dict[str, object]:
        return {"ph": "E", "ts": self._now(), "pid": self.rank, "tid": track}

    def _now(self) -> float:
        """Microseconds since the origin."""
        return (time.perf_counter_ns() - self.origin_ns) / 1000

    def _write(self, *events: Mapping[str, object]) -> None:
        text = "".join(json.dumps(event) + ",\n" for event in events).encode()
        with self._lock:
            if self._file < 0:
                return
            try:
                os.write(self._file, text)
            except OSError as error:  # a full disk: training matters more
                os.close(self._file)
                self._file = -1
                warnings.warn(
                    f"The timeline ends here: {self.path} cannot be written ({error.strerror}).", stacklevel=4
                )


def start(transport: Transport) -> None:
    """Open this rank's trace if ``HVDSCALE_TIMELINE`` names one, here or on another rank. Collective.

    Raises:
        WorldError: on every rank, if one of them cannot write its file.
    """
    global _current
    stop()
    _current = open_together(transport, os.environ)
    if _current is not None:
        atexit.register(_current.close)


def open_together(transport: Transport, env: Mapping[str, str]) -> Timeline | None:
    """The trace of this rank; ``None`` where no rank's ``env`` names one. As ``start``, which keeps it."""
    # A launcher may not have passed the variable on to other hosts: all ranks have a trace, or none.
    named = [text.decode() for text in transport.allgather(env.get(VARIABLE, "").encode()) if text]
    if not named:
        return None
    file = path_of_rank(env.get(VARIABLE) or named[0], transport.rank)
    origin_ns, facts = _meet(transport)
    problem, opened = "", None
    try:
        opened = Timeline(file, transport.rank, origin_ns, facts)
    except OSError as error:
        problem = f"rank {transport.rank} cannot write {str(file)!r} ({error.strerror})"
    problems = [text.decode() for text in transport.allgather(problem.encode()) if text]
    if problems:
        if opened is not None:
            opened.close()
        raise WorldError(
            f"{VARIABLE} names a file beside which every rank can write its own; {'; '.join(problems)}. "
            "Name another, or unset it."
        )
    return opened


def stop() -> None:
    """Close the trace, if one is open."""
    global _current
    if _current is not None:
        _current.close()
    _current = None


def span(name: str, **about: object) -> AbstractContextManager[None]:
    """``with span("wait"):`` the training thread waits, or works for a round. Nothing without a trace."""
    return _OFF if _current is None else _current.span(name, **about)


def travel(name: str, **about: object) -> AbstractContextManager[None]:
    """``with travel("round"):`` something is on its way. Nothing without a trace."""
    return _OFF if _current is None else _current.travel(name, **about)


def step() -> None:
    """The optimizer has made a step. Nothing without a trace."""
    if _current is not None:
        _current.step()


def _meet(transport: Transport) -> tuple[int, dict[str, Any]]:
    """The moment all ranks leave an all-gather, on this rank's clock: of several, the one that took the shortest."""
    moments = []
    for _ in range(_ATTEMPTS):
        entered = time.perf_counter_ns()
        transport.allgather(b"")
        moments.append((time.perf_counter_ns(), time.perf_counter_ns() - entered))
    told = [json.loads(text) for text in transport.allgather(json.dumps([took for _, took in moments]).encode())]
    longest = [max(took) for took in zip(*told, strict=True)]  # of all ranks, per attempt
    best = min(range(_ATTEMPTS), key=longest.__getitem__)
    facts = {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "ranks": transport.size,
        "begun_unix_seconds": time.time(),
        "clocks_agree_within_us": longest[best] / 1000,
    }
    return moments[best][0], facts
