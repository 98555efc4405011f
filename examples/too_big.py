"""A language model that one process has no room for, under a limit on its memory, and two train.

    python examples/too_big.py                          # ends: it does not fit
    mpirun -np 2 python examples/too_big.py             # trains: each rank has a part of every layer
    mpirun -np 2 python examples/too_big.py --stages    # trains: each rank has half of the layers

Every process may take ``--limit-mb`` beyond what Python, PyTorch and MPI take themselves. The model is described on the
meta device, where it takes no memory; each rank then makes its own part.
"""

import argparse
import resource
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch_lm import Block, LanguageModel

import hvdscale.torch as hvd


def limit_memory(megabytes: int) -> None:
    """From here on this process may map so much more memory, and no more; as ``ulimit -v`` does."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = mapped + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def mean_over_tokens(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train(flags: argparse.Namespace) -> None:
    with torch.device("meta"):
        model = LanguageModel(256, flags.context, flags.layers, flags.width, flags.heads)
    whole = sum(p.numel() * p.element_size() for p in model.parameters()) >> 20
    if flags.stages:
        sharded = hvd.shard_model(
            model, hvd.Mesh(pp=hvd.size()), by="graph", whole=(Block,), loss=mean_over_tokens, microbatches=flags.batch
        )
    else:
        sharded = hvd.shard_model(model, hvd.Mesh(tp=hvd.size()), by="features", loss=mean_over_tokens)
    optimizer = torch.optim.AdamW(sharded.parameters(), 3e-4, foreach=False)  # one parameter's temporaries at a time
    optimizer = hvd.DistributedOptimizer(optimizer, model=sharded)
    text = torch.tensor(list(Path(__file__).read_bytes()))[: flags.batch * flags.context + 1]
    inputs, targets = (t.view(flags.batch, flags.context) for t in (text[:-1], text[1:]))
    for step in range(flags.steps):  # over the same lines, so that a few steps show that it learns
        optimizer.zero_grad()
        loss = sharded.train_step(inputs, targets)
        optimizer.step()
        if hvd.rank() == 0:
            print(f"step {step}  loss {loss.item():.3f}", flush=True)
    if hvd.rank() == 0:
        here = sum(p.numel() * p.element_size() for p in sharded.parameters()) >> 20
        print(f"weights {whole} MB in all, {here} MB on this rank; gradients and moments take three times as much more")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-mb", type=int, default=900, help="memory a process may take (%(default)s)")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--context", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2, help="samples in a step (%(default)s)")
    parser.add_argument("--stages", action="store_true", help="cut the model into stages, not every layer")
    parser.add_argument("--steps", type=int, default=3)
    flags = parser.parse_args()
    hvd.init()
    limit_memory(flags.limit_mb)
    try:
        train(flags)
    except (MemoryError, RuntimeError) as error:
        if "allocate memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        sys.stderr.write(f"too_big.py: the model does not fit {flags.limit_mb} MB a process; start more of them.\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
