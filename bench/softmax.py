"""Row softmax and the causal scaled softmax of attention scores: every provider at every row length.

    python bench/softmax.py
    python bench/softmax.py --op softmax,causal_softmax --length 1024,8192 --mode fwd,bwd

Bytes, the least possible, for M rows of N elements: forward x read and y written, 2 M N; backward y and dy read, dx
written, 3 M N. The causal form works on square N x N matrices of scores and reads only their lower triangles,
N (N + 1) / 2 elements each, but writes whole ones: 1 read and a write forward, 2 reads and a write backward.
"""

import sys
from functools import partial
from pathlib import Path

if not __package__:  # run as a script: the checkout belongs on the path, not bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import command, compile_cases, harness
from bench.compiled import Case
from bench.rows import RowBench, add_flags, normal

OPS = ("softmax", "causal_softmax")
READS = {"fwd": 1, "bwd": 2}
FLOPS_PER_ELEMENT = {"fwd": 5, "bwd": 4}  # max, subtract, exp, sum, divide; multiply, sum, subtract, multiply


class Softmax(RowBench):
    name = "softmax"

    def cases(self, args, device):
        """As everywhere; the causal form takes whole square matrices, at least one."""
        cases = super().cases(args, device)
        for case in cases:
            if case["op"] == "causal_softmax":
                case["rows"] = max(1, case["rows"] // case["length"]) * case["length"]
        return cases

    def inputs(self, case, device):
        matrix = case["rows"], case["length"]
        if case["op"] == "causal_softmax":
            matrix = case["rows"] // case["length"], case["length"], case["length"]
        return {"x": normal(*matrix, dtype=case["dtype"], device=device)}

    def call(self, function, inputs, case):
        return function(inputs["x"], 0.125) if case["op"] == "causal_softmax" else function(inputs["x"])

    def gate_case(self, case, cases):
        checked = super().gate_case(case, cases)
        return checked if case["op"] == "softmax" else {**checked, "rows": checked["length"]}

    def compile_case(self, case):
        shape = "bfloat16", case["length"], case["op"] == "causal_softmax"
        call = partial(compile_cases.launch, compile_cases.prepare_softmax, *shape)
        return Case(f"{case['op']}-n{case['length']}", call)

    def flops(self, case, mode):
        return sum(FLOPS_PER_ELEMENT[m] for m in mode.split("+")) * case["rows"] * self.seen(case)

    def bytes(self, case, mode):
        elements = sum(READS[m] * self.seen(case) + case["length"] for m in mode.split("+")) * case["rows"]
        return elements * command.DTYPES[case["dtype"]].itemsize

    def seen(self, case):
        """Elements of an average row that are not masked."""
        return (case["length"] + 1) / 2 if case["op"] == "causal_softmax" else case["length"]


def main(argv=None):
    p = harness.parser(__doc__, OPS)
    add_flags(p, OPS, default=["softmax"])
    harness.main(Softmax(), p.parse_args(argv))


if __name__ == "__main__":
    sys.exit(command.run(main))
