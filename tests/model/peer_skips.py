"""What is skipped of the suite that `test_peer_suite.py` runs, or is not in it, with reasons."""

FIELDS = {"return_dict": False, "output_hidden_states": True, "dtype": "float16", "problem_type": "regression"}

NOT_DISTRIBUTED = {
    # its mixin GenerationTesterMixin is empty here, so that none of the suite's tests of `generate` run:
    # test_model_generate.py, test_generate_outputs.py and test_decoding_step.py compare that with stock T5
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    # tests of an exporter to other runtimes, which is not offered
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    # the values that ConfigTester sets and looks for again, here a few of them
    "utils/test_configuration_utils.py": f"config_common_kwargs = {FIELDS}\n",
}
"""Files that the suite imports and its source distribution (that of 5.23.0, say) leaves out: text in their place.

A release that has one of them fails the test, which then is to use it.
"""

LISTED = {
    "test_model_base_model_prefix": "as in stock T5, the stacks belong to every model itself, under no common name",
    "test_sdpa_can_dispatch_non_composite_models": "the default is 'fat5', which chooses call by call; sdpa is tested",
    "FlashT5EncoderTest.test_load_with_mismatched_shapes": "from the file it loads the model with a decoder, "
    "and gives it no decoder input; the models with a decoder pass",
}
"""Tests that do not hold here: of all models, or of one class of tests."""

BY_THE_SUITE = {
    r"test requires (accelerator|multiple accelerators|MPS)": "hardware that is not here; tests marked `gpu` have it",
    r"test requires Flash Attention( 3| 4)?": "needs a GPU, and what flash-attn cannot do is refused by name",
    r"test requires (the kernels library|deepspeed)": "not among the dependencies",
    r"test is slow": "`torch.compile` in training, which test_model_training.py has",
    r"(Model is not a|This model is not) composite( model\.)?": "one configuration, without others in it",
    r"No subconfigs so the test does not make sense": "the same",
    r"FlashT5\w+ does not support SDPA": "says so of models that are not composite",
    r"FlashT5\w+ does not support grouped_mm": "for mixtures of experts",
    r"No conversion found for .*": "loads weights by their own names",
    r"No usage of the `capture_outputs` decorator\.": "outputs are collected in plain sight",
    r"Cannot capture hidden states, or cannot correctly set layer indices .*": "the same",
    r"Model does not have a TP plan\.": "tensor parallelism is not offered",
    r"Model does not have position embeddings": "positions are biases or turns, not embeddings that could be resized",
    r"This model does not (have RoPE|support RoPE scaling)": "RoPE here has fields of its own: test_positions.py",
    r".* has no axial RoPE layer defined\.": "for images",
    r"Model does not support sliding window mask": "every token sees all others",
    r"This model has no (sparse experts|`output_router_logits` in its config)\.": "dense layers",
    r"No decoder-only language modeling head to check": "the decoder has an encoder",
    r"No sequence-to-sequence language modeling head to check": "of the models without a decoder",
}
"""What the suite skips in its own words, and why that is right: the words as a regular expression."""
