"""Measure `fat5 pretrain` as it is used: UL2 at 512/512, from text on the disk to updated weights.

    python benchmarks/pretrain.py                                            # one GPU, about 3 minutes
    python benchmarks/pretrain.py --processes 2 --parallel ddp fsdp          # two GPUs, through torchrun
    python benchmarks/pretrain.py                                            # on a CPU: toy sizes, times mean nothing

Writes text of its own, documents of 100 to 2,000 words (a token each) as frequent as words are, trains a T5-base of
random weights on it by `recipes/ul2.yaml` in bf16, with packing (`stream`) and without (`none`), launched from CUDA
graphs and from Python, and reads the run's own log: the warm-up's entries are left out, the others added up. Rows are
those of a forward pass of one process; an update has as many. Model tokens are real encoder and decoder tokens, text
tokens those that they were made from; MFU is as in `fat5/train/flops.py`. Stores `pretrain-<device>.json` in
`benchmarks/results/`.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from measure import ON_GPU, describe
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fat5.train.data import load_data
from fat5.train.load import load_tokenizer
from fat5.train.options import ModelOptions
from fat5.train.recipe import Recipe, load_recipe
from fat5.train.report import versions

HERE = Path(__file__).parent
WARM_UP, STEPS, EACH = (20, 60, 10) if ON_GPU else (2, 4, 1)  # updates; each entry of the log sums up so many
WORDS, DOCUMENTS, LENGTHS = (31997, 4000, (100, 2000)) if ON_GPU else (500, 60, (10, 200))
LONGEST = 512 if ON_GPU else 48
SHAPE = "{d_model: 768, d_kv: 64, d_ff: 2048, num_layers: 12, num_heads: 12" if ON_GPU else "{d_model: 32, d_kv: 8"
SHAPE += ", feed_forward_proj: gated-gelu, tie_word_embeddings: false}"
EMBEDDING = 32128 if ON_GPU else 640


def write_tokenizer(folder: Path) -> None:
    """A word is a token; ids as T5's: pad 0, EOS 1, unk 2, and 100 sentinels last, counting down."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *(f"w{n}" for n in range(WORDS))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", *(f"<extra_id_{n}>" for n in reversed(range(100)))])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def write_text(path: Path) -> None:
    """Documents of lengths drawn evenly in the logarithm, of words as frequent as Zipf's law has it."""
    random = np.random.default_rng(0)
    frequency = 1 / np.arange(1, WORDS + 1)
    low, high = np.log(LENGTHS)
    with path.open("w") as file:
        for length in np.exp(random.uniform(low, high, DOCUMENTS)).astype(int):
            words = random.choice(WORDS, length, p=frequency / frequency.sum())
            file.write(json.dumps({"text": " ".join(f"w{n}" for n in words)}) + "\n")


def settings(folder: Path, form: str, rows: int, parallel: str, graphs: bool, processes: int) -> list[str]:
    """What is changed of `recipes/ul2.yaml`."""
    values = {
        "model": f"{{path: '{folder}/tokenizer', fresh: {SHAPE}, dropout_rate: 0.0}}",
        "data.train": f"[{{files: ['{folder}/text.jsonl']}}]",
        "data.evaluation": "[]",
        "data.cache": folder / "tokens",
        "data.max_input_length": LONGEST,
        "data.max_target_length": LONGEST,
        "data.packing": form,
        "training.steps": WARM_UP + STEPS,
        "training.warmup_steps": WARM_UP,
        "training.batch_size": rows * processes,
        "training.micro_batch_size": rows,
        "training.parallel": parallel,
        "training.cuda_graphs": str(graphs).lower(),
        "output.folder": folder / "run",
        "output.log_every": EACH,
        "output.save_every": 10**6,
    }
    return [f"{key}={value}" for key, value in values.items()]


def text_tokens(recipe: Recipe) -> int:
    """Tokens of raw text in the batches of the steps that are measured."""
    tokenizer = load_tokenizer(ModelOptions(recipe.model.path), None)
    at_once = recipe.training.batch_size // recipe.training.micro_batch_size
    batches: Any = load_data(recipe, tokenizer, EMBEDDING, at_once).batches
    numbers = range(WARM_UP * at_once, (WARM_UP + STEPS) * at_once)
    return sum(int(batches.gather(number).plan.lengths.sum()) for number in numbers)


def add_up(log: list[dict[str, Any]], text: int, processes: int) -> dict[str, Any]:
    """Add the log's entries up: the rates of each are over its own seconds."""
    seconds = tokens = places = 0.0
    shares = {"mfu": 0.0, "tflops": 0.0, "data_wait": 0.0}
    before = 0
    for entry in (entry for entry in log if "loss" in entry):
        new, before = entry["tokens"] - before, entry["tokens"]
        if entry["step"] <= WARM_UP:
            continue
        its_seconds = new / entry["tokens_per_second"]
        seconds, tokens, places = seconds + its_seconds, tokens + new, places + new / (1 - entry["padding"])
        for name in shares:
            shares[name] += entry.get(name, 0.0) * its_seconds
    means = {name: total / seconds for name, total in shares.items() if total or name == "data_wait"}
    memory = max((entry["peak_memory_gib"] for entry in log if "peak_memory_gib" in entry), default=None)
    return {
        "steps": STEPS,
        "ms_a_step": seconds / STEPS * 1e3,
        "model_tokens_per_second": tokens / seconds,
        "text_tokens_per_second": text / seconds,
        "text_tokens_per_second_and_gpu": text / seconds / processes,
        **means,
        "padding": 1 - tokens / places,
        "peak_memory_gib": memory,
        "first_loss": next(entry["loss"] for entry in log if "loss" in entry),
        "last_loss": [entry["loss"] for entry in log if "loss" in entry][-1],
    }


def measure(folder: Path, form: str, rows: int, parallel: str, graphs: bool, processes: int) -> dict[str, Any]:
    """One run, in processes of its own."""
    changes = settings(folder, form, rows, parallel, graphs, processes)
    command = ["-m", "fat5.cli", "pretrain", "ul2", *(part for change in changes for part in ("--set", change))]
    if processes > 1 or parallel == "fsdp":
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [*launcher, *command]
    subprocess.run([sys.executable, *command], check=True, cwd=HERE.parent)
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    recipe = load_recipe(HERE.parent / "recipes" / "ul2.yaml", changes)
    shutil.rmtree(folder / "run")
    return add_up(log, text_tokens(recipe), processes)


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packing", nargs="+", choices=("stream", "segments", "none"), default=["stream", "none"])
    parser.add_argument("--launch", nargs="+", choices=("graphs", "python"), default=["graphs", "python"])
    parser.add_argument("--rows", nargs="+", type=int, default=[64, 128] if ON_GPU else [4])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--parallel", nargs="+", choices=("ddp", "fsdp"), default=["ddp"])
    parser.add_argument("--output", type=Path, default=HERE / "results")
    options = parser.parse_args()
    about = describe() | {"versions": versions(), "processes": options.processes, "records": []}
    device = re.sub(r"[^a-z0-9]+", "-", about["device"].lower().split(",")[0]).strip("-")
    several = f"-x{options.processes}" if options.processes > 1 else ""
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"pretrain-{device}{several}.json"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokenizer(folder / "tokenizer")
        write_text(folder / "text.jsonl")
        for parallel, rows, form, launch in product(options.parallel, options.rows, options.packing, options.launch):
            case = {"packing": form, "rows": rows, "parallel": parallel, "launch": launch}
            case |= measure(folder, form, rows, parallel, launch == "graphs", options.processes)
            about["records"].append(case)
            path.write_text(json.dumps(about, indent=1) + "\n")
            print({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in case.items()}, flush=True)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
