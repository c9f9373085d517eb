"""Token ids to batches: sliding windows, shuffled per epoch for training and in a fixed order for evaluation.

A window of `context_length` inputs and its targets, one token later, are `context_length + 1` tokens in a row. Windows
run across the end of text between documents, as in GPT-2.
"""

from collections.abc import Iterator

import numpy as np
import torch

from gptlib.errors import UserError


class Batches:
    """Training batches without end.

    Windows start every `stride` tokens. Each epoch visits them in an order of its own, drawn from (seed, epoch) alone:
    the order depends on nothing else that is random, and a saved position finds it again. The last windows of an epoch
    that do not fill a batch are left out of it; they turn up in other epochs. A tail of the tokens shorter than a
    window is never seen.

    Args:
        tokens: 1-D array of token ids, memory-mapped or not.
        context_length: inputs per window, T.
        batch_size: windows per batch, B.
        stride: tokens between the starts of neighbouring windows; context_length when None, so that none overlap.
        seed: of the orders.

    Attributes: windows, how many there are; batches_per_epoch; epoch, of the last batch drawn, from 0.

    Raises UserError where the tokens do not fill one batch.
    """

    def __init__(
        self, tokens: np.ndarray, *, context_length: int, batch_size: int, stride: int | None = None, seed: int = 0
    ):
        stride = context_length if stride is None else stride
        _check_positive(context_length=context_length, batch_size=batch_size, stride=stride)
        if seed < 0:
            raise UserError(f"the seed must not be negative, got {seed}")
        self.windows = _count_windows(len(tokens), context_length, stride)
        if self.windows < batch_size:
            raise UserError(
                f"the training text is too small: {len(tokens)} tokens make {self.windows} windows of context length "
                f"{context_length} with stride {stride}, one batch needs {batch_size}; give more text or lower these"
            )
        self.batches_per_epoch = self.windows // batch_size
        self.epoch = 0
        self._position = 0  # batches drawn in this epoch
        self._tokens = tokens
        self._context_length, self._batch_size, self._stride, self._seed = context_length, batch_size, stride, seed
        self._order = self._order_of_epoch()

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, both (B, T) int64 on the CPU; targets are the inputs one token later."""
        if self._position == self.batches_per_epoch:
            self.epoch, self._position = self.epoch + 1, 0
            self._order = self._order_of_epoch()
        first = self._position * self._batch_size
        self._position += 1
        starts = self._order[first : first + self._batch_size] * self._stride
        return _gather(self._tokens, starts, self._context_length)

    def state_dict(self) -> dict[str, int]:
        """Where the next batch comes from, as integers that fit JSON."""
        return {"seed": self._seed, "epoch": self.epoch, "position": self._position, **self._shape()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues where `state` was taken. Raises UserError where it is damaged or belongs to other windows."""
        expected = ("seed", "epoch", "position", *self._shape())
        if not isinstance(state, dict) or any(type(state.get(key)) is not int or state[key] < 0 for key in expected):
            raise UserError(f"the saved data position is damaged: it must hold the counts {', '.join(expected)}")
        for key, value in self._shape().items():
            if state[key] != value:
                raise UserError(f"the saved data position belongs to other batches: {key} {state[key]}, not {value}")
        if state["position"] > self.batches_per_epoch:
            raise UserError(
                f"the saved data position is damaged: batch {state['position']} of {self.batches_per_epoch}"
            )
        self._seed, self.epoch, self._position = state["seed"], state["epoch"], state["position"]
        self._order = self._order_of_epoch()

    def _shape(self) -> dict[str, int]:
        """What the order of batches follows from, beside the seed and the epoch."""
        return {
            "tokens": len(self._tokens),
            "context_length": self._context_length,
            "batch_size": self._batch_size,
            "stride": self._stride,
        }

    def _order_of_epoch(self) -> np.ndarray:
        sequence = np.random.SeedSequence([self._seed, self.epoch])
        return np.random.Generator(np.random.Philox(sequence)).permutation(self.windows)


def evaluation_batches(
    tokens: np.ndarray, *, context_length: int, batch_size: int, max_windows: int | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Windows that do not overlap, in order and the same every time.

    Yields inputs and targets as `Batches.next_batch` does; the last batch may have fewer rows. With `max_windows`, that
    many windows at even distances over all tokens. Raises UserError (at the call, not at the first batch) where there
    is no window.
    """
    _check_positive(context_length=context_length, batch_size=batch_size)
    windows = _count_windows(len(tokens), context_length, context_length)
    if windows == 0:
        raise UserError(
            f"the validation text is too small: {len(tokens)} tokens, a window of context length {context_length} "
            f"needs {context_length + 1}; give more text or lower the context length"
        )
    kept = windows if max_windows is None else min(windows, max_windows)
    _check_positive(max_windows=kept)
    starts = np.arange(kept) * windows // kept * context_length
    return (_gather(tokens, starts[i : i + batch_size], context_length) for i in range(0, kept, batch_size))


def _count_windows(n_tokens: int, context_length: int, stride: int) -> int:
    return max(0, (n_tokens - context_length - 1) // stride + 1)


def _gather(tokens: np.ndarray, starts: np.ndarray, context_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = np.stack([tokens[start : start + context_length + 1] for start in starts]).astype(np.int64)  # (B, T + 1)
    batch = torch.from_numpy(rows)
    return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise UserError(f"{name.replace('_', ' ')} must be at least 1, got {value}")
