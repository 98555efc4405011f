"""What the benches of relaxed synchronisation compare: ways of keeping four ranks together, by name."""

from __future__ import annotations

from dataclasses import dataclass

from hvdscale.sync import DiLoCo, EveryStep, LocalSGD, Relaxed

__all__ = [
    "BEST",
    "DDP",
    "FULL_WIRE",
    "INDEPENDENT",
    "IN_THE_WAY",
    "MATRIX_VALUES",
    "OTHER_VALUES",
    "PLANS",
    "POST_LOCAL",
    "SELDOM",
    "SOONEST",
    "WIRES",
    "Inner",
    "inner_of",
    "rounds_in",
    "sent_bytes",
]

INDEPENDENT, DDP, POST_LOCAL = "no communication", "torch DDP (gloo)", "PostLocalSGDOptimizer, 8"


def growing(step: int) -> int:
    """Periods that grow as the learning rate falls: weights change most in the beginning."""
    return 2 if step < 100 else 4 if step < 200 else 8


PLANS: dict[str, EveryStep | Relaxed] = {
    "every step": EveryStep(),
    "every step, int8": EveryStep(wire="int8"),
    "every step, int4": EveryStep(wire="int4"),
    "local SGD, 1": LocalSGD(1),
    "local SGD, 2": LocalSGD(2),
    "local SGD, 2, int8": LocalSGD(2, wire="int8"),
    "local SGD, 2, int4": LocalSGD(2, wire="int4"),
    "local SGD, 2, int4, overlap": LocalSGD(2, wire="int4", overlap=1),
    "local SGD, 2, int4, halves": LocalSGD(2, wire="int4", fragments=2, overlap=1),
    "local SGD, 4": LocalSGD(4),
    "local SGD, 4, int8": LocalSGD(4, wire="int8"),
    "local SGD, 4, int4": LocalSGD(4, wire="int4"),
    "local SGD, 4, int8, overlap": LocalSGD(4, wire="int8", overlap=2),
    "local SGD, 2 to 8, int4, overlap": LocalSGD(growing, wire="int4", overlap=1),
    "local SGD, 8": LocalSGD(8),
    "local SGD, 8, int8, overlap": LocalSGD(8, wire="int8", overlap=4),
    "local SGD, 16, int8": LocalSGD(16, wire="int8"),
    "local SGD, 16, int8, overlap": LocalSGD(16, wire="int8", overlap=4),
    "local SGD, 32": LocalSGD(32),
    "DiLoCo, 8": DiLoCo(8, outer_lr=1.0, outer_momentum=0.3),
    "DiLoCo, 32": DiLoCo(32),
}


@dataclass(frozen=True)
class Inner:
    """AdamW inside a way: highest learning rate, momentum, and what it adds to the root of the second moment.

    The rate falls until step ``horizon``.
    """

    lr: float
    beta1: float
    eps: float
    horizon: int = 360


def inner_of(way: str, small: bool = False) -> Inner:
    """What the way trained best with, of what was tried; ``small``: in the model of 0.4 M parameters."""
    if small:
        tuned = {"local SGD, 2, int4": Inner(5e-3, 0.7, 2e-4), "local SGD, 4": Inner(3e-3, 0.7, 2e-4)}
        return tuned.get(way, Inner(4e-3, 0.8, 1e-4))
    # Ranks that train alone divide by the noise of their own small batches, and want a higher rate.
    together = way == DDP or isinstance(PLANS.get(way), EveryStep)
    return Inner(1e-3 if together else 2e-3, 0.8, 1e-8, 420 if way == SOONEST else Inner.horizon)


WIRES = {"int8": ("every step, int8", 0.003), "int4": ("every step, int4", 0.01)}
"""By wire: its plan, and how much above the same plan over fp32, ``FULL_WIRE``, its loss may end."""
FULL_WIRE = "every step"
BEST = "every step, int4"  # by loss after equal tokens
SOONEST = "local SGD, 2, int4, halves"  # at the loss of synchronous training over a slow link
SELDOM = "local SGD, 16, int8, overlap"  # by seconds of a step
IN_THE_WAY = "local SGD, 16, int8"  # the same, and training waits for each transfer

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
    return a_round * rounds_in(plan, steps)


def rounds_in(plan: EveryStep | Relaxed, steps: int) -> float:
    """How often ranks meet in the first ``steps`` steps; of a constant period the part of one that is left counts."""
    every = getattr(plan, "every", 1)
    if not callable(every):
        return steps / every
    rounds, met = 0, every(0)
    while met <= steps:
        rounds, met = rounds + 1, met + every(met)
    return rounds
