"""``mlx.nn.quantize`` by rules, and the entries of a config that say what was quantized."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import mlx.nn as nn
from mlx.utils import tree_flatten

from .._errors import NoMatchError
from .._patterns.fold import folded
from .._select.select import select
from .._show.measure import measure
from .._show.report import Left, Replacement, left
from .._swap.factories import Factory
from .._swap.replace import replace_layers
from .._words import listed
from ._loaders import loader_of
from ._rules import Rule, Rules, Settings, defaults, is_table, read_rules, rules_of_table

_PREDICATE = "the model's own quant_predicate"
_NOTE = f"decided by {_PREDICATE}"
_HOLDS_MODULES = "holds other modules"


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

    A catch-all rule, each of whose patterns ends in the segment ``**``, does for its
    layers what ``mlx_lm.convert`` does for all: it leaves alone layers whose width the
    group size does not divide, and follows the model's own ``quant_predicate``. Any
    other rule ignores the predicate, and raises an error if the group size does not
    divide a width. The report marks layers that the predicate decided, and its last
    lines name what a rule left alone (``left``).

    Args:
        model (mlx.nn.Module): The model to change in place.
        rules (Mapping): What to do with the layers that a pattern, or a tuple of
            patterns, matches: an ``int`` is the number of bits per weight, a
            mapping holds keywords of ``to_quantized`` (``bits``, ``group_size``,
            ``mode``), and ``None`` or ``False`` leaves a layer alone, with everything
            inside it. The table of ``"quantization"`` in a config of mlx-lm is taken as
            well; its global settings are for the layers that it does not name.
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
    if is_table(rules):
        rules = rules_of_table(rules, select(model, "**", where=_is_layer, strict=False))
    wanted = read_rules(rules, group_size, mode)
    decisions = _decisions(model, wanted, strict)
    if strict:
        _check_that_rules_quantize(decisions)
    _check_widths(decisions)
    choice = _chosen(model, decisions)
    if strict and decisions and not choice.settings:
        raise NoMatchError(_nothing_to_quantize(decisions, choice.left))

    def as_chosen(path: str, layer: Any) -> nn.Module:
        if path not in choice.settings:
            return layer
        by_model = path in choice.by_model
        return _to_quantized(path, layer, choice.settings[path], by_model=by_model)

    factories = {pattern: rule and as_chosen for pattern, rule in wanted.items()}
    report = replace_layers(model, factories, where=quantizable, strict=False)
    report.left += choice.left
    marked = {id(report[path]) for path in choice.by_model}
    report.notes.update((path, _NOTE) for path in report if id(report[path]) in marked)
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


# ---------------------------------------------------------------- what happens to each layer


class _Decision(NamedTuple):
    """The rule that decides about a layer."""

    path: str
    layer: Any
    rule: Rule


class _Choice(NamedTuple):
    """What will be done.

    Attributes:
        settings (dict): The keywords of ``to_quantized`` for each layer, by path.
        by_model (set): The paths whose settings are those of the model's own predicate.
        left (list of Left): What catch-all rules leave alone, and what is quantized already.
    """

    settings: dict[str, Settings]
    by_model: set[str]
    left: list[Left]


def _is_layer(path: str, layer: Any) -> bool:
    """Return whether rules are about a layer: it can be quantized, or is quantized already."""
    return quantizable(path, layer) or quantized(path, layer)


def _decisions(
    model: nn.Module, wanted: Mapping[Any, Rule | None], strict: bool
) -> list[_Decision]:
    """Return the rule that decides about each layer, except those that are to be left alone."""
    decisions: list[_Decision] = []

    def noting(rule: Rule) -> Factory:
        def note(path: str, layer: nn.Module) -> nn.Module:
            decisions.append(_Decision(path, layer, rule))
            return layer

        return note

    # Rules that change nothing show which layers each of them decides.
    factories = {pattern: rule and noting(rule) for pattern, rule in wanted.items()}
    try:
        replace_layers(model, factories, where=_is_layer, strict=strict)
    except NoMatchError as error:
        raise NoMatchError(_without_where(str(error))) from None
    return decisions


def _chosen(model: nn.Module, decisions: list[_Decision]) -> _Choice:
    """Return the settings of each layer, and why others are left alone."""
    choice = _Choice({}, set(), [])
    reasons: dict[str, dict[str, Any]] = {}
    for rule in _rules_in(decisions):
        some = [one for one in decisions if one.rule is rule]
        by_default = _by_default(model, rule)
        for path, layer, _ in some:
            if quantized(path, layer):
                outcome = f"already quantized to {layer.bits} bits"
            else:
                outcome = by_default(path, layer) if rule.is_catch_all else rule.settings
            if isinstance(outcome, str):
                reasons.setdefault(outcome, {})[path] = layer
                continue
            choice.settings[path] = outcome
            if outcome is not rule.settings:
                choice.by_model.add(path)
    reasons.pop(_HOLDS_MODULES, None)
    choice.left.extend(_left(reason, layers) for reason, layers in reasons.items())
    return choice


def _by_default(model: nn.Module, rule: Rule) -> Callable[[str, Any], Settings | str]:
    """Return a function that says what a catch-all rule does with a layer.

    It returns the keywords of ``to_quantized`` or, if the layer is left alone, the reason.
    """
    loader = loader_of(model)
    predicate = loader.predicate(model, rule.settings)
    group_size = rule.settings["group_size"]
    matched = select(model, rule.pattern, where=_is_layer, strict=False)
    names_skipped = all(map(loader.skips, matched))

    def by_default(path: str, layer: Any) -> Settings | str:
        if tree_flatten(layer.children()):  # which `nn.quantize` leaves alone
            return _HOLDS_MODULES
        if loader.skips(path) and not names_skipped:
            return f"{loader.name} does not quantize them"
        if answer := predicate(path, layer):
            return dict(answer) if isinstance(answer, Mapping) else rule.settings
        if _width(layer) % group_size:
            return f"groups of {group_size} do not divide {{widths}}"
        return f"excluded by {_PREDICATE}"

    return by_default


def _left(reason: str, layers: Mapping[str, Any]) -> Left:
    widths = sorted({_width(layer) for layer in layers.values()})
    words = f"the width{'s' * (len(widths) > 1)} {', '.join(map(str, widths))}"
    sizes = {
        path: measured.nbytes for path, measured in zip(layers, measure(list(layers.values())))
    }
    return left("layers", reason.replace("{widths}", words), sizes)


def _rules_in(decisions: list[_Decision]) -> list[Rule]:
    return list({id(one.rule): one.rule for one in decisions}.values())


def _to_quantized(
    path: str, layer: Any, settings: Mapping[str, Any], *, by_model: bool
) -> nn.Module:
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
        message = f"{place} cannot be quantized with {message}: {error}"
        if by_model:
            mode = settings.get("mode", "affine")
            groups = settings.get("group_size") or defaults(mode)[0]
            message += (
                f"; {_PREDICATE} asks for groups of {groups}, so name this layer in an earlier "
                "rule, with settings that fit or with None (keep)"
            )
        raise ValueError(message) from error


def _width(layer: Any) -> int:
    """Return the number of weights in a row, which is divided into groups."""
    return layer.weight.shape[-1]


# ---------------------------------------------------------------- messages


def _check_that_rules_quantize(decisions: list[_Decision]) -> None:
    """Raise an error for the first rule whose layers are all quantized already."""
    for rule in _rules_in(decisions):
        layers = [(one.path, one.layer) for one in decisions if one.rule is rule]
        if not any(quantizable(*one) for one in layers):
            raise NoMatchError(
                f"{rule} has nothing to quantize: the layers that it matches ({len(layers)}) are "
                "already quantized and are left unchanged; start from the original model"
            )


def _check_widths(decisions: list[_Decision]) -> None:
    """Raise an error if a rule that names layers has groups that do not divide their widths."""
    for rule in _rules_in(decisions):
        group_size = rule.settings["group_size"]
        paths: dict[int, list[str]] = {}
        for path, layer, its in decisions:
            fits = quantized(path, layer) or _width(layer) % group_size == 0
            if its is rule and not rule.is_catch_all and not fits:
                paths.setdefault(_width(layer), []).append(path)
        if paths:
            raise ValueError(_mismatch(rule, paths))


def _mismatch(rule: Rule, paths: dict[int, list[str]]) -> str:
    """Write that a group size does not divide some widths, and which sizes do."""
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
        f"{rule} asks for groups of {rule.settings['group_size']}, which do not divide the width "
        f"of {', '.join(places)}; {advice}"
    )


def _nothing_to_quantize(decisions: list[_Decision], left: list[Left]) -> str:
    """Write why catch-all rules quantize nothing."""
    rules = [str(rule) for rule in _rules_in(decisions)]
    reasons = [f"{one.why} ({one.count} layer{'s' * (one.count > 1)})" for one in left]
    advice = "name the layers in a rule of their own, with a group_size that fits"
    if any(quantized(one.path, one.layer) for one in decisions):
        advice = "start from the original model"
    return (
        f"{listed(rules)} quantize{'s' * (len(rules) == 1)} nothing: {', '.join(reasons)}; {advice}"
    )


def _without_where(message: str) -> str:
    """Write a message of the core without ``where``, which the user has not passed."""
    name = f"where={_is_layer.__name__}"
    for words, others in (
        (f"{name} rejects", "there is no to_quantized in"),
        (f"{name} already leaves alone", "there is no to_quantized in"),
        (f" that {name} accepts", " that can be quantized"),
    ):
        message = message.replace(words, others)
    return message
