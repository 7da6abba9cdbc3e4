"""The claims: data in `claims.toml`, and in the TOML file beside an experiment from outside the package. Imports no jax.

A claim is a statement about a mean over seeds or tasks, or about a rate of violations, with a band for it.
"""

import hashlib
import json
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from math import inf
from pathlib import Path

from lindm.errors import DataError, UsageError, unknown
from lindm.io import inputs, limits

PASS, FAIL, INCONCLUSIVE = "PASS", "FAIL", "INCONCLUSIVE"
OPEN = "OPEN"  # expected where theory predicts nothing: any verdict is a result


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim and the numbers that decide it; `claims.toml` describes the fields."""

    id: str
    experiment: str
    statement: str
    source: str
    predicted: str
    criterion: str
    lo: float = -inf
    hi: float = inf
    min_seeds: int = 5
    expected: str = PASS

    def __post_init__(self) -> None:
        if not self.lo <= self.hi or (self.lo, self.hi) == (-inf, inf):
            raise ValueError(f"lo and hi must be a band with one finite end at least; got lo={self.lo}, hi={self.hi}")
        if self.min_seeds < 1:
            raise ValueError(f"min_seeds must be >= 1; got {self.min_seeds}")
        if self.expected not in (PASS, FAIL, OPEN):
            raise ValueError(f"expected must be PASS, FAIL or OPEN; got {self.expected!r}")


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One mistake in what decides a claim. `change` alters the records in place; it gets a copy of them."""

    claim: str
    mistake: str
    change: Callable[[list[dict]], None]


def read_claims(path: Path, experiment: str | None = None) -> dict[str, Claim]:
    """The claims of a TOML file, by id; `experiment` is the default of that field. DataError naming the file and the claim."""
    try:
        if not path.exists():
            raise DataError(f"{path}: no such file; the claims of an experiment are in a TOML file beside it")
        tables = tomllib.loads(inputs.read_text(path, limits.CLAIMS_FILE)).get("claim", [])
    except ValueError as e:
        raise DataError(f"{path}: not a TOML file: {e}") from e
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise DataError(f"{path}: claim must be a list of tables, [[claim]]; got {tables!r:.100}")
    types = {f.name: (float, int) if f.type is float else f.type for f in fields(Claim)}
    required = {f.name for f in fields(Claim) if f.default is MISSING}
    claims: dict[str, Claim] = {}
    for table in tables:
        values = ({"experiment": experiment} if experiment else {}) | table
        name = values.get("id", f"claim number {len(claims) + 1}")
        wrong = [k for k, v in values.items() if k not in types or not isinstance(v, types[k]) or isinstance(v, bool)]
        if wrong or required - values.keys():
            raise DataError(
                f"{path}: {name}: wrong or unknown: {wrong or 'none'}; missing: {sorted(required - values.keys()) or 'none'}"
            )
        if name in claims:
            raise DataError(f"{path}: {name} is given twice")
        band = {"lo": f"{values.get('lo', -inf):g}", "hi": f"{values.get('hi', inf):g}"}
        try:
            claims[name] = Claim(**values | {"criterion": values["criterion"].format(**band)})
        except (ValueError, LookupError) as e:
            raise DataError(f"{path}: {name}: {e}") from e
    return claims


PACKAGE_CLAIMS = Path(__file__).parents[1] / "claims.toml"
CLAIMS: dict[str, Claim] = read_claims(PACKAGE_CLAIMS)


def add_claims(claims: dict[str, Claim]) -> None:
    """Make the claims of an experiment from outside the package known in this process. UsageError for an id that is taken."""
    for id, claim in claims.items():
        if CLAIMS.setdefault(id, claim) != claim:
            raise UsageError(f"claim {id!r} belongs to the experiment {CLAIMS[id].experiment}; choose another id")


class UnknownClaimError(ValueError):
    """No claim has this id, `id`."""

    def __init__(self, id: str) -> None:
        super().__init__(unknown("claim", id, list(CLAIMS)))
        self.id = id


def get_claim(id: str) -> Claim:
    """The claim with this id; UnknownClaimError when there is none."""
    if id not in CLAIMS:
        raise UnknownClaimError(id)
    return CLAIMS[id]


def claim_ids(experiment: str) -> tuple[str, ...]:
    """The ids of the claims that an experiment decides, in the order of the file."""
    return tuple(c.id for c in CLAIMS.values() if c.experiment == experiment)


def claims_hash(ids: Sequence[str]) -> str:
    """SHA-256 of the content of these claims; which module measures them is not part of it."""
    content = [{k: v for k, v in asdict(get_claim(i)).items() if k != "experiment"} for i in sorted(ids)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
