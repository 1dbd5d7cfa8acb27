"""What the tests of `mlx_modswap.lm` share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of a tiny llama."""
    import model_folders  # it needs mlx-lm

    return model_folders.llama_folder(tmp_path / "source")
