"""Train the model of ``torch_lm.py`` once per plan of agreement, and draw the losses against steps, seconds and bytes.

    mpirun -np 4 python examples/compare_plans.py
    mpirun -np 4 python examples/compare_plans.py --steps 200 --plot plans.png \\
        --plan every-step --plan "local-sgd --every 8" --plan "diloco --every 16 --wire int8 --overlap 4"

A plan is written as behind ``--sync``. Each starts from the same weights and reads the same batches; evaluations are
left out of its seconds. Between machines the picture shows what the network costs; on one machine, what rounds do.
"""

import argparse
import contextlib
import io
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from lm.batches import Share
from lm.flags import parse_flags, run
from lm.plans import add_plan_flags, plan_of
from lm.report import say
from lm.together import load_together
from torch import nn
from torch_lm import LanguageModel, mean_of_ranks, schedule

import hvdscale.torch as hvd
from hvdscale.errors import PlanError

PLANS = ("every-step", "local-sgd --every 8", "diloco --every 8 --wire int8 --outer-momentum 0.5")


@dataclass
class Curve:
    """What one plan's training came to, a point per evaluation."""

    plan: str
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    sent_bytes: list[float] = field(default_factory=list)  # by this rank
    losses: list[float] = field(default_factory=list)


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("plans", "Written as behind --sync of torch_lm.py, whose --help lists the flags.")
    group.add_argument(
        "--plan", action="append", dest="plans", metavar="PLAN", help=f"one more; left out: {', '.join(PLANS)}"
    )
    parser.set_defaults(plot="plans.png", eval_every=20, steps=200, shard="random")


def read_plan(text: str) -> object:
    """The plan behind ``--sync``.

    Raises:
        PlanError: it cannot be.
    """
    parser = argparse.ArgumentParser(add_help=False)
    add_plan_flags(parser)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return plan_of(parser.parse_args(["--sync", *text.split()]))
    except SystemExit:
        raise PlanError(
            f"--plan is written as behind --sync of torch_lm.py, such as {PLANS[1]!r}; it is {text!r}. See its --help, "
            "agreement."
        ) from None


def train(text: str, flags: argparse.Namespace, share: Share) -> Curve:
    torch.manual_seed(flags.seed)
    model = LanguageModel(share.vocabulary, flags.context, flags.layers, flags.width, flags.heads)
    optimizer = torch.optim.AdamW(model.parameters(), flags.lr, weight_decay=0.01)
    optimizer = hvd.DistributedOptimizer(optimizer, model=model, sync=read_plan(text))
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, flags.steps, flags.warmup))
    a_gradient = 2 * (hvd.size() - 1) / hvd.size() * sum(4 * p.numel() for p in model.parameters())  # on a ring
    curve, seconds = Curve(text), 0.0
    for step in range(1, flags.steps + 1):
        started = time.perf_counter()
        optimizer.zero_grad()
        model.loss(*share.batches[step - 1]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        if step == flags.steps:
            optimizer.sync.flush()
        seconds += time.perf_counter() - started
        if step % flags.eval_every == 0 or step == flags.steps:
            curve.steps.append(step)
            curve.seconds.append(seconds)
            curve.sent_bytes.append(optimizer.sync.metrics().get("bytes_sent", step * a_gradient))
            curve.losses.append(evaluate(model, optimizer, share, flags.batch_size))
    return curve


def evaluate(model: LanguageModel, optimizer: torch.optim.Optimizer, share: Share, batch_size: int) -> float:
    """The held-out loss of the weights that all ranks share."""
    inputs, targets = share.held_out
    total = 0.0
    with optimizer.sync.evaluating(), torch.no_grad():
        for i in range(0, len(inputs), batch_size):
            piece = targets[i : i + batch_size]
            total += model.loss(inputs[i : i + batch_size], piece).item() * piece.size
    summed, count = mean_of_ranks(np.array([total, targets.size], np.float64))
    return float(summed / max(count, 1))


def draw(path: str, curves: list[Curve]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(12, 4.5), sharey=True, layout="constrained")
    for curve in curves:
        megabytes = np.array(curve.sent_bytes) / 1e6
        for axes, places in zip(panels, (curve.steps, curve.seconds, megabytes), strict=True):
            axes.plot(places, curve.losses, ".-", label=curve.plan)
    for axes, name in zip(panels, ("steps", "seconds", "MB sent by a rank"), strict=True):
        axes.set(xlabel=name)
        axes.grid(alpha=0.3)
    if any(curve.sent_bytes[-1] for curve in curves):  # more than one rank
        # Before the first round a rank has sent nothing: there is no place for that.
        panels[2].set_xscale("log", nonpositive="mask")
    panels[0].set_ylabel("held-out loss (nats per token)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center")
    figure.savefig(path, dpi=110)


def main() -> None:
    flags = parse_flags(__doc__, extend=add_flags, one_run=False)
    plans = flags.plans or list(PLANS)
    # What cannot be is said before the first of them has run.
    in_groups = [getattr(read_plan(text), "groups", "world") != "world" for text in plans]
    hvd.init(process_sets="dynamic" if any(in_groups) else None)
    share = load_together(flags, hvd.rank(), hvd.size(), mean_of_ranks)
    curves = []
    for text in plans:
        curves.append(train(text, flags, share))
        if hvd.rank() == 0:
            end = curves[-1]
            say(
                f"{text:<50} held-out loss {end.losses[-1]:.4f} after {end.steps[-1]} steps, {end.seconds[-1]:.1f} s, "
                f"{end.sent_bytes[-1] / 1e6:,.1f} MB sent by a rank"
            )
    if hvd.rank() == 0:
        draw(flags.plot, curves)
        say(f"curves in {flags.plot}")


if __name__ == "__main__":
    run(main)
