"""
From finished runs to a scaling law: its fit, what it predicts, and which claims hold.

    python fit_laws.py runs/GRID --out results/GRID                    # a grid: collect, fit, draw
    python fit_laws.py results/GRID/results.csv --out DIR              # again, from its table
    python fit_laws.py TABLE.csv --x params tokens --y loss --out DIR  # any table
    python fit_laws.py DIR/laws.json --predict CELLS.csv               # before runs; after: errors
    python fit_laws.py DIR/laws.json --recommend --users 30 --hours-per-user 2
    python fit_laws.py DIR/laws.json --recommend --hours 20 --setup 0.5

A table is {column: array (n,)}, a row a run. To change a law, change its function and its ranges.
"""
import csv, functools, math
from collections import namedtuple
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares
from scipy.special import huber
from scipy.stats import t as student

from data import (UserError, build_parser, command, number, provenance, read_json, replacing,
                  require, write_json)

# ---------------------------------------------------------------- two laws
Law = namedtuple("Law", "formula ranges huber")        # residuals above huber count linearly

def grid_law(table, E, R, A, a, h=math.inf, B=0., c=0.):
    """The loss (n,) of runs on U users, H hours of each, with P parameters:

        loss = E + 1 / (1/s + 1/R)        s = A N^-a + B P^-c        N = U h H / (H + h)

    E stays with endless data and parameters; without data the loss is E + R. s: what is missing.
    N: effective hours in all. H hours of a person count half at H = h, and never more than h.
    """
    hours = table["hours_per_user"]
    N = table["users"] * hours / (1 + hours / h)
    s = A * N ** -a + B * table["params_encoder"] ** -c
    return E + 1 / (1 / s + 1 / R)

# Of each number the lowest and highest, and between which two it starts. If the lowest is above 0,
# its logarithm is fitted, and its interval is symmetric on a log axis.
GRID = {
    "E": (0, 10, 0, .2),
    "R": (1e-3, 10, .05, 1),
    "A": (1e-5, 1e3, .01, 1),
    "a": (0, 4, .1, 1.5),
    "h": (1e-4, 1e3, .01, 1),
    "B": (1e-6, 1e6, .1, 100),
    "c": (0, 2, .1, 1)}

def table_law(table, units, E=0., **numbers):
    """E + the sum over terms of A times each factor's x^-alpha (Hoffmann et al. 2022, 2203.15556).
    numbers: {"A users*hours": A of a term, ..., "alpha users": alpha of a factor, ...}; units:
    {factor: its divisor}, so that an A is its term amid the data."""
    loss = E
    for name, A in numbers.items():
        if name.startswith("A "):
            factors = name[2:].split("*")
            powers = [(table[x] / units[x]) ** -numbers[f"alpha {x}"] for x in factors]
            loss = loss + A * math.prod(powers)
    return loss

def table_ranges(table, y, terms, floor):
    """As GRID, for factors that are divided by their geometric means."""
    mean = table[y].mean()
    ranges = {"E": (0, 5 * mean, 0, .9 * mean)} if floor else {}
    for term in terms:
        ranges["A " + "*".join(term)] = 1e-12 * mean, 100 * mean, .03 * mean, mean
        for x in term:
            half = np.ptp(np.log(table[x])) / 2        # alpha 1 / half changes a term e^2-fold
            ranges[f"alpha {x}"] = 0, 20 / half, .05 / half, 1 / half
    return ranges

# ---------------------------------------------------------------- the fit
@np.errstate(all="ignore")                             # trial steps may overflow
def fit(law, table, y, near=None):
    """{name: value} of the least squared (or Huber) log residuals: the best of 12 random starts, or
    of 3 and of `near`, the fit to a similar table."""
    ranges = np.array([*law.ranges.values()]).T
    logs = ranges[0] > 0
    low, high, start_low, start_high = np.where(logs, np.log(ranges), ranges)

    def named(theta):
        return dict(zip(law.ranges, np.where(logs, np.exp(theta), theta).tolist()))

    def residuals(theta):
        return np.log(law.formula(table, **named(theta))) - np.log(table[y])

    draws = np.random.default_rng(0).random((3 if near else 12, len(low)))
    starts = list(start_low + (start_high - start_low) * draws)
    if near:                                           # alone it may stick
        values = np.array([*near.values()])
        starts.append(np.where(logs, np.log(values), values))
    for evaluations in (15, None):                     # all starts briefly, the best two to the end
        fits = [least_squares(residuals, np.clip(start, low, high), bounds=(low, high),
                              x_scale="jac", loss="huber", f_scale=law.huber,
                              max_nfev=evaluations) for start in starts]
        fits.sort(key=lambda found: found.cost)
        starts = [found.x for found in fits[:2]]
    return named(starts[0])

# ---------------------------------------------------------------- intervals
def take(table, rows):
    return {name: values[rows] for name, values in table.items()}

def without_each(values):
    """The mean of values (n, ...) without each of them in turn, (n, ...)."""
    return (np.sum(values, axis=0) - values) / max(len(values) - 1, 1)

def interval(value, without_seed, without_person=()):
    """The 95 % interval of a number, from its values without each seed (and each held-out person)
    in turn: the jackknife's error times Student's t."""
    if len(without_seed) < 3:                          # two say next to nothing
        return None
    groups = [values for values in (without_seed, without_person) if len(values)]
    square = sum(np.var(values, axis=0) * (len(values) - 1) for values in groups)
    half = student.ppf(.975, min(map(len, groups)) - 1) * np.sqrt(square)
    return [value - half, value + half]

# ---------------------------------------------------------------- equal hours, more people
def numbered(*columns):                                # (n,): the number of each row's combination
    return np.unique(columns, axis=1, return_inverse=True)[1].ravel()

def merged(values):
    """Values (n,), each replaced by the smallest of its group: all within 5 % of that."""
    found, place = np.unique(values, return_inverse=True)
    for i in range(1, len(found)):
        if found[i] < 1.05 * found[i - 1]:
            found[i] = found[i - 1]
    return found[place]

def equal_hours(table):                                # (n,): which runs are compared
    return numbered(merged(table["hours"]), table["params_encoder"])

def savings(y, x, seeds, *groups):
    """In each seed (k,), how much y (n,) falls as x (n,) rises by 1: least squares, with a constant
    for each value of each group (n,). Seeds with nothing to compare are left out."""
    found = []
    for seed in np.unique(seeds):
        rows = seeds == seed
        constants = [group[rows] == value for group in groups for value in np.unique(group)]
        constants = np.stack(constants, axis=1).astype(float)
        change = x[rows] - constants @ np.linalg.lstsq(constants, x[rows], rcond=None)[0]
        if change @ change > .01:                      # else nothing differs enough
            found.append(-(change @ y[rows]) / (change @ change))
    return np.array(found)

def users_save(table, losses):
    """In each seed, what e times as many users save in log loss at equal hours in all."""
    return savings(np.log(losses), np.log(table["users"]), table["seed"], table["equal_hours"])

# ---------------------------------------------------------------- held out, beside forecasters
def forecasts(rest, rows, y, settings, x):
    """{forecaster: its y of rows (m,)}, from `rest`, without a law. Lines are straight in the logs
    of all settings."""
    before, now = (np.column_stack([np.log(table[other]) for other in settings] +
                                   [np.ones_like(table[x])]) for table in (rest, rows))
    targets = np.column_stack([np.log(rest[y]), rest[y]])
    slopes = np.linalg.lstsq(before, targets, rcond=None)[0]
    log_log, semi_log = (now @ slopes).T
    ratio = [last_ratio(rest, take(rows, i), y, settings, x) for i in range(len(now))]
    return {"last ratio": np.array(ratio), "line on log axes": np.exp(log_log),
            "line on semi-log axes": semi_log}

def last_ratio(rest, row, y, settings, x):
    """The ratio of y between the last two smaller x, all else equal, goes on."""
    alike = [np.isclose(rest[other], row[other], .03, 0) for other in settings if other != x]
    before = take(rest, np.all([rest[x] < row[x], *alike], axis=0))
    values = merged(before[x])
    last = np.unique(values)[-2:]
    if len(last) < 2:
        return math.nan
    means = [before[y][values == value].mean() for value in last]
    steps = np.log(row[x] / last[1]) / np.log(last[1] / last[0])       # such as the last one
    return means[1] * (means[1] / means[0]) ** steps

# ---- from here on: files, flags, figures
# ---------------------------------------------------------------- tables
def as_number(text, decimal="."):
    """nan for an empty text, None for any other that is no number."""
    try:
        return float(text.replace(decimal, ".") or "nan")
    except ValueError:
        return None

def read_csv(path, needed):
    """{column: (n,)} of a CSV file, a spreadsheet's, too: numbers, or else texts. Columns that are
    needed have numbers above 0."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        mark = max(",;\t", key=text.partition("\n")[0].count)
        reader = csv.reader(text.splitlines(), delimiter=mark, skipinitialspace=True)
        rows = {reader.line_num: row for row in reader if "".join(row).strip()}
    except (OSError, ValueError, csv.Error):
        raise UserError(f"{path} is no CSV table in UTF-8, no folder of runs: name one") from None
    require(len(rows) > 1, f"{path} has no rows: give a header and a line per row")
    names = [name.strip() for name in rows.pop(min(rows))]
    require(len({*names}) == len(names), f"{path} has a column twice in {names}: rename one")
    absent = sorted({*needed} - {*names})
    require(not absent, f"{path} has no column {absent} (name factors by --x); it has "
            f"{', '.join(names)[:200]}")
    for line, row in rows.items():
        require(len(row) == len(names), f"{path}, line {line}: {len(row)} fields, but the header "
                f"has {len(names)}")
    points = [text for row in rows.values() for text in row if "." in text and as_number(text)]
    decimal = "." if points or mark == "," else ","    # else 1,000 may be a thousand
    table = {}
    for name, texts in zip(names, zip(*rows.values())):
        values = [as_number(text, decimal) for text in texts]
        table[name] = np.array(texts if None in values else values)
        above = -1 if name == "seed" else 0            # seeds start at 0
        for line, text, value in zip(rows, texts, values):
            fine = value is not None and above < value < math.inf
            require(fine or name not in needed, f"{path}, line {line}: '{name}' is '{text}', but "
                    "must be a number above 0")
    return table

# ---------------------------------------------------------------- a grid of runs
SETTINGS = "users", "hours_per_user", "params_encoder"
NEEDED = *SETTINGS, "hours", "width", "depth", "heads", "seed", "loss"
MAY_DIFFER = {"users", "hours_per_user", "width", "depth", "heads", "seed", "steps"}
SCORE = "_macro_f1"                                    # a probe's column: DATA_macro_f1

def read_cell(cell):
    """A finished run's flags, and its row of results.csv, with the scores of its probes."""
    result = read_json(cell / "result.json")
    require({"config", "people", "hours_cap"} <= {*result}, f"{cell}/result.json lacks what a run "
            "writes: delete it and run this cell again")
    row = {"name": cell.name}
    row |= {key: value for key, value in result.items() if np.isscalar(value)}
    row["hours_cap"] = result["hours_cap"] or math.inf
    row |= {"person.{source}/{user}".format(**who): who["loss"] for who in result["people"]}
    for path in sorted(cell.glob("finetune/*-probe.json")):
        data = path.name.removesuffix("-probe.json")
        row |= {f"{data}_{key}": value for key, value in read_json(path).items()
                if isinstance(value, (int, float))}
    return result["config"], row

def collect(folder, out):
    """Write results.csv, a row for each finished run, into `out`. UserError if their flags differ;
    one that a run doesn't name had its default."""
    from pretrain import FLAGS                         # here, as it imports torch
    defaults = {flag: default for flag, (default, *_) in FLAGS.items()}
    rows, usual = [], None
    for cell in sorted(folder.glob("*/")):
        if not (cell / "result.json").is_file():
            print(f"note: {cell.name} is not done and is left out")
            continue
        flags, row = read_cell(cell)
        flags, rows = defaults | flags, [*rows, row]
        usual = usual or flags
        differ = {key for key in flags.keys() | usual if flags.get(key) != usual.get(key)}
        require(differ <= MAY_DIFFER, f"{folder} mixes configurations: {cell.name} and "
                f"{rows[0]['name']} differ in {differ - MAY_DIFFER}: give each its own folder")
    require(rows, f"{folder} has no finished run: train first")
    with replacing(out / "results.csv") as path, open(path, "w", newline="") as file:
        columns = dict.fromkeys(key for row in rows for key in row)
        writer = csv.DictWriter(file, columns, restval=math.nan, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return out / "results.csv"

def read_grid(path):
    """The columns of a results.csv. hours_per_user: near a cap, the mean; equal_hours: see there;
    people: their losses (n, people)."""
    table = read_csv(path, NEEDED)
    names, each = table.get("name", ()), table["hours_per_user"]
    require(len({*names}) == len(names), f"{path} has a run twice: each name must stand once")
    caps = merged(table.get("hours_cap", each))
    for runs in (caps == cap for cap in {*caps}):      # people may have somewhat less than the cap
        if each[runs].max() < 1.5 * each[runs].min():
            each[runs] = each[runs].mean()
    table["equal_hours"] = equal_hours(table)
    people = [losses for key, losses in table.items() if key.startswith("person.")
              and losses.dtype.kind == "f" and losses.min() > 0]       # those of all runs
    table["people"] = np.reshape(people, (-1, len(each))).T
    return table

def main_model(table):
    """The runs of the model that has most of them, the largest if several have."""
    sizes, counts = np.unique(table["params_encoder"], return_counts=True)
    return take(table, table["params_encoder"] == sizes[counts == counts.max()].max())

def models(table):
    """{as one names it: its parameters}."""
    names = map("{:.0f}x{:.0f}x{:.0f}".format, table["width"], table["depth"], table["heads"])
    return dict(zip(names, table["params_encoder"]))

def grid_ranges(table):
    """Of the numbers that this grid has settings for; none if it has too few for a law."""
    users, times, sizes = (len({*table[x]}) for x in SETTINGS)
    names = "ERAa" + "h" * (times > 1) + "Bc" * (sizes > 2)      # a letter is a number's name
    data = {*zip(table["users"], table["hours_per_user"])}
    enough = users > 2 and len(data) > 4 + (times > 1)           # more than E, R, A, a and h
    return {name: GRID[name] for name in names} if enough else {}

def grid_study(table):
    """laws[0] of a grid: with the fits without each seed, and without the runs where one setting
    is largest. Two sizes make no law: then it is that of the model with most runs."""
    if len({*table["params_encoder"]}) == 2:
        table = main_model(table)
    law = Law(grid_law, grid_ranges(table), 1e9)
    first = {"name": "grid", "parameters": None, "ci95": None, "noise": noise(table), "fits": [],
             "form": "E + 1 / (1/s + 1/R), s = A N^-a + B P^-c, N = U h H / (H + h)",
             "models": models(table), "held_out": {}, "y": "loss", "n": len(table["loss"])}
    if not law.ranges:
        print("note: no law, which takes three numbers of users and six settings of users and time")
        return first
    tops = {}
    for x in SETTINGS:
        top = table[x] == table[x].max()
        if grid_ranges(take(table, ~top)).keys() == law.ranges.keys():
            tops[x] = top
    seeds = table["seed"]                              # runs of a seed share people, vary together
    without_seed = [take(table, seeds != seed) for seed in np.unique(seeds)]
    first |= study(law, table, "loss", SETTINGS, tops, without_seed)
    whole, *others = first["fits"]
    if len(others) > 2:
        first["ci95"] = {name: grid_interval(whole[name], [one[name] for one in others], low, high)
                         for name, (low, high, *_) in law.ranges.items()}
    return first | {"parameters": whole}

def grid_interval(value, others, low, high):
    """95 % of a number, from the fits to all seeds and without each: all of its range, if the data
    press it against an end."""
    way, back = (np.log, np.exp) if low > 0 else (np.array, np.array)
    bottom, top, at = way([low, high, value])
    if not 1e-4 < (at - bottom) / (top - bottom) < .999:
        return [low, high]
    return back(np.maximum(interval(at, way(others)), bottom)).tolist()

def noise(table):
    """A run against the mean of the other seeds of its setting: rms of the relative difference."""
    setting = numbered(*map(table.get, SETTINGS))
    runs = [table["loss"][setting == one] for one in {*setting}]
    off = [losses / without_each(losses) - 1 for losses in runs if len(losses) > 1]
    return rms(np.hstack(off)) if off else None

# ---------------------------------------------------------------- any table
HUBER = 1e-3

def table_study(path, a):
    """laws[0] of a table, whose rows, or whole groups, are resampled for intervals."""
    factors, tops = sum(a.x, ()), {}
    table = read_csv(path, [*factors, a.y, a.holdout or a.y])
    if a.holdout:
        held = table[a.holdout]
        tops[a.holdout] = held >= min(held.max() / 1.1, np.quantile(held, .9))
    check_table(path, table, a, factors, tops)
    units = {x: np.exp(np.log(table[x]).mean()) for x in factors}
    formula = functools.partial(table_law, units=units)
    law = Law(formula, table_ranges(table, a.y, a.x, not a.no_floor), HUBER)
    groups = numbered(table.get(a.group, np.arange(len(table[a.y]))))
    rows = [np.flatnonzero(groups == group) for group in {*groups}]
    draws = np.random.default_rng(0).integers(len(rows), size=(a.bootstrap, len(rows)))
    resampled = [take(table, np.hstack([rows[i] for i in drawn])) for drawn in draws]
    first = study(law, table, a.y, factors, tops, resampled)
    numbers, *others = [in_lists(fit, a.x, units) for fit in first["fits"]]
    ci95 = {key: np.percentile([one[key] for one in others], (2.5, 97.5), axis=0).T
            for key in numbers if others}
    for x, alpha in zip(factors, numbers["alpha"]):
        if alpha * np.ptp(np.log(table[x])) < .01:
            print(f"note: {a.y} doesn't fall as {x} rises: a law is of what falls, as 1 - accuracy")
    form = " + ".join(["E"] + [f"A {'^-alpha '.join(term)}^-alpha" for term in a.x])
    held_out = first.pop("held_out").get(a.holdout)
    return first | {"name": "table", "x": factors, "terms": a.x, "form": form, **numbers,
                    "ci95": ci95 or None, "holdout": held_out and {"column": a.holdout, **held_out},
                    "units": units, "fits": first["fits"][:201]}

def check_table(path, table, a, factors, tops):
    """UserError if the table is too small for a law; notes on rows that belong together."""
    require(len({*factors, a.y}) == len(factors) + 1, "--x takes each column in one term only, and "
            "not --y")
    n, least = len(table[a.y]), len(a.x) + len(factors) + 3
    rest = n - sum(map(sum, tops.values()))
    require(rest >= least, f"{path} has {rest} rows that aren't held out; a law of "
            f"{', '.join(factors)} needs {least}")
    for x in factors:
        require(len({*table[x]}) > 2, f"{path} has too few values of {x}: an exponent needs 3")
    require(not a.group or len({*table.get(a.group, ())}) > 4,
            f"{path} has no column '{a.group}', or fewer than the five groups that intervals take")
    for name, values in table.items():
        if values.dtype.kind == "U" and 1 < len({*values}) < n and not a.group:
            print(f"note: {name} has {len({*values})} different texts in {n} rows: if those of one "
                  f"belong together, the intervals are too narrow without --group {name}")
    twice = n - len({*zip(*(table[x] for x in (*factors, a.y)))})
    if twice:
        print(f"note: {twice} of {n} rows are there twice: leave them out if they are one run")

def in_lists(numbers, terms, units):
    """{"E", "A": one a term, "alpha": one a factor}, where no factor is divided by its unit."""
    alpha, A = {x: numbers[f"alpha {x}"] for x in units}, []
    for term in terms:
        power = math.prod(units[x] ** alpha[x] for x in term)
        A.append(numbers["A " + "*".join(term)] * min(power, 1e300))
    return {"E": numbers.get("E", 0.), "A": A, "alpha": [*alpha.values()]}

# ---------------------------------------------------------------- of either law
def study(law, table, y, settings, tops, others):
    """What laws.json says of either law: its fits to the table and to others that are like it, and
    in the rows tops[x], where x is largest, its errors and the forecasters' from all other rows."""
    whole, held_out = fit(law, table, y), {}
    for x, top in tops.items():
        rows, rest = take(table, top), take(table, ~top)
        predicted = law.formula(rows, **fit(law, rest, y))
        held_out[x] = outcome(predicted, forecasts(rest, rows, y, settings, x), rows[y])
    residuals = np.log(table[y] / law.formula(table, **whole))
    return {"y": y, "n": len(residuals), "rows": {x: table[x] for x in (*settings, y)},
            "fits": [whole, *(fit(law, other, y, whole) for other in others)],
            "held_out": held_out, "rms": rms(residuals),
            "objective": huber(HUBER, residuals).sum()}

def rms(values):
    return np.mean(values ** 2) ** .5

def errors_of(predicted, measured):
    error = abs(predicted / measured - 1)
    error = error[np.isfinite(error)]
    return {"n": len(error), "median_relative_error": np.median(error),
            "worst_relative_error": error.max(),
            "rms_relative_error": rms(error)} if len(error) else None

def outcome(predicted, others, measured):
    """The law's errors and the forecasters'."""
    errors = {who: errors_of(each, measured) for who, each in others.items()}
    return {**errors_of(predicted, measured), "forecasters": errors}

def each_of(errors):
    """{the law, a forecaster: its errors}, of those that predict anything."""
    return {who: one for who, one in {"law": errors, **errors["forecasters"]}.items() if one}

def read_law(path):
    """Of a laws.json: laws[0] and the verdicts."""
    try:
        content = read_json(path)
        first, verdicts = content["laws"][0], content["verdicts"]
        require(first["fits"], f"{path} has no law, as its grid has too few settings: add some and "
                "fit again")
        first["rows"] = {x: np.array(values, float) for x, values in first["rows"].items()}
        return first, verdicts
    except (LookupError, TypeError, AttributeError):
        raise UserError(f"{path} is no laws.json of this program: fit again") from None

def expected(first, table):
    """The loss of each row (n,) and the band of 95 % of single runs (2, n), the law's interval and
    the runs' scatter about it; None in its place if the law has no interval."""
    rows, fits, is_grid = first["rows"], first["fits"], first["name"] == "grid"
    formula = grid_law if is_grid else functools.partial(table_law, units=first["units"])
    whole, *others = np.log([formula(table, **numbers) for numbers in fits])
    off = np.log(rows[first["y"]] / formula(rows, **fits[0]))
    if is_grid:
        ends = interval(whole, others)
        off = off[rows["users"] >= np.median(rows["users"])]       # runs on few people scatter more
    else:
        ends = np.percentile(others, (2.5, 97.5), axis=0) if others else None
    if ends is None:
        return np.exp(whole), None
    free = max(1, first["n"] - len(fits[0]))
    scatter = student.ppf(.975, free) * rms(off) * math.sqrt(first["n"] / free)
    return np.exp(whole), np.exp(whole + np.hypot(ends - whole, scatter) * [[-1], [1]])

def predict(path, cells, out):
    """Predict each row of a CSV; if it has the column y, report the errors."""
    first, _ = read_law(path)
    rows = first["rows"]
    *settings, y = rows
    table = read_csv(cells, settings)
    losses, band = expected(first, table)
    beyond = [x for x in settings if max(table[x]) > 1.01 * max(rows[x])] or settings
    others = forecasts(rows, table, y, settings, beyond[0])
    prediction = [{"name": str(name), "loss": losses[i],
                   "single_run": None if band is None else band[:, i],
                   "forecasters": {who: each[i] if np.isfinite(each[i]) else None
                                   for who, each in others.items()}}
                  for i, name in enumerate(table.get("name", losses))]
    result = {"law": path.name, "provenance": provenance(), "cells": prediction}
    if y not in table:
        write_json(out / "prediction.json", result)
        return print(f"{len(losses)} predictions are in {out / 'prediction.json'}")
    measured = read_csv(cells, rows)[y]
    errors, inside = outcome(losses, others, measured), None
    for who, one in each_of(errors).items():
        print("{:22} n {n}, relative error: median {median_relative_error:.2%}, rms "
              "{rms_relative_error:.2%}".format(who, **one))
    if band is not None:
        inside = np.mean((band[0] <= measured) & (measured <= band[1]))
        print(f"{inside:.0%} of {len(measured)} runs inside the band")
    write_json(out / "outcome.json", {**result, **errors, "inside": inside, "measured": measured})

# ---------------------------------------------------------------- advice
def recommend(path, a):
    """The best plan for a budget; for a plan the model, the loss, whom to record next."""
    first, verdicts = read_law(path)
    users, each = a.users, a.hours_per_user
    budget = bool(a.hours) and (a.setup or math.inf) < a.hours
    require(first["name"] == "grid" and budget != bool(users and each),
            "--recommend takes a grid's laws.json, and --users and --hours-per-user, or --hours "
            "and a smaller --setup")
    if budget:                                         # users (H + setup) = hours
        h = first["parameters"].get("h", math.inf)
        require(h < 3 * max(first["rows"]["hours_per_user"]), f"{path}: a budget takes a grid of "
                "recordings so long that a person's hours run out: add longer ones")
        each = math.sqrt(h * a.setup)                  # where N is largest
        users = max(1, math.floor(a.hours / (each + a.setup)))
        each = a.hours / users - a.setup
        print(f"{users} people, {duration(each)} of each, if one's hours saturate as in this law.")
    names, sizes = zip(*sorted(first["models"].items(), key=lambda model: model[1]))
    plan = {"users": users, "hours_per_user": each, "params_encoder": np.array(sizes)}
    losses, band = expected(first, plan)
    best = np.argmax(losses < 1.01 * losses.min())
    print(f"Model {names[best]}, the smallest within 1 % of the law's best. "
          f"Expected loss {losses[best]:.4f}.")
    if band is not None:
        print("95 % of runs: {:.4f} to {:.4f}.".format(*band[:, best]))
    for claim in "hours_saturate", "users_minus_hours_exponent":
        print(verdicts[claim]["text"])
    people, times = first["rows"]["users"], first["rows"]["hours_per_user"]
    print(f"The grid has {min(people):.0f} to {max(people):.0f} people, {duration(min(times))} to "
          f"{duration(max(times))} of each: beyond that, the law is a guess.")

def duration(hours):
    """As one says it: 50 s, 13 min, 2.5 h."""
    seconds = round(hours * 3600)
    if seconds > 10600:
        return f"{hours:.2g} h"
    return f"{seconds / 60:.0f} min" if seconds > 575 or seconds % 60 == 0 else f"{seconds} s"

# ---------------------------------------------------------------- verdicts
def verdict(question, yes, no, value, ci95, margin=None, needs="more seeds or users", **more):
    """Holds if its margin (by default the interval) is all above 0; fails if all below."""
    low, high = margin or ci95 or (0, 0)
    needs = needs if margin or ci95 else "three seeds that have runs to compare"
    decision, answer = "can't tell here", f"Not decided by this grid: it needs {needs}."
    if low > 0:
        decision, answer = "holds", yes
    if high < 0:
        decision, answer = "doesn't hold", no
    return {"value": value, "ci95": ci95, "decision": decision, "text": f"{question} {answer}",
            **more}

def over_seeds(question, yes, no, values, **more):
    """The verdict on a value of each seed (k,). {} in `yes` is what twice as much then saves."""
    value = values.mean() if len(values) else None
    yes = yes.format(1 - 2 ** -(value or 0))
    return verdict(question, yes, no, value, interval(value, without_each(values)), **more)

def users_or_hours(table):
    """At equal hours in all: each seed, each held-out person, neighbours on a line."""
    values, won = users_save(table, table["loss"]), []
    people = table["people"].T if len(values) else np.zeros((0, 1))
    each, rest = ([users_save(table, losses).mean() for losses in means]
                  for means in (people, without_each(people)))
    runs = main_model(table)
    for number in {*runs["equal_hours"]}:
        cells = take(runs, runs["equal_hours"] == number)
        users = np.unique(cells["users"])
        for pair in zip(users, users[1:]):
            both = take(cells, np.isin(cells["users"], pair))
            gains = users_save(both, both["loss"])     # of the seeds that have both
            won += [bool(gains.mean() > 0)] if len(gains) else []
    positive = sum(bool(gain > 0) for gain in each)
    text = (f"At equal hours in all, more people, recorded for less time each, had the lower loss "
            f"in {sum(won)} of {len(won)} pairs of settings")
    text += f", and for {positive} of {len(each)} held-out people." if each else "."
    return over_seeds(
        "More people, or longer recordings of each?",
        f"More people. {text}", f"Longer recordings. {text}", values,
        ci95_people=interval(values.mean(), without_each(values), rest) if each else None,
        people={"positive": positive, "of": len(each)}, pairs={"won": sum(won), "of": len(won)})

def power_law(held):
    """Is the law better than both straight lines where users are held out, or worse than both? By
    a quarter of the error (rms): noise alone makes smaller differences."""
    margin, said, needs = [0, 0], "", "a law, and six runs at the most people"
    if held and held["n"] > 5:                         # fewer decide nothing
        law = held["rms_relative_error"]
        lines = sorted(error["rms_relative_error"] for who, error in held["forecasters"].items()
                       if who.startswith("line"))
        margin = [lines[0] - 1.25 * law, 1.25 * lines[1] - law]
        said = "it errs by {:.1%}, they by {:.1%} and {:.1%}".format(law, *lines)
        needs = f"errors that differ by a quarter; {said}"
    return verdict("Does the law predict the loss at the most people?",
                   f"Yes, better than straight lines: {said}.",
                   f"No, worse than straight lines: {said}.",
                   margin[0] or None, None, margin, needs)

def verdicts_of(table, first):
    """{claim: its verdict}, the central ones first."""
    loss, users, time = (np.log(table[x]) for x in ("loss", "users", "hours_per_user"))
    size, seeds, longest = table["params_encoder"], table["seed"], table["hours_per_user"].max()
    people = savings(loss, users, seeds, numbered(time, size))
    times = savings(loss, time, seeds, numbered(users, size))
    both = np.log10(size) * np.log2(table["hours"])    # ten times the size and twice the hours
    more = savings(loss, both, seeds, numbered(users, time), size)
    h, ends = ((first[key] or {}).get("h") for key in ("parameters", "ci95"))
    half = f"{60 * (h or 0):.1f} minutes"
    verdicts = {
        "more_people": over_seeds("Do more people help?", "Yes: twice the people have {:.0%} less "
                                  "loss.", "No.", people),
        "longer_recordings": over_seeds("Do longer recordings help?", "Yes: twice as long, the "
                                        "same people have {:.0%} less loss.", "No.", times),
        "users_minus_hours_exponent": users_or_hours(table),
        "hours_saturate": verdict("Do the hours of one person count less and less?",
                                  f"Yes: by the law {half} of one person count half, and endless "
                                  f"hours as {half} of new people.",
                                  f"Not within {duration(longest)}.", h, ends,
                                  ends and [3 * longest - ends[1], 3 * longest - ends[0]]),
        "power_law": power_law(first["held_out"].get("users")),
        "capacity_interaction": over_seeds("Do larger models gain more from more data?", "Yes.",
                                           "No, they gain less.", more)}
    for name, score in scores_of(table).items():
        rows = np.isfinite(score)
        verdicts[f"downstream_{name}"] = over_seeds(
            f"Does the score on {name} rise as the loss falls?", "Yes.", "No, it falls.",
            savings(score[rows], loss[rows], seeds[rows], size[rows] * 0))
    return verdicts

def scores_of(table):
    """{a set: macro-F1 of each run's probe on it, nan where it has none}."""
    return {name.removesuffix(SCORE): values for name, values in table.items()
            if name.endswith(SCORE) and values.dtype.kind == "f"}

def show(first):
    """The law and its numbers."""
    print(f"{first['y']} = {first['form']}   ({first['n']} rows)")
    numbers, ends = first.get("parameters", first), first["ci95"] or {}
    np.set_printoptions(precision=4)
    for name in [*GRID, "alpha"]:
        if name in numbers:
            print(f"  {name:6}", *(np.atleast_1d(each[name]) for each in (numbers, ends) if each))
    if first.get("holdout"):
        print("held out: {column}, median error {median_relative_error:.1%}".format(
            **first["holdout"]))

def screen(table, first, verdicts, drawn, out):
    """What a sweep ends with."""
    runs = main_model(table)
    times = np.unique(runs["hours_per_user"])
    model, *_ = models(runs)
    print(f"\nMean loss of {model}, users down, recorded of each across:")
    print(f"{'':8}", *(f"{duration(time):>8}" for time in times))
    for users in np.unique(runs["users"]):
        row = take(runs, runs["users"] == users)
        cells = [row["loss"][row["hours_per_user"] == time] for time in times]
        print(f"{users:8.0f}", *(f"{cell.mean():8.4f}" if len(cell) else f"{'-':>8}"
                                 for cell in cells))
    said = [verdict["text"] for verdict in verdicts.values() if verdict["value"] is not None]
    print("", *(f"- {text}" for text in said), "", sep="\n")
    for name in [*drawn][:1]:
        print(f"Open {out / name}.png; numbers and intervals are in {out / 'laws.json'}.")
    advice = f"python fit_laws.py {out / 'laws.json'} --recommend --hours 20 --setup 0.5"
    more = "the same grid with more USERS and HOURS"
    print("Next:", advice if verdicts["hours_saturate"]["decision"] == "holds" else more)

# ---------------------------------------------------------------- figures
def new_axes(title, xlabel, ylabel):
    from matplotlib.figure import Figure               # here, so that errors come fast
    ax = Figure((7, 5), layout="constrained").subplots()
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return ax

def curves(title, xlabel, x, table, labels, fits):
    """Means over seeds with their error against x, a colour and a curve of the law (without one, a
    line) for each label that has two points; open where --steps ended a run."""
    from matplotlib import colormaps, ticker
    labels = np.array([*labels])
    kinds = dict.fromkeys(labels[np.argsort(table["hours"], kind="stable")])
    kinds = [kind for kind in kinds if len({*table[x][labels == kind]}) > 1]
    if not kinds:
        return
    ax = new_axes(title, xlabel, "loss on held-out people")
    ax.set(xscale="log", yscale="log")
    for i, kind in enumerate(kinds):
        colour, line = colormaps["viridis"](.9 * i / len(kinds)), take(table, labels == kind)
        places, at = np.unique(line[x], return_index=True)
        cells = [take(line, line[x] == place) for place in places]
        means = np.array([cell["loss"].mean() for cell in cells])
        errors = [cell["loss"].std() / max(len(cell["loss"]) - 1, 1) ** .5 for cell in cells]
        ax.errorbar(places, means, errors, fmt="o", color=colour)
        capped = [np.isin(cell.get("converged"), ["False", "FALSE"]).any() for cell in cells]
        ax.plot(places[capped], means[capped], "o", color=colour, markerfacecolor="white",
                zorder=3)                              # above the points of errorbar
        law = grid_law(take(line, at), **fits[0]) if fits else means
        ax.plot(places, law, color=colour, label=kind)
    ax.set_xticks(np.unique(table[x]))
    ax.yaxis.set_major_locator(ticker.MaxNLocator(7))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:,.6g}")
    ax.minorticks_off()
    return ax

def errors_figure(held_out, noise):
    """Errors of the law and of the forecasters, a colour for each setting that was held out."""
    ax = new_axes("Largest setting, predicted from the rest", "error of the loss (rms, %)", "")
    for x, errors in held_out.items():
        error = {who: 100 * one["rms_relative_error"] for who, one in each_of(errors).items()}
        ax.plot([*error.values()], [*error], "o", label=x)
    ax.axvline(100 * (noise or 0), color="black", ls=":", label="a run, from its other seeds")
    ax.set_xlim(0)
    return ax

def scores_figure(table, scores):
    ax = new_axes("Linear probes of each run", "loss on held-out people",
                  "macro-F1, divided by its mean")
    for name, score in scores.items():
        mean = np.nanmean(score)
        ax.plot(table["loss"], score / mean, ".", label=f"{name}: mean {mean:.3f}")
    return ax

def figures(table, first):
    """{name: axes}, of those that have something to show."""
    runs, scores = main_model(table), scores_of(table)
    each, in_all = map(duration, runs["hours_per_user"]), map(duration, merged(runs["hours"]))
    data = [f"{users:.0f} people, {duration(hours)}"
            for users, hours in zip(table["users"], table["hours_per_user"])]
    law = first["fits"]
    law_of_sizes = law if "c" in (first["parameters"] or {}) else []
    drawn = {
        "loss_vs_users": curves("Colours: recorded of each", "people", "users", runs, each, law),
        "equal_hours": curves("Colours: recorded in all", "people", "users", runs, in_all, law),
        "loss_vs_params": curves("Colours: the data", "parameters of the encoder",
                                 "params_encoder", table, data, law_of_sizes),
        "predicted": first["held_out"] and errors_figure(first["held_out"], first["noise"]),
        "downstream": scores and scores_figure(table, scores)}
    drawn = {name: ax for name, ax in drawn.items() if ax}
    for ax in drawn.values():
        ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return drawn

# ---------------------------------------------------------------- the command line
FLAGS = {                # name: (default, range or choices, what it does)
    "out": (None, Path, "folder for laws.json, the figures and a grid's table"),
    "y": ("loss", str, "the column to explain"),
    "no_floor": (False, bool, "E is 0: with enough data any loss can be reached"),
    "holdout": (None, str, "a column: predict the rows where it is largest, too"),
    "group": (None, str, "a column: rows with the same value are resampled together"),
    "bootstrap": (1000, number(int, 0), "resampled tables for a table's intervals; 0: none"),
    "recommend": (False, bool, "advice, for --users and --hours-per-user or --hours and --setup"),
    "users": (None, number(float, 1), "people in the plan"),
    "hours_per_user": (None, number(float, 1e-3), "hours recorded of each"),
    "hours": (None, number(float, 1e-3), "the budget: hours in all, set-up included"),
    "setup": (None, number(float, 1e-3), "hours that a person costs before recording"),
    "predict": (None, Path, "a CSV of cells (name, factors): write prediction.json, or "
                "outcome.json with the errors if it has the column y"),
}

def main():
    p = build_parser(FLAGS, __doc__)
    p.add_argument("target", type=Path, help="folder of runs, a results.csv, a table, a laws.json")
    p.add_argument("--x", nargs="+", type=lambda term: tuple(term.split("*")), metavar="TERM",
                   help="columns of a table; those joined by * share a term")
    a = p.parse_args()
    require(a.out or a.recommend or a.predict, "give --out a folder to write to")
    if a.recommend:
        return recommend(a.target, a)
    if a.predict:
        return predict(a.target, a.predict, a.out or a.target.parent)
    if a.x:
        first, verdicts, drawn = table_study(a.target, a), {}, {}
    else:
        table = read_grid(collect(a.target, a.out) if a.target.is_dir() else a.target)
        first = grid_study(table)
        verdicts, drawn = verdicts_of(table, first), figures(table, first)
    write_json(a.out / "laws.json", {"laws": [first], "verdicts": verdicts,
                                     "provenance": provenance()})
    for name, ax in drawn.items():
        with replacing(a.out / f"{name}.png") as path:
            ax.figure.savefig(path, dpi=150)
    if first["fits"]:
        show(first)
    if verdicts:
        screen(table, first, verdicts, drawn, a.out)

if __name__ == "__main__":
    command(main)
