"""Checks learning curves: one variant against another, or new curves against the pinned ones.

    python benchmarks/check.py runs/mine-* --against runs/base-*    run folders of two variants
    python benchmarks/check.py mine.csv --against base.csv          or curves of benchmarks/run.py
    python benchmarks/check.py runs/benchmarks/curves               each CSV file against the pinned
                                                                    curve of the same name
    python benchmarks/check.py                                      the pinned curves themselves:
                                                                    whole, as their cards say

A side of --against is all that is named: run folders, CSV files, folders with either. Exit code 1
if the new side falls short (or a pinned curve is not as its card says), 2 if something cannot be
compared.

Statistics. `held` is the mean of a seed's evaluations in the last third of the frames, or the last
one before if there is none; of its training episodes, if some seed was never evaluated. `area` is
the area under the curve of its training episodes, divided by the frames. `worst` is the lowest of
the evaluations in the last third; it is shown and not judged. All curves are cut to the frames of
the shortest.

Verdict. The new side falls short if its mean over the seeds lies below the old one by more than a
margin, in either of the two statistics.

    against pinned   margin = t * spread * sqrt(1 / pinned seeds + 1 / new seeds)
    --against        margin = t * sqrt(old spread^2 / old seeds + new spread^2 / new seeds)

A spread is the sample standard deviation of the seeds; against pinned curves theirs counts for
both, so that one new seed is enough. It counts as at least 5 % of what the old seeds gained over
random play: three seeds that all end at 500 do not promise that the fourth does. t is the one-sided
quantile of Student's distribution for alpha / 2, with pinned seeds - 1 degrees of freedom, or with
those of Welch's test. So an unchanged algorithm whose seeds vary normally is accused in a share
alpha of the comparisons at most: 0.01 against pinned curves, 0.05 with --against, where the margin
is half of the 95 % confidence interval that is printed. If random play would pass, the check says
that it cannot tell.

Power. "finds a loss of 80" means: such a loss in return is found with a probability of 95 %, a
smaller one less often. It is simulated with a fixed seed: 20,000 times seeds of both sides are
drawn from normal distributions with the spreads that were seen, and compared. For the pinned curves
this agrees with the noncentral t distribution.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import scipy.stats
import yaml

sys.path.insert(0, str(Path(__file__).parent))
import records
from records import shown

# Flags without which returns do not mean the same, or are not measured in the same way.
SAME = [
    "env_id", "env_kwargs", "time_limit", "sticky_prob", "full_action_space", "eval_every",
    "eval_episodes", "eval_envs", "eval_sample",
]  # fmt: skip
SIMULATIONS = 20_000


# Both margins take the seeds of each side (..., seeds) and the least spread -> (...).


def pinned_margin(old, new, least, alpha):
    """The margin if the spread of the old side counts for both."""
    spread = np.maximum(old.std(-1, ddof=1), least)
    t = scipy.stats.t.ppf(1 - alpha / 2, old.shape[-1] - 1)
    return t * spread * np.sqrt(1 / old.shape[-1] + 1 / new.shape[-1])


def welch_margin(old, new, least, alpha):
    """The margin of Welch's test, in which each side has a spread of its own."""
    a = np.maximum(old.var(-1, ddof=1), least**2) / old.shape[-1]
    b = np.maximum(new.var(-1, ddof=1), least**2) / new.shape[-1]
    freedom = (a + b) ** 2 / (a**2 / (old.shape[-1] - 1) + b**2 / (new.shape[-1] - 1))
    return scipy.stats.t.ppf(1 - alpha / 2, freedom) * np.sqrt(a + b)


def compare(old, new, alpha=0.01, own_spreads=False):
    """Compares curves, lists of rows for each seed -> a dict for each statistic that is judged.

    own_spreads: whether the new side counts with its own spread, and not with the old one's.
    Raises ValueError if there are too few seeds or episodes.
    """
    margin = welch_margin if own_spreads else pinned_margin
    sides = [("old", old), ("new", new)] if own_spreads else [("old", old)]
    for name, curves in sides:
        if len(curves) < 2:
            raise ValueError(f"a spread takes two seeds, the {name} side has {len(curves)}")
    frames = min(map(records.last_frame, [*old, *new]))
    untrained = [records.untrained(rows) for rows in [*old, *new]]
    untrained = [value for value in untrained if not np.isnan(value)]
    random_play = float(np.mean(untrained)) if untrained else -np.inf
    results = []
    for name, kind in kinds(old, new, frames).items():
        before, after = values(name, kind, old, frames), values(name, kind, new, frames)
        gain = abs(before.mean() - random_play) if untrained else 0.0
        least = max(0.05 * gain, 1e-6)
        forgiven = float(margin(before, after, least, alpha))
        difference = float(after.mean() - before.mean())
        spread = max(before.std(ddof=1), least)
        other = max(after.std(ddof=1), least) if own_spreads else spread
        results.append({
            "statistic": name, "frames": frames, "old": float(before.mean()),
            "new": float(after.mean()), "spread": float(spread), "difference": difference,
            "margin": forgiven, "limit": float(before.mean()) - forgiven,
            "short": difference < -forgiven, "better": difference > forgiven,
            "blind": before.mean() - forgiven < random_play, "random_play": random_play,
            "finds": smallest_loss(
                (spread, other), (len(old), len(new)), least, alpha, margin
            ),
        })  # fmt: skip
    return results


def kinds(old, new, frames):
    """The kind of row that each judged statistic is taken from."""
    seen = all(records.evaluated(rows, frames) for rows in [*old, *new])
    return {"held": "eval" if seen else "train", "area": "train"}


def values(name, kind, curves, frames):
    """A statistic of each seed: (seeds,)."""
    return np.array([getattr(records, name)(rows, frames, kind) for rows in curves])


def smallest_loss(spreads, seeds, least, alpha, margin):
    """The loss in return that is found with a probability of 95 %."""
    random = np.random.default_rng(0)
    old = random.normal(0, spreads[0], (SIMULATIONS, seeds[0]))
    new = random.normal(0, spreads[1], (SIMULATIONS, seeds[1]))
    # Without a loss the means differ by chance; a loss is found if it exceeds this:
    needed = new.mean(-1) - old.mean(-1) + margin(old, new, least, alpha)
    return float(np.quantile(needed, 0.95))


def finding(result):
    """What loss would be found, for people; nothing can lose more than all it has learned."""
    if result["finds"] > result["old"] - result["random_play"]:
        return "too few seeds to find any loss"
    return f"finds a loss of {shown(result['finds'], result['old'])}"


def verdict(result, otherwise):
    """What is made of a difference, for people; `otherwise`: if there is nothing to say."""
    if result["short"]:
        lacking = shown(-result["difference"] - result["margin"], result["old"])
        return f"FALLS SHORT by {lacking}"
    if result["blind"]:
        return f"cannot tell, random play with {shown(result['random_play'])} would pass"
    return otherwise


# Two variants


def check_against(new_paths, old_paths, alpha):
    """Prints how two sets of curves compare -> whether the new one falls short.

    Raises ValueError, a line for people, if they cannot be compared.
    """
    new, old = records.find_curves(new_paths), records.find_curves(old_paths)
    refuse_other_settings([*old, *new])
    for side in (old, new):
        records.refuse_repeated_seeds(side)
    old_rows, new_rows = ([curve.rows for curve in side] for side in (old, new))
    results = compare(old_rows, new_rows, alpha, own_spreads=True)

    frames = results[0]["frames"]
    print(f"{name_of(new)} against {name_of(old)}, {env_of(old[0])} to {frames:,} frames")
    for line in differences(old, new):
        print(line)
    for r in results:
        difference = shown(r["difference"], r["old"])
        low = shown(r["difference"] - r["margin"], r["old"])
        high = shown(r["difference"] + r["margin"], r["old"])
        said = "better" if r["better"] else verdict(r, "no difference found")
        print(
            f"{r['statistic']:5} {shown(r['new'])} against {shown(r['old'])}:"
            f" difference {difference}, {100 * (1 - alpha):g} % interval {low} to {high},"
            f" {finding(r)}: {said}"
        )
    kind = kinds(old_rows, new_rows, frames)["held"]
    lowest = [shown(values("worst", kind, rows, frames).mean()) for rows in (new_rows, old_rows)]
    print(f"worst {lowest[0]} against {lowest[1]}: not judged")
    return any(r["short"] for r in results)


def name_of(side):
    labels = dict.fromkeys(curve.label for curve in side)
    return f"{', '.join(labels)} ({len(side)} seeds)"


def env_of(curve):
    return curve.rows[0]["env_id"]


def refuse_other_settings(curves):
    """Raises ValueError if environment or evaluation differ."""
    first = curves[0]
    for curve in curves:
        one, two = (c.args or {"env_id": env_of(c)} for c in (first, curve))
        for flag in SAME:
            if flag in one and flag in two and one[flag] != two[flag]:
                raise ValueError(
                    f"{first.source} and {curve.source} differ in {flag}: {one[flag]}, {two[flag]}"
                )


def differences(old, new):
    """A line for each flag that is not the same in all curves."""
    without = [curve for curve in [*old, *new] if curve.args is None]
    if without:
        return [f"flags are not compared: {without[0].source} has no card"]
    flags = dict.fromkeys(flag for curve in [*old, *new] for flag in curve.args)
    lines = []
    for flag in flags:
        before, after = (
            " or ".join(dict.fromkeys(str(curve.args.get(flag, "nothing")) for curve in side))
            for side in (old, new)
        )
        if flag != "seed" and (before != after or " or " in before):
            lines.append(f"differs: {flag} {before} -> {after}")
    return lines


# New curves against pinned ones


def show(name, results):
    for r in results:
        print(
            f"{name:44} {r['statistic']} to {r['frames']:,} frames: {shown(r['new']):>8}, pinned"
            f" {shown(r['old'])} +- {shown(r['spread'])}, limit {shown(r['limit'])},"
            f" {finding(r)}: {verdict(r, 'ok')}"
        )


def find_files(path):
    """The CSV files that are meant by a file or a folder; ValueError if there is none."""
    if path.is_file():
        return [path]
    found = sorted(path.glob("*.csv"))
    if not found:
        hint = "; a run folder needs --against" if (path / "args.yaml").exists() else ""
        raise ValueError(f"{path} is neither a CSV file nor a folder with any{hint}")
    return found


def check_new(paths, pinned, alpha):
    """Prints a line for each task and statistic -> names of what fell short, of what is unusable.

    What cannot be compared is said in one line, and the others are checked.
    """
    short, unusable, files = [], [], []
    for path in map(Path, paths):
        try:
            files += find_files(path)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            unusable.append(path.name)
    for file in files:
        old = Path(pinned) / file.name
        try:
            if not old.exists():
                raise ValueError(f"there is no pinned curve {old}, compare it with --against")
            old_curves = records.find_curves([old])
            new_curves = records.find_curves([file])
            refuse_other_settings([*old_curves, *new_curves])
            old_rows = [curve.rows for curve in old_curves]
            new_rows = [curve.rows for curve in new_curves]
            results = compare(old_rows, new_rows, alpha)
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
        print(f"{name:48} {describe([*curves.values()])}")
    return wrong


def describe(curves):
    """What pinned seeds reached, and the losses that as many new seeds would show."""
    frames = [records.last_frame(rows) for rows in curves]
    held = [shown(records.held(rows, last)) for rows, last in zip(curves, frames, strict=True)]
    worst = [shown(records.worst(rows, last)) for rows, last in zip(curves, frames, strict=True)]
    text = f"held {', '.join(held)}, worst {', '.join(worst)}"
    if len(curves) < 2:
        return text
    finds = [f"{r['statistic']} {finding(r)}" for r in compare(curves, curves)]
    return f"{text}; with {len(curves)} new seeds {'; '.join(finds)}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("new", nargs="*", help="run folders, CSV files, or folders of them")
    parser.add_argument("--against", nargs="+", metavar="OLD", help="what to compare them with")
    parser.add_argument("--pinned", default=records.CURVES, help="folder of the pinned curves")
    parser.add_argument("--alpha", type=float, help="false alarms per comparison, at most")
    args = parser.parse_args(argv)
    alpha = args.alpha
    if alpha is None:
        alpha = 0.05 if args.against else 0.01
    if not 0 < alpha < 1:
        parser.error(f"--alpha is {alpha}, it must be between 0 and 1")
    if args.against:
        try:
            short = check_against(args.new, args.against, alpha)
        except (ValueError, KeyError, ArithmeticError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 1 if short else 0
    if not args.new:
        wrong = check_pinned(args.pinned)
        for line in wrong:
            print(line, file=sys.stderr)
        return 1 if wrong else 0
    short, unusable = check_new(args.new, args.pinned, alpha)
    if short:
        print(f"fell short: {', '.join(short)}", file=sys.stderr)
    return 1 if short else 2 if unusable else 0


if __name__ == "__main__":
    sys.exit(main())
