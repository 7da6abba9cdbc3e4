"""Old and new tasks on one design, with their moments and optima by numpy."""
# numpy arrays stand in for jax arrays here on purpose
# pyright: reportArgumentType=false

import numpy as np
import scipy.integrate

from lindm_theory.moments import design_fourth

N = 5  # pairs of a training context


def second_moment(D, Psi, length=N):
    """B_N of a design with another law of tasks, by numpy."""
    K = np.sum([p * (x @ Psi @ x) * np.outer(x, x) for p, x in zip(D.weights, D.phi, strict=True)], axis=0)
    L = D.Lambda
    return (1 - 1 / length) * L @ Psi @ L + (K + D.noise) / length


class Case:
    """Old and new tasks on one design."""

    def __init__(self, design, seed, d=3):
        D = self.D = design(seed, n=d + 3, d=d)
        rng = np.random.default_rng(seed + 1000)
        F = rng.normal(size=(d, d)) * np.geomspace(2, 0.3, d)
        self.Psi0, self.Psi1, self.Lq = D.Psi, F @ F.T / d + 0.02 * np.eye(d), D.Lambda
        self.B0, self.B1 = second_moment(D, self.Psi0), second_moment(D, self.Psi1)
        self.C0, self.C1 = D.Lambda @ self.Psi0, D.Lambda @ self.Psi1
        self.A0, self.A1 = self.C0.T @ np.linalg.inv(self.B0), self.C1.T @ np.linalg.inv(self.B1)

    def risk(self, A, which):
        B, C, Psi = ((self.B0, self.C0, self.Psi0), (self.B1, self.C1, self.Psi1))[which]
        return np.trace(self.Lq @ (A @ B @ A.T - A @ C - C.T @ A.T + Psi))

    def fourth(self, P):
        return design_fourth(self.D.phi, self.D.weights, P)


def ode(slope, start, t):
    """y(t) of y' = slope(y), y(0) = start."""
    return scipy.integrate.solve_ivp(lambda _, y: slope(y), (0, t), start, rtol=1e-10, atol=1e-12).y[:, -1]
