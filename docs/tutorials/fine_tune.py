# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fine-tune a model and let it decide
#
# A language model reads the log of an unknown decision problem and says what to do next. This tutorial trains such a model,
# measures how much it loses on problems that it has never seen and which part of this loss is the model's own, and gets a
# decision from it. It takes about a minute of CPU time and no download: the model is small and starts from random weights. A
# pretrained model is trained by the same call.
#
# ## The problem
#
# A machine has three settings, numbered 0, 1 and 2. Each setting has a *reward*, one of 0, 0.1, ..., 1, which is the same at
# each trial and differs from machine to machine. Of a new machine there is a log of five trials, whose settings were drawn at
# random. Which setting should come next? A choice of this kind is called a *bandit*. In lindm it is the smallest *MDP* (Markov
# decision process): one state, one decision, three actions. A *suite* is a law from which such problems are drawn; a problem
# together with its log is a *task*.

# %%
from pathlib import Path

import numpy as np
from matplotlib import pyplot

import lindm as ld
from lindm.figures.style import BLUE, GRAY, GREEN, INK, RED, render
from lindm.llm.sft.metrics import draw_curves
from lindm.text import Step

STEPS, BATCH = 480, 16  # steps of training, and tasks in each
machines = ld.suite("mdp", horizon=1, states=1, actions=3, step=0.1, gap=0.0)
tasks = ld.draw_tasks(machines, tasks=8000, demos=5, behavior="uniform", seed=0)

first = next(iter(tasks))
print("rewards of the first machine:", first.problem().r.ravel())
trials = [(trial.action[0], trial.reward[0]) for trial in first.demonstrations]
print("its log, as (setting, reward):", trials)

# %% [markdown]
# In lindm's words the trials of a log are *demonstrations*, and `behavior="uniform"` says that their actions were random. The
# problem of each training task is known, so its best action is, too. It is the *label* that the model learns to predict, and it
# is computed, not guessed.
#
# ## Train
#
# The log is written as text: `#` begins an episode, `0` is the state, a capital letter the action, a number the reward. The model
# reads the text from left to right and predicts the best action at each trial and at the decision after the log. Training
# minimizes the *cross-entropy*, which is minus the logarithm of the probability that the model gives to the label. `held_out`
# keeps 3 % of the tasks out of the training; on these, the *held-out loss* is measured. Each other task is read at most once.
#
# What `ld.finetune` prints is folded below. There is the text of one task: `[[ ]]` is what is predicted, and `C != A` means
# that the trial was of A where the best action is C.

# %% tags=["hide-output"]
size = {"steps": STEPS, "batch": BATCH, "learning_rate": 1e-3}
tests = {"held_out": 0.03, "eval_every": 40, "eval_tasks": 100}
run = ld.finetune(tasks, "run", preset="tiny", seed=0, **size, **tests)

# %% [markdown]
# A loss does not say what a decision is worth. The *normalized optimality gap*, or gap, does: it is the reward lost against the
# best action, divided by what a random action loses. It is 0 for the best action and 1 for random actions. Both were measured
# during the training, on tasks that were held out.

# %%
evaluations = [record for record in run.metrics if record["kind"] == "eval"]
for one in evaluations[::3]:
    print(f"step {one['step']:3}: held-out loss {one['loss']:.3f}, gap {one['gap']:.3f}")
assert evaluations[-1]["loss"] < 0.9 < 5 < evaluations[0]["loss"]

# %% mystnb={"image": {"alt": "Two curves over the steps of training. Left: the loss falls steeply in the first steps and then slowly, on training batches and held out alike. Right: the gap of the model stays near that of behavior cloning, about 1, for the first steps, and then falls close to zero."}}
render(lambda: draw_curves(run.metrics), "training.png")

# %% [markdown]
# ## What does it lose on new problems?
#
# New machines are drawn from the same law, with another seed. Four policies read the same logs:
#
# - `sft:run` is the model of the directory `run`; SFT means supervised fine-tuning.
# - `bc`, *behavior cloning*, takes the most frequent action of the log. It ignores rewards.
# - `lsvi`, *least-squares value iteration*, fits the rewards of the actions and takes the largest.
# - `bayes` knows the law from which machines are drawn. It takes the action with the largest expected reward, given the log. No
#   policy that knows the law and the log alone earns more in the mean over all machines.

# %%
names = ["sft:run", "bc", "lsvi", "bayes"]
results = ld.evaluate(machines, names, tasks=200, demos=5, behavior="uniform")
for name, result in results.items():
    low, high = result.ci
    print(
        f"{name:8} gap {result.gap:.3f}, "
        f"95 % interval [{low:.3f}, {high:.3f}]; "
        f"best action in {result.action_agreement:.0%}"
    )
assert results["sft:run"].ci[1] < 0.5 * results["bc"].ci[0]

# %% [markdown]
# The interval is over machines. `bayes` is not at zero either: where a setting was never tried, the log does not contain its
# reward. So the gap of every policy has two parts. The first, *not in the context*, is the gap of `bayes`. The second, *lost by
# the reader*, is the rest, and only this part can become smaller by training. It may be slightly below zero, where a policy had more
# luck than `bayes` on these machines.

# %%
lost = {}
for name in ("sft:run", "bc", "lsvi"):
    split = results[name].loss_split
    lost[name], (low, high) = split.lost_by_reader, split.lost_by_reader_ci
    absent = split.not_in_context
    print(
        f"{name:8} {split.gap:.3f}: {absent:.3f} not in the context, "
        f"{lost[name]:.3f} lost by the reader [{low:.3f}, {high:.3f}]"
    )
    assert np.isclose(split.gap, absent + lost[name])
assert lost["sft:run"] < 0.15 < 0.7 < lost["bc"]


# %% mystnb={"image": {"alt": "A row for each policy with its normalized optimality gap and interval. Behavior cloning is near 1. The fine-tuned model and LSVI are close to the dashed line of the Bayes policy, the part of the gap that is not in the context, near 0.1."}}
def draw_gaps():
    figure, axes = pyplot.subplots(figsize=(6.4, 2.8))
    shown = {"bc": "behavior cloning", "sft:run": "fine-tuned model", "lsvi": "LSVI"}
    for row, (name, color) in enumerate(zip(shown, (RED, BLUE, GREEN), strict=True)):
        low, high = results[name].ci
        axes.plot([low, high], [-row, -row], color=color, marker="|", markersize=9)
        axes.plot([results[name].gap], [-row], color=color, marker="o", markersize=6)
    level = results["bayes"].gap
    axes.axvline(level, color=INK, linestyle="--", linewidth=1.2)
    axes.text(level + 0.015, 0.35, "not in the context (Bayes)", va="center", fontsize=9)
    axes.set_yticks([0, -1, -2], list(shown.values()))
    axes.set(xlabel="normalized optimality gap, 95 % interval over machines")
    axes.set(xlim=(0, None), ylim=(-2.5, 0.6))
    return figure


render(draw_gaps, "gaps.png")

# %% [markdown]
# The model has learned to read rewards from a log, which `bc` cannot do. What it lost as a reader is small; the interval says
# how surely. Here a program such as `bayes` makes the same decisions without any training, because the law of the machines is
# known and simple. A model is of use where no such program exists. Its result is that of one training: repeat it with other
# values of `seed` before you rely on it.
#
# ## Let the model decide
#
# This is the log of a machine of your own. Setting 2 was tried once and did best.

# %%
Path("log.csv").write_text("""\
episode,step,state,action,reward
monday,0,0,1,0.6
tuesday,0,0,0,0.3
wednesday,0,0,1,0.6
thursday,0,0,2,0.8
friday,0,0,0,0.3
""")
policy = ld.load_policy("run", temperature=1.0)  # with the model's own probabilities
log = ld.read_demonstrations("log.csv", policy.problem)
decision = policy.act(log, "0")  # the decision in state 0
print("setting", decision.action, "with probabilities", decision.probabilities.round(3))
assert decision.action == 2

# %% [markdown]
# Does the model use the rewards? Change one of them and let it decide again. On the left of the figure below, the reward of
# setting 2 goes from 0 to 1; the best other setting has 0.6. On the right, setting 2 was never tried, and the reward of setting
# 1, the best that was tried, changes. Since the mean of all rewards is 0.5, an untried setting is the better choice as long as
# the best tried one has less.

# %%
rewards = np.arange(11) / 10


def decide(*trials):
    """The probabilities of the settings after these trials (setting, reward)."""
    log = [[Step(setting, state=0, reward=float(reward))] for setting, reward in trials]
    return policy.act(log, "0").probabilities


tried = np.array(
    [decide((1, 0.6), (0, 0.3), (1, 0.6), (2, r), (0, 0.3)) for r in rewards]
)
untried = np.array(
    [decide((1, r), (0, 0.2), (1, r), (0, 0.2), (0, 0.2)) for r in rewards]
)
print("setting 2 tried:   chosen where its reward is", rewards[tried.argmax(1) == 2])
print("setting 2 untried: chosen where setting 1 has", rewards[untried.argmax(1) == 2])
assert tried[4].argmax() == 1 and tried[8].argmax() == 2  # rewards 0.4 and 0.8
assert untried[2].argmax() == 2 and untried[8].argmax() == 1  # rewards 0.2 and 0.8


# %% mystnb={"image": {"alt": "Probabilities of the three settings. Left: as the reward of setting 2 rises, the model changes from setting 1 to setting 2 where a dotted line marks the best other reward, 0.6. Right: setting 2 was never tried; as the reward of setting 1 rises, the model changes from the untried setting 2 to setting 1 near the dotted line at 0.5, the mean of all rewards."}}
def draw_answers():
    figure, axes = pyplot.subplots(1, 2, figsize=(7.6, 3.4), sharey=True)
    for axis, answers, border in zip(axes, (tried, untried), (0.6, 0.5), strict=True):
        for setting, (color, marker) in enumerate(
            ((GRAY, "o"), (GREEN, "s"), (BLUE, "^"))
        ):
            of_one = {"color": color, "marker": marker, "label": f"setting {setting}"}
            axis.plot(rewards, answers[:, setting], **of_one)
        axis.axvline(border, color=INK, linestyle=":", linewidth=1.2)
    axes[0].set(xlabel="reward of setting 2, tried once")
    axes[1].set(xlabel="reward of setting 1; 2 was never tried")
    axes[0].set(ylabel="probability of the model", ylim=(-0.02, 1.02))
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3
    )
    return figure


render(draw_answers, "answers.png")

# %% [markdown]
# The dotted lines are where the Bayes policy changes its choice, and the model changes near them. No text says that the mean
# is 0.5; the model learned this from the training tasks. Machines from another law need another training.
#
# ## What the run leaves

# %%
for path in sorted(Path("run").iterdir()):
    files = sorted(file.name for file in path.iterdir()) if path.is_dir() else []
    print(f"run/{path.name}", *files, sep="\n    ")
for name, value in ld.describe_model("run/model").items():
    print(f"{name:12} {value}")

# %% [markdown]
# `model` is a directory in the format of Hugging Face, which transformers and other programs load. `config.json` has the
# options, `metrics.jsonl` a line for each step and each evaluation, `curves` is the figure above, and `manifest.json` has a
# checksum of each file. An interrupted run goes on from the last of the `checkpoints`: the same call resumes it.
#
# The commands `lindm sft`, `lindm eval` and `lindm act` do the same. A pretrained model is fine-tuned with `model=` and its
# directory in place of `preset=`: [fine-tuning](../fine-tuning.md). Problems with hidden states, more decisions and names are in
# [families](../families.md) and [your own decision problem](../decision-problems.md).
