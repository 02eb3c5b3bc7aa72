"""The sections of a card, as Markdown, written from what is known of a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fat5convert.errors import ConvertError
from fat5convert.publish.contents import CERTIFICATE, CONVERSION, CURVE, TRAINING
from fat5convert.publish.origin import Origin
from fat5convert.publish.preflight import Ready

_WORST = 5
"""Tensors listed in the precision report."""


def sections(ready: Ready, origin: Origin | None, repo_id: str, hashes: Mapping[str, str]) -> dict[str, str]:
    """Write them, by name and in order; without those that there is nothing to say in.

    Args:
        ready: the checked folder.
        origin: what it was made from.
        repo_id: where it will be.
        hashes: SHA-256 of the weight files.
    """
    conversion, training = ready.folder / CONVERSION, ready.folder / TRAINING
    written = {
        "about": _about(ready, origin, repo_id),
        "load": _load(ready, repo_id),
        "provenance": _made_of(conversion if ready.conversion else training, _provenance, ready, origin, hashes),
        "precision": _made_of(conversion, _precision, ready),
        "parity": _made_of(ready.folder / CERTIFICATE, _parity, ready),
        "training": _made_of(training, _training, ready),
        "limits": _limits(ready, origin),
    }
    return {name: text for name, text in written.items() if text}


def _made_of(path: Path, write: Callable[..., str], *arguments: object) -> str:
    """Write a section whose figures are those of a file."""
    try:
        return write(*arguments)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        told = f"is not as FAT5 writes it ({type(error).__name__}: {error})"
        raise ConvertError(
            f"{path}: {told}, and the card cannot be made of it; convert, verify or train again"
        ) from error


def _link(origin: Origin) -> str:
    return f"[{origin.name}](https://huggingface.co/{origin.name})" if origin.on_hub else f"`{origin.name}`"


def _about(ready: Ready, origin: Origin | None, repo_id: str) -> str:
    name = repo_id.split("/")[1]
    kind = "encoder" if ready.encoder_only else "encoder-decoder model"
    what = f"A FAT5 {kind} of {ready.parameters:,} parameters"
    if ready.task.head:
        what += f" with a head for {ready.task.head}"
    if origin is None:
        made = f"{what}, pretrained from scratch with UL2." if ready.training else f"{what}."
    elif origin.trained:
        made = f"{what}: {_link(origin)} on FAT5's layers, its pretraining continued with UL2."
    else:
        made = f"{what}: {_link(origin)} on FAT5's layers, computing the same."
    fast = "Its attention, norms, feed-forward layers and loss run as fused kernels on NVIDIA GPUs, with T5's own bias."
    return f"# {name}\n\n{made} {fast}"


def _load(ready: Ready, repo_id: str) -> str:
    auto, task = ready.auto_class, ready.task
    lines = [f"from transformers import {auto}" + (", AutoTokenizer" if ready.tokenizer else ""), ""]
    lines.append(f'model = {auto}.from_pretrained("{repo_id}", trust_remote_code=True)')
    if ready.tokenizer:
        lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}", trust_remote_code=True)')
        lines += [f'inputs = tokenizer({task.text}, return_tensors="pt")', task.call]
    code = "\n".join(lines)
    return (
        f"## How to load\n\nIt needs torch and transformers, and triton for the kernels. The model's code is in this "
        f"repo, hence `trust_remote_code`; pin it by `revision`.\n\n```python\n{code}\n```"
    )


def _provenance(ready: Ready, origin: Origin | None, hashes: Mapping[str, str]) -> str:
    rows: list[Sequence[object]] = []
    if origin is not None:
        rows.append(["source", _link(origin) + (f" at `{origin.revision}`" if origin.on_hub else "")])
    conversion = ready.conversion or {}
    for name in conversion.get("source", {}).get("files", []):
        rows.append(["source file", f"`{name}`"])
    versions = conversion.get("versions") or (ready.training or {}).get("versions") or {}
    made_with = ", ".join(f"{name} {versions[name]}" for name in ("fat5", "torch", "transformers") if name in versions)
    rows.append(["made with", made_with])
    rows += [[f"SHA-256 of `{name}`", f"`{digest}`"] for name, digest in sorted(hashes.items())]
    text = "## Provenance\n\n" + _table(["", ""], rows)
    if ready.conversion is not None:
        text += f"\n\n`{CONVERSION}` has the hash of every tensor, before and after."
    return text


def _precision(ready: Ready) -> str:
    if ready.conversion is None:
        return ""
    dtypes = sorted({str(info.dtype).removeprefix("torch.") for info in ready.checkpoint.tensors.values()})
    lines = [f"Weights are {' and '.join(dtypes)}."]
    rounding = {name: e for name, e in ready.conversion.get("rounding", {}).items() if e["rms_relative"] > 0}
    if ready.training is not None:
        lines.append("They have been trained since the conversion.")
    if not rounding:
        lines.append("The conversion rounded nothing: every weight has its source's value.")
        return "## Precision\n\n" + " ".join(lines)
    lines.append(f"The conversion rounded {len(rounding)} tensors; relative errors, the worst first:")
    worst = sorted(rounding.items(), key=lambda item: -item[1]["max_relative"])[:_WORST]
    rows = [
        [f"`{name}`", f"{e['max_relative']:.2e}", f"{e['rms_relative']:.2e}", e["overflows"], e["underflows"]]
        for name, e in worst
    ]
    table = _table(["tensor", "largest", "RMS", "overflows", "underflows"], rows)
    return "## Precision\n\n" + " ".join(lines) + "\n\n" + table


def _parity(ready: Ready) -> str:
    if ready.certificate is None:
        return ""
    tensors, models = ready.certificate["tensors"], ready.certificate.get("models")
    text = (
        f"## Parity\n\n{tensors['compared']} tensors compared with the source's: {tensors['identical']} bit-identical, "
        f"{tensors['rounded']} rounded."
    )
    if models is None:
        return f"{text} The models were not run against each other. `{CERTIFICATE}` has the hashes."
    text += (
        f" Both models were run on the same inputs in fp32 on a CPU; largest differences of the {models['compared']} "
        f"and of the loss, relative to the largest logit. `{CERTIFICATE}` has all figures.\n\n"
    )
    rows = []
    for entry in models["implementations"]:
        figures = [entry.get(key) for key in ("logits_error", "encoder_error", "loss_error", "bound")]
        greedy = entry.get("greedy_identical")
        rows.append(
            [
                entry["attn_implementation"],
                *("" if figure is None else f"{figure:.1e}" for figure in figures),
                "" if greedy is None else "identical" if greedy else "different",
            ]
        )
    return text + _table(["attention", "logits", "encoder states", "loss", "bound", "greedy tokens"], rows)


def _training(ready: Ready) -> str:
    if ready.training is None:
        return ""
    text = f"## Training\n\n{ready.training.get('steps', 0):,} steps of UL2."
    first, last = ready.training.get("first_evaluation"), ready.training.get("last_evaluation")
    if first and last:
        rows = []
        for key in sorted(key for key in last if key.startswith("eval_") and key.endswith("loss") and key in first):
            name = key.removeprefix("eval_").removesuffix("loss").removesuffix("_") or "all denoisers"
            rows.append([name, *(_with_error(entry, key) for entry in (first, last))])
        header = ["held-out loss, nats per token", f"step {first.get('step', 0)}", f"step {last.get('step', 0)}"]
        text += "\n\n" + _table(header, rows)
    if ready.curve:
        text += f"\n\n![Training and held-out loss by step]({CURVE})"
    training = (ready.training.get("recipe") or {}).get("training") or {}
    told = ("optimizer", "learning_rate", "schedule", "batch_size", "precision", "seed")
    settings = {key: training[key] for key in told if key in training}
    if settings:
        text += "\n\n" + ", ".join(f"{key} {json.dumps(value)}" for key, value in settings.items()) + "."
    return text


def _with_error(entry: Mapping[str, Any], key: str) -> str:
    error = entry.get(f"{key}_se")
    return f"{entry[key]:.4f}" + (f" ± {error:.4f}" if error else "")


def _limits(ready: Ready, origin: Origin | None) -> str:
    lines = ["The kernels need an NVIDIA GPU from sm_80 on; elsewhere the same model runs on PyTorch's own attention."]
    if origin is not None:
        told = _link(origin)
        lines.append(f"What is said of the abilities, biases and intended use of {told} holds for this model as well.")
    if not ready.tokenizer:
        lines.append("There is no tokenizer in this repo, since the source has none.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
