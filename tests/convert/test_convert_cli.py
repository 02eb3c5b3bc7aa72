"""The command as people use it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from toy_checkpoints import FAMILIES

from fat5convert.cli import main
from fat5convert.hashing import hash_tensor


def run(*args: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    assert "\x1b[" not in result.output, "colour is for terminals"
    return result


def test_default_command_and_summary(flan: Path, tmp_path: Path) -> None:
    output = run(flan, tmp_path / "out").output.splitlines()
    assert len(output) == 4
    assert output[0].startswith("flan: T5 v1.1, ")
    assert "head untied, unscaled" in output[0]
    assert "bit-identical" in output[2]
    assert (tmp_path / "out" / "parity.json").exists()
    run("convert", flan, tmp_path / "again", "--no-verify", "--shard-size", "20KB")
    assert not (tmp_path / "again" / "parity.json").exists()
    assert (tmp_path / "again" / "model.safetensors.index.json").exists()
    run("--dtype", "bfloat16", flan, tmp_path / "third")
    run(flan, tmp_path / "third", code=1)
    run(flan, tmp_path / "third", "--overwrite")


def test_dry_run_writes_nothing(flan: Path, tmp_path: Path) -> None:
    assert "dry run" in run(flan, tmp_path / "out", "--dry-run").output
    assert [path.name for path in tmp_path.iterdir()] == ["flan"]


def test_verify_and_its_exit_codes(flan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(flan, out, "--no-verify")
    assert "--against" in run("verify", out).output
    assert not (out / "parity.json").exists()
    assert "logits within" in run("verify", out, "--against", flan).output
    assert json.loads((out / "parity.json").read_text())["result"] == "same"
    path = out / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "is not what the conversion wrote" in run("verify", out, code=3).output
    assert "differs from" in run("verify", out, "--against", flan, code=3).output


@pytest.mark.parametrize("family", FAMILIES)
def test_inspect(family: str, originals: dict[str, Path]) -> None:
    facts = json.loads(run("inspect", originals[family], "--json").output)
    shape = FAMILIES[family]
    assert facts["family"] == shape.title
    assert facts["decisions"]["tie_word_embeddings"]["value"] is not shape.untied
    assert facts["decisions"]["scale_decoder_outputs"]["value"] is shape.scaled
    assert all(decision["reason"] for decision in facts["decisions"].values())
    assert facts["memory"] == {"float32": 4 * facts["parameters"], "bfloat16": 2 * facts["parameters"]}
    assert facts["dtypes"] == {"float32": facts["parameters"]}
    assert facts["bfloat16_exact"] is False
    text = run("inspect", originals[family]).output
    assert shape.title in text
    assert f"{facts['parameters']:,}" in text


def test_export_says_what_it_did(converted: dict[str, Path], tmp_path: Path) -> None:
    output = run("export", converted["umt5"], tmp_path / "t5").output
    assert "multiplies its logits" in output
    assert "stock umt5" in output
    run("export", converted["umt5"], tmp_path / "t5", code=1)
    run("export", converted["mt5"], tmp_path / "t5", "--overwrite")


def test_what_may_not_be_replaced_is_not_said_to_be(flan: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", flan):
        output = run(flan, out, code=1).output
        assert "Give another folder" in output
        assert "--overwrite" not in output


def test_many_differences_are_told_by_a_few(converted: dict[str, Path], originals: dict[str, Path]) -> None:
    output = run("verify", converted["t5-v1.1"], "--against", originals["mt5"], code=3).output
    assert " more" in output
    assert output.count("; ") == 7


def test_quiet(flan: Path, tmp_path: Path) -> None:
    assert run(flan, tmp_path / "out", "--quiet", "--no-verify").output == ""
    assert run("verify", tmp_path / "out", "--quiet").output == ""
    assert run("export", tmp_path / "out", tmp_path / "t5", "--quiet").output == ""
    assert "exists already" in run(flan, tmp_path / "out", "--quiet", code=1).output


def test_the_summary_has_four_lines_for_a_lossy_dtype_too(flan: Path, tmp_path: Path) -> None:
    output = run(flan, tmp_path / "out", "--dtype", "float16").output.splitlines()
    assert len(output) == 4
    assert "relative rounding errors up to" in output[1]
    assert "rounding moves logits by" in output[2]


def test_families_are_listed_from_the_code_and_the_readme_agrees() -> None:
    table = run("--list-families").output
    for name in ("T5 v1.0", "mT5", "umT5", "Pile-T5", "ByT5", "UL2", "MADLAD-400", "CodeT5", "ProtT5", "Ankh", "FAT5"):
        assert f"| {name} |" in table
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert table in readme


def test_help_has_three_examples() -> None:
    text = run("--help").output
    assert text.count("\n      fat5convert ") + text.count("\n    fat5convert ") == 3
    for code in ("0 done", "1 the work failed", "2 wrong usage", "3 verification found", "130 and 143"):
        assert code in " ".join(text.split())
    for command in ("inspect", "verify", "export", "convert"):
        assert command in text


@pytest.mark.parametrize("args", [["only-a-model"], ["m", "o", "--dtype", "int3"], ["m", "o", "--shard-size", "big"]])
def test_wrong_usage(args: list[str]) -> None:
    run(*args, code=2)


LOAD = """
import sys
sys.modules["fat5"] = sys.modules["fat5convert"] = None  # what a machine without the package has
import torch
from transformers import AutoModelForSeq2SeqLM
model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
ids = torch.arange(2, 22)[None]
print(float(model(input_ids=ids, labels=ids).loss), type(model).__module__.startswith("transformers_modules"))
if len(sys.argv) > 2:
    model.save_pretrained(sys.argv[2])
"""


def test_loads_where_fat5_is_not_installed(converted: dict[str, Path], env: dict[str, str], tmp_path: Path) -> None:
    """And what that process saves loads again, when the first folder is gone."""

    def load(*folders: Path) -> str:
        done = subprocess.run(
            [sys.executable, "-c", LOAD, *map(str, folders)], env=env, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    shutil.copytree(converted["umt5"], tmp_path / "first")
    first = load(tmp_path / "first", tmp_path / "second")
    assert first.split()[1] == "True"
    shutil.rmtree(tmp_path / "first")
    shutil.rmtree(tmp_path / "hf")
    assert load(tmp_path / "second") == first


def test_hashing_a_tensor_is_hashing_its_bytes() -> None:
    import hashlib

    import torch

    tensor = torch.randn(4, 6)
    assert hash_tensor(tensor.T) == hashlib.sha256(tensor.numpy().T.tobytes()).hexdigest()


@pytest.mark.parametrize("module", ["fat5convert.cli", "fat5.cli"])
def test_help_imports_nothing_heavy(module: str) -> None:
    code = f"""
import sys
from {module} import main
for command in ([], *([name] for name in main.list_commands(None))):
    main([*command, "--help"], standalone_mode=False)
assert not {{"torch", "transformers"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage:") > 4
