"""The data card: what a dataset is, how it was made and how to read it, for people who have only the files."""

import json

CONVENTIONS = """\
- A problem has a finite horizon `H`; stages count from 0. There is no discount: it is folded into the rewards, so that the reward
  of stage `h` counts as it stands, and values at any stage are in units of reward as of the start.
- `P[h, s, a, s']` is the probability of the next state. Its first axis has length 1 where the kernel is the same at every stage.
"""
OBSERVED = """\
- `O[h, a, s', o]` is the probability of observation `o` after action `a` that led to state `s'` (first axis as above). The first
  action is chosen before anything is seen. The state is recorded, but no label depends on it, nor on the rewards.
"""
AMBIGUOUS = """\
- The arrays have one more axis in front, over the models of the cloud. At every stage nature plays against the chosen action:
  with probability `alpha` it takes the worst model of the oracle's continuation, otherwise the best one. The stage's reward, next
  state and observation are that model's, and which it was is told (`model`). Values are values of this game, a stage-wise
  alpha-maxmin: `V = max_a [alpha min_m G_m + (1 - alpha) max_m G_m]`, with `G_m` the value of the action under model `m`.
"""
PROBLEM = "\n`problem` has one row: the arrays that all tasks share."
TASKS = {
    "task": "number of the task, from 0",
    "kind": "mdp, pomdp or apomdp",
    "horizon": "H, the number of decisions of an episode",
    "n_states": "S",
    "n_actions": "A",
    "n_observations": "O",
    "n_models": "M, the models of the cloud",
    "value": "of the oracle's play from the start, in units of reward: exact, or the middle of its bounds",
    "lower": "certified lower bound of the optimal value; the value where the oracle is exact",
    "upper": "certified upper bound, likewise",
    "uniform_value": "of uniformly random actions; only where the oracle is exact",
    "method": "of the oracle: backward induction or tree (exact), hsvi or net (certified bounds)",
}
ARRAYS = {
    "P": "transition probabilities, flattened in C order",
    "P_shape": "their shape, [H or 1, S, A, S]; of an apomdp with the models in front, here and below",
    "O": "observation probabilities, flattened",
    "O_shape": "their shape, [H or 1, A, S, O]",
    "r": "mean rewards, flattened",
    "r_shape": "their shape, [H, S, A]",
    "rho": "law of the first state, flattened",
    "rho_shape": "its shape, [S]",
    "alpha": "attitude to ambiguity in [0, 1]: 1 is the worst case",
}
EPISODES = {
    "task": "the task that the episode belongs to",
    "episode": "its number within the task and the role",
    "role": "demo or query",
    "state": "[H] before the action",
    "model": "[H] that nature took, after the action",
    "observation": "[H] of the next state, after the action",
    "action": "[H] that was taken",
    "reward": "[H] mean reward of the state and the action",
    "label": "[H] the oracle's action: for the state of an mdp, otherwise for the history of actions, models and observations; "
    "greedy in the lower bounds, so where the certificate is bounded it may differ from the argmax of Q",
    "Q": "[H, A] the oracle's action values there, in units of reward: exact, or the middle of its bounds",
    "certificate": "[H] of the label: 0 exact, 1 certified (no other action can be better), 2 bounded",
    "regret": "[H] at most this much is lost by the label at this step, in units of reward; 0 where exact or certified",
}
MEANS = {
    "mean_value": "value of the oracle's play, mean over tasks",
    "mean_lower": "lower bound of the optimal value, mean over tasks",
    "mean_upper": "upper bound of the optimal value, mean over tasks",
    "mean_uniform_value": "value of uniformly random actions, mean over tasks",
}
ACTS = {
    "oracle": "the oracle",
    "epsilon": "the oracle, but with a uniformly random action with probability {}",
    "uniform": "uniformly random actions",
}
READING = """\
```python
import json

rows = [json.loads(line) for line in open("tasks-00000.jsonl")]

import pyarrow.parquet  # or pandas.read_parquet, polars.read_parquet, ...

table = pyarrow.parquet.read_table("episodes-00000.parquet")

import datasets  # of Hugging Face

every = datasets.load_dataset("parquet", data_files="episodes-*.parquet", split="train")

from pathlib import Path

import lindm.datasets

for task, episodes in lindm.datasets.load(Path(".")):  # every file verified
    problem = lindm.datasets.problem_of(task)
```

An array has its shape again by `numpy.array(row["P"]).reshape(row["P_shape"])`.
"""


def card(manifest: dict) -> str:
    """README.md of a dataset, from its manifest alone."""
    config, totals = manifest["config"], manifest["totals"]
    recipe, source, sizes = config["recipe"], config["source"], config["source"]["sizes"]
    fixed, kind, exact = "problem" in source, sizes["kind"], config["oracle"] in ("backward induction", "tree")
    title = "one problem" if fixed else f"suite {source['suite']['name']}, split {source['suite']['split']}"
    patterns = {"episodes": "episodes-*.parquet", "tasks": "tasks-*.parquet"} | ({"problem": "problem.parquet"} if fixed else {})
    front = "".join(f"- config_name: {name}\n  data_files: {pattern}\n" for name, pattern in patterns.items())
    counts = {"tasks": totals["tasks"], "episodes": totals["episodes"], "labelled steps": totals["steps"]}
    counts |= {f"labels: {name}": f"{n / totals['steps']:.2%}" for name, n in totals["certificates"].items()}
    counts |= {MEANS[k]: f"{totals[k]:.6g}" for k in MEANS if k in totals and not (exact and k in ("mean_lower", "mean_upper"))}
    demos = ACTS[recipe["behavior"]].format(recipe["epsilon"])
    queries = ACTS[recipe["query_behavior"]].format(recipe["query_epsilon"])
    absent = set() if kind == "apomdp" else {"model", "alpha", "n_models"}
    absent |= {"observation", "O", "O_shape", "n_observations"} if kind == "mdp" else set()
    absent |= set() if exact else {"uniform_value"}
    arrays = {k: v for k, v in ARRAYS.items() if k not in absent}
    tables = [_table("episodes", {k: v for k, v in EPISODES.items() if k not in absent})]
    tasks = {k: v for k, v in TASKS.items() if k not in absent}
    tables += [_table("tasks", tasks), _table("problem", arrays)] if fixed else [_table("tasks", tasks | arrays)]
    made = {key: config[key] for key in ("source", "recipe", "names") if config[key]}
    return f"""\
---
license: {config["license"]}
task_categories:
- reinforcement-learning
tags:
- in-context-learning
- {kind}
configs:
{front}---

# Labelled episodes: {title}, horizon {sizes["horizon"]}

{"Every task is the same problem, only the episodes differ." if fixed else "Every task is another problem of one law."}
A task has demonstrations ({recipe["demos"]}) and queries ({recipe["queries"]}). Every step of both has the action of an oracle
that knows the problem, the oracle's action values, and a certificate that says how far the label can be trusted.

{_rows(counts)}
## How it was made

Demonstrations are made by {demos}; queries by {queries}. The oracle is `{config["oracle"]}`.
Task i draws from `fold_in(key({recipe["seed"]}), i)`, so a run with more tasks begins with these; for held-out tasks take another
seed. `manifest.json` has the versions, and the SHA-256 and the number of rows of every file. Made by
lindm {manifest["versions"]["lindm"]} from

```json
{json.dumps(made, indent=1, ensure_ascii=False)}
```

## Conventions

{CONVENTIONS}{"" if kind == "mdp" else OBSERVED}{AMBIGUOUS if kind == "apomdp" else ""}
## Files

Every table comes as Parquet and as JSON lines, with the same rows and the same numbers. `tasks-*` has a row per task,
`episodes-*` a row per episode: task after task, its demonstrations and then its queries.{PROBLEM if fixed else ""}

{"".join(tables)}## Reading

{READING}
## License

{config["license"]}
"""


def _rows(rows: dict) -> str:
    return "".join(["| | |\n|---|---|\n", *(f"| {name} | {what} |\n" for name, what in rows.items())])


def _table(name: str, columns: dict[str, str]) -> str:
    return f"### {name}\n\n{_rows({f'`{column}`': what for column, what in columns.items()})}\n"
