"""Read the ``LoraConfig`` and the arrays of PEFT."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from .experts import PARAMETERS, join_modules, split_parameters
from .files import (
    CONFIG,
    MERGE,
    PEFT_WEIGHTS,
    quoted,
    read_arrays,
    read_dropout,
    read_number,
    read_object,
    read_rank,
)
from .kinds import Adapter, Fit

_START = "base_model.model."
_NAME = re.compile(
    r"(?P<path>.+)\.(?:lora_(?P<side>[AB])\.weight|lora_embedding_(?P<embedding>[AB])"
    r"|(?P<base>base_layer)\.weight)"
)
_INNER = ".base_layer"  # what PEFT adds to a path for each parameter but the last of a module

# Keys that do not change the result of plain LoRA, or that are read below. Any other key that is
# set may change it, as the keys of PEFT's many variants of LoRA do.
_HARMLESS = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
        *("runtime_config", "task_type", "megatron_core", "fan_in_fan_out", "qalora_group_size"),
        *("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform"),
        *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),  # of init_lora_weights
        *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora"),
        *("ensure_weight_tying", "target_parameters"),
    }
)
_PLAIN = {  # the values that are plain LoRA, of keys that are never empty
    "bias": ("none",),
    # Others change the base weights.
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal", "mica"),
}

Arrays = dict[str, mx.array]  # of one path: "A", "B", "embedding_A", "embedding_B", "base_layer"


def read_peft(folder: Path, config: Mapping[str, Any]) -> dict[str, Adapter]:
    """Read a folder with LoRA of PEFT.

    Returns:
        dict: The adapter of each path. ``lora_a`` and ``lora_b`` are the transposed
        ``lora_A`` and ``lora_B``.

    Raises:
        ValueError: If it is not plain LoRA, or the files do not fit each other.
    """
    _check_plain(config, folder / CONFIG)
    lora = _Config(config, folder)
    arrays = _read_by_path(folder / PEFT_WEIGHTS)
    adapters = _take_embeddings(arrays, lora)
    adapters |= _take_parameters(arrays, lora)
    adapters |= {path: lora.adapter(path, some) for path, some in arrays.items()}
    return join_modules(adapters)


def _check_plain(config: Mapping[str, Any], file: Path) -> None:
    for key, value in config.items():
        if key == "peft_type":
            is_plain = value == "LORA"
        elif key in _PLAIN and value:
            is_plain = (value.lower() if isinstance(value, str) else value) in _PLAIN[key]
        else:
            is_plain = not value or key in _HARMLESS
        if not is_plain:
            raise ValueError(
                f"{quoted(file)} sets {key!r} to {value!r}, which is not plain LoRA; {MERGE}"
            )


def _read_by_path(file: Path) -> dict[str, Arrays]:
    """Read the arrays of each path, in the order of the file."""
    arrays: dict[str, Arrays] = {}
    for name, array in read_arrays(file).items():
        found = _NAME.fullmatch(name.removeprefix(_START))
        if found is None or array.ndim != 2:
            shape = "" if found is None else f" of shape {array.shape}"
            raise ValueError(
                f"{quoted(file)} has an array {name!r}{shape}, which is not LoRA of a linear "
                f"layer; {MERGE}"
            )
        if not name.startswith(_START):
            raise ValueError(
                f"{quoted(file)} has an array {name!r}, whose name is PEFT's without the "
                f"{_START!r} at its start, which save_pretrained of PEFT writes; add it to the "
                "names of all arrays"
            )
        side, embedding, base = found["side"], found["embedding"], found["base"]
        key = side or base or f"embedding_{embedding}"
        arrays.setdefault(found["path"], {})[key] = array
    for path, some in arrays.items():
        if some.keys() == {"base_layer"}:
            raise ValueError(
                f"{quoted(file)} has the weight of {path!r} ({_START}{path}{_INNER}.weight), but "
                f"no adapter for it; {MERGE}"
            )
    return arrays


# ---------------------------------------------------------------- ranks and scales


class _Config:
    """A ``LoraConfig``, which says how the arrays beside it are used."""

    def __init__(self, entries: Mapping[str, Any], folder: Path):
        self.entries = entries
        self.folder = folder
        self.file = quoted(folder / PEFT_WEIGHTS)
        self.dropout = read_dropout(entries.get("lora_dropout", 0.0), self.name("lora_dropout"))

    def name(self, key: str) -> str:
        """Return the name of an entry for a message."""
        return f"{key!r} in {quoted(self.folder / CONFIG)}"

    def adapter(self, target: str, arrays: Arrays) -> Adapter:
        """Return the adapter of a linear layer, which PEFT has under this name."""
        pair = {f"lora_{side.lower()}": arrays[side].T for side in "AB" if side in arrays}
        rank = self.rank(target, arrays["A"].shape[0] if "A" in arrays else None)
        fits = (_check_base(arrays["base_layer"], self.file),) if "base_layer" in arrays else ()
        return Adapter(pair, "lora", rank, self.scale(target, rank), self.dropout, fits)

    def parameter(self, target: str, arrays: Arrays) -> Adapter:
        """Return the adapter of a parameter that holds all experts of a layer."""
        rank = self.rank(target)
        shapes = [arrays[side].shape for side in "AB" if side in arrays]
        if len(shapes) < 2 or shapes[0][0] != shapes[1][1] or shapes[0][0] % rank:
            raise ValueError(
                f"{self.file} has arrays of the shapes {shapes} for {target!r}, which are not "
                f"lora_A and lora_B of rank {rank} for each expert, as {CONFIG} says"
            )
        pair = {"lora_a": arrays["A"].T, "lora_b": arrays["B"].T}
        return Adapter(pair, "lora", rank, self.scale(target, rank), self.dropout)

    def rank(self, target: str, rows: int | None = None) -> int:
        """Return the rank for a name; the rows of ``lora_A`` decide between several patterns."""
        if rows in self.matching(target, "rank_pattern").values():
            return read_rank(rows, self.name("rank_pattern"))
        return read_rank(*self.value(target, "rank_pattern", "r"))

    def scale(self, target: str, rank: int) -> float:
        """Return PEFT's scale: alpha / r, or alpha / sqrt(r) with ``use_rslora``."""
        alpha = read_number(*self.value(target, "alpha_pattern", "lora_alpha"))
        return alpha / (math.sqrt(rank) if self.entries.get("use_rslora") else rank)

    def value(self, target: str, patterns: str, usual: str) -> tuple[Any, str]:
        """Return the value of the pattern that matches a name, or the usual one, and its name."""
        matching = self.matching(target, patterns)
        if not matching:
            return self.entries.get(usual, 8), self.name(usual)  # 8 is PEFT's default for both
        (first, value), *others = matching.items()
        for other in others:
            if other[1] != value:
                raise ValueError(
                    f"{self.name(patterns)} has {first!r}: {value!r} and {other[0]!r}: "
                    f"{other[1]!r}, which both match {target!r}; PEFT used the one that was given "
                    "first, but sorts the patterns when it writes the file; remove the one that it "
                    "did not use"
                )
        return value, f"{first!r} of {self.name(patterns)}"

    def matching(self, target: str, patterns: str) -> dict[str, Any]:
        """Return the patterns that match the end of a name, and their values."""
        what = self.name(patterns)
        matching: dict[str, Any] = {}
        for pattern, value in read_object(self.entries.get(patterns) or {}, what).items():
            try:
                found = re.match(rf"(.*\.)?({pattern})$", target)  # as in PEFT's get_pattern_key
            except re.error as error:
                raise ValueError(
                    f"{what} has {pattern!r}, which is not a regular expression: {error}"
                ) from error
            if found:
                matching[pattern] = value
        return matching

    def parameters(self, path: str) -> list[str]:
        """Return which parameters of a module PEFT adapted, innermost first; none of a layer."""
        targets = self.names("target_parameters")
        if not targets or self.is_layer(path):
            return []
        adapted = {
            name
            for name in {target.rpartition(".")[2] for target in targets}
            if any(f".{path}.{name}".endswith(f".{target}") for target in targets)
        }
        if "weight" in adapted:  # a module with a weight has no experts, though their names match
            return ["weight"]
        # PEFT wraps a module once for each, in the order in which transformers defines them.
        return sorted(adapted, key=lambda name: (name == "down_proj", name))

    def is_layer(self, path: str) -> bool:
        """Return whether PEFT adapted a module, and not its parameters."""
        targets = self.entries.get("target_modules")
        if isinstance(targets, str):
            return re.fullmatch(targets, path) is not None
        return any(f".{path}".endswith(f".{target}") for target in self.names("target_modules"))

    def is_old(self) -> bool:
        """Return whether PEFT was older than 0.19; it writes its version since 0.18."""
        version = re.match(r"(\d+)\.(\d+)", str(self.entries.get("peft_version")))
        return version is None or tuple(map(int, version.groups())) < (0, 19)

    def names(self, key: str) -> list[str]:
        """Return an entry that is a list of names."""
        names: Any = self.entries.get(key) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{self.name(key)} must be a list of names")
        return names


def _check_base(weight: mx.array, file: str) -> Fit:
    """Return a function that compares the weight of a layer with a copy that PEFT wrote."""

    def fit(path: str, layer: Any, adapter: Adapter) -> Adapter:
        if not _is_copy(weight, layer):
            raise ValueError(
                f"{file} has a copy of the weight of {path!r}, as PEFT writes it for an adapted "
                "head or embedding, and it differs from the weight of the model; use the model "
                "that the adapter was trained on; if this is that model, only quantized by another "
                f"method, remove the array {_START}{path}{_INNER}.weight from the file"
            )
        return adapter

    return fit


def _is_copy(weight: mx.array, layer: Any) -> bool:
    """Return whether a layer has this weight, cast or quantized."""
    if "scales" in layer:
        is_float = mx.issubdtype(layer.scales.dtype, mx.floating)  # not in mxfp4 and the like
        weight = weight.astype(layer.scales.dtype) if is_float else weight
        expected = mx.quantize(weight, layer.group_size, layer.bits, mode=layer.mode)
        held = [layer[name] for name in ("weight", "scales", "biases") if name in layer]
        return all(mx.array_equal(*pair).item() for pair in zip(held, expected))
    held = layer.weight
    casts = (held.astype(weight.dtype), weight), (held, weight.astype(held.dtype))
    return any(mx.array_equal(*pair).item() for pair in casts)


# ---------------------------------------------------------------- what is not a linear layer


def _take_embeddings(arrays: dict[str, Arrays], lora: _Config) -> dict[str, Adapter]:
    """Take the adapters of embeddings out of the arrays, each with that of the tied head.

    PEFT's adapter of an embedding changes only the inputs, and mlx-lm's also changes the outputs
    if the head is tied. The two are the same if PEFT adapted the head with the same arrays, as it
    does with ``ensure_weight_tying``.
    """
    adapters: dict[str, Adapter] = {}
    for path in [path for path, some in arrays.items() if "embedding_A" in some]:
        embedding = {key.removeprefix("embedding_"): one for key, one in arrays.pop(path).items()}
        head = next((head for head, some in arrays.items() if _is_tied(some, embedding)), None)
        if head is None or not lora.entries.get("ensure_weight_tying"):
            raise ValueError(
                f"{lora.file} has an adapter of an embedding, {path!r}: PEFT adapts only the "
                "inputs, but mlx-lm would adapt the outputs as well if the head is tied to the "
                f"embedding; {MERGE}"
            )
        adapter = lora.adapter(path, embedding)
        other = lora.adapter(head, arrays.pop(head))
        if other.scale != adapter.scale:
            raise ValueError(
                f"{lora.file} has one adapter for {path!r} and {head!r}, which are tied, but the "
                f"scales are {adapter.scale} and {other.scale}, and mlx-lm has one for both; "
                f"{MERGE}"
            )
        adapters[path] = adapter._replace(fits=adapter.fits + other.fits)
    return adapters


def _is_tied(head: Arrays, embedding: Arrays) -> bool:
    """Return whether a head is adapted by the arrays of an embedding, with the sides exchanged."""
    pairs = [(head.get("A"), embedding.get("B")), (head.get("B"), embedding.get("A"))]
    return all(
        one is not None and other is not None and mx.array_equal(one, other.T).item()
        for one, other in pairs
    )


def _take_parameters(arrays: dict[str, Arrays], lora: _Config) -> dict[str, Adapter]:
    """Take the adapters of ``target_parameters`` out of the arrays."""
    adapters: dict[str, Adapter] = {}
    for path in [path for path in arrays if not path.endswith(_INNER)]:
        names = lora.parameters(path)
        if names == ["weight"]:  # of a router, which is not a linear layer in transformers 5
            adapters[path] = lora.adapter(f"{path}.weight", arrays.pop(path))
        elif unknown := [name for name in names if name not in PARAMETERS]:
            raise ValueError(
                f"{lora.file} has an adapter of the parameter {unknown[0]!r} of {path!r}, which "
                f"mlx-lm has under another name than {', '.join(PARAMETERS)}; {MERGE}"
            )
        else:
            parts = {
                name: lora.parameter(f"{path}.{name}", arrays.pop(path + _INNER * depth, {}))
                for depth, name in enumerate(reversed(names))
            }
            adapters |= split_parameters(path, parts, is_old=lora.is_old())
    for path in arrays:
        if path.endswith(_INNER):
            raise ValueError(
                f"{lora.file} has more adapters for {path.removesuffix(_INNER)!r} than "
                f"{lora.name('target_parameters')} has parameters"
            )
    return adapters
