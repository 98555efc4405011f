"""Text for the language model examples: documents from files, and their tokens."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from hvdscale.errors import PlanError

END = 0  # the token between documents: byte 0 occurs in no text
PIECE_CHARACTERS = 4096  # a single file is cut into documents of about this length
TRAINING_CHARACTERS = 2_000_000  # a byte pair tokenizer is trained on these first ones
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Document:
    key: str
    text: str


def read_documents(data: str | None) -> list[Document]:
    """The documents of a folder (one a file), of a file (pieces cut at blank lines), or of Python's own library.

    Raises:
        PlanError: nothing there, nothing in it, or nothing in it that is text.
    """
    if data is None:
        return _read_folder(Path(sysconfig.get_paths()["stdlib"]), "*.py")
    path = Path(data)
    if path.is_dir():
        return _read_folder(path, "*")
    if not path.exists():
        raise PlanError(f"--data must name a file or a folder; {data!r} does not exist.")
    return _read_pieces(path)


def _read_folder(folder: Path, pattern: str) -> list[Document]:
    """Hidden files, tests and installed packages are left out; so are files that are not text."""
    names = sorted(path.relative_to(folder) for path in folder.rglob(pattern) if path.is_file())
    names = [name for name in names if not any(part in LEFT_OUT or part.startswith(".") for part in name.parts)]
    texts = ((name.as_posix(), _decode((folder / name).read_bytes())) for name in names)
    documents = [Document(key, text) for key, text in texts if text]
    if not documents:
        files = f"{len(names)} file{'' if len(names) == 1 else 's'}"
        raise PlanError(f"--data {os.fspath(folder)!r}: {files} in this folder, none of them text.")
    return documents


def _read_pieces(path: Path) -> list[Document]:
    raw = path.read_bytes()
    if not raw.strip():
        raise PlanError(f"--data {os.fspath(path)!r} is empty.")
    text = _decode(raw)
    if text is None:
        raise PlanError(f"--data {os.fspath(path)!r} is not text: it must be UTF-8 without zero bytes.")
    return [Document(f"{path.name}#{i}", piece) for i, piece in enumerate(_cut(text))]


def _cut(text: str) -> Iterator[str]:
    """At the first blank line after ``PIECE_CHARACTERS``: text added at the end leaves earlier pieces as they are."""
    start = 0
    while start < len(text):
        blank = text.find("\n\n", start + PIECE_CHARACTERS)
        end = len(text) if blank < 0 else blank + 2
        yield text[start:end]
        start = end


def _decode(raw: bytes) -> str | None:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


class Tokenizer(Protocol):
    vocabulary: int

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """uint16[tokens] for each text; never ``END``."""
        ...


class Bytes:
    vocabulary = 256

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint16) for text in texts]


class BytePairs:
    """Trained on ``texts``. The same texts give the same tokens: each rank trains its own, nothing is sent."""

    def __init__(self, texts: Sequence[str], vocabulary: int) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        self._tokenizer = Tokenizer(models.BPE())
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<|end|>"],  # the first token is END
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        self._tokenizer.train_from_iterator(texts, trainer)
        self.vocabulary = self._tokenizer.get_vocab_size()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.uint16) for one in encoded]


def make_tokenizer(name: str, documents: Sequence[Document], vocabulary: int) -> Tokenizer:
    """``"bytes"``, or ``"bpe"`` trained here with ``vocabulary`` tokens.

    Raises:
        PlanError: another name, or a vocabulary that does not fit 16 bits.
    """
    if name == "bytes":
        return Bytes()
    if name != "bpe":
        raise PlanError(f"--tokenizer is 'bytes' or 'bpe'; it is {name!r}.")
    if not 512 <= vocabulary <= 65536:
        raise PlanError(f"--vocabulary of a bpe tokenizer lies in 512..65536; it is {vocabulary}.")
    texts, room = [], TRAINING_CHARACTERS
    for document in documents:
        texts.append(document.text[:room])
        room -= len(texts[-1])
    return BytePairs(texts, vocabulary)
