"""Ranks compare what they are about to do before they do it: a difference is an error, not a hang."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hvdscale.errors import DesyncError
from hvdscale.runtime.transport import Transport

__all__ = ["Fingerprint", "agree"]


@dataclass(frozen=True)
class Fingerprint:
    """An ordered list of facts ``(name, value)`` that must be the same on every rank."""

    facts: tuple[tuple[str, str], ...]

    @classmethod
    def of(
        cls,
        tensors: Iterable[tuple[str, tuple[int, ...], str]] = (),
        facts: Mapping[str, object] | None = None,
    ) -> Fingerprint:
        """``tensors`` are ``(name, shape, dtype)`` in the order they will be exchanged."""
        head = [(name, str(value)) for name, value in (facts or {}).items()]
        body = [(f"parameter {i}", f"{name} {dtype}{list(shape)}") for i, (name, shape, dtype) in enumerate(tensors)]
        return cls((*head, ("number of parameters", str(len(body))), *body))

    def encode(self) -> bytes:
        return json.dumps(self.facts, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, data: bytes) -> Fingerprint:
        return cls(tuple((name, value) for name, value in json.loads(data)))

    def digest(self) -> bytes:
        """16 bytes; equal fingerprints have equal digests on every machine."""
        return hashlib.blake2b(self.encode(), digest_size=16).digest()


def agree(fingerprint: Fingerprint, transport: Transport, about: str) -> None:
    """Check that all ranks of ``transport`` hold the same fingerprint: one 16-byte all-gather when they do.

    Raises:
        DesyncError: on every rank, with the same text, naming the ranks that differ from the first
            and the first fact in which they do.
    """
    if transport.size == 1:
        return
    digests = transport.allgather(fingerprint.digest())
    if len(set(digests)) == 1:
        return
    everyone = [Fingerprint.decode(data) for data in transport.allgather(fingerprint.encode())]
    raise DesyncError(_difference(dict(zip(transport.ranks, everyone, strict=True)), about))


def _difference(claims: dict[int, Fingerprint], about: str) -> str:
    """``claims`` by global rank."""
    head, *_ = claims
    reference = claims[head]
    others = [rank for rank, claim in claims.items() if claim != reference]
    first = min(_first_difference(reference, claims[rank]) for rank in others)
    values: dict[tuple[str, str], list[int]] = {}
    for rank, claim in claims.items():
        fact = claim.facts[first] if first < len(claim.facts) else ("nothing more", "")
        values.setdefault(fact, []).append(rank)
    lines = [f"  {_ranks(ranks)}: {fact[0]} = {fact[1]}" for fact, ranks in values.items()]
    return (
        f"Ranks disagree about {about}: {_ranks(others)} differ{'s' if len(others) == 1 else ''} from rank {head}. "
        "First difference:\n" + "\n".join(lines) + "\n"
        "All ranks must build the same model, optimizer and plan, in the same order. "
        "Nothing was exchanged; make these equal and start again."
    )


def _first_difference(a: Fingerprint, b: Fingerprint) -> int:
    for i, (x, y) in enumerate(zip(a.facts, b.facts, strict=False)):
        if x != y:
            return i
    return min(len(a.facts), len(b.facts))


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
