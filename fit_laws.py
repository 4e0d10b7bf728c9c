"""
From finished runs to a scaling law: its fit, intervals, what it predicts, and which claims hold.

    python fit_laws.py runs/GRID --out results/GRID                    # a grid: collect, fit, draw
    python fit_laws.py results/GRID/results.csv --out DIR              # again, from its table
    python fit_laws.py TABLE.csv --x params tokens --y loss --out DIR  # any table
    python fit_laws.py DIR/laws.json --recommend --users 30 --hours-per-user 2
    python fit_laws.py DIR/laws.json --predict CELLS.csv               # before and after runs

The law of a grid is  loss = E + (A users^-a hours_per_user^-b + B params_encoder^-c)^delta.
Users and hours per user are two ways to get data, so they share a term. Data and parameters are
coupled: with delta below 1 the scarcer of the two limits (Kaplan et al. 2020, arXiv 2001.08361).
`alpha` in laws.json is a, b or c times delta: the slope on log axes where nothing else limits.
The fit is approach 3 of Hoffmann et al. 2022 (2203.15556). results/coverage.md tests it on grids.
"""
import os
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")     # before numpy: small matrices, idle threads
import argparse, csv, json, math
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from scipy.optimize import minimize
from scipy.stats import spearmanr, t as student_t, ttest_1samp

from data import UserError, command, number, provenance, read_json, replacing, require, write_json

HUBER = 1e-3                             # residuals above 0.1 % count linearly, not squared
DATA = ("users", "hours_per_user")
TERMS = (DATA, ("params_encoder",))      # of the law of a grid
FACTORS = sum(TERMS, ())
MAY_DIFFER = "users hours_per_user width depth heads seed steps".split()        # between cells
Study = namedtuple("Study", "shown table y law fits tables laws")       # see `analyse`

# ---------------------------------------------------------------- the law
@dataclass
class Shape:
    terms: tuple                         # of factors: (("users", "hours_per_user"), ("params",))
    floor: bool = True                   # else E is 0
    coupled: bool = False                # else delta is 1
    enough: float = 0                    # hours: the factor "data" is users / (1/hours + 1/enough);
                                         # 1e9: it is the hours in all
    curve: tuple = ()                    # ("logarithm" or "exponential", factor)

    def __post_init__(self):
        self.x = sum(self.terms, ())                           # all factors
        self.columns = sum((DATA if self.enough and x == "data" else (x,) for x in self.x), ())
        self.member = np.array([[float(x in term) for x in self.x] for term in self.terms])
        self.parameters = (self.floor + len(self.terms) + len(self.x) + self.coupled
                           + (0 < self.enough < 1e9))

def logs(table, shape):
    """Log of each factor, (k, n); a factor with an exponential curve stays as it is."""
    if shape.enough:
        hours = 1 / (1 / table["hours_per_user"] + 1 / shape.enough)
        table = {**table, "data": table["users"] * hours}
    return np.array(np.broadcast_arrays(*[
        table[x] if shape.curve == ("exponential", x) else np.log(table[x]) for x in shape.x]))

def parts(theta, shape):
    """Of theta = E, a_1 ..., alpha_1 ..., log delta: E, a (terms,), alpha (k,) and delta."""
    T = len(shape.terms)
    return theta[0], theta[1:1 + T], theta[1 + T:-1], math.exp(theta[-1])

def loss_and_slopes(theta, u, shape):
    """The loss (n,) at the scaled logs u (k, n) of the factors, and its slopes by theta (P, n).

    loss = E + (sum over terms t of exp(z_t))^delta,  delta z_t = a_t - sum_i alpha_i u_i
    """
    E, a, alpha, delta = parts(theta, shape)
    powers, slopes = -alpha[:, None] * u, -u               # log of each factor's power, (k, n)
    if "logarithm" in shape.curve:       # 1 - alpha u in place of exp(-alpha u)
        i = shape.x.index(shape.curve[1])
        slopes[i] /= 1 + powers[i]
        powers[i] = np.log1p(powers[i])
    z = (a[:, None] + shape.member @ powers) / delta
    shares = np.exp(z - z.max(0))
    log_sum = z.max(0) + np.log(shares.sum(0))
    above = np.exp(delta * log_sum)
    by_a = above * shares / shares.sum(0)
    by_alpha = shape.member.T @ by_a * slopes
    by_log_delta = delta * (above * log_sum - (by_a * z).sum(0))
    return E + above, np.vstack([np.ones_like(above), by_a, by_alpha, by_log_delta])

def objective(theta, u, log_y, shape):
    """Sum over rows of Huber(log y - log law) / HUBER^2, and its gradient."""
    loss, slopes = loss_and_slopes(theta, u, shape)
    residuals = log_y - np.log(loss)
    clipped = np.clip(residuals, -HUBER, HUBER)
    value = (clipped * (residuals - clipped / 2)).sum()
    return value / HUBER ** 2, -slopes @ (clipped / loss) / HUBER ** 2

# ---------------------------------------------------------------- its fit
@dataclass
class Fit:
    shape: Shape
    theta: np.ndarray                    # at logs scaled to -1 ... 1 and a loss about 1
    middle: np.ndarray                   # of each factor's logs, (k,)
    half: np.ndarray                     # of their range, (k,)
    unit: float                          # of the loss
    objective: float = 0.
    residuals: np.ndarray = None         # log y - log law, (n,)
    held: dict = None                    # {factor: its largest, held out and predicted}

    def scaled(self, table):
        return ((logs(table, self.shape).T - self.middle) / self.half).T

    def loss(self, table):
        return self.unit * loss_and_slopes(self.theta, self.scaled(table), self.shape)[0]

    def alpha(self, x):
        return self.numbers()["alpha"][self.shape.x.index(x)]

    def numbers(self):
        """E, A, alpha, delta of E + (sum over terms of A times each x^-(alpha / delta))^delta."""
        E, a, alpha, delta = parts(self.theta, self.shape)
        alpha = alpha / self.half
        powers = [self.shape.curve != ("logarithm", x) for x in self.shape.x]    # else at u = 0
        a = a + self.shape.member @ (alpha * self.middle * powers) + math.log(self.unit)
        A = np.exp(np.clip(a / delta, -700, 700))
        numbers = {"E": self.unit * E, "A": A, "alpha": alpha}
        return {**numbers, "delta": delta} if self.shape.coupled else numbers

@np.errstate(all="ignore")               # trial steps may overflow
def fit(table, shape, y, near=None):
    """Fit a shape to the column `y` of `table` {column: (n,)}: the best of 48 random starts (E, a,
    alpha, log delta); `near`, the fit to a similar table, saves time."""
    log_y, (T, k) = np.log(table[y]), shape.member.shape
    starts = np.random.default_rng(0).random((48, T + k + 2)) * [.8, *[-3] * T, *[.8] * k, -1]
    if near:                             # from `near` alone, the fit may stick
        fitted, starts = replace(near, shape=shape), [near.theta, *starts[:2]]
    else:
        u = logs(table, shape)
        low, high = u.min(1), u.max(1)
        middle, half = (low + high) / 2, np.maximum((high - low) / 2, .01)
        if "exponential" in shape.curve:                   # of x itself, which may span decades
            i = shape.x.index(shape.curve[1])
            middle[i], half[i] = low[i], math.sqrt(low[i] * high[i])
        fitted = Fit(shape, None, middle, half, math.exp(log_y.mean()))
    problem = fitted.scaled(table), log_y - math.log(fitted.unit), shape
    bounds = [(0, 10 if shape.floor else 0), *[(-40, 40)] * T,          # .999: 1 - alpha u above 0
              *[(0, .999 if shape.curve == ("logarithm", x) else 20) for x in shape.x],
              (-3, 1.6) if shape.coupled else (0, 0)]
    for steps in (15, 3000):             # all starts briefly, then the best four to the end
        options = {"maxiter": steps, "ftol": 1e-11, "gtol": 1e-6, "maxcor": 20}
        ends = [minimize(objective, start, problem, "L-BFGS-B", True, bounds=bounds,
                         options=options) for start in starts]
        ends.sort(key=lambda end: end.fun)
        starts = [end.x for end in ends[:4]]
    fitted.theta, fitted.objective = starts[0], ends[0].fun * HUBER ** 2
    fitted.residuals = log_y - np.log(fitted.loss(table))
    return fitted

def aicc(fitted):
    """AICc with the Laplace density, as Huber's loss is linear above 0.1 %; lower is better. Minus
    twice its log likelihood is 2 n log(2 e b), b the mean |residual|, which is a parameter, too."""
    n, k = len(fitted.residuals), fitted.shape.parameters + 1
    deviance = 2 * n * math.log(2 * math.e * max(fitted.objective, 1e-12) / n / HUBER)
    return deviance + 2 * k + 2 * k * (k + 1) / max(n - k - 1, 1e-3)

# ---------------------------------------------------------------- intervals
SCALES = {"signed": (np.asarray, np.asarray), "positive": (np.asarray, np.asarray),
          "ratio": (np.log, np.exp),     # where an interval is symmetric, and back
          "correlation": (lambda r: np.arctanh(np.clip(r, -.999, .999)), np.tanh)}    # Fisher's z

def take(table, rows):
    return {name: values[rows] for name, values in table.items()}

def indicators(values):
    """For each different value, the rows that have it: (different values, n)"""
    return np.unique(values)[:, None] == values

def labels(table, text):
    """`text` for each row, (n,): names of columns in braces are replaced by their values."""
    return np.array([text.format(**dict(zip(table, row))) for row in zip(*table.values())])

def grouped(table, text):
    """{label: its rows}"""
    names = labels(table, text)
    return {name: take(table, names == name) for name in dict.fromkeys(names)}

def resampled(table, y, draws=1):
    """{"whole": [table], ...: the tables that intervals are made from}. Runs of one seed share
    people, so each whole seed is left out in turn, and so is each held-out person. Without a
    column `seed`, rows are drawn with replacement."""
    tables = {"whole": [table]}
    if draws and "seed" not in table:
        rng, n = np.random.default_rng(0), len(table[y])
        tables["rows"] = [take(table, rng.integers(n, size=n)) for _ in range(draws)]
    elif draws and len(seeds := indicators(table["seed"])) > 2:     # two say next to nothing
        tables["seeds"] = [take(table, ~rows) for rows in seeds]
        if np.ndim(table.get("people")) == 2 and y == "loss":      # (n, people): loss on each
            tables["people"] = [{**table, y: np.delete(table["people"], person, 1).mean(1)}
                                for person in range(table["people"].shape[1])]
    return tables

def estimate(quantity, samples, scale="signed"):
    """A quantity and its 95 % interval, from `resampled` tables or the fits to them: with seeds the
    jackknife's error times Student's t. `ci95_people` counts held-out people as well."""
    change, back = SCALES[scale]
    value, square = np.asarray(quantity(samples["whole"][0])), 0
    result = {"value": value.tolist(), "ci95": None, "ci95_people": None}
    for kind in list(samples)[1:]:
        draws = change(np.array([quantity(sample) for sample in samples[kind]]))
        if kind == "rows":
            ends = np.percentile(draws, [2.5, 97.5], axis=0)
        else:
            square += draws.var(0) * (len(draws) - 1)
            half = student_t.ppf(.975, len(samples["seeds"]) - 1) * np.sqrt(square)
            ends = change(value) + np.multiply.outer([-1, 1], half)
        if np.isfinite(ends).all():
            result["ci95_people" if kind == "people" else "ci95"] = back(ends).T.tolist()
    return result

# ---------------------------------------------------------------- what is held out
def setting(table, x):
    """A grid's setting of x: of hours, the cap, as users who recorded less give all they have."""
    return table["cap" if x == "hours_per_user" and "cap" in table else x]

def largest(table, x):
    """Rows of the largest x: of a grid its largest setting, else the top tenth, or all above
    1 / 1.1 of the largest."""
    values = setting(table, x)
    tenth = min(values.max() / 1.1, np.quantile(values, .9))
    return values >= (values.max() if "cap" in table else tenth)

def saturating(table, shape, y):
    """The same shape with those `enough` hours, of 12 numbers, that fit best."""
    near, hours = fit(table, shape, y), table["hours_per_user"]
    trials = [replace(shape, enough=enough)
              for enough in np.geomspace(hours.min() / 4, hours.max() * 10, 12)]
    return min(trials, key=lambda trial: fit(table, trial, y, near).objective)

def hold_out(table, law, y, x):
    """The largest x, predicted by the same law fitted to the other rows alone."""
    top, shape = largest(table, x), law.shape
    rows, rest = take(table, top), take(table, ~top)
    if 0 < shape.enough < 1e9:
        shape = saturating(rest, shape, y)
    predicted = fit(rest, shape, y, law).loss(rows)
    return {"measured": rows[y], "predicted": predicted, "error": abs(predicted / rows[y] - 1),
            "seed": table.get("seed", np.arange(len(top)))[top]}

def predicts_worse(law, other, x):
    """Are its errors at the largest x larger than another law's? One-sided t at 5 % over seeds,
    without seeds over rows."""
    excess = law.held[x]["error"] - other.held[x]["error"]
    excess = np.array([excess[rows].mean() for rows in indicators(law.held[x]["seed"])])
    if len(excess) < 3:
        return excess.mean() > 0
    return ttest_1samp(excess, 0, alternative="greater").pvalue < .05

# ---------------------------------------------------------------- the shapes that are compared
def candidates(table, terms, a):
    """{name: shape}, the law first: the one that --law names, or a grid's coupled one, or M1."""
    added, grid = Shape(terms, not a.no_floor), "cap" in table
    shapes = {"M2, terms coupled": replace(added, coupled=True)} if len(terms) > 1 else {}
    shapes["M1, terms added"] = added
    if grid and DATA in terms:
        hours = replace(added, terms=(("data",), *terms[1:]), enough=1e9)
        shapes |= {"M0, only hours in all count": hours,
                   "MA, a term for each factor": replace(added, terms=tuple((x,) for x in added.x)),
                   "MC, hours of a person count less and less": saturating(table, hours, a.y),
                   "MC, coupled": saturating(
                       table, replace(hours, coupled=len(terms) > 1), a.y)}
    first = [name for name in shapes if name.startswith(a.law or ("" if grid else "M1"))]
    require(first, f"--law {a.law}: name one of {', '.join(shapes)}")
    law = shapes[first[0]]
    shapes = {first[0]: law} | shapes
    for x in law.x:                      # another curve in the place of its power law
        floor = law.floor and (law.coupled or (x,) not in law.terms)     # a lone log needs none
        shapes |= {f"logarithm in {x}": replace(law, curve=("logarithm", x), floor=floor),
                   f"exponential in {x}": replace(law, curve=("exponential", x))}
    return shapes

def analyse(shown, terms, a):
    """Fit the law of these terms and its alternatives to the rows of `shown` that are used; predict
    the held-out ones; resample."""
    table = take(shown, shown.get("used", slice(None)))
    fixed = [x for x in sum(terms, ()) if len(np.unique(setting(table, x))) < 3]
    terms = tuple(filter(None, [tuple(x for x in term if x not in fixed) for term in terms]))
    require(not fixed or terms and "cap" in table,
            f"{a.target} has too few values of {', '.join(fixed)}: an exponent needs 3, add runs")
    for x in fixed:
        print(f"note: {x} is left out of the law: an exponent needs 3 settings of it")
    shapes = candidates(table, terms, a)
    shape, *_ = shapes.values()
    n, least = len(table[a.y]), max(5, *(shape.parameters for shape in shapes.values()))
    require(n >= least, f"{a.target} has {n} rows, which are too few for a law of "
            f"{', '.join(shape.x)}: it needs {least}, add runs")
    columns = [x for x in dict.fromkeys([a.holdout, *shape.columns])
               if x and sum(~largest(table, x)) >= least]
    require(a.holdout in (None, *columns),
            f"{a.target} has too few rows left without the largest {a.holdout}: add runs")
    fits = {name: fit(table, candidate, a.y) for name, candidate in shapes.items()}
    for fitted in fits.values():
        fitted.held = {x: hold_out(table, fitted, a.y, x) for x in columns}
    law, *_ = fits.values()
    tables = resampled(table, a.y, a.bootstrap)
    again = partial(fit, shape=shape, y=a.y, near=law)
    with ProcessPoolExecutor(2) as pool:
        laws = {"whole": [law]} | {kind: list(pool.map(again, tables[kind], chunksize=8))
                                   for kind in tables if kind != "whole"}
    return Study(shown, table, a.y, law, fits, tables, laws)

# ---------------------------------------------------------------- verdicts
def span(ci95):
    if not ci95:
        return "[no interval: it takes 3 seeds, or --bootstrap]"
    return "[{:.4g}, {:.4g}]".format(*ci95) if ci95[1] < 1e6 * max(ci95[0], 1) else "[unbounded]"

def verdict(claim, text, quantity, samples, scale="signed", against="", refuted=False):
    """Decide a claim: the interval of a quantity lies above 0 (of a ratio, 1) or below it. Evidence
    `against` it leaves it open, and so does the interval of a positive number that spans a decade
    or touches 0. Without an interval nothing is claimed."""
    result = estimate(quantity, samples, scale)
    low, high = result["ci95"] or (-math.inf, math.inf)
    null, decision = float(scale == "ratio"), "can't tell here"
    if refuted and result["ci95"]:
        decision = "doesn't hold"
    elif not against and (scale not in ("positive", "ratio") or 1e-3 < low and high < 10 * low):
        decision = "holds" if low > null else "doesn't hold" if high < null else decision
    text = f"{claim}: {decision}. {text} {result['value']:.3g} {span(result['ci95'])}{against}"
    if result["ci95_people"]:
        text += f"; with other held-out people {span(result['ci95_people'])}"
    return {**result, "decision": decision, "text": text}

def power_law(study, x):
    """Undecided if another curve has a lower AICc or predicts the largest x better; refuted if
    both, but never by three settings, which any curve fits."""
    law, refuted = study.law, False
    against = "" if law.alpha(x) > 0 else f"; {study.y} doesn't fall with it"
    for name in (f"logarithm in {x}", f"exponential in {x}"):
        other = study.fits[name]
        signs = [aicc(other) <= aicc(law), x in law.held and predicts_worse(law, other, x)]
        against += f"; as good: {name}" if any(signs) else ""
        refuted |= all(signs) and len(np.unique(setting(study.table, x))) > 3
    return verdict(f"a power law in {x}", "Exponent", lambda law: law.alpha(x), study.laws,
                   "positive", against, refuted)

def slope(table, y, columns, groups):
    """Least squares of log y on the columns and a constant for each group: the first slope."""
    columns = np.vstack([*columns, *indicators(groups)]).T
    return np.linalg.lstsq(columns, np.log(table[y]), rcond=None)[0][0]

def slopes_apart(table, y):
    """Users' log-slope minus hours', positive where users are worth more: the mean over seeds. At
    equal hours in all, the slope on log users is that difference. Hours in all have a slope of
    their own for each size, and a curvature: straight lines alone claim too much (coverage.md)."""
    apart = []
    for rows in grouped(table, "{seed}").values():
        total, sizes = np.log(rows["hours"]), rows["params_encoder"]
        columns = [np.log(rows["users"]), total ** 2, *total * indicators(sizes)]
        apart.append(-slope(rows, y, columns, sizes))
    return np.mean(apart)

def users_or_hours(study):
    centre = {x: np.sqrt([study.table[x].min() * study.table[x].max()]) for x in FACTORS}

    def gain(law):
        users, hours = (law.loss({**centre, x: 2 * centre[x]}).item() for x in DATA)
        return hours / users
    return {
        "users_minus_hours_exponent": verdict(
            "users are worth more than hours per user", "Difference of the log-slopes",
            lambda rows: slopes_apart(rows, study.y), study.tables),
        "twice_users_or_hours": verdict(
            "twice the users beat twice the hours", "At the centre of the grid, loss with twice "
            "the hours over loss with twice the users:", gain, study.laws, "ratio"),
        "exponent_ratio": verdict(
            "the next hour is worth more from a new user than from the same users", "Ratio a/b",
            lambda law: (law.alpha("users") + 1e-9) / (law.alpha("hours_per_user") + 1e-9),
            study.laws, "ratio")}

def interaction(study):
    """How much more log loss a tenfold larger model saves per doubling of the total hours, among
    the runs of one draw of users."""
    table, sizes = study.table, study.table["params_encoder"]

    def gain(rows):
        sizes, same_draw = rows["params_encoder"], labels(rows, "{users} {cap} {seed}")
        columns = [np.log10(sizes) * np.log2(rows["hours"]), *indicators(sizes)[1:]]
        return -slope(rows, study.y, columns, same_draw)
    complete = np.isin(table["seed"], table["seed"][sizes == sizes.min()])     # all sizes run
    added = study.fits["M1, terms added"]
    worse = any(predicts_worse(study.law, added, x) for x in study.law.held)
    return verdict("larger models need more data", "What a tenfold model saves in log loss grows, "
                   "per doubling of the hours in all, by", gain, resampled(
                       take(table, complete), study.y, len(study.tables) - 1), "signed",
                   "; but uncoupled predicts better" if worse else "")

def capacity(law, plan):
    """The smallest model that no larger one beats by more than 1 %."""
    sizes = np.append(np.geomspace(1e2, 1e11, 2000), 1e30)
    losses = law.loss({**plan, "params_encoder": sizes})
    return sizes[np.argmax(losses <= 1.01 * losses[-1])]

def frontier(table):
    """The lowest loss of any run at a given compute, whether the run had ended or was cut off; from
    where the first run of the law has its minimum."""
    runs = table["curve"]                # per run an array (2, evaluations): flops, loss
    budgets = np.geomspace(min(flops[loss.argmin()] for flops, loss in runs[table["used"]]),
                           max(flops[-1] for flops, _ in runs), 60)
    losses = np.array([[loss[flops <= budget].min(initial=np.inf) for budget in budgets]
                       for flops, loss in runs])
    sizes = table["params_encoder"][losses.argmin(0)]
    return {"flops": budgets, "loss": losses.min(0), "params_encoder": sizes}

frontier_law = partial(fit, shape=Shape((("flops",),)), y="loss")

def compute_frontier(study):
    points = frontier(study.shown)
    law, flops = frontier_law(points), np.log(points["flops"])
    size = slope(points, "params_encoder", [flops], flops > 0)           # all are one group
    several = np.ptp(points["params_encoder"]) > 0
    text = f"Size grows as flops^{size:.2f}; exponent" if several else "Exponent"
    return {**law.numbers(), "size_exponent": size, "points": points, **verdict(
        "the lowest loss is a power law in compute", text,
        lambda table: frontier_law(frontier(table)).alpha("flops"), resampled(
            take(study.shown, np.isin(study.shown["seed"], study.table["seed"])), "",
            len(study.tables) - 1), "positive")}

def downstream(study, score):
    """Does a benchmark's score follow the loss? Spearman's rank correlation."""
    def follows(rows):
        return -spearmanr(rows[study.y], rows[score])[0]
    rows = take(study.table, np.isfinite(study.table[score]))
    within = {size: follows(group) for size, group in grouped(rows, "{params_encoder:.0f}").items()
              if len({*group[score]}) > 4}
    text = f"Within a size {np.round([*within.values()], 2)}; over all"
    return {"within_size": within, **verdict(f"{score}: higher where the loss is lower", text,
                                             follows, resampled(rows, "", len(study.tables) - 1),
                                             "correlation")}

def verdicts_of(study):
    table, shape = study.table, study.law.shape
    verdicts = {f"power_law_of_{x}": power_law(study, x) for x in shape.x}
    if "cap" not in table:               # no grid
        return verdicts
    if DATA in shape.terms:
        verdicts |= users_or_hours(study)
    if shape.coupled:
        verdicts["capacity_interaction"] = interaction(study)
    if "curve" in table:
        verdicts["compute_frontier"] = compute_frontier(study)
    return verdicts | {f"downstream_{key[:-9]}": downstream(study, key) for key in table
                       if key.endswith("_macro_f1") and len({*table[key][table[key] >= 0]}) > 4}

# ---------------------------------------------------------------- tables
def read_csv(path, needed):
    """{column: (n,)} of a CSV file: numbers, or texts where a column has other texts. The columns
    `needed` must be there, with numbers above 0."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = [row for row in csv.reader(file, skipinitialspace=True) if row]
    except (OSError, ValueError, csv.Error):
        raise UserError(f"{path} is no CSV table or folder of runs: name one") from None
    require(len(lines) > 1, f"{path} has no rows: give a header and a line per row")
    names, *rows = lines
    require(len(set(names)) == len(names), f"{path} has a column twice in {names}: rename one")
    for line, row in enumerate(rows, 2):
        require(len(row) == len(names), f"{path}, line {line}: the header has {len(names)} fields")
    table = dict(zip(names, np.array(rows).T))
    for name, texts in table.items():
        try:
            table[name] = texts if name == "name" and name not in needed else texts.astype(float)
        except ValueError as error:
            require(name not in needed, f"{path}: '{name}' must be a number in each row; {error}")
    for name in sorted(needed):
        require(name in table, f"{path} has no column '{name}' (name factors by --x); it has "
                f"{', '.join(names)[:200]}")
        for line, value in enumerate(table[name], 2):
            require(0 < value < math.inf, f"{path}, line {line}: '{name}' must be above 0, finite")
    return table

def read_cell(cell):
    """Of a finished run: its config, its row of results.csv and its rows of curves.csv."""
    result, name = read_json(cell / "result.json"), {"name": cell.name}
    try:
        row = {key: result[key] for key in result if not isinstance(result[key], (dict, list))}
        row["hours_cap"] = result["hours_cap"] or math.inf
        row |= {"person.{source}/{user}".format(**who): who["loss"] for who in result["people"]}
        for path in sorted(cell.glob("finetune/*-probe.json")):
            scores, data = read_json(path), path.name.removesuffix("-probe.json")
            row |= {f"{data}_{key}": scores[key] for key in ("macro_f1", "accuracy", "macro_f1_sd")}
        return dict(result["config"]), name | row, [
            name | {key: point[key] for key in ("step", "flops", "loss")}
            for point in read_json(cell / "metrics.jsonl")]
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{cell} has a damaged file ({error!r}): train this cell again") from None

def collect(folder, out):
    """Write results.csv (a row per finished run), curves.csv (a row per evaluation) into `out`."""
    results, curves, first, configs = [], [], {}, {}
    for cell in sorted(folder.glob("*/")):
        if not (cell / "result.json").is_file():
            print(f"note: {cell.name} is not done and is left out")
            continue
        config, row, curve = read_cell(cell)
        for key, value in config.items():
            other = first.setdefault(key, value)
            require(key in MAY_DIFFER or value == other, f"{folder} mixes configurations: {key} is "
                    f"{value} in {cell.name}, and {other} in others: give each its own folder")
        results.append(row)
        curves += curve
        configs[cell.name] = config
    for key in first:
        if older := [name for name, config in configs.items() if key not in config]:
            print(f"note: {key} is {first[key]}, but these cells don't name it (older?):", *older)
    require(results, f"{folder} has no finished run: train first")
    for path, rows in ((out / "results.csv", results), (out / "curves.csv", curves)):
        with replacing(path) as temporary, open(temporary, "w", newline="") as file:
            columns = dict.fromkeys(key for row in rows for key in row)
            writer = csv.DictWriter(file, columns, restval=math.nan)
            writer.writeheader()
            writer.writerows(rows)
    return out / "results.csv"

def read_grid(path, needed, a):
    """The columns of a results.csv; `used` (n,): the rows that a law is fitted to."""
    table = read_csv(path, {*needed, "hours", "unexplained"})
    for key, kind in {"name": "U", "converged": "U", "seed": "f", "hours_cap": "f"}.items():
        require(key in table and table[key].dtype.kind == kind, f"{path}: '{key}' is missing or "
                "damaged: collect the grid again, or give --x for a table of another kind")
    table["cap"], names = table["hours_cap"], table["name"]
    people = [values for key, values in table.items() if key.startswith("person.")]
    if people and np.isfinite(people).all():               # all runs have the same people
        table["people"] = np.transpose(people)
    if path.with_name("curves.csv").is_file():
        curves = read_csv(path.with_name("curves.csv"), ("flops", "loss"))
        points = np.array([curves["flops"], curves["loss"]])
        runs = [points[:, curves["name"] == name] for name in names]     # (2, evaluations) each
        if all(run.size for run in runs):
            table["curve"] = np.fromiter(runs, object)
    group = labels(table, "{users} {cap} {params_encoder}")
    capped = np.char.upper(table["converged"]) != "TRUE"       # as spreadsheets write it
    require(a.converged_only or not capped.any(), f"{', '.join(names[capped])} did not converge: "
            "continue them with more --steps, or leave them out by --converged-only")
    small = np.array([table["unexplained"][group == setting].mean() for setting in group]
                     ) > a.max_unexplained                 # of a setting: single runs are noisy
    for out, why in ((capped, "did not converge"), (small, "hardly learned (--max-unexplained)")):
        if out.any():
            print(f"note: not in the law: {sum(out)} of {len(names)} cells {why}:", *names[out])
    return {**table, "used": ~capped & ~small}

# ---------------------------------------------------------------- a law in laws.json, and advice
def summary(error):
    return {"n": len(error), "median_relative_error": np.median(error),
            "worst_relative_error": error.max(), "rms_relative_error": np.sqrt(np.mean(error ** 2))}

def entry(study, name):
    """A law as laws.json has it; the first one with its intervals and the fits behind them."""
    law, table = study.fits[name], study.table
    shape, n, numbers = law.shape, len(law.residuals), law.numbers()

    alpha, power = ("(alpha/delta)", "^(1/delta)") if shape.coupled else ("alpha", "")
    forms = {x: f"{x}^-{alpha}" for x in shape.x}
    if shape.curve:
        x, middle = shape.curve[1], law.middle[shape.x.index(shape.curve[1])]
        forms[x] = (f"exp(-{alpha} {x})" if "exponential" in shape.curve else
                    f"(1 - alpha log({x} / {math.exp(middle):.4g})){power}")
    terms = " + ".join(f"A {' '.join(forms[x] for x in term)}" for term in shape.terms)
    form = ("E + " if shape.floor else "") + (f"({terms})^delta" if shape.coupled else terms)
    form += "; data = users / (1/hours_per_user + 1/enough)" if shape.enough else ""
    held = {x: {"column": x, **summary(rows["error"])} for x, rows in law.held.items()}
    result = {"name": name, "x": shape.x, "terms": shape.terms, "y": study.y, "form": form,
              **numbers, "enough": shape.enough, "ci95": None, "objective": law.objective, "n": n,
              "aicc": aicc(law), "holdout": next(iter(held.values()), None), "held_out": held}
    if law is study.law:
        around = {key: estimate(lambda law: law.numbers()[key], study.laws,
                                "ratio" if key in ("A", "delta") else "signed") for key in numbers}
        result |= {kind: {key: interval[kind] for key, interval in around.items()}
                   for kind in ("ci95", "ci95_people") if around["E"][kind]}
        spread = (law.residuals ** 2).sum() / max(n - shape.parameters, 1)
        result |= {"scatter": 1.96 * math.sqrt(spread),
                   "range": {x: [min(table[x]), max(table[x])] for x in shape.columns},
                   "scaling": [law.middle, law.half, law.unit],
                   "thetas": {kind: [resample.theta for resample in laws[:200]]
                              for kind, laws in study.laws.items()}}
    return result

def report(study, entries, verdicts):
    first = entries[0]
    print("\n{y} = {form}   ({n} rows, objective {objective:.9g})".format(**first))
    for key, value in study.law.numbers().items():
        ends = (first["ci95"] or {}).get(key, [])
        print(f"  {key:6}", *(np.array2string(np.array(v), precision=4) for v in (value, *ends)))
    print(f"{'':44} AICc, rms error at the largest", *first["held_out"])
    for law in entries:
        print("  {name:42} {aicc:7.1f}".format(**law), *[
            "{rms_relative_error:7.1%}".format(**errors) for errors in law["held_out"].values()])
    print(*[f"- {verdict['text']}" for verdict in verdicts.values()], sep="\n")

def read_law(path):
    """From a laws.json: its first law, that law's fits to the resampled tables, the verdicts."""
    content = read_json(path)
    try:
        first, verdicts = content["laws"][0], content["verdicts"]
        shape = Shape(tuple(map(tuple, first["terms"])), True, "delta" in first, first["enough"])
        laws = {kind: [Fit(shape, np.array(theta), *first["scaling"]) for theta in thetas]
                for kind, thetas in first["thetas"].items()}
        laws["whole"][0].numbers(), first["range"], first["scatter"]           # what is used later
    except (LookupError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path} is not a laws.json of this program's version: fit again") from None
    return first, laws, verdicts

def expected(first, laws, table):
    """The loss of each row, and the band of 95 % of single runs: the law's interval and scatter."""
    result = estimate(lambda law: law.loss(table), laws, "ratio")
    losses = np.array(result["value"])[:, None]
    around = np.log(np.array(result["ci95"] or losses * [1, 1]) / losses)
    return losses[:, 0], losses * np.exp(np.hypot(around, first["scatter"]) * [-1, 1])

def recommend(path, plan):
    """Which model fits a plan, what loss to expect, and whom to record next."""
    first, laws, verdicts = read_law(path)
    ranges = first["range"]
    plan = {x: value for x, value in plan.items() if x in ranges}
    require(plan and set(ranges) <= set(FACTORS) and all(value > 0 for value in plan.values()),
            f"{path} has a law of {', '.join(ranges)}; --recommend needs one of users and hours, "
            "and --users and --hours-per-user above 0")
    if "params_encoder" in ranges:
        size = estimate(lambda law: capacity(law, plan), laws, "ratio")
        plan["params_encoder"] = np.clip(size["value"], *ranges["params_encoder"])
        print(f"capacity: {size['value']:.3g} encoder parameters {span(size['ci95'])}; no larger "
              f"model gains more than 1 %; train {plan['params_encoder']:.3g}")
    (loss,), (band,) = expected(first, laws, {x: np.array([plan[x]]) for x in plan})
    print(f"expected loss: {loss:.4f}, 95 % of single runs within {span(band.tolist())}")
    if "exponent_ratio" in verdicts:
        print(verdicts["exponent_ratio"]["text"])
    for x, (low, high) in ranges.items():
        if not low <= plan[x] <= high:
            print(f"note: {x} {plan[x]:g} is extrapolated, the grid has {low:g} to {high:g}")

def predict(path, cells, out):
    """Predict each row of a CSV; where y is measured in all of them, report the error."""
    first, laws, _ = read_law(path)
    table = read_csv(cells, first["range"])
    losses, bands = expected(first, laws, table)
    result = {"law": str(path), "provenance": provenance(), "cells": [
        {"name": name, "loss": loss, "single_run": band}
        for name, loss, band in zip(table.get("name", losses), losses, bands)]}
    measured = table.get(first["y"])
    if measured is None or measured.dtype != float:
        return write_json(out / "prediction.json", result)
    require((measured > 0).all(), f"{cells}: '{first['y']}' must be above 0 in all rows or missing")
    inside = np.mean((bands[:, 0] <= measured) & (measured <= bands[:, 1]))
    result |= {**summary(abs(losses / measured - 1)), "inside": inside, "measured": measured}
    print("median error {median_relative_error:.2%}, worst {worst_relative_error:.2%}, "
          "{inside:.0%} inside the band".format(**result))
    write_json(out / "outcome.json", result)

# ---------------------------------------------------------------- figures
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split() * 9   # Okabe and Ito
LABELS = {"hours_per_user": "hours of each user", "params_encoder": "encoder parameters",
          "hours": "hours in all", "flops": "compute of the training, FLOPs",
          "loss": "loss on held-out people"}

def panels(n):
    """The axes of n panels, side by side."""
    from matplotlib.figure import Figure     # here, so that --help and errors come fast
    size = (7, 5) if n == 1 else (3.6 * n, 4.5)
    return Figure(size, layout="constrained").subplots(1, n, sharey=True, squeeze=False)[0]

def draw(title, x, y, groups, law=None, ax=None):
    """Points of each group (empty: left out of the law); with a law its lines, named at the end."""
    ax = ax or panels(1)[0]
    ax.set(title=title, xlabel=LABELS.get(x, x), ylabel=LABELS.get(y, y))
    ax.spines[["top", "right"]].set_visible(False)
    if law:
        ax.set_xscale("log")
    if x in FACTORS:
        ticks = np.unique(np.concatenate([setting(rows, x) for rows in groups.values()]))
        ax.set_xticks(ticks, [f"{tick:,.7g}" for tick in ticks])
        ax.minorticks_off()
    ends = []
    for (name, rows), colour in zip(groups.items(), COLOURS):
        line = take(rows, np.unique(setting(rows, x), return_index=True)[1])
        if law and len(line[x]) < 2:
            continue
        filled = np.where(rows.get("used", rows[x] > 0), colour, "white")
        ax.scatter(rows[x], rows[y], 12, filled, edgecolors=colour, linewidths=.7, label=name)
        if law:
            losses = law.loss(line)
            ax.plot(line[x], losses, color=colour)
            ends.append((losses[-1], line[x][-1], name, colour))
    height, gap = -math.inf, np.ptp(ax.get_ylim()) / 25
    for end, right, name, colour in sorted(ends):          # names don't overlap
        height = max(end, height + gap)
        ax.text(right, height, f"  {name}", color=colour, fontsize=8, va="center")
    if not law:
        ax.legend(frameon=False)
    return ax

def figures(study):
    """Yields (name, axes): of a grid those factors that vary, and all of its cells are shown."""
    measured, law, y = study.table[study.y], study.law, study.y
    fits = {"fitted to": {"measured": measured, "predicted": law.loss(study.table)}, **{
        f"largest {LABELS.get(x, x)}, held out": rows for x, rows in law.held.items()}}
    ax = draw("The law against the runs", "measured", "predicted", fits)
    ax.axline([measured[0]] * 2, slope=1, color="black", lw=1)
    yield "fit", ax
    if "used" not in study.shown:        # no grid
        return
    shown = take(study.shown, np.lexsort([study.shown[x] for x in FACTORS[::-1]]))
    sizes = shown["params_encoder"]
    main = take(shown, sizes == np.quantile(sizes, .5, method="nearest"))
    for name, title, x, rows, label in (
            ("loss_vs_users", "More people, as long each", "users", main, "{cap:.2g} h each"),
            ("users_vs_hours", "As many hours, of more people", "users", main,
             "{hours:.2g} h in all"),
            ("loss_vs_params", "Larger models on the same data", "params_encoder", shown,
             "{users:g} users, {cap:.2g} h")):
        lines = {text: line for text, line in grouped(rows, label).items()
                 if np.ptp(setting(line, x))}              # a line takes two settings
        if lines and x in law.shape.columns:
            yield name, draw(title, x, y, lines, law)
    if "hours_per_user" in law.shape.columns:              # a panel for each number of users
        counts, models = np.unique(shown["users"]), grouped(shown, "{params_encoder:,.0f}")
        for users, ax in zip(counts, panels(len(counts))):
            rows = {size: take(runs, runs["users"] == users) for size, runs in models.items()}
            draw(f"{users:g} users", "hours_per_user", y, rows, law, ax).label_outer()
        yield "loss_vs_hours", ax
    for score in shown:
        if score.endswith("_macro_f1"):
            yield score, draw("A linear probe's score against the loss", y, score,
                              grouped(shown, "{params_encoder:,.0f} parameters"))
    if "curve" in shown:
        points = frontier(shown)
        ax = draw("The lowest loss for a given compute (grey: all evaluations)", "flops", "loss",
                  grouped(points, "{params_encoder:,.0f} parameters"), frontier_law(points))
        ax.plot(*np.hstack(list(shown["curve"])), ",", color="grey", zorder=0)
        yield "frontier", ax
    if law.shape.coupled:
        yield from capacity_figure(study)

def capacity_figure(study):
    """The capacity that fits the data of each cell: a bar where its interval spans less than a
    decade; no figure if there is no such cell."""
    bars = []
    for rows in grouped(study.table, "{users} {cap}").values():
        plan = {x: rows[x][0] for x in DATA}
        ci95 = estimate(lambda law: capacity(law, plan), study.laws, "ratio")["ci95"]
        if ci95 and ci95[1] < 10 * ci95[0]:
            bars.append((rows["hours"][0], *ci95))
    if bars:
        ax = draw("The smallest model that no larger one beats by 1 %: bars of 95 %", "hours",
                  "params_encoder", {"runs": study.table})
        hours, *ends = zip(*bars)
        ax.plot([hours, hours], ends, color=COLOURS[1], lw=3)
        ax.set(xscale="log", yscale="log")
        yield "capacity", ax

# ---------------------------------------------------------------- the command line
def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("target", type=Path, help="folder of runs, a grid's results.csv, a table, or a laws.json")
    add("--out", type=Path, help="folder for laws.json, the figures and a grid's tables")
    add("--x", nargs="+", metavar="TERM", type=lambda term: tuple(term.split("*")),
        help="columns of a table; those joined by * share a term")
    add("--y", default="loss", help="the column to explain (default: loss)")
    add("--no-floor", action="store_true", help="E is 0: with enough data any loss can be reached")
    add("--law", default="", metavar="NAME", help="the shape to use, by the start of its name: M0, "
        "M1, M2, MA or MC (default: M2 for a grid; results/coverage.md says why)")
    add("--holdout", metavar="COLUMN", help="predict the rows where it is largest, too, and first "
        "(default: those of each factor)")
    add("--bootstrap", type=number(int, 0), default=1000, help="resampled tables for the "
        "intervals, or 0; with seeds, each seed is left out once instead (default: 1000)")
    add("--converged-only", action="store_true", help="leave out cells that --steps cut off")
    add("--max-unexplained", type=number(float, 0), default=.93, help="settings (users x hours x "
        "model) that leave more of the signal unexplained, on average over their seeds, have "
        "hardly learned and stay out of the law (default: 0.93)")
    add("--recommend", action="store_true", help="print capacity, loss, whom to record next, for:")
    add("--users", type=number(float, 0), default=0, help="users in the plan")
    add("--hours-per-user", type=number(float, 0), default=0, help="hours recorded of each")
    add("--predict", metavar="CSV", help="write prediction.json for these cells (name, factors), "
        "or outcome.json with the errors if y was measured in all")
    a = p.parse_args()
    require(a.out or a.recommend or a.predict, "give --out a folder to write to")
    if a.recommend:
        return recommend(a.target, {x: vars(a)[x] for x in DATA})
    if a.predict:
        return predict(a.target, a.predict, a.out or a.target.parent)
    terms = tuple(a.x or TERMS)
    factors = sum(terms, ())
    needed = {*factors, a.y, a.holdout or a.y}
    require(len({*factors, a.y}) == len(factors) + 1 < 6 and not needed & {"", "cap", "used"},
            "--x takes one to four columns, each in one term only, and not --y (rename cap, used)")
    path = collect(a.target, a.out) if a.target.is_dir() else a.target
    shown = read_csv(path, needed) if a.x else read_grid(path, needed, a)
    if a.x:                              # other columns have no meaning here
        shown = {x: shown[x] for x in shown if x in needed | {"seed"}}
    study = analyse(shown, terms, a)
    verdicts, entries = verdicts_of(study), [entry(study, name) for name in study.fits]
    write_json(a.out / "laws.json",
               {"laws": entries, "verdicts": verdicts, "provenance": provenance()})
    for name, ax in figures(study):
        with replacing(a.out / f"{name}.png") as temporary:
            ax.figure.savefig(temporary, dpi=150)
    report(study, entries, verdicts)

if __name__ == "__main__":
    command(main)
