"""Exact answers: what no learner can beat."""
