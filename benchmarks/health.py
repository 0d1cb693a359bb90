"""Says where the metrics of a run leave the range of good runs.

    python benchmarks/health.py RUN        a line for each metric that does, exit code 1 if one does
    python benchmarks/health.py --tables   writes docs/health.md's table and metrics/README.md

Good runs are the pinned ones of benchmarks/curves, whose metrics are in benchmarks/metrics, if they
held at least 90 % of what the best seed of their task gained over random play. Runs are compared at
three stages, after so many updates, by the median of what was logged within a quarter of that
number. The range of a metric reaches from the lowest to the highest of the good runs, and by its
width or by half of the larger end further on either side, for there are few of them. A run of a
task with at least three good runs of other seeds, with the same observations and sizes, is compared
with these. Any other one is compared with all good runs of its script, and only in how far values
are from what they are trained on.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parent.parent))
import plot
import records

import runtime

STAGES = (1000, 3000, 5900)  # updates
ENOUGH = 3  # good runs of a task, below which they make no range
METRICS = records.ROOT / "benchmarks" / "metrics"
PAGE = """# Ranges of good runs

`python benchmarks/health.py --tables` writes this page from the metrics beside it. A task has the
lowest and the highest value of its [good runs](../../docs/health.md) after 1,000, 3,000 and 5,900
updates, where there are at least three of them. Another page says
[what each metric is](../../docs/metrics.md).
"""

# What each metric of V1 and V2 means where it is too low and too high, and what to try first.
MEANING = {
    "losses/image": (
        "", "the images are not learnt, or are more varied: look at the open-loop video"
    ),
    "losses/vector": (
        "", "vectors are not learnt: bring their entries to the order of 1, raise --vector-scale"
    ),
    "losses/reward": (
        "", "rewards are not predicted, or are large: scale them, or --reward-transform tanh"
    ),
    "losses/discount": (
        "", "ends are not predicted: see that the environment says terminated, not truncated"
    ),
    "losses/kl": (
        "the posterior tells nothing new: see losses/vector or losses/image",
        "the prior does not follow: raise --kl-scale, lower --model-lr",
    ),
    "model/post_entropy": (
        "", "latents are not used: lower --kl-scale, raise --vector-scale"
    ),
    "model/prior_entropy": (
        "", "what comes next is not predicted: train for longer, raise --batch-length"
    ),
    "imag/actor_entropy": (
        "the policy is certain too early: raise --actor-entropy, lower --actor-lr",
        "the policy learns nothing from its dreams: see imag/return, raise --actor-lr",
    ),
    "imag/discount": (
        "dreams end early: see losses/discount", "dreams do not end: see losses/discount"
    ),
    "value - return": (
        "the critic lags behind: raise --critic-lr",
        "the critic promises too much: lower --critic-lr",
    ),
    "slow - value": (
        "the slow critic lags behind: lower --slow-update",
        "it lags behind while values fall: lower --slow-update",
    ),
    "grad_norm/model": ("", "rare large losses: lower --model-lr or --clip"),
    "grad_norm/actor": ("the actor is not driven: see imag/actor_entropy", "lower --actor-lr"),
    "grad_norm/critic": ("", "lower --critic-lr"),
}  # fmt: skip
# The same of V3, which has one learning rate and other losses.
MEANING_V3 = {
    "losses/image": MEANING["losses/image"],
    "losses/vector": (
        "", "vectors are not learnt: bring small entries to the order of 1, raise --train-ratio"
    ),
    "losses/reward": ("", "rewards are not predicted: raise --train-ratio"),
    "losses/discount": MEANING["losses/discount"],
    "model/kl": (
        "the posterior tells nothing new: see losses/vector or losses/image",
        "the prior does not follow: raise --dyn-scale, lower --lr",
    ),
    "model/post_entropy": ("", "latents are not used: lower --rep-scale"),
    "model/prior_entropy": MEANING["model/prior_entropy"],
    "imag/actor_entropy": (
        "the policy is certain too early: raise --actor-entropy, lower --lr",
        "the policy learns nothing from its dreams: see imag/return, raise --lr",
    ),
    "imag/discount": MEANING["imag/discount"],
    "value - return": (
        "the critic lags behind: raise --lr", "the critic promises too much: lower --lr"
    ),
    "slow - value": (
        "the slow critic lags behind: raise --slow-rate",
        "it lags behind while values fall: raise --slow-rate",
    ),
    "losses/replay_critic": ("", "values do not fit the replayed rewards: see losses/reward"),
    "grad_norm": ("", "rare large losses: lower --lr or --agc"),
}  # fmt: skip
# What can be compared between tasks, and how far beyond the range counts as equal there.
COMPARABLE = {"value - return": 0.05, "slow - value": 0.05}
# Flags in which a run agrees with those of a task that it is compared with.
ALIKE = (
    "env_id", "env_kwargs", "observation", "pixels", "action_repeat", "reward_transform", "deter",
    "hidden", "stoch", "units", "layers", "cnn_depth",
)  # fmt: skip


def meaning_of(script):
    """The meanings of the metrics of a script."""
    return MEANING_V3 if script == "dreamerv3" else MEANING


def with_differences(row):
    """A logged row, and how far values are from what they are trained on.

    Both distances are in units of the return, or of 1 if the return is smaller.
    """
    row = dict(row)
    if "imag/value" in row and "imag/return" in row:
        scale = max(1.0, abs(row["imag/return"]))
        row["value - return"] = (row["imag/value"] - row["imag/return"]) / scale
        if "imag/slow_value" in row:
            row["slow - value"] = (row["imag/slow_value"] - row["imag/value"]) / scale
    return row


def stages(rows):
    """The medians of each metric near each stage that was reached: {stage: {metric: value}}."""
    found = {}
    for stage in STAGES:
        near = [with_differences(row) for row in rows if abs(row["updates"] - stage) <= stage / 4]
        values = {tag: [row[tag] for row in near if tag in row] for tag in MEANING | MEANING_V3}
        found[stage] = {tag: float(np.median(seen)) for tag, seen in values.items() if seen}
    return {stage: values for stage, values in found.items() if values}


def good_seeds(name, curves=records.CURVES):
    """The seeds of a pinned task that held 90 % of what the best one gained over random play."""
    seeds = records.read_curve(Path(curves) / f"{name}.csv")
    held = {seed: records.held(rows, records.last_frame(rows)) for seed, rows in seeds.items()}
    random = records.tasks()[name]["random"]
    enough = random + 0.9 * (max(held.values()) - random)
    return [seed for seed, value in held.items() if value >= enough]


def good_runs(script, metrics=METRICS, curves=records.CURVES):
    """What the good runs of a script logged: {task: {seed: stages of a run}}."""
    found = {}
    for name, task in records.tasks().items():
        path = Path(metrics) / f"{name}.csv"
        if Path(task["script"]).name == script and path.exists():
            logs = records.read_metrics(path)
            found[name] = {seed: stages(logs[seed]) for seed in good_seeds(name, curves)}
    return found


def task_like(args, names, curves=records.CURVES):
    """The first of the pinned tasks with the observations and sizes of a run, or None."""
    for name in names:
        told = yaml.safe_load((Path(curves) / f"{name}.yaml").read_text())["args"]
        if all(told.get(key) == args.get(key) for key in ALIKE):
            return name
    return None


def ranges(runs):
    """The lowest and highest of each metric at each stage: {stage: {metric: (low, high)}}."""
    found = {stage: {} for stage in STAGES}
    for stage in STAGES:
        for tag in MEANING | MEANING_V3:
            seen = [run[stage][tag] for run in runs if tag in run.get(stage, {})]
            if seen:
                found[stage][tag] = (min(seen), max(seen))
    return found


def outside(script, args, rows):
    """Where a run leaves the range of good runs -> lines for people, and what it was compared with.

    script: the script's name; args: the run's, a dict; rows: what it logged. Raises ValueError, a
    line for people, if there is nothing to compare.
    """
    good = good_runs(script)
    if not good:
        raise ValueError(f"no run of {script} is pinned; --like SCRIPT compares a copy of SCRIPT")
    reached = stages(rows)
    if not reached:
        raise ValueError(f"nothing was logged near {STAGES[0]:,} updates yet")
    same = task_like(args, good)
    others = {seed: run for seed, run in good.get(same, {}).items() if seed != args["seed"]}
    if len(others) >= ENOUGH:
        tags = meaning_of(script)
        runs = list(others.values())
        compared = f"{len(runs)} good runs of {same}"
    else:
        tags = COMPARABLE
        runs = [run for seeds in good.values() for run in seeds.values()]
        compared = f"{len(runs)} good runs of {script} on all tasks, in {', '.join(tags)} alone"
    compared += f", after {', '.join(f'{stage:,}' for stage in reached)} updates"
    chosen = ranges(runs)
    said = []
    for stage, values in reached.items():
        for tag in tags:
            if tag not in values or tag not in chosen[stage]:
                continue
            low, high = chosen[stage][tag]
            if tag in COMPARABLE:  # a share, of which half would mean nothing
                slack = max(high - low, COMPARABLE[tag])
            else:
                slack = max(high - low, abs(high) / 2, abs(low) / 2)
            too_low, too_high = meaning_of(script)[tag]
            meaning = ""
            if values[tag] < low - slack:
                meaning = too_low
            if values[tag] > high + slack:
                meaning = too_high
            if meaning:
                said.append(
                    f"{tag} is {values[tag]:.3g} after {stage:,} updates, good runs have"
                    f" {low:.3g} to {high:.3g}: {meaning}"
                )
    return said, compared


def table(script, runs):
    """Markdown rows of the ranges of the good runs of a script on a task."""
    found = ranges(runs)
    rows = []
    for tag in meaning_of(script):
        if any(tag in found[stage] for stage in STAGES):
            rows.append([f"`{tag}`", *(range_text(found[stage].get(tag)) for stage in STAGES)])
    return plot.markdown(["metric", *(f"{stage:,}" for stage in STAGES)], rows)


def range_text(ends):
    """A lowest and a highest value as text, or a dash for None."""
    return f"{ends[0]:.3g} to {ends[1]:.3g}" if ends else "-"


def meanings(told):
    """Markdown rows of what each metric means; told: MEANING or MEANING_V3."""
    rows = [[f"`{tag}`", low or "-", high or "-"] for tag, (low, high) in told.items()]
    return plot.markdown(["metric", "too low", "too high"], rows)


def tables():
    """Markdown of the ranges of all pinned tasks, "" if there are none."""
    parts = []
    for script in ("dreamerv1", "dreamerv2", "dreamerv3"):
        for name, seeds in good_runs(script).items():
            if len(seeds) >= ENOUGH:
                parts.append(
                    f"## {name}, {len(seeds)} runs\n\n{table(script, list(seeds.values()))}\n"
                )
    return "\n".join(parts)


def ranges_page():
    """Markdown of the page beside the metrics."""
    return f"{PAGE}\n{tables()}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--like", help="the script whose good runs to compare with")
    parser.add_argument("--tables", action="store_true", help="write the tables of good runs")
    args = parser.parse_args(argv)
    if (args.run is None) != args.tables:
        parser.error("name a run, or --tables")
    if args.tables:
        if not tables():
            sys.exit(f"error: there are no metrics of a task in {METRICS}")
        path = records.ROOT / "docs" / "health.md"
        page = plot.with_section(path.read_text(), "meanings", meanings(MEANING))
        path.write_text(plot.with_section(page, "meanings-v3", meanings(MEANING_V3)))
        (METRICS / "README.md").write_text(ranges_page())
        return 0
    try:
        told = yaml.safe_load((args.run / "args.yaml").read_text())
        script = Path(args.like or told["exp_name"]).stem
        said, compared = outside(script, told, runtime.read_log(args.run))
    except (ValueError, KeyError, TypeError, OSError, yaml.YAMLError) as error:
        said = f"no {error} in its args.yaml" if isinstance(error, KeyError) else str(error)
        print(f"error: {' '.join(said.split())}", file=sys.stderr)
        return 2
    print(f"compared with {compared}")
    print(*(said or ["no metric leaves the range of good runs"]), sep="\n")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
