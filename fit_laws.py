"""
From finished runs to a scaling law: its fit, intervals, what it predicts, and which claims hold.

    python fit_laws.py runs/GRID --out results/GRID                    # a grid: collect, fit, draw
    python fit_laws.py results/GRID/results.csv --out DIR              # again, from its table
    python fit_laws.py TABLE.csv --x params tokens --y loss --out DIR  # any table
    python fit_laws.py DIR/laws.json --recommend --users 30 --hours-per-user 2
    python fit_laws.py DIR/laws.json --predict CELLS.csv               # before and after they run

The law of a grid is  loss = E + (A users^-a hours_per_user^-b + B params_encoder^-c)^delta.
Users and hours per user are two ways to get data, so they share a term. Data and parameters are
coupled: with delta below 1 the scarcer of the two decides (Kaplan et al. 2020, arXiv 2001.08361).
The fit is approach 3 of Hoffmann et al. 2022 (2203.15556). results/coverage.md tests all of this.
"""
import argparse
import csv
import json
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from scipy.optimize import minimize
from scipy.special import stdtrit
from scipy.stats import spearmanr

from data import UserError, command, provenance, replacing, write_json

HUBER = 1e-3  # residuals above 0.1 % count by their size, not by its square
DATA = ("users", "hours_per_user")
FACTORS = (*DATA, "params_encoder")


# ---------------------------------------------------------------- the law
@dataclass(frozen=True)
class Shape:
    terms: tuple  # the factors of each term: (("users", "hours_per_user"), ("params_encoder",))
    floor: bool = True  # else E is 0
    coupled: bool = False  # else delta is 1
    logarithm: str = ""  # the factor whose x^-alpha is replaced by 1 - alpha log x

    @cached_property
    def x(self):
        return sum(self.terms, ())

    @cached_property
    def first(self):  # index of each term's first factor
        return np.cumsum([0, *map(len, self.terms[:-1])])

    @cached_property
    def parameters(self):
        return self.floor + len(self.terms) + len(self.x) + self.coupled


def law(theta, u, shape):
    """The loss (n,) at the centred logs u (k, n) of the factors, and its slopes by theta (P, n).

    loss = E + (sum over terms t of exp(z_t))^delta,  delta z_t = a_t - sum_i alpha_i u_i
    theta = E, a_1 ..., alpha_1 ..., log delta
    """
    T = len(shape.terms)
    E, a, alpha, delta = theta[0], theta[1:1 + T], theta[1 + T:-1], math.exp(theta[-1])
    bends, slopes = -alpha[:, None] * u, -u
    if shape.logarithm:
        i = shape.x.index(shape.logarithm)
        left = np.maximum(1 + bends[i], 1e-9)
        bends[i], slopes[i] = np.log(left), slopes[i] / left
    z = (a[:, None] + np.add.reduceat(bends, shape.first)) / delta
    shares = np.exp(z - z.max(0))
    log_sum = z.max(0) + np.log(shares.sum(0))
    above = np.exp(delta * log_sum)
    by_a = above * shares / shares.sum(0)
    by_alpha = np.repeat(by_a, [len(term) for term in shape.terms], axis=0) * slopes
    by_log_delta = delta * (above * log_sum - (by_a * z).sum(0))
    return E + above, np.vstack([np.ones_like(above), by_a, by_alpha, by_log_delta])


def objective(theta, u, log_y, shape):
    """Sum over rows of Huber(log y - log law) / HUBER^2, and its gradient.

    A sum, and a large one: L-BFGS-B stops at a change relative to max(objective, 1).
    """
    loss, slopes = law(theta, u, shape)
    residuals = log_y - np.log(loss)
    clipped = np.clip(residuals, -HUBER, HUBER)
    value = (clipped * (residuals - clipped / 2)).sum()
    return value / HUBER ** 2, -slopes @ (clipped / loss) / HUBER ** 2


# ---------------------------------------------------------------- its fit
@dataclass
class Fit:
    shape: Shape
    theta: np.ndarray
    middle: np.ndarray = 0.  # of each factor's logs, which are centred, (k, 1)
    unit: float = 1.  # the loss is fitted in units of its geometric mean
    objective: float = 0.
    residuals: np.ndarray = None  # log y - log law, (n,)
    starts: list = None  # where fits to resampled tables begin

    def loss(self, table):
        return self.unit * law(self.theta, logs(table, self.shape) - self.middle, self.shape)[0]

    def alpha(self, x):
        return self.theta[1 + len(self.shape.terms) + self.shape.x.index(x)]

    def plain(self):
        """The numbers of E + (sum over terms of A times each x^-(alpha / delta))^delta."""
        alpha, delta = self.theta[1 + len(self.shape.terms):-1], math.exp(self.theta[-1])
        moved = np.add.reduceat(alpha * np.ravel(self.middle), self.shape.first)
        log_A = (self.theta[1:1 + len(moved)] + moved + math.log(self.unit)) / delta
        return {"E": self.theta[0] * self.unit, "A": np.exp(np.clip(log_A, -700, 700)).tolist(),
                "alpha": alpha.tolist(), **({"delta": delta} if self.shape.coupled else {})}


def from_plain(shape, numbers):
    delta = numbers.get("delta", 1)
    log_A = delta * np.log(numbers["A"])
    return Fit(shape, np.array([numbers["E"], *log_A, *numbers["alpha"], math.log(delta)]))


def logs(table, shape):
    return np.log([table[x] for x in shape.x])  # (k, n)


@np.errstate(all="ignore")  # a trial step may lead far out
def search(starts, u, log_y, shape, steps):
    """L-BFGS-B from each start, within bounds; the ends, best first."""
    steepest = [.999 / abs(row).max() if x == shape.logarithm else 20
                for x, row in zip(shape.x, u)]
    bounds = [(0, math.exp(log_y.max()) * shape.floor), *[(-40, 40)] * len(shape.terms),
              *[(0, alpha) for alpha in steepest],
              (math.log(.05) * shape.coupled, math.log(5) * shape.coupled)]
    options = {"maxiter": steps, "maxfun": 10 * steps, "ftol": 1e-11, "gtol": 1e-6, "maxcor": 20}
    ends = [minimize(objective, start, (u, log_y, shape), "L-BFGS-B", True,
                     bounds=bounds, options=options) for start in starts]
    return sorted(ends, key=lambda end: end.fun)


def grid_of_starts(u, log_y, shape):
    floors, deltas = (0, .7) if shape.floor else (0,), (1, .3) if shape.coupled else (1,)
    falls = (.1, .4, 1.2) if len(u) < 3 else (.15, .6)  # of the log loss over half a range
    T, starts = len(shape.terms), []
    for floor, delta, *fall in product(floors, deltas, *[falls] * len(u)):
        E = floor * math.exp(log_y.min())
        a = math.log(math.exp(log_y.mean()) - E) - delta * math.log(T)
        starts.append([E, *[a] * T, *(fall / u.max(1)), math.log(delta)])
    return starts


def fit(table, shape, y, near=None):
    """Fit a shape to `table` {column: (n,)}; `near`, the fit to a similar table, saves time."""
    if near is None and len(table[y]) < max(5, shape.parameters):
        raise UserError(f"{len(table[y])} rows are too few for a law of {', '.join(shape.x)}: it "
                        f"takes {max(5, shape.parameters)}, add runs")
    u, log_y = logs(table, shape), np.log(table[y])
    middle = near.middle if near else (u.max(1, keepdims=True) + u.min(1, keepdims=True)) / 2
    unit = near.unit if near else math.exp(log_y.mean())
    problem = u - middle, log_y - math.log(unit), shape
    tried = [] if near else [
        end.x for end in search(grid_of_starts(*problem), *problem, steps=15)]
    best = search(near.starts if near else tried[:4], *problem, steps=3000)[0]
    fitted = Fit(shape, best.x, middle, unit, best.fun * HUBER ** 2)
    fitted.residuals = log_y - np.log(fitted.loss(table))
    far = tried[len(tried) // 3::len(tried) // 3 or 1][:2]  # from the best alone, resamples stick
    fitted.starts = [best.x, *far]
    return fitted


def aicc(fitted):
    """Akaike's criterion by Laplace's density, which Huber's is past 0.1 %; lower is better."""
    n, k = len(fitted.residuals), fitted.shape.parameters + 1
    deviance = 2 * n * math.log(2 * math.e * max(fitted.objective, 1e-12) / n / HUBER)
    return deviance + 2 * k + 2 * k * (k + 1) / max(n - k - 1, 1e-3)


# ---------------------------------------------------------------- intervals
def take(table, rows):
    return {name: values[rows] for name, values in table.items()}


def resampled(table, y, draws=1):
    """{what was resampled: tables}, for intervals.

    Runs of one seed share people, so each seed is left out whole in turn, and so is each held-out
    person. Without a column `seed`, rows are drawn with replacement.
    """
    if draws and "seed" not in table:
        rng, n = np.random.default_rng(0), len(table[y])
        return {"rows": [take(table, rng.integers(n, size=n)) for _ in range(draws)]}
    seeds = np.unique(table.get("seed", []))
    if not draws or len(seeds) < 3:  # two seeds say next to nothing about the spread of seeds
        return {}
    tables = {"seeds": [take(table, table["seed"] != seed) for seed in seeds]}
    if "people" in table and y == "loss":  # (n, people): each run's loss on each held-out person
        tables["people"] = [{**table, y: np.delete(table["people"], person, 1).mean(1)}
                            for person in range(table["people"].shape[1])]
    return tables


def estimate(quantity, whole, others, log=False):
    """`quantity(whole)` and its 95 % interval; `others` are resampled like `whole`.

    Seeds: the jackknife's error times Student's t. `ci95_people` counts held-out people as well.
    """
    change, back = (np.log, np.exp) if log else (np.asarray, np.asarray)
    value, square = change(quantity(whole)), 0
    result = {"value": back(value).tolist(), "ci95": None}
    for kind, some in others.items():
        draws = np.array([change(quantity(other)) for other in some])
        if not np.isfinite(draws).all():
            break
        if kind == "rows":
            ends = np.percentile(draws, [2.5, 97.5], axis=0)
        else:
            square += draws.var(0) * (len(draws) - 1)
            half = stdtrit(len(others["seeds"]) - 1, .975) * np.sqrt(square)
            ends = value - half, value + half
        result["ci95_people" if kind == "people" else "ci95"] = np.stack(back(ends), -1).tolist()
    return result


# ---------------------------------------------------------------- what is held out
def setting(table, x):
    """A grid sets a cap on the hours of each user; people who recorded less give all they have."""
    return table["cap" if x == "hours_per_user" and "cap" in table else x]


def largest(table, x):
    """Rows of the largest x: of a grid its largest setting, else the top tenth."""
    values = setting(table, x)
    return values >= (values.max() if "cap" in table else
                      min(values.max() / 1.1, np.quantile(values, .9)))


def hold_out(table, whole, y, x):
    """The largest x, predicted by the same law fitted to the other rows."""
    top = largest(table, x)
    rows = take(table, top)
    predicted = fit(take(table, ~top), whole.shape, y, whole).loss(rows)
    return {"seed": rows.get("seed", top[top]), "measured": rows[y], "predicted": predicted,
            "error": abs(predicted / rows[y] - 1)}


def predicts_worse(held, other):
    """Are the errors larger than another law's? One-sided t at 5 %, paired by seed."""
    excess = held["error"] - other["error"]
    means = np.array([excess[held["seed"] == seed].mean() for seed in np.unique(held["seed"])])
    chance = stdtrit(len(means) - 1, .95) * means.std(ddof=1) if len(means) > 2 else 0
    return bool(means.mean() > chance / math.sqrt(len(means)))


# ---------------------------------------------------------------- the shapes that are compared
def candidates(table, varied, y, floor):
    """{name: (table, shape)} for a grid; its law is the first, results/coverage.md says why."""
    data = tuple(x for x in varied if x in DATA)
    rest = [(x,) for x in varied if x not in DATA]
    joint = Shape(tuple(filter(None, [data, *rest])), floor)
    shapes = {"M2, data and parameters coupled": (table, replace(joint, coupled=True)),
              "M1, data and parameters added": (table, joint)}
    if len(joint.terms) == 1:
        shapes = {"M1": (table, joint)}
    if data == DATA:
        shapes["M0, only hours in all count"] = table, Shape((("hours",), *rest), floor)
        shapes["MA, a term for each factor"] = table, Shape(tuple((x,) for x in varied), floor)
        hours, one = table["hours_per_user"], Shape((("data",), *rest), floor)
        tables = [{**table, "data": table["users"] / (1 / hours + 1 / enough)}
                  for enough in np.geomspace(hours.min() / 4, hours.max() * 10, 12)]
        near = fit(tables[6], one, y)
        best = min(tables, key=lambda table: fit(table, one, y, near).objective)
        shapes["MC, hours of a person count less and less"] = best, one
    return shapes


def other_curves(table, shape, x):
    """The same law with another curve in the place of the power law in x."""
    exp_x = f"exp({x})"  # a power law in exp(x) is an exponential in x
    scaled = table[x] / math.exp(np.log(table[x]).mean())
    terms = tuple(tuple(exp_x if name == x else name for name in term) for term in shape.terms)
    floor = shape.floor and len(shape.x) > 1  # a logarithm alone needs none
    return {f"logarithm in {x}": (table, replace(shape, logarithm=x, floor=floor)),
            f"exponential in {x}": ({**table, exp_x: np.exp(np.minimum(scaled, 700))},
                                    replace(shape, terms=terms))}


# ---------------------------------------------------------------- verdicts
def span(ci95):
    return "[{:.4g}, {:.4g}]".format(*ci95) if ci95 else "[no interval: it takes 3 seeds]"


def verdict(claim, text, quantity, whole, others, ratio=False, positive=False, against="",
            refuted=False):
    """Decide a claim: the interval of a quantity lies above 0 (of a ratio, 1) or below it.

    Evidence `against` it leaves it open, and so does the interval of a positive number that spans
    a decade or touches 0. Without an interval nothing is claimed.
    """
    result, null = estimate(quantity, whole, others, ratio), float(ratio)
    low, high = result["ci95"] or (-math.inf, math.inf)
    vague = against or positive and (low < 1e-3 or high > 10 * low)
    decision = "holds" if low > null else "doesn't hold" if high < null else "can't tell here"
    if vague:
        decision = "doesn't hold" if refuted and result["ci95"] else "can't tell here"
    result["decision"] = decision
    result["text"] = (f"{claim}: {decision}. {text} {result['value']:.3g} "
                      f"{span(result['ci95'])}{against}")
    if "ci95_people" in result:
        result["text"] += f"; with other held-out people {span(result['ci95_people'])}"
    return result


def regress(y, columns, groups):
    """Least-squares slopes of y on the columns, with a constant for each group."""
    constants = groups[:, None] == np.unique(groups)
    return np.linalg.lstsq(np.column_stack([*columns, constants]), y, rcond=None)[0]


def slopes_apart(table, y):
    """Users' log-slope minus hours', positive where users are worth more: the mean over seeds.

    At equal hours in all, the slope on log users is that difference. Hours in all have a slope of
    their own for each size, and a curvature: a straight line alone claims too much (coverage.md).
    """
    apart = []
    for seed in np.unique(table["seed"]):
        rows = take(table, table["seed"] == seed)
        total, sizes = np.log(rows["hours"]), rows["params_encoder"]
        by_size = [total * (sizes == size) for size in np.unique(sizes)]
        columns = [np.log(rows["users"]), total ** 2, *by_size]
        apart.append(-regress(np.log(rows[y]), columns, sizes)[0])
    return np.mean(apart)


def exponent_ratio(law):
    return (law.alpha("users") + 1e-9) / (law.alpha("hours_per_user") + 1e-9)


def users_or_hours(study):
    table, y, law = study.table, study.y, study.law
    centre = {x: np.sqrt([table[x].min() * table[x].max()]) for x in law.shape.x}

    def gain(law):
        users, hours = (law.loss({**centre, x: 2 * centre[x]}).item() for x in DATA)
        return hours / users
    return {
        "users_minus_hours_exponent": verdict(
            "users are worth more than hours per user", "Difference of the log-slopes",
            lambda rows: slopes_apart(rows, y), table, study.tables),
        "exponent_ratio": verdict(
            "the exponent of users is larger than that of hours per user", "Ratio a/b",
            exponent_ratio, law, study.laws, True, True),
        "twice_users_or_hours": verdict(
            "twice the users beat twice the hours", "At the centre of the grid, loss with twice "
            "the hours over loss with twice the users:", gain, law, study.laws, True)}


def power_law(study, x):
    """Left open if another curve has a lower AICc or predicts the largest x better; if both, no."""
    (first, *others), held, against, refuted = study.fits, study.held, "", False
    for name in [name for name in others if name.endswith(f" in {x}")]:
        lower = aicc(study.fits[name]) <= aicc(study.law)
        better = x in held[name] and predicts_worse(held[first][x], held[name][x])
        against += f"; as good: {name}" * (lower or better)
        refuted |= lower and better
    return verdict(f"a power law in {x}", "Exponent", lambda law: law.alpha(x), study.law,
                   study.laws, False, True, against, refuted)


def size_gap(table, y):
    """How much more log loss a tenfold model saves for each doubling of the hours in all."""
    sizes = table["params_encoder"]
    columns = [np.log10(sizes) * np.log2(table["hours"]), *(sizes == np.unique(sizes)[1:, None])]
    return -regress(np.log(table[y]), columns, table["draw"])[0]  # within the same people and hours


def interaction(study):
    table, y = study.table, study.y
    seeds = table["seed"][table["params_encoder"] == table["params_encoder"].min()]
    rows = take(table, np.isin(table["seed"], seeds))
    coupled, added, *_ = study.held.values()
    worse = any(predicts_worse(coupled[x], added[x]) for x in coupled)
    return verdict("larger models need more data", "What a tenfold model saves in log loss grows, "
                   "per doubling of the hours in all, by", lambda rows: size_gap(rows, y), rows,
                   resampled(rows, y), against="; but M1 predicts held-out cells better" * worse)


def capacity(law, plan, most):
    """The smallest model that no larger one beats by more than 1 %."""
    sizes = np.append(np.geomspace(most / 1e4, most * 1e4, 2000), 1e30)
    losses = law.loss({"params_encoder": sizes, **{x: np.full(2001, plan[x]) for x in plan}})
    return sizes[np.argmax(losses <= 1.01 * losses[-1])]


def frontier(table):
    """The lowest loss of any run for a given compute, from where the first run was at its best."""
    runs = table["curve"]  # of each run an array (2, evaluations): flops, loss
    start = min(flops[loss.argmin()] for flops, loss in runs)
    budgets = np.geomspace(start, max(flops[-1] for flops, _ in runs), 60)
    losses = np.array([np.append(np.inf, np.minimum.accumulate(loss))[
        np.searchsorted(flops, budgets, side="right")] for flops, loss in runs])
    sizes = table["params_encoder"][losses.argmin(0)]
    return {"flops": budgets, "loss": losses.min(0), "params_encoder": sizes}


def compute_frontier(study):
    def of(rows):
        return fit(frontier(rows), Shape((("flops",),)), "loss")
    law, study.frontier = of(study.table), frontier(study.table)
    study.frontier["law"] = law.loss(study.frontier)
    size = np.polyfit(*np.log([study.frontier[x] for x in ("flops", "params_encoder")]), 1)[0]
    return {**law.plain(), "size_exponent": size,
            "points": {key: values.tolist() for key, values in study.frontier.items()},
            **verdict("a power law of the lowest loss in compute", "The size on it grows as "
                      f"flops^{size:.2f}; exponent of the loss",
                      lambda rows: of(rows).alpha("flops"), study.table, study.tables,
                      positive=True)}


def downstream(study, score):
    """Does a benchmark's score follow the loss? Spearman's rank correlation."""
    rows = take(study.table, np.isfinite(study.table[score]))
    sizes = rows["params_encoder"]

    def follows(rows):
        return -spearmanr(rows[study.y], rows[score])[0]
    within = {f"{size:.0f}": follows(take(rows, sizes == size))
              for size in np.unique(sizes) if (sizes == size).sum() > 4}
    text = "Rank correlation within a size " + ", ".join(f"{rho:.2f}" for rho in within.values())
    return {**verdict(f"{score}: higher where the loss is lower", f"{text}; over all", follows,
                      rows, resampled(rows, "")), "within_size": within}


# ---------------------------------------------------------------- tables and grids read
RESULT = ("data users hours_cap hours_per_user hours windows width depth heads params_encoder "
          "params seed loss loss_last baseline_loss unexplained steps best_step converged lr flops "
          "seconds").split()
MAY_DIFFER = "users hours_per_user width depth heads seed steps".split()  # keys of config
CURVE = ("step", "flops", "loss")
SCORES = ("macro_f1", "accuracy", "macro_f1_sd")


def read_json(path):
    try:
        return dict(json.loads(Path(path).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} can't be read ({error}): make it again") from None


def read_csv(path):
    """The rows of a CSV file as dictionaries of text."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            names, rows = reader.fieldnames or [], list(reader)
    except (OSError, ValueError, csv.Error):
        raise UserError(f"{path} is not a CSV table: name one, or a folder of runs") from None
    if len(set(names)) < len(names):
        raise UserError(f"{path} has a column twice in {', '.join(names)[:200]}: rename one")
    for i, row in enumerate(rows, 2):
        if None in {*row, *row.values()}:  # what is too many, and what is missing
            raise UserError(f"{path}, line {i}: it takes {len(names)} fields, as the header has")
    return rows


def numbers(rows, name, path):
    """A column as positive, finite numbers, which laws need."""
    if not rows or name not in rows[0]:
        has = ", ".join(rows[0])[:200] if rows else "no rows"
        raise UserError(f"{path} has no column '{name}'; it has {has}")
    for i, row in enumerate(rows, 2):
        try:
            fine = 0 < float(row[name]) < math.inf
        except ValueError:
            fine = False
        if not fine:
            raise UserError(f"{path}, line {i}: '{name}' is '{row[name]}', and must be a number "
                            "above 0")
    return np.array([float(row[name]) for row in rows])


def collect(folder, partial):
    """The rows of results.csv, people.csv and curves.csv, from a folder of finished runs."""
    cells = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    done = [cell for cell in cells if (cell / "result.json").is_file()]
    missing = ", ".join(cell.name for cell in cells if cell not in done)
    if missing and not partial:
        raise UserError(f"{len(cells) - len(done)} of {len(cells)} cells are not done "
                        f"({missing[:200]}): finish the sweep, or fit the others with --partial")
    tables = {"results": [], "people": [], "curves": []}
    for cell in done:
        result, name = read_json(cell / "result.json"), {"name": cell.name}
        row = {**name, **{key: result.get(key) for key in RESULT}}
        row.update({f"config.{key}": str(value) for key, value in result.get("config", {}).items()})
        for path in sorted(cell.glob("finetune/*-probe.json")):
            probe, data = read_json(path), path.name.removesuffix("-probe.json")
            row.update({f"{data}_{key}": probe.get(key) for key in SCORES})
        tables["results"].append(row)
        tables["people"] += [{**name, **person} for person in result.get("people", [])]
        metrics = cell / "metrics.jsonl"
        for line in metrics.read_text().splitlines() if metrics.is_file() else []:
            point = json.loads(line)
            tables["curves"].append({**name, **{key: point[key] for key in CURVE}})
    if missing:
        print(f"note: left out, as they are not done: {missing}")
    return {name: [{key: "" if value is None else str(value) for key, value in row.items()}
                   for row in rows] for name, rows in tables.items()}


def read_grid(target, partial):
    """The three tables of a grid, from its runs or from results.csv and the files beside it."""
    if target.is_dir():
        return collect(target, partial)
    paths = {name: target.with_name(f"{name}.csv") for name in ("people", "curves")}
    return {"results": read_csv(target),
            **{name: read_csv(path) if path.is_file() else [] for name, path in paths.items()}}


def choose(rows, a):
    """Which rows a law is fitted to: one configuration, converged, past the small-data region."""
    for key in {key for row in rows for key in row if key.startswith("config.")}:
        names = {row[key]: row["name"] for row in rows if row.get(key)}
        if len(names) > 1 and key[7:] not in MAY_DIFFER and not a.mixed:
            raise UserError(f"{a.target} mixes configurations, {key} of {str(names)[:200]}: give "
                            "each its own folder, or fit them as one with --mixed")
    capped = [row["name"] for row in rows if row.get("converged") == "False"]
    small = [row["name"] for row in rows if float(row.get("unexplained") or 0) > a.max_unexplained]
    if capped and not a.converged_only:
        raise UserError(f"{len(capped)} of {len(rows)} cells did not converge "
                        f"({', '.join(capped)}): run them on with more --steps, or leave them out "
                        "by --converged-only")
    for names, why in ((capped, "did not converge"), (small, "hardly learned (--max-unexplained)")):
        if names:
            print(f"note: {len(names)} of {len(rows)} cells {why}, shown but left out of the law: "
                  f"{', '.join(names)}")
    return np.array([row["name"] not in capped + small for row in rows])


def grid_table(rows, people, curves, a):
    """The columns of a grid, with `people` if every run was measured on the same ones."""
    table = {x: numbers(rows, x, a.target) for x in (a.y, "hours", *FACTORS)}
    table.update({key: np.array([row[key] for row in rows]) for key in ("name", "seed")})
    table["cap"] = np.array([float(row.get("hours_cap") or "inf") for row in rows])
    table["draw"] = np.array(["{users} {hours_cap} {seed}".format(**row) for row in rows])
    table["used"] = choose(rows, a)
    for key in {key for row in rows for key in row if key.endswith("_macro_f1")}:
        table[key] = np.array([float(row.get(key) or "nan") for row in rows])
    losses = {(row["name"], row["source"], row["user"]): float(row["loss"]) for row in people}
    who = sorted({key[1:] for key in losses})
    matrix = [[losses.get((name, *person), math.nan) for person in who] for name in table["name"]]
    if who and np.isfinite(matrix).all():
        table["people"] = np.array(matrix)
    points = {}
    for row in curves:
        points.setdefault(row["name"], []).append((float(row["flops"]), float(row["loss"])))
    if set(points) >= set(table["name"]):
        arrays = (np.transpose(points[name]) for name in table["name"])
        table["curve"] = np.fromiter(arrays, object, len(rows))
    return table


# ---------------------------------------------------------------- a study
def analyse(table, a, shapes):
    """All that is known of a table: the first shape is its law, with intervals."""
    name, (_, shape) = next(iter(shapes.items()))
    for x in shape.x:
        if len(np.unique(table[x])) < 3:
            raise UserError(f"{a.target} has {len(np.unique(table[x]))} value(s) of '{x}', and an "
                            "exponent takes 3: leave it out, or add runs")
        shapes.update(other_curves(table, shape, x))
    needed = max(5, *(one.parameters for _, one in shapes.values()))
    columns = dict.fromkeys([*([a.holdout] if a.holdout else []), *shape.x])
    columns = [x for x in columns if sum(~largest(table, x)) >= needed]
    if a.holdout and a.holdout not in columns:
        raise UserError(f"too few rows are left to fit without the largest {a.holdout}: add runs")
    if "seed" in table and len(np.unique(table["seed"])) < 3:
        print("note: fewer than 3 seeds, so no intervals and no claims")
    study = SimpleNamespace(table=table, y=a.y, tables=resampled(table, a.y, a.bootstrap))
    study.fits = {key: fit(rows, one, a.y) for key, (rows, one) in shapes.items()}
    law = study.law = study.fits[name]
    again = partial(fit, shape=shape, y=a.y, near=law)
    with ProcessPoolExecutor(2) as pool:
        study.laws = {kind: list(pool.map(again, some, chunksize=len(some) // 16 + 1))
                      for kind, some in study.tables.items()}
    study.held = {key: {x: hold_out(rows, study.fits[key], a.y, x) for x in columns}
                  for key, (rows, _) in shapes.items()}
    study.verdicts = {f"power_law_of_{x}": power_law(study, x) for x in shape.x}
    return study


def analyse_grid(table, a):
    counts = {x: len(np.unique(setting(table, x))) for x in FACTORS}
    varied = [x for x in FACTORS if counts[x] > 2]
    if not varied:
        raise UserError(f"{a.target} has 3 settings of none of {', '.join(FACTORS)}: add runs")
    for x in FACTORS:
        if x not in varied:
            print(f"note: {x} is left out of the law: the grid has {counts[x]} of the 3 settings "
                  "that an exponent takes")
    study = analyse(table, a, candidates(table, varied, a.y, not a.no_floor))
    verdicts = study.verdicts
    if set(DATA) <= set(varied):
        verdicts.update(users_or_hours(study))
    if study.law.shape.coupled:
        verdicts["capacity_interaction"] = interaction(study)
    if "curve" in table:
        verdicts["compute_frontier"] = compute_frontier(study)
    for score in sorted(key for key in table if key.endswith("_macro_f1")):
        if np.isfinite(table[score]).sum() > 4:
            verdicts[f"downstream_{score[:-9]}"] = downstream(study, score)
    return study


def entry(study, name):
    """A law as it stands in laws.json."""
    law, table = study.fits[name], study.table
    shape, n, laws = law.shape, len(law.residuals), study.laws if law is study.law else {}
    power = "^(-alpha/delta)" if shape.coupled else "^-alpha"
    terms = " + ".join(" ".join(["A", *[x + power for x in term]]) for term in shape.terms)
    form = "E + " * shape.floor + (f"({terms})^delta" if shape.coupled else terms)
    scatter = 1.96 * math.sqrt((law.residuals ** 2).sum() / max(n - shape.parameters, 1))
    result = {"name": name, "x": shape.x, "terms": shape.terms, "y": study.y, "form": form,
              **law.plain(), "ci95": None, "objective": law.objective, "n": n, "aicc": aicc(law),
              "scatter": scatter,
              "range": {x: [min(table[x]), max(table[x])] for x in shape.x if x in table},
              "resampled": {kind: [one.plain() for one in laws[kind][:200]] for kind in laws}}
    around = {key: estimate(lambda law: law.plain()[key], law, laws, key in ("A", "delta"))
              for key in law.plain()}
    for kind in ["ci95"] * bool(laws) + ["ci95_people"] * ("people" in laws):
        result[kind] = {key: one.get(kind) for key, one in around.items()}
    held = {x: {"column": x, **summary(one["error"])} for x, one in study.held[name].items()}
    return {**result, "holdout": next(iter(held.values()), None), "held_out": held}


def summary(error):
    """Of relative errors."""
    return {"n": len(error), "median_relative_error": float(np.median(error)),
            "worst_relative_error": error.max(), "rms_relative_error": np.sqrt(np.mean(error ** 2))}


def report(entries, verdicts):
    first = entries[0]
    print("\n{y} = {form}   ({n} rows, objective {objective:.9g})".format(**first))
    for kind, what in ((None, "best"), ("ci95", "95 %"), ("ci95_people", "with other people")):
        numbers = first if kind is None else first.get(kind) or {}
        for key in ("E", "A", "alpha", "delta"):
            if key in numbers:
                values = np.array2string(np.array(numbers[key]), precision=4).replace("\n", "")
                print(f"  {what:18} {key:6} {values}")
    for one in entries:
        text = ", ".join("largest {column} {rms_relative_error:.1%}".format(**held)
                         for held in one["held_out"].values())
        print(f"  {one['name']:50} AICc {one['aicc']:7.1f}  error held out: {text}")
    print(*["- " + one["text"] for one in verdicts.values()], sep="\n")


# ---------------------------------------------------------------- advice, from laws.json alone
def read_law(path):
    """The first law of a laws.json, the same resampled, and its entry."""
    first = (read_json(path).get("laws") or [{}])[0]
    if "resampled" not in first:
        raise UserError(f"{path} is no laws.json of this program: fit a grid first")
    shape = Shape(tuple(map(tuple, first["terms"])), coupled="delta" in first)
    laws = {kind: [from_plain(shape, one) for one in some]
            for kind, some in first["resampled"].items()}
    return from_plain(shape, first), laws, first


def expected(law, laws, first, table):
    """The loss of each row, and the band of 95 % of single runs: the law's interval and scatter."""
    result = estimate(lambda law: law.loss(table), law, laws, log=True)
    losses = np.array(result["value"])[:, None]
    around = np.log(np.array(result["ci95"] or losses * [1, 1]) / losses)
    return losses[:, 0], losses * np.exp(np.hypot(around, first["scatter"]) * [-1, 1])


def recommend(path, plan):
    """Which model fits a plan, what loss to expect, and whom to record next."""
    law, laws, first = read_law(path)
    plan = {x: value for x, value in plan.items() if x in first["x"]}
    if not plan or set(first["x"]) - set(FACTORS) or not all(v and v > 0 for v in plan.values()):
        raise UserError(f"{path} has a law of {', '.join(first['x'])}; --recommend is for a law of "
                        "users and hours, and needs --users and --hours-per-user above 0")
    if "params_encoder" in first["x"]:
        low, high = first["range"]["params_encoder"]
        size = estimate(lambda law: capacity(law, plan, high), law, laws, log=True)
        plan["params_encoder"] = float(np.clip(size["value"], low, high))
        print(f"capacity: {size['value']:.3g} encoder parameters {span(size['ci95'])}, no larger "
              f"model gains more than 1 %; train {plan['params_encoder']:.3g}")
    plan = {x: np.array([value]) for x, value in plan.items()}
    (loss,), (band,) = expected(law, laws, first, plan)
    print(f"expected loss: {loss:.4f}, 95 % of single runs within {span(list(band))}")
    if DATA in law.shape.terms:  # in their common term, 1 % more of a factor gains by its exponent
        print(verdict("record someone new next", "Gain of that hour over an hour of the same "
                      "people:", exponent_ratio, law, laws, True, True)["text"])
    for x, value in plan.items():
        low, high = first["range"][x]
        if not low <= value <= high:
            print(f"note: {x} {value.item():g} is extrapolated, the grid has {low:g} to {high:g}")


def predict(path, cells, out):
    """Predict each row of a CSV; where all have a measured `loss`, report the error."""
    law, laws, first = read_law(path)
    rows = read_csv(cells)
    losses, bands = expected(law, laws, first, {x: numbers(rows, x, cells) for x in first["x"]})
    result = {"law": str(path), "provenance": provenance(), "cells": [
        {"name": row.get("name"), "loss": loss, "single_run": band.tolist()}
        for row, loss, band in zip(rows, losses, bands)]}
    if not rows[0].get("loss"):
        return write_json(out / "prediction.json", result)
    measured = numbers(rows, "loss", cells)
    error = abs(losses / measured - 1)
    inside = (bands[:, 0] <= measured) & (measured <= bands[:, 1])
    result.update(summary(error), measured=measured.tolist(), inside=inside.mean())
    print("median error {median_relative_error:.2%}, worst {worst_relative_error:.2%}, "
          "{inside:.0%} inside the band".format(**result))
    write_json(out / "outcome.json", result)


# ---------------------------------------------------------------- figures
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split() * 9  # Okabe and Ito
LABELS = {"hours_per_user": "hours per user", "params_encoder": "encoder parameters",
          "hours": "hours in all", "flops": "compute of the training, FLOPs",
          "loss": "loss on held-out people"}


def draw(title, x, y, groups, law=None, style="o"):
    """The rows of each group as points, and with a law its line, with the group's name at its end;
    empty points are left out of the law. Names that end alike share a colour."""
    import matplotlib  # here, so that --help and refusals don't wait for it
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker
    figure, ax = pyplot.subplots(figsize=(7, 4.8), layout="constrained")
    ax.set(title=title, xlabel=LABELS.get(x, x), ylabel=LABELS.get(y, y))
    colours = dict(zip(dict.fromkeys(name.split(", ")[-1] for name in groups), COLOURS))
    for name, rows in groups.items():
        colour = colours[name.split(", ")[-1]]
        _, first = np.unique(setting(rows, x), return_index=True)
        if law and len(first) == 1:
            continue
        ax.plot(rows[x], rows[y], style, color=colour, ms=4, lw=.6, label=name)
        if law:
            line, out = take(rows, first), take(rows, ~rows["used"])
            ax.plot(line[x], law.loss(line), color=colour)
            ax.plot(out[x], out[y], "o", color=colour, ms=4, mfc="white")
            ax.annotate(name, (line[x][-1], law.loss(line)[-1]), (6, -3), color=colour,
                        fontsize=8, textcoords="offset points")
    if law:
        ax.set_xscale("log")
        ax.xaxis.set(major_locator=ticker.LogLocator(subs=(1, 3)), major_formatter="{x:,.7g}",
                     minor_formatter=ticker.NullFormatter())
        ax.margins(x=.2)
        ax.spines[["top", "right"]].set_visible(False)
    else:
        ax.legend(frameon=False)
    return ax


def grouped(rows, label):
    """{label: rows}; a label is made of users, hours of each, encoder parameters, hours in all."""
    places = zip(rows["users"], rows["cap"], rows["params_encoder"], rows["users"] * rows["cap"])
    labels = np.array([label.format(*place).replace("inf h", "all hours") for place in places])
    return {name: take(rows, labels == name) for name in dict.fromkeys(labels)}


def draw_grid(study, shown):
    """{name: axes}, as far as the grid varies what they show; `shown` has all of its cells."""
    shown = take(shown, np.lexsort([shown[x] for x in FACTORS]))
    y, law, sizes = study.y, study.law, shown["params_encoder"]
    main = take(shown, sizes == np.quantile(sizes, .5, method="nearest"))
    by_size = grouped(shown, "{2:,.0f} encoder parameters")
    views = {
        "loss_vs_users": ("More people, as long each", "users", main, "{1:.2g} h each"),
        "users_vs_hours": ("As many hours, of more people", "users", main, "{3:.2g} h in all"),
        "loss_vs_hours": ("More hours of as many people", "hours_per_user", shown,
                          "{0:g} users, {2:,.0f}"),
        "loss_vs_params": ("Larger models on the same data", "params_encoder", shown,
                           "{0:g} users x {1:.2g} h")}
    drawn = {name: draw(title, x, y, grouped(rows, label), law)
             for name, (title, x, rows, label) in views.items() if x in law.shape.x}
    for score in [key for key in shown if key.endswith("_macro_f1")]:
        drawn[score] = draw("A linear probe's score against the loss", y, score, by_size)
    if "compute_frontier" in study.verdicts:
        best = study.frontier
        curves = {name: {"flops": np.concatenate([curve[0] for curve in rows["curve"]]), "loss":
                         np.concatenate([curve[1] for curve in rows["curve"]])}
                  for name, rows in by_size.items()}
        drawn["frontier"] = ax = draw("The lowest loss for a given compute", "flops", y, curves,
                                      style=".")
        ax.plot(best["flops"], best["law"], color="black")
        ax.set_xscale("log")
    if law.shape.coupled and study.laws:
        drawn["capacity"] = draw_capacity(study)
    return drawn


def draw_capacity(study):
    """The capacity that fits the data of each cell; no bar where its interval spans a decade."""
    table, most = study.table, study.table["params_encoder"].max()
    rows = take(table, np.unique(table["hours"].round(3), return_index=True)[1])
    plans = [dict(zip(DATA, plan)) for plan in zip(*(rows[x] for x in DATA))]
    ci95 = estimate(lambda law: np.array([capacity(law, plan, most) for plan in plans]),
                    study.law, study.laws, log=True)["ci95"]
    ax = draw("The smallest model that no larger one beats by more than 1 %", "hours",
              "params_encoder", {"runs": table})
    for hours, (low, high) in zip(rows["hours"], ci95):
        if high < 10 * low:
            ax.plot([hours, hours], [low, high], color=COLOURS[1], lw=3)
    ax.set(xscale="log", yscale="log")
    return ax


def draw_held(study):
    held = next(iter(study.held.values()))
    ax = draw("Runs that the law had not seen", "measured", "predicted", {
        f"largest {LABELS.get(x, x)}": rows for x, rows in held.items()})
    ax.plot(ax.get_xlim(), ax.get_xlim(), color="black", lw=1)
    return ax


# ---------------------------------------------------------------- the command line
def terms_of(words, y):
    terms = tuple(tuple(word.split("*")) for word in words)
    factors = sum(terms, ())
    if not 1 <= len(factors) <= 4 or {"", y} & set(factors) or len(set(factors)) < len(factors):
        raise UserError("--x takes one to four columns, each in one term only, and not --y; "
                        "columns joined by * share a term")
    return terms


def write_csv(path, rows):
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(key for row in rows for key in row))
        writer.writeheader()
        writer.writerows(rows)


def parse():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("target", help="a grid's folder of runs or its results.csv; a CSV table with --x; a "
        "laws.json with --recommend or --predict")
    add("--out", help="folder for laws.json, the figures and a grid's tables")
    add("--x", nargs="+", metavar="TERM", help="columns of a table, a term each; columns joined by "
        "* share a term (default: a grid's law)")
    add("--y", default="loss", help="the column to explain (default: loss)")
    add("--no-floor", action="store_true", help="E is 0: with enough data any loss can be reached")
    add("--holdout", metavar="COLUMN", help="predict the largest of this column from the rest "
        "(default: each factor in turn)")
    add("--bootstrap", type=int, default=1000, help="resampled tables for the intervals; with "
        "seeds each is left out once instead; 0: no intervals, sooner done (default: 1000)")
    add("--partial", action="store_true", help="fit the cells that are done instead of refusing")
    add("--converged-only", action="store_true", help="leave out cells that --steps cut off")
    add("--max-unexplained", type=float, default=.93, help="cells that leave more of the signal "
        "unexplained have hardly learned and stay out of the law (default: 0.93)")
    add("--mixed", action="store_true", help="fit cells of different configurations as one grid")
    add("--recommend", action="store_true", help="capacity, loss and whom to record next, for:")
    add("--users", type=float, help="users in the plan")
    add("--hours-per-user", type=float, help="hours recorded of each")
    add("--predict", metavar="CSV", help="write prediction.json for these cells (name and the "
        "law's factors), or outcome.json with the errors if they have a measured loss")
    a = p.parse_args()
    if a.bootstrap < 0 or not (a.out or a.recommend or a.predict):
        raise UserError("--out must name a folder, and --bootstrap be 0 or more")
    return a


def main():
    a = parse()
    if a.recommend:
        return recommend(a.target, {"users": a.users, "hours_per_user": a.hours_per_user})
    if a.predict:
        return predict(a.target, a.predict, Path(a.out or Path(a.target).parent))
    out, grid, axes = Path(a.out), {}, {}
    if a.x:
        terms, rows = terms_of(a.x, a.y), read_csv(a.target)
        columns = {*sum(terms, ()), a.y, a.holdout} - {None}
        table = {x: numbers(rows, x, a.target) for x in columns}
        if "seed" in rows[0]:
            table["seed"] = np.array([row["seed"] for row in rows])
        shapes = {f"{a.y} by {' + '.join(a.x)}": (table, Shape(terms, not a.no_floor))}
        if len(terms) > 1:
            shapes["the same, coupled"] = table, Shape(terms, not a.no_floor, True)
        study = analyse(table, a, shapes)
        axes["fit"] = draw("All rows", "measured", "fitted", {a.y: {
            "measured": table[a.y], "fitted": study.law.loss(table)}})
    else:
        grid = read_grid(Path(a.target), a.partial)
        shown = grid_table(*grid.values(), a)
        study = analyse_grid(take(shown, shown["used"]), a)
        axes = draw_grid(study, shown)
    verdicts, entries = study.verdicts, [entry(study, name) for name in study.fits]
    if entries[0]["holdout"]:
        axes["held_out"] = draw_held(study)
    for name, rows in grid.items():
        if rows and Path(a.target).resolve() != (out / f"{name}.csv").resolve():
            write_csv(out / f"{name}.csv", rows)
    for name, ax in axes.items():
        with replacing(out / f"{name}.png") as temporary:
            ax.figure.savefig(temporary, dpi=150)
    write_json(out / "laws.json", {"laws": entries, "verdicts": verdicts,
                                   "provenance": provenance()})
    report(entries, verdicts)
    print(f"\n{out}: laws.json, {', '.join(f'{name}.png' for name in axes)}")


if __name__ == "__main__":
    command(main)
