"""Rounding against an independent oracle in numpy, and what the reports say of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_checkpoints import all_tensors, edit_config, rewrite
from transformers import T5ForConditionalGeneration

from fat5.model import FlashT5EncoderModel
from fat5convert.convert import convert
from fat5convert.errors import ConvertError
from fat5convert.export import export
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


def test_auto_is_bfloat16_only_where_that_is_exact(flan: Path, tmp_path: Path) -> None:
    report = convert(str(flan), tmp_path / "kept", dtype="auto", verify=False)
    assert report.plan.dtype == "keep"
    rewrite(flan, lambda t: t.update({name: v.bfloat16().float() for name, v in t.items()}))
    report = convert(str(flan), tmp_path / "halved", dtype="auto")
    assert report.plan.dtype == "bfloat16"
    assert report.parity is not None
    assert report.parity["models"]["rounding"] is None, "nothing was lost"
    before, after = all_tensors(flan), all_tensors(tmp_path / "halved")
    for name, entry in report.conversion["tensors"].items():
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(after[name].float(), before[entry["source"]])
    rewrite(flan, lambda t: t["lm_head.weight"].add_(2**-20))
    assert convert(str(flan), tmp_path / "again", dtype="auto", verify=False).plan.dtype == "keep"


def exceed_float16(tensors: dict[str, torch.Tensor]) -> None:
    """As in T5-XXL: the residual stream and what the feed-forward layers compute inside exceed 65504."""
    for name, tensor in tensors.items():
        if name.endswith(("wo.weight", "Attention.o.weight")):
            tensor.mul_(30)
        if name.endswith(("wi.weight", "wi_1.weight")):
            tensor.mul_(3000)


@pytest.mark.parametrize("family", ["t5-v1.0", "t5-v1.1", "umt5"])
def test_float16_is_rescaled_exactly(family: str, originals: dict[str, Path], tmp_path: Path) -> None:
    """Each weight is its source times a power of two, rounded once; the model computes what the source does."""
    source = Path(shutil.copytree(originals[family], tmp_path / "source"))
    rewrite(source, exceed_float16)
    report = convert(str(source), tmp_path / "out", dtype="float16")
    k = report.plan.rescaling.residual
    assert k > 3
    assert len(report.plan.rescaling.inner) == 5, "every feed-forward layer of the toy"
    before, after = all_tensors(source), all_tensors(tmp_path / "out")
    for name, entry in report.conversion["tensors"].items():
        exponent = entry.get("exponent", 0)
        expected = (before[entry["source"]].double().numpy() * 2.0**exponent).astype(np.float16)
        assert (after[name].numpy() == expected).all(), name
        assert np.isfinite(expected).all()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_norm_epsilon"] == 1e-6 * 2.0 ** (-2 * k)

    assert report.parity is not None
    figures = report.parity["models"]
    assert figures["implementations"][0]["logits_error"] <= 1e-5
    assert figures["in_own_dtype"]["finite"] is True
    for quantiles in (figures["rounding"]["quantiles"], figures["in_own_dtype"]["quantiles"]):
        assert list(quantiles) == ["50", "90", "99", "99.9", "99.99"]
        assert list(quantiles.values()) == sorted(quantiles.values())
        assert 0 < quantiles["99.99"] < 0.1
    assert verify(tmp_path / "out", str(source))["result"] == "same"

    # And back: the scale is undone, so that what stock loads is the source, rounded.
    export(tmp_path / "out", tmp_path / "t5")
    back = all_tensors(tmp_path / "t5")
    for name, entry in report.conversion["tensors"].items():
        tensor, exponent = before[entry["source"]], entry.get("exponent", 0)
        assert torch.equal(back[entry["source"]], (tensor * 2.0**exponent).half().float() * 2.0**-exponent), name
    assert json.loads((tmp_path / "t5" / "config.json").read_text())["layer_norm_epsilon"] == 1e-6


def test_without_rescaling_it_would_overflow(originals: dict[str, Path], tmp_path: Path) -> None:
    """What the rescaling is for: the same weights in float16, unscaled, give infinities in the residual stream."""
    source = Path(shutil.copytree(originals["t5-v1.1"], tmp_path / "source"))
    rewrite(source, exceed_float16)
    model = T5ForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        states = model.encoder(torch.arange(2, 42)[None], output_hidden_states=True).hidden_states
    assert max(float(state.abs().max()) for state in states) > 65504
    out = convert(str(source), tmp_path / "out", dtype="float16", verify=False).plan
    ours = FlashT5EncoderModel.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        states = ours(torch.arange(2, 42)[None], output_hidden_states=True).hidden_states
    assert max(float(state.abs().max()) for state in states) < 65504 / 4
    assert out.rescaling.residual


def test_float16_within_range_is_left_alone(flan: Path, tmp_path: Path) -> None:
    report = convert(str(flan), tmp_path / "out", dtype="float16")
    assert report.conversion["rescaling"] == {"residual": 0, "inner": {}}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["layer_norm_epsilon"] == 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].mul_(1e6), r"wi_0.*no rescaling"),
        (lambda t: t["encoder.block.0.layer.0.SelfAttention.q.weight"].mul_(1e5), r"SelfAttention.*no rescaling"),
        (lambda t: t["lm_head.weight"].mul_(1e5), r"lm_head.*no rescaling"),
        (lambda t: t["shared.weight"].mul_(float("nan")), "not finite"),
    ],
)
def test_float16_that_cannot_be_made_safe(change: Any, message: str, flan: Path, tmp_path: Path) -> None:
    rewrite(flan, change)
    with pytest.raises(ConvertError, match=message):
        convert(str(flan), tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_float16_refuses_a_plain_gelu(originals: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(originals["t5-v1.0"], tmp_path / "source"))
    edit_config(source, feed_forward_proj="gelu", dense_act_fn="gelu")
    convert(str(source), tmp_path / "fits", dtype="float16", verify=False)
    rewrite(source, exceed_float16)
    with pytest.raises(ConvertError, match="gelu cannot be rescaled exactly"):
        convert(str(source), tmp_path / "out", dtype="float16")


def test_values_lost_to_subnormals_are_counted() -> None:
    form, meter = Form(torch.float16, -8), ErrorMeter()
    before = torch.tensor([1.0, 2.0**-14 * 1.5, 2.0**-20, 3.0 * 2.0**-17, 2.0**-13 * (1 + 2**-10)])
    after = form.apply(before)
    meter.add(before, form.undo(after))
    error = meter.result()
    assert error.underflows == 1, "2**-28 is below half of the smallest subnormal"
    assert error.max_relative == pytest.approx(1 / 3, rel=1e-3), "1.5 * 2**-24 becomes 2**-23"
