"""Stock checkpoints with heads for classification and question answering: converted, verified, and back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_checkpoints import SIZES, all_tensors, edit_config, rewrite
from toy_heads import ANSWER, SEQUENCE, TASKS, TOKEN, write_headed
from toy_layouts import write_published_fat5
from transformers import AutoModelForSequenceClassification, T5EncoderModel

import fat5.model
from fat5.model import FlashT5Config, FlashT5ForSequenceClassification, FlashT5Model, heads_flash_t5
from fat5convert.convert import convert
from fat5convert.errors import ConvertError, DifferenceError
from fat5convert.export import export
from fat5convert.verify import verify


def inputs() -> dict[str, torch.Tensor]:
    """Rows of odd lengths, padded on the right, each with two end-of-sequence tokens, the last behind the text."""
    ids, mask = torch.randint(2, 120, (3, 41)), torch.zeros(3, 41, dtype=torch.int64)
    for row, length in enumerate((41, 17, 3)):
        mask[row, :length] = 1
        ids[row, [0, length - 1]] = 1
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def outputs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        output = model(**batch)
    if hasattr(output, "start_logits"):
        return torch.stack([output.start_logits, output.end_logits], -1)[batch["attention_mask"] == 1]
    return output.logits if output.logits.ndim == 2 else output.logits[batch["attention_mask"] == 1]


CASES = [
    *(("t5-v1.1", task) for task in TASKS),
    ("umt5", SEQUENCE),
    ("mt5", ANSWER),
    *(
        pytest.param(family, task, marks=pytest.mark.slow)
        for family in ("t5-v1.0", "mt5", "umt5")
        for task in TASKS
        if (family, task) not in {("umt5", SEQUENCE), ("mt5", ANSWER)}
    ),
]


@pytest.mark.parametrize(("family", "task"), CASES)
def test_there_and_back(family: str, task: str, tmp_path: Path) -> None:
    stock = write_headed(tmp_path / "source", task, family)
    report = convert(str(tmp_path / "source"), tmp_path / "out")
    assert report.parity is not None
    assert report.parity["models"]["compared"].startswith("logits of ")
    assert all(r["logits_error"] <= r["bound"] for r in report.parity["models"]["implementations"])
    assert not report.conversion["leftovers"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [f"FlashT5For{task}"]
    assert config["head_reads_decoder"] is (task != TOKEN)
    assert config["auto_map"][f"AutoModelFor{task}"].endswith(f".FlashT5For{task}")
    assert "AutoModelForSeq2SeqLM" not in config["auto_map"]
    assert not (tmp_path / "out" / "generation_config.json").exists()
    if task != ANSWER:
        assert config["id2label"] == {"0": "no", "1": "yes", "2": "perhaps"}

    ours = getattr(fat5.model, f"FlashT5For{task}").from_pretrained(tmp_path / "out", attn_implementation="eager")
    batch = inputs()
    expected = outputs(stock, batch)
    assert (outputs(ours.eval(), batch) - expected).abs().max() <= 1e-5 * expected.abs().max()

    export(tmp_path / "out", tmp_path / "t5")
    before, after = all_tensors(tmp_path / "source"), all_tensors(tmp_path / "t5")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor.view(torch.int32), before[name].view(torch.int32)) for name, tensor in after.items())
    back = type(stock).from_pretrained(tmp_path / "t5", attn_implementation="eager").eval()
    assert torch.equal(outputs(back, batch), expected)
    assert back.config.id2label == stock.config.id2label


def test_the_auto_class_loads_it(tmp_path: Path) -> None:
    stock = write_headed(tmp_path / "source", SEQUENCE)
    convert(str(tmp_path / "source"), tmp_path / "out", verify=False)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", trust_remote_code=True, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    batch = inputs()
    expected = outputs(stock, batch)
    assert (outputs(loaded.eval(), batch) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert FlashT5Model.from_pretrained(tmp_path / "out").decoder is not None


def test_aliases_behind_the_prefix(tmp_path: Path) -> None:
    write_headed(tmp_path / "source", SEQUENCE)
    tensors = all_tensors(tmp_path / "source")
    aliases = [f"transformer.{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")]
    (tmp_path / "source" / "model.safetensors").unlink()
    torch.save(
        tensors | dict.fromkeys(aliases, tensors["transformer.shared.weight"]), tmp_path / "source/pytorch_model.bin"
    )
    report = convert(str(tmp_path / "source"), tmp_path / "out", verify=False)
    assert sorted(report.conversion["leftovers"]) == sorted(aliases)
    assert verify(tmp_path / "out", str(tmp_path / "source"))["result"] == "same"


@pytest.mark.parametrize("task", [SEQUENCE, ANSWER])
def test_float16_is_rescaled_under_a_head(task: str, tmp_path: Path) -> None:
    """The stream shrinks, the decoder's last norm does not make up for it: there is no tied head."""
    write_headed(tmp_path / "source", task)

    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(("shared.weight", "Attention.o.weight", "DenseReluDense.wo.weight")):
                tensor.mul_(2**14)

    rewrite(tmp_path / "source", enlarge)
    report = convert(str(tmp_path / "source"), tmp_path / "out", dtype="float16")
    assert report.plan.rescaling.residual > 0
    assert report.parity is not None
    assert report.parity["models"]["in_own_dtype"]["finite"]
    export(tmp_path / "out", tmp_path / "t5")
    before, after = all_tensors(tmp_path / "source"), all_tensors(tmp_path / "t5")
    for name, tensor in after.items():
        assert torch.allclose(tensor, before[name], rtol=2**-10, atol=2**-24 * 2**14), name


def test_verification_compares_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_headed(tmp_path / "source", SEQUENCE)
    load = FlashT5ForSequenceClassification.from_pretrained

    def load_with_an_error(*args: object, **kwargs: object) -> torch.nn.Module:
        model = load(*args, **kwargs)
        with torch.no_grad():
            model.classification_head.out_proj.bias[0] += 0.1
        return model

    monkeypatch.setattr(FlashT5ForSequenceClassification, "from_pretrained", load_with_an_error)
    with pytest.raises(DifferenceError, match="eager: logits_error"):
        convert(str(tmp_path / "source"), tmp_path / "out")


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        (TOKEN, {"architectures": ["T5ForQuestionAnswering"]}, "contradicts the file, which has classifier.weight"),
        (SEQUENCE, {"id2label": {"0": "a", "2": "b"}}, "numbered from 0"),
        (
            SEQUENCE,
            {"id2label": {"0": "a", "1": "b"}},
            r"out_proj.weight in model.safetensors has shape \[3, 32\], the config asks for \[2, 32\]",
        ),
        (SEQUENCE, {"id2label": ["a"]}, "id2label"),
        (SEQUENCE, {"label2id": {"no": "0"}}, "label2id"),
        (SEQUENCE, {"problem_type": "poetry"}, "problem_type"),
        (SEQUENCE, {"eos_token_id": [1, 2]}, "eos_token_id must be one token id"),
        (ANSWER, {"num_labels": 3}, "two outputs"),
        (ANSWER, {"num_labels": "two"}, "num_labels"),
    ],
)
def test_configs_that_do_not_fit_the_head(task: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_headed(tmp_path / "source", task)
    edit_config(tmp_path / "source", **changes)
    with pytest.raises(ConvertError, match=message):
        convert(str(tmp_path / "source"), tmp_path / "out")


def test_tensors_that_do_not_fit_the_head(tmp_path: Path) -> None:
    write_headed(tmp_path / "source", SEQUENCE)
    whole = load_file(tmp_path / "source" / "model.safetensors")

    def refused(tensors: dict[str, torch.Tensor], message: str) -> None:
        save_file(tensors, tmp_path / "source" / "model.safetensors")
        with pytest.raises(ConvertError, match=message):
            convert(str(tmp_path / "source"), tmp_path / "out")

    refused(whole | {"adapter.weight": torch.zeros(3)}, "unknown tensor.*adapter.weight")
    refused({n: t for n, t in whole.items() if "dense" not in n}, "missing tensor.*classification_head.dense.weight")
    no_decoder = {n: t for n, t in whole.items() if "decoder" not in n}
    refused(no_decoder, "missing tensor.*transformer.decoder")
    edit_config(tmp_path / "source", architectures=None)
    refused(no_decoder, "missing tensor.*transformer.decoder")


def write_published_head(folder: Path, stock: Path, task: str, **changes: Any) -> dict[str, torch.Tensor]:
    """A published FAT5 with a head on the encoder, as its classes save it, and the tensors of the head."""
    architecture = [f"FlashT5For{task}"]
    labels = {} if task == ANSWER else {"id2label": {"0": "no", "1": "yes", "2": "perhaps"}}
    source = write_published_fat5(folder, stock, architectures=architecture, **labels, **changes)
    shapes = {
        SEQUENCE: {"classification_head.dense": (32, 32), "classification_head.out_proj": (3, 32)},
        TOKEN: {"classifier": (3, 32)},
        ANSWER: {"qa_outputs": (2, 32)},
    }[task]
    generator = torch.Generator().manual_seed(3)
    head = {}
    for name, shape in shapes.items():
        head[f"{name}.weight"] = torch.randn(shape, generator=generator)
        head[f"{name}.bias"] = torch.randn(shape[0], generator=generator)

    def replace(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(("decoder.", "lm_head."))]:
            del tensors[name]
        tensors.update(head)

    rewrite(source, replace)
    return head


def published_by_formula(task: str, states: torch.Tensor, batch: dict[str, torch.Tensor], head: Any) -> torch.Tensor:
    """What the published head makes of the encoder's states `[B, L, D]`."""
    if task == SEQUENCE:
        last = batch["attention_mask"].sum(1) - 1
        inner = torch.tanh(states[range(3), last] @ head[f"{HEAD}.dense.weight"].T + head[f"{HEAD}.dense.bias"])
        return inner @ head[f"{HEAD}.out_proj.weight"].T + head[f"{HEAD}.out_proj.bias"]
    name = "classifier" if task == TOKEN else "qa_outputs"
    return (states @ head[f"{name}.weight"].T + head[f"{name}.bias"])[batch["attention_mask"] == 1]


HEAD = "classification_head"


@pytest.mark.parametrize("task", TASKS)
def test_published_heads_read_the_encoder(task: str, originals: dict[str, Path], tmp_path: Path) -> None:
    """There and, since stock T5 has no such models, not back; only that for tokens is stock's as well."""
    head = write_published_head(tmp_path / "source", originals["t5-v1.1"], task)
    report = convert(str(tmp_path / "source"), tmp_path / "out")
    assert report.parity is not None
    assert [r["logits_error"] <= r["bound"] for r in report.parity["models"]["implementations"]] == [True, True]
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["head_reads_decoder"]
    assert verify(tmp_path / "out", str(tmp_path / "source"))["result"] == "same"

    batch = inputs()
    stock = T5EncoderModel.from_pretrained(originals["t5-v1.1"], attn_implementation="eager").eval()
    with torch.no_grad():
        states = stock(**batch).last_hidden_state
    expected = published_by_formula(task, states, batch, head)
    ours = getattr(fat5.model, f"FlashT5For{task}").from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert (outputs(ours.eval(), batch) - expected).abs().max() <= 1e-5 * expected.abs().max()
    if task == TOKEN:
        export(tmp_path / "out", tmp_path / "t5")
    else:
        with pytest.raises(ConvertError, match="reads the encoder, and that of stock T5 the decoder"):
            export(tmp_path / "out", tmp_path / "t5")


def test_a_published_head_with_other_positions(originals: dict[str, Path], tmp_path: Path) -> None:
    write_published_head(tmp_path / "source", originals["t5-v1.1"], ANSWER, position_encoding_type="ALiBi")
    report = convert(str(tmp_path / "source"), tmp_path / "out")
    assert report.parity is not None
    assert report.plan.recognised.layout.positions == "ALiBi"


def test_the_oracle_of_a_published_head_is_not_ours(
    originals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_published_head(tmp_path / "source", originals["t5-v1.1"], SEQUENCE)
    monkeypatch.setattr(heads_flash_t5, "last_end_of_sequence", lambda ids, *_: torch.zeros_like(ids[:, 0]))
    with pytest.raises(DifferenceError, match="logits_error"):
        convert(str(tmp_path / "source"), tmp_path / "out")


def test_an_early_published_head_reads_the_decoder(originals: dict[str, Path], tmp_path: Path) -> None:
    """Question answering had a decoder at first, as in stock T5."""
    source = write_published_fat5(tmp_path / "source", originals["t5-v1.1"])

    def replace(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"]
        tensors.update({"qa_outputs.weight": torch.randn(2, 32), "qa_outputs.bias": torch.randn(2)})

    rewrite(source, replace)
    convert(str(source), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["head_reads_decoder"]
    export(tmp_path / "out", tmp_path / "t5")


def test_a_head_on_the_encoder_is_not_exported(tmp_path: Path) -> None:
    """As FAT5 trains it by default; stock T5 has no such model."""
    FlashT5ForSequenceClassification(FlashT5Config(**SIZES, num_labels=3)).save_pretrained(tmp_path / "out")
    with pytest.raises(ConvertError, match="reads the encoder, and that of stock T5 the decoder"):
        export(tmp_path / "out", tmp_path / "t5")
    assert not (tmp_path / "t5").exists()
