"""The laws against what is known: planted laws, a published fit, gradients by differences, and tables nobody can fit.

The coverage study makes results/coverage.md, in about 20 minutes of two cores:
    COVERAGE=results/coverage.md python -m pytest -m slow tests/test_laws.py
"""
import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import differential_evolution

import fit_laws
from data import Refused
from fit_laws import (SHAPES, Form, Scale, analyse, capacities, collect, estimate, fit, grid_of_starts, loss_at,
                      objective, prediction_band, read_table, resample)

ROOT = Path(__file__).parent.parent
CHINCHILLA = ROOT.parent / "shared" / "tables" / "chinchilla.csv"
E, A, ALPHA = 1.8, (480., 2100.), (.35, .37)                     # the planted law: like Chinchilla's


def run(*arguments, **options):
    """The command line, as a user gives it."""
    words = [sys.executable, str(ROOT / "fit_laws.py"), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, **options)


def planted(rng, n=120, noise=.005, E=E, A=A, alpha=ALPHA, ranges=((1e7, 1e10), (1e9, 1e12))):
    """A table of a known law: x log-uniform, errors log-normal."""
    x = [np.exp(rng.uniform(*np.log(ends), n)) for ends in ranges]
    y = E + sum(a * column ** -b for a, b, column in zip(A, alpha, x))
    return {**{f"x{i}": column for i, column in enumerate(x)}, "loss": y * np.exp(noise * rng.normal(size=n))}


def make_grid(out, users=(2, 4, 8, 16, 32), caps=(.05, .1, .2), widths=(8, 16, 32), seeds=(0, 1), probe=True, **more):
    """Finished cells as pretrain.py and finetune.py leave them, with losses from a known law."""
    rng = np.random.default_rng(0)
    for u, h, w, s in [(u, h, w, s) for u in users for h in caps for w in widths for s in seeds]:
        P = 50 * w ** 2
        loss = (.15 + .2 * u ** -.6 + .01 * h ** -.4 + 3 * P ** -.5) * math.exp(.003 * rng.normal())
        cell = out / f"u{u}-h{h}-{w}x2x2-s{s}"
        (cell / "finetune").mkdir(parents=True)
        (cell / "result.json").write_text(json.dumps({
            "loss": loss, "loss_last": loss, "baseline_loss": .6, "users": u, "hours": u * h, "hours_per_user": h,
            "hours_cap": h, "windows": 100, "params": P + 9, "params_encoder": P, "width": w, "depth": 2, "heads": 2,
            "patch": 5, "mask_ratio": .75, "steps": 100, "lr": .01, "seed": s, "data": "simulated", "versions": {},
            **more}))
        if probe:
            scores = {"macro_f1": 1 - loss, "accuracy": 1 - loss, "macro_f1_sd": .01}
            (cell / "finetune" / "ucihar-probe.json").write_text(json.dumps(scores))
    return out


# ---------------------------------------------------------------- the fit
@pytest.mark.parametrize("floor", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_is_the_slope_of_the_objective(shape, floor):
    rng, form = np.random.default_rng(0), Form(("power law", shape), floor)
    log_x, log_y, weights = rng.uniform(-1, 1, (2, 30)), rng.normal(size=30), rng.integers(0, 3, (1, 30)).astype(float)
    scale = Scale(np.zeros(2), np.ones(2), log_y.min())
    theta = grid_of_starts(form, scale, log_x, log_y)[:1] + .1
    value = lambda theta: objective(theta, form, scale, log_x, log_y, weights)
    slopes = [(value(theta + step)[0][0] - value(theta - step)[0][0]) / 2e-6 for step in 1e-6 * np.eye(theta.size)]
    np.testing.assert_allclose(value(theta)[1][0], slopes, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("unit", [1e-9, 1e9])
def test_a_planted_law_is_found_in_any_units_and_held_by_its_intervals(unit):
    table = planted(np.random.default_rng(2))
    table["loss"] *= unit
    fitted = fit(table, ["x0", "x1"], "loss", bootstrap=200)
    truths = [E * unit, *np.log(np.multiply(A, unit)), *ALPHA]
    quantities = [lambda units: units["E"], lambda units: units["log_A"][:, 0], lambda units: units["log_A"][:, 1],
                  lambda units: units["alpha"][:, 0], lambda units: units["alpha"][:, 1]]
    for truth, quantity in zip(truths, quantities):
        value, (low, high) = estimate(fitted, quantity)
        assert low < truth < high and value == pytest.approx(truth, rel=.1)
    assert not fitted.warnings


@pytest.mark.parametrize("alpha", [.02, .3, 2.])
def test_a_pure_power_law_is_found_with_a_floor_and_without(alpha):
    table = planted(np.random.default_rng(0), n=40, noise=1e-3, E=0., A=(5.,), alpha=(alpha,), ranges=((1e2, 1e8),))
    for floor in (True, False):
        fitted = fit(table, ["x0"], "loss", Form(("power law",), floor))
        assert fitted.units["alpha"][0, 0] == pytest.approx(alpha, rel=.1 if floor else .02)
    assert fitted.units["E"][0] == 0


def test_no_search_finds_a_lower_objective():
    """Differential evolution needs neither starts nor gradients, and comes no lower on a noisy table with outliers."""
    table = planted(np.random.default_rng(3), n=60, noise=.03)
    table["loss"][::9] *= 1.3
    fitted = fit(table, ["x0", "x1"], "loss")
    log_x, log_y = np.log([table["x0"], table["x1"]]), np.log(table["loss"])
    value = lambda theta: objective(theta.T, fitted.form, fitted.scale, log_x, log_y, 1.)[0]
    bounds = [(-8, 8), (-8, 3), (-3, 3), (-8, 3), (-3, 3)]
    found = differential_evolution(value, bounds, seed=0, vectorized=True, updating="deferred", maxiter=300)
    assert fitted.objective <= found.fun * (1 + 1e-7)


def test_flat_surfaces_and_parameters_at_a_bound_are_told():
    x = np.geomspace(1, 1e3, 12)
    assert any("no floor" in said for said in fit({"x": x, "loss": x ** -.3}, ["x"], "loss").warnings)
    useless = {"x": x, "z": np.random.default_rng(0).permutation(x), "loss": 1 + x ** -.5}
    assert any("z" in said for said in fit(useless, ["x", "z"], "loss").warnings)


@pytest.mark.skipif(not CHINCHILLA.is_file(), reason="no ../shared/tables/chinchilla.csv on this machine")
def test_the_published_chinchilla_fit():
    fitted = fit(read_table(CHINCHILLA, ["params", "tokens", "loss"]), ["params", "tokens"], "loss", bootstrap=300)
    assert fitted.objective <= 0.00101827 * (1 + 1e-5)
    assert fitted.units["E"][0] == pytest.approx(1.8172, abs=.002)
    np.testing.assert_allclose(fitted.units["alpha"][0], [.3473, .3672], atol=.005)
    assert estimate(fitted, lambda units: units["E"])[1] == pytest.approx((1.769, 1.871), rel=.01)
    assert estimate(fitted, lambda units: units["alpha"][:, 0])[1] == pytest.approx((.317, .373), rel=.03)
    assert estimate(fitted, lambda units: units["alpha"][:, 1])[1] == pytest.approx((.331, .415), rel=.03)


# ---------------------------------------------------------------- how far it is to be trusted
def test_whole_seeds_are_resampled_and_few_of_them_widen_the_intervals():
    table, seeds = planted(np.random.default_rng(0), n=60), np.arange(60) % 6
    weights, widen = resample({**table, "group": seeds}, ["x0", "x1"], 50, np.random.default_rng(0))
    assert all(np.ptp(weights[:, seeds == seed], axis=1).max() == 0 for seed in range(6)), "a seed's rows come together"
    assert widen == pytest.approx(math.sqrt(6 / 5) * 2.571 / 1.96, rel=1e-3), "as for a mean of six values"
    assert resample(table, ["x0", "x1"], 50, np.random.default_rng(0))[1] == 1, "rows as they are"
    table["loss"] *= np.exp(.03 * np.random.default_rng(1).normal(size=6))[seeds]           # what a seed's runs share
    by_seed, by_row = (fit(one, ["x0", "x1"], "loss", bootstrap=200) for one in ({**table, "group": seeds}, table))
    around = lambda fitted: np.ptp(estimate(fitted, lambda units: loss_at(units, [1e9, 1e11]))[1])
    assert around(by_seed) > 1.5 * around(by_row)


def test_two_seeds_are_resampled_among_the_runs_of_one_user_count():
    table = {"x": np.repeat([2., 4, 8, 16], 6)}
    fit_laws.group_by(table, ["0", "1"] * 12, table["x"])
    weights, _ = resample(table, ["x"], 50, np.random.default_rng(0))
    assert (np.add.reduceat(weights, range(0, 24, 6), axis=1) == 6).all(), "each count keeps its weight"
    assert np.ptp(weights[:, :6:2], axis=1).max() == 0, "all runs on one draw of users come together"


def test_the_largest_scale_is_predicted_from_the_rest(tmp_path):
    table = planted(np.random.default_rng(0), noise=.002)
    with open(tmp_path / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows([table, *zip(*table.values())])
    done = run(tmp_path / "t.csv", "--x", "x0", "x1", "--holdout", "x1", "--bootstrap", 50, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    first = json.loads((tmp_path / "out" / "laws.json").read_text())["laws"][0]
    assert first["holdout"]["column"] == "x1" and first["holdout"]["n"] == 12
    assert first["holdout"]["median_relative_error"] < .005 and "held out, largest x1" in done.stdout
    assert first["ci95"]["alpha"][0][0] < ALPHA[0] < first["ci95"]["alpha"][0][1]
    assert set(os.listdir(tmp_path / "out")) == {"laws.json", "fit.png", "residuals.png", "held_out.png"}


@pytest.mark.parametrize("made, claimed", [(lambda x: .3 + x ** -.5, True), (lambda x: .3 + np.exp(-x / 20), False),
                                           (lambda x: 2 - .3 * np.log(x), False)])
def test_a_power_law_is_claimed_only_where_one_made_the_data(made, claimed):
    x = np.geomspace(1, 100, 30)
    table = {"x": x, "loss": made(x) * np.exp(.003 * np.random.default_rng(0).normal(size=30))}
    verdict = analyse(table, ["x"], "loss", bootstrap=0)[1]["power_law_of_x"]
    assert verdict["claimed"] == claimed, verdict["text"]


@pytest.mark.parametrize("D", [10., 1000.])
def test_the_capacity_that_fits_keeps_its_promises(D):
    units = {"E": np.array([.2]), "log_A": np.log([[3., 50.]]), "alpha": np.array([[.3, .5]])}
    P = capacities(units, [D], "balanced")[0]
    assert loss_at(units, [1.001 * D, P])[0] == pytest.approx(loss_at(units, [D, 1.001 * P])[0], rel=1e-6)
    P = capacities(units, [D], "within_1_percent")[0]
    assert loss_at(units, [D, P])[0] == pytest.approx(1.01 * loss_at(units, [D, 1e300])[0])


# ---------------------------------------------------------------- grids
def test_a_grid_becomes_a_table_laws_verdicts_figures_and_advice(tmp_path):
    out = tmp_path / "out"
    done = run(make_grid(tmp_path / "runs"), "--out", out, "--bootstrap", 60)
    assert done.returncode == 0, done.stderr
    with open(out / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 90 and list(rows[0])[:3] == ["name", "data", "users"] and float(rows[0]["ucihar_macro_f1"]) > .4
    found = json.loads((out / "laws.json").read_text())
    first, verdicts = found["laws"][0], found["verdicts"]
    assert first["x"] == ["users", "hours_per_user", "params_encoder"]
    assert all(low < truth < high for truth, (low, high) in zip((.6, .4, .5), first["ci95"]["alpha"]))
    assert verdicts["equal_hours_loss_ratio"]["ci95"][1] < 1, "by this law users are worth more than hours"
    assert verdicts["downstream_ucihar"]["value"] == pytest.approx(-1)
    figures = {f"{name}.png" for name in ("loss_vs_hours loss_vs_params users_vs_hours residuals held_out capacity "
                                          "downstream").split()}
    assert set(os.listdir(out)) == figures | {"laws.json", "results.csv"}
    told = run(out / "laws.json", "--recommend", "--users", 30, "--hours-per-user", 2)
    assert told.returncode == 0 and "record new users" in told.stdout and "beyond twice the fitted range" in told.stdout
    truth = .15 + .2 * 30 ** -.6 + .01 * 2 ** -.4 + 3 * 51200 ** -.5
    assert float(told.stdout.split("expected loss")[1].split()[0]) == pytest.approx(truth, rel=.05)


def test_the_smallest_grid_gives_a_law_of_what_it_varies(tmp_path):
    make_grid(tmp_path / "runs", users=(2, 4, 8), caps=(.1,), widths=(8, 16), seeds=(0,), probe=False)
    done = run(tmp_path / "runs", "--out", tmp_path / "out", "--bootstrap", 20)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "laws.json").read_text())["laws"][0]["x"] == ["users"]
    assert "hours_per_user is left out" in done.stdout and "params_encoder is left out" in done.stdout


def test_cells_that_are_not_done_and_mixed_configurations_are_refused_unless_asked_for(tmp_path):
    make_grid(tmp_path, seeds=(0,), probe=False)
    (tmp_path / "u64-h0.1-8x2x2-s0").mkdir()
    with pytest.raises(Refused, match="1 of 46 cells.*u64-h0.1-8x2x2-s0"):
        collect(tmp_path)
    assert len(collect(tmp_path, partial=True)) == 45
    other = json.loads((tmp_path / "u32-h0.1-8x2x2-s0" / "result.json").read_text())
    (tmp_path / "u64-h0.1-8x2x2-s0" / "result.json").write_text(json.dumps({**other, "users": 64, "mask_ratio": .5}))
    with pytest.raises(Refused, match="mask_ratio 0.75.*0.5"):
        collect(tmp_path)
    assert len(collect(tmp_path, mixed=True)) == 46


# ---------------------------------------------------------------- input nobody can fit
ROWS = [f"{2 ** i},{3 ** (i % 4)},{1 + 2 ** -i}" for i in range(9)]
GOOD = "\n".join(["x,z,loss", *ROWS]) + "\n"
BAD = {
    "four rows": ("\n".join(["x,z,loss", *ROWS[:4]]), "4 rows"),
    "two values": ("x,loss\n" + "1,3\n2,2\n" * 4, "2 distinct"),
    "zero": (GOOD.replace("\n8,", "\n0,"), "line 5"),
    "negative": (GOOD.replace("\n8,", "\n-8,"), "line 5"),
    "not finite": (GOOD.replace("\n8,", "\nnan,"), "line 5"),
    "infinite": (GOOD.replace("\n8,", "\ninf,"), "line 5"),
    "text": (GOOD.replace("\n8,", "\neight,"), "not a number"),
    "blank": (GOOD.replace("\n8,", "\n,"), "not a number"),
    "no such column": (GOOD.replace("x,", "y,", 1), "0 columns 'x'"),
    "a column twice": (GOOD.replace("x,z", "x,x", 1), "2 columns 'x'"),
    "ragged": (GOOD + "1,2\n", "2 fields"),
    "only a header": ("x,z,loss\n", "0 rows"),
    "empty": ("", "nothing"),
    "binary": ("\udcff\udcfe\x00", "CSV")}


@pytest.mark.parametrize("why", BAD)
def test_a_table_that_cannot_be_fitted_is_refused_in_a_sentence(why, tmp_path, monkeypatch):
    text, words = BAD[why]
    (tmp_path / "t.csv").write_bytes(text.encode(errors="surrogateescape"))
    line = ["fit_laws.py", str(tmp_path / "t.csv"), "--x", "x", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(Refused, match=words):
        fit_laws.main()
    assert os.listdir(tmp_path) == ["t.csv"]


@pytest.mark.parametrize("arguments", [
    "nothing.csv --x x --out out", "t.csv --x x x --out out", "t.csv --x x", "t.csv --x x --out out --bootstrap -1",
    "folder --out out", "laws.json --recommend --users 3"])
def test_a_refusal_is_one_line_and_exit_2_and_leaves_nothing(arguments, tmp_path):
    (tmp_path / "t.csv").write_text(GOOD)
    (tmp_path / "folder").mkdir()
    (tmp_path / "laws.json").write_text('{"laws": [')
    before = sorted(os.listdir(tmp_path))
    done = run(*arguments.split(), cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert sorted(os.listdir(tmp_path)) == before


# ---------------------------------------------------------------- the coverage study
def simulated(rng, design, n, S, shared):
    """A table with 1 % of noise and S seeds, whose runs share log-normal moves of E and each A (in a grid: those on one
    draw of users); names of its factors; the truth, E, log A and alpha; losses of new runs of new seeds."""
    if design == "grid":
        x = np.array([(u, h, P) for u in (4, 8, 16, 32, 64) for h in (.05, .1, .2, .4) for P in (2e4, 1.5e5, 8e5)
                      for _ in range(S)]).T
        law = (.17, (.16, .012, 60.), (.6, .5, .75))
    elif design == "one factor":
        x, law = np.geomspace(1, 2e3, n)[None], (.2, (.5,), (.4,))
    else:
        x, law = np.exp(rng.uniform(*np.log([[1e7, 1e9], [1e10, 1e12]]), (n, 2))).T, (E, A, ALPHA)
    rows = np.arange(x.shape[1])
    groups = rows % max(S, 1)
    if design == "grid":
        groups = np.unique([groups, x[0]], axis=1, return_inverse=True)[1].ravel()

    def losses(groups):
        terms = np.stack([np.full(len(rows), law[0]), *(a * column ** -b for a, b, column in zip(*law[1:], x))])
        moves = np.exp(shared * rng.normal(size=(len(terms), groups.max() + 1)))
        return (terms * moves[:, groups]).sum(0) * np.exp(.01 * rng.normal(size=len(rows)))

    table = {**{f"x{i}": column for i, column in enumerate(x)}, "loss": losses(groups)}
    if S:
        table.update(group=groups, **({"stratum": x[0]} if design == "grid" else {}))
    return table, [f"x{i}" for i in range(len(x))], [law[0], *np.log(law[1]), *law[2]], losses(rows)


DESIGNS = [                                                      # design, rows, seeds, what the runs of a seed share
    ("one factor", 12, 0, 0.), ("two factors", 60, 0, 0.), ("two factors", 240, 0, 0.), ("two factors", 60, 5, .02),
    ("grid", 120, 2, .02)]


@pytest.mark.slow
def test_the_intervals_hold_the_truth_in_90_to_98_per_cent_of_simulated_tables(tmp_path):
    tables, rng, shares = int(os.environ.get("TABLES", 200)), np.random.default_rng(0), []
    lines = ["| table | rows | seeds | shared | E | each A | each exponent | their difference | new runs in the band |"]
    lines.append("|---" * 9 + "|")
    for design, n, S, shared in DESIGNS:
        held = []
        for _ in range(tables):
            table, names, truth, new = simulated(rng, design, n, S, shared)
            fitted, k = fit(table, names, "loss", bootstrap=200), len(names)
            columns = [("log_A", i) for i in range(k)] + [("alpha", i) for i in range(k)]
            quantities = [lambda units: units["E"], *(lambda units, c=c: units[c[0]][:, c[1]] for c in columns),
                          lambda units: units["alpha"][:, 0] - units["alpha"][:, -1]]
            ends = [estimate(fitted, quantity)[1] for quantity in quantities]
            low, high = prediction_band(fitted, [table[name][::7] for name in names])
            held.append([low <= value <= high for value, (low, high) in zip([*truth, truth[1 + k] - truth[-1]], ends)]
                        + [((low <= new[::7]) & (new[::7] <= high)).mean()])
        share = 100 * np.mean(held, 0)
        shares.append(share[:-1 if len(names) > 1 else -2])
        cells = [share[:1], share[1:1 + k], share[1 + k:1 + 2 * k], share[-2:-1] if k > 1 else [], share[-1:]]
        lines.append(f"| {design} | {n} | {S or 'none'} | {shared:.0%} | "
                     + " | ".join(", ".join(f"{value:.1f}" for value in cell) for cell in cells) + " |")
        print(lines[-1], flush=True)
        report = REPORT.format(tables=tables, lines="\n".join(lines))
        Path(os.environ.get("COVERAGE", tmp_path / "coverage.md")).write_text(report)
    assert 90 <= np.mean(np.concatenate(shares)) <= 98


REPORT = """# Do the 95 % intervals hold the truth?

In how many per cent of {tables} simulated tables of a known law the interval holds the true value, and how many per
cent of new runs fall in the prediction band: 1 % of noise in the loss, 200 bootstraps. `shared`: by how much the runs
of a seed move E and each A together (in the grid, the runs of one draw of users).

{lines}

    COVERAGE=results/coverage.md python -m pytest -m slow tests/test_laws.py
"""
