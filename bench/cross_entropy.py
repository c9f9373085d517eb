"""Cross-entropy of logits with the classes they should have: every provider at every vocabulary.

    python bench/cross_entropy.py
    python bench/cross_entropy.py --length 32768,131072 --rows 4096 --mode fwd,bwd,fwd+bwd

Bytes, the least possible, for M rows of N logits: forward read, M N; backward read and the gradient written, 2 M N.
Targets and losses, one to a row, do not count. bench/linear_cross_entropy.py measures the loss together with the head.
"""

import sys
from functools import partial
from pathlib import Path

if not __package__:  # run as a script: the checkout belongs on the path, not bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench import command, compile_cases, harness
from bench.compiled import Case
from bench.rows import RowBench, add_flags, normal

OPS = ("cross_entropy",)
PASSES = {"fwd": 1, "bwd": 2}
FLOPS_PER_ELEMENT = {"fwd": 4, "bwd": 4}  # max, subtract, exp, sum; subtract, exp, subtract, multiply
GPU_VOCABULARIES, CPU_VOCABULARIES = [4096, 32768, 50257, 131072], [4096, 50257]


class CrossEntropy(RowBench):
    name = "cross_entropy"

    def cases(self, args, device):
        args.length = args.length or (GPU_VOCABULARIES if device.type == "cuda" else CPU_VOCABULARIES)
        return super().cases(args, device)

    def inputs(self, case, device):
        logits = normal(case["rows"], case["length"], dtype=case["dtype"], device=device)
        return {"logits": logits, "targets": torch.randint(case["length"], (case["rows"],), device=device)}

    def call(self, function, inputs, case):
        return function(*inputs.values())

    def compile_case(self, case):
        call = partial(compile_cases.launch, compile_cases.prepare_loss, "bfloat16", case["length"], False)
        return Case(f"cross-entropy-n{case['length']}", call)

    def flops(self, case, mode):
        return sum(FLOPS_PER_ELEMENT[m] for m in mode.split("+")) * case["rows"] * case["length"]

    def bytes(self, case, mode):
        elements = sum(PASSES[m] for m in mode.split("+")) * case["rows"] * case["length"]
        return elements * command.DTYPES[case["dtype"]].itemsize


def main(argv=None):
    p = harness.parser(__doc__, OPS)
    add_flags(p, OPS, default=list(OPS))
    harness.main(CrossEntropy(), p.parse_args(argv))


if __name__ == "__main__":
    sys.exit(command.run(main))
