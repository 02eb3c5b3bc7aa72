"""Libraries that load FlashT5 by `transformers`, installed for the test: sentence-transformers and bitsandbytes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_parity import build_pair
from toy_repo import write_repo, write_tokenizer
from transformers import AutoModelForTextEncoding

pytestmark = pytest.mark.versions
HERE = Path(__file__).parent


def run(script: str, folder: Path, package: str, *complete: str) -> None:
    """Run a script in a folder, with a package beside what is installed, and others with all that they require."""
    packages = folder / "packages"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(packages)]
    for requirements in (["--no-deps", package], complete):
        done = subprocess.run([*pip, *requirements], capture_output=True, text=True) if requirements else None
        if done is not None and done.returncode != 0:
            pytest.skip(f"{package} cannot be installed: {done.stderr[-500:]}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(packages), str(HERE)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


WITHOUT_FAT5 = "import sys; sys.modules['fat5'] = None\n"

EMBED = """
import torch
from sentence_transformers import SentenceTransformer

expected = torch.load("expected.pt")
model = SentenceTransformer("encoder", trust_remote_code=True, device="cpu")
for folder in ("saved", None):
    embeddings = model.encode(expected["texts"], convert_to_tensor=True)
    torch.testing.assert_close(embeddings, expected["embeddings"])
    if folder is not None:
        model.save_pretrained(folder)
        model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
"""


def test_sentence_transformers_load_the_encoder(tmp_path):
    write_repo(tmp_path / "repo")
    encoder = AutoModelForTextEncoding.from_pretrained(tmp_path / "repo", trust_remote_code=True).eval()
    encoder.save_pretrained(tmp_path / "encoder")
    tokenizer = write_tokenizer(tmp_path / "encoder")
    texts = ["a fine film", "which dull music a film", "music"]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    mask = inputs["attention_mask"][..., None]
    with torch.no_grad():
        states = encoder(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    torch.save({"texts": texts, "embeddings": (states * mask).sum(1) / mask.sum(1)}, tmp_path / "expected.pt")
    run(WITHOUT_FAT5 + EMBED, tmp_path, "sentence-transformers", "scikit-learn")


COMPARE = """
import numpy
for embeddings in (embeddings, again):
    numpy.testing.assert_allclose(embeddings, mean.numpy(), rtol=1e-4, atol=1e-5)
"""


def test_the_page_on_embeddings(tmp_path):
    write_repo(tmp_path / "flan-t5-small-fat5")
    page = (HERE.parents[1] / "docs" / "embeddings.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    run("".join([WITHOUT_FAT5, *blocks, COMPARE]), tmp_path, "sentence-transformers", "scikit-learn")


QUANTISE = """
import torch
from model_parity import relative_error
from transformers import AutoModelForSeq2SeqLM, BitsAndBytesConfig, T5ForConditionalGeneration

quantised = {
    "Linear8bitLt": BitsAndBytesConfig(load_in_8bit=True),
    "Linear4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}
inputs = torch.load("inputs.pt")
for kind, config in quantised.items():
    stock = T5ForConditionalGeneration.from_pretrained("stock", quantization_config=config).eval()
    model = AutoModelForSeq2SeqLM.from_pretrained("repo", quantization_config=config, trust_remote_code=True).eval()
    kinds = [[type(layer).__name__ for layer in net.modules()].count(kind) for net in (stock, model)]
    assert kinds[0] == kinds[1] > 0, kinds
    assert type(model.encoder.block[0].self_attention_layer.self_attention.Wq).__name__ == kind
    assert type(model.encoder.block[0].ff_layer.wo) is torch.nn.Linear  # kept, as in stock T5
    with torch.no_grad():
        error = relative_error(model(**inputs).logits.float(), stock(**inputs).logits.float())
    print(kind, error)
    assert error < 0.02
    assert model.generate(inputs["input_ids"], max_new_tokens=4).shape[0] == len(inputs["input_ids"])
"""


def test_8_bit_and_4_bit_compute_what_stock_t5_does(tmp_path):
    # Blocks of 64 values share a scale, and 8-bit outliers start at 6: a shape and weights that meet neither.
    shape = {"d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 128}
    stock, model = build_pair("t5_v1_1", **shape)
    with torch.no_grad():
        for name, weight in (*stock.named_parameters(), *model.named_parameters()):
            if weight.ndim == 2 and "shared" not in name and "relative" not in name:
                weight.mul_(0.5)
    stock.save_pretrained(tmp_path / "stock")
    model.save_pretrained(tmp_path / "repo")
    ids = torch.randint(2, 99, (2, 12))
    torch.save({"input_ids": ids, "decoder_input_ids": ids[:, :7]}, tmp_path / "inputs.pt")
    run(QUANTISE, tmp_path, "bitsandbytes")
