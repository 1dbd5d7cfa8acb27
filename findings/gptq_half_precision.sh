#!/bin/sh
# mlx-lm 0.32.2: GPTQ ruins a bfloat16 layer, and a float16 layer becomes NaN; in float32 it is right.
#
# Source: mlx_lm/quant/gptq.py, Catcher.__call__. It adds xf.T @ xf to a float32 sum, but computes the
# product in the dtype of the model. In bfloat16 each entry of the product of a batch is rounded to 8
# bits. If the inputs have a strong direction in common, as those of language models do, the rounding
# errors exceed the small eigenvalues and the damping (1e-2 of the mean of the diagonal). So the sum is
# not positive definite, and compute_inverse_hessian returns nonsense without an error. In float16 the
# product overflows if the inputs are larger. Inputs cast to float32 before the product would cure both.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
cat > "$folder/show.py" <<'PYTHON'
import math
import sys
from importlib.metadata import version

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.quant.gptq import gptq_quantize

mx.set_default_device(mx.cpu)
print(f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}")


def build(dtype):
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(256, 64, bias=False))
    model.set_dtype(dtype)
    return model


def inputs(size):
    """Sequences whose tokens share a direction, with a tenth of noise."""
    mx.random.seed(1)
    direction = mx.random.normal((256,))
    x = direction * mx.random.normal((72, 64, 1)) + 0.1 * mx.random.normal((72, 64, 256))
    return size * x[:64], size * x[64:]


def error(model, original, x):
    wanted = original(x).astype(mx.float32)
    change = model(x).astype(mx.float32) - wanted
    return (change.square().mean() / wanted.square().mean()).item()


errors = {}
for size in (1, 8):
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        train, test = (x.astype(dtype) for x in inputs(size))
        model, rounded, original = build(dtype), build(dtype), build(dtype)
        nn.quantize(rounded, group_size=64, bits=4)
        gptq_quantize(model, train, 4, 64, 4, 64)
        found, plain = error(model, original, test), error(rounded, original, test)
        print(f"inputs x {size}, {dtype}, error of the outputs: GPTQ {found:.5f}, plain rounding {plain:.5f}")
        errors[size, dtype] = found, plain

as_seen = (
    all(errors[size, mx.float32][0] < errors[size, mx.float32][1] / 10 for size in (1, 8))
    and all(errors[size, mx.bfloat16][0] > 100 * errors[size, mx.bfloat16][1] for size in (1, 8))
    and math.isnan(errors[8, mx.float16][0])
)
print("as it was" if as_seen else "this has changed")
sys.exit(not as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/show.py" 2> "$folder/progress" || { code=$?; tail -3 "$folder/progress"; exit $code; }
# Output:
#   mlx 0.32.4, mlx-lm 0.32.2
#   inputs x 1, mlx.core.float32, error of the outputs: GPTQ 0.00006, plain rounding 0.00377
#   inputs x 1, mlx.core.bfloat16, error of the outputs: GPTQ 8.70071, plain rounding 0.00397
#   inputs x 1, mlx.core.float16, error of the outputs: GPTQ 0.00007, plain rounding 0.00366
#   inputs x 8, mlx.core.float32, error of the outputs: GPTQ 0.00006, plain rounding 0.00377
#   inputs x 8, mlx.core.bfloat16, error of the outputs: GPTQ 3.23408, plain rounding 0.00397
#   inputs x 8, mlx.core.float16, error of the outputs: GPTQ nan, plain rounding 0.00366
#   as it was
