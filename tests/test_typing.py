"""Code of a user that is strictly checked gets the right types, and is told of a wrong call.

pyright and mypy run far from this folder, with the settings of docs/pitfalls.md, so that what they
see is the package that is installed, with its `py.typed`.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
PITFALLS = HERE.parent / "docs" / "pitfalls.md"

Found = dict[tuple[str, int], str]  # by file and line


def pyright(folder: Path) -> Found:
    report = output_of("pyright", "--pythonpath", sys.executable, "--outputjson", folder=folder)
    return {
        (Path(found["file"]).name, found["range"]["start"]["line"] + 1): found["message"]
        for found in json.loads(report)["generalDiagnostics"]
    }


def mypy(folder: Path) -> Found:
    report = output_of("mypy", "--output=json", "--cache-dir=cache", ".", folder=folder)
    found: list[Any] = [json.loads(line) for line in report.splitlines() if line.startswith("{")]
    return {(Path(one["file"]).name, one["line"]): one["message"] for one in found}


def output_of(module: str, *arguments: str, folder: Path) -> str:
    command = [sys.executable, "-m", module, *arguments]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode in (0, 1), run.stdout + run.stderr
    return run.stdout


WRONG = """\
select(model)
select(model, 1)
select(model, re.compile(b"a"))
select([model], "a")
select(model, "a", nn.Linear)
select(model, "a", where="Linear")
select(model, "a", where=lambda module: True)
select(model, "a", exclude=None)
replace_layers(model, "a")
replace_layers(model, "a", nn.Identity())
replace_layers(model, "a", lambda layer: layer)
replace_layers(model, "a", lambda path, layer: None)
replace_layers(model, "a", lambda path, layer: nn.Linear)
replace_layers(model, "a", factory, nn.Linear)
replace_layers(model, {"a": 3})
replace_layers(model, {1: factory})
replace_layers(model, {("a", 1): factory})
replace_layers(model, {("a", "b"): nn.Linear(4, 4)})
replace_layers(model, {frozenset({"a"}): factory})
replace_layers(model, "a", factory)["a"] = model
swapped(model, "a")
swapped(model, "a", factory).keys()
partial_modules(model, {"a": None})
partial_modules(model, [("a", model)])
tree(model, strict=False)
tree("model")
capture(model)
capture(model, "a", lambda path, output: output)
observe(model, "a")
observe(model, "a", nn.Identity())
patch(model, "a")
patch(model, "a", lambda output: output)
Wrapper()
Wrapper("a")
Scaled(model)
Scaled(model, "a")
"""
AROUND_IT = """\
import re

import mlx.nn as nn
from mlx_modswap import Wrapper, capture, observe, partial_modules, patch, replace_layers, select, swapped, tree
from typing_user import Scaled, scaled as factory

model = nn.Identity()
print(Wrapper, capture, observe, partial_modules, patch, replace_layers, select, swapped, tree, re, Scaled, factory)
"""  # noqa: E501


@pytest.fixture(scope="module", params=[pyright, mypy], ids=["pyright", "mypy"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What a type checker finds in the code that is right, and in the wrong calls."""
    check: Callable[[Path], Found] = request.param
    if importlib.util.find_spec(check.__name__) is None:
        pytest.skip(f"{check.__name__} is not installed")
    folder = tmp_path_factory.mktemp("user")
    (settings,) = re.findall(r"(?s)```toml\n(.*?)```", PITFALLS.read_text("utf-8"))
    (folder / "pyproject.toml").write_text(settings)
    (folder / "right.py").write_text(AROUND_IT)
    (folder / "wrong.py").write_text(AROUND_IT + WRONG)
    shutil.copy(HERE / "typing_user.py", folder)
    return check(folder)


def test_right_code_is_accepted_and_has_the_right_types(found):
    assert not {place: found[place] for place in found if place[0] != "wrong.py"}


@pytest.mark.parametrize(
    ("line", "call"), list(enumerate(WRONG.splitlines(), AROUND_IT.count("\n") + 1))
)
def test_a_wrong_call_is_refused(found, line, call):
    assert ("wrong.py", line) in found, call
