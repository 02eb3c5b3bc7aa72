"""Run by the tests in a process of its own: load a repository by its code alone, compare, save, load again.

Arguments: folder or id, file with inputs and expected logits, optionally a folder to save to, optionally `delete` to
remove the first folder before saving.
"""

import shutil
import sys

import torch
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoModelForTextEncoding


class Blocker:
    """Makes `import fat5` fail, as where FAT5 is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fat5", "fat5convert"):
            raise ImportError(f"{name} is blocked")


def main() -> None:
    sys.meta_path.insert(0, Blocker())
    repository, expected_file, *rest = sys.argv[1:]
    expected = torch.load(expected_file)
    torch.set_num_threads(1)

    def check(where):
        model = AutoModelForSeq2SeqLM.from_pretrained(where, trust_remote_code=True).eval()
        with torch.no_grad():
            logits = model(**expected["inputs"]).logits
            ids = model.generate(expected["inputs"]["input_ids"], max_new_tokens=4, num_beams=2)
        assert (logits - expected["logits"]).abs().max() <= 1e-5 * expected["logits"].abs().max()
        assert ids.shape[1] <= 5
        base = AutoModel.from_pretrained(where, trust_remote_code=True)
        encoder = AutoModelForTextEncoding.from_pretrained(where, trust_remote_code=True)
        assert (type(base).__name__, type(encoder).__name__) == ("FlashT5Model", "FlashT5EncoderModel")
        return model

    model = check(repository)
    if rest:
        if rest[1:] == ["delete"]:
            shutil.rmtree(repository)
        model.save_pretrained(rest[0])
        check(rest[0])
    assert not any(name.split(".")[0] == "fat5" for name in sys.modules)
    print("same logits")


main()
