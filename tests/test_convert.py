"""Hugging Face's GPT-2 format: a model written by hand in it computes the same once converted, and comes back equal."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from gptlib import checkpoint, convert, generate
from gptlib.errors import UserError
from gptlib.model import GPTConfig, GPTModel
from gptlib.tokenizer import END_OF_TEXT, Tokenizer, byte_characters

V, T, C, H, LAYERS = 261, 12, 24, 3, 2
CONFIG = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "vocab_size": V,
    "n_positions": T,
    "n_embd": C,
    "n_head": H,
    "n_layer": LAYERS,
    "resid_pdrop": 0.0,
    "layer_norm_epsilon": 1e-05,
}


def their_tensors(prefix="", tied=True):
    """Random tensors under the names and in the layout of transformers' GPT2LMHeadModel, mask buffers included."""
    tensors = {"wte.weight": (V, C), "wpe.weight": (T, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    for i in range(LAYERS):
        for name, (rows, columns) in {
            "attn.c_attn": (C, 3 * C),
            "attn.c_proj": (C, C),
            "mlp.c_fc": (C, 4 * C),
            "mlp.c_proj": (4 * C, C),
        }.items():
            tensors |= {f"h.{i}.{name}.weight": (rows, columns), f"h.{i}.{name}.bias": (columns,)}
        for name in ("ln_1", "ln_2"):
            tensors |= {f"h.{i}.{name}.weight": (C,), f"h.{i}.{name}.bias": (C,)}
        tensors |= {f"h.{i}.attn.bias": (1, 1, T, T), f"h.{i}.attn.masked_bias": ()}
    named = {f"{prefix}{name}": torch.randn(shape) * 0.3 for name, shape in tensors.items()}
    return named if tied else named | {"lm_head.weight": torch.randn(V, C) * 0.3}


def their_logits(t, idx):
    """GPT-2 in their layout, y = x @ weight + bias, straight from the paper; t: tensors without prefix."""

    def linear(x, name):
        return x @ t[f"{name}.weight"] + t[f"{name}.bias"]

    def norm(x, name):
        return F.layer_norm(x, (C,), t[f"{name}.weight"], t[f"{name}.bias"], 1e-5)

    x = t["wte.weight"][idx] + t["wpe.weight"][: idx.shape[1]]
    future = torch.ones(idx.shape[1], idx.shape[1], dtype=torch.bool).triu(1)
    for i in range(LAYERS):
        q, k, v = (
            part.unflatten(-1, (H, C // H)).transpose(1, 2)
            for part in linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(C, dim=-1)
        )
        scores = (q @ k.mT / math.sqrt(C // H)).masked_fill(future, -math.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"h.{i}.attn.c_proj")
        h = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ t.get("lm_head.weight", t["wte.weight"]).T


def without_masks(tensors):
    return {name: tensor for name, tensor in tensors.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}


def assert_equal(found, expected):
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def write_source(folder, tensors, config=CONFIG, vocabulary=True):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    if vocabulary:
        tokens = [*byte_characters(), "th", "the", END_OF_TEXT]
        (folder / "vocab.json").write_text(json.dumps({token: id for id, token in enumerate(tokens)}))
    return folder


@pytest.fixture
def idx():
    return torch.randint(0, V, (2, T))


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_in_their_format_computes_the_same(prefix, tied, idx):
    tensors = their_tensors(prefix, tied)
    cfg, state = convert.from_hf(CONFIG | {"tie_word_embeddings": tied}, tensors)
    assert cfg == GPTConfig(V, T, C, H, LAYERS, drop_rate=0.0, qkv_bias=True, tie_weights=tied)
    model = GPTModel(cfg).eval()
    model.load_state_dict(state)
    expected = their_logits({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, idx)
    torch.testing.assert_close(model(idx), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_there_and_back_changes_no_bit(tied):
    tensors = their_tensors("transformer.", tied)
    cfg, state = convert.from_hf(CONFIG | {"tie_word_embeddings": tied}, tensors)
    config, back = convert.to_hf(cfg, state)
    assert_equal(back, without_masks(tensors))
    assert convert.from_hf(config, back)[0] == cfg


def test_a_model_without_qkv_bias_and_with_masks_goes_out_computing_the_same(idx):
    cfg = GPTConfig(V, T, C, H, LAYERS, drop_rate=0.0)
    model = GPTModel(cfg).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    masks = {f"trf_blocks.{i}.att.mask": torch.ones(T, T).triu(1) for i in range(LAYERS)}
    config, theirs = convert.to_hf(cfg, model.state_dict() | masks)
    assert config["tie_word_embeddings"] is False and not any("mask" in name for name in theirs)
    found = their_logits({name.removeprefix("transformer."): tensor for name, tensor in theirs.items()}, idx)
    torch.testing.assert_close(found, model(idx), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_run_folders_there_and_back(tmp_path, idx, tied, capsys):
    tensors = their_tensors("transformer.", tied)
    source = write_source(tmp_path / "theirs", tensors, CONFIG | {"tie_word_embeddings": tied})
    run, back, again = tmp_path / "runs" / "gpt2", tmp_path / "back", tmp_path / "again"
    assert convert.main(["--from-hf", str(source), "--out", str(run)]) == 0
    assert "2 layers, 24 wide, 3 heads, 261 tokens" in capsys.readouterr().out
    model = checkpoint.load_model(run, attn="reference", norm="reference").eval()
    expected = their_logits({name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}, idx)
    torch.testing.assert_close(model(idx), expected, rtol=1e-4, atol=1e-4)
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    assert tokenizer.hash == checkpoint.load_state(run)["tokenizer_hash"]
    assert tokenizer.encode("the\n") == [257, 10] and tokenizer.eot == 258

    assert convert.main(["--to-hf", str(run), "--out", str(back)]) == 0
    written = load_file(back / "model.safetensors")
    assert_equal(written, without_masks(tensors))
    config = json.loads((back / "config.json").read_text())
    assert config["eos_token_id"] == 258 and config["architectures"] == ["GPT2LMHeadModel"]

    weights = write_source(back, written, config) / "model.safetensors"
    assert convert.main(["--from-hf", str(weights), "--out", str(again)]) == 0
    assert_equal(*(load_file(folder / "checkpoint" / "model.safetensors") for folder in (again, run)))


def test_a_converted_run_generates(tmp_path, capsys):
    convert.import_run(write_source(tmp_path / "theirs", their_tensors()), tmp_path / "run")
    generate.main(["--run", str(tmp_path / "run"), "--prompt", "the", "--max-new-tokens", "4", "--device", "cpu"])
    assert capsys.readouterr().out.startswith("the")


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize(
    "config, change, message",
    [
        ({"model_type": "llama"}, None, "model_type = 'llama'"),
        ({"activation_function": "gelu"}, None, "activation_function = 'gelu'"),
        ({"layer_norm_epsilon": 1e-6}, None, "layer_norm_epsilon"),
        ({"scale_attn_by_inverse_layer_idx": True}, None, "scale_attn_by_inverse_layer_idx"),
        ({"n_inner": 50}, None, "n_inner = 50"),
        ({"n_head": 5}, None, "emb_dim 24 is not a multiple of n_heads 5"),
        ({"n_head": "3"}, None, "needs the integer n_head, it has '3'"),
        ({"n_layer": None}, None, "needs the integer n_layer"),
        ({"resid_pdrop": "none"}, None, "config.json needs the number resid_pdrop, it has 'none'"),
        ({"resid_pdrop": None}, None, "needs the number resid_pdrop, it has None"),
        ({"resid_pdrop": 1.5}, None, "config.json: drop_rate is 1.5; it must be at least 0 and below 1"),
        ({"n_layer": 10**12}, None, "lacks the tensor h.2.attn.c_attn.weight"),
        ({"n_layer": 1}, None, "a tensor that GPT-2 has not: h.1"),
        ({"n_positions": 13}, None, r"wpe.weight has shape \(12, 24\), its config.json says \(13, 24\)"),
        ({"tie_word_embeddings": False}, None, "lacks the tensor lm_head.weight"),
        ({}, lambda t: without(t, "h.0.mlp.c_fc.bias"), "lacks the tensor h.0.mlp.c_fc.bias"),
        ({}, lambda t: t | {"adapter.weight": torch.ones(1)}, "has not: adapter.weight"),
        ({}, lambda t: t | {"h.1.attn.c_attn.weight": torch.ones(3 * C, C)}, r"shape \(72, 24\)"),
    ],
)
def test_what_is_not_this_gpt2_is_refused(config, change, message):
    tensors = their_tensors()
    with pytest.raises(UserError, match=message):
        convert.from_hf(CONFIG | config, change(tensors) if change else tensors)


def test_bad_files_get_one_line_and_leave_nothing(tmp_path, capsys):
    out = tmp_path / "out"

    def refused(source, message):
        assert convert.main(["--from-hf", str(source), "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1
        assert not out.exists() and not list(tmp_path.glob(".writing*"))

    refused(tmp_path / "nowhere", "config.json: No such file")
    source = write_source(tmp_path / "theirs", their_tensors())
    (source / "pytorch_model.bin").write_bytes(b"\x80\x02}q")
    refused(source / "pytorch_model.bin", "pickles can run code")
    (source / "model.safetensors").write_bytes(b"\xff" * 100)
    refused(source, "cannot read")
    for content in ("{", "[]", "[" * 100_000, "\udcff".encode("utf-8", "surrogateescape").decode("latin-1")):
        (source / "config.json").write_text(content, encoding="utf-8")
        refused(source, "config.json is not")
    source = write_source(tmp_path / "theirs", their_tensors())
    ids = {token: id for id, token in enumerate(byte_characters())}
    for bad in (
        {},
        ids,
        ids | {END_OF_TEXT: 300},
        ids | {END_OF_TEXT: "x"},
        ids | {"\n": 256, END_OF_TEXT: 257},
        {END_OF_TEXT: 0},
    ):
        (source / "vocab.json").write_text(json.dumps(bad))
        refused(source, "vocab.json is not a vocabulary")
    big = {chr(0x100 + i // 60) * 2 + chr(0x100 + i % 60): 256 + i for i in range(20)}
    (source / "vocab.json").write_text(json.dumps(ids | big | {END_OF_TEXT: 276}))
    refused(source, "277 tokens do not fit the model's 261")


def test_an_out_folder_in_use_is_refused(tmp_path, capsys):
    source = write_source(tmp_path / "theirs", their_tensors())
    out = tmp_path / "out"
    out.mkdir()
    assert convert.main(["--from-hf", str(source), "--out", str(out)]) == 0
    before = sorted(path.name for path in out.rglob("*"))
    capsys.readouterr()
    assert convert.main(["--from-hf", str(source), "--out", str(out)]) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert sorted(path.name for path in out.rglob("*")) == before
    assert convert.main(["--to-hf", str(tmp_path / "none"), "--out", str(tmp_path / "x")]) == 2
    assert "no checkpoint" in capsys.readouterr().err
