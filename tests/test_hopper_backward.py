"""The Hopper backward in one pass, in the emulator: its numbers, its protocol, and that faults do not pass.

Its machine code is checked by tests/test_compiled_kernels.py. On an H100, tests/test_hopper_on_gpu.py runs it for real.
"""

import pytest
import torch

from kernels import _runtime, _tuning
from kernels._tuning import HopperBackwardTile
from kernels.attention import hopper
from kernels.attention.backward import attention_backward
from kernels.attention.forward import attention_forward
from kernels.attention.hopper.backward import hopper_backward
from tests.attention_cases import HOPPER_CALLS, Call, check, make
from tests.gluon_emulator import SCHEDULES, assert_caught, emulated
from tests.oracle import assert_matches

bf16 = torch.bfloat16
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the emulator runs the kernel on CPU tensors"),
]


def draw(call):
    """dout, q, k, v, and what the portable forward makes of them: out and lse."""
    torch.manual_seed(0)
    shapes = (call.H, call.Tq), (call.H, call.Tq), (call.Hkv, call.Tk), (call.Hkv, call.Tk)
    dout, q, k, v = (make(call, heads, tokens, "cpu") for heads, tokens in shapes)
    return dout, q, k, v, *attention_forward(q, k, v, 0.125)


def gradients(dout, q, k, v, out, lse):
    return hopper_backward(dout, None, q, k, v, out, lse, 0.125)


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", HOPPER_CALLS, ids=str)
def test_gradients_of_out_and_lse(call):
    with emulated(SCHEDULES[HOPPER_CALLS.index(call) % len(SCHEDULES)]):
        check(call, "cpu", hopper.one_pass)


@pytest.mark.parametrize("tile", [HopperBackwardTile(2, 1, True), HopperBackwardTile(3, 3, False)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_schedule_gives_the_same_bits(head_dim, tile, monkeypatch):
    """Programs run one after the other here, so dq adds up in one order."""
    monkeypatch.setitem(_tuning.HOPPER_BACKWARD, head_dim, tile)
    inputs = draw(Call(H=2, Hkv=1, Tq=150, Tk=333, D=head_dim, dtype=bf16))
    with emulated():
        expected = gradients(*inputs)
    for schedule in SCHEDULES[1:]:
        with emulated(schedule):
            found = gradients(*inputs)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), schedule


def test_gradients_of_any_stride():
    """out.sum().backward() delivers one expanded element."""
    _, q, k, v, out, lse = draw(Call(H=1, Hkv=1, Tq=70, Tk=70, D=64, dtype=bf16))
    q.requires_grad_()
    with emulated():
        found = torch.autograd.grad(hopper.one_pass(q, k, v).sum(), q)[0]
    q = q.detach()
    expected = attention_backward(torch.ones_like(out), None, q, k, v, out, lse, 0.125)[0]
    assert_matches("dq", found, expected.double(), expected)


def test_keys_get_nothing_from_queries_that_do_not_see_them():
    dout, q, k, v, out, lse = draw(Call(H=1, Hkv=1, Tq=300, Tk=300, D=64, dtype=bf16))
    dout[:, :, 41:] = 0.0
    with emulated():
        dq, dk, dv = gradients(dout, q, k, v, out, lse)
    assert all((gradient[:, :, 41:] == 0).all() for gradient in (dq, dk, dv))
    assert (dv[:, :, :41] != 0).any(-1).all()


# ---- faults ----------------------------------------------------------------------------------------------------------

READY = "    mbarrier.arrive(ready.index(0), count=1)\n    mbarrier.wait(ready.index(0), n & 1)\n"
LAST_READY = READY.replace("n & 1", "num_q * GROUP & 1")
# what to run instead, and what the emulator or the error rule says: (piece of the source, replacement, complaint)
FAULTS = {
    "q not waited for": ("    wait_for(q_ring, n)", "    pass", "copy is on its way"),
    "dout not waited for": ("    wait_for(dout_ring, n)", "    pass", "copy is on its way"),
    "stats not waited for": ("    wait_for(stats_ring, n)", "    pass", "copy is on its way"),
    "v not waited for": ("    wait_for(v_ring, ME)", "    pass", "copy is on its way"),
    "q freed before dk is done": ("    dk = warpgroup_mma_wait(BEHIND, deps=(dk,))\n    release(q_ring, n)",
                                  "    release(q_ring, n)\n    dk = warpgroup_mma_wait(BEHIND, deps=(dk,))",
                                  "is being read"),
    "dout freed before dv is done": ("    mbarrier.wait(ready.index(0), n & 1)\n\n    if HALVES == 2:\n"
                                     "        dv, p = warpgroup_mma_wait(0, deps=(dv, p))",
                                     "    mbarrier.wait(ready.index(0), n & 1)\n\n    if HALVES == 2:\n"
                                     "        release(dout_ring, n)\n        dv, p = warpgroup_mma_wait(0, "
                                     "deps=(dv, p))", "is being read"),
    "stats never freed": ("    release(stats_ring, n)\n", "", "waits for parity"),
    "scores used in flight": ("    s = warpgroup_mma_wait(1 + BEHIND, deps=(s,))\n", "", "without a wait"),
    "a wait for scores that covers too little": ("warpgroup_mma_wait(1 + BEHIND, deps=(s,))",
                                                 "warpgroup_mma_wait(2 + BEHIND, deps=(s,))", "lets it be unfinished"),
    "a wait for dp that covers too little": ("warpgroup_mma_wait(1 + BEHIND, deps=(dp, p))",
                                             "warpgroup_mma_wait(2 + BEHIND, deps=(dp, p))", "lets it be unfinished"),
    "a wait for dq that covers too little": ("warpgroup_mma_wait(HALVES + BEHIND, deps=(dq,))",
                                             "warpgroup_mma_wait(HALVES + BEHIND + 1, deps=(dq,))",
                                             "lets it be unfinished"),
    "products behind dq miscounted": ("h_before, start_before, ME, HALVES, 3)",
                                      "h_before, start_before, ME, HALVES, 4)", "lets it be unfinished"),
    "dv in flight": ("        dv, p = warpgroup_mma_wait(0, deps=(dv, p))  # with", "        pass  #", "wait"),
    "ds not fenced": ("    fence_async_shared()  # the tensor", "    pass  #", "without a fence"),
    "no waiting for the other consumer's ds": (READY, READY.splitlines()[0] + "\n",
                                               "max error|without a fence|arrivals|NaN"),
    "the wrong phase of ready": ("mbarrier.wait(ready.index(0), n & 1)", "mbarrier.wait(ready.index(0), n & 1 ^ 1)",
                                 "max error|without a fence|arrivals|NaN"),
    "one buffer of ds": ("(n % 2 * HALVES + HALF)", "HALF", "is being read|without a fence|max error"),
    "a buffer of dq not waited for": ("    tma.store_wait(0)  # what left", "    pass  #", "is being read"),
    "dq not fenced": ("    dq_buffer.reshape((16, 256)).store(by_thread(dq))\n    fence_async_shared()\n",
                      "    dq_buffer.reshape((16, 256)).store(by_thread(dq))\n", "without a fence"),
    "dq stored, not added": ("tma_add(dq_desc, [b, h, place_of_tile * 16, 0]",
                             "tma_store(dq_desc, [b, h, place_of_tile * 16, 0]", "max error"),
    "dq of the next tile's queries": ("q_ring, dq_buffer, dq_desc, b, h_before, start_before, ME, HALVES, 3)",
                                      "q_ring, dq_buffer, dq_desc, b, h, start_q, ME, HALVES, 3)", "max error"),
    "dq of the same half twice": ("ds_of(ds_buffers, n, ME % HALVES, 1, HALVES)", "ds_of(ds_buffers, n, 0, 1, HALVES)",
                                  "max error"),
    "dq of one consumer's keys": ("    dq = warpgroup_mma(ds.permute((1, 0)), dq_columns(k, ME, HALVES), dq, "
                                  "is_async=True)\n", "", "max error|unfinished"),
    "the last dq left out": ("        dk = finish_gradients(last_n, dq, dk, q_ring, dq_buffer, dq_desc, b, h, start_q, "
                             "ME, HALVES, 0)", "        dk = warpgroup_mma_wait(0, deps=(dk,))", "max error"),
    "dk leaves where k is still read": ("    mbarrier.wait(ready.index(0), num_q * GROUP & 1)\n", "",
                                        "is being read|max error"),
    "dk not fenced": ("    fence_async_shared()\n    tma_store", "    tma_store", "without a fence"),
    "dv fenced when the threads have met": (f"    fence_async_shared()\n{LAST_READY}",
                                            f"{LAST_READY}    fence_async_shared()\n", "may not have fenced yet"),
    "dk and dv not waited for": ("    tma.store_wait(0)", "    pass", "store on its way|is being read"),
    "no mask": ("        if start_q < whole:", "        if False:", "max error"),
    "a cut tile taken for a whole one": ("whole = start_k + CONSUMERS * ROWS - 1", "whole = start_k", "max error"),
    "the mask of the first half for both": ("    start_q += HALF * ROWS\n", "", "max error"),
    "delta of the first half for both": ("statistic(stats_ring, n, HALF, 1, S_LAYOUT)",
                                         "statistic(stats_ring, n, 0, 1, S_LAYOUT)", "max error"),
    "lse for delta": ("statistic(stats_ring, n, HALF, 1, S_LAYOUT)", "statistic(stats_ring, n, HALF, 0, S_LAYOUT)",
                      "max error"),
    "heads that do not change": ("h = gl.where(start_q < Tq, h, h + 1)", "pass", "max error"),
    "the first queries left out": ("first_q = gl.maximum(start_k - (Tk - Tq), 0) // BLOCK_Q * BLOCK_Q",
                                   "first_q = gl.maximum(start_k - (Tk - Tq) + 127, 0) // BLOCK_Q * BLOCK_Q",
                                   "max error"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault, monkeypatch):
    monkeypatch.setitem(_tuning.HOPPER_BACKWARD, 64, HopperBackwardTile(2, 2, True))
    inputs = draw(Call(H=2, Hkv=1, Tq=200, Tk=230, D=64, dtype=bf16))
    expected = attention_backward(inputs[0], None, *inputs[1:], 0.125)

    def attempt():
        for name, got, want in zip(("dq", "dk", "dv"), gradients(*inputs), expected, strict=True):
            assert_matches(name, got, want.double(), want, scale=want.abs().max())

    assert_caught(attempt, *FAULTS[fault])


# ---- the call --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attend", "expected"), [(hopper.one_pass, "hopper_backward_kernel"), (hopper.causal_attention, "dkdv_kernel")]
)
def test_who_asks_for_the_same_bits_gets_the_portable_backward(attend, expected):
    launched = []
    _, q, k, v, *_ = draw(Call(H=1, Hkv=1, Tq=5, Tk=5, D=64, dtype=bf16))
    with _runtime.record_launches("sm_90", lambda kernel, *_: launched.append(kernel.__name__)):
        attend(q.requires_grad_(), k, v).sum().backward()
    assert expected in launched and len({"hopper_backward_kernel", "dkdv_kernel"} & set(launched)) == 1


def test_an_empty_batch_has_empty_gradients():
    q, k, v = (torch.empty(0, 2, 5, 64, dtype=bf16, requires_grad=True) for _ in range(3))
    with emulated():
        hopper.one_pass(q, k, v).sum().backward()
    assert all(x.grad.shape == (0, 2, 5, 64) for x in (q, k, v))
