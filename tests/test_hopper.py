"""The Hopper forward in the emulator: its numbers, its protocol under every schedule, and that faults do not pass.

Its machine code is checked by tests/test_compiled_kernels.py. On an H100, tests/test_hopper_on_gpu.py runs it for real.
"""

import pytest
import torch

from gptlib import reference
from kernels import _runtime, _tuning
from kernels._tuning import HopperTile
from kernels.attention import hopper
from tests.attention_cases import HOPPER_CALLS, Call, check, make
from tests.gluon_emulator import SCHEDULES, assert_caught, emulated
from tests.oracle import assert_matches

bf16 = torch.bfloat16
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the emulator runs the kernel on CPU tensors"),
]


def attend(q, k, v, schedule=SCHEDULES[0], **options):
    """hopper.causal_attention with its forward emulated; its backward runs in Triton's interpreter."""
    with emulated(schedule):
        return hopper.causal_attention(q, k, v, **options)


# ---- numbers ---------------------------------------------------------------------------------------------------------

FAST = HopperTile(32, 2)  # a small block of keys has many of them in a short call


def draw(call):
    torch.manual_seed(0)
    return [make(call, h, t, "cpu") for h, t in ((call.H, call.Tq), (call.Hkv, call.Tk), (call.Hkv, call.Tk))]


@pytest.mark.parametrize("call", HOPPER_CALLS, ids=str)
def test_output_and_lse(call):
    inputs, options = draw(call), {"scale": call.scale, "return_lse": True}
    schedule = SCHEDULES[HOPPER_CALLS.index(call) % len(SCHEDULES)]
    found = attend(*inputs, schedule, **options)
    ref = reference.causal_attention(*(x.double() for x in inputs), **options)
    eager = reference.causal_attention(*inputs, **options)
    assert_matches("out", found[0], ref[0], eager[0])
    assert_matches("lse", found[1], ref[1], eager[1], scale=2 * ref[1].abs().max())  # to base 2 and back


def test_gradients():
    check(Call(H=2, Hkv=1, Tq=113, Tk=140, D=64, dtype=bf16), "cpu", attend)


@pytest.mark.parametrize("tile", [FAST, HopperTile(64, 1), HopperTile(64, 3, turns=False)], ids=str)
def test_every_schedule_gives_the_same_bits(tile, monkeypatch):
    monkeypatch.setitem(_tuning.HOPPER, 64, tile)
    inputs = draw(Call(H=2, Hkv=1, Tq=150, Tk=333, D=64, dtype=bf16))
    expected = attend(*inputs, return_lse=True)
    for schedule in SCHEDULES[1:]:
        found = attend(*inputs, schedule, return_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), schedule


def test_infinite_scores_give_zero_and_not_nan():
    q, k, v = (x.contiguous() for x in draw(Call(H=1, Hkv=1, Tq=150, Tk=150, D=64, dtype=bf16)))
    k.fill_(1.0)
    q[0, 0, 7] = -torch.inf
    out, lse = attend(q, k, v, return_lse=True)
    assert (out[0, 0, 7] == 0).all() and lse[0, 0, 7] == -torch.inf
    q[0, 0, 7] = 0.0
    others = torch.arange(150) != 7
    assert torch.equal(out[0, 0, others], attend(q, k, v)[0, 0, others])


def test_the_future_is_not_seen():
    q, k, v = draw(Call(H=1, Hkv=1, Tq=150, Tk=150, D=64, dtype=bf16))
    out = attend(q, k, v)
    k[:, :, 41:] += 3.0
    v[:, :, 41:] -= 5.0
    changed = attend(q, k, v)
    assert torch.equal(out[:, :, :41], changed[:, :, :41]) and not torch.equal(out[:, :, 41:], changed[:, :, 41:])


# ---- faults ----------------------------------------------------------------------------------------------------------

# what to run instead, and what the emulator or the error rule says: (piece of the source, replacement, complaint)
FAULTS = {
    "k not waited for": ("    wait_for(k_ring, n + block + 1, block + 1 < num_k)", "    pass", "copy is on its way"),
    "v not waited for": ("    wait_for(v_ring, n)", "    pass", "copy is on its way"),
    "q not waited for": ("    wait_for(q_ring, i * CONSUMERS + ME)", "    pass", "copy is on its way"),
    "no wait for a free slot": ("mbarrier.wait(empty.index(slot), parity ^ 1)", "pass", "arrivals"),
    "the wrong phase of a free slot": ("mbarrier.wait(empty.index(slot), parity ^ 1)",
                                       "mbarrier.wait(empty.index(slot), parity)", "waits for parity"),
    "the wrong phase of a full slot": ("mbarrier.wait(full.index(slot), parity,",
                                       "mbarrier.wait(full.index(slot), parity ^ 1,", "copy is on its way"),
    "a slot freed by one consumer": ("allocate_barriers(SLOTS, READERS)", "allocate_barriers(SLOTS, 1)",
                                     "is being read"),
    "k never freed": ("    release(k_ring, n + block)\n", "", "waits for parity"),
    "k freed before its product is done": ("    s = warpgroup_mma_wait(1, deps=(s,))\n    release(k_ring, n + block)\n",
                                           "    release(k_ring, n + block)\n"
                                           "    s = warpgroup_mma_wait(1, deps=(s,))\n", "is being read"),
    "v freed before its product is done": ("    acc, p = warpgroup_mma_wait(0, deps=(acc, p))\n"
                                           "    release(v_ring, n + block - 1)",
                                           "    release(v_ring, n + block - 1)\n"
                                           "    acc, p = warpgroup_mma_wait(0, deps=(acc, p))", "is being read"),
    "q never freed": ("    release(q_ring, (i - 1) * CONSUMERS + ME, i > 0)\n", "", "waits for parity"),
    "q freed while out leaves through it": ("    tma.store_wait(0)  # the out before", "    pass  #", "is being read"),
    "q of the tile before": ("    q = tile(q_ring, i * CONSUMERS + ME)\n    wait_for(k_ring, n)",
                             "    q = tile(q_ring, ME)\n    wait_for(k_ring, n)", "max error|on its way|written"),
    "scores used in flight": ("    s = warpgroup_mma_wait(1, deps=(s,))\n", "", "without a wait"),
    "a wait that covers too little": ("warpgroup_mma_wait(1, deps=(s,))", "warpgroup_mma_wait(2, deps=(s,))",
                                      "lets it be unfinished"),
    "turns without phases": ("(n + block & 1) ^ (1 - ME)", "1 - ME", "waits for parity"),
    "turns not passed on": ("mbarrier.arrive(turn.index(1 - ME), count=1)", "pass", "waits for parity"),
    "bytes miscounted": ("desc.block_type.nbytes)", "desc.block_type.nbytes // 2)", "waits for parity"),
    "out not fenced": ("        fence_async_shared()\n        slot", "        slot", "without a fence"),
    "out not waited for": ("    tma.store_wait(0)", "    pass", "store on its way|is being read"),
    "no mask": ("    if MASKED:", "    if False:", "max error"),
    "a masked block taken for a whole one": ("whole = gl.minimum(gl.maximum(", "whole = num_k  # (", "max error"),
    "acc not rescaled": ("m, l, acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]", "m, l, acc",
                         "max error"),
    "values of the next block": ("start_values(p, acc, v_ring, n + block - 1,",
                                 "start_values(p, acc, v_ring, n + block,", "max error"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault, monkeypatch):
    monkeypatch.setitem(_tuning.HOPPER, 64, FAST)
    monkeypatch.setattr(_runtime, "multiprocessors", lambda device: 1)  # a program with four tiles
    inputs = draw(Call(H=2, Hkv=1, Tq=130, Tk=170, D=64, dtype=bf16))
    ref, eager = reference.causal_attention(*(x.double() for x in inputs)), reference.causal_attention(*inputs)
    assert_caught(lambda: assert_matches("out", hopper.causal_attention(*inputs), ref, eager), *FAULTS[fault])


# ---- the call --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"dtype": torch.float32}, "dtype torch.float32"),
        ({"D": 136}, "head dimension 136"),
        ({"D": 44}, "head dimension 44"),
        ({"dropout_p": 0.1}, "dropout_p = 0.1"),
        ({"window": 10}, "window = 10"),
        ({"docs": (0, 30, 64)}, "cu_seqlens"),
        ({"Tq": 80}, "1 <= Tq <= Tk"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused(change, complaint):
    call = Call(dtype=bf16).with_(**change) if isinstance(change, dict) else change
    docs = None if call.docs is None else torch.tensor(call.docs, dtype=torch.int32)
    with pytest.raises(ValueError, match=complaint) as error:
        attend(*draw(call), dropout_p=call.dropout_p, window=call.window, cu_seqlens=docs)
    assert "\n" not in str(error.value)
    assert complaint.startswith("1 <=") or str(error.value).endswith("use kernels.causal_attention")


def test_a_window_that_hides_nothing_is_none():
    inputs = draw(Call(Tq=40, Tk=64, dtype=bf16))
    assert torch.equal(attend(*inputs, window=64), attend(*inputs))


def test_other_machines_are_refused():
    with pytest.raises(ValueError, match=r"H100 or H200.*not Triton's interpreter; use kernels\.causal_attention"):
        hopper.causal_attention(*draw(Call(dtype=bf16)))


def test_an_empty_batch_has_an_empty_result():
    out, lse = attend(*(torch.empty(0, 2, 5, 64, dtype=bf16) for _ in range(3)), return_lse=True)
    assert out.shape == (0, 2, 5, 64) and lse.shape == (0, 2, 5)
