"""What ``lm.save`` compares besides layers and parameters: attributes, constants, arguments."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import model_folders
import pytest
from mlx_lm.models.rope_utils import initialize_rope
from model_folders import load, refusal

from mlx_modswap import lm, replace_layers

pytestmark = pytest.mark.usefixtures("on_the_cpu")

SCALED = """
import mlx.core as mx
from mlx_lm.models import llama
from mlx_lm.models.llama import ModelArgs
from mlx_modswap import Wrapper, replace_layers

class Scaled(Wrapper):
    def __init__(self, layer, by=2.0, vector=1.0):
        super().__init__(layer)
        self.by = by
        self._vector = mx.full((64,), vector)

    def __call__(self, x):
        return self.by * self._vector * super().__call__(x)

class Negated(Wrapper):
    def __call__(self, x):
        return -super().__call__(x)

RULES = {"model.layers[-2:].mlp.down_proj": lambda path, layer: Scaled(layer)}

class Model(llama.Model):
    def __init__(self, args):
        super().__init__(args)
        replace_layers(self, RULES)
"""


OTHER_VALUE = (
    "mlx-lm would set {name} of model.layers[2:4].mlp.down_proj to {one}, but the model has "
    "{other}: set it "
    "in the model, or pass the config entry that sets it: config={{...}}"
)
OTHER_LAYER = (
    "mlx-lm would build Scaled(Linear) at model.layers[2:4].mlp.down_proj, but the model has "
    "{other}: fuse "
    "or unwrap it, or pass a model_file"
)


@pytest.mark.parametrize(
    ("wrap", "told"),
    [
        ("Scaled(layer, 5.0)", OTHER_VALUE.format(name="by", one="2.0", other="5.0")),
        (
            "Scaled(layer, vector=5.0)",
            "mlx-lm would give _vector of model.layers[2:4].mlp.down_proj other values than "
            "the model "
            "has: set them in the model, or pass the config entry that sets them: config={...}",
        ),
        ("Scaled(Scaled(layer))", OTHER_LAYER.format(other="Scaled(Scaled(Linear))")),
        ("Scaled(Negated(layer))", OTHER_LAYER.format(other="Scaled(Negated(Linear))")),
    ],
)
def test_wrappers_with_other_attributes_or_around_other_layers_are_refused(
    tmp_path, source, wrap, told
):
    (tmp_path / "scaled.py").write_text(SCALED)
    exec(SCALED, names := {"__name__": "scaled"})
    model = load(source)
    wrapper = eval(f"lambda path, layer: {wrap}", names)
    replace_layers(model, "model.layers[-2:].mlp.down_proj", wrapper)
    model_file = {"model_file": str(tmp_path / "scaled.py")}
    how: dict[str, Any] = {"config": model_file, "trust_remote_code": True}

    assert refusal(model, tmp_path / "saved", source, **how) == told


def test_attributes_of_a_wrapper_under_a_wrapper_are_compared(tmp_path, source):
    thrice = SCALED.replace("Scaled(layer)}", "Scaled(Scaled(Scaled(layer)))}")
    (source / "scaled.py").write_text(thrice)
    how: dict[str, Any] = {"config": {"model_file": "scaled.py"}, "trust_remote_code": True}
    exec(thrice, names := {"__name__": "scaled"})
    model = load(source)
    replace_layers(model, names["RULES"])
    lm.save(model, tmp_path / "equal", source, **how)

    model.layers[-1].mlp.down_proj.__wrapped__.__wrapped__.by = 5.0

    assert refusal(model, tmp_path / "saved", source, **how) == (
        "mlx-lm would set __wrapped__.__wrapped__.by of model.layers.3.mlp.down_proj to 2.0, "
        "but the model has 5.0: set it in the model, or pass the config entry that sets it: "
        "config={...}"
    )


def test_ropes_with_other_frequencies_are_refused(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}
    source = model_folders.llama_folder(tmp_path / "source", rope_scaling=scaling)
    model = load(source)
    lm.save(model, tmp_path / "equal", source)
    for layer in model.layers[1:]:
        layer.self_attn.rope = initialize_rope(16, 10000, False, {**scaling, "factor": 32.0})

    assert refusal(model, tmp_path / "saved", source) == (
        "mlx-lm would give _freqs of model.layers[1:4].self_attn.rope other values than the "
        "model has: "
        "set them in the model, or pass the config entry that sets them: config={...}"
    )


def test_a_config_of_which_the_model_computes_with_the_old_value_is_refused(tmp_path):
    """The calls of minicpm read ``args.scale_emb``."""
    source = model_folders.zoo_folder(tmp_path / "source", "minicpm")
    model = load(source)
    lm.quantize(model, {"**": 4})

    assert refusal(model, tmp_path / "saved", source, config={"scale_emb": 40}) == (
        "mlx-lm would set args.scale_emb of the model itself, model, model.layers[0:4], "
        "model.layers[0:4].self_attn to 40, but the model has 2: set it in the model, or pass "
        "the config entry that sets it: config={...}"
    )
    model.args.scale_emb = 40
    lm.save(model, tmp_path / "saved", source, config={"scale_emb": 40})


def test_a_model_that_does_not_use_its_new_head_is_refused(tmp_path):
    source = model_folders.llama_folder(tmp_path / "source", tie_word_embeddings=True)
    model, config = load(source), {"tie_word_embeddings": False}
    model.lm_head = nn.Linear(64, 100, bias=False)

    assert refusal(model, tmp_path / "saved", source, config=config) == (
        "mlx-lm would set args.tie_word_embeddings of the model itself, model, "
        "model.layers[0:4] to "
        "False, but the model has True: set it in the model, or pass the config entry that "
        "sets it: config={...}"
    )
    model.args.tie_word_embeddings = False
    lm.save(model, tmp_path / "saved", source, config=config)
    tokens = mx.array([[3, 5]])
    assert mx.array_equal(load(tmp_path / "saved")(tokens), model(tokens))


SCALING = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}


def with_an_object(model: Any) -> None:
    model.note = Decimal(1)


def with_a_dict(model: Any) -> None:
    model.note = {"a": (1, "b"), 2: [2.5, None]}


def with_fewer_frequencies(model: Any) -> None:
    model.layers[0].self_attn.rope._freqs = mx.zeros((4,), mx.float16)


def without_a_scale(model: Any) -> None:
    del model.layers[0].self_attn.scale


def with_another_factor(model: Any) -> None:
    model.args.rope_scaling = {**SCALING, "factor": 4.0}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            with_an_object,
            "mlx-lm would set note of the model itself to nothing, but the model has Decimal",
        ),
        (
            with_a_dict,
            "mlx-lm would set note of the model itself to nothing, but the model has "
            "{'a': (1, 'b'), 2: (2.5, None)}",
        ),
        (
            with_fewer_frequencies,
            "mlx-lm would set _freqs of model.layers.0.self_attn.rope to float32 (8,), but the "
            "model has "
            "float16 (4,)",
        ),
        (
            without_a_scale,
            "mlx-lm would set scale of model.layers.0.self_attn to 0.25, but the model has nothing",
        ),
        (
            with_another_factor,
            "mlx-lm would set args.rope_scaling of the model itself, model, model.layers[0:4] to "
            "...8.0, 'original_max_position_embeddings': 16, 'rope_type': 'l..., but the model has "
            "...4.0, 'original_max_position_embeddings': 16, 'rope_type': 'l...",
        ),
    ],
)
def test_attributes_of_any_kind_are_compared(tmp_path, change, told):
    source = model_folders.llama_folder(tmp_path / "source", rope_scaling=SCALING)
    model = load(source)
    change(model)

    cure = "set it in the model, or pass the config entry that sets it: config={...}"
    assert refusal(model, tmp_path / "saved", source) == f"{told}: {cure}"
