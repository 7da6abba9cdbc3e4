"""Choices as `Literal` types, checked in one place."""

import dataclasses
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lindm.errors import unknown

Behavior = Literal["oracle", "epsilon", "uniform"]
"""Behavior policy: the oracle; the oracle with a uniformly random action with probability epsilon; uniformly random actions."""

Rewards = Literal["auto", "shown", "hidden"]
"""Rewards in a text: auto shows them where the state is observed."""

Supervise = Literal["all", "query"]
"""Trained steps of a text: those of the demonstrations and of the query (all), or of the query alone (query)."""

Loss = Literal["action", "soft", "regret", "behavior"]
"""Training loss at an action: cross-entropy of the oracle's action (action), of its softmax policy (soft) or of the action that
the demonstrator took (behavior), or the expected regret of the model's own action probabilities (regret)."""

Preset = Literal["tiny", "small"]
"""Randomly initialized models with a vocabulary of their own, of 1.4 and of 11 million weights."""

Overlong = Literal["refuse", "truncate", "drop"]
"""What is done with a document of more tokens than `max_length`: an error, cut off at its end, left out."""

Optimizer = Literal["adamw", "adafactor"]
"""Optimizer of the training: AdamW, or Adafactor, whose second moments of a matrix are those of its rows and columns."""

Moments = Literal["f32", "bf16"]
"""Storage of AdamW's first moments."""

Split = Literal["id", "ood"]
"""Split of a suite: in distribution or out of distribution."""

ExportFormat = Literal["trl", "minari"]
"""Other tools that datasets are exported for."""

Benchmark = Literal["attention", "solvers", "sft", "decisions", "accelerator"]
"""Benchmarks, modules of `lindm.bench`."""


Made = TypeVar("Made")


def from_options(kind: type[Made], options: Mapping[str, Any]) -> Made:
    """An instance of a dataclass from its fields by name.

    Raises:
      ValueError: a name that is no field, or a field without a default that is not given.
    """
    known = [field.name for field in dataclasses.fields(kind) if field.init]  # pyright: ignore[reportArgumentType]
    if wrong := [name for name in options if name not in known]:
        raise ValueError(unknown("option", wrong[0], known))
    for field in dataclasses.fields(kind):  # pyright: ignore[reportArgumentType]
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING and field.name not in options:
            raise ValueError(f"{field.name} must be given")
    return kind(**options)


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
