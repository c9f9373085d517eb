"""The one error rule of this project, as an assertion; bench/parity.py states it and says why."""

from bench.parity import compare


def assert_matches(name, out, ref, eager, *, scale=None, rows=None):
    """Hold `out` to the rule against `ref` (float64) and `eager` (out's dtype). `scale`: magnitude of the largest
    rounded intermediate, default max|ref|. `rows`: for sums over rows (dgamma, dbeta), whose roundings walk as
    sqrt(rows)."""
    problem = compare(out, ref, eager, scale=scale, rows=rows).problem
    assert not problem, f"{name}: {problem}"
