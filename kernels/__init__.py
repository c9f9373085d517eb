"""Hand-written Triton kernels for GPT training. `import kernels` needs no Triton: ops are imported when first used."""

import importlib
import sys
import types

_OPS = {
    "causal_attention": "kernels.attention",
    "softmax": "kernels.softmax",
    "causal_softmax": "kernels.softmax",
    "layer_norm": "kernels.layernorm",
    "add_layer_norm": "kernels.layernorm",
    "rms_norm": "kernels.layernorm",
    "cross_entropy": "kernels.cross_entropy",
    "linear_cross_entropy": "kernels.cross_entropy",
}

__all__ = list(_OPS)


def __getattr__(name):
    if name not in _OPS:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}; it has {', '.join(_OPS)}")
    return getattr(importlib.import_module(_OPS[name]), name)


def __dir__():
    return sorted([*globals(), *_OPS])


class _Package(types.ModuleType):
    """Importing the file kernels/softmax.py would bind the module to the name of the function it defines."""

    def __setattr__(self, name, value):
        if name in _OPS and isinstance(value, types.ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
