"""The laws against what is known: planted laws, a published fit, planted claims, bad input."""
import csv, math, os, re
from pathlib import Path

import numpy as np
import pytest

import data
import fit_laws
from conftest import read, write
from fit_laws import Law, equal_hours, fit, grid_law, interval, take, users_save, without_each

CHINCHILLA = Path(fit_laws.__file__).parents[1] / "shared/tables/chinchilla.csv"
SIZES = {"16x2x2": 6496., "32x3x2": 37632., "64x3x4": 148992., "128x4x4": 789760.}
TRUE = {"E": .12, "R": .23, "A": .14, "a": .8, "h": .09, "B": 5.8, "c": .48}
USERS, HOURS = (3, 6, 12, 24, 48), [.0139 * 2 ** i for i in range(5)]
pytestmark = pytest.mark.usefixtures("elsewhere")

def write_table(path, table, mark=","):
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter=mark).writerows([table, *zip(*table.values())])

@pytest.fixture
def fitted(run):
    """Fit a table, t.csv: what is said, laws[0], the verdicts."""
    def call(table, flags=""):
        write_table("t.csv", table)
        status, printed, error = run(f"fit_laws.py t.csv --out out {flags}")
        assert status == 0, error
        content = read("out/laws.json")
        return printed, content["laws"][0], content["verdicts"]
    return call

def grid(seeds=3, noise=.01, sizes=True, **numbers):
    """The real grid's shape: all of users x hours at 64x3x4, other sizes at some of them."""
    rows = [(u, h, "64x3x4", s) for s in range(seeds) for u in USERS for h in HOURS]
    rows += [(u, h, size, s) for s in range(seeds) for u in USERS[1::2] for h in HOURS[::2]
             for size in SIZES if sizes and size != "64x3x4"]
    rng = np.random.default_rng(0)
    users, hours, size, seed = map(np.array, zip(*rows))
    table = {"name": np.array(["u{}-h{:.4f}-{}-s{}".format(*row) for row in rows]),
             "users": users * 1., "hours_per_user": hours, "hours_cap": hours,
             "hours": users * hours, "params_encoder": np.array([*map(SIZES.get, size)]),
             "seed": seed, "converged": np.array([True] * len(rows))}
    table |= dict(zip(("width", "depth", "heads"), np.array([s.split("x") for s in size], int).T))
    error = rng.normal(size=len(rows)) * noise + rng.normal(size=(seeds, 49))[seed, users] * noise
    table["loss"] = grid_law(table, **{**TRUE, **numbers}) * np.exp(error)
    return table

def write_runs(table):
    """runs/: finished cells as pretrain.py and finetune.py leave them, as far as they are read."""
    for values in zip(*table.values()):
        row = {key: value.item() for key, value in zip(table, values)}
        cell, loss = Path("runs") / row.pop("name"), row["loss"]
        people = [{"source": "pool", "user": f"p{share}", "loss": loss * share}
                  for share in (.7, .9, 1.1, 1.3)]
        config = {key: row[key] for key in ("users", "width", "seed")} | {"mask_ratio": .75}
        data.write_json(cell / "result.json", {**row, "people": people, "config": config})
        scores = {"macro_f1": 1 - loss, "accuracy": .9, "per_class_f1": [1, 2], "l2": .1}
        data.write_json(cell / "finetune/ucihar-probe.json", scores)

def test_a_planted_grid_law_is_found():
    table = grid(noise=0)
    found = fit(Law(grid_law, fit_laws.grid_ranges(table), 1e9), table, "loss")
    assert found == pytest.approx(TRUE, rel=1e-3)

@pytest.mark.parametrize("unit", [1e-9, 1e9])
def test_a_planted_law_is_found_in_any_units(unit, fitted):
    x, z = map(np.ravel, np.meshgrid(np.geomspace(1e7, 1e10, 8), np.geomspace(1e9, 1e12, 8)))
    loss = unit * (1.8 + 480 * x ** -.35 + 2100 * z ** -.37)
    table = {"x": x, "z": z, "mse": loss, "seed": loss ** 0}
    _, law, _ = fitted(table, "--x x z --y mse --bootstrap 3")
    assert law["E"] == pytest.approx(1.8 * unit, rel=1e-3)
    assert law["ci95"], "a constant seed is no seed"
    np.testing.assert_allclose(law["alpha"], [.35, .37], rtol=1e-3)

def test_joined_factors_share_a_term_and_no_floor_is_none(fitted, run, refused):
    x, z = map(np.ravel, np.meshgrid([1., 2, 4, 8, 16], [1., 3, 9, 27]))
    _, law, _ = fitted({"x": x, "z": z, "loss": 3 * x ** -.5 * z ** -.2},
                       "--x x*z --no-floor --bootstrap 0 --holdout z")
    np.testing.assert_allclose([law["E"], *law["A"], *law["alpha"]], [0, 3, .5, .2], atol=1e-3)
    assert law["ci95"] is None and law["holdout"]["column"] == "z" and law["x"] == ["x", "z"]
    assert run("fit_laws.py out/laws.json --predict t.csv")[0] == 0
    assert read("out/outcome.json")["worst_relative_error"] < .001
    refused("fit_laws.py out/laws.json --recommend --hours 20 --setup .5", "a grid's laws.json")

@pytest.mark.skipif(not CHINCHILLA.is_file(), reason="no ../shared/tables on this machine")
def test_the_published_chinchilla_fit(run):
    flags = "--x params tokens --holdout tokens --bootstrap 100 --out out"
    assert run(f"fit_laws.py {CHINCHILLA} {flags}")[0] == 0
    law = read("out/laws.json")["laws"][0]
    assert law["objective"] <= .00101827 * (1 + 1e-5)
    assert law["E"] == pytest.approx(1.8172, abs=.002)
    np.testing.assert_allclose(law["alpha"], [.3473, .3672], atol=.001)
    np.testing.assert_allclose(law["ci95"]["alpha"], [(.317, .373), (.331, .415)], rtol=.06)
    assert law["holdout"]["n"] == 24

def test_the_interval_of_a_mean_over_seeds_is_the_textbook_one_and_people_widen_it():
    values = np.random.default_rng(0).normal(size=5)
    low, high = interval(values.mean(), without_each(values))
    assert high - low == pytest.approx(2 * 2.7764 * values.std(ddof=1) / 5 ** .5, rel=1e-4)
    assert np.diff(interval(values.mean(), without_each(values), [1, 2, 3])) > high - low
    assert interval(0, [1, 2]) is None, "two seeds say next to nothing"

def test_at_equal_hours_the_slope_is_the_difference_of_the_exponents():
    """Also where cells are missing, or other sizes stand beside: each line has its own constant."""
    table = grid()
    table["loss"] = table["users"] ** -.3 * table["hours_per_user"] ** -.1
    table["loss"] *= table["params_encoder"] ** -.2
    rng = np.random.default_rng(0)
    table = take(table, rng.random(len(table["loss"])) < .6)
    table["hours"] = table["hours"] * rng.uniform(1, 1.04, len(table["loss"]))      # are one line
    table["equal_hours"] = equal_hours(table)
    np.testing.assert_allclose(users_save(table, table["loss"]), [.2] * 3)
    same = table["users"] == 6
    assert len(users_save(take(table, same), table["loss"][same])) == 0, "nothing to compare"

# ---------------------------------------------------------------- grids
def test_a_grid_becomes_a_table_a_law_figures_and_advice(run):
    write_runs(grid(5, noise=.005))
    status, printed, error = run("fit_laws.py runs --out out")
    assert status == 0 and "13 min" in printed, error
    law, verdicts = read("out/laws.json")["laws"][0], read("out/laws.json")["verdicts"]
    for name, (low, high) in law["ci95"].items():
        assert low < law["parameters"][name] < high, name
    assert law["parameters"]["h"] == pytest.approx(TRUE["h"], rel=.4)
    assert verdicts.keys() == {
        "more_people", "longer_recordings", "users_minus_hours_exponent", "hours_saturate",
        "power_law", "capacity_interaction", "downstream_ucihar"}
    assert {verdict["decision"] for verdict in verdicts.values()} == {"holds"}
    assert verdicts["users_minus_hours_exponent"]["pairs"] == {"won": 16, "of": 16}
    assert verdicts["users_minus_hours_exponent"]["people"] == {"positive": 4, "of": 4}
    assert {*os.listdir("out")} == {"results.csv", "laws.json", *(f"{name}.png" for name in (
        "loss_vs_users", "equal_hours", "loss_vs_params", "predicted", "downstream"))}
    assert "ucihar_accuracy" in Path("out/results.csv").read_text()
    assert run("fit_laws.py out/results.csv --out again")[0] == 0
    assert read("out/laws.json")["laws"] == read("again/laws.json")["laws"]

    _, advice, _ = run("fit_laws.py out/laws.json --recommend --users 30 --hours-per-user 2")
    assert "More people." in advice and "48 people, 50 s to 13 min of each" in advice
    model, loss = re.search(r"Model (\w+), .* loss (\d\.\d+)", advice).groups()
    expected = grid_law({"users": 30, "hours_per_user": 2, "params_encoder": SIZES[model]}, **TRUE)
    assert float(loss) == pytest.approx(expected, rel=.05)

def test_the_budget_is_nearly_the_one_that_brute_force_finds(fitted, run):
    fitted(grid(5, noise=0, sizes=False))
    for hours, setup in ((20, .5), (3, .05), (500, 1)):
        _, advice, _ = run(f"fit_laws.py out/laws.json --recommend --hours {hours} --setup {setup}")
        users = np.arange(1, hours / setup)
        each = hours / users - setup
        effective = users * each / (TRUE["h"] + each)
        found = int(re.match(r"(\d+) people, .* of each", advice)[1])
        assert effective[found - 1] > .999 * effective.max()

def test_a_prediction_and_its_outcome_stand_beside_the_forecasters(fitted, run):
    table = grid(5, noise=.015)
    fitted(take(table, table["users"] < 48))
    done = take(table, table["users"] == 48)
    measured = done["loss"]
    write_table("done.csv", done)
    write_table("planned.csv", {key: done[key] for key in done if key != "loss"})
    assert run("fit_laws.py out/laws.json --predict planned.csv")[0] == 0
    assert not Path("out/outcome.json").exists()
    cells = read("out/prediction.json")["cells"]
    low, high = np.transpose([cell["single_run"] for cell in cells])
    assert run("fit_laws.py out/laws.json --predict done.csv")[0] == 0
    outcome = read("out/outcome.json")
    assert outcome["inside"] == np.mean((low <= measured) & (measured <= high)) > .8
    assert outcome["median_relative_error"] < .03
    for name in ("last ratio", "line on log axes", "line on semi-log axes"):
        error = np.array([cell["forecasters"][name] for cell in cells]) / measured - 1
        median = outcome["forecasters"][name]["median_relative_error"]
        assert median == pytest.approx(np.median(abs(error)))

def test_the_last_ratio_goes_on():
    users, loss = np.array([3., 6, 12, 12.1]), np.array([9., 8, 3, 5])
    rest = {"users": users, "size": np.ones(4), "loss": loss}
    row = {"users": np.array([24., 48]), "size": np.array([1, 1.])}
    found = fit_laws.forecasts(rest, row, "loss", ("users", "size"), "users")["last ratio"]
    np.testing.assert_allclose(found, [2, 1])

def test_no_difference_is_not_claimed_and_hours_do_not_run_out_where_they_do_not(fitted, refused):
    table = grid(3, h=math.inf)
    no_cap = {"hours_cap": table["hours"] + math.inf}
    printed, law, verdicts = fitted(table | no_cap)
    assert "h" in law["parameters"]
    assert verdicts["users_minus_hours_exponent"]["decision"] == "can't tell here"
    assert verdicts["hours_saturate"]["decision"] != "holds"
    assert "Next: the same grid" in printed
    refused("fit_laws.py out/laws.json --recommend --hours 9 --setup .1", "hours run out")

FULL = grid(5)
THIN = {  # a grid: (its rows, words on the screen, of advice on a plan, why no budget)
    "one seed": (FULL["seed"] == 0, "", "Model", ""),
    "two seeds": (FULL["seed"] < 2, "", "it needs three seeds", ""),
    "two models": (np.isin(FULL["width"], (16, 64)), "", "Model 64x3x4,", ""),
    "one model": (FULL["width"] == 64, "", "Model 64x3x4,", ""),
    "one time": (FULL["hours_per_user"] == HOURS[0], "", "Model", "hours run out"),
    "one line": ((FULL["width"] == 64) & np.isclose(FULL["hours"], 48 * HOURS[0], .01),
                 "4 of 4 pairs", "", "has no law")}

@pytest.mark.parametrize("has", THIN)
def test_what_a_thin_grid_cannot_tell_is_not_said(has, fitted, run, refused):
    rows, screen, advice, words = THIN[has]
    printed, law, _ = fitted(take(FULL, rows))
    assert screen in printed and ("note: no law" in printed) == (has == "one line")
    assert (law["ci95"] is None) == (has in ("one seed", "two seeds", "one line"))
    recommend = "fit_laws.py out/laws.json --recommend"
    if advice:
        assert advice in run(f"{recommend} --users 9 --hours-per-user .1")[1]
    if words:
        refused(f"{recommend} --hours 9 --setup .1", words)

def test_a_pair_is_compared_on_the_seeds_that_have_both(fitted):
    table = grid(4, noise=.001, sizes=False)
    table["loss"][table["seed"] == 3] *= 1.2
    assert "16 of 16 pairs" in fitted(take(table, (table["users"] < 24) | (table["seed"] == 3)))[0]

# ---------------------------------------------------------------- tables as people have them
ROWS = [f"{2 ** i},{3 ** (i % 4)},{1 + 2 ** -i}" for i in range(9)]
GOOD = "\n".join(["x,z,loss", *ROWS]) + "\n"
TABLE = "--x x --out out"
REFUSED = {                              # what is wrong: (table, flags, words of the sentence)
    "four rows": ("\n".join(["x,z,loss", *ROWS[:3]]), TABLE, "3 rows"),
    "two values": ("x,loss\n" + "1,3\n2,2\n" * 4, TABLE, "too few values of x"),
    "zero": (GOOD.replace("\n8,", "\n0,"), TABLE, "line 5"),
    "not finite": (GOOD.replace("\n8,", "\nnan,"), TABLE, "line 5"),
    "empty rows count as lines": (GOOD.replace("\n8,", "\n\n,,\neight,"), TABLE, "line 7"),
    "no such column": (GOOD, "--x y --out out", "no column"),
    "a column twice": (GOOD.replace("x,z", "x,x", 1), TABLE, "twice"),
    "ragged": (GOOD + "1,2\n", TABLE, "line 11: 2 fields"),
    "empty": ("", TABLE, "no rows"),
    "binary": ("\udcff\udcfe\x00", TABLE, "CSV"),
    "a factor in two terms": (GOOD, "--x x*z z --out out", "one term only"),
    "no --out": (GOOD, "--x x", "--out"),
    "minus one table": (GOOD, "--x x --out out --bootstrap -1", "--bootstrap"),
    "no such group": (GOOD, "--x x --group run --out out", "no column"),
    "no grid": (GOOD, "--out out", "no column"),
    "half a plan": ('{"laws": [', "--recommend --users 3", "can't be read"),
    "no plan": ("[]", "--recommend --users 3", "laws.json")}

@pytest.mark.parametrize("why", REFUSED)
def test_a_refusal_is_one_line_and_exit_2_and_leaves_nothing(why, refused):
    text, flags, words = REFUSED[why]
    write("t.csv", text.encode(errors="surrogateescape"))
    refused(f"fit_laws.py t.csv {flags}", words, usage=True)
    refused(f"fit_laws.py nothing.csv {flags}", "", usage=True)
    assert os.listdir() == ["t.csv"]

def test_a_results_csv_that_a_spreadsheet_saved_gives_the_same_law(fitted, run):
    table = grid(3)
    _, plain, _ = fitted(table)
    write_table("sheet.csv", {key: [str(value).replace(".", ",").replace("True", "WAHR")
                                    for value in values] for key, values in table.items()}, ";")
    text = Path("sheet.csv").read_text().replace("\n", "\n" + ";" * (len(table) - 1) + "\n", 3)
    write("sheet.csv", "\ufeff" + text)
    assert run("fit_laws.py sheet.csv --out sheet")[0] == 0
    assert read("sheet/laws.json")["laws"] == [plain]

def test_rows_that_are_not_independent_are_named_and_groups_widen_the_interval(fitted):
    tokens = np.outer(np.geomspace(1e6, 1e8, 6), np.geomspace(.03, 1, 30)).ravel()
    error = np.repeat(.02 * np.random.default_rng(0).normal(size=6), 30)
    table = {"run": np.repeat([*"abcdef"], 30), "tokens": tokens,
             "loss": (1.7 + 30 * tokens ** -.34) * np.exp(error)}
    width = []
    for flags in ("", "--group run"):
        printed, law, _ = fitted(table, f"--x tokens --bootstrap 60 {flags}")
        assert ("6 different texts" in printed) == (not flags)
        width.append(np.ptp(law["ci95"]["alpha"]))
    assert width[1] > 2 * width[0]
    twice = {key: np.append(values, values[:3]) for key, values in table.items()}
    assert "3 of 183 rows" in fitted(twice, "--x tokens --bootstrap 0")[0]
    rising = {"tokens": tokens, "loss": 70 - table["loss"]}
    assert "doesn't fall as tokens" in fitted(rising, "--x tokens --bootstrap 0")[0]
