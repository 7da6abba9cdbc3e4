"""Checks of the fields of an experiment's Config: ValueError that names the field, the rule and the value."""

import math
from typing import Any

from lindm.validate import count


def check_counts(config: Any, *names: str, least: int = 1) -> None:
    """The fields are whole numbers of at least `least`."""
    for name in names:
        count(getattr(config, name), name, least)


def check_rising(config: Any, *names: str, length: int = 1, least: int = 1) -> None:
    """The fields are tuples of at least `length` rising numbers, the first of at least `least`."""
    for name in names:
        values = getattr(config, name)
        if len(values) < length or list(values) != sorted(set(values)) or (values and values[0] < least):
            number = f"at least {length} " if length > 1 else ""
            raise ValueError(f"{name} must contain {number}rising numbers of at least {least}; got {values}")


def check_multiples(config: Any, base: int, *names: str) -> None:
    """The fields are multiples of `base`."""
    for name in names:
        if (value := getattr(config, name)) % base:
            raise ValueError(f"{name} must be a multiple of {base}; got {value}")


def check_positive(config: Any, *names: str) -> None:
    """The fields are finite numbers above zero."""
    for name in names:
        if not 0 < (value := getattr(config, name)) < math.inf:
            raise ValueError(f"{name} must be positive and finite; got {value}")


def check_at_least(config: Any, least: float, *names: str) -> None:
    """The fields are finite numbers of at least `least`."""
    for name in names:
        if not least <= (value := getattr(config, name)) < math.inf:
            raise ValueError(f"{name} must be finite and at least {least}; got {value}")
