"""Choices as `Literal` types, checked in one place."""

import dataclasses
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lindm.errors import unknown

Behavior = Literal["oracle", "epsilon", "uniform"]
"""Behavior policy: the oracle; the oracle with a uniformly random action with probability epsilon; uniformly random actions."""

Rewards = Literal["auto", "shown", "hidden"]
"""Rewards in a text: auto shows them where the state is observed."""

Supervise = Literal["all", "query"]
"""Trained steps of a text: those of the demonstrations and of the query (all), or of the query alone (query)."""

Split = Literal["id", "ood"]
"""Split of a suite: in distribution or out of distribution."""

ExportFormat = Literal["trl", "minari"]
"""Other tools that datasets are exported for."""


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
