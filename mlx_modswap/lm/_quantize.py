"""``mlx.nn.quantize`` by rules, and the entries of a config that say what was quantized."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .._errors import NoMatchError
from .._patterns.fold import folded
from .._select.select import select
from .._show.report import Replacement
from .._swap.replace import replace_layers
from .._words import described
from ._loaders import loader_of

Settings = dict[str, Any]  # keywords of `to_quantized`
Value = int | Mapping[str, Any] | None
Rules = Mapping[Any, Value]  # from a pattern or several; not typed, as keys are invariant

_CATCH_ALL = "**"


def quantize(
    model: nn.Module,
    rules: Rules,
    *,
    group_size: int | None = None,
    mode: str = "affine",
    strict: bool = True,
) -> Replacement:
    """Quantize the layers of a model by rules, in place.

    This is like :func:`mlx.nn.quantize`, but the first pattern that matches the path
    of a layer decides how many bits the layer gets. Only layers with a method
    ``to_quantized`` are considered; layers that are quantized already stay as they
    are. As in :func:`~mlx_modswap.replace_layers`, all of the layers change or none does.

    The catch-all rule, whose key is exactly ``"**"``, does what ``mlx_lm.convert``
    does: it skips layers whose width the group size does not divide, and follows
    the model's own ``quant_predicate``. Any other rule ignores the predicate, and
    raises an error if the group size does not divide a width.

    Args:
        model (mlx.nn.Module): The model to change in place.
        rules (Mapping): What to do with the layers that a pattern, or a tuple of
            patterns, matches: an ``int`` is the number of bits per weight, a
            mapping holds keywords of ``to_quantized`` (``bits``, ``group_size``,
            ``mode``), and ``None`` leaves a layer alone, with everything inside it.
        group_size (int, optional): How many weights share a scale, unless a rule says
            otherwise. Default: ``None``, MLX's default for the mode, which is 64 for
            ``"affine"``.
        mode (str): How to quantize, unless a rule says otherwise: ``"affine"``,
            ``"mxfp4"``, ``"nvfp4"`` or ``"mxfp8"``. See
            :func:`mlx.core.quantize`. Default: ``"affine"``.
        strict (bool): If ``True``, a rule that does nothing is an error. See
            :func:`~mlx_modswap.replace_layers`. Default: ``True``.

    Returns:
        Replacement: A mapping from path to quantized layer. Print it to see the
        change.

    Raises:
        PatternError: If the text of a pattern is wrong.
        NoMatchError: If a rule does nothing, or if none of the layers that the rules
            are to quantize can be quantized.
        SelectionError: If tied layers would get different settings.
        ValueError: If a group size does not divide the width of a layer, or if MLX
            does not know a number of bits, a group size or a mode.
        TypeError: If an argument is of the wrong type.

    Example:
        >>> import mlx.nn as nn
        >>> from mlx_modswap import lm
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> _ = lm.quantize(model, {"layers[0]": 8, "**": {"bits": 4, "group_size": 32}})
        >>> model.layers[0].bits, model.layers[2].bits, model.layers[2].group_size
        (8, 4, 32)
    """
    if not isinstance(rules, Mapping) or isinstance(rules, nn.Module):
        raise TypeError(
            "rules must map patterns to bits, to keywords of to_quantized or to None, "
            f"not {described(rules)}"
        )
    factories = {
        pattern: _factory(model, rules, pattern, _settings(pattern, value, group_size, mode))
        if value is not None
        else None
        for pattern, value in rules.items()
    }
    try:
        report = replace_layers(model, factories, where=quantizable, strict=strict)
    except NoMatchError:
        _refuse_quantized(model, rules)
        raise
    catch_all = rules.get(_CATCH_ALL)
    if strict and not report and catch_all is not None:
        settings = _settings(_CATCH_ALL, catch_all, group_size, mode)
        raise NoMatchError(_nothing_fits(model, settings["group_size"]))
    return report


def quantization_config(model: nn.Module) -> Settings:
    """Describe the quantized layers of a model, as the config of an mlx-lm folder does.

    The result belongs in the config under ``"quantization"`` and, since mlx-lm
    writes both, also under ``"quantization_config"``.

    Args:
        model (mlx.nn.Module): A model with quantized layers.

    Returns:
        dict: The ``"group_size"``, ``"bits"`` and ``"mode"`` that are most frequent,
        and the settings of each quantized layer under its path.

    Raises:
        ValueError: If no layer of the model is quantized.

    Example:
        >>> import mlx.nn as nn
        >>> from mlx_modswap import lm
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> _ = lm.quantize(model, {"**": 4})
        >>> lm.quantization_config(model)["layers.0"]
        {'group_size': 64, 'bits': 4, 'mode': 'affine'}
    """
    layers = select(model, "**", where=quantized, strict=False)
    if not layers:
        raise ValueError("no layer of the model is quantized; see mlx_modswap.lm.quantize")
    entries = {path: _settings_of(layer) for path, layer in layers.items()}
    usual = ("group_size", "bits", "mode")
    counts = Counter(tuple(entry[name] for name in usual) for entry in entries.values())
    most_frequent, _ = counts.most_common(1)[0]
    return {**dict(zip(usual, most_frequent)), **entries}


def quantizable(path: str, layer: Any) -> bool:
    """Return whether a layer has a method ``to_quantized``."""
    return hasattr(layer, "to_quantized")


def quantized(path: str, layer: Any) -> bool:
    """Return whether a layer holds packed weights, or would if it were not in training mode."""
    if isinstance(layer, nn.QQLinear):
        return True
    return "scales" in layer and hasattr(layer, "bits") and hasattr(layer, "group_size")


def _settings_of(layer: Any) -> Settings:
    """Return the keywords with which ``to_quantized`` makes such a layer."""
    settings = {
        "group_size": layer.group_size,
        "bits": layer.bits,
        "mode": getattr(layer, "mode", "affine"),
    }
    if isinstance(layer, nn.QQLinear):
        settings["quantize_input"] = True
    if "global_scale" in layer:
        settings["global_scale"] = True
    return settings


# ---------------------------------------------------------------- rules to factories


def _settings(pattern: Any, value: Any, group_size: int | None, mode: str) -> Settings:
    """Return the value of a rule as keywords of ``to_quantized``, including the defaults."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"bits": value}
    if not isinstance(value, Mapping):
        raise TypeError(
            f"rule {_shown(pattern)} must be a number of bits, a mapping of keywords of "
            f"to_quantized, or None, not {value!r}"
        )
    given = {key: one for key, one in value.items() if one is not None}
    own_mode = given.get("mode", mode)
    usual_group_size, usual_bits = _defaults(own_mode)
    if group_size is not None and own_mode == mode:
        usual_group_size = group_size
    settings = {"group_size": usual_group_size, "bits": usual_bits, "mode": own_mode, **given}
    for name in ("group_size", "bits"):
        number = settings[name]
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise TypeError(
                f"{name} of rule {_shown(pattern)} must be an int of 1 or more, not {number!r}"
            )
    return settings


def _defaults(mode: str) -> tuple[int, int]:
    """Return MLX's default group size and bits for a mode, derived from the shapes it makes."""
    try:
        weight, scales, *_ = mx.quantize(mx.zeros((32, 512)), mode=mode)  # never computed
    except (TypeError, ValueError):
        raise ValueError(
            f"mode must be 'affine', 'mxfp4', 'nvfp4' or 'mxfp8', not {mode!r}"
        ) from None
    return 512 // scales.shape[1], weight.shape[1] * 32 // 512


def _factory(
    model: nn.Module, rules: Rules, pattern: Any, settings: Settings
) -> Callable[[str, Any], nn.Module]:
    if pattern == _CATCH_ALL:
        return _catch_all(model, pattern, settings)

    def by_rule(path: str, layer: Any) -> nn.Module:
        if _width(layer) % settings["group_size"]:
            raise ValueError(_mismatch(model, rules, pattern, settings["group_size"]))
        return _to_quantized(path, layer, settings)

    return by_rule


def _catch_all(
    model: nn.Module, pattern: Any, settings: Settings
) -> Callable[[str, Any], nn.Module]:
    loader = loader_of(model)
    predicate = loader.predicate(model, settings)
    # A rule that matches only what the conversion skips asks for just that.
    matched = select(model, pattern, where=quantizable, strict=False)
    may_skip = not all(map(loader.skips, matched))

    def catch_all(path: str, layer: Any) -> nn.Module:
        is_leaf = not tree_flatten(layer.children())  # `nn.quantize` skips other modules
        if not is_leaf or (may_skip and loader.skips(path)):
            return layer
        answer = predicate(path, layer)
        if not answer:
            return layer
        return _to_quantized(path, layer, answer if isinstance(answer, Mapping) else settings)

    return catch_all


def _to_quantized(path: str, layer: Any, settings: Mapping[str, Any]) -> nn.Module:
    # Not every `to_quantized` knows `quantize_input`, so it is left out if it is off.
    keywords = {key: value for key, value in settings.items() if value or key != "quantize_input"}
    known = inspect.signature(layer.to_quantized).parameters
    takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values())
    unknown = [repr(name) for name in keywords if name not in known]
    place = f"{path!r} ({type(layer).__name__})"
    if unknown and not takes_any:
        raise TypeError(
            f"{place} cannot be quantized: its to_quantized takes {', '.join(known)}, "
            f"not {', '.join(unknown)}"
        )
    try:
        return layer.to_quantized(**keywords)
    except ValueError as error:
        message = ", ".join(f"{key}={value!r}" for key, value in keywords.items())
        raise ValueError(f"{place} cannot be quantized with {message}: {error}") from error


def _width(layer: Any) -> int:
    """Return the number of weights in a row, which is divided into groups."""
    return layer.weight.shape[-1]


# ---------------------------------------------------------------- messages


def _shown(pattern: Any) -> str:
    return repr(list(pattern)) if isinstance(pattern, tuple) else repr(pattern)


def _mismatch(model: nn.Module, rules: Rules, pattern: Any, group_size: int) -> str:
    """Write that a group size does not divide some widths, and which sizes do."""
    paths: dict[int, list[str]] = {}

    def note(path: str, layer: Any) -> nn.Module:
        if _width(layer) % group_size:
            paths.setdefault(_width(layer), []).append(path)
        return layer

    # Rules that change nothing show which layers this rule decides, and not one before it.
    noting = {
        one: None if value is None else note if one == pattern else lambda path, layer: layer
        for one, value in rules.items()
    }
    replace_layers(model, noting, where=quantizable, strict=False)
    places = [
        f"{', '.join(folded(some, numbers_are_indices=True))} ({width})"
        for width, some in paths.items()
    ]
    fitting = [str(size) for size in (128, 64, 32) if not any(width % size for width in paths)]
    advice = "no supported group size does, so leave these layers alone with None (keep)"
    if fitting:
        advice = (
            f"use a group_size (--q-group-size) of {' or '.join(fitting)}, or leave these layers "
            "alone with None (keep)"
        )
    return (
        f"rule {_shown(pattern)} asks for groups of {group_size}, which do not divide the width of "
        f"{', '.join(places)}; {advice}"
    )


def _refuse_quantized(model: nn.Module, rules: Rules) -> None:
    """Raise an error for the first rule that matches only layers that are quantized already."""
    for pattern, value in rules.items():
        if value is None or select(model, pattern, where=quantizable, strict=False):
            continue
        if stay := select(model, pattern, where=quantized, strict=False):
            raise NoMatchError(
                f"rule {_shown(pattern)} has nothing to quantize: the layers that it matches "
                f"({len(stay)}) are already quantized and are left unchanged; start from the "
                "original model"
            ) from None


def _nothing_fits(model: nn.Module, group_size: int) -> str:
    layers = select(model, "**", where=quantizable)
    widths = {_width(layer) for layer in layers.values()}
    mismatches = ", ".join(str(width) for width in sorted(widths) if width % group_size)
    reasons = (
        [f"groups of {group_size} do not divide the widths {mismatches}"] if mismatches else []
    )
    if any(width % group_size == 0 for width in widths):
        reasons.append("the model's own quant_predicate excludes the layers that fit")
    advice = "name the layers in a rule of their own, with a group_size that fits"
    if stay := select(model, "**", where=quantized, strict=False):
        reasons.append(f"{len(stay)} layers are already quantized and are left unchanged")
        advice = "start from the original model"
    return f"rule '**' quantizes nothing: {', and '.join(reasons)}; {advice}"
