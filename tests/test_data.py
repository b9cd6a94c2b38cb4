"""Preparing text: exact splits, pieces equal to the whole, atomic folders, errors that help."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn import data
from fastattn.data import TokenDataset, encode_chunks, prepare, read_meta
from fastattn.files import read_bundled
from fastattn.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer

TEXT = "The quick brown fox jumps over the lazy dog.\nÀ la carte, 東京!\n" * 40


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


def tokens(folder: Path, split: str) -> list[int]:
    return TokenDataset(folder, split).tokens.tolist()


# ---- what is written ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_split_and_tokens_are_those_of_the_text(text_file: Path, tmp_path: Path, kind: str):
    meta = prepare(text_file, kind, tmp_path / "out", val_fraction=0.25)
    tokenizer = TokenDataset(tmp_path / "out").tokenizer
    assert tokenizer.kind == kind
    cut = int(len(TEXT) * 0.75)
    assert tokens(tmp_path / "out", "train") == tokenizer.encode(TEXT[:cut])
    assert tokens(tmp_path / "out", "val") == tokenizer.encode(TEXT[cut:])
    assert (meta["characters"], meta["val_start"]) == (len(TEXT), cut)
    assert (
        meta == read_meta(tmp_path / "out") == json.loads((tmp_path / "out/meta.json").read_text())
    )
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]
    for split in ("train", "val"):
        dataset = TokenDataset(tmp_path / "out", split)
        assert dataset.sha256 == hashlib.sha256(dataset.path.read_bytes()).hexdigest()
        assert len(dataset) == meta["splits"][split]["tokens"]
        dataset.verify()


def test_default_split_is_nine_to_one(text_file: Path, tmp_path: Path):
    prepare(text_file, "byte", tmp_path / "out")
    assert tokens(tmp_path / "out", "train") == list(TEXT[: int(len(TEXT) * 0.9)].encode())


def test_wide_vocabulary_is_stored_in_uint32(tmp_path: Path):
    text = "".join(map(chr, range(0x10000, 0x10000 + 70000)))
    (tmp_path / "wide").write_text(text, encoding="utf-8")
    assert prepare(tmp_path / "wide", "char", tmp_path / "out")["dtype"] == "uint32"
    assert tokens(tmp_path / "out", "val") == list(range(63000, 70000))


def test_documents_are_separated_by_eot(tmp_path: Path):
    for name, text in [("a", "one two"), ("b", "three"), ("c", "four five six seven eight nine")]:
        (tmp_path / name).write_text(text)
    files = [tmp_path / name for name in "abc"]
    bpe = BPETokenizer()
    prepare(files, bpe, tmp_path / "bpe", val_fraction=0.5)
    parts = ["one two", "three", "four five"]  # half of 42 characters
    train = [i for part in parts for i in [bpe.eot, *bpe.encode(part)]][1:]
    assert tokens(tmp_path / "bpe", "train") == train
    assert tokens(tmp_path / "bpe", "val") == bpe.encode(" six seven eight nine")
    prepare(files, "byte", tmp_path / "byte", val_fraction=0.5)  # no eot: end to end
    assert bytes(tokens(tmp_path / "byte", "train")) == b"one twothreefour five"


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text("ab'1é.! \n\t\r\u00a0\u3000", max_size=60), st.lists(st.integers(0, 60), max_size=5))
def test_pieces_are_tokenized_like_the_whole(text: str, cuts: list[int]):
    cuts = sorted(min(cut, len(text)) for cut in cuts)
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    for tokenizer in (BPETokenizer(), ByteTokenizer()):
        encoded = [i for ids in encode_chunks(iter(pieces), tokenizer) for i in ids.tolist()]
        assert encoded == tokenizer.encode(text)


@pytest.mark.parametrize("block", [1, 7, 100])
def test_small_blocks_give_the_same_dataset(
    text_file: Path, tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
):
    expected = prepare(text_file, "bpe", tmp_path / "whole")
    monkeypatch.setattr(data, "BLOCK", block)  # cuts characters of several bytes too
    assert prepare(text_file, "bpe", tmp_path / "pieces") == expected


def test_byte_order_mark_is_dropped(tmp_path: Path):
    (tmp_path / "bom").write_bytes(b"\xef\xbb\xbfabcdefghij" * 2)
    prepare(tmp_path / "bom", "char", tmp_path / "out")
    assert TokenDataset(tmp_path / "out").tokenizer.alphabet == "abcdefghij\ufeff"  # the inner one
    assert TokenDataset(tmp_path / "out").meta["characters"] == 21


# ---- sources -----------------------------------------------------------------------------------


def test_shakespeare_is_split_by_plays(tmp_path: Path):
    meta = prepare("shakespeare", "char", tmp_path)
    text = read_bundled("shakespeare.txt").decode("ascii")
    tokenizer = TokenDataset(tmp_path).tokenizer
    assert meta["splits"]["train"]["tokens"] + meta["splits"]["val"]["tokens"] == len(text)
    assert tokenizer.decode(tokens(tmp_path, "train")) == text[: data.SHAKESPEARE_VAL_START]
    val = tokenizer.decode(tokens(tmp_path, "val"))
    assert val.startswith("ORLANDO:\nAs I remember, Adam")  # As You Like It
    assert val.endswith("Let your indulgence set me free.\n")  # The Tempest
    train_speakers = {s.split("\n")[0] for s in text[: data.SHAKESPEARE_VAL_START].split("\n\n")}
    assert "ROMEO:" in train_speakers
    assert not {"ROSALIND:", "MACBETH:", "PROSPERO:", "KING JOHN:"} & train_speakers


def test_shakespeare_is_clean():
    """One layout, a small ASCII alphabet, no Markdown, no stage directions."""
    text = read_bundled("shakespeare.txt").decode("ascii")
    assert len(set(text)) == 68 and not set(text) & set('[]_*#\\"()<>\t\r')
    for speech in text.rstrip("\n").split("\n\n"):
        speaker, _, lines = speech.partition(":\n")
        assert speaker and lines, speech
        assert not set(speaker) - set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz '-"), (
            speech
        )
        assert all(0 < len(line) < 76 and line == line.strip() for line in lines.split("\n")), (
            speech
        )
    assert "Exeunt" not in text


def test_a_val_fraction_overrides_the_split_by_plays(tmp_path: Path):
    meta = prepare("shakespeare", "byte", tmp_path, val_fraction=0.5)
    assert meta["val_start"] == meta["characters"] // 2


def test_python_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    documents = data.documents_of("pystdlib")
    names = [document.name for document in documents]
    assert len(names) > 400 and "argparse.py" in names and "json/decoder.py" in names
    assert names != sorted(names)
    assert not [n for n in names if n.startswith(("test/", "site-packages/")) or "/tests/" in n]
    monkeypatch.setattr(data, "documents_of", lambda source: documents[:20])
    meta = prepare("pystdlib", "byte", tmp_path)
    assert (meta["source"], meta["documents"]) == ("pystdlib", 20)


# ---- writing twice, and being stopped ----------------------------------------------------------


def test_same_dataset_again_is_left_alone(text_file: Path, tmp_path: Path):
    out = tmp_path / "out"
    meta = prepare(text_file, "char", out)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert prepare(text_file, "char", out) == meta
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before


def test_another_dataset_is_replaced_only_by_force(text_file: Path, tmp_path: Path):
    out = tmp_path / "out"
    meta = prepare(text_file, "char", out)
    for other in ({"tokenizer": "byte"}, {"tokenizer": "char", "val_fraction": 0.5}):
        with pytest.raises(FileExistsError, match=r"another dataset.*force"):
            prepare(text_file, out_dir=out, **other)
        assert read_meta(out) == meta
    assert prepare(text_file, "byte", out, force=True)["tokenizer"] == "byte"
    assert TokenDataset(out).tokenizer == ByteTokenizer()


def test_foreign_files_are_not_overwritten(text_file: Path, tmp_path: Path):
    (tmp_path / "train.bin").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"train\.bin"):
        prepare(text_file, "char", tmp_path)
    assert (tmp_path / "train.bin").read_bytes() == b"precious"
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="not a folder"):
        prepare(text_file, "char", tmp_path / "file")


def test_damaged_dataset_is_named(text_file: Path, tmp_path: Path):
    out = tmp_path / "out"
    prepare(text_file, "byte", out)
    content = (out / "train.bin").read_bytes()
    (out / "train.bin").write_bytes(content[:-2])
    with pytest.raises(ValueError, match=r"train\.bin is damaged: size"):
        TokenDataset(out)
    with pytest.raises(FileExistsError, match="damaged"):
        prepare(text_file, "byte", out)
    (out / "train.bin").write_bytes(content[:-2] + b"\x01\x01")
    with pytest.raises(ValueError, match="sha256"):
        TokenDataset(out).verify()
    with pytest.raises(FileNotFoundError, match="fastattn prepare"):
        TokenDataset(tmp_path)
    with pytest.raises(ValueError, match="split"):
        TokenDataset(out, "test")


def test_a_failure_leaves_the_old_dataset(text_file: Path, tmp_path: Path):
    out = tmp_path / "out"
    meta = prepare(text_file, "byte", out)

    class Failing(CharTokenizer):
        def encode_to_numpy(self, text: str) -> np.ndarray:
            raise RuntimeError("disk full, say")

    with pytest.raises(RuntimeError):
        prepare(text_file, Failing(TEXT), out, force=True)
    assert read_meta(out) == meta
    assert sorted(p.name for p in out.iterdir() if p.name.startswith(".tmp")) == []


# ---- bad input ---------------------------------------------------------------------------------


def test_bad_paths(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no file shakespear .*shakespeare, pystdlib"):
        prepare("shakespear", "char", tmp_path)
    with pytest.raises(IsADirectoryError, match="folder"):
        prepare(tmp_path, "char", tmp_path / "out")
    with pytest.raises(ValueError, match="no source"):
        prepare([], "char", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"ab", "too short: 2 characters leave 1 to train on and 1 to validate"),
        (b"abc\xff" + b"d" * 9, "byte 0xFF at offset 3"),
        ("Grüße".encode("latin1") * 9, "byte 0xFC at offset 2"),
        ("Grüße".encode("utf-16") * 9, "byte 0xFF at offset 0"),
        (b"a" * 50 + "é".encode()[:1], "byte 0xC3 at offset 50"),  # cut in a character
    ],
)
@pytest.mark.parametrize("block", [1 << 22, 1, 2])
def test_bad_text(tmp_path: Path, content: bytes, message: str, block: int, monkeypatch):
    monkeypatch.setattr(data, "BLOCK", block)
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "bad.txt", "char", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_arguments(text_file: Path, tmp_path: Path):
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="val_fraction"):
            prepare(text_file, "char", tmp_path / "out", val_fraction=fraction)
    with pytest.raises(ValueError, match="tokenizer must be char, byte, bpe"):
        prepare(text_file, "chars", tmp_path / "out")
    with pytest.raises(ValueError, match=r"5 characters that the tokenizer lacks: '!' ','"):
        alphabet = set(TEXT) - set("!À東京,")
        prepare(text_file, CharTokenizer(alphabet), tmp_path / "out")
    prepare(text_file, CharTokenizer("?abc", unk="?"), tmp_path / "out")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmHWM from /proc")
def test_big_files_take_little_memory(tmp_path: Path):
    line = "It is a truth universally acknowledged, that a file may be big.\n"
    (tmp_path / "big.txt").write_text(line * 500_000)  # 32 MB
    code = """
        import re, sys
        from fastattn.data import prepare
        status = lambda: open("/proc/self/status").read()
        peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", status())[1]) >> 10  # MiB
        start = peak()
        prepare(sys.argv[1], "char", sys.argv[2])
        print(peak() - start)
    """
    run = [sys.executable, "-c", textwrap.dedent(code), tmp_path / "big.txt", tmp_path / "out"]
    grown = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    assert grown < 60, f"{grown} MiB"  # 28 when written; the text is 31, its tokens 61
    assert os.path.getsize(tmp_path / "out/train.bin") == 2 * int(len(line) * 500_000 * 0.9)
