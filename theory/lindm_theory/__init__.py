"""What is predicted: arrays and numbers in, predictions out.

Pure functions of `jax.numpy` arrays. Nothing here samples, and nothing here imports `lindm`: what is measured and what is
predicted share no code, so that their agreement says something. The ledger of statements is `theory/README.md`; the proofs
are in `theory/notes/`.

Notation: `d` features, `H` stages, `S` states, `A` actions, `N` pairs in a training prompt, `M` pairs in a test prompt,
`n` points in the finite support of a design, Lambda = E[x x'], Psi = E[w w'] (not centred), K(Psi) = E[x x' Psi x x'],
S_M = (1/M) sum y_i x_i, prediction Qhat(s, a) = phi(s, a)' A S_M.
"""
