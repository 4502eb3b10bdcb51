"""Rules of a config's fields: what types they have, and the sentence for one that is broken."""

import enum
import functools
import math

from disag_jax.errors import ConfigError


def require(holds: bool, field: str, value, rule: str):
    """Raises ConfigError with the field, its value and the rule unless the rule holds."""
    if not holds:
        shown = value.value if isinstance(value, enum.Enum) else value
        raise ConfigError(f"{field} = {shown!r} must be {rule}")


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _is_tuple_of(holds, value) -> bool:
    return isinstance(value, tuple) and all(holds(item) for item in value)


_TYPES = {
    int: (_is_int, "an int"),
    float: (_is_finite, "a finite number"),
    bool: (lambda value: isinstance(value, bool), "True or False"),
    float | None: (lambda value: value is None or _is_finite(value), "a finite number, or None"),
    tuple[float, ...]: (functools.partial(_is_tuple_of, _is_finite), "a tuple of finite numbers"),
    tuple[str, ...]: (
        functools.partial(_is_tuple_of, lambda item: isinstance(item, str)),
        "a tuple of strings",
    ),
}


def type_rule(kind):
    """(test of a value, its rule in words) for a field's type."""
    if kind in _TYPES:
        return _TYPES[kind]
    members = ", ".join(f"{kind.__name__}.{member.name}" for member in kind)
    return (lambda value: isinstance(value, kind)), f"one of {members}"
