#!/bin/sh
# mlx-vlm 0.7.10: load_model builds phi4_siglip, molmo_point, jina_vlm and nemotron_parse with default sizes.
#
# Source: mlx_vlm/utils.py, load_model. It puts empty dicts for a "text_config" or "vision_config" that
# config.json does not have, lets ModelConfig.from_dict of the architecture read the config, and then calls
# update_module_configs, which replaces what from_dict has found by TextConfig.from_dict(config["text_config"])
# and VisionConfig.from_dict(config["vision_config"]). These four architectures have the sizes elsewhere, where
# their from_dict reads them: phi4_siglip at the top level, molmo_point in "vit_config", nemotron_parse in
# "encoder", jina_vlm with other names ("n_layers"). So update_module_configs goes back to the defaults.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "mlx[cpu]==0.32.4" "mlx-vlm==0.7.10"
cat > "$folder/finding.py" <<'PYTHON'
import copy
import sys
from importlib.metadata import version

from mlx_vlm import utils

print("mlx", version("mlx"), "mlx-vlm", version("mlx-vlm"))
CONFIGS = {
    "phi4_siglip": ("text_config", "num_hidden_layers", {"model_type": "phi4-siglip", "num_hidden_layers": 2}),
    "molmo_point": ("vision_config", "num_hidden_layers", {
        "model_type": "molmo_point", "text_config": {"num_hidden_layers": 2}, "adapter_config": {},
        "vit_config": {"num_hidden_layers": 2}}),
    "jina_vlm": ("text_config", "num_hidden_layers", {
        "model_type": "jvlm", "text_config": {"n_layers": 2}, "vision_config": {"n_layers": 2}}),
    "nemotron_parse": ("vision_config", "num_layers", {
        "model_type": "nemotron_parse", "encoder": {"num_layers": 2}, "decoder": {"decoder_layers": 2}}),
}  # fmt: skip

found = {}
for name, (part, key, config) in CONFIGS.items():
    # As in load_model: no model is built, since it would have the full size.
    config = copy.deepcopy(config)
    package, _ = utils.get_model_and_args(config)
    config.setdefault("text_config", config.pop("llm_config", {}))
    config.setdefault("vision_config", {})
    config.setdefault("audio_config", {})
    settings = package.ModelConfig.from_dict(config)
    before = getattr(settings, part)
    before = before[key] if isinstance(before, dict) else getattr(before, key)
    utils.update_module_configs(settings, package, config, ["text", "vision", "perceiver", "projector", "audio"])
    found[name] = before, getattr(getattr(settings, part), key)
    print(f"{name}: config.json says 2 layers, from_dict {before}, update_module_configs {found[name][1]}")
expected = {"phi4_siglip": (2, 40), "molmo_point": (2, 27), "jina_vlm": (2, 28), "nemotron_parse": (2, 32)}
sys.exit(0 if found == expected else 1)
PYTHON
"$folder/venv/bin/python" "$folder/finding.py"
# Output:
#   mlx 0.32.4 mlx-vlm 0.7.10
#   phi4_siglip: config.json says 2 layers, from_dict 2, update_module_configs 40
#   molmo_point: config.json says 2 layers, from_dict 2, update_module_configs 27
#   jina_vlm: config.json says 2 layers, from_dict 2, update_module_configs 28
#   nemotron_parse: config.json says 2 layers, from_dict 2, update_module_configs 32
