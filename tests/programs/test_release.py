"""What has to be true of a version before it is uploaded."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import pytest
from release import check_content, check_links, check_tag

import mlx_modswap

CHANGELOG = """\
# Changelog

## [0.2.0] - 2026-11-30

## [0.1.0] - unreleased
"""


@pytest.mark.skipif("INSTALLED" not in os.environ, reason="for an environment with the wheel")
def test_what_is_tested_is_what_was_installed():
    assert Path(mlx_modswap.__file__).is_relative_to(sysconfig.get_path("purelib"))


def test_a_tag_stands_for_the_version_that_the_changelog_dates():
    check_tag("v0.2.0", "0.2.0", CHANGELOG)


@pytest.mark.parametrize(
    ("tag", "version", "reason"),
    [
        ("v0.2.1", "0.2.0", "the tag is v0.2.1, but the version in pyproject.toml is 0.2.0"),
        ("0.2.0", "0.2.0", "the tag is 0.2.0, but the version in pyproject.toml is 0.2.0"),
        ("v0.1.0", "0.1.0", "CHANGELOG.md has no line like '## [0.1.0] - 2025-12-31'"),
        ("v0.2", "0.2", "CHANGELOG.md has no line like '## [0.2] - 2025-12-31'"),
    ],
)
def test_a_release_that_does_not_fit_its_tag_is_refused(tag, version, reason):
    with pytest.raises(SystemExit) as refusal:
        check_tag(tag, version, CHANGELOG)

    assert str(refusal.value) == reason


def test_a_readme_whose_links_would_not_work_on_pypi_is_refused():
    check_links("See the [tour][tour].\n\n[tour]: https://example.org/blob/v1/docs/tour.md\n")
    with pytest.raises(SystemExit) as refusal:
        check_links("[tour]: docs/tour.md\n[tree]: https://example.org/raw/v1/tree.png\n")

    assert str(refusal.value) == (
        "README.md has links without the address of the repository: ['docs/tour.md']"
    )


def test_an_archive_with_a_file_too_many_or_too_few_is_refused():
    check_content("a.whl", {"a/__init__.py"}, ["a/__init__.py"])
    with pytest.raises(SystemExit) as refusal:
        check_content("a.whl", {"a/__init__.py", "a/py.typed"}, ["a/__init__.py", "tests/a.py"])

    assert str(refusal.value) == ("a.whl lacks ['a/py.typed'], and should not hold ['tests/a.py']")
