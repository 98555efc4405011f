"""Runs the Python examples of README.md as they are written: ``mpirun -np 2 python -m tests.documented torch``.

Each starts from a page of its own, on which stand the names a reader has by then: a model, batches, a loss.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["blocks", "framework_of"]

REPOSITORY = Path(__file__).resolve().parents[1]


def blocks(path: Path) -> list[str]:
    """The fenced Python of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S)


def framework_of(block: str) -> str:
    """What a block imports; one that goes on from another's import is tried in PyTorch."""
    found = re.search(r"import hvdscale\.(\w+)", block)
    return found[1] if found else "torch"


def torch_page() -> dict[str, Any]:
    import torch

    import hvdscale.torch as hvd

    hvd.init()
    torch.seed()  # another model on each rank
    data = np.arange(256, dtype=np.float32).reshape(64, 4)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    loader = hvd.shard_dataset(data, hvd.ShardPlan(len(data), hvd.size(), "random", seed=7), batch_size=8)
    return {
        "torch": torch,
        "hvd": hvd,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "batches": [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(3)],
        "loss": torch.nn.functional.mse_loss,
        "data": data,
        "states_of_all_ranks": hvd.allgather_object(loader.state_dict()),
    }


def keras_page() -> dict[str, Any]:
    import keras
    import tensorflow as tf

    model = keras.Sequential([keras.Input([4]), keras.layers.Dense(1)])
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(model.trainable_variables)
    x, y = np.random.default_rng(0).normal(size=(2, 8, 4)).astype("float32")
    return {
        "tf": tf,
        "keras": keras,
        "model": model,
        "optimizer": optimizer,
        "loss": lambda y, predicted: tf.reduce_mean((predicted - y) ** 2),
        "x": tf.constant(x),
        "y": tf.constant(y[:, :1]),
    }


PAGES: dict[str, Callable[[], dict[str, Any]]] = {"torch": torch_page, "tensorflow": keras_page, "keras": keras_page}


def weights_of(model: Any) -> bytes:
    """This rank's weights, bit for bit, in 16 bytes."""
    weights = model.get_weights() if hasattr(model, "get_weights") else [p.detach() for p in model.parameters()]
    return hashlib.blake2b(b"".join(np.asarray(w).tobytes() for w in weights), digest_size=16).digest()


def main(frameworks: list[str]) -> None:
    os.chdir(REPOSITORY)
    for number, block in enumerate(blocks(REPOSITORY / "README.md"), 1):
        if framework_of(block) in frameworks:
            page = PAGES[framework_of(block)]()
            before = weights_of(page["model"])
            exec(compile(block, f"README.md, example {number}", "exec"), page)
            everyone = page["hvd"].world().transport.allgather(before + weights_of(page["model"]))
            if page["hvd"].rank() == 0:
                assert len({said[:16] for said in everyone}) == len(everyone), "ranks must start apart"
                agree = len({said[16:] for said in everyone}) == 1
                print(f"example {number}: {'trains together' if agree else 'leaves the model alone'}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
