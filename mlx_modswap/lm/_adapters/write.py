"""Write the adapters of a model as an adapter folder."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import save_config

from ..._patterns.fold import folded
from ..._select.arguments import check_model
from ..._select.select import select
from ..._words import described, listed
from .._loaders import VisionLoader, loader_of
from .files import CONFIG, ORIGINALS, PEFT_WEIGHTS, WEIGHTS, quoted
from .kinds import A_RANK, LINEAR, METHODS, Adapter, class_of, kind_for, kind_of, mismatch, shapes
from .uniform import unify


def save_adapters(model: nn.Module, folder: str | Path) -> None:
    """Write the adapters of a model to a folder for mlx-lm and :func:`adapter_rules`.

    ``mlx_lm.load(..., adapter_path=folder)``, ``mlx_lm.generate``, ``mlx_lm.server``
    and ``mlx_lm.fuse`` read the folder. The adapters are of mlx-lm's classes
    (``LoRALinear``, ``LoRASwitchLinear``, ``LoRAEmbedding``, ``DoRALinear``,
    ``DoRAEmbedding``), at any paths and with any ranks and scales. Only the adapters
    are written, and no other parameters that were trained.

    mlx-lm reads one rank and one scale for all adapters. So lower ranks are padded
    with zeros, and other scales are folded into ``lora_b``, which changes the outputs
    only by rounding. ``adapter_config.json`` also contains the true rank and scale of
    each adapter, which :func:`adapter_rules` restores. The restored ranks, ``lora_a``
    and ``m`` are the same bit for bit, and so is ``lora_b`` if all scales are
    equal or differ by powers of two, or if ``lora_b`` is float16 or bfloat16.
    Otherwise ``lora_b`` differs by at most one unit in the last place of float32.

    The folder may exist, as it does when a training saves again. Its two adapter
    files are replaced, and its other files stay. If something fails, the old files
    stay. A program that reads the folder meanwhile finds the old adapter, none, or
    the new one, never parts of both. A process that is killed may leave a folder
    ``.unfinished-*`` inside.

    Args:
        model (mlx.nn.Module): A model with adapters. It is not changed.
        folder (str or Path): The folder to write ``adapters.safetensors`` and
            ``adapter_config.json`` to.

    Raises:
        ValueError: If the model has no adapters; if mlx-lm cannot read its adapters,
            because they are of another class, one is inside another, some are LoRA
            and some DoRA, or their dropouts differ; or if the folder contains an
            adapter of PEFT. Then nothing is written.

    Example:
        >>> import os, tempfile
        >>> import mlx.nn as nn
        >>> from mlx_lm.tuner.lora import LoRALinear
        >>> from mlx_modswap import lm, replace_layers
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> model = model.freeze()
        >>> lora = {
        ...     "layers[0]": lambda path, layer: LoRALinear.from_base(layer, r=4),
        ...     "layers[2]": lambda path, layer: LoRALinear.from_base(layer, r=8),
        ... }
        >>> _ = replace_layers(model, lora)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lm.save_adapters(model, folder)
        ...     sorted(os.listdir(folder))
        ['adapter_config.json', 'adapters.safetensors']
    """
    check_model(model)
    modules = select(model, "**", where=_has_lora, strict=False)
    if not modules:
        raise ValueError(
            "the model has no adapters; put some in with replace_layers and a class of mlx-lm, "
            "such as mlx_lm.tuner.lora.LoRALinear"
        )
    adapters = {path: _read(path, module) for path, module in modules.items()}
    _check_same(adapters, "method", "remove the adapters of one kind, or fuse them")
    _check_same(adapters, "dropout", "give them one: layer.dropout = mlx.nn.Dropout(p)")
    keys, num_layers = _keys(model, modules)
    uniform, originals = unify(adapters)
    first = next(iter(uniform.values()))
    config = {
        "fine_tune_type": first.method,
        "num_layers": num_layers,
        "lora_parameters": {
            "rank": first.rank,
            "scale": first.scale,
            "dropout": first.dropout,
            "keys": keys,
        },
        ORIGINALS: originals,
    }
    arrays = {
        f"{path}.{name}": array
        for path, adapter in uniform.items()
        for name, array in adapter.arrays.items()
    }
    with _replaced(Path(folder)) as stage:
        mx.save_safetensors(str(stage / WEIGHTS), arrays)
        save_config(config, stage / CONFIG)


# ---------------------------------------------------------------- what the model has


def _has_lora(path: str, module: nn.Module) -> bool:
    return "lora_a" in module


def _read(path: str, module: Any) -> Adapter:
    """Read an adapter from its module, and check that mlx-lm would build the same."""
    name, kind = class_of(module).__name__, kind_of(module)
    if kind is None:
        raise ValueError(
            f"{path!r} is a {name}, which mlx-lm does not build; use the classes of "
            "mlx_lm.tuner.lora and mlx_lm.tuner.dora"
        )
    layer = module[kind.holds]
    if _has_lora(path, layer):
        raise ValueError(
            f"{path!r} is an adapter around an adapter, and mlx-lm reads one for each layer; "
            "remove one of the two"
        )
    if kind_for(layer, kind.method) is not kind:
        raise ValueError(
            f"{path!r} is a {name} around a {layer.__class__.__name__}, which mlx-lm does not build"
        )
    rank = module.lora_a.shape[A_RANK]
    arrays = {key: module[key] for key in shapes(layer, kind.method, rank)}
    if wrong := mismatch(layer, arrays, kind.method, rank):
        raise ValueError(f"the adapter at {path!r} does not fit its layer: {wrong}")
    if not isinstance(module.scale, Real) or not math.isfinite(module.scale):
        raise ValueError(f"the scale of {path!r} must be a number, not {module.scale!r}")
    if not isinstance(module.dropout, nn.Dropout):
        found = described(module.dropout)
        raise ValueError(f"the dropout of {path!r} must be an mlx.nn.Dropout, not {found}")
    # nn.Dropout stores 1 - p; for p = 0.1, 1 - (1 - p) is 0.09999999999999998.
    dropout = round(1 - module.dropout._p_1, 12)
    return Adapter(arrays, kind.method, rank, float(module.scale), dropout)


def _check_same(adapters: Mapping[str, Adapter], field: str, advice: str) -> None:
    """Check that a field is the same for all adapters, since mlx-lm reads only one value."""
    groups: dict[Any, list[str]] = {}
    for path, adapter in adapters.items():
        groups.setdefault(getattr(adapter, field), []).append(path)
    if len(groups) > 1:
        found = ", ".join(
            f"{METHODS.get(value, value)} at {listed(places, 4)}"
            for value, paths in groups.items()
            for places in [map(repr, folded(paths, numbers_are_indices=True))]
        )
        raise ValueError(f"mlx-lm reads one {field} for all adapters, not {found}; {advice}")


# ---------------------------------------------------------------- where mlx-lm will put them


def _keys(model: nn.Module, modules: Mapping[str, nn.Module]) -> tuple[list[str], int]:
    """Return the ``keys`` and ``num_layers`` with which mlx-lm finds the places of the adapters.

    mlx-lm adapts the modules whose path is one of the keys: first the path from each of
    the last ``num_layers`` blocks, and then the path from the model. Keys relative to a
    block are preferred, since other programs can read them too; whole paths can name any
    places. The search of mlx-lm is repeated here: either it finds exactly these places,
    or it is an error.
    """
    if isinstance(loader_of(model), VisionLoader):  # mlx-vlm looks up whole paths
        _check_linear(modules)
        return list(modules), -1
    layers = getattr(model, "layers", None)
    layers = layers if isinstance(layers, (list, tuple)) else ()
    blocks = [dict(block.named_modules()) for block in layers]
    wanted = Counter(map(id, modules.values()))
    has_some = [not wanted.keys().isdisjoint(map(id, names.values())) for names in blocks]
    last = blocks[has_some.index(True) :] if any(has_some) else []
    relative = {key for names in last for key, module in names.items() if id(module) in wanted}
    found = Counter(id(names[key]) for names in last for key in relative if key in names)
    are_distinct = len(set(map(id, layers))) == len(layers)  # mlx-lm adapts each block in turn
    if are_distinct and found == wanted and relative.isdisjoint(dict(model.named_modules())):
        return sorted(relative), len(last)
    for path in modules:
        if any(path in names for names in blocks):
            raise ValueError(
                f"mlx-lm would also find {path!r} inside a block, and would put adapters there as "
                "well"
            )
    return list(modules), len(blocks)


def _check_linear(modules: Mapping[str, Any]) -> None:
    for path, module in modules.items():
        kind = kind_of(module)
        if kind is not None and kind.layers != LINEAR:
            layer = type(module[kind.holds]).__name__
            raise ValueError(
                f"mlx-vlm puts adapters around linear layers only, not around the {layer} at "
                f"{path!r}; leave it out"
            )


# ---------------------------------------------------------------- the files


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """Yield a folder to write the two files to, and then move both into ``folder``."""
    peft = Path(PEFT_WEIGHTS)
    if any((folder / name).exists() for name in (peft, peft.with_suffix(".bin"))):
        raise ValueError(
            f"{quoted(folder)} has an adapter of PEFT, which would be lost; use another folder"
        )
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{quoted(folder)} is a file; pass a folder")
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(prefix=".unfinished-", dir=folder) as stage:
            yield Path(stage)
            _move_in(Path(stage), folder)
    except BaseException:
        with suppress(OSError):  # another program put something there
            for one in made:
                one.rmdir()
        raise


def _move_in(stage: Path, folder: Path) -> None:
    # A folder without a config has no adapter. The old config is moved out first, and the new one
    # is moved in last. So a program that reads the folder meanwhile, or after a crash, never finds
    # the arrays of one adapter and the config of another.
    olds = [name for name in (CONFIG, WEIGHTS) if (folder / name).exists()]
    try:
        for name in olds:
            os.replace(folder / name, stage / f"old-{name}")
        for name in (WEIGHTS, CONFIG):
            os.replace(stage / name, folder / name)
    except BaseException:
        for name in (WEIGHTS, CONFIG):
            if (stage / f"old-{name}").exists():
                os.replace(stage / f"old-{name}", folder / name)
            elif name not in olds:
                (folder / name).unlink(missing_ok=True)
        raise
