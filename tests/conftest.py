"""How the tests run: how many random examples, and on which device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, settings

slow_is_fine = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
# While `CI` is set a profile inherits `derandomize=True`, so each of them says what it wants.
settings.register_profile("default", max_examples=50, derandomize=False, **slow_is_fine)
settings.register_profile("ci", max_examples=200, derandomize=True, **slow_is_fine)
settings.register_profile("nightly", max_examples=2000, derandomize=False, **slow_is_fine)
settings.register_profile(
    "mutants", max_examples=15, derandomize=True, database=None, **slow_is_fine
)
settings.load_profile("default")

if "DEVICE" in os.environ:
    mx.set_default_device(getattr(mx, os.environ["DEVICE"]))


@pytest.fixture(scope="session")
def nightly(request: pytest.FixtureRequest) -> bool:
    """Whether the tests may take their time."""
    return request.config.getoption("--hypothesis-profile") == "nightly"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, which itself cannot be reached."""
    from huggingface_hub import constants  # it comes with mlx-lm

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.fixture
def on_the_cpu() -> Iterator[None]:
    """Compute on the CPU, whatever `DEVICE` says, with the same random numbers each time.

    It is for tests of exact values: a GPU multiplies in TF32.
    """
    mx.random.seed(0)
    with mx.stream(mx.cpu):
        yield
