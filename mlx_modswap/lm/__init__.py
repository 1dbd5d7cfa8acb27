"""Quantize, convert and save language models for mlx-lm; read and write their adapters.

Needs mlx-lm (``pip install 'mlx-modswap[lm]'``); ``import mlx_modswap`` alone never
imports it.
"""

try:
    import mlx_lm as _  # noqa: F401
except ImportError as error:
    raise ImportError(
        "mlx_modswap.lm needs mlx-lm: pip install 'mlx-modswap[lm]'", name=error.name
    ) from error

from ._adapters import adapter_rules
from ._blocks import layers_path
from ._convert import convert
from ._quantize import quantization_config, quantize
from ._save import save
from ._save_adapters import save_adapters

__all__ = [
    "adapter_rules",
    "convert",
    "layers_path",
    "quantization_config",
    "quantize",
    "save",
    "save_adapters",
]
