"""Adapters of any ranks and scales <-> adapters of one rank and one scale, as mlx-lm reads them.

A lower rank is padded with zeros, and taken off again exactly. The padding stays
zero in training, because each side's gradient is a product with the other side.

A scale is folded into ``lora_b``: the product of both stays the same. It is
multiplied and divided in float64, so each way rounds once. Taken out again,
``lora_b`` is the same bit by bit where the scale is the most frequent one or
differs from it by a power of two, and where ``lora_b`` is float16 or bfloat16
(it is written as float32 if its own dtype would lose something). Otherwise it
differs by at most one unit in the last place of float32. No array of float32
could do better: there are more numbers than places on one side of the fold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from ._adapter_files import read_number, read_object, read_rank
from ._lora import A_RANK, Adapter, b_rank
from ._paths import folded

Truths = dict[str, dict[str, Any]]  # the true rank and scale of each path

_DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16}  # those that are written as float32


def make_uniform(adapters: Mapping[str, Adapter]) -> tuple[dict[str, Adapter], Truths]:
    """Give all adapters one rank and one scale, without a change of what they compute.

    Returns:
        The adapters by path, and what :func:`restore` needs.

    Raises:
        ValueError: If some scales are zero, which no array could be divided by later.
    """
    scales = Counter(adapter.scale for adapter in adapters.values())
    zeros = [path for path, adapter in adapters.items() if adapter.scale == 0]
    if zeros and len(scales) > 1:
        raise ValueError(
            f"the scale is 0 at {', '.join(folded(zeros))}, and lora_b could not be restored from "
            "what mlx-lm reads; set another scale, or take the adapters off"
        )
    scale, _ = scales.most_common(1)[0]
    rank = max(adapter.rank for adapter in adapters.values())
    uniform: dict[str, Adapter] = {}
    truths: Truths = {}
    for path, adapter in adapters.items():
        arrays = dict(adapter.arrays)
        lora_b = _fold(arrays["lora_b"], adapter.scale, scale)
        truths[path] = {"rank": adapter.rank, "scale": adapter.scale}
        if lora_b.dtype != arrays["lora_b"].dtype:
            truths[path]["dtype"] = str(arrays["lora_b"].dtype).rpartition(".")[2]
        arrays["lora_a"] = _pad(arrays["lora_a"], A_RANK, rank)
        arrays["lora_b"] = _pad(lora_b, b_rank(lora_b), rank)
        uniform[path] = adapter._replace(arrays=arrays, rank=rank, scale=scale)
    return uniform, truths


def restore(adapters: Mapping[str, Adapter], truths: Any, what: str) -> dict[str, Adapter]:
    """Give all adapters their own rank and scale again.

    Args:
        adapters (Mapping): The adapters by path, all of one rank and scale.
        truths (Any): What should be the second result of :func:`make_uniform`.
        what (str): What to call it in a message.

    Raises:
        ValueError: If the two do not fit each other.
    """
    truths = read_object(truths, what)
    if unpaired := sorted(set(truths) ^ set(adapters)):
        raise ValueError(f"{what} does not have the paths of the arrays: {unpaired[0]!r}")
    return {
        path: _restored(adapter, read_object(truths[path], f"{path!r} of {what}"), path, what)
        for path, adapter in adapters.items()
    }


def _restored(adapter: Adapter, truth: dict[str, Any], path: str, what: str) -> Adapter:
    rank = read_rank(truth.get("rank"), f"'rank' of {path!r} in {what}")
    scale = read_number(truth.get("scale"), f"'scale' of {path!r} in {what}")
    dtype: Any = truth.get("dtype")
    if dtype not in (None, *_DTYPES):
        raise ValueError(f"'dtype' of {path!r} in {what} must be one of {', '.join(_DTYPES)}")
    if scale != adapter.scale and 0 in (scale, adapter.scale):
        raise ValueError(f"'scale' of {path!r} in {what} cannot be {scale}")
    arrays = dict(adapter.arrays)
    for name, axis in (("lora_a", A_RANK), ("lora_b", b_rank(arrays["lora_b"]))):
        arrays[name], rest = mx.split(arrays[name], [min(rank, adapter.rank)], axis=axis)
        if rank > adapter.rank or mx.any(rest).item():
            raise ValueError(f"'rank' of {path!r} in {what} cannot be {rank}: see {name}")
    if scale != adapter.scale:
        own_dtype = _DTYPES[dtype] if dtype else arrays["lora_b"].dtype
        arrays["lora_b"] = _scaled(arrays["lora_b"], adapter.scale, scale, own_dtype)
    mx.eval(arrays)
    return adapter._replace(arrays=arrays, rank=rank, scale=scale)


def _fold(lora_b: mx.array, scale: float, common: float) -> mx.array:
    """Put a scale into ``lora_b``, in its own dtype if it can be taken out again exactly."""
    if scale == common:
        return lora_b
    for dtype in (lora_b.dtype, mx.float32):
        array = _scaled(lora_b, scale, common, dtype)
        if mx.array_equal(_scaled(array, common, scale, lora_b.dtype), lora_b):
            break
    return array


def _scaled(array: mx.array, factor: float, divisor: float, dtype: mx.Dtype) -> mx.array:
    with mx.stream(mx.cpu):  # the one device that has float64
        return (array.astype(mx.float64) * factor / divisor).astype(dtype)


def _pad(array: mx.array, axis: int, rank: int) -> mx.array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, rank - array.shape[axis])
    return mx.pad(array, widths)
