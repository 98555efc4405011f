"""Two ranks on this host train a 3 M-parameter GPT in torch: what does keeping them in step cost?

python -m ci.bench.torch_step [--quick] [--json FILE]
python -m ci.bench.torch_step --device cuda --width 1024 --layers 8     # 102 million, both ranks on one GPU
"""

from __future__ import annotations

from ci.bench.harness import Target, arguments, finish
from ci.bench.local import local_variants, settings_to_try
from ci.bench.turns import take_turns

RANKS = 2
ROLES = {"independent": "limit", "in_step": "peer", "ddp": "peer", "horovod": "peer", "hvdscale": "ours"}
NAMES = {
    "independent": "no communication",
    "in_step": "no communication, in step",
    "ddp": "torch DDP (gloo)",
    "horovod": "stock Horovod",
    "hvdscale": "hvdscale",
}
TARGETS = (Target("no communication", 0.95), Target("torch DDP (gloo)", 1.0), Target("stock Horovod", 1.5))


def main() -> int:
    parser = arguments(__doc__ or "", rounds=15, steps=4, quick=(3, 3))
    parser.add_argument(
        *("--also", "-a"),
        action="append",
        default=[],
        type=settings_to_try,
        metavar="NAME=VALUE,...",
        help="one more variant of hvdscale, with these settings; may be given several times",
    )
    parser.add_argument("--device", default="cpu", help="where the model is; on a GPU stock Horovod is left out")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    # Stock Horovod hands tensors on GPUs to NCCL, which refuses two ranks on one.
    roles = {way: role for way, role in ROLES.items() if options.device == "cpu" or way != "horovod"}
    targets = TARGETS if options.device == "cpu" else TARGETS[1:2]
    model = ("--device", options.device, "--width", str(options.width), "--layers", str(options.layers))
    variants, note = local_variants(
        "ci.bench.workers.torch_step", RANKS, roles, NAMES, options.steps, options.also, model
    )
    results = take_turns(variants, options.rounds, options.steps, options.deadline)
    where = "one host" if options.device == "cpu" else f"one {options.device}"
    return finish(f"GPT training step in torch, 2 ranks on {where}", results, targets, options, [note])


if __name__ == "__main__":
    raise SystemExit(main())
