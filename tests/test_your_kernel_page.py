"""docs/your_kernel.md does what it says: its kernel passes its own tests, and its commands run."""

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptlib import reference
from tests.oracle import assert_matches

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "your_kernel.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
NEEDED = ["bench", "docs", "gptlib", "kernels", "tests", "README.md", "pyproject.toml"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project with the page's kernel saved where it says."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in NEEDED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    (kernel,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (folder / "my_kernel.py").write_text(kernel)
    return folder


def run(command, folder):
    words = shlex.split(command)
    assert words[0] == "python"
    done = subprocess.run([sys.executable, *words[1:]], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_page_has_a_command_for_every_step():
    assert [line.split()[1:3] for line in COMMANDS] == [
        ["-m", "pytest"],
        ["bench/attention.py", "--seq"],
        ["-m", "gptlib.train"],
        ["bench/train.py", "--n-layers"],
    ]
    assert all("my_kernel:attend" in line for line in COMMANDS)


def test_its_kernel_is_right(checkout, device):
    attend = runpy.run_path(str(checkout / "my_kernel.py"))["attend"]
    q, k, v = (torch.randn(1, 70, 2, 32, device=device).transpose(1, 2) for _ in range(3))
    ref = reference.causal_attention(q.double(), k.double(), v.double())
    assert_matches("out", attend(q, k, v), ref, reference.causal_attention(q, k, v))


@pytest.mark.deep
def test_its_kernel_passes_the_tests(checkout):
    printed = run(COMMANDS[0] + " -q -p no:cacheprovider", checkout)
    assert re.search(r"\d+ passed", printed) and "failed" not in printed


@pytest.mark.deep
def test_a_mistake_in_it_is_found(checkout):
    broken = (checkout / "my_kernel.py").read_text().replace("rows[:, None] >= cols[None, :]", "rows[:, None] >= 0")
    (checkout / "broken_kernel.py").write_text(broken)
    command = COMMANDS[0].replace("my_kernel", "broken_kernel") + " -q -p no:cacheprovider"
    with pytest.raises(AssertionError, match="test_the_future_is_not_seen"):
        run(command, checkout)


@pytest.mark.deep
@pytest.mark.parametrize("command", COMMANDS[1:], ids=lambda c: " ".join(c.split()[1:3]))
def test_its_commands_run(command, checkout):
    printed = run(command, checkout)
    assert "my_kernel:attend" in printed
    assert "wrong" not in printed and "failed" not in printed
