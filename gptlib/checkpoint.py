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

from gptlib.device import memory_for
from gptlib.errors import UserError, kind_of, writing
from gptlib.model import GPTConfig, GPTModel

STATE_KEYS = {"step", "model", "tokenizer_hash", "data_fingerprint", "batches"}


def save(run, model, optimizer, batches, corpus, step):
    """Write run/checkpoint: everything that the steps to come depend on.

    UserError where that fails, as on a full disk, or where the weights are not finite; the checkpoint of before is then
    still there.
    """
    if not all(torch.stack([p.isfinite().all() for p in model.parameters()])):
        raise UserError(f"the weights are not finite at step {step}, and were not saved: training diverged; lower --lr")
    run = Path(run)
    partial, new, final = (run / f"checkpoint{suffix}" for suffix in (".partial", ".new", ""))
    state = {
        "step": step,
        "model": dataclasses.asdict(model.cfg),
        "tokenizer_hash": corpus.tokenizer.hash,
        "data_fingerprint": corpus.fingerprint,
        "batches": batches.state_dict(),
    }
    with writing(final, SafetensorError):
        if new.exists():  # left by a process killed while it replaced the old one
            _replace_folder(new, final)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            save_file(model_tensors(model), partial / "model.safetensors")
            save_file(_optimizer_tensors(model, optimizer), partial / "optimizer.safetensors")
            save_file(_random_state(_device(model)), partial / "random.safetensors")
            write_json(partial / "state.json", state)
            for file in partial.iterdir():
                with open(file, "rb") as f:
                    os.fsync(f.fileno())
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        os.rename(partial, new)
        _replace_folder(new, final)


def restore(run, model, optimizer, batches, corpus):
    """Put everything back as `save` found it; returns the step. UserError if the text or the model is another one."""
    state = load_state(run)
    if state["tokenizer_hash"] != corpus.tokenizer.hash or state["data_fingerprint"] != corpus.fingerprint:
        raise UserError(f"the text that {run} was trained on has changed; put it back, or start a new run")
    load_weights(run, model)
    for name, value in dataclasses.asdict(model.cfg).items():
        if state["model"][name] != value:
            path = find(run) / "state.json"
            raise UserError(
                f"{path} says {name} {state['model'][name]}, the run's config.json {value}; put back the one that fits"
            )
    load_optimizer(run, model, optimizer, state["step"])
    batches.load_state_dict(state["batches"])
    _restore_random_state(find(run) / "random.safetensors", _device(model))
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
    """The contents of state.json; UserError for what `save` would not have written."""
    path = find(run) / "state.json"
    try:
        state = read_json(path)
        if not state.keys() >= STATE_KEYS:
            raise ValueError(f"it lacks one of {', '.join(sorted(STATE_KEYS))}")
        if type(state["step"]) is not int or state["step"] < 0:
            raise ValueError(f"step is {state['step']!r}")
        if type(state["tokenizer_hash"]) is not str:
            raise ValueError(f"tokenizer_hash is {state['tokenizer_hash']!r}")
        _check_shape(state["model"])
        return state
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e}); the checkpoint is damaged") from e


def load_model(run, *, attn, norm, loss="torch"):
    """The trained model on the CPU, computed by the named implementations."""
    cfg = GPTConfig(**load_state(run)["model"])
    with memory_for(cfg, f"{find(run) / 'state.json'} asks for it"):
        model = GPTModel(cfg, attn=attn, norm=norm, loss=loss)
    load_weights(run, model)
    return model


def load_weights(run, model):
    """Fill the model with a run's weights; UserError if they are of another shape."""
    path = find(run) / "model.safetensors"
    tensors = _read(path)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(f"{path} does not fit the model: {name} is {kind_of(tensor)}; the checkpoint is damaged")
    if model.cfg.tie_weights and "tok_emb.weight" in tensors:
        tensors["out_head.weight"] = tensors["tok_emb.weight"]
    try:
        model.load_state_dict(tensors)
    except RuntimeError as e:
        raise UserError(f"{path} does not fit the model: {str(e).splitlines()[-1].strip()}") from e


def load_optimizer(run, model, optimizer, step):
    """Fill the optimizer with a run's moments; UserError unless they are AdamW's for this model (none at step 0)."""
    path = find(run) / "optimizer.safetensors"
    tensors = _read(path)
    expected = {}
    for name, p in model.named_parameters() if step else ():
        expected |= {f"{name}.step": torch.zeros(()), f"{name}.exp_avg": p, f"{name}.exp_avg_sq": p}
    for key in sorted(tensors.keys() | expected.keys()):
        found, wanted = kind_of(tensors.get(key)), kind_of(expected.get(key))
        if found != wanted:
            raise UserError(f"{path} does not fit the model ({key}: {found}, not {wanted}); the checkpoint is damaged")
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


def read_json(path):
    """The object in a JSON file; OSError or ValueError where there is none."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    return values


def write_json(path, values):
    """A JSON file, written whole."""
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(partial, path)


def _check_shape(shape):
    """ValueError unless these are the fields of a GPTConfig, each of its type."""
    types = {f.name: (int, float) if f.type is float else (f.type,) for f in dataclasses.fields(GPTConfig)}
    if not isinstance(shape, dict) or shape.keys() != types.keys():
        raise ValueError(f"model must hold {', '.join(types)} and nothing else")
    for name, value in shape.items():
        if type(value) not in types[name] or not abs(value) < 2**63:
            raise ValueError(f"{name} of the model is {value!r}")
    GPTConfig(**shape)


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


def _restore_random_state(path, device):
    states = _read(path)
    try:
        torch.set_rng_state(states["cpu"])
        if device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], device)
    except (KeyError, TypeError, RuntimeError) as e:
        reason = "it lacks cpu" if isinstance(e, KeyError) else str(e).splitlines()[0]
        raise UserError(f"{path} holds no state of torch's generators ({reason}); the checkpoint is damaged") from e


def _read(path):
    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path} cannot be read ({e}); the checkpoint is damaged") from e
