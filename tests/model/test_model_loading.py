"""Loading as `from_pretrained` offers it: spread over devices and disk, in another dtype, without a second copy."""

import pytest
import torch
from model_parity import SHAPE, batch, randomise, relative_error
from transformers import AutoModelForSeq2SeqLM

from fat5.model import FlashT5Config, FlashT5EncoderModel, FlashT5ForConditionalGeneration


@pytest.fixture
def saved(tmp_path):
    model = FlashT5ForConditionalGeneration(FlashT5Config(**SHAPE, feed_forward_proj="gated-gelu")).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    return model


def assert_same_logits(loaded, whole):
    """Of real tokens, on the GPU: what runs without padding has zeros for the others."""
    inputs = batch("right")
    logits = loaded(**{name: value.cuda() for name, value in inputs.items()}).logits.cpu()
    real = inputs["decoder_attention_mask"].bool()
    assert relative_error(logits[real], whole(**inputs).logits[real]) < 1e-3


def size(model):
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize(
    ("cls", "part"),
    [(FlashT5ForConditionalGeneration, 0.8), (FlashT5ForConditionalGeneration, 0.5), (FlashT5EncoderModel, 0.8)],
)
def test_what_memory_does_not_hold_lies_on_disk(cls, part, saved, tmp_path):
    whole = cls.from_pretrained(tmp_path).eval()
    loaded = cls.from_pretrained(
        tmp_path,
        device_map="auto",
        max_memory={"cpu": int(part * size(whole))},
        offload_folder=tmp_path / "offload",
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    blocks = {name for name in loaded.hf_device_map if ".block." in name}
    assert all(name.split(".block.")[1].isdigit() for name in blocks)  # no block is torn apart
    inputs = batch("right")
    if cls is FlashT5EncoderModel:
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        assert torch.equal(loaded(**inputs).last_hidden_state, whole(**inputs).last_hidden_state)
        return
    assert torch.equal(loaded(**inputs).logits, whole(**inputs).logits)
    options = {"max_new_tokens": 6, "num_beams": 2}
    assert torch.equal(loaded.generate(inputs["input_ids"], **options), whole.generate(inputs["input_ids"], **options))


@pytest.mark.gpu
@torch.no_grad()
def test_what_the_gpu_does_not_hold_lies_in_memory(saved, tmp_path):
    loaded = FlashT5ForConditionalGeneration.from_pretrained(
        tmp_path, device_map="auto", max_memory={0: int(0.6 * size(saved)), "cpu": "1GB"}
    )
    assert set(loaded.hf_device_map.values()) == {0, "cpu"}
    assert_same_logits(loaded, saved)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("auto", [False, True])
def test_dtype(name, auto, saved, tmp_path):
    folder = tmp_path / "half"
    saved.to(torch.bfloat16).save_pretrained(folder)
    asked = "auto" if auto else torch.float32
    loaded = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True, **{name: asked})
    assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16 if auto else torch.float32}
    for key, weight in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[key].to(weight.dtype), weight), key


@torch.no_grad()
@pytest.mark.parametrize("options", [{"low_cpu_mem_usage": True}, {"device_map": "cpu"}, {"device_map": "auto"}])
def test_without_a_second_copy(options, saved, tmp_path):
    loaded = FlashT5ForConditionalGeneration.from_pretrained(tmp_path, **options).cpu()
    assert not any(weight.is_meta for weight in loaded.state_dict().values())
    inputs = batch("left")
    assert torch.equal(loaded(**inputs).logits, saved(**inputs).logits)


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.gpu
@two_gpus
def test_kernels_run_where_their_tensors_are(saved):
    """On the second GPU while the first is the current one: loss, gradients and tokens as on the first."""
    inputs, results = batch("left"), []
    for device in ("cuda:0", "cuda:1"):
        model = saved.to(device)
        model.zero_grad()
        given = {name: value.to(device) for name, value in inputs.items()}
        with torch.cuda.device(0):
            loss = model.train()(**given).loss
            loss.backward()
            tokens = model.eval().generate(given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=6)
        results.append([x.detach().cpu().clone() for x in (loss, tokens, *(p.grad for p in model.parameters()))])
    for other, expected in zip(*results, strict=True):
        assert relative_error(other.float(), expected.float()) < 1e-4


@pytest.mark.gpu
@two_gpus
@torch.no_grad()
def test_a_model_over_two_gpus(saved, tmp_path):
    share = int(0.6 * size(saved))
    loaded = FlashT5ForConditionalGeneration.from_pretrained(
        tmp_path, device_map="auto", max_memory={0: share, 1: share, "cpu": "1GB"}
    )
    assert {0, 1} <= set(loaded.hf_device_map.values())
    assert_same_logits(loaded, saved)
