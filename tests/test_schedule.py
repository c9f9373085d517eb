"""The learning rate at its corners."""

import pytest

from gptlib.schedule import learning_rate


def rates(steps, warmup, final=0.1):
    return [learning_rate(s, steps=steps, peak=2.0, warmup=warmup, final=final) for s in range(steps)]


def test_warm_up_then_cosine():
    r = rates(101, 20)
    assert r[0] == pytest.approx(2.0 / 21)
    assert r[19] == pytest.approx(2.0 * 20 / 21)
    assert r[20] == 2.0 == max(r)
    assert r[60] == pytest.approx(2.0 * 0.55)  # half-way down from 1 to 0.1
    assert r[100] == pytest.approx(0.2)
    assert r[:21] == sorted(r[:21]) and r[20:] == sorted(r[20:], reverse=True)


def test_no_warm_up_and_no_floor():
    r = rates(5, 0, final=0.0)
    assert r[0] == 2.0 and r[-1] == pytest.approx(0.0)


@pytest.mark.parametrize("steps, warmup", [(1, 0), (1, 5), (5, 5), (3, 50), (6, 5)])
def test_short_runs_stay_within_bounds(steps, warmup):
    assert all(0 < r <= 2.0 for r in rates(steps, warmup))
