"""Save tokenizers so that every supported release of transformers reads them."""

import json
import os
from pathlib import Path

from transformers import PreTrainedTokenizerBase


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike[str]) -> None:
    """`save_pretrained` under a class name that all releases know.

    transformers 5 calls a fast tokenizer without a class of its own `TokenizersBackend`, which transformers 4 lacks;
    both read it as `PreTrainedTokenizerFast`.
    """
    tokenizer.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}  # not all kinds write it
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
