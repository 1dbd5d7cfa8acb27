"""Read the rules of a quantization: what each pattern asks for, and how it decides."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .._words import described

Settings = dict[str, Any]  # keywords of `to_quantized`
Value = int | Mapping[str, Any] | None
Rules = Mapping[Any, Value]  # from a pattern or several; not typed, as keys are invariant

CATCH_ALL = "**"
_GLOBAL = ("group_size", "bits", "mode")  # what mlx-lm's table of quantization says of all layers


class Rule(NamedTuple):
    """A rule that quantizes.

    Attributes:
        pattern (Pattern or tuple of Pattern): What it matches.
        settings (dict): The keywords of ``to_quantized``, including the defaults.
    """

    pattern: Any
    settings: Settings

    @property
    def is_catch_all(self) -> bool:
        """Whether the rule does what the package of the model does by default.

        It does if each of its patterns ends in ``**``. Any other rule names layers.
        """
        patterns = self.pattern if isinstance(self.pattern, tuple) else (self.pattern,)
        return all(isinstance(one, str) and one.rpartition(".")[2] == CATCH_ALL for one in patterns)

    def __str__(self) -> str:
        """Write the patterns as in the rules that were given."""
        return f"rule {shown(self.pattern)}"


def read_rules(rules: Any, group_size: int | None, mode: str) -> dict[Any, Rule | None]:
    """Return the rules by their patterns, and ``None`` for what is left alone.

    Raises:
        TypeError: If the rules, or one of their values, are of the wrong type.
        ValueError: If MLX does not know a mode.
    """
    if not isinstance(rules, Mapping) or isinstance(rules, nn.Module):
        raise TypeError(
            "rules must map patterns to bits, to keywords of to_quantized or to None, "
            f"not {described(rules)}"
        )
    return {
        pattern: None
        if value is None or value is False
        else Rule(pattern, _settings(pattern, value, group_size, mode))
        for pattern, value in rules.items()
    }


def is_table(rules: Any) -> bool:
    """Return whether rules are a table that mlx-lm writes into a config as ``"quantization"``."""
    return isinstance(rules, Mapping) and all(
        isinstance(rules.get(name), int) for name in ("group_size", "bits")
    )


def rules_of_table(table: Mapping[str, Any], layers: Collection[str]) -> Rules:
    """Return a table of mlx-lm as rules: its entries by path, and then those for all other layers.

    Args:
        table (Mapping): The table. An entry that is ``False`` leaves a layer alone, also one
            that cannot be quantized.
        layers (Collection of str): The paths of the layers that rules can be about.
    """
    usual = {name: table[name] for name in _GLOBAL if name in table}
    entries = {
        path: usual if value is True else value
        for path, value in table.items()
        if path not in _GLOBAL and (value is not False or path in layers)
    }
    return entries if entries.keys() >= set(layers) else {**entries, CATCH_ALL: usual}


def shown(pattern: Any) -> str:
    """Write the key of a rule."""
    return repr(list(pattern)) if isinstance(pattern, tuple) else repr(pattern)


def _settings(pattern: Any, value: Any, group_size: int | None, mode: str) -> Settings:
    """Return the value of a rule as keywords of ``to_quantized``, including the defaults."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"bits": value}
    if not isinstance(value, Mapping):
        raise TypeError(
            f"rule {shown(pattern)} must be a number of bits, a mapping of keywords of "
            f"to_quantized, or None, not {value!r}"
        )
    given = {key: one for key, one in value.items() if one is not None}
    own_mode = given.get("mode", mode)
    usual_group_size, usual_bits = defaults(own_mode)
    if group_size is not None and own_mode == mode:
        usual_group_size = group_size
    settings = {"group_size": usual_group_size, "bits": usual_bits, "mode": own_mode, **given}
    for name in ("group_size", "bits"):
        number = settings[name]
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise TypeError(
                f"{name} of rule {shown(pattern)} must be an int of 1 or more, not {number!r}"
            )
    return settings


def defaults(mode: str) -> tuple[int, int]:
    """Return MLX's default group size and bits for a mode, derived from the shapes it makes."""
    try:
        weight, scales, *_ = mx.quantize(mx.zeros((32, 512)), mode=mode)  # never computed
    except (TypeError, ValueError):
        raise ValueError(
            f"mode must be 'affine', 'mxfp4', 'nvfp4' or 'mxfp8', not {mode!r}"
        ) from None
    return 512 // scales.shape[1], weight.shape[1] * 32 // 512
