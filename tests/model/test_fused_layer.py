"""A model with norm, activation and loss as kernels equals itself without: loss, every gradient, whatever wraps it.

Without a GPU the tests that need kernels run in a process that interprets them.
"""

import pytest
import torch
from interpreter import DEVICE, HAS_KERNELS, INTERPRETED, needs_kernels, run_interpreted, serve_layers
from model_parity import batch, build_flash, build_stock, relative_error
from peft import LoraConfig, get_peft_model
from torch.autograd import forward_ad
from torch.nn import functional as F

import fat5.model.layers_flash_t5
import fat5.model.lm_head_flash_t5
import fat5.model.modeling_flash_t5
from fat5.model import fused_linear as fused_linear_module
from fat5.model import recomputed_linear
from fat5.model.norm_flash_t5 import FlashT5LayerNorm
from fat5.model.ops_linear_cross_entropy import linear_cross_entropy

SHAPE = {"num_layers": 1, "num_heads": 2, "vocab_size": 99}
TOKENS = (4, 3, 2) if INTERPRETED else (61, 37, 3)


def test_in_the_interpreter():
    run_interpreted(__file__)


@pytest.fixture
def kernels():
    """Whether the layer's kernels run can be said in a test; afterwards all is as before."""
    yield serve_layers
    serve_layers(not INTERPRETED)


def build(family="t5_v1_1", **overrides):
    stock = build_stock(family, **{**SHAPE, **overrides})
    return build_flash(family, stock, "sdpa", **{**SHAPE, **overrides}).to(DEVICE)


def inputs_of(padding="right"):
    inputs = batch(padding, *TOKENS)
    inputs["labels"][:, ::3] = -100
    return {name: x.to(DEVICE) for name, x in inputs.items() if "mask" not in name and "decoder_input" not in name}


def loss_and_gradients(model, **inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_alike(model, inputs, kernels, limit=2e-5):
    """Loss and gradients in training with the kernels and without."""
    model.train()
    kernels(False)
    expected, gradients = loss_and_gradients(model, **inputs)
    kernels(True)
    output, fused = loss_and_gradients(model, **inputs)
    assert expected.logits is not None
    assert output.logits is None, "the loss was not fused"
    assert relative_error(output.loss, expected.loss) < limit
    assert gradients.keys() == fused.keys()
    for name, gradient in gradients.items():
        assert relative_error(fused[name], gradient) < limit, name


@needs_kernels
@pytest.mark.parametrize("family", ["t5", "t5_v1_1"])
def test_loss_and_gradients(family, kernels):
    assert_alike(build(family), inputs_of(), kernels)


@needs_kernels
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("padding", ["right", "left", "none"])
def test_the_loss_sees_labels_alone(padding, masked, kernels, monkeypatch):
    """With a mask or without: from the head on nothing is computed for labels of -100."""
    model, inputs, seen = build(), inputs_of(padding), []
    if masked:
        inputs["attention_mask"] = (inputs["input_ids"] != 0).long()
    fused = linear_cross_entropy

    def count(hidden_states, weight, labels, **options):
        seen.append((hidden_states.shape[:-1].numel(), (labels != -100).sum()))
        return fused(hidden_states, weight, labels, **options)

    monkeypatch.setattr(fat5.model.lm_head_flash_t5, "linear_cross_entropy", count)
    assert_alike(model, inputs, kernels)
    inputs["labels"][inputs["labels"] == -100] = 5
    assert_alike(model, inputs, kernels)
    labels = inputs["labels"].numel()
    assert seen[0][0] == seen[0][1] < labels
    assert seen[1] == (labels, labels)


@needs_kernels
def test_one_product_for_both_projections(kernels, monkeypatch):
    joined = []

    def count(*arguments):
        joined.append(fused_linear_module.fused_linear(*arguments))
        return joined[-1]

    monkeypatch.setattr(fat5.model.layers_flash_t5, "fused_linear", count)
    assert_alike(build(d_ff=3), inputs_of(), kernels)
    assert [x is not None for x in joined] == [False, False, True, True], "with enough tokens, and with kernels"


@needs_kernels
def test_one_product_for_queries_keys_and_values(kernels, monkeypatch):
    joined = []

    def note(together, parts):
        joined.append(parts)
        return together.chunk(parts, -1)

    monkeypatch.setattr(fused_linear_module.SplitColumns, "apply", note)
    assert_alike(build(num_heads=1, d_kv=2), inputs_of(), kernels)
    assert joined == [3, 3, 2], "self-attention of both stacks, and cross-attention"


@needs_kernels
@pytest.mark.parametrize("target", ["wi_0", "Wk", "lm_head"])
def test_adapters_are_called(target, kernels):
    kernels(True)
    model, inputs = build(d_ff=3, num_heads=1, d_kv=2), inputs_of()
    adapted = get_peft_model(model, LoraConfig(target_modules=[target], r=2, task_type="SEQ_2_SEQ_LM")).train()
    before, _ = loss_and_gradients(adapted, **inputs)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    after, gradients = loss_and_gradients(adapted, **inputs)
    assert relative_error(after.loss, before.loss) > 1e-3
    assert (after.logits is not None) == (target == "lm_head")
    assert all(gradient.any() for name, gradient in gradients.items() if "lora" in name)


@needs_kernels
def test_checkpointing_recomputes_the_same(kernels):
    """Dropout included: against layers that run as when checkpointed, but are kept."""
    kernels(True)
    model, inputs = build(dropout_rate=0.3).train(), inputs_of()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(7)
    _, recomputed = loss_and_gradients(model, **inputs)
    for block in (*model.encoder.block, *model.decoder.block):
        block._gradient_checkpointing_func = lambda function, *arguments: function(*arguments)
    torch.manual_seed(7)
    _, kept = loss_and_gradients(model, **inputs)
    for name, gradient in kept.items():
        assert relative_error(recomputed[name], gradient) < 2e-5, name


@needs_kernels
def test_micro_batches_add_up(kernels):
    kernels(True)
    model, inputs = build().train(), inputs_of()
    _, whole = loss_and_gradients(model, **inputs)
    items = (inputs["labels"] != -100).sum()
    model.zero_grad()
    for rows in (slice(0, 1), slice(1, None)):
        model(**{name: x[rows] for name, x in inputs.items()}, num_items_in_batch=items).loss.backward()
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, whole[name]) < 2e-5, name


@needs_kernels
def test_logits_are_there_outside_training(kernels):
    kernels(True)
    model, inputs = build().eval(), inputs_of()
    with torch.no_grad():
        output = model(**inputs)
        assert output.logits.shape == (TOKENS[2], TOKENS[1], 99)
        expected = F.cross_entropy(output.logits.float().flatten(0, 1), inputs["labels"].flatten())
        assert relative_error(output.loss, expected) < 1e-5
        assert model.train()(**inputs).logits is None
        del inputs["labels"]
        assert model(**inputs, decoder_input_ids=inputs["input_ids"]).logits is not None


@needs_kernels
def test_hidden_states_are_sums(kernels):
    model, inputs = build(num_layers=2).eval(), inputs_of()
    states = []
    for serve in (False, True):
        kernels(serve)
        with torch.no_grad():
            states.append(model.encoder(inputs["input_ids"], output_hidden_states=True).hidden_states)
    for got, expected in zip(*states, strict=True):
        assert relative_error(got, expected) < 1e-5


@pytest.mark.skipif(INTERPRETED, reason="real widths")
@pytest.mark.parametrize(
    "shape",
    [
        {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
        pytest.param(
            {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32}, marks=pytest.mark.gpu
        ),
    ],
    ids=["small", "xl"],
)
def test_residual_in_fp32_tracks_fp32(shape):
    """Encoder outputs at the shapes of flan-t5-small and -xl: bf16's error at every quantile half of stock's at most.

    Without the kernels, which round less, it is still well below.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = {"vocab_size": 99, **shape}
    stock = build_stock("t5_v1_1", **shape, num_decoder_layers=1).to(device)
    with torch.no_grad():
        for name, weight in stock.named_parameters():  # as T5 is initialised, and exact in bf16
            if weight.ndim == 2 and "relative" not in name and "shared" not in name:
                weight.normal_(0, weight.shape[1] ** -0.5 * (shape["d_kv"] ** -0.5 if ".q." in name else 1))
            weight.copy_(weight.bfloat16().float())
    flash = build_flash("t5_v1_1", stock, "fat5", **shape, num_decoder_layers=1).to(device)
    ids = torch.randint(99, (2, 64), device=device)
    with torch.no_grad():
        exact = stock.encoder(ids).last_hidden_state
        states = [model.bfloat16().encoder(ids).last_hidden_state for model in (stock, flash)]
    assert states[1].dtype == torch.bfloat16
    errors = [(x.float() - exact).abs().flatten() for x in states]
    quantiles = torch.tensor([0.5, 0.9, 0.99, 0.999, 0.9999], device=device)
    ratios = errors[1].quantile(quantiles) / errors[0].quantile(quantiles)
    print("bf16 error as a share of stock's:", [round(ratio, 3) for ratio in ratios.tolist()])
    assert (ratios <= (0.5 if HAS_KERNELS else 0.75)).all(), ratios


@needs_kernels
def test_autocast(kernels):
    """Errors against fp32 at most twice those without the kernels."""
    model, inputs = build().train(), inputs_of()
    kernels(True)
    _, exact = loss_and_gradients(model, **inputs)
    found = []
    for serve in (False, True):
        kernels(serve)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            output = model(**inputs)
        model.zero_grad()
        output.loss.backward()
        assert output.loss.dtype == torch.float32
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in exact.items():
        plain, fused = ((x[name] - gradient).norm() for x in found)
        assert found[1][name].dtype == torch.float32
        assert fused <= 2 * plain + 0.01 * gradient.norm(), name


@needs_kernels
@pytest.mark.parametrize("wrapped", ["layer_norm", "act", "self_attention", "wo"])
def test_hooks_see_what_they_saw(wrapped, kernels):
    """Layers whose products are joined with what stands before them are called where somebody waits for the call."""
    kernels(True)
    model, inputs = build(d_ff=3, num_heads=1, d_kv=2).train(), inputs_of()
    _, expected = loss_and_gradients(model, **inputs)
    seen = []
    for name, module in model.named_modules():
        if name.endswith(f".{wrapped}"):
            module.register_forward_hook(lambda module, given, output: seen.append(given[0].shape))
    _, hooked = loss_and_gradients(model, **inputs)
    assert len(seen) == {"layer_norm": 5, "act": 2, "self_attention": 2, "wo": 2}[wrapped]
    for name, gradient in expected.items():
        assert relative_error(hooked[name], gradient) < 2e-5, name


@needs_kernels
def test_hooks_of_all_modules_see_every_call(kernels):
    kernels(True)
    model, inputs = build(d_ff=3, num_heads=1, d_kv=2).train(), inputs_of()
    seen = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(lambda module, given: seen.append(module))
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        hook.remove()
    called = (torch.nn.Linear, FlashT5LayerNorm)
    assert not [name for name, module in model.named_modules() if isinstance(module, called) and module not in seen]


@needs_kernels
def test_forward_mode_goes_by_plain_torch(kernels):
    """The derivative of a training step's loss along every weight at once, on the eager implementation."""
    kernels(True)
    model, inputs = build(d_ff=3, num_heads=1, d_kv=2).train(), inputs_of()
    model.set_attn_implementation("eager")
    _, gradients = loss_and_gradients(model, **inputs)
    weights = dict(model.named_parameters())
    tangents = {name: torch.randn_like(weight) for name, weight in weights.items()}
    expected = sum((gradients[name] * tangent).sum() for name, tangent in tangents.items())

    def loss(weights):
        return torch.func.functional_call(model, weights, kwargs=inputs).loss

    torch.testing.assert_close(torch.func.jvp(loss, (weights,), (tangents,))[1], expected, rtol=1e-4, atol=1e-5)
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(weight, tangents[name]) for name, weight in weights.items()}
        got = forward_ad.unpack_dual(loss(duals)).tangent
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@needs_kernels
def test_norms_and_activations_are_computed_again(kernels, monkeypatch):
    """In every sub-layer, in training; what that keeps is tested with the operators."""
    kernels(True)
    calls = []
    for function in (recomputed_linear.NormLinear, recomputed_linear.GatedActLinear):
        apply = function.apply
        monkeypatch.setattr(function, "apply", lambda *x, f=function, apply=apply: calls.append(f) or apply(*x))
    model, inputs = build(d_ff=3, num_heads=1, d_kv=2).train(), inputs_of()
    loss_and_gradients(model, **inputs)
    assert (calls.count(recomputed_linear.NormLinear), calls.count(recomputed_linear.GatedActLinear)) == (5, 2)
    with torch.no_grad():
        model(**inputs)
    assert len(calls) == 7


@needs_kernels
def test_weights_that_lie_on_disk_are_fetched(kernels, tmp_path):
    """By the hooks of the modules that own them, also where kernels take a weight without its module."""
    kernels(True)
    whole = build().eval()
    whole.save_pretrained(tmp_path)
    places = {name: "disk" for name, _ in whole.named_children()}
    loaded = type(whole).from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offload")
    ids = inputs_of()["input_ids"]
    with torch.no_grad():
        states = [model.encoder(ids).last_hidden_state.to(DEVICE) for model in (loaded, whole)]
    assert relative_error(*states) < 2e-5
