"""Run the Triton kernels in Triton's interpreter where there is no GPU.

FAT5_TEST_PART=80 makes a newer GPU run what one of sm_80 would: its configurations, compiled with its instructions.
"""

import os
from collections.abc import Iterator

import pytest
import torch

PART = os.environ.get("FAT5_TEST_PART")
if PART:
    os.environ["TRITON_OVERRIDE_ARCH"] = f"sm{PART}"  # read when a kernel is compiled

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined, so before they are imported

pytest.importorskip("triton")


if os.environ.get("TRITON_INTERPRET") == "1":
    from triton_interpreter import mend

    mend()


@pytest.fixture(scope="session")
def device() -> Iterator[torch.device]:
    """Where the kernels under test run."""
    from fat5.model import ops_device
    from fat5.model.ops_attention import INTERPRETED, kernels_serve

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert kernels_serve(device), "these tests would miss the kernels"
    assert (device.type == "cpu") == INTERPRETED, "the kernels were imported before these tests could set them up"
    with pytest.MonkeyPatch.context() as patch:
        if PART:
            own = ops_device._properties
            patch.setattr(ops_device, "_properties", lambda device: (int(PART), own(device)[1]))
        yield device


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU, the tests of kernels are its tests: `-m gpu` runs them, too."""
    if torch.cuda.is_available():
        for item in items:
            if "device" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.gpu)
