"""Hand-written Triton kernels for GPT training. `import kernels` needs no Triton: each op is imported when first used."""

import importlib

_OPS = {
    "causal_attention": "kernels.attention",
    "softmax": "kernels.softmax",
    "causal_softmax": "kernels.softmax",
    "layer_norm": "kernels.layernorm",
    "add_layer_norm": "kernels.layernorm",
    "rms_norm": "kernels.layernorm",
}

__all__ = list(_OPS)


def __getattr__(name):
    if name not in _OPS:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}; it has {', '.join(_OPS)}")
    return getattr(importlib.import_module(_OPS[name]), name)


def __dir__():
    return sorted([*globals(), *_OPS])
