#!/bin/sh
# mlx-vlm 0.7.10: a folder of rt_detr_v2 that mlx-vlm has written cannot be loaded by mlx-vlm.
#
# Source: mlx_vlm/models/rt_detr_v2/rt_detr_v2.py, Model.sanitize, transposes each 4-D ".conv.weight" on every
# load. mlx_vlm/models/rt_detr_v2/convert.py says that the metadata {"format": "mlx"} "is what
# mlx_vlm.utils.load_model keys on to skip Model.sanitize", but load_model (mlx_vlm/utils.py) does not look at
# the metadata. So the convolutions are transposed once more, and load_model fails, for the folder of
# rt_detr_v2's own converter and for that of mlx_vlm.utils.save_weights, which mlx_vlm.convert uses.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "mlx[cpu]==0.32.4" "mlx-vlm==0.7.10"
cat > "$folder/finding.py" <<'PYTHON'
import json
import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
from mlx_vlm import utils
from mlx_vlm.models import rt_detr_v2

print("mlx", version("mlx"), "mlx-vlm", version("mlx-vlm"))
mx.set_default_device(mx.cpu)
CONFIG = {"model_type": "rt_detr_v2", "num_labels": 4, "d_model": 64, "encoder_hidden_dim": 64,
          "encoder_in_channels": [64, 64, 128], "encoder_ffn_dim": 128, "decoder_layers": 1,
          "decoder_ffn_dim": 128, "decoder_in_channels": [64, 64, 64], "num_queries": 10,
          "backbone_config": {"depths": [1, 1, 1, 1], "embedding_size": 32,
                              "hidden_sizes": [32, 64, 64, 128]}}  # fmt: skip
model = rt_detr_v2.Model(rt_detr_v2.ModelConfig.from_dict(dict(CONFIG)))

folder = Path(sys.argv[1])
utils.save_weights(folder, model)
(folder / "config.json").write_text(json.dumps(CONFIG))
print("metadata:", mx.load(str(folder / "model.safetensors"), return_metadata=True)[1])
try:
    utils.load_model(folder)
except ValueError as error:
    print("load_model: ValueError:", error)
    sys.exit(0 if "Expected shape (16, 3, 3, 16) but received shape (16, 3, 16, 3)" in str(error) else 1)
print("load_model: loaded")
sys.exit(1)
PYTHON
"$folder/venv/bin/python" "$folder/finding.py" "$folder/model"
# Output:
#   mlx 0.32.4 mlx-vlm 0.7.10
#   metadata: {'format': 'mlx'}
#   load_model: ValueError: Expected shape (16, 3, 3, 16) but received shape (16, 3, 16, 3) for parameter vision.backbone.embedder.embedder.1.conv.weight
