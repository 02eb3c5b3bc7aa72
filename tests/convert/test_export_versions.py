"""Exports as others read them: both lines of transformers, and CTranslate2's own converter."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from toy_checkpoints import FAMILIES, make_model, write_checkpoint
from toy_heads import TASKS, write_headed
from toy_layouts import make_encoder
from transformers import GenerationConfig, PreTrainedTokenizerFast

from fat5convert.convert import convert
from fat5convert.export import export

pytestmark = pytest.mark.versions

IDS = torch.arange(2, 62).reshape(2, 30)


def install(folder: Path, *requirements: str) -> str:
    """`PYTHONPATH` of an environment with other packages before ours."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), *requirements]
    subprocess.run(pip, check=True)
    return str(folder)


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    # with `datasets`, which Trainer imports where it finds it and which must fit the same huggingface_hub
    old = install(tmp_path_factory.mktemp("transformers_4.57"), "transformers==4.57.*", "datasets")
    return {"4.57": old, "5": ""}


LOAD = """
import sys, torch, transformers
folder, release, name, result = sys.argv[1:]
assert transformers.__version__.startswith(release), transformers.__version__
model = getattr(transformers, name).from_pretrained(folder, attn_implementation="eager").eval()
ids = torch.arange(2, 62).reshape(2, 30)
with torch.no_grad():
    if name.endswith("EncoderModel"):
        values = model(input_ids=ids).last_hidden_state
    else:
        values = model(input_ids=ids, decoder_input_ids=ids[:, :9]).logits
torch.save(values, result)
"""


def run(script: str, *arguments: object, path: str, folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def expected(family: str, model: Any) -> torch.Tensor:
    """What the source computes; umT5 under the unscaled head it was trained with."""
    with torch.no_grad():
        if family.endswith("encoder"):
            return model(input_ids=IDS).last_hidden_state
        output = model(input_ids=IDS, decoder_input_ids=IDS[:, :9], output_hidden_states=True)
        return model.lm_head(output.decoder_hidden_states[-1]) if family == "umt5" else output.logits


@pytest.mark.parametrize("dialect", [None, 4, 5])
@pytest.mark.parametrize("family", [*FAMILIES, "t5-encoder", "umt5-encoder"])
def test_both_lines_of_transformers_agree_with_the_source(
    family: str, dialect: int | None, releases: dict[str, str], tmp_path: Path
) -> None:
    if family.endswith("encoder"):
        model = make_encoder(family.removesuffix("-encoder"))
        model.save_pretrained(tmp_path / "source")
    else:
        model = make_model(family)
        write_checkpoint(tmp_path / "source", family)
    convert(str(tmp_path / "source"), tmp_path / "out", verify=False)
    export(tmp_path / "out", tmp_path / "t5", transformers=dialect)
    values = expected(family, model)
    for release, path in releases.items():
        name = json.loads((tmp_path / "t5" / "config.json").read_text())["architectures"][0]
        run(LOAD, tmp_path / "t5", release, name, tmp_path / "values.pt", path=path, folder=tmp_path)
        got = torch.load(tmp_path / "values.pt")
        # Stock umT5 in transformers 5 scales its logits: agreement is up to that factor, and the export says so.
        factor = model.config.d_model**-0.5 if family == "umt5" and release == "5" else 1.0
        assert (got - factor * values).abs().max() <= 1e-5 * factor * values.abs().max(), release


LOAD_HEAD = """
import sys, torch, transformers
folder, release, name, result = sys.argv[1:]
assert transformers.__version__.startswith(release), transformers.__version__
model, info = getattr(transformers, name).from_pretrained(
    folder, attn_implementation="eager", output_loading_info=True
)
assert not info["missing_keys"], info
with torch.no_grad():
    output = model.eval()(input_ids=torch.load(result))
torch.save(output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits]), result)
"""


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", ["t5-v1.1", "umt5"])
def test_heads_in_both_lines(family: str, task: str, releases: dict[str, str], tmp_path: Path) -> None:
    model = write_headed(tmp_path / "source", task, family)
    convert(str(tmp_path / "source"), tmp_path / "out", verify=False)
    export(tmp_path / "out", tmp_path / "t5")
    ids = torch.cat([IDS, torch.ones(2, 1, dtype=torch.int64)], dim=1)  # with an end of sequence
    with torch.no_grad():
        output = model(input_ids=ids)
    values = output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits])
    for release, path in releases.items():
        torch.save(ids, tmp_path / "values.pt")
        run(
            LOAD_HEAD, tmp_path / "t5", release, type(model).__name__, tmp_path / "values.pt",
            path=path, folder=tmp_path,
        )  # fmt: skip
        got = torch.load(tmp_path / "values.pt")
        assert (got - values).abs().max() <= 1e-5 * values.abs().max(), release


@pytest.mark.parametrize("family", ["t5-v1.1", "umt5"])
def test_the_converter_runs_on_both_lines(family: str, releases: dict[str, str], tmp_path: Path) -> None:
    """With verification, on a checkpoint and on one with a head."""
    write_checkpoint(tmp_path / "model", family)
    write_headed(tmp_path / "headed", "SequenceClassification", family)
    for release, path in releases.items():
        for name in ("model", "headed"):
            out = tmp_path / f"{name}-{release}"
            run("from fat5convert.cli import main; main()", tmp_path / name, out, path=path, folder=tmp_path)
            parity = json.loads((out / "parity.json").read_text())
            assert parity["result"] == "same"
            assert parity["versions"]["transformers"].startswith(release)


TRANSLATE = """
import json, sys, ctranslate2
from ctranslate2.converters import TransformersConverter
folder, out, tokens, result = sys.argv[1:]
TransformersConverter(folder).convert(out)
translator = ctranslate2.Translator(out, inter_threads=1, intra_threads=1)
results = translator.translate_batch(json.loads(tokens), beam_size=1, max_decoding_length=12)
json.dump([found.hypotheses[0] for found in results], open(result, "w"))
"""


@pytest.fixture(scope="module")
def ctranslate2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return install(tmp_path_factory.mktemp("ctranslate2"), "ctranslate2", "--no-deps")


@pytest.mark.parametrize("family", ["t5-v1.0", "t5-v1.1", "mt5"])
def test_ctranslate2_generates_the_same_tokens(family: str, ctranslate2: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", family)
    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(3, 120))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(source)
    convert(str(source), tmp_path / "out", verify=False)
    export(tmp_path / "out", tmp_path / "t5")
    rows = [[words[i] for i in row] for row in IDS.tolist()]
    run(
        TRANSLATE, tmp_path / "t5", tmp_path / "ct2", json.dumps(rows), tmp_path / "r.json",
        path=ctranslate2, folder=tmp_path,
    )  # fmt: skip
    settings = GenerationConfig(
        max_new_tokens=12, do_sample=False, decoder_start_token_id=0, eos_token_id=1, pad_token_id=0
    )
    generated = make_model(family).generate(IDS, generation_config=settings)
    for ids, got in zip(generated.tolist(), json.loads((tmp_path / "r.json").read_text()), strict=True):
        ours = [words[i] for i in ids[1:]]
        assert got == ours[: ours.index("</s>")] if "</s>" in ours else got == ours
