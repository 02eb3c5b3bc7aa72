"""What `fat5convert inspect` says about a checkpoint."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fat5convert.convert import plan_conversion
from fat5convert.precision import is_bfloat16_exact, short_name


def inspect_model(model: str, revision: str | None = None) -> dict[str, Any]:
    """Recognise a checkpoint and read through its tensors once; nothing is written.

    Returns:
        Name, family and other decisions with reasons, sizes, parameter count, dtypes (name -> parameters), memory of
        the weights in bytes by dtype, whether all of them are bfloat16 values already, and what would stay behind.

    Raises:
        ConvertError: as `plan_conversion`.
    """
    plan = plan_conversion(model, revision=revision)
    checkpoint, recognised = plan.checkpoint, plan.recognised
    dtypes: Counter[str] = Counter()
    for info in plan.outputs.values():
        dtypes[short_name(info.dtype)] += info.numel
    sizes = (
        "vocab_size",
        "d_model",
        "d_kv",
        "d_ff",
        "num_heads",
        "num_layers",
        "num_decoder_layers",
        "feed_forward_proj",
    )
    return {
        "source": checkpoint.location.label,
        "files": checkpoint.weight_files,
        "family": recognised.title,
        "model_type": recognised.model_type,
        "decisions": recognised.decisions(),
        "sizes": {name: recognised.config[name] for name in sizes},
        "parameters": plan.parameters,
        "tensors": len(plan.outputs),
        "dtypes": dict(dtypes),
        "memory": {"float32": 4 * plan.parameters, "bfloat16": 2 * plan.parameters},
        "bfloat16_exact": all(is_bfloat16_exact(checkpoint.load(pair.t5)) for pair in recognised.pairs),
        "leftovers": recognised.leftovers,
    }
