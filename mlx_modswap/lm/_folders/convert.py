"""Convert a folder of weights to a quantized one, without holding the model in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_map_with_path
from mlx_lm import utils
from mlx_lm.convert import MODEL_CONVERSION_DTYPES
from tqdm import tqdm

from ..._show.report import Replacement
from .._loaders import loader_named
from .._quantize import quantize
from .._rules import Rules
from .._source import Config, Folder, Source, locate, one_line, text_config
from .compare import outline
from .left import left_out
from .save import check, finish
from .write import check_free, copied_nbytes, staged, writing

Arrays = dict[str, mx.array]


def convert(
    source: Folder,
    folder: Folder,
    rules: Rules,
    *,
    group_size: int | None = None,
    mode: str = "affine",
    dtype: str | mx.Dtype | None = None,
    strict: bool = True,
    max_shard_mb: float = 1000,
    loader: str = "mlx-lm",
    trust_remote_code: bool = False,
) -> Replacement:
    """Quantize a model by rules, from folder to folder, even if it is larger than memory.

    The arrays are read, quantized and written one after the other. However large
    the model is, this takes at most the memory of one shard plus one and a half
    times the largest layer that is quantized, or plus twice that layer if the model
    assembles it from several arrays of its files, as with experts that are stored
    one by one. With the same settings, the arrays are those that ``mlx_lm.convert``
    writes. On a terminal, a bar shows the progress.

    As in :func:`save`, the folder is written under another name and loaded by
    mlx-lm before it gets its own name. If anything fails or is interrupted,
    nothing is left of the folder.

    Args:
        source (str or pathlib.Path): The folder of a model, or its name on the
            hub, from where it is downloaded.
        folder (str or pathlib.Path): The folder to make. It must not exist.
        rules (Mapping): What to do with the layers that a pattern matches. See
            :func:`quantize`.
        group_size (int, optional): See :func:`quantize`. Default: ``None``.
        mode (str): See :func:`quantize`. Default: ``"affine"``.
        dtype (str or mlx.core.Dtype, optional): The dtype of arrays that are not
            quantized: ``"float16"``, ``"bfloat16"`` or ``"float32"``. Default:
            ``None``, the dtype in the config, as for ``mlx_lm.convert``.
        strict (bool): See :func:`quantize`. Default: ``True``.
        max_shard_mb (float): The largest size of a weights file, in megabytes (10**6
            bytes). A larger array gets a file of its own. Default: ``1000``.
        loader (str): The package that loads both folders: ``"mlx-lm"``, or ``"mlx-vlm"``
            for a vision-language model with its vision part. Default: ``"mlx-lm"``.
        trust_remote_code (bool): Whether to run the ``model_file`` that the config
            names. Default: ``False``.

    Returns:
        Replacement: What was quantized. Its figures are valid, but its layers no
        longer hold weights. ``left``, and the last lines when it is printed, are what
        did not come along: arrays that the loader does not use, files that were not
        copied, and layers that a rule left alone.

    Raises:
        PatternError, NoMatchError, SelectionError: As in :func:`quantize`.
        ValueError: As in :func:`quantize`, or if mlx-lm cannot load the source, or
            would not build the converted model from the folder.
        FileNotFoundError: If the source is not a folder here and cannot be downloaded.
        FileExistsError: If the folder exists.
        OSError: If the disk has too little space.
        TypeError: If an argument is of the wrong type.

    Example:
        >>> import mlx_lm
        >>> from mlx_modswap import lm
        >>> rules = {"model.layers[0]": None, "**.v_proj": 8, "**": 4}
        >>> report = lm.convert("my_model", "my_model_mixed", rules)
        >>> model, tokenizer = mlx_lm.load("my_model_mixed")
        >>> model.layers[1].self_attn.v_proj.bits
        8
    """
    target = Path(folder)
    check_free(target)
    if not isinstance(max_shard_mb, (int, float)) or not max_shard_mb > 0:
        raise ValueError(f"max_shard_mb must be a number above 0, not {max_shard_mb!r}")
    origin, model, config, report, originals = plan(
        source,
        rules,
        group_size=group_size,
        mode=mode,
        dtype=dtype,
        strict=strict,
        loader=loader,
        trust_remote_code=trust_remote_code,
    )
    expected = outline(model)
    arrays = _parameters(model)
    nbytes = sum(array.nbytes for array in arrays.values())
    with staged(target, nbytes + copied_nbytes(origin.folder)) as staging:
        finish(staging, origin, config, model)
        shards = list(_shards(arrays, max_shard_mb * 10**6))
        summary = {"total_size": nbytes, "total_parameters": utils.get_total_parameters(model)}
        del arrays
        _drop_arrays(model, report)
        _write(staging, shards, originals, summary)
        check(origin._replace(folder=staging), target, expected, None)
    return report


class Conversion(NamedTuple):
    """What will be written. None of its arrays is computed yet.

    Attributes:
        origin (Source): The folder of the source.
        model (mlx.nn.Module): The quantized model.
        config (dict): The config of the source.
        report (Replacement): What was quantized.
        originals (dict): The parameters before they were quantized, by name.
    """

    origin: Source
    model: nn.Module
    config: Config
    report: Replacement
    originals: Arrays


def plan(
    source: Folder,
    rules: Rules,
    *,
    group_size: int | None,
    mode: str,
    dtype: str | mx.Dtype | None,
    strict: bool,
    trust_remote_code: bool,
    loader: str = "mlx-lm",
) -> Conversion:
    """Load and quantize a model lazily, with the arguments of ``convert``; return the plan."""
    wanted = _parsed(dtype)
    reader = loader_named(loader)
    origin = Source(locate(source, reader.download), reader, trust_remote_code)
    loaded = origin.load()
    left = left_out(origin, loaded)
    model, config, read = loaded
    read.clear()
    _cast(model, config, wanted)
    originals = _parameters(model)
    report = quantize(model, rules, group_size=group_size, mode=mode, strict=strict)
    report.left += left
    return Conversion(origin, model, config, report, originals)


def _parameters(model: nn.Module) -> Arrays:
    parameters: Any = tree_flatten(model.parameters())
    return dict(parameters)


def _parsed(dtype: Any) -> str | None:
    name = str(dtype).removeprefix("mlx.core.") if dtype is not None else None
    if name is not None and name not in MODEL_CONVERSION_DTYPES:
        known = ", ".join(map(repr, MODEL_CONVERSION_DTYPES))
        raise ValueError(f"dtype must be one of {known}, not {dtype!r}")
    return name


def _cast(model: nn.Module, config: Config, dtype: str | None) -> None:
    """Cast the same arrays as ``mlx_lm.convert``, to the same dtype."""
    inner = text_config(config)
    name = dtype or config.get("torch_dtype") or inner.get("dtype")
    if name not in MODEL_CONVERSION_DTYPES:
        return
    wanted = getattr(mx, name)
    is_cast = getattr(model, "cast_predicate", lambda name: True)

    def cast(name: str, array: mx.array) -> mx.array:
        is_wanted = is_cast(name) and mx.issubdtype(array.dtype, mx.floating)
        return array.astype(wanted) if is_wanted else array

    model.update(tree_map_with_path(cast, model.parameters()))


# ---------------------------------------------------------------- write as it is computed


def _shards(arrays: Arrays, most: float) -> Iterator[Arrays]:
    """Yield the arrays in order, in groups of at most ``most`` bytes or of one array."""
    shard: Arrays = {}
    taken = 0
    for name, array in arrays.items():
        if shard and taken + array.nbytes > most:
            yield shard
            shard, taken = {}, 0
        shard[name] = array
        taken += array.nbytes
    yield shard


def _drop_arrays(model: nn.Module, report: Replacement) -> None:
    """Remove the arrays from a model, after the report has read its figures from them."""
    _ = report.changes
    model.update(tree_map(lambda array: mx.array([]), model.parameters()))


def _write(folder: Path, shards: list[Arrays], originals: Arrays, summary: dict[str, Any]) -> None:
    """Compute and write the shards one after the other; free each when it is written.

    A computed array releases its inputs, so only as much of the original model is in
    memory as one array needs. An original array is computed before its quantized array:
    otherwise MLX would keep the array it was cast from until both are done.
    """
    count = len(shards)
    files: dict[str, str] = {}
    shards.reverse()  # `pop` takes the next one from the end
    size = summary["total_size"]
    with tqdm(total=size, unit="B", unit_scale=True, disable=None, desc=folder.name) as bar:
        while shards:
            shard = shards.pop()
            file = f"model-{count - len(shards):05d}-of-{count:05d}.safetensors"
            if count == 1:
                file = "model.safetensors"
            for name in shard:
                _compute(name, originals.pop(name, None))
                _compute(name, shard[name])
                bar.update(shard[name].nbytes)
            with writing(file):
                mx.save_safetensors(str(folder / file), shard, metadata={"format": "mlx"})
            files.update(dict.fromkeys(shard, file))
            shard.clear()
            mx.clear_cache()
    index = {"metadata": summary, "weight_map": dict(sorted(files.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=4))


def _compute(name: str, array: mx.array | None) -> None:
    try:
        mx.eval(array)
    except Exception as error:
        raise ValueError(f"{name!r} cannot be computed: {one_line(error)}") from error
