"""The example of a vision-language model runs, and prints what mlx-vlm makes of its folders."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

pytestmark = pytest.mark.usefixtures("on_the_cpu")

AFTER_THE_REPORT = """
mlx-vlm loads it: 30 layers are quantized
the vision tower is the same: True
mlx-lm loads the part language_model, without the tower

LoRA on the language part: loss {before:.2f} -> {after:.2f}
mlx-vlm loads the adapters: equal outputs: True
so does adapter_rules: True
"""


def test_a_tiny_model_is_quantized_and_adapted_for_mlx_vlm(tmp_path, monkeypatch, capsys):
    vision: Any = importlib.import_module("vision")
    losses: list[tuple[float, float]] = []

    def noting(model: Any) -> tuple[float, float]:
        losses.append(train(model))
        return losses[0]

    train = vision.train
    monkeypatch.setattr(vision, "train", noting)
    vision.main(["--folder", str(tmp_path / "tiny-vlm")])

    before, after = losses[0]
    assert capsys.readouterr().out.endswith(AFTER_THE_REPORT.format(before=before, after=after))
    assert after < before - 1
    assert {path.name for path in (tmp_path / "tiny-vlm").iterdir()} == {
        *("adapter", "mixed", "model")
    }
