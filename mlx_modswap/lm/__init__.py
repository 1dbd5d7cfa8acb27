"""Quantize, convert and save language models for mlx-lm; read and write their adapters.

Needs mlx-lm 0.32.1 or newer (``pip install 'mlx-modswap[lm]'``); ``import mlx_modswap``
alone never imports mlx-lm.
"""

import re

try:
    import mlx_lm

    if tuple(map(int, re.findall(r"\d+", mlx_lm.__version__)[:3])) < (0, 32, 1):
        raise ImportError(f"{mlx_lm.__version__} is installed", name="mlx_lm")
except ImportError as error:
    raise ImportError(
        f"mlx_modswap.lm needs mlx-lm 0.32.1 or newer: pip install 'mlx-modswap[lm]' ({error})",
        name=error.name,
    ) from error
except AttributeError as error:  # a name that an older MLX does not have
    raise ImportError(f"mlx-lm needs a newer MLX: pip install -U mlx ({error})") from error

from ._adapters.read import adapter_rules
from ._adapters.write import save_adapters
from ._folders.convert import convert
from ._folders.save import save
from ._layers_path import layers_path
from ._quantize import quantization_config, quantize

__all__ = [
    "adapter_rules",
    "convert",
    "layers_path",
    "quantization_config",
    "quantize",
    "save",
    "save_adapters",
]
