"""Tokenizers: text to token ids and back, stored as JSON beside the model trained on them.

    CharTokenizer   one id a character of the training text: the smallest vocabulary
    ByteTokenizer   one id a UTF-8 byte: any text, 256 ids
    BPETokenizer    GPT-2's byte pairs, through tiktoken with the ranks bundled here: 50,257 ids

None of them needs a network. A round trip:

    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode("To be")  # list[int]
    tokenizer.save(run_dir)
    Tokenizer.load(run_dir).decode(ids)  # "To be"
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .files import read_bundled, read_json, write_json

FILE_NAME = "tokenizer.json"
FORMAT = 1  # of tokenizer.json


class Tokenizer(ABC):
    """What every tokenizer does. Ids are 0 … vocab_size − 1; any sequence of ids can be decoded."""

    kind: ClassVar[str]  # the name in tokenizer.json and on the command line
    vocab_size: int
    eot: int | None = None  # id of the token between documents, if there is one

    @abstractmethod
    def encode_to_numpy(self, text: str) -> np.ndarray:
        """Text -> (n,) ids of `self.dtype`. The fast path."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Ids (a list, a 1-D tensor or array) -> text. Bytes that are not UTF-8 become U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """All there is to know, as JSON values; Tokenizer.from_dict gives an equal one back."""

    @classmethod
    @abstractmethod
    def _from_fields(cls, fields: dict[str, Any]) -> Tokenizer:
        """The inverse of to_dict for this kind."""

    def encode(self, text: str) -> list[int]:
        """Text -> list of ids. Special tokens written out in the text are ordinary text."""
        return self.encode_to_numpy(text).tolist()

    @property
    def dtype(self) -> np.dtype:
        """The narrowest of uint16 and uint32 that holds every id."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.kind, self.vocab_size))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size})"

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write tokenizer.json into an existing folder, atomically."""
        path = Path(folder) / FILE_NAME
        write_json(path, {"format": FORMAT, **self.to_dict()})
        return path

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> Tokenizer:
        """Read tokenizer.json from a folder, or from the path of the file itself."""
        path = Path(folder)
        path = path / FILE_NAME if path.is_dir() else path
        try:
            return Tokenizer.from_dict(read_json(path))
        except FileNotFoundError:
            raise FileNotFoundError(f"no tokenizer at {path}") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a fastattn tokenizer file ({error!r})") from None

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> Tokenizer:
        """The tokenizer whose to_dict gave `fields`; ValueError for an unknown kind or format."""
        found = fields.get("format", FORMAT)
        if found != FORMAT:
            raise ValueError(f"tokenizer format {found!r} is unknown; this version reads {FORMAT}")
        return _kind(fields["kind"])._from_fields(fields)

    def _checked(self, ids: Iterable[int]) -> np.ndarray:
        """Ids as an int64 array, each inside the vocabulary."""
        array = np.asarray(ids if hasattr(ids, "__array__") else list(ids), dtype=np.int64)
        outside = (array < 0) | (array >= self.vocab_size)
        if outside.any():
            raise ValueError(
                f"token id {array[outside][0]} is outside the vocabulary of {self.vocab_size}"
            )
        return array


class CharTokenizer(Tokenizer):
    """One id a character, in code point order.

    A character outside the alphabet raises ValueError that names it and its place, unless `unk`
    names a character of the alphabet to stand for all unknown ones.
    """

    kind = "char"

    def __init__(self, alphabet: Iterable[str], unk: str | None = None):
        self.alphabet = "".join(sorted(set("".join(alphabet))))
        self.unk = unk
        self.vocab_size = len(self.alphabet)
        if not self.alphabet:
            raise ValueError("alphabet is empty")
        if unk is not None and (len(unk) != 1 or unk not in self.alphabet):
            raise ValueError(f"unk must be one character of the alphabet, got {unk!r}")
        self._code_points = _code_points(self.alphabet)
        # code point -> id, −1 for unknown; one entry more stands for everything above the alphabet
        self._id_of = np.full(int(self._code_points[-1]) + 2, -1, dtype=np.int32)
        self._id_of[self._code_points] = np.arange(self.vocab_size)
        if unk is not None:
            self._id_of[self._id_of < 0] = self.alphabet.index(unk)

    @classmethod
    def from_text(cls, text: str, unk: str | None = None) -> CharTokenizer:
        """The tokenizer whose alphabet is the set of characters in `text`."""
        return cls(set(text), unk)

    def encode_to_numpy(self, text: str) -> np.ndarray:
        code_points = _code_points(text)
        ids = self._id_of[np.minimum(code_points, len(self._id_of) - 1)]
        unknown = np.flatnonzero(ids < 0)
        if unknown.size:
            at = int(unknown[0])
            raise ValueError(
                f"character {text[at]!r} (U+{ord(text[at]):04X}) at position {at} is not among the "
                f"{self.vocab_size} characters of this tokenizer's alphabet; give it `unk`, or use "
                "the byte or bpe tokenizer, which take any text"
            )
        return ids.astype(self.dtype)

    def decode(self, ids: Iterable[int]) -> str:
        code_points = self._code_points[self._checked(ids)]
        return code_points.tobytes().decode("utf-32-le", "surrogatepass")

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "alphabet": self.alphabet, "unk": self.unk}

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> CharTokenizer:
        return cls(fields["alphabet"], fields["unk"])


class ByteTokenizer(Tokenizer):
    """One id a byte of the UTF-8 text."""

    kind = "byte"
    vocab_size = 256

    def encode_to_numpy(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(self.dtype)

    def decode(self, ids: Iterable[int]) -> str:
        return self._checked(ids).astype(np.uint8).tobytes().decode("utf-8", "replace")

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind}

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> ByteTokenizer:
        return cls()


class BPETokenizer(Tokenizer):
    """GPT-2's byte-pair encoding: 50,256 byte pairs and <|endoftext|>, the same ids as every GPT-2.

    Needs the tiktoken package (in the extra `fastattn[train]`); the ranks are bundled.
    """

    kind = "bpe"
    vocab_size = 50257
    eot = 50256

    # How GPT-2 cuts text before merging: contractions; runs of letters, digits or other marks, each
    # with at most one space before it; white space (its last one left to the word that follows).
    PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

    def encode_to_numpy(self, text: str) -> np.ndarray:
        return np.array(_gpt2_encoding().encode_ordinary(text), dtype=self.dtype)

    def encode(self, text: str) -> list[int]:
        return _gpt2_encoding().encode_ordinary(text)

    def decode(self, ids: Iterable[int]) -> str:
        return _gpt2_encoding().decode(self._checked(ids).tolist(), errors="replace")

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "vocabulary": "gpt2"}

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> BPETokenizer:
        if fields["vocabulary"] != "gpt2":
            raise ValueError(
                f"unknown byte-pair vocabulary {fields['vocabulary']!r}; known: 'gpt2'"
            )
        return cls()


TOKENIZERS: tuple[type[Tokenizer], ...] = (CharTokenizer, ByteTokenizer, BPETokenizer)


def _kind(name: str) -> type[Tokenizer]:
    for tokenizer in TOKENIZERS:
        if tokenizer.kind == name:
            return tokenizer
    known = ", ".join(tokenizer.kind for tokenizer in TOKENIZERS)
    raise ValueError(f"unknown tokenizer {name!r}; known: {known}")


def _code_points(text: str) -> np.ndarray:
    """(len(text),) uint32; lone surrogates, which a str may hold, pass through."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


@cache
def _gpt2_encoding() -> Any:
    """tiktoken's encoder for GPT-2, built once a process (0.3 s)."""
    try:
        import tiktoken
    except ImportError:
        raise ImportError(
            "the bpe tokenizer needs tiktoken: pip install 'fastattn[train]'"
        ) from None
    tokens = read_bundled("gpt2_bpe.hex").decode("ascii").split()
    return tiktoken.Encoding(
        "gpt2",
        pat_str=BPETokenizer.PATTERN,
        mergeable_ranks={bytes.fromhex(token): rank for rank, token in enumerate(tokens)},
        special_tokens={"<|endoftext|>": BPETokenizer.eot},
        explicit_n_vocab=BPETokenizer.vocab_size,
    )
