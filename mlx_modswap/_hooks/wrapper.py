"""A module that takes the place of a layer and keeps its names and attributes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import mlx.nn as nn

from .._model.containers import WRAPPED, has_parameters, is_container, unwrapped
from .._words import described

T = TypeVar("T")

_SEALED = "(sealed)"  # not an identifier, so it hides no attribute of a layer
_OF_EVERY_MODULE = frozenset(nn.Module.__mro__)
_LENT = frozenset(["__call__", "to_quantized"])  # methods of `Wrapper` that call the layer's own


class _Sealing(type):
    """A metaclass that checks and seals a wrapper once its ``__init__`` has returned."""

    def __call__(cls: type[T], *args: Any, **kwargs: Any) -> T:
        wrapper: Any = super().__call__(*args, **kwargs)
        if not dict.__contains__(wrapper, WRAPPED):
            raise TypeError(f"{cls.__name__}.__init__ must call super().__init__(layer)")
        _check_own(wrapper)
        _set_own_modes(wrapper, getattr(wrapper, "_training", True))
        _own(wrapper)[_SEALED] = True
        return wrapper


class Wrapper(nn.Module, metaclass=_Sealing):
    """The base class for a module that represents a layer and changes what it does.

    Attributes, parameters and their names, frozen state, training mode and
    ``isinstance`` are those of the layer, however they are read or set. A subclass
    overrides ``__call__`` to see or change the inputs and outputs. ``__wrapped__``
    is the layer.

    An attribute that ``__init__`` sets on ``self`` belongs to the wrapper. So does
    an attribute that is set later, unless the layer has one of that name. Such an
    attribute is not a parameter: it is neither trained nor saved nor cast. It is
    therefore an error if ``__init__`` sets a public attribute to an array or to a
    module that holds arrays. Give a constant a name that starts with ``_``; if the
    array is to be trained, write a plain :class:`mlx.nn.Module` that holds the layer.
    A module without parameters, such as :class:`mlx.nn.Dropout`, has the training
    mode of the layer.

    :func:`mlx.nn.quantize` keeps the wrapper: ``to_quantized`` returns a wrapper of
    the same class, with the same attributes, around the quantized layer. Override
    ``to_quantized`` if some of the attributes were computed from the layer.

    Args:
        layer (mlx.nn.Module): The layer to represent.

    Raises:
        TypeError: If ``layer`` is not a module, or if the ``__init__`` of a subclass
            sets a public attribute that holds arrays.

    Example:
        >>> import mlx.core as mx
        >>> import mlx.nn as nn
        >>> from mlx_modswap import Wrapper, replace_layers
        >>> class Scaled(Wrapper):
        ...     def __init__(self, layer, scale):
        ...         super().__init__(layer)
        ...         self.scale = scale
        ...
        ...     def __call__(self, *args, **kwargs):
        ...         return self.scale * super().__call__(*args, **kwargs)
        >>> model = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
        >>> _ = replace_layers(model, "layers.0", lambda path, layer: Scaled(layer, 2.0))
        >>> model.layers[0]
        Scaled(Linear(input_dims=4, output_dims=2, bias=True))
        >>> isinstance(model.layers[0], nn.Linear), model.layers[0].weight.shape
        (True, (2, 4))
    """

    # Everything exists once, in the layer. The wrapper's own dict holds only the layer:
    # `mx.eval` and `mx.compile` read raw dicts, and find the arrays through it. All other
    # code calls the methods below, which pass the call on to the layer, so no parameter
    # name gets an additional segment. A copy of the layer's entries would have the same
    # names, but would go stale when the layer sets an entry itself, as `BatchNorm` does.

    __wrapped__: nn.Module

    def __init__(self, layer: nn.Module):
        if not issubclass(type(layer), nn.Module):
            raise TypeError(f"layer must be an mlx.nn.Module, not {described(layer)}")
        dict.__setitem__(self, WRAPPED, layer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return dict.__getitem__(self, WRAPPED)(*args, **kwargs)

    def to_quantized(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Quantize the layer, and wrap the result. Exists only if the layer can be quantized.

        Args:
            *args: Positional arguments for the layer's ``to_quantized``.
            **kwargs: Keyword arguments for the layer's ``to_quantized``.

        Returns:
            mlx.nn.Module: A wrapper of the same class, with a copy of its attributes.
        """
        layer: Any = self.__wrapped__
        return _rebuilt(type(self), layer.to_quantized(*args, **kwargs), own_attributes(self))

    # The methods of `nn.Module` and `dict` come from the layer as well, since its class may
    # override them. So does `__class__`, which `isinstance` reads.
    def __getattribute__(self, name: str) -> Any:
        if name == "__wrapped__":
            return dict.__getitem__(self, WRAPPED)
        if _is_own(self, name):
            value = object.__getattribute__(self, name)
            return _lent(self, name, value) if name in _LENT else value
        return getattr(dict.__getitem__(self, WRAPPED), name)

    # Python calls this when `__getattribute__` raises an AttributeError. The `__getattr__` of
    # `nn.Module` would then look in the wrapper's class, and would find `to_quantized` there
    # although the layer has none.
    def __getattr__(self, name: str) -> Any:
        return self.__getattribute__(name)

    # MLX finds the layer's modules, but not those of the wrapper.
    def _set_training_mode(self, mode: bool) -> None:
        self.__wrapped__._set_training_mode(mode)
        _set_own_modes(self, mode)

    # What a wrapper stores in its `__call__` (`self.last = x`) must not become a parameter of
    # the layer: it would be saved, and would stay after unwrapping.
    def __setattr__(self, name: str, value: Any) -> None:
        is_sealed = _SEALED in _own(self)
        if is_sealed and not _is_own(self, name) and hasattr(unwrapped(self), name):
            setattr(self.__wrapped__, name, value)
        else:
            object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        if _is_own(self, name):
            object.__delattr__(self, name)
        else:
            delattr(self.__wrapped__, name)

    # Python looks these methods up in the class, without `__getattribute__`.
    def __getitem__(self, key: Any) -> Any:
        return self.__wrapped__ if key == WRAPPED else self.__wrapped__[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        if key == WRAPPED:  # `mx.grad` of MLX 0.30.0 writes back what it found in the raw dict
            dict.__setitem__(self, key, value)
        else:
            self.__wrapped__[key] = value

    def __delitem__(self, key: Any) -> None:
        del self.__wrapped__[key]

    def __contains__(self, key: object) -> bool:
        return key == WRAPPED or key in self.__wrapped__

    def __iter__(self) -> Iterator[Any]:
        return iter(self.__wrapped__)

    def __len__(self) -> int:
        return len(self.__wrapped__)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.__wrapped__!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (type(self), self.__wrapped__, own_attributes(self))


# ---------------------------------------------------------------- what is the wrapper's own


def _own(wrapper: Wrapper) -> dict[str, Any]:
    return object.__getattribute__(wrapper, "__dict__")


def own_attributes(wrapper: Wrapper) -> dict[str, Any]:
    """Return all attributes that were set on the wrapper itself."""
    return dict(_own(wrapper))


def _set_own_modes(wrapper: Wrapper, mode: bool) -> None:
    """Set the training mode of the wrapper's own modules that have no parameters."""
    for value in own_attributes(wrapper).values():
        if not issubclass(type(value), nn.Module) and not (is_container(value) and value):
            continue
        if not _holds_arrays(value):
            _holder(value).train(mode)


def _is_own(wrapper: Wrapper, name: str) -> bool:
    """Return whether an attribute is the wrapper's: set on it, or defined in its class."""
    if name in _own(wrapper):
        return True
    for cls in type(wrapper).__mro__:
        if name in cls.__dict__:
            return cls not in _OF_EVERY_MODULE
    return False


def _check_own(wrapper: Wrapper) -> None:
    """Check the attributes set in ``__init__``.

    MLX would not find the arrays of a public attribute. And it calls the methods of
    every module, such as ``items``, which an attribute must not hide.
    """
    for name, value in own_attributes(wrapper).items():
        if callable(getattr(nn.Module, name, None)):
            raise TypeError(
                f"{type(wrapper).__name__}.__init__ sets {name!r}, which is a method of every "
                "mlx.nn.Module; use another name for the attribute"
            )
        if not name.startswith("_") and _holds_arrays(value):
            what = described(value) + " that holds arrays" * is_container(value)
            raise TypeError(
                f"{type(wrapper).__name__}.__init__ sets {name!r} to {what}, which is not a "
                "parameter there: it would be neither trained, nor saved, nor cast; name it "
                f"'_{name}' if it is a constant, or write a plain mlx.nn.Module that holds the "
                "layer if it is to be trained and saved"
            )


def _holds_arrays(value: Any) -> bool:
    return has_parameters(_holder(value))


def _holder(value: Any) -> nn.Module:
    """Return a module with a value as its only attribute."""
    holder = nn.Module()
    dict.__setitem__(holder, "value", value)
    return holder


def _lent(wrapper: Wrapper, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of the wrapper, with the layer's signature unless it has its own.

    Raises:
        AttributeError: If the layer does not have the method.
    """
    import inspect  # here, since it takes a quarter of the time of `import mlx_modswap`

    kinds = [parameter.kind for parameter in inspect.signature(method).parameters.values()]
    if kinds != [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]:
        return method

    @functools.wraps(getattr(wrapper.__wrapped__, name))
    def lent(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return lent


def _rebuilt(cls: type[Wrapper], layer: nn.Module, own: dict[str, Any]) -> Wrapper:
    """Build a wrapper from its parts, for ``copy``, ``pickle`` and ``to_quantized``."""
    wrapper = cls.__new__(cls)
    dict.__setitem__(wrapper, WRAPPED, layer)
    for name, value in own.items():
        object.__setattr__(wrapper, name, value)
    return wrapper
