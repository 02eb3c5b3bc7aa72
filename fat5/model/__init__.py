"""The FlashT5 model: these very files are what a converted repository ships."""

from .configuration_flash_t5 import AUTO_MAP, ENCODER_AUTO_MAP, FlashT5Config
from .modeling_flash_t5 import (
    FlashT5EncoderModel,
    FlashT5ForConditionalGeneration,
    FlashT5ForQuestionAnswering,
    FlashT5ForSequenceClassification,
    FlashT5ForTokenClassification,
    FlashT5Model,
    FlashT5PreTrainedModel,
)
from .runtime_files import RUNTIME_FILES, copy_runtime_files

__all__ = [
    "AUTO_MAP",
    "ENCODER_AUTO_MAP",
    "RUNTIME_FILES",
    "FlashT5Config",
    "FlashT5EncoderModel",
    "FlashT5ForConditionalGeneration",
    "FlashT5ForQuestionAnswering",
    "FlashT5ForSequenceClassification",
    "FlashT5ForTokenClassification",
    "FlashT5Model",
    "FlashT5PreTrainedModel",
    "copy_runtime_files",
]
