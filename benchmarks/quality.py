"""The quality of mlx-lm's recipes, and of the rules that examples/mixed_precision.py chooses, at
the same size. Needs a GPU, mlx-lm, and the folder that examples/smollm2.py makes:

python -m benchmarks.quality smollm2                         # all recipes, about half an hour
python -m benchmarks.quality smollm2 mixed_3_4 dynamic_quant # these recipes
"""

from __future__ import annotations

import importlib
import platform
import sys
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from math import exp
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx_lm.convert import mixed_quant_predicate_builder
from mlx_lm.quant.dynamic_quant import estimate_sensitivities, estimate_threshold

from .tables import Row, markdown

sys.path.append(str(Path(__file__).parent.parent / "examples"))
mixed: Any = importlib.import_module("mixed_precision")

TOKENS = 24_576  # of each half of the text
ROUNDS = 8
MIXED = ("mixed_3_4", "mixed_3_6", "mixed_4_6")


def main(folder: str, *names: str) -> None:
    model, tokenizer, *_ = mlx_lm.load(folder)
    first, second = mixed.halves(tokenizer, None, TOKENS)
    search = mixed.Search(model, first)
    judges = [mixed.Meter(model, half) for half in (second[::2], second[1::2])]
    print(f"Python {platform.python_version()}, MLX {version('mlx')}, mlx-lm {version('mlx-lm')},")
    print(f"{mx.device_info().get('device_name', 'CPU')}, {date.today()}; {second.size:,} tokens")
    rows: list[Row] = []
    for name, recipe in recipes(model, search, first[::4]):
        if names and name not in names:
            continue
        budget = search.size(recipe)
        chosen = search.choose(budget + 1, ROUNDS)
        row = {"recipe": name, "MB": f"{budget / 1e6:.1f}"}
        found: dict[str, list[float]] = {}
        for who, choice in (("recipe", recipe), ("chosen", chosen)):
            with search.put(choice):
                found[who] = [judge() for judge in judges]
                row[f"perplexity, {who}"] = f"{perplexity(model, second):.2f}"
        old, new = (sum(found[who]) / 2 for who in ("recipe", "chosen"))
        row |= {"KL, recipe": f"{old:.4f}", "KL, chosen": f"{new:.4f}"}
        row["less"] = f"**{1 - new / old:.0%}**"
        row["less, each half"] = ", ".join(f"{1 - b / a:.1%}" for a, b in zip(*found.values()))
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    print(markdown(rows))


def recipes(model: Any, search: Any, sequences: mx.array) -> Iterator[tuple[str, list[int]]]:
    """Each recipe, with the index in `SETTINGS` that it gives to each layer."""

    def setting(bits: int) -> int:
        return mixed.SETTINGS.index(mixed.Setting(bits, 64))

    for name in MIXED:
        predicate: Any = mixed_quant_predicate_builder(name, model)
        answers: list[Any] = [predicate(part.paths[0], part.layer) for part in search.parts]
        yield name, [setting(answer["bits"]) for answer in answers]
    for bits in (4, 5, 3):
        yield f"{bits} bits everywhere", [setting(bits)] * len(search.parts)
    # mlx-lm's dynamic_quant with its own defaults: 4 and 5 bits, 5 bits per weight in total
    gradients = dict(estimate_sensitivities(model, sequences, 4, 64, 5, 64, batch_size=2))
    threshold = estimate_threshold(model, gradients, 5.0, 4, 64, 5, 64)
    sensitive = [gradients[part.paths[0]] > threshold for part in search.parts]
    yield "dynamic_quant", [setting(5 if one else 4) for one in sensitive]


def perplexity(model: Any, sequences: mx.array) -> float:
    total = 0.0
    for sequence in sequences:
        logits = model(sequence[None, :-1]).astype(mx.float32)
        log_probs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        total -= float(mx.take_along_axis(log_probs, sequence[None, 1:, None], axis=-1).sum())
    return exp(total / (sequences.size - len(sequences)))


if __name__ == "__main__":
    main(*sys.argv[1:])
