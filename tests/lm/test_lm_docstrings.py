"""The docstrings of ``mlx_modswap.lm``: their examples run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import mlx.core as mx
import model_folders
import pytest

from mlx_modswap import lm


def docstrings() -> list[doctest.DocTest]:
    names = [module.name for module in pkgutil.walk_packages(lm.__path__, f"{lm.__name__}.")]
    modules = list(map(importlib.import_module, names))
    found = [examples for module in modules for examples in doctest.DocTestFinder().find(module)]
    return [examples for examples in found if examples.examples]


@pytest.mark.parametrize("examples", docstrings(), ids=lambda examples: examples.name)
def test_the_examples_in_a_docstring_print_what_they_say(examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model_folders.add_tokenizer(model_folders.llama_folder(tmp_path / "my_model"))
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    with mx.stream(mx.cpu):
        runner.run(examples, out=report.append)
    assert "".join(report) == ""


def test_every_public_name_has_a_docstring_with_an_example():
    for name in lm.__all__:
        assert "Example:" in (getattr(lm, name).__doc__ or ""), name
