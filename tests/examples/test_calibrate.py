"""The calibration example: its sums are mlx-lm's own, and its errors those of real outputs."""

from __future__ import annotations

import importlib
import importlib.util
import io
import re
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama, mixtral
from mlx_lm.quant import gptq

calibrate: Any = importlib.import_module("calibrate")

SHAPE = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 100,
    "tie_word_embeddings": False,
}
EXPERTS = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {"llama": (llama, SHAPE), "mixtral": (mixtral, SHAPE | EXPERTS)}


def built(family: str, dtype: mx.Dtype = mx.float32) -> Any:
    module, config = FAMILIES[family]
    mx.random.seed(0)
    model: Any = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def of_mlx_lm(model: Any, data: mx.array, monkeypatch: pytest.MonkeyPatch) -> dict[str, mx.array]:
    """The sums that mlx-lm's GPTQ collects. It changes each in place when it uses it."""
    found: dict[int, mx.array] = {}

    class Catcher(gptq.Catcher):
        def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
            output = super().__call__(x, *args, **kwargs)
            found[id(self.module)] = self.H + 0  # a copy
            return output

    leaves: Any = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    monkeypatch.setattr(gptq, "Catcher", Catcher)
    gptq.gptq_quantize(model, data, 4, 64, 4, 64, batch_size=calibrate.BATCH)
    return {path: found[id(layer)] for path, layer in leaves if id(layer) in found}


# MLX computes experts on a CPU in float32 only.
@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", mx.float32), ("llama", mx.bfloat16), ("mixtral", mx.float32)],
)
def test_the_sums_are_those_of_mlx_lms_gptq_bit_for_bit(family, dtype, monkeypatch):
    data = mx.random.randint(0, 100, (3 * calibrate.BATCH - 1, 16), key=mx.random.key(1))
    model = built(family, dtype)
    batches = [data[at : at + calibrate.BATCH] for at in range(0, len(data), calibrate.BATCH)]
    moments = calibrate.collect(model, "**", batches)
    expected = of_mlx_lm(model, data, monkeypatch)

    assert moments.keys() == expected.keys()
    assert len(moments) == {"llama": 15, "mixtral": 17}[family]
    for path, moment in moments.items():
        assert moment.dtype == expected[path].dtype
        assert mx.array_equal(moment, expected[path]), path


def test_the_model_is_as_before_when_its_inputs_were_collected():
    model = built("llama")
    before = dict(model.named_modules())
    calibrate.collect(model, "model.layers[0].**", [mx.zeros((1, 4), mx.int32)])
    after = dict(model.named_modules())

    assert before.keys() == after.keys()
    assert all(after[path] is layer for path, layer in before.items())


def test_the_loss_is_the_error_of_the_outputs_on_the_inputs_that_the_layer_got():
    mx.random.seed(0)
    layer = nn.Linear(128, 32, bias=False)
    x = mx.random.normal((200, 128)) * mx.linspace(0.01, 10, 128)  # some inputs are much larger
    exact = x @ layer.weight.T
    rounded = nn.QuantizedLinear.from_linear(layer, group_size=64, bits=4)(x)
    change = mx.linalg.norm(rounded - exact) / mx.linalg.norm(exact)
    loss = calibrate.loss("layer", layer, x.T @ x, 4)

    assert loss.outputs == pytest.approx(change.item(), rel=1e-3)


def test_a_layer_whose_large_inputs_meet_exact_weights_loses_little():
    layer = nn.Linear(128, 8, bias=False)
    layer.weight[:, :64] = 1.0  # a group of equal numbers is exact
    x = mx.concatenate([mx.ones((10, 64)), mx.zeros((10, 64))], axis=1)
    loss = calibrate.loss("layer", layer, x.T @ x, 4)

    assert loss.outputs < 1e-6
    assert loss.weights > 1e-3


def test_an_empty_text_is_refused_in_one_line(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(SystemExit) as stop:
        calibrate.read(Characters(), tmp_path / "empty.txt", 100)

    assert stop.value.code == "the text is empty"


class Characters:
    """A tokenizer whose tokens are characters."""

    def encode(self, text: str) -> list[int]:
        return list(map(ord, text))


def test_a_text_is_cut_into_batches_of_sequences(tmp_path):
    (tmp_path / "text.txt").write_text("a" * 10_000)
    batches = calibrate.read(Characters(), tmp_path / "text.txt", 9_000)

    assert [batch.shape for batch in batches] == [(8, 512), (8, 512), (1, 512)]


@pytest.mark.usefixtures("beside_smollm2")
def test_smollm2_is_calibrated_and_the_worst_layers_come_first():
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        calibrate.main(["--blocks", "2", "--tokens", "32", "--top", "5"])
    rows = re.findall(r"(?m)^(model\.layers\.[01]\.\S+) +([\d.]+)% +([\d.]+)%$", out.getvalue())
    lost = [float(outputs) for _, _, outputs in rows]

    assert err.getvalue() == ""
    assert out.getvalue().startswith("second moments of the inputs of 14 layers: 34.8 MB\n")
    assert len(rows) == 5
    assert lost == sorted(lost, reverse=True)
    assert all(5 < float(weights) < 15 for _, weights, _ in rows)
