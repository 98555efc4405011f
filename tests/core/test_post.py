"""Point-to-point messages: the same promises from threads of one process and from TCP."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from hvdscale.errors import PlanError, TransportError
from hvdscale.runtime import tcp_post
from hvdscale.runtime.post import Post, SoloPost, open_post
from hvdscale.runtime.tcp_post import TCPPost
from hvdscale.runtime.transport import LoopbackTransport, SoloTransport, Transport, run_loopback

OPEN: dict[str, Callable[[Transport], Post]] = {"loopback": open_post, "tcp": TCPPost}
KINDS = pytest.mark.parametrize("kind", OPEN)


def run(kind: str, size: int, body: Callable[[Post], Any], timeout_seconds: float = 10) -> list[Any]:
    """``body(post)`` on every rank; all posts stay open until all bodies ended."""

    def with_post(transport: Transport) -> Any:
        post = OPEN[kind](transport)
        try:
            return body(post)
        finally:
            transport.allgather(b"")
            post.close()

    return run_loopback(size, with_post, timeout_seconds)


def numbers(rank: int, n: int = 1000) -> np.ndarray:
    return np.random.default_rng(rank).integers(0, 256, n, np.uint8)


@KINDS
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("n", [0, 1, 1000, 300_000])
def test_everyone_writes_to_everyone(kind: str, size: int, n: int) -> None:
    def body(post: Post) -> list[np.ndarray]:
        peers = [r for r in range(size) if r != post.rank]
        boxes = {peer: np.zeros(n, np.uint8) for peer in peers}
        tickets = [post.receive(boxes[peer], peer, tag=5) for peer in peers]
        tickets += [post.send(numbers(post.rank, n), peer, tag=5) for peer in peers]
        for ticket in tickets:
            ticket.wait()
        assert all(ticket.test() for ticket in tickets)
        assert post.sent_bytes == n * len(peers)
        return [boxes.get(r, numbers(r, n)) for r in range(size)]

    for result in run(kind, size, body):
        np.testing.assert_array_equal(result, [numbers(r, n) for r in range(size)])


@KINDS
@pytest.mark.parametrize("posted", ["ahead", "late"])
def test_tags_are_apart_and_one_tag_keeps_its_order(kind: str, posted: str) -> None:
    order = [(7, 1), (3, 2), (7, 3), (7, 4), (3, 5)]  # (tag, value) as sent

    def body(post: Post) -> Any:
        if post.rank == 0:
            if posted == "ahead":
                post.receive(hello := np.zeros(1, np.uint8), 1, 9).wait()
                assert hello[0] == 1
            for ticket in [post.send(np.array([value], np.uint8), 1, tag) for tag, value in order]:
                ticket.wait()
            return None
        if posted == "late":
            while post.probe(0, 3) is None:
                pass
        boxes = {tag: [np.zeros(1, np.uint8) for t, _ in order if t == tag] for tag in (3, 7)}
        tickets = [post.receive(box, 0, tag) for tag in (3, 7) for box in boxes[tag]]
        if posted == "ahead":
            post.send(np.ones(1, np.uint8), 0, 9).wait()
        for ticket in tickets:
            ticket.wait()
        return {tag: [int(box[0]) for box in boxes[tag]] for tag in boxes}

    assert run(kind, 2, body) == [None, {3: [2, 5], 7: [1, 3, 4]}]


@KINDS
def test_probe_tells_what_nobody_asked_for(kind: str) -> None:
    def body(post: Post) -> Any:
        if post.rank == 0:
            assert post.probe() is None
            post.send(numbers(0, 12), 1, tag=4).wait()
            return None
        while (found := post.probe(tag=4)) is None:
            assert post.probe(tag=5) is None
        source, tag, n = found
        out = np.empty(n, np.uint8)
        post.receive(out, source, tag).wait()
        assert post.probe() is None
        return found, out.tolist()

    assert run(kind, 2, body)[1] == ((0, 4, 12), numbers(0, 12).tolist())


@KINDS
@pytest.mark.parametrize("posted", ["ahead", "late"])
@pytest.mark.parametrize("n", [3, 5])
def test_a_message_of_another_length_is_an_error(kind: str, posted: str, n: int) -> None:
    def body(post: Post) -> None:
        if post.rank == 0:
            if posted == "ahead":
                post.receive(np.zeros(1, np.uint8), 1, 9).wait()
            post.send(np.zeros(n, np.uint8), 1, 0)
            return
        if posted == "late":
            while post.probe() is None:
                pass
        ticket = post.receive(np.zeros(4, np.uint8), 0, 0)
        if posted == "ahead":
            post.send(np.zeros(1, np.uint8), 0, 9)
        ticket.wait()

    first, second = run(kind, 2, body)
    assert first is None
    assert isinstance(second, TransportError)
    assert f"{n} bytes came for 4" in str(second)


@KINDS
def test_a_peer_that_left_is_named(kind: str) -> None:
    def body(transport: Transport) -> None:
        post = OPEN[kind](transport)
        if transport.rank == 0:
            post.close()
            return
        for _ in range(2):  # the one that waited, and one that comes later
            with pytest.raises(TransportError, match="rank 0"):
                post.receive(np.zeros(4, np.uint8), 0, 0).wait()

    assert run_loopback(2, body, 10) == [None, None]


def wait_until(over: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not over():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_a_connection_reset_inside_a_message_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        peer = socket.create_connection(server.getsockname())
        connection, _ = server.accept()
    monkeypatch.setattr(tcp_post, "_connect", lambda transport: {1: connection})
    post = TCPPost(LoopbackTransport(0, 2, {}))
    out = np.zeros(8, np.uint8)
    ticket = post.receive(out, 1, tag=3)
    peer.sendall(struct.pack("=qq", 3, 8) + b"\x07")
    wait_until(lambda: out[0] == 7)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()  # with a reset
    with pytest.raises(TransportError, match="rank 1 left the job"):
        wait_until(ticket.test)


def test_nothing_is_buffered_on_the_loopback() -> None:
    """So that a schedule which relies on buffers shows itself as one that hangs."""

    def body(post: Post) -> None:
        post.send(np.zeros(1, np.uint8), 1 - post.rank, 0).wait()

    for result in run("loopback", 2, body, timeout_seconds=0.3):
        assert isinstance(result, TransportError)


def test_two_posts_of_the_same_ranks_are_apart() -> None:
    def body(transport: Transport) -> Any:
        posts = [open_post(transport) for _ in range(2)]
        if transport.rank == 0:
            tickets = [posts[i].send(np.full(1, 10 + i, np.uint8), 1, 0) for i in (0, 1)]
            return [ticket.wait() for ticket in tickets]
        boxes = [np.zeros(1, np.uint8) for _ in posts]
        for i in (1, 0):
            posts[i].receive(boxes[i], 0, 0).wait()
        return [int(box[0]) for box in boxes]

    assert run_loopback(2, body, 10) == [[None, None], [10, 11]]


def test_a_world_of_one_has_nobody_to_write_to() -> None:
    post = open_post(SoloTransport())
    assert isinstance(post, SoloPost)
    assert post.probe() is None
    with pytest.raises(PlanError, match="one rank"):
        post.send(np.zeros(1, np.uint8), 1, 0)
