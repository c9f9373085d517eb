"""Continue a text with a trained model: python -m gptlib.generate --run runs/<name> --prompt "def "."""

import argparse
import codecs
import math
import sys

import torch

from gptlib import backends, checkpoint
from gptlib.device import autocast_for, choose_device, choose_dtype
from gptlib.errors import Parser, UserError, exit_status
from gptlib.flags import file_name, fraction, non_negative_float, non_negative_int, positive_int
from gptlib.tokenizer import Tokenizer


class LayerCache:
    """Keys and values of one block for the positions so far, in memory for all of them."""

    def __init__(self, context_length):
        self.context_length = context_length
        self.length = 0

    def append(self, k, v):
        """k, v: (B, H, T, D), the next positions -> all keys, all values (B, H, length, D)."""
        if self.length == 0:
            B, H, _, D = k.shape
            self.keys, self.values = k.new_empty(2, B, H, self.context_length, D)
        start, self.length = self.length, self.length + k.shape[2]
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class KVCache:
    """One LayerCache per block: a token costs one position's work, not the whole window's."""

    def __init__(self, cfg):
        self.layers = [LayerCache(cfg.context_length) for _ in range(cfg.n_layers)]

    @property
    def length(self):
        return self.layers[0].length


@torch.no_grad()
def generate(
    model, ids, *, max_new_tokens, temperature=0.0, top_k=None, top_p=None, generator=None, eot=None, first=None
):
    """Yield token ids that continue `ids`, one by one, until `eot` (not yielded) or max_new_tokens.

    Once the context is full every token sees the context_length before it: positions are absolute, so the window is
    read anew for each. temperature, top_k, top_p: see `pick`. first: bool (V,), the tokens that may come first.
    """
    device = model.tok_emb.weight.device
    context_length = model.cfg.context_length
    was_training = model.training
    model.eval()
    try:
        ids = list(ids)
        cache = KVCache(model.cfg)
        unread = ids[-context_length:]
        for _ in range(max_new_tokens):
            if cache.length + len(unread) > context_length:
                cache = KVCache(model.cfg)
                unread = ids[-context_length:]
            logits = model(torch.tensor([unread], device=device), cache)[0, -1].float().cpu()
            if first is not None:
                logits, first = logits.masked_fill(~first, -math.inf), None
            token = pick(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            if token == eot:
                return
            yield token
            ids.append(token)
            unread = [token]
    finally:
        model.train(was_training)


def pick(logits, *, temperature=0.0, top_k=None, top_p=None, generator=None):
    """One token id from logits (V,): the likeliest at temperature 0, else a draw.

    top_k keeps the k likeliest tokens; top_p then keeps the smallest set of the likeliest with that much probability.
    """
    if not logits.max().isfinite():
        raise UserError("the model's scores are not finite: its weights are damaged, or its training diverged")
    if temperature == 0:
        return int(logits.argmax())
    scaled = (logits - logits.max()).double() / temperature  # at most 0, so that no temperature is too low for it
    probabilities, order = scaled.softmax(dim=-1).float().sort(descending=True, stable=True)
    if top_k is not None:
        probabilities[top_k:] = 0
        probabilities /= probabilities.sum()
    if top_p is not None:
        before = probabilities.cumsum(0) - probabilities  # probability of all likelier tokens
        probabilities[1:][before[1:] >= top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def text_stream(tokenizer, tokens):
    """Text of the tokens as they come, cut only between characters."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        yield decoder.decode(tokenizer.decode_bytes([token]))
    yield decoder.decode(b"", final=True)


def noted(tokens, produced):
    """The tokens, each also appended to `produced`."""
    for token in tokens:
        produced.append(token)
        yield token


def load_run(run, *, attn, norm):
    """(model, tokenizer) of a run folder; UserError if they do not belong together."""
    state = checkpoint.load_state(run)
    tokenizer = Tokenizer.load(f"{run}/tokenizer.json")
    if tokenizer.hash != state["tokenizer_hash"] or tokenizer.n_vocab > state["model"]["vocab_size"]:
        raise UserError(
            f"{run}/tokenizer.json ({tokenizer.n_vocab} tokens, {tokenizer.hash[:12]}) is not what the checkpoint was "
            f"trained with ({state['model']['vocab_size']} tokens, {state['tokenizer_hash'][:12]}); put that back"
        )
    return checkpoint.load_model(run, attn=attn, norm=norm), tokenizer


def prompt_ids(tokenizer, prompt, context_length):
    """The prompt's tokens (end-of-text for an empty one, so that a document begins); UserError if they do not fit."""
    ids = tokenizer.encode(prompt) or [tokenizer.eot]
    if len(ids) > context_length:
        raise UserError(f"--prompt has {len(ids)} tokens, the model's context holds {context_length}; shorten it")
    return ids


def split_last_space(prompt):
    """(text to read, text that the first token must begin with): BPE joins a space to the word after it, so a space at
    the prompt's end, read as a token of its own, would be followed by what hardly ever follows one in the corpus."""
    return (prompt[:-1], " ") if prompt.endswith(" ") else (prompt, "")


def tokens_beginning_with(text, tokenizer, vocab_size):
    """bool (vocab_size,): the ordinary tokens whose bytes begin with the text's."""
    begins = torch.zeros(vocab_size, dtype=torch.bool)
    for token in range(tokenizer.n_vocab):
        begins[token] = token != tokenizer.eot and tokenizer.decode_bytes([token]).startswith(text.encode())
    return begins


def parse(argv):
    parser = Parser(prog="python -m gptlib.generate", description="Continue a text with a trained model.")
    parser.add_argument("--run", type=file_name, required=True, metavar="DIR", help="run folder of gptlib.train")
    parser.add_argument("--prompt", default="", help="text to continue (default: none, a new document)")
    parser.add_argument("--max-new-tokens", type=positive_int, default=200, metavar="N")
    parser.add_argument("--temperature", type=non_negative_float, default=0.8, help="0: likeliest token (default 0.8)")
    parser.add_argument("--top-k", type=positive_int, metavar="K", help="draw from the K likeliest tokens only")
    parser.add_argument(
        "--top-p", type=fraction, default=0.95, metavar="P", help="draw from the likeliest that have P together (0.95)"
    )
    parser.add_argument("--seed", type=non_negative_int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default auto)")
    parser.add_argument("--attn", help=f"{', '.join(backends.ATTENTION)} or package.module:function")
    parser.add_argument("--norm", help=f"{', '.join(backends.NORM)} or package.module:function")
    return parser.parse_args(argv)


def run(args: argparse.Namespace):
    device = choose_device(args.device)
    default_attn, default_norm, _ = backends.default_names(device)
    attn, norm = args.attn or default_attn, args.norm or default_norm
    model, tokenizer = load_run(args.run, attn=attn, norm=norm)
    if backends.is_interpreted(attn, norm, "torch", device):
        print(backends.INTERPRETER_NOTE, file=sys.stderr)
    cfg, dtype = model.cfg, choose_dtype("auto", device)
    backends.check_generating(attn, device=device, n_heads=cfg.n_heads, head_dim=cfg.head_dim, dtype=dtype)
    model.to(device)
    context_length = cfg.context_length
    prompt, space = split_last_space(args.prompt)
    ids = prompt_ids(tokenizer, prompt, context_length)
    tokens = generate(
        model,
        ids,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        generator=torch.Generator().manual_seed(args.seed),
        eot=tokenizer.eot,
        first=tokens_beginning_with(space, tokenizer, cfg.vocab_size) if space else None,
    )
    print(prompt, end="", flush=True)
    produced = []
    with autocast_for(device, dtype):
        for text in text_stream(tokenizer, noted(tokens, produced)):
            print(text, end="", flush=True)
    print()
    if len(ids) + len(produced) > context_length:
        print(f"note: beyond {context_length} tokens the window slid, the oldest were forgotten", file=sys.stderr)


def main(argv=None):
    return exit_status(lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
