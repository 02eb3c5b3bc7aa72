"""Run as a script by `load_check`, in a process of its own: load a repo by the code that it carries, and run it.

Arguments: the folder; `whole` to load the weights, or `outline` to compare only their names and shapes with the
model's, where they are large; `tokenizer` if there is one. Prints one line of JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any


class NoFat5:
    """Makes `import fat5` fail, as where it is not installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Refuse our packages; have the next finder look for any other."""
        if name.split(".")[0] in ("fat5", "fat5convert"):
            raise ImportError(f"{name} is not to be used here")


def load(folder: str, how: str, *extras: str) -> None:
    """Load the repo and run it on a few tokens.

    Raises:
        ValueError: weights are missing, left over or not finite, or the tokenizer has no vocabulary.
    """
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    wanted = config.architectures[0]
    name = next(key for key, value in config.auto_map.items() if value.rsplit(".", 1)[-1] == wanted)
    auto = getattr(transformers, name)
    if "tokenizer" in extras:
        check_vocabulary(transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True), Path(folder))
    if how == "outline":
        with torch.device("meta"):
            outline = auto.from_config(config, trust_remote_code=True)
        compare({key: list(value.shape) for key, value in outline.named_parameters()}, Path(folder))
        return
    model, report = auto.from_pretrained(folder, trust_remote_code=True, dtype="auto", output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise ValueError(f"{kind.replace('_', ' ')}: {', '.join(sorted(map(str, report[kind])))}")
    ids = torch.arange(3, 11)[None] % config.vocab_size
    with torch.no_grad():
        states = model.eval().get_encoder()(input_ids=ids)[0]
        if not states.isfinite().all():
            raise ValueError("the encoder's output is not finite")
        if hasattr(model, "lm_head"):
            model.generate(ids, max_new_tokens=2)


def check_vocabulary(tokenizer: Any, folder: Path) -> None:
    """See that a tokenizer has what it is made of: transformers 5 makes one of a hundred tokens of nothing."""
    names = sorted(set(tokenizer.vocab_files_names.values()))
    if names and not any((folder / name).is_file() for name in names):
        raise ValueError(f"the tokenizer, a {type(tokenizer).__name__}, has no vocabulary: none of {', '.join(names)}")


def compare(shapes: dict[str, list[int]], folder: Path) -> None:
    """Hold names and shapes of a model's parameters against the headers of the weight files."""
    from safetensors import safe_open

    stored: dict[str, list[int]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = file.keys()
            stored |= {key: file.get_slice(key).get_shape() for key in names}
    for key in sorted(shapes.keys() | stored.keys()):
        if shapes.get(key) != stored.get(key):
            raise ValueError(f"{key} has shape {stored.get(key)} in the files and {shapes.get(key)} in the model")


if __name__ == "__main__":
    sys.meta_path.insert(0, NoFat5())
    try:
        load(*sys.argv[1:])
        print(json.dumps({"error": None}))
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
