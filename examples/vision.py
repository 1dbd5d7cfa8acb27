"""Quantize the language part of a vision-language model, keep its vision tower, and adapt it.

::

    python examples/vision.py                     # in a folder for temporary files
    python examples/vision.py --folder tiny-vlm   # keep the folders

The model is a Qwen2-VL with random weights, so small that all of this takes seconds and nothing is
downloaded. mlx-vlm loads the folder and the adapters, and neither needs this library.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from mlx_modswap import replace_layers, select, tree

try:
    import mlx_lm
    from mlx_lm.tuner.lora import LoRALinear
    from mlx_vlm import utils
    from mlx_vlm.trainer.peft.utils import apply_lora_layers

    from mlx_modswap import lm
except ImportError as error:
    sys.exit(f"mlx-vlm or mlx-lm is not installed: pip install 'mlx-modswap[vlm]' ({error})")

CONFIG = {
    "model_type": "qwen2_vl",
    "image_token_id": 250,
    "video_token_id": 251,
    "vision_start_token_id": 252,
    "vision_end_token_id": 253,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 512,
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
    "tie_word_embeddings": False,
    "vision_config": {
        "model_type": "qwen2_vl",
        "depth": 2,
        "embed_dim": 64,
        "hidden_size": 128,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
    },
}
# The first rule that matches a layer decides. The last one does what `mlx_vlm.convert` does, which
# leaves the vision tower alone.
RULES = {"**.{embed_tokens,lm_head}": 8, "**.{v,down}_proj": 6, "**": 4}
ADAPTED = "language_model.**.{q,v}_proj"
CAPTION = [7, 77, 177, 17, 71, 117]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Quantize and adapt a tiny vision model.")
    parser.add_argument("--folder", type=Path, help="must not exist yet; default: a temporary one")
    args = parser.parse_args(argv)
    if args.folder is not None and args.folder.exists():
        sys.exit(f"{args.folder} exists: remove it, or give another --folder")
    with TemporaryDirectory() if args.folder is None else nullcontext(args.folder) as folder:
        show(Path(folder))


def show(root: Path) -> None:
    source, mixed, adapter = make(root / "model"), root / "mixed", root / "adapter"

    print(tree(utils.load_model(source, lazy=True)))
    print("\nQuantize, from folder to folder:")
    print(lm.convert(source, mixed, RULES, loader="mlx-vlm"))

    model = utils.load_model(mixed)
    print(f"\nmlx-vlm loads it: {quantized(model)} layers are quantized")
    print(f"the vision tower is the same: {towers_are_equal(utils.load_model(source), model)}")
    language, _ = mlx_lm.utils.load_model(mixed)
    print(f"mlx-lm loads the part {', '.join(language.children())}, without the tower")

    before, after = train(model)
    print(f"\nLoRA on the language part: loss {before:.2f} -> {after:.2f}")
    lm.save_adapters(model, adapter)
    again = apply_lora_layers(utils.load_model(mixed), adapter)
    again.eval()
    same = mx.array_equal(logits(model), logits(again)).item()
    print(f"mlx-vlm loads the adapters: equal outputs: {same}")
    fresh = utils.load_model(mixed)
    replace_layers(fresh.freeze(), lm.adapter_rules(adapter))
    print(f"so does adapter_rules: {mx.array_equal(logits(model), logits(fresh)).item()}")


def make(folder: Path, dtype: mx.Dtype = mx.float32) -> Path:
    """Write a model with random weights, as mlx-vlm reads it."""
    folder.mkdir(parents=True)
    config = json.loads(json.dumps(CONFIG))  # a copy, since mlx-vlm changes what it is given
    package, _ = utils.get_model_and_args(config)
    settings = package.ModelConfig.from_dict(config)
    settings = utils.update_module_configs(settings, package, config, ["text", "vision"])
    mx.random.seed(0)
    model = package.Model(settings)
    model.set_dtype(dtype)
    arrays: Any = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    return folder


def quantized(model: nn.Module) -> int:
    return len(select(model, "**", where=lambda path, layer: "scales" in layer))


def towers_are_equal(one: Any, other: Any) -> bool:
    arrays: Any = tree_flatten(one.vision_tower.parameters())
    others: Any = dict(tree_flatten(other.vision_tower.parameters()))
    return all(mx.array_equal(array, others[name]).item() for name, array in arrays)


def inputs() -> dict[str, Any]:
    """An image of 4 x 4 patches, which takes the place of four tokens, and its caption."""
    rows, columns, merged = 4, 4, 2
    mx.random.seed(1)
    image = [252, *[250] * (rows * columns // merged**2), 253]
    return {
        "input_ids": mx.array([image + CAPTION]),
        "pixel_values": mx.random.normal((rows * columns, 3 * 2 * 14 * 14)),
        "mask": None,
        "image_grid_thw": mx.array([[1, rows, columns]]),
    }


def logits(model: Any) -> mx.array:
    return model(**inputs()).logits


def train(model: Any, steps: int = 30) -> tuple[float, float]:
    """Train adapters to predict the caption; return the loss before and after."""
    model.freeze()  # adapters that are put in afterwards are trainable
    mx.random.seed(2)
    replace_layers(model, ADAPTED, lambda path, layer: LoRALinear.from_base(layer, r=8))
    wanted = mx.array([CAPTION])

    def loss(model: Any) -> mx.array:
        return nn.losses.cross_entropy(
            logits(model)[:, -len(CAPTION) - 1 : -1], wanted, reduction="mean"
        )

    optimizer = optim.Adam(learning_rate=1e-2)
    step = nn.value_and_grad(model, loss)
    losses: list[float] = []
    for _ in range(steps):
        value, gradients = step(model)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(value.item())
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
