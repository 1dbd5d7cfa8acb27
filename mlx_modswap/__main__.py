"""Draw a model of mlx-lm from the config.json in its folder.

--json prints one object:
  modules   how many modules there are in the model
  selected  how many of them PATTERN selects, or null if it was not given
  places    the lines of the picture, all of them, from the top down. Each has
    path       the pattern of its places ('' is the model itself)
    class      the class of the modules, or null for what is no module to MLX
    text       the same with the numbers that matter
    count      how many places there are
    params, trainable, bytes, dtypes
               what they hold together; a module in several places counts in the first
    selected   whether PATTERN selects them
    note       such as 'tied to model.embed_tokens'

No weights are read: dtype and quantization are what the config says. PATTERN marks the
modules it selects.

Exit status: 0, 1 if there is no model to draw, 2 if the arguments are wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ._errors import NoMatchError, PatternError
from ._show.tree import tree


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given = _parser().parse_args(arguments)
    try:
        picture = tree(_build(Path(given.MODEL_DIR)), given.PATTERN, exclude=given.exclude)
    except (PatternError, NoMatchError) as error:
        print(f"mlx_modswap: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    print(json.dumps(picture.data(), indent=1) if given.json else picture)
    return 0


def _parser() -> argparse.ArgumentParser:
    description, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m mlx_modswap",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("MODEL_DIR", help="a folder with a config.json")
    parser.add_argument("PATTERN", nargs="?", default="**", help="such as '**.q_proj', in quotes")
    parser.add_argument(
        "--exclude", metavar="PATTERN", action="append", default=[], help="what not to select"
    )
    parser.add_argument("--json", action="store_true", help="print data, not a picture; see below")
    return parser


def _build(folder: Path) -> nn.Module:
    """The model that a config describes; nothing of it is computed.

    Raises:
        SystemExit: With one line, if there is no such model.
    """
    try:
        from mlx_lm import utils
    except ImportError:
        sys.exit("mlx_modswap: this needs mlx-lm: pip install mlx-lm")
    try:
        config = utils.load_config(folder)
        model_class, args_class = utils._get_classes(config)
        model = model_class(args_class.from_dict(config))
        _set_dtype(model, config)
        _quantize(model, config)
        return model
    except Exception as error:  # code of mlx-lm, at work on any config
        what = " ".join(f"{type(error).__name__}: {error}".split())
        sys.exit(f"mlx_modswap: mlx-lm builds no model from {folder}: {what}")


def _set_dtype(model: nn.Module, config: dict[str, Any]) -> None:
    for one in (config, config.get("text_config") or {}):
        name = one.get("dtype") or one.get("torch_dtype")
        dtype = getattr(mx, str(name).removeprefix("torch."), None)
        if isinstance(dtype, mx.Dtype):
            model.set_dtype(dtype)
            return


def _quantize(model: nn.Module, config: dict[str, Any]) -> None:
    """Quantize the layers that mlx-lm quantizes, some of them with settings of their own."""
    quantization = config.get("quantization")
    if not quantization:
        return
    group_size = quantization["group_size"]
    chosen_by_model = getattr(model, "quant_predicate", None) or (lambda path, module: True)

    def settings(path: str, module: Any) -> bool | dict[str, Any]:
        if path in quantization:
            return quantization[path]
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % group_size:
            return False
        return chosen_by_model(path, module)

    others = {key: quantization[key] for key in ("bits", "mode") if key in quantization}
    nn.quantize(model, group_size, class_predicate=settings, **others)


if __name__ == "__main__":
    sys.exit(main())
