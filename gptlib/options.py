"""The trainer's flags: what they are, their defaults by preset, and what a resumed run may change."""

import argparse
import dataclasses

from gptlib import backends
from gptlib.errors import Parser, UserError
from gptlib.flags import below_one, file_name, non_negative_float, non_negative_int, positive_float, positive_int
from gptlib.model import PRESETS, GPTConfig
from gptlib.tokenizer import NAMES as TOKENIZERS

# What training defaults to, by preset; "" holds what all share.
DEFAULTS = {
    "": {
        "preset": "tiny",
        "data": None,
        "tokenizer": "corpus",
        "steps": 5000,
        "batch_size": 8,
        "grad_accum": 1,
        "stride": None,
        "lr": 6e-4,
        "final_lr": 0.1,
        "warmup_steps": 200,
        "weight_decay": 0.1,
        "beta2": 0.95,
        "clip": 1.0,
        "seed": 0,
        "eval_every": 250,
        "eval_windows": 256,
        "sample_every": 500,
        "save_every": 500,
        "log_every": 10,
        "device": "auto",
        "dtype": "auto",
        "compile": False,
    },
    "tiny": {
        "steps": 1200,
        "lr": 3e-3,
        "final_lr": 0.0,
        "warmup_steps": 150,
        "beta2": 0.99,
        "eval_every": 100,
        "eval_windows": 128,
        "sample_every": 400,
        "save_every": 400,
    },
}

# Changing one of these would make another model, or other batches.
FIXED_ON_RESUME = (
    "preset",
    "n_layers",
    "n_heads",
    "emb_dim",
    "context_length",
    "vocab_size",
    "drop_rate",
    "qkv_bias",
    "tie_weights",
    "data",
    "tokenizer",
    "batch_size",
    "grad_accum",
    "stride",
    "seed",
)

# What belongs to one start of the trainer, not to the run.
NOT_INHERITED = ("out", "resume", "overwrite", "stop_at", "profile")

DTYPES = ("auto", "float32", "bfloat16")


def parse(argv=None):
    """The flags given, None where one was not."""
    parser = Parser(
        prog="python -m gptlib.train", description="Train a GPT.", epilog=_defaults_in_words(), allow_abbrev=False
    )
    model = parser.add_argument_group("model")
    model.add_argument("--preset", choices=PRESETS, help="shape of the model and defaults for training (tiny)")
    model.add_argument("--n-layers", type=positive_int)
    model.add_argument("--n-heads", type=positive_int)
    model.add_argument("--emb-dim", type=positive_int)
    model.add_argument("--context-length", type=positive_int)
    model.add_argument("--vocab-size", type=positive_int, help="of --tokenizer corpus at most, of the model exactly")
    model.add_argument("--drop-rate", type=below_one)
    model.add_argument("--qkv-bias", action=argparse.BooleanOptionalAction)
    model.add_argument("--tie-weights", action=argparse.BooleanOptionalAction, help="head and embedding share weights")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", type=file_name, nargs="+", metavar="PATH", help="files, folders, globs (the Python standard library)"
    )
    data.add_argument("--tokenizer", choices=TOKENIZERS)
    data.add_argument("--stride", type=positive_int, help="tokens between window starts (the context length)")
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=positive_int, help="length of the learning-rate schedule")
    training.add_argument(
        "--stop-at", type=positive_int, metavar="STEP", help="end there, leaving the schedule as it is"
    )
    training.add_argument("--batch-size", type=positive_int, help="windows per micro-batch")
    training.add_argument("--grad-accum", type=positive_int, help="micro-batches per step")
    training.add_argument("--lr", type=positive_float, help="peak learning rate")
    training.add_argument("--final-lr", type=non_negative_float, help="learning rate at the end, as a share of --lr")
    training.add_argument("--warmup-steps", type=non_negative_int)
    training.add_argument("--weight-decay", type=non_negative_float, help="on matrices only")
    training.add_argument("--beta2", type=below_one, help="of AdamW")
    training.add_argument("--clip", type=positive_float, help="largest norm of the gradient")
    training.add_argument("--seed", type=non_negative_int)
    reports = parser.add_argument_group("reports")
    reports.add_argument(
        "--out", type=file_name, metavar="DIR", help="run folder (runs/<preset>-<attn>, numbered when taken)"
    )
    reports.add_argument("--log-every", type=positive_int, metavar="STEPS")
    reports.add_argument("--eval-every", type=positive_int, metavar="STEPS")
    reports.add_argument("--eval-windows", type=positive_int, help="validation windows until the last evaluation")
    reports.add_argument("--sample-every", type=positive_int, metavar="STEPS")
    reports.add_argument("--save-every", type=positive_int, metavar="STEPS")
    reports.add_argument("--profile", action="store_true", help="trace a few steps with torch.profiler")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="auto, cpu, cuda, cuda:1")
    machine.add_argument("--dtype", choices=DTYPES, help="of matrix products: auto is bfloat16 on a GPU that has it")
    machine.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the model")
    machine.add_argument("--attn", help=f"{', '.join(backends.ATTENTION)} or package.module:function")
    machine.add_argument("--norm", help=f"{', '.join(backends.NORM)} or package.module:function")
    machine.add_argument("--loss", help=f"{', '.join(backends.LOSS)} or package.module:function")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue the run in --out exactly where it stopped")
    again.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    return parser.parse_args(argv)


def _defaults_in_words():
    def words(values):
        return ", ".join(f"{name.replace('_', '-')} {value}" for name, value in values.items() if value is not None)

    special = "; ".join(f"of {preset}: {words(values)}" for preset, values in DEFAULTS.items() if preset)
    return f"Defaults: {words(DEFAULTS[''])}; {special}."


def complete(given, device, stored=None):
    """Every flag's value: as given, else as in the run resumed, else the preset's default. Returns a Namespace."""
    explicit = {name: value for name, value in vars(given).items() if value is not None}
    stored = stored or {}
    for name in FIXED_ON_RESUME:
        if stored and name in explicit and explicit[name] != stored.get(name):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {explicit[name]} differs from the run resumed ({stored.get(name)}): leave it out")
    preset = explicit.get("preset", stored.get("preset", DEFAULTS[""]["preset"]))
    names = dict(zip(("attn", "norm", "loss"), backends.default_names(device), strict=True))
    merged = {**vars(given), **names, **DEFAULTS[""], **DEFAULTS.get(preset, {})}
    inherited = {name: value for name, value in stored.items() if value is not None and name not in NOT_INHERITED}
    merged |= {name: value for name, value in inherited.items() if name in merged} | explicit
    return argparse.Namespace(**merged)


def model_config(args):
    """The preset with the fields that flags override; UserError for a shape that cannot be."""
    overrides = {f.name: getattr(args, f.name) for f in dataclasses.fields(GPTConfig)}
    try:
        return dataclasses.replace(PRESETS[args.preset], **{k: v for k, v in overrides.items() if v is not None})
    except ValueError as e:
        raise UserError(str(e)) from e
