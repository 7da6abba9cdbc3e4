"""Theoretical predictions: closed forms and bounds as functions of arrays.

Pure functions of `jax.numpy` arrays. This package never samples and never imports `lindm`: predictions and measurements share no
code, so their agreement is informative. The ledger of statements is `theory/README.md`; the proofs
are in `theory/notes/`.

Notation: `d` features, `H` stages, `S` states, `A` actions, `N` pairs in a training prompt, `M` pairs in a test prompt,
`n` points in the finite support of a design, Lambda = E[x x'], Psi = E[w w'] (not centered), K(Psi) = E[x x' Psi x x'],
S_M = (1/M) sum y_i x_i, prediction Qhat(s, a) = phi(s, a)' A S_M.
"""
