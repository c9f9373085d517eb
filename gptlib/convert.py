"""GPT-2 checkpoints of Hugging Face in and out.

    python -m gptlib.convert --from-hf DIR --out runs/gpt2      then: python -m gptlib.generate --run runs/gpt2
    python -m gptlib.convert --to-hf runs/gpt2 --out DIR

DIR holds config.json and model.safetensors, as a GPT-2 repository on the Hub does; pickles are never read. The names
on both sides differ, and two things beside: theirs keeps linear weights as (in, out), ours as nn.Linear's (out, in);
theirs has query, key and value in one matrix `c_attn`, ours in three. A model of ours without query, key and value bias
gets zeros for it on the way out, which compute the same.
"""

import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiktoken_ext.openai_public import r50k_pat_str
from torch import Tensor

from gptlib import checkpoint
from gptlib.errors import Parser, UserError, exit_status
from gptlib.flags import file_name
from gptlib.model import GPT2, GPTConfig
from gptlib.tokenizer import END_OF_TEXT, Tokenizer, byte_characters, load_gpt2

# What their configuration must say for their model to compute what ours does, each also the value when it is absent.
_SAME_MODEL = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
_LINEAR = {"att.out_proj": "attn.c_proj", "ff.layers.0": "mlp.c_fc", "ff.layers.2": "mlp.c_proj"}
_NORMS = {"norm1": "ln_1", "norm2": "ln_2"}
_PROJECTIONS = ("W_query", "W_key", "W_value")


def from_hf(config: dict, tensors: dict[str, Tensor]) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Their configuration and tensors -> ours: the shape and the state_dict of a GPTModel, fp32.

    Names may start with "transformer."; mask buffers are ignored, and so is the head where it is tied. Raises UserError
    for another architecture and for missing, unknown or misshapen tensors.
    """
    cfg = _our_config(config)
    named = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    theirs = {name: tensor.float() for name, tensor in named.items() if not _is_ignored(name, cfg)}
    _check_shapes(theirs, _their_shapes(cfg))
    ours = {mine: theirs[name].T.contiguous() if flip else theirs[name] for mine, name, flip in _pairs(cfg)}
    for i in range(cfg.n_layers):
        weights = theirs[f"h.{i}.attn.c_attn.weight"].T.chunk(3)  # 3 x (C, C)
        biases = theirs[f"h.{i}.attn.c_attn.bias"].chunk(3)
        for projection, weight, bias in zip(_PROJECTIONS, weights, biases, strict=True):
            ours[f"trf_blocks.{i}.att.{projection}.weight"] = weight.contiguous()
            ours[f"trf_blocks.{i}.att.{projection}.bias"] = bias
    ours["out_head.weight"] = ours["tok_emb.weight"] if cfg.tie_weights else theirs["lm_head.weight"]
    return cfg, ours


def to_hf(cfg: GPTConfig, state: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """Our shape and a GPTModel's state_dict -> their config.json and tensors. `mask` buffers are ignored."""
    theirs = {name: state[mine].T.contiguous() if flip else state[mine] for mine, name, flip in _pairs(cfg)}
    for i in range(cfg.n_layers):
        parts = [f"trf_blocks.{i}.att.{projection}" for projection in _PROJECTIONS]
        theirs[f"h.{i}.attn.c_attn.weight"] = torch.cat([state[f"{part}.weight"] for part in parts]).T.contiguous()
        no_bias = torch.zeros(cfg.emb_dim)
        theirs[f"h.{i}.attn.c_attn.bias"] = torch.cat([state.get(f"{part}.bias", no_bias) for part in parts])
    theirs = {f"transformer.{name}": tensor for name, tensor in theirs.items()}
    if not cfg.tie_weights:
        theirs["lm_head.weight"] = state["out_head.weight"]
    return _their_config(cfg), theirs


def import_run(source: str | Path, out: str | Path) -> GPTConfig:
    """Writes the run folder `out` from the model in `source`: its folder, or its .safetensors file.

    The tokenizer is the one in vocab.json beside the model, else tiktoken's gpt2. `out` must be new or empty.
    """
    source = Path(source)
    folder, weights = (source, source / "model.safetensors") if source.is_dir() else (source.parent, source)
    cfg, state = from_hf(_read_json(folder / "config.json"), _read_tensors(weights))
    vocabulary = folder / "vocab.json"
    if not vocabulary.exists() and cfg.vocab_size < GPT2.vocab_size:
        raise UserError(
            f"{folder} has no vocab.json, and with {cfg.vocab_size} tokens the model's tokenizer is not GPT-2's: "
            "put the model's own vocab.json beside it"
        )
    tokenizer = _tokenizer(_read_json(vocabulary), vocabulary) if vocabulary.exists() else load_gpt2()
    if tokenizer.n_vocab > cfg.vocab_size:
        raise UserError(f"the tokenizer's {tokenizer.n_vocab} tokens do not fit the model's {cfg.vocab_size}")
    shape = dataclasses.asdict(cfg)
    if cfg.tie_weights:
        del state["out_head.weight"]

    def fill(run: Path) -> None:
        (run / "checkpoint").mkdir()
        save_file(state, run / "checkpoint" / "model.safetensors")
        progress = {"step": 0, "data_fingerprint": None, "batches": {}}  # it was trained elsewhere
        state_file = run / "checkpoint" / "state.json"
        checkpoint.write_json(state_file, progress | {"model": shape, "tokenizer_hash": tokenizer.hash})
        tokenizer.save(run / "tokenizer.json")
        named = {"name": tokenizer.name, "n_vocab": tokenizer.n_vocab, "hash": tokenizer.hash}
        checkpoint.write_json(run / "config.json", {"converted_from": str(source), "model": shape, "tokenizer": named})

    _write_folder(Path(out), fill)
    return cfg


def export_run(run: str | Path, out: str | Path) -> GPTConfig:
    """Writes a run's model to the folder `out`, new or empty, as config.json and model.safetensors."""
    model = checkpoint.load_model(run, attn="sdpa", norm="torch")
    eot = Tokenizer.load(Path(run, "tokenizer.json")).eot
    config, tensors = to_hf(model.cfg, checkpoint.model_tensors(model))

    def fill(folder: Path) -> None:
        checkpoint.write_json(folder / "config.json", config | {"bos_token_id": eot, "eos_token_id": eot})
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})  # transformers asks for the format

    _write_folder(Path(out), fill)
    return model.cfg


# --- names and shapes ---


def _pairs(cfg: GPTConfig) -> list[tuple[str, str, bool]]:
    """(our name, their name, whether one is the other's transpose) of all tensors but c_attn and the head."""
    pairs = [("tok_emb.weight", "wte.weight", False), ("pos_emb.weight", "wpe.weight", False)]
    norms = {"final_norm": "ln_f"}
    for i in range(cfg.n_layers):
        norms |= {f"trf_blocks.{i}.{mine}": f"h.{i}.{theirs}" for mine, theirs in _NORMS.items()}
        for mine, theirs in _LINEAR.items():
            pairs.append((f"trf_blocks.{i}.{mine}.weight", f"h.{i}.{theirs}.weight", True))
            pairs.append((f"trf_blocks.{i}.{mine}.bias", f"h.{i}.{theirs}.bias", False))
    for mine, theirs in norms.items():
        pairs += [(f"{mine}.scale", f"{theirs}.weight", False), (f"{mine}.shift", f"{theirs}.bias", False)]
    return pairs


def _their_shapes(cfg: GPTConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    C = cfg.emb_dim
    block = {"attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}
    yield "wte.weight", (cfg.vocab_size, C)
    yield "wpe.weight", (cfg.context_length, C)
    for i in range(cfg.n_layers):
        for name, (rows, columns) in block.items():
            yield f"h.{i}.{name}.weight", (rows, columns)
            yield f"h.{i}.{name}.bias", (columns,)
    for norm in ["ln_f", *(f"h.{i}.{norm}" for i in range(cfg.n_layers) for norm in _NORMS.values())]:
        yield f"{norm}.weight", (C,)
        yield f"{norm}.bias", (C,)
    if not cfg.tie_weights:
        yield "lm_head.weight", (cfg.vocab_size, C)


def _is_ignored(name: str, cfg: GPTConfig) -> bool:
    return name.endswith((".attn.bias", ".attn.masked_bias")) or (cfg.tie_weights and name == "lm_head.weight")


def _check_shapes(tensors: dict[str, Tensor], expected: Iterator[tuple[str, tuple[int, ...]]]) -> None:
    """Reads `expected` only as far as `tensors` has it, as the number of layers comes from a file."""
    unknown = set(tensors)
    for name, shape in expected:
        if name not in tensors:
            raise UserError(f"the model lacks the tensor {name}")
        if tuple(tensors[name].shape) != shape:
            raise UserError(f"the tensor {name} has shape {tuple(tensors[name].shape)}, its config.json says {shape}")
        unknown.remove(name)
    if unknown:
        raise UserError(f"the model has a tensor that GPT-2 has not: {min(unknown)}")


def _our_config(config: dict) -> GPTConfig:
    for key, value in _SAME_MODEL.items():
        if config.get(key, value) != value:
            raise UserError(f"config.json says {key} = {config[key]!r}; only {value!r} computes what our model does")
    fields = {"vocab_size": "vocab_size", "context_length": "n_positions", "emb_dim": "n_embd"}
    fields |= {"n_heads": "n_head", "n_layers": "n_layer"}
    for theirs in fields.values():
        if type(config.get(theirs)) is not int:
            raise UserError(f"config.json needs the integer {theirs}, it has {config.get(theirs)!r}")
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise UserError(f"config.json says n_inner = {config['n_inner']!r}; our MLP is 4 times the width")
    drop_rate = config.get("resid_pdrop", 0.1)
    if type(drop_rate) not in (int, float):
        raise UserError(f"config.json needs the number resid_pdrop, it has {drop_rate!r}")
    shape = {mine: config[theirs] for mine, theirs in fields.items()}
    try:
        return GPTConfig(
            **shape,
            drop_rate=drop_rate,
            qkv_bias=True,
            tie_weights=bool(config.get("tie_word_embeddings", True)),
        )
    except ValueError as error:
        raise UserError(f"config.json: {error}") from error


def _their_config(cfg: GPTConfig) -> dict:
    return _SAME_MODEL | {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": cfg.vocab_size,
        "n_positions": cfg.context_length,
        "n_ctx": cfg.context_length,
        "n_embd": cfg.emb_dim,
        "n_head": cfg.n_heads,
        "n_layer": cfg.n_layers,
        "embd_pdrop": cfg.drop_rate,
        "attn_pdrop": cfg.drop_rate,
        "resid_pdrop": cfg.drop_rate,
        "tie_word_embeddings": cfg.tie_weights,
        "torch_dtype": "float32",
    }


# --- files ---


def _tokenizer(vocabulary: dict, path: Path) -> Tokenizer:
    """The tokenizer of a vocab.json: id of every token, in the order of merges, end of text last."""
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    try:
        ordered = sorted(vocabulary, key=vocabulary.get)
        if [vocabulary[token] for token in ordered] != list(range(len(ordered))) or ordered.pop() != END_OF_TEXT:
            raise ValueError(f"ids must count from 0 and end with {END_OF_TEXT}'s")
        tokens = [bytes(byte_of[character] for character in token) for token in ordered]
        if not {bytes([byte]) for byte in range(256)} <= set(tokens):
            raise ValueError("a single byte is missing")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path} is not a vocabulary of GPT-2's kind: {error}") from error
    return Tokenizer("gpt2", r50k_pat_str, tokens)


def _read_json(path: Path) -> dict:
    try:
        return checkpoint.read_json(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON that describes a model: {error}") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is not a .safetensors file, the only kind that is read: pickles can run code")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Lets `fill` write a new folder's files and puts it in place, whole or not at all."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already and is not empty: choose another --out")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as temporary:
            fresh = Path(temporary, "folder")
            fresh.mkdir()
            fill(fresh)
            os.replace(fresh, folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from error


# --- command line ---


def main(arguments: list[str] | None = None) -> int:
    return exit_status(lambda: _run(arguments))


def _run(arguments: list[str] | None) -> None:
    parser = Parser(prog="gptlib.convert", description="GPT-2 checkpoints of Hugging Face in and out.")
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument(
        "--from-hf", type=file_name, metavar="DIR", help="folder of config.json and model.safetensors"
    )
    direction.add_argument(
        "--to-hf", type=file_name, metavar="RUN", help="run folder whose model to write in their format"
    )
    parser.add_argument("--out", type=file_name, required=True, metavar="DIR", help="folder to write, new or empty")
    options = parser.parse_args(arguments)
    convert = import_run if options.from_hf else export_run
    cfg = convert(options.from_hf or options.to_hf, options.out)
    if options.to_hf:
        print("the tokenizer is not written: it stays in the run's tokenizer.json")
    print(f"{options.out}: {cfg.n_layers} layers, {cfg.emb_dim} wide, {cfg.n_heads} heads, {cfg.vocab_size:,} tokens")


if __name__ == "__main__":
    sys.exit(main())
