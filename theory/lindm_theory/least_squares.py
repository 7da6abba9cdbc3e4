"""The layer against ordinary least squares, for x ~ N(0, lambda I) and tasks with Psi = I.

Only under that isotropy do both risks reduce to one line each. For another Lambda or Psi use `in_context.gaussian_risk` or
`in_context.risk` for the layer; the boundary below is then not the right one. Derived in notes/in-context.md, section 10.
"""

from math import sqrt


def layer_risk(M: int, sigma: float, dim: int) -> float:
    """E |A_M S_M - w|^2 = d c/(c + M), c = d + 1 + sigma^2, for x ~ N(0, I_dim), Psi = I, the layer trained at N = M (ours).

    This is `in_context.gaussian_risk` at Lambda = I: A_M = M/(M + c) I. For x ~ N(0, lambda I) replace sigma^2 by sigma^2/lambda.
    """
    c = dim + 1 + sigma**2
    return dim * c / (c + M)


def ols_risk(M: int, sigma: float, dim: int) -> float:
    """E |w_OLS - w|^2 for the same law: the mean of an inverse Wishart law.

    For M < dim the part of w outside the span of the rows, a share (dim - M)/dim of |w|^2 by rotation, is lost.
    Raises ValueError for |M - dim| < 2, where the risk is infinite.
    """
    more = M - dim
    if more >= 2:
        return dim * sigma**2 / (more - 1)
    if more <= -2:
        return -more + M * sigma**2 / (-more - 1)
    raise ValueError(f"M must keep a distance of 2 from d = {dim}: the risk is infinite; got {M}")


def boundary(M: float, dim: int) -> float:
    """The sigma^2 above which the layer (trained at N = M) has the smaller risk; negative where it always has (ours).

    sqrt(M (d + 1)) - (d + 1) for M >= d + 2, sqrt(d (M + 1)) - (M + 1) for M <= d - 2.
    """
    short, long = sorted((float(M), float(dim)))
    return sqrt(long * (short + 1)) - (short + 1)
