"""The recipes that come with FAT5: each runs, and each can be found where FAT5 is installed."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from torch import distributed as dist

from fat5.cli import main
from fat5.model import FlashT5Config, FlashT5ForConditionalGeneration
from fat5.train.recipe import load_recipe
from fat5.train.recipes_command import shipped

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
# One of each kind, in every run of the tests; the others differ from one of them in numbers, or are of two kinds.
KINDS = {"ul2", "flan-t5-xl-fsdp", "fat5-small-french", "domain-replay"}
TOY = "{d_model: 32, d_kv: 8, num_heads: 4, d_ff: 48, num_layers: 2, num_decoder_layers: 2}"


def to_run() -> list:
    slow = pytest.mark.slow
    return [pytest.param(p, id=p.stem, marks=[] if p.stem in KINDS else [slow]) for p in RECIPES]


@pytest.fixture
def group(tmp_path):
    """A group of this one process, which sharding needs."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("path", to_run())
def test_a_recipe_runs_for_two_steps_at_toy_size(path, toy, tmp_path, request):
    recipe = load_recipe(path)
    if recipe.training.parallel == "fsdp":
        request.getfixturevalue("group")
    changes = {"evaluation__samples": 0, "evaluation__every": 2}
    if recipe.training.schedule == "wsd":
        changes["training__schedule_options"] = "{decay_steps: 1}"
    if recipe.model.fresh is not None:
        changes["model__fresh"] = TOY
    text = f"{{files: ['{toy.train}'], documents: line}}"
    corpora = recipe.data.train  # as many as it has, with their weights
    weighted = [text.replace("}", f", weight: {c.weight}}}") if c.weight is not None else text for c in corpora]
    changes["data__train"] = f"[{', '.join(weighted)}]"
    settings = toy.settings(tmp_path / "out", **changes)
    result = CliRunner().invoke(main, ["pretrain", str(path), *(p for s in settings for p in ("--set", s))])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
    ran, written = load_recipe(tmp_path / "out" / "recipe.yaml"), recipe
    for kept in ("optimizer", "precision", "parallel", "schedule"):
        assert getattr(ran.training, kept) == getattr(written.training, kept)
    assert ran.data.packing == written.data.packing


def test_the_french_model_is_of_the_published_size():
    recipe = load_recipe(ROOT / "recipes" / "fat5-small-french.yaml")
    with torch.device("meta"):
        model = FlashT5ForConditionalGeneration(FlashT5Config(vocab_size=32768, **recipe.model.fresh))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 147
    assert (recipe.data.max_input_length, len(recipe.mixture.resolved())) == (1024, 7)


def test_they_are_listed_shown_and_copied(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listed = CliRunner().invoke(main, ["recipes", "list"]).output
    assert [line.split()[0] for line in listed.splitlines()] == [p.stem for p in RECIPES]
    assert all(len(line.split()) > 4 for line in listed.splitlines())
    text = (ROOT / "recipes" / "smoke.yaml").read_text()
    assert CliRunner().invoke(main, ["recipes", "show", "smoke"]).output == text
    assert CliRunner().invoke(main, ["recipes", "copy", "smoke"]).exit_code == 0
    assert (tmp_path / "smoke.yaml").read_text() == text
    again = CliRunner().invoke(main, ["recipes", "copy", "smoke"])
    assert again.exit_code == 1
    assert "exists already" in again.output
    unknown = CliRunner().invoke(main, ["recipes", "show", "smok"])
    assert unknown.exit_code == 2
    assert "there is no recipe smok; there are " in unknown.output


def test_a_name_serves_where_a_file_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["pretrain", "smoke", "--set", "model.path=absent"])
    assert "absent is no model's folder or Hub id" in result.output
    assert CliRunner().invoke(main, ["pretrain", "absent.yaml"]).exit_code == 2


def test_every_package_is_named_in_pyproject():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    there = {
        str(path.parent.relative_to(ROOT)).replace("/", ".")
        for package in ("fat5", "fat5convert")
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert set(setuptools["packages"]) == there | {"fat5.recipes"}


@pytest.mark.slow
def test_they_are_in_the_wheel_and_found_there(tmp_path):
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(pip, check=True)
    [wheel] = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = """
import sys
sys.path.insert(0, sys.argv[1])
from fat5.train.recipes_command import shipped
print(*shipped().values())
"""
    command = [sys.executable, "-c", code, str(tmp_path / "installed")]
    found = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout.split()
    assert [Path(p).name for p in found] == [p.name for p in RECIPES]
    assert all(p.startswith(str(tmp_path / "installed")) for p in found)
    assert all(yaml.safe_load(Path(p).read_text()) for p in found)
    assert set(shipped()) == {p.stem for p in RECIPES}
