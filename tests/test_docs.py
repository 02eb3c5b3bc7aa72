"""What the pages show works: Python and console blocks run, commands that stand by themselves at least exist.

Some have a test elsewhere (`RUN_ELSEWHERE`): pages about the model also run under other releases of transformers, one
page needs a library that is installed for it, and one a Hub.
"""

import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

import fat5.cli
import fat5convert.cli
from fat5convert.convert import convert

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN_ELSEWHERE = {
    "configuration.md": "model/test_model_docs.py",
    "fine-tuning.md": "model/test_model_docs.py",
    "embeddings.md": "model/test_other_libraries.py",
    "publishing.md": "hub/test_publishing_page.py",
}
PROGRAMS: dict[str, click.Group] = {"fat5": fat5.cli.main, "fat5convert": fat5convert.cli.main}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def write_flan(folder: Path) -> None:
    """A small stock T5 v1.1 with a tokenizer, under the name that the pages use."""
    words = ["<pad>", "</s>", "<unk>", "a", "fine", "dull", "film", "music"]
    words_only = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    words_only.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    special["model_input_names"] = ["input_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=words_only, **special).save_pretrained(folder)
    shape = {"vocab_size": 16, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 2}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    T5ForConditionalGeneration(T5Config(**shape, **tokens, feed_forward_proj="gated-gelu")).save_pretrained(folder)


def run_console(line: str) -> None:
    program, *arguments = shlex.split(line, comments=True)
    done = CliRunner().invoke(PROGRAMS[program], arguments)
    assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception}"


@every_page
def test_blocks_run(page, tmp_path, monkeypatch):
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    assert {kind for kind, _ in blocks} <= {"python", "console"}, "what is not to run stands indented, without a fence"
    if page.name in RUN_ELSEWHERE:
        test = RUN_ELSEWHERE[page.name]
        assert f'"{page.name}"' in (ROOT / "tests" / test).read_text()
        pytest.skip(f"tests/{test} runs it")
    monkeypatch.chdir(tmp_path)
    if blocks:
        write_flan(Path("flan-t5-small"))
        if blocks[0][0] == "python":  # the page begins where the conversion is done
            convert("flan-t5-small", Path("flan-t5-small-fat5"), verify=False)
    variables: dict = {}
    for number, (kind, block) in enumerate(blocks):
        if kind == "python":
            exec(compile(block, f"{page.name}, block {number}", "exec"), variables)
        else:
            for line in block.splitlines():
                run_console(line)


def command_of(group: click.Group, arguments: list[str]) -> tuple[click.Command, list[str]]:
    """The command that arguments name, and what is left for it."""
    name = arguments[0] if arguments else ""
    command = group.get_command(click.Context(group), name)
    if command is None:
        return group.commands["convert"], arguments  # `fat5convert MODEL OUT`
    return command_of(command, arguments[1:]) if isinstance(command, click.Group) else (command, arguments[1:])


@every_page
def test_commands_exist_with_their_options(page):
    for line in re.findall(r"^    ((?:fat5|fat5convert) .*)$", page.read_text(), re.MULTILINE):
        program, *arguments = shlex.split(line, comments=True)
        command, rest = command_of(PROGRAMS[program], arguments)
        values, left, _ = command.make_parser(click.Context(command)).parse_args(rest)
        assert not left, line
        required = [x.name for x in command.params if isinstance(x, click.Argument) and x.required]
        assert all(isinstance(values.get(name), (str, tuple)) and values[name] for name in required), line
