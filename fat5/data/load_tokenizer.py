"""Load the tokenizer of a folder or Hub id, with or without a model beside it."""

from huggingface_hub.errors import HFValidationError
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from fat5.data.documents import DataError
from fat5.model.configuration_flash_t5 import FlashT5Config


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer without running code of its repository.

    Raises:
        DataError: there is none.
    """
    revision = revision or "main"
    try:
        raw, _ = PretrainedConfig.get_config_dict(path, revision=revision)
    except (OSError, HFValidationError):
        raw = {}  # a tokenizer alone
    try:
        # A FAT5 repo's own configuration code would be asked for if the configuration were not given.
        config = FlashT5Config.from_dict(raw) if raw.get("model_type") == FlashT5Config.model_type else None
        return AutoTokenizer.from_pretrained(path, revision=revision, config=config)
    except (OSError, ValueError) as error:
        if isinstance(error, HFValidationError) or isinstance(error.__cause__, HFValidationError):
            raise DataError(f"{path}: no such folder, and no valid Hub id") from error
        raise DataError(f"{path} has no tokenizer that loads: {error}") from error
