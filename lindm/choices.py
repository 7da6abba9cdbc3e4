"""Choices as `Literal` types, checked in one place."""

import dataclasses
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lindm.errors import unknown


def check_choices(config: Any) -> None:
    """Check every field of a dataclass whose type is a `Literal`, or a `Literal` or None.

    Raises:
      ValueError: a value that its type does not list; names the field, the choices and the value.
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        hint, value = hints[field.name], getattr(config, field.name)
        options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if value is None and NoneType in options:
            continue
        literals = [option for option in options if get_origin(option) is Literal]
        allowed = [choice for literal in literals for choice in get_args(literal)]
        if literals and value not in allowed:
            raise ValueError(unknown(field.name, str(value), allowed))
