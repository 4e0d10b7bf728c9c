"""Are the intervals right? Grids simulated from four known laws, at the rows of the real grid and
with its noise, go through fit_laws.py: how often does an interval hold the truth, what is claimed?

    python tests/coverage.py results/coverage.md --grids 200        # half an hour of a core

writes the table of that page again.
"""
import argparse, re, sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import fit_laws
from fit_laws import GRID, Law, fit, grid_law, interval, take, users_save, without_each

def coupled(table, E, R, A, a, b, B, c, d):
    """M2 with a plateau: hours have an exponent of their own, data and size are coupled."""
    data = A * table["users"] ** -a * table["hours_per_user"] ** -b
    return E + 1 / ((data + B * table["params_encoder"] ** -c) ** -d + 1 / R)

def pure(table, A, a, b, B, c):
    """No floor, no plateau."""
    data = A * table["users"] ** -a * table["hours_per_user"] ** -b
    return data + B * table["params_encoder"] ** -c

WIDE = {**GRID, "E": (.02, 10, .05, .2), "A": (1e-9, 1e3, .01, 1), "a": (0, 9, .1, 1.5),
        "b": (0, 9, .1, 1), "d": (.3, 1, .4, .9)}
KINDS = {"this law": (grid_law, "ERAahBc"), "M2, with a plateau": (coupled, "ERAabBcd"),
         "pure power law": (pure, "AabBc"), "this law, h endless": (grid_law, "ERAaBc")}
FAR = {"users": np.array([96.]), "hours_per_user": np.array([.2222]),
       "params_encoder": np.array([148992.])}
COLUMNS = [*GRID, "96 users", "a run of 96", "slope", "users", "hours", "run out"]

def studied(rng, formula, true, table):
    """One simulated grid: which intervals hold the truth, and what is claimed?"""
    seeds, users = (np.unique(table[x], return_inverse=True)[1] for x in ("seed", "users"))
    shared = .017 * rng.normal(size=(max(seeds) + 1, max(users) + 1))[seeds, users]
    noise = np.exp(.022 * rng.normal(size=len(shared)) + shared)
    drawn = {**table, "loss": formula(table, **true) * noise}
    first = fit_laws.grid_study(drawn)
    far, slopes = formula(FAR, **true)[0], users_save(drawn, drawn["loss"])
    whole, *others = np.log([grid_law(FAR, **numbers)[0] for numbers in first["fits"]])
    run = far * np.exp(.022 * rng.normal() + .017 * rng.normal())
    ends = interval(slopes.mean(), without_each(slopes))
    slope = users_save(table, formula(table, **true)).mean()
    holds = {name: (ends, true.get(name)) for name, ends in first["ci95"].items()} | {
        "96 users": (np.exp(interval(whole, others)), far),
        "a run of 96": (fit_laws.expected(first, FAR)[1][:, 0], run),
        "slope": (ends, slope)}
    known = [name for name in holds if name in true or name not in GRID]
    return {name: low <= truth <= high for name, ((low, high), truth) in holds.items()
            if name in known and (formula is grid_law or name not in "AaBc")} | {
        "users": ends[0] > 0, "hours": ends[1] < 0,
        "run out": first["ci95"]["h"][1] < 3 * table["hours_per_user"].max()}

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="a page whose table begins as that of coverage.md")
    parser.add_argument("--grids", type=int, default=200, help="simulated grids of each kind")
    a = parser.parse_args()
    real = fit_laws.read_grid(ROOT / "results/experiment/results.csv")
    report = re.match(r"(?s).*?\|---.*?\n", a.page.read_text())[0]
    for kind, (formula, names) in KINDS.items():
        true = fit(Law(formula, {name: WIDE[name] for name in names}, 1e9), real, "loss")
        for seeds in (5, 3):
            rng, table = np.random.default_rng(0), take(real, real["seed"] < seeds)
            found = [studied(rng, formula, true, table) for _ in range(a.grids)]
            share = {name: 100 * np.mean([one[name] for one in found]) for name in found[0]}
            cells = [f"{share[name]:.1f}" if name in share else "" for name in COLUMNS]
            report += f"| {kind} | {seeds} | {' | '.join(cells)} |\n"
            a.page.write_text(report)
            print(kind, seeds, *cells, flush=True)

if __name__ == "__main__":
    main()
