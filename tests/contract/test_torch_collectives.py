"""Collectives for every dtype and layout, blocking and not, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hvdscale.sync import Reduction
from hvdscale.torch import handles

DTYPES = [
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda t: t,
    "transposed": lambda t: t.t(),
    "every second column": lambda t: t[:, ::2],
    "empty": lambda t: t[:0],
}


@pytest.fixture(autouse=True)
def nothing_is_left_to_do() -> Iterator[None]:
    """What a handle has left to do once its output is there is dropped when that is done."""
    yield
    assert not handles._unfinished


def own(rank: int, dtype: torch.dtype, layout: str = "plain") -> Tensor:
    """A (4, 6) tensor of small whole numbers, laid out as asked, other on every rank."""
    return LAYOUTS[layout](((torch.arange(24).view(4, 6) % 7) + rank).to(dtype))


def names(hvd: Any) -> dict[str, Callable[[Tensor], Tensor]]:
    """Every spelling of the sum."""
    return {
        "allreduce": lambda t: hvd.allreduce(t, op=hvd.Sum),
        "allreduce_": lambda t: hvd.allreduce_(t, op=hvd.Sum),
        "allreduce_async": lambda t: hvd.synchronize(hvd.allreduce_async(t, op=hvd.Sum)),
        "allreduce_async_": lambda t: hvd.synchronize(hvd.allreduce_async_(t, op=hvd.Sum)),
        "grouped_allreduce": lambda t: hvd.grouped_allreduce([t, t + 1], op=hvd.Sum)[0],
        "grouped_allreduce_": lambda t: hvd.grouped_allreduce_([t, t + 1], op=hvd.Sum)[0],
        "grouped_allreduce_async": lambda t: hvd.synchronize(hvd.grouped_allreduce_async([t, t + 1], op=hvd.Sum))[0],
        "grouped_allreduce_async_": lambda t: hvd.synchronize(hvd.grouped_allreduce_async_([t, t + 1], op=hvd.Sum))[0],
    }


SUMS = ["allreduce", "allreduce_", "allreduce_async", "allreduce_async_"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*SUMS, *(f"grouped_{name}" for name in SUMS)])
def test_sums_of_every_dtype_and_layout(hvd: Any, rank: int, size: int, name: str, dtype: torch.dtype) -> None:
    for layout in LAYOUTS:
        tensor = own(rank, dtype, layout)
        kept = tensor.clone()
        result = names(hvd)[name](tensor)
        wanted = sum(own(r, torch.float64, layout) for r in range(size))
        assert result.dtype == dtype, layout
        torch.testing.assert_close(result.double(), wanted, msg=lambda text, layout=layout: f"{layout}: {text}")
        in_place = name.endswith("_")
        assert torch.equal(tensor, result if in_place else kept), layout
        assert (result is tensor) == in_place


@pytest.mark.parametrize(("op", "wanted"), [("Sum", True), ("Max", True), ("Min", False), ("Average", False)])
def test_truths_are_combined(hvd: Any, rank: int, size: int, op: str, wanted: bool) -> None:
    """True on one rank of several: any() for sums and maxima, all() for minima and averages."""
    result = hvd.allreduce(torch.tensor([rank == 0, True, False]), op=getattr(hvd, op))
    assert result.tolist() == [wanted or size == 1, True, False]


def test_bfloat16_is_added_in_float32(hvd: Any, rank: int, size: int) -> None:
    """256 + 1 is 256 in bfloat16: added up rank by rank, ones would be lost; their float32 sum is not."""
    tensor = torch.tensor([256.0 if rank == 0 else 1.0], dtype=torch.bfloat16)
    result = hvd.allreduce(tensor, op=hvd.Sum, prescale_factor=2.0)
    assert result.item() == torch.tensor(512.0 + 2 * (size - 1)).bfloat16().item()


MOVED = [torch.bool, *DTYPES]


@pytest.mark.parametrize("dtype", MOVED, ids=str)
def test_gathers_and_broadcasts_are_exact(hvd: Any, rank: int, size: int, dtype: torch.dtype) -> None:
    for layout in LAYOUTS:
        tensor = own(rank, dtype, layout)
        wanted = torch.cat([own(r, dtype, layout) for r in range(size)])
        for gathered in (
            hvd.allgather(tensor),
            hvd.synchronize(hvd.allgather_async(tensor)),
            hvd.grouped_allgather([tensor, tensor])[1],
            hvd.synchronize(hvd.grouped_allgather_async([tensor, tensor]))[1],
        ):
            assert gathered.dtype == dtype
            assert torch.equal(gathered, wanted), layout
        root = size - 1
        for received in (
            hvd.broadcast(tensor, root),
            hvd.synchronize(hvd.broadcast_async(tensor, root)),
            hvd.broadcast_(tensor.clone(), root),
        ):
            assert torch.equal(received, own(root, dtype, layout)), layout
        assert torch.equal(tensor, own(rank, dtype, layout)), layout
        assert hvd.synchronize(hvd.broadcast_async_(tensor, root)) is tensor
        assert torch.equal(tensor, own(root, dtype, layout)), layout


@pytest.mark.parametrize("dtype", MOVED, ids=str)
def test_alltoall(hvd: Any, rank: int, size: int, dtype: torch.dtype) -> None:
    def sent(r: int) -> Tensor:
        return own(r, dtype).t()[:1].repeat(size, 1)[:, ::2]  # a row for every rank, not contiguous

    wanted = torch.cat([sent(r)[rank : rank + 1] for r in range(size)])
    splits = torch.ones(size, dtype=torch.int32)
    assert torch.equal(hvd.alltoall(sent(rank)), wanted)
    result, received = hvd.alltoall(sent(rank), splits=splits)
    assert torch.equal(result, wanted)
    assert received.tolist() == [1] * size
    assert torch.equal(hvd.synchronize(hvd.alltoall_async(sent(rank), splits))[0], wanted)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32], ids=str)
def test_reducescatter(hvd: Any, rank: int, size: int, dtype: torch.dtype) -> None:
    if size > 1 and not hvd.mpi_enabled():
        return  # Horovod has no reduce-scatter over Gloo

    def whole(r: int) -> Tensor:
        return (torch.arange(2 * size * 3).view(3, 2 * size) + r).to(dtype).t()

    wanted = sum(whole(r) for r in range(size))[2 * rank : 2 * rank + 2]
    for result in (
        hvd.reducescatter(whole(rank), op=hvd.Sum),
        hvd.synchronize(hvd.reducescatter_async(whole(rank), op=hvd.Sum)),
        hvd.grouped_reducescatter([whole(rank), whole(rank)], op=hvd.Sum)[1],
        hvd.synchronize(hvd.grouped_reducescatter_async([whole(rank)] * 2, op=hvd.Sum))[1],
    ):
        assert result.dtype == dtype
        assert torch.equal(result, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["allreduce", "grouped_allreduce", "allgather", "broadcast", "alltoall"])
def test_gradients_flow_through(hvd: Any, rank: int, size: int, name: str, dtype: torch.dtype) -> None:
    """Also those that come as views, such as the gradient of a sum."""
    x = torch.ones(size, 3, dtype=dtype, requires_grad=True)
    output, wanted = {
        "allreduce": lambda: (hvd.allreduce(x, op=hvd.Sum), size),
        "grouped_allreduce": lambda: (hvd.grouped_allreduce([x], op=hvd.Sum)[0], size),
        "allgather": lambda: (hvd.allgather(x), 1),
        "broadcast": lambda: (hvd.broadcast(x, 0), 1 if rank == 0 else 0),
        "alltoall": lambda: (hvd.alltoall(x, splits=torch.ones(size, dtype=torch.int32))[0], 1),
    }[name]()
    output.sum().backward()
    assert x.grad.dtype == dtype
    torch.testing.assert_close(x.grad, torch.full_like(x, wanted))


def test_handles_can_be_polled_and_waited_for_in_any_order(hvd: Any, rank: int, size: int) -> None:
    sent = [torch.full((3,), float(rank + i)).to(dtype) for i, dtype in enumerate(DTYPES)]
    handles = [hvd.allreduce_async(t, op=hvd.Sum, name=f"polled.{i}") for i, t in enumerate(sent)]
    results = {i: hvd.synchronize(handles[i]) for i in reversed(range(len(handles)))}
    for i, dtype in enumerate(DTYPES):
        assert results[i].tolist() == [sum(r + i for r in range(size))] * 3
        assert results[i].dtype == dtype
    handle = hvd.allreduce_async(sent[0], name="polled")
    while not hvd.poll(handle):
        pass
    hvd.synchronize(handle)


def test_sparse_tensors_are_added(hvd: Any, rank: int, size: int) -> None:
    tensor = torch.sparse_coo_tensor([[0, rank + 1]], torch.ones(2, 2, dtype=torch.bfloat16), (6, 2))
    handle = hvd.sparse_allreduce_async(tensor, "sparse", hvd.Average)
    while not hvd.poll(handle):
        pass
    result = hvd.synchronize(handle).to_dense()
    wanted = torch.zeros(6, 2)
    wanted[0] = 1.0
    wanted[1 : size + 1] = 1.0 / size
    torch.testing.assert_close(result.float(), wanted, rtol=1e-2, atol=1e-2)


GRADIENTS: list[Callable[[int], Tensor | None]] = [
    lambda r: torch.arange(12.0).view(3, 4) + r,
    lambda r: None,
    lambda r: torch.empty(0, 3),
    lambda r: (torch.arange(12.0).view(3, 4) * (r + 1)).t(),
    lambda r: torch.full((5,), 3.0 * r, dtype=torch.bfloat16),
    lambda r: torch.sparse_coo_tensor([[0, r + 1]], torch.full((2, 2), r + 1.0), (6, 2)),
    lambda r: torch.full((2,), r, dtype=torch.float64),
    lambda r: torch.tensor(float(r)),
    lambda r: torch.sparse_coo_tensor(torch.empty(1, 0, dtype=torch.int64), torch.empty(0, 2), (6, 2)),
    lambda r: (torch.arange(24.0).view(1, 2, 3, 4) + r).contiguous(memory_format=torch.channels_last),
]

REDUCTIONS = [
    Reduction(),
    Reduction("sum"),
    Reduction(predivide=4.0),
    Reduction(predivide=4.0, groups=3),
    Reduction(groups=((0, 3), (4, 5, 9))),
    Reduction(sparse_as_dense=True),
]


@pytest.mark.parametrize("compression", ["none", "fp16"])
@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
def test_lists_of_gradients(hvd: Any, rank: int, size: int, reduction: Reduction, compression: str) -> None:
    mine = [make(rank) for make in GRADIENTS]
    results = hvd.reduce_gradients(mine, reduction, compression=getattr(hvd.Compression, compression))
    divisor = size if reduction.op == "average" else 1
    for make, before, result in zip(GRADIENTS, mine, results, strict=True):
        if before is None:
            assert result is None
            continue
        assert (result.dtype, result.layout, result.shape) == (before.dtype, before.layout, before.shape)
        wanted = sum(make(r).to_dense().double() for r in range(size)) / divisor
        torch.testing.assert_close(result.to_dense().double(), wanted, rtol=1e-2, atol=1e-2)
        assert torch.equal(before.to_dense(), make(rank).to_dense()), "an input was changed"


def test_adasum_of_sparse_gradients_is_refused(hvd: Any, size: int) -> None:
    if size > 1:
        with pytest.raises(hvd.PlanError, match="sparse_as_dense=True"):
            hvd.reduce_gradients([GRADIENTS[5](0)], Reduction("adasum"))


def test_backward_passes_meet_after_some_ranks_worked_among_themselves(
    driver: Any, hvd: Any, rank: int, size: int
) -> None:
    for _ in range(2 if driver.even_ranks.included() else 0):
        hvd.allreduce(torch.ones(1), process_set=driver.even_ranks)
    value = torch.full((2,), rank + 1.0, requires_grad=True)
    hvd.allreduce(value, op=hvd.Sum).sum().backward()
    assert value.grad.tolist() == [size, size]
