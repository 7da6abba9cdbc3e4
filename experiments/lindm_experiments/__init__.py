"""Experiments, where measurements (`lindm`) meet predictions (`lindm_theory`): one question per module."""
