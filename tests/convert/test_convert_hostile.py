"""Files that may not be read, folders within folders, records that somebody edited: one message, nothing lost."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from toy_checkpoints import edit_config

from fat5convert.cli import main
from fat5convert.convert import convert
from fat5convert.errors import ConvertError
from fat5convert.export import export
from fat5convert.rescaling import Rescaling


def message(*args: object) -> str:
    """Run the command, which must fail; what it says."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    return result.output


@pytest.fixture
def nobody(flan: Path) -> Iterator[Path]:
    """A folder with the checkpoint, where the test runs as somebody who is not root."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(flan, folder / "flan")
        for path in (folder / "flan").iterdir():
            path.chmod(0o644)
        (folder / "flan" / "model.safetensors").chmod(0)
        folder.chmod(0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o755)


def test_weights_that_may_not_be_read(nobody: Path) -> None:
    said = message(nobody / "flan", nobody / "out")
    assert "flan/model.safetensors: cannot be read (Permission denied)" in said


def test_a_folder_that_may_not_be_written(nobody: Path) -> None:
    with pytest.raises(ConvertError, match="Permission denied"), _staged(nobody / "out"):
        raise AssertionError("not to be reached")


def _staged(out: Path) -> Any:
    from fat5convert.staging import holds_model, staged

    return staged(out, False, holds_model("flash_t5"))


def test_a_disk_that_does_not_read(flan: Path, tmp_path: Path) -> None:
    """A file that opens and then fails, as on a broken disk."""
    if not Path("/proc/self/mem").exists():
        pytest.skip("needs /proc")
    (flan / "model.safetensors").unlink()
    (flan / "model.safetensors").symlink_to("/proc/self/mem")
    message(flan, tmp_path / "out")
    message("inspect", flan)


@pytest.mark.parametrize("name", ["out", "../flan/out", "link/out"])
def test_out_in_the_source(name: str, flan: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(flan)
    out = flan / name if name == "out" else tmp_path / "flan" / name if name.startswith("..") else tmp_path / name
    before = sorted(flan.iterdir())
    assert "is, holds or lies in the source" in message(flan, out)
    assert sorted(flan.iterdir()) == before


@pytest.mark.parametrize("target", ["source", "source/out/t5", "source/out"])
def test_an_export_does_not_replace_what_it_reads(target: str, flan: Path, tmp_path: Path) -> None:
    """Replacing the folder around OUT would have taken OUT along."""
    convert(str(flan), tmp_path / "out", verify=False)
    source = tmp_path / "source"
    flan.rename(source)
    shutil.move(tmp_path / "out", source / "out")
    assert "is, holds or lies in the source" in message("export", source / "out", tmp_path / target, "--overwrite")
    assert (source / "out" / "model.safetensors").is_file()


def test_a_name_too_long_for_a_folder(flan: Path, tmp_path: Path) -> None:
    assert "cannot be used as a folder" in message(flan, tmp_path / ("x" * 300))


def test_an_empty_name(tmp_path: Path) -> None:
    """As from a shell variable that is not set."""
    assert "the name of the model is empty" in message("", tmp_path / "out")


@pytest.mark.parametrize("key", ["tie_word_embeddings", "scale_decoder_outputs"])
def test_neither_true_nor_false(key: str, flan: Path, tmp_path: Path) -> None:
    edit_config(flan, **{key: "false"})
    assert f"{key} must be true or false, not 'false'" in message(flan, tmp_path / "out")


def test_a_head_of_another_task_is_unknown(flan: Path, tmp_path: Path) -> None:
    edit_config(flan, architectures=["T5ForSequenceClassification"])
    said = message(flan, tmp_path / "out")
    assert "missing tensor(s): classification_head.dense.weight" in said
    assert "unknown tensor(s): lm_head.weight" in said


def test_a_dense_module_without_weights(flan: Path, tmp_path: Path) -> None:
    listing = [{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]
    (flan / "modules.json").write_text(json.dumps(listing))
    assert "2_Dense: holds no weights" in message(flan, tmp_path / "out", "--no-verify")
    listing[0] |= {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}  # which Hub repos leave out
    (flan / "modules.json").write_text(json.dumps(listing))
    convert(str(flan), tmp_path / "out", verify=False)


@pytest.mark.parametrize("key", ["leftovers", "source_config"])
def test_a_record_edited_by_hand(key: str, converted: dict[str, Path], tmp_path: Path) -> None:
    out = Path(shutil.copytree(converted["mt5"], tmp_path / "out"))
    record = json.loads((out / "conversion.json").read_text())
    (out / "conversion.json").write_text(json.dumps(record | {key: []}))
    with pytest.raises(ConvertError, match=rf"conversion\.json: {key} is malformed"):
        export(out, tmp_path / "t5")


@pytest.mark.parametrize("residual", [10**9, -1, True, "1", None])
def test_exponents_that_none_can_be(residual: object) -> None:
    assert Rescaling.from_dict({"residual": residual, "inner": {}}) == Rescaling()
    assert Rescaling.from_dict({"residual": 3, "inner": {"a": residual, "b": 2}}) == Rescaling(3, {"b": 2})


@pytest.mark.slow
def test_a_path_that_is_no_text(flan: Path, tmp_path: Path, env: dict[str, str]) -> None:
    source = os.fsencode(tmp_path) + b"/\xff"
    os.rename(os.fsencode(flan), source)
    command = [sys.executable, "-m", "fat5convert", source, str(tmp_path / "out"), "--no-verify"]
    done = subprocess.run(command, env=env | {"LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"\\udcff: T5 v1.1" in done.stdout
