"""The files of the weights of a folder, and the index that names them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

INDEX = "model.safetensors.index.json"
_FILES = "model*.safetensors"  # what mlx-lm reads


def weight_files(folder: Path) -> list[Path]:
    """List the files that mlx-lm takes for weights of the model."""
    return sorted(folder.glob(_FILES))


def missing_shards(folder: Path) -> list[str]:
    """Name the files that the index names and the folder does not have."""
    return sorted(name for name in named_shards(folder) if not (folder / name).exists())


def stale_shards(folder: Path) -> list[str]:
    """Name the files that mlx-lm would read although the index does not name them."""
    named = named_shards(folder)
    found = {file.name for file in weight_files(folder)}
    return sorted(found - named) if found & named else []


def named_shards(folder: Path) -> set[str]:
    """Name the files that the index names."""
    try:
        index = json.loads((folder / INDEX).read_text())
        return set(index["weight_map"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return set()  # without a usable index, all files count


@contextmanager
def without(folder: Path, names: Collection[str]) -> Iterator[Path]:
    """Yield a folder with links to everything in a folder except some of its files."""
    if not names:
        yield folder
        return
    with tempfile.TemporaryDirectory() as links:
        for file in folder.iterdir():
            if file.name not in names:
                (Path(links) / file.name).symlink_to(file.absolute())
        yield Path(links)
