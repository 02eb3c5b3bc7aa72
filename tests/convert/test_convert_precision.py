"""Rounding against an independent oracle in numpy, and what the reports say of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_checkpoints import all_tensors, rewrite

from fat5convert.convert import convert
from fat5convert.inspection import inspect_model
from fat5convert.precision import ErrorMeter, Form, RoundingError, is_bfloat16_exact
from fat5convert.verify import verify


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Nearest, ties to even, on the bits of fp32: add half of the last kept place, less one where that is even."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return (rounded.astype(np.uint32) << 16).view(np.float32)


def test_rounds_to_nearest_even() -> None:
    random = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    random = random[np.isfinite(random)]
    half_way = (np.arange(0x3F80, 0x3FA0, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    extremes = np.array([3.4e38, -3.4e38, 1e-45, 1e-40, 0.0, -0.0], dtype=np.float32)
    values = np.concatenate([random, half_way, extremes])
    ours = Form(torch.bfloat16).apply(torch.from_numpy(values)).float().numpy()
    assert (ours.view(np.uint32) == round_to_bfloat16(values).view(np.uint32)).all()


def measure(before: torch.Tensor) -> RoundingError:
    """In two pieces, as files are read."""
    meter = ErrorMeter()
    for piece in before.split(len(before) // 2):
        meter.add(piece, piece.bfloat16())
    return meter.result()


def test_error_report() -> None:
    before = torch.tensor([1.0, 1.0 + 2**-9, -3.0, 3.4e38, 1e-45, 0.0])
    error = measure(before)
    assert (error.overflows, error.underflows) == (1, 1)
    assert error.max_relative == pytest.approx(2**-9 / (1 + 2**-9))
    values = torch.randn(10_000)
    rounded = round_to_bfloat16(values.numpy()).astype(np.float64)
    error = measure(values)
    exact = values.double().numpy()
    assert error.max_relative == pytest.approx((abs(rounded - exact) / abs(exact)).max())
    assert error.rms_relative == pytest.approx(np.sqrt(((rounded - exact) ** 2).sum() / (exact**2).sum()))


def exact(tensor: torch.Tensor) -> bool:
    return is_bfloat16_exact(tensor.split(3))


def test_exactness() -> None:
    values = torch.randn(100).bfloat16()
    assert exact(values)
    assert exact(values.float())
    assert exact(torch.tensor([1.0, float("nan"), float("inf")]))
    assert not exact(values.float() * (1 + 2**-20))
    assert not exact(torch.tensor([1 + 2**-10], dtype=torch.float16))


def test_bfloat16_conversion(flan: Path, tmp_path: Path) -> None:
    report = convert(str(flan), tmp_path / "out", dtype="bfloat16")
    before = all_tensors(flan)
    for name, entry in report.conversion["tensors"].items():
        after = all_tensors(tmp_path / "out")[name]
        assert after.dtype == torch.bfloat16
        assert (after.float().numpy() == round_to_bfloat16(before[entry["source"]].numpy())).all()
        assert report.conversion["rounding"][name]["max_relative"] <= 2**-8
    worst = [error["max_relative"] for error in report.conversion["rounding"].values()]
    assert worst == sorted(worst, reverse=True)
    assert report.parity is not None
    assert report.parity["tensors"]["rounded"] == len(before)
    assert 0 < report.parity["models"]["rounding"]["logits_error"] < 0.2
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert verify(tmp_path / "out", str(flan))["result"] == "same"


def test_float32_of_half_is_exact(flan: Path, tmp_path: Path) -> None:
    rewrite(flan, lambda t: t.update({n: v.bfloat16() for n, v in t.items()}))
    report = convert(str(flan), tmp_path / "out", dtype="float32")
    before, after = all_tensors(flan), all_tensors(tmp_path / "out")
    for name, entry in report.conversion["tensors"].items():
        assert after[name].dtype == torch.float32
        assert torch.equal(after[name].bfloat16(), before[entry["source"]])
        assert report.conversion["rounding"][name]["rms_relative"] == 0
    assert inspect_model(str(flan))["bfloat16_exact"] is True
