"""The three errors of the library."""


class PatternError(ValueError):
    """The text of a pattern is wrong."""

    __module__ = "mlx_modswap"  # where users find it


class NoMatchError(LookupError):
    """A pattern, a ``where`` or an ``exclude`` did nothing."""

    __module__ = "mlx_modswap"  # where users find it


class SelectionError(ValueError):
    """What was selected cannot be swapped as asked."""

    __module__ = "mlx_modswap"  # where users find it
