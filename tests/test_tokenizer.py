"""Tokenizers: nothing is lost, `tokenizers` and tiktoken encode alike, files are checked before they are believed."""

import json
import random
import sys

import pytest
import tiktoken.load
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlib import tokenizer as module
from gptlib.errors import UserError
from gptlib.tokenizer import END_OF_TEXT, Tokenizer, byte_tokenizer, load_gpt2, train_bpe, train_with_tokenizers

CODE = '''def _split_heads(x, n_heads=12):
    """Zerlegt (B, T, C) in Köpfe — naïve 日本語 αβγ."""
    if x is None or n_heads <= 0:
        raise ValueError(f"n_heads = {n_heads!r}, __init__")
    return [x[..., i * 64:(i + 1) * 64] for i in range(n_heads)]


class Naïve(object):
\tTABLE = {0x1F600: "😀", 3.14159e-10: '\\\\n'}  # tabs, too
'''
TEXTS = [
    "",
    " ",
    "\n",
    CODE,
    CODE.replace("\n", "\r\n"),
    "the quick  brown   fox's     'll don't   ",
    " " * 257 + "x" + "\n" * 513 + "\t" * 7,
    "a" * 5000 + "0" * 700 + "-" * 700 + "é" * 700,
    "aaaaabaaaabaaabaab " * 40,
    "😀👩‍👩‍👧‍👦🇩🇪 e\u0301 \u200b\u2003\u3000\u00a0\ufeff\u2028\u0085 мир 中文 עברית हिन्दी 𞓐𞓑",
    "".join(map(chr, range(256))),
    f"before{END_OF_TEXT}after {END_OF_TEXT}",
    "\0\x01\x1b[0m\x7f",
]


@pytest.fixture(scope="module")
def source():
    return [CODE, open(module.__file__, encoding="utf-8").read(), *TEXTS]


@pytest.fixture(scope="module")
def corpus(source):
    return train_bpe(source, 700, progress=False)


@pytest.fixture(scope="module")
def peer(source):
    """`tokenizers`' own encoding, as ids of ours: text -> list of ids."""
    trained = train_with_tokenizers(source, 700, progress=False)
    byte_of = {character: byte for byte, character in enumerate(module.byte_characters())}
    ours = train_bpe(source, 700, progress=False)

    def encode(text):
        tokens = [bytes(byte_of[c] for c in token) for token in trained.encode(text, add_special_tokens=False).tokens]
        return [ours._encoding.encode_single_token(token) for token in tokens]

    return encode


def random_texts(n, seed=0):
    generator = random.Random(seed)
    alphabet = [
        "a",
        "b",
        "e",
        "_",
        " ",
        " ",
        "\n",
        "    ",
        "self",
        "\t",
        "0",
        "12",
        ".",
        "(",
        "é",
        "中",
        "😀",
        "\r\n",
        "\u2003",
    ]
    return ["".join(generator.choices(alphabet, k=generator.randrange(1, 60))) for _ in range(n)]


def test_both_libraries_encode_alike(corpus, peer):
    for text in [*TEXTS, *random_texts(2000)]:
        assert corpus.encode(text) == peer(text), repr(text)


def test_both_libraries_cut_every_character_alike(corpus, peer):
    assert sys.maxunicode == 0x10FFFF
    for start in range(0, 0x20000, 64):
        around = "".join(f"a{chr(c)}b {chr(c)}" for c in range(start, start + 64) if not 0xD800 <= c < 0xE000)
        assert corpus.encode(around) == peer(around), hex(start)


@settings(deadline=None, max_examples=150)
@given(text=st.text())
def test_encoding_loses_nothing(text):
    tokenizer = test_encoding_loses_nothing.tokenizer
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.decode_bytes(ids) == text.encode()
    assert not ids or 0 <= min(ids) <= max(ids) < tokenizer.eot


test_encoding_loses_nothing.tokenizer = train_bpe([CODE, *TEXTS], 600, progress=False)


def test_numbers_of_tokens(corpus):
    assert corpus.n_vocab == 700 and corpus.eot == 699 and corpus.name == "corpus"
    assert [corpus.decode_bytes([byte]) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert corpus.decode([corpus.eot]) == END_OF_TEXT
    plain = byte_tokenizer()
    assert (plain.name, plain.n_vocab, plain.eot) == ("bytes", 257, 256)
    assert plain.encode(CODE) == list(CODE.encode())


def test_merges_happen_and_stay_inside_pieces(corpus):
    assert len(corpus.encode(CODE)) < 0.6 * len(CODE.encode())
    for token in (corpus.decode_bytes([id]) for id in range(256, corpus.eot)):
        text = token.decode("utf-8", errors="ignore")
        assert text.isspace() or text.lstrip(" ").isalpha() or not any(c.isascii() and c.isalpha() for c in text), token
        assert "\n" not in text.strip()


def test_little_text_gives_a_small_vocabulary_without_single_occurrences():
    tokenizer = train_bpe(["abab xyz"], 4096, progress=False)
    assert tokenizer.n_vocab == 258 and tokenizer.encode("ab") == [256]
    assert train_bpe([], 4096, progress=False).n_vocab == 257


def test_the_order_of_texts_does_not_matter(source, corpus):
    assert train_bpe(source[::-1], 700, progress=False).hash == corpus.hash
    assert train_bpe(source, 699, progress=False).hash != corpus.hash


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(UserError, match="256 is too small"):
        train_bpe(["text"], 256)


@pytest.mark.parametrize("kind", ["corpus", "bytes"])
def test_end_of_text_in_a_text_is_text(kind, corpus):
    tokenizer = corpus if kind == "corpus" else byte_tokenizer()
    ids = tokenizer.encode(f"a{END_OF_TEXT}b")
    assert tokenizer.eot not in ids and tokenizer.decode(ids) == f"a{END_OF_TEXT}b"


def test_batches_equal_single_texts(corpus):
    texts = [*TEXTS, *random_texts(50)]
    for threads in (None, 1, 3):
        assert corpus.encode_batch(texts, threads=threads) == [corpus.encode(text) for text in texts]


def test_decoding_half_a_character_and_bad_ids(corpus):
    assert corpus.decode([0xF0, 0x9F]) == "\ufffd"
    assert corpus.encode("\ud800") == corpus.encode("\ufffd")  # no UTF-8 has it
    for bad in (-1, 700, 1 << 40):
        with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary of 700"):
            corpus.decode([1, bad])


def test_long_pieces_take_linear_time(corpus):
    text = "x" * 300_000 + " " * 2_000_000 + "y"
    assert corpus.decode_bytes(corpus.encode(text)) == text.encode()
    assert train_bpe([text], 300, progress=False).n_vocab <= 300  # quadratic, this would take hours


def test_saving_and_loading(tmp_path, corpus):
    path = tmp_path / "tokenizer.json"
    for tokenizer in (corpus, byte_tokenizer()):
        tokenizer.save(path)
        loaded = Tokenizer.load(path)
        assert (loaded.name, loaded.hash, loaded.n_vocab) == (tokenizer.name, tokenizer.hash, tokenizer.n_vocab)
        assert all(loaded.encode(text) == tokenizer.encode(text) for text in TEXTS)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]
    assert len({corpus.hash, byte_tokenizer().hash}) == 2 and len(corpus.hash) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"name": "../../etc"},
        {"name": ["corpus"]},
        {"pattern": None},
        {"pattern": "(unclosed"},
        {"pattern": "a" * 2000},
        {"tokens": None},
        {"tokens": {}},
        {"tokens": ["a", "b"]},
        {"tokens": [chr(b) for b in range(256)] + [""]},
        {"tokens": [chr(b) for b in range(256)] + [7]},
        {"tokens": [chr(b) for b in range(256)] + ["日"]},
        {"tokens": [chr(b) for b in range(256)] + ["ab", "ab"]},
        {"tokens": [chr(b) for b in range(255)] + ["ab"]},
        {"special_tokens": {}},
        {"special_tokens": {END_OF_TEXT: 3}},
        {"special_tokens": {END_OF_TEXT: 699, "x": 700}},
        {"hash": "0" * 64},
        {"hash": None},
    ],
    ids=lambda change: "-".join(f"{key}={str(value)[:8]}" for key, value in change.items()),
)
def test_a_damaged_file_is_refused(tmp_path, corpus, change):
    path = tmp_path / "tokenizer.json"
    corpus.save(path)
    changed = json.loads(path.read_text()) | change
    if "tokens" in change and isinstance(change["tokens"], list):  # made to fit, so that only the tokens are wrong
        tokens = [str(text).encode("latin-1", "replace") for text in change["tokens"]]
        end = {END_OF_TEXT: len(tokens)}
        changed |= {"hash": module._definition_hash(changed["pattern"], tokens), "special_tokens": end}
    path.write_text(json.dumps(changed))
    with pytest.raises(UserError, match="is not a tokenizer" if "hash" not in change else "is damaged"):
        Tokenizer.load(path)


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"\xff\xfe", b"{" * 9, b"[" * 200_000, b"1" * 9000])
def test_what_is_no_tokenizer_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a tokenizer"):
        Tokenizer.load(path)


def test_missing_and_huge_files_are_refused(tmp_path, monkeypatch, corpus):
    with pytest.raises(UserError, match=r"cannot read the tokenizer .*none\.json: No such file"):
        Tokenizer.load(tmp_path / "none.json")
    corpus.save(tmp_path / "big.json")
    monkeypatch.setattr(module, "_MAX_FILE_BYTES", 100)
    with pytest.raises(UserError, match="larger than 100 bytes"):
        Tokenizer.load(tmp_path / "big.json")


def without_network(*_):
    raise ConnectionError("no route")


def test_gpt2_without_its_files_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.load, "read_file", without_network)
    with pytest.raises(UserError) as caught:
        load_gpt2()
    message = str(caught.value)
    assert "\n" not in message
    for url, name in (
        ("encodings/main/vocab.bpe", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"),
        ("encodings/main/encoder.json", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"),
    ):
        assert f"{url} as {tmp_path / name}" in message
    assert "TIKTOKEN_CACHE_DIR" in message and "--tokenizer corpus" in message and "--tokenizer bytes" in message
    assert list(tmp_path.iterdir()) == []


def test_gpt2_comes_from_tiktokens_files(tmp_path, monkeypatch):
    """A small table under the names that tiktoken looks for, its checksums waived: the whole way but the network."""
    characters = module.byte_characters()
    order = sorted(range(256), key=lambda byte: (ord(characters[byte]) >= 256, byte))  # tiktoken's order of the bytes
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    tokens = [*(characters[byte] for byte in order), *(left + right for left, right in merges), END_OF_TEXT]
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges), ""]
    vocab, encoder = (tmp_path / module._cache_name(url) for url in module._GPT2_FILES)
    vocab.write_text("\n".join(lines), encoding="utf-8")
    encoder.write_text(json.dumps({token: id for id, token in enumerate(tokens)}))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.load, "check_hash", lambda *_: True)
    monkeypatch.setattr(tiktoken.load, "read_file", without_network)

    gpt2 = load_gpt2()
    assert (gpt2.name, gpt2.n_vocab, gpt2.eot) == ("gpt2", 260, 259)
    assert gpt2.encode(" the") == [258] and gpt2.encode("\x00") == [order.index(0)]
    for text in TEXTS:
        assert gpt2.decode(gpt2.encode(text)) == text
    long = "x" + " " * 2_000_000 + "y"  # tiktoken alone overflows its stack on this
    assert gpt2.decode_bytes(gpt2.encode(long)) == long.encode()
    gpt2.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json").hash == gpt2.hash
