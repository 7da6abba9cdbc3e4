# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From a POMDP of your own to a decision
#
# A patient was treated, and the disease may return. Every quarter of a year the clinic waits, makes a scan, or treats again.
# The state of the disease is hidden: what the clinic sees are signs, and signs can be wrong. Such a problem is a *POMDP*, a
# partially observable Markov decision process. This tutorial writes one, computes its best decisions, compares rules of thumb
# with them, makes labeled data of it, and decides for one patient. The numbers are made up; with rates of your own, the program
# stays the same.
#
# ## Write the problem
#
# A POMDP has *states* (the condition), *actions* (what is done) and *observations* (what is seen after an action). In
# Cassandra's text format, a row of `T` has the probabilities of the next state, a row of `O` those of the observation, given
# the state that the action led to, and `R` is the *reward* of a quarter: here 1 is a quarter in full health, and scans and
# treatments cost a part of it. A reward that comes a quarter later counts `discount` times as much. `start` is the *belief* at
# the start: the probabilities of the states.

# %%
from pathlib import Path

import numpy as np
from matplotlib import pyplot

import lindm as ld
from lindm.datasets import Dataset
from lindm.figures.beliefs import belief_values, draw_belief_values
from lindm.figures.policy_graph import draw_policy_graph
from lindm.figures.style import BLUE, GRAY, render

Path("patient.pomdp").write_text("""\
discount: 0.95
values: reward
states: well early late
actions: wait scan treat
observations: quiet signs
start: 0.85 0.12 0.03

T: wait
0.88 0.12 0.00
0.00 0.65 0.35
0.00 0.00 1.00
T: scan
0.88 0.12 0.00
0.00 0.65 0.35
0.00 0.00 1.00
T: treat
0.95 0.05 0.00
0.80 0.10 0.10
0.20 0.10 0.70

O: *
0.90 0.10
0.70 0.30
0.30 0.70
O: scan
0.95 0.05
0.10 0.90
0.05 0.95

R: wait : well : * : * 1.0
R: wait : early : * : * 0.9
R: wait : late : * : * 0.3
R: scan : well : * : * 0.92
R: scan : early : * : * 0.82
R: scan : late : * : * 0.22
R: treat : well : * : * 0.6
R: treat : early : * : * 0.5
R: treat : late : * : * 0.1
""")
patient = ld.read_pomdp("patient.pomdp", horizon=8)
print(patient.states, patient.actions, patient.observations)

# %% [markdown]
# A row that does not sum to one, a name that is not declared and the like are errors with the line of the file. What lindm
# cannot see is a wrong number: it solves the problem as it is written.
#
# ## Solve it exactly
#
# The *horizon* is the number of decisions, here 8 quarters. A *history* is what was done and seen so far, and a *policy*
# chooses an action for every history. The *value* of a policy is its expected sum of discounted rewards. With 3 actions and 2
# observations there are few enough histories to take the best action at each of them: the tree of all histories is solved from
# its leaves to its root, and the value is that of the best policy, up to rounding.

# %%
solution = ld.solve(patient)
print(
    f"value {solution.value:.4f} by {solution.method}, exact: {solution.exact}; "
    f"first action: {solution.first_action}"
)

# %% [markdown]
# ## Bounds where the tree is too large
#
# The number of histories is multiplied by 6 in every quarter. For a long horizon, and for one without an end, lindm searches
# along good play and returns certified *bounds*: a policy that earns at least the lower bound, and a proof that no policy earns
# more than the upper bound. The search ends when they are as close as `tolerance` says.

# %%
endless = ld.read_stationary_pomdp("patient.pomdp")
bounded = {
    horizon: ld.solve_stationary(endless, horizon, tolerance="1%")
    for horizon in (8, 20, np.inf)
}
for horizon, found in bounded.items():
    print(
        f"{horizon:>3} quarters: value in [{found.lower:.4f}, {found.upper:.4f}], "
        f"first action {found.first_action}"
    )
assert bounded[8].lower <= solution.value <= bounded[8].upper

# %% [markdown]
# The exact value of 8 quarters lies between the bounds that the search found for them, as it must.
#
# ## A policy that a clinic can carry out
#
# The policy of the search may be drawn as a graph that needs no computation of beliefs: a box is an action, and an arrow says
# where to go on after an observation. Boxes that are nearly alike become one. What the graph earns is computed exactly.

# %% mystnb={"image": {"alt": "A policy graph of seven boxes, each with an action, and arrows for quiet and signs. The start is box 1, scan: quiet leads to box 2, wait, and signs to box 3, treat. From box 2, quiet leads back to the scan and signs to a treatment."}}
endless_solution = bounded[np.inf]
graph = endless_solution.graph()
print(
    f"the graph earns {graph.value:.4f}; "
    f"no policy earns more than {endless_solution.upper:.4f}"
)
print("\n".join(graph.rules()))
render(lambda: draw_policy_graph(graph), "patient-graph.png")

# %% [markdown]
# Where does the best action change? With three states, a belief is a point of a triangle, with a corner for each state that is
# certain.

# %% mystnb={"image": {"alt": "Two triangles of beliefs with the corners well, early and late. Left: the value is highest near the corner well and falls toward the corner late. Right: the best first action is wait or scan in a small part near the corner well and treat in the rest."}}
values = belief_values(endless, relative=0.02)
for action in np.unique(values.actions):
    share = (values.actions == action).mean()
    name, count = endless.actions[action], len(values.beliefs)
    print(f"{name:5}: best at {share:.0%} of {count} beliefs")
render(lambda: draw_belief_values(values, endless, np.inf), "patient-beliefs.png")

# %% [markdown]
# Not every hexagon is certain: where the bounds of two actions overlap, the one with the larger lower bound is shown.
#
# ## What rules of thumb lose
#
# A policy of your own is a function of the history: a list of steps with `action` and `observation` as numbers, the last one
# still open. *QMDP* is a well-known rule for POMDPs that assumes that the state will be seen from the next quarter on. The
# *loss* of a policy is the value of the best policy minus its own. It is exact here, because every history that the policy can
# reach is enumerated. The *normalized optimality gap* divides it by the loss of uniformly random actions: 0 is optimal, 1 is
# random.

# %%
WAIT, SCAN, TREAT = range(3)


def wait_and_see(demonstrations, history):
    return WAIT


def treat_after_signs(demonstrations, history):
    return TREAT if len(history) > 1 and history[-2].observation == 1 else WAIT


def scan_every_second_quarter(demonstrations, history):
    if len(history) > 1 and history[-2].observation == 1:
        return TREAT
    return SCAN if len(history) % 2 else WAIT


def scan_until_the_last_year(demonstrations, history):
    return (
        WAIT if len(history) > 4 else scan_every_second_quarter(demonstrations, history)
    )


endless_solution.save("patient.json")
policies = {
    "optimal": solution.policy,
    "graph without an end": ld.load_saved_policy("patient.json", endless),
    "QMDP": ld.policies.qmdp(),
    "scan every second quarter": scan_every_second_quarter,
    "the same until the last year": scan_until_the_last_year,
    "treat after signs": treat_after_signs,
    "wait": wait_and_see,
    "uniformly random": ld.policies.random(),
}
results = ld.evaluate(patient, policies, tasks=1, demos=1)
for name, result in results.items():
    print(
        f"{name:28} gap {result.gap:.3f}, loss {result.suboptimality:.4f} "
        f"({result.method})"
    )

# %% mystnb={"image": {"alt": "Exact losses of eight policies over 8 quarters as points, from the optimal policy with loss 0 at the top to the uniformly random policy with the largest loss at the bottom."}}
names = sorted(results, key=lambda name: results[name].suboptimality)


def draw_losses():
    figure, axis = pyplot.subplots(figsize=(7.0, 3.0))
    for row, name in enumerate(names):
        loss = results[name].suboptimality
        axis.plot(
            loss,
            row,
            "o",
            color=GRAY if name in ("optimal", "uniformly random") else BLUE,
            markersize=7,
        )
        axis.annotate(
            f"{loss:.3f}",
            (loss, row),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(
        xlabel="exact loss over 8 quarters, in quarters of full health",
        title="What policies lose",
    )
    axis.margins(x=0.12)
    return figure


render(draw_losses, "patient-losses.png")

# %% [markdown]
# Two lessons. First, the horizon is a part of the question. The graph is nearly the best policy without an end, and here it
# loses more than most rules: it treats and scans for a future that 8 quarters do not have. A rule of thumb that stops scans and
# treatments in the last year loses a small part of what it loses otherwise. Where the patient lives on after the horizon, the
# problem without an end is the right one. Second, information has a price: QMDP never scans, as a scan costs more than waiting
# and it expects to see the state anyway, and the rule that scans in the first year loses less.

# %%
loss = {name: result.suboptimality for name, result in results.items()}
assert abs(loss["optimal"]) < 1e-9 and graph.value > 0.98 * endless_solution.upper
assert (
    loss["graph without an end"]
    > loss["scan every second quarter"]
    > 5 * loss["the same until the last year"]
)
assert (
    0
    < loss["the same until the last year"]
    < loss["QMDP"]
    < loss["treat after signs"]
    < loss["wait"]
)

# %% [markdown]
# ## Labeled data
#
# Models that learn to decide need data: *episodes*, each with the best action and the action values of every step as labels.
# Here a clinic acts well but takes a random action with probability 0.2, and the labels say what it should have done.
# `certificate` 0 means that a label is exact.

# %%
made = ld.make_dataset(
    patient, "patients", tasks=20, demos=3, behavior="epsilon", epsilon=0.2, seed=0
)
episodes = [
    episode for task in Dataset(Path("patients")) for episode in task.demonstrations
]
taken = np.array([episode.action for episode in episodes])
labels = np.array([episode.label for episode in episodes])
exact = np.mean([episode.certificate for episode in episodes] == np.zeros(taken.shape))
print(
    f"{len(episodes)} episodes of {taken.shape[1]} steps, {made.made} shard; "
    f"labels exact: {exact:.0%}"
)
share = (taken == labels).mean()
print(f"the clinic took the labeled action at {share:.0%} of the steps")
first = zip(taken[0], episodes[0].observation, labels[0], strict=True)
print(
    *(
        f"{patient.actions[a]}->{patient.observations[o]} (best: {patient.actions[b]})"
        for a, o, b in first
    ),
    sep="\n",
)

# %% [markdown]
# ## A decision
#
# One patient: the scan of the first quarter was quiet, the clinic waited, and then there were signs. The belief follows by
# Bayes' rule, and the action values are exact: each is the value of this action now and of the best ones afterward. In the
# second history the signs come from a scan.

# %%
oracle = ld.policies.oracle()
for history in ("scan quiet wait signs", "scan quiet scan signs"):
    decision = oracle.act((), history, patient)
    beliefs = zip(patient.states, decision.belief, strict=True)
    values = zip(patient.actions, decision.Q, strict=True)
    belief = ", ".join(f"{state} {p:.3f}" for state, p in beliefs)
    value = ", ".join(f"{action} {q:.4f}" for action, q in values)
    print(f"{history}: {decision.action}\n    belief: {belief}\n    values: {value}")

# %% [markdown]
# Signs without a scan are weak evidence, and the best decision is a scan; it is a close one, as the values show. After signs in
# a scan, treating is the best decision by far. The graph of the problem without an end treats after both:

# %%
assert [
    oracle.act((), f"scan quiet {seen} signs", patient).action
    for seen in ("wait", "scan")
] == ["scan", "treat"]
rule = ld.load_saved_policy("patient.json", endless)
print(
    "without an end:",
    *(rule.act((), f"scan quiet {seen} signs").action for seen in ("wait", "scan")),
)

# %% [markdown]
# ## Before you trust a decision
#
# - Solve with other rates that you find possible: does the decision change? Several models of one problem make an *ambiguous*
#   POMDP, which has a best decision of its own ([from two experts, or from logs, to
#   decisions](../from-experts-to-decisions.md)).
# - Is the value exact, or are there bounds? `solution.exact` and `method` of each result say so.
#
# Where to go on: all ways to a problem are in [add a decision problem](../how-to/problem.md), every option of solving and of
# data in [your own decision problem](../decision-problems.md), and policies of your own in [add a policy](../how-to/policy.md).
# To fine-tune a language model on the data of this page, see [fine-tuning](../fine-tuning.md).
