"""The page that a run leaves behind: one HTML file with everything in it, to look at in a browser."""

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean

from matplotlib import rc_context
from matplotlib.figure import Figure

from fat5.train.figures import Log, accuracy_figure, course_figure, held_out_curves, loss_figure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
img { width: 100%; height: auto; }
table { border-collapse: collapse; margin: .6rem 0; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; vertical-align: top; border-bottom: 1px solid #eee; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
table.samples td { font: 13px/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
table.samples td:nth-child(-n+2) { white-space: nowrap; overflow-wrap: normal; }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 13px; }
"""


def write_page(
    path: Path,
    *,
    title: str,
    log: Log,
    recipe: str,
    samples: Mapping[str, Sequence[Mapping[str, str]]],
    facts: Mapping[str, str],
) -> None:
    """Write the page of a run.

    Args:
        path: the file.
        title: what the run is called.
        log: the entries of `log.jsonl`.
        recipe: the recipe as YAML.
        samples: as `fat5.train.samples` keeps them.
        facts: versions, device and whatever else there is to say, in the order in which it is said.
    """
    figures = {
        "training and held-out loss": loss_figure(log, "Loss"),
        "held-out accuracy": accuracy_figure(log),
        "learning rate, gradient norm and throughput": course_figure(log),
    }
    parts = [
        f"<h1>{escape(title)}</h1>",
        "<h2>Held-out text, before and after</h2>",
        _before_and_after(log),
        "<h2>Curves</h2>",
        *(_image(figure, alt) for alt, figure in figures.items()),
        "<h2>Throughput</h2>",
        _throughput(log),
        "<h2>Span infilling on held-out text</h2>",
        _samples(samples),
        "<h2>Where it ran</h2>",
        _table((), facts.items()),
        "<h2>Recipe</h2>",
        f"<pre>{escape(recipe)}</pre>",
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    body = "\n".join(parts)
    path.write_text(f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n', "utf-8")


def _image(figure: Figure, alt: str) -> str:
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": "fat5"}):  # the same file for the same run
        figure.savefig(file, format="svg", metadata={"Date": None})
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/svg+xml;base64,{data}">'


def _before_and_after(log: Log) -> str:
    losses, accuracies = held_out_curves(log), held_out_curves(log, "accuracy")
    if not losses:
        return "<p>The run was not evaluated.</p>"
    rows = []
    for name, (_, values, errors) in losses.items():
        cells = [name or "all denoisers"]
        for i in (0, -1):
            error = f" ± {errors[i]:.4f}" if errors[i] else ""
            cells += [f"{values[i]:.4f}{error}", f"{_perplexity(values[i]):.2f}", f"{accuracies[name][1][i]:.1%}"]
        rows.append(cells)
    what = ["loss", "perplexity", "accuracy"]
    header = ["denoiser", *(f"{w} {when}" for when in ("before", "after") for w in what)]
    return _table(header, rows) + "<p>Loss in nats per target token, with its standard error over the examples.</p>"


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # beyond what a float holds


def _throughput(log: Log) -> str:
    names = {
        "tokens_per_second": ("real tokens per second", "{:,.0f}"),
        "tflops": ("TFLOP/s of one process, forward and backward of real tokens", "{:.3g}"),
        "mfu": ("MFU, of the device's dense bf16 peak", "{:.1%}"),
        "padding": ("padding, of the computed tokens", "{:.1%}"),
        "data_wait": ("waiting for data, of the time", "{:.2%}"),
        "peak_memory_gib": ("most GPU memory that tensors took, GiB", "{:.1f}"),
    }
    rows = []
    for key, (name, form) in names.items():
        values = [entry[key] for entry in log if key in entry]
        # The first entry has the warm-up of kernels and caches in it.
        if len(values) > 1:
            values = values[1:]
        if values:
            rows.append([name, form.format(fmean(values)), form.format(min(values)), form.format(max(values))])
    tokens = max((entry["tokens"] for entry in log if "tokens" in entry), default=0)
    return _table(["", "mean", "least", "most"], rows) + f"<p>{tokens:,} real tokens seen in all.</p>"


def _samples(samples: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    before, after = samples.get("before", ()), samples.get("after", ())
    if not before or len(before) != len(after):
        return "<p>None were made.</p>"
    rows: list[list[str]] = []
    for first, last in zip(before, after, strict=True):
        rows += [
            [first["denoiser"], "input", first["input"]],
            ["", "target", first["target"]],
            ["", "before", first["output"]],
            ["", "after", last["output"]],
        ]
    return _table((), rows, kind="samples")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Make a table; columns after the first are numbers where there is a header."""

    def cells(values: Sequence[str], tag: str) -> str:
        numbers = [False, *[bool(header)] * len(values)]
        marks = [' class="number"' if number else "" for number in numbers]
        return "".join(f"<{tag}{m}>{escape(v)}</{tag}>" for m, v in zip(marks, values, strict=False))

    head = f"<tr>{cells(header, 'th')}</tr>" if header else ""
    lines = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<table class="{kind}">{head}{lines}</table>'
