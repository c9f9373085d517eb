"""`make bench`: our kernels' times as multiples of a stock torch op's, compared with the saved multiples.

    python bench/ratios.py              compare with results/<device>/ratios.json; more than 25 % slower fails
    python bench/ratios.py --publish    replace that file

Both are timed in one process, in turns, so that what slows the machine down slows both and the ratio stays. It is a
ratio of this machine: another processor, torch or load may change the stock op alone, so publish before a change and
compare after it. pytest-benchmark runs, tabulates, stores and compares; the clock it is given
advances by one for every time that the stock op would have taken. On a CPU ours run in Triton's interpreter: there the
ratios say nothing about a GPU, but a kernel that starts more programs or does more per program still shows.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script, or collected by pytest: the checkout belongs on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.session import PerformanceRegression

from bench import command, environment, timing
from bench.arguments import GaveUp
from gptlib.device import choose_device

ALLOWED = "median:25%"
ROUNDS, OURS, STOCK = 7, 3, 15  # the fastest of so many repeats on each side, in each round
SHAPES = {  # what one measurement works on: attention (B, H, T, D), rows (M, N)
    "cuda": {"attention": (16, 16, 1024, 64), "rows": (16384, 4096), "dtype": torch.bfloat16},
    "cpu": {"attention": (1, 2, 256, 64), "rows": (256, 1024), "dtype": torch.float32},
}


class StockClock:
    """Time in multiples of the stock op; stands still except when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


CLOCK = StockClock()


def attention_inputs(shape, dtype, device):
    B, H, T, D = shape
    return [torch.randn(B, T, H, D, device=device).to(dtype).transpose(1, 2).requires_grad_() for _ in "qkv"]


def row_inputs(shape, dtype, device, vectors=0):
    sizes = [shape, *[shape[-1:]] * vectors]
    return [torch.randn(size, device=device).to(dtype).requires_grad_() for size in sizes]


def pair(name, device):
    """(ours, stock, inputs) of one measurement."""
    import kernels

    shapes = SHAPES[device.type]
    dtype = shapes["dtype"]
    if name == "attention":
        stock = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
        return kernels.causal_attention, stock, attention_inputs(shapes["attention"], dtype, device)
    if name == "softmax":
        return kernels.softmax, lambda x: torch.softmax(x, dim=-1), row_inputs(shapes["rows"], dtype, device)
    stock = lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b)  # noqa: E731
    return kernels.layer_norm, stock, row_inputs(shapes["rows"], dtype, device, vectors=2)


def fastest_ms(timer, call, inputs, mode, repeats):
    """The fastest of some repeats of a forward, or of a backward alone: what disturbs a repeat only slows it."""

    upstream = torch.ones_like(call(*inputs))

    def forward(_=None):
        return call(*inputs)

    def backward(out):
        return torch.autograd.grad(out, inputs, upstream)

    step, prepare = (forward, lambda: None) if mode == "fwd" else (backward, forward)
    return min(timer.repeat(step, prepare, repeats))


@pytest.mark.benchmark(timer=CLOCK, disable_gc=True)
@pytest.mark.parametrize("mode", ["fwd", "bwd"])
@pytest.mark.parametrize("name", ["attention", "softmax", "layer_norm"])
def test_ratio(benchmark, name, mode):
    device = choose_device()
    timer = timing.timer_for(device)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the interpreter has one
    ours, stock, inputs = pair(name, device)

    def turns():
        own = fastest_ms(timer, ours, inputs, mode, OURS)
        CLOCK.now += own / fastest_ms(timer, stock, inputs, mode, STOCK)

    turns()  # compiled and warm
    benchmark.pedantic(turns, rounds=ROUNDS)


def main(argv=None):
    p = command.Parser(__doc__)
    p.add_argument("--out", type=command.folder, default="runs/bench", metavar="DIR", help="where ratios.json goes")
    p.add_argument("--publish", action="store_true", help="replace the saved ratios instead of comparing with them")
    args = p.parse_args(argv)
    device = choose_device()
    saved = environment.results_folder(device) / "ratios.json"
    written = saved if args.publish else Path(args.out) / "ratios.json"
    written.parent.mkdir(parents=True, exist_ok=True)
    columns = "--benchmark-columns=median,min,max,iqr,rounds"
    flags = [
        __file__,
        "-q",
        "-p",
        "no:cacheprovider",
        columns,
        "--benchmark-sort=fullname",
        f"--benchmark-json={written}",
    ]
    if saved.is_file() and not args.publish:
        flags += [f"--benchmark-compare={saved}", f"--benchmark-compare-fail={ALLOWED}"]
    elif not args.publish:
        print(f"nothing saved for this device yet ({saved.parent.name}); --publish saves these ratios")
    try:
        code = pytest.main(flags)
    except PerformanceRegression:
        code = 1
    if code != 0:
        raise GaveUp(
            "a ratio grew by more than 25 %, or could not be measured; the table above says which. To compare with "
            "this very machine, --publish the ratios of an earlier commit first"
        )


if __name__ == "__main__":
    sys.exit(command.run(main))
