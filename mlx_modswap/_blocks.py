"""The ``swapped`` blocks that are open, and how one of them ends while others are open."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import dropwhile
from typing import Any

import mlx.nn as nn

from ._containers import Location, unwrapped, value_at
from ._errors import SelectionError
from ._walk import Places

Update = Callable[[Places, Sequence[nn.Module], Sequence[nn.Module]], None]

_open: list[Block] = []  # in the order in which they were entered

_MODIFIED = "{!r} was modified inside the block; nothing was put back"
_ADVICE = "end blocks in the reverse order, or use one block around both"
_COVERED = (
    "{!r} was changed again by a block that was entered after this one and is still open; "
    f"{_ADVICE}; the model has its own layers back once the last of these blocks has ended"
)
_LOST = (
    "{!r} is no longer at its path: another block, which did not end in the reverse order, changed "
    f"a module around it; its own layer was put back inside that module; {_ADVICE}"
)


def _open_now() -> list[Block]:
    # A copy: other threads and the garbage collector may end a block at any time, and a loop over
    # a list skips an item when another item is removed.
    return _open.copy()


class Block:
    """What a ``swapped`` block has put into a model, until the block ends.

    Two token streams on one model may each have a block, and end them in any order. If
    each block simply put back what it found, the second block could put back the new
    modules of the first after the first has ended, and these would stay in the model.
    So all open blocks are listed in this file, in the order in which they were entered.
    Blocks are compared by location and not by module, since a later block may use a
    module again. There are three cases:

    * *The same location.* The model holds the module that the last block put there. If
      an earlier block ends first, it does not change the location. It hands the module
      that it found there to the next block on this location, which will put it back.
    * *A module around the location.* A block may remove a module that contains a place
      of another block, or put such a module back. The place is restored inside its own
      container, even if that container is not in the model at the moment: another block
      may put it back when it ends.
    * *Changes by hand.* These must be distinguished from the changes of other blocks. So
      each block records what other blocks put into the locations that it relies on: its
      own locations, and those on the way to them. If such a location holds anything
      other than what this block or another one put there, it was changed by hand, and
      this block puts nothing back.

    In the common case there is only one block, or the last block ends first: then all of
    this costs no more than a list with one entry. There is no lock. Blocks in different
    models do not rely on each other's locations, and a block that the garbage collector
    ends might wait for a lock that its own thread holds.

    Attributes:
        places (Places): The places that have changed, with the modules to put back.
        news (list[nn.Module]): The module that was put into each place.
        rewritten (dict[Location, nn.Module]): What other blocks have put since then into
            the locations that this block relies on.
    """

    def __init__(self, places: Places, news: list[nn.Module]):
        self.places, self.news = places, news
        self.rewritten: dict[Location, nn.Module] = {}
        self._is_retry = False

    @cached_property
    def locations(self) -> list[Location]:
        """The location of each place."""
        return self.places.locations()

    @cached_property
    def _own(self) -> frozenset[Location]:
        return frozenset(self.locations)

    @cached_property
    def _relied_on(self) -> frozenset[Location]:
        around = self.places.container_locations(self.places.ancestors()[1:])
        return self._own.union(around)

    def begin(self) -> None:
        """Join the open blocks, now that the new modules are in the model."""
        _open.append(self)
        self._tell_others(self.news, {})

    def end(self, update: Update) -> None:
        """Put the old modules back, or hand them to the blocks that will put them back.

        May be called again after a ``KeyboardInterrupt``.

        Args:
            update (Callable): Called as ``update(places, olds, news)``; puts ``news`` into
                the places, which hold ``olds``.

        Raises:
            SelectionError: If a place was modified by hand (then nothing is put back), or
                if the blocks did not end in the reverse order.
        """
        places, olds = self.places, self.places.modules
        above = self._above()
        lost: list[int] = []
        is_retry, self._is_retry = self._is_retry, True
        if not (is_retry and self._is_restored(above)):
            is_unmoved = places.first_moved() is None and places.first_without(self.news) is None
            if is_unmoved and not above:  # the common case
                update(places, self.news, olds)
            else:
                lost = self._check()
                self._write_where_not(above)
        self._tell_others(olds, above)
        for block in set(above.values()):
            block._take_over(self, above)
        for number, location in enumerate(self.locations if above else ()):
            if location in above:
                raise SelectionError(_COVERED.format(places.paths[number]))
        for number in lost:
            raise SelectionError(_LOST.format(places.paths[number]))

    def close(self) -> None:
        """Leave the open blocks."""
        with suppress(ValueError):
            _open.remove(self)

    # ------------------------------------------------------------ among other blocks

    def _above(self) -> dict[Location, Block]:
        """Return, by location, the next open block that was entered after this block."""
        later = list(dropwhile(lambda block: block is not self, _open_now()))[1:]
        above: dict[Location, Block] = {}
        for block in reversed(later):
            above.update(dict.fromkeys(self._own & block._own, block))
        return above

    def _tell_others(self, modules: Sequence[nn.Module], above: Mapping[Location, Block]) -> None:
        """Tell the other open blocks what is in the places now, except those in ``above``."""
        others = [block for block in _open_now() if block is not self]
        if others:
            put = dict(zip(self.locations, modules))
            for block in others:
                for location in block._relied_on & self._own - above.keys():
                    block.rewritten[location] = put[location]

    def _take_over(self, below: Block, above: Mapping[Location, Block]) -> None:
        """Take over what another block would put back, where this block is the next above it."""
        olds = dict(zip(below.locations, below.places.modules))
        for number, location in enumerate(self.locations):
            if above.get(location) is self:
                self.places.modules[number] = olds[location]

    # ------------------------------------------------------------ place by place

    def _check(self) -> list[int]:
        """Check that nothing that the block relies on was changed by hand.

        Returns:
            The numbers of the places that are no longer at their paths.
        """
        places = self.places
        lost: set[int] = set()
        rows = places.ancestors()  # each container before all that it holds
        for row, location in zip(rows, places.container_locations(rows)):
            found, parent = places.containers[row], places.parents[row]
            now = value_at(places.holders[parent], places.parent_keys[row]) if row else found
            is_there = unwrapped(now) is places.holders[row]
            if not is_there if now is found else not self._was_put_by_others(location, now):
                at = next(at for at in range(len(places.rows)) if row in self._around(at))
                raise SelectionError(_MODIFIED.format(places.paths[at]))
            if parent in lost or not is_there:
                lost.add(row)
        for at, (row, key, location) in enumerate(zip(places.rows, places.keys, self.locations)):
            now = value_at(places.holders[row], key)
            if now is not self.news[at] and not self._was_put_by_others(location, now):
                raise SelectionError(_MODIFIED.format(places.paths[at]))
        return [at for at, row in enumerate(places.rows) if row in lost]

    def _was_put_by_others(self, location: Location, value: Any) -> bool:
        return location in self.rewritten and self.rewritten[location] is value

    def _is_restored(self, above: Mapping[Location, Block]) -> bool:
        """Return whether the old modules are in their containers, except at those in ``above``."""
        places = self.places
        rows = zip(places.rows, places.keys, places.modules, self.locations)
        return all(
            location in above or value_at(places.holders[row], key) is old
            for row, key, old, location in rows
        )

    def _around(self, at: int) -> list[int]:
        """Return the rows of the containers around a place."""
        rows = [self.places.rows[at]]
        while rows[-1]:
            rows.append(self.places.parents[rows[-1]])
        return rows

    def _write_where_not(self, above: Mapping[Location, Block]) -> None:
        """Put the old modules into their containers directly, except at locations in ``above``."""
        places = self.places
        rows = zip(places.rows, places.keys, places.modules, self.locations)
        writes: list[tuple[Any, Any, nn.Module, Any]] = []
        for row, key, old, location in rows:
            if location not in above:
                holder = places.holders[row]
                writes.append((holder, key, old, value_at(holder, key)))
        try:
            for holder, key, old, _ in writes:
                holder[key] = old
        except BaseException as error:
            for holder, key, _, now in writes:
                with suppress(Exception):
                    holder[key] = now
            if not isinstance(error, Exception):
                raise
            message = f"putting modules back failed, so none was put back: {error}"
            raise SelectionError(message) from error
