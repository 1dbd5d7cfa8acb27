"""Write the folder of a model under another name until it is complete."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_lm import utils

from ..._words import size
from .._source import GENERATION, Config, one_line

# What `copy_files` does not copy: weights in any format, and files that describe them.
_WEIGHTS = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack"),
    *(".npy", ".npz", ".onnx", ".onnx_data", ".ot", ".part", ".pkl", ".tflite"),
}
_DESCRIPTIONS = {"config.json", "hf_quant_config.json"}
_INDEX = ".index.json"
_SMALL = 10**7  # bytes; larger files of sub-folders are not copied


@contextmanager
def staged(folder: Path, nbytes: int) -> Iterator[Path]:
    """Yield an empty folder beside the target, and rename it to the target at the end.

    Args:
        folder (Path): The target.
        nbytes (int): The size of what will be written, in bytes.

    Raises:
        FileExistsError: If the target exists.
        OSError: If the disk does not have enough space.
    """
    check_free(folder)
    # Missing parents are made at the end, so that none is left after a failure. The first folder
    # above the target that exists is on the disk where the target will be.
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    left = shutil.disk_usage(above).free
    if nbytes > left:
        raise OSError(
            f"{str(folder)!r} needs {size(nbytes)}, and its disk has {size(left)} left; "
            "nothing was written"
        )
    outer = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=above))
    try:
        inner = outer / folder.name  # with the usual permissions, unlike the outer folder
        inner.mkdir()
        yield inner
        check_free(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        inner.rename(folder)
    except BaseException:
        _remove(outer)
        raise
    outer.rmdir()


def check_free(folder: Path) -> None:
    """Raise a ``FileExistsError`` if something has that name."""
    if folder.exists() or folder.is_symlink():
        raise FileExistsError(f"{str(folder)!r} exists already; use a new folder name")


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        warnings.warn(
            f"{str(folder)!r} holds an unfinished model and could not be removed: {error}",
            stacklevel=2,
        )


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Raise an ``OSError`` that says what could not be written, since MLX's error does not."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"{what} could not be written: {one_line(error)}") from error


def copy_files(source: Path, folder: Path) -> None:
    """Copy the tokenizer and the other files of a source, except those of its weights."""
    for file in _files_to_copy(source):
        copy = folder / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def copied_nbytes(source: Path) -> int:
    """Return the size of the files that are copied, in bytes."""
    return sum(file.stat().st_size for file in _files_to_copy(source))


def files_left_out(source: Path, weights: Iterable[Path]) -> tuple[dict[str, int], set[str]]:
    """Return the files that are neither copied nor written anew, and folders without copies.

    Args:
        source (pathlib.Path): The folder of the source.
        weights (Iterable of pathlib.Path): The files of its weights, which are written anew.

    Returns:
        tuple: The size in bytes of each file, by its name from the source on, and the names of
        the folders.
    """
    copied = set(_files_to_copy(source))
    replaced = {source / name for name in _DESCRIPTIONS} | {*weights}
    left = [
        file
        for file in _files(source)
        if file not in copied | replaced and not file.name.endswith(_INDEX)
    ]
    tops = {file.relative_to(source).parts[0] for file in copied}
    sizes = {file.relative_to(source).as_posix(): file.stat().st_size for file in left}
    return sizes, {name.partition("/")[0] for name in sizes if "/" in name} - tops


def _files_to_copy(source: Path) -> list[Path]:
    """List the files of a source except those of its weights, and the small ones of sub-folders."""
    return [
        file
        for file in _files(source)
        if file.suffix.lower() not in _WEIGHTS
        and (
            file.stat().st_size <= _SMALL
            if file.parent != source
            else file.name not in _DESCRIPTIONS and not file.name.endswith(_INDEX)
        )
    ]


def _files(source: Path) -> Iterator[Path]:
    """Yield the files of a folder and of its sub-folders that are not hidden."""
    for folder, names, files in os.walk(source):
        names[:] = sorted(name for name in names if not name.startswith((".", "__")))
        yield from filter(Path.is_file, (Path(folder) / name for name in sorted(files)))


def change_generation(folder: Path, changes: Config) -> None:
    """Give entries new values in the generation config of a folder, where it has them.

    Otherwise mlx-lm, which prefers the end tokens of this file, would not see theirs.
    """
    file = folder / GENERATION
    if not file.is_file():
        return
    try:
        old: Config = json.loads(file.read_text())
    except ValueError:  # mlx-lm ignores such a file
        return
    new = {key: changes.get(key, value) for key, value in old.items()}
    if new != old:
        file.write_text(json.dumps(new, indent=2))


def write_config(config: Config, folder: Path, *, keep_vision_config: bool) -> None:
    """Write a config as ``mlx_lm.utils.save`` does."""
    utils.save_config(
        dict(config),  # a copy, since `save_config` removes entries
        config_path=folder / "config.json",
        keep_vision_config=keep_vision_config,
    )
