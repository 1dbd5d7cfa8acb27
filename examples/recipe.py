"""Save a swapped model together with the recipe of its swap, and build it again from the file.

Weights alone do not say that a layer was quantized or has an adapter. A recipe does: it is a list
of rules, each with a pattern, the name of a factory, and arguments for the factory. The recipe is
JSON, and is stored in the metadata of the file that holds the weights::

    python examples/recipe.py
    python examples/recipe.py --recipe FILE.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_modswap import Replacement, replace_layers

Rule = dict[str, Any]

# The first rule that matches a layer decides, as always.
RECIPE: list[Rule] = [
    {"pattern": "layers[-1].**", "factory": "keep"},
    {"pattern": "**.{query,value}_proj", "factory": "lora", "args": {"rank": 4}},
    {"pattern": "**.linear*", "factory": "quantize", "args": {"bits": 4, "group_size": 32}},
    {"pattern": "**", "factory": "quantize", "args": {"bits": 8}},
]


class LoRA(nn.Module):
    def __init__(self, layer: nn.Linear, rank: int):
        super().__init__()
        outputs, inputs = layer.weight.shape
        self.layer = layer
        self.a = mx.random.normal((inputs, rank), scale=inputs**-0.5)
        self.b = mx.random.normal((rank, outputs), scale=0.1)  # as if it had been trained

    def __call__(self, x: mx.array) -> mx.array:
        return self.layer(x) + x @ self.a @ self.b


def quantize(layer: nn.Linear, bits: int, group_size: int = 64) -> nn.Module:
    return layer.to_quantized(group_size=group_size, bits=bits)


# A recipe may name only these factories, so a file from elsewhere cannot call anything else.
FACTORIES: dict[str, Callable[..., nn.Module] | None] = {
    "keep": None,
    "lora": LoRA,
    "quantize": quantize,
}


def build() -> nn.Module:
    """Build the model, as it is before the swap."""
    return nn.TransformerEncoder(num_layers=4, dims=128, num_heads=4, mlp_dims=256)


def apply(recipe: list[Rule], model: nn.Module) -> Replacement:
    try:
        rules = {rule["pattern"]: factory_of(rule) for rule in recipe}
        return replace_layers(model, rules, where=nn.Linear)
    except (LookupError, TypeError, ValueError) as error:
        raise SystemExit(f"the recipe does not fit this model: {error}") from None


def factory_of(rule: Rule) -> Callable[[str, nn.Module], nn.Module] | None:
    name, args = rule["factory"], rule.get("args", {})
    if name not in FACTORIES:
        known = ", ".join(FACTORIES)
        raise SystemExit(f"the recipe names an unknown factory {name!r}; known are {known}")
    make = FACTORIES[name]
    return None if make is None else lambda path, layer: make(layer, **args)


def save(model: nn.Module, recipe: list[Rule], file: Path) -> None:
    arrays = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(file), arrays, {"recipe": json.dumps(recipe)})


def load(file: Path) -> nn.Module:
    arrays, metadata = cast(Any, mx.load(str(file), return_metadata=True))
    model = build()
    apply(json.loads(metadata["recipe"]), model)  # before the weights, so that their names fit
    model.load_weights(list(arrays.items()))
    return model


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Save a swapped model with its recipe.")
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="a JSON list of rules")
    args = parser.parse_args(argv)
    recipe = json.loads(args.recipe.read_text()) if args.recipe else RECIPE

    mx.random.seed(0)
    x, mask = mx.random.normal((1, 8, 128)), None
    model = build()
    print(apply(recipe, model))
    before = model(x, mask)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.safetensors")
        save(model, recipe, file)
        after = load(file)(x, mask)
        print()
        print(f"saved     {file.stat().st_size / 1e3:.1f} KB, with a recipe of {len(recipe)} rules")
    print(f"rebuilt   the outputs are {'equal' if mx.array_equal(before, after) else 'different'}")


if __name__ == "__main__":
    main()
