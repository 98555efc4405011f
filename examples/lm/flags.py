"""Command line of the language model examples, and how they end when it asks for what cannot be."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from hvdscale.errors import HvdscaleError, PlanError
from lm.plans import add_plan_flags, plan_of


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The launch lines of the description as they are, and each flag's default."""


def parse_flags(
    description: str,
    arguments: Sequence[str] | None = None,
    extend: Callable[[argparse.ArgumentParser], None] | None = None,
    one_run: bool = True,
) -> argparse.Namespace:
    """The command line, ``arguments`` when given; ``extend`` adds flags of an example's own.

    ``one_run``: it trains once, by one plan, and what that came to can be written to files.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=_Formatter)
    text = parser.add_argument_group("text")
    text.add_argument("--data", help="a text file or a folder; left out: the source of Python's own library")
    text.add_argument("--tokenizer", default="bytes", metavar="{bytes,bpe}", help="bpe: one is trained on the text")
    text.add_argument("--vocabulary", type=int, default=2048, help="tokens of the bpe tokenizer")
    text.add_argument("--shard", choices=("hash", "random", "ordered"), default="hash", help="how ranks share the text")
    text.add_argument("--held-out", type=float, default=0.05, help="fraction of documents for evaluation alone")
    model = parser.add_argument_group("model")
    model.add_argument("--layers", type=int, default=4)
    model.add_argument("--width", type=int, default=256)
    model.add_argument("--heads", type=int, default=4)
    model.add_argument("--context", type=int, default=128, help="tokens per window")
    train = parser.add_argument_group("training")
    train.add_argument("--steps", type=int, default=300)
    train.add_argument("--batch-size", type=int, default=8, help="windows per rank and step")
    train.add_argument("--lr", type=float, default=1e-3, help="highest learning rate")
    train.add_argument(
        "--warmup", type=int, help="steps until the highest learning rate; left out: 20, or fewer in short runs"
    )
    train.add_argument("--eval-every", type=int, default=100, help="steps between evaluations")
    train.add_argument("--seed", type=int, default=0)
    output = parser.add_argument_group("output")
    output.add_argument("--plot", help="write the loss curves to this image")
    if one_run:
        output.add_argument("--logdir", help="write TensorBoard scalars here")
        output.add_argument("--record", help="write the losses to this JSON file")
        add_plan_flags(parser)
    if extend is not None:
        extend(parser)
    flags = parser.parse_args(arguments)
    if flags.warmup is None:
        flags.warmup = min(20, max(flags.steps, 0) // 5)
    return flags


def check_flags(flags: argparse.Namespace) -> None:
    """Raises PlanError for numbers no run can have, and for a plan that cannot be."""
    for name in ("layers", "width", "heads", "context", "steps", "batch_size", "eval_every"):
        if getattr(flags, name) < 1:
            raise PlanError(f"--{name.replace('_', '-')} must be at least 1; it is {getattr(flags, name)}.")
    if flags.seed < 0:
        raise PlanError(f"--seed must be at least 0; it is {flags.seed}.")
    if not 0 < flags.lr < float("inf"):
        raise PlanError(f"--lr must be a number above 0; it is {flags.lr}.")
    if flags.width % flags.heads:
        raise PlanError(f"--width must be a multiple of --heads; they are {flags.width} and {flags.heads}.")
    if not 0 <= flags.warmup < flags.steps:
        raise PlanError(f"--warmup lies in 0..steps-1; it is {flags.warmup} of {flags.steps} steps.")
    if not 0 < flags.held_out < 1:
        raise PlanError(f"--held-out lies between 0 and 1; it is {flags.held_out:g}.")
    if hasattr(flags, "sync"):
        plan_of(flags)


def process_sets(flags: argparse.Namespace) -> str | None:
    """What ``hvd.init`` must know: ``"dynamic"`` where some ranks will work together without the others."""
    split = max(getattr(flags, "tp", 1), getattr(flags, "pp", 1)) > 1
    return "dynamic" if split or getattr(flags, "groups", "world") != "world" else None


def run(main: Callable[[], None]) -> None:
    """Call ``main``; wrong input ends the run with one line and exit code 2, on every rank alike."""
    try:
        main()
    except HvdscaleError as error:
        _stop(str(error))


def _stop(message: str) -> NoReturn:
    sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {message}\n")
    sys.exit(2)
