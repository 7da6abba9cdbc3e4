"""Policies, their exact losses, and the comparison behind `lindm eval`."""

EVAL_FORMAT = "lindm-eval-2"  # of eval.json
