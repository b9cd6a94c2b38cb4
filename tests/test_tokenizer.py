"""Tokenizers: round trips, known ids, errors that name the culprit, and files that load again."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn import files
from fastattn import tokenizer as tokenizer_module
from fastattn.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer

SAMPLES = [
    "",
    "?",
    "First Citizen:\nBefore we proceed any further, hear me speak.\n",
    "naïve café, 東京, Ελλάδα, \U0001f600 and a zero\x00byte",
    "  spaces   \t tabs\r\n\r\n  new lines \n",
    "<|endoftext|> is only text here",
]


def make(kind: str) -> Tokenizer:
    if kind == "char":
        return CharTokenizer.from_text("".join(SAMPLES))
    return {"byte": ByteTokenizer, "bpe": BPETokenizer}[kind]()


@pytest.fixture(params=["char", "byte", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return make(request.param)


@pytest.mark.parametrize("text", SAMPLES)
def test_round_trip(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
    array = tokenizer.encode_to_numpy(text)
    assert array.tolist() == ids and array.dtype == np.uint16
    assert tokenizer.decode(array) == text
    assert tokenizer.decode(torch.tensor(ids, dtype=torch.int64)) == text


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text())
def test_byte_and_bpe_take_any_text(text: str):
    for kind in ("byte", "bpe"):
        assert make(kind).decode(make(kind).encode(text)) == text


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(st.characters(), min_size=1))  # lone surrogates too
def test_char_takes_every_character_of_its_text(text: str):
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == len(set(text))


def test_save_and_load(tokenizer: Tokenizer, tmp_path):
    path = tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path) == tokenizer == Tokenizer.load(path)
    assert Tokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict()))) == tokenizer
    assert Tokenizer.load(tmp_path).encode(SAMPLES[2]) == tokenizer.encode(SAMPLES[2])
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]  # no temporary file is left


def test_unequal_tokenizers():
    assert make("char") != CharTokenizer("ab")
    assert make("byte") != make("bpe")
    assert CharTokenizer("ab", unk="a") != CharTokenizer("ab")


# ---- characters --------------------------------------------------------------------------------


def test_char_ids_follow_code_points():
    tokenizer = CharTokenizer(["b", "a", "ca"])
    assert tokenizer.alphabet == "abc"
    assert tokenizer.encode("cab") == [2, 0, 1]


@pytest.mark.parametrize("stranger", ["z", "é", "\U0001f600", "\x00"])
def test_unknown_character_is_named(stranger: str):
    with pytest.raises(ValueError, match="position 3") as error:
        CharTokenizer("abc").encode("abc" + stranger)
    assert repr(stranger) in str(error.value)
    assert f"U+{ord(stranger):04X}" in str(error.value)


def test_unk_stands_for_unknown_characters():
    tokenizer = CharTokenizer("abc?", unk="?")
    assert tokenizer.decode(tokenizer.encode("aéb\U0001f600\x00")) == "a?b??"
    with pytest.raises(ValueError, match="unk"):
        CharTokenizer("abc", unk="?")


def test_wide_alphabet_needs_uint32():
    alphabet = "".join(map(chr, range(0x10000, 0x10000 + 70000)))
    tokenizer = CharTokenizer(alphabet)
    assert tokenizer.dtype == np.uint32
    assert tokenizer.encode(alphabet[-1]) == [69999]


def test_empty_alphabet():
    with pytest.raises(ValueError, match="empty"):
        CharTokenizer("")


# ---- bytes and byte pairs ----------------------------------------------------------------------


def test_partial_utf8_decodes_to_replacement_characters():
    ids = ByteTokenizer().encode("日本")
    assert ByteTokenizer().decode(ids[:4]) == "日\ufffd"
    bpe = BPETokenizer()
    ids = bpe.encode("\U0001f600")  # more than one token
    assert len(ids) > 1
    assert "\ufffd" in bpe.decode(ids[:1])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 50256)))
def test_any_ids_decode(ids: list[int]):
    assert isinstance(BPETokenizer().decode(ids), str)
    assert isinstance(ByteTokenizer().decode([i % 256 for i in ids]), str)


@pytest.mark.parametrize("bad", [-1, "vocab_size"])
def test_ids_outside_the_vocabulary(tokenizer: Tokenizer, bad: int | str):
    bad = tokenizer.vocab_size if bad == "vocab_size" else bad
    with pytest.raises(ValueError, match=f"token id {bad} is outside"):
        tokenizer.decode([0, bad])


@pytest.mark.parametrize(
    ("text", "ids"),  # published GPT-2 encodings
    [
        ("hello world", [31373, 995]),
        ("Hello, I'm a language model,", [15496, 11, 314, 1101, 257, 3303, 2746, 11]),
        ("\n", [198]),
        ("<|endoftext|>", [27, 91, 437, 1659, 5239, 91, 29]),  # as text, not as the special token
    ],
)
def test_bpe_known_ids(text: str, ids: list[int]):
    assert BPETokenizer().encode(text) == ids


def test_bpe_agrees_with_merging_by_hand():
    """Byte-pair encoding by its definition: merge the pair of lowest rank until none is left."""
    import regex  # comes with tiktoken

    tokens = files.read_bundled("gpt2_bpe.hex").decode().split()
    ranks = {bytes.fromhex(token): rank for rank, token in enumerate(tokens)}
    assert len(ranks) == 50256

    def merge(word: bytes) -> list[int]:
        parts = [bytes([b]) for b in word]
        while len(parts) > 1:
            pairs = [ranks.get(a + b, 1 << 30) for a, b in pairwise(parts)]
            at = min(range(len(pairs)), key=pairs.__getitem__)
            if pairs[at] == 1 << 30:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [ranks[part] for part in parts]

    # GPT-2's published pattern, without the possessive quantifiers
    contractions = r"'s|'t|'re|'ve|'m|'ll|'d"
    cut = regex.compile(contractions + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    text = "".join(SAMPLES) + files.read_bundled("shakespeare.txt")[:20000].decode()
    expected = [i for word in cut.findall(text) for i in merge(word.encode())]
    assert BPETokenizer().encode(text) == expected


def test_bpe_end_of_text():
    tokenizer = BPETokenizer()
    assert (tokenizer.vocab_size, tokenizer.eot) == (50257, 50256)
    assert tokenizer.decode([31373, tokenizer.eot]) == "hello<|endoftext|>"


def test_bpe_without_tiktoken_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    tokenizer_module._gpt2_encoding.cache_clear()
    monkeypatch.setitem(sys.modules, "tiktoken", None)  # import tiktoken now fails
    with pytest.raises(ImportError, match=r"fastattn\[train\]"):
        BPETokenizer().encode("a")


def test_char_and_byte_do_without_tiktoken():
    code = (
        "import sys; sys.modules['tiktoken'] = None\n"
        "from fastattn.tokenizer import ByteTokenizer, CharTokenizer\n"
        "assert ByteTokenizer().encode('a') == [97] and CharTokenizer('ab').encode('b') == [1]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- files -------------------------------------------------------------------------------------


def test_load_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        Tokenizer.load(tmp_path)
    for content, message in [
        ("{", "not valid JSON"),
        ("{}", "not a fastattn tokenizer"),
        ("[]", "not a fastattn tokenizer"),
        ('{"kind": "char"}', "not a fastattn tokenizer"),
        ('{"kind": "wordpiece"}', "unknown tokenizer 'wordpiece'; known: char, byte, bpe"),
        ('{"format": 9, "kind": "byte"}', "format 9"),
        ('{"kind": "bpe", "vocabulary": "o200k"}', "o200k"),
    ]:
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            Tokenizer.load(tmp_path)


def test_damaged_bundle_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(files.BUNDLED_SHA256, "gpt2_bpe.hex", "0" * 64)
    with pytest.raises(ValueError, match="damaged"):
        files.read_bundled("gpt2_bpe.hex")


def test_replacing_leaves_the_old_file_on_an_error(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), files.replacing(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
