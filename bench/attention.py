"""Causal attention: every provider at every sequence length.

    python bench/attention.py --seq 1024
    python bench/attention.py --seq 512,1024,2048 --head-dim 64,128 --mode fwd,bwd,fwd+bwd --providers sdpa,triton
    python bench/attention.py --seq 1024 --heads 12 --head-dim 64 --batch 8,16,32,64 --label gpt2
    python bench/attention.py --providers triton,my.kernel:attend

On a GPU the default batch keeps batch x seq at 16,384 tokens and the default number of heads keeps heads x head_dim at
2,048, the shapes of FlashAttention's own tables; on a CPU one sequence of 4 heads.

FLOPs: two matrix products of 2 T^2 D each per head, halved because half of the scores are masked: 2 B H T^2 D. The
backward has five such products, 2.5 times that. Bytes, the least possible: forward q, k, v read, out written; backward
q, k, v, out, dout read, dq, dk, dv written.
"""

import sys
from functools import partial
from pathlib import Path

if not __package__:  # run as a script: the checkout belongs on the path, not bench/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench import command, compile_cases, harness
from bench.compiled import Case
from gptlib.flags import below_one, positive_int

OPS = ("causal_attention",)
GPU_TOKENS, GPU_WIDTH, CPU_HEADS = 16384, 2048, 4
GATE_SEQ = (64, 2048)  # the checked sequence length stays between these


class Attention(harness.KernelBench):
    name = "attention"

    def cases(self, args, device):
        on_gpu = device.type == "cuda"
        sequences = args.seq or ([1024, 4096, 16384] if on_gpu else [256, 512, 1024])
        head_dims = args.head_dim or ([64, 128] if on_gpu else [64])
        return [
            {
                "dtype": dtype,
                "batch": batch or (max(1, GPU_TOKENS // seq) if on_gpu else 1),
                "heads": args.heads or (max(1, GPU_WIDTH // head_dim) if on_gpu else CPU_HEADS),
                "seq": seq,
                "head_dim": head_dim,
                "dropout": args.dropout,
            }
            for dtype in args.dtype
            for head_dim in head_dims
            for seq in sequences
            for batch in args.batch or [None]
        ]

    def op(self, case):
        return "causal_attention"

    def inputs(self, case, device):
        # as a model has them: (B, T, H, D) in memory, seen as (B, H, T, D)
        shape = case["batch"], case["seq"], case["heads"], case["head_dim"]
        dtype = command.DTYPES[case["dtype"]]
        return {n: torch.randn(shape, device=device).to(dtype).transpose(1, 2).requires_grad_() for n in "qkv"}

    def call(self, function, inputs, case):
        return function(*inputs.values(), scale=None, dropout_p=case["dropout"])

    def flops(self, case, mode):
        forward = 2 * case["batch"] * case["heads"] * case["seq"] ** 2 * case["head_dim"]
        return forward * {"fwd": 1, "bwd": 2.5, "fwd+bwd": 3.5}[mode]

    def bytes(self, case, mode):
        tensor = case["batch"] * case["heads"] * case["seq"] * case["head_dim"]
        return {"fwd": 4, "bwd": 8, "fwd+bwd": 12}[mode] * tensor * command.DTYPES[case["dtype"]].itemsize

    def gate_case(self, case, cases):
        least, most = GATE_SEQ
        seq = min(max(min(c["seq"] for c in cases), least), most)
        return {**case, "batch": 1, "heads": min(4, case["heads"]), "seq": seq, "dropout": 0.0}

    def compile_case(self, case):
        shape = "bfloat16", case["head_dim"], case["dropout"]
        call = partial(compile_cases.launch, compile_cases.prepare_attention, *shape)
        return Case(f"attention-d{case['head_dim']}", call)


def main(argv=None):
    p = harness.parser(__doc__, OPS)
    p.add_argument(
        "--seq",
        type=command.positives,
        metavar="T,...",
        help="sequence lengths; default 256,512,1024, on a GPU 1024,4096,16384",
    )
    p.add_argument("--head-dim", type=command.positives, metavar="D,...", help="default 64, on a GPU 64,128")
    p.add_argument("--heads", type=positive_int, metavar="H", help="default 4, on a GPU 2048 / D")
    p.add_argument("--batch", type=command.positives, metavar="B,...", help="default 1, on a GPU 16384 / T")
    p.add_argument("--dropout", type=below_one, default=0.0, metavar="P", help="on the weights (0); not in the check")
    harness.main(Attention(), p.parse_args(argv))


if __name__ == "__main__":
    sys.exit(command.run(main))
