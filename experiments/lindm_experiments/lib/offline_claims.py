"""What the records of `offline_data` say: gaps by cell, training and task, the verdicts on its claims, and its table."""

import numpy as np

from lindm_experiments.harness.claims import FAIL, PASS, get_claim
from lindm_experiments.harness.statistics import crossed, crossed_ci, equivalence
from lindm_experiments.harness.verdicts import EFFECTIVE, Verdict, mean_verdict, to_verdict, undecided
from lindm_experiments.lib.jumps import doublings_of_fall, evidence_of_jump, sequences_to_reach
from lindm_experiments.lib.offline_cells import CELLS, LAW, MAIN, REFERENCE

YARDSTICK = "bayes-demo"
LENGTHS = ("two", REFERENCE, "ten")  # cells that differ in the number of demonstrations of a training task
LOSSES = (REFERENCE, "soft", "regret", "cloning")


class Records:
    """The records of a run, by cell."""

    def __init__(self, records: list[dict]):
        self.trainings = [r for r in records if "cell" in r["point"]]
        self.tests = {(r["point"]["test"], r["point"]["demos"]): r["rows"] for r in records if "test" in r["point"]}
        self.main = next((name for name in MAIN if self.trainings_of(name)), None)
        self.law = next((name for name in LAW if self.trainings_of(name)), None)

    def trainings_of(self, name: str, n: int | None = None) -> list[dict]:
        """The trainings of a cell at n, or at its largest n."""
        mine = [r for r in self.trainings if r["point"]["cell"] == name]
        n = max((r["point"]["n"] for r in mine), default=0) if n is None else n
        return [r for r in mine if r["point"]["n"] == n]

    def sizes(self, name: str) -> list[int]:
        return sorted({r["point"]["n"] for r in self.trainings if r["point"]["cell"] == name})

    def sft(self, name: str, n: int | None = None, demos: int | None = None) -> np.ndarray:
        """Gaps [trainings, tasks] of the trained models."""
        key = str(CELLS[name].demos if demos is None else demos)
        return np.array([r["rows"][key]["gaps"] for r in self.trainings_of(name, n)], float)

    def row(self, name: str, policy: str, demos: int | None = None) -> dict | None:
        """The result of a policy on the test tasks of a cell; None where it was not measured."""
        cell = CELLS[name]
        wanted = cell.test(cell.demos if demos is None else demos)
        for (other, number), rows in self.tests.items():
            if CELLS[other].test(number) == wanted:
                return rows.get(policy)
        return None

    def policy(self, name: str, policy: str, demos: int | None = None) -> np.ndarray:
        """Its gaps [tasks]."""
        row = self.row(name, policy, demos)
        if row is None:
            raise KeyError(f"{policy} in the tests of {name}")
        return np.array(row["gaps"], float)

    def curves(self, name: str, value: str) -> tuple[np.ndarray, np.ndarray]:
        """Training sequences [points], and loss or gap [trainings, points] at the largest n, from the first evaluation after the
        start on."""
        curves = [r["curve"][1:] for r in self.trainings_of(name)]
        return np.array([p["sequences"] for p in curves[0]], float), np.array([[p[value] for p in c] for c in curves])

    def needed(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Sequences [trainings] until the gap of a model stays below that of bc on the same tasks, and whether it does at all.

        Where it does not, the number is that of the whole training, and the true one is larger.
        """
        n, gaps = self.curves(name, "gap")
        levels = self.curves(name, "bc")[1][:, 0]
        found = [sequences_to_reach(n, curve, level) for curve, level in zip(gaps, levels, strict=True)]
        return np.array([x or n[-1] for x in found]), np.array([x is not None for x in found])


def check(records: list[dict]) -> list[Verdict]:
    """The verdicts on all claims of the experiment."""
    r = Records(records)
    verdicts = [_compared(r, *of) for of in COMPARED]
    verdicts += [_jump(r), _data(r), _quality(r), _loss(r), _lengths(r), _names(r), _pretrained(r)]
    return verdicts


COMPARED = (  # claim, policy, factor of its gap, a name for it
    ("offline/beats-demonstrator", "behavior", 1.0, "demonstrator"),
    ("offline/beats-majority", "bc", 1.0, "bc"),
    ("offline/beats-lsvi", "lsvi", 1.0, "LSVI"),
    ("offline/near-bayes", YARDSTICK, 1.25, "yardstick"),
)


def _over_trainings_and_tasks(id: str, values: np.ndarray, figure: str, note: str) -> Verdict:
    claim = get_claim(id)
    decision = crossed(values, claim.lo, claim.hi, min_seeds=claim.min_seeds)
    return to_verdict(id, decision, predicted=claim.predicted, figure=figure, note=note)


def _compared(r: Records, id: str, policy: str, factor: float, label: str) -> Verdict:
    if r.main is None or r.row(r.main, policy) is None:
        return undecided(id, "the base cell was not measured")
    effective = (r.row(r.main, policy) or {}).get("effective_samples")
    if effective and effective[1] < EFFECTIVE:
        return undecided(id, f"the sample of the {label} is too small: an effective size of {effective[1]:.1f}")
    mine, theirs = r.sft(r.main), r.policy(r.main, policy)
    note = f"normalized gap, model {mine.mean():.3f}, {label} {theirs.mean():.3f}; {len(mine)} trainings, {len(theirs)} tasks"
    return _over_trainings_and_tasks(id, mine - factor * theirs, "law", note)


def _jump(r: Records) -> Verdict:
    if r.main is None:
        return undecided("offline/jump", "the base cell was not measured")
    n, losses = r.curves(r.main, "loss")
    evidence = np.array([evidence_of_jump(n, loss) for loss in losses])
    note = f"difference of the BIC for a point of the curve {evidence.mean():.2f}; " + _described(*r.needed(r.main))
    sharpness = [doublings_of_fall(n, loss) for loss in losses]
    if not np.isfinite(sharpness).all():
        return undecided("offline/jump", f"a loss does not fall to a quarter; {note}")
    least = equivalence(evidence, 0.0, np.inf, min_seeds=get_claim("offline/jump").min_seeds)
    return mean_verdict("offline/jump", sharpness, also=[least], figure="curves", note=note)


def _described(needed: np.ndarray, reached: np.ndarray) -> str:
    numbers = (f"{n:,.0f}" if ok else f"more than {n:,.0f}" for n, ok in zip(needed, reached, strict=True))
    return "sequences until it stays below bc: " + " / ".join(numbers)


def _fewer(id: str, mine: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray], figure: str, note: str) -> Verdict:
    """Do models need at most as many sequences as others, in the mean over trainings of the log2 of the ratio?

    Where one of a pair does not get below bc, the ratio is a limit that can decide in one direction alone.
    """
    k = max(len(mine[0]), len(other[0]))
    (needed, reached), (others, others_reached) = (tuple(np.resize(x, k) for x in side) for side in (mine, other))
    if not (reached | others_reached).all():
        return undecided(id, f"neither gets below bc; {note}")
    verdict = mean_verdict(id, np.log2(needed / others), figure=figure, note=note)
    only_larger, only_smaller = not reached.all(), not others_reached.all()
    if (verdict.verdict == PASS and only_larger) or (verdict.verdict == FAIL and only_smaller):
        return undecided(id, f"the ratio is a limit; {note}")
    return verdict


def _data(r: Records) -> Verdict:
    if r.law is None or len(r.sizes(r.law)) < 2:
        return undecided("offline/data", "one number of training tasks was measured")
    sizes, theirs = r.sizes(r.law), r.policy(r.law, "bc")
    note = "gap at n tasks: " + ", ".join(f"{n:,} {r.sft(r.law, n).mean():.3f}" for n in sizes)
    note += f"; bc {theirs.mean():.3f}"
    return _over_trainings_and_tasks("offline/data", r.sft(r.law, sizes[0]) - theirs, "law", note)


def _quality(r: Records) -> Verdict:
    cells = ("oracle", "quarter", REFERENCE, "uniform")
    if not all(r.trainings_of(name) for name in cells):
        return undecided("offline/quality", "the demonstrators were not all measured")
    means = ", ".join(f"{CELLS[c].epsilon:g}: {r.sft(c).mean():.3f} / {r.policy(c, YARDSTICK).mean():.3f}" for c in cells)
    worst, best = r.sft("uniform"), r.sft("oracle")
    k = min(len(worst), len(best))
    return _over_trainings_and_tasks(
        "offline/quality", worst[:k] - best[:k], "factors", f"gap of model / yardstick by share of random actions, {means}"
    )


def _loss(r: Records) -> Verdict:
    if not all(r.trainings_of(name) for name in LOSSES):
        return undecided("offline/loss", "the losses were not all measured")
    labels = {name: "oracle's action" if name == REFERENCE else CELLS[name].label for name in LOSSES}
    note = "; ".join(f"{labels[name]}: {_described(*r.needed(name))}" for name in LOSSES)
    return _fewer("offline/loss", r.needed("soft"), r.needed(REFERENCE), "factors", note)


def _lengths(r: Records) -> Verdict:
    if not all(r.trainings_of(name) for name in LENGTHS):
        return undecided("offline/training-length", "the numbers of demonstrations were not all measured")
    tested = CELLS[REFERENCE].test_demos
    k = min(len(r.trainings_of(name)) for name in LENGTHS)
    bayes = np.array([r.policy(REFERENCE, YARDSTICK, M).mean() for M in tested])
    tables = np.array([[[r.sft(name, demos=M)[i].mean() for M in tested] for name in LENGTHS] for i in range(k)])
    shares = [unexplained(table - bayes) for table in tables]
    rows = "; ".join(
        f"trained at {CELLS[name].demos}: " + " / ".join(f"{x:.3f}" for x in tables.mean(0)[j]) for j, name in enumerate(LENGTHS)
    )
    note = f"gap asked at {' / '.join(map(str, tested))}, {rows}; yardstick " + " / ".join(f"{x:.3f}" for x in bayes)
    return mean_verdict("offline/training-length", shares, figure="lengths", note=note)


def unexplained(table: np.ndarray) -> float:
    """Of the variance that the means of the columns of a table [N, M] leave, the share that a part for each row leaves, too."""
    left = table - table.mean(0)
    rest = left - left.mean(1)[:, None]
    return float((rest**2).sum() / (left**2).sum()) if left.any() else 0.0


def _names(r: Records) -> Verdict:
    pair = ("pretrained-names", "pretrained-symbols")
    if not all(r.trainings_of(name) for name in pair):
        return undecided("offline/names", "the pretrained model was not measured with names and with symbols")
    mine, symbols = (r.sft(name)[:1] for name in pair)
    note = f"gap of the pretrained model with names {mine.mean():.3f}, with symbols {symbols.mean():.3f}; one training of each"
    if all(r.trainings_of(name) for name in ("names", "symbols")):
        note += f"; randomly initialized {r.sft('names').mean():.3f} and {r.sft('symbols').mean():.3f}"
    return _over_trainings_and_tasks("offline/names", mine - symbols, "factors", note)


def _pretrained(r: Records) -> Verdict:
    if r.main is None or not r.trainings_of("pretrained"):
        return undecided("offline/pretrained", "the pretrained model was not measured")
    mine, tiny = r.needed("pretrained"), r.needed(r.main)
    note = f"pretrained, one training: {_described(*mine)}; randomly initialized: {_described(*tiny)}"
    return _fewer("offline/pretrained", mine, tiny, "curves", note)


def table(records: list[dict]) -> list[dict]:
    """A row for each policy in the tests of each cell: its gap, and what of it the reader lost; 95 % intervals."""
    r, rows = Records(records), []
    for (name, demos), policies in r.tests.items():
        for policy, row in policies.items():
            rows.append(_row(r, name, demos, policy, np.array([row["gaps"]], float), row))
    for name, cell in CELLS.items():
        for n in r.sizes(name):
            for demos in cell.test_demos:
                first = r.trainings_of(name, n)[0]["rows"][str(demos)]
                rows.append(_row(r, name, demos, "sft", r.sft(name, n, demos), first) | {"n": n})
    return rows


def _row(r: Records, name: str, demos: int, policy: str, gaps: np.ndarray, row: dict) -> dict:
    mean, (low, high) = crossed_ci(gaps)
    made = {
        "cell": name,
        "demos": demos,
        "policy": policy,
        "n": None,
        "trainings": len(gaps),
        "gap": mean,
        "low": low,
        "high": high,
    }
    if r.row(name, YARDSTICK, demos) is not None:
        lost, (least, most) = crossed_ci(gaps - r.policy(name, YARDSTICK, demos))
        made |= {"lost": lost, "lost_low": least, "lost_high": most}
    effective = (row.get("effective_samples") or (None, None))[1]
    return made | {"method": row["method"], "error": row.get("error"), "effective_samples": effective}
