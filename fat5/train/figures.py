"""The pictures of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Log = Sequence[Mapping[str, Any]]
Curve = tuple[list[int], list[float], list[float]]

# Okabe and Ito's colours, which people with any colour vision tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8a7500")


def held_out_curves(log: Log, what: str = "loss") -> dict[str, Curve]:
    """Collect the evaluations of a log as name -> (steps, values, standard errors).

    Sorted by name, which is "" for all denoisers together. `what` is `loss` (nats per target token) or `accuracy`.
    """
    curves: dict[str, Curve] = {}
    for entry in log:
        for key, value in entry.items():
            if key.startswith("eval_") and key.endswith(what):
                name = key.removeprefix("eval_").removesuffix(what).removesuffix("_")
                steps, values, errors = curves.setdefault(name, ([], [], []))
                steps.append(entry["step"])
                values.append(value)
                errors.append(entry.get(f"{key}_se", 0.0))  # a single example has none
    return dict(sorted(curves.items()))


def loss_figure(log: Log, title: str) -> Figure:
    """Draw a run's losses: training and held-out on the left, held-out by denoiser on the right."""
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
        _finish(axes)
    if left.has_data():
        left.legend(frameon=False)
    if curves:
        right.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0)
    return figure


def accuracy_figure(log: Log) -> Figure:
    """Draw the held-out accuracy, all together and by denoiser."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, (name, (steps, values, _)) in enumerate(held_out_curves(log, "accuracy").items()):
        colour = COLOURS[(i - 1) % len(COLOURS)] if name else "black"
        label = f"{name or 'all denoisers'}  ({values[-1]:.1%})"
        axes.plot(steps, values, color=colour, linewidth=1.6, marker="o", markersize=3.5, label=label)
    axes.set(title="Held-out accuracy (last value)", ylabel="share of the targets")
    _finish(axes)
    if axes.has_data():
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0)
    return figure


# Panel titles and, for each, the log's keys with how they are called there.
_PANELS: dict[str, dict[str, str]] = {
    "Learning rate": {"learning_rate": ""},
    "Gradient norm before clipping": {"grad_norm": ""},
    "log² Z on held-out text (z-loss)": {"eval_log_z_squared": ""},
    "Tokens per second": {"tokens_per_second": ""},
    "Share of the time or of the device's peak": {"data_wait": "waiting for data", "mfu": "MFU"},
    "Share of computed tokens that are padding": {"padding": ""},
}


def course_figure(log: Log) -> Figure:
    """Draw what else a run logs, a panel each."""
    figure = Figure(figsize=(13, 6.4), layout="constrained")
    for axes, (title, keys) in zip(figure.subplots(2, 3).flat, _PANELS.items(), strict=True):
        for (key, label), colour in zip(keys.items(), COLOURS, strict=False):
            points = [(entry["step"], entry[key]) for entry in log if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.4, label=label)
        axes.set_title(title, fontsize=10)
        _finish(axes)
        if len(keys) > 1 and axes.has_data():
            axes.legend(frameon=False)
    return figure


def _curve(axes: Any, steps: list[int], losses: list[float], errors: list[float], colour: str, label: str) -> None:
    low, high = ([a + sign * e for a, e in zip(losses, errors, strict=True)] for sign in (-1, 1))
    axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(steps, losses, color=colour, linewidth=1.6, marker="o", markersize=3.5, label=label)


def _finish(axes: Any) -> None:
    axes.set_xlabel("step (updates of the weights)")
    axes.grid(alpha=0.25)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
