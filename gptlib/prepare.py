"""Documents to token shards: find, check, split, tokenize, and keep the result on disk.

    python -m gptlib.prepare --data notes/ 'src/**/*.py' stories.jsonl --tokenizer corpus --vocab-size 4096

A document is one file, or one line of a .jsonl file. Identical ones count once. They are laid out in the order of the
SHA-256 of their text, so the tokens follow from what the documents say, not from names or the order of arguments.

Held out for validation are the first 5 % of the documents in that order: chosen by a hash of their content. Fewer than
20 documents have no 5 % of their own: then it is the last 5 % of each, from the start of a line on where there is one.

The shards lie in `cache_dir/<fingerprint>/`: train.npy and val.npy (uint16, or uint32 for more than 65,536 ids; every
document ends with the end of text), tokenizer.json and meta.json. A second call finds them and only hashes the text.
"""

import glob
import hashlib
import json
import math
import os
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gptlib import tokenizer as tokenizers
from gptlib.errors import Parser, UserError, exit_status
from gptlib.flags import file_name, positive_int
from gptlib.tokenizer import Tokenizer

VALIDATION_SHARE = 0.05
_FEWEST_TO_CHOOSE_FROM = 20  # below, one document is more than the share
_FORMAT = "gptlib.corpus/1"  # part of the fingerprint: raise it when splitting or layout change
_NOT_SOURCE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_PIECE = 1 << 16  # characters after which a long document is cut, so that threads share it
_CHUNK = 1 << 22  # characters tokenized at a time
_END_OF_LINE = re.compile(r"(?<=\S)\n")


@dataclass
class Corpus:
    """A tokenized corpus.

    train, val: memory-mapped 1-D arrays of token ids; every document ends with the tokenizer's eot.
    train_bytes, val_bytes: UTF-8 bytes of the text behind them, end-of-text tokens not counted.
    val_unigram_entropy: nats per token of the ids in `val` themselves, -sum p ln p with p = count / len(val): the loss
        of the best model that knows how often each token occurs and nothing of its context.
    fingerprint: SHA-256 (hex) over the documents, the tokenizer asked for and the way of splitting.
    train_documents, val_documents: how many; a document cut in two counts on both sides.
    """

    tokenizer: Tokenizer
    train: np.ndarray
    val: np.ndarray
    train_bytes: int
    val_bytes: int
    val_unigram_entropy: float
    fingerprint: str
    train_documents: int = 0
    val_documents: int = 0


def prepare(
    data: list[str] | None,
    tokenizer: str,
    vocab_size: int,
    *,
    cache_dir: str | Path = "runs/data",
    progress: bool = True,
) -> Corpus:
    """The corpus of `data`, from the cache or made now.

    Args:
        data: files, folders and glob patterns of UTF-8 text; in .jsonl files the field "text" of every line. None: the
            sources of the running Python's standard library, without its tests.
        tokenizer: "corpus" (learnt from the training documents), "gpt2" or "bytes".
        vocab_size: the largest vocabulary of "corpus", end of text included; the others have their own.
        progress: show a bar on stderr.

    Raises UserError for an unknown tokenizer and for data that is missing, empty, binary or too little to split.
    """
    if tokenizer not in tokenizers.NAMES:
        raise UserError(f"unknown tokenizer {tokenizer!r}: choose one of {', '.join(tokenizers.NAMES)}")
    texts = _standard_library() if data is None else _read_all(data)
    by_hash = sorted((hashlib.sha256(text.encode()).hexdigest(), text) for text in set(texts))
    fingerprint = _fingerprint([digest for digest, _ in by_hash], tokenizer, vocab_size)
    folder = Path(cache_dir) / fingerprint
    corpus = _open(folder, fingerprint)
    if corpus is None:
        train, val = _split([text for _, text in by_hash])
        _build(folder, train, val, _make_tokenizer(tokenizer, train, vocab_size, progress), progress)
        corpus = _open(folder, fingerprint)
        assert corpus is not None, f"{folder} cannot be read back"
    return corpus


# --- documents ---


def _standard_library() -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _NOT_SOURCE)
        sources = sorted(file for file in files if file.endswith(".py") and not file.startswith("_sysconfigdata"))
        texts += [text for file in sources if (text := _text(Path(folder, file))).strip()]
    if not texts:
        raise UserError(f"this Python has no readable sources under {root}: name a text of your own with --data")
    return texts


def _read_all(data: list[str]) -> list[str]:
    """The documents of files, folders and patterns, with duplicates and in the order found."""
    texts, skipped = [], []
    for argument in data:
        found, named = _find(argument)
        kept = len(texts)
        for path in found:
            documents = _documents(path)
            if documents:
                texts += documents
            elif named:
                raise UserError(f"{path} is empty or binary: training needs UTF-8 text without NUL bytes")
            else:
                skipped.append(path)
        if len(texts) == kept:
            why = f"{len(found)} files, all empty or binary" if found else "it holds no text files that are not hidden"
            raise UserError(f"no text in {argument}: {why}")
    if skipped:
        others = f" and {len(skipped) - 1} more" if len(skipped) > 1 else ""
        print(f"skipped files that are empty or binary: {skipped[0]}{others}", file=sys.stderr)
    return texts


def _find(argument: str) -> tuple[list[Path], bool]:
    """(files, whether the argument names its file itself). A folder's hidden files are left out."""
    path = Path(argument)
    if path.is_file():
        return [path], True
    if path.is_dir():
        return _files_below(path), False
    if path.exists():
        raise UserError(f"{path} is neither a file nor a folder")
    if not glob.has_magic(argument):
        raise UserError(f"{path} does not exist")
    matches = [Path(match) for match in sorted(glob.glob(argument, recursive=True))]
    if not matches:
        raise UserError(f"no file matches the pattern {argument}")
    files = [file for match in matches for file in (_files_below(match) if match.is_dir() else [match])]
    return [file for file in dict.fromkeys(files) if file.is_file()], False


def _files_below(root: Path) -> list[Path]:
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name != "__pycache__")
        found += [Path(folder, name) for name in sorted(files) if not name.startswith(".")]
    return [path for path in found if path.is_file()]


def _documents(path: Path) -> list[str]:
    """The documents in one file; none where it is empty or binary."""
    text = _text(path)
    texts = _json_lines(path, text) if path.suffix == ".jsonl" else [text]
    return [text for text in texts if text.strip()]


def _text(path: Path) -> str:
    """The file's text, "" where it is binary: with a NUL byte or not UTF-8."""
    try:
        with path.open("rb") as file:
            content = file.read(1 << 16)
            if b"\0" not in content:  # else it may be large and there is no need to read on
                content += file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    try:
        return "" if b"\0" in content else content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return ""


def _json_lines(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            record["text"].encode()
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON ({error.msg})") from error
        except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
            raise UserError(f'{path}:{number}: needs a JSON object with text in its field "text"') from error
        yield record["text"]


# --- splitting and tokenizing ---


def _fingerprint(digests: list[str], tokenizer: str, vocab_size: int) -> str:
    choice = [tokenizer, vocab_size, tokenizers.CORPUS_PATTERN] if tokenizer == "corpus" else [tokenizer]
    return hashlib.sha256(json.dumps([_FORMAT, choice, digests]).encode()).hexdigest()


def _split(texts: list[str]) -> tuple[list[str], list[str]]:
    """(training documents, validation documents) of texts in the order of their hashes."""
    if len(texts) >= _FEWEST_TO_CHOOSE_FROM:
        held_out = round(len(texts) * VALIDATION_SHARE)
        return texts[held_out:], texts[:held_out]
    cuts = [_cut(text) for text in texts]
    tails = [text[cut:] for text, cut in zip(texts, cuts, strict=True) if cut < len(text)]
    if not tails:
        raise UserError("the corpus is too small to hold out a validation text: give more text")
    return [text[:cut] for text, cut in zip(texts, cuts, strict=True)], tails


def _cut(text: str) -> int:
    """Where the last 5 % begin: at the start of that line, unless it is longer than 5 % itself."""
    point = max(1, int(len(text) * (1 - VALIDATION_SHARE)))
    line = text.rfind("\n", int(len(text) * (1 - 2 * VALIDATION_SHARE)), point) + 1
    return line or point


def _make_tokenizer(name: str, train: list[str], vocab_size: int, progress: bool) -> Tokenizer:
    if name == "gpt2":
        return tokenizers.load_gpt2()
    if name == "bytes":
        return tokenizers.byte_tokenizer()
    return tokenizers.train_bpe(train, vocab_size, progress)


def _dtype(tokenizer: Tokenizer) -> type:
    return np.uint16 if tokenizer.n_vocab <= 1 << 16 else np.uint32


def _tokenize(tokenizer: Tokenizer, texts: list[str], bar: tqdm) -> np.ndarray:
    """All documents' ids, 1-D, each document followed by eot."""
    dtype, shards = _dtype(tokenizer), []
    for pieces in _chunks(texts):
        for ids, (piece, ends) in zip(tokenizer.encode_batch([p for p, _ in pieces]), pieces, strict=True):
            shards.append(np.array([*ids, tokenizer.eot] if ends else ids, dtype=dtype))
            bar.update(len(piece.encode()))
    return np.concatenate(shards)


def _chunks(texts: list[str]) -> Iterator[list[tuple[str, bool]]]:
    """Lists of (piece, whether a document ends with it) of about _CHUNK characters, so that lists of ids stay short."""
    chunk, size = [], 0
    for text in texts:
        for piece, ends in _pieces(text):
            chunk.append((piece, ends))
            size += len(piece)
            if size >= _CHUNK:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Cuts a long document before a newline that follows text: every tokenizer's pattern cuts there as well."""
    start = 0
    while len(text) - start > _PIECE and (cut := _END_OF_LINE.search(text, start + _PIECE)):
        yield text[start : cut.start()], False
        start = cut.start()
    yield text[start:], True


# --- shards on disk ---


def _build(folder: Path, train: list[str], val: list[str], tokenizer: Tokenizer, progress: bool) -> None:
    """Tokenizes and writes `folder`, whole or not at all."""
    meta, off = {"format": _FORMAT, "tokenizer_hash": tokenizer.hash}, not progress
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as temporary:
            fresh = Path(temporary, "corpus")
            fresh.mkdir()
            for name, texts in (("train", train), ("val", val)):
                size = sum(len(text.encode()) for text in texts)
                with tqdm(
                    total=size, desc=f"tokenize {name}", unit="B", unit_scale=True, disable=off, leave=False
                ) as bar:
                    tokens = _tokenize(tokenizer, texts, bar)
                np.save(fresh / f"{name}.npy", tokens)
                meta |= {f"{name}_tokens": len(tokens), f"{name}_bytes": size, f"{name}_documents": len(texts)}
            meta["val_unigram_entropy"] = _entropy(tokens)
            tokenizer.save(fresh / "tokenizer.json")
            (fresh / "meta.json").write_text(json.dumps(meta, indent=1))
            shutil.rmtree(folder, ignore_errors=True)  # there only if damaged, or written by a run beside this one
            os.replace(fresh, folder)
    except OSError as error:
        raise UserError(f"cannot write the tokens to {folder}: {error.strerror}") from error


def _entropy(tokens: np.ndarray) -> float:
    """Nats per token of the distribution of the ids in `tokens`."""
    counts = np.bincount(tokens)
    shares = counts[counts > 0] / len(tokens)
    return float(-(shares * np.log(shares)).sum())


def _open(folder: Path, fingerprint: str) -> Corpus | None:
    """The corpus in `folder`; None where there is none or it is not whole."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        shards = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("train", "val")}
        whole = all(
            shard.shape == (meta[f"{name}_tokens"],)
            and shard.dtype == _dtype(tokenizer)
            and shard.max() < tokenizer.n_vocab
            for name, shard in shards.items()
        )
        if not whole or meta["format"] != _FORMAT or meta["tokenizer_hash"] != tokenizer.hash:
            return None
        sizes = {key: int(meta[key]) for key in ("train_bytes", "val_bytes", "train_documents", "val_documents")}
        entropy = float(meta["val_unigram_entropy"])
        if min(sizes["train_bytes"], sizes["val_bytes"]) < 1 or not 0 <= entropy < math.inf:
            return None
    except Exception:  # whatever is wrong with a cache, it is made again
        return None
    return Corpus(tokenizer, **shards, **sizes, val_unigram_entropy=entropy, fingerprint=fingerprint)


# --- command line ---


def main(arguments: list[str] | None = None) -> int:
    return exit_status(lambda: _run(arguments))


def _run(arguments: list[str] | None) -> None:
    parser = Parser(prog="gptlib.prepare", description="Turn text into token shards on disk.")
    parser.add_argument(
        "--data", type=file_name, nargs="+", metavar="PATH", help="files, folders, patterns (default: the stdlib)"
    )
    parser.add_argument("--tokenizer", default="corpus", help=f"one of {', '.join(tokenizers.NAMES)} (default: corpus)")
    parser.add_argument(
        "--vocab-size", type=positive_int, default=4096, help="largest corpus vocabulary (default: 4096)"
    )
    parser.add_argument(
        "--cache-dir", type=file_name, default="runs/data", help="where the shards go (default: runs/data)"
    )
    options = parser.parse_args(arguments)
    corpus = prepare(options.data, options.tokenizer, options.vocab_size, cache_dir=options.cache_dir)
    print(f"tokenizer   {corpus.tokenizer.name}, {corpus.tokenizer.n_vocab:,} tokens")
    for name in ("train", "val"):
        tokens, size = len(getattr(corpus, name)), getattr(corpus, f"{name}_bytes")
        documents = getattr(corpus, f"{name}_documents")
        ratio = tokens / size
        print(f"{name:<11} {documents:,} documents, {size:,} bytes, {tokens:,} tokens ({ratio:.4f} per byte)")
    print(f"unigram     {corpus.val_unigram_entropy:.4f} nats per validation token")
    print(f"written to  {Path(options.cache_dir, corpus.fingerprint)}")


if __name__ == "__main__":
    sys.exit(main())
