"""What an import of the package brings, and what it says where mlx-lm is missing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_modswap

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
