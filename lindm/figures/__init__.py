"""Figures of problems and their solutions, in the style of all figures of the project."""
