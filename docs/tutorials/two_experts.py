# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Two experts who disagree
#
# Two experts describe the same decision problem with different probabilities, and nobody knows who is right. This tutorial
# computes what each of them would do, what the advice of one costs if the other is right, and what it is worth to know who is
# right. It then shows how the decision depends on one's attitude to not knowing, and takes a decision for an observed history.
#
# The example is a disease that may progress. Six times, every three months, a doctor chooses one of three actions: *wait*;
# *test*, which costs a little and is more informative; or *treat*, which has side effects. The numbers are made up for this page and are
# no medical advice. With a machine in place of the patient and a replacement in place of the treatment it is a problem of
# maintenance.

# %%
from pathlib import Path

import numpy as np
from matplotlib import pyplot
from matplotlib.colors import ListedColormap

import lindm as ld
from lindm.figures.style import BLUE, INK, ORANGE, PURPLE, RED, SKY, render

# %% [markdown]
# ## The problem, as each expert sees it
#
# The problem is a *POMDP*, a partially observable Markov decision process. The *state* of the patient (early, advanced or
# recovered) is hidden. After each action comes an *observation*, a normal or a raised marker, and a *reward*, in points for the
# quality of life. The *belief* is what is known of the state: its probabilities, given all actions and observations so far.
#
# The experts agree on the rewards and on the meaning of the markers. They disagree on two numbers: the probability that the disease
# advances within three months, and the probability that a treatment works once it has. Each writes a file in Cassandra's text
# format. A row of `T` has the probabilities of the next state, a row of `O` those of the observation, given the state that the
# action led to; `R` are the rewards, and `start` is the belief at the start.

# %%
DISEASE = """
discount: 1.0
values: reward
states: early advanced recovered
actions: wait test treat
observations: normal raised
start: 0.8 0.2 0.0

T: wait
{stays} {advances} 0.0
0.0 1.0 0.0
0.0 0.0 1.0
T: test
{stays} {advances} 0.0
0.0 1.0 0.0
0.0 0.0 1.0
T: treat
0.05 0.0 0.95
0.0 {fails} {works}
0.0 0.0 1.0

O: *
0.8 0.2
0.4 0.6
0.9 0.1
O: test
0.95 0.05
0.1 0.9
0.9 0.1

R: wait : early : * : * 1.0
R: wait : advanced : * : * 0.2
R: wait : recovered : * : * 0.8
R: test : early : * : * 0.9
R: test : advanced : * : * 0.1
R: test : recovered : * : * 0.7
R: treat : early : * : * 0.5
R: treat : advanced : * : * 0.1
R: treat : recovered : * : * 0.2
"""
VIEWS = {
    "slow": {"stays": 0.95, "advances": 0.05, "works": 0.8, "fails": 0.2},
    "fast": {"stays": 0.75, "advances": 0.25, "works": 0.4, "fails": 0.6},
}
HORIZON = 6  # number of decisions

for name, view in VIEWS.items():
    Path(f"{name}.pomdp").write_text(DISEASE.format(**view))
experts = {name: ld.read_pomdp(f"{name}.pomdp", horizon=HORIZON) for name in VIEWS}
solutions = {name: ld.solve(expert) for name, expert in experts.items()}
for name, solution in solutions.items():
    print(f"{name}: value {solution.value:.3f}, first action {solution.first_action}")
assert all(solution.exact for solution in solutions.values())

# %% [markdown]
# A *policy* chooses an action after every history of actions and observations; this page calls it a plan. The *value* is the
# expected sum of rewards of the best plan. The values are exact, since all histories were enumerated. The experts disagree on
# the first action, so the doctor has to choose.
#
# ## What it costs to listen to the wrong expert
#
# Take the plan that is best for one expert into the world that the other one describes. What it loses there against the best
# plan of that world is called its *regret*. The *normalized optimality gap* is the same loss on a scale without units: 0 is the
# best plan, 1 is the plan whose actions are uniformly random. `ld.evaluate` computes both, exactly here. (Its tasks and
# demonstrations are for policies that learn; a plan needs neither, so one task is enough.)

# %%
plans = {f"plan of {name}": solution.policy for name, solution in solutions.items()}


def evaluate(plans):
    """What plans lose if slow is right, and if fast is right; and a table of it."""
    results = {
        name: ld.evaluate(expert, plans, tasks=1, demos=1)
        for name, expert in experts.items()
    }
    print(f"{'':26}" + "".join(f"{f'if {name} is right':25}" for name in results))
    for plan in plans:
        cells = (
            f"regret {result[plan].suboptimality:.3f}, gap {result[plan].gap:.2f}"
            for result in results.values()
        )
        print(f"{plan:26}" + "   ".join(cells))
    return results


crossed = evaluate(plans)
wrong = crossed["slow"]["plan of fast"], crossed["fast"]["plan of slow"]
assert min(result.gap for result in wrong) > 0.4

# %% [markdown]
# In both cases the plan of the wrong expert loses more than 0.4 of the difference between the best plan and random actions.
# So it matters who is right.
#
# ## If one may bet: a probability for each expert
#
# Let $w$ be the probability that fast is right. Who is right is then one more thing that is hidden, and the problem is again a
# POMDP, with a state for each pair of an expert and a condition of the patient. Its best plan learns from the observations who
# is right, while it treats the patient.


# %%
def bet(w):
    """The best plan where fast is right with probability w."""
    slow, fast = (expert.problem for expert in experts.values())
    P = np.zeros((1, 6, 3, 6))  # [stage, state, action, next state]; all stages are alike
    P[:, :3, :, :3], P[:, 3:, :, 3:] = slow.P, fast.P  # who is right never changes
    # [stage, action, next state, observation]
    O = np.concatenate([slow.O, fast.O], axis=2)
    r = np.concatenate([slow.r, fast.r], axis=1)  # [stage, state, action]
    rho = np.concatenate([(1 - w) * np.asarray(slow.rho), w * np.asarray(fast.rho)])
    return ld.solve(ld.pomdp(P, O, r, rho))


ACTIONS = experts["slow"].actions
weights = np.linspace(0, 1, 41)
bets = {round(w, 3): bet(w) for w in weights}
unknown = np.array([solution.value for solution in bets.values()])
known = (1 - weights) * solutions["slow"].value + weights * solutions["fast"].value
worth = known - unknown
for i in range(4, 40, 4):
    first = ACTIONS[bets[weights[i].round(3)].first_action]
    print(
        f"w = {weights[i]:.1f}: value {unknown[i]:.3f}, "
        f"first action {first:5}; "
        f"to know who is right is worth {worth[i]:.3f}"
    )

# %% [markdown]
# If the doctor knew who is right before the first decision, the expected value would be on the dashed line of the figure. Its
# distance from the value without this knowledge is the *value of knowing*: the most that a study which settles the question is
# worth for one patient. The value of the plan of one expert is a straight line, since the plan ignores $w$.


# %% mystnb={"image": {"alt": "Expected values over the probability that fast is right. Highest is a dashed straight line, who is right is known. The best plan without knowing is a convex curve below it. The band between them is the value of knowing; it is widest near the middle. The lines of the plans of slow and of fast touch the curve at one end each and fall below it toward the other."}}
def draw_values():
    figure, axes = pyplot.subplots()
    band = {"color": SKY, "alpha": 0.3, "linewidth": 0}
    axes.fill_between(weights, unknown, known, label="value of knowing", **band)
    lines = {"marker": "", "linewidth": 1.6}
    axes.plot(weights, known, "--", color=INK, label="who is right is known", **lines)
    axes.plot(weights, unknown, color=BLUE, label="best plan without knowing", **lines)
    for name, color, dashes in (("slow", ORANGE, "-."), ("fast", RED, ":")):
        plan = f"plan of {name}"
        ends = [
            solutions[one].value - crossed[one][plan].suboptimality for one in experts
        ]
        axes.plot([0, 1], ends, color=color, linestyle=dashes, label=plan, **lines)
    axes.set(xlabel="probability w that fast is right", ylabel="expected value")
    axes.set(xlim=(0, 1))
    axes.legend()
    return figure


render(draw_values, "value-of-knowing.png")

# %% [markdown]
# ## If nobody may bet: ambiguity
#
# Often nobody knows such a probability. A set of models without probabilities is called *ambiguity*. An *ambiguous POMDP* is a
# set of models and an *attitude* $\alpha$ between 0 and 1. At every decision anew, an action counts as $\alpha$ times its worst
# value over the models plus $1 - \alpha$ times its best one: $\alpha = 1$ fears the worst, $\alpha = 0$ hopes for the best.
# [Ambiguity](../explanations/ambiguity.md) has the equations.

# %%
attitudes = {}
for alpha in (0.0, 0.25, 0.5, 0.75, 1.0):
    both = ld.read_pomdp("slow.pomdp", "fast.pomdp", horizon=HORIZON, alpha=alpha)
    solution = attitudes[alpha] = ld.solve(both)
    print(
        f"alpha = {alpha:.2f}: value {solution.value:.3f}, "
        f"first action {solution.first_action}"
    )
ends = [attitudes[0.0].value, attitudes[1.0].value]
assert np.allclose(ends, [solutions["slow"].value, solutions["fast"].value])

# %% [markdown]
# Here the ends are the two experts: whoever hopes for the best believes slow, and whoever fears the worst believes fast. This
# need not be so, because one expert may be the worst for waiting and the best for treating.
#
# The decision depends on the attitude, and on how likely the disease has already advanced. The next cell solves the problem for
# a grid of both.

# %%
alphas, chances = np.linspace(0, 1, 21), np.linspace(0, 0.6, 25)
best = np.zeros((len(chances), len(alphas)), int)
for i, chance in enumerate(chances):
    start = [1 - chance, chance, 0]
    given = (expert.problem for expert in experts.values())
    models = [ld.pomdp(one.P, one.O, one.r, start) for one in given]
    for j, alpha in enumerate(alphas):
        best[i, j] = ld.solve(ld.apomdp(models, alpha)).first_action
treats = ACTIONS.index("treat")
enough = chances[(best == treats).argmax(0)]  # of each attitude: the first with treat
for j in range(0, 21, 5):
    print(
        f"alpha = {alphas[j]:.2f}: treat at once "
        f"where the disease is advanced with probability {enough[j]:.3f} or more"
    )
assert (best == treats).any(0).all() and (np.diff(enough) <= 0).all()


# %% mystnb={"image": {"alt": "The best first action over the attitude alpha and the probability that the disease has advanced. Treat fills the right, where the worst is feared, and the top. Test fills the left below it, and wait is a strip at the bottom left, where the disease has hardly ever advanced. The border of treat falls from left to right."}}
def draw_decisions():
    figure, axes = pyplot.subplots()
    colors = ListedColormap([SKY, ORANGE, PURPLE])
    style = {"vmin": -0.5, "vmax": 2.5, "alpha": 0.6, "shading": "nearest"}
    axes.pcolormesh(alphas, chances, best, cmap=colors, rasterized=True, **style)
    for action, name in enumerate(ACTIONS):
        rows, columns = np.nonzero(best == action)
        place = alphas[columns].mean(), chances[rows].mean()
        axes.text(*place, name, ha="center", va="center")
    axes.set(xlabel="attitude alpha (1 fears the worst)", xlim=(0, 1))
    axes.set(ylabel="probability of advanced at the start", ylim=(0, 0.6))
    axes.grid(False)
    return figure


render(draw_decisions, "attitudes.png")

# %% [markdown]
# The more one fears the worst, the smaller is the probability of an advanced disease at which one treats at once.
#
# ## The regret of all plans
#
# The criterion supposes that one learns after each step which model made it, and its plan updates the belief by this model. The
# doctor will not learn this. `policy.assuming(name)` is the same plan where every step is taken for one of this expert, so a
# doctor can carry it out. Each attitude then gives two plans.

# %%
plans |= {f"bet on w = {w}": bets[w].policy for w in (0.4, 0.5, 0.6)}
for alpha in (0.5, 0.75):
    for name in experts:
        plans[f"alpha {alpha}, read as {name}"] = attitudes[alpha].policy.assuming(name)
results = evaluate(plans)
regrets = {plan: [one[plan].suboptimality for one in results.values()] for plan in plans}
safest = min(plans, key=lambda plan: max(regrets[plan]))
print(f"the smallest largest regret: {max(regrets[safest]):.3f}, {safest}")
if_slow, if_fast = regrets[safest]
assert safest == "alpha 0.5, read as fast"
assert ((1 - weights) * if_slow + weights * if_fast > worth + 0.01).all()


# %% mystnb={"image": {"alt": "A row for each plan with two points, its regret if slow is right and its regret if fast is right. In all rows but one, one point is near zero and the other one beyond 0.4. The exception is alpha 0.5, read as fast: both points are in between."}}
def draw_regrets():
    figure, axes = pyplot.subplots(figsize=(7.2, 4.2))
    rows = np.arange(len(plans))[::-1]
    if_slow, if_fast = np.transpose([regrets[plan] for plan in plans])
    points = {"linestyle": "none", "markersize": 6}
    axes.plot(if_slow, rows, color=BLUE, marker="o", label="if slow is right", **points)
    axes.plot(if_fast, rows, color=RED, marker="s", label="if fast is right", **points)
    axes.set_yticks(rows, list(plans))
    axes.set(xlabel="regret")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


render(draw_regrets, "regrets.png")

# %% [markdown]
# Most plans bet on one expert, whatever their name, because one decision cannot be taken back: to treat at once, or not. The
# exception begins with a test and then reads the markers as fast would. Its largest regret is the smallest of these plans,
# although it is the best plan under no bet: at every $w$ its expected regret is larger than that of the best plan, which is the
# value of knowing. So an attitude alone does not limit regret. Whoever wants a small regret compares the regrets of plans.
#
# ## A decision for an observed history
#
# The doctor tested, and the marker was normal; then waited, and it was raised. What now? `act` takes this history in the words
# of the problem. It returns the action, the belief, and the value `Q` of each action, by which the plan chooses.

# %%
HISTORY = "test normal wait raised"
advisers = {f"plan of {name}": solution.policy for name, solution in solutions.items()}
for name in experts:
    advisers[f"alpha 0.5, read as {name}"] = attitudes[0.5].policy.assuming(name)
print(f"{'':24}action  advanced      Q:" + "".join(f"{action:>7}" for action in ACTIONS))
for plan, policy in advisers.items():
    decision = policy.act((), HISTORY)
    Q = "".join(f"{value:7.3f}" for value in decision.Q)
    print(f"{plan:24}{decision.action:8}{decision.belief[1]:8.2f}{'':8}{Q}")
for w in (0.5, 0.8):  # the joint problem has numbers, not names: 0 0 is wait, normal
    decision = bets[w].policy.act((), "1 0 0 1")
    print(
        f"bet on w = {w:<13}{ACTIONS[decision.action]:8}"
        f"fast is right with probability {decision.belief[3:].sum():.2f}"
    )
advice = [policy.act((), HISTORY).action for policy in advisers.values()]
assert advice == ["test", "treat", "test", "treat"]

# %% [markdown]
# The advice depends on whose model reads the history: the raised marker makes an advanced disease likely for fast, and much less
# so for slow. The two markers contain little information about who is right. A doctor who leans to neither expert tests again,
# and one who is rather sure of fast treats.
#
# ## What to keep
#
# - Compare plans in the world of each expert before asking who is right. Where the regrets are small, the disagreement does not
#   matter.
# - The value of knowing says what settling the question is worth, before anybody pays for a study.
# - An attitude to ambiguity is a choice of the decision maker. Show how the decision changes with it, as in the second figure.
#
# [From two experts, or from logs, to decisions](../from-experts-to-decisions.md) does the same on the command line, and goes on
# to a fine-tuned model. [Ambiguity](../explanations/ambiguity.md) has the criterion and what is proved about it, and
# [your own decision problem](../decision-problems.md#several-models) has the files of several experts.
