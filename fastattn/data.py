"""Data: text -> a folder of memory-mapped tokens, which the trainer reads.

`prepare` writes a dataset folder, once:

    train.bin  val.bin   token ids, little-endian uint16 or uint32, nothing else
    tokenizer.json       the tokenizer that made them
    meta.json            dtype, counts, sha256, where the text came from; written last, so a folder
                         that has it is complete

`TokenDataset` opens one split of it; `WindowSampler` (sampler.py) draws batches from its tokens.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import os
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from .files import read_bundled, read_json, replacing, sha256_of, write_json
from .sampler import WindowSampler, eval_batches
from .tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer

__all__ = ["TokenDataset", "WindowSampler", "eval_batches", "prepare", "read_meta"]

META = "meta.json"
FORMAT = 1  # of the dataset folder
SPLITS = ("train", "val")
SOURCES = ("shakespeare", "pystdlib")
BLOCK = 1 << 20  # bytes of text read and tokenized at a time

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]  # a name, a file or files

SHAKESPEARE_VAL_START = 4_251_436  # character at which the four held-out plays begin


# ---- text --------------------------------------------------------------------------------------


class Document(NamedTuple):
    """A text that can be read more than once."""

    name: str
    open: Callable[[], BinaryIO]

    def chunks(self) -> Iterator[str]:
        """The text in pieces. ValueError names the byte at which it stops being UTF-8."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        start = 0  # offset of the block
        with self.open() as file:
            while True:
                block = file.read(BLOCK)
                pending = len(decoder.getstate()[0])  # bytes of a character cut by the last block
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    offset = start - pending + error.start
                    byte = error.object[error.start]
                    raise ValueError(
                        f"{self.name} is not UTF-8 text: byte 0x{byte:02X} at offset {offset} "
                        "(convert it first, for example with iconv -f latin1 -t utf-8)"
                    ) from None
                yield text.removeprefix("\ufeff") if start == 0 else text  # a byte-order mark
                start += len(block)
                if not block:
                    return


def documents_of(source: Source) -> list[Document]:
    """The documents behind a source: "shakespeare", "pystdlib", a file, or files in order."""
    if source == "shakespeare":
        return [Document("shakespeare", lambda: io.BytesIO(read_bundled("shakespeare.txt")))]
    if source == "pystdlib":
        return _python_library()
    paths = [source] if isinstance(source, str | os.PathLike) else list(source)
    if not paths:
        raise ValueError(f"no source: give files, or one of {', '.join(SOURCES)}")
    return [_file(Path(path)) for path in paths]


def _file(path: Path) -> Document:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the files in it")
    if not path.is_file():
        hint = "" if path.suffix else f" (nor is it one of the sources {', '.join(SOURCES)})"
        raise FileNotFoundError(f"no file {path}{hint}")
    return Document(str(path), lambda: open(path, "rb"))


def _python_library() -> list[Document]:
    """This Python's standard library, without tests, its files in an order that mixes packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test"}

    def document(path: Path) -> Document:
        def read() -> BinaryIO:
            with tokenize.open(path) as file:  # a few files declare another encoding than UTF-8
                return io.BytesIO(file.read().encode("utf-8"))

        return Document(path.relative_to(root).as_posix(), read)

    paths = [p for p in root.rglob("*.py") if skipped.isdisjoint(p.relative_to(root).parts[:-1])]
    documents = [document(path) for path in paths if path.stat().st_size]
    return sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).digest())


# ---- prepare -----------------------------------------------------------------------------------


class _Scan(NamedTuple):
    """What one reading of all documents tells."""

    characters: int
    alphabet: set[str]
    sha256: str  # of the text and of where documents end


def _scan(documents: list[Document]) -> _Scan:
    digest, total, alphabet = hashlib.sha256(), 0, set[str]()
    for document in documents:
        characters = 0
        for text in document.chunks():
            digest.update(text.encode("utf-8"))
            characters += len(text)
            alphabet.update(text)
        if not characters:
            raise ValueError(f"{document.name} is empty")
        digest.update(f"\n{characters}\n".encode())
        total += characters
    return _Scan(total, alphabet, digest.hexdigest())


def _choose_tokenizer(tokenizer: str | Tokenizer, alphabet: set[str]) -> Tokenizer:
    if tokenizer == "char":
        return CharTokenizer(alphabet)
    if tokenizer == "byte":
        return ByteTokenizer()
    if tokenizer == "bpe":
        return BPETokenizer()
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(f"tokenizer must be char, byte, bpe or a Tokenizer, got {tokenizer!r}")
    if isinstance(tokenizer, CharTokenizer) and tokenizer.unk is None:
        strangers = sorted(alphabet - set(tokenizer.alphabet))
        if strangers:
            named = " ".join(repr(c) for c in strangers[:10]) + (
                " …" if len(strangers) > 10 else ""
            )
            raise ValueError(
                f"the text has {len(strangers)} characters that the tokenizer lacks: {named}"
            )
    return tokenizer


def encode_chunks(chunks: Iterator[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Tokens of a text that comes in pieces, equal to those of the whole text.

    Byte-pair encoding never merges across a step from a visible character to a space or newline,
    so each piece is cut at its last such step and the rest waits for the next piece.
    """
    rest = ""
    for text in chunks:
        searched, rest = len(rest), rest + text
        at = len(rest) - 1
        while at > searched and not (rest[at] in " \n" and not rest[at - 1].isspace()):
            at -= 1
        if at > searched:
            yield tokenizer.encode_to_numpy(rest[:at])
            rest = rest[at:]
    if rest:
        yield tokenizer.encode_to_numpy(rest)


def _between(documents: list[Document], start: int, end: int) -> Iterator[Iterator[str]]:
    """For each document: its characters inside [start, end) of the joined text, in pieces."""
    position = 0

    def clipped(document: Document) -> Iterator[str]:
        nonlocal position
        for text in document.chunks():
            yield text[max(start - position, 0) : max(end - position, 0)]
            position += len(text)
            if position >= end:
                return

    for document in documents:
        if position < end:
            yield clipped(document)


def _write_tokens(
    file: BinaryIO, documents: Iterator[Iterator[str]], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Write the tokens of `documents`, with `eot` between them; returns {"tokens", "sha256"}."""
    dtype = tokenizer.dtype.newbyteorder("<")
    digest, tokens = hashlib.sha256(), 0
    separator = False  # due before the next token
    for document in documents:
        for ids in encode_chunks(document, tokenizer):
            if separator and ids.size and tokenizer.eot is not None:
                ids = np.concatenate([np.array([tokenizer.eot], ids.dtype), ids])
            separator = separator and not ids.size
            packed = ids.astype(dtype).tobytes()
            file.write(packed)
            digest.update(packed)
            tokens += ids.size
        separator = tokens > 0
    return {"tokens": tokens, "sha256": digest.hexdigest()}


def prepare(
    source: Source,
    tokenizer: str | Tokenizer,
    out_dir: str | os.PathLike[str],
    *,
    val_fraction: float | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Tokenize a source into `out_dir` (made if absent) and return its meta.json as a dict.

    source         "shakespeare" (bundled), "pystdlib" (this Python's own library), or text file(s)
    tokenizer      "char" (alphabet taken from the text), "byte", "bpe", or a Tokenizer to reuse
    val_fraction   share of the characters, at the end, kept for validation. None is 0.1, except
                   that shakespeare is split by plays (data/README.md)
    force          replace another dataset in `out_dir`; without it that raises FileExistsError

    Nothing happens if `out_dir` holds this very dataset already. Files are read in pieces, and more
    than once, so they may be larger than memory but not pipes.

    Raises FileNotFoundError or IsADirectoryError for a bad path, and ValueError for text that is
    empty, too short to split, not UTF-8, or has characters that a given tokenizer lacks.
    """
    documents = documents_of(source)
    scan = _scan(documents)
    tokenizer = _choose_tokenizer(tokenizer, scan.alphabet)
    val_start = _val_start(source, scan.characters, val_fraction)

    out_dir = Path(out_dir)
    identity = {
        "format": FORMAT,
        "text_sha256": scan.sha256,
        "val_start": val_start,
        "tokenizer": tokenizer.kind,
        "tokenizer_sha256": hashlib.sha256(json.dumps(tokenizer.to_dict()).encode()).hexdigest(),
    }
    existing = _existing(out_dir, identity, force)
    if existing is not None:
        return existing

    out_dir.mkdir(parents=True, exist_ok=True)
    ranges = {"train": (0, val_start), "val": (val_start, scan.characters)}
    splits: dict[str, dict[str, Any]] = {}
    with replacing(out_dir / "train.bin") as train, replacing(out_dir / "val.bin") as val:
        for split, file in (("train", train), ("val", val)):
            splits[split] = _write_tokens(file, _between(documents, *ranges[split]), tokenizer)
        (out_dir / META).unlink(missing_ok=True)  # from here until it is back, there is no dataset
    tokenizer.save(out_dir)
    meta = {
        **identity,
        "source": source if source in SOURCES else [document.name for document in documents],
        "documents": len(documents),
        "characters": scan.characters,
        "vocab_size": tokenizer.vocab_size,
        "dtype": tokenizer.dtype.name,
        "splits": splits,
        "python": sys.version.split()[0],
    }
    write_json(out_dir / META, meta)
    return meta


def _val_start(source: Source, characters: int, val_fraction: float | None) -> int:
    """The character at which validation begins; each side has at least an input and a target."""
    if val_fraction is None and source == "shakespeare":
        return SHAKESPEARE_VAL_START
    fraction = 0.1 if val_fraction is None else val_fraction
    if not 0 < fraction < 1:
        raise ValueError(f"val_fraction must be between 0 and 1, got {fraction}")
    start = int(characters * (1 - fraction))
    if min(start, characters - start) < 2:
        raise ValueError(
            f"the text is too short: {characters} characters leave {start} to train on and "
            f"{characters - start} to validate on (val_fraction {fraction})"
        )
    return start


def _existing(out_dir: Path, identity: dict[str, Any], force: bool) -> dict[str, Any] | None:
    """meta.json if `out_dir` holds this dataset whole, None if it may be written."""
    if out_dir.exists() and not out_dir.is_dir():
        raise FileExistsError(f"{out_dir} is a file, not a folder")
    try:
        meta = read_meta(out_dir)
        if all(meta.get(key) == value for key, value in identity.items()):
            return meta
        found = f"another dataset ({meta['source']}, tokenizer {meta['tokenizer']})"
    except FileNotFoundError:
        left = [f"{split}.bin" for split in SPLITS if (out_dir / f"{split}.bin").exists()]
        if not left:
            return None
        found = f"{' and '.join(left)} of an unknown or unfinished dataset"
    except (KeyError, TypeError, ValueError):
        found = "a damaged dataset"
    if not force:
        raise FileExistsError(f"{out_dir} holds {found}: choose another folder, or force (--force)")
    return None


def read_meta(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """meta.json of a dataset folder, after checking that the token files have the sizes it says.

    Raises FileNotFoundError where there is no dataset, ValueError where one is damaged.
    """
    folder = Path(folder)
    try:
        meta = read_json(folder / META)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no dataset in {folder} ({META} is missing); make one with: fastattn prepare"
        ) from None
    if meta.get("format") != FORMAT:
        raise ValueError(f"{folder} has dataset format {meta.get('format')!r}, not {FORMAT}")
    for split in SPLITS:
        path = folder / f"{split}.bin"
        expected = meta["splits"][split]["tokens"] * np.dtype(meta["dtype"]).itemsize
        size = path.stat().st_size if path.exists() else None
        if size != expected:
            raise ValueError(f"{path} is damaged: size {size} bytes, {META} says {expected}")
    return meta


# ---- read --------------------------------------------------------------------------------------


class TokenDataset:
    """One split of a prepared folder; `tokens` is a memory map, so nothing is read until used."""

    def __init__(self, folder: str | os.PathLike[str], split: str = "train"):
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        self.folder, self.split, self.meta = Path(folder), split, read_meta(folder)
        self.path = self.folder / f"{split}.bin"
        self.vocab_size: int = self.meta["vocab_size"]
        self.sha256: str = self.meta["splits"][split]["sha256"]
        dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        self.tokens: np.ndarray = np.memmap(self.path, dtype=dtype, mode="r")  # (N,)

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"TokenDataset({str(self.path)!r}, {len(self):,} tokens)"

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens."""
        return Tokenizer.load(self.folder)

    def verify(self) -> None:
        """Read the whole file and compare its sha256; ValueError if it differs."""
        found = sha256_of(self.path)
        if found != self.sha256:
            raise ValueError(f"{self.path} is damaged: sha256 {found}, {META} says {self.sha256}")
