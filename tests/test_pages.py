"""The README and the pages in results/ are promises, too: their numbers are those of tables."""
import csv, json, re
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_1samp

import advice
from fit_laws import interval, without_each

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *(str(page.relative_to(ROOT)) for page in ROOT.glob("results/**/*.md"))]
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}

def table(path):
    return list(csv.DictReader(open(ROOT / "results" / path)))

def pairs_of(text):
    """All pairs of numbers [low, high] in the text of a JSON file."""
    pairs = re.findall(r"\[\s*(-?\d[\d.e+-]*),\s*(-?\d[\d.e+-]*)\s*\]", text)
    return [[float(low), float(high)] for low, high in pairs]

def rounded(number, text):
    """Whether a text, such as .225 or 0.23, is this number."""
    return f"{number:.{len(text.partition('.')[2])}f}".lstrip("0") == text.lstrip("0")

def sensors():
    """The slopes of results/sensors.md from its table: {name: one a seed}."""
    logs = {(row["sensors"], row["model"], row["users"], row["windows"], row["seed"]):
            np.log(float(row["loss"])) for row in table("sensors.csv")}
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

def losses_on_feet(column):                            # (users, seeds)
    return np.array([[float(row[column]) for row in table("walk/feet.csv") if row["users"] == users]
                     for users in ("12", "55", "256")])

def bends(column):
    """How far the loss of 55 people lies below the line on log axes through 12 and 256, by seed."""
    w = np.log(256 / 55) / np.log(256 / 12)
    return [w, -1, 1 - w] @ np.log(losses_on_feet(column))

@pytest.mark.parametrize("page", PAGES)
def test_every_interval_in_a_page_is_in_a_committed_table_or_follows_from_one(page):
    known = [interval(slopes.mean(), without_each(slopes)) for slopes in
             (*sensors().values(), bends("loss"), bends("loss_2500"))]
    for path in [*ROOT.glob("results/**/laws.json"), *ROOT.glob("results/*/*prediction.json"),
                 *ROOT.glob("results/*.json")]:
        known += pairs_of(path.read_text())
    for path in (ROOT / "results").glob("*.csv"):                          # name_low, name_high
        for row in table(path):
            known += [[float(row[name]), float(row[name.replace("low", "high")])]
                      for name in row if name.split("_")[-1] == "low"]
    known += [[unit * low, unit * high]                                    # %, seconds
              for low, high in known for unit in (100, 3600)]
    for low, high in re.findall(r"\[(-?[\d.]+), (-?[\d.]+)\]", TEXTS[page]):
        assert any(rounded(ends[0], low) and rounded(ends[1], high) for ends in known), (low, high)

def test_the_first_screen_of_the_readme_has_the_losses_of_the_experiment():
    screen, rows = TEXTS["README.md"].partition("## Run it")[0], table("experiment/results.csv")
    quoted = re.findall(r"\| \**(\d+)\** \| (\d+) seconds \| \**(\.\d+)\** \|", screen)
    assert len(quoted) == 3
    for users, seconds, loss in quoted:
        losses = [float(row["loss"]) for row in rows
                  if (row["users"], row["width"]) == (users, "64")
                  and round(float(row["hours_cap"]) * 360) * 10 == int(seconds)]
        assert rounded(np.mean(losses), loss), (users, seconds, losses)
    laws = json.loads((ROOT / "results/experiment/laws.json").read_text())
    verdict = laws["verdicts"]["users_minus_hours_exponent"]
    pairs, people = verdict["pairs"], verdict["people"]
    assert f"{pairs['won']} of {pairs['of']}" in screen
    assert f"{people['positive']} of {people['of']} people" in screen
    baseline, = {f"{float(row['baseline_loss']):.3f}".lstrip("0") for row in rows}
    assert f"({baseline}: " in screen

def test_the_quarter_of_an_hour_on_real_people_has_the_losses_of_its_table():
    quoted = re.findall(r"(\d+)\s+people x \d+ (?:s|min) (\.\d+)", TEXTS["README.md"])
    assert len(quoted) == 4
    for users, loss in quoted:
        losses = [float(row["loss"]) for row in table("real/results.csv") if row["users"] == users]
        assert len(losses) == 5 and rounded(np.mean(losses), loss), (users, losses)

def test_what_carries_over_from_walking_has_the_means_of_its_table():
    rows = table("walk/downstream.csv")
    for people, name in ("8 people", "u8"), ("128 people", "u128"), ("nobody .*?", "random"):
        quoted = re.search(rf"\| {people} \|.*", TEXTS["results/walk/result.md"])[0]
        scores = re.findall(r"\.\d{3}\b", quoted)[-3:]
        for score, column in zip(scores, ("ucihar", "wisdm_phone", "wisdm_watch"), strict=True):
            found = [float(row[f"{column}_macro_f1"]) for row in rows
                     if row["name"].startswith(name)]
            assert rounded(np.mean(found), score), (people, column, found)

def test_what_was_predicted_is_compared_with_the_final_table_and_the_page_has_the_errors():
    final = {row["name"]: row["loss"] for row in table("walk/results.csv")}
    for folder in (ROOT / "results/walk/before").glob("*/"):
        for row in table(folder / "measured.csv"):
            assert row["loss"] == final[row["name"]], row
        law = json.loads((folder / "outcome.json").read_text())
        for errors in (law, law["forecasters"]["line on log axes"]):
            error = 100 * errors["median_relative_error"]
            assert f"{error:.1f}" in TEXTS["results/walk/result.md"], folder

def test_power_law_or_logarithm_is_decided_by_the_bends_of_its_table():
    text = TEXTS["results/walk/feet.md"]
    for column in ("loss", "loss_2500"):
        test = ttest_1samp(bends(column), 0, alternative="greater")
        for number, digits in ((bends(column).mean(), 3), (test.pvalue, 4), *(
                (loss, 4) for loss in losses_on_feet(column).mean(1))):
            assert f"{number:.{digits}f}"[1:] in text, number
        assert f"| {test.statistic:.1f} |" in text and (bends(column) > 0).all()

def test_the_advice_page_has_the_rows_that_its_command_prints():
    rows = [*advice.rows("experiment"), *advice.rows("walk")]
    assert "\n".join(rows) in TEXTS["results/advice.md"]

def test_pages_are_short_and_what_they_name_exists():
    tests = "".join(path.read_text() for path in ROOT.glob("tests/test_*.py"))
    for page, text in TEXTS.items():
        assert len(text.splitlines()) <= (100 if page != "README.md" else 250), page
        assert "```python\nimport" not in text, f"{page} has a program in it"
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert ((ROOT / page).parent / link).exists(), f"{page} links to {link}"
        for name in re.findall(r"`(test_\w+?)(?:\.\.\.)?`", text):
            assert f"def {name}" in tests, f"{page} names {name}"
