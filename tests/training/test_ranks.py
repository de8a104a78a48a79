"""A rank as a process, before it meets the others."""

import subprocess
import sys
from pathlib import Path

import pytest

import pretrain

SLOW_TO_IMPORT = ("numpy", "pydantic", "omegaconf", "torch")


@pytest.mark.parametrize("module", ["pretrain.training.__main__", "pretrain.evaluation.__main__"])
def test_a_signal_in_the_first_moment_finds_its_handler_since_nothing_slow_is_imported_before(module):
    code = f"import sys, {module}; print(*[name for name in {SLOW_TO_IMPORT} if name in sys.modules])"
    root = Path(pretrain.__file__).parents[1]
    ended = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == []
