"""Is the advice right? Among measured cells of about equal cost U (H + o), for U people, H seconds
of each and o seconds of set-up a person: does the lowest loss stand near H = sqrt(h o)?

    python tests/advice.py experiment walk          # rows of the table in results/advice.md
"""
import json, sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from fit_laws import main_model, read_grid, take

def rivals(losses, setup, cost, tolerance=1.2):
    """{H: (U, loss)} of the cells whose cost is nearest to `cost`, one for each H, within 20 %."""
    found = {}
    for (users, each), loss in losses.items():
        off = abs(np.log(users * (each + setup) / cost))
        if off < min(np.log(tolerance), found.get(each, (9,))[0]):
            found[each] = off, users, loss
    return {each: (users, loss) for each, (_, users, loss) in sorted(found.items())}

def rows(grid):
    folder = ROOT / "results" / grid
    runs = main_model(read_grid(folder / "results.csv"))
    h = 3600 * json.loads((folder / "laws.json").read_text())["laws"][0]["parameters"]["h"]
    seconds = np.round(3600 * runs["hours_per_user"])
    losses = {(u, s): take(runs, (runs["users"] == u) & (seconds == s))["loss"].mean()
              for u, s in {*zip(runs["users"], seconds)}}
    for setup in (60, 120, 300):
        groups = [rivals(losses, setup, u * (s + setup)) for u, s in losses]
        unique = {tuple((each, users) for each, (users, _) in group.items()): group
                  for group in groups if len({u for u, _ in group.values()}) > 1}
        for group in sorted(unique.values(), key=lambda group: -max(u for u, _ in group.values())):
            best, advised = min(group, key=lambda each: group[each][1]), np.sqrt(h * setup)
            nearest = min(group, key=lambda each: abs(np.log(each / advised)))
            cells = ", ".join(f"{users:.0f} x {each:.0f} s {loss:.4f}"
                              for each, (users, loss) in group.items())
            yield (f"| {grid} | {setup // 60} min | {cells} | {best:.0f} s | {advised:.0f} s | "
                   f"{'yes' if best == nearest else 'no'} |")

if __name__ == "__main__":
    for grid in sys.argv[1:]:
        print(*rows(grid), sep="\n")
