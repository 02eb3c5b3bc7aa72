"""The command `fat5`."""

from importlib import import_module

import click

# Where each command is; it is imported when it is used, since torch and transformers take seconds to import.
COMMANDS = {
    "pretrain": "fat5.train.commands:pretrain",
    "recipes": "fat5.train.recipes_command:recipes",
    "tokenize": "fat5.data_commands:tokenize",
    "train-tokenizer": "fat5.data_commands:train_tokenizer",
    "data": "fat5.data_commands:data",
}


class LazyGroup(click.Group):
    """A group that imports a command when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the commands, in the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; None if there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name].split(":")
        command: click.Command = getattr(import_module(module), name)
        return command


# \b keeps click from filling the lines that follow.
EXAMPLES = """\b
A whole walk:
  fat5convert google/flan-t5-small flan-t5-small-fat5
  fat5 pretrain recipes/ul2.yaml --set model.path=flan-t5-small-fat5
  fat5convert export runs/ul2/model flan-t5-small-adapted
"""


@click.group(
    cls=LazyGroup,
    epilog=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="fat5")
def main() -> None:
    """Continue the pretraining of a T5 that fat5convert has converted."""


if __name__ == "__main__":  # `torchrun -m fat5.cli`
    main()
