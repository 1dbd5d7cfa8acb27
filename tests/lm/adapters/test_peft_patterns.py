"""Ranks and alphas by pattern: PEFT takes the first that was given, but its file is sorted.

Checked with PEFT 0.21.2, whose ``get_pattern_key`` takes the first pattern that matches, and whose
``save_pretrained`` writes ``adapter_config.json`` with sorted keys.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from adapting import frozen, message

from mlx_modswap import lm, replace_layers

pytestmark = pytest.mark.usefixtures("on_the_cpu")

Q0 = "model.layers.0.self_attn.q_proj"


def write(folder: Path, rank: int = 4, start: str = "base_model.model.", **entries: Any) -> Path:
    """Write an adapter of one layer as PEFT does."""
    pair = {"A": mx.random.normal((rank, 64)), "B": mx.random.normal((64, rank))}
    arrays = {f"{start}{Q0}.lora_{side}.weight": array for side, array in pair.items()}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), arrays)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **entries}
    (folder / "adapter_config.json").write_text(json.dumps(config, sort_keys=True))
    return folder


def read(folder: Path) -> Any:
    (new,) = replace_layers(frozen("llama"), lm.adapter_rules(folder)).values()
    return new


def test_two_alphas_for_one_layer_are_one_clear_error(tmp_path):
    write(tmp_path, alpha_pattern={"q_proj": 16, "0.self_attn.q_proj": 32, "v_proj": 2})

    assert message(lambda: lm.adapter_rules(tmp_path), tmp_path) == (
        "ValueError: 'alpha_pattern' in 'math/adapter_config.json' has '0.self_attn.q_proj': 32 "
        f"and 'q_proj': 16, which both match '{Q0}'; PEFT used the one that was given first, but "
        "sorts the patterns when it writes the file; remove the one that it did not use"
    )


@pytest.mark.parametrize(
    ("alphas", "scale"),
    [
        ({"q_proj": 16, "0.self_attn.q_proj": 16}, 4.0),
        ({"q_proj": 16, "0.self_attn.q_proj": 16.0}, 4.0),
        ({"q_proj": 16, "1.self_attn.q_proj": 32}, 4.0),
        ({"v_proj": 16, "k_proj": 32}, 2.0),
    ],
)
def test_two_patterns_are_fine_if_they_say_the_same_or_match_different_layers(
    alphas, scale, tmp_path
):
    assert read(write(tmp_path, alpha_pattern=alphas)).scale == scale


@pytest.mark.parametrize("rank", [2, 8])
def test_the_arrays_tell_which_of_two_ranks_was_used(rank, tmp_path):
    new = read(write(tmp_path, rank, rank_pattern={"q_proj": 2, "0.self_attn.q_proj": 8}))

    assert (new.lora_a.shape, new.scale) == ((64, rank), 8 / rank)


def test_two_ranks_of_which_the_arrays_have_neither_are_one_clear_error(tmp_path):
    write(tmp_path, 4, rank_pattern={"q_proj": 2, "0.self_attn.q_proj": 8})

    assert message(lambda: lm.adapter_rules(tmp_path), tmp_path) == (
        "ValueError: 'rank_pattern' in 'math/adapter_config.json' has '0.self_attn.q_proj': 8 and "
        f"'q_proj': 2, which both match '{Q0}'; PEFT used the one that was given first, but sorts "
        "the patterns when it writes the file; remove the one that it did not use"
    )


def test_names_without_the_prefix_of_peft_are_one_clear_error(tmp_path):
    write(tmp_path, start="")

    assert message(lambda: lm.adapter_rules(tmp_path), tmp_path) == (
        f"ValueError: 'math/adapter_model.safetensors' has an array '{Q0}.lora_A.weight', whose "
        "name is PEFT's without the 'base_model.model.' at its start, which save_pretrained of "
        "PEFT writes; add it to the names of all arrays"
    )


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], r".*\.(q|down)_proj"])
def test_a_layer_whose_path_matches_a_parameter_as_well_is_a_layer(targets, tmp_path):
    write(tmp_path, target_modules=targets, target_parameters=["gate_up_proj", "down_proj"])

    assert list(lm.adapter_rules(tmp_path)) == [Q0]
