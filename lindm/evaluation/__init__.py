"""Policies, their exact losses, and the comparison behind `lindm eval`."""
