"""Read rules of quantization from text: from arguments of the command line and a JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Key = str | tuple[str, ...]
Value = Any  # which `lm.quantize` checks
Rule = tuple[Key, Value]

MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")  # as in mlx_lm.convert
_KEEP = "keep"  # leaves a layer alone, like None in the library and null in JSON
_BITS = range(1, 33)  # MLX says which of these it supports
_FORMS = '{"PATTERN": VALUE} or [["PATTERN" or ["PATTERN", ...], VALUE], ...]'


class RulesError(ValueError):
    """The text of a rule, or a file of rules, is wrong."""


def read_rules(texts: Sequence[str], files: Sequence[Path] = ()) -> dict[Key, Value]:
    """Read the rules of a command line, and then the rules of each file.

    Args:
        texts (Sequence of str): Each is ``PATTERN=BITS``, or ``PATTERN=keep`` to leave what it
            matches alone.
        files (Sequence of Path): JSON files, each with an object of pattern to value, or a list
            of ``[pattern or patterns, value]``. A value is a number of bits, an object such as
            ``{"bits": 4, "group_size": 32}``, or null or ``"keep"`` to leave alone.
            Default: ``()``.

    Returns:
        dict: Patterns to values, in the order in which they were given, for
        :func:`mlx_modswap.lm.quantize`.

    Raises:
        RulesError: If a text or a file is wrong, or two rules have the same pattern.
    """
    given = [_rule(text) for text in texts]
    for file in files:
        given += _rules_in(file)
    if not given:
        raise RulesError("no rules: give at least one, such as '**=4', or --rules FILE.json")
    rules: dict[Key, Value] = {}
    for key, value in given:
        if key in rules:
            raise RulesError(f"two rules for {_shown(key)}: keep one of them")
        rules[key] = value
    return rules


def _rule(text: str) -> Rule:
    pattern, equals, value = text.rpartition("=")
    if not equals:
        raise RulesError(
            f"the rule {text!r} has no value: write '{text}=4', or '{text}=keep' to leave it alone"
        )
    if value == _KEEP:
        return pattern, None
    if value not in map(str, _BITS):
        raise RulesError(
            f"the rule {text!r} ends in {value!r}, which is neither a number of bits nor 'keep'"
        )
    return pattern, int(value)


def _rules_in(file: Path) -> list[Rule]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise RulesError(f"{file} cannot be read: {error.strerror}") from None
    except _DuplicateKey as error:
        raise RulesError(f"{file}: two values for {error}: keep one of them") from None
    except (ValueError, RecursionError) as error:
        raise RulesError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, (dict, list)):
        raise RulesError(f"{file} holds {json.dumps(content)}; it must be {_FORMS}")
    items: Iterable[Any] = content.items() if isinstance(content, dict) else content
    return [_checked(file, item) for item in items]


class _DuplicateKey(ValueError):
    """A JSON object has the same key twice, and Python would keep only the last value."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKey(repr(key))
        found[key] = value
    return found


def _checked(file: Path, item: Any) -> Rule:
    if not isinstance(item, (list, tuple)) or len(item) != 2:
        raise RulesError(f"{file}: {json.dumps(item)} is not [pattern or patterns, value]")
    key, value = item
    patterns = key if isinstance(key, list) else [key]
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise RulesError(f"{file}: {json.dumps(key)} is not a pattern or a list of patterns")
    return tuple(key) if isinstance(key, list) else key, None if value == _KEEP else value


def _shown(key: Key) -> str:
    return ", ".join(map(repr, [key] if isinstance(key, str) else key))
