"""Find out which block of all-MiniLM-L6-v2 matters most: skip one block at a time.

::

    python examples/ablation.py
"""

from __future__ import annotations

from typing import Any

import minilm
import mlx.core as mx
from quantize_minilm import SENTENCES, nearest

from mlx_modswap import Wrapper, select, swapped

SAMPLE = SENTENCES[:12]


class Skip(Wrapper):
    """A block that returns its input, and ignores its other arguments: a mask, a cache."""

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return x


def main() -> None:
    model, tokenizer = minilm.load()

    def embed() -> mx.array:
        vectors = minilm.embed(model, tokenizer, SAMPLE)
        mx.eval(vectors)  # now, while the layers that compute them are in the model
        return vectors

    original = embed()
    similarity: dict[str, float] = {}
    print("without           cosine   neighbours kept")
    for path in select(model, "encoder.layer.*"):
        with swapped(model, path, lambda path, block: Skip(block)):
            vectors = embed()
        similarity[path] = float((original * vectors).sum(axis=-1).mean())
        kept = int((nearest(original) == nearest(vectors)).sum())
        print(f"{path}   {similarity[path]:.4f}   {kept} of {len(SAMPLE)}")

    equal = "equal" if mx.array_equal(original, embed()) else "different"
    print()
    print(f"matters most              {min(similarity, key=similarity.__getitem__)}")
    print(f"embeddings with all back  {equal}")


if __name__ == "__main__":
    main()
