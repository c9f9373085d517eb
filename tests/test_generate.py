"""Sampling: the cache changes nothing, the distribution is cut where asked, the window slides."""

import math
import re
import shutil

import pytest
import torch

from gptlib import generate as sampling
from gptlib.errors import UserError
from gptlib.generate import (
    KVCache,
    generate,
    pick,
    prompt_ids,
    split_last_space,
    text_stream,
    tokens_beginning_with,
)
from gptlib.model import GPTConfig, GPTModel
from gptlib.tokenizer import byte_tokenizer, train_bpe
from tests import trainer

SMALL = GPTConfig(vocab_size=257, context_length=12, emb_dim=24, n_heads=3, n_layers=2, drop_rate=0.2)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    model = GPTModel(SMALL)
    for p in model.parameters():  # livelier than fresh weights, whose likeliest token hardly ever changes
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.6)
    return model


def greedy_without_cache(model, ids, n):
    model.eval()
    for _ in range(n):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids[-12:]]))[0, -1].argmax())]
    model.train()
    return ids[-n:]


@pytest.mark.parametrize("prompt_length", [1, 5, 12])
def test_greedy_equals_a_model_without_cache_also_beyond_the_context(model, prompt_length):
    ids = torch.randint(257, (prompt_length,)).tolist()
    expected = greedy_without_cache(model, ids, 20)
    assert len(set(expected)) > 5, "a test that hardly varies proves little"
    assert list(generate(model, ids, max_new_tokens=20)) == expected
    assert model.training, "left as it was found"


@pytest.mark.parametrize("attn", ["reference", "sdpa", "triton-softmax", "triton"])
def test_the_cache_gives_the_logits_of_one_pass(model, attn, device):
    other = GPTModel(SMALL, attn=attn).to(device).eval()
    other.load_state_dict(model.state_dict())
    idx = torch.randint(257, (2, 12), device=device)
    cache = KVCache(SMALL)
    with torch.no_grad():
        parts = [other(part, cache) for part in idx.split([5, 1, 3, 1, 1, 1], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), other(idx), atol=2e-4, rtol=1e-3)
    assert cache.length == 12


def test_the_first_token_can_be_restricted(model):
    allowed = torch.zeros(257, dtype=torch.bool)
    allowed[[5, 9]] = True
    free, tied = (list(generate(model, [3], max_new_tokens=4, first=first)) for first in (None, allowed))
    assert free[0] not in (5, 9) and tied[0] in (5, 9)
    assert tied[1:] == greedy_without_cache(model, [3, tied[0]], 3), "those after it are free"


def test_a_space_at_the_end_of_a_prompt_becomes_that_of_the_next_word():
    assert split_last_space("def ") == ("def", " ") and split_last_space("a  ") == ("a ", " ")
    assert split_last_space("def") == ("def", "") and split_last_space("") == ("", "")
    tokenizer = train_bpe(["a word and a word and another word " * 9], 270, progress=False)
    begins = tokens_beginning_with(" ", tokenizer, 300)
    assert begins.shape == (300,) and begins[tokenizer.encode(" word")[0]]
    assert [tokenizer.decode([i])[0] for i in begins.nonzero().flatten().tolist()] == [" "] * int(begins.sum())
    assert not begins[tokenizer.encode("word")[0]] and not begins[tokenizer.eot :].any()


def test_stops_at_end_of_text(model):
    tokens = list(generate(model, [3], max_new_tokens=20))
    first = tokens.index(tokens[7])
    assert list(generate(model, [3], max_new_tokens=20, eot=tokens[7])) == tokens[:first]


def test_a_seed_repeats_and_another_does_not(model):
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return list(generate(model, [3], max_new_tokens=20, temperature=1.5, generator=generator))

    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(state, torch.get_rng_state()), "the global generator is not touched"


LOGITS = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3]))


def drawn(**options):
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(1000):
        counts[pick(LOGITS, generator=generator, **options)] += 1
    return counts / 1000


def test_pick_follows_the_distribution():
    assert pick(LOGITS) == 1
    torch.testing.assert_close(drawn(temperature=1.0), torch.tensor([0.1, 0.4, 0.2, 0.3]), atol=0.05, rtol=0)
    sharpened = torch.tensor([0.1, 0.4, 0.2, 0.3]) ** 2
    torch.testing.assert_close(drawn(temperature=0.5), sharpened / sharpened.sum(), atol=0.05, rtol=0)


def test_top_k_and_top_p_cut_the_tail():
    torch.testing.assert_close(drawn(temperature=1.0, top_k=2), torch.tensor([0, 4 / 7, 0, 3 / 7]), atol=0.05, rtol=0)
    torch.testing.assert_close(
        drawn(temperature=1.0, top_p=0.75), torch.tensor([0, 4 / 9, 2 / 9, 3 / 9]), atol=0.05, rtol=0
    )
    assert drawn(temperature=1.0, top_p=0.01)[1] == drawn(temperature=1.0, top_k=1)[1] == 1
    # Of the two that top_k leaves, the first alone has 4/7 of the probability.
    assert drawn(temperature=1.0, top_k=2, top_p=0.5)[1] == 1
    torch.testing.assert_close(drawn(temperature=1.0, top_k=99, top_p=1.0), drawn(temperature=1.0))


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-30, 1e300])
def test_any_temperature_draws(temperature):
    logits = LOGITS - 100
    logits[0] = -math.inf
    drawn = {pick(logits, temperature=temperature) for _ in range(100)}
    assert drawn == ({1} if temperature < 1 else {1, 2, 3})


def test_any_top_p_draws():
    assert pick(LOGITS, temperature=1.0, top_p=1e-300) == int(LOGITS.argmax())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_are_not_finite_are_refused(value, temperature):
    logits = LOGITS.clone()
    logits[1] = value
    with pytest.raises(UserError, match="scores are not finite"):
        pick(logits, temperature=temperature)


def test_text_is_cut_between_characters():
    tokenizer = byte_tokenizer()
    pieces = list(text_stream(tokenizer, tokenizer.encode("a€b")))
    assert pieces == ["a", "", "", "€", "b", ""]
    assert "".join(text_stream(tokenizer, tokenizer.encode("a€")[:-1])) == "a\ufffd"


def test_an_empty_prompt_begins_a_document():
    tokenizer = byte_tokenizer()
    assert prompt_ids(tokenizer, "", 12) == [tokenizer.eot]
    assert prompt_ids(tokenizer, "ab", 12) == tokenizer.encode("ab")


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert trainer.run("--steps", 6, "--out", "run", data=trainer.real_text(folder / "text"))[0] == 0
    return folder / "run"


def run_cli(capsys, *arguments):
    code = sampling.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_command_line(trained_run, capsys):
    command = ("--run", trained_run, "--device", "cpu", "--prompt", "def ", "--max-new-tokens")
    code, short, err = run_cli(capsys, *command, 10, "--temperature", 0)
    assert code == 0 and err == "" and short.startswith("def ") and len(short) > len("def \n")
    code, again, _ = run_cli(capsys, *command, 10, "--temperature", 0, "--attn", "reference", "--norm", "reference")
    assert code == 0 and again == short
    code, long, err = run_cli(capsys, *command, 60, "--top-k", 20, "--top-p", 0.9, "--seed", 5)
    assert code == 0 and err.count("window") == 1 and err.count("\n") == 1
    assert run_cli(capsys, *command, 60, "--top-k", 20, "--top-p", 0.9, "--seed", 5)[1] == long
    assert run_cli(capsys, *command, 60, "--top-k", 20, "--top-p", 0.9, "--seed", 6)[1] != long


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompt", "x" * 40], "--prompt has 40 tokens, the model's context holds 32; shorten it"),
        (["--top-p", "0"], "--top-p: 0 is not above 0"),
        (["--temperature", "-1"], "--temperature: -1 is not"),
        (["--top-k", "0"], "--top-k: 0 is not at least 1"),
        (["--max-new-tokens", "many"], "--max-new-tokens: 'many' is not a positive integer"),
        (["--attn", "flash"], "--attn flash: unknown"),
        (["--run", "nowhere"], "nowhere holds no checkpoint"),
        (["--device", "tpu"], "--device tpu: unknown"),
        (["--device", ""], "--device : unknown"),
        (["--attn", "sdpa-cudnn"], "--attn sdpa-cudnn cannot generate here: "),
    ],
)
def test_bad_input_is_one_line(trained_run, capsys, flags, message):
    code, out, err = run_cli(capsys, "--device", "cpu", "--run", trained_run, *flags)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_a_tokenizer_of_another_run_is_refused(trained_run, tmp_path, capsys):
    shutil.copytree(trained_run / "checkpoint", tmp_path / "checkpoint")
    train_bpe(["some other words"], 260, progress=False).save(tmp_path / "tokenizer.json")
    code, _, err = run_cli(capsys, "--device", "cpu", "--run", tmp_path)
    assert code == 2 and re.search(r"is not what the checkpoint was trained with", err)
