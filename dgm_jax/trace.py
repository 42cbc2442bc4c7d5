"""The trace of a linear map A of which only the products e -> A e can be had, with its standard error.

Every function takes the map as ``matvec`` and random vectors as ``probes``, drawn by ``dgm_jax.probes`` with identity
covariance, E[e e^T] = I. With m entries in an example, S = (A + A^T) / 2 and n probes:

    function         products    unbiased for   wins where
    exact            m           any A          m is small, or no error is allowed
    hutchinson       n           any A          the spectrum is flat, or products are few
    grouped          n G         any A          the couplings of A are known and local
    deflated         r + n       any A          a subspace that holds most of A is known beforehand
    control_variate  n           any A          a map near A is cheap and has a known trace
    hutch_pp         2 s + g     any A          the spectrum decays
    na_hutch_pp      n           any A          the spectrum decays, A is symmetric, all products at one time
    xtrace           2 n         any A          the spectrum decays; ahead of hutch_pp at equal products
    xnystrace        n           A >= 0         A is symmetric positive semidefinite with a decaying spectrum

A sketch pays with products for a part of the trace that it gets exactly, and leaves less to chance: where the squared
spectrum is spread evenly, the products are better spent on more probes. Relative errors, root mean square, as
benchmarks/trace_estimators.py prints them: Jacobians of a velocity field trained on 64-dimensional digits, and the
spectrum i^-2 in 200 dimensions.

    products                             digits: 4    16      i^-2: 24    96
    hutchinson, Rademacher probes        0.047        0.022   0.17        0.082
    hutchinson, Hadamard probes          0.045        0.021   0.19        0.074
    hutchinson, probes.rotated           0.024        0.012   0.0037      0.0017
    grouped, learnt groups               0.033        0.010
    deflated                             0.057        0.031   0.0045      0.0009
    control_variate                      0.025        0.013   0.0091      0.0045
    hutch_pp                             0.071        0.042   0.011       0.0006
    na_hutch_pp                          0.21         0.099   0.031       0.0020
    xtrace                               0.079        0.038   0.0064      0.0003
    xnystrace                                                 0.0051      0.0003

Turned probes, deflation and the control variate know a matrix near: the mean Jacobian at other digits, and the matrix
of spectrum i^-2 with 5 per cent of noise. ``choose`` decides from a few products, and from groups and a basis if known.

Derivatives: an estimate is differentiable in whatever ``matvec`` depends on, and its gradient estimates the gradient of
the trace without bias. What was computed from the sketches (bases, factors, inverses) is held fixed: the expectation
does not depend on it, and its own derivative is infinite where A loses rank.

Probes are rows ``[num, *event]``, or a pytree whose leaves have that leading axis; ``matvec`` then takes and returns
such a tree without it. A standard error of infinity says that one draw tells nothing of its spread.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax._checks import concrete, floating, group_labels, like, orthogonal_basis, positive_integer
from dgm_jax.types import Array

__all__ = [
    "Choice",
    "Estimate",
    "choose",
    "control_variate",
    "deflated",
    "exact",
    "grouped",
    "hutch_pp",
    "hutchinson",
    "na_hutch_pp",
    "xnystrace",
    "xtrace",
]

Matvec = Callable[[Any], Any]
Rows = Callable[[Array], Array]

BLOCK = 2**20  # entries that the unit vectors of one block of ``exact`` have at most


class Estimate(NamedTuple):
    """A trace and how far it may be off.

    Attributes:
        value: the estimate of tr A ``[]``.
        stderr: its standard error ``[]``: 0 where it is exact, infinite where one draw says nothing of its spread.
    """

    value: Array
    stderr: Array


class Choice(NamedTuple):
    """The estimator that ``choose`` expects to err least.

    Attributes:
        name: "hutchinson", "hutch_pp", "xtrace" or "xnystrace"; where they are known, "grouped" or "rotated".
        estimator: ``(matvec, probes) -> Estimate``, with its options filled in.
        num: how many probes it wants; of "grouped", how many draws of all groups.
        draw: from which function of ``dgm_jax.probes``, by name.
        options: what that function takes beside ``key``, ``x`` and ``num``, by name: the groups, or nothing.
    """

    name: str
    estimator: Callable[[Matvec, Any], Estimate]
    num: int
    draw: str
    options: Mapping[str, Any] = {}


def exact(matvec: Matvec, x: Any, *, size: int | None = None) -> Estimate:
    """Compute tr A from all m columns: sum_i u_i^T A u_i, u_i the unit vectors.

    m products. Wins where m is small, or where no error is allowed. The unit vectors come from their indices, ``size``
    at a time, in the derivative too, so that memory grows with size m and not with m^2.

    Args:
        matvec: e -> A e, ``[*event] -> [*event]``, or between pytrees.
        x: one example ``[*event]``, or a pytree; only its shapes and dtype matter.
        size: columns in a block, at least 1; it need not divide m. By default as many as have 2^20 entries together.

    Returns:
        The trace ``[]``, and a standard error of 0.

    Raises:
        TypeError: ``x`` not of floats of one dtype, or A e of another dtype.
        ValueError: ``x`` without entries, A e of another shape, or ``size`` not a positive integer.
    """
    example, unravel = _flatten("x", x, axes=0)
    m, apply = example.size, _product("matvec", matvec, unravel)
    size = max(1, BLOCK // m) if size is None else positive_integer("size", size)
    indices = jnp.arange(m)

    def diagonal_entry(i: Array) -> Array:
        return apply((indices == i).astype(example.dtype))[i]

    if size >= m:
        entries = jax.vmap(diagonal_entry)(indices)
    else:  # without checkpoint, the derivative would keep what every block computed
        entries = jax.lax.map(jax.checkpoint(diagonal_entry, prevent_cse=False), indices, batch_size=size)
    return Estimate(jnp.sum(entries), jnp.zeros((), example.dtype))


def hutchinson(matvec: Matvec, probes: Any, *, population: int | None = None) -> Estimate:
    """Estimate tr A as the mean of n quadratic forms q_i = e_i^T A e_i.

    n products. Wins where the squared spectrum of A is flat, and where products are few. Independent probes give the
    standard error s / sqrt(n), s^2 the sample variance of the q_i; one probe gives infinity.

    Probes drawn without replacement from a set of P vectors with sum e e^T = P I (``probes.orthogonal``, P = m;
    ``probes.hadamard``, P its order) do better, and ``population=P`` says so. The mean of q over the whole set is tr A,
    and a random order makes the q_i exchangeable, with one variance v and one covariance c between each two. The sum of
    all P is a constant: P v + P (P - 1) c = 0, so c = -v / (P - 1). Then

        Var(mean) = v / n + (n - 1) / n c = v / n (P - n) / (P - 1),
        E[s^2]    = v - c = v P / (P - 1),

    and s^2 / n (P - n) / P is an unbiased estimate of Var(mean), 0 at n = P. Where n > P, whole sets drop out: with r
    the remainder of n by P and s^2 that of the first P forms, it is s^2 r (P - r) / (P n^2).

    Args:
        matvec: e -> A e, ``[*event] -> [*event]``, or between pytrees.
        probes: ``[n, *event]`` of identity covariance.
        population: P, where the probes come without replacement from such a set, in order again after each P.

    Returns:
        The mean ``[]`` and its standard error ``[]``.

    Raises:
        TypeError: ``probes`` not of floats of one dtype, or A e of another dtype.
        ValueError: no probes, A e of another shape, or ``population`` not a positive integer.

    Source: Hutchinson (1990), "A stochastic estimator of the trace of the influence matrix for
    Laplacian smoothing splines", section 2; Cochran (1977), "Sampling Techniques", theorem 2.2.
    """
    e, unravel = _flatten("probes", probes)
    forms = _forms(e, _products("matvec", matvec, unravel)(e))
    if population is None:
        return _mean(forms)
    n, p = e.shape[0], positive_integer("population", population)
    rest, seen = n % p, forms[:p]
    if rest == 0:
        stderr = jnp.zeros((), e.dtype)
    elif seen.size == 1:
        stderr = jnp.full((), jnp.inf, e.dtype)
    else:
        stderr = _root(jnp.var(seen, ddof=1)) * (math.sqrt(rest * (p - rest) / p) / n)
    return Estimate(jnp.mean(forms), stderr)


def grouped(matvec: Matvec, probes: Any) -> Estimate:
    """Estimate tr A by probing the coordinates in groups: the mean over draws k and groups g of e_kg^T A e_kg.

    n G products. e_kg has sqrt(G) times random signs on group g and zeros elsewhere, so the groups of one draw are
    disjoint and only couplings within a group make noise: Var = 2 / n sum_g sum_(i != j in g) S_ij^2. Wins where A is
    banded, sparse, or otherwise local, with groups of coordinates that hardly couple (``probes.learn_groups``).

    Args:
        matvec: e -> A e, ``[*event] -> [*event]``, or between pytrees.
        probes: ``[n, G, *event]``, from ``probes.grouped``.

    Returns:
        The mean ``[]``, and its standard error ``[]`` from the n draws; infinite for n = 1.

    Raises:
        TypeError: ``probes`` not of floats of one dtype, or A e of another dtype.
        ValueError: no probes, probes without the axis of groups, or A e of another shape.

    Source: Stathopoulos, Laeuchli and Orginos (2013), "Hierarchical probing for estimating the trace of the
    matrix inverse on toroidal lattices", section 2.
    """
    e, unravel = _flatten("probes", probes, axes=2)
    n, g, m = e.shape
    e = e.reshape(n * g, m)
    forms = _forms(e, _products("matvec", matvec, unravel)(e))
    return _mean(jnp.mean(forms.reshape(n, g), axis=1))


def deflated(matvec: Matvec, basis: Any, probes: Any) -> Estimate:
    """Estimate tr A exactly on a given subspace and by Hutchinson's mean on the rest.

    tr A ~ sum_j b_j^T A b_j + 1/n sum_i d_i^T A d_i, with d = e - sum_j b_j (b_j . e).

    r + n products. Wins where r directions that hold most of A are known beforehand: a low-frequency basis, the
    leading directions of an earlier time or of another example. For the spectrum i^-2 in 200 dimensions and the first 8
    eigenvectors of a matrix 5 per cent away, at 24 products, the relative error is 0.0045, of ``xtrace`` 0.0064 and of
    plain probes 0.17; probes turned into all those eigenvectors (``probes.rotated``) have 0.0037. Loses even to plain
    probes where the spectrum is flat: 0.057 against 0.047 on Jacobians of a field trained on digits, at 4 products.
    Unbiased for any orthonormal rows, good or bad; they are held fixed in derivatives.

    Args:
        matvec: e -> A e, ``[*event] -> [*event]``, or between pytrees.
        basis: r orthonormal vectors b_j, ``[r, *event]``.
        probes: ``[n, *event]`` of identity covariance.

    Returns:
        The estimate ``[]`` and its standard error ``[]``, of the second sum. NaN where the rows of ``basis`` are not
        orthonormal and that could not be known in time to raise.

    Raises:
        TypeError: ``probes`` not of floats of one dtype, or ``basis`` or A e of another.
        ValueError: no probes, ``basis`` or A e not of their shape, or rows that are not orthonormal.

    Source: Gambhir, Stathopoulos and Orginos (2017), "Deflation as a method of variance reduction for estimating the
    trace of a matrix inverse", section 3.
    """
    e, unravel = _flatten("probes", probes)
    b = jax.lax.stop_gradient(_beside("basis", basis, probes))
    apply = _products("matvec", matvec, unravel)
    error = jnp.max(jnp.abs(_dot(b, b.T) - jnp.eye(b.shape[0], dtype=b.dtype)))
    allowed = math.sqrt(_eps(b.dtype))
    if concrete(error) and not error <= allowed:
        raise ValueError(
            f"basis must have orthonormal rows, but its Gram matrix is off by {float(error):.3g}: "
            "pass for instance jnp.linalg.qr(rows.T)[0].T."
        )
    inside = jnp.where(error <= allowed, jnp.sum(_forms(b, apply(b))), jnp.nan)
    d = e - _dot(_dot(e, b.T), b)
    return _plus(inside, _mean(_forms(d, apply(d))))


def control_variate(
    matvec: Matvec, surrogate: Matvec, surrogate_trace: Any, probes: Any, *, coefficient: Any = 1.0
) -> Estimate:
    """Estimate tr A with the noise of a map B of known trace taken off.

    tr A ~ 1/n sum_i (e_i^T A e_i - c (e_i^T B e_i - tr B)).

    n products with A and n with B. Unbiased for any B and c; the variance is Hutchinson's of A - c B. Wins where B is
    near A and far cheaper: the linear part of a network, the field at an earlier time. With B the mean Jacobian at
    other digits, at 4 products, the relative error on Jacobians of a field trained on digits is 0.025, without B 0.047;
    on those of a flow trained by maximum likelihood 0.036 and 0.11. Probes turned into the eigenvectors of the same B
    (``probes.rotated``) have 0.024 and 0.033, and need no products with it.

    Args:
        matvec: e -> A e, ``[*event] -> [*event]``, or between pytrees.
        surrogate: e -> B e, alike.
        surrogate_trace: tr B ``[]``, exactly: an error in it goes into the estimate, c times.
        probes: ``[n, *event]`` of identity covariance.
        coefficient: c ``[]``; it must not be fitted to the same probes.

    Returns:
        The mean ``[]`` and its standard error ``[]``.

    Raises:
        TypeError: ``probes`` not of floats of one dtype, or A e, B e or one of the two numbers of another.
        ValueError: no probes, A e or B e of another shape, or ``surrogate_trace`` or ``coefficient`` not one number.

    Source: Adams et al. (2018), "Estimating the spectral density of large implicit matrices", section 3;
    Lavenberg and Welch (1981), "A perspective on the use of control variables to increase the efficiency of
    Monte Carlo simulations".
    """
    e, unravel = _flatten("probes", probes)
    c = _number("coefficient", coefficient, e.dtype)
    known = _number("surrogate_trace", surrogate_trace, e.dtype)
    forms = _forms(e, _products("matvec", matvec, unravel)(e))
    return _mean(forms - c * (_forms(e, _products("surrogate", surrogate, unravel)(e)) - known))


def hutch_pp(matvec: Matvec, probes: Any, *, sketch: int | None = None) -> Estimate:
    """Estimate tr A exactly on the range of a sketch and by Hutchinson's mean on the rest (Hutch++).

    Q = orth(A [e_1 .. e_s]), d_i = (I - Q Q^T) e_i for the g = n - s others, and

        tr A ~ tr(Q^T A Q) + 1/g sum_i d_i^T A d_i.

    2 s + g products. Wins over ``hutchinson`` at equal products where the squared spectrum decays: the variance is
    2/g |(I - Q Q^T) S (I - Q Q^T)|_F^2 or less. Loses where it is flat: a third of the products make noise small.
    Exact where s is at least the rank of A.

    Args:
        matvec: e -> A e, ``[*event] -> [*event]``, or between pytrees.
        probes: ``[n, *event]`` of identity covariance, independent, n at least 2.
        sketch: s, from 1 to n - 1 and at most m; n // 2 by default (no more than m).

    Returns:
        The estimate ``[]`` and its standard error ``[]``, from the g forms: infinite for g = 1.

    Raises:
        TypeError: ``probes`` not of floats of one dtype, or A e of another dtype.
        ValueError: less than 2 probes, ``sketch`` out of its range, or A e of another shape.

    Source: Meyer, Musco, Musco and Woodruff (2021), "Hutch++: Optimal Stochastic Trace Estimation", algorithm 1.
    """
    e, unravel = _flatten("probes", probes)
    n, m = e.shape
    if n < 2:
        raise ValueError(
            f"probes has {n} row, but hutch_pp needs at least 2, one for the sketch and one for the rest: "
            "draw num=2 or more, or use trace.hutchinson."
        )
    s = min(n // 2, m) if sketch is None else positive_integer("sketch", sketch)
    if s > min(n - 1, m):
        raise ValueError(
            f"sketch is {s}, but with {n} probes of {m} entries it must be from 1 to {min(n - 1, m)}: "
            "at least one probe is for the rest, and more directions than entries there are not."
        )
    apply = _products("matvec", matvec, unravel)
    q = _orthonormal(apply(e[:s]))
    rest = e[s:] - _dot(_dot(e[s:], q.T), q)
    images = apply(jnp.concatenate([q, rest]))
    return _plus(jnp.sum(_forms(q, images[:s])), _mean(_forms(rest, images[s:])))


def na_hutch_pp(matvec: Matvec, probes: Any, *, sketch: tuple[int, int] | None = None) -> Estimate:
    """Estimate tr A with a sketch whose products need not wait for each other (non-adaptive Hutch++).

    With the probes split into the columns of S [m, s], R [m, r] and G [m, g], Z = A R, W = A S, M = (S^T Z)^+ and the
    approximation A~ = Z M W^T,

        tr A ~ tr A~ + 1/g sum_i (g_i^T A g_i - g_i^T A~ g_i).

    n products, all in one batch: one pass over a map that is costly to start. Unbiased for any A, since A~ does not
    depend on G; but W^T = S^T A^T is S^T A for a symmetric A alone, and only then is A~ near A. Wins over
    ``hutchinson`` where a symmetric A has a decaying spectrum, then exact for ranks up to s; at equal products it loses
    to ``hutch_pp`` and ``xtrace``. For the spectrum i^-2 in 200 dimensions, at 24 products, the relative error is
    0.031: of ``hutchinson`` 0.17, ``hutch_pp`` 0.011, ``xtrace`` 0.0064. At 6 products (0.40 against 0.35), and
    where the spectrum is linear or a step, it loses to ``hutchinson`` too.

    In derivatives Z and W carry the gradient and M = M_0 is held fixed but for its first order, M_0 - M_0 d(S^T Z) M_0,
    finite for any rank. That leaves the gradient unbiased, since tr A~ - E[g^T A~ g] = 0 for any A~ made without G.
    Where S^T Z can come near to losing rank, as with r - s of 3 or less, gradients have heavy tails.

    Args:
        matvec: e -> A e, ``[*event] -> [*event]``, or between pytrees.
        probes: ``[n, *event]`` of identity covariance, independent, n at least 3; in the order S, R, G.
        sketch: (s, r), each at least 1, with s + r less than n; by default about n / 4 and n / 2. s < r keeps S^T Z
            well-conditioned.

    Returns:
        The estimate ``[]`` and its standard error ``[]``, from the g terms: infinite for g = 1.

    Raises:
        TypeError: ``probes`` not of floats of one dtype, or A e of another dtype.
        ValueError: less than 3 probes, ``sketch`` out of its range, or A e of another shape.

    Source: Meyer, Musco, Musco and Woodruff (2021), "Hutch++: Optimal Stochastic Trace Estimation", algorithm 2.
    """
    e, unravel = _flatten("probes", probes)
    n = e.shape[0]
    if n < 3:
        raise ValueError(
            f"probes has {n} row{'s' if n > 1 else ''}, but na_hutch_pp needs at least 3, two for the sketch and one "
            "for the rest: draw num=3 or more, or use trace.hutchinson."
        )
    s, r = (max(1, n // 4), n // 2) if sketch is None else (positive_integer("sketch", each) for each in sketch)
    if s + r >= n:
        raise ValueError(
            f"sketch is {(s, r)}, but {n} probes leave room for two numbers of sum at most {n - 1}: "
            "at least one probe is for the rest."
        )
    images = _products("matvec", matvec, unravel)(e)
    (w, z), rest = (images[:s], images[s : s + r]), e[s + r :]
    core = _dot(e[:s], z.T)
    fixed = jnp.linalg.pinv(jax.lax.stop_gradient(core), rtol=_eps(e.dtype) ** 0.75)
    inverse = 2 * fixed - _dot(_dot(fixed, core), fixed)  # equal to it, with the derivative of an inverse
    approximate = jnp.sum(inverse.T * _dot(w, z.T))
    forms = _forms(rest, images[s + r :]) - _forms(_dot(_dot(rest, z.T), inverse), _dot(rest, w.T))
    return _plus(approximate, _mean(forms))


def xtrace(matvec: Matvec, probes: Any, *, normalize: bool = False) -> Estimate:
    """Estimate tr A with every probe in turn for the rest and all the others for the sketch (XTrace).

    With Q_i = orth(A e_j, j != i) and u_i = (I - Q_i Q_i^T) e_i,

        tr A ~ 1/n sum_i t_i,    t_i = tr(Q_i^T A Q_i) + u_i^T A u_i.

    2 n products (1 for n = 1, which is Hutchinson's). All bases come from one: with Y = A [e_1 .. e_n] = Q R, Z = A Q
    and s_i the unit vector along R^(-T) e_i, orthogonal to every column of R but the i-th, Q_i Q_i^T =
    Q (I - s_i s_i^T) Q^T. Then tr(Q_i^T A Q_i) = tr(Q^T Z) - s_i^T Q^T Z s_i and, with v_i = (I - s_i s_i^T) Q^T e_i,
    u_i = e_i - Q v_i and A u_i = Y_i - Z v_i. Q, s, v and u are held fixed in derivatives.

    Wins where the squared spectrum decays, by more than ``hutch_pp`` at equal products, since the sketch has n - 1
    directions for 2 n products and n probes go over the rest. Loses to ``hutchinson`` where it is flat. Exact where
    n - 1 is at least the rank of A.

    Args:
        matvec: e -> A e, ``[*event] -> [*event]``, or between pytrees.
        probes: ``[n, *event]`` of identity covariance, independent, n from 1 to m. In fewer than about 15 dimensions
            from ``probes.sphere`` or ``probes.gaussian``: two equal Rademacher vectors, which come up there, bias it.
        normalize: give each u_i the squared norm m - n + 1, its mean, so that its length makes no noise. Only for
            ``probes.sphere`` and ``probes.gaussian``: with others the estimate is biased.

    Returns:
        The mean of the t_i ``[]`` and its standard error ``[]``, infinite for n = 1. The t_i are not independent:
        with s^2 their sample variance, t_ij what t_i is without probe j and D_ij = t_i - t_ij, its square is
        s^2 / n + mean_(i != j) D_ij D_ji, which is unbiased but for being kept above s^2 / n.

    Raises:
        TypeError: ``probes`` not of floats of one dtype, or A e of another dtype.
        ValueError: no probes, more than m, or A e of another shape.

    Source: Epperly, Tropp and Webber (2024), "XTrace: Making the Most of Every Sample in Stochastic Trace
    Estimation", sections 2.1, 2.3 and 3.1.
    """
    e, unravel = _flatten("probes", probes)
    n, _ = _no_more_than_entries("xtrace", e)
    apply = _products("matvec", matvec, unravel)
    y = apply(e)
    if n == 1:
        return _mean(_forms(e, y) * (_length_factor(jnp.sum(e**2, axis=1), e.shape[1]) if normalize else 1))
    q, r = jnp.linalg.qr(jax.lax.stop_gradient(y).T)
    z = apply(q.T).T
    s, _ = _leave_one_out(r)
    v = _dot(q.T, e.T)
    v = v - s * jnp.sum(s * v, axis=0, keepdims=True)
    u = e - _dot(q, v).T
    inside = _dot(q.T, z)
    traces = jnp.trace(inside) - jnp.sum(s * _dot(inside, s), axis=0)
    forms = _forms(u, y - _dot(z, v).T)
    # without e_j too, u_i grows by (p . v_i) Q p, p the rest of s_j beside s_i
    grown, known = _beside_each(s, v), _squares_beside_each(s, inside)
    along = _beside_each(s, r + _dot(e, z).T - _dot(inside + inside.T, v))
    fewer = forms[:, None] + grown * along + grown**2 * known
    if normalize:
        squares = jnp.sum(u**2, axis=1)
        forms = forms * _length_factor(squares, u.shape[1] - n + 1)
        fewer = fewer * _length_factor(squares[:, None] + grown**2, u.shape[1] - n + 2)
    return _leave_one_out_mean(traces + forms, known + forms[:, None] - fewer)


def xnystrace(matvec: Matvec, probes: Any, *, normalize: bool = False) -> Estimate:
    """Estimate tr A for a symmetric positive semidefinite A with Nystrom's approximation, each probe left out in turn.

    With E_i the matrix of all probes but e_i and N_i = A E_i (E_i^T A E_i)^+ E_i^T A (XNysTrace),

        tr A ~ 1/n sum_i t_i,    t_i = tr N_i + e_i^T (A - N_i) e_i.

    n products: half of ``xtrace``'s for a sketch as large, and N_i errs by the spectrum's tail where a projection errs
    by its square root. With Y = A E, H = E^T Y = C^T C, F = Y C^(-1) and c_i the unit vector along the i-th row of
    C^(-1), N_i = F (I - c_i c_i^T) F^T. C comes from the eigenvectors of H, with its eigenvalues kept above rounding,
    so that any rank is allowed. In derivatives Y and H carry the gradient; C and c are held fixed.

    Wins wherever A is positive semidefinite with a decaying spectrum. Exact where n - 1 is at least the rank.

    Args:
        matvec: e -> A e, ``[*event] -> [*event]``, or between pytrees.
        probes: ``[n, *event]`` of identity covariance, independent, n from 1 to m.
        normalize: scale the second term of t_i by (m - n + 1) / |p_i|^2, p_i what of e_i the other probes do not span,
            which takes the noise of its length away. Only for ``probes.sphere`` and ``probes.gaussian``: with others
            the estimate is biased.

    Returns:
        The mean of the t_i ``[]`` and its standard error ``[]`` as in ``xtrace``, infinite for n = 1. NaN where H is
        not symmetric or has an eigenvalue below zero by more than rounding: then A is not what this estimator is for,
        and ``xtrace`` is.

    Raises:
        TypeError: ``probes`` not of floats of one dtype, or A e of another dtype.
        ValueError: no probes, more than m, or A e of another shape.

    Source: Epperly, Tropp and Webber (2024), "XTrace: Making the Most of Every Sample in Stochastic Trace
    Estimation", sections 2.2, 2.3 and 3.2.
    """
    e, unravel = _flatten("probes", probes)
    n, m = _no_more_than_entries("xnystrace", e)
    eps = _eps(e.dtype)
    y = _products("matvec", matvec, unravel)(e)
    h = _dot(e, y.T)
    symmetric = (h + h.T) / 2
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(symmetric))
    largest = jnp.max(jnp.abs(values))
    rounding = 10 * m * eps * largest
    asked = (jnp.min(values) >= -rounding) & (jnp.max(jnp.abs(jax.lax.stop_gradient(h - h.T))) <= rounding)

    inverse = vectors / jnp.sqrt(jnp.maximum(values, jnp.where(largest > 0, n * eps * largest, 1)))[None, :]  # C^(-1)
    f = _dot(inverse.T, y)  # F^T
    c = _unit_columns(inverse.T)
    # N_i = F P (P G P)^+ P F^T with P = I - c c^T and G = C^(-T) H C^(-1), the identity here: to first order 2 - G
    g = _dot(inverse.T, _dot(symmetric, inverse))
    twice = 2 * jnp.eye(n, dtype=e.dtype) - g
    gram = _dot(f, f.T)
    crossed, along, inside = _dot(gram, twice), _dot(twice, c), _dot(gram, c)
    traces = (
        jnp.trace(crossed)
        - jnp.sum(c * (_dot(crossed, c) + _dot(crossed.T, c)), axis=0)
        + jnp.sum(c * along, axis=0) * jnp.sum(c * inside, axis=0)
    )
    w = _dot(f, e.T)
    w = w - c * jnp.sum(c * w, axis=0, keepdims=True)
    forms = _forms(e, y) - jnp.sum(w * _dot(twice, w), axis=0)
    known, fewer = _squares_beside_each(c, gram), forms[:, None] + _beside_each(c, w) ** 2  # without e_j too
    if normalize:
        s, lengths = _leave_one_out(jnp.linalg.qr(jax.lax.stop_gradient(e).T, mode="r"))
        forms = forms * _length_factor(lengths**2, m - n + 1)
        fewer = fewer * _length_factor(lengths[:, None] ** 2, m - n + 2) * _sines(s) ** 2
    terms, changes = traces + forms, known + forms[:, None] - fewer
    return _leave_one_out_mean(jnp.where(asked, terms, jnp.nan), changes)


def choose(
    matvec: Matvec, probes: Any, products: int, *, positive: bool = False, groups: Any = None, basis: Any = None
) -> Choice:
    """Choose an estimator for a budget of products, from a few pilot probes of the same map.

    The pilots Y = A E, E = [e_1 .. e_p], give without bias |A|_F^2 (the mean |y_i|^2), its antisymmetric share
    (from e_i^T y_j - e_j^T y_i) and the squared diagonal (from products of e_i y_i and e_j y_j), thus Hutchinson's
    variance; and, r columns of Y at a time, the share rho(r) of |A|_F^2 that a sketch of r = 1 .. p - 1 probes
    leaves. Sketching estimators have their own r, which may be beyond p, so the spectrum is needed. Flat,
    polynomial, exponential, linear and step spectra are weighed by how well they explain rho (for ``positive`` also
    the same of tr A). Each gives a variance a method, with E[I - Q Q^T] = (1 + A^2 / gamma)^(-1), tr(A^2 / (A^2 +
    gamma)) = r, and with the first-order correlation of the leave-one-out terms. The answer has the least expected
    ratio of its variance to the best one.

    What is known of the map widens the choice: ``groups`` of coordinates that hardly couple, for ``grouped``, and a
    ``basis`` Q in which it is nearly diagonal, for Hadamard probes turned by Q. The pilots give without bias the
    squares that either leaves, sum_g sum_(i != j in g) S_ij^2 and |S|_F^2 - sum_i (q_i^T S q_i)^2, but with an error
    that may be as large; so each is taken on trust, until the pilots say otherwise: groups leave between 1 / sqrt(G)
    and all of what random groups would, or all squares off the diagonal, with a twelfth of the weight of the others; a
    basis leaves between 1 / 32 and all of |S|_F^2.

    With max(4, products / 2) pilots it erred, root mean square over pilots, at most 1.3 times as much as the best of
    the four on flat, linear, i^-2, 0.7^i and step spectra in random bases, m 64 and 200, 6 to 96 products, and on
    Jacobians of networks (benchmarks/trace_estimators.py). With groups and a basis learnt from Jacobians at other
    digits, over 48 sets of pilots, it was at most 1.22 times as much as the best of all: with 16 pilots for 32
    products; 1.06 with 8 for 2 to 16 products, and 1.15 with 4 for 2 to 8. With fewer pilots it can miss by more, and
    so it can where all but a few eigenvalues are equal: then two tiny errors compete. A step at more than twice the
    pilots it does not see. On the host: its inputs must be known.

    Args:
        matvec: e -> A e, ``[*event] -> [*event]``, or between pytrees.
        probes: p pilots, ``[p, *event]`` of identity covariance, independent, at least 2 and better half of
            ``products``; each costs one product, beside those of ``products``. Draw the estimator's probes anew.
        products: what one estimate may cost, at least 1.
        positive: whether A is known to be symmetric positive semidefinite, which allows ``xnystrace``.
        groups: the group of each coordinate, as for ``probes.grouped``, of the shapes of one example; for instance
            ``probes.learn_groups(symmetric, products)`` from other maps of the kind. Without them where there are more
            groups than ``products``.
        basis: Q ``[m, m]``, its columns orthonormal, as for ``probes.rotated``; for instance the eigenvectors of the
            mean symmetric part of other maps of the kind.

    Returns:
        A Choice: ``choice.estimator(matvec, draw(key, x, num=choice.num, **choice.options))`` with draw =
        getattr(probes, choice.draw) costs at most ``products``; ``draw(key, x, choice.num)`` does where no groups were
        given. All of them are used, but for the odd one with ``xtrace``, which takes two a probe, and what G groups
        leave of them: no part of a draw has the mean tr A. Where they are m or more, the estimate is exact after m.

    Raises:
        TypeError: ``probes`` not of floats of one dtype, A e or ``basis`` of another dtype, ``groups`` not integers, or
            inputs that are not known.
        ValueError: less than 2 probes, A e of another shape or not finite, ``products`` not a positive integer,
            ``groups`` not one number for each coordinate, from 0 to G - 1, each used, or ``basis`` not orthogonal, or
            not of the size of ``probes``.

    Source: the variances follow Derezinski, Liang, Liao and Mahoney (2020), "Precise expressions for random
    projections: Low-rank approximation and randomized Newton", section 2.
    """
    rows, unravel = _flatten("probes", probes)
    products = positive_integer("products", products)
    labels = None if groups is None else group_labels(groups, jax.tree.map(lambda leaf: leaf[0], probes))
    turn = None if basis is None else orthogonal_basis(basis, rows.shape[1], rows.dtype)[0]
    if rows.shape[0] < 2:
        raise ValueError("probes has 1 row, but choose needs at least 2 pilots, and better half of products.")
    images = _products("matvec", matvec, unravel)(rows)
    if not concrete((rows, images)):
        raise TypeError("choose runs on the host, outside jit, vmap and grad: its result is a choice, not an array.")
    e, y = np.asarray(rows, np.float64), np.asarray(images, np.float64)
    if not np.all(np.isfinite(y)):
        raise ValueError("matvec returned values that are not finite for probes.")
    choice = _choose(e, y, products, positive, labels, turn)
    return choice._replace(options={"groups": groups}) if choice.name == "grouped" else choice


def _flatten(name: str, tree: Any, axes: int = 1) -> tuple[Array, Callable[[Array], Any]]:
    """The leaves side by side as ``[*leading, m]``, and the way back from one vector ``[m]`` to one example."""
    leaves, treedef = jax.tree.flatten(tree)
    leaves = [floating(name, leaf) for leaf in leaves]
    if not leaves:
        raise ValueError(f"{name} holds no arrays: pass an array, or a pytree of arrays.")
    dtypes = {leaf.dtype for leaf in leaves}
    if len(dtypes) > 1:
        raise TypeError(f"{name} has leaves of {', '.join(sorted(map(str, dtypes)))}: cast them to one dtype.")
    leading = leaves[0].shape[:axes]
    if axes and any(leaf.ndim < axes or leaf.shape[:axes] != leading for leaf in leaves):
        wanted = ["[num, *event]", "[num, groups, *event]"][axes - 1]
        got = ", ".join(str(leaf.shape) for leaf in leaves)
        raise ValueError(f"{name} must be {wanted}, with the same leading axes in every leaf, got {got}.")
    shapes = [leaf.shape[axes:] for leaf in leaves]
    sizes = [math.prod(shape) for shape in shapes]
    if sum(sizes) * math.prod(leading) == 0:
        raise ValueError(
            f"{name} has shape {', '.join(str(leaf.shape) for leaf in leaves)} and so no entries: "
            "pass at least one vector of at least one entry."
        )
    ends = np.cumsum(sizes)[:-1].tolist()

    def unravel(vector: Array) -> Any:
        parts = jnp.split(vector, ends)
        return jax.tree.unflatten(treedef, [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)])

    flat = [leaf.reshape(*leading, size) for leaf, size in zip(leaves, sizes, strict=True)]
    return jnp.concatenate(flat, axis=-1), unravel


def _product(name: str, matvec: Matvec, unravel: Callable[[Array], Any]) -> Rows:
    """e ``[m]`` -> A e ``[m]``, held to shapes and dtype."""

    def apply(vector: Array) -> Array:
        example = unravel(vector)
        image = matvec(example)
        leaves, images = jax.tree.leaves(example), jax.tree.leaves(image)
        treedef: Any = jax.tree.structure(example)
        found: Any = jax.tree.structure(image)
        if found != treedef:
            raise TypeError(f"{name} returned {found} for {treedef}: it must return what it takes.")
        pairs = zip(images, leaves, strict=True)
        return jnp.concatenate([like(name, got, leaf.shape, leaf.dtype).reshape(leaf.size) for got, leaf in pairs])

    return apply


def _products(name: str, matvec: Matvec, unravel: Callable[[Array], Any]) -> Rows:
    """``[k, m]`` -> ``[k, m]``: one product a row."""
    return jax.vmap(_product(name, matvec, unravel))


def _beside(name: str, tree: Any, probes: Any) -> Array:
    """``tree`` as rows ``[r, m]``, if its vectors are of the structure, shapes and dtype of ``probes``."""
    rows, _ = _flatten(name, tree)
    shapes = [[leaf.shape[1:] for leaf in jax.tree.leaves(each)] for each in (tree, probes)]
    structures: list[Any] = [jax.tree.structure(each) for each in (tree, probes)]
    if structures[0] != structures[1] or shapes[0] != shapes[1]:
        raise ValueError(f"{name} has vectors of shape {shapes[0]} and probes of {shapes[1]}: they must agree.")
    dtype = jax.tree.leaves(probes)[0].dtype
    if rows.dtype != dtype:
        raise TypeError(f"{name} has dtype {rows.dtype} and probes {dtype}: one dtype for both.")
    return rows


def _number(name: str, value: Any, dtype: Any) -> Array:
    """One number in ``dtype``; an array of floats must have it already."""
    if isinstance(value, int | float) and not isinstance(value, np.generic):
        return jnp.asarray(value, dtype)
    array = floating(name, value)
    if array.shape != ():
        raise ValueError(f"{name} must be one number, got shape {array.shape}.")
    if array.dtype != dtype:
        raise TypeError(f"{name} has dtype {array.dtype} and probes {dtype}: one dtype for both.")
    return array


def _no_more_than_entries(name: str, e: Array) -> tuple[int, int]:
    n, m = e.shape
    if n > m:
        raise ValueError(
            f"probes has {n} rows of {m} entries, but {name} takes at most {m}: "
            f"trace.exact is exact after {m} products."
        )
    return n, m


def _dot(a: Array, b: Array) -> Array:
    """a @ b in full precision: graphics processors round the factors otherwise."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _forms(e: Array, images: Array) -> Array:
    """e_i . y_i for the rows of both."""
    return jnp.sum(e * images, axis=1)


def _eps(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps)


def _root(variance: Array) -> Array:
    """The square root, with a derivative of zero at zero."""
    positive = variance > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)), variance)


def _mean(terms: Array) -> Estimate:
    """The mean of ``[n]`` and its standard error, sd / sqrt(n)."""
    n = terms.size
    stderr = _root(jnp.var(terms, ddof=1)) / math.sqrt(n) if n > 1 else jnp.full((), jnp.inf, terms.dtype)
    return Estimate(jnp.mean(terms), stderr)


def _plus(known: Array, estimate: Estimate) -> Estimate:
    return Estimate(known + estimate.value, estimate.stderr)


def _orthonormal(rows: Array) -> Array:
    """Orthonormal rows that span the given ones, and more where those are dependent; fixed in derivatives."""
    return jnp.linalg.qr(jax.lax.stop_gradient(rows).T)[0].T


def _leave_one_out(r: Array) -> tuple[Array, Array]:
    """For R of a QR decomposition: unit vectors s_i, orthogonal to all columns but the i-th, as columns ``[n, n]``, and
    the distance of each column from the span of the others ``[n]``.

    Both from R^(-T): r_j . R^(-T) e_i = 1 for j = i, else 0. Pivots near rounding are raised.
    """
    largest = jnp.max(jnp.abs(r))
    largest = jnp.where(largest > 0, largest, 1)
    r = r / largest
    pivots, least = jnp.diagonal(r), _eps(r.dtype) ** 0.75  # above rounding, or rounding would turn the s_i
    r = r + jnp.diag(jnp.where(jnp.abs(pivots) < least, jnp.where(pivots < 0, -least, least) - pivots, 0))
    inverse = jax.scipy.linalg.solve_triangular(r, jnp.eye(r.shape[0], dtype=r.dtype), trans=1)
    return _unit_columns(inverse), largest / jnp.linalg.norm(inverse, axis=0)


def _unit_columns(a: Array) -> Array:
    return a / jnp.linalg.norm(a, axis=0, keepdims=True)


def _length_factor(squares: Array, mean: int) -> Array:
    """What makes squared norms their mean: 0 where they are 0."""
    return jnp.where(squares > 0, mean / jnp.where(squares > 0, squares, 1), 0)


def _sines(s: Array) -> Array:
    """Of the angles between the unit columns of s, ``[n, n]``; 1 where they are parallel, and nothing is beside."""
    squares = 1 - _dot(s.T, s) ** 2
    return jnp.sqrt(jnp.where(squares > _eps(s.dtype), squares, 1))


def _beside_each(s: Array, a: Array) -> Array:
    """p_ij . a_i, p_ij the unit vector in the span of s_i and s_j that is orthogonal to s_i; columns, ``[n, n]``."""
    along = _dot(s.T, a)
    products = along.T - _dot(s.T, s) * jnp.diagonal(along)[:, None]
    return jnp.where(_apart(s), products / _sines(s), 0)


def _squares_beside_each(s: Array, a: Array) -> Array:
    """p_ij^T A p_ij, p_ij as in ``_beside_each``."""
    cosines, inside = _dot(s.T, s), _dot(s.T, _dot(a, s))
    own = jnp.diagonal(inside)
    products = own[None] - cosines * (inside + inside.T) + cosines**2 * own[:, None]
    return jnp.where(_apart(s), products / _sines(s) ** 2, 0)


def _apart(s: Array) -> Array:
    """Whether two columns are different ones, and not parallel."""
    return 1 - _dot(s.T, s) ** 2 > _eps(s.dtype)


def _leave_one_out_mean(terms: Array, changes: Array) -> Estimate:
    """The mean of t_i ``[n]``, each the function of probe i and of all the others alike, and its standard error.

    The t_i have one variance v and one covariance c: Var(mean) = (v + (n - 1) c) / n and E[s^2] = v - c. Over probe i
    alone t_i has the mean tr A, whatever the others; so what t_i and t_j have in common depends on both probes. It is
    in D_ij = t_i - t_ij and in D_ji, with t_ij what t_i is without probe j; the rest of D_ij depends on one of the two
    alone, and on another one than that of D_ji. So E[D_ij D_ji] = c, and s^2 / n + mean D_ij D_ji is unbiased.
    """
    n, plain = terms.size, _mean(terms)
    if n == 1:
        return plain
    changes = jax.lax.stop_gradient(changes)
    covariance = (jnp.sum(changes * changes.T) - jnp.sum(jnp.diagonal(changes) ** 2)) / (n * (n - 1))
    return Estimate(plain.value, _root(plain.stderr**2 + jnp.maximum(covariance, 0)))


def _in_basis(matvec: Matvec, probes: Any, *, basis: Array, population: int) -> Estimate:
    """Hutchinson's mean with the probes turned, e -> Q e, for probes without replacement."""
    e, unravel = _flatten("probes", probes)
    return hutchinson(matvec, jax.vmap(unravel)(_dot(e, basis.T)), population=population)


def _choose(
    e: np.ndarray, y: np.ndarray, products: int, positive: bool, labels: np.ndarray | None, basis: Array | None
) -> Choice:
    """The choice from pilots e and their images y, both ``[p, m]``; the options of a draw by groups are left out."""
    p, m = e.shape
    order = 1 << (m - 1).bit_length()
    population = m if products >= m else order
    plain = Choice("hutchinson", functools.partial(hutchinson, population=population), min(products, m), "hadamard")
    norm = np.mean(np.sum(y**2, axis=1))
    if products >= m or norm == 0:
        return plain

    # Hutchinson's variance
    forms, pairs = e @ y.T, p * (p - 1)
    trace = np.mean(np.diag(forms))
    antisymmetric = np.sum((forms - forms.T) ** 2) / (4 * pairs)
    local = e * y
    diagonal = (np.sum(np.sum(local, axis=0) ** 2) - np.sum(local**2)) / pairs
    share = min(max((norm - antisymmetric) / norm, 0.5), 1)
    excess = max(diagonal - trace**2 / m, 0) / norm  # what a diagonal that is not constant takes off
    options, few = [plain], (order - products) / (products * (order - 1))

    # the other variances for every candidate spectrum, in units of |A|_F^2
    spectra, counts = _spectra(m, p)
    mass = np.sqrt(np.sum(counts * spectra**2, axis=1, keepdims=True))
    spectra = spectra / mass
    traces = np.sum(counts * spectra, axis=1)
    signs = np.clip(trace / math.sqrt(norm) / traces, -1, 1) ** 2  # how much of the trace does not cancel
    weights = _weights(y @ y.T, spectra**2, counts)
    if positive:
        weights = weights + _weights((forms + forms.T) / 2, spectra / traces[:, None], counts)
        spread = (2 * np.maximum(1 - traces**2 / m, 0) + traces**2 * np.sum(counts * spectra**4, axis=1) / 2) / p + 1e-3
        z2 = (trace / math.sqrt(norm) - traces) ** 2 / spread
        weights = weights - z2 / 2
    off = np.maximum(share - excess - signs * traces**2 / m, 0)  # the squares of S off its diagonal
    table = [2 * few * off]
    both_sides = 2 * share - 1  # a sketch of the range of A shortens its rows too only so far as A is symmetric
    s = max((products - 1) // 3, 1)
    if (g := products - 2 * s) >= 1:
        options.append(Choice("hutch_pp", functools.partial(hutch_pp, sketch=s), s + g, "rademacher"))
        rho, rest, _ = _left(spectra, counts, spectra**2, s, signs, both_sides)
        table.append(2 / g * share * np.maximum(rho - rest**2 / m, 0))
    if (n := products // 2) >= 2:
        options.append(Choice("xtrace", functools.partial(xtrace, normalize=True), n, "sphere"))
        rho, rest, effective = _left(spectra, counts, spectra**2, n - 1, signs, both_sides)
        free = m - n + 1
        table.append(2 / n * share * (1 + (n - 1) / effective) * np.maximum(rho - rest**2 / free, 0))
    if positive and (n := products) >= 2:
        options.append(Choice("xnystrace", functools.partial(xnystrace, normalize=True), n, "sphere"))
        rho, rest, _ = _left(spectra, counts, spectra, n - 1, np.ones_like(signs), 1.0)
        free = m - n + 1
        correlated = min(m / free, 2) * (1 + (n - 1) * rho / rest**2)  # the first factor was measured, not derived
        table.append(2 / n * correlated * np.maximum(rho - rest**2 / free, 0))
    # what is known: the candidates before, each with each of how much of the squares groups, or a basis, may leave
    if labels is not None and products >= (number := int(labels.max()) + 1):
        sizes, draws = np.bincount(labels), products // number
        random = np.sum(sizes * (sizes - 1)) / (m * (m - 1))  # the share that random groups of those sizes leave
        left = np.outer(off, np.append(random * np.geomspace(number**-0.5, 1, 12), 1))
        weights, table = _beside_known(weights, table, 2 / draws, left, _within(e, y, labels) / norm)
        options.append(Choice("grouped", grouped, draws, "grouped"))
    if basis is not None:
        left = np.outer(np.full(len(weights), share), np.geomspace(1 / 32, 1, 11))
        turned = (e @ np.asarray(basis)) * (y @ np.asarray(basis))
        weights, table = _beside_known(weights, table, 2 * few, left, share - turned @ turned.T / norm)
        estimator = functools.partial(_in_basis, basis=basis, population=order)
        options.append(Choice("rotated", estimator, products, "hadamard"))
    costs = np.stack(table) + 1e-20  # rounding: below it there is nothing to choose between
    ratios = np.minimum(costs / np.min(costs, axis=0), 100) @ np.exp(weights - np.max(weights))
    return options[int(np.argmin(ratios))]


def _within(e: np.ndarray, y: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """From each two pilots an unbiased estimate of sum_g sum_(i != j in g) S_ij^2, off the diagonal of ``[p, p]``.

    A_ij A_kl has the unbiased estimate y_i e_j z_k f_l, for pilots e and f with images y and z. With (a . b)_g the
    product over the coordinates of group g, the sums of A_ij^2 and A_ij A_ji over i and j in g are estimated by
    (y . z)_g (e . f)_g and (y . f)_g (e . z)_g; the mean of both is that of S_ij^2, and sum_i y_i e_i z_i f_i the part
    with i = j.
    """
    squares = np.zeros((len(e), len(e)))
    for g in range(labels.max() + 1):
        members = labels == g
        forms = e[:, members] @ y[:, members].T
        squares += (y[:, members] @ y[:, members].T) * (e[:, members] @ e[:, members].T) + forms * forms.T
    return squares / 2 - (e * y) @ (e * y).T


def _beside_known(
    weights: np.ndarray, table: list[np.ndarray], factor: float, left: np.ndarray, pairs: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Log-weights and variances with one more method, whose variance is ``factor`` times the squares that it leaves.

    ``left`` holds c candidates of those squares for each of n candidates before, ``[n, c]``, and there are n c after.
    Each two pilots give an estimate of them, ``pairs``; the estimates of two and of two others have hardly anything in
    common, and so the spread of the mean is that of independent ones. A single one has no spread, and does not count.
    """
    weights = np.repeat(weights, left.shape[1])
    each = pairs[np.triu_indices(len(pairs), 1)]
    if len(each) > 1:
        weights = weights - (left.ravel() - np.mean(each)) ** 2 / (2 * np.var(each, ddof=1) / len(each) + 1e-12)
    return weights, [*(np.repeat(row, left.shape[1]) for row in table), factor * left.ravel()]


def _spectra(m: int, p: int) -> tuple[np.ndarray, np.ndarray]:
    """Candidate spectra at some of the places 1 .. m ``[candidates, k]``, and how many each stands for ``[k]``."""
    beyond = np.geomspace(128, max(m, 128), 64).astype(int)
    edges = np.unique(np.minimum(np.concatenate([np.arange(128), beyond]), m))
    counts = np.diff(edges).astype(np.float64)
    i = (edges[:-1] + edges[1:] + 1) / 2
    powers = [i**-a for a in (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4)]
    decays = [np.exp(-(i - 1) / length) for length in np.geomspace(0.5, m / 2, 16)]
    ramps = [(1 - (i - 1) / m) ** c for c in (0.5, 1, 2, 4)]
    steps = [
        np.where(i <= k, 1, tail * (1 - i / m) if tail > 0.02 else tail)
        for k in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 25, 30, 40, 50, 65, 80)
        if k <= min(2 * p, m - 1)  # p pilots do not see a much later step
        for tail in (0.3, 0.1, 0.03, 0.01, 1e-3, 1e-6)
    ]
    return np.maximum(np.stack(powers + decays + ramps + steps), 1e-12), counts


def _shrink(sigma: np.ndarray, counts: np.ndarray, r: int) -> tuple[np.ndarray, np.ndarray]:
    """gamma with sum sigma / (sigma + gamma) = r ``[candidates, 1]``, and gamma / (sigma + gamma)."""
    low, high = np.full((len(sigma), 1), -100.0), np.full((len(sigma), 1), 50.0)
    for _ in range(45):
        middle = (low + high) / 2
        many = np.sum(counts * (sigma / (sigma + np.exp(middle))), axis=1, keepdims=True) > r
        low, high = np.where(many, middle, low), np.where(many, high, middle)
    gamma = np.exp(middle)
    return gamma, gamma / (sigma + gamma)


def _left(
    spectra: np.ndarray, counts: np.ndarray, sigma: np.ndarray, r: int, signs: np.ndarray, both_sides: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a sketch of r probes leaves of A: its squared norm, its trace, the effective dimension of the one-sided
    rest.

    With P the projection away from the sketch of ``sigma`` (A^2 for a projection, A for Nystrom), E[P] = D and
    E[P A P] = D A D + D sigma D tr(A sigma D^2) / (gamma^2 r - tr(sigma^2 D^2)) to first order. Where the rows of A
    have nothing to do with its range, P on their side is a random projection to m - r dimensions, and the squared norm
    is tr(D A^2) (1 - r / m); ``both_sides`` is 1 for a symmetric A and 0 there.
    """
    gamma, d = _shrink(sigma, counts, r)
    shrunk = sigma * d / gamma  # sigma / (sigma + gamma)
    free = np.maximum(r - np.sum(counts * shrunk**2, axis=1), 1e-9)
    norm = (
        np.sum(counts * (spectra * d) ** 2, axis=1) + signs * np.sum(counts * spectra * shrunk * d, axis=1) ** 2 / free
    )
    one_sided = np.sum(counts * spectra**2 * d, axis=1) * (1 - r / np.sum(counts))
    norm = both_sides * norm + (1 - both_sides) * one_sided
    trace = np.sqrt(signs) * np.sum(counts * spectra * d, axis=1)
    rest = sigma * d
    return norm, trace, np.sum(counts * rest, axis=1) ** 2 / np.sum(counts * rest**2, axis=1)


def _weights(gram: np.ndarray, sigma: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Log-likelihood of each candidate ``sigma``, of sum 1, given the Gram matrix of the pilots ``[candidates]``.

    What r pilots leave of the others, on average over random orders, r = 1 .. p - 1, against its expectation.
    """
    p = len(gram)
    gram = gram / np.mean(np.diag(gram))
    generator, rounds = np.random.default_rng(0), 16
    left = np.zeros(p - 1)
    for _ in range(rounds):
        order = generator.permutation(p)
        rest = gram[order][:, order]
        for r in range(p - 1):
            pivot, column = rest[0, 0], rest[1:, 0]
            rest = rest[1:, 1:] - (np.outer(column, column) / pivot if pivot > 1e-14 else 0)
            left[r] += np.mean(np.maximum(np.diag(rest), 0)) / rounds
    errors, spreads = [], []
    for r in range(1, p):
        rest = sigma * _shrink(sigma, counts, r)[1]
        share = np.sum(counts * rest, axis=1)
        effective = share**2 / np.sum(counts * rest**2, axis=1)
        errors.append(np.log(np.maximum(left[r - 1], 1e-14) / np.maximum(share, 1e-14)))
        spreads.append(2 / (effective * (p - r)) + 0.05)
    error, spread = np.stack(errors), np.stack(spreads)
    # each r has an error of its own, and all have that of the mean diagonal in common
    common = 2 * np.sum(counts * sigma**2, axis=1) / p
    precision = np.sum(1 / spread, axis=0)
    squares = np.sum(error**2 / spread, axis=0) - common * np.sum(error / spread, axis=0) ** 2 / (
        1 + common * precision
    )
    total = -(squares + np.sum(np.log(spread), axis=0) + np.log1p(common * precision)) / 2
    return total * min(1.0, 8 / (p - 1))  # neighbouring r see nearly the same
