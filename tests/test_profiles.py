"""How many random examples the tests look at, and that they differ from night to night."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHOW = """
import json
import conftest
from hypothesis import settings

profiles = map(settings.get_profile, ["default", "ci", "nightly"])
print(json.dumps([[profile.max_examples, profile.derandomize] for profile in profiles]))
"""


@pytest.mark.parametrize("ci", [{}, {"CI": "true"}], ids=["here", "in continuous integration"])
def test_the_profiles_are_what_they_say_and_the_nightly_one_is_random(ci):
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    run = subprocess.run(
        [sys.executable, "-c", SHOW],
        cwd=Path(__file__).parent,
        env={**environment, **ci},
        capture_output=True,
        text=True,
        check=True,
    )

    assert json.loads(run.stdout) == [[50, False], [200, True], [2000, False]]
