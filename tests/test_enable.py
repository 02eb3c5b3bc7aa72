"""`fat5.enable` changes how a stock model attends, and nothing else; `fat5.disable` changes it back."""

import copy
import subprocess
import sys

import pytest
import torch
import transformers
from interpreter import DEVICE, HAS_KERNELS, INTERPRETED, needs_kernels, run_interpreted
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertModel,
    MT5Config,
    MT5EncoderModel,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    T5ForQuestionAnswering,
    T5ForSequenceClassification,
    T5ForTokenClassification,
    T5Model,
    UMT5Config,
    UMT5EncoderModel,
    UMT5ForConditionalGeneration,
)

import fat5

SUPPORTED = Version(transformers.__version__) >= Version("5.17")
since_5_17 = pytest.mark.skipif(not SUPPORTED, reason="fat5.enable needs transformers 5.17")
SHAPE = {
    "vocab_size": 99, "d_model": 24, "d_kv": 6, "d_ff": 20, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 2,
    "relative_attention_max_distance": 20, "dropout_rate": 0.0, "decoder_start_token_id": 0, "num_labels": 2,
}  # fmt: skip
MODELS = {
    "t5": (T5ForConditionalGeneration, T5Config),
    "mt5": (MT5ForConditionalGeneration, MT5Config),
    "umt5": (UMT5ForConditionalGeneration, UMT5Config),
}
LENGTHS = (19, 11) if INTERPRETED or not HAS_KERNELS else (431, 277)


def test_in_the_interpreter():
    run_interpreted(__file__)


@pytest.mark.slow
def test_the_long_ones_in_the_interpreter():
    run_interpreted(__file__, "slow")


def build(cls, config_cls, implementation="eager", **fields):
    model = cls(config_cls(**{**SHAPE, **fields}, attn_implementation=implementation)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0.0, 1.0 if "relative" in name or "shared" in name else 1.2 * weight.shape[1] ** -0.5)
    return model.to("cuda" if DEVICE.type == "cuda" and HAS_KERNELS else "cpu")


def inputs_of(kind, labels=True):
    length, decoder_length = LENGTHS
    inputs = {"input_ids": torch.randint(2, 99, (2, length)), "labels": torch.randint(2, 99, (2, decoder_length))}
    if kind != "none":
        mask = torch.ones(2, length, dtype=torch.long)
        hidden = {"right": slice(12, None), "left": slice(0, 7), "holes": slice(5, 9)}[kind]
        mask[1, hidden] = 0
        inputs["attention_mask"] = mask
    if not labels:
        del inputs["labels"]
    return {name: value.to(DEVICE if HAS_KERNELS else "cpu") for name, value in inputs.items()}


def run(model, inputs):
    """Logits and every gradient."""
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return [output.logits.detach()] + [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


def assert_near(actual, expected, tolerance=2e-5 if INTERPRETED else 1e-3):
    for one, two in zip(actual, expected, strict=True):
        assert (one - two).abs().max() <= tolerance * two.abs().max()


@since_5_17
@needs_kernels
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("t5", "right"),
        pytest.param("umt5", "left", marks=pytest.mark.slow),
        *(pytest.param("t5", kind, marks=pytest.mark.slow) for kind in ("none", "left", "holes")),
        pytest.param("mt5", "right", marks=pytest.mark.slow),
    ],
)
def test_logits_and_gradients(family, kind):
    model = build(*MODELS[family])
    inputs = inputs_of(kind)
    expected = run(model, inputs)
    fat5.enable(model)
    assert_near(run(model, inputs), expected)
    rounding = 0 if DEVICE.type == "cpu" else 1e-4  # a GPU adds a table's gradient, 10^5 terms an entry, in any order
    assert_near(run(fat5.disable(model), inputs), expected, rounding)


@since_5_17
@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), [("t5", "right"), ("umt5", "left")])
def test_generation(family, kind):
    model = build(*MODELS[family])
    inputs = inputs_of(kind, labels=False)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = model.generate(**inputs, **options)
    fat5.enable(model)
    assert torch.equal(model.generate(**inputs, **options), expected)
    assert torch.equal(model.generate(**inputs, **options, cache_implementation="static"), expected)
    prompt = torch.tensor([[0, 0, 0, 7], [0, 5, 6, 8]], device=expected.device)
    prompted = {**inputs, "decoder_input_ids": prompt, "decoder_attention_mask": torch.ones_like(prompt)}
    prompted["decoder_attention_mask"][0, :2] = 0
    again = model.generate(**prompted, **options), model.generate(**prompted, **options, cache_implementation="static")
    expected = fat5.disable(model).generate(**prompted, **options)
    assert torch.equal(again[0], expected)
    assert torch.equal(again[1], expected)


class LargestSquare(TorchDispatchMode):
    """The largest tensor that any operation returns with two axes of a sequence's length, in elements."""

    def __init__(self, lengths):
        super().__init__()
        self.lengths, self.elements = lengths, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and sum(size in self.lengths for size in tensor.shape) > 1:
                self.elements = max(self.elements, tensor.numel())
        return result


@since_5_17
@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), [("t5", "left"), ("umt5", "right")])
def test_nothing_is_as_long_as_it_is_wide(family, kind):
    model = build(*MODELS[family])
    inputs = inputs_of(kind)
    squares = []
    for change in (fat5.disable, fat5.enable):
        with LargestSquare(LENGTHS) as mode:
            run(change(model), inputs)
        squares.append(mode.elements)
    length, decoder_length = LENGTHS
    assert squares[0] >= SHAPE["num_heads"] * length * max(length, decoder_length)
    assert squares[1] == 0


@since_5_17
@needs_kernels
@pytest.mark.slow
def test_gradient_checkpointing():
    model = build(*MODELS["t5"])
    inputs = inputs_of("left")
    expected = run(model, inputs)
    fat5.enable(model).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_near(run(model, inputs), expected)


HEADS = [
    (T5Model, T5Config), (T5ForSequenceClassification, T5Config), (T5ForTokenClassification, T5Config),
    (T5ForQuestionAnswering, T5Config), (MT5EncoderModel, MT5Config), (UMT5EncoderModel, UMT5Config),
]  # fmt: skip


@since_5_17
@pytest.mark.parametrize(("cls", "config_cls"), [*HEADS, *MODELS.values()])
def test_every_class_runs_and_keeps_its_state(cls, config_cls, tmp_path):
    """Here without kernels as well: enabled modules run on sdpa."""
    model = build(cls, config_cls)  # on eager: under sdpa the decoder of umT5 is not causal in transformers 5.17
    inputs = inputs_of("left", labels=False)
    if "Encoder" not in cls.__name__ and "TokenClass" not in cls.__name__ and "Sequence" not in cls.__name__:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :7]
    inputs["input_ids"][:, -1] = 1  # the end of the sentence, where the classifier looks
    names, weights = list(model.state_dict()), list(model.parameters())
    modules = {name: type(module) for name, module in model.named_modules()}
    with torch.no_grad():
        expected = model(**inputs)[0]
        assert fat5.enable(model) is model
        types = {type(module).__name__ for module in model.modules() if "Attention" in type(module).__name__}
        actual = model(**inputs)[0]
    assert any(name.startswith("Enabled") for name in types)
    assert not types & {"T5Attention", "MT5Attention", "UMT5Attention"}
    real = slice(None) if actual.dim() == 2 or actual.shape[1] != LENGTHS[0] else slice(7, None)
    assert_near([actual[:, real]], [expected[:, real]], 1e-4)
    assert list(model.state_dict()) == names
    assert all(one is two for one, two in zip(model.parameters(), weights, strict=True))
    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    saved = loaded.to(expected.device).state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in model.state_dict().items())
    assert fat5.disable(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == modules
    stacks = [module for module in model.modules() if isinstance(module, transformers.PreTrainedModel)]
    assert all(stack.config._attn_implementation == "eager" for stack in stacks)
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], expected)


@since_5_17
@pytest.mark.parametrize("mask", ["bool", "float"])
def test_masks_of_the_users_own(mask):
    model = build(*MODELS["t5"], "sdpa")
    inputs = inputs_of("none")
    allowed = torch.rand(2, 1, LENGTHS[0], LENGTHS[0], device=inputs["input_ids"].device) < 0.7
    own = allowed if mask == "bool" else torch.zeros_like(allowed, dtype=torch.float).masked_fill(~allowed, -1e4)
    with torch.no_grad():
        expected = model.encoder(inputs["input_ids"], attention_mask=own).last_hidden_state
        actual = fat5.enable(model).encoder(inputs["input_ids"], attention_mask=own).last_hidden_state
    assert_near([actual], [expected], 1e-4)


@since_5_17
def test_twice_is_once_and_copies_are_independent():
    model = build(*MODELS["t5"])
    twin = copy.deepcopy(fat5.enable(fat5.enable(model)))
    inputs = inputs_of("right")
    with torch.no_grad():
        expected = model(**inputs).logits
        for weight in model.parameters():
            weight.zero_()
        assert torch.equal(twin(**inputs).logits, expected)
        fat5.disable(fat5.disable(twin))
        assert_near([twin(**inputs).logits], [expected], 1e-4)
    assert twin.encoder.block[0].layer[0].SelfAttention.q.weight.abs().max() > 0


@since_5_17
def test_adapters_stay_through_enable_and_disable():
    from peft import LoraConfig, get_peft_model

    model = fat5.enable(build(*MODELS["t5"]))
    adapted = get_peft_model(model, LoraConfig(target_modules=["q"], r=2, task_type="SEQ_2_SEQ_LM")).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_()
        inputs = inputs_of("right")
        expected = adapted(**inputs).logits
        with adapted.disable_adapter():
            assert (adapted(**inputs).logits - expected).abs().max() > 1e-2
        fat5.disable(model)
        assert_near([adapted(**inputs).logits], [expected], 1e-4)


@since_5_17
def test_what_is_refused():
    bert = BertModel(BertConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8))
    for other in (bert, torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=rf"T5, mT5 or umT5.*{type(other).__name__}"):
            fat5.enable(other)
    model = fat5.enable(build(*MODELS["t5"]))
    inputs = inputs_of("none")
    with pytest.raises(ValueError, match="no attention weights"):
        model(**inputs, output_attentions=True)
    model.encoder.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"fat5\.disable"):
        model(**inputs)
    stock = build(*MODELS["t5"], "fat5")  # the name is known, but the model was not enabled
    with pytest.raises(ValueError, match=r"fat5\.enable"):
        stock(**inputs)


@pytest.mark.skipif(SUPPORTED, reason="this release is supported")
def test_older_releases_are_refused():
    with pytest.raises(RuntimeError, match=r"5\.17 or later"):
        fat5.enable(build(*MODELS["t5"]))


def test_importing_fat5_is_cheap():
    code = "import sys, fat5; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fat5.nothing
