"""The picture and the summary that a run leaves behind."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Log = Sequence[Mapping[str, Any]]

# Okabe and Ito's colours, which people with any colour vision tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8a7500")


def held_out_curves(log: Log) -> dict[str, tuple[list[int], list[float], list[float]]]:
    """Collect the evaluations of a log as name -> (steps, losses, standard errors), nats per target token.

    Sorted by name, which is "" for the loss over all denoisers.
    """
    curves: dict[str, tuple[list[int], list[float], list[float]]] = {}
    for entry in log:
        for key, value in entry.items():
            if key.startswith("eval_") and key.endswith("loss"):
                name = key.removeprefix("eval_").removesuffix("loss").removesuffix("_")
                steps, losses, errors = curves.setdefault(name, ([], [], []))
                steps.append(entry["step"])
                losses.append(value)
                errors.append(entry.get(f"{key}_se", 0.0))  # a single example has none
    return dict(sorted(curves.items()))


def draw_losses(log: Log, path: Path, title: str) -> None:
    """Draw a run's losses: training and held-out on the left, held-out by denoiser on the right, as a PNG.

    Args:
        log: the entries of `log.jsonl`.
        path: the picture's file.
        title: what the run is called in the picture.
    """
    curves = held_out_curves(log)
    train = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    figure = Figure(figsize=(13, 4.8), layout="constrained")  # pyplot would keep state and may want a display
    left, right = figure.subplots(1, 2, sharey=True)
    figure.suptitle(title)
    if train:
        left.plot(*zip(*train, strict=True), color="0.6", linewidth=1.2, label="training")
    if "" in curves:
        _curve(left, *curves.pop(""), colour="black", label="held-out, ± 1 standard error")
    for i, (name, curve) in enumerate(curves.items()):
        _curve(right, *curve, colour=COLOURS[i % len(COLOURS)], label=f"{name}  ({curve[1][-1]:.2f})")
    left.set(title="All denoisers", ylabel="loss (nats per target token)")
    right.set(title="Held-out, by denoiser (last value)")
    for axes in (left, right):
        axes.set_xlabel("step (updates of the weights)")
        axes.grid(alpha=0.25)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    if curves:
        right.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0)
    figure.savefig(path, dpi=120)


def _curve(axes: Any, steps: list[int], losses: list[float], errors: list[float], colour: str, label: str) -> None:
    low, high = ([a + sign * e for a, e in zip(losses, errors, strict=True)] for sign in (-1, 1))
    axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(steps, losses, color=colour, linewidth=1.6, marker="o", markersize=3.5, label=label)


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
