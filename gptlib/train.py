"""Train a GPT: python -m gptlib.train [--preset tiny] [--attn triton] [--data PATH...]

`train` holds the loop, from top to bottom; what it calls stands above it in the order of use.
"""

import dataclasses
import math
import signal
import statistics
import sys

import torch
from tqdm import tqdm

from gptlib import backends, checkpoint, options, runfolder
from gptlib.data import Batches, evaluation_batches
from gptlib.device import NO_AUTOCAST, autocast_for, choose_device, choose_dtype, memory_for
from gptlib.errors import UserError, exit_status, writing
from gptlib.generate import generate
from gptlib.metrics import (
    MFU_FORMULA,
    MetricsFile,
    bits_per_byte,
    draw_loss_curve,
    mfu,
    peak_memory_mb,
    read_metrics,
)
from gptlib.model import GPTModel
from gptlib.prepare import prepare
from gptlib.schedule import learning_rate
from gptlib.watch import Interval, StopRequest, profiler

SAMPLE_TOKENS = 120
LITTLE_TEXT = "the last step validates on all held-out text, so give it little: --data README.md --tokenizer bytes"


def build_model(cfg, *, attn, norm, loss="torch", device="cpu", seed=0):
    """A new model. Weights are drawn on the CPU, so that a seed means the same model on every device."""
    torch.manual_seed(seed)
    return GPTModel(cfg, attn=attn, norm=norm, loss=loss).to(device)


def make_optimizer(model, *, lr, weight_decay=0.1, betas=(0.9, 0.95)):
    """AdamW, fused, with decay on matrices only (embeddings included; biases and norms not)."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def train_step(loss_fn, optimizer, micro_batches, *, lr, clip=1.0, autocast=NO_AUTOCAST):
    """One update: forward and backward of every micro-batch, clipping, AdamW.

    loss_fn: (x, y) -> scalar, `model.loss` or its compiled form. micro_batches: list of (x, y) on the model's device,
    equal in size. autocast: context of the forward passes. Returns (loss, gradient norm before clipping), as scalars
    on the device, so that nothing waits for it here.
    """
    total = 0.0
    for x, y in micro_batches:
        with autocast:
            loss = loss_fn(x, y) / len(micro_batches)
        loss.backward()
        total = total + loss.detach()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, grad_norm


@torch.no_grad()
def evaluate(model, loss_fn, tokens, *, batch_size, max_windows=None, autocast=NO_AUTOCAST):
    """Mean loss in nats per token over windows of held-out tokens; a bar where that takes all of them."""
    device = model.tok_emb.weight.device
    model.eval()
    total, count = 0.0, 0
    batches = evaluation_batches(
        tokens, context_length=model.cfg.context_length, batch_size=batch_size, max_windows=max_windows
    )
    hidden = True if max_windows else None  # None: hidden only where nobody watches
    for x, y in tqdm(batches, desc="validation", unit="batch", leave=False, disable=hidden):
        with autocast:
            total += loss_fn(x.to(device), y.to(device)).double() * y.numel()
        count += y.numel()
    model.train()
    return float(total / count)


def sample(model, tokenizer, seed, autocast=NO_AUTOCAST):
    """A short text from a model, drawn by a generator of its own so that training does not notice."""
    generator = torch.Generator().manual_seed(seed)
    tokens = generate(
        model,
        [tokenizer.eot],
        max_new_tokens=min(SAMPLE_TOKENS, model.cfg.context_length - 1),
        temperature=0.8,
        top_p=0.95,
        generator=generator,
        eot=tokenizer.eot,
    )
    with autocast:
        return tokenizer.decode(list(tokens))


def quoted(text):
    """The text set off by a margin, each run of empty lines as one."""
    lines = [line.rstrip() for line in text.splitlines()]
    kept = [line for line, above in zip(lines, ["", *lines], strict=False) if line or above]
    return "\n".join(f"    | {line}" for line in kept)


def to_device(batch, device):
    if device.type == "cuda":
        return tuple(t.pin_memory().to(device, non_blocking=True) for t in batch)
    return batch


def with_vocabulary(cfg, tokenizer, asked):
    """The model's shape for a tokenizer: exactly its vocabulary, or the larger one that --vocab-size asks for."""
    if asked is not None and asked < tokenizer.n_vocab:
        raise UserError(
            f"--vocab-size {asked} is too small for the {tokenizer.n_vocab} tokens of --tokenizer {tokenizer.name}"
        )
    return dataclasses.replace(cfg, vocab_size=asked or tokenizer.n_vocab)


def settle(given):
    """What is asked for, refused before anything slow happens or is written: (args, cfg, device, dtype)."""
    runfolder.refuse_taken(given.out, resume=given.resume, overwrite=given.overwrite)
    stored = runfolder.stored_arguments(given.out) if given.resume else {}
    device = choose_device(given.device or stored.get("device", "auto"))
    args = options.complete(given, device, stored)
    cfg = options.model_config(args)
    dtype = choose_dtype(args.dtype, device)
    backends.norm(args.norm)
    backends.loss(args.loss)
    backends.check_training(
        args.attn, device=device, n_heads=cfg.n_heads, head_dim=cfg.head_dim, dropout_p=cfg.drop_rate, dtype=dtype
    )
    if backends.is_interpreted(args.attn, args.norm, args.loss, device):
        print(f"{backends.INTERPRETER_NOTE}; {LITTLE_TEXT}", file=sys.stderr)
    return args, cfg, device, dtype


def train(given):
    """A whole run, in order. given: the flags, None where one was not given. Returns the exit code."""
    args, cfg, device, dtype = settle(given)
    autocast = autocast_for(device, dtype)

    # Text -> tokens -> batches.
    corpus = prepare(args.data, args.tokenizer, cfg.vocab_size, progress=sys.stderr.isatty())
    tokenizer = corpus.tokenizer
    cfg = with_vocabulary(cfg, tokenizer, args.vocab_size)
    T = cfg.context_length
    batches = Batches(corpus.train, context_length=T, batch_size=args.batch_size, stride=args.stride, seed=args.seed)
    evaluation_batches(corpus.val, context_length=T, batch_size=args.batch_size)  # refuses a text too small

    # The model, new or as it was left.
    with memory_for(cfg):
        model = build_model(cfg, attn=args.attn, norm=args.norm, loss=args.loss, device=device, seed=args.seed)
    optimizer = make_optimizer(model, lr=args.lr, weight_decay=args.weight_decay, betas=(0.9, args.beta2))
    step = checkpoint.restore(given.out, model, optimizer, batches, corpus) if args.resume else 0
    last = min(args.steps, args.stop_at or args.steps)
    if step >= last:
        raise UserError(f"{args.out} is at step {step} already; raise --steps or --stop-at (now {last}) to go on")
    loss_fn = torch.compile(model.loss) if args.compile else model.loss

    run = runfolder.claim(args)
    metrics = MetricsFile(run / "metrics.csv", last_step=step)  # first: it refuses a damaged one
    with writing(run):
        runfolder.write_config(run, args, cfg, corpus, device, dtype)
        tokenizer.save(run / "tokenizer.json")
    tokens_per_step = args.batch_size * args.grad_accum * T
    kinds = f"{args.attn} attention, {args.norm} norms, {args.loss} loss"
    print("" if step == 0 else f"going on after step {step}: ", end="")
    print(
        f"{args.preset}: {model.n_params():,} parameters, vocabulary {cfg.vocab_size:,}, {len(corpus.train):,} training"
        f" tokens; {kinds}, {str(dtype).removeprefix('torch.')} on {device} -> {run}"
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def due(every):
        return step == last or step % every == 0

    bar = tqdm(total=args.steps, initial=step, unit="step", disable=None, dynamic_ncols=True)
    with bar, StopRequest() as stop, profiler(run, device, args.profile) as profile:
        interval = Interval()
        while step < last and not stop.signal:
            lr = learning_rate(step, steps=args.steps, peak=args.lr, warmup=args.warmup_steps, final=args.final_lr)
            micro_batches = [to_device(batches.next_batch(), device) for _ in range(args.grad_accum)]
            loss, grad_norm = train_step(loss_fn, optimizer, micro_batches, lr=lr, clip=args.clip, autocast=autocast)
            interval.losses.append(loss)
            step += 1
            bar.update()
            if profile:
                profile.step()
            every = (args.log_every, args.eval_every, args.sample_every, args.save_every)
            if (stop.signal and step < last) or not any(due(n) for n in every):
                continue

            train_loss, tokens_per_s = interval.finish(tokens_per_step)
            if not math.isfinite(train_loss):
                raise UserError(f"the loss is {train_loss} at step {step}; lower --lr (it is {args.lr})")
            val_loss = None
            if due(args.eval_every):
                windows = None if step == last else args.eval_windows
                val_loss = evaluate(
                    model, loss_fn, corpus.val, batch_size=args.batch_size, max_windows=windows, autocast=autocast
                )
                bar.write(f"step {step:>6}   training loss {train_loss:.3f}   validation loss {val_loss:.3f}")
            metrics.append(
                step=step,
                tokens=step * tokens_per_step,
                train_loss=train_loss,
                val_loss=val_loss,
                bits_per_byte=None if val_loss is None else bits_per_byte(val_loss, len(corpus.val), corpus.val_bytes),
                lr=lr,
                grad_norm=float(grad_norm),
                tokens_per_s=tokens_per_s,
                peak_memory_mb=peak_memory_mb(device),
            )
            bar.set_postfix_str(f"loss {train_loss:.3f}, {tokens_per_s:,.0f} tokens/s")
            if due(args.sample_every) and step < last:
                bar.write(quoted(sample(model, tokenizer, args.seed, autocast)))
            if due(args.save_every) and step < last:
                checkpoint.save(run, model, optimizer, batches, corpus, step)
            interval = Interval()

        checkpoint.save(run, model, optimizer, batches, corpus, step)
    if step < last:
        print(f"{signal.Signals(stop.signal).name}: saved at step {step}; to go on: --resume --out {run}")
        return 128 + stop.signal
    report(run, args, model, corpus, sample(model, tokenizer, args.seed, autocast))
    return 0


def report(run, args, model, corpus, text):
    """The loss curve and the closing lines of a run that reached its end."""
    rows = read_metrics(run / "metrics.csv")
    entropy = corpus.val_unigram_entropy
    draw_loss_curve(rows, run / "loss.png", unigram_entropy=entropy, title=f"{args.preset}, {args.attn} attention")
    final = rows[-1]
    speed = statistics.median(row["tokens_per_s"] for row in rows if row["tokens_per_s"] is not None)
    utilization = mfu(model, model.cfg.context_length, speed, model.tok_emb.weight.device)
    share = "n/a" if utilization is None else f"{utilization:.1%}"
    gain = entropy - final["val_loss"]
    print(
        f"validation loss {final['val_loss']:.3f} nats per token ({final['bits_per_byte']:.3f} bits per byte), "
        f"{abs(gain):.2f} {'below' if gain > 0 else 'above'} the unigram entropy of the same tokens ({entropy:.3f})"
    )
    print(f"{speed:,.0f} tokens/s (median); MFU {share} = {MFU_FORMULA}")
    print("a sample:\n" + quoted(text))
    print(f"in {run}: checkpoint, tokenizer.json, config.json, metrics.csv, loss.png{', profile' * args.profile}")
    print(f'continue a text: python -m gptlib.generate --run {run} --prompt "def "')


def main(argv=None):
    return exit_status(lambda: train(options.parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
