"""One process: the CPU time of a round on a torch GPT, its peers and the network left out, beside one pass over it."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from ci.bench.mirror import Mirror
from ci.bench.relaxed_cost import ADD, PASS, PLANS
from ci.bench.workers.ranks import leave_result
from ci.bench.workers.torch_step import GPT

REPEATS = 15
_SWEEP = np.zeros(1 << 25, np.float32)  # 128 MiB: more than a processor's caches


def cpu_seconds(work: Callable[[], object]) -> float:
    """The best of several, so that what else the machine does counts least.

    Each begins with caches that hold something else, as they do after a training step.
    """
    took = []
    for _ in range(REPEATS):
        _SWEEP[:] += 1
        start = time.process_time()
        work()
        took.append(time.process_time() - start)
    return min(took)


def main() -> None:
    import hvdscale.torch  # noqa: F401 - the adapter stands on Horovod, which must be there
    from hvdscale.sync import Rounds
    from hvdscale.torch.store import TorchStore

    torch.set_num_threads(1)
    model = GPT()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    size = sum(p.numel() for p in model.parameters())
    weights, change = np.ones(size, np.float32), np.ones(size, np.float32)
    gradients = [torch.ones_like(p) for p in model.parameters()]

    def add() -> None:
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.add_(gradient, alpha=-1e-6)

    figures = {PASS: cpu_seconds(lambda: np.subtract(weights, change, out=weights)), ADD: cpu_seconds(add)}
    for name, plan in PLANS.items():
        rounds = Rounds(plan, TorchStore(optimizer, list(model.named_parameters()), None), Mirror())
        rounds.before_step()
        rounds.after_step()  # work space is made in the first
        figures[name] = cpu_seconds(rounds.after_step)
    leave_result(0, **figures)


if __name__ == "__main__":
    main()
