"""The benches: cost models by hand, the gate before the clock, what becomes of a provider that fails, bad input."""

import argparse
import json

import pytest
import torch

from bench import (
    attention,
    command,
    compiled,
    cross_entropy,
    environment,
    gate,
    harness,
    layernorm,
    linear_cross_entropy,
    output,
    providers,
    softmax,
    table,
    timing,
)
from bench.arguments import GaveUp
from gptlib import reference

CPU = torch.device("cpu")
ATTENTION = {"dtype": "fp32", "batch": 2, "heads": 3, "seq": 8, "head_dim": 4, "dropout": 0.0}
CEILINGS = {"matmul fp32": 1e9, "copy": 1e9}


class FakeGpu:
    """A clock for the host and one for a device that works off its queue; a pass of the flush takes it 0.1 ms."""

    def __init__(self, monkeypatch):
        self.host = self.device = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.host)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(self))
        monkeypatch.setattr(
            torch.cuda, "synchronize", lambda device: setattr(self, "host", max(self.host, self.device))
        )
        monkeypatch.setattr(torch, "empty", lambda *shape, **options: self)

    def launch(self, seconds, queueing=0.0):
        self.host += queueing
        self.device = max(self.device, self.host) + seconds

    def zero_(self):
        self.launch(1e-4)


class FakeEvent:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.at = self.gpu.device = max(self.gpu.device, self.gpu.host)

    def synchronize(self):
        self.gpu.host = max(self.gpu.host, self.at)

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


def test_what_it_takes_to_launch_is_not_counted(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    timer = timing.DeviceTimer("cuda")

    def step(_):  # three launches, of kernels that are done long before the next one is queued
        for _ in range(3):
            gpu.launch(1e-5, queueing=4e-4)

    assert max(timing.sample(timer, step, budget_s=0.1)) == pytest.approx(0.03)
    assert timing.flush_passes(1e-6, 1e-4) == timing.LEAST_PASSES
    assert timing.flush_passes(10.0, 1e-4) == timing.MOST_PASSES, "a step that compiles is no reason to flush for long"


class FakeTimer:
    """Every repeat takes `ms`, whatever it does; counts the repeats."""

    def __init__(self, ms=2.0):
        self.ms, self.repeats, self.clock = ms, 0, 0.0

    def repeat(self, step, prepare, times):
        for _ in range(times):
            step(prepare())
        self.repeats += times
        self.clock += times * self.ms / 1e3
        return [self.ms] * times

    def now(self):
        return self.clock

    def extra_memory(self, run):
        run()
        return 3 * timing.MIB


def provider(name, call):
    return providers.Provider(name, call)


def run_attention(*competitors, modes=("fwd", "bwd"), cases=(ATTENTION,), timer=None, **options):
    return harness.run(
        attention.Attention(),
        list(cases),
        list(competitors),
        modes,
        reference=reference.causal_attention,
        device=CPU,
        timer=timer or FakeTimer(),
        ceilings=CEILINGS,
        budget_s=0.01,
        **options,
    )


# ---- cost models -----------------------------------------------------------------------------------------------------


def test_attention_flops_and_bytes_by_hand():
    bench = attention.Attention()
    # 2 sequences x 3 heads; q k^T: 8 x 8 scores of 4 products and 4 sums, again for p v; half of them masked
    assert bench.flops(ATTENTION, "fwd") == 2 * 3 * (8 * 8 * 4 * 2) * 2 / 2 == 3072
    assert bench.flops(ATTENTION, "bwd") == 7680
    assert bench.flops(ATTENTION, "fwd+bwd") == 10752
    one_tensor = 2 * 3 * 8 * 4 * 4
    assert bench.bytes(ATTENTION, "fwd") == 4 * one_tensor
    assert bench.bytes({**ATTENTION, "dtype": "bf16"}, "bwd") == 8 * one_tensor / 2


@pytest.mark.parametrize(
    ("bench", "op", "fwd", "bwd"),
    [
        (softmax.Softmax(), "softmax", 2 * 60, 3 * 60),
        (softmax.Softmax(), "causal_softmax", 33 + 60, 2 * 33 + 60),  # 6 rows of 10: (10 + 1) / 2 seen in each
        (layernorm.LayerNorm(), "layer_norm", 2 * 60, 3 * 60),
        (layernorm.LayerNorm(), "rms_norm", 2 * 60, 3 * 60),
        (layernorm.LayerNorm(), "add_layer_norm", 4 * 60, 4 * 60),
        (cross_entropy.CrossEntropy(), "cross_entropy", 60, 2 * 60),
    ],
)
def test_row_bytes_by_hand(bench, op, fwd, bwd):
    case = {"op": op, "dtype": "bf16", "rows": 6, "length": 10}
    assert bench.bytes(case, "fwd") == 2 * fwd
    assert bench.bytes(case, "bwd") == 2 * bwd
    assert bench.bytes({**case, "dtype": "fp32"}, "fwd+bwd") == 4 * (fwd + bwd)


def test_head_and_loss_by_hand():
    bench = linear_cross_entropy.LinearCrossEntropy()
    case = {"dtype": "bf16", "tokens": 6, "width": 4, "classes": 10}
    assert bench.flops(case, "fwd+bwd") == 3 * (2 * 6 * 4 * 10)  # logits; their gradient's product with weight and x
    assert bench.bytes(case, "fwd+bwd") == 2 * 2 * (6 * 4 + 10 * 4)


def test_rate_and_share_by_hand():
    row = {"unit": "GFLOP/s", "flops": 3_000_000, "p50_ms": 2.0}
    harness.add_rate(row, ceiling=6e9)
    assert row["rate"] == pytest.approx(1.5)
    assert row["share"] == pytest.approx(0.25)
    assert output.rate_unit("flops", torch.device("cuda")) == "TFLOP/s"


# ---- timing ----------------------------------------------------------------------------------------------------------


def test_percentiles():
    assert timing.percentiles([float(i) for i in range(11)]) == (2.0, 5.0, 8.0)
    assert timing.percentiles([7.0]) == (7.0, 7.0, 7.0)


@pytest.mark.parametrize(("budget_s", "repeats"), [(0.1, 50), (1e-9, 3), (100.0, 200)])
def test_repeats_fill_the_budget(budget_s, repeats):
    timer = FakeTimer(ms=2.0)
    assert len(timing.sample(timer, lambda _: None, budget_s=budget_s)) == repeats


def test_host_timer_counts_the_step_and_not_its_preparation():
    prepared = []
    durations = timing.HostTimer().repeat(lambda x: prepared.append(x), lambda: sum(range(300_000)), 3)
    assert len(prepared) == len(durations) == 3
    assert max(durations) < 1.0


def test_host_memory_counts_what_is_held_at_once():
    def work():
        held = torch.ones(timing.MIB // 4)
        for _ in range(3):
            held = held + 1  # two of them live at a time

    assert timing.HostTimer().extra_memory(work) / timing.MIB == pytest.approx(2.0, abs=0.1)


@pytest.mark.gpu
def test_device_timer_agrees_with_the_work():
    timer = timing.DeviceTimer("cuda")
    a = torch.randn(4096, 4096, device="cuda")
    one = min(timing.sample(timer, lambda _: a @ a, budget_s=0.1))  # other test processes use the GPU too
    two = min(timing.sample(timer, lambda _: (a @ a, a @ a), budget_s=0.1))
    assert 1.6 < two / one < 2.4
    assert timer.extra_memory(lambda: a @ a) >= 4096 * 4096 * 4


# ---- rows and the gate -----------------------------------------------------------------------------------------------


def test_a_right_provider_gets_a_full_row():
    timer = FakeTimer(ms=2.0)
    (row,) = run_attention(provider("eager", reference.causal_attention), modes=["fwd"], timer=timer)
    assert row["status"] == "ok"
    assert (row["p20_ms"], row["p50_ms"], row["p80_ms"]) == (2.0, 2.0, 2.0)
    assert row["rate"] == pytest.approx(3072 / 2e-3 / 1e9)
    assert row["share"] == pytest.approx(3072 / 2e-3 / 1e9)
    assert row["peak_mib"] == pytest.approx(3 + 3 * 2 * 3 * 8 * 4 * 4 / timing.MIB)
    assert row["provider"] == "eager" and row["mode"] == "fwd" and row["seq"] == 8 and row["device"] == "CPU"
    assert 0 < row["max_error"] <= row["error_bound"]


def sees_the_future(q, k, v, *, scale=None, dropout_p=0.0):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)


def wrong_gradient(q, k, v, *, scale=None, dropout_p=0.0):
    return reference.causal_attention(q, k.detach() * 0.5 + k * 0.5, v, scale=scale)


@pytest.mark.parametrize("bad", [sees_the_future, wrong_gradient])
def test_a_wrong_provider_is_refused_and_not_timed(bad):
    timer = FakeTimer()
    rows = run_attention(provider("bad", bad), timer=timer)
    assert [row["status"] for row in rows] == ["wrong", "wrong"]
    assert "max error" in rows[0]["note"]
    assert "rate" not in rows[0]
    assert timer.repeats == 0


def test_a_wrong_gradient_passes_where_only_the_forward_is_asked():
    (row,) = run_attention(provider("bad", wrong_gradient), modes=["fwd"])
    assert row["status"] == "ok"


def raising(error, only_when_large=False):
    def attend(q, k, v, *, scale=None, dropout_p=0.0):
        if q.shape[2] > 64 or not only_when_large:
            raise error
        return reference.causal_attention(q, k, v, scale=scale)

    return attend


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "oom"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "oom"),
        (RuntimeError("No available kernel. Aborting execution."), "unsupported"),
        (ValueError("flex has no dropout"), "unsupported"),
        (RuntimeError("CUDA error: an illegal memory access"), "failed"),
        (TypeError("unexpected keyword"), "failed"),
    ],
)
def test_an_error_is_a_row_and_the_others_go_on(error, status):
    rows = run_attention(
        provider("fails", raising(error)), provider("works", reference.causal_attention), modes=["fwd"]
    )
    assert [row["status"] for row in rows] == [status, "ok"]
    assert str(error)[:20] in rows[0]["note"]


def test_out_of_memory_beyond_the_checked_shape_is_a_row():
    error = torch.OutOfMemoryError("CUDA out of memory")
    cases = [{**ATTENTION, "seq": 64}, {**ATTENTION, "seq": 65}]
    rows = run_attention(provider("greedy", raising(error, only_when_large=True)), modes=["fwd"], cases=cases)
    assert [row["status"] for row in rows] == ["ok", "oom"]


def test_inputs_that_do_not_fit_are_rows(monkeypatch):
    inputs = attention.Attention.inputs

    def small_memory(self, case, device):
        if case["seq"] > 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inputs(self, case, device)

    monkeypatch.setattr(attention.Attention, "inputs", small_memory)
    cases = [{**ATTENTION, "seq": 64}, {**ATTENTION, "seq": 65}]
    rows = run_attention(provider("eager", reference.causal_attention), modes=["fwd"], cases=cases)
    assert [row["status"] for row in rows] == ["ok", "oom"]


def test_the_checked_shape_is_the_smallest_and_bounded():
    bench = attention.Attention()
    cases = [{**ATTENTION, "seq": seq} for seq in (4096, 512)]
    assert bench.gate_case(cases[0], cases)["seq"] == 512
    assert bench.gate_case(cases[0], cases) == bench.gate_case(cases[1], cases)
    assert bench.gate_case({**ATTENTION, "dropout": 0.1}, [{**ATTENTION, "seq": 1}]) == {
        **ATTENTION,
        "batch": 1,
        "seq": 64,
    }


def test_triton_in_the_interpreter_is_checked_and_not_timed(device):
    if device == "cuda":
        pytest.skip("on a GPU the kernels are compiled and timed")
    found, missing = providers.resolve("causal_attention", ["triton"])
    assert not missing
    timer = FakeTimer()
    (row,) = run_attention(*found, modes=["fwd"], timer=timer, cases=[{**ATTENTION, "head_dim": 8}])
    assert row["status"] == "parity" and timer.repeats == 0
    assert row["max_error"] <= row["error_bound"]
    assert row.get("rate") is None


def test_weight_gradients_are_held_to_the_sqrt_law():
    bench = layernorm.LayerNorm()
    case = {"op": "layer_norm", "dtype": "fp32", "rows": 9, "length": 16}
    assert bench.summed_rows(case, "dweight") == 9
    assert bench.summed_rows(case, "dx") is None
    checks = gate.Gate(bench, reference.layer_norm, CPU, with_gradients=True)
    verdict = checks.verdict(provider("torch", providers.resolve("layer_norm", ["torch"])[0][0].call), case)
    assert verdict.status == "ok" and not verdict.interpreted


@pytest.mark.parametrize("op", list(providers.PEERS))
def test_every_default_provider_of_a_cpu_is_known(op):
    chosen = harness.choose_providers([op], None, CPU)[op]
    assert chosen[0] == "reference" and "triton" in chosen
    assert set(chosen) <= set(providers.known_names(op))


@pytest.mark.parametrize("error", [ImportError, OSError, AttributeError, RuntimeError])
def test_a_missing_or_broken_peer_is_a_line(error, monkeypatch):
    def load():
        raise error("no such thing here\nand a long story")

    monkeypatch.setitem(providers.PEERS["causal_attention"], "flash-attn-3", load)
    found, missing = providers.resolve("causal_attention", ["flash-attn-3", "reference"])
    assert [p.name for p in found] == ["reference"]
    assert missing == ["flash-attn-3: not usable here (no such thing here)"]


def test_peers_see_tokens_first():
    q, k, v = (torch.randn(2, 3, 5, 4) for _ in range(3))

    def theirs(q, k, v):
        assert q.shape == (2, 5, 3, 4)
        return q + v, "log-sum-exp"

    torch.testing.assert_close(providers.tokens_first(theirs, q, k, v), q + v)


# ---- what is written -------------------------------------------------------------------------------------------------


def test_columns_survive_the_csv(tmp_path):
    rows = run_attention(provider("eager", reference.causal_attention), provider("bad", sees_the_future))
    args = argparse.Namespace(out=str(tmp_path), commit="abc123", publish=False, label=None)
    report = output.Report(attention.Attention(), CPU, args, list(ATTENTION))
    report.save(rows)
    stored = table.read_csv(tmp_path / "attention.csv")
    assert list(stored[0]) == report.columns and len(stored) == 4
    assert set().union(*rows) <= set(report.columns)
    assert stored[0]["p50_ms"] == 2 and stored[0]["seq"] == 8 and stored[0]["provider"] == "eager"
    assert stored[1]["p50_ms"] is None and stored[1]["status"] == "wrong"
    facts = json.loads((tmp_path / "attention.json").read_text())
    assert facts["commit"] == "abc123" and facts["complete"] is False
    assert {"command", "date", "device", "packages", "python"} <= set(facts)


def test_rows_are_handed_over_as_they_come():
    seen = []
    run_attention(provider("eager", reference.causal_attention), on_row=lambda rows: seen.append(len(rows)))
    assert seen == [1, 2]


def test_what_cannot_be_compared_is_a_failed_row(monkeypatch):
    compare = gate.parity.compare

    def read(tensor, *expected, **rule):  # where a kernel's fault shows
        if tensor.isnan().all():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return compare(tensor, *expected, **rule)

    monkeypatch.setattr(gate.parity, "compare", read)
    bad = provider("bad", lambda q, k, v, **_: (q + k + v) * torch.nan)
    rows = run_attention(bad, provider("eager", reference.causal_attention))
    assert [row["status"] for row in rows] == ["failed", "ok"] * 2
    assert "illegal memory access" in rows[0]["note"]


def test_nothing_is_blamed_on_others_once_the_device_is_lost(monkeypatch):
    def lost(device, culprit):
        raise GaveUp(culprit)

    seen = []
    monkeypatch.setattr(timing, "require_device", lost)
    competitors = [provider(name, reference.causal_attention) for name in ("first", "last")]
    competitors.insert(1, provider("bad", sees_the_future))
    with pytest.raises(GaveUp, match="bad fwd"):
        run_attention(*competitors, on_row=lambda rows: seen.append([r["provider"] for r in rows]))
    assert seen[-1] == ["first", "bad"], "each is checked and timed before the next is touched"


def test_a_lost_device_names_who_lost_it(monkeypatch):
    def fails(device=None):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand a long story")

    timing.require_device(CPU, "nobody")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    timing.require_device("cuda", "nobody")
    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    with pytest.raises(GaveUp, match=r"^triton fwd: CUDA error: an illegal memory access was encountered\. After"):
        timing.require_device("cuda", "triton fwd")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", fails)
    timing.free_memory()


def test_giving_up_is_one_line_and_exit_1(capsys):
    def main(argv):
        raise GaveUp("no GPU is left")

    assert command.run(main) == 1
    assert capsys.readouterr().err == "error: no GPU is left\n"


def test_the_table_marks_the_best_and_shows_why_a_cell_is_empty():
    rows = [
        {"seq": 8, "provider": "a", "rate": 1.04, "status": "ok"},
        {"seq": 8, "provider": "b", "rate": 2.5, "status": "ok"},
        {"seq": 8, "provider": "c", "status": "oom"},
        {"seq": 16, "provider": "a", "rate": 3.0, "status": "ok"},
    ]
    lines = [line.split() for line in table.compare_providers(rows, ["seq"], "rate").splitlines()]
    assert lines == [["seq", "a", "b", "c"], ["8", "1.0", "2.5*", "oom"], ["16", "3.0*", "-", "-"]]
    lowest = table.compare_providers(rows[:2], ["seq"], "rate", lowest=True).splitlines()[1].split()
    assert lowest == ["8", "1.0*", "2.5"]


def test_folder_and_command_name_no_machine(monkeypatch):
    monkeypatch.setattr(environment, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert environment.results_folder("cuda") == environment.ROOT / "results" / "h100-80gb-hbm3"
    monkeypatch.setattr("sys.argv", [str(environment.ROOT / "bench" / "attention.py"), "--seq", "8"])
    assert environment.command_line() == "python bench/attention.py --seq 8"


def test_every_op_can_be_compiled_for_a_gpu_that_is_not_here():
    rows = {"dtype": "fp32", "rows": 64, "length": 64}
    cases = [attention.Attention().compile_case({**ATTENTION, "head_dim": 64, "dropout": 0.1})]
    cases += [softmax.Softmax().compile_case({**rows, "op": op}) for op in softmax.OPS]
    cases += [layernorm.LayerNorm().compile_case({**rows, "op": op}) for op in layernorm.OPS]
    cases += [cross_entropy.CrossEntropy().compile_case({**rows, "op": "cross_entropy"})]
    cases += [linear_cross_entropy.LinearCrossEntropy().compile_case({"classes": 64})]
    with compiled.Workers(1) as pool:
        jobs = pool.list_jobs(cases, ["sm_90"])
    kernels = {case.name: {job.kernel for job in jobs if job.case == case.name} for case in cases}
    assert list(kernels) == [
        *("attention-d64", "softmax-n64", "causal_softmax-n64"),
        *("layer-norm-n64", "add-layer-norm-n64", "rms-norm-n64"),
        *("cross-entropy-n64", "linear-cross-entropy-n64"),
    ]
    assert {"attention_forward_kernel", "dkdv_kernel", "dq_kernel"} <= kernels["attention-d64"]
    assert kernels.pop("linear-cross-entropy-n64") == {"loss_and_gradient_kernel"}
    assert all(len(names) >= 2 for names in kernels.values())
