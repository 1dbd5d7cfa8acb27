"""Convert adapters of any ranks and scales to one rank and scale, which mlx-lm reads, and back.

A lower rank is padded with zeros, and the padding can be removed exactly. It stays
zero in training, because each side's gradient is a product with the other side.

A scale is folded into ``lora_b``, so that the product of both stays the same. It is
multiplied and divided in float64, so each direction rounds once. When the scale is
taken out again, ``lora_b`` is the same bit for bit if its scale is the most frequent
one or differs from it by a power of two, or if ``lora_b`` is float16 or bfloat16,
which is written as float32 if its own dtype would round. Otherwise ``lora_b`` differs
by at most one unit in the last place: in float32, several numbers times a scale may
round to the same product.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from ..._patterns.fold import folded
from .files import read_number, read_object, read_rank
from .kinds import A_RANK, Adapter, b_rank

Originals = dict[str, dict[str, Any]]  # the true rank and scale of each path

_DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16}  # these may be written as float32


def unify(adapters: Mapping[str, Adapter]) -> tuple[dict[str, Adapter], Originals]:
    """Give all adapters one rank and one scale, without changing what they compute.

    Returns:
        The adapters by path, and what :func:`restore` needs.

    Raises:
        ValueError: If some but not all scales are zero: ``lora_b`` could not be restored.
    """
    scales = Counter(adapter.scale for adapter in adapters.values())
    zeros = [path for path, adapter in adapters.items() if adapter.scale == 0]
    if zeros and len(scales) > 1:
        places = ", ".join(folded(zeros, numbers_are_indices=True))
        raise ValueError(
            f"the scale is 0 at {places}, and lora_b could not be restored from "
            "what mlx-lm reads; set another scale, or remove the adapters"
        )
    scale, _ = scales.most_common(1)[0]
    rank = max(adapter.rank for adapter in adapters.values())
    uniform: dict[str, Adapter] = {}
    originals: Originals = {}
    for path, adapter in adapters.items():
        arrays = dict(adapter.arrays)
        lora_b = _fold(arrays["lora_b"], adapter.scale, scale)
        originals[path] = {"rank": adapter.rank, "scale": adapter.scale}
        if lora_b.dtype != arrays["lora_b"].dtype:
            originals[path]["dtype"] = str(arrays["lora_b"].dtype).rpartition(".")[2]
        arrays["lora_a"] = _pad(arrays["lora_a"], A_RANK, rank)
        arrays["lora_b"] = _pad(lora_b, b_rank(lora_b), rank)
        uniform[path] = adapter._replace(arrays=arrays, rank=rank, scale=scale)
    return uniform, originals


def restore(adapters: Mapping[str, Adapter], originals: Any, what: str) -> dict[str, Adapter]:
    """Return all adapters with their own rank and scale.

    Args:
        adapters (Mapping): The adapters by path, all of one rank and scale.
        originals (Any): What a file has as the second result of :func:`unify`.
        what (str): The name of ``originals`` in a message.

    Raises:
        ValueError: If the two do not fit each other.
    """
    originals = read_object(originals, what)
    if unpaired := sorted(set(originals) ^ set(adapters)):
        raise ValueError(f"{what} and the arrays have different paths: {unpaired[0]!r}")
    return {
        path: _restored(adapter, originals[path], f"{path!r} under {what}")
        for path, adapter in adapters.items()
    }


def _restored(adapter: Adapter, original: Any, what: str) -> Adapter:
    original = read_object(original, what)
    rank = read_rank(original.get("rank"), f"'rank' of {what}")
    scale = read_number(original.get("scale"), f"'scale' of {what}")
    dtype: Any = original.get("dtype")
    if dtype not in (None, *_DTYPES):
        raise ValueError(f"'dtype' of {what} must be {' or '.join(map(repr, _DTYPES))}")
    if rank > adapter.rank:
        raise ValueError(f"'rank' of {what} is {rank}, but the arrays have the rank {adapter.rank}")
    if scale != adapter.scale and 0 in (scale, adapter.scale):
        raise ValueError(f"'scale' of {what} cannot be {scale} where others are {adapter.scale}")
    arrays = dict(adapter.arrays)
    for name, axis in (("lora_a", A_RANK), ("lora_b", b_rank(arrays["lora_b"]))):
        arrays[name], padding = mx.split(arrays[name], [rank], axis=axis)
        if mx.any(padding).item():
            raise ValueError(f"'rank' of {what} is {rank}, but {name} is not zero beyond it")
    if scale != adapter.scale:
        own = _DTYPES[dtype] if dtype else arrays["lora_b"].dtype
        exact = _multiplied(arrays["lora_b"], adapter.scale, scale)
        arrays["lora_b"] = exact.astype(own, stream=mx.cpu)
    return adapter._replace(arrays=arrays, rank=rank, scale=scale)


def _fold(lora_b: mx.array, scale: float, common: float) -> mx.array:
    """Fold a scale into ``lora_b``, in its own dtype if that does not round, else in float32."""
    if scale == common:
        return lora_b
    exact = _multiplied(lora_b, scale, common)
    with mx.stream(mx.cpu):
        own = exact.astype(lora_b.dtype)
        is_exact = mx.array_equal(own.astype(mx.float64), exact).item()
        return own if is_exact else exact.astype(mx.float32)


def _multiplied(array: mx.array, factor: float, divisor: float) -> mx.array:
    with mx.stream(mx.cpu):  # the only device with float64
        return array.astype(mx.float64) * factor / divisor


def _pad(array: mx.array, axis: int, rank: int) -> mx.array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, rank - array.shape[axis])
    return mx.pad(array, widths)
