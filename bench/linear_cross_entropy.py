"""The output head and its loss, which need not store the logits: every provider at every vocabulary.

    python bench/linear_cross_entropy.py
    python bench/linear_cross_entropy.py --classes 50257 --tokens 16384,65536 --width 768

Timed forward and backward together: some make the gradients in the forward. FLOPs: the three matrix products of M
tokens, width C and N classes (logits, their gradient's product with the weight, and with x), 6 M C N. Bytes, the least
possible: x and the weight read and their gradients written. Memory is the point: the table shows that too.
"""

import math
import sys
from functools import partial
from pathlib import Path

if not __package__:  # run as a script: the checkout belongs on the path, not bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench import command, compile_cases, harness
from bench.compiled import Case
from bench.rows import normal
from gptlib.errors import UserError
from gptlib.flags import positive_int

OPS = ("linear_cross_entropy",)
GATE_TOKENS = 256
LARGEST_LOGIT = 5.0  # of random normal ones


class LinearCrossEntropy(harness.KernelBench):
    name = "linear_cross_entropy"

    def cases(self, args, device):
        on_gpu = device.type == "cuda"
        return [
            {"dtype": dtype, "tokens": tokens, "width": args.width or (768 if on_gpu else 128), "classes": classes}
            for dtype in args.dtype
            for tokens in args.tokens or [16384 if on_gpu else 1024]
            for classes in args.classes or ([32768, 50257, 131072] if on_gpu else [4096, 50257])
        ]

    def op(self, case):
        return "linear_cross_entropy"

    def inputs(self, case, device):
        """Logits of unit variance, as a model's first ones nearly are."""
        place = {"dtype": case["dtype"], "device": device}
        x, weight = (normal(case[rows], case["width"], **place) for rows in ("tokens", "classes"))
        weight.data.mul_(1 / math.sqrt(case["width"]))
        targets = torch.randint(case["classes"], (case["tokens"],), device=device)
        return {"x": x, "weight": weight, "targets": targets}

    def call(self, function, inputs, case):
        return function(*inputs.values())

    def flops(self, case, mode):
        return 3 * 2 * case["tokens"] * case["width"] * case["classes"]

    def bytes(self, case, mode):
        return 2 * (case["tokens"] + case["classes"]) * case["width"] * command.DTYPES[case["dtype"]].itemsize

    def gate_case(self, case, cases):
        return {**case, "tokens": min(GATE_TOKENS, *(c["tokens"] for c in cases)), "classes": cases[0]["classes"]}

    def summed_rows(self, case, name):
        return case["tokens"] if name == "dweight" else None

    def intermediate(self, case, name):
        """The loss, in fp32, is the mean of a sum that is rounded on the way, of logits rounded to their dtype."""
        if name != "out":
            return None
        rounding = torch.finfo(command.DTYPES[case["dtype"]]).eps / torch.finfo(torch.float32).eps
        return max(2 * math.log(case["classes"]), LARGEST_LOGIT * rounding / math.sqrt(case["tokens"]))

    def compile_case(self, case):
        call = partial(compile_cases.launch, compile_cases.prepare_loss, "bfloat16", case["classes"], True)
        return Case(f"linear-cross-entropy-n{case['classes']}", call)


def main(argv=None):
    p = harness.parser(__doc__, OPS)
    p.set_defaults(mode=["fwd+bwd"])
    p.add_argument("--tokens", type=command.positives, metavar="M,...", help="rows of x")
    p.add_argument("--width", type=positive_int, metavar="C", help="columns of x")
    p.add_argument("--classes", type=command.positives, metavar="N,...", help="size of the vocabulary")
    args = p.parse_args(argv)
    if args.mode != ["fwd+bwd"]:
        raise UserError(
            f"--mode {','.join(args.mode)}: only fwd+bwd can be compared, since some make the gradients in the forward"
        )
    harness.main(LinearCrossEntropy(), args)


if __name__ == "__main__":
    sys.exit(command.run(main))
