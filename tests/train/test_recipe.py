"""Recipes: what is read, what is refused, and how the refusal is put."""

from pathlib import Path

import pytest
import yaml

from fat5.train.recipe import Recipe, RecipeError, differences, load_recipe, recipe_text

MINIMAL = """
model: {path: some-repo}
data: {train: [{files: [a.txt]}]}
training: {steps: 100}
output: {folder: out}
"""
RECIPES = Path(__file__).parents[2] / "recipes"
SHIPPED = sorted(RECIPES.glob("*.yaml"))


@pytest.fixture
def recipe(tmp_path):
    """Read MINIMAL with `--set` changes."""

    def read(*changes: str, text: str = MINIMAL) -> Recipe:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path, changes)

    return read


def test_what_is_not_written_has_its_default(recipe):
    read = recipe()
    assert (read.model.path, read.training.steps, read.output.folder) == ("some-repo", 100, "out")
    assert read.data.train[0].files == ("a.txt",)
    assert read.evaluation.every == 500
    assert read.mixture.name == "ul2_fat5"


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ("training.steps=7", "steps", 7),
        ("training.learning_rate=3e-4", "learning_rate", 3e-4),
        ("training.learning_rate=1", "learning_rate", 1.0),
        ("training.gradient_checkpointing=true", "gradient_checkpointing", True),
        ("training.schedule=cosine", "schedule", "cosine"),
        ("training.schedule_options={num_cycles: 0.25}", "schedule_options", {"num_cycles": 0.25}),
        ("training.schedule_options.num_cycles=0.25", "schedule_options", {"num_cycles": 0.25}),
    ],
)
def test_set_reads_its_value_as_yaml(recipe, change, key, value):
    found = getattr(recipe(change).training, key)
    assert found == value
    assert type(found) is type(value)


def test_set_replaces_lists_and_nulls_and_the_last_one_wins(recipe):
    read = recipe(
        "data.train=[{files: [b.txt, c.txt]}]",
        "evaluation.examples=null",
        "training.steps=1",
        "training.steps=2",
    )
    assert read.data.train[0].files == ("b.txt", "c.txt")
    assert read.evaluation.examples is None
    assert read.training.steps == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.learning_rat=1", "training.learning_rat is not a known key; did you mean learning_rate?"),
        ("trainig.steps=1", "trainig is not a known key; did you mean training?"),
        ("output.zzz=1", "output.zzz is not a known key; known here: folder, log_every, save_every"),
        ("data.train=[{fils: [a]}]", "data.train[0].fils is not a known key; did you mean files?"),
        ("training.steps=many", "training.steps must be a whole number, not 'many'"),
        ("training.steps=1.5", "training.steps must be a whole number, not 1.5"),
        ("training.steps=true", "training.steps must be a whole number, not True"),
        ("training.steps=null", "training.steps must be a whole number, not nothing"),
        ("training.learning_rate=fast", "training.learning_rate must be a number, not 'fast'"),
        ("training.learning_rate=.nan", "training.learning_rate must be a number, not nan"),
        ("training.deterministic=1", "training.deterministic must be true or false, not 1"),
        (
            "training.precision=fp8",
            "training.precision must be one of fp32, bf16, bf16_kahan, bf16_stochastic, bf16_nearest, not 'fp8'",
        ),
        ("training.schedule_options=[1]", "training.schedule_options must be a mapping, not [1]"),
        ("model.path=3", "model.path must be text, not 3"),
        ("data.train=a.txt", "data.train must be a list, such as [a, b], not 'a.txt'"),
        ("data.train=[a.txt]", "data.train[0] must be a section with keys, not 'a.txt'"),
        ("training=3", "training must be a section with keys, not 3"),
        ("training.batch_size=10", "training: batch_size 10 must be a multiple of micro_batch_size 8"),
        ("training.steps=0", "training: steps must be at least 1"),
        ("training.warmup_steps=101", "training: warmup_steps must be from 0 to steps"),
        ("output.save_every=0", "output: save_every must be at least 1 step"),
        ("output.report_to=[csv]", "output.report_to[0] must be one of tensorboard, wandb, trackio, not 'csv'"),
        ("training.optimizer=adamw_scales", "training: optimizer 'adamw_scales' is not known; known: adamw_scale, "),
        ("training.precision=bf16_kahan", "training: precision bf16_kahan needs optimizer adamw_scale"),
        ("training.adam_beta1=1.0", "training: adam_beta1 must be from 0 up to, not including, 1"),
        ("training.adam_beta2=-0.1", "training: adam_beta2 must be from 0 up to, not including, 1"),
        ("training.adam_epsilon=0", "training: adam_epsilon must be above 0"),
        ("training.seed=4294967296", "training: seed must be from 0 to 4294967295"),
        (
            "data.train=[{files: [a], streaming: true}, {files: [b], streaming: true}]",
            "data: several streamed corpora need weights",
        ),
        ("guard.on_bad_step=go", "guard.on_bad_step must be one of stop, skip, not 'go'"),
        ("guard.spike=0", "guard: spike must be above 0"),
        ("model.dropout_rate=1.0", "model: dropout_rate must be from 0 up to, not including, 1"),
        ("mixture.name=ul3", "mixture: name 'ul3' is no mixture"),
        ("training.steps", "--set training.steps: write it as section.key=value"),
        (".steps=3", "--set .steps=3: write it as section.key=value"),
        ("training.steps.more=3", "--set training.steps.more=3: training.steps is a value, not a section"),
        ("training.steps=[", "--set training.steps=[: the value is not valid YAML"),
    ],
)
def test_what_is_wrong_is_named_by_its_whole_path(recipe, change, message):
    with pytest.raises(RecipeError) as caught:
        recipe(change)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {path: a}", "data is missing, and it has no default"),
        (MINIMAL.replace("{steps: 100}", "{}"), "training.steps is missing, and it has no default"),
        (MINIMAL.replace("{steps: 100}", ""), "training must be a section with keys, not nothing"),
        ("- model", "must be YAML sections"),
        ("model: [", "is not valid YAML"),
        (MINIMAL + "training: {steps: 3}", "training stands there twice"),
        (MINIMAL.replace("steps: 100", "steps: 100, steps: 3"), "steps stands there twice"),
        ("", "must be YAML sections"),
    ],
)
def test_a_file_that_is_no_recipe(recipe, text, message):
    with pytest.raises(RecipeError) as caught:
        recipe(text=text)
    assert message in str(caught.value)
    assert "recipe.yaml" in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*absent\.yaml"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*binary\.yaml"):
        load_recipe(tmp_path / "binary.yaml")


def test_the_resolved_recipe_reads_back_to_the_same(recipe):
    read = recipe("mixture.denoisers=[{kind: span, mu: 4, r: 0.2, mode: '[R]'}]", "training.schedule_options={a: 1}")
    assert recipe(text=recipe_text(read)) == read


def test_only_what_makes_another_run_counts_as_a_difference(recipe):
    before = recipe()
    harmless = ["training.steps=200", "training.micro_batch_size=4", "output.folder=b", "data.cache=c", "guard.spike=9"]
    assert differences(before, recipe(*harmless)) == []
    assert differences(before, recipe("training.seed=1", "data.window=64")) == [
        "data.window: None -> 64",
        "training.seed: 0 -> 1",
    ]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_a_shipped_recipe_is_valid(path):
    assert load_recipe(path).training.steps > 0


def test_the_documented_recipe_writes_out_every_field():
    path = RECIPES / "ul2.yaml"
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    whole = yaml.safe_load(recipe_text(load_recipe(path)))
    for section in whole:
        assert set(raw[section]) == set(whole[section]), section
