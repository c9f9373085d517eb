"""From documents to shards: what is read, what is refused, what is held out, and that the cache is never trusted."""

import hashlib
import json
import math
from collections import Counter

import numpy as np
import pytest

from gptlib import prepare as module
from gptlib.errors import UserError
from gptlib.prepare import main, prepare
from gptlib.tokenizer import END_OF_TEXT, Tokenizer, byte_tokenizer, train_bpe


def words(i):
    return f"document number {i}\n" + "".join(f"line {j} of {i}: {(i * 31 + j * 17) % 101} apples\n" for j in range(8))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    for i in range(40):
        (folder / ("deeper" if i % 2 else ".") / f"{i}.txt").write_text(words(i))
    return folder


@pytest.fixture
def make(tmp_path):
    def make(*data, tokenizer="bytes", vocab_size=300):
        paths = [str(path) for path in data]
        return prepare(paths, tokenizer, vocab_size, cache_dir=tmp_path / "cache", progress=False)

    return make


def documents(corpus, side):
    """The texts behind a shard, which must end with end of text."""
    tokens = np.asarray(getattr(corpus, side))
    ends = np.flatnonzero(tokens == corpus.tokenizer.eot)
    assert ends[-1] == len(tokens) - 1
    return [corpus.tokenizer.decode(part[part != corpus.tokenizer.eot]) for part in np.split(tokens, ends[:-1] + 1)]


def test_every_document_is_on_one_side_whole(make, folder):
    corpus = make(folder)
    train, val = documents(corpus, "train"), documents(corpus, "val")
    assert sorted(train + val) == sorted(words(i) for i in range(40))
    assert val == sorted(train + val, key=lambda text: hashlib.sha256(text.encode()).hexdigest())[:2]
    assert len(val) == corpus.val_documents == 2 and len(train) == corpus.train_documents == 38
    assert corpus.train_bytes == sum(len(text.encode()) for text in train)
    assert corpus.val_bytes == sum(len(text.encode()) for text in val)
    assert corpus.train.dtype == np.uint16 and isinstance(corpus.train, np.memmap) and corpus.train.ndim == 1
    with pytest.raises(ValueError, match="read-only"):
        corpus.train[0] = 0


def test_the_split_follows_content_not_names_order_or_copies(make, folder, tmp_path):
    first = make(folder)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for i in range(40):
        (elsewhere / f"{(i * 7) % 40}-renamed.md").write_text(words(i))
        (elsewhere / f"copy of {i}.txt").write_text(words(i))
    second = make(elsewhere)
    assert second.fingerprint == first.fingerprint and documents(second, "val") == documents(first, "val")
    (elsewhere / "one more.txt").write_text(words(40))
    third = make(elsewhere)
    assert third.fingerprint != first.fingerprint and third.train_documents + third.val_documents == 41


def test_few_documents_give_the_end_of_each(make, tmp_path):
    texts = ["".join(f"{i} line {j}\n" for j in range(100 * i)) for i in (1, 2)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    corpus = make(tmp_path / "0.txt", tmp_path / "1.txt")
    train, val = sorted(documents(corpus, "train")), sorted(documents(corpus, "val"))
    assert [a + b for a, b in zip(train, val, strict=True)] == texts
    for head, tail, text in zip(train, val, texts, strict=True):
        assert head.endswith("\n") and 0.05 <= len(tail) / len(text) < 0.07


def test_one_line_is_cut_where_five_percent_begin(make, tmp_path):
    (tmp_path / "line.txt").write_text("x" * 1000)
    corpus = make(tmp_path / "line.txt")
    assert documents(corpus, "train") == ["x" * 950] and documents(corpus, "val") == ["x" * 50]
    (tmp_path / "letter.txt").write_text("x")
    with pytest.raises(UserError, match="too small to hold out"):
        make(tmp_path / "letter.txt")


def test_bpe_is_learnt_from_training_documents_only(make, folder, monkeypatch):
    seen = []

    def recorded(texts, *arguments):
        seen.extend(texts)
        return train_bpe(texts, *arguments)

    monkeypatch.setattr(module.tokenizers, "train_bpe", recorded)
    corpus = make(folder, tokenizer="corpus")
    assert seen == documents(corpus, "train") and len(seen) == 38


def test_unigram_entropy_is_that_of_the_validation_tokens(make, folder):
    corpus = make(folder, tokenizer="corpus")
    counts = Counter(np.asarray(corpus.val).tolist())
    expected = -sum(n / len(corpus.val) * math.log(n / len(corpus.val)) for n in counts.values())
    assert corpus.val_unigram_entropy == pytest.approx(expected, rel=1e-12)
    assert 0 < expected < math.log(corpus.tokenizer.n_vocab)


def test_json_lines_are_documents(make, tmp_path):
    path = tmp_path / "stories.jsonl"
    texts = [words(i) for i in range(30)] + ["line\u2028separator\x0bkept \0 too", "", words(0)]
    path.write_text(
        "\n\n".join(json.dumps({"text": text, "id": 1}, ensure_ascii=i % 2 == 1) for i, text in enumerate(texts))
    )
    corpus = make(path)
    assert sorted(documents(corpus, "train") + documents(corpus, "val")) == sorted({*texts} - {""})


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "not JSON"),
        ("text", "not JSON"),
        ('{"txt": "x"}', 'field "text"'),
        ('{"text": null}', 'field "text"'),
        ('{"text": ["x"]}', 'field "text"'),
        ('["text"]', 'field "text"'),
        ('"text"', 'field "text"'),
        ('{"text": "\\ud800"}', 'field "text"'),
        ("[" * 200_000, 'field "text"'),
    ],
    ids=lambda value: value[:16],
)
def test_a_bad_json_line_is_named(make, tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(UserError, match=f"bad.jsonl:3: .*{message}"):
        make(path)


def test_folders_skip_what_is_not_text_and_patterns_too(make, folder, capsys):
    plain = make(folder)
    (folder / "empty.txt").touch()
    (folder / "blank.txt").write_text(" \n")
    (folder / "image.png").write_bytes(b"\x89PNG\r\n\0\0")
    (folder / "latin1.txt").write_bytes("Köpfe".encode("latin-1"))
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "cached.txt").write_text("cached")
    (folder / "dangling.txt").symlink_to(folder / "nothing")
    for data in (folder, f"{folder}/**", f"{folder}/**/*.*"):
        assert set(documents(make(data), "train")) <= {words(i) for i in range(40)} | {"cached"}
    assert make(folder).fingerprint == plain.fingerprint
    assert "skipped files that are empty or binary" in capsys.readouterr().err
    assert make(f"{folder}/deeper/*.txt").train_documents == 19
    assert make(f"{folder}/deep*").train_documents == 19
    assert (
        make(folder / "1.txt" if (folder / "1.txt").exists() else folder / "2.txt", folder / "0.txt").val_documents == 2
    )


def test_a_byte_order_mark_is_not_text(make, tmp_path):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + b"x" * 100)
    assert documents(make(tmp_path / "bom.txt"), "train") == ["x" * 95]


def bad_inputs(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.md").write_text("\n \t\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "binary.bin").write_bytes(b"text\0text")
    (tmp_path / "late.bin").write_bytes(b"text" * 50_000 + b"\0")
    (tmp_path / "latin1.txt").write_bytes(b"K\xf6pfe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "empty.txt").touch()
    (tmp_path / "nothing" / ".git").mkdir(parents=True)
    (tmp_path / "nothing" / ".git" / "text").write_text("hidden")
    return {
        "empty.txt": "empty or binary",
        "blank.md": "empty or binary",
        "empty.jsonl": "empty or binary",
        "binary.bin": "empty or binary",
        "late.bin": "empty or binary",
        "latin1.txt": "empty or binary",
        "folder": "no text in .*folder: 1 files, all empty or binary",
        "missing.txt": "missing.txt does not exist",
        "*.nothing": r"no file matches the pattern .*\*.nothing",
        "f*": "no text in",
        "nothing": "no text in .*nothing: it holds no text files that are not hidden",
    }


def test_bad_input_gets_one_line_with_its_path_and_leaves_nothing(tmp_path, capsys):
    cache = tmp_path / "cache"
    (tmp_path / "good.txt").write_text(words(1))
    for name, message in bad_inputs(tmp_path).items():
        path = str(tmp_path / name)
        arguments = ["--data", str(tmp_path / "good.txt"), path, "--tokenizer", "bytes", "--cache-dir", str(cache)]
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and path in error, error
        with pytest.raises(UserError, match=message):
            prepare([path], "bytes", 300, cache_dir=cache)
    assert main(["--vocab-size", "many"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "'many'" in error
    with pytest.raises(UserError, match="/dev/null is neither a file nor a folder"):
        prepare(["/dev/null"], "bytes", 300, cache_dir=cache)
    with pytest.raises(UserError, match="unknown tokenizer 'bpe': choose one of corpus, gpt2, bytes"):
        prepare([str(tmp_path / "good.txt")], "bpe", 300, cache_dir=cache)
    with pytest.raises(UserError, match="256 is too small"):
        prepare([str(tmp_path / "good.txt")], "corpus", 256, cache_dir=cache)
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_named(make, tmp_path):
    (tmp_path / "good.txt").write_text(words(1))
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write the tokens to .*cache"):
        make(tmp_path / "good.txt")


def test_the_second_call_reads_the_shards(make, folder, monkeypatch):
    first = make(folder, tokenizer="corpus")

    def never(*_):
        raise AssertionError("made again")

    monkeypatch.setattr(module, "_build", never)
    second = make(folder, tokenizer="corpus")
    assert second.tokenizer.hash == first.tokenizer.hash and second.fingerprint == first.fingerprint
    assert np.array_equal(second.train, first.train) and np.array_equal(second.val, first.val)
    named = [name for name in vars(first) if name not in ("tokenizer", "train", "val")]
    assert [getattr(first, name) for name in named] == [getattr(second, name) for name in named]
    for change in ({"tokenizer": "bytes"}, {"tokenizer": "corpus", "vocab_size": 301}):
        with pytest.raises(AssertionError, match="made again"):
            make(folder, **change)


@pytest.mark.parametrize("name", ["train.npy", "val.npy", "meta.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "emptied", "other"])
def test_damaged_shards_are_made_again(make, folder, tmp_path, name, damage):
    first = make(folder, tokenizer="corpus")
    train = np.array(first.train)
    path = tmp_path / "cache" / first.fingerprint / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"cut": content[: len(content) // 2], "emptied": b"", "other": b'{"format": "other"}'}[damage])
    again = make(folder, tokenizer="corpus")
    assert np.array_equal(again.train, train) and again.tokenizer.hash == first.tokenizer.hash
    assert path.read_bytes() == content
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [first.fingerprint]


@pytest.mark.parametrize("name", ["train", "val"])
@pytest.mark.parametrize("change", ["dtype", "id"])
def test_shards_of_the_right_length_with_wrong_ids_are_made_again(make, folder, tmp_path, name, change):
    first = make(folder, tokenizer="corpus")
    path = tmp_path / "cache" / first.fingerprint / f"{name}.npy"
    content, tokens = path.read_bytes(), np.array(getattr(first, name))
    tokens[7] = first.tokenizer.n_vocab if change == "id" else tokens[7]
    path.unlink()
    np.save(path, tokens if change == "id" else tokens.astype(np.float32))
    again = make(folder, tokenizer="corpus")
    assert getattr(again, name).dtype == np.uint16 and path.read_bytes() == content


@pytest.mark.parametrize(
    "change", [{"val_bytes": 0}, {"train_bytes": -1}, {"val_unigram_entropy": math.nan}, {"val_bytes": math.inf}]
)
def test_a_description_that_cannot_be_true_is_made_again(make, folder, tmp_path, change):
    path = tmp_path / "cache" / make(folder, tokenizer="corpus").fingerprint / "meta.json"
    content = path.read_text()
    path.write_text(json.dumps(json.loads(content) | change))
    make(folder, tokenizer="corpus")
    assert path.read_text() == content


@pytest.mark.parametrize("name", ["train.npy", "meta.json"])
def test_hostile_shards_are_made_again(make, folder, tmp_path, name):
    path = tmp_path / "cache" / make(folder, tokenizer="corpus").fingerprint / name
    content = path.read_bytes()
    path.unlink()
    if name == "meta.json":
        path.write_text("[" * 100_000)
    else:
        with open(path, "wb") as f:
            np.savez(f, a=np.arange(3))
    make(folder, tokenizer="corpus")
    assert path.read_bytes() == content


def test_another_tokenizer_beside_the_shards_is_not_believed(make, folder, tmp_path):
    first = make(folder, tokenizer="corpus")
    byte_tokenizer().save(tmp_path / "cache" / first.fingerprint / "tokenizer.json")
    assert make(folder, tokenizer="corpus").tokenizer.hash == first.tokenizer.hash


def test_an_interrupted_run_leaves_nothing(make, folder, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Tokenizer, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(folder)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("tokenizer", ["corpus", "bytes"])
def test_long_documents_are_cut_without_a_trace(make, tmp_path, monkeypatch, tokenizer):
    text = "".join(f"def f{i}(x):\n    return x  # {i}\n\n\n  \n\t y = {i % 7}\r\n" for i in range(300)) + "z" * 500
    (tmp_path / "long.txt").write_text(text, newline="")
    whole = np.array(make(tmp_path / "long.txt", tokenizer=tokenizer).train)
    monkeypatch.setattr(module, "_FORMAT", "another fingerprint")
    monkeypatch.setattr(module, "_PIECE", 50)
    monkeypatch.setattr(module, "_CHUNK", 400)
    assert len(list(module._pieces(text))) > 100
    assert np.array_equal(make(tmp_path / "long.txt", tokenizer=tokenizer).train, whole)


def test_more_than_65536_ids_need_four_bytes(monkeypatch):
    class Wide:
        eot, n_vocab = 70_000, 70_001

        def encode_batch(self, texts):
            return [[ord(c) for c in text] for text in texts]

    with module.tqdm(disable=True) as bar:
        tokens = module._tokenize(Wide(), ["😀", "a"], bar)
    assert tokens.dtype == np.uint32 and tokens.tolist() == [0x1F600, 70_000, ord("a"), 70_000]


def test_end_of_text_in_a_document_does_not_end_it(make, folder):
    (folder / "0.txt").write_text(f"before {END_OF_TEXT} after")
    corpus = make(folder)
    assert f"before {END_OF_TEXT} after" in documents(corpus, "train") + documents(corpus, "val")


def test_the_standard_library_is_found_without_its_tests(tmp_path, monkeypatch):
    texts = module._standard_library()
    assert sum(len(text) for text in texts) > 5_000_000 and all(text.strip() for text in texts)
    assert any("class Decimal" in text for text in texts) and any("def dataclass(" in text for text in texts)
    assert sum("unittest.main()" in text for text in texts) < 20
    monkeypatch.setattr(module.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match="name a text of your own with --data"):
        prepare(None, "bytes", 300, cache_dir=tmp_path)


def test_the_standard_library_corpus_from_the_command_line(tmp_path, monkeypatch, capsys):
    library = tmp_path / "lib"
    for name in (
        "a.py",
        "pkg/b.py",
        "test/c.py",
        "pkg/tests/d.py",
        "site-packages/e.py",
        "_sysconfigdata_x.py",
        "f.txt",
    ):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(f"{name}\n" * 30)
    monkeypatch.setattr(module.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    monkeypatch.chdir(tmp_path)
    assert main(["--tokenizer", "corpus", "--vocab-size", "270"]) == 0
    output = capsys.readouterr().out
    (written,) = (tmp_path / "runs" / "data").iterdir()
    assert f"written to  runs/data/{written.name}" in output and "2 documents" in output and "nats per" in output
    assert sorted(path.name for path in written.iterdir()) == ["meta.json", "tokenizer.json", "train.npy", "val.npy"]
    text = Tokenizer.load(written / "tokenizer.json").decode(np.load(written / "train.npy"))
    assert "a.py" in text and "pkg/b.py" in text
    assert not any(name in text for name in ("c.py", "d.py", "e.py", "_sysconfig", "f.txt"))
