#!/bin/sh
# mlx-vlm 0.7.10: a folder of falcon_ocr that mlx-vlm has written gives another model when it is loaded.
#
# Source: mlx_vlm/models/falcon_ocr/falcon_ocr.py, Model.sanitize. On the hub the rows of w1 and w3 alternate
# in w13, and sanitize takes them apart: concatenate([v[0::2], v[1::2]]). It does so on every load, and
# load_model (mlx_vlm/utils.py) calls sanitize for folders with the metadata {"format": "mlx"} too. So
# save_weights, which mlx_vlm.convert uses, and load_model give gate and up projections with permuted rows,
# without any error. falcon_perception has the same line.
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
from mlx.utils import tree_flatten
from mlx_vlm import utils
from mlx_vlm.models import falcon_ocr

print("mlx", version("mlx"), "mlx-vlm", version("mlx-vlm"))
mx.set_default_device(mx.cpu)
CONFIG = {"model_type": "falcon_ocr", "dim": 64, "n_layers": 1, "n_heads": 4, "head_dim": 16,
          "n_kv_heads": 2, "vocab_size": 128, "ffn_dim": 128, "max_seq_len": 512}  # fmt: skip
mx.random.seed(0)
model = falcon_ocr.Model(falcon_ocr.ModelConfig.from_dict(dict(CONFIG)))

folder = Path(sys.argv[1])
utils.save_weights(folder, model)
(folder / "config.json").write_text(json.dumps(CONFIG))
loaded = utils.load_model(folder)

before, after = dict(tree_flatten(model.parameters())), dict(tree_flatten(loaded.parameters()))
changed = [name for name in before if not mx.array_equal(before[name], after[name])]
print("changed by save_weights and load_model:", changed)
name = "language_model.model.layers.0.mlp.w13.weight"
rows = mx.concatenate([before[name][0::2], before[name][1::2]])
print("the rows are permuted:", mx.array_equal(after[name], rows).item())
tokens = mx.array([[1, 2, 3, 4]])
same = mx.allclose(model(tokens).logits, loaded(tokens).logits).item()
print("the logits are the same:", same)
sys.exit(0 if changed == [name] and mx.array_equal(after[name], rows) and not same else 1)
PYTHON
"$folder/venv/bin/python" "$folder/finding.py" "$folder/model"
# Output:
#   mlx 0.32.4 mlx-vlm 0.7.10
#   changed by save_weights and load_model: ['language_model.model.layers.0.mlp.w13.weight']
#   the rows are permuted: True
#   the logits are the same: False
