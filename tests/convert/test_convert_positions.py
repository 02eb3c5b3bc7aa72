"""Published FAT5 with other positions than T5's: the oracle is stock T5 under biases computed number by number."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy_checkpoints import all_tensors, edit_config, make_model, rewrite, write_checkpoint
from toy_layouts import write_published_fat5

from fat5.model import FlashT5ForConditionalGeneration
from fat5.model.position_fire import FirePositionBias
from fat5convert.convert import convert
from fat5convert.errors import ConvertError, DifferenceError
from fat5convert.export import export
from fat5convert.verify import verify

HEADS, WIDTH = 6, 5
IDS = torch.arange(2, 82).reshape(2, 40)
MASK = torch.ones_like(IDS)
MASK[1, 31:] = 0
LABELS = (IDS + 7).flip(1)[:, :33].contiguous()

Bias = Callable[[int, int], list[float]]


def alibi(i: int, j: int) -> list[float]:
    """Query i, key j; six heads: the slopes of four, then every other one of eight."""
    return [-(2.0**-power) * abs(i - j) for power in (2, 4, 6, 8, 1, 3)]


def one_way_alibi(i: int, j: int) -> list[float]:
    """Three heads look back, three ahead; slopes of two, then the first of four."""
    values = [-(2.0**-power) * abs(i - j) for power in (4, 8, 2)]
    nowhere = [-math.inf] * 3
    return (nowhere if j > i else values) + (nowhere if j < i else values)


def fire(tensors: dict[str, torch.Tensor], stack: str) -> Bias:
    prefix = f"{stack}.block.0.self_attention_layer.self_attention.pe_encoding."
    p = {name.removeprefix(prefix): t.tolist() for name, t in tensors.items() if name.startswith(prefix)}

    def psi(x: float) -> float:
        return math.copysign(math.log(abs(p["c"] * x) + 1), x) if x else 0.0

    def bias(i: int, j: int) -> list[float]:
        x = psi(i - j) / (psi(max(i, abs(p["L_multiplier"] * p["init_L"]))) + 1e-6)
        hidden = [max(0.0, w[0] * x + b) for w, b in zip(p["mlp.0.weight"], p["mlp.0.bias"], strict=True)]
        rows = zip(p["mlp.2.weight"], p["mlp.2.bias"], strict=True)
        return [sum(w * h for w, h in zip(row, hidden, strict=True)) + b for row, b in rows]

    return bias


class Table(torch.nn.Module):
    """Stands where stock T5 looks its buckets up: the bias of every query and key, written out."""

    def __init__(self, bias: Bias) -> None:
        super().__init__()
        self.values = torch.tensor([[bias(i, j) for j in range(40)] for i in range(40)])

    def forward(self, buckets: torch.Tensor) -> torch.Tensor:
        return self.values[: buckets.shape[0], : buckets.shape[1]]


KINDS: dict[str, dict[str, Any]] = {
    "ALiBi": {"position_encoding_type": "ALiBi"},
    "one-way ALiBi": {"position_encoding_type": "ALiBi", "alibi_mode": "asymetric"},
    "FIRE": {"position_encoding_type": "FIRE", "fire_mlp_width": WIDTH, "use_randomized_position_encoding": True},
    "none": {"position_encoding_type": "none"},
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("stock") / "t5", "t5-v1.1", num_heads=HEADS)


@pytest.mark.parametrize("kind", KINDS)
def test_positions_of_the_published_models(kind: str, stock: Path, tmp_path: Path) -> None:
    source = write_published_fat5(tmp_path / "source", stock, attention_scale=None, **KINDS[kind])
    report = convert(str(source), tmp_path / "out")
    assert report.parity is not None
    assert report.parity["models"]["implementations"][0]["greedy_identical"]
    oracle = make_model("t5-v1.1", num_heads=HEADS)
    for stack in ("encoder", "decoder"):
        bias: Bias = {"ALiBi": alibi, "one-way ALiBi": one_way_alibi, "none": lambda i, j: [0.0] * HEADS}.get(
            kind
        ) or fire(load_file(source / "model.safetensors"), stack)
        getattr(oracle, stack).block[0].layer[0].SelfAttention.relative_attention_bias = Table(bias)
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if name.endswith("Attention.q.weight"):
                parameter.mul_(HEADS**-0.5)
        expected = oracle(input_ids=IDS, attention_mask=MASK, labels=LABELS).logits
    for implementation, bound in (("eager", 1e-5), ("sdpa", 1e-4)):
        ours = FlashT5ForConditionalGeneration.from_pretrained(tmp_path / "out", attn_implementation=implementation)
        with torch.no_grad():
            got = ours.eval()(input_ids=IDS, attention_mask=MASK, labels=LABELS).logits
        assert (got - expected).abs().max() <= bound * expected.abs().max()
    with pytest.raises(ConvertError, match="stock T5 has no positions of type"):
        export(tmp_path / "out", tmp_path / "t5")


def test_the_length_of_fire_is_kept(stock: Path, tmp_path: Path) -> None:
    """In the file it is an integer; no model computes in those."""
    source = write_published_fat5(tmp_path / "source", stock, **KINDS["FIRE"])
    convert(str(source), tmp_path / "out", verify=False)
    assert verify(tmp_path / "out", str(source))["result"] == "same"
    lengths = {name: t for name, t in all_tensors(tmp_path / "out").items() if name.endswith("init_L")}
    assert len(lengths) == 2
    assert all(t.dtype == torch.float32 and t == 20 for t in lengths.values())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["fire_mlp_width"] == WIDTH


def test_the_oracle_does_not_share_our_formula(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_published_fat5(tmp_path / "source", stock, **KINDS["FIRE"])
    monkeypatch.setattr(FirePositionBias, "eps", 0.5)
    with pytest.raises(DifferenceError, match="logits_error"):
        convert(str(source), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_encoding_type": "RoPE"}, "'RoPE' does not convert: the published model turns values"),
        ({"position_encoding_type": "alibi"}, "'alibi' is none of .*write 'none'"),
        ({"position_encoding_type": 3}, "3 is none of"),
        ({"position_encoding_type": "ALiBi", "alibi_mode": "sideways"}, "alibi_mode"),
        ({"position_encoding_type": "ALiBi", "use_randomized_position_encoding": True}, "Set it to false"),
        ({"position_encoding_type": "t5", "use_randomized_position_encoding": "yes"}, "must be true or false"),
        (
            {"position_encoding_type": "FIRE", "fire_mlp_width": WIDTH + 1},
            "mlp.0.weight in model.safetensors has shape",
        ),
        ({"position_encoding_type": "FIRE", "fire_mlp_width": 0}, "fire_mlp_width"),
        ({"position_encoding_type": "t5"}, "missing tensor.*relative_attention_bias"),
    ],
)
def test_positions_that_do_not_convert(changes: dict[str, Any], message: str, stock: Path, tmp_path: Path) -> None:
    source = write_published_fat5(tmp_path / "source", stock, **KINDS["FIRE"])
    edit_config(source, **({"use_randomized_position_encoding": None} | changes))
    with pytest.raises(ConvertError, match=message):
        convert(str(source), tmp_path / "out")


def test_randomised_positions_are_drawn_in_training_and_told_of(originals: dict[str, Path], tmp_path: Path) -> None:
    """The published model draws in every call, so the comparison is at 0, 1, 2, ..., as the decisions say."""
    fields = {"use_randomized_position_encoding": True, "max_sequence_length": 77, "dropout_rate": 0.0}
    source = write_published_fat5(tmp_path / "source", originals["t5-v1.1"], **fields)
    report = convert(str(source), tmp_path / "out")
    assert "drawn at random" in report.plan.recognised.decisions()["positions"]["reason"]
    model = FlashT5ForConditionalGeneration.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert (model.config.use_randomized_position_encoding, model.config.max_sequence_length) == (True, 77)
    with torch.no_grad():
        model.eval()
        assert torch.equal(*(model(input_ids=IDS, labels=LABELS).logits for _ in range(2)))
        model.train()
        assert not torch.equal(*(model(input_ids=IDS, labels=LABELS).loss for _ in range(2)))


def test_one_way_alibi_needs_an_even_number_of_heads(originals: dict[str, Path], tmp_path: Path) -> None:
    source = write_published_fat5(tmp_path / "source", originals["t5-v1.1"], **KINDS["one-way ALiBi"])
    with pytest.raises(ConvertError, match="even `num_heads`"):
        convert(str(source), tmp_path / "out")


def test_integers_elsewhere_are_refused(stock: Path, tmp_path: Path) -> None:
    source = write_published_fat5(tmp_path / "source", stock, **KINDS["FIRE"])
    name = "encoder.block.0.self_attention_layer.self_attention.pe_encoding.c"
    rewrite(source, lambda t: t.update({name: torch.tensor(1)}))
    with pytest.raises(ConvertError, match=r"pe_encoding\.c is int64"):
        convert(str(source), tmp_path / "out")


def test_a_trained_fat5_is_not_taken_for_a_published_one(stock: Path, tmp_path: Path) -> None:
    """Randomised positions are a field of both."""
    convert(str(stock), tmp_path / "out", verify=False)
    edit_config(tmp_path / "out", use_randomized_position_encoding=True)
    with pytest.raises(ConvertError, match="FAT5 model already"):
        convert(str(tmp_path / "out"), tmp_path / "again")
