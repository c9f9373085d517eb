"""LayerNorm, with the residual add fused, and RMSNorm: every provider at every row length.

    python bench/layernorm.py
    python bench/layernorm.py --op layer_norm,rms_norm --length 768,1024,4096 --rows 8192 --mode fwd,bwd

Bytes, the least possible, for M rows of N elements (weights are read from the cache and not counted): forward x read
and y written, 2 M N; backward x and dy read, dx written, 3 M N. With the residual add 4 M N each: x and residual read,
the norm and the sum written; the sum and both gradients read, one gradient written for both inputs.
"""

import sys
from functools import partial
from pathlib import Path

if not __package__:  # run as a script: the checkout belongs on the path, not bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import command, compile_cases, harness
from bench.compiled import Case
from bench.rows import RowBench, add_flags, normal

OPS = ("layer_norm", "add_layer_norm", "rms_norm")
FLOPS_PER_ELEMENT = {"fwd": 8, "bwd": 14}  # mean, variance, normalize, scale; and back


class LayerNorm(RowBench):
    name = "layernorm"

    def inputs(self, case, device):
        """x, the residual where there is one, then weight and, except for RMSNorm, bias."""
        matrices = ["x", "residual"] if case["op"] == "add_layer_norm" else ["x"]
        vectors = ["weight"] if case["op"] == "rms_norm" else ["weight", "bias"]
        place = {"dtype": case["dtype"], "device": device}
        inputs = {name: normal(case["rows"], case["length"], **place) for name in matrices}
        return inputs | {name: normal(case["length"], **place) for name in vectors}

    def call(self, function, inputs, case):
        return function(*inputs.values())

    def compile_case(self, case):
        kind = case["op"].replace("_", "-")
        call = partial(compile_cases.launch, compile_cases.prepare_norm, "bfloat16", case["length"], kind)
        return Case(f"{kind}-n{case['length']}", call)

    def flops(self, case, mode):
        return sum(FLOPS_PER_ELEMENT[m] for m in mode.split("+")) * case["rows"] * case["length"]

    def bytes(self, case, mode):
        passes = {"fwd": 4, "bwd": 4} if case["op"] == "add_layer_norm" else {"fwd": 2, "bwd": 3}
        elements = sum(passes[m] for m in mode.split("+")) * case["rows"] * case["length"]
        return elements * command.DTYPES[case["dtype"]].itemsize

    def summed_rows(self, case, name):
        return case["rows"] if name in ("dweight", "dbias") else None


def main(argv=None):
    p = harness.parser(__doc__, OPS)
    add_flags(p, OPS, default=["layer_norm"])
    harness.main(LayerNorm(), p.parse_args(argv))


if __name__ == "__main__":
    sys.exit(command.run(main))
