"""The three errors of the library."""


class PatternError(ValueError):
    """The text of a pattern is wrong."""


class NoMatchError(LookupError):
    """A pattern, a ``where`` or an ``exclude`` did nothing."""


class SelectionError(ValueError):
    """What was selected cannot be swapped as asked."""
