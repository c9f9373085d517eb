"""Small kernels for the tests of the compile report: a matmul, a row softmax, and two that go wrong."""

import os
import time
from functools import partial

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from bench import compile_cases
from bench.compiled import Case
from kernels import _tuning
from kernels._runtime import launch


@triton.jit
def matmul_kernel(a_desc, b_desc, c_ptr, K, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    row, col = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        acc = tl.dot(a_desc.load([row, k]), b_desc.load([k, col]), acc)
    offs = (row + tl.arange(0, BLOCK_M))[:, None] * N + (col + tl.arange(0, BLOCK_N))[None, :]
    tl.store(c_ptr + offs, acc.to(c_ptr.dtype.element_ty))


@triton.jit
def softmax_kernel(x_ptr, out_ptr, scale, bias_ptr, N, BLOCK_N: tl.constexpr):
    offs = tl.arange(0, BLOCK_N)
    start = tl.program_id(0).to(tl.int64) * N
    x = tl.load(x_ptr + start + offs, offs < N, -float("inf")).to(tl.float32) * scale
    if bias_ptr is not None:
        x += tl.load(bias_ptr + offs, offs < N, 0.0)
    p = tl.exp2(x - tl.max(x))
    tl.store(out_ptr + start + offs, (p / tl.sum(p)).to(out_ptr.dtype.element_ty), offs < N)


@triton.jit
def broken_kernel(x_ptr, BLOCK_N: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK_N), tl.arange(0, 2 * BLOCK_N))


def call_matmul(block_m, block_n, num_warps, dtype=torch.bfloat16):
    a, b, c = (torch.empty(1024, 1024, dtype=dtype, device="meta") for _ in range(3))
    descriptors = TensorDescriptor.from_tensor(a, [block_m, 64]), TensorDescriptor.from_tensor(b, [64, block_n])
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 64}
    launch(matmul_kernel, (8, 8), *descriptors, c, 1024, 1024, num_warps=num_warps, num_stages=3, **sizes)


def call_softmax(n, num_warps=4):
    x, out = (torch.empty(8, n, dtype=torch.float16, device="meta") for _ in range(2))
    launch(softmax_kernel, (8,), x, out, 0.5, None, n, num_warps=num_warps, BLOCK_N=triton.next_power_of_2(n))


def call_broken():
    launch(broken_kernel, (1,), torch.empty(8, device="meta"), BLOCK_N=8)


MATMUL = Case("matmul", partial(call_matmul, 128, 128, 8), {"matmul_kernel": ("tensor", "tma_load")})
SMALL_MATMUL = Case("small-matmul", partial(call_matmul, 16, 64, 4), {"matmul_kernel": ("tensor",)})
SOFTMAX = Case("softmax", partial(call_softmax, 1024), {"softmax_kernel": ("wide_load",)})
ODD_SOFTMAX = Case("odd-softmax", partial(call_softmax, 1001), {"softmax_kernel": ("wide_load",)})
SPILLING = Case("spilling", partial(call_softmax, 8192, num_warps=1))
BROKEN = Case("broken", call_broken)
ALL = [MATMUL, SMALL_MATMUL, SOFTMAX, ODD_SOFTMAX, SPILLING, BROKEN]


def call_with_tile(kernel, tile):
    """Attention at head dimension 64 with a tile of our choice."""
    tile = _tuning.Tile(*tile)
    compile_cases.with_tile(
        kernel, tile, partial(compile_cases.launch, compile_cases.prepare_attention, "bfloat16", 64)
    )


def die():
    """What a compiler does that aborts."""
    print("assertion failed: out of luck", flush=True)
    os._exit(134)


def sleep():
    time.sleep(60)


def divide_by_zero():
    return 1 / 0


def environment():
    return {name: os.environ.get(name) for name in ("TRITON_INTERPRET", "TRITON_CACHE_DIR")}
