"""What the peer's own test suite runs on: our models, and what of it they skip. Run by `test_peer_suite.py`, not alone.

The suite is the one of the installed transformers, unpacked as the package `tests`.
"""

import unittest

import torch
from peer_skips import LISTED
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import GenerationTesterMixin, ModelTesterMixin, global_rng, ids_tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto import modeling_auto as auto

from fat5.model import (
    FlashT5Config,
    FlashT5EncoderModel,
    FlashT5ForConditionalGeneration,
    FlashT5ForQuestionAnswering,
    FlashT5ForSequenceClassification,
    FlashT5ForTokenClassification,
    FlashT5Model,
)

# The suite tells by the names of classes what a model is for, and does not know ours.
for names, classes in (
    (auto.MODEL_MAPPING_NAMES, ("FlashT5Model", "FlashT5EncoderModel")),
    (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "FlashT5ForConditionalGeneration"),
    (auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, "FlashT5ForSequenceClassification"),
    (auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, "FlashT5ForTokenClassification"),
    (auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, "FlashT5ForQuestionAnswering"),
):
    names["flash_t5"] = classes

AutoConfig.register("flash_t5", FlashT5Config)
for auto_class, cls in (
    (AutoModel, FlashT5Model),
    (AutoModelForSeq2SeqLM, FlashT5ForConditionalGeneration),
    (AutoModelForSequenceClassification, FlashT5ForSequenceClassification),
    (AutoModelForTokenClassification, FlashT5ForTokenClassification),
    (AutoModelForQuestionAnswering, FlashT5ForQuestionAnswering),
):
    auto_class.register(FlashT5Config, cls)


class FlashT5ModelTester:
    """Configuration and inputs, as the suite's mixins ask for them. Both stacks read equally long inputs: the suite
    gives the decoder the encoder's mask."""

    batch_size = 5
    seq_length = encoder_seq_length = decoder_seq_length = 7
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 4, 99
    is_training = True

    def __init__(self, is_encoder_decoder):
        self.is_encoder_decoder = is_encoder_decoder

    def get_config(self):
        config = FlashT5Config(
            vocab_size=self.vocab_size,
            d_model=self.hidden_size,
            d_kv=8,
            d_ff=37,
            num_layers=self.num_hidden_layers,
            num_heads=self.num_attention_heads,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=20,
            head_reads_decoder=self.is_encoder_decoder,
        )
        config.is_encoder_decoder = self.is_encoder_decoder  # from here the suite knows the names of outputs
        return config

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 2) + 2
        ids[:, -3] = 1  # sequence classification reads there; the suite masks the last two
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.is_encoder_decoder:
            targets = ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 2) + 2
            inputs |= {"decoder_input_ids": targets, "decoder_attention_mask": torch.ones_like(targets)}
        return self.get_config(), inputs


class Peer(ModelTesterMixin):
    """The suite's tests of models and configurations."""

    test_can_init_all_missing_weights_before_2023 = True  # it runs where it is not told that a model is old

    def setUp(self):
        for name in (self._testMethodName, f"{type(self).__name__}.{self._testMethodName}"):
            if name in LISTED:
                self.skipTest(f"listed: {LISTED[name]}")
        global_rng.seed(0)  # the suite draws inputs from it unseeded: fp16's tolerance then holds on most of them only
        self.model_tester = FlashT5ModelTester(self.is_encoder_decoder)

    def test_config(self):
        ConfigTester(self, config_class=FlashT5Config, d_model=37, vocab_size=99).run_common_tests()

    def test_inputs_embeds(self):
        readers = [cls for cls in self.all_model_classes if cls is not FlashT5ForSequenceClassification]
        self.all_model_classes = tuple(readers)  # as in stock T5, that one looks for a token by its id
        super().test_inputs_embeds()


class FlashT5EncoderDecoderTest(Peer, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (
        FlashT5Model,
        FlashT5ForConditionalGeneration,
        FlashT5ForSequenceClassification,
        FlashT5ForQuestionAnswering,
    )
    is_encoder_decoder = True


class FlashT5EncoderTest(Peer, unittest.TestCase):
    all_model_classes = (
        FlashT5EncoderModel,
        FlashT5ForTokenClassification,
        FlashT5ForSequenceClassification,
        FlashT5ForQuestionAnswering,
    )
    is_encoder_decoder = False
