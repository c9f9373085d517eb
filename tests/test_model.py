"""The model: GPT-2's facts, and state dicts and results of the well-known form of its code."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from gptlib.model import PRESETS, GPTConfig, GPTModel, MultiHeadAttention

SMALL = GPTConfig(vocab_size=61, context_length=16, emb_dim=24, n_heads=3, n_layers=2, drop_rate=0.0)


def tokens(B=2, T=10, V=61):
    return torch.randint(V, (B, T))


@pytest.mark.parametrize("preset, count", [("seed-124m", 163_009_536), ("gpt2", 124_439_808)])
def test_parameter_counts(preset, count):
    with torch.device("meta"):
        assert GPTModel(PRESETS[preset]).n_params() == PRESETS[preset].n_params == count


@pytest.mark.parametrize("options", [{}, {"qkv_bias": True}, {"tie_weights": True}], ids=str)
def test_a_shape_knows_its_parameters(options):
    cfg = dataclasses.replace(SMALL, **options)
    assert cfg.n_params == GPTModel(cfg).n_params()


@pytest.mark.parametrize("tie_weights", [False, True])
def test_first_loss_is_that_of_guessing(tie_weights):
    cfg = dataclasses.replace(SMALL, vocab_size=5003, emb_dim=96, tie_weights=tie_weights)
    idx = tokens(4, 16, 5003)
    assert abs(GPTModel(cfg).loss(idx, idx.roll(-1, 1)).item() - math.log(5003)) < 0.1


class ListingAttention(nn.Module):
    """Multi-head attention as textbooks print it: a mask buffer, masked_fill, softmax, dropout."""

    def __init__(self, d, context_length, heads, qkv_bias):
        super().__init__()
        self.heads = heads
        self.W_query, self.W_key, self.W_value = (nn.Linear(d, d, bias=qkv_bias) for _ in range(3))
        self.out_proj = nn.Linear(d, d)
        self.register_buffer("mask", torch.triu(torch.ones(context_length, context_length), diagonal=1))

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = (w(x).view(b, t, self.heads, -1).transpose(1, 2) for w in (self.W_query, self.W_key, self.W_value))
        scores = (q @ k.transpose(2, 3)).masked_fill(self.mask.bool()[:t, :t], -torch.inf)
        weights = torch.softmax(scores / k.shape[-1] ** 0.5, dim=-1)
        return self.out_proj((weights @ v).transpose(1, 2).reshape(b, t, d))


class ListingNorm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(d)), nn.Parameter(torch.randn(d))

    def forward(self, x):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return self.scale * (x - mean) / torch.sqrt(var + 1e-5) + self.shift


class ListingFeedForward(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(d, 4 * d), nn.Identity(), nn.Linear(4 * d, d))

    def forward(self, x):
        h = self.layers[0](x)
        return self.layers[2](0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))))


class ListingBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.att = ListingAttention(cfg.emb_dim, cfg.context_length, cfg.n_heads, cfg.qkv_bias)
        self.ff = ListingFeedForward(cfg.emb_dim)
        self.norm1, self.norm2 = ListingNorm(cfg.emb_dim), ListingNorm(cfg.emb_dim)

    def forward(self, x):
        x = x + self.att(self.norm1(x))
        return x + self.ff(self.norm2(x))


class ListingGPT(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.tok_emb = nn.Embedding(cfg.vocab_size, cfg.emb_dim)
        self.pos_emb = nn.Embedding(cfg.context_length, cfg.emb_dim)
        self.trf_blocks = nn.Sequential(*[ListingBlock(cfg) for _ in range(cfg.n_layers)])
        self.final_norm = ListingNorm(cfg.emb_dim)
        self.out_head = nn.Linear(cfg.emb_dim, cfg.vocab_size, bias=False)

    def forward(self, idx):
        x = self.tok_emb(idx) + self.pos_emb(torch.arange(idx.shape[1]))
        return self.out_head(self.final_norm(self.trf_blocks(x)))


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_a_state_dict_of_the_well_known_form_fits(qkv_bias):
    cfg = dataclasses.replace(SMALL, qkv_bias=qkv_bias)
    listing, model = ListingGPT(cfg).double(), GPTModel(dataclasses.asdict(cfg)).double()
    state = listing.state_dict()
    assert "trf_blocks.0.att.mask" in state
    model.load_state_dict(state)
    assert "trf_blocks.0.att.mask" in state, "the caller's dict must not change"
    idx = tokens()
    torch.testing.assert_close(model(idx), listing(idx))
    assert set(model.state_dict()) == {k for k in state if not k.endswith("mask")}


def test_the_future_does_not_matter():
    model, idx = GPTModel(SMALL), tokens()
    changed = idx.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 61
    before, after = model(idx), model(changed)
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


def test_loss_is_the_cross_entropy_of_the_logits(device):
    idx, targets = tokens(), tokens()
    for loss in ("reference", "torch", "triton"):
        model, idx, targets = GPTModel(SMALL, loss=loss).to(device), idx.to(device), targets.to(device)
        expected = nn.functional.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
        torch.testing.assert_close(model.loss(idx, targets), expected)


def test_every_parameter_gets_a_gradient():
    model = GPTModel(dataclasses.replace(SMALL, qkv_bias=True))
    model.loss(tokens(), tokens()).backward()
    # A key bias adds the same to all scores of a row, which softmax does not see: its gradient is zero or rounding.
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert [n for n in without if not n.endswith("W_key.bias")] == []


def test_dropout_acts_in_training_only():
    model, idx = GPTModel(dataclasses.replace(SMALL, drop_rate=0.5)), tokens()
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))
    attention_only = MultiHeadAttention(24, 24, 16, 0.5, 3)
    x = torch.randn(2, 5, 24)
    assert not torch.equal(attention_only(x), attention_only(x)), "attention weights are dropped too"


def test_residual_projections_start_smaller():
    model = GPTModel(dataclasses.replace(SMALL, emb_dim=96, n_layers=8))
    block = model.trf_blocks[3]
    for layer, std in ((block.att.W_query, 0.02), (block.att.out_proj, 0.005), (block.ff.layers[2], 0.005)):
        assert abs(layer.weight.std().item() / std - 1) < 0.1
    assert not block.att.out_proj.bias.any()


def test_a_tied_head_shares_the_embedding():
    model = GPTModel(dataclasses.replace(SMALL, tie_weights=True))
    assert model.out_head.weight is model.tok_emb.weight


def test_attention_module_with_another_output_width():
    module = MultiHeadAttention(d_in=10, d_out=12, context_length=8, dropout=0.0, num_heads=3, qkv_bias=True)
    assert module(torch.randn(2, 8, 10)).shape == (2, 8, 12)
    with pytest.raises(ValueError, match=r"9 positions.*8"):
        module(torch.randn(2, 9, 10))
    with pytest.raises(ValueError, match=r"d_out 12.*num_heads 5"):
        MultiHeadAttention(10, 12, 8, 0.0, 5)


def test_too_many_positions():
    with pytest.raises(ValueError, match=r"17 positions.*16"):
        GPTModel(SMALL)(tokens(T=17))


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("n_heads", 5, r"emb_dim 24.*n_heads 5"),
        ("n_layers", 0, "n_layers is 0"),
        ("vocab_size", 2.5, r"vocab_size is 2\.5"),
        ("drop_rate", 1.0, r"drop_rate is 1\.0"),
    ],
)
def test_a_shape_that_cannot_be(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **{field: value})


def test_bf16_autocast_stays_near_fp32():
    model, idx = GPTModel(SMALL, attn="sdpa", norm="torch", loss="torch"), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(idx, idx)
    assert loss.dtype == torch.float32
    assert abs(loss.item() - model.loss(idx, idx).item()) < 0.02
