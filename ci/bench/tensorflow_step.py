"""Two ranks on this host train a 3 M-parameter Keras GPT in TensorFlow: what does keeping them in step cost?

python -m ci.bench.tensorflow_step [--quick] [--json FILE]
"""

from __future__ import annotations

from ci.bench.harness import Target, arguments, finish
from ci.bench.local import local_variants, settings_to_try
from ci.bench.turns import take_turns

RANKS = 2
ROLES = {"independent": "limit", "in_step": "peer", "strategy": "peer", "horovod": "peer", "hvdscale": "ours"}
NAMES = {
    "independent": "no communication",
    "in_step": "no communication, in step",
    "strategy": "MultiWorkerMirroredStrategy",
    "horovod": "stock Horovod",
    "hvdscale": "hvdscale",
}
TARGETS = (
    Target("no communication", 0.95),
    Target("MultiWorkerMirroredStrategy", 1.3),
    Target("stock Horovod", 1.4),
)


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
    options = parser.parse_args()
    variants, note = local_variants(
        "ci.bench.workers.tensorflow_step", RANKS, ROLES, NAMES, options.steps, options.also
    )
    results = take_turns(variants, options.rounds, options.steps, options.deadline)
    return finish("GPT training step in TensorFlow, 2 ranks on one host", results, TARGETS, options, [note])


if __name__ == "__main__":
    raise SystemExit(main())
