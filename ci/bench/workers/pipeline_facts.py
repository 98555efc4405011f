"""One rank of the pipeline bench's other figures: what it holds, what it peaks at, how fast activations travel."""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

WIDTH, LAYERS = 2048, 12  # 4.2 M parameters each: 201 MB in all, 805 MB with gradients and Adam's moments
TRANSFER_BYTES = 16 << 20


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def held() -> dict[str, float]:
    """Parameters and optimizer state of this rank over those of the whole model, and its peak memory in a step."""
    import hvdscale.torch as hvd

    before = peak_bytes()
    layers = [hvd.Lazy(nn.Linear, WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
    sharded = hvd.shard_model(layers, hvd.Mesh(pp=hvd.size()), loss=nn.functional.mse_loss, microbatches=4)
    optimizer = torch.optim.AdamW(sharded.parameters())
    x = torch.randn(8, WIDTH)
    for _ in range(2):
        optimizer.zero_grad()
        sharded.train_step(x, x)
        optimizer.step()
    own = sum(p.nbytes for p in sharded.parameters())
    own += sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
    every = LAYERS * WIDTH * WIDTH * 4 * 3
    return {"share of parameters and optimizer state": own / every, "peak MB": (peak_bytes() - before) / 1e6}


def transfer() -> dict[str, float]:
    """MB/s of an activation there and back: through the post, with receives posted ahead, and by bare mpi4py."""
    from mpi4py import MPI

    import hvdscale.torch as hvd
    from hvdscale.torch.channel import open_post

    post, comm = open_post(), MPI.COMM_WORLD.Dup()
    rank, peer = hvd.rank(), 1 - hvd.rank()
    sent, got = np.ones(TRANSFER_BYTES, np.uint8), np.zeros(TRANSFER_BYTES, np.uint8)

    def ours() -> None:
        back = post.receive(got, peer, 0)
        if rank == 0:
            post.send(sent, peer, 0).wait()
            back.wait()
        else:
            back.wait()
            post.send(sent, peer, 0).wait()

    def bare() -> None:
        if rank == 0:
            comm.Send([sent, MPI.BYTE], peer)
            comm.Recv([got, MPI.BYTE], peer)
        else:
            comm.Recv([got, MPI.BYTE], peer)
            comm.Send([sent, MPI.BYTE], peer)

    took: dict[str, list[float]] = {"ours": [], "bare": []}
    for turn in range(40):
        for name, way in (("ours", ours), ("bare", bare)):
            comm.Barrier()
            start = time.perf_counter()
            way()
            if turn >= 5:
                took[name].append(time.perf_counter() - start)
    rate = {name: 2 * TRANSFER_BYTES / statistics.median(times) / 1e6 for name, times in took.items()}
    return {"post MB/s": rate["ours"], "bare mpi4py MB/s": rate["bare"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", choices=("held", "transfer"), required=True)
    options = parser.parse_args()
    import hvdscale.torch as hvd

    hvd.init()
    figures = transfer() if options.what == "transfer" else held()
    (Path(os.environ["BENCH_FOLDER"]) / f"facts-{hvd.rank()}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
