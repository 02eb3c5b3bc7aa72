"""What `fat5convert inspect` says about a checkpoint."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fat5convert.convert import plan_conversion
from fat5convert.precision import is_bfloat16_exact, short_name

_SIZES = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_heads",
    "num_layers",
    "num_decoder_layers",
    "feed_forward_proj",
)


def inspect_model(model: str, revision: str | None = None, config: str | None = None) -> dict[str, Any]:
    """Recognise a checkpoint and read through its tensors once; nothing is written.

    Args:
        model: local folder or single weight file, or Hub id.
        revision: for a Hub id.
        config: for a single file, a known name or a JSON file.

    Returns:
        Name, family and other decisions with reasons, sizes, parameter count, dtypes (name -> parameters), memory of
        the weights in bytes by dtype, which values are not finite, whether all of them are bfloat16 values already
        and what `--dtype auto` would do, and what would stay behind.

    Raises:
        ConvertError: as `plan_conversion`.
    """
    plan = plan_conversion(model, revision=revision, config=config)
    checkpoint, recognised = plan.checkpoint, plan.recognised
    dtypes: Counter[str] = Counter()
    for pair in recognised.pairs:
        info = checkpoint.tensors[pair.source]
        dtypes[short_name(info.dtype)] += info.numel
    exact, not_finite = True, {}
    for pair in recognised.pairs:
        count = 0
        for chunk in checkpoint.chunks(pair.source):
            exact = exact and is_bfloat16_exact([chunk])
            count += int((~chunk.float().isfinite()).sum())
        if count:
            not_finite[pair.source] = count
    reason = "every weight is a bfloat16 value already" if exact else "not every weight is a bfloat16 value"
    return {
        "source": checkpoint.location.label,
        "files": checkpoint.weight_files,
        "family": recognised.title,
        "model_type": recognised.model_type,
        "encoder_only": recognised.layout.encoder_only,
        "decisions": recognised.decisions()
        | {"dtype_auto": {"value": "bfloat16" if exact else "keep", "reason": reason}},
        "sizes": {name: recognised.config[name] for name in _SIZES},
        "parameters": plan.parameters,
        "tensors": len(plan.outputs),
        "dtypes": dict(dtypes),
        "memory": {"float32": 4 * plan.parameters, "bfloat16": 2 * plan.parameters},
        "bfloat16_exact": exact,
        "not_finite": not_finite,
        "leftovers": recognised.leftovers,
    }
