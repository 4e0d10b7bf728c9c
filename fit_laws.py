"""
From finished runs to a scaling law one can trust: the fit, its intervals, its rivals, and what to do next.

    loss = E + sum_i A_i x_i^-alpha_i       E: the floor no x gets below; x_i: users, hours per user, parameters, tokens...

In the order of this file (n rows, k factors, P = 1 + 2k parameters, B problems solved side by side):
    law         log E and log A_i - alpha_i log x_i, k + 1 terms of (B, n); their log-sum-exp is the log of the loss
    objective   the sum over rows of Huber(0.001) of log-residuals, (B,), and its exact gradient, (B, P)
    fit         L-BFGS from a grid of starts, all at once; the best is kept, and a warning given where the best disagree
    bootstrap   the same fit to 1,000 resampled tables, for 95 % intervals of everything that is reported
    held out    the largest scale is left out, then predicted
    forms       other curves in a factor's place (exponential, logarithm, broken power law), compared by AICc and held out
    verdicts    the study's questions, answered in words with numbers
    collect     a grid's folder to one table; figures; main

    python fit_laws.py runs/GRID --out results/GRID                                     # a grid: collects, fits, draws
    python fit_laws.py TABLE.csv --x params tokens --y loss --holdout tokens --out DIR  # any table
    python fit_laws.py results/GRID/laws.json --recommend --users 30 --hours-per-user 2 # what a law says about a plan

The objective is approach 3 of Hoffmann et al. 2022 (arXiv 2203.15556), as refitted by Besiroglu et al. 2024 (2404.10102).
"""
import argparse, csv, json, math, os, re
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import erf, stdtrit

from data import Refused, command, provenance, replacing

DELTA = 1e-3                                                     # Huber's: log-residuals beyond 0.1 % count by their size
FACTORS = ("users", "hours_per_user", "params_encoder")          # of a grid, in the order of the joint law


# ---------------------------------------------------------------- the law
class Form(NamedTuple):
    """A curve for each factor, by its name in SHAPES, on top of a floor or of nothing."""
    shapes: tuple
    floor: bool = True


class Scaled(NamedTuple):
    """A table as the optimiser sees it: u = (log x - middle) / half lies in [-1, 1], whatever the units of x."""
    u: np.ndarray                                                # (k, n)
    half: np.ndarray                                             # (k,)
    low: float                                                   # log of the lowest loss: E stays below


# Each shape returns how a factor's term bends, log term - a: (B, n), and the derivatives by its own parameters q, all (B, 1).
def power(u, half, q):
    """A x^-alpha; q = log(alpha half)."""
    bend = -np.exp(q[0]) * u
    return bend, [bend]


def exponential(u, half, q):
    """A exp(-x / x0); q = log x0 - middle."""
    bend = -np.exp(np.minimum(half * u - q[0], 300))
    return bend, [-bend]


def logarithm(u, half, q):
    """A (log x_end - log x): a straight line over log x that ends in 0 at x_end, exp(q) beyond the largest x."""
    left = np.maximum(1 + np.exp(q[0]) - u, 1e-300)
    return np.log(left), [np.exp(q[0]) / left]


def broken(u, half, q):
    """A x^-alpha (1 + x / x_break)^(alpha - beta): exponent alpha before the break, beta past it."""
    alpha, beta = np.exp(q[0]), np.exp(q[1])
    past = np.logaddexp(0, half * (u - q[2])) / half
    inside = 1 / (1 + np.exp(np.clip(half * (q[2] - u), -300, 300)))
    return (alpha - beta) * past - alpha * u, [alpha * (past - u), -beta * past, (beta - alpha) * inside]


# name: function, formula, the starting values of q
SHAPES = {"power law": (power, "A {x}^-alpha", [(math.log(s),) for s in (.1, .5, 1.5, 5)]),
          "exponential": (exponential, "A exp(-{x}/x0)", [(-2.,), (0.,), (2.,)]),
          "logarithm": (logarithm, "A (log x0 - log {x})", [(-3.,), (0.,), (2.,)]),
          "broken power law": (broken, "A {x}^-alpha (1 + {x}/x0)^(alpha - beta)", [
              (math.log(first), math.log(then), at) for first, then in ((.3, 2), (2, .3)) for at in (-.5, .5)])}


def log_terms(theta, form, scaled):
    """Logs of E and of each factor's term, (B, n) or (B, 1) each, and for each column of theta its term and d log term."""
    columns, terms, slopes = list(theta.T[:, :, None]), [], []
    if form.floor:                                               # E = lowest loss x sigmoid(s): 0 < E < lowest loss
        s = columns.pop(0)
        terms.append(scaled.low - np.logaddexp(0, -s))
        slopes.append((0, 1 / (1 + np.exp(s))))
    for shape, u, half in zip(form.shapes, scaled.u, scaled.half):
        function, _, starts = SHAPES[shape]
        a, *q = [columns.pop(0) for _ in range(1 + len(starts[0]))]
        bend, derivatives = function(u, half, q)
        slopes += [(len(terms), d) for d in (np.ones((1, 1)), *derivatives)]
        terms.append(a + bend)
    return terms, slopes


def log_sum_exp(terms):
    """log of the sum of exp(term), (B, n), and exp(term) / sum for each term."""
    top = terms[0]
    for term in terms[1:]:
        top = np.maximum(top, term)
    parts = [np.exp(term - top) for term in terms]
    total = sum(parts)
    return top + np.log(total), [part / total for part in parts]


# ---------------------------------------------------------------- the objective and its gradient
def huber(residuals):
    clipped = np.clip(residuals, -DELTA, DELTA)
    return clipped * (residuals - clipped / 2)                   # r^2 / 2 near 0, DELTA (|r| - DELTA / 2) beyond


def objective(theta, form, scaled, log_y, weights):
    """sum_rows weight Huber(log y - log law), (B,), and its gradient by theta, (B, P); weights (B, n) count the rows.

    A sum, not a mean: a mean of such small terms makes optimisers with absolute tolerances stop early.
    """
    terms, slopes = log_terms(theta, form, scaled)
    log_law, shares = log_sum_exp(terms)
    residuals = log_y - log_law
    pull = -weights * np.clip(residuals, -DELTA, DELTA)          # d objective / d log law, and d log law / d term = share
    pulls = [pull * share for share in shares]
    gradient = [np.einsum("bn,bn->b", pulls[t], np.broadcast_to(d, pull.shape)) for t, d in slopes]
    return (weights * huber(residuals)).sum(1), np.stack(gradient, 1)


# ---------------------------------------------------------------- the fit
def minimise(function, x, ticks, memory=10):
    """L-BFGS on B problems side by side: from x (B, P) to (x, f) where f gets no lower, or after so many evaluations.

    `function(x[i], i)` gives f (b,) and its gradient (b, P) for the problems i. A tick evaluates every unfinished
    problem once, at the trial step of its own line search: bisection to the weak Wolfe conditions, which copes with
    kinks such as Huber's (Lewis & Overton 2013). A search that fails starts afresh along the gradient, then ends.
    """
    dot = lambda a, b: np.einsum("bp,bp->b", a, b)
    downhill = lambda g, length: -length * g / np.maximum(np.linalg.norm(g, axis=1, keepdims=True), 1e-300)
    B, P = x.shape
    x, active = x.copy(), np.arange(B)
    f, g = function(x, active)
    S, Y = np.zeros((2, B, memory, P))                           # the last steps, and how the gradient changed over them
    d, step, near, far = downhill(g, .1), np.ones(B), np.zeros(B), np.full(B, np.inf)
    afresh, quiet = np.ones(B, bool), np.zeros(B, int)
    for _ in range(ticks):
        trial = x[active] + step[active, None] * d[active]
        f_trial, g_trial = function(trial, active)
        slope = dot(g[active], d[active])
        too_far = ~(f_trial <= f[active] + 1e-4 * step[active] * slope)          # true for what is no number, too
        too_near = ~too_far & (dot(g_trial, d[active]) < .9 * slope)
        far[active[too_far]], near[active[too_near]] = step[active[too_far]], step[active[too_near]]
        missed, good = active[too_far | too_near], ~(too_far | too_near)
        step[missed] = np.where(np.isinf(far[missed]), 2 * near[missed], (near[missed] + far[missed]) / 2)

        i = active[good]                                         # a step is taken: remember it, choose the next direction
        S[i] = np.concatenate([S[i, 1:], (trial[good] - x[i])[:, None]], 1)
        Y[i] = np.concatenate([Y[i, 1:], (g_trial[good] - g[i])[:, None]], 1)
        quiet[i] = np.where(f[i] - f_trial[good] > 1e-12 * f_trial[good], 0, quiet[i] + 1)
        x[i], f[i], g[i], afresh[i] = trial[good], f_trial[good], g_trial[good], False
        curvature = np.einsum("bmp,bmp->bm", S[i], Y[i])
        rho = np.where(curvature > 0, 1 / np.maximum(curvature, 1e-300), 0)
        q, used = g[i].copy(), []
        for m in reversed(range(memory)):                        # the two loops of L-BFGS (Nocedal & Wright, 7.4)
            used.append(rho[:, m] * dot(S[i, m], q))
            q -= used[-1][:, None] * Y[i, m]
        q *= np.where(curvature[:, -1] > 0, curvature[:, -1] / np.maximum(dot(Y[i, -1], Y[i, -1]), 1e-300), 1)[:, None]
        for m in range(memory):
            q += (used.pop() - rho[:, m] * dot(Y[i, m], q))[:, None] * S[i, m]
        d[i], step[i], near[i], far[i] = -q, 1, 0, np.inf

        failed = missed[(far[missed] - near[missed] < 1e-10 * np.maximum(near[missed], 1)) | (step[missed] > 1e10)]
        again = failed[~afresh[failed]]
        S[again], Y[again], d[again], afresh[again] = 0, 0, downhill(g[again], 1e-3), True
        step[again], near[again], far[again] = 1, 0, np.inf
        quiet[np.setdiff1d(failed, again)] = 5
        active = active[quiet[active] < 5]
        if not len(active):
            break
    return x, f


def solve(form, scaled, log_y, starts, weights, keep):
    """Fit B weightings of one table, weights (B, n), from M starts each: a short run of all, a long one of the best `keep`.

    Returns theta (B, keep, P) and the objective (B, keep), best first. Chunks of problems share the cores, in threads.
    """
    def run(theta, owner, ticks):
        chunks = np.array_split(np.arange(len(theta)), max(1, round(len(theta) * len(log_y) / 100_000)))
        one = lambda c: minimise(lambda x, i: objective(x, form, scaled, log_y, weights[owner[c[i]]]), theta[c], ticks)
        with np.errstate(all="ignore"), ThreadPoolExecutor(os.cpu_count()) as pool:
            return [np.concatenate(part) for part in zip(*pool.map(one, chunks))]

    def best(theta, f, keep):
        theta, f = theta.reshape(B, -1, theta.shape[1]), f.reshape(B, -1)
        order = np.argsort(f, axis=1)[:, :keep]
        return np.take_along_axis(theta, order[:, :, None], 1), np.take_along_axis(f, order, 1)

    B = len(weights)
    theta, f = best(*run(np.tile(starts, (B, 1)), np.repeat(np.arange(B), len(starts)), 40), keep)
    keep = theta.shape[1]
    return best(*run(theta.reshape(B * keep, -1), np.repeat(np.arange(B), keep), 2000), keep)


def grid_of_starts(form, scaled, log_y):
    """Every combination of the shapes' starting values and three floors; what E leaves of the loss is shared evenly. (M, P)"""
    starts, mean_loss = [], math.exp(log_y.mean())
    for s, *choice in product((-3., 0., 2.) if form.floor else (None,), *(SHAPES[shape][2] for shape in form.shapes)):
        E = 0 if s is None else math.exp(scaled.low) / (1 + math.exp(-s))
        start = [] if s is None else [s]
        for shape, u, half, q in zip(form.shapes, scaled.u, scaled.half, choice):
            bend, _ = SHAPES[shape][0](u, half, np.array(q)[:, None, None])
            start += [math.log((mean_loss - E) / len(choice)) - math.log(np.exp(bend).mean()), *q]
        starts.append(start)
    return np.array(starts)


class Fit(NamedTuple):
    """A fitted law; theta is in scaled units (see Scaled), `in_units` gives those of the table."""
    x: tuple                                                     # names of the k factors
    y: str
    form: Form
    middle: np.ndarray                                           # (k,)
    half: np.ndarray                                             # (k,)
    low: float
    theta: np.ndarray                                            # (P,)
    draws: np.ndarray                                            # (bootstrap, P): the fits to resampled tables
    widen: float                                                 # what their spread is multiplied by (see `resample`)
    objective: float
    aicc: float
    residuals: np.ndarray                                        # (n,) log y - log law
    warnings: list


def fit(table, x, y, form=None, bootstrap=0, seed=0):
    """Fit `form` (power laws on a floor, if not said) to `table` {column: (n,)}; Refused where the table can't carry it."""
    form = form or Form(("power law",) * len(x))
    columns, log_y = np.log([table[name] for name in x]), np.log(table[y])
    half, middle = np.ptp(columns, axis=1) / 2, (columns.max(1) + columns.min(1)) / 2
    P = form.floor + sum(1 + len(SHAPES[shape][2][0]) for shape in form.shapes)
    if len(log_y) < max(5, P):
        raise Refused(f"{len(log_y)} rows can't carry a law of {' and '.join(x)} with {P} parameters: at least {max(5, P)} are needed")
    for name, column in zip(x, columns):
        if len(np.unique(column)) < 3:
            raise Refused(f"the column '{name}' has {len(np.unique(column))} distinct value(s), and 3 are the least that show an "
                          "exponent: leave it out of --x, or add runs")
    scaled = Scaled((columns - middle[:, None]) / half[:, None], half, log_y.min())
    starts = grid_of_starts(form, scaled, log_y)
    found, objectives = (part[0] for part in solve(form, scaled, log_y, starts, np.ones((1, len(log_y))), keep=20))
    residuals = log_y - log_sum_exp(log_terms(found[:1], form, scaled)[0])[0][0]
    result = Fit(tuple(x), y, form, middle, half, scaled.low, found[0], None, 1, objectives[0], aicc(residuals, P), residuals, [])
    result = result._replace(warnings=doubts(result, found[objectives <= objectives[0] * 1.001]))
    if not bootstrap:
        return result
    weights, widen = resample(table, x, bootstrap, np.random.default_rng(seed))
    apart = [found[0]]                                           # start where fits to the table ended, and at two of the grid
    for other in found[1:]:
        if len(apart) < 4 and min(np.abs(np.tanh((other - one) / 3)).max() for one in apart) > .2:
            apart.append(other)
    starts = np.concatenate([apart, starts[[len(starts) // 3, -1 - len(starts) // 3]]])
    return result._replace(draws=solve(form, scaled, log_y, starts, weights, keep=2)[0][:, 0], widen=widen)


def law(fitted, x, theta=None):
    """The loss at x (k, m): (m,), or (B, m) for several theta (B, P)."""
    x = np.log(np.atleast_2d(np.asarray(x, float)))
    scaled = Scaled((x - fitted.middle[:, None]) / fitted.half[:, None], fitted.half, fitted.low)
    with np.errstate(over="ignore", under="ignore"):
        loss = np.exp(log_sum_exp(log_terms(np.atleast_2d(fitted.theta if theta is None else theta), fitted.form, scaled)[0])[0])
    return loss[0] if theta is None else loss


def in_units(fitted, theta=None):
    """{"E": (B,), "A": (B, k), "alpha": ..., "beta": ..., "x0": ...} in the table's units; NaN where a shape has no such part."""
    theta = np.atleast_2d(fitted.theta if theta is None else theta)
    columns, k = list(theta.T), len(fitted.x)
    E = np.exp(fitted.low - np.logaddexp(0, -columns.pop(0))) if fitted.form.floor else np.zeros(len(theta))
    A, alpha, beta, x0 = np.full((4, len(theta), k), np.nan)
    for i, (shape, middle, half) in enumerate(zip(fitted.form.shapes, fitted.middle, fitted.half)):
        a, *q = [columns.pop(0) for _ in range(1 + len(SHAPES[shape][2][0]))]
        if shape in ("power law", "broken power law"):
            alpha[:, i] = np.exp(q[0]) / half
            a = a + alpha[:, i] * middle
        if shape == "broken power law":
            beta[:, i], x0[:, i] = np.exp(q[1]) / half, np.exp(np.minimum(middle + half * q[2], 700))
        if shape == "exponential":
            x0[:, i] = np.exp(np.minimum(middle + q[0], 700))
        if shape == "logarithm":
            a, x0[:, i] = a - math.log(half), np.exp(np.minimum(middle + half * (1 + np.exp(q[0])), 700))
        A[:, i] = np.exp(np.clip(a, -700, 700))
    return {"E": E, "A": A, "alpha": alpha, "beta": beta, "x0": x0}


def doubts(fitted, rivals):
    """Sentences on what in a fit must not be trusted; `rivals` (m, P) are the ends within 0.1 % of the best objective."""
    said, low, ends = [], math.exp(fitted.low), in_units(fitted, rivals)
    for name, values, far in [("E", ends["E"], .01 * low)] + [
            (f"alpha of {x}", column, .02) for x, column in zip(fitted.x, ends["alpha"].T) if np.isfinite(column).all()]:
        if np.ptp(values) > far:
            said.append(f"flat surface: starts that end within 0.1 % of the best objective disagree on {name} "
                        f"({values.min():.4g} to {values.max():.4g})")
    if fitted.form.floor and not 1e-4 < ends["E"][0] / low < 1 - 1e-4:
        said.append(f"E is at its bound, {'0: the table shows no floor' if ends['E'][0] < .5 * low else 'the lowest loss'}")
    for x, shape, alpha, half in zip(fitted.x, fitted.form.shapes, ends["alpha"][0], fitted.half):
        if shape == "power law" and not 5e-4 < alpha * half < 15:
            said.append(f"alpha of {x} is at its bound, {'0: the loss does not fall with it' if alpha * half < 1 else 'where only the smallest value feels it'}")
    return said


# ---------------------------------------------------------------- bootstrap
def resample(table, x, B, rng):
    """Weights (B, n) that stand for resampled tables, and the factor by which the spread of their fits is widened.

    Rows are drawn with replacement. With a column `seed`, whole seeds are: runs of a seed share users and weights, so their
    errors go together. Few seeds say little about their spread, so it is widened as for a mean of S values,
    sqrt(S / (S - 1)) t_S-1 / 1.96 (measured: results/coverage.md). Two seeds give three different tables, which tell nothing:
    then rows are drawn, and what the runs of a seed share is not in the intervals. Resamples with fewer than three values of a factor are redrawn.
    """
    n = len(table[x[0]])
    groups = np.unique(table["seed"], return_inverse=True)[1] if "seed" in table else np.zeros(n, int)
    S = groups.max() + 1
    if S < 3:
        groups, S, widen = np.arange(n), n, 1.
    else:
        widen = math.sqrt(S / (S - 1)) * stdtrit(S - 1, .975) / stdtrit(1e9, .975)
    levels = [np.unique(table[name], return_inverse=True)[1] for name in x]
    kinds = [np.eye(level.max() + 1)[level] for level in levels if level.max() < 20]
    weights = np.zeros((0, n))
    for _ in range(50):
        drawn = rng.multinomial(S, np.full(S, 1 / S), size=B)[:, groups].astype(float)
        enough = np.all([((drawn > 0) @ kind > 0).sum(1) >= 3 for kind in kinds] or [np.ones(B, bool)], axis=0)
        weights = np.concatenate([weights, drawn[enough]])[:B]
        if len(weights) == B:
            return weights, widen
    raise Refused(f"whole seeds can't be resampled: hardly any draw of them has 3 values of {' and '.join(x)}; remove the column seed")


def interval(value, draws, widen=1., log=False):
    """95 % interval of `value` from its bootstrap draws, by percentiles; widened around the value, on a log scale if so wished."""
    if draws is None:
        return None
    if log:
        with np.errstate(divide="ignore"):
            return [math.exp(v) for v in interval(np.log(value), np.log(draws), widen)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return [float(value + widen * (low - value)), float(value + widen * (high - value))]


# ---------------------------------------------------------------- forms compared: AICc, and the largest scale held out
def aicc(residuals, parameters):
    """AICc of the density exp(-Huber(r) / t) / Z(t): at any scale t its maximum-likelihood law is the one that is fitted here."""
    t = np.geomspace(1e-13, 10, 4000)
    Z = np.sqrt(2 * np.pi * t) * erf(DELTA / np.sqrt(2 * t)) + 2 * t / DELTA * np.exp(-DELTA ** 2 / (2 * t))
    n, k = len(residuals), parameters + 1                        # t is a parameter as well
    deviance = np.min(2 * huber(residuals).sum() / t + 2 * n * np.log(Z))
    return float(deviance + 2 * k + 2 * k * (k + 1) / (n - k - 1)) if n > k + 1 else math.inf


def take(table, rows):
    return {name: column[rows] for name, column in table.items()}


def held_out(table, x, y, form, column):
    """Fit without the largest scale of `column` (what is within 10 % of the maximum, a tenth of the rows at least), predict it.

    Returns {"column", "n", "median_relative_error", "worst_relative_error", "truth", "predicted"}; Refused if too little is left.
    """
    values = table[column]
    top = values >= min(values.max() / 1.1, np.quantile(values, .9))
    try:
        fitted = fit(take(table, ~top), x, y, form)
    except Refused as refusal:
        raise Refused(f"the largest {column} can't be held out: without it, {refusal}") from None
    truth, predicted = table[y][top], law(fitted, [table[name][top] for name in x])
    error = np.abs(predicted / truth - 1)
    return {"column": column, "n": int(top.sum()), "median_relative_error": float(np.median(error)),
            "worst_relative_error": float(error.max()), "truth": truth, "predicted": predicted}


def try_held_out(*arguments):
    try:
        return held_out(*arguments)
    except Refused:
        return None


# ---------------------------------------------------------------- verdicts: questions answered in words with numbers
RIVALS = (("power law", True), ("power law", False), ("exponential", True), ("logarithm", False), ("broken power law", False))


def analyse(table, x, y, floor=True, bootstrap=1000, column=None, seed=0):
    """The law asked for, then its rivals: [(name, Fit, held-out errors or None)], and {"power_law_of_X": verdict}."""
    form = Form(("power law",) * len(x), floor)
    laws = [("loss by " + ", ".join(x), fit(table, x, y, form, bootstrap, seed), column and held_out(table, x, y, form, column))]
    verdicts = {}
    for i, factor in enumerate(x):
        tried = []
        for shape, on_floor in RIVALS:
            rival = Form(tuple(shape if j == i else "power law" for j in range(len(x))), on_floor)
            try:
                tried.append((f"{shape} in {factor}" + ", on a floor" * on_floor, fit(table, x, y, rival),
                              try_held_out(table, x, y, rival, column or factor)))
            except Refused:                                      # too few rows for a form with more parameters
                continue
        verdicts[f"power_law_of_{factor}"] = judge(factor, i, laws[0][1], tried)
        laws += tried
        if len(x) > 1:
            laws.append((f"{factor} alone", fit(table, (factor,), y), try_held_out(table, (factor,), y, None, column or factor)))
    return laws, verdicts


def judge(factor, i, joint, tried):
    """Is the loss a power law of `factor`? Only where no other form fits or predicts better."""
    of_power = lambda law: law[1].form.shapes[i] == "power law"
    mine = min(filter(of_power, tried), key=lambda law: law[1].aicc)
    other = min((law for law in tried if not of_power(law)), key=lambda law: law[1].aicc, default=None)
    alpha = in_units(joint)["alpha"][0, i]
    ci95 = interval(alpha, None if joint.draws is None else in_units(joint, joint.draws)["alpha"][:, i], joint.widen)
    verdict = {"value": float(alpha), "ci95": ci95, "claimed": False}
    what = f"loss against {factor}: "
    if other is None or math.isinf(other[1].aicc) or math.isinf(mine[1].aicc):
        return {**verdict, "text": what + "too few rows to tell a power law from other forms"}
    ahead = other[1].aicc - mine[1].aicc
    errors = [law[2] and law[2]["median_relative_error"] for law in (mine, other)]
    told = f"AICc {abs(ahead):.1f} {'better' if ahead > 0 else 'worse'} than {other[0]}"
    if None not in errors:
        told += f"; error on the largest {mine[2]['column']}, held out: {errors[0]:.2%} against {errors[1]:.2%}"
    predicts = None in errors or errors[0] <= errors[1] + np.median(np.abs(mine[1].residuals)) / 2
    if ahead > 2 and predicts:
        return {**verdict, "claimed": True, "text": what + f"a power law, exponent {alpha:.3f}{span(ci95)} ({told})"}
    if ahead < -2:
        return {**verdict, "text": what + f"no power law: {other[0]} fits better ({told})"}
    return {**verdict, "text": what + f"not decided between {mine[0]} and {other[0]} ({told})"}


def span(ci95, digits=3):
    return "" if ci95 is None else f" [{ci95[0]:.{digits}g}, {ci95[1]:.{digits}g}]"


def gains(units, x):
    """What one more per cent of each factor takes off the loss, in per cent of its unit: alpha_i A_i x_i^-alpha_i, (B, k)."""
    return units["alpha"] * units["A"] * np.asarray(x, float) ** -units["alpha"]


def fitting_capacity(units, x, data):
    """Parameters P (the last factor) for which 1 % more of them gains as much as 1 % more data, gathered the better way. (B,)

    That is the optimum when cost goes as parameters x data (Hoffmann et al. 2022): c C P^-c = max_i alpha_i A_i x_i^-alpha_i.
    An additive law falls with P for ever, so it has a best P only against a cost.
    """
    gain = gains(units, np.append(x, 1.))
    with np.errstate(all="ignore"):
        return np.minimum((gain[:, -1] / gain[:, :-1][:, data].max(1)) ** (1 / units["alpha"][:, -1]), 1e300)


def users_or_hours(joint, table):
    """Do users beat hours per user? By exponents, by the law at equal total hours, and by pairs of cells, without a law."""
    units, many = in_units(joint), joint.draws is not None and in_units(joint, joint.draws)
    difference = float(units["alpha"][0, 0] - units["alpha"][0, 1])
    ci95 = interval(difference, many["alpha"][:, 0] - many["alpha"][:, 1], joint.widen) if many else None
    says = lambda low, high, more, less: more if low > 0 else less if high < 0 else "can't be told apart from"
    verdicts = {"users_minus_hours_exponent": {"value": difference, "ci95": ci95, "text": (
        f"exponent of users {units['alpha'][0, 0]:.3f}, of hours per user {units['alpha'][0, 1]:.3f}, difference {difference:+.3f}{span(ci95)}: "
        + (f"users' is {says(*ci95, 'steeper than', 'flatter than')} that of hours per user" if ci95 else "no interval was asked for"))}}
    half = [table[name].max() / 2 for name in joint.x[:2]] + [table[name].max() for name in joint.x[2:]]
    wider, deeper = ([[v * (2 if i == j else 1)] for i, v in enumerate(half)] for j in (0, 1))
    ratio = float(law(joint, wider)[0] / law(joint, deeper)[0])
    ci95 = many and interval(ratio, law(joint, wider, joint.draws)[:, 0] / law(joint, deeper, joint.draws)[:, 0], joint.widen, log=True)
    verdicts["equal_hours_loss_ratio"] = {"value": ratio, "ci95": ci95 or None, "text": (
        f"at equal total hours, {2 * half[0]:.0f} users x {half[1]:.3g} h lose {ratio:.4f}{span(ci95 or None, 4)} times what {half[0]:.0f} users x "
        f"{2 * half[1]:.3g} h do" + (f": twice the users is {says(*np.log(ci95), 'worse than', 'better than')} twice the hours" if ci95 else ""))}
    return verdicts


def grid_minima(table):
    """Of each data volume (users, cap), the capacity with the lowest loss (mean over seeds): [{..., "edge": None | "largest" | "smallest"}]."""
    minima = []
    sizes = np.unique(table["params_encoder"])
    for users, cap in sorted(set(zip(table["users"], table["cap"]))):
        here = (table["users"] == users) & (table["cap"] == cap)
        mean = {P: table["loss"][here & (table["params_encoder"] == P)].mean() for P in sizes if (here & (table["params_encoder"] == P)).any()}
        if len(mean) > 1:
            P = min(mean, key=mean.get)
            minima.append({"users": int(users), "hours": float(table["hours"][here].mean()), "params_encoder": int(P),
                           "edge": "largest" if P == max(mean) else "smallest" if P == min(mean) else None})
    return minima


def capacity(joint, by_hours, table):
    """Which capacity fits a data volume: P_opt ~ D^g from the law of hours and parameters, the grid's minima, and a table."""
    units, many = in_units(by_hours), by_hours.draws is not None and in_units(by_hours, by_hours.draws)
    g = float(units["alpha"][0, 0] / units["alpha"][0, 1])
    ci95 = interval(g, many["alpha"][:, 0] / many["alpha"][:, 1], by_hours.widen) if many else None
    minima = grid_minima(table)
    inside = [m for m in minima if not m["edge"]]
    at_largest = sum(m["edge"] == "largest" for m in minima)
    own = f"the grid's own best is at, or beyond, its largest model for {at_largest} of {len(minima)} data volumes"
    slope = None
    if len(inside) > 2 and len({m["hours"] for m in inside}) > 2:
        slope = float(np.polyfit(*np.log([[m["hours"], m["params_encoder"]] for m in inside]).T, 1)[0])
        own += f", and goes as D^{slope:.2f} over the {len(inside)} others"
    plans = []
    data = [i for i, name in enumerate(joint.x) if name != "params_encoder"]
    levels = [np.unique(table[name]) if name != "hours_per_user" else np.unique([table[name][table["cap"] == c].mean() for c in set(table["cap"])])
              for name in joint.x[:-1]]
    for x in product(*levels):
        P = fitting_capacity(in_units(joint), x, data)[0]
        plans.append({**{name: float(v) for name, v in zip(joint.x, x)}, "params_encoder": float(P), "ci95": joint.draws is not None and interval(
            P, fitting_capacity(in_units(joint, joint.draws), x, data), joint.widen, log=True) or None,
            "beyond_twice_the_range": not table["params_encoder"].min() / 2 <= P <= 2 * table["params_encoder"].max()})
    return {"value": g, "ci95": ci95, "grid_exponent": slope, "grid_minima": minima, "table": plans, "text": (
        f"best parameters go as hours^g, g = {g:.2f}{span(ci95)}, where 1 % more parameters gain what 1 % more data gain; {own}")}


def ranks(values):
    """Ranks from 0, ties sharing their mean rank."""
    order, where, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count + 1) / 2)[where]


def follows(table, score, bootstrap, seed):
    """Spearman's rank correlation of a downstream score with the pre-training loss, over the cells that have both."""
    have = np.isfinite(table[score])
    pair = np.array([table["loss"][have], table[score][have]])
    rho = lambda v: float(np.corrcoef(ranks(v[0]), ranks(v[1]))[0, 1]) if min(map(np.ptp, v)) > 0 else 0.
    rng, n = np.random.default_rng(seed), pair.shape[1]
    draws = np.array([rho(pair[:, rng.integers(n, size=n)]) for _ in range(bootstrap)])
    ci95 = [float(v) for v in np.percentile(draws, [2.5, 97.5])] if bootstrap else None
    sure = "" if ci95 is None else ": better reconstruction, better features" if ci95[1] < 0 else ": no sure relation"
    return {"value": rho(pair), "ci95": ci95, "n": n, "text": f"{score} against loss over {n} cells: rank correlation {rho(pair):+.2f}{span(ci95, 2)}{sure}"}


def recommend(path, users, hours_per_user):
    """Print what the law in `path` says about a plan: capacity, expected loss, and where the next hour should be recorded."""
    try:
        law0 = json.loads(Path(path).read_text())["laws"][0]
        names, limits = law0["x"], [law0["range"][name] for name in law0["x"]]
        units = {key: np.array([law0[key]]) for key in ("E", "A", "alpha")}
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise Refused(f"{path} is no laws.json of this program ({type(error).__name__}: {error})") from None
    plan = {"users": users, "hours_per_user": hours_per_user}
    lacking = [name for name in names if name in plan and not (plan[name] or 0) > 0]
    if lacking or not set(names) & set(plan):
        raise Refused(f"{path} holds a law of {', '.join(names)}: --recommend needs one of users or hours per user, and "
                      f"positive --{' and --'.join(n.replace('_', '-') for n in lacking or plan)}")
    draws = law0["draws"] and {key: np.array(value) for key, value in law0["draws"].items()}
    between = lambda value, many, log=True: span(draws and interval(value, many, law0["widen"], log))
    x = [plan[name] for name in names if name in plan]
    print(f"a plan of {users:g} users x {hours_per_user:g} h each, by the law of {law0['name']}")
    if names[-1] == "params_encoder":
        data = list(range(len(x)))
        P = fitting_capacity(units, x, data)[0]
        print(f"  capacity that fits    {P:,.0f} encoder parameters{between(P, draws and fitting_capacity(draws, x, data))}")
        if not limits[-1][0] <= P <= limits[-1][1]:
            P = float(np.clip(P, *limits[-1]))
            print(f"                        (not among those that were run; the loss below is for {P:,.0f})")
        x.append(P)
    at = lambda u: u["E"] + (u["A"] * np.array(x) ** -u["alpha"]).sum(1)
    print(f"  expected loss         {at(units)[0]:.4f}{between(at(units)[0], draws and at(draws), True)}, one run within {law0['scatter']:.1%} of it")
    if {"users", "hours_per_user"} <= set(names):
        one = gains(units, x)[0]
        ratio, many = one[0] / one[1], draws and (lambda g: g[:, 0] / g[:, 1])(gains(draws, x))
        print(f"  the next hour         to {'a new user' if ratio > 1 else 'the users there are'}: a new user's hour gains {ratio:.2f}{between(ratio, many)} times as much")
    for name, value, (low, high) in zip(names, x, limits):
        if not low / 2 <= value <= 2 * high:
            print(f"  beyond the law        {name} {value:g} is more than twice outside what was fitted ({low:g} to {high:g}): a guess")


# ---------------------------------------------------------------- what is read
def numbers(rows, name, where):
    """The column `name` of rows [(line, {column: text})] as positive numbers; Refused with the line of the first that isn't."""
    values = []
    for line, row in rows:
        try:
            value = float(row[name])
        except (TypeError, ValueError):
            raise Refused(f"{where}, {line}: '{name}' is '{row[name]}', not a number") from None
        if not (math.isfinite(value) and value > 0):
            raise Refused(f"{where}, {line}: '{name}' is {value:g}, but a power law needs positive, finite numbers; remove or mend the row")
        values.append(value)
    return np.array(values)


def read_table(path, names):
    """The columns `names` of a CSV file, and `seed` if it has one: {column: (n,)}."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = [(f"line {i}", row) for i, row in enumerate(csv.reader(file), 1) if any(map(str.strip, row))]
    except (UnicodeDecodeError, csv.Error):
        raise Refused(f"{path} is not a CSV text file") from None
    header = [name.strip() for name in lines[0][1]] if lines else []
    if len(set(header)) < len(header):
        raise Refused(f"{path} has two columns of one name: rename one")
    unknown = [name for name in names if name not in header]
    if unknown:
        raise Refused(f"{path} has no column '{unknown[0]}'; it has: {', '.join(header)[:300] or 'nothing'}")
    for line, row in lines[1:]:
        if len(row) != len(header):
            raise Refused(f"{path}, {line} has {len(row)} fields, its header {len(header)}")
    rows = [(line, dict(zip(header, row))) for line, row in lines[1:]]
    table = {name: numbers(rows, name, path) for name in names}
    if "seed" in header:
        table["seed"] = np.array([row["seed"].strip() for _, row in rows])
    return table


FIRST = ("name data users hours_cap hours_per_user hours windows width depth heads params_encoder params seed loss loss_last "
         "baseline_loss").split()
SAME = "data fingerprint patch mask_ratio sensors masking target positions batch optimizer precision decoder_width decoder_depth".split()
SAME_BY_MODEL = ("steps", "lr")                                  # these may follow the size, and nothing else


def collect(folder, partial, mixed):
    """The finished cells of a grid, one dict each with their probes' scores; Refused where they can't be one table."""
    cells = sorted(path for path in Path(folder).iterdir() if path.is_dir() and not path.name.startswith("."))
    missing = [cell.name for cell in cells if not (cell / "result.json").is_file()]
    if not cells or len(missing) == len(cells):
        raise Refused(f"{folder} holds no finished cell (of {len(cells)}): run sweep.sh first")
    if missing and not partial:
        raise Refused(f"{len(missing)} of {len(cells)} cells of {folder} are not done ({', '.join(missing[:8])}{', ...' * (len(missing) > 8)}): "
                      "finish the sweep, or fit what is there with --partial")
    rows = []
    for cell in (cell for cell in cells if cell.name not in missing):
        probes = sorted(cell.glob("finetune/*-probe.json"))
        try:
            row = {"name": cell.name, **json.loads((cell / "result.json").read_text())}
            for probe in probes:
                scores = json.loads(probe.read_text())
                row.update({f"{probe.name[:-len('-probe.json')]}_{key}": scores.get(key) for key in ("macro_f1", "accuracy", "macro_f1_sd")})
        except (ValueError, AttributeError):
            raise Refused(f"{cell} holds a result or a score that is not readable JSON: delete that file and run the cell again") from None
        rows.append({key: value for key, value in row.items() if not isinstance(value, (dict, list))})
    lacking = [(row["name"], key) for row in rows for key in ("loss", "hours", *FACTORS) if row.get(key) is None]
    if lacking:
        raise Refused(f"{folder}/{lacking[0][0]}/result.json has no '{lacking[0][1]}': it is not a result of pretrain.py")
    model = lambda row: f"{row.get('width')}x{row.get('depth')}x{row.get('heads')} "
    for key, of in [(key, lambda row: "") for key in SAME] + [(key, model) for key in SAME_BY_MODEL]:
        found = {}
        for row in rows:
            found.setdefault(of(row), {}).setdefault(str(row.get(key)), []).append(row["name"])
        several = next(((who, values) for who, values in found.items() if len(values) > 1), None)
        if several and not mixed:
            raise Refused(f"{folder} mixes configurations: {several[0]}cells have {key} " + " and ".join(
                f"{value[:12]} ({len(names)}, e.g. {names[0]})" for value, names in list(several[1].items())[:3])
                + "; give each its own folder, or fit them together with --mixed")
    return sorted(rows, key=lambda row: [row[k] for k in FACTORS] + [str(row.get("seed"))]), missing


def write_csv(path, rows):
    keys = list(dict.fromkeys(key for row in rows for key in row))
    scores = sorted(key for key in keys if re.search("_(macro_f1|accuracy|macro_f1_sd)$", key))
    columns = [key for key in FIRST if key in keys] + [key for key in keys if key not in FIRST and key not in scores] + scores
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


# ---------------------------------------------------------------- figures
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]           # Okabe and Ito: safe for all eyes
TITLES = {"users": "users", "hours_per_user": "hours per user", "hours": "hours in all", "params_encoder": "encoder parameters"}


def panels(columns=1, height=4.6):
    import matplotlib                                            # here, so that --help and a refusal don't wait for it
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    figure, axes = plt.subplots(1, columns, figsize=(8 if columns == 1 else 4.7 * columns, height), squeeze=False, layout="constrained")
    return figure, axes[0]


def readable(axis):
    """Log axis whose ticks are numbers a reader knows: 1, 2, 5 of each decade, or round steps within one; 20k and 3M."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,), numticks=12) if decades > .8 else
                           FixedLocator(MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: next((f"{v / s:.3g}{unit}" for s, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "0k"))
                                                              if v >= s and unit != "0k"), f"{v / 1e3:g}k" if v >= 1e4 else f"{v:.3g}")))
    axis.set_view_interval(low, high, ignore=True)


def log_axes(axes, xlabel, ylabel, x=True, y=True):
    axes.set(xlabel=TITLES.get(xlabel, xlabel), ylabel=TITLES.get(ylabel, ylabel))
    for axis, wanted in ((axes.xaxis, x), (axes.yaxis, y)):
        if wanted:
            readable(axis)


def band(fitted, x):
    """95 % of what new runs at x (k, m) would score: the law's interval and the runs' scatter, added as independent. (2, m)"""
    centre = np.log(law(fitted, x))
    sides = np.zeros((2, 1)) if fitted.draws is None else fitted.widen * (
        np.percentile(np.log(law(fitted, x, fitted.draws)), [2.5, 97.5], axis=0) - centre)
    return np.exp(centre + np.array([[-1], [1]]) * np.hypot(sides, scatter(fitted)))


def scatter(fitted):
    """Half-width in log loss that holds 95 % of runs around the law, corrected for the parameters spent on them."""
    n, P = len(fitted.residuals), len(fitted.theta)
    return float(np.percentile(np.abs(fitted.residuals), 95) * math.sqrt(n / max(n - P, 1)))


def curve(axes, fitted, factor, others, low, high, colour, label=None, shade=True, beyond=4):
    """The law along one factor from low to high, dashed on to `beyond` times high; others {name: value} stay."""
    for start, stop, style in ((low, high, "-"), (high, high * beyond, "--")):
        grid = np.geomspace(start, stop, 60)
        x = [grid if name == factor else np.full(60, others[name]) for name in fitted.x]
        axes.plot(grid, law(fitted, x), style, color=colour, lw=1.8, label=label if style == "-" else None)
        if shade:
            axes.fill_between(grid, *band(fitted, x), color=colour, alpha=.15, lw=0)


def spread(axes, table, rows, x, key, **style):
    """Points: the mean over seeds of cells alike in `key`, with a bar from the lowest to the highest."""
    alike = np.unique(np.stack([table[name][rows] for name in key]), axis=1, return_inverse=True)[1].ravel()
    for cell in range(alike.max() + 1):
        mine = np.flatnonzero(rows)[alike == cell]
        y, at = table["loss"][mine], table[x][mine].mean()
        axes.plot([at, at], [y.min(), y.max()], "-", color=style.get("color", "k"), lw=1)
        axes.plot(at, y.mean(), "o", mec="white", mew=.5, **style)


def draw_table(law0, table, seed=0):
    """For each factor: the law and the rows moved along it to the other factors' medians; residuals; the held-out rows."""
    _, fitted, held = law0
    middle = {name: float(np.median(table[name])) for name in fitted.x}
    fit_figure, axes = panels(len(fitted.x))
    for ax, name in zip(axes, fitted.x):
        here = law(fitted, [table[n] if n == name else np.full(len(fitted.residuals), middle[n]) for n in fitted.x])
        ax.plot(table[name], here * np.exp(fitted.residuals), "o", ms=4, color=COLOURS[0], alpha=.6, mew=0)
        curve(ax, fitted, name, middle, table[name].min(), table[name].max(), COLOURS[1])
        log_axes(ax, name, fitted.y if len(fitted.x) == 1 else f"{fitted.y}, other factors at their medians")
    return {"fit": fit_figure, "residuals": draw_residuals(fitted, table), **({"held_out": draw_held_out([law0], fitted.y)} if held else {})}


def draw_residuals(fitted, table):
    figure, axes = panels(len(fitted.x), 3.8)
    for ax, name in zip(axes, fitted.x):
        ax.axhline(0, color="black", lw=1)
        ax.plot(table[name], 100 * fitted.residuals, "o", ms=4, color=COLOURS[0], alpha=.7, mew=0)
        log_axes(ax, name, "measured above the law, %", y=False)
    return figure


def draw_held_out(laws, y):
    figure, (ax,) = panels()
    for (_, fitted, held), colour, marker in zip(laws, COLOURS, "os^Dv"):
        ax.plot(held["truth"], held["predicted"], marker, ms=6, color=colour, mec="white", mew=.5, label=(
            f"largest {TITLES.get(held['column'], held['column'])} ({held['n']} rows): median error {held['median_relative_error']:.1%}"))
    ends = np.array([min(ax.get_xlim()[0], ax.get_ylim()[0]), max(ax.get_xlim()[1], ax.get_ylim()[1])])
    ax.plot(ends, ends, "-", color="black", lw=1)
    ax.legend(loc="upper left", fontsize=10)
    log_axes(ax, f"{y}, measured on what was held out", f"{y}, predicted")
    return figure


def draw_grid(study, table, scores):
    """The study's figures: {name: figure}; those for which the grid varies too little are left out."""
    joint, by_hours, sizes = study["joint"], study["by_hours"], study["by_size"]
    figures = {"residuals": draw_residuals(joint, table)}
    many = "params_encoder" in joint.x
    largest = {name: float(table[name].max()) for name in FACTORS}

    figure, (ax,) = panels()
    for colour, (P, fitted) in zip(COLOURS, sizes.items()):
        mine = table["params_encoder"] == P
        for users in np.unique(table["users"]):
            spread(ax, table, mine & (table["users"] == users), "hours", ("cap",), color=colour,
                   ms=3 + 8 * math.log(1 + users) / math.log(1 + largest["users"]))
        if fitted:
            curve(ax, fitted, "hours", {}, table["hours"].min(), table["hours"].max(), colour)
        ax.plot([], [], "o-", color=colour, label=f"{P:,.0f} encoder parameters")
    ax.legend(fontsize=10, title="larger points: more users", title_fontsize=10)
    log_axes(ax, "hours", "loss")
    figures["loss_vs_hours"] = figure

    if many:
        import matplotlib
        figure, (ax,) = panels()
        volumes = sorted(set(zip(table["users"], table["cap"])), key=lambda v: table["hours"][(table["users"] == v[0]) & (table["cap"] == v[1])].mean())
        colour_of = matplotlib.colormaps["viridis"]
        hours_norm = matplotlib.colors.LogNorm(table["hours"].min(), table["hours"].max())
        for k, (users, cap) in enumerate(volumes):
            mine = (table["users"] == users) & (table["cap"] == cap)
            colour = colour_of(.95 * hours_norm(table["hours"][mine].mean()))
            others = {name: float(table[name][mine].mean()) for name in FACTORS[:2]}
            spread(ax, table, mine, "params_encoder", ("params_encoder",), color=colour, ms=6)
            curve(ax, joint, "params_encoder", others, table["params_encoder"].min(), largest["params_encoder"], colour, shade=k in (0, len(volumes) - 1))
        figure.colorbar(matplotlib.cm.ScalarMappable(hours_norm, colour_of), ax=ax, label="hours in all")
        readable(figure.axes[-1].yaxis)
        log_axes(ax, "params_encoder", "loss")
        figures["loss_vs_params"] = figure

    if {"users", "hours_per_user"} <= set(joint.x):
        figure, axes = panels(2)
        users, hours = (np.geomspace(table[name].min() / 1.5, table[name].max() * 1.5, 60) for name in FACTORS[:2])
        mesh = np.meshgrid(users, hours)
        surface = law(joint, [*(m.ravel() for m in mesh), *([np.full(mesh[0].size, largest["params_encoder"])] if many else [])]).reshape(60, 60)
        lines = axes[0].contour(users, hours, surface, levels=8, cmap="viridis_r")
        axes[0].clabel(lines, fontsize=9, fmt="%.3g")
        axes[0].plot(table["users"], table["hours_per_user"], "o", ms=4, color="black")
        totals = np.geomspace(table["hours"].min(), table["hours"].max(), 4)
        best = table["params_encoder"] == largest["params_encoder"]
        for total, colour in zip(totals, COLOURS):
            axes[0].plot(users, total / users, ":", color=colour, lw=1.8)
            split = users[(total / users >= hours[0]) & (total / users <= hours[-1])]
            if len(split) > 1:
                x = [split, total / split, *([np.full(len(split), largest["params_encoder"])] if many else [])]
                axes[1].plot(split, law(joint, x), "-", color=colour, label=f"{total:.2g} hours in all")
                axes[1].fill_between(split, *band(joint, x), color=colour, alpha=.15, lw=0)
            near = best & (np.abs(np.log(table["hours"] / total)) < .2)
            axes[1].plot(table["users"][near], table["loss"][near], "o", color=colour, ms=5, mec="white", mew=.5)
        axes[0].set(xlim=users[[0, -1]], ylim=hours[[0, -1]])
        log_axes(axes[0], "users", "hours_per_user")
        log_axes(axes[1], "users", "loss")
        axes[1].legend(fontsize=10)
        figures["users_vs_hours"] = figure

    if study["held"]:
        figures["held_out"] = draw_held_out(study["held"], "loss")

    if by_hours and "capacity" in study["verdicts"]:
        figure, (ax,) = panels()
        low, high = table["hours"].min(), table["hours"].max()
        for start, stop, style in ((low, high, "-"), (high, 4 * high, "--")):
            hours = np.geomspace(start, stop, 40)
            P = np.array([fitting_capacity(in_units(by_hours), [h], [0])[0] for h in hours])
            ax.plot(hours, P, style, color=COLOURS[0], lw=1.8, label="law: 1 % more parameters gain what 1 % more data gain" if style == "-" else None)
            if by_hours.draws is not None:
                sides = [interval(p, fitting_capacity(in_units(by_hours, by_hours.draws), [h], [0]), by_hours.widen, log=True) for p, h in zip(P, hours)]
                ax.fill_between(hours, *np.transpose(sides), color=COLOURS[0], alpha=.15, lw=0)
        for m in study["verdicts"]["capacity"]["grid_minima"]:
            ax.plot(m["hours"], m["params_encoder"], {"largest": "^", "smallest": "v", None: "o"}[m["edge"]], ms=8, color=COLOURS[1], mec="white")
        ax.plot([], [], "^", color=COLOURS[1], label="grid's own best: the largest, so here or above")
        ax.plot([], [], "o", color=COLOURS[1], label="grid's own best, between others")
        ax.axhspan(*(table["params_encoder"].min(), largest["params_encoder"]), color="black", alpha=.05, lw=0)
        ax.set_ylim(table["params_encoder"].min() / 10, largest["params_encoder"] * 30)
        ax.legend(fontsize=10, loc="upper left")
        log_axes(ax, "hours", "params_encoder")
        figures["capacity"] = figure

    if scores:
        figure, axes = panels(len(scores), 4)
        for ax, score, colour in zip(axes, scores, COLOURS):
            ax.plot(table["loss"], table[score], "o", ms=5, color=colour, mec="white", mew=.5)
            verdict = study["verdicts"][f"downstream_{score}"]
            ax.set_title(f"{score.removesuffix('_macro_f1')}\nrank correlation {verdict['value']:+.2f}{span(verdict['ci95'], 2)}", fontsize=11)
            log_axes(ax, "loss", "macro-F1 of a linear probe" if ax is axes[0] else "", y=False)
        figures["downstream"] = figure
    return figures


# ---------------------------------------------------------------- what is written and printed
def entry(name, fitted, held, table):
    """A law as it stands in laws.json; numbers that a form doesn't have, or that weren't asked for, are null."""
    units, many = in_units(fitted), None if fitted.draws is None else in_units(fitted, fitted.draws)
    plain = lambda v: None if not math.isfinite(v) else float(v)
    columns = lambda key, log: [interval(units[key][0, i], many[key][:, i], fitted.widen, log) for i in range(len(fitted.x))]
    law_of = " + ".join(["E"] * fitted.form.floor + [SHAPES[s][1].format(x=x) for s, x in zip(fitted.form.shapes, fitted.x)])
    return {
        "name": name, "x": list(fitted.x), "y": fitted.y, "form": law_of, "E": float(units["E"][0]),
        **{key: [plain(v) for v in units[key][0]] for key in ("A", "alpha", "beta", "x0") if key in ("A", "alpha") or np.isfinite(units[key]).any()},
        "ci95": many and {"E": clip(interval(units["E"][0], many["E"], fitted.widen), math.exp(fitted.low)),
                          "A": columns("A", True), "alpha": [clip(ci, math.inf) for ci in columns("alpha", False)]},
        "objective": float(fitted.objective), "n": len(fitted.residuals), "aicc": plain(fitted.aicc),
        "in_sample": {"median_relative_error": float(np.median(np.abs(np.expm1(-fitted.residuals)))),
                      "worst_relative_error": float(np.abs(np.expm1(-fitted.residuals)).max())},
        "holdout": held and {key: held[key] for key in ("column", "n", "median_relative_error", "worst_relative_error")},
        "range": {x: [float(table[x].min()), float(table[x].max())] for x in fitted.x}, "scatter": scatter(fitted),
        "widen": fitted.widen, "warnings": fitted.warnings,
        "draws": many and {key: np.round(many[key][:200], 12 if key != "A" else 9).tolist() for key in ("E", "A", "alpha")}}


def clip(ci95, top):
    return [min(max(v, 0.), top) for v in ci95]


def write_laws(path, content):
    """laws.json, with lists of numbers on one line each."""
    text = json.dumps(content, indent=1, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(re.sub(r'\[[^\[\]{}"]*\]', lambda numbers: " ".join(numbers[0].split()), text) + "\n")


def report(entries, verdicts):
    """The screen: the law with its intervals, how it predicts, its rivals, the verdicts, the doubts."""
    first = entries[0]
    print(f"\n{first['y']} = {first['form']}   ({first['n']} rows, objective {first['objective']:.8g})")
    ci = first["ci95"] or {"E": None, "A": [None] * 9, "alpha": [None] * 9}
    print(f"  {'E':24s}{first['E']:12.5g}  {span(ci['E'], 5)}")
    for i, x in enumerate(first["x"]):
        print(f"  {'A of ' + x:24s}{first['A'][i]:12.5g}  {span(ci['A'][i], 5)}")
        print(f"  {'alpha of ' + x:24s}{first['alpha'][i]:12.5g}  {span(ci['alpha'][i], 5)}")
    print(f"  in sample: median error {first['in_sample']['median_relative_error']:.2%}, worst {first['in_sample']['worst_relative_error']:.2%}")
    if first["holdout"]:
        held = first["holdout"]
        print(f"  held out, the largest {held['column']} ({held['n']} rows): median {held['median_relative_error']:.2%}, worst {held['worst_relative_error']:.2%}")
    print(f"\n  {'other laws':52s}{'n':>5s}{'AICc':>10s}{'held out':>10s}")
    for e in entries:
        aicc_, held = ("-" if e["aicc"] is None else f"{e['aicc']:.1f}"), e["holdout"] and f"{e['holdout']['median_relative_error']:.2%}"
        print(f"  {e['name']:52s}{e['n']:5d}{aicc_:>10s}{held or '-':>10s}")
    print()
    for name, verdict in verdicts.items():
        print(f"- {verdict['text']}")
    for e in entries[:1]:
        for warning in e["warnings"]:
            print(f"! {e['name']}: {warning}")


def save(figures, out):
    for name, figure in figures.items():
        with replacing(Path(out) / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=150)


def study_grid(a):
    rows, missing = collect(a.target, a.partial, a.mixed)
    if missing:
        print(f"{len(missing)} of {len(rows) + len(missing)} cells are not done and left out: {', '.join(missing)}")
    texts = [(row["name"], row) for row in rows]
    table = {name: numbers(texts, name, a.target) for name in (a.y, "hours", *FACTORS)}
    table["loss"] = table[a.y]
    table["cap"] = np.array([math.inf if row.get("hours_cap") is None else row["hours_cap"] for row in rows])
    if any("seed" in row for row in rows):
        table["seed"] = np.array([str(row.get("seed")) for row in rows])
    by_cap = {"users": "users", "hours_per_user": "cap", "params_encoder": "params_encoder"}
    varied = [x for x in FACTORS if len(np.unique(table[by_cap[x]])) > 2]
    for x in FACTORS:
        if x not in varied:
            print(f"{x} is left out of the law: the grid has {len(np.unique(table[by_cap[x]]))} value(s) of it, and 3 show an exponent")
    if not varied:
        raise Refused(f"{a.target} varies neither users, nor hours per user, nor parameters in 3 values or more: nothing to fit")
    options = dict(floor=not a.no_floor, bootstrap=a.bootstrap, seed=a.seed)
    joint_laws, verdicts = analyse(table, varied, "loss", column=a.holdout, **options)
    joint = joint_laws[0][1]
    held = [("", None, h) for h in (try_held_out(table, varied, "loss", joint.form, x) for x in varied) if h]
    laws, by_hours = list(joint_laws), None
    if joint_laws[0][2] is None and held:
        laws[0] = (laws[0][0], joint, held[0][2])
    by_size = {}
    for P in np.unique(table["params_encoder"]):
        sub = take(table, table["params_encoder"] == P)
        try:
            by_size[P] = fit(sub, ("hours",), "loss", None, a.bootstrap, a.seed)
            laws.append((f"loss by hours at {P:.0f} encoder parameters", by_size[P], try_held_out(sub, ("hours",), "loss", None, "hours")))
        except Refused:
            by_size[P] = None
    if "params_encoder" in varied:
        try:
            by_hours = fit(table, ("hours", "params_encoder"), "loss", None, a.bootstrap, a.seed)
        except Refused:
            by_hours = None
    hour_laws, hour_verdicts = [], {}
    x = ("hours",) + (("params_encoder",) if "params_encoder" in varied else ())
    try:
        hour_laws, hour_verdicts = analyse(table, x, "loss", column="hours", **options)
        by_hours = hour_laws[0][1] if len(x) > 1 else None
        laws += [l for l in hour_laws if "params_encoder alone" not in l[0]]
        verdicts["power_law_of_hours"] = hour_verdicts["power_law_of_hours"]
    except Refused:
        pass
    if {"users", "hours_per_user"} <= set(varied):
        verdicts.update(users_or_hours(joint, table))
    if by_hours and len(varied) > 1:
        verdicts["capacity"] = capacity(joint, by_hours, table)
    scores = []
    for name in sorted({key for row in rows for key in row if key.endswith("_macro_f1")}):
        table[name] = np.array([row.get(name, math.nan) if row.get(name) is not None else math.nan for row in rows])
        if np.isfinite(table[name]).sum() >= 5:
            scores.append(name)
            verdicts[f"downstream_{name}"] = follows(table, name, a.bootstrap, a.seed)
    study = {"joint": joint, "by_hours": by_hours, "by_size": by_size, "held": held, "verdicts": verdicts}
    entries = [entry(*one, table) for one in laws]
    return rows, entries, verdicts, draw_grid(study, table, scores)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("target", help="a CSV table, a grid's folder of runs, or (with --recommend) a laws.json")
    p.add_argument("--out", help="folder for laws.json, the figures and, of a grid, results.csv")
    g = p.add_argument_group("the law")
    g.add_argument("--x", nargs="+", help="a table's factors, one to four columns; a grid's are users, hours_per_user and params_encoder")
    g.add_argument("--y", default="loss", help="the column to explain (default: loss)")
    g.add_argument("--no-floor", action="store_true", help="fix E at 0: a pure power law, which promises that any loss can be reached")
    g = p.add_argument_group("how far to trust it")
    g.add_argument("--bootstrap", type=int, default=1000, help="resampled tables behind the 95 %% intervals; 0 leaves them out (default: 1000)")
    g.add_argument("--holdout", metavar="COLUMN", help="keep the largest values of this column out and predict them (default: of a grid, its first factor)")
    g.add_argument("--seed", type=int, default=0, help="of the resampling: another one moves the intervals a little (default: 0)")
    g = p.add_argument_group("a grid")
    g.add_argument("--partial", action="store_true", help="fit the finished cells, though others are not done")
    g.add_argument("--mixed", action="store_true", help="fit cells together whose configurations differ in more than the grid's factors")
    g = p.add_argument_group("advice")
    g.add_argument("--recommend", action="store_true", help="say what the law in a laws.json expects of a plan, and which capacity fits it")
    g.add_argument("--users", type=float, help="users in the plan")
    g.add_argument("--hours-per-user", type=float, help="hours recorded of each")
    a = p.parse_args()
    if a.recommend:
        return recommend(a.target, a.users, a.hours_per_user)
    if not a.out:
        raise Refused("--out is missing: name a folder for laws.json and the figures")
    if a.bootstrap < 0:
        raise Refused(f"--bootstrap {a.bootstrap} is not a number of resampled tables: 0 or more")
    if Path(a.target).is_dir():
        if a.x:
            raise Refused(f"{a.target} is a folder, a grid of runs, whose factors are fixed: leave --x out, or name a CSV file")
        rows, entries, verdicts, figures = study_grid(a)
        write_csv(Path(a.out) / "results.csv", rows)
    else:
        if not a.x:
            raise Refused("--x is missing: name the columns that the loss depends on")
        names = [*a.x, a.y, *([a.holdout] if a.holdout else [])]
        if len({*a.x, a.y}) < len(a.x) + 1 or len(a.x) > 4:
            raise Refused(f"--x {' '.join(a.x)} --y {a.y}: name one to four different columns, and another one for the loss")
        if not Path(a.target).is_file():
            raise Refused(f"{a.target} does not exist: name a CSV table or a folder of runs")
        table = read_table(a.target, dict.fromkeys(names))
        laws, verdicts = analyse(table, a.x, a.y, not a.no_floor, a.bootstrap, a.holdout, a.seed)
        entries, figures = [entry(*one, table) for one in laws], draw_table(laws[0], table)
    save(figures, a.out)
    write_laws(Path(a.out) / "laws.json", {"laws": entries, "verdicts": verdicts, "provenance": provenance()})
    report(entries, verdicts)
    print(f"\n{a.out}: laws.json, {', '.join(f'{name}.png' for name in figures)}")


if __name__ == "__main__":
    command(main)
