"""The data card, README.md of a dataset: its content, how it was made and how to read it."""

import json

from lindm.datasets.columns import KEY_COLUMNS, LABEL_COLUMNS, PROBLEM_COLUMNS, STEP_COLUMNS, TASK_COLUMNS

CARD = "README.md"
CONVENTIONS = """\
- A problem has a finite horizon `H`; stages count from 0. The discount is gamma = {discount}.
- `reward` is what the environment paid at this very step, not discounted. `discounted_mean_reward` is `gamma^h E[R]` given the
  state and the action at stage `h`: gamma is folded into it, as into the array `r`, so that it counts as it stands, and values,
  `Q` and `regret` of any stage are in units of reward as of the start.
"""
OBSERVED = """\
- `O[h, a, s', o]` is the probability of observation `o` after action `a` that led to state `s'` (first axis as above). The first
  action is chosen before anything is seen. The state is recorded, but no label depends on it, nor on the rewards.
"""
AMBIGUOUS = """\
- The arrays have one more axis in front, over the models. At every stage nature plays against the chosen action: with
  probability `alpha` it takes the worst model of the oracle's continuation, otherwise the best one. The stage's reward, next
  state and observation are that model's, and the column `model` names it. Values are values of this game, a stage-wise
  alpha-maxmin: `V = max_a [alpha min_m G_m + (1 - alpha) max_m G_m]`, with `G_m` the value of the action under model `m`.
"""
LICENSE = "apache-2.0"
MINARI_REWARDS = (
    "rewards are what the environment paid at each step, not discounted; the value of an episode is the sum of discount^h times "
    "the reward of stage h; infos/discounted_mean_reward is discount^h E[R] given the state and the action, and Q and regret are "
    "sums of it"
)
PROBLEM = "\n`problem` has one row: the arrays that all tasks share."
MEANS = {
    "mean_value": "value of the oracle's policy, mean over tasks",
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

episodes = datasets.load_dataset("parquet", data_files="episodes-*.parquet", split="train")

from pathlib import Path

import lindm.datasets

for task in lindm.datasets.Dataset(Path(".")):  # every file verified
    problem, demonstrations, queries = task.problem(), task.demonstrations, task.queries
```

An array has its shape again by `numpy.array(row["P"]).reshape(row["P_shape"])`.
"""


def card(manifest: dict) -> str:
    """README.md of a dataset, from its manifest alone."""
    config, totals = manifest["config"], manifest["totals"]
    options, source, sizes = config["dataset"], config["source"], config["source"]["sizes"]
    fixed, kind, exact = "problem" in source, sizes["kind"], config["oracle"] in ("backward induction", "tree")
    title = "one problem" if fixed else f"suite {source['suite']['name']}, split {source['suite']['split']}"
    patterns = {"episodes": "episodes-*.parquet", "tasks": "tasks-*.parquet"} | ({"problem": "problem.parquet"} if fixed else {})
    front = "".join(f"- config_name: {name}\n  data_files: {pattern}\n" for name, pattern in patterns.items())
    counts = {"tasks": totals["tasks"], "episodes": totals["episodes"], "labeled steps": totals["steps"]}
    counts |= {f"labels: {name}": f"{n / totals['steps']:.2%}" for name, n in totals["certificates"].items()}
    counts |= {MEANS[k]: f"{totals[k]:.6g}" for k in MEANS if k in totals and not (exact and k in ("mean_lower", "mean_upper"))}
    demos = ACTS[options["behavior"]].format(options["epsilon"])
    queries = ACTS[options["query_behavior"]].format(options["query_epsilon"])
    absent = set() if kind == "apomdp" else {"model", "alpha", "num_models"}
    absent |= {"observation", "O", "O_shape", "num_observations"} if kind == "mdp" else set()
    absent |= set() if exact else {"uniform_value"}
    absent |= set() if config["source"].get("illegal_actions") else {"legal", "legal_shape"}
    absent |= set() if any(shard["reward_function"] for shard in manifest["shards"]) else {"R", "R_shape"}
    arrays = {k: v for k, v in PROBLEM_COLUMNS.items() if k not in absent}
    described = KEY_COLUMNS | {name: column.description for name, column in (STEP_COLUMNS | LABEL_COLUMNS).items()}
    tables = [_table("episodes", {k: v for k, v in described.items() if k not in absent})]
    tasks = {k: v for k, v in TASK_COLUMNS.items() if k not in absent}
    tables += [_table("tasks", tasks), _table("problem", arrays)] if fixed else [_table("tasks", tasks | arrays)]
    discount = config["rewards"]["discount"]
    made = {key: config[key] for key in ("source", "dataset", "names") if config[key]}
    return f"""\
---
license: {LICENSE}
task_categories:
- reinforcement-learning
tags:
- in-context-learning
- {kind}
configs:
{front}---

# Labeled episodes: {title}, horizon {sizes["horizon"]}

{"Every task is the same problem, only the episodes differ." if fixed else "Every task is another problem of one law."}
A task has demonstrations ({options["demos"]}) and queries ({options["queries"]}). Every step of both has the action of an oracle
that knows the problem, the oracle's action values, and a certificate that says how far the label can be trusted.

{_rows(counts)}
## How it was made

Demonstrations are made by {demos}; queries by {queries}. The oracle is `{config["oracle"]}`.
The key of task i is `fold_in(key({options["seed"]}), i)`: a dataset with more tasks begins with these, and held-out tasks need
another seed. `manifest.json` has the versions, and the SHA-256 and the number of rows of every file. Made by
lindm {manifest["versions"]["lindm"]} from

```json
{json.dumps(made, indent=1, ensure_ascii=False)}
```

## Conventions

{CONVENTIONS.format(discount=discount)}{"" if kind == "mdp" else OBSERVED}{AMBIGUOUS if kind == "apomdp" else ""}
## Files

Every table comes as Parquet and as JSON lines, with the same rows and the same numbers. `tasks-*` has a row per task,
`episodes-*` a row per episode: task after task, its demonstrations and then its queries.{PROBLEM if fixed else ""}

{"".join(tables)}## Reading

{READING}
## License

{LICENSE}
"""


def trl_card(discount: float, rewards_shown: bool) -> str:
    """README.md of an export for TRL."""
    shown = "Rewards in the texts are those that the environment paid at each step; they are not discounted."
    rewards = shown if rewards_shown else "The texts show no rewards."
    return f"""\
---
license: {LICENSE}
configs:
- config_name: prompt_completion
  data_files: prompt_completion.jsonl
- config_name: messages
  data_files: messages.jsonl
discount: {discount!r}
rewards: {rewards}
---

# Labeled episodes for supervised fine-tuning

Answers are the actions of an oracle that maximizes the expected sum of gamma^h times the reward of stage h; gamma = {discount!r}.
{rewards}

```python
import datasets

rows = datasets.load_dataset("json", data_files="messages.jsonl", split="train")  # or prompt_completion.jsonl
```

TRL's `max_length` cuts rows at their end, where the answers are. With `messages` set `assistant_only_loss=True`.
"""


def _rows(rows: dict) -> str:
    return "".join(["| | |\n|---|---|\n", *(f"| {name} | {what} |\n" for name, what in rows.items())])


def _table(name: str, columns: dict[str, str]) -> str:
    return f"### {name}\n\n{_rows({f'`{column}`': what for column, what in columns.items()})}\n"
