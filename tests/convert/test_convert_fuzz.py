"""Malformed input of every kind: one message or a right result, never a traceback, and nothing written but OUT."""

import json
import random
import resource
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from toy_checkpoints import all_tensors, write_checkpoint

from fat5convert.cli import main
from fat5convert.verify import verify

TINY = {"vocab_size": 20, "d_model": 8, "d_ff": 8, "num_layers": 1, "num_decoder_layers": 1}
NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**63, 2**64, 10**30, -(2**63), 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "0", "t5", "../..", "/etc/passwd", "a" * 5000, "\x00", "\ud800", [], [[]],
    [-1, 2**62], {}, {"a": {}},
)  # fmt: skip
MOST_MEMORY = 600_000  # KiB by which the whole run may grow


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "one": write_checkpoint(root / "one", "t5-v1.1", **TINY),
        "sharded": write_checkpoint(root / "sharded", "t5-v1.1", sharded=True, **{**TINY, "vocab_size": 700}),
        "bin": write_checkpoint(root / "bin", "t5-v1.0", weights="bin", **TINY),
    }


def nest(chance: random.Random) -> Any:
    value = chance.choice(NASTY)
    return [value] * chance.randrange(4) if chance.random() < 0.2 else value


def dump(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def spoil_bytes(data: bytes, chance: random.Random, limit: int | None = None) -> bytes:
    spoilt = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        place = chance.randrange(min(limit or len(spoilt), len(spoilt)))
        spoilt[place] = chance.randrange(256)
    if chance.random() < 0.3:
        del spoilt[chance.randrange(len(spoilt)) :]
    return bytes(spoilt)


def spoil_header(folder: Path, chance: random.Random) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    kind = chance.randrange(4)
    if kind == 0:
        path.write_bytes(spoil_bytes(data, chance, 8 + length))
        return
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    for _ in range(chance.randint(1, 3)):
        name = chance.choice(names)
        entry = header.get(name)
        change = chance.randrange(6)
        if change == 0:
            header[name] = nest(chance)
        elif change == 1 and isinstance(entry, dict):
            entry[chance.choice(["dtype", "shape", "data_offsets"])] = nest(chance)
        elif change == 2 and isinstance(entry, dict):
            entry["dtype"] = chance.choice(["F32", "F64", "BF16", "I8", "BOOL", "F8_E4M3", "F4", "U64"])
        elif change == 3 and isinstance(entry, dict) and isinstance(entry.get("data_offsets"), list):
            entry["data_offsets"] = [v + chance.choice([-4, 4, 2**40]) for v in entry["data_offsets"] if type(v) is int]
        elif change == 4:
            header[chance.choice([name + "x", "", "../x", "a" * 3000])] = header.pop(name, {})
        else:
            header["__metadata__"] = nest(chance)
    text = dump(header)
    if kind == 1:  # a key that appears twice
        text = text[:-1] + b"," + text[1:]
    stated = len(text) if kind < 3 else chance.choice([0, 2**63, 2**64 - 1, len(text) - 1, len(text) + 1, len(data)])
    path.write_bytes(struct.pack("<Q", stated) + text + data[8 + length :])


def spoil_config(folder: Path, chance: random.Random) -> None:
    path = folder / "config.json"
    if chance.random() < 0.1:
        path.write_bytes(spoil_bytes(path.read_bytes(), chance))
        return
    raw = json.loads(path.read_text())
    extra = ["hidden_size", "quantization_config", "model_type", "architectures", "attention_scale", "tokenizer_class"]
    for _ in range(chance.randint(1, 3)):
        key = chance.choice([*raw, *extra])
        if chance.random() < 0.2:
            raw.pop(key, None)
        else:
            raw[key] = nest(chance)
    path.write_bytes(dump(raw))


def spoil_index(folder: Path, chance: random.Random) -> None:
    path = folder / "model.safetensors.index.json"
    if chance.random() < 0.1:
        path.write_bytes(spoil_bytes(path.read_bytes(), chance))
        return
    index = json.loads(path.read_text())
    shards = sorted(folder.glob("model-*.safetensors"))
    for _ in range(chance.randint(1, 3)):
        entries = index["weight_map"]
        change = chance.randrange(5)
        if change == 0 and entries:
            elsewhere = ["../model.safetensors", str(shards[0]), "config.json", "model-9.safetensors", ".", ""]
            entries[chance.choice([*entries])] = chance.choice([*elsewhere, nest(chance)])
        elif change == 1:
            entries.pop(chance.choice([*entries]), None)
        elif change == 2:
            entries[chance.choice(["ghost", "", "\x00"])] = shards[0].name
        elif change == 3:
            chance.choice(shards).unlink(missing_ok=True)
        else:
            index["weight_map"] = nest(chance)
            break
    path.write_bytes(dump(index))


def spoil_pickle(folder: Path, chance: random.Random) -> None:
    path = folder / "pytorch_model.bin"
    kind = chance.randrange(4)
    if kind < 2:
        path.write_bytes(spoil_bytes(path.read_bytes(), chance, 3000 if kind else None))
        return
    if kind == 2:  # a bomb: compressed zeros, where torch only stores
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        name = chance.choice([*entries])
        entries[name] = b"\0" * chance.choice([10**6, 10**7])
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for entry, data in entries.items():
                archive.writestr(entry, data)
        return
    tensors: dict[Any, Any] = dict(all_tensors(folder))
    name = chance.choice([*tensors])
    tensors[name] = chance.choice(
        [
            torch.zeros(1).expand(2**40, 2**20),
            torch.zeros(3, 3).to_sparse(),
            torch.zeros(2, device="meta"),
            torch.zeros(20, 8, dtype=torch.complex64),
            "text",
            [tensors[name]],
            {name: tensors[name]},
            None,
        ]
    )
    if chance.random() < 0.2:
        tensors[3] = torch.zeros(1)
    torch.save(tensors, path)


def spoil_values(folder: Path, chance: random.Random) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = chance.choice([*tensors])
    tensors[name].view(-1)[0] = chance.choice([float("nan"), float("inf"), -float("inf"), 3e38])
    save_file(tensors, folder / "model.safetensors")


SPOILERS: dict[str, tuple[str, Callable[[Path, random.Random], None]]] = {
    "header": ("one", spoil_header),
    "config": ("one", spoil_config),
    "index": ("sharded", spoil_index),
    "pickle": ("bin", spoil_pickle),
    "values": ("one", spoil_values),
}


def fuzz(kind: str, cases: range, bases: dict[str, Path], tmp_path: Path) -> None:
    base, spoil = SPOILERS[kind]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in cases:
        chance = random.Random(f"{kind} {case}")
        work = tmp_path / str(case)
        source = Path(shutil.copytree(bases[base], work / "source"))
        spoil(source, chance)
        dtype = chance.choice(["keep", "keep", "auto", "bfloat16", "float32"])
        command = [str(source), str(work / "out"), "--no-verify", "--dtype", dtype]
        if chance.random() < 0.1:
            command = ["inspect", str(source), "--json"]
        result = CliRunner().invoke(main, command)
        what = f"{kind} case {case}: {result.output}"
        assert result.exception is None or isinstance(result.exception, SystemExit), what
        assert result.exit_code in (0, 1), what
        assert "Traceback" not in result.output
        if result.exit_code:
            assert result.output.startswith("Error: "), what
            assert [path.name for path in work.iterdir()] == ["source"], what
        elif command[0] != "inspect":
            assert sorted(path.name for path in work.iterdir()) == ["out", "source"], what
            assert verify(work / "out")["result"] == "same", what
        shutil.rmtree(work)
    assert list(tmp_path.iterdir()) == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY


@pytest.mark.parametrize("kind", SPOILERS)
def test_a_sample(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    fuzz(kind, range(30), bases, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SPOILERS)
def test_five_thousand_cases(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    fuzz(kind, range(100, 1100), bases, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_reported(value: float, bases: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(bases["one"], tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors["shared.weight"][3, 2:5] = value
    save_file(tensors, source / "model.safetensors")
    facts = json.loads(CliRunner().invoke(main, ["inspect", str(source), "--json"]).output)
    assert facts["not_finite"] == {"shared.weight": 3}
    assert "3 value(s) of shared.weight" in CliRunner().invoke(main, ["inspect", str(source)]).output
