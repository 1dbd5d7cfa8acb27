#!/bin/sh
# mlx-vlm 0.7.10: after a forward pass of florence2 the folder that save_weights writes cannot be loaded.
#
# Source: mlx_vlm/models/florence2/language.py, Florence2LanguageModel: its call sets
# self.encoder.embed_tokens = self.shared, and the same for the decoder. So the first forward pass adds two names
# to model.parameters(), save_weights (mlx_vlm/utils.py) writes them, and load_weights of a new model refuses them.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "mlx[cpu]==0.32.4" "mlx-vlm==0.7.10"
cat > "$folder/finding.py" <<'PYTHON'
import copy
import json
import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_vlm import utils
from mlx_vlm.models import florence2

print("mlx", version("mlx"), "mlx-vlm", version("mlx-vlm"))
mx.set_default_device(mx.cpu)
CONFIG = {
    "model_type": "florence2", "vocab_size": 128,
    "text_config": {"d_model": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
                    "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "encoder_layers": 1,
                    "decoder_layers": 1, "vocab_size": 128, "max_position_embeddings": 64},
    "vision_config": {"depths": [1, 1], "dim_embed": [32, 64], "num_heads": [2, 4], "num_groups": [2, 4],
                      "window_size": 4, "patch_size": [7, 3], "patch_stride": [4, 2],
                      "patch_padding": [3, 1], "patch_prenorm": [False, True], "hidden_size": 64}}  # fmt: skip
config = copy.deepcopy(CONFIG)
settings = florence2.ModelConfig.from_dict(config)
utils.update_module_configs(settings, florence2, config, ["text", "vision"])
model = florence2.Model(settings)


def saved_and_loaded(folder: Path) -> str:
    utils.save_weights(folder, model)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    try:
        utils.load_model(folder)
    except ValueError as error:
        return f"ValueError: {error}"
    return "loaded"


names = set(dict(tree_flatten(model.parameters())))
before = saved_and_loaded(Path(sys.argv[1]) / "before")
print("before a forward pass:", before)
mx.eval(model(mx.array([[1, 2, 3]])).logits)
new = sorted(set(dict(tree_flatten(model.parameters()))) - names)
print("new parameters:", new)
after = saved_and_loaded(Path(sys.argv[1]) / "after")
print("after a forward pass:", after)
sys.exit(0 if before == "loaded" and len(new) == 2 and "2 parameters not in model" in after else 1)
PYTHON
"$folder/venv/bin/python" "$folder/finding.py" "$folder/model"
# Output:
#   mlx 0.32.4 mlx-vlm 0.7.10
#   before a forward pass: loaded
#   new parameters: ['language_model.model.decoder.embed_tokens.weight', 'language_model.model.encoder.embed_tokens.weight']
#   after a forward pass: ValueError: Received 2 parameters not in model:
#   language_model.model.decoder.embed_tokens.weight,
#   language_model.model.encoder.embed_tokens.weight.
