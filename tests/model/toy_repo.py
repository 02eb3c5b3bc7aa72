"""A small FlashT5 repository with a tokenizer, as a converted one: every library that loads models takes it."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fat5.model import FlashT5Config, FlashT5ForConditionalGeneration

WORDS = ["<pad>", "</s>", "<unk>", "a", "fine", "dull", "film", "music", "which"]
SHAPE = {"vocab_size": 16, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 2}
FIELDS = {**SHAPE, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer of a few words, which ends texts and pairs of them as T5's do."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    names = ["input_ids", "attention_mask"]  # as T5's
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names, **special)
    wrapped.save_pretrained(folder)
    return wrapped


def write_repo(folder: Path) -> FlashT5ForConditionalGeneration:
    """Model and tokenizer in a folder."""
    write_tokenizer(folder)
    model = FlashT5ForConditionalGeneration(FlashT5Config(**FIELDS)).eval()
    model.save_pretrained(folder)
    return model
