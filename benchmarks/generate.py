"""Measure generation and embedding of FlashT5 against stock `transformers` T5, and embedding against nai-t5.

    python benchmarks/generate.py                       # everything (one GPU: half an hour; 2 CPU cores: 3 minutes)
    python benchmarks/generate.py --parts embed
    python benchmarks/generate.py --models toy --new-tokens 4 --rounds 1      # a trial
    python benchmarks/generate.py --models base --seconds 150                 # what can be begun in that time

Stock T5 is built with random weights and converted, so that all compute the same; `same` says whether they gave the
same tokens, and for embeddings the largest difference relative to the largest value. Generation is by `generate`,
greedy and with 4 beams, the cache growing token by token ("loop") or allocated at once and the step compiled
("static"); it never ends early. Batches to embed are padded to the longest of random lengths, from an eighth of it to
all of it; rates count real tokens. What is compiled comes last, on a CPU only with `--compiled`. nai-t5 (`pip install
nai-t5`) takes part where it is installed. All peers are timed in turns, round by round; a figure is the median of its
rounds, and `times_stock` the median of how many times as fast as stock, run alike by the faster of its attentions, in
the same round; `first_s` is the first call, compiling included. fp32 on a CPU, bf16 on a GPU. Writes
`generate-<device>.json` to `benchmarks/results/`, anew after each measurement.
"""

import argparse
import gc
import json
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
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


def generation_runs(folder: Path, ids: torch.Tensor, beams: int, new_tokens: int, compiled: bool) -> Runs:
    """How each peer continues a batch by `new_tokens`, in a loop or compiled."""
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

    if compiled:
        return {f"{name}, static": run_of(model, "static") for name, model in models.items()}
    return {f"{name}, loop": run_of(model, None) for name, model in models.items()}


def embedding_runs(folder: Path, ids: torch.Tensor, mask: torch.Tensor, compiled: bool) -> Runs:
    """How each peer encodes a batch."""
    models = {
        "stock eager": load(T5EncoderModel, folder / "stock", "eager"),
        "stock sdpa": load(T5EncoderModel, folder / "stock", "sdpa"),
        "fat5": load(FlashT5EncoderModel, folder / "fat5"),
    }

    def prepared(model: Any) -> Any:
        return torch.compile(model, dynamic=False) if compiled else model

    def run_of(model: Any) -> Callable[[], torch.Tensor]:
        return lambda: model(input_ids=ids, attention_mask=mask).last_hidden_state

    runs = {name: run_of(prepared(model)) for name, model in models.items()}
    if T5EncoderStack is not None:
        stock = models["stock sdpa"]
        config = to_based_config(stock.config, n_tokens=ids.shape[1])
        nai = T5EncoderStack(config)
        nai.load_state_dict(hf_to_based_t5_enc_state(stock.state_dict(), config))
        nai = prepared(nai.to(DEVICE, DTYPE).eval())
        runs["nai-t5 sdpa"] = lambda: nai(ids, input_mask=mask.bool())
    return {f"{name}, compiled": run for name, run in runs.items()} if compiled else runs


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
def time_in_turns(runs: Runs, rounds: int, compiled: bool) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of the first call and of every round, and a result of each; of a peer that cannot run, its message."""
    results: dict[str, Any] = {}
    first: dict[str, float] = {}
    for name, run in runs.items():
        try:
            first[name] = seconds(run)
            for _ in range(2 if compiled else 0):  # a graph may be compiled twice
                run()
            results[name] = run()
        except Exception as error:  # what torch.compile raises is of many kinds
            results[name] = str(error).splitlines()[0][:200]
    times = {name: [first[name]] for name, result in results.items() if not isinstance(result, str)}
    for _ in range(rounds):
        for name, rounds_of in times.items():
            rounds_of.append(seconds(runs[name]))
    return times, results


def records_of(times: dict[str, list[float]], results: dict[str, Any], units: int) -> list[dict]:
    """One record a peer: time, rate, and how many times as fast as stock, run alike, by its faster attention."""
    records = []
    stock = [rounds for name, (_, *rounds) in times.items() if name.startswith("stock")]
    for name, result in results.items():
        if name not in times:
            records.append({"peer": name, "skipped": result})
            continue
        first, *rounds = times[name]
        record = {
            "peer": name,
            "ms": statistics.median(rounds) * 1e3,
            "tokens_s": units / statistics.median(rounds),
            "first_s": first,
        }
        if stock:
            against = min(stock, key=statistics.median)
            record["times_stock"] = statistics.median(s / r for s, r in zip(against, rounds, strict=True))
        records.append(record)
    return records


def measure_generation(
    arguments: argparse.Namespace, model: str, folder: Path, compiled: bool, beams: int, rows: int
) -> list[dict]:
    """Greedy or beam search of one batch."""
    ids = torch.randint(2, SHAPES[model]["vocab_size"], (rows, arguments.inputs), device=DEVICE)
    runs = generation_runs(folder, ids, beams, arguments.new_tokens, compiled)
    times, results = time_in_turns(runs, arguments.rounds, compiled)
    about = {"part": "generate", "model": model, "rows": rows, "inputs": arguments.inputs, "beams": beams}
    records = []
    for record in records_of(times, results, rows * arguments.new_tokens):
        if "ms" in record:
            record["ms_step"] = record["ms"] / arguments.new_tokens
            record["same"] = all(torch.equal(results[record["peer"]], results[peer]) for peer in times)
        records.append(about | {"new_tokens": arguments.new_tokens} | record)
    return records


def measure_embedding(arguments: argparse.Namespace, model: str, folder: Path, compiled: bool) -> list[dict]:
    """Batches of texts of different lengths."""
    rows, longest = arguments.embed_rows, arguments.embed_length
    lengths = torch.randint(max(1, longest // 8), longest + 1, (rows,))
    lengths[0] = longest
    mask = (torch.arange(longest) < lengths[:, None]).long().to(DEVICE)
    ids = torch.randint(2, SHAPES[model]["vocab_size"], mask.shape, device=DEVICE) * mask
    times, results = time_in_turns(embedding_runs(folder, ids, mask, compiled), arguments.rounds, compiled)
    expected = results[next(iter(times))][mask.bool()].float()
    records = []
    for record in records_of(times, results, int(lengths.sum())):
        if "ms" in record:
            difference = results[record["peer"]][mask.bool()].float() - expected
            record["same"] = (difference.abs().max() / expected.abs().max()).item()
        records.append({"part": "embed", "model": model, "rows": rows, "longest": longest} | record)
    return records


def measurements(arguments: argparse.Namespace, folder: Path) -> Iterator[Callable[[], list[dict]]]:
    """What is to be measured, with what is compiled at the end."""
    for compiled in [False] * arguments.eager + [True] * arguments.compiled:
        for model in arguments.models:
            given = (arguments, model, folder / model, compiled)
            if "generate" in arguments.parts:
                for beams in arguments.beams:
                    for rows in arguments.rows:
                        yield partial(measure_generation, *given, beams, rows)
            if "embed" in arguments.parts:
                yield partial(measure_embedding, *given)


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
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=ON_GPU, help="what is compiled")
    parser.add_argument("--eager", action=argparse.BooleanOptionalAction, default=True, help="what is not compiled")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no new measurement after this time")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    start = time.perf_counter()
    about = describe()
    if not ON_GPU:
        about["device"] = f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
    arguments.output.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    path = arguments.output / f"generate-{name}.json"
    records: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        for model in arguments.models:
            write_models(model, Path(folder) / model)
        for measure in measurements(arguments, Path(folder)):
            if time.perf_counter() - start > arguments.seconds:
                print("out of time: the rest is left out")
                break
            records += (new := measure())
            for record in new:
                print_record(record)
            path.write_text(json.dumps(about | {"rounds": arguments.rounds, "records": records}, indent=1) + "\n")
            gc.collect()
            torch._dynamo.reset()  # or else what is compiled for one batch counts against the next
    print(f"written: {path}")


if __name__ == "__main__":
    main()
