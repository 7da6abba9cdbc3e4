"""Rotary position embedding: what `rope_parameters` of config.json says, and the angle per position of each pair of coordinates.

default    f_i = theta^(-2 i / R) for the first R = partial_rotary_factor * head_dim coordinates
linear     f_i / factor
dynamic    f_i: its scaling begins behind max_position_embeddings, to which texts are limited here
llama3     long wavelengths divided by `factor` (Llama 3.1)
yarn       long wavelengths divided by `factor`, cosines and sines times an attention factor (Peng et al., 2023)
longrope   f_i / short_factor_i in a text of up to original_max_position_embeddings tokens, f_i / long_factor_i at every position
           of a longer one, cosines and sines times an attention factor (Ding et al., 2024)
"""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from lindm.choices import check_choices
from lindm.errors import DataError

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
# keys beside rope_type, rope_theta and partial_rotary_factor: those that must be there, those that may
_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim"),
    ),
    "longrope": (("short_factor", "long_factor", "original_max_position_embeddings"), ("attention_factor",)),
}


@dataclass(frozen=True, kw_only=True)
class RopeParameters:
    """Rotary position embedding; the fields are the keys of `rope_parameters` in config.json."""

    rope_theta: float = 10_000.0
    rope_type: RopeType = "default"
    partial_rotary_factor: float = 1.0  # share of the coordinates of a head that is rotated
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3: wavelengths above original_max_position_embeddings / low_freq_factor are scaled,
    high_freq_factor: float = 4.0  # those below original_max_position_embeddings / high_freq_factor are not; blended in between
    original_max_position_embeddings: int = 8192
    attention_factor: float = 1.0  # yarn, longrope: of cosines and sines
    beta_fast: float = 32.0  # yarn: pairs that rotate more often than this over the original length are not scaled,
    beta_slow: float = 1.0  # those that rotate less often than this are
    truncate: bool = True  # yarn: the two bounds are rounded to whole pairs
    short_factor: tuple[float, ...] = ()  # longrope: divisors of the frequencies in texts of at most the original length
    long_factor: tuple[float, ...] = ()  # longrope: those in longer texts

    def __post_init__(self):
        check_choices(self)
        for name in {field.name for field in fields(self)} - {"rope_type", "truncate"}:
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
                    raise ValueError(f"{name} must be a positive number; got {number!r}")
        if self.partial_rotary_factor > 1:
            raise ValueError(f"partial_rotary_factor must be at most 1; got {self.partial_rotary_factor}")
        if self.low_freq_factor >= self.high_freq_factor:
            got = f"{self.low_freq_factor} and {self.high_freq_factor}"
            raise ValueError(f"low_freq_factor must be below high_freq_factor; got {got}")

    def check_factors(self, head_dim: int) -> None:
        """ValueError where longrope has not one factor for each pair of coordinates that is rotated."""
        pairs = int(head_dim * self.partial_rotary_factor) // 2
        for name in ("short_factor", "long_factor") if self.rope_type == "longrope" else ():
            if len(getattr(self, name)) != pairs:
                raise ValueError(f"{name} must be {pairs} numbers; got {len(getattr(self, name))}")

    def version_4_scaling(self, max_position_embeddings: int) -> dict[str, Any] | None:
        """The object `rope_scaling`, which has the place of `rope_parameters` in version 4 of transformers.

        Phi-3 takes no attention factor there: version 4 computes it.
        """
        if self.rope_type == "default":
            return None
        content = {key: value for key, value in self.to_json().items() if key != "rope_theta"}
        if self.rope_type == "longrope":
            content["type"], original = content.pop("rope_type"), self.original_max_position_embeddings
            if self.attention_factor == _longrope_attention_factor(max_position_embeddings / original, original):
                del content["attention_factor"]
        return content

    def to_json(self) -> dict[str, Any]:
        """The object `rope_parameters` of config.json: the keys that this rope_type uses."""
        required, optional = _KEYS[self.rope_type]
        names = {field.name for field in fields(self)}
        content = {"rope_type": self.rope_type, "rope_theta": self.rope_theta}
        if self.partial_rotary_factor != 1:
            content["partial_rotary_factor"] = self.partial_rotary_factor
        return content | {key: getattr(self, key) for key in (*required, *optional) if key in names}


def parse_rope_parameters(given: dict[str, Any], source: str, max_position_embeddings: int) -> RopeParameters:
    """The parameters of an object `rope_parameters`; errors (DataError) name its `source`."""
    given = {key: value for key, value in given.items() if value is not None}
    rope_type = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    if rope_type not in tuple(_KEYS):
        raise DataError(f"{source}: rope_type must be one of {', '.join(_KEYS)}; got {rope_type!r}")
    required, optional = _KEYS[rope_type]
    if missing := set(required) - given.keys():
        raise DataError(f"{source}: rope_type {rope_type} needs {', '.join(sorted(missing))}")
    common = {"rope_theta", "partial_rotary_factor"}
    harmless = _KEYS["llama3"][0]  # with another rope_type
    if unknown := given.keys() - common - {*required, *optional, *harmless}:
        raise DataError(f"{source}: rope parameters {', '.join(sorted(unknown))} are not known for rope_type {rope_type}")
    values: dict[str, Any] = {key: value for key, value in given.items() if key in {*common, *required, *optional}}
    try:
        if rope_type == "yarn":
            values["attention_factor"] = _attention_factor(values)
            values = {key: value for key, value in values.items() if not key.startswith("mscale")}
        if rope_type == "longrope":
            original = values["original_max_position_embeddings"]
            factor = given.get("factor") or max_position_embeddings / original
            values = {"attention_factor": _longrope_attention_factor(factor, original)} | values
            values |= {name: tuple(values[name]) for name in ("short_factor", "long_factor")}
        return RopeParameters(rope_type=rope_type, **values)
    except (TypeError, ValueError, ZeroDivisionError) as e:
        raise DataError(f"{source}: {e}") from e


def _attention_factor(values: dict[str, Any]) -> float:
    """The factor of cosines and sines of yarn: given, or by its formula."""
    if values.get("attention_factor") is not None:
        return values["attention_factor"]

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(values["factor"]) + 1 if values["factor"] > 1 else 1.0

    if values.get("mscale") and values.get("mscale_all_dim"):
        return scale(values["mscale"]) / scale(values["mscale_all_dim"])
    return scale(1.0)


def _longrope_attention_factor(factor: float, original: int) -> float:
    """Of cosines and sines of longrope, where texts become `factor` times as long as the original length."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def rope_frequencies(rope: RopeParameters, head_dim: int, long: bool = False) -> list[float]:
    """Angle per position of each rotated pair of coordinates [R / 2], in double precision.

    Args: long: of a text above original_max_position_embeddings, which matters to longrope alone.

    llama3, with n = original_max_position_embeddings: a frequency f of wavelength 2 pi / f is kept where the wavelength is below
    n / high_freq_factor, divided by `factor` where it is above n / low_freq_factor, and in between blended linearly in
    n / wavelength. yarn blends linearly in i between the pairs that rotate beta_fast and beta_slow times over n positions.
    """
    size = int(head_dim * rope.partial_rotary_factor)
    frequencies = [rope.rope_theta ** (-2 * i / size) for i in range(size // 2)]
    match rope.rope_type:
        case "linear":
            return [f / rope.factor for f in frequencies]
        case "longrope":
            divisors = rope.long_factor if long else rope.short_factor
            return [f / divisor for f, divisor in zip(frequencies, divisors, strict=True)]
        case "llama3":
            return [_blended(f, rope.factor, _llama3_share(f, rope)) for f in frequencies]
        case "yarn":
            low, high = _yarn_range(rope, size)
            shares = [1 - min(max((i - low) / (high - low), 0.0), 1.0) for i in range(len(frequencies))]
            return [_blended(f, rope.factor, share) for f, share in zip(frequencies, shares, strict=True)]
    return frequencies


def _blended(frequency: float, factor: float, kept: float) -> float:
    """kept = 1: the frequency; 0: the frequency divided by the factor."""
    return kept * frequency + (1 - kept) * frequency / factor


def _llama3_share(frequency: float, rope: RopeParameters) -> float:
    rotations = rope.original_max_position_embeddings * frequency / (2 * math.pi)
    return min(max((rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0), 1.0)


def _yarn_range(rope: RopeParameters, size: int) -> tuple[float, float]:
    """The pairs, as numbers, that rotate beta_fast and beta_slow times over the original length."""

    def pair(rotations: float) -> float:
        return (
            size * math.log(rope.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(rope.rope_theta))
        )

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    return low, high if high != low else high + 0.001
