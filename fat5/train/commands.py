"""The training commands of `fat5`.

What is heavy to import is imported when a command runs, so that --help is quick.
"""

import os
import sys
from pathlib import Path

import click

from fat5.train.recipes_command import RecipeFile

# \b keeps click from filling the lines that follow.
EXAMPLES = """\b
Examples:
  fat5 pretrain recipes/ul2.yaml
  fat5 pretrain recipes/ul2.yaml --set 'data.train=[{files: [a.txt, b.txt]}]' --set training.learning_rate=3e-4
  fat5 pretrain recipes/ul2.yaml --dry-run
  fat5 pretrain recipes/ul2.yaml --resume runs/ul2/checkpoints/checkpoint-2000
  torchrun --nproc-per-node 8 -m fat5.cli pretrain recipes/ul2.yaml
"""


@click.command(epilog=EXAMPLES)
@click.argument("recipe", type=RecipeFile())
@click.option(
    "--set",
    "changes",
    metavar="KEY=VALUE",
    multiple=True,
    help="Change one key of the recipe, for example training.steps=1000. The value is read as YAML. "
    "May be given many times.",
)
@click.option(
    "--resume",
    metavar="auto|never|PATH",
    default="auto",
    show_default=True,
    help="auto: continue from the newest checkpoint in output.folder, if there is one. never: start afresh. "
    "A path: continue from that checkpoint.",
)
@click.option("--dry-run", is_flag=True, help="Check everything that can be checked in seconds, and train nothing.")
def pretrain(recipe: Path, changes: tuple[str, ...], resume: str, dry_run: bool) -> None:
    """Train a FAT5 model as RECIPE, a YAML file, says.

    The paths in a recipe are relative to the current folder. The run writes into output.folder: the recipe as it
    was used, log.jsonl, checkpoints/, and at the end loss.png, report.html and model/, a complete FAT5 repo. After an
    interruption, the same command continues the run.

    SIGTERM and SIGINT (Ctrl-C) let the step finish, save a checkpoint and end the run; a second one ends it at once.

    Exit status: 0 done, 1 failed (the message says why), 2 wrong usage, 75 stopped by a signal with everything saved.
    Under torchrun the status is torchrun's own.
    """
    import torch
    from transformers.utils import logging

    from fat5.train.errors import Stopped, TrainingError
    from fat5.train.folder import RunFolder
    from fat5.train.preflight import preflight
    from fat5.train.recipe import RecipeError, load_recipe
    from fat5.train.report import describe_run
    from fat5.train.run import pretrain as run
    from fat5.train.signals import STOPPED

    first = os.environ.get("RANK", "0") == "0"  # under torchrun, one process speaks
    logging.disable_progress_bar()  # of loading and saving; the run has its own
    try:
        read = load_recipe(recipe, changes)
        if dry_run:
            for line in preflight(read):
                if first:
                    click.echo(line)
            return
        log = run(read, resume)
    except Stopped as stopped:
        click.echo(str(stopped), err=True)
        sys.exit(STOPPED)
    except (RecipeError, TrainingError) as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        where = error.filename or f"{read.output.folder} or the cache of tokenised text"
        advice = f"output.folder is {read.output.folder}: give one that can be written"
        raise click.ClickException(f"{where}: {error.strerror or error} ({advice})") from error
    except torch.OutOfMemoryError as error:
        advice = "set training.cuda_graphs=false (graphs keep memory of their own for activations), lower "
        advice += "training.micro_batch_size (the result stays the same) or set training.gradient_checkpointing"
        advice += "; while held-out text is measured, lower evaluation.batch_size"
        raise click.ClickException(f"the GPU has too little memory: {advice}") from error
    if first:
        folder = RunFolder(Path(read.output.folder))
        click.echo(describe_run(log))
        click.echo(f"model: {folder.model}\nlog: {folder.log}\npage: {folder.page}")
