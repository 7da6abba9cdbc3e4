"""Write what a version of lindm computes, so that two versions can be compared.

    python tests/equivalence/freeze.py --lindm .venv/bin/lindm --out frozen/new

The outputs are: records of every experiment at its smoke preset, a small dataset of each suite, values of `lindm solve`, results
of `lindm eval`, and the metrics and weights of a short `lindm sft` run. `compare.py` compares two such directories. A finished
output is kept, so a second call resumes. `--behaviour` takes the flag names of commit 8881518, the state before the renames.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

FILES = Path(__file__).parents[1] / "lindm" / "problems" / "files"
EXPERIMENTS = [
    "against_statistics",
    "ambiguity",
    "belief_bounds",
    "bellman_horizon",
    "controls",
    "decisions",
    "dependence",
    "depth",
    "few_tasks",
    "gradient_flow",
    "isotropy",
    "ladder",
    "llm_law",
    "margin",
    "mechanism",
    "onehot_coverage",
    "risk",
    "shift",
    "softmax",
    "weights",
]
SUITES = {"mdp": "4", "pomdp": "4", "apomdp": "3"}
SOLVE = {"tiger": "5", "1d": "6", "4x3": "4"}


def jobs(out: Path, behavior_flag: str, eval_suite: list[str]) -> dict[str, list[str]]:
    """Name of each output -> the arguments of `lindm` that write it."""
    tiger = str(FILES / "tiger.pomdp")
    commands = {}
    for suite, horizon in SUITES.items():
        for split in ("id", "ood"):
            commands[f"data/{suite}-{split}"] = [
                *("data", "make", suite, "--tasks", "6", "--demos", "3", "--horizon", horizon, "--split", split, "--seed", "5"),
                *(behavior_flag, "epsilon"),
            ]
    commands["data/prostate"] = ["data", "make", "prostate", "--tasks", "2", "--demos", "2", "--horizon", "4"]
    commands["data/tiger"] = ["data", "make", tiger, "--tasks", "24", "--demos", "3", "--horizon", "4"]
    for name, horizon in SOLVE.items():
        commands[f"solve/{name}"] = ["solve", str(FILES / f"{name}.pomdp"), "--horizon", horizon, "--json"]
    commands["solve/prostate"] = ["solve", "prostate", "--horizon", "4", "--json"]
    for suite, horizon in SUITES.items():
        policies = ["oracle", "random", "behavior", "bc", "certainty-equivalence"]
        policies += ["lsvi", "pevi", "layer"] if suite == "mdp" else ["qmdp"]
        if behavior_flag == "--behaviour":
            policies = [name.replace("behavior", "behaviour") for name in policies]
        words = [word for policy in policies for word in ("--policy", policy)]
        commands[f"eval/{suite}"] = ["eval", *eval_suite, suite, "--horizon", horizon, "--tasks", "6", *words, "--json"]
    commands["sft/tiger"] = [
        *("sft", "--preset", "tiny", "--data", str(out / "data/tiger"), "--steps", "6", "--batch", "4", "--held-out", "0.25"),
        *("--eval-every", "3", "--save-every", "3"),
    ]
    for name in EXPERIMENTS:
        commands[f"runs/{name}"] = ["run", name, "--preset", "smoke"]
    return commands


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lindm", required=True, help="the lindm command of the version to freeze")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--only", default="", help="only the outputs whose name begins so")
    parser.add_argument("--behaviour", action="store_true", help="use the flag names of commit 8881518")
    given = parser.parse_args()
    out, failed = given.out.absolute(), []
    flags = ("--behaviour", ["--suite"]) if given.behaviour else ("--behavior", [])
    for name, words in jobs(out, *flags).items():
        done = out / f"{name}.done"
        if not name.startswith(given.only) or done.exists():
            continue
        done.parent.mkdir(parents=True, exist_ok=True)
        directory = [] if "--json" in words else ["--out", str(out / name)]
        process = subprocess.run([given.lindm, *words, *directory], capture_output=True, text=True, cwd=out)
        written = "--json" in words or (out / name).exists()
        if process.returncode not in (0, 1) or not written:  # 1: a verdict at the smoke preset is not the expected one
            failed.append(name)
            print(f"{name}: exit {process.returncode}: {process.stderr.strip()[-300:]}", file=sys.stderr)
            continue
        if "--json" in words:
            (out / f"{name}.json").write_text(json.dumps(json.loads(process.stdout), indent=1))
        done.write_text("")
        print(name, flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
