"""The one error rule of this project, after FlashAttention's own tests.

A kernel's result is right when its largest error is at most twice that of plain PyTorch in the same dtype, both
measured against the float64 reference:

    max|out - ref| <= 2 * max|eager - ref| + atol

The factor 2 allows another order of the same roundings. `atol` covers results where eager's error happens to be zero
(one-element rows, exactly representable sums) though a kernel may still round once: half a unit in the last place of
the result, taken at its largest magnitude and doubled, eps(dtype) * max|ref|. Where a kernel rounds an intermediate
larger than the result (attention gradients on tiny shapes: delta = rowsum(out * dout) is computed from the rounded
output and cancels), the caller passes that intermediate's magnitude as `scale`. Never loosen it to pass.

The tests assert it (tests/oracle.py); the benchmarks apply it before they time anything (bench/harness.py).
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Comparison:
    """Errors of one result against float64, and `problem`: why it fails the rule, empty when it passes."""

    error: float
    eager_error: float
    atol: float
    problem: str = ""

    @property
    def bound(self):
        return 2 * self.eager_error + self.atol


def compare(out, ref, eager, *, scale=None, rows=None):
    """Comparison of `out` with `ref` (float64) and `eager` (out's dtype). `scale`: magnitude of the largest rounded
    intermediate, default max|ref|. `rows`: for sums over rows (dgamma, dbeta), whose roundings walk as sqrt(rows)."""
    if out.shape != ref.shape:
        return _incomparable(f"shape {tuple(out.shape)}, expected {tuple(ref.shape)}")
    if ref.dtype != torch.float64:
        return _incomparable(f"the reference must be float64, got {ref.dtype}")
    if out.dtype != eager.dtype:
        return _incomparable(f"dtype {out.dtype}, eager gives {eager.dtype}")
    if out.numel() == 0:
        return Comparison(0.0, 0.0, 0.0)
    out64, eager64, ref = (t.detach().double().to(ref.device) for t in (out, eager, ref))
    if not bool(torch.isfinite(out64).all()) and bool(torch.isfinite(ref).all()):
        return _incomparable("NaN or inf in the result")
    error = _largest_error(out64, ref)
    eager_error = _largest_error(eager64, ref)
    finite = ref[torch.isfinite(ref)].abs()
    magnitude = float(scale) if scale is not None else finite.max().item() if finite.numel() else 0.0
    atol = torch.finfo(out.dtype).eps * magnitude * (max(1.0, rows**0.5) if rows is not None else 1.0)
    bound = 2 * eager_error + atol
    problem = ""
    if not error <= bound:
        problem = f"max error {error:.3e} > {bound:.3e} = 2 x eager's {eager_error:.3e} + atol {atol:.1e}"
    return Comparison(error, eager_error, atol, problem)


def _largest_error(x, ref):
    same = x == ref  # equal infinities count as no error
    return (x - ref).abs().masked_fill(same, 0).max().item()


def _incomparable(problem):
    return Comparison(float("inf"), 0.0, 0.0, problem)
