"""One process without a launcher: what importing, wrapping and stepping through hvdscale takes beside plain training.

Plain and wrapped steps alternate one by one in the same process, on two models of the same size.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

from ci.bench.workers.ranks import leave_result

Step = Callable[[], Any]


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternate(first: Step, second: Step, steps: int, warmup: int = 3) -> tuple[float, float]:
    """Median time of each, calls taken in turns; who goes first alternates too."""
    took: dict[Step, list[float]] = {first: [], second: []}
    for turn in range(warmup + steps):
        for step in (first, second) if turn % 2 else (second, first):
            spent = seconds(step)
            if turn >= warmup:
                took[step].append(spent)
    return statistics.median(took[first]), statistics.median(took[second])


def torch_steps() -> tuple[Step, Step, float]:
    """The plain step, the wrapped one, and the seconds that init and wrap took."""
    import torch

    import hvdscale.torch as hvd
    from ci.bench.workers.torch_step import GPT, random_batch, training_step

    plain, wrapped, data = GPT(), GPT(), random_batch(0)
    alone, ours = (torch.optim.AdamW(model.parameters(), lr=3e-4) for model in (plain, wrapped))
    start = time.perf_counter()
    hvd.init()
    ours = hvd.DistributedOptimizer(ours, model=wrapped)
    spent = time.perf_counter() - start
    return training_step(plain, alone, data), training_step(wrapped, ours, data), spent


def tensorflow_steps() -> tuple[Step, Step, float]:
    from ci.bench.workers.tensorflow_step import hvdscale, independent

    _, _, _, plain = independent()
    start = time.perf_counter()
    _, _, _, wrapped = hvdscale()
    return plain, wrapped, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--framework", choices=("torch", "tensorflow"), required=True)
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args()
    package = seconds(lambda: importlib.import_module("hvdscale"))
    import_plain = seconds(lambda: importlib.import_module(options.framework))
    import_ours = seconds(lambda: importlib.import_module(f"hvdscale.{options.framework}"))
    plain, wrapped, wrap = torch_steps() if options.framework == "torch" else tensorflow_steps()
    step_plain, step_ours = alternate(plain, wrapped, options.steps)
    leave_result(
        0,
        package_ours=package,
        import_plain=import_plain,
        import_ours=import_plain + import_ours,
        step_plain=step_plain,
        step_ours=step_ours,
        wrap_ours=wrap,
    )


if __name__ == "__main__":
    main()
