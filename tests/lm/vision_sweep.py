"""What the sweep over the zoo of mlx-vlm does with each model."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import vision_zoo
import zoo
from mlx_lm.tuner.lora import LoRALinear
from mlx_vlm import quant_utils, utils
from mlx_vlm.trainer.peft.utils import apply_lora_layers

from mlx_modswap import lm, replace_layers, select


def mixed_rules(model: nn.Module) -> dict[str, Any]:
    """Eight bits for one layer, six for another, four for the rest; or four for all."""
    found: dict[str, Any] = select(model, "**", where=is_quantizable)
    layers = [path for path, layer in found.items() if layer.weight.shape[-1] % 32 == 0]
    first, middle = layers[0], layers[len(layers) // 2]
    own = {first: {"bits": 8, "group_size": 32}, middle: {"bits": 6, "group_size": 32}}
    return {**own, "**": 4}


def is_quantizable(path: str, layer: Any) -> bool:
    return hasattr(layer, "to_quantized")


def layers_of(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the paths and layers that can be quantized."""
    return list(select(model, "**", where=is_quantizable).items())


def quantize_as_mlx_vlm(model: Any, group_size: int | None = None) -> dict[str, tuple[int, int]]:
    """Quantize a model as ``mlx_vlm.convert`` does; return the settings of its layers."""
    own = getattr(model, "quant_predicate", None)

    def predicate(path: str, layer: nn.Module) -> Any:
        if utils.skip_multimodal_module(path):
            return False
        return own(path, layer) if own is not None else True

    with contextlib.redirect_stdout(io.StringIO()):
        quant_utils.quantize_model(model, {}, group_size, 4, quant_predicate=predicate)
    return settings_of(model)


def settings_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        path: (layer.bits, layer.group_size)
        for path, layer in model.named_modules()
        if "scales" in layer
    }


def adaptable(model: nn.Module) -> list[str]:
    """Return the paths of a few linear layers outside the towers."""
    layers = select(model, "**", where=nn.Linear)
    paths = [path for path, layer in layers.items() if type(layer) is nn.Linear]
    outside = [path for path in paths if not utils.skip_multimodal_module(path)]
    return outside[:: max(len(outside) // 8, 1)]


def output(model: Any, record: vision_zoo.Record) -> mx.array:
    mx.random.seed(0)  # diffusion begins with noise
    return vision_zoo.outputs(model, record)


def results(record: vision_zoo.Record, folder: Path) -> Iterator[tuple[str, bool]]:
    """Yield what was done with a model, and whether it worked."""
    source = vision_zoo.folder(record, folder / "source")
    model = utils.load_model(source)
    rules = mixed_rules(model)
    lm.quantize(model, rules, strict=False)

    def save(target: Path) -> None:
        lm.save(model, target, source)

    def convert(target: Path) -> None:
        lm.convert(source, target, rules, strict=False, loader="mlx-vlm")

    for name, write in (("saved", save), ("converted", convert)):
        try:
            write(folder / name)
        except ValueError:
            yield name, False
        else:
            yield name, _are_equal(utils.load_model(folder / name), model)
    ours, theirs = vision_zoo.build(record), vision_zoo.build(record)
    lm.quantize(ours, {"**": 4}, strict=False)
    same = quantize_as_mlx_vlm(theirs) == settings_of(ours)
    yield "equal to mlx_vlm.convert", same and _are_equal(ours, theirs)
    if record["inputs"] is not None:
        yield "adapters read by mlx-vlm", _reads_adapters(record, folder / "adapters")


def _reads_adapters(record: vision_zoo.Record, folder: Path) -> bool:
    model, other = vision_zoo.build(record), vision_zoo.build(record)
    try:
        model.freeze()
    except AttributeError:
        return False
    replace_layers(model, tuple(adaptable(model)), adapted)
    lm.save_adapters(model, folder)
    apply_lora_layers(other, folder).eval()
    return zoo.same(output(model, record), output(other, record))


def adapted(path: str, layer: Any) -> nn.Module:
    """Return an adapter around a layer, as if it had been trained."""
    new: Any = LoRALinear.from_base(layer, r=4, scale=3.0)
    new.lora_b = mx.random.normal(new.lora_b.shape) * 0.1
    return new


def _are_equal(one: nn.Module, other: nn.Module) -> bool:
    arrays, others = vision_zoo.arrays_of(one), vision_zoo.arrays_of(other)
    return list(arrays) == list(others) and all(
        zoo.same(arrays[name], others[name]) for name in arrays
    )
