"""What the tests of `mlx_modswap.lm` share."""

from __future__ import annotations

from pathlib import Path

import model_folders
import pytest


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of a tiny llama."""
    return model_folders.llama_folder(tmp_path / "source")
