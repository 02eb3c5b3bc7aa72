"""Saved models are complete repositories: they load where FAT5 is not installed, and again after each save."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_parity import SHAPE, batch, randomise
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForSeq2SeqLM
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import fat5.model
from fat5.model import (
    AUTO_MAP,
    ENCODER_AUTO_MAP,
    RUNTIME_FILES,
    FlashT5Config,
    FlashT5EncoderModel,
    FlashT5ForConditionalGeneration,
    FlashT5Model,
    copy_runtime_files,
)

SOURCE = Path(fat5.model.__file__).parent
UNTIED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
FRESH_PROCESS = Path(__file__).with_name("fresh_process.py")


def new_model(cls=FlashT5ForConditionalGeneration, **fields):
    model = cls(FlashT5Config(**{**SHAPE, **UNTIED, **fields})).eval()
    randomise(model)
    return model


def assert_complete(folder: Path, auto_map: dict[str, str] = AUTO_MAP) -> None:
    assert json.loads((folder / "config.json").read_text())["auto_map"] == auto_map
    for name in RUNTIME_FILES:
        assert (folder / name).read_bytes() == (SOURCE / name).read_bytes()


def names_in(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_is_exact_and_the_head_is_in_the_file_when_it_is_its_own(tmp_path, tied):
    model = new_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert_complete(tmp_path)
    parameters = {name for name, _ in model.named_parameters()}
    assert names_in(tmp_path) == parameters
    assert ("lm_head.weight" in parameters) is not tied
    loaded, report = FlashT5ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert (loaded.lm_head.weight is loaded.shared.weight) is tied
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    inputs = batch("right")
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()


def test_sharded_round_trip(tmp_path):
    model = new_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = FlashT5ForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch("none", rows=1)).logits.isnan(), torch.zeros(1, 23, 99, dtype=torch.bool))
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("cls", [FlashT5Model, FlashT5EncoderModel])
def test_other_classes_load_from_the_same_files_without_complaint(tmp_path, cls, caplog):
    model = new_model()
    model.save_pretrained(tmp_path)
    loaded, report = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    inputs = batch("right")
    expected = model.encoder(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    output = loaded.encoder(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    assert torch.equal(output, expected)
    loaded.save_pretrained(tmp_path / "again")
    assert_complete(tmp_path / "again", ENCODER_AUTO_MAP if cls is FlashT5EncoderModel else AUTO_MAP)
    assert names_in(tmp_path / "again") == {name for name, _ in loaded.named_parameters()}


def test_files_that_repeat_the_embedding_load(tmp_path):
    model = new_model()
    weights = model.state_dict()
    for stack in ("encoder", "decoder"):
        weights[f"{stack}.embed_tokens.weight"] = weights["shared.weight"].clone()
    model.save_pretrained(tmp_path, state_dict=weights)
    assert "encoder.embed_tokens.weight" in names_in(tmp_path)
    for cls in (FlashT5ForConditionalGeneration, FlashT5Model, FlashT5EncoderModel):
        _, report = cls.from_pretrained(tmp_path, output_loading_info=True)
        assert not report["unexpected_keys"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path, dtype):
    new_model().save_pretrained(tmp_path)
    loaded = FlashT5ForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.shared.weight.dtype == dtype
    inputs = batch("right")
    logits = loaded(**inputs).logits
    assert logits.isfinite().all()
    expected = FlashT5ForConditionalGeneration.from_pretrained(tmp_path)(**inputs).logits
    assert (logits - expected).abs().max() < 0.1 * expected.abs().max()


def test_runtime_files_are_what_the_remote_code_loader_finds():
    # transformers 4 does not follow the imports of the imported files when it loads from a folder
    found = {f"{module}.py" for module in get_relative_imports(SOURCE / "modeling_flash_t5.py")}
    assert found | {"modeling_flash_t5.py"} == set(RUNTIME_FILES)
    assert set(RUNTIME_FILES) == {path.name for path in SOURCE.glob("*.py")} - {"__init__.py"}
    for name in RUNTIME_FILES:
        assert not name.startswith("_")
        tree = ast.parse((SOURCE / name).read_text())
        relative = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        assert all(node.module and "." not in node.module for node in relative)
        assert {node.module for node in relative} == set(get_relative_imports(SOURCE / name))
        assert set(get_imports(SOURCE / name)) <= {"torch", "transformers", *sys.stdlib_module_names}
    for reference in AUTO_MAP.values():
        module, _, cls = reference.partition(".")
        assert cls in (SOURCE / f"{module}.py").read_text()


def test_copying_onto_itself_is_harmless(tmp_path):
    copy_runtime_files(tmp_path / "new")
    assert_names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert assert_names == sorted(RUNTIME_FILES)
    copy_runtime_files(SOURCE)
    assert all((SOURCE / name).stat().st_size > 0 for name in RUNTIME_FILES)


def test_somebody_else_s_files_survive(tmp_path):
    (tmp_path / "attention.py").write_text("# of a project that is not FAT5's")
    copy_runtime_files(tmp_path)
    assert (tmp_path / "attention.py.before_flash_t5").read_text() == "# of a project that is not FAT5's"
    (tmp_path / "attention.py").write_text("# of an earlier version of FAT5")
    copy_runtime_files(tmp_path)
    assert (tmp_path / "attention.py").read_bytes() == (SOURCE / "attention.py").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} - {*RUNTIME_FILES} == {"attention.py.before_flash_t5"}


def test_only_a_trainer_s_checkpoint_puts_code_into_the_folder_above(tmp_path):
    """Which `Trainer` pushes; tests/hub has it do so. Whoever saves by hand has other things there."""
    model = new_model()
    model.save_pretrained(tmp_path / "mine" / "checkpoint-5")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["checkpoint-5"]
    model.save_pretrained(tmp_path / "trainer" / "checkpoint-5", state_dict=None)
    assert {path.name for path in (tmp_path / "trainer").iterdir()} == {"checkpoint-5", *RUNTIME_FILES}
    assert_complete(tmp_path / "trainer" / "checkpoint-5")


@pytest.fixture
def registered():
    """The way of those who import FAT5 and use the auto-classes without remote code."""
    AutoConfig.register("flash_t5", FlashT5Config)
    AutoModelForSeq2SeqLM.register(FlashT5Config, FlashT5ForConditionalGeneration)
    yield
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    del CONFIG_MAPPING._extra_content["flash_t5"]
    del AutoModelForSeq2SeqLM._model_mapping._extra_content[FlashT5Config]


def test_model_from_a_registered_class_saves_its_code(tmp_path, registered, monkeypatch):
    monkeypatch.setattr(FlashT5ForConditionalGeneration, "_auto_class", None)
    new_model().save_pretrained(tmp_path / "first")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "first")
    assert type(model) is FlashT5ForConditionalGeneration
    shutil.rmtree(tmp_path / "first")
    model.save_pretrained(tmp_path / "second")
    assert_complete(tmp_path / "second")


def test_auto_map_of_a_wrapped_class_is_put_right(tmp_path):
    model = new_model()
    model.config.auto_map = {"AutoModel": "_fsdp_fully_shard.FSDPFlashT5Model", "AutoConfig": "a/b--c.D"}
    model.save_pretrained(tmp_path)
    assert_complete(tmp_path)


def test_merged_lora_saves_a_complete_repository(tmp_path):
    adapted = get_peft_model(new_model(), LoraConfig(target_modules=["Wq"], r=2, task_type="SEQ_2_SEQ_LM"))
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert_complete(tmp_path)
    assert names_in(tmp_path) == {name for name, _ in new_model().named_parameters()}


def run_fresh(*arguments, cwd: Path) -> None:
    """Run `fresh_process.py` where `fat5` cannot be imported and the module cache is empty."""
    environment = {"HF_HOME": str(cwd / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    command = [sys.executable, "-I", str(FRESH_PROCESS), *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.strip().endswith("same logits")


def save_expected(model, folder: Path) -> Path:
    inputs = batch("right")
    with torch.no_grad():
        logits = model(**inputs).logits
    torch.save({"inputs": inputs, "logits": logits}, folder / "expected.pt")
    return folder / "expected.pt"


def test_loads_and_saves_in_a_process_without_fat5(tmp_path):
    model = new_model()
    model.save_pretrained(tmp_path / "first")
    expected = save_expected(model, tmp_path)
    run_fresh(tmp_path / "first", expected, tmp_path / "second", "delete", cwd=tmp_path)
    assert not (tmp_path / "first").exists()
    assert_complete(tmp_path / "second")
    run_fresh(tmp_path / "second", expected, cwd=tmp_path)


def test_loads_from_the_hub_cache_in_a_process_without_fat5(tmp_path):
    """The loader treats a repository of the Hub differently from a folder: it fetches file by file."""
    model = new_model(tie_word_embeddings=True)
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hf" / "hub" / "models--someone--flash-t5.tiny"
    model.save_pretrained(repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    expected = save_expected(model, tmp_path)
    run_fresh("someone/flash-t5.tiny", expected, tmp_path / "second", cwd=tmp_path)
    assert_complete(tmp_path / "second")
