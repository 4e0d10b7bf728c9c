"""The laws against what is known: planted laws, a published fit, planted claims, bad input.

`COVERAGE=results/coverage.md python -m pytest -m slow tests/test_laws.py` writes that page's tables
again (five minutes).
"""
import csv, json, os, re, shutil, subprocess, sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.optimize import differential_evolution

import data
import fit_laws
from conftest import read
from data import UserError
from fit_laws import (FACTORS, HUBER, TERMS, Fit, Shape, analyse, estimate, fit, objective,
                      resampled, slopes_apart, take, verdicts_of)

ROOT = Path(__file__).parent.parent
CHINCHILLA = ROOT.parent / "shared" / "tables" / "chinchilla.csv"
SIZES = {"16x2x2": 6496, "32x3x2": 38000, "64x3x4": 148992, "128x4x4": 790000}
COUPLED = Shape((("users", "hours_per_user"), ("params_encoder",)), coupled=True)
DATA = Shape((("users", "hours_per_user"),))
HOURS = [.0139 * 2 ** i for i in range(5)]
DEFAULTS = SimpleNamespace(y="loss", bootstrap=1, holdout=None, target="grid", no_floor=False,
                           law="", converged_only=False, max_unexplained=.93)
pytestmark = pytest.mark.usefixtures("elsewhere")

def write_table(path, table):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([table, *zip(*table.values())])

def planted(rng, n=120, noise=.005):
    """Like the published language-model tables: a term for parameters, one for tokens."""
    params, tokens = (np.exp(rng.uniform(*np.log(ends), n)) for ends in ((1e7, 1e10), (1e9, 1e12)))
    loss = 1.8 + 480 * params ** -.35 + 2100 * tokens ** -.37
    return {"params": params, "tokens": tokens, "loss": loss * np.exp(noise * rng.normal(size=n))}

def true_loss(users, hours, size, a, b, delta=.4):
    """About .23 for 12 users x .0556 h and 64x3x4; delta None: of users and hours alone."""
    by_data = .13 * (users / 12) ** -a * (hours / .0556) ** -b
    by_size = .05 * (size / 148992) ** -.4 * (delta is not None)
    delta = delta or 1
    return .1 + (by_data ** (1 / delta) + by_size ** (1 / delta)) ** delta

def grid(rng, seeds=3, shared=.02, a=.3, b=.15, delta=.4, noise=.01):
    """The real grid's shape: all of users x hours at 64x3x4, other sizes at some of them."""
    rows = [(u, h, "64x3x4", s) for s in range(seeds) for u in (3, 6, 12, 24, 48) for h in HOURS]
    if delta is not None:
        rows += [(u, h, size, s) for s in range(min(3, seeds)) for u in (6, 24, 48)
                 for h in HOURS[::2] for size in ("16x2x2", "32x3x2", "128x4x4")]
    users, hours, size, seed = map(np.array, zip(*rows))
    size = np.array([SIZES[name] for name in size])
    people = shared * rng.normal(size=(seeds, 49))  # those who have the same people drawn share it
    log_error = people[seed, users] + noise * rng.normal(size=len(rows))
    return {"users": users * 1., "hours_per_user": hours, "cap": hours, "hours": users * hours,
            "params_encoder": size * 1., "seed": seed,
            "loss": true_loss(users, hours, size, a, b, delta) * np.exp(log_error)}

def write_runs(table):
    """runs/: finished cells as pretrain.py and finetune.py leave them, as far as they are read."""
    names = {size: name for name, size in SIZES.items()}
    for values in zip(*table.values()):
        row = {key: value.item() for key, value in zip(table, values)}
        loss, size = row["loss"], names[row["params_encoder"]]
        cell = Path(f"runs/u{row['users']:.0f}-h{row['cap']:.4g}-{size}-s{row['seed']}")
        people = [{"source": "pool", "user": f"p{share}", "loss": loss * share}
                  for share in (.7, .9, 1.1, 1.3)]
        row |= {"width": size, "hours_cap": row["cap"], "unexplained": loss, "converged": True}
        config = {key: row[key] for key in ("users", "hours_per_user", "width", "seed")}
        config |= {"mask_ratio": .75, "lr": None, "fingerprint": "abc"}
        data.write_json(cell / "result.json", {**row, "people": people, "config": config})
        curve = [{"step": step, "flops": step * row["params_encoder"] * 1e5,
                  "loss": loss * (1 + 30 / step)} for step in (30, 100, 300, 900)]
        (cell / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curve))
        scores = {"macro_f1": 1 - loss, "accuracy": .9, "macro_f1_sd": .01}
        data.write_json(cell / "finetune/ucihar-probe.json", scores)

def apart(table):
    """The interval of users against hours, by log-slopes."""
    return estimate(lambda rows: slopes_apart(rows, "loss"), resampled(table, "loss"))["ci95"]

# ---------------------------------------------------------------- the fit
@pytest.mark.parametrize("shape", [COUPLED, replace(COUPLED, curve=("logarithm", "users"))])
def test_the_gradient_is_the_slope_of_the_objective(shape):
    rng = np.random.default_rng(0)
    u, log_y, theta = rng.uniform(-1, 1, (3, 30)), rng.normal(size=30), np.linspace(.2, .5, 7)
    value = lambda theta: objective(theta, u, log_y, shape)
    slopes = [(value(theta + step)[0] - value(theta - step)[0]) / 2e-6 for step in 1e-6 * np.eye(7)]
    np.testing.assert_allclose(value(theta)[1], slopes, rtol=1e-5)

@pytest.mark.parametrize("unit", [1e-9, 1e9])
def test_a_planted_law_is_found_in_any_units(unit):
    table = planted(np.random.default_rng(2), noise=.001)
    table["loss"] *= unit
    found = fit(table, Shape((("params",), ("tokens",))), "loss").numbers()
    assert found["E"] == pytest.approx(1.8 * unit, rel=.01)
    np.testing.assert_allclose(found["alpha"], [.35, .37], rtol=.03)

def test_a_planted_law_of_joined_and_coupled_factors_is_found():
    found = fit(grid(np.random.default_rng(0), 5, 0, noise=.001), COUPLED, "loss").numbers()
    np.testing.assert_allclose(found["alpha"], [.3, .15, .4], rtol=.05)
    assert found["E"] == pytest.approx(.1, abs=.005)
    assert found["delta"] == pytest.approx(.4, abs=.02)

def test_an_exponential_over_six_decades_is_found():
    tokens = np.geomspace(1e6, 1e12, 40)
    table = {"tokens": tokens, "loss": .2 + .8 * np.exp(-tokens / 3e8)}
    found = fit(table, Shape((("tokens",),), curve=("exponential", "tokens")), "loss").numbers()
    np.testing.assert_allclose([found["E"], *found["A"], *found["alpha"]], [.2, .8, 1 / 3e8], 1e-3)

def test_no_search_finds_a_lower_objective():
    """Differential evolution needs neither starts nor gradients, and comes no lower."""
    table = planted(np.random.default_rng(3), n=60, noise=.03)
    table["loss"][::9] *= 1.3
    shape = Shape((("params",), ("tokens",)))
    fitted = fit(table, shape, "loss")
    problem = fitted.scaled(table), np.log(table["loss"] / fitted.unit), shape
    value = lambda theta: objective(np.append(theta, 0.), *problem)[0] * HUBER ** 2
    bounds = [(0, 1.5), (-8, 3), (-8, 3), (0, 6), (0, 6)]
    found = differential_evolution(value, bounds, seed=0, maxiter=150)
    assert fitted.objective <= found.fun * (1 + 1e-6)

def test_fits_to_resampled_tables_end_at_their_minimum():
    table, ends = grid(np.random.default_rng(5), 1, .02, delta=None), []
    whole, rng = fit(table, DATA, "loss"), np.random.default_rng(0)
    for _ in range(12):
        drawn = take(table, rng.integers(25, size=25))
        ends.append(fit(drawn, DATA, "loss", whole).objective / fit(drawn, DATA, "loss").objective)
    assert sum(end < 1.001 for end in ends) >= 11

@pytest.mark.skipif(not CHINCHILLA.is_file(), reason="no ../shared/tables on this machine")
def test_the_published_chinchilla_fit(run):
    status, _, error = run(f"fit_laws.py {CHINCHILLA} --x params tokens --holdout tokens "
                           "--bootstrap 150 --out out")
    assert status == 0, error
    first = read("out/laws.json")["laws"][0]
    assert first["objective"] <= .00101827 * (1 + 1e-5)
    assert first["E"] == pytest.approx(1.8172, abs=.002)
    np.testing.assert_allclose(first["alpha"], [.3473, .3672], atol=.005)
    np.testing.assert_allclose(first["ci95"]["alpha"], [(.317, .373), (.331, .415)], rtol=.06)
    assert first["holdout"]["column"] == "tokens" and first["holdout"]["n"] == 24

# ---------------------------------------------------------------- intervals
def test_the_interval_of_a_mean_over_seeds_is_the_textbook_one():
    values = np.random.default_rng(0).normal(size=5)
    table = {"seed": np.arange(5), "loss": values}
    low, high = estimate(lambda t: t["loss"].mean(), resampled(table, "loss"))["ci95"]
    assert high - low == pytest.approx(2 * 2.7764 * values.std(ddof=1) / 5 ** .5, rel=1e-4)

def test_held_out_people_widen_the_interval_and_two_seeds_give_none():
    rng, mean = np.random.default_rng(0), lambda table: table["loss"].mean()
    table = {"seed": np.arange(12) % 3, "people": rng.normal(size=(12, 6)) + rng.normal(size=6)}
    table["loss"] = table["people"].mean(1)
    found = estimate(mean, resampled(table, "loss"))
    assert np.diff(found["ci95_people"]) > 1.5 * np.diff(found["ci95"])
    assert estimate(mean, resampled(take(table, table["seed"] < 2), "loss"))["ci95"] is None

def test_the_interval_of_a_correlation_stays_below_one():
    found = estimate(np.mean, {"whole": [[.9]], "seeds": [[.8], [.9], [1.]]}, "correlation")
    assert found["value"] == .9 and -1 < found["ci95"][0] < .9 < found["ci95"][1] < 1

def test_users_and_hours_that_are_worth_the_same_are_seldom_told_apart_and_others_are():
    rng, claims = np.random.default_rng(0), {.2: [], .3: []}
    for a, b in [(.2, .2), (.3, .15)] * 40:
        table = grid(rng, 5, .02, a, b)
        low, high = apart(table)
        claims[a].append(low > 0 or high < 0)
    assert np.mean(claims[.2]) <= .12 and np.mean(claims[.3]) >= .9

# ---------------------------------------------------------------- verdicts
def test_no_difference_is_not_claimed():
    table = grid(np.random.default_rng(4), 3, .02, .2, .2, delta=None)
    verdicts = verdicts_of(analyse(table, TERMS, DEFAULTS))
    for claim in ("users_minus_hours_exponent", "twice_users_or_hours", "exponent_ratio"):
        assert verdicts[claim]["decision"] == "can't tell here"

def test_a_logarithm_is_not_called_a_power_law():
    table = grid(np.random.default_rng(0), 3, 0, delta=None, noise=.002)
    power_law = true_loss(table["users"], table["hours_per_user"], 1, .3, .15, None)
    table["loss"] += .3 - power_law - .04 * np.log(table["users"])
    verdicts = verdicts_of(analyse(table, TERMS, DEFAULTS))
    assert verdicts["power_law_of_users"]["decision"] != "holds"

def test_three_settings_refute_no_power_law_since_other_curves_pass_through_them_too():
    table = {"x": np.repeat([1e6, 1e7, 1e8], 10), "seed": np.tile(np.arange(5), 6)}
    for draw in range(6):
        noise = np.exp(.01 * np.random.default_rng(draw).normal(size=30))
        table["loss"] = (1 + 100 * table["x"] ** -.3) * noise
        verdicts = verdicts_of(analyse(table, (("x",),), DEFAULTS))
        assert verdicts["power_law_of_x"]["decision"] != "doesn't hold"

def test_what_is_held_out_chooses_nothing_in_its_own_prediction():
    table, size, predicted = grid(np.random.default_rng(0), 3), "params_encoder", []
    for factor in (1, 1.5):
        losses = np.where(table[size] == 790000, factor, 1) * table["loss"]
        changed = {**table, "loss": losses}
        shape = fit_laws.saturating(changed, Shape((("data",), (size,)), enough=1.), "loss")
        law = fit(changed, shape, "loss")
        predicted.append(fit_laws.hold_out(changed, law, "loss", size)["predicted"])
    np.testing.assert_allclose(*predicted, rtol=2e-3)

def test_the_frontier_counts_runs_that_were_cut_off():
    runs = [np.array([[1e9, 2e9], [.5, end]]) for end in (.4, .3)]         # flops, loss
    best = fit_laws.frontier({"curve": np.fromiter(runs, object), "used": np.array([True, False]),
                              "params_encoder": np.array([6496, 37632])})
    assert best["loss"][-1] == .3 and best["params_encoder"][-1] == 37632

# ---------------------------------------------------------------- grids
def test_a_grid_becomes_tables_laws_figures_and_advice(run):
    rng = np.random.default_rng(1)
    write_runs(grid(rng, 5, .01))
    assert run("fit_laws.py runs --out out")[0] == 0
    laws, verdicts = read("out/laws.json")["laws"], read("out/laws.json")["verdicts"]
    assert laws[0]["x"] == ["users", "hours_per_user", "params_encoder"] and "delta" in laws[0]
    assert {law["name"][:2] for law in laws[:6]} == {"M0", "M1", "M2", "MA", "MC"}
    for claim in ("power_law_of_users", "power_law_of_hours_per_user", "exponent_ratio",
                  "users_minus_hours_exponent", "twice_users_or_hours", "capacity_interaction"):
        assert verdicts[claim]["decision"] == "holds", claim
    assert verdicts["power_law_of_params_encoder"]["decision"] != "doesn't hold"
    low, high = verdicts["exponent_ratio"]["ci95"]
    assert low < 2 < high
    assert verdicts["downstream_ucihar"]["value"] == pytest.approx(1)
    points = verdicts["compute_frontier"]["points"]
    assert np.all(np.diff(points["loss"]) <= 0) and len(points["flops"]) == 60
    assert {"users_vs_hours.png", "frontier.png", "fit.png"} <= set(os.listdir("out"))
    assert run("fit_laws.py out/results.csv --law MC --out other")[0] == 0
    assert read("other/laws.json")["laws"][0]["x"] == ["data", "params_encoder"]

    _, advice, _ = run("fit_laws.py out/laws.json --recommend --users 30 --hours-per-user 2")
    assert "from a new user than from the same users: holds" in advice
    assert "hours_per_user 2 is extrapolated" in advice
    loss = float(advice.split("expected loss: ")[1].split(",")[0])
    assert loss == pytest.approx(true_loss(30, 2, 790000, .3, .15), rel=.15)

    done = take(grid(rng, 1, .01), slice(25))
    write_table("done.csv", done)
    measured = done.pop("loss")
    write_table("planned.csv", {"name": np.arange(25), **done})
    assert run("fit_laws.py out/laws.json --predict planned.csv")[0] == 0
    predicted = read("out/prediction.json")["cells"]
    low, high = np.transpose([cell["single_run"] for cell in predicted])
    assert run("fit_laws.py out/laws.json --predict done.csv")[0] == 0
    outcome = read("out/outcome.json")
    assert outcome["inside"] == np.mean((low <= measured) & (measured <= high)) > .8
    assert outcome["median_relative_error"] < .05

def test_names_of_columns_have_no_meaning_in_a_table(run):
    x, z = map(np.ravel, np.meshgrid([1., 2, 4, 8, 16], [1., 3, 9, 27]))
    table = {"data": x, "people": z, "used": z, "curve": x, "loss": 9 * x, "mse": 1 / x + 1 / z}
    write_table("t.csv", table)
    assert run("fit_laws.py t.csv --x data people --y mse --bootstrap 9 --out out")[0] == 0
    np.testing.assert_allclose(read("out/laws.json")["laws"][0]["alpha"], [1, 1], atol=.01)
    assert run("fit_laws.py out/laws.json --predict t.csv")[0] == 0
    assert read("out/outcome.json")["worst_relative_error"] < .01, "of mse, not of loss"

def test_a_constant_factor_is_left_out_the_table_gives_the_law_again_and_one_seed_no_interval(run):
    table = grid(np.random.default_rng(0), delta=None)
    write_runs(take(table, table["cap"] == HOURS[0]))
    status, printed, _ = run("fit_laws.py runs --out out")
    assert status == 0 and "hours_per_user is left out" in printed
    assert run("fit_laws.py out/results.csv --out again")[0] == 0
    first, again = read("out/laws.json"), read("again/laws.json")
    assert first["laws"] == again["laws"] and first["verdicts"] == again["verdicts"]
    law = first["laws"][0]
    assert law["x"] == ["users"] and "ci95_people" in law and "delta" not in law

    for cell in Path("runs").glob("*-s[12]"):          # one seed gives no interval and says so
        shutil.rmtree(cell)
    assert "it takes 3 seeds" in run("fit_laws.py runs --out one")[1]
    assert read("one/laws.json")["laws"][0]["ci95"] is None

def test_cells_that_cannot_be_used_are_named_and_left_out(capsys):
    write_runs(grid(np.random.default_rng(0), 2, 0, delta=None))
    first, second = (Path(f"runs/u12-h0.0139-64x3x4-s{seed}") for seed in (0, 1))
    result = read(first / "result.json")

    def used(cell=first, converged_only=False, **changes):
        """How many cells a law would be fitted to, if these things were in the result of one."""
        data.write_json(cell / "result.json", result | changes)
        a = SimpleNamespace(**vars(DEFAULTS) | {"converged_only": converged_only})
        table = fit_laws.collect(Path("runs"), Path())
        return fit_laws.read_grid(table, {"loss", *FACTORS}, a)["used"].sum()
    for text in (False, "FALSE"):                      # as a spreadsheet writes it
        with pytest.raises(UserError, match=f"{first.name} did not converge"):
            used(converged=text)
    assert used(converged_only=True, converged=False) == 49
    other = {**result["config"], "mask_ratio": .5}
    with pytest.raises(UserError, match="mixes configurations: mask_ratio"):
        used(config=other)
    with pytest.raises(UserError, match=f"{first.name} has a damaged file"):
        used(people=None)
    del other["mask_ratio"]
    assert used(config=other) == 50 and "mask_ratio is 0.75, but these" in capsys.readouterr().out
    assert used(unexplained=1.) == 50, "a setting counts by the mean over its seeds, here .63"
    used(unexplained=1.7)
    assert used(second, unexplained=.9, seed=1) == 48
    assert f"{first.name} {second.name}" in capsys.readouterr().out
    Path("runs/u96-h1-64x3x4-s0").mkdir()
    assert used(unexplained=.1) == 50
    assert "u96-h1-64x3x4-s0 is not done" in capsys.readouterr().out

# ---------------------------------------------------------------- bad input
ROWS = [f"{2 ** i},{3 ** (i % 4)},{1 + 2 ** -i}" for i in range(9)]
GOOD = "\n".join(["x,z,loss", *ROWS]) + "\n"
TABLE = "--x x --out out"
REFUSED = {                              # what is wrong: (table, flags, words of the sentence)
    "four rows": ("\n".join(["x,z,loss", *ROWS[:4]]), TABLE, "4 rows"),
    "two values": ("x,loss\n" + "1,3\n2,2\n" * 4, TABLE, "too few values of x"),
    "zero": (GOOD.replace("\n8,", "\n0,"), TABLE, "line 5"),
    "not finite": (GOOD.replace("\n8,", "\nnan,"), TABLE, "line 5"),
    "text": (GOOD.replace("\n8,", "\neight,"), TABLE, "must be a number"),
    "no such column": (GOOD, "--x y --out out", "no column 'y'"),
    "a column twice": (GOOD.replace("x,z", "x,x", 1), TABLE, "twice"),
    "ragged": (GOOD + "1,2\n", TABLE, "line 11: the header has 3 fields"),
    "only a header": ("x,z,loss\n", TABLE, "no rows"),
    "empty": ("", TABLE, "no rows"),
    "binary": ("\udcff\udcfe\x00", TABLE, "CSV"),
    "a factor twice": (GOOD, "--x x x --out out", "one term only"),
    "a factor in two terms": (GOOD, "--x x*z z --out out", "one term only"),
    "no --out": (GOOD, "--x x", "--out"),
    "minus one table": (GOOD, "--x x --out out --bootstrap -1", "--bootstrap"),
    "no such law": (GOOD, "--x x --law MX --out out", "name one of M1"),
    "no grid": (GOOD, "--out out", "no column"),
    "half a plan": ('{"laws": [', "--recommend --users 3", "can't be read"),
    "no plan": ("[]", "--recommend --users 3", "fit again")}

@pytest.mark.parametrize("why", REFUSED)
def test_a_refusal_is_one_line_and_exit_2_and_leaves_nothing(why, refused):
    text, flags, words = REFUSED[why]
    Path("t.csv").write_bytes(text.encode(errors="surrogateescape"))
    refused(f"fit_laws.py t.csv {flags}", words, usage=True)
    assert os.listdir() == ["t.csv"]

@pytest.mark.parametrize("target", ["nothing.csv --x x", "."])
def test_a_refusal_has_no_traceback(target):
    words = [sys.executable, fit_laws.__file__, *target.split(), "--out", "out"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert not os.listdir()

# ---------------------------------------------------------------- the coverage study
GRIDS = int(os.environ.get("GRIDS", 200))

def studied(rng, shape, near, **design):
    """One simulated grid: does each interval hold the truth; are users called worth more?"""
    a, b, delta = .3, .15, .4 if shape.coupled else None
    table = grid(rng, a=a, b=b, delta=delta, **design)
    tables, whole = resampled(table, "loss"), fit(table, shape, "loss", near)
    laws = {kind: [fit(rows, shape, "loss", whole) for rows in some]
            for kind, some in tables.items()}
    corner = dict(zip(FACTORS, np.array([[96.], [HOURS[-1]], [148992.]])))
    truths = {"E": (lambda law: law.numbers()["E"], .1, "signed")}
    for name, x, true in zip(("users", "hours", "parameters"), shape.x, (a, b, .4)):
        truths[name] = partial(Fit.alpha, x=x), true, "signed"
    truths["a/b"] = lambda law: law.alpha("users") / law.alpha("hours_per_user"), a / b, "ratio"
    truths["loss of 96 users"] = (lambda law: law.loss(corner).item(),
                                  true_loss(96, HOURS[-1], 148992, a, b, delta), "ratio")
    if shape.coupled:
        truths["delta"] = lambda law: law.numbers()["delta"], delta, "ratio"
    held = {}
    for name, (quantity, truth, scale) in truths.items():
        low, high = estimate(quantity, laws, scale)["ci95"]
        held[name] = low <= truth <= high
    held["power"] = apart(table)[0] > 0
    equal = [apart(grid(rng, a=.2, b=.2, delta=delta, **design)) for _ in range(3)]
    held["false claims"] = np.mean([low > 0 or high < 0 for low, high in equal])
    return held

@pytest.mark.slow
def test_intervals_hold_the_truth_and_equal_users_and_hours_are_seldom_told_apart(tmp_path):
    text = (ROOT / "results/coverage.md").read_text()
    report = re.match(r"(?s).*?five minutes of one core\.\n", text)[0]
    row = lambda *cells: "| " + " | ".join(map(str, cells)) + " |\n"
    for shape in (COUPLED, DATA):
        delta = .4 if shape.coupled else None
        near = fit(grid(np.random.default_rng(1), 5, 0, delta=delta), shape, "loss")
        for seeds, shared in [(5, .02), (3, .02), (5, .04), (3, .04), (5, 0.), (3, 0.)]:
            rng = np.random.default_rng(0)
            held = [studied(rng, shape, near, seeds=seeds, shared=shared) for _ in range(GRIDS)]
            share = {name: 100 * np.mean([one[name] for one in held]) for name in held[0]}
            if (seeds, shared) == (5, .02):
                report += f"\n{len(shape.x)} factors, {GRIDS} grids:\n\n"
                report += row("seeds", "shared", *share) + "|---" * (len(share) + 2) + "|\n"
            report += row(seeds, f"{shared:.0%}", *(f"{value:.1f}" for value in share.values()))
            Path(os.environ.get("COVERAGE", tmp_path / "coverage.md")).write_text(report)
            assert share["false claims"] <= 9
            assert GRIDS < 200 or all(87 <= value <= 99.5 for name, value in share.items()
                                     if name not in ("power", "false claims"))

# ---------------------------------------------------------------- the README
def test_every_test_that_the_readme_names_exists():
    tests = "".join(path.read_text() for path in ROOT.glob("tests/test_*.py"))
    for name in re.findall(r"`(test_\w+?)(?:\.\.\.)?`", (ROOT / "README.md").read_text()):
        assert f"def {name}" in tests, name

@pytest.mark.parametrize("page", ["README.md", "results/spread.md", "results/sensors.md",
                                  "results/experiment/result.md"])
def test_every_interval_in_a_page_is_in_a_committed_table(page):
    parts = []
    for path in [*ROOT.glob("results/**/laws.json"), *ROOT.glob("results/*/prediction.json"),
                 ROOT / "results/sensors.json"]:
        json.loads(path.read_text(), object_hook=parts.append)             # all that is in {}
    known = [(part.get("value", part.get("loss")), part[kind]) for part in parts
             for kind in ("ci95", "ci95_people", "single_run") if part.get(kind)]
    text = (ROOT / page).read_text().partition("## Earlier work")[0]       # from --recommend, no table
    quoted = re.findall(r"(?:(-?[\d.]+) )?\[(-?[\d.]+), (-?[\d.]+)\]", " ".join(text.split()))
    assert quoted
    for texts in quoted:
        assert any(all(not text or f"{number:.{len(text.partition('.')[2])}f}" == text
                       for text, number in zip(texts, (value, *ends))) for value, ends in known
                   if not isinstance(value, list)), f"{texts} is in no laws.json of results/"
