"""FAT5: T5 on fused kernels, and its continued pretraining with UL2."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .stock_models import disable, enable

__all__ = ["disable", "enable"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `import fat5` alone loads neither torch nor transformers."""
    if name not in __all__:
        raise AttributeError(f"module 'fat5' has no attribute {name!r}")
    from . import stock_models

    return getattr(stock_models, name)
