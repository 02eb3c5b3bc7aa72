"""A Triton in which the kernels cannot be defined turns them off, but not in silence."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys, warnings
import torch
torch.version.cuda = "13.0"
sys.modules["triton.experimental.gluon"] = None  # as in releases before it
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from fat5.model import ops_attention
assert not ops_attention.HAS_KERNELS
print([str(x.message) for x in caught if "kernels of FAT5 are off" in str(x.message)])
"""


@pytest.mark.slow
def test_kernels_that_are_off_are_told_of():
    pytest.importorskip("triton")
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert result.stdout.count("kernels of FAT5 are off") == 1, result.stdout
    assert "gluon" in result.stdout
