"""Quantize all-MiniLM-L6-v2 by rules, and measure how much its embeddings change.

::

    python examples/quantize_minilm.py
    python examples/quantize_minilm.py --model DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

import minilm
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_modswap import NoMatchError, Replacement, replace_layers


def bits(n: int):
    return lambda path, layer: layer.to_quantized(group_size=64, bits=n)


# The first rule that matches a layer decides; None keeps the layer as it is.
RULES = {
    "encoder.layer[0].**": None,
    "encoder.layer[-1].**": None,
    "encoder.layer.*.attention.**": bits(8),
    "encoder.layer.*.{intermediate,output}.dense": bits(4),
    "embeddings.*": bits(8),
}


def quantize(model: nn.Module) -> Replacement:
    return replace_layers(model, RULES, where=(nn.Linear, nn.Embedding))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Quantize a sentence embedding model by rules.")
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="a folder with config.json, model.safetensors and tokenizer.json "
        "of a BERT (default: the installed all-MiniLM-L6-v2)",
    )
    args = parser.parse_args(argv)

    model, tokenizer = minilm.load(args.model)
    size = megabytes(model)
    original = minilm.embed(model, tokenizer, SENTENCES)
    mx.eval(original)  # now, since its graph would keep the old weights alive

    try:
        print(quantize(model))
    except (NoMatchError, ValueError) as error:  # such as only two blocks, or a width of 312
        raise SystemExit(f"the rules do not fit this model: {error}") from None

    quantized = minilm.embed(model, tokenizer, SENTENCES)
    cosine = (original * quantized).sum(axis=-1)
    same = (nearest(original) == nearest(quantized)).sum()
    print()
    print(f"size               {size:.1f} MB -> {megabytes(model):.1f} MB")
    print(f"cosine similarity  {cosine.mean().item():.4f} mean, {cosine.min().item():.4f} worst")
    print(f"nearest neighbour  the same for {same.item()} of {len(SENTENCES)} sentences")


def megabytes(model: nn.Module) -> float:
    arrays = dict(tree_flatten(model.parameters())).values()
    return sum(array.nbytes for array in arrays) / 1e6


def nearest(embeddings: mx.array) -> mx.array:
    """Return, for each sentence, the index of the other sentence that is most similar."""
    itself = 2 * mx.eye(len(embeddings))
    return mx.argmax(embeddings @ embeddings.T - itself, axis=-1)


SENTENCES = """\
The weather is lovely today.
It's so sunny outside!
Heavy rain is expected tomorrow.
Take an umbrella, the forecast says it will pour.
He drove to the stadium.
The football match was sold out.
The home team scored in the last minute.
Our goalkeeper was injured during the game.
Fry the onions in butter until they are golden.
Chop the garlic and add it to the pan.
Let the bread dough rise for two hours.
My grandmother bakes her own bread.
The program crashes when the file is empty.
There is a bug in the code that reads the file.
I forgot the password of my laptop.
Choose a login that nobody can guess.
The central bank raised interest rates.
Mortgages are becoming more expensive.
Shares fell sharply after the announcement.
Investors on the stock market are nervous.
The orchestra played a symphony by Mahler.
She has a ticket for the classical concert.
He is learning to play the piano.
I practise the guitar every evening.
My cat sleeps on the sofa all day.
The kitten is purring in its basket.
The dog barked at the postman.
Our puppy chases every bicycle.
Astronauts repaired the space station.
A rocket carried the satellite into orbit.
The telescope discovered a distant planet.
Astronomers have observed a new galaxy.
The doctor told her to rest for a week.
The nurse took care of the patient.
A vaccine protects most children from measles.
Wash your hands to avoid catching the flu.
""".splitlines()


if __name__ == "__main__":
    main()
