"""The vocabularies of published text towers: found, read, and kept in the form of the `tokenizers` library.

A checkpoint holds a tower's numbers but not its vocabulary, which is a file of its own:

    family  files, the first that is there                              source
    clip    tokenizer.json | vocab.json + merges.txt |                  Radford et al. 2021: lower-cased byte-level BPE
            bpe_simple_vocab_16e6.txt.gz (or unpacked)
    t5      tokenizer.json | spiece.model                               Raffel et al. 2020: SentencePiece unigrams
    bert    tokenizer.json | vocab.txt                                  Devlin et al. 2019: WordPiece

CLIP's towers and those of OpenCLIP share one vocabulary.
"""

from __future__ import annotations

import gzip
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import BPE, Unigram
from tokenizers.normalizers import NFC, Lowercase, Normalizer, Precompiled, Replace, Strip
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import ByteLevel, Metaspace, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers

from darkroom.conditioning.tokenizer import WordPieceTokenizer
from darkroom.errors import DarkroomError

# A folder that holds clip/, t5/ and bert/ with these files.
VOCABULARIES = "DARKROOM_VOCABULARIES"
START, END = "<|startoftext|>", "<|endoftext|>"
# Words as OpenAI's tokenizer cuts them, after lower-casing.
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_CLIP_MERGES = 49152 - 256 - 2  # of the lines of the published file; the others are not used
_SPACE = "▁"


@dataclass(frozen=True)
class Family:
    """name: for people; files: alternatives, each one or more file names; readers: from such files."""

    name: str
    files: tuple[tuple[str, ...], ...]
    readers: tuple[Callable[..., Tokenizer], ...]

    @property
    def wanted(self) -> str:
        """ "vocab.json and merges.txt, or tokenizer.json" """
        return ", or ".join(" and ".join(names) for names in self.files)


# ------------------------------------------------------------------------------------------------------------ reading


def clip_tokenizer(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> Tokenizer:
    """Byte-level BPE whose words end in "</w>"; text is normalised (NFC), lower-cased, and its spaces are one."""
    for token in (START, END):
        if token not in vocabulary:
            raise DarkroomError(f"CLIP's vocabulary has a token {token}, this one has none; give the published files")
    try:
        model = BPE(
            dict(vocabulary), list(merges), end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token=END
        )
    except Exception as error:  # the library raises bare Exception
        raise DarkroomError(
            f"CLIP's vocabulary and merges do not fit each other ({error}); give both from one place"
        ) from None
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = Normalizers([NFC(), Replace(Regex(r"\s+"), " "), Lowercase()])
    tokenizer.pre_tokenizer = PreTokenizers(
        [Split(Regex(_CLIP_WORDS), "removed", invert=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (START, END)])
    return tokenizer


def byte_characters() -> list[str]:
    """The 256 bytes as printable characters, in the order of CLIP's ids: printable ones stand for themselves, the
    others take the characters from 256 on (Radford et al. 2019, released code)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(rest))]


def clip_from_merges(merges: Sequence[tuple[str, str]]) -> Tokenizer:
    """The vocabulary follows from the merges: characters, characters that end a word, merged pairs, start, end."""
    characters = byte_characters()
    tokens = [*characters, *(c + "</w>" for c in characters), *(a + b for a, b in merges), START, END]
    return clip_tokenizer({token: index for index, token in enumerate(tokens)}, merges)


def _merges(lines: Iterable[str], path: Path) -> list[tuple[str, str]]:
    pairs = [tuple(line.split()) for line in lines if line.strip()]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise DarkroomError(f"{path}: not a list of merges, two pieces per line; give the published file")
    return pairs  # type: ignore[return-value]


def _lines(path: Path) -> list[str]:
    """The text of a file, packed or not, by line."""
    data = path.read_bytes()
    return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8").split("\n")


def _clip_bpe(path: Path) -> Tokenizer:
    return clip_from_merges(_merges(_lines(path)[1 : 1 + _CLIP_MERGES], path))


def _clip_pair(vocabulary: Path, merges: Path) -> Tokenizer:
    lines = _lines(merges)
    pairs = _merges(lines[1:] if lines[0].startswith("#version") else lines, merges)
    tokens = json.loads(vocabulary.read_text(encoding="utf-8"))
    if not isinstance(tokens, dict) or not all(isinstance(index, int) for index in tokens.values()):
        raise DarkroomError(f"{vocabulary}: not a vocabulary, a mapping of pieces to numbers; give the published file")
    return clip_tokenizer(tokens, pairs)


def t5_tokenizer(
    pieces: Sequence[tuple[str, float]], unknown: int, charsmap: bytes, special: Sequence[str]
) -> Tokenizer:
    """Unigrams by their log-probabilities, over text normalised by SentencePiece's own table."""
    tokenizer = Tokenizer(Unigram(list(pieces), unk_id=unknown, byte_fallback=False))
    steps: list[Normalizer] = [Precompiled(charsmap)] if charsmap else []
    tokenizer.normalizer = Normalizers([*steps, Strip(), Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = Metaspace(_SPACE, prepend_scheme="always")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """The (number, value) fields of a protocol buffer message; 4 and 8 byte numbers as their bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        number, kind = key >> 3, key & 7
        if kind == 0:
            yield number, varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"field {number} has the wire type {kind}")
        size = varint() if kind == 2 else 8 if kind == 1 else 4
        if at + size > len(data):
            raise ValueError(f"field {number} ends behind the file")
        yield number, data[at : at + size]
        at += size


def _t5_pieces(path: Path) -> Tokenizer:
    """SentencePiece's own file: pieces (text, log-probability, type) and the table of its normaliser.

    The format is sentencepiece_model.proto of that project: field 1 the pieces, 3 the normaliser, whose field 2 is the
    table. T5 adds 100 tokens of its own behind the pieces, which no caption holds.
    """
    pieces: list[tuple[str, float]] = []
    special, unknown, charsmap = [], None, b""
    for number, value in _fields(path.read_bytes()):
        if number == 1 and isinstance(value, bytes):
            piece = dict(_fields(value))
            text, score, kind = piece[1], piece.get(2, b"\0\0\0\0"), piece.get(3, 1)
            assert isinstance(text, bytes) and isinstance(score, bytes)
            if kind == 2:
                unknown = len(pieces)
            if kind in (2, 3):  # unknown, and control: pad and end
                special.append(text.decode("utf-8"))
            pieces.append((text.decode("utf-8"), struct.unpack("<f", score)[0]))
        elif number == 3 and isinstance(value, bytes):
            table = dict(_fields(value)).get(2, b"")
            assert isinstance(table, bytes)
            charsmap = table
    if unknown is None:
        raise ValueError("no piece stands for what is unknown")
    extra = [f"<extra_id_{i}>" for i in reversed(range(100))]
    return t5_tokenizer([*pieces, *((token, 0.0) for token in extra)], unknown, charsmap, [*special, *extra])


def _bert_lines(path: Path) -> Tokenizer:
    return Tokenizer.from_str(WordPieceTokenizer.from_vocabulary([t for t in _lines(path) if t.strip()]).to_json())


def _library(path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(path))


FAMILIES: dict[str, Family] = {
    "clip": Family(
        "CLIP",
        (
            ("vocab.json", "merges.txt"),
            ("tokenizer.json",),
            ("bpe_simple_vocab_16e6.txt.gz",),
            ("bpe_simple_vocab_16e6.txt",),
        ),
        (_clip_pair, _library, _clip_bpe, _clip_bpe),
    ),
    "t5": Family("T5", (("tokenizer.json",), ("spiece.model",)), (_library, _t5_pieces)),
    "bert": Family("BERT", (("vocab.txt",), ("tokenizer.json",)), (_bert_lines, _library)),
}


# ------------------------------------------------------------------------------------------------------------ finding


def read_vocabulary(path: str | Path, family: str) -> Tokenizer:
    """The tokenizer of a family ("clip", "t5", "bert") from a folder with its files, or from one of them."""
    place, known = Path(path).expanduser(), FAMILIES[family]
    folder = place if place.is_dir() else place.parent
    for names, read in zip(known.files, known.readers, strict=True):
        paths = [folder / name for name in names]
        if all(p.is_file() for p in paths) and (place.is_dir() or place in paths):
            try:
                tokenizer = read(*paths)
            except DarkroomError:
                raise
            except Exception as error:  # the library raises bare Exception
                reason = " ".join(str(error).split()) or type(error).__name__
                raise DarkroomError(f"{paths[0]}: cannot be read as {known.name}'s vocabulary ({reason})") from None
            tokenizer.no_padding()
            tokenizer.no_truncation()
            return tokenizer
    problem = "holds no" if place.is_dir() else "is not" if place.is_file() else "is not there; it should be"
    raise DarkroomError(f"{place} {problem} {known.name}'s vocabulary: {known.wanted}")


def find_vocabulary(family: str, beside: Iterable[Path | None] = ()) -> Path | None:
    """The first folder that holds a family's files: of `beside`, then the one that the environment names."""
    root = os.environ.get(VOCABULARIES)
    for folder in (*beside, Path(root).expanduser() / family if root else None):
        if folder is not None and any(all((folder / n).is_file() for n in names) for names in FAMILIES[family].files):
            return folder
    return None


def missing_vocabulary(family: str, where: str) -> DarkroomError:
    """What to say when text cannot become ids. `where`: the setting that takes the path."""
    known = FAMILIES[family]
    return DarkroomError(
        f"text needs {known.name}'s vocabulary, which no checkpoint holds: put {known.wanted} into a folder {family}/ "
        f"and name the folder around it in the environment variable {VOCABULARIES}, name its folder in {where}, or "
        "give token ids instead of text"
    )


@cache
def from_json(text: str) -> Tokenizer:
    """A tokenizer from the JSON of the `tokenizers` library, as configs keep it."""
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise DarkroomError(f"tokenizer: cannot be read ({error}); give the JSON of the tokenizers library") from None
