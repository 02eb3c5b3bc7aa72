"""What may be asked of a conversion, in words that take nothing heavy to import."""

DTYPES = ("keep", "auto", "bfloat16", "float32", "float16")
"""Policies for the dtype of the result."""
DEFAULT_SHARD_SIZE = 2_000_000_000
"""Bytes."""
