"""The package ``mlx_modswap.lm``: what it brings, and what the core does not bring."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import pkgutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_modswap

HAS_MLX_LM = importlib.util.find_spec("mlx_lm") is not None
needs_mlx_lm = pytest.mark.skipif(not HAS_MLX_LM, reason="mlx-lm is not installed")


NEEDS = "mlx_modswap.lm needs mlx-lm 0.32.1 or newer: pip install 'mlx-modswap[lm]'"


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_package_alone_never_imports_mlx_lm():
    names = run("import sys, mlx_modswap; print(*sys.modules)").split()

    assert "mlx_modswap" in names
    assert not [name for name in names if name.partition(".")[0] in ("mlx_lm", "transformers")]
    assert "mlx_modswap.lm" not in names


def test_lm_says_what_to_install_where_mlx_lm_is_missing():
    told = run(
        "import sys; sys.modules['mlx_lm'] = None\n"
        "try: from mlx_modswap import lm\n"
        "except ImportError as error: print(error)"
    )
    assert told == f"{NEEDS} (import of mlx_lm halted; None in sys.modules)\n"


# What an install of other versions gives, in the fewest lines.
@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("__version__ = '0.31.3'", f"{NEEDS} (0.31.3 is installed)"),
        ("__version__ = '0.9.0'", f"{NEEDS} (0.9.0 is installed)"),
        ("__version__ = '0.32.0'", f"{NEEDS} (0.32.0 is installed)"),
        (
            "import mlx.core as mx; mx.no_such_name",
            "mlx-lm needs a newer MLX: pip install -U mlx (module 'mlx.core' has no attribute "
            "'no_such_name')",
        ),
    ],
)
def test_lm_says_which_version_is_too_old(tmp_path, code, told):
    (tmp_path / "mlx_lm.py").write_text(code)
    assert told + "\n" == run(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "try: from mlx_modswap import lm\n"
        "except ImportError as error: print(error)"
    )


def test_what_is_used_of_mlx_lm_is_public():
    """What begins with ``_`` may go away in any release of mlx-lm."""
    assert mlx_modswap.__file__
    private = []
    for file in (Path(mlx_modswap.__file__).parent / "lm").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlx_lm"):
                private += [name.name for name in node.names if name.name.startswith("_")]
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                is_of_mlx_lm = node.value.id in ("mlx_lm", "utils")
                is_private = node.attr.startswith("_") and node.attr != "__version__"
                private += [node.attr] if is_of_mlx_lm and is_private else []
    assert private == []


def docstrings() -> list[doctest.DocTest]:
    if not HAS_MLX_LM:
        return []
    from mlx_modswap import lm

    names = [module.name for module in pkgutil.walk_packages(lm.__path__, f"{lm.__name__}.")]
    modules = list(map(importlib.import_module, names))
    found = [examples for module in modules for examples in doctest.DocTestFinder().find(module)]
    return [examples for examples in found if examples.examples]


@needs_mlx_lm
@pytest.mark.parametrize("examples", docstrings(), ids=lambda examples: examples.name)
def test_the_examples_in_a_docstring_print_what_they_say(examples, tmp_path, monkeypatch):
    import model_folders

    monkeypatch.chdir(tmp_path)
    model_folders.add_tokenizer(model_folders.llama_folder(tmp_path / "my_model"))
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    with mx.stream(mx.cpu):
        runner.run(examples, out=report.append)
    assert "".join(report) == ""


@needs_mlx_lm
def test_every_public_name_has_a_docstring_with_an_example():
    from mlx_modswap import lm

    for name in lm.__all__:
        assert "Example:" in (getattr(lm, name).__doc__ or ""), name
