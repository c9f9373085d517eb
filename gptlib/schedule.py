"""The learning rate at each step: linear warm-up, then half a cosine."""

import math


def learning_rate(step, *, steps, peak, warmup, final=0.1):
    """The rate of the update that follows `step` finished ones (0 <= step < steps).

    It climbs linearly to `peak`, which the update number `warmup` is the first to use, and falls along a cosine to
    final * peak at the last update. A run shorter than its warm-up only climbs.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
