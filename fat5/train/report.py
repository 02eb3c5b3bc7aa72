"""What a run leaves behind for people: picture, page, the table on the screen, the summary beside the weights."""

import json
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fat5.train.figures import Log, held_out_curves, loss_figure
from fat5.train.folder import RunFolder
from fat5.train.page import write_page
from fat5.train.recipe import Recipe, recipe_text
from fat5.train.samples import read_samples
from fat5.train.typed import to_plain


def write_report(recipe: Recipe, folder: RunFolder, model: Path, log: Log, facts: dict[str, str]) -> None:
    """Write picture and page into a run's folder, and picture and summary into the model's, for its card.

    Args:
        recipe: the run's.
        folder: the run's.
        model: where the trained model lies by now.
        log: the run's log.
        facts: what the page is to say of the run beside versions.
    """
    title = f"Pretraining: {folder.root.name}"
    loss_figure(log, title).savefig(folder.picture, dpi=120)
    shutil.copyfile(folder.picture, model / folder.picture.name)
    samples = read_samples(folder.samples)
    text = recipe_text(recipe)
    write_page(folder.page, title=title, log=log, recipe=text, samples=samples, facts=facts | versions())
    summary = {**summarise_run(log), "recipe": to_plain(recipe), "versions": versions()}
    content = json.dumps(summary, indent=2, ensure_ascii=False)
    (model / "training.json").write_text(content + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Give the versions of Python and of what decides the numbers of a run."""
    found = {"python": platform.python_version()}
    for name in ("fat5", "torch", "transformers", "accelerate", "triton", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """Say what a run computed on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} ({torch.get_num_threads()} threads)"


def describe_run(log: Log) -> str:
    """Write the first and last held-out losses, whole and by denoiser, as a small table; empty without any."""
    curves = held_out_curves(log)
    if not curves:
        return ""
    lines = [f"{'held-out loss, nats per token':30}{'first':>18}{'last':>18}"]
    for name, (_, losses, errors) in curves.items():
        first, last = (f"{losses[i]:.4f}" + (f" ± {errors[i]:.4f}" if errors[i] else "") for i in (0, -1))
        lines.append(f"  {name or 'all denoisers':28}{first:>18}{last:>18}")
    return "\n".join(lines)


def summarise_run(log: Log) -> dict[str, Any]:
    """Say what a run came to: the first and last held-out figures, and the last training loss."""
    evaluations = [dict(entry) for entry in log if "eval_loss" in entry]
    train = [entry["loss"] for entry in log if "loss" in entry]
    return {
        "steps": max((entry["step"] for entry in log), default=0),
        "first_evaluation": evaluations[0] if evaluations else None,
        "last_evaluation": evaluations[-1] if evaluations else None,
        "last_training_loss": train[-1] if train else None,
    }
