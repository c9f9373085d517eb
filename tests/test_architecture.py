"""Imports run one way, nothing touches a GPU or Triton on import, and gptlib works where Triton does not exist."""

import ast
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kernels

ROOT = Path(__file__).parents[1]
OURS = ("tests", "bench", "gptlib", "kernels")
MAY_IMPORT = {
    "tests": {"tests", "bench", "gptlib", "kernels"},
    "bench": {"bench", "gptlib", "kernels"},
    "gptlib": {"gptlib"},
    "kernels": {"kernels"},
}
SOURCES = [p for package in ("bench", "gptlib", "kernels") for p in sorted((ROOT / package).rglob("*.py"))]


def imports(path):
    """(imported module, whether at import time of the file) of every import statement."""
    tree = ast.parse(path.read_text())
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.Lambda) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module, id(node) not in inside
            # `from kernels import softmax` may name a module
            yield from ((f"{node.module}.{alias.name}", id(node) not in inside) for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    backends = path == ROOT / "gptlib" / "backends.py"
    for module, at_import in imports(path):
        top = module.split(".")[0]
        if top in OURS:
            allowed = top in MAY_IMPORT[package] or (backends and top == "kernels" and not at_import)
            assert allowed, f"{module} is imported"
        if package in ("gptlib", "bench") and at_import:
            assert top not in ("triton", "kernels"), f"{module} is imported at import time"
        if package == "kernels":
            assert top in (*sys.stdlib_module_names, "torch", "triton", "kernels"), f"{module} is imported"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_op_imports_another(path):
    ops = {"attention", "softmax", "layernorm", "cross_entropy"}
    parts = path.relative_to(ROOT / "kernels").with_suffix("").parts
    for module, _ in imports(path):
        names = module.split(".")
        if names[0] == "kernels" and len(names) > 1 and names[1] in ops:
            assert names[1] == parts[0], f"{module} is imported"


def test_kernels_is_ours():
    assert Path(kernels.__file__) == ROOT / "kernels" / "__init__.py"


def run_python(code, tmp_path, **environment):
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment = {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_anything_imports_no_triton_and_asks_no_gpu(tmp_path):
    run_python(
        """
import importlib, pkgutil, sys
import torch
def refuse(*args, **kwargs):
    raise AssertionError("a GPU was queried at import time")
for name in ("is_available", "device_count", "get_device_name", "get_device_capability", "current_device", "init"):
    setattr(torch.cuda, name, refuse)
import bench, gptlib, kernels
for package in (gptlib, bench):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
assert "triton" not in sys.modules, "triton was imported"
assert not any(name.startswith("kernels.") for name in sys.modules), "an op was imported"
""",
        tmp_path,
    )


def test_gptlib_trains_and_samples_without_triton(tmp_path):
    out = run_python(
        """
import importlib.abc, pathlib, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Blocked())
from gptlib import generate, train
pathlib.Path("text.txt").write_text("".join(f"line {i} of a text\\n" for i in range(300)))
shape = "--data text.txt --tokenizer bytes --n-layers 1 --emb-dim 16 --n-heads 2 --context-length 16 --steps 2".split()
for attn, norm in (("reference", "reference"), ("sdpa", "torch")):
    assert train.main([*shape, "--device", "cpu", "--attn", attn, "--norm", norm]) == 0
assert generate.main(["--run", "runs/tiny-sdpa", "--prompt", "line", "--device", "cpu", "--max-new-tokens", "3"]) == 0
assert "triton" not in sys.modules
sys.stderr = sys.stdout
for flags in (["--attn", "triton"], ["--attn", "triton-softmax"], ["--norm", "triton"], ["--loss", "triton"]):
    assert train.main([*shape, "--device", "cpu", *flags]) == 2
""",
        tmp_path,
    )
    errors = [line for line in out.splitlines() if line.startswith("error")]
    assert len(errors) == 4 and all("triton cannot be imported" in e and "--attn sdpa" in e for e in errors)


def release(package):
    """(3, 6) of an installed package."""
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])


@pytest.mark.deep
@pytest.mark.skipif(
    release("triton") == (3, 6) and release("numpy") >= (2, 4), reason="Triton 3.6's interpreter needs NumPy below 2.4"
)
@pytest.mark.parametrize("early", [False, True])
def test_the_interpreter_is_chosen_before_torch_imports_triton(tmp_path, early):
    """torch imports Triton when it makes an AdamW: the trainer has chosen the interpreter by then, or repairs it."""
    run_python(
        f"""
import pathlib, torch
if {early}:
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
from gptlib import train
pathlib.Path("text.txt").write_text("".join(f"line {{i}} of a text\\n" for i in range(300)))
shape = "--data text.txt --tokenizer bytes --n-layers 1 --emb-dim 16 --n-heads 2 --context-length 16 --steps 2".split()
assert train.main([*shape, "--device", "cpu", "--attn", "triton", "--norm", "triton", "--eval-windows", "2"]) == 0
""",
        tmp_path,
    )


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=str)
def test_no_compiled_function_has_a_text_as_default(path):
    """Triton 3.6 cannot compile one: it sees the text itself where later versions see a constant."""
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in function.decorator_list):
            texts = [
                d.value for d in function.args.defaults if isinstance(d, ast.Constant) and isinstance(d.value, str)
            ]
            assert not texts, f"{path.name}: {function.name} has the default {texts[0]!r}"
