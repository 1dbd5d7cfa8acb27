"""Checks what a release uploads: that it is the right version, complete, and works by itself.

    python tests/programs/release.py dist          # what `python -m build --outdir dist` has made
    python tests/programs/release.py dist v1.2.3   # and that it is what this tag stands for

It needs nothing but Python, and pip to install the wheel into an empty environment.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]
SOURCES = {
    file.relative_to(ROOT).as_posix()
    for file in (ROOT / "mlx_modswap").rglob("*")
    if file.suffix in {".py", ".typed"}
}
ABOUT_IT = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
AROUND_IT = {".gitignore", "CHANGELOG.md", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"}


def main(folder: Path, tag: str = "") -> None:
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    name, version, *_ = wheel.name.split("-")
    if tag:
        check_tag(tag, version, (ROOT / "CHANGELOG.md").read_text("utf-8"))
        check_links((ROOT / "README.md").read_text("utf-8"))
    with zipfile.ZipFile(wheel) as archive:
        about = {f"{name}-{version}.dist-info/{file}" for file in ABOUT_IT}
        check_content(wheel.name, SOURCES | about, archive.namelist())
    with tarfile.open(sdist) as archive:
        inside = {f"{name}-{version}/{file}" for file in SOURCES | AROUND_IT}
        check_content(sdist.name, inside, archive.getnames())
    check_alone(wheel)
    print(f"{wheel.name} and {sdist.name} are complete, and the example of the README runs")


def check_tag(tag: str, version: str, changelog: str) -> None:
    """Raise unless the tag names the version, and the changelog says when it came out."""
    if tag != f"v{version}":
        raise SystemExit(f"the tag is {tag}, but the version in pyproject.toml is {version}")
    heading = re.escape(f"## [{version}] - ") + r"\d{4}-\d\d-\d\d"
    if not re.search(f"(?m)^{heading}$", changelog):
        raise SystemExit(f"CHANGELOG.md has no line like '## [{version}] - 2025-12-31'")


def check_links(readme: str) -> None:
    """Raise unless the links at the end of the README work on PyPI, which has no other files."""
    if relative := re.findall(r"(?m)^\[[\w-]+\]: (?!https://)(\S+)$", readme):
        raise SystemExit(f"README.md has links without the address of the repository: {relative}")


def check_content(archive: str, expected: set[str], found: list[str]) -> None:
    """Raise unless an archive holds these files and no others."""
    missing, extra = sorted(expected - set(found)), sorted(set(found) - expected)
    if missing or extra:
        raise SystemExit(f"{archive} lacks {missing}, and should not hold {extra}")


def check_alone(wheel: Path) -> None:
    """Raise unless the README's example that needs no files prints what stands there.

    It runs in an environment that holds the wheel and what that asks for, far from this folder.
    """
    text = (ROOT / "README.md").read_text("utf-8")
    examples = re.findall(r"(?s)```python\n((?:(?!```).)*)```\n+```\n(.*?)```", text)
    code, expected = next(example for example in examples if "\nmodel = nn." in example[0])
    where = "\nimport mlx_modswap\nprint(mlx_modswap.__file__)"
    extra = "[cpu]" if platform.system() == "Linux" else ""
    with TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = f"{folder}/bin/python"
        install = [python, "-m", "pip", "install", "-q", f"{wheel.resolve()}{extra}"]
        subprocess.run(install, check=True)
        run = [python, "-I", "-W", "error", "-c", code + where]
        printed = subprocess.run(run, check=True, capture_output=True, text=True, cwd=folder).stdout
        *lines, file = printed.splitlines()
        if lines != expected.splitlines():
            raise SystemExit(f"the README says\n{expected}\nbut its example prints\n{printed}")
        if not Path(file).resolve().is_relative_to(os.path.realpath(folder)):
            raise SystemExit(f"the example used {file}, not what was installed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
