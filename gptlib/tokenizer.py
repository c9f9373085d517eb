"""Text to token ids and back. Every tokenizer is a `tiktoken.Encoding` inside; three differ only in their tables:

* `corpus`: byte-level BPE (Sennrich et al. 2016; over bytes as in GPT-2) learnt from the corpus, bytes first;
* `gpt2`: tiktoken's own, 50,257 tokens;
* `bytes`: the 256 bytes and nothing else.

The last id (the first free one) is END_OF_TEXT. It is never produced by encoding: its spelling inside a text is text.
"""

import hashlib
import json
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tiktoken

from gptlib.errors import UserError

END_OF_TEXT = "<|endoftext|>"

# How text is cut into the pieces inside which BPE merges: words, numbers and punctuation with the space before them,
# and runs of white space but for that last space, so that " self" is one token in a line and after an indentation. That
# is GPT-2's way, with two differences:
# * ranges, not \p{L} and \s: `tokenizers` and tiktoken carry other Unicode tables and would disagree on young scripts;
# * at most 256 characters: learning from a piece takes time quadratic in its length, and minified files have long ones;
#   and tiktoken, which backtracks for the look-ahead, would overflow its stack on a million spaces.
_WORD = r"A-Za-z\x{C0}-\x{1FFF}\x{2C00}-\x{2FFF}\x{3040}-\x{10FFFF}"
_SPACE = r" \t\n\r\f\v"
CORPUS_PATTERN = "|".join(
    [
        rf" ?[{_WORD}]{{1,256}}",
        r" ?[0-9]{1,256}",
        rf" ?[^{_WORD}0-9{_SPACE}]{{1,256}}",
        rf"[{_SPACE}]{{1,256}}(?![^{_SPACE}])",
        rf"[{_SPACE}]",
    ]
)
BYTES_PATTERN = r"\n|[^\n]+"  # nothing merges, so the pieces only bound the work done at a time
NAMES = ("corpus", "gpt2", "bytes")

_GPT2_FILES = [
    f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{file}" for file in ("vocab.bpe", "encoder.json")
]
_DOWNLOAD_TIMEOUT = 30.0  # seconds without an answer
_LONGEST_RUN = re.compile(r"(\s{65536})")
_MAX_FILE_BYTES = 1 << 26
_LONGEST_PATTERN = 1000
_FORMAT = "gptlib.tokenizer/1"


class Tokenizer:
    """One vocabulary.

    Args:
        name: "corpus", "gpt2" or "bytes".
        pattern: the regular expression that cuts text into pieces.
        tokens: the bytes of every ordinary token in id order, which is also the order of their merges; all 256 single
            bytes are among them. END_OF_TEXT gets the id after the last.

    Attributes: name; n_vocab, END_OF_TEXT included; eot, its id; hash, the SHA-256 (hex) of pattern, tokens and eot.
    """

    def __init__(self, name: str, pattern: str, tokens: Sequence[bytes]):
        self.name = name
        self.eot = len(tokens)
        self.n_vocab = len(tokens) + 1
        self.hash = _definition_hash(pattern, tokens)
        self._pattern = pattern
        self._tokens = tuple(tokens)
        ranks = {token: rank for rank, token in enumerate(tokens)}
        self._encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: self.eot}
        )

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, n_vocab={self.n_vocab}, hash={self.hash[:12]})"

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; what is spelled like a special token is encoded as the plain text that it is."""
        if self.name != "gpt2":
            return self._encoding.encode_ordinary(text)
        pieces = _LONGEST_RUN.split(text)  # tiktoken overflows its stack in longer runs of white space
        return [token for piece in pieces for token in self._encoding.encode_ordinary(piece)]

    def encode_batch(self, texts: list[str], threads: int | None = None) -> list[list[int]]:
        """`encode` of every text, on `threads` threads (default: the processors this process may use)."""
        with ThreadPoolExecutor(threads or _available_processors()) as pool:
            return list(pool.map(self.encode, texts))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8, as of a character cut in half, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`. Raises ValueError for an id outside the vocabulary."""
        ids = [int(token) for token in ids]
        for token in ids:
            if not 0 <= token < self.n_vocab:
                raise ValueError(f"token id {token} is outside the vocabulary of {self.n_vocab}")
        return self._encoding.decode_bytes(ids)

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer to `path` as JSON, whole or not at all. One character of a token stands for one byte."""
        definition = {
            "format": _FORMAT,
            "name": self.name,
            "pattern": self._pattern,
            "special_tokens": {END_OF_TEXT: self.eot},
            "hash": self.hash,
            "tokens": [token.decode("latin-1") for token in self._tokens],
        }
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(definition, indent=0), encoding="ascii")
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads what `save` wrote. Raises UserError for anything else, whatever it is."""
        path = Path(path)
        try:
            if path.stat().st_size > _MAX_FILE_BYTES:
                raise ValueError(f"it is larger than {_MAX_FILE_BYTES} bytes")
            name, pattern, tokens, stated_hash = _checked(json.loads(path.read_text(encoding="utf-8")))
            tokenizer = cls(name, pattern, tokens)
        except OSError as error:
            raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not a tokenizer of this project: {error}") from error
        if tokenizer.hash != stated_hash:
            raise UserError(f"{path} is damaged: its hash is not the one it states")
        return tokenizer


def byte_tokenizer() -> Tokenizer:
    """The 256 bytes and END_OF_TEXT."""
    return Tokenizer("bytes", BYTES_PATTERN, [bytes([byte]) for byte in range(256)])


def train_bpe(texts: Iterable[str], vocab_size: int, progress: bool = True) -> Tokenizer:
    """Learns byte-level BPE from `texts`: 256 bytes, merges of pairs that occur at least twice, END_OF_TEXT.

    The same texts give the same tokenizer, whatever their order. `vocab_size` counts END_OF_TEXT; little text gives
    fewer tokens. Raises UserError for a `vocab_size` below 257.
    """
    trained = train_with_tokenizers(texts, vocab_size, progress)
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    merges = json.loads(trained.to_str())["model"]["merges"]
    # `tokenizers` merges the pairs it lists, tiktoken any neighbours whose concatenation is a token. They agree as a
    # token has one last merge: inside its span BPE takes the same steps wherever the span stands.
    learned = [bytes(byte_of[character] for character in left + right) for left, right in merges]
    return Tokenizer("corpus", CORPUS_PATTERN, [*(bytes([byte]) for byte in range(256)), *learned])


def train_with_tokenizers(texts: Iterable[str], vocab_size: int, progress: bool = True):
    """The `tokenizers.Tokenizer` behind `train_bpe`, without END_OF_TEXT; its ids are in another order."""
    if vocab_size < 257:
        raise UserError(f"a vocabulary of {vocab_size} is too small: 256 bytes and the end of text need 257")
    # Stated, so that `tokenizers` does not warn in every process forked later, as torch.compile's workers are.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(CORPUS_PATTERN), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            min_frequency=2,
            initial_alphabet=alphabet,
            show_progress=progress and sys.stderr.isatty(),  # it writes empty lines to anything else
        ),
    )
    return bpe


def load_gpt2() -> Tokenizer:
    """tiktoken's GPT-2 tokenizer, from its cache or the network. Raises UserError where neither has its two files."""
    from tiktoken_ext import openai_public

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT)  # tiktoken's download has no limit of its own
    try:
        definition = openai_public.gpt2()
    except (OSError, ValueError, AssertionError) as error:  # requests' errors are OSErrors
        folder = _tiktoken_folder()
        places = " and ".join(f"{url} as {folder / _cache_name(url)}" for url in _GPT2_FILES)
        raise UserError(
            f"the gpt2 tokenizer's files cannot be had ({type(error).__name__}): put {places} (TIKTOKEN_CACHE_DIR "
            "chooses that folder), or use --tokenizer corpus or --tokenizer bytes"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    ranks = definition["mergeable_ranks"]
    return Tokenizer("gpt2", definition["pat_str"], sorted(ranks, key=ranks.get))


def _tiktoken_folder() -> Path:
    """Where tiktoken looks for its files before it downloads them."""
    named = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    return Path(named or Path(tempfile.gettempdir(), "data-gym-cache"))


def _cache_name(url: str) -> str:
    return hashlib.sha1(url.encode()).hexdigest()


def byte_characters() -> list[str]:
    """GPT-2's printable character for every byte: itself where it prints, else the next free one from U+0100 on."""
    spare = iter(range(256, 512))
    return [chr(b) if chr(b).isprintable() and b != 0x20 else chr(next(spare)) for b in range(256)]


def _available_processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _definition_hash(pattern: str, tokens: Sequence[bytes]) -> str:
    definition = [pattern, [token.hex() for token in tokens], {END_OF_TEXT: len(tokens)}]
    return hashlib.sha256(json.dumps(definition, separators=(",", ":")).encode()).hexdigest()


def _checked(definition: object) -> tuple[str, str, list[bytes], object]:
    """(name, pattern, tokens, hash) of a parsed file. Raises ValueError where they cannot make a tokenizer."""
    if not isinstance(definition, dict) or definition.get("format") != _FORMAT:
        raise ValueError(f'it lacks "format": "{_FORMAT}"')
    name, pattern, texts = (definition.get(key) for key in ("name", "pattern", "tokens"))
    if name not in NAMES:
        raise ValueError(f"its name is none of {', '.join(NAMES)}")
    if not isinstance(pattern, str) or len(pattern) > _LONGEST_PATTERN:
        raise ValueError("its pattern is not a short string")
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("its tokens are not a list of non-empty strings")
    tokens = [text.encode("latin-1") for text in texts]
    if len(set(tokens)) != len(tokens) or not {bytes([byte]) for byte in range(256)} <= set(tokens):
        raise ValueError("its tokens repeat, or a single byte is missing among them")
    if definition.get("special_tokens") != {END_OF_TEXT: len(tokens)}:
        raise ValueError(f"{END_OF_TEXT} is not its one special token with the id after the last token's")
    return name, pattern, tokens, definition.get("hash")
