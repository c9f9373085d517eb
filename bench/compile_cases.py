"""Every kernel that ships, in every configuration the compile report must vouch for, as calls on meta tensors.

A case calls the launchers themselves, so tiles, grids and flags are those of a real run. Its name says what is called;
`expects` says what the machine code of its kernels must contain, in words that each architecture spells its own way:

    tensor      the architecture's best matrix instruction: mma.sync on sm_80, wgmma on sm_90, tcgen05 on sm_100, MFMA
    mma         mma.sync on NVIDIA: what a tile of 16 rows can use
    tma_load, tma_store     bulk copies by descriptor, where the architecture has them
    setmaxnreg  registers that move from some warps to others
    wide_load   16-byte loads from global memory
"""

from functools import partial

from bench.compiled import Case

BATCH, HEADS, TOKENS, GROUPS = 8, 12, 1024, 4
HEAD_DIMS = (16, 32, 64, 96, 128, 256)
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
FEATURES = {
    "plain": {},
    "dropout": {"dropout_p": 0.1},
    "window": {"window": 256},
    "documents": {"documents": True},
    "gqa": {"kv_heads": HEADS // GROUPS},
    "everything": {"dropout_p": 0.1, "window": 256, "documents": True, "kv_heads": HEADS // GROUPS},
}
# One row length at least in every class of the tables, GPT-2's width, and two that no 16-byte load fits.
ROW_LENGTHS = (48, 768, 1023, 2048, 4096, 8192, 16384, 32768, 50257, 131072)
VOCABULARIES = (256, 4096, 50257, 131072)

TMA = ("tensor", "tma_load", "tma_store")
ATTENTION_EXPECTS = {"attention_forward_kernel": TMA, "dkdv_kernel": TMA, "dq_kernel": TMA}
PRODUCTS = {"attention_forward_kernel": 2, "dkdv_kernel": 4, "dq_kernel": 3}  # per block of queries and keys
POINTER_EXPECTS = dict.fromkeys(ATTENTION_EXPECTS, ("tensor",))


def cases():
    """All cases, those that most people run first."""
    return [*attention_cases(), *hopper_cases(), *decode_cases(), *softmax_cases(), *norm_cases(), *loss_cases()]


def named(name):
    """The case of that name."""
    return next(case for case in cases() if case.name == name)


def launch(prepare, *args, **options):
    """Make the inputs, then run the launchers."""
    return prepare(*args, **options)()


def with_tile(kernel, tile, call):
    """call() with `tile` (a _tuning.Tile or RowTile) in the place of the table's row for `kernel`. Strides and types
    decide, as for the row, whether it is read by descriptors."""
    from kernels import _tuning

    name = "row_tile" if isinstance(tile, _tuning.RowTile) else "attention_tile"
    table = getattr(_tuning, name)

    def choose(*args, **options):
        row = table(*args, **options)
        if kernel not in args[:2]:
            return row
        return tile if isinstance(tile, _tuning.RowTile) else tile._replace(use_tma=row.use_tma)

    setattr(_tuning, name, choose)
    try:
        return call()
    finally:
        setattr(_tuning, name, table)


# ---- attention -------------------------------------------------------------------------------------------------------


def attention_cases():
    """Every head dimension with every feature in bf16; fp16 and fp32 plain and with dropout. The core: all features at
    64 and 128, the other head dimensions and types plain."""
    found = []

    def add(dtype, head_dim, feature, expects, **arguments):
        call = partial(launch, prepare_attention, DTYPES[dtype], head_dim, **FEATURES.get(feature, {}), **arguments)
        core = (feature == "plain" and dtype != "fp16") or (dtype == "bf16" and head_dim in (64, 128))
        found.append(Case(f"attention-{dtype}-d{head_dim}-{feature}", call, expects, PRODUCTS, core))

    for head_dim in sorted(HEAD_DIMS, key=lambda d: d not in (64, 128)):
        for feature in FEATURES:
            add("bf16", head_dim, feature, ATTENTION_EXPECTS)
        for feature in ("plain", "dropout"):
            add("fp16", head_dim, feature, ATTENTION_EXPECTS)
            add("fp32", head_dim, feature, {})
    # Arguments of 1, which Triton turns into constants: a window of one key, and the smallest dropout there is.
    add("bf16", 64, "ones", ATTENTION_EXPECTS, dropout_p=0.004, window=1)
    for head_dim in (64, 128):
        add("bf16", head_dim, "lse", ATTENTION_EXPECTS, lse_gradient=True)
        add("bf16", head_dim, "pointers", POINTER_EXPECTS, padding=1)
        add("fp32", head_dim, "tf32", POINTER_EXPECTS, tf32=True)
        add("fp32", head_dim, "tf32-dropout", POINTER_EXPECTS, tf32=True, dropout_p=0.1)
    return found


def prepare_attention(
    dtype,
    head_dim,
    dropout_p=0.0,
    window=0,
    documents=False,
    kv_heads=HEADS,
    lse_gradient=False,
    padding=0,
    tf32=False,
    device="meta",
    tokens=TOKENS,
    part=None,
):
    """A call of forward and backward, which returns out, lse, dq, dk and dv, or of one `part` of them: "forward" or
    "backward". `padding` elements between the rows of q, k, v and dout keep descriptors from reading them."""
    import torch

    from kernels.attention.backward import attention_backward
    from kernels.attention.forward import attention_forward

    def heads(count):
        width = head_dim + padding
        x = _normal(max(1, BATCH * TOKENS // tokens), tokens, count, width, dtype=dtype, device=device)
        return x[..., :head_dim].transpose(1, 2)

    q, k, v, dout = heads(HEADS), heads(kv_heads), heads(kv_heads), heads(HEADS)
    rng = torch.zeros(2, dtype=torch.int64, device=device) if dropout_p else None
    bounds = [torch.zeros(tokens, dtype=torch.int32, device=device) if documents else None for _ in range(2)]

    def forward():
        return attention_forward(q, k, v, 0.125, dropout_p, rng, window, bounds[0])

    def backward(out, lse):
        dlse = torch.empty_like(lse) if lse_gradient else None
        return attention_backward(dout, dlse, q, k, v, out, lse, 0.125, dropout_p, rng, window, *bounds)

    def both():
        out, lse = forward()
        return out, lse, *backward(out, lse)

    def run():
        precision = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
        try:
            return call()
        finally:
            torch.backends.cuda.matmul.fp32_precision = precision

    if part == "backward":
        call = forward
        out, lse = run()
    call = {None: both, "forward": forward, "backward": lambda: backward(out, lse)}[part]
    return run


def hopper_cases():
    """The warp-specialized kernels; 80 is padded, and in "ones" arguments of 1 become constants."""
    kernels = {"hopper_forward_kernel": 2, "hopper_backward_kernel": 5}
    about = {
        "expects": dict.fromkeys(kernels, (*TMA, "setmaxnreg")),
        "products": kernels,
        "loop_warps": dict.fromkeys(kernels, 8),
    }
    calls = {
        f"{dtype}-d{head_dim}": partial(launch, prepare_hopper, DTYPES[dtype], head_dim)
        for dtype, head_dim in (("bf16", 64), ("bf16", 128), ("fp16", 64), ("fp16", 128), ("bf16", 80))
    }
    for head_dim in (64, 128):
        calls[f"bf16-d{head_dim}-gqa"] = partial(launch, prepare_hopper, "bfloat16", head_dim, kv_heads=HEADS // GROUPS)
    calls["bf16-d64-ones"] = partial(launch, prepare_hopper, "bfloat16", 64, shape=(1, 1, 1), kv_heads=1)
    calls["bf16-d64-lse"] = partial(launch, prepare_hopper, "bfloat16", 64, lse_gradient=True)
    return [Case(f"hopper-{name}", call, **about, archs=("sm_90",)) for name, call in calls.items()]


def prepare_hopper(dtype, head_dim, shape=(BATCH, HEADS, TOKENS), kv_heads=HEADS, lse_gradient=False, device="meta"):
    """A call of the forward and the backward that only Hopper runs, which returns out, lse, dq, dk and dv."""
    import torch

    from kernels.attention.hopper.backward import hopper_backward
    from kernels.attention.hopper.forward import hopper_forward

    batch, heads, tokens = shape
    q, k, v, dout = (
        _normal(batch, tokens, n, head_dim, dtype=dtype, device=device).transpose(1, 2)
        for n in (heads, kv_heads, kv_heads, heads)
    )

    def run():
        out, lse = hopper_forward(q, k, v, 0.125)
        dlse = torch.empty_like(lse) if lse_gradient else None
        return out, lse, *hopper_backward(dout, dlse, q, k, v, out, lse, 0.125)

    return run


def decode_cases():
    found = []
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            expects = {} if dtype == "fp32" else {"decode_kernel": ("mma", "tma_load")}
            call = partial(launch, prepare_decode, DTYPES[dtype], head_dim)
            found.append(Case(f"decode-{dtype}-d{head_dim}-plain", call, expects, core=dtype != "fp16"))
        for head_dim in (128, 256):  # 64 rows: the most registers and shared memory
            call = partial(launch, prepare_decode, DTYPES[dtype], head_dim, queries=5, kv_heads=1)
            found.append(Case(f"decode-{dtype}-d{head_dim}-rows", call, core=dtype != "fp16"))
    for feature, arguments in {
        "window": {"window": 256},
        "gqa": {"kv_heads": 3},
        "rows": {"queries": 5, "kv_heads": 1},
    }.items():
        expects = {"decode_kernel": ("tensor" if feature == "rows" else "mma", "tma_load")}
        found.append(
            Case(f"decode-bf16-d64-{feature}", partial(launch, prepare_decode, "bfloat16", 64, **arguments), expects)
        )
    return found


def prepare_decode(dtype, head_dim, queries=1, kv_heads=HEADS, window=0, device="meta"):
    """A call for a few queries against a long cache."""
    from kernels.attention.decode import attention_decode

    q = _normal(1, HEADS, queries, head_dim, dtype=dtype, device=device)
    k, v = (_normal(1, kv_heads, 8 * TOKENS, head_dim, dtype=dtype, device=device) for _ in range(2))
    return lambda: attention_decode(q, k, v, 0.125, window)


# ---- rows ------------------------------------------------------------------------------------------------------------


def softmax_cases():
    return [
        _row_case(
            kind, dtype, n, partial(launch, prepare_softmax, DTYPES[dtype], n, kind == "causal-softmax"), "softmax"
        )
        for kind in ("softmax", "causal-softmax")
        for dtype in DTYPES
        for n in ROW_LENGTHS
    ]


def prepare_softmax(dtype, n, causal, device="meta"):
    """A call of forward and backward for rows of n elements, which returns y and dx."""
    from kernels.softmax import softmax_backward, softmax_forward

    x = _normal(BATCH * TOKENS, n, dtype=dtype, device=device)

    def run():
        y = softmax_forward(x, 1.0, causal, x.dtype)
        return y, softmax_backward(y, x, 1.0, causal, x.dtype)

    return run


def norm_cases():
    found = [
        _row_case(kind, dtype, n, partial(launch, prepare_norm, DTYPES[dtype], n, kind), "norm")
        for kind in ("layer-norm", "add-layer-norm", "rms-norm")
        for dtype in DTYPES
        for n in ROW_LENGTHS
    ]
    plain = partial(launch, prepare_norm, "bfloat16", 768, "layer-norm", affine=False)
    mixed = partial(launch, prepare_norm, "bfloat16", 768, "add-layer-norm", parameters="float32")
    return [*found, Case("layer-norm-bf16-n768-bare", plain), Case("add-layer-norm-bf16-n768-fp32-parameters", mixed)]


def prepare_norm(dtype, n, kind, affine=True, parameters=None, device="meta"):
    """A call of forward and backward for rows of n elements, which returns y, dx, dweight and dbias. `affine`: with
    weight and bias, in `parameters`' dtype if given."""
    from kernels.layernorm import norm_backward, norm_forward

    x, dy = (_normal(BATCH * TOKENS, n, dtype=dtype, device=device) for _ in range(2))
    rms = kind == "rms-norm"
    weight = _normal(n, dtype=parameters or dtype, device=device) if affine else None
    bias = None if rms else weight
    residual = dy if kind == "add-layer-norm" else None
    dtypes = [None if t is None else t.dtype for t in (weight, bias)]

    def run():
        y, h, stats = norm_forward(x, residual, weight, bias, 1e-5, rms, x.dtype)
        return y, *norm_backward(dy, residual, x if residual is None else h, stats, weight, rms, *dtypes)

    return run


def loss_cases():
    return [
        Case(
            f"{kind}-{dtype}-n{n}",
            partial(launch, prepare_loss, DTYPES[dtype], n, fused),
            {"loss_and_gradient_kernel": ("wide_load",)} if fused else {},
            core=dtype != "fp16",
        )
        for kind, fused in (("cross-entropy", False), ("linear-cross-entropy", True))
        for dtype in DTYPES
        for n in VOCABULARIES
    ]


def prepare_loss(dtype, n, fused, device="meta"):
    """A call of forward and backward for n classes, which returns the losses and dlogits, or `fused` with the head the
    losses, dx and dweight."""
    import torch

    from kernels.cross_entropy import cross_entropy_backward, cross_entropy_forward, linear_cross_entropy_forward

    targets = torch.zeros(TOKENS, dtype=torch.int64, device=device)
    if fused:
        x, weight = (_normal(rows, 64, dtype=dtype, device=device) for rows in (TOKENS, n))
        return lambda: linear_cross_entropy_forward(x, weight, targets, -100, True, True)
    logits = _normal(TOKENS, n, dtype=dtype, device=device)

    def run():
        losses, m, log2_l = cross_entropy_forward(logits, targets, -100)
        return losses, cross_entropy_backward(losses, logits, targets, m, log2_l, -100)

    return run


def _row_case(kind, dtype, n, call, family):
    core = dtype == "bf16" or (dtype == "fp32" and kind == "add-layer-norm")  # the widest tiles of most operands
    return Case(f"{kind}-{dtype}-n{n}", call, _wide(family, n), core=core)


def _wide(family, n):
    """Kernels of a family must load 16 bytes at a time if rows are long enough for it and start at multiples of it."""
    kernels = {
        "softmax": [f"softmax_{way}{blocks}_kernel" for way in ("forward", "backward") for blocks in ("", "_blocks")],
        "norm": ["norm_forward_kernel", "norm_forward_blocks_kernel", "norm_row_sums_kernel", "norm_backward_kernel"],
    }
    return dict.fromkeys(kernels[family], ("wide_load",)) if n >= 512 and n % 8 == 0 else {}


def _normal(*shape, dtype, device):
    import torch

    if device == "meta":
        return torch.empty(*shape, dtype=getattr(torch, dtype), device=device)
    return torch.randn(*shape, device=device).to(getattr(torch, dtype))
