"""Exact and certified solvers: dynamic programming, the belief tree, HSVI, the belief net."""
