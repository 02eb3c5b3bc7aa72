"""OUT is complete or absent: what is written, and what is left behind when writing fails."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from toy_checkpoints import all_tensors

from fat5convert import convert as convert_module
from fat5convert.convert import convert
from fat5convert.errors import ConvertError
from fat5convert.formats import SafetensorsFile, TensorInfo
from fat5convert.writer import Item, check_space, holds_model, staged, write_weights


def items(tensors: dict[str, torch.Tensor]) -> list[Item]:
    return [Item(name, TensorInfo(t.dtype, tuple(t.shape)), lambda t=t: t) for name, t in tensors.items()]


TENSORS = {
    "odd": torch.randn(3, 5).bfloat16(),
    "wide": torch.randn(7, 2),
    "sliced": torch.randn(6, 8).T,
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(2.5),
    "half": torch.randn(5).half(),
}


@pytest.mark.parametrize("shard_size", [1, 100, 10**9])
def test_written_files_are_read_by_the_safetensors_library(shard_size: int, tmp_path: Path) -> None:
    counts: list[int] = []
    write_weights(tmp_path, items(TENSORS), shard_size, counts.append)
    back = all_tensors(tmp_path)
    assert back.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
    assert sum(counts) == sum(t.nbytes for t in TENSORS.values())
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        ours = SafetensorsFile(path)
        assert all(torch.equal(ours.load(name), TENSORS[name]) for name in ours.tensors)
    index = tmp_path / "model.safetensors.index.json"
    if shard_size == 10**9:
        assert not index.exists()
        return
    stored = json.loads(index.read_text())
    assert stored["metadata"]["total_size"] == sum(counts)
    assert stored["weight_map"].keys() == TENSORS.keys()
    for name, shard in stored["weight_map"].items():
        assert name in SafetensorsFile(tmp_path / shard).tensors


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    """The next tensor is asked for only after the one before was written."""
    alive = 0

    def produce(nbytes: int) -> torch.Tensor:
        nonlocal alive
        alive += 1
        assert alive == 1
        return torch.zeros(nbytes // 4)

    def written(count: int) -> None:
        nonlocal alive
        alive -= 1

    todo = [Item(f"t{i}", TensorInfo(torch.float32, (100,)), lambda: produce(400)) for i in range(20)]
    write_weights(tmp_path, todo, 1000, written)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ConvertError, OSError, MemoryError])
@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_left_behind(error: type[BaseException], overwrite: bool, flan: Path, tmp_path: Path) -> None:
    """Interrupted in the middle of the weights: no OUT, or the old OUT as it was."""
    out = tmp_path / "deep" / "er" / "out"
    if overwrite:
        convert(str(flan), out, verify=False)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    calls = iter(range(10))

    def interrupt(count: int) -> None:
        if next(calls) == 5:
            raise error("stop")

    expected = ConvertError if error is OSError else error
    with pytest.raises(expected):
        convert(str(flan), out, overwrite=overwrite, verify=False, progress=lambda plan: interrupt)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert out.exists() == (tmp_path / "deep").exists() == overwrite


def test_overwrite_replaces_the_whole_folder(flan: Path, originals: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(str(flan), out, shard_size=20_000, verify=False)
    assert len(list(out.glob("model-*"))) > 2
    convert(str(originals["mt5"]), out, overwrite=True, verify=False)
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flan", "out"]


def test_the_old_folder_survives_a_failed_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text('{"model_type": "flash_t5"}')
    rename = Path.rename

    def refuse_the_new(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new)
    with pytest.raises(ConvertError, match="no space"), staged(out, True, holds_model("flash_t5")):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "config.json"]


def test_an_out_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def somebody_else() -> Iterator[None]:
        with staged(out, False, holds_model("flash_t5")) as folder:
            (folder / "config.json").write_text("{}")
            out.mkdir()
            (out / "theirs").write_text("kept")
            yield

    with pytest.raises(ConvertError, match="appeared"):
        list(somebody_else())
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


def test_too_small_a_disk(tmp_path: Path, flan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConvertError, match="GB free"):
        check_space(tmp_path / "not" / "yet" / "there", 10**18)
    monkeypatch.setattr(convert_module, "check_space", lambda out, needed: check_space(out, needed + 10**18))
    with pytest.raises(ConvertError, match="GB free"):
        convert(str(flan), tmp_path / "out")
    assert not (tmp_path / "out").exists()
