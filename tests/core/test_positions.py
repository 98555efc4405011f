"""Which parameter stands where in the optimizer of a whole model, when ranks hold parts of it."""

from __future__ import annotations

import re

import pytest

from hvdscale.errors import StateError
from hvdscale.model.layout import Layout, Placement
from hvdscale.model.mesh import Mesh
from hvdscale.model.positions import WholeOptimizer, merged_groups, tell_optimizers
from hvdscale.runtime.transport import Transport, run_loopback

NAMES = ("embed", "norm", "dense", "bias", "head")

MERGED = {
    "one stage": ({0: [["dense", "embed"]], 1: [["dense", "embed"]]}, (("dense", "embed"),)),
    "two stages": ({0: [["embed", "norm"]], 1: [["dense", "head"]]}, (("embed", "norm", "dense", "head"),)),
    "two groups": (
        {0: [["embed"], ["norm"]], 1: [["embed", "dense"], ["bias"]]},  # embed is shared
        (("embed", "dense"), ("norm", "bias")),
    ),
    "an empty group": ({0: [[], ["norm"]], 1: [["head"], []]}, (("head",), ("norm",))),
    "something frozen": ({0: [["norm"]], 1: [["dense"]]}, (("norm", "dense"),)),
}


@pytest.mark.parametrize("what", MERGED)
def test_groups_of_stages_are_merged_in_the_order_of_the_model(what: str) -> None:
    ranks, expected = MERGED[what]
    assert merged_groups(ranks, NAMES) == expected


REFUSED = {
    "rank 0 has 1 and rank 1 2": {0: [["embed"]], 1: [["dense"], ["bias"]]},
    "group 0 on rank 1 does not": {0: [["embed"]], 1: [["head", "dense"]]},
    "embed is in group 0 on rank 0 and in group 1 on rank 2": {0: [["embed"], []], 2: [["head"], ["embed"]]},
}


@pytest.mark.parametrize("rule", REFUSED)
def test_groups_that_do_not_go_together_are_refused(rule: str) -> None:
    with pytest.raises(StateError, match=re.escape(rule)):
        merged_groups(REFUSED[rule], NAMES)


def test_each_copy_learns_its_own_and_an_error_is_everyones() -> None:
    mesh = Mesh(dp=2, pp=2)
    layout = Layout(mesh, (Placement("a", (2,), stages=(0,)), Placement("b", (2,), stages=(0, 1))))
    held = [{"a": rank, "b": rank} if rank % 2 == 0 else {"b": rank} for rank in range(4)]

    def tell(transport: Transport, error: str = "") -> WholeOptimizer:
        rank = transport.rank
        error = error if rank == 3 else ""
        return tell_optimizers(layout, rank, transport, [list(held[rank])], held[rank], error)

    told = run_loopback(4, tell)
    assert [t.groups for t in told] == [(("a", "b"),)] * 4
    assert [t.held for t in told] == [{"a": 0, "b": 0}] * 2 + [{"a": 2, "b": 2}] * 2
    assert set(map(str, run_loopback(4, lambda t: tell(t, "it is none")))) == {"rank 3: it is none"}
    held[1]["b"] = object()
    (text,) = set(map(str, run_loopback(4, tell)))
    assert text.startswith("rank 1: ")
    assert "object" in text
