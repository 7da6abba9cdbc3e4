"""What theory predicts for a law, a problem or a layer of your own: `ld.theory`.

`risk` is the exact error of Qhat of a layer trained on prompts of N pairs and tested on prompts of M pairs. `Case` holds one
decision problem with the values Qhat of one policy, `bounds(case)` all bounds on what that policy loses, and every rung by itself
is a function of the same case, `RUNGS["span_per_stage"](case)`.

>>> table = ld.theory.risk([[2.0, 0.0], [0.0, 0.5]], train_lengths=[8, 32], test_lengths=[8, 128])
>>> table.total.shape, table.paper_bound.shape
((2, 2), (2, 2))
>>> problem = ld.linear_mdp([[[1, 0], [0, 1]], [[0, 1], [0.5, 0.5]]], [[[0, 1], [1, 0]]] * 2, [[0.0, 1.0]] * 2)
>>> case = ld.theory.Case.of(problem, Qhat=[[[0.3, 0.2], [0.4, 0.1]], [[0, 1], [1, 0.5]]])
>>> bounds = ld.theory.bounds(case)
>>> bounds["suboptimality"] <= bounds["span_per_stage"] <= bounds["sup_norm"]
True
"""

from lindm_experiments.toolkit.risks import Risk, risk
from lindm_experiments.toolkit.rungs import RUNGS, Case, Rung, bounds

__all__ = ["RUNGS", "Case", "Risk", "Rung", "bounds", "risk"]
