"""A toy stock T5 and its conversion, with a real tokenizer, and a little text: what `fat5 pretrain` needs."""

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

WORDS = ["the", "a", "one", "two", "red", "old", "new", "cat", "dog", "bird", "tree", "house", "sees", "finds", "and"]


@dataclass(frozen=True)
class Toy:
    """Where the toys lie."""

    stock: Path
    model: Path
    train: Path
    held_out: Path
    cache: Path

    def settings(self, output: Path, **changes: object) -> list[str]:
        """Give the `--set` arguments that make any recipe a toy run into `output`; `__` in a key is a dot."""
        values = {
            "model.path": self.model,
            "data.train": f"[{{files: ['{self.train}'], documents: line}}]",
            "data.evaluation": f"[{{files: ['{self.held_out}'], documents: line}}]",
            "data.cache": self.cache,
            "data.max_input_length": 40,
            "data.max_target_length": 40,
            "training.steps": 2,
            "training.warmup_steps": 0,
            "training.batch_size": 4,
            "training.micro_batch_size": 2,
            "training.device": "cpu",
            "training.loader_workers": 0,
            "evaluation.every": 1,
            "evaluation.examples": 12,
            "evaluation.batch_size": 5,
            "output.folder": output,
            "output.log_every": 1,
            "output.save_every": 2,
        }
        values |= {key.replace("__", "."): value for key, value in changes.items()}
        return [f"{key}={value}" for key, value in values.items()]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One id a word, laid out as T5's: pad 0, eos 1, unk 2, and the sentinels last, counting down."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    sentinels = [f"<extra_id_{i}>" for i in range(20)]
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", *sentinels[::-1]])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def write_text(path: Path, seed: int, lines: int) -> Path:
    draw = random.Random(seed)
    text = (" ".join(draw.choices(WORDS, range(len(WORDS), 0, -1), k=draw.randint(4, 60))) for _ in range(lines))
    path.write_text("".join(line + "\n" for line in text), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _no_precision_left_by_an_earlier_run(monkeypatch):
    """Transformers 4 keeps a run's mixed precision in the process, for the next run to take over."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Toy:
    """A stock T5 v1.1 folder, what fat5convert makes of it, and text."""
    from click.testing import CliRunner

    from fat5convert.cli import main as fat5convert

    folder = tmp_path_factory.mktemp("toy")
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    # transformers 5 ties a fresh T5 even when asked not to; a head of its own has to be put there.
    model.lm_head.weight = torch.nn.Parameter(torch.randn(64, 32) * 32**-0.5)
    model.config.tie_word_embeddings = False
    model.save_pretrained(folder / "stock")
    tokenizer.save_pretrained(folder / "stock")
    result = CliRunner().invoke(fat5convert, [str(folder / "stock"), str(folder / "model")])
    assert result.exit_code == 0, result.output
    return Toy(
        stock=folder / "stock",
        model=folder / "model",
        train=write_text(folder / "train.txt", 1, 30),
        held_out=write_text(folder / "held_out.txt", 2, 20),
        cache=folder / "tokens",
    )
