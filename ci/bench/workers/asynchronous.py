"""One rank of the asynchronous bench: a 3 M-parameter GPT on the source of Python's library, also with a straggler.

Without ``--seconds`` all ranks are equally fast, and steps are timed in the harness's turns. With it the last one
sleeps so long after each step that it is ``SLOWER`` times as slow, for so many seconds, and the first one watches the
evaluation loss.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import hvdscale.torch as hvd
from ci.bench.workers.ranks import digest, leave_result, median_seconds, meet
from ci.bench.workers.torch_step import BATCH, CONTEXT, GPT

SLOWER = 3
HELD_OUT_BYTES = 1 << 16
TEXT_BYTES = 1 << 22
LOOK_SECONDS = 1.0  # between two evaluations
STRETCH_STEPS = 4  # timed together: an asynchronous step may be short because the one before was long


def text() -> np.ndarray:
    """uint8[TEXT_BYTES], the modules of Python's library one after the other."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    data = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return np.frombuffer(data[:TEXT_BYTES], np.uint8)


class Windows:
    """Random windows of the text, others on each rank, and some of its end for evaluation."""

    def __init__(self, rank: int) -> None:
        data = text()
        self._train = data[:-HELD_OUT_BYTES]
        self._draw = np.random.default_rng(rank)
        self.held_out = self._cut(data[-HELD_OUT_BYTES:], np.arange(8) * (HELD_OUT_BYTES // 8))

    def __call__(self) -> torch.Tensor:
        return self._cut(self._train, self._draw.integers(0, self._train.size - CONTEXT, BATCH))

    @staticmethod
    def _cut(data: np.ndarray, starts: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.stack([data[s : s + CONTEXT + 1] for s in starts]).astype(np.int64))


def loss_of(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    logits = model(windows[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def fresh(plan: Any) -> tuple[GPT, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return model, optimizer if plan is None else hvd.DistributedOptimizer(optimizer, model=model, sync=plan)


def stepping(model: GPT, optimizer: torch.optim.Optimizer, windows: Windows) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        loss_of(model, windows()).backward()
        optimizer.step()

    return step


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def total(value: float) -> float:
    return float(hvd.allreduce(torch.tensor(value, dtype=torch.float64), op=hvd.Sum))


def equal_ranks(plan: Any, windows: Windows) -> None:
    """Seconds of a few steps of ranks that are equally fast, and what serving takes."""
    model, optimizer = fresh(plan)
    step = stepping(model, optimizer, windows)
    stretches = 0

    def stretch() -> None:
        nonlocal stretches
        stretches += 1
        for _ in range(STRETCH_STEPS):
            step()

    stretch()
    optimizer.sync.flush()
    before, stretches = optimizer.sync.metrics(), 0
    seconds = median_seconds(stretch, 1, warmup=0)
    optimizer.sync.flush()
    facts = {}
    if not isinstance(plan, hvd.EveryStep):
        after, steps = optimizer.sync.metrics(), stretches * STRETCH_STEPS
        facts["server CPU, seconds per step"] = (after["server_cpu_seconds"] - before["server_cpu_seconds"]) / steps
        facts["sent MB per step"] = (after["bytes_sent"] - before["bytes_sent"]) / steps / 1e6
    weights = digest(p.detach().numpy() for p in model.parameters())
    leave_result(hvd.rank(), weights, facts, **{f"equal ranks: seconds of {STRETCH_STEPS} steps": seconds})


def straggling(plan: Any, seconds: float, target: float, pause_seconds: float, windows: Windows) -> dict[str, float]:
    """Seconds for one step of each rank on average, and until the evaluation loss was reached."""
    model, optimizer = fresh(plan)
    step = stepping(model, optimizer, windows)
    last = hvd.rank() == hvd.size() - 1
    lockstep = isinstance(plan, hvd.EveryStep)
    reached, looked, steps = math.inf, 0.0, 0
    total(0.0)
    start = time.perf_counter()
    while True:
        passed = time.perf_counter() - start
        over = passed >= seconds
        if total(float(over)) > 0 if lockstep and steps % 4 == 0 else over and not lockstep:
            break
        step()
        steps += 1
        if last:
            time.sleep(pause_seconds)
        if hvd.rank() == 0 and passed - looked > LOOK_SECONDS and reached == math.inf:
            looked = passed
            with torch.inference_mode(), optimizer.sync.evaluating():
                if loss_of(model, windows.held_out).item() <= target:
                    reached = time.perf_counter() - start
    optimizer.sync.flush()
    elapsed = time.perf_counter() - start
    mean_steps = total(float(steps)) / hvd.size()
    reached = total(reached if hvd.rank() == 0 else 0.0)
    return {"straggler: seconds per step": elapsed / mean_steps, f"straggler: seconds to loss {target:g}": reached}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=("synchronous", "asynchronous"), required=True)
    parser.add_argument("--seconds", type=float, help="with a straggler, for so long")
    parser.add_argument("--target", type=float, default=0.0, help="evaluation loss to reach")
    options = parser.parse_args()
    hvd.init()
    plan = hvd.EveryStep() if options.way == "synchronous" else hvd.ParameterServer(None)
    windows = Windows(hvd.rank())
    meet(hvd.rank(), hvd.size())
    if options.seconds is None:
        equal_ranks(plan, windows)
        return
    alone = stepping(*fresh(None), windows)
    step_seconds = statistics.median(timed(alone) for _ in range(8))
    pause_seconds = (SLOWER - 1) * step_seconds
    leave_result(hvd.rank(), **straggling(plan, options.seconds, options.target, pause_seconds, windows))


if __name__ == "__main__":
    main()
