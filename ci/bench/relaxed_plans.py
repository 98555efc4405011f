"""What the benches of relaxed synchronisation compare: ways of keeping four ranks together, by name."""

from __future__ import annotations

from hvdscale.sync import DiLoCo, EveryStep, LocalSGD, Relaxed

__all__ = [
    "BEST",
    "DDP",
    "FULL_WIRE",
    "INDEPENDENT",
    "MATRIX_VALUES",
    "OTHER_VALUES",
    "PLANS",
    "POST_LOCAL",
    "WIRES",
    "sent_bytes",
]

INDEPENDENT, DDP, POST_LOCAL = "no communication", "torch DDP (gloo)", "PostLocalSGDOptimizer, 8"

PLANS: dict[str, EveryStep | Relaxed] = {
    "every step": EveryStep(),
    "local SGD, 1": LocalSGD(1),
    "local SGD, 2, int4, overlap": LocalSGD(2, wire="int4", overlap=1),
    "local SGD, 4": LocalSGD(4),
    "local SGD, 4, int8": LocalSGD(4, wire="int8"),
    "local SGD, 4, int4": LocalSGD(4, wire="int4"),
    "local SGD, 4, int8, overlap": LocalSGD(4, wire="int8", overlap=2),
    "local SGD, 8": LocalSGD(8),
    "local SGD, 8, int8, overlap": LocalSGD(8, wire="int8", overlap=4),
    "local SGD, 16, int8, overlap": LocalSGD(16, wire="int8", overlap=4),
    "local SGD, 32": LocalSGD(32),
    "DiLoCo, 8": DiLoCo(8, outer_lr=1.0, outer_momentum=0.3),
    "DiLoCo, 32": DiLoCo(32),
}
WIRES = {"int8": ("local SGD, 4, int8", 0.003), "int4": ("local SGD, 4, int4", 0.01)}
"""By wire: its plan, and how much above the same plan over fp32, ``FULL_WIRE``, its loss may end."""
FULL_WIRE = "local SGD, 4"
BEST = "local SGD, 16, int8, overlap"

# The model of the benches: what goes coded, and what goes as float32 all the same (embeddings, norms, biases).
MATRIX_VALUES, OTHER_VALUES = 3_211_264, 112_128


def sent_bytes(
    plan: EveryStep | Relaxed,
    ranks: int,
    steps: int,
    matrix_values: int = MATRIX_VALUES,
    other_values: int = OTHER_VALUES,
) -> float:
    """What each rank sends in ``steps`` steps, whole periods of ``plan``, by the formula: headers left out.

    A mean over n ranks takes 2(n-1)/n of what is averaged: 4 bytes a value, and for matrices on a narrow wire
    1 or 1/2 byte a value and 4 bytes per 256 of them.
    """
    wire = getattr(plan, "wire", "fp32")
    matrix = {"fp32": 4.0, "int8": 1 + 4 / 256, "int4": 0.5 + 4 / 256}[wire]
    a_round = 2 * (ranks - 1) / ranks * (matrix_values * matrix + other_values * 4)
    every = getattr(plan, "every", 1)
    return a_round * steps / every
