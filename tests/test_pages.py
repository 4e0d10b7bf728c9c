"""The README and the pages in results/ are promises, too: their numbers are those of tables."""
import csv, json, re
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t as student

import advice

ROOT = Path(__file__).parent.parent
PAGES = [path.relative_to(ROOT).as_posix() for path in (ROOT / "results").rglob("*.md")]

def numbers_of(value):
    """All numbers in what a JSON file holds."""
    if isinstance(value, (dict, list)):
        parts = value.values() if isinstance(value, dict) else value
        return [number for part in parts for number in numbers_of(part)]
    return [value] if isinstance(value, float) else []

def pairs_of(content, found):
    """All pairs of numbers [low, high] in what a JSON file holds, added to `found`."""
    if isinstance(content, list) and len(content) == 2 and len(numbers_of(content)) == 2:
        found.append(content)
    parts = content.values() if isinstance(content, dict) else content
    for part in parts if isinstance(parts, (list, type({}.values()))) else []:
        pairs_of(part, found)
    return found

def rounded(number, text):
    """Whether a text, such as .225 or 0.23, is this number."""
    return f"{number:.{len(text.partition('.')[2])}f}".lstrip("0") == text.lstrip("0")

def interval(values):
    """95 % of a mean over seeds, by Student's t."""
    half = student.ppf(.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** .5
    return [np.mean(values) - half, np.mean(values) + half]

def sensors():
    """The slopes of results/sensors.md from its table: {name: one a seed}."""
    rows = list(csv.DictReader(open(ROOT / "results/sensors.csv")))
    logs = {(row["sensors"], row["model"], row["users"], row["windows"], row["seed"]):
            np.log(float(row["loss"])) for row in rows}
    users, slopes = ("6", "12", "24"), {}
    for sensor in ("both", "acc", "gyro"):
        y = [[logs[sensor, "64x3x4", u, "40", str(s)] for s in range(5)] for u in users]
        slopes[sensor] = -np.polyfit(np.log([6, 12, 24]), y, 1)[0]
    for one, other in (("acc", "gyro"), ("both", "gyro"), ("acc", "both")):
        slopes[f"{one} - {other}"] = slopes[one] - slopes[other]
    for wide, deep in (("64x3x4", "32x12x2"), ("32x3x2", "16x12x2")):
        slopes[deep] = np.array([logs["both", deep, "24", "20", str(s)]
                                 - logs["both", wide, "24", "20", str(s)] for s in range(3)])
    return slopes

@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_every_interval_in_a_page_is_in_a_committed_table_or_follows_from_sensors_csv(page):
    known = [interval(values) for values in sensors().values()]
    for path in [*ROOT.glob("results/**/laws.json"), *ROOT.glob("results/*/*prediction.json"),
                 *ROOT.glob("results/*.json")]:
        pairs_of(json.loads(path.read_text()), known)
    for path in (ROOT / "results").glob("*.csv"):                          # name_low, name_high
        for row in csv.DictReader(open(path)):
            known += [[float(row[name]), float(row[name.replace("low", "high")])]
                      for name in row if name.split("_")[-1] == "low"]
    known += [[unit * low, unit * high]                                    # %, seconds
              for low, high in known for unit in (100, 3600)]
    for low, high in re.findall(r"\[(-?[\d.]+), (-?[\d.]+)\]", (ROOT / page).read_text()):
        assert any(rounded(ends[0], low) and rounded(ends[1], high) for ends in known), (low, high)

def test_the_first_screen_of_the_readme_has_the_losses_of_the_experiment():
    screen = (ROOT / "README.md").read_text().partition("## Run it")[0]
    rows = list(csv.DictReader(open(ROOT / "results/experiment/results.csv")))
    quoted = re.findall(r"\| \**(\d+)\** \| (\d+) seconds \| \**(\.\d+)\** \|", screen)
    assert len(quoted) == 3
    for users, seconds, loss in quoted:
        losses = [float(row["loss"]) for row in rows
                  if (row["users"], row["width"]) == (users, "64")
                  and round(float(row["hours_cap"]) * 360) * 10 == int(seconds)]
        assert rounded(np.mean(losses), loss), (users, seconds, losses)
    verdict = json.loads((ROOT / "results/experiment/laws.json").read_text()
                         )["verdicts"]["users_minus_hours_exponent"]
    pairs, people = verdict["pairs"], verdict["people"]
    assert f"{pairs['won']} of {pairs['of']}" in screen
    assert f"{people['positive']} of {people['of']} people" in screen
    baseline, = {f"{float(row['baseline_loss']):.3f}".lstrip("0") for row in rows}
    assert f"({baseline}: " in screen

def test_the_quarter_of_an_hour_on_real_people_has_the_losses_of_its_table():
    rows = list(csv.DictReader(open(ROOT / "results/real/results.csv")))
    quoted = re.findall(r"(\d+)\s+people x \d+ (?:s|min) (\.\d+)", (ROOT / "README.md").read_text())
    assert len(quoted) == 4
    for users, loss in quoted:
        losses = [float(row["loss"]) for row in rows if row["users"] == users]
        assert len(losses) == 5 and rounded(np.mean(losses), loss), (users, losses)

def test_the_advice_page_has_the_rows_that_its_command_prints():
    page = (ROOT / "results/advice.md").read_text()
    printed = [row for grid in ("experiment",) for row in advice.rows(grid)]
    assert printed == [line for line in page.splitlines() if line.startswith("| experiment")]

def test_pages_are_short_and_what_they_name_exists():
    for page in ["README.md", *PAGES]:
        text, folder = (ROOT / page).read_text(), (ROOT / page).parent
        assert len(text.splitlines()) <= (100 if page != "README.md" else 250), page
        assert "```python\nimport" not in text, f"{page} has a program in it"
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (folder / link).exists(), f"{page} links to {link}"
    tests = "".join(path.read_text() for path in ROOT.glob("tests/test_*.py"))
    for page in ["README.md", *PAGES]:
        for name in re.findall(r"`(test_\w+?)(?:\.\.\.)?`", (ROOT / page).read_text()):
            assert f"def {name}" in tests, f"{page} names {name}"
