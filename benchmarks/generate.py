"""Measure generation and embedding of FlashT5 against stock `transformers` T5, and embedding against nai-t5.

    python benchmarks/generate.py                       # everything (one GPU: 15 minutes; 2 CPU cores: 3 minutes)
    python benchmarks/generate.py --parts embed
    python benchmarks/generate.py --models toy --new-tokens 4 --rounds 1      # a trial

Stock T5 is built with random weights and converted, so that all compute the same; `same` says whether they gave the
same tokens, and for embeddings the largest difference relative to the largest value. Generation is by `generate`,
greedy and with 4 beams, the cache growing token by token ("loop") or allocated at once and the step compiled
("static"); it never ends early. Batches to embed are padded to the longest of random lengths, from an eighth of it to
all of it; rates count real tokens. What is compiled is measured on a GPU, on a CPU only with `--static`. nai-t5 (`pip
install nai-t5`) takes part where it is installed. One run times all peers in turns, round by round; a figure is the
median of its rounds, and `times_stock` the median of how many times as fast as stock, run alike by the faster of its
attentions, in the same round. fp32 on a CPU, bf16 on a GPU. Writes `generate-<device>.json` to `benchmarks/results/`.
"""

import argparse
import gc
import json
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import ON_GPU, describe
from transformers import CompileConfig, GenerationConfig, T5Config, T5EncoderModel, T5ForConditionalGeneration

from fat5.model import FlashT5EncoderModel, FlashT5ForConditionalGeneration
from fat5convert.convert import convert

try:
    from nai_t5 import T5EncoderStack, hf_to_based_t5_enc_state, to_based_config
except ImportError:
    T5EncoderStack = None

RESULTS = Path(__file__).parent / "results"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
SHAPES = {  # T5 v1.1
    "toy": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 256},
    "small": {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "vocab_size": 32128},
    "base": {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12, "vocab_size": 32128},
    "large": {"d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_layers": 24, "num_heads": 16, "vocab_size": 32128},
}
OPTIONS = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0}
Runs = dict[str, Callable[[], Any]]


def write_models(model: str, folder: Path) -> None:
    """Stock T5 with random weights, and its conversion."""
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(**SHAPES[model], **OPTIONS)).to(DTYPE).save_pretrained(folder / "stock")
    convert(str(folder / "stock"), folder / "fat5", verify=False)


def load(cls: Any, folder: Path, attention: str | None = None) -> Any:
    """A saved model, ready to run."""
    return cls.from_pretrained(folder, dtype=DTYPE, attn_implementation=attention).to(DEVICE).eval()


def generation_runs(folder: Path, ids: torch.Tensor, beams: int, new_tokens: int, static: bool) -> Runs:
    """How each peer continues a batch by `new_tokens`."""
    models = {
        "stock eager": load(T5ForConditionalGeneration, folder / "stock", "eager"),
        "stock sdpa": load(T5ForConditionalGeneration, folder / "stock", "sdpa"),
        "fat5": load(FlashT5ForConditionalGeneration, folder / "fat5"),
    }
    mask = torch.ones_like(ids)

    def run_of(model: Any, cache: str | None) -> Callable[[], torch.Tensor]:
        options = GenerationConfig(
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            num_beams=beams,
            do_sample=False,
            cache_implementation=cache,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
        if cache is not None:
            options.compile_config = CompileConfig()
            options.compile_config._compile_all_devices = True  # `generate` compiles on GPUs only
        return lambda: model.generate(ids, attention_mask=mask, generation_config=options)

    runs = {f"{name}, loop": run_of(model, None) for name, model in models.items()}
    if static:
        runs |= {f"{name}, static": run_of(model, "static") for name, model in models.items()}
    return runs


def embedding_runs(folder: Path, ids: torch.Tensor, mask: torch.Tensor, compiled: bool) -> Runs:
    """How each peer encodes a batch."""
    models = {
        "stock eager": load(T5EncoderModel, folder / "stock", "eager"),
        "stock sdpa": load(T5EncoderModel, folder / "stock", "sdpa"),
        "fat5": load(FlashT5EncoderModel, folder / "fat5"),
    }

    def run_of(model: Any) -> Callable[[], torch.Tensor]:
        return lambda: model(input_ids=ids, attention_mask=mask).last_hidden_state

    runs = {name: run_of(model) for name, model in models.items()}
    if compiled:
        runs |= {f"{name}, compiled": run_of(torch.compile(model, dynamic=False)) for name, model in models.items()}
    if T5EncoderStack is not None:
        stock = models["stock sdpa"]
        config = to_based_config(stock.config, n_tokens=ids.shape[1])
        nai = T5EncoderStack(config)
        nai.load_state_dict(hf_to_based_t5_enc_state(stock.state_dict(), config))
        nai = nai.to(DEVICE, DTYPE).eval()
        runs["nai-t5 sdpa"] = lambda: nai(ids, input_mask=mask.bool())
        if compiled:
            nai_compiled = torch.compile(nai, dynamic=False)
            runs["nai-t5 sdpa, compiled"] = lambda: nai_compiled(ids, input_mask=mask.bool())
    return runs


def seconds(run: Callable[[], Any]) -> float:
    """Time of one call, to the end of the device's work."""
    if ON_GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def time_in_turns(runs: Runs, rounds: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of every round and the first result of each; a peer that cannot run has its message as result."""
    results: dict[str, Any] = {}
    for name, run in runs.items():
        try:
            for _ in range(3 if "compiled" in name or "static" in name else 1):  # a graph may be compiled twice
                results[name] = run()
        except Exception as error:  # what torch.compile raises is of many kinds
            results[name] = str(error).splitlines()[0][:200]
    times: dict[str, list[float]] = {name: [] for name, result in results.items() if not isinstance(result, str)}
    for _ in range(rounds):
        for name, rounds_of in times.items():
            rounds_of.append(seconds(runs[name]))
    return times, results


def records_of(times: dict[str, list[float]], results: dict[str, Any], units: int) -> list[dict]:
    """One record a peer: time, rate, and how many times as fast as stock, run alike, by its faster attention."""
    records = []
    for name, result in results.items():
        if name not in times:
            records.append({"peer": name, "skipped": result})
            continue
        rounds, kind = times[name], name.partition(", ")[2]
        alike = [times[peer] for peer in times if peer.startswith("stock") and peer.partition(", ")[2] == kind]
        record = {
            "peer": name,
            "ms": statistics.median(rounds) * 1e3,
            "tokens_s": units / statistics.median(rounds),
        }
        if alike:
            against = min(alike, key=statistics.median)
            record["times_stock"] = statistics.median(s / r for s, r in zip(against, rounds, strict=True))
        records.append(record)
    return records


def measure_generation(arguments: argparse.Namespace, model: str, folder: Path) -> list[dict]:
    """Greedy and beam search of every batch size."""
    records = []
    for beams in arguments.beams:
        for rows in arguments.rows:
            ids = torch.randint(2, SHAPES[model]["vocab_size"], (rows, arguments.inputs), device=DEVICE)
            runs = generation_runs(folder, ids, beams, arguments.new_tokens, arguments.static)
            times, results = time_in_turns(runs, arguments.rounds)
            about = {"part": "generate", "model": model, "rows": rows, "inputs": arguments.inputs, "beams": beams}
            for record in records_of(times, results, rows * arguments.new_tokens):
                if "ms" in record:
                    record["ms_step"] = record["ms"] / arguments.new_tokens
                    record["same"] = torch.equal(results[record["peer"]], results["stock eager, loop"])
                records.append(about | {"new_tokens": arguments.new_tokens} | record)
                print_record(records[-1])
            del runs
            gc.collect()
            torch._dynamo.reset()  # or else what is compiled for one batch counts against the next
    return records


def measure_embedding(arguments: argparse.Namespace, model: str, folder: Path) -> list[dict]:
    """Batches of texts of different lengths."""
    rows, longest = arguments.embed_rows, arguments.embed_length
    lengths = torch.randint(max(1, longest // 8), longest + 1, (rows,))
    lengths[0] = longest
    mask = (torch.arange(longest) < lengths[:, None]).long().to(DEVICE)
    ids = torch.randint(2, SHAPES[model]["vocab_size"], mask.shape, device=DEVICE) * mask
    times, results = time_in_turns(embedding_runs(folder, ids, mask, arguments.static), arguments.rounds)
    expected = results["stock eager"][mask.bool()].float()
    records = []
    for record in records_of(times, results, int(lengths.sum())):
        if "ms" in record:
            difference = results[record["peer"]][mask.bool()].float() - expected
            record["same"] = (difference.abs().max() / expected.abs().max()).item()
        records.append({"part": "embed", "model": model, "rows": rows, "longest": longest} | record)
        print_record(records[-1])
    return records


def print_record(record: dict) -> None:
    """One line."""
    what = f"{record['part']:9}{record['model']:6}{record['rows']:>4} rows"
    what += f" {record['beams']} beams" if "beams" in record else ""
    if "skipped" in record:
        print(f"{what}  {record['peer']:22} {record['skipped']}", flush=True)
        return
    same = record["same"] if isinstance(record["same"], bool) else f"{record['same']:.1e}"
    times = f"{record['times_stock']:6.2f} x" if "times_stock" in record else 8 * " "
    print(
        f"{what}  {record['peer']:22}{record['ms']:10.1f} ms {record['tokens_s']:10.0f} tokens/s {times}  same: {same}"
    )


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=("generate", "embed"), default=["generate", "embed"])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["base", "large"] if ON_GPU else ["small"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16] if ON_GPU else [1])
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--inputs", type=int, default=512 if ON_GPU else 64, help="tokens that the encoder reads")
    parser.add_argument("--new-tokens", type=int, default=128 if ON_GPU else 32)
    parser.add_argument("--embed-rows", type=int, default=64 if ON_GPU else 8)
    parser.add_argument("--embed-length", type=int, default=512 if ON_GPU else 128)
    parser.add_argument("--static", action=argparse.BooleanOptionalAction, default=ON_GPU, help="and what is compiled")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    about = describe()
    if not ON_GPU:
        about["device"] = f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
    arguments.output.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    path = arguments.output / f"generate-{name}.json"
    records: list[dict] = []
    parts = {"generate": measure_generation, "embed": measure_embedding}
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            write_models(model, Path(folder))
            for part in arguments.parts:
                records += parts[part](arguments, model, Path(folder))
                path.write_text(json.dumps(about | {"rounds": arguments.rounds, "records": records}, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
