"""The Hopper kernels for real: `pytest tests/test_hopper_on_gpu.py --hopper` on an H100 or H200.

Asked for by name, because a fault of their barriers may hang the GPU's process. Everything else about them is tested
without a GPU, by test_hopper.py and test_hopper_backward.py.
"""

import pytest
import torch

from kernels import _tuning
from kernels._tuning import HopperBackwardTile, HopperTile
from kernels.attention import hopper
from tests.attention_cases import HOPPER_CALLS, Call, check, make

bf16, fp16 = torch.bfloat16, torch.float16
LONGER = [  # several tiles for every program, and more heads than a section of the schedule may have
    Call(B=4, H=12, Hkv=12, Tq=1024, Tk=1024, D=64, dtype=bf16),
    Call(B=2, H=8, Hkv=2, Tq=1000, Tk=1500, D=128, dtype=bf16),
    Call(B=1, H=6, Hkv=1, Tq=2047, Tk=2047, D=64, dtype=fp16, layout="qkv"),
    Call(B=40, H=16, Hkv=16, Tq=130, Tk=130, D=128, dtype=fp16),
]
TILES = [HopperTile(128, 2), HopperTile(64, 3), HopperTile(128, 2, turns=False)]
BACKWARD_TILES = [HopperBackwardTile(2, 2, True), HopperBackwardTile(2, 1, False), HopperBackwardTile(3, 2, False)]
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned", "asked_for"), pytest.mark.timeout(120)]


@pytest.fixture
def asked_for(request):
    if not request.config.getoption("--hopper"):
        pytest.skip("pytest --hopper runs it")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs an H100 or H200")


@pytest.mark.parametrize("attend", [hopper.causal_attention, hopper.one_pass], ids=lambda f: f.__name__)
@pytest.mark.parametrize("call", [*HOPPER_CALLS, *LONGER], ids=str)
def test_results_and_gradients(call, attend):
    check(call, "cuda", attend)


@pytest.mark.parametrize(("tile", "backward_tile"), list(zip(TILES, BACKWARD_TILES, strict=True)), ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_other_tiles(head_dim, tile, backward_tile, monkeypatch):
    monkeypatch.setitem(_tuning.HOPPER, head_dim, tile)
    monkeypatch.setitem(_tuning.HOPPER_BACKWARD, head_dim, backward_tile)
    check(Call(H=4, Hkv=2, Tq=500, Tk=700, D=head_dim, dtype=bf16), "cuda", hopper.one_pass)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_run_gives_the_same_bits_but_for_dq(head_dim):
    """A race shows as other bits now and then."""
    call = Call(B=8, H=12, Hkv=12, Tq=1024, Tk=1024, D=head_dim, dtype=bf16)
    q, k, v, dout = (make(call, call.H, call.Tq, "cuda").requires_grad_() for _ in range(4))

    def run():
        out, lse = hopper.one_pass(q, k, v, return_lse=True)
        return out, lse, *torch.autograd.grad(out, (q, k, v), dout)

    out, lse, dq, dk, dv = run()
    for _ in range(30):
        again = run()
        assert all(torch.equal(a, b) for a, b in zip((out, lse, dk, dv), (*again[:2], *again[3:]), strict=True))
        torch.testing.assert_close(again[2], dq, rtol=2**-6, atol=2**-6 * dq.abs().max().item())
