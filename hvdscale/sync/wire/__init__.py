"""What a pseudo-gradient looks like on the wire."""

from __future__ import annotations

from hvdscale.errors import PlanError
from hvdscale.sync.wire.codec import Codec
from hvdscale.sync.wire.full import Full
from hvdscale.sync.wire.half import BrainHalf, Half
from hvdscale.sync.wire.quantised import Quantised
from hvdscale.sync.wire.top_k import TopK

__all__ = ["Codec", "parse_wire"]

_FIXED: dict[str, Codec] = {
    "fp32": Full(),
    "fp16": Half(),
    "bf16": BrainHalf(),
    "int8": Quantised(8),
    "int4": Quantised(4),
}


def parse_wire(text: str) -> Codec:
    """The codec named ``fp32``, ``fp16``, ``bf16``, ``int8``, ``int4`` or ``topk:f`` (the fraction of values sent).

    Raises:
        PlanError: any other name, or a fraction outside 0 .. 1.
    """
    name, colon, rest = text.partition(":") if isinstance(text, str) else ("", "", "")
    if not colon and name in _FIXED:
        return _FIXED[name]
    try:
        fraction = float(rest) if name == "topk" else 0.0
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise PlanError(
            f"wire is one of {', '.join(_FIXED)}, or topk:f with 0 < f <= 1 (topk:0.01 sends one value in a hundred); "
            f"it is {text!r}."
        )
    return TopK(fraction)
