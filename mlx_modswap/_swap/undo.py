"""The ``with`` blocks that change a model, and how one of them ends while others are open."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import dropwhile

import mlx.nn as nn

from .._errors import SelectionError
from .._model.containers import Location, value_at
from .._model.walk import Places
from .._words import listed

_open: list[_Block] = []  # in the order in which they were entered

_ADVICE = "end blocks in the reverse order, or use one block around both"
_COVERED = (
    "{!r} was changed again by a block that was entered after this one and is still open; "
    f"{_ADVICE}; the model has its own layers back once the last of these blocks has ended"
)
_MODIFIED = "{} modified inside the block and left as it is now; everything else was put back"
_MOVED = (
    "{!r} is no longer at its path, because a module that contains it was replaced inside the "
    f"block; its own layer was put back inside that module; if another block replaced it, {_ADVICE}"
)


@contextmanager
def until_the_end(
    places: Places, new_modules: Sequence[nn.Module], put: Callable[[], object]
) -> Iterator[None]:
    """Change places for the length of a ``with`` block.

    Args:
        places (Places): The places, with the modules that are there now.
        new_modules (Sequence[nn.Module]): What each of them gets.
        put (Callable): Puts them into the places, or raises an error and changes nothing.

    Raises:
        SelectionError: At the end of the block, if some place was modified inside it, or if
            blocks did not end in the reverse order. If the block itself raises an error, that
            error is raised, with this one as a note.
    """
    block = _Block(places, new_modules)
    try:
        put()
        _open.append(block)
        yield
    except BaseException as error:
        try:
            block.end()
        except SelectionError as refusal:
            error.add_note(str(refusal))
        raise
    block.end()


class _Block:
    """What a block has put into a model, until it ends.

    Two token streams on one model may each have a block, and end them in any order. If each block
    simply put back what it found, the second could put back the new modules of the first after
    the first has ended, and these would stay in the model. So a block that ends while a later one
    is open on the same location does not change the location. It hands the module that it found
    there to the next block above it, which will put it back.

    Blocks are compared by location (a container and a key) and not by path, so a place is
    restored inside its own container, even if that container is not in the model at the moment:
    another block may put it back when it ends.

    There is no lock: a block that the garbage collector ends might wait for a lock that its own
    thread holds. Blocks in different models have no location in common.
    """

    def __init__(self, places: Places, new_modules: Sequence[nn.Module]):
        self.places, self.new_modules = places, new_modules
        self.at: dict[Location, int] = {}  # the number of a place at each location
        for number, location in enumerate(places.locations()):
            self.at.setdefault(location, number)

    def end(self) -> None:
        """Put the old modules back, even if an interrupt comes in between."""
        try:
            self._put_back()
        except KeyboardInterrupt as interrupt:
            try:
                self._put_back()  # again, from the start: it leaves what is back already
            except SelectionError as refusal:
                interrupt.add_note(str(refusal))
            raise
        finally:
            with suppress(ValueError):
                _open.remove(self)

    def _put_back(self) -> None:
        places = self.places
        covered: list[int] = []
        modified: list[int] = []
        # A copy of the list: other threads and the garbage collector may end a block at any time.
        above = list(dropwhile(lambda block: block is not self, _open.copy()))[1:]
        for location, number in self.at.items():
            holder, key = places.holders[places.rows[number]], places.keys[number]
            old, now = places.modules[number], value_at(holder, key)
            if later := next((block for block in above if location in block.at), None):
                later.places.modules[later.at[location]] = old
                covered.append(number)
            elif now is self.new_modules[number]:
                try:
                    holder[key] = old
                except Exception:  # a module that cannot be changed any more
                    modified.append(number)
            elif now is not old:
                modified.append(number)
        moved = places.first_moved()
        if modified:
            paths = listed(repr(places.paths[number]) for number in modified)
            raise SelectionError(_MODIFIED.format(f"{paths} {'were' if modified[1:] else 'was'}"))
        for text, numbers in ((_COVERED, covered), (_MOVED, [] if moved is None else [moved])):
            if numbers:
                raise SelectionError(text.format(places.paths[numbers[0]]))
