"""Checkpoints of safetensors and JSON: whole at every moment, exact to the bit, nothing unpickled.

    checkpoint/model.safetensors       the weights, a tied head once
    checkpoint/optimizer.safetensors   <parameter>.<moment>
    checkpoint/random.safetensors      states of the random generators
    checkpoint/state.json              step, model shape, data cursor, hashes of the tokenizer and the text

A new checkpoint is written beside the old one as checkpoint.partial, renamed checkpoint.new once it is whole, and takes
the old one's place after that. A process killed between any two of these leaves a whole checkpoint: `find` knows where.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gptlib.errors import UserError
from gptlib.model import GPTConfig, GPTModel

STATE_KEYS = {"step", "model", "tokenizer_hash", "data_fingerprint", "batches"}


def save(run, model, optimizer, batches, corpus, step):
    """Write run/checkpoint: everything that the steps to come depend on."""
    run = Path(run)
    partial, new, final = (run / f"checkpoint{suffix}" for suffix in (".partial", ".new", ""))
    state = {
        "step": step,
        "model": dataclasses.asdict(model.cfg),
        "tokenizer_hash": corpus.tokenizer.hash,
        "data_fingerprint": corpus.fingerprint,
        "batches": batches.state_dict(),
    }
    if new.exists():  # left by a process killed while it replaced the old one
        _replace_folder(new, final)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(model_tensors(model), partial / "model.safetensors")
    save_file(_optimizer_tensors(model, optimizer), partial / "optimizer.safetensors")
    save_file(_random_state(_device(model)), partial / "random.safetensors")
    write_json(partial / "state.json", state)
    for file in partial.iterdir():
        with open(file, "rb") as f:
            os.fsync(f.fileno())
    os.rename(partial, new)
    _replace_folder(new, final)


def restore(run, model, optimizer, batches, corpus):
    """Put everything back as `save` found it; returns the step. UserError if the text is another one."""
    state = load_state(run)
    if state["tokenizer_hash"] != corpus.tokenizer.hash or state["data_fingerprint"] != corpus.fingerprint:
        raise UserError(f"the text that {run} was trained on has changed; put it back, or start a new run")
    load_weights(run, model)
    load_optimizer(run, model, optimizer)
    batches.load_state_dict(state["batches"])
    _restore_random_state(_read(find(run) / "random.safetensors"), _device(model))
    return state["step"]


def find(run):
    """The folder of a run's newest whole checkpoint; UserError if it has none."""
    run = Path(run)
    for folder in (run / "checkpoint.new", run / "checkpoint"):
        if folder.is_dir():
            return folder
    raise UserError(f"{run} holds no checkpoint; one is made every --save-every steps, at the end or on SIGTERM")


def exists(run):
    """Whether the folder holds a checkpoint."""
    return any((Path(run) / name).is_dir() for name in ("checkpoint", "checkpoint.new"))


def load_state(run):
    """The contents of state.json."""
    path = find(run) / "state.json"
    try:
        state = json.loads(path.read_text())
        if not isinstance(state, dict) or not state.keys() >= STATE_KEYS:
            raise ValueError(f"it lacks one of {', '.join(sorted(STATE_KEYS))}")
        return state
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e}); the checkpoint is damaged") from e


def load_model(run, *, attn, norm, loss="torch"):
    """The trained model on the CPU, computed by the named implementations."""
    model = GPTModel(GPTConfig(**load_state(run)["model"]), attn=attn, norm=norm, loss=loss)
    load_weights(run, model)
    return model


def load_weights(run, model):
    """Fill the model with a run's weights; UserError if they are of another shape."""
    path = find(run) / "model.safetensors"
    tensors = _read(path)
    if model.cfg.tie_weights and "tok_emb.weight" in tensors:
        tensors["out_head.weight"] = tensors["tok_emb.weight"]
    try:
        model.load_state_dict(tensors)
    except RuntimeError as e:
        raise UserError(f"{path} does not fit the model: {str(e).splitlines()[-1].strip()}") from e


def load_optimizer(run, model, optimizer):
    """Fill the optimizer with a run's moments."""
    tensors = _read(find(run) / "optimizer.safetensors")
    names = {id(p): name for name, p in model.named_parameters()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    moments = {}
    for key, tensor in tensors.items():
        name, _, moment = key.rpartition(".")
        moments.setdefault(order.index(name), {})[moment] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def model_tensors(model):
    """The state_dict as contiguous CPU tensors, a tied head left out."""
    tied = model.cfg.tie_weights
    return {k: _plain(v) for k, v in model.state_dict().items() if not (tied and k == "out_head.weight")}


def write_json(path, values):
    """A JSON file, written whole."""
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(partial, path)


def _optimizer_tensors(model, optimizer):
    return {
        f"{name}.{moment}": _plain(tensor)
        for name, p in model.named_parameters()
        for moment, tensor in optimizer.state[p].items()
    }


def _replace_folder(new, final):
    shutil.rmtree(final, ignore_errors=True)
    os.rename(new, final)


def _plain(tensor):
    return tensor.detach().cpu().contiguous()


def _device(model):
    return model.tok_emb.weight.device


def _random_state(device):
    """Every random generator that training draws from, but for the data's own (see Batches)."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _restore_random_state(states, device):
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _read(path):
    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path} cannot be read ({e}); the checkpoint is damaged") from e
