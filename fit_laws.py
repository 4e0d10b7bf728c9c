"""
From finished runs to a scaling law one can trust: the fit, its intervals, its rivals, and what to do next.

    loss = E + sum_i A_i x_i^-alpha_i       E: the floor no x gets below; x_i: users, hours per user, parameters...

The method, in the order of this file (n rows, k factors, P = 1 + 2k parameters, B problems solved side by side):
    law         log E and log A_i - alpha_i log x_i: k + 1 terms (B, n), whose log-sum-exp is the log of the loss
    objective   the sum over rows of Huber(0.001) of log-residuals, (B,), and its exact gradient, (B, P)
    fit         L-BFGS from a grid of starts, all at once; the best is kept, and a warning given where the best disagree
    bootstrap   the same fit to 1,000 resampled tables, for 95 % intervals of everything that is reported
    rivals      other curves in a factor's place, compared by AICc and on the largest scale, held out
What is asked of it: verdicts in words with numbers, advice for a plan, tables and grids of runs read, figures, main.

    python fit_laws.py runs/GRID --out results/GRID                                     # a grid: collects, fits, draws
    python fit_laws.py TABLE.csv --x params tokens --y loss --holdout tokens --out DIR  # any table
    python fit_laws.py results/GRID/laws.json --recommend --users 30 --hours-per-user 2 # what a law says about a plan

Objective: approach 3 of Hoffmann et al. 2022 (arXiv 2203.15556), as refitted by Besiroglu et al. 2024 (2404.10102).
"""
import argparse, csv, json, math, os, re
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import erf, stdtrit

from data import Refused, command, provenance, replacing

DELTA = 1e-3                                                     # Huber's: residuals past 0.1 % count by their size
FACTORS = ("users", "hours_per_user", "params_encoder")          # of a grid, in the order of its joint law


# ---------------------------------------------------------------- the law
class Form(NamedTuple):
    """A curve for each factor, by its name in SHAPES, on top of a floor or of nothing."""
    shapes: tuple
    floor: bool = True


class Scale(NamedTuple):
    """Units in which a table is fitted, whatever its own: u = (log x - middle) / half lies in [-1, 1]."""
    middle: np.ndarray                                           # (k,)
    half: np.ndarray                                             # (k,)
    low: float                                                   # log of the lowest loss: E stays below


# A shape bends a factor's term: log term = a + bend. Each gives the bend, (B, n), and its derivatives by q, all (B, 1).
def power(u, half, q):
    """A x^-alpha; q = log(alpha half)"""
    bend = -np.exp(q[0]) * u
    return bend, [bend]


def exponential(u, half, q):
    """A exp(-x / x0); q = log x0 - middle"""
    bend = -np.exp(np.minimum(half * u - q[0], 300))
    return bend, [-bend]


def logarithm(u, half, q):
    """A (log x0 - log x), a straight line over log x that ends at x0; q = log((log x0 - log largest x) / half)"""
    left = np.maximum(1 + np.exp(q[0]) - u, 1e-300)
    return np.log(left), [np.exp(q[0]) / left]


def broken(u, half, q):
    """A x^-alpha (1 + x / x0)^(alpha - beta): exponent alpha before x0, beta past it"""
    alpha, beta, inside = np.exp(q[0]), np.exp(q[1]), 1 / (1 + np.exp(np.clip(half * (q[2] - u), -300, 300)))
    past = np.logaddexp(0, half * (u - q[2])) / half
    return (alpha - beta) * past - alpha * u, [alpha * (past - u), -beta * past, (beta - alpha) * inside]


SHAPES = {                                                       # name: function, starting values of q
    "power law": (power, [[math.log(s)] for s in (.1, .5, 1.5, 5)]),
    "exponential": (exponential, [[-2.], [0.], [2.]]),
    "logarithm": (logarithm, [[-3.], [0.], [2.]]),
    "broken power law": (broken, [[math.log(a), math.log(b), at] for a, b in ((.3, 2), (2, .3)) for at in (-.5, .5)])}


def split(theta, form):
    """The columns of theta (B, P): s of the floor, or None, and (a, q) of each factor, all (B, 1)."""
    columns = iter(theta.T[:, :, None])
    s = next(columns) if form.floor else None
    return s, [(next(columns), [next(columns) for _ in SHAPES[shape][1][0]]) for shape in form.shapes]


def log_terms(theta, form, scale, log_x):
    """Logs of E and of each factor's term at log_x (k, n); for each column of theta, its term and d log term by it."""
    s, factors = split(theta, form)
    terms, slopes = [], []
    if form.floor:                                               # E = lowest loss x sigmoid(s): 0 < E < lowest loss
        terms.append(scale.low - np.logaddexp(0, -s))
        slopes.append((0, 1 / (1 + np.exp(np.minimum(s, 300)))))
    for shape, (a, q), x, middle, half in zip(form.shapes, factors, log_x, scale.middle, scale.half):
        bend, derivatives = SHAPES[shape][0]((x - middle) / half, half, q)
        slopes += [(len(terms), d) for d in (np.ones((1, 1)), *derivatives)]
        terms.append(a + bend)
    return terms, slopes


def log_sum_exp(terms):
    """log of the sum of exp(term), (B, n), and the share of each in it."""
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


def objective(theta, form, scale, log_x, log_y, weights):
    """sum over rows of weight x Huber(log y - log law), (B,), and its gradient by theta, (B, P); weights (B, n).

    A sum, not a mean: a mean of such small terms makes optimisers with absolute tolerances stop early.
    """
    terms, slopes = log_terms(theta, form, scale, log_x)
    log_law, shares = log_sum_exp(terms)
    residuals = log_y - log_law
    pull = -weights * np.clip(residuals, -DELTA, DELTA)          # d objective / d log law
    pulls = [pull * share for share in shares]                   # d log law / d log term is the term's share in the law
    gradient = [np.einsum("bn,bn->b", pulls[term], np.broadcast_to(d, pull.shape)) for term, d in slopes]
    return (weights * huber(residuals)).sum(1), np.stack(gradient, 1)


# ---------------------------------------------------------------- the fit
@np.errstate(all="ignore")                                       # a trial step may lead to what is no number
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
    S, Y = np.zeros((2, B, memory, P))                           # the last steps, and what the gradient changed by
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

        i = active[good]                                         # a step is taken: remember it, choose the next
        S[i] = np.concatenate([S[i, 1:], (trial[good] - x[i])[:, None]], 1)
        Y[i] = np.concatenate([Y[i, 1:], (g_trial[good] - g[i])[:, None]], 1)
        quiet[i] = np.where(f[i] - f_trial[good] > 1e-12 * f_trial[good], 0, quiet[i] + 1)
        x[i], f[i], g[i], afresh[i] = trial[good], f_trial[good], g_trial[good], False
        curvature = np.einsum("bmp,bmp->bm", S[i], Y[i])
        rho = np.where(curvature > 0, 1 / np.maximum(curvature, 1e-300), 0)
        q, used = g[i].copy(), []
        for m in reversed(range(memory)):                        # the two loops (Nocedal & Wright, algorithm 7.4)
            used.append(rho[:, m] * dot(S[i, m], q))
            q -= used[-1][:, None] * Y[i, m]
        last = curvature[:, -1] / np.maximum(dot(Y[i, -1], Y[i, -1]), 1e-300)
        q *= np.where(curvature[:, -1] > 0, last, 1)[:, None]
        for m in range(memory):
            q += (used.pop() - rho[:, m] * dot(Y[i, m], q))[:, None] * S[i, m]
        d[i], step[i], near[i], far[i] = -q, 1, 0, np.inf

        failed = missed[(far[missed] - near[missed] < 1e-10 * np.maximum(near[missed], 1)) | (step[missed] > 1e10)]
        quiet[failed[afresh[failed]]] = 5
        i = failed[~afresh[failed]]
        S[i], Y[i], d[i], afresh[i], step[i], near[i], far[i] = 0, 0, downhill(g[i], 1e-3), True, 1, 0, np.inf
        active = active[quiet[active] < 5]
        if not len(active):
            break
    return x, f


def solve(form, scale, log_x, log_y, starts, weights, keep):
    """Fit B weightings of a table, (B, n), from M starts each: a short run of all, a long one of the best `keep`.

    Returns theta (B, keep, P) and the objective (B, keep), best first. Chunks of problems share the cores, in threads.
    """
    B, (M, P) = len(weights), starts.shape
    theta = np.tile(starts, (B, 1))
    for ticks, left in ((40, M), (1500, min(keep, M))):
        owner = np.repeat(np.arange(B), left)
        chunks = np.array_split(np.arange(B * left), math.ceil(B * left * len(log_y) / 100_000))
        value = lambda x, tables: objective(x, form, scale, log_x, log_y, weights[tables])
        one = lambda c: minimise(lambda x, i: value(x, owner[c[i]]), theta[c], ticks)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            theta, f = (np.concatenate(part) for part in zip(*pool.map(one, chunks)))
        best = np.argsort(f.reshape(B, left), axis=1)[:, :keep]
        theta, f = (np.take_along_axis(part.reshape(B, left, -1), best[:, :, None], 1) for part in (theta, f))
        theta = theta.reshape(-1, P)
    return theta.reshape(B, -1, P), f[:, :, 0]


def grid_of_starts(form, scale, log_x, log_y):
    """Every combination of the shapes' starting values and three floors; the factors share what E leaves. (M, P)"""
    starts = []
    for s, *choice in product((-3., 0., 2.) if form.floor else (None,), *(SHAPES[shape][1] for shape in form.shapes)):
        E = 0 if s is None else math.exp(scale.low) / (1 + math.exp(-s))
        start = [] if s is None else [s]
        for shape, q, x, middle, half in zip(form.shapes, choice, log_x, scale.middle, scale.half):
            bend, _ = SHAPES[shape][0]((x - middle) / half, half, np.array(q)[:, None, None])
            start += [math.log((math.exp(log_y.mean()) - E) / len(choice) / np.exp(bend).mean()), *q]
        starts.append(start)
    return np.array(starts)


def in_units(theta, form, scale):
    """Laws theta (B, P) in the table's units: {"E": (B,), "log_A", "alpha", "beta", "x0": (B, k)}, some of them NaN."""
    s, factors = split(theta, form)
    units = {name: np.full((len(theta), len(factors)), np.nan) for name in ("log_A", "alpha", "beta", "x0")}
    units["E"] = np.exp(scale.low - np.logaddexp(0, -s[:, 0])) if form.floor else np.zeros(len(theta))
    for i, (shape, (a, q), middle, half) in enumerate(zip(form.shapes, factors, scale.middle, scale.half)):
        if shape.endswith("power law"):
            units["alpha"][:, i:i + 1] = np.exp(q[0]) / half
            a = a + np.exp(q[0]) * middle / half
        if shape == "broken power law":
            units["beta"][:, i:i + 1] = np.exp(q[1]) / half
        units["log_A"][:, i:i + 1] = a - math.log(half) * (shape == "logarithm")
        if shape != "power law":
            end = {"exponential": q[0], "logarithm": half * (1 + np.exp(q[0])), "broken power law": half * q[-1]}[shape]
            units["x0"][:, i:i + 1] = np.exp(np.clip(middle + end, -700, 700))
    return units


class Fit(NamedTuple):
    """A fitted law; `units` and `draws` are as `in_units` gives them, for it and for B resampled tables (or None)."""
    x: tuple                                                     # names of the k factors
    y: str
    form: Form
    scale: Scale
    theta: np.ndarray                                            # (1, P)
    objective: float
    residuals: np.ndarray                                        # (n,) log y - log law
    aicc: float
    warnings: list
    units: dict
    draws: dict = None
    widen: float = 1.                                            # what the spread of the draws is multiplied by


@np.errstate(all="ignore")                                       # so may the worse of the starts
def fit(table, x, y, form=None, bootstrap=0, seed=0):
    """Fit `form` (power laws on a floor) to `table`, {column: (n,)}. Raises Refused where the table can't carry it."""
    form = form or Form(("power law",) * len(x))
    log_x, log_y = np.log([table[name] for name in x]), np.log(table[y])
    P = form.floor + sum(1 + len(SHAPES[shape][1][0]) for shape in form.shapes)
    if len(log_y) < max(5, P):
        raise Refused(f"{len(log_y)} rows can't carry the {P} parameters of a law of {' and '.join(x)}: add runs")
    for name in x:
        if len(np.unique(table[name])) < 3:
            raise Refused(f"the column '{name}' has {len(np.unique(table[name]))} distinct value(s), and it takes 3 to "
                          "show an exponent: leave it out, or add runs")
    scale = Scale((log_x.max(1) + log_x.min(1)) / 2, np.ptp(log_x, axis=1) / 2, log_y.min())
    starts = grid_of_starts(form, scale, log_x, log_y)
    ends, f = (part[0] for part in solve(form, scale, log_x, log_y, starts, np.ones((1, len(log_y))), keep=12))
    residuals = log_y - log_sum_exp(log_terms(ends[:1], form, scale, log_x)[0])[0][0]
    warnings = doubts(x, form, scale, in_units(ends[f <= f[0] * 1.001], form, scale))
    fitted = Fit(tuple(x), y, form, scale, ends[:1], f[0], residuals, aicc(residuals, P), warnings,
                 in_units(ends[:1], form, scale))
    if not bootstrap:
        return fitted
    weights, widen = resample(table, x, bootstrap, np.random.default_rng(seed))
    apart = [ends[0]]                                            # resamples start where fits to the table end, and afar
    for end in ends[1:]:
        if len(apart) < 4 and min(np.abs(np.tanh((end - other) / 3)).max() for other in apart) > .2:
            apart.append(end)
    starts = np.stack([*apart, starts[len(starts) // 3], starts[-len(starts) // 3]])
    draws, _ = solve(form, scale, log_x, log_y, starts, weights, keep=2)
    return fitted._replace(draws=in_units(draws[:, 0], form, scale), widen=widen)


def doubts(x, form, scale, ends):
    """What in a fit must not be trusted, in sentences; `ends` are the laws within 0.1 % of the best objective."""
    said, low = [], math.exp(scale.low)
    alphas = [(f"alpha of {name}", alpha, .02) for name, alpha in zip(x, ends["alpha"].T)]
    for name, values, apart in [("E", ends["E"], .01 * low), *alphas]:
        if np.ptp(values) > apart:
            said.append(f"flat surface: fits 0.1 % worse at most have {name} {values.min():.4g} to {values.max():.4g}")
    if form.floor and not 1e-4 < ends["E"][0] / low < 1 - 1e-4:
        at = "0: the table shows no floor" if ends["E"][0] < low / 2 else "the lowest loss"
        said.append(f"E is at its bound, {at}")
    for name, slope in zip(x, ends["alpha"][0] * scale.half):
        if slope < 5e-4 or slope > 15:
            said.append(f"alpha of {name} is at its bound: " + (
                "the loss doesn't fall with it" if slope < 1 else "only the smallest value matters"))
    return said


@np.errstate(all="ignore")                                       # and a rival, far outside the table
def law(fitted, x):
    """The loss at x (k, m): (m,), for a law of any form."""
    return np.exp(log_sum_exp(log_terms(fitted.theta, fitted.form, fitted.scale, np.log(x))[0])[0][0])


# ---------------------------------------------------------------- bootstrap
def resample(table, x, B, rng):
    """Weights (B, n) that stand for B resampled tables, and the factor by which the spread of their fits is widened.

    Rows are drawn with replacement, or, with a column `group`, whole groups (in each `stratum`, if there is one): runs
    whose errors go together, as those of a seed, which share users and weights. Few groups say little about their own
    spread, so it is widened as for the mean of a few values: S groups in T strata, d = S - T, by sqrt(S / d) t_d / 1.96
    (results/coverage.md has what that does). Resamples with less than three values of a factor are drawn again; where
    hardly any has three, rows are drawn after all.
    """
    n = len(table[x[0]])
    levels = [np.unique(table[name], return_inverse=True)[1] for name in x]
    kinds = [np.eye(level.max() + 1)[level] for level in levels if level.max() < 20]
    rows, one = np.arange(n), np.zeros(n)
    for groups, strata in ((table.get("group", rows), table.get("stratum", one)), (rows, one)):
        _, first, groups = np.unique(groups, return_index=True, return_inverse=True)
        strata = np.unique(strata[first], return_inverse=True)[1]                # of each group
        S, free, weights = len(first), len(first) - strata.max() - 1, np.zeros((0, n))
        for _ in range(50 * (free > 0)):
            counts = np.zeros((B, S))
            for stratum in range(strata.max() + 1):
                mine = np.flatnonzero(strata == stratum)
                counts[:, mine] = rng.multinomial(len(mine), np.full(len(mine), 1 / len(mine)), size=B)
            drawn = counts[:, groups]
            enough = np.all([((drawn > 0) @ kind > 0).sum(1) > 2 for kind in kinds] or [np.ones(B, bool)], axis=0)
            weights = np.concatenate([weights, drawn[enough]])[:B]
            if len(weights) == B:
                return weights, math.sqrt(S / free) * stdtrit(free, .975) / 1.96 if S < n else 1.
    raise Refused(f"resampled tables hardly ever hold 3 values of {' and '.join(x)}: add runs, or use --bootstrap 0")


def interval(value, draws, widen=1., log=False, low=-math.inf, high=math.inf):
    """95 % interval of a number: percentiles of its bootstrap draws, widened around it (log=True: on a log scale)."""
    if log:
        with np.errstate(divide="ignore"):
            return [math.exp(min(v, 700)) for v in interval(np.log(value), np.log(draws), widen)]
    return [float(np.clip(value + widen * (end - value), low, high)) for end in np.percentile(draws, [2.5, 97.5])]


def estimate(fitted, quantity, **scale):
    """(value, 95 % interval or None) of `quantity(units)`, a number for each law."""
    value = float(quantity(fitted.units)[0])
    return value, fitted.draws and interval(value, quantity(fitted.draws), fitted.widen, **scale)


# ---------------------------------------------------------------- rivals: AICc, and the largest scale held out
def aicc(residuals, parameters):
    """AICc by the density exp(-Huber(r) / t) / Z(t): at any t, its maximum-likelihood law is the one fitted here."""
    t = np.geomspace(1e-13, 10, 4000)
    Z = np.sqrt(2 * np.pi * t) * erf(DELTA / np.sqrt(2 * t)) + 2 * t / DELTA * np.exp(-DELTA ** 2 / (2 * t))
    n, k = len(residuals), parameters + 1                        # t is a parameter as well
    deviance = np.min(2 * huber(residuals).sum() / t + 2 * n * np.log(Z))
    return float(deviance + 2 * k + 2 * k * (k + 1) / (n - k - 1)) if n > k + 1 else math.inf


def take(table, rows):
    return {name: column[rows] for name, column in table.items()}


def hold_out(table, x, y, form, column, must=False):
    """Fit without the largest scale of `column` (to 10 % below its maximum, a tenth of the rows at least); predict it.

    Returns the errors and what they are of; None where too little is left to fit (Refused, if it must).
    """
    top = table[column] >= min(table[column].max() / 1.1, np.quantile(table[column], .9))
    try:
        fitted = fit(take(table, ~top), x, y, form)
    except Refused as refusal:
        if must:
            raise Refused(f"the largest {column} can't be held out: without it, {refusal}") from None
        return None
    truth, predicted = table[y][top], law(fitted, [table[name][top] for name in x])
    error = np.abs(predicted / truth - 1)
    return {"column": column, "n": int(top.sum()), "median_relative_error": float(np.median(error)),
            "worst_relative_error": float(error.max()), "truth": truth, "predicted": predicted}


RIVALS = [("power law", True), ("power law", False), ("exponential", True), ("logarithm", False),
          ("broken power law", False)]


def analyse(table, x, y, floor=True, bootstrap=1000, column=None, seed=0, judged=None):
    """That law and its rivals in each `judged` factor's place, [(name, Fit, held-out errors or None)]; verdicts."""
    form = Form(("power law",) * len(x), floor)
    held = hold_out(table, x, y, form, column, must=True) if column else None
    laws, verdicts = [(f"{y} by {', '.join(x)}", fit(table, x, y, form, bootstrap, seed), held)], {}
    for i, factor in enumerate(x):
        if factor not in (judged or x):
            continue
        tried = []
        for shape, on_floor in RIVALS:
            rival = Form(tuple(shape if j == i else "power law" for j in range(len(x))), on_floor)
            try:
                fitted = fit(table, x, y, rival)
            except Refused:                                      # fewer rows than this form has parameters
                continue
            name = f"{shape} in {factor}{' on a floor' * on_floor}"
            tried.append((name, fitted, hold_out(table, x, y, rival, column or factor)))
        verdicts[f"power_law_of_{factor}"] = judge(laws[0][1], i, tried)
        laws += tried
        if len(x) > 1:
            alone = hold_out(table, (factor,), y, None, column or factor)
            laws.append((f"{factor} alone, on a floor", fit(table, (factor,), y), alone))
    return laws, verdicts


# ---------------------------------------------------------------- verdicts: questions answered in words with numbers
def span(ci95, form="{:.3g}"):
    return "" if ci95 is None else f" [{form.format(ci95[0])}, {form.format(ci95[1])}]"


def sign(ci95, above, below):
    return "" if ci95 is None else f": {above if ci95[0] > 0 else below if ci95[1] < 0 else 'not decided'}"


def judge(asked, i, tried):
    """Is the loss a power law of factor i? Claimed where its AICc is 2 better than other curves', no worse than that of
    the broken power law, which contains it, and where none predicts what was held out better (by half the scatter)."""
    value, ci95 = estimate(asked, lambda units: units["alpha"][:, i], low=0)
    is_power = lambda one: one[1].form.shapes[i] == "power law"
    mine = min(filter(is_power, tried), key=lambda one: one[1].aicc)
    others = [one for one in tried if not is_power(one) and one[1].aicc < math.inf]
    told = {"value": value, "ci95": ci95, "claimed": False, "text": f"{asked.y} against {asked.x[i]}: "}
    if not others:
        return {**told, "text": told["text"] + "too few rows to tell one curve from another"}
    ahead = [one[1].aicc - mine[1].aicc - 2 * (one[1].form.shapes[i] != "broken power law") for one in others]
    error = lambda one: one[2]["median_relative_error"] if one[2] and mine[2] else 0
    better = [one for one in others if error(one) + np.median(np.abs(mine[1].residuals)) / 2 < error(mine)]
    rival = better[0] if better and min(ahead) > 0 else others[np.argmin(ahead)]
    told["claimed"] = bool(min(ahead) > 0 and not better)
    told["text"] += (f"a power law, exponent {value:.3f}{span(ci95)}; next comes the {rival[0]}" if told["claimed"] else
                     f"no single power law, the {rival[0]} fits better" if min(ahead) < -4 else
                     f"not decided between {mine[0]} and {rival[0]}")
    held = mine[2] and f"; error on the largest {mine[2]['column']}, held out, {error(mine):.2%} and {error(rival):.2%}"
    return {**told, "text": told["text"] + f" (AICc {mine[1].aicc:.1f} and {rival[1].aicc:.1f}{held or ''})"}


def terms_at(units, x):
    """A_i x_i^-alpha_i of power laws at x (k,): (B, k)."""
    return np.exp(np.minimum(units["log_A"] - units["alpha"] * np.log(np.asarray(x, float)), 700))


def loss_at(units, x):
    return units["E"] + terms_at(units, x).sum(1)


def capacities(units, x, way):
    """Parameters P (the last factor) that fit the data x (the others), (B,). An additive law falls with P for ever, so
    what fits is a matter of cost:

    balanced           1 % more parameters gain what 1 % more data gain, gathered the better way: alpha_P A_P P^-alpha_P
                       = max_i alpha_i A_i x_i^-alpha_i. Best where cost is parameters x data (Hoffmann et al. 2022)
    within_1_percent   no larger model gains more than 1 % on these data: A_P P^-alpha_P is 1 % of all the rest. Best
                       where data are dear and the machine is not
    """
    terms = terms_at(units, [*x, 1.])
    with np.errstate(all="ignore"):                              # an exponent of 0: any capacity fits
        if way == "balanced":
            target = (units["alpha"] * terms)[:, :-1].max(1) / units["alpha"][:, -1]
        else:
            target = .01 * (units["E"] + terms[:, :-1].sum(1))
        return np.exp(np.clip(np.log(terms[:, -1] / target) / units["alpha"][:, -1], -700, 700))


def users_or_hours(joint, table):
    """Do users beat hours per user? By exponents; by the law at equal hours in all; by pairs of runs, without a law."""
    value, ci95 = estimate(joint, lambda units: units["alpha"][:, 0] - units["alpha"][:, 1])
    a, b = joint.units["alpha"][0, :2]
    verdicts = {"users_minus_hours_exponent": {"value": value, "ci95": ci95, "text": (
        f"exponent of users {a:.3f}, of hours per user {b:.3f}, difference {value:+.3f}{span(ci95)}"
        + sign(ci95, "that of users is steeper", "that of hours per user is steeper"))}}

    def ratio(log_value, log_ci95, text):
        ci95 = log_ci95 and [math.exp(end) for end in log_ci95]
        said = sign(log_ci95, "hours per user are worth more", "users are worth more")
        return {"value": math.exp(log_value), "ci95": ci95,
                "text": text.format(f"{math.exp(log_value):.4f}{span(ci95, '{:.4f}')}") + said}

    start = [math.sqrt(table[x].min() * table[x].max() / 2) for x in joint.x[:2]]
    start += [table[x].max() for x in joint.x[2:]]
    twice = lambda i: [value * (1 + (i == j)) for j, value in enumerate(start)]
    verdicts["equal_hours_loss_ratio"] = ratio(
        *estimate(joint, lambda units: np.log(loss_at(units, twice(0)) / loss_at(units, twice(1)))),
        f"from {start[0]:.0f} users x {start[1]:.2g} h, twice the users has {{}} times the loss of twice the hours")
    U, H, P = (table[name] for name in ("users", "hours", "params_encoder"))
    same = (np.abs(np.log(H[None] / H[:, None])) < .1) & (P[None] == P[:, None])
    few, many = np.nonzero(same & (U[None] > 1.4 * U[:, None]))
    if len(few) > 4 and ci95:
        per_doubling = np.log(table[joint.y][many] / table[joint.y][few]) / np.log2(U[many] / U[few])
        weights, widen = resample(table, joint.x, 1000, np.random.default_rng(0))
        weights = weights[:, few] * weights[:, many]
        drawn = (weights @ per_doubling)[weights.any(1)] / weights.sum(1)[weights.any(1)]
        verdicts["equal_hours_pairs"] = ratio(per_doubling.mean(), interval(per_doubling.mean(), drawn, widen), (
            f"without a law, in {len(few)} pairs of runs of equal hours, twice the users has {{}} times the loss"))
    return verdicts


def capacity(joint, by_hours, table):
    """Which capacity fits a data volume: hours^g by the law of hours, the grid's own best, a table by the joint law."""
    value, ci95 = estimate(by_hours, lambda units: units["alpha"][:, 0] / units["alpha"][:, 1], log=True)
    minima, plans = [], []
    for users, cap in sorted(set(zip(table["users"], table["cap"]))):
        cells = take(table, (table["users"] == users) & (table["cap"] == cap))
        sizes = np.unique(cells["params_encoder"])
        best = sizes[np.argmin([cells[joint.y][cells["params_encoder"] == P].mean() for P in sizes])]
        plan = {"users": int(users), **{name: float(cells[name].mean()) for name in ("hours_per_user", "hours")}}
        minima.append({**plan, "params_encoder": int(best), "edge": "largest" if best == sizes[-1] else
                       "smallest" if best == sizes[0] else "between"})
        x = [plan[name] for name in joint.x[:-1]]
        for way in ("balanced", "within_1_percent"):
            plan[way], plan[f"{way}_ci95"] = estimate(joint, lambda units: capacities(units, x, way), log=True)
        plans.append(plan)
    log = np.log([[m["hours"], m["params_encoder"]] for m in minima if m["edge"] == "between"]).reshape(-1, 2)
    text = (f"the capacity that fits goes as hours^g, g = {value:.2f}{span(ci95)}; of {len(minima)} data volumes "
            f"{sum(m['edge'] == 'largest' for m in minima)} do best with the grid's largest model, so there or beyond")
    if len(np.unique(log[:, 0])) > 2:
        text += f"; over {len(log)} that do best with one between, it goes as hours^{np.polyfit(*log.T, 1)[0]:.2f}"
    return {"value": value, "ci95": ci95, "grid_minima": minima, "table": plans, "text": text}


def follows(table, score, y, bootstrap, seed):
    """Spearman's rank correlation of a downstream score with the loss, over the runs that have both."""
    def rank(v):                                                 # ties share their mean rank
        _, where, count = np.unique(v, return_inverse=True, return_counts=True)
        return (np.cumsum(count) - count / 2)[where]

    rho = lambda pair: float(np.corrcoef(*map(rank, pair))[0, 1]) if np.ptp(pair, axis=1).min() > 0 else 0.
    pair = np.stack([table[y], table[score]])[:, np.isfinite(table[score])]
    rng, n = np.random.default_rng(seed), pair.shape[1]
    ci95 = interval(0., [rho(pair[:, rng.integers(n, size=n)]) for _ in range(bootstrap)]) if bootstrap else None
    return {"value": rho(pair), "ci95": ci95, "n": n, "text": (
        f"{score.removesuffix('_macro_f1')}: macro-F1 against {y} in {n} runs, rank correlation {rho(pair):+.2f}"
        + span(ci95, "{:+.2f}") + sign(ci95, "it rises with the loss", "it rises as the loss falls"))}


def recommend(path, users, hours_per_user):
    """Print what the law in `path` says about a plan: capacity, expected loss, where to record the next hour."""
    try:
        first = json.loads(Path(path).read_text())["laws"][0]
        names, ranges = first["x"], [first["range"][name] for name in first["x"]]
        arrays = lambda laws: laws and {name: np.array(values, float) for name, values in laws.items()}
        units = arrays({"E": [first["E"]], "log_A": np.log([first["A"]]), "alpha": [first["alpha"]]})
        known = Fit(*[None] * 9, units, arrays(first["draws"]), first["widen"])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise Refused(f"{path} is no laws.json of this program ({type(error).__name__}: {error})") from None
    plan = {name: given for name, given in (("users", users), ("hours_per_user", hours_per_user)) if name in names}
    lacking = [f"--{name.replace('_', '-')}" for name, given in plan.items() if not (given and 0 < given < math.inf)]
    if lacking or not plan or set(names) - set(FACTORS):
        raise Refused(f"{path} holds a law of {', '.join(names)}; --recommend is for laws of users or hours per user"
                      + f", and needs a positive {' and '.join(lacking)} for this one" * bool(lacking))
    x = list(plan.values())

    def show(label, quantity, form):
        value, ci95 = estimate(known, quantity, log=True)
        print(f"  {label:36s}{form.format(value)}{span(ci95, form)}")

    print(f"{' x '.join(f'{v:g} {name}' for name, v in plan.items())}, by the law '{first['name']}' [95 % interval]")
    if names[-1] == "params_encoder":
        show("parameters, balanced with the data", lambda units: capacities(units, x, "balanced"), "{:.3g}")
        show("parameters, within 1 % of the best", lambda units: capacities(units, x, "within_1_percent"), "{:.3g}")
        best = capacities(units, x, "within_1_percent")[0]
        x.append(float(np.clip(best, *ranges[-1])))
        print(f"  {'train':36s}{x[-1]:,.0f}" + ", the most that was run: more may pay" * bool(best > x[-1]))
    show("expected loss", lambda units: loss_at(units, x), "{:.4f}")
    print(f"  {'95 % of single runs within':36s}{first['scatter']:.1%} of it")
    if len(plan) == 2:                                           # 1 % more of either are the same hours in all
        gain = lambda units: units["alpha"] * terms_at(units, x)
        show("an hour of new users gains", lambda units: gain(units)[:, 0] / gain(units)[:, 1], "{:.2f}")
        better = "new users" if np.diff(gain(units)[0])[0] < 0 else "the same users for longer"
        print(f"  {'':36s}times what an hour more of the same users gains: record {better}")
    for name, value, (low, high) in zip(names, x, ranges):
        if not low / 2 <= value <= 2 * high:
            print(f"  ! {name} {value:g} lies beyond twice the fitted range, {low:g} to {high:g}: a guess")


# ---------------------------------------------------------------- what is read
def numbers(rows, name):
    """Column `name` of rows [(where, {column: value})], positive and finite; Refused with the place if it isn't."""
    for where, row in rows:
        try:
            if not 0 < float(row[name]) < math.inf:
                raise Refused(f"{where}: '{name}' is {row[name]}, and a power law needs positive, finite numbers")
        except (TypeError, ValueError):
            raise Refused(f"{where}: '{name}' is '{row[name]}', not a number: mend that row") from None
    return np.array([float(row[name]) for _, row in rows])


def group_by(table, seeds, users=()):
    """Give `table` the groups to resample: whole seeds from three up. Two make but three different tables: then a
    grid's draws of `users` (seed x users, among those of one count), else rows, which leave out of the intervals what
    the runs of a seed share; as they do where there is one seed."""
    if len(set(seeds)) > 2:
        table["group"] = np.array(seeds)
    elif len(set(seeds)) == 2 and len(users):
        table.update(group=np.array([f"{seed} {count}" for seed, count in zip(seeds, users)]), stratum=np.array(users))


def read_table(path, names):
    """Columns `names` of a CSV file, grouped by its column `seed` if it has one: {column: (n,)}."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = [(f"{path}, line {i}", [cell.strip() for cell in row])
                     for i, row in enumerate(csv.reader(file), 1) if any(row)]
    except (UnicodeDecodeError, csv.Error):
        raise Refused(f"{path} is not a CSV text file") from None
    header = lines[0][1] if lines else []
    for name in names:
        if header.count(name) != 1:
            has = ", ".join(header)[:200] or "nothing"
            raise Refused(f"{path} has {header.count(name)} columns '{name}', and must have one; it has {has}")
    for where, row in lines[1:]:
        if len(row) != len(header):
            raise Refused(f"{where}: {len(row)} fields under a header of {len(header)}")
    rows = [(where, dict(zip(header, row))) for where, row in lines[1:]]
    table = {name: numbers(rows, name) for name in names}
    if "seed" in header and "seed" not in names:
        group_by(table, [row["seed"] for _, row in rows])
    return table


SAME = ("data fingerprint sensors patch mask_ratio masking target rotate positions batch optimizer weight_decay "
        "precision decoder_width decoder_depth steps lr").split()
BY_MODEL = ("steps", "lr")                                       # these may follow the model's size, and nothing else


def collect(folder, partial=False, mixed=False):
    """The finished cells of a grid, one flat dict each with its probes' scores. Refused where they are no one table."""
    cells = sorted(path for path in Path(folder).iterdir() if path.is_dir() and not path.name.startswith("."))
    missing = [cell.name for cell in cells if not (cell / "result.json").is_file()]
    if missing and partial:
        print(f"{len(missing)} of {len(cells)} cells are not done and left out: {', '.join(missing)}")
    elif missing:
        raise Refused(f"{len(missing)} of {len(cells)} cells in {folder} are not done ({', '.join(missing[:6])}"
                      f"{', ...' * (len(missing) > 6)}): finish the sweep, or fit what is there with --partial")
    rows = []
    for cell in (cell for cell in cells if cell.name not in missing):
        row = {"name": cell.name}
        for path in [cell / "result.json", *sorted(cell.glob("finetune/*-probe.json"))]:
            try:
                read = dict(json.loads(path.read_text()))
            except (ValueError, TypeError):
                raise Refused(f"{path} is not readable: delete it and run that cell again") from None
            if path.name != "result.json":
                data = path.name.removesuffix("-probe.json")
                read = {f"{data}_{key}": read.get(key) for key in ("macro_f1", "accuracy", "macro_f1_sd")}
            row.update(read)
        for key in ("loss", "hours", *FACTORS):
            if key not in row:
                raise Refused(f"{cell}/result.json has no '{key}': it is no result of pretrain.py")
        rows.append({key: value for key, value in row.items() if not isinstance(value, (dict, list))})
    if not rows:
        raise Refused(f"{folder} holds no finished cell: run sweep.sh first")
    for key in [] if mixed else SAME:
        found = {}
        for row in rows:
            model = f"{row.get('width')}x{row.get('depth')}x{row.get('heads')}" if key in BY_MODEL else "cells"
            found.setdefault(model, {}).setdefault(str(row.get(key)), row["name"])
        for model, values in found.items():
            if len(values) > 1:
                several = " and ".join(f"{value[:12]} ({name})" for value, name in [*values.items()][:3])
                raise Refused(f"{folder} mixes configurations, {model} with {key} {several}: give each its own "
                              "folder, or fit them as one with --mixed")
    return sorted(rows, key=lambda row: [row[name] for name in FACTORS] + [str(row.get("seed"))])


FIRST = ("name data users hours_cap hours_per_user hours windows width depth heads params_encoder params seed loss "
         "loss_last baseline_loss").split()


def write_csv(path, rows):
    keys = list(dict.fromkeys(key for row in rows for key in row))
    scores = [key for key in keys if key.endswith(("_macro_f1", "_accuracy", "_macro_f1_sd"))]
    columns = [key for key in FIRST if key in keys] + [key for key in keys if key not in FIRST + scores] + scores
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def study(rows, y, floor, bootstrap, column, seed):
    """A grid's laws and verdicts: the joint law of what varies, that of hours in all, that of hours at each capacity.

    Returns laws and verdicts as `analyse` does, the table, and what the figures need beside."""
    places = [(row["name"], row) for row in rows]
    table = {name: numbers(places, name) for name in (y, "hours", *FACTORS)}
    table["cap"] = np.array([math.inf if row.get("hours_cap") is None else row["hours_cap"] for row in rows])
    if all("seed" in row for row in rows):
        group_by(table, [str(row["seed"]) for row in rows], table["users"])
    settings = {x: len(np.unique(table["cap" if x == "hours_per_user" else x])) for x in FACTORS}
    varied = tuple(x for x in FACTORS if settings[x] > 2)
    for x in FACTORS:
        if x not in varied:
            print(f"{x} is left out of the law: the grid has {settings[x]} value(s) of it, and 3 show an exponent")
    if not varied:
        raise Refused("this grid has 3 values of neither users, nor hours per user, nor parameters: no law fits")
    laws, verdicts = analyse(table, varied, y, floor, bootstrap, column, seed)
    joint, by_hours, by_size = laws[0][1], None, {}
    held = [found for x in varied if (found := hold_out(table, varied, y, joint.form, x))]
    laws[0] = (*laws[0][:2], laws[0][2] or (held[0] if held else None))
    if set(varied) & {"users", "hours_per_user"}:
        of_hours = ("hours", *(x for x in varied if x == "params_encoder"))
        more, told = analyse(table, of_hours, y, floor, bootstrap, None, seed, judged=("hours",))
        laws, verdicts, by_hours = laws + more, {**verdicts, **told}, more[0][1]
        for P in np.unique(table["params_encoder"]):
            cells = take(table, table["params_encoder"] == P)
            try:
                by_size[P] = fit(cells, ("hours",), y, None, bootstrap, seed)
                found = hold_out(cells, ("hours",), y, None, "hours")
                laws.append((f"{y} by hours at {P:.0f} parameters", by_size[P], found))
            except Refused:                                      # too few cells of this size
                by_size[P] = None
    if {"users", "hours_per_user"} <= set(varied):
        verdicts.update(users_or_hours(joint, table))
    if by_hours and varied[-1] == "params_encoder":
        verdicts["capacity"] = capacity(joint, by_hours, table)
    for score in sorted({key for row in rows for key in row if key.endswith("_macro_f1")}):
        table[score] = np.array([math.nan if row.get(score) is None else row[score] for row in rows])
        if np.isfinite(table[score]).sum() > 4:
            verdicts[f"downstream_{score.removesuffix('_macro_f1')}"] = follows(table, score, y, bootstrap, seed)
    return laws, verdicts, table, (joint, by_hours, by_size, held)


# ---------------------------------------------------------------- figures
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]   # Okabe and Ito: for all eyes
TITLES = {"hours_per_user": "hours per user", "hours": "hours in all", "params_encoder": "encoder parameters"}


def panels(columns=1, height=4.6):
    import matplotlib                                            # here, so that --help and refusals don't wait for it
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
                         "legend.fontsize": 10, "axes.titlesize": 11})
    width = 8 if columns == 1 else 4.5 * columns
    figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained")
    return figure, np.atleast_1d(axes)


def log_ticks(axis):
    """A log axis with ticks a reader knows: 1, 2, 5 in each decade, or round steps within less than one; 20k, 3M."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    steps = LogLocator(subs=(1, 2, 5) if high < 3000 * low else (1,), numticks=15)
    if high < 6 * low:
        steps = FixedLocator(MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high))
    axis.set_major_locator(steps)
    axis.set_minor_locator(NullLocator())
    units = ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"), (0, 1, ""))
    short = lambda v: next(f"{v / size:.4g}{unit}" for least, size, unit in units if v >= least)
    axis.set_major_formatter(FuncFormatter(lambda v, _: short(v)))
    axis.set_view_interval(low, high, ignore=True)


def finish(axes, x, y, log="xy"):
    axes.set(xlabel=TITLES.get(x, x), ylabel=TITLES.get(y, y))
    for name in log:
        log_ticks(getattr(axes, f"{name}axis"))


def scatter(fitted):
    """95 % of runs lie so far from the law in log loss; a bit more than in the table, as the law was bent to those."""
    n, P = len(fitted.residuals), fitted.theta.size
    return float(np.percentile(np.abs(fitted.residuals), 95) * math.sqrt(n / max(n - P, 1)))


def prediction_band(fitted, x):
    """Between which losses 95 % of new runs at x (k, m) fall, (2, m): the law's interval and the scatter of runs."""
    centre = law(fitted, x)
    around = [estimate(fitted, lambda units: loss_at(units, point), log=True)[1] for point in np.transpose(x)]
    return centre * np.exp(np.hypot(np.log(around).T - np.log(centre), scatter(fitted)) * [[-1], [1]])


def draw_law(axes, fitted, x, at, colour, label=None, band=True, style="-"):
    axes.plot(at, law(fitted, x), style, color=colour, lw=1.8, label=label)
    if band and fitted.draws:
        axes.fill_between(at, *prediction_band(fitted, x), color=colour, alpha=.13, lw=0)


def draw_along(axes, fitted, factor, others, table, colour, band=True, beyond=4):
    """The law along one factor, over its range in the table and dashed beyond; {name: value} of the others stay."""
    low, high = table[factor].min(), table[factor].max()
    for at, style in ((np.geomspace(low, high, 40), "-"), (np.geomspace(high, high * beyond, 20), "--")):
        x = [at if name == factor else np.full(len(at), others[name]) for name in fitted.x]
        draw_law(axes, fitted, x, at, colour, band=band, style=style)


def draw_cells(axes, table, x, y, alike, colour, size=6):
    """The runs of each value of `alike` as one point, their mean, with a bar from the lowest to the highest seed."""
    for value in np.unique(table[alike]):
        at, found = (table[name][table[alike] == value] for name in (x, y))
        axes.plot([at.mean()] * 2, [found.min(), found.max()], "-", color=colour, lw=1)
        axes.plot(at.mean(), found.mean(), "o", color=colour, ms=size, mec="white", mew=.5)


def figure_residuals(fitted, table):
    figure, axes = panels(len(fitted.x), 3.8)
    for ax, name in zip(axes, fitted.x):
        ax.axhline(0, color="black", lw=1)
        ax.plot(table[name], 100 * fitted.residuals, "o", ms=4, color=COLOURS[0], alpha=.7, mew=0)
        finish(ax, name, f"{fitted.y} above the law, %", log="x")
    return figure


def figure_held_out(found, y):
    figure, (ax,) = panels()
    for held, colour, marker in zip(found, COLOURS, "os^Dv"):
        label = f"largest {TITLES.get(held['column'], held['column'])}, {held['n']} runs: median error "
        ax.plot(held["truth"], held["predicted"], marker, ms=6, color=colour, mec="white", mew=.5,
                label=label + f"{held['median_relative_error']:.1%}")
    ends = [min(ax.get_xlim()[0], ax.get_ylim()[0]), max(ax.get_xlim()[1], ax.get_ylim()[1])]
    ax.plot(ends, ends, "-", color="black", lw=1)
    ax.legend(loc="upper left")
    finish(ax, f"{y}, measured on what was held out", f"{y}, predicted from the rest")
    return figure


def figure_fit(fitted, table):
    """The law along each factor, the others at their medians, and the rows moved there along the law."""
    middle = {name: float(np.median(table[name])) for name in fitted.x}
    figure, axes = panels(len(fitted.x))
    for ax, name in zip(axes, fitted.x):
        there = law(fitted, [table[x] if x == name else np.full(len(fitted.residuals), middle[x]) for x in fitted.x])
        ax.plot(table[name], there * np.exp(fitted.residuals), "o", ms=4, color=COLOURS[0], alpha=.6, mew=0)
        draw_along(ax, fitted, name, middle, table, COLOURS[1])
        finish(ax, name, fitted.y + ", other factors at their medians" * bool(len(axes) > 1 and ax is axes[0]))
    return figure


def figure_hours(by_size, table, y):
    figure, (ax,) = panels()
    for colour, (P, fitted) in zip(cycle(COLOURS), by_size.items()):
        for users in np.unique(table["users"]):
            cells = take(table, (table["params_encoder"] == P) & (table["users"] == users))
            draw_cells(ax, cells, "hours", y, "cap", colour, size=2 + 1.5 * math.log2(1 + users))
        if fitted:
            draw_along(ax, fitted, "hours", {}, table, colour)
        ax.plot([], [], "o-", color=colour, label=f"{P:,.0f} encoder parameters")
    ax.legend(title="larger points: more users", title_fontsize=10)
    finish(ax, "hours", y)
    return figure


def figure_parameters(joint, table, volumes):
    figure, (ax,) = panels()
    from matplotlib import cm, colors
    shade = cm.ScalarMappable(colors.LogNorm(table["hours"].min() / 1.01, table["hours"].max() * 1.3), "viridis")
    for i, cells in enumerate(volumes):
        others, colour = {name: cells[name].mean() for name in FACTORS}, shade.to_rgba(cells["hours"].mean())
        draw_cells(ax, cells, "params_encoder", joint.y, "params_encoder", colour)
        draw_along(ax, joint, "params_encoder", others, table, colour, band=i in (0, len(volumes) - 1))
    log_ticks(figure.colorbar(shade, ax=ax, label=TITLES["hours"]).ax.yaxis)
    finish(ax, "params_encoder", joint.y)
    return figure


def figure_users_or_hours(joint, table):
    """Left: lines of equal loss and of equal hours over users and hours per user; right: the loss along the latter."""
    figure, (left, right) = panels(2)
    largest = table["params_encoder"].max()
    users, hours = (np.geomspace(table[name].min(), table[name].max(), 50) for name in FACTORS[:2])
    with_size = lambda u, h: [u, h] + [np.full(len(u), largest)] * (len(joint.x) - 2)
    surface = law(joint, with_size(np.tile(users, 50), np.repeat(hours, 50))).reshape(50, 50)
    left.clabel(left.contour(users, hours, surface, levels=8, cmap="viridis_r"), fontsize=9, fmt="%.3g")
    left.plot(table["users"], table["hours_per_user"], "o", ms=4, color="black")
    for total, colour in zip(np.geomspace(table["hours"].min(), table["hours"].max(), 5)[1:-1], COLOURS):
        left.plot(users, total / users, ":", color=colour, lw=2)
        ways = users[(total / users > hours[0]) & (total / users < hours[-1])]            # beyond, a law may explode
        if len(ways):
            draw_law(right, joint, with_size(ways, total / ways), ways, colour, f"{total:.2g} hours in all")
        near = (table["params_encoder"] == largest) & (np.abs(np.log(table["hours"] / total)) < .35)
        right.plot(table["users"][near], table[joint.y][near], "o", color=colour, ms=5, mec="white", mew=.5)
    left.set(xlim=users[[0, -1]] * [.8, 1.25], ylim=hours[[0, -1]] * [.8, 1.25],
             title="lines of equal loss; dotted: of equal hours")
    right.legend()
    finish(left, "users", "hours_per_user")
    finish(right, "users", f"{joint.y} at equal hours, {largest:,.0f} parameters")
    return figure


def figure_capacity(by_hours, table, minima):
    figure, (ax,) = panels()
    (low, high), sizes = ((table[name].min(), table[name].max()) for name in ("hours", "params_encoder"))
    for way, label, colour in (("balanced", "law: 1 % more parameters gain what 1 % more data gain", COLOURS[0]),
                               ("within_1_percent", "law: no larger model gains more than 1 %", COLOURS[2])):
        for at, style in ((np.geomspace(low, high, 40), "-"), (np.geomspace(high, 4 * high, 20), "--")):
            found = [estimate(by_hours, lambda units: capacities(units, [h], way), log=True) for h in at]
            ax.plot(at, [P for P, _ in found], style, color=colour, lw=1.8, label=label if style == "-" else None)
            if by_hours.draws:
                ax.fill_between(at, *np.transpose([ci95 for _, ci95 in found]), color=colour, alpha=.13, lw=0)
    for edge, marker, label in (("largest", "^", "grid's best: its largest, so here or above"), (
            "between", "o", "grid's best"), ("smallest", "v", "grid's best: its smallest, so here or below")):
        found = [(m["hours"], m["params_encoder"]) for m in minima if m["edge"] == edge]
        if found:
            ax.plot(*np.transpose(found), marker, ms=8, color=COLOURS[1], mec="white", label=label)
    ax.set_ylim(sizes[0] / 10, sizes[1] * 300)
    ax.legend(loc="upper left")
    finish(ax, "hours", "params_encoder")
    return figure


def figure_downstream(table, y, verdicts):
    figure, axes = panels(len(verdicts), 4)
    for ax, (name, verdict), colour in zip(axes, verdicts.items(), cycle(COLOURS)):
        ax.plot(table[y], table[f"{name}_macro_f1"], "o", ms=5, color=colour, mec="white", mew=.5)
        ax.set_title(f"{name}: rank correlation\n{verdict['value']:+.2f}{span(verdict['ci95'], '{:+.2f}')}")
        finish(ax, f"{y} of pre-training", "macro-F1 of a linear probe" if ax is axes[0] else "", log="x")
    return figure


def study_figures(table, verdicts, joint, by_hours, by_size, held):
    """{name: figure}, as far as the grid varies what they show."""
    figures = {"residuals": figure_residuals(joint, table)}
    if held:
        figures["held_out"] = figure_held_out(held, joint.y)
    if by_size:
        figures["loss_vs_hours"] = figure_hours(by_size, table, joint.y)
    if "params_encoder" in joint.x:
        volumes = sorted(set(zip(table["users"], table["cap"])))
        figures["loss_vs_params"] = figure_parameters(joint, table, [
            take(table, (table["users"] == users) & (table["cap"] == cap)) for users, cap in volumes])
    if {"users", "hours_per_user"} <= set(joint.x):
        figures["users_vs_hours"] = figure_users_or_hours(joint, table)
    if "capacity" in verdicts:
        figures["capacity"] = figure_capacity(by_hours, table, verdicts["capacity"]["grid_minima"])
    scores = {name.removeprefix("downstream_"): one for name, one in verdicts.items() if name.startswith("downstream_")}
    if scores:
        figures["downstream"] = figure_downstream(table, joint.y, scores)
    return figures


# ---------------------------------------------------------------- what is written and printed
FORMULAS = {"power law": "A {0}^-alpha", "exponential": "A exp(-{0}/x0)", "logarithm": "A (log x0 - log {0})",
            "broken power law": "A {0}^-alpha (1 + {0}/x0)^(alpha - beta)"}


def entry(name, fitted, held, table):
    """A law as it stands in laws.json; null is what its form doesn't have, or what wasn't asked for."""
    one = lambda i, quantity, scale: estimate(fitted, lambda u: quantity(u)[:, i], **scale)
    each = lambda quantity, **scale: zip(*[one(i, quantity, scale) for i in range(len(fitted.x))])
    (E, E_ci95), (A, A_ci95), (alpha, alpha_ci95) = (
        estimate(fitted, lambda u: u["E"], low=0, high=math.exp(fitted.scale.low)),
        each(lambda u: np.exp(np.clip(u["log_A"], -700, 700)), log=True), each(lambda u: u["alpha"], low=0))
    number = lambda v: float(v) if math.isfinite(v) else None
    own = [part for part in ("beta", "x0") if np.isfinite(fitted.units[part]).any()]
    errors = np.abs(np.expm1(-fitted.residuals))
    terms = [FORMULAS[shape].format(x) for shape, x in zip(fitted.form.shapes, fitted.x)]
    return {
        "name": name, "x": list(fitted.x), "y": fitted.y, "form": " + ".join(["E"] * fitted.form.floor + terms),
        "E": E, "A": A, "alpha": [number(v) for v in alpha],
        **{part: [number(v) for v in fitted.units[part][0]] for part in own},
        "ci95": fitted.draws and {"E": E_ci95, "A": A_ci95, "alpha": alpha_ci95},
        "objective": float(fitted.objective), "n": len(errors), "aicc": number(fitted.aicc),
        "in_sample": {"median_relative_error": float(np.median(errors)), "worst_relative_error": float(errors.max())},
        "holdout": held and {key: value for key, value in held.items() if key not in ("truth", "predicted")},
        "scatter": scatter(fitted), "range": {x: [float(table[x].min()), float(table[x].max())] for x in fitted.x},
        "resampled": f"{len(set(table['group']))} groups" if "group" in table else "rows", "warnings": fitted.warnings}


def report(entries, verdicts):
    """The screen: the law and its intervals, how well it predicts, its rivals, the verdicts, the doubts."""
    first = entries[0]
    print(f"\n{first['y']} = {first['form']}   ({first['n']} rows, objective {first['objective']:.9g})")
    ci95 = first["ci95"] or {"E": None, "A": [None] * 4, "alpha": [None] * 4}
    lines = [("E", first["E"], ci95["E"])]
    for i, x in enumerate(first["x"]):
        lines += [(f"{part} of {x}", first[part][i], ci95[part][i]) for part in ("A", "alpha")]
    for label, value, around in lines:
        print(f"  {label:26s}{value:<14.6g}{span(around, '{:.5g}')}")
    for label, errors in (("in sample", first["in_sample"]), ("held out", first["holdout"])):
        if errors:
            label += f", largest {errors['column']}, {errors['n']} rows" if "column" in errors else ""
            print(f"  {label}: median error {errors['median_relative_error']:.2%}, "
                  f"worst {errors['worst_relative_error']:.2%}")
    print(f"\n  {'laws and their rivals':58s}{'rows':>5s}{'AICc':>10s}  held out")
    for e in entries:
        held = "{median_relative_error:8.2%} largest {column}".format(**e["holdout"]) if e["holdout"] else "       -"
        print(f"  {e['name']:58s}{e['n']:5d}{'-' if e['aicc'] is None else format(e['aicc'], '.1f'):>10s}  {held}")
    print()
    for line in [f"- {verdict['text']}" for verdict in verdicts.values()] + [f"! {said}" for said in first["warnings"]]:
        print(line)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("target", help="a CSV table, a grid's folder of runs, or (with --recommend) a laws.json")
    p.add_argument("--out", help="folder for laws.json, the figures and, of a grid, results.csv")
    g = p.add_argument_group("the law")
    g.add_argument("--x", nargs="+", metavar="COLUMN", help="one to four factors of a table (a grid has its own)")
    g.add_argument("--y", default="loss", metavar="COLUMN", help="what is to be explained (default: loss)")
    g.add_argument("--no-floor", action="store_true", help="fix E at 0: a law by which any loss can be reached")
    g = p.add_argument_group("how far to trust it")
    g.add_argument("--bootstrap", type=int, default=1000, metavar="B",
                   help="resampled tables behind the 95 %% intervals; 0: no intervals, and done sooner (default: 1000)")
    g.add_argument("--holdout", metavar="COLUMN",
                   help="predict the rows largest in this column from the others (default: a grid's first factor)")
    g.add_argument("--seed", type=int, default=0, help="of the resampling: moves the intervals a little (default: 0)")
    g = p.add_argument_group("a grid that isn't whole")
    g.add_argument("--partial", action="store_true", help="fit the cells that are done instead of refusing")
    g.add_argument("--mixed", action="store_true", help="fit cells of several configurations as one")
    g = p.add_argument_group("advice")
    g.add_argument("--recommend", action="store_true", help="say what a law expects of a plan, and what fits it")
    g.add_argument("--users", type=float, metavar="N", help="users in the plan")
    g.add_argument("--hours-per-user", type=float, metavar="H", help="hours recorded of each")
    a = p.parse_args()
    if a.recommend:
        return recommend(a.target, a.users, a.hours_per_user)
    if not a.out:
        raise Refused("--out is missing: name a folder for laws.json and the figures")
    if a.bootstrap < 0:
        raise Refused(f"--bootstrap {a.bootstrap} must be 0 or more")
    out, of_a_grid = Path(a.out), Path(a.target).is_dir()
    if of_a_grid:
        if a.x:
            raise Refused(f"{a.target} is a folder of runs, whose factors are fixed: leave --x out, or name a CSV file")
        rows = collect(a.target, a.partial, a.mixed)
        write_csv(out / "results.csv", rows)                     # the table stands even where no law can be fitted
        laws, verdicts, table, parts = study(rows, a.y, not a.no_floor, a.bootstrap, a.holdout, a.seed)
        figures = study_figures(table, verdicts, *parts)
    else:
        if not Path(a.target).is_file():
            raise Refused(f"{a.target} does not exist: name a CSV table or a folder of runs")
        if not a.x or not len({*a.x, a.y}) == len(a.x) + 1 < 6:
            raise Refused("--x must name one to four columns, each once, and none that is --y")
        table = read_table(a.target, dict.fromkeys([*a.x, a.y, *([a.holdout] if a.holdout else [])]))
        laws, verdicts = analyse(table, tuple(a.x), a.y, not a.no_floor, a.bootstrap, a.holdout, a.seed)
        figures = {"fit": figure_fit(laws[0][1], table), "residuals": figure_residuals(laws[0][1], table)}
        if a.holdout:
            figures["held_out"] = figure_held_out([laws[0][2]], a.y)
    entries = [entry(*one, table) for one in laws]
    fitted = laws[0][1]                                          # 200 of its draws are kept, for --recommend
    entries[0].update(widen=fitted.widen, draws=fitted.draws and {
        part: np.clip(fitted.draws[part][:200], -700, 700).round(9).tolist() for part in ("E", "log_A", "alpha")})
    for name, figure in figures.items():
        with replacing(out / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=150)
    text = json.dumps({"laws": entries, "verdicts": verdicts, "provenance": provenance()}, indent=1, allow_nan=False)
    with replacing(out / "laws.json") as temporary:              # a list of numbers stands on one line
        text = re.sub(r"\[[\[\]\d\s.,enul+-]*\]", lambda numbers: " ".join(numbers[0].split()), text)
        temporary.write_text(text + "\n")
    report(entries, verdicts)
    print(f"\n{out}: laws.json, {'results.csv, ' * of_a_grid}{', '.join(f'{name}.png' for name in figures)}")


if __name__ == "__main__":
    command(main)
