"""Does what users do with a repo of the Hub where FAT5 is not installed: {"action": ..., ...}; see the functions.

Each starts with nothing in the cache but what it downloads itself.
"""

import os
import re
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import transformers
from fork_server import serve
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

EVERY = {"save_strategy": "steps", "save_steps": 1, "hub_strategy": "every_save", "hub_always_push": True}
IDS = torch.arange(3, 27).view(2, 12)


class NoFat5:
    """Makes `import fat5` fail, as where it is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fat5", "fat5convert"):
            raise ImportError(f"{name} is blocked")


def load(repo: str, **options):
    model = AutoModelForSeq2SeqLM.from_pretrained(repo, trust_remote_code=True, **options).eval()
    assert type(model).__module__.startswith("transformers_modules.")
    return model


def changed(repo: str, **options):
    """The model, with weights that nobody else has."""
    model = load(repo, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.01 * torch.randn_like(weight))
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, decoder_input_ids=IDS[:, :5]).logits


def keep(model, file: str) -> None:
    torch.save(logits(model.eval()), file)


def check(repo: str, file: str | None = None, tokenizer: bool = True, **options) -> None:
    """Load a repo, see that it computes what was kept, and generate."""
    model = load(repo, **options)
    if file is not None:
        expected = torch.load(file)
        assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    ids = IDS
    if tokenizer:
        ids = AutoTokenizer.from_pretrained(repo, trust_remote_code=True, **options)(
            "abc", return_tensors="pt"
        ).input_ids
    assert model.generate(ids, max_new_tokens=4, num_beams=2).shape[1] <= 5
    assert not any(name.split(".")[0] == "fat5" for name in sys.modules)


def run_card(repo: str) -> None:
    """Do what its card says of how to load it."""
    from huggingface_hub import ModelCard

    (code,) = re.findall(r"```python\n(.*?)```", ModelCard.load(repo).text, re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert type(names["model"]).__name__ == names["model"].config.architectures[0]
    assert "inputs" in names


def run_code(code: str) -> None:
    exec(code, {})


def save_and_push(repo: str, target: str, file: str) -> None:
    model = changed(repo)
    keep(model, file)
    model.push_to_hub(target)
    AutoTokenizer.from_pretrained(repo, trust_remote_code=True).push_to_hub(target)


def trainer(model, folder: str, target: str, repo: str, **options) -> Trainer:
    row = {"input_ids": IDS[0], "labels": IDS[0, :5]}
    arguments = {
        "output_dir": folder,
        "max_steps": 2,
        "per_device_train_batch_size": 1,
        "use_cpu": True,
        "report_to": [],
    }
    arguments |= {"push_to_hub": True, "hub_model_id": target, "save_strategy": "no", "logging_steps": 1}
    tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=True)
    return Trainer(model, TrainingArguments(**arguments | options), train_dataset=[row] * 4, processing_class=tokenizer)


def train_and_push(repo: str, target: str, file: str, folder: str) -> None:
    """`Trainer.save_model`, and its folder pushed by `Trainer.push_to_hub`."""
    training = trainer(load(repo), folder, target, repo)
    training.train()
    training.save_model()
    training.push_to_hub()
    keep(training.model, file)


def train_pushing_every_save(repo: str, target: str, file: str, folder: str) -> None:
    """A push after each checkpoint, and no other: as if the run had been killed before its last."""
    training = trainer(load(repo), folder, target, repo, **EVERY)

    class Waits(TrainerCallback):
        """A push reads the folder when its turn comes: by then a slow machine may have the next checkpoint in it."""

        def on_step_begin(self, *_, **__):
            training._finish_current_push()

    training.add_callback(Waits())
    training.train()
    training._finish_current_push()
    keep(training.model, file)


def merge_and_push(repo: str, target: str, file: str) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(load(repo), LoraConfig(target_modules=["Wq", "Wv"], r=2, task_type="SEQ_2_SEQ_LM"))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    before = logits(load(repo))
    merged = adapted.merge_and_unload()
    assert (logits(merged) - before).abs().max() > 1e-3 * before.abs().max()
    keep(merged, file)
    merged.push_to_hub(target)


def together(work: Callable[[int], None], folder: str) -> None:
    """Do it in two processes, of which this one is the first, that make a group."""
    from torch import distributed as dist

    Path(folder).mkdir()
    second = os.fork()
    rank = 0 if second else 1
    status = 1
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=100)
        )
        work(rank)
        status = 0
    finally:
        if rank == 1:
            if status:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(status)
    assert os.waitpid(second, 0)[1] == 0


def shard_and_push(repo: str, target: str, file: str, folder: str) -> None:
    """A step of FSDP2, saved as `Trainer` does it, which itself shards on GPUs alone."""
    from huggingface_hub import snapshot_download
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2,))
        model = changed(repo)
        for block in [*model.encoder.block, *model.decoder.block]:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert type(model).__name__ == "FSDPFlashT5ForConditionalGeneration"
        assert all(isinstance(weight, DTensor) for weight in model.parameters())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(input_ids=IDS, labels=IDS[:, :5]).loss.backward()
        optimizer.step()
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank == 0:
            alone = load(repo)
            alone.load_state_dict(whole)
            keep(alone, file)
        model.save_pretrained(f"{folder}/model", state_dict=whole, is_main_process=rank == 0)

    # transformers 4 takes a file for missing that another process is just fetching
    snapshot_download(repo)
    together(work, folder)
    upload(f"{folder}/model", target)


def upload(folder: str, target: str) -> None:
    from huggingface_hub import HfApi

    HfApi().create_repo(target, exist_ok=True)
    HfApi().upload_folder(repo_id=target, folder_path=folder)


def pin_and_push(repo: str, target: str, file: str, code: str) -> None:
    """Weights of main, code of another revision; the saved repo has that code."""
    model = changed(repo, code_revision=code)
    keep(model, file)
    model.push_to_hub(target)


ACTIONS = {
    action.__name__: action
    for action in (
        check,
        run_card,
        run_code,
        save_and_push,
        train_and_push,
        train_pushing_every_save,
        merge_and_push,
        shard_and_push,
        pin_and_push,
        upload,
    )
}


def run(request: dict) -> None:
    transformers.logging.set_verbosity_error()
    ACTIONS[request["action"]](**request["arguments"])


if __name__ == "__main__":
    sys.meta_path.insert(0, NoFat5())
    assert os.environ["HF_ENDPOINT"].startswith("http://127.0.0.1:")
    serve(run)
