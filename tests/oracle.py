"""The one error rule of this project, after FlashAttention's own tests.

A kernel's result is right when its largest error is at most twice that of plain PyTorch in the same dtype, both measured
against the float64 reference:

    max|out - ref| <= 2 * max|eager - ref| + atol

The factor 2 allows another order of the same roundings. `atol` covers results where eager's error happens to be zero
(one-element rows, exactly representable sums) though a kernel may still round once: half a unit in the last place of the
result, taken at its largest magnitude and doubled, eps(dtype) * max|ref|. Where a kernel rounds an intermediate larger
than the result (attention gradients on tiny shapes: delta = rowsum(out * dout) is computed from the rounded output
and cancels), the caller passes that intermediate's magnitude as `scale`. Never loosen it to pass.
"""

import torch


def eps(dtype):
    return torch.finfo(dtype).eps


def assert_matches(name, out, ref, eager, *, scale=None, rows=None):
    """Hold `out` to the rule against `ref` (float64) and `eager` (out's dtype). `scale`: magnitude of the largest rounded
    intermediate, default max|ref|. `rows`: for sums over rows (dgamma, dbeta), whose roundings walk as sqrt(rows)."""
    assert out.shape == ref.shape, f"{name}: shape {tuple(out.shape)}, expected {tuple(ref.shape)}"
    if out.numel() == 0:
        return
    assert ref.dtype == torch.float64, f"{name}: the reference must be float64, got {ref.dtype}"
    assert out.dtype == eager.dtype, f"{name}: dtype {out.dtype}, eager gives {eager.dtype}"
    out64, eager64, ref = out.detach().double().cpu(), eager.detach().double().cpu(), ref.detach().cpu()
    assert bool(torch.isfinite(out64).all()) or not bool(torch.isfinite(ref).all()), f"{name}: NaN or inf in the result"
    same = out64 == ref  # equal infinities count as no error
    error = (out64 - ref).abs().masked_fill(same, 0).max().item()
    eager_error = (eager64 - ref).abs().masked_fill(eager64 == ref, 0).max().item()
    magnitude = ref[torch.isfinite(ref)].abs().max().item() if scale is None else float(scale)
    atol = eps(out.dtype) * magnitude
    if rows is not None:
        atol *= max(1.0, rows**0.5)
    bound = 2 * eager_error + atol
    assert error <= bound, f"{name}: max error {error:.3e} > {bound:.3e} = 2 x eager's {eager_error:.3e} + atol {atol:.1e}"
