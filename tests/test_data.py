"""Batches: what windows hold, that each epoch is a permutation, that a saved position continues exactly."""

import json

import numpy as np
import pytest
import torch

from gptlib.data import Batches, evaluation_batches
from gptlib.errors import UserError

TOKENS = np.arange(1000, dtype=np.uint16)  # the id is the position, so a window tells where it stood


def make(**changes):
    return Batches(TOKENS, **{"context_length": 16, "batch_size": 4, "seed": 3} | changes)


def test_targets_are_the_inputs_one_token_later():
    x, y = make().next_batch()
    assert x.shape == y.shape == (4, 16) and x.dtype == y.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous() and x.device.type == "cpu"
    assert torch.equal(y, x + 1)
    assert torch.equal(x, x[:, :1] + torch.arange(16))


@pytest.mark.parametrize("stride", [1, 7, 16, 40])
def test_an_epoch_visits_each_window_at_most_once_and_drops_less_than_a_batch(stride):
    batches = make(stride=stride)
    starts = torch.cat([batches.next_batch()[0][:, 0] for _ in range(batches.batches_per_epoch)]).tolist()
    every = set(range(0, 1000 - 16, stride))  # the last window's targets end with the last token
    assert batches.windows == len(every) and batches.epoch == 0
    assert len(set(starts)) == len(starts) and set(starts) <= every
    assert len(every) - len(starts) < 4
    second = torch.cat([batches.next_batch()[0][:, 0] for _ in range(batches.batches_per_epoch)]).tolist()
    assert batches.epoch == 1 and len(set(second)) == len(second)
    batches.next_batch()
    assert batches.epoch == 2


def test_the_last_token_is_a_target_and_never_an_input_beyond_the_end():
    exact = Batches(np.arange(33), context_length=16, batch_size=2)
    x, y = exact.next_batch()
    assert exact.windows == 2 and int(y.max()) == 32 and int(x.max()) == 31
    assert Batches(np.arange(32), context_length=16, batch_size=1).windows == 1


def test_epochs_and_seeds_have_orders_of_their_own():
    def epochs(seed):
        batches = make(seed=seed)
        return [[batches.next_batch()[0][:, 0].tolist() for _ in range(batches.batches_per_epoch)] for _ in range(2)]

    first, second = epochs(3)
    assert first != second and first != sorted(first)
    assert epochs(3) == [first, second]
    assert epochs(4)[0] != first


def test_global_generators_are_neither_read_nor_moved():
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    one = [make().next_batch()[0] for _ in range(2)]
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    torch.manual_seed(2)
    np.random.seed(2)
    assert torch.equal(one[0], make().next_batch()[0])


@pytest.mark.parametrize("drawn", [0, 1, 14, 15, 16, 40])  # 15 batches an epoch: before, at and after its end
def test_a_saved_position_continues_exactly(drawn):
    batches = make()
    assert batches.batches_per_epoch == 15
    for _ in range(drawn):
        batches.next_batch()
    state = json.loads(json.dumps(batches.state_dict()))
    expected = [batches.next_batch() for _ in range(20)]
    resumed = make(seed=99)
    resumed.next_batch()
    resumed.load_state_dict(state)
    for x, y in expected:
        again = resumed.next_batch()
        assert torch.equal(x, again[0]) and torch.equal(y, again[1])
    assert resumed.state_dict() == batches.state_dict()


@pytest.mark.parametrize("key", ["epoch", "position", "seed"])
@pytest.mark.parametrize("value", [-1, "1", 1.0, None, True])
def test_a_damaged_position_is_refused(key, value):
    batches = make()
    whole = batches.state_dict()
    with pytest.raises(UserError, match="damaged"):
        batches.load_state_dict(whole | {key: value})
    with pytest.raises(UserError, match="damaged"):
        batches.load_state_dict({k: v for k, v in whole.items() if k != key})
    assert batches.state_dict() == whole


def test_a_position_of_other_batches_is_refused():
    state = make().state_dict()
    for change in ({"context_length": 8}, {"batch_size": 2}, {"stride": 3}):
        with pytest.raises(UserError, match="belongs to other batches"):
            make(**change).load_state_dict(state)
    with pytest.raises(UserError, match="damaged"):
        make().load_state_dict(state | {"position": 16})


@pytest.mark.parametrize("n, batch_size", [(0, 1), (16, 1), (64, 4), (80, 5)])
def test_too_few_tokens_for_one_batch(n, batch_size):
    with pytest.raises(UserError, match=f"too small: {n} tokens"):
        Batches(np.arange(n), context_length=16, batch_size=batch_size)
    Batches(np.arange(max(n, 16) + 1), context_length=16, batch_size=batch_size)


@pytest.mark.parametrize("name", ["context_length", "batch_size", "stride"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(UserError, match="must be at least 1, got 0"):
        make(**{name: 0})


def test_evaluation_covers_the_tokens_in_order():
    batches = list(evaluation_batches(TOKENS, context_length=16, batch_size=5))
    assert [len(x) for x, _ in batches] == [5] * 12 + [2]  # 62 windows
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    assert torch.equal(x.flatten(), torch.arange(62 * 16)) and torch.equal(y, x + 1)
    assert x.dtype == torch.int64


def test_evaluation_of_some_windows_spreads_them_evenly():
    starts = torch.cat(
        [x[:, 0] for x, _ in evaluation_batches(TOKENS, context_length=16, batch_size=4, max_windows=10)]
    )
    assert len(starts) == 10 and (starts % 16 == 0).all()
    assert set(starts.diff().tolist()) <= {6 * 16, 7 * 16}
    everything = evaluation_batches(TOKENS, context_length=16, batch_size=4, max_windows=1000)
    assert sum(len(x) for x, _ in everything) == 62


def test_evaluation_refuses_too_little_text_at_once():
    with pytest.raises(UserError, match="16 tokens, a window of context length 16 needs 17"):
        evaluation_batches(TOKENS[:16], context_length=16, batch_size=4)
    with pytest.raises(UserError, match="max windows must be at least 1"):
        evaluation_batches(TOKENS, context_length=16, batch_size=4, max_windows=0)
    assert len(list(evaluation_batches(TOKENS[:17], context_length=16, batch_size=4))) == 1
