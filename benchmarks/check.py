"""Checks new learning curves against the pinned ones in benchmarks/curves.

    python benchmarks/check.py NEW...    CSV files, or folders of them, as benchmarks/run.py writes
    python benchmarks/check.py           the pinned curves themselves: whole, as their cards say

Exit code 1 if a task falls short (or a pinned curve is not as its card says), 2 if a curve cannot
be compared.

A task falls short if the mean over the new seeds of either statistic lies below

    limit = mean - t * spread * sqrt(1 / pinned seeds + 1 / new seeds)

with the mean and the spread (sample standard deviation) of the pinned seeds. The statistics are the
tail, the mean of the evaluations in the last tenth of the curve (of the last one before, if it has
none; of training episodes, if a curve has none at all), and the area under the curve of training
episodes over its frames. t is the one-sided quantile of Student's distribution for a
false alarm in alpha / 2 of such comparisons, so that an unchanged algorithm whose seeds vary like
the pinned ones, normally, is accused in a share alpha of the tasks at most. The spread counts as
at least 5 % of what the pinned seeds gained over random play: three seeds that all end at 500 do
not promise that the fourth does. All curves are cut to the frames of the shortest. If a limit is
so low that random play would pass, the check says so.
"""

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np
import scipy.stats
import yaml

sys.path.insert(0, str(Path(__file__).parent))
import records


def compare(pinned, new, alpha=0.01):
    """Compares curves, lists of rows for each seed -> a dict for each statistic.

    Raises ValueError if there are fewer than two pinned seeds.
    """
    if len(pinned) < 2:
        raise ValueError(f"{len(pinned)} pinned seeds, it takes two to know their spread")
    frames = min(map(records.last_frame, [*pinned, *new]))
    quantile = scipy.stats.t.ppf(1 - alpha / 2, len(pinned) - 1)
    base = np.nanmean([*map(records.untrained, pinned), *map(records.untrained, new)])
    results = []
    seen = all(records.evaluated(rows, frames) for rows in [*pinned, *new])
    kinds = {"tail": "eval" if seen else "train", "area": "train"}
    for name, kind in kinds.items():
        statistic = getattr(records, name)
        old, now = ([statistic(rows, frames, kind) for rows in curves] for curves in (pinned, new))
        mean = statistics.mean(old)
        spread = max(statistics.stdev(old), 0.05 * abs(mean - base))
        limit = mean - quantile * spread * np.sqrt(1 / len(old) + 1 / len(now))
        results.append({
            "statistic": name, "frames": frames, "pinned": mean, "spread": spread,
            "new": statistics.mean(now), "limit": limit, "short": statistics.mean(now) < limit,
            "blind": limit < base, "untrained": base, "seeds": (len(old), len(now)),
        })  # fmt: skip
    return results


def show(name, results):
    for r in results:
        said = {k: records.shown(v) for k, v in r.items() if isinstance(v, float)}
        verdict = "ok"
        if r["blind"]:
            verdict = f"cannot tell, random play with {said['untrained']} would pass"
        if r["short"]:
            verdict = f"FALLS SHORT by {records.shown(r['limit'] - r['new'])}"
        print(
            f"{name:44} {r['statistic']:4} to {r['frames']:,} frames: {said['new']:>8}, pinned"
            f" {said['pinned']} +- {said['spread']}, limit {said['limit']}: {verdict}"
        )


def files(paths):
    """The CSV files that are meant by files and folders, or None for each that has none."""
    for path in map(Path, paths):
        found = sorted(path.glob("*.csv")) if path.is_dir() else [path] if path.is_file() else []
        if not found:
            print(f"error: {path} is no CSV file and no folder with any", file=sys.stderr)
        yield from found or [None]


def check_new(paths, pinned, alpha):
    """Prints a line for each task and statistic -> names of what fell short, of what is unusable.

    What cannot be compared is said in one line, and the others are checked.
    """
    short, unusable = [], []
    for file in files(paths):
        if file is None:
            unusable.append("")
            continue
        old = Path(pinned) / file.name
        try:
            if not old.exists():
                raise ValueError(f"there is no pinned curve {old}")
            curves = [[*records.read_curve(path).values()] for path in (old, file)]
            results = compare(*curves, alpha)
        except (ValueError, KeyError, ArithmeticError) as error:
            print(f"error: {file} cannot be checked: {error}", file=sys.stderr)
            unusable.append(file.stem)
            continue
        show(file.stem, results)
        if any(r["short"] for r in results):
            short.append(file.stem)
    return short, unusable


def check_pinned(folder):
    """What is wrong with the pinned curves and cards, as lines."""
    wrong, folder, known = [], Path(folder), records.tasks()
    if not any(folder.glob("*.csv")):
        return [f"error: there is no curve in {folder}"]
    csvs, cards = ({p.stem for p in folder.glob(f"*.{kind}")} for kind in ("csv", "yaml"))
    wrong += [f"{name}: a curve or a card is missing" for name in csvs ^ cards]
    wrong += [f"{name} is not in tasks.yaml" for name in csvs - set(known)]
    for name in sorted(csvs & cards & set(known)):
        curves = records.read_curve(folder / f"{name}.csv")
        card = yaml.safe_load((folder / f"{name}.yaml").read_text())
        if [run["seed"] for run in card["runs"]] != list(curves):
            wrong.append(f"{name}: seeds of curve and card differ")
            continue
        for run, rows in zip(card["runs"], curves.values(), strict=True):
            last = [row for row in rows if row["kind"] == "eval"][-1]
            facts = records.rounded(last["episode_return"]), last["env_frames"], last["updates"]
            told = run["final_eval_return"], run["env_frames"], run["updates"]
            if facts != told:
                wrong.append(f"{name} seed {run['seed']}: the curve ends with {facts}, not {told}")
            if run["env_frames"] < card["args"]["total_frames"]:
                wrong.append(f"{name} seed {run['seed']} ends after {run['env_frames']:,} frames")
        print(f"{name:52} {len(curves)} seeds, tail", end=" ")
        tails = (records.tail(rows, records.last_frame(rows)) for rows in curves.values())
        print(*map(records.shown, tails))
    return wrong


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("new", nargs="*", help="CSV files or folders; none: check what is pinned")
    parser.add_argument("--pinned", default=records.CURVES, help="folder of the pinned curves")
    parser.add_argument("--alpha", type=float, default=0.01, help="false alarms per task, at most")
    args = parser.parse_args(argv)
    if not args.new:
        wrong = check_pinned(args.pinned)
        for line in wrong:
            print(line, file=sys.stderr)
        return 1 if wrong else 0
    short, unusable = check_new(args.new, args.pinned, args.alpha)
    if short:
        print(f"fell short: {', '.join(short)}", file=sys.stderr)
    return 1 if short else 2 if unusable else 0


if __name__ == "__main__":
    sys.exit(main())
