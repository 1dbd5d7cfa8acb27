"""Say what of a folder did not come along into a new one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..._patterns.fold import folded
from ..._show.report import Left
from .._loaders import Loaded
from .._shards import INDEX, stale_shards
from .._source import Source
from .origins import origins
from .write import files_left_out


def left_out(origin: Source, loaded: Loaded) -> list[Left]:
    """Describe what of a folder is not in the folder that is made from it."""
    return [*_arrays(loaded, origin.loader.name), *_files(origin)]


def _arrays(loaded: Loaded, loader: str) -> list[Left]:
    unused = {name: array.nbytes for name, array in sorted(origins(loaded).unused.items())}
    used = loaded.read.keys() - unused.keys()
    return _left("arrays", f"{loader} does not use them", unused, _folded_arrays(unused, used))


def _files(origin: Source) -> list[Left]:
    sizes, whole = files_left_out(origin.folder, origin.loader.files(origin.folder))
    stale = {name: sizes.pop(name) for name in stale_shards(origin.folder) if name in sizes}
    return [
        *_left("files", "not copied", sizes, _folded_files(sizes, whole)),
        *_left("files", f"not in {INDEX}", stale, stale),
    ]


def _left(what: str, why: str, sizes: Mapping[str, int], pattern: Iterable[str]) -> list[Left]:
    if not sizes:
        return []
    return [Left(what, why, len(sizes), sum(sizes.values()), tuple(pattern))]


def _folded_arrays(unused: Iterable[str], used: Iterable[str]) -> list[str]:
    """Write names of arrays; ``a.b.**`` are several of which none is used."""
    modules = {above for name in used for above in _above(name)}
    groups: dict[str, list[str]] = {}
    for name in unused:
        alone = (above for above in _above(name) if above not in modules)
        groups.setdefault(next(alone, name), []).append(name)
    single = [names[0] for names in groups.values() if len(names) == 1]
    several = [module for module, names in groups.items() if len(names) > 1]
    return [
        *(f"{module}.**" for module in folded(several, numbers_are_indices=True)),
        *folded(single, numbers_are_indices=True),
    ]


def _above(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[:length]) for length in range(1, len(parts)))


def _folded_files(names: Iterable[str], whole: Iterable[str]) -> list[str]:
    """Write names of files; ``a/**`` is a folder of which nothing is copied."""
    inside = {name: name.partition("/")[0] for name in names}
    shown = (f"{top}/**" if top in whole else name for name, top in inside.items())
    return list(dict.fromkeys(shown))
