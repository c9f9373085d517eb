"""GPT-2's architecture, small enough to read in one sitting.

tok_emb + pos_emb -> n_layers x [norm, attention, add, norm, MLP, add] -> final norm -> head. Pre-norm, tanh GELU,
learned positions, dropout after the embeddings, on the attention weights, after attention and after the MLP. How
attention, normalization and the loss are computed is chosen by name (gptlib.backends) and changes neither parameters
nor maths.

Letters: B batch, T positions, C model width, H heads, D head dim, V vocabulary.
"""

import dataclasses
import math

import torch
from torch import nn

from gptlib import backends


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """The shape of a model. Raises ValueError, naming the value, for a shape that cannot be."""

    vocab_size: int = 50257
    context_length: int = 1024
    emb_dim: int = 768
    n_heads: int = 12
    n_layers: int = 12
    drop_rate: float = 0.1
    qkv_bias: bool = False
    tie_weights: bool = False

    def __post_init__(self):
        for name in ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1")
        if self.emb_dim % self.n_heads:
            raise ValueError(
                f"emb_dim {self.emb_dim} is not a multiple of n_heads {self.n_heads}; every head takes an equal share"
            )
        if not 0 <= self.drop_rate < 1:
            raise ValueError(f"drop_rate is {self.drop_rate!r}; it must be at least 0 and below 1")

    @property
    def head_dim(self):
        return self.emb_dim // self.n_heads

    @property
    def n_params(self):
        """Parameters of such a model, a tied head counted once."""
        C, norm = self.emb_dim, 2 * self.emb_dim
        attention = 4 * C * C + C + 3 * C * self.qkv_bias
        block = attention + 8 * C * C + 5 * C + 2 * norm
        tables = self.vocab_size * (1 if self.tie_weights else 2) + self.context_length
        return tables * C + self.n_layers * block + norm


GPT2 = GPTConfig(qkv_bias=True, tie_weights=True)

PRESETS = {
    "tiny": GPTConfig(
        vocab_size=4096, context_length=128, emb_dim=128, n_heads=4, n_layers=4, drop_rate=0.0, tie_weights=True
    ),
    "seed-124m": GPTConfig(),
    "gpt2": GPT2,
    "gpt2-medium": dataclasses.replace(GPT2, emb_dim=1024, n_heads=16, n_layers=24),
    "gpt2-large": dataclasses.replace(GPT2, emb_dim=1280, n_heads=20, n_layers=36),
    "gpt2-xl": dataclasses.replace(GPT2, emb_dim=1600, n_heads=25, n_layers=48),
}


class LayerNorm(nn.Module):
    def __init__(self, emb_dim, *, norm="reference"):
        super().__init__()
        self.eps = 1e-5
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))
        self.normalize = backends.norm(norm)
        self.add_and_normalize = backends.add_norm(norm)

    def forward(self, x):
        return self.normalize(x, self.scale, self.shift, self.eps)

    def of_sum(self, x, residual):
        """(norm of x + residual, x + residual): one pass over memory if the implementation has one."""
        return self.add_and_normalize(x, residual, self.scale, self.shift, self.eps)


class MultiHeadAttention(nn.Module):
    """Causal self-attention, (B, T, d_in) -> (B, T, d_out), with dropout on the attention weights.

    attn names the implementation (gptlib.backends); the parameters are the same for each. There is no mask buffer:
    those of a state_dict that has them are dropped on loading.
    """

    def __init__(self, d_in, d_out, context_length, dropout, num_heads, qkv_bias=False, *, attn="reference"):
        super().__init__()
        if d_out % num_heads:
            raise ValueError(f"d_out {d_out} is not a multiple of num_heads {num_heads}")
        self.d_out = d_out
        self.num_heads = num_heads
        self.head_dim = d_out // num_heads
        self.context_length = context_length
        self.dropout = dropout
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out)
        self.attend = backends.attention(attn)
        self.register_load_state_dict_pre_hook(_drop_mask_buffer)

    def forward(self, x, cache=None):
        """cache: a gptlib.generate.LayerCache; x then holds only the positions that it does not have yet."""
        B, T, _ = x.shape
        q = self.split_heads(self.W_query(x))  # (B, H, T, D), a view of (B, T, H, D) memory
        k = self.split_heads(self.W_key(x))
        v = self.split_heads(self.W_value(x))
        if cache is not None:
            k, v = cache.append(k, v)
        if k.shape[2] > self.context_length:
            raise ValueError(f"{k.shape[2]} positions are more than context_length {self.context_length}")
        context = self.attend(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(context.transpose(1, 2).reshape(B, T, self.d_out))

    def split_heads(self, x):
        return x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)


def _drop_mask_buffer(module, state_dict, prefix, *args):
    state_dict.pop(prefix + "mask", None)


class FeedForward(nn.Module):
    def __init__(self, emb_dim):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(emb_dim, 4 * emb_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * emb_dim, emb_dim),
        )

    def forward(self, x):
        return self.layers(x)


class TransformerBlock(nn.Module):
    def __init__(self, cfg, *, attn="reference", norm="reference"):
        super().__init__()
        self.att = MultiHeadAttention(
            cfg.emb_dim, cfg.emb_dim, cfg.context_length, cfg.drop_rate, cfg.n_heads, cfg.qkv_bias, attn=attn
        )
        self.ff = FeedForward(cfg.emb_dim)
        self.norm1 = LayerNorm(cfg.emb_dim, norm=norm)
        self.norm2 = LayerNorm(cfg.emb_dim, norm=norm)
        self.drop_shortcut = nn.Dropout(cfg.drop_rate)

    def forward(self, x, cache=None):
        normed, x = self.norm2.of_sum(self.drop_shortcut(self.att(self.norm1(x), cache)), x)
        return x + self.drop_shortcut(self.ff(normed))


class GPTModel(nn.Module):
    """model(idx) -> logits; model.loss(idx, targets) -> mean cross-entropy in nats.

    cfg: a GPTConfig or a dict of its fields. attn, norm, loss: names that gptlib.backends knows.
    """

    def __init__(self, cfg, *, attn="reference", norm="reference", loss="reference"):
        super().__init__()
        self.cfg = cfg = cfg if isinstance(cfg, GPTConfig) else GPTConfig(**cfg)
        self.tok_emb = nn.Embedding(cfg.vocab_size, cfg.emb_dim)
        self.pos_emb = nn.Embedding(cfg.context_length, cfg.emb_dim)
        self.drop_emb = nn.Dropout(cfg.drop_rate)
        self.trf_blocks = nn.ModuleList(TransformerBlock(cfg, attn=attn, norm=norm) for _ in range(cfg.n_layers))
        self.final_norm = LayerNorm(cfg.emb_dim, norm=norm)
        self.out_head = nn.Linear(cfg.emb_dim, cfg.vocab_size, bias=False)
        self.head_loss = backends.loss(loss)
        self.initialize()
        if cfg.tie_weights:
            self.out_head.weight = self.tok_emb.weight

    def forward(self, idx, cache=None):
        """idx: (B, T) int64 -> logits (B, T, V). cache: a gptlib.generate.KVCache holding the positions before idx."""
        return self.out_head(self.hidden(idx, cache))

    def loss(self, idx, targets):
        """idx, targets: (B, T) int64 -> scalar."""
        return self.head_loss(self.hidden(idx), self.out_head.weight, targets)

    def hidden(self, idx, cache=None):
        """What the head sees: (B, T, C)."""
        start = 0 if cache is None else cache.length
        end = start + idx.shape[1]
        if end > self.cfg.context_length:
            raise ValueError(f"{end} positions are more than context_length {self.cfg.context_length}")
        positions = torch.arange(start, end, device=idx.device)
        x = self.drop_emb(self.tok_emb(idx) + self.pos_emb(positions))
        for i, block in enumerate(self.trf_blocks):
            x = block(x, None if cache is None else cache.layers[i])
        return self.final_norm(x)

    def initialize(self):
        """GPT-2's: N(0, 0.02), residual projections smaller by sqrt(2 n_layers) so that their sum keeps its size.

        A head tied to the embedding needs this: with torch's N(0, 1) embedding the first loss is in the hundreds.
        """
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                residual = name.endswith(("att.out_proj", "ff.layers.2"))
                std = 0.02 / math.sqrt(2 * self.cfg.n_layers) if residual else 0.02
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def n_params(self):
        """Parameters, a tied head counted once."""
        return sum(p.numel() for p in self.parameters())
