"""What the two row-wise benches (softmax, layer norm) share: matrices of many row lengths, bound by bytes."""

import torch

from bench import command, harness
from gptlib.flags import positive_int

GPU_ELEMENTS, CPU_ELEMENTS = 2**27, 2**21  # a matrix: 256 MiB in bf16, five times an H100's L2; 8 MiB in fp32
GPU_LENGTHS, CPU_LENGTHS = [1024, 4096, 16384, 65536], [1024, 4096, 16384]
GATE_ROWS = 2048


class RowBench(harness.KernelBench):
    """`rows` x `length` matrices; the default number of rows keeps their product constant."""

    bound = "bytes"

    def cases(self, args, device):
        elements = GPU_ELEMENTS if device.type == "cuda" else CPU_ELEMENTS
        lengths = args.length or (GPU_LENGTHS if device.type == "cuda" else CPU_LENGTHS)
        return [
            {"op": op, "dtype": dtype, "rows": args.rows or max(1, elements // length), "length": length}
            for op in args.op
            for dtype in args.dtype
            for length in lengths
        ]

    def op(self, case):
        return case["op"]

    def gate_case(self, case, cases):
        smallest = min(cases, key=lambda c: c["length"])
        return {**case, "rows": min(smallest["rows"], GATE_ROWS), "length": smallest["length"]}


def normal(*shape, dtype, device):
    """A random normal leaf that requires grad."""
    return torch.randn(shape, device=device).to(command.DTYPES[dtype]).requires_grad_()


def add_flags(p, ops, default):
    p.add_argument(
        "--op",
        type=command.one_of(ops),
        default=default,
        metavar="OP,...",
        help=f"of {', '.join(ops)} ({', '.join(default)})",
    )
    p.add_argument("--length", type=command.positives, metavar="N,...", help="row lengths; default several")
    p.add_argument("--rows", type=positive_int, metavar="M", help="rows; default: rows x length stays constant")
