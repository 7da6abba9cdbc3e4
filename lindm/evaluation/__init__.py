"""Policies, their exact losses, and the comparison behind `lindm eval`."""

EVAL_FORMAT = "lindm-eval-3"  # of eval.json
