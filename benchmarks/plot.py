"""Draws the pinned curves and writes the tables of results, from committed files alone.

    python benchmarks/plot.py             benchmarks/plots/*.png, benchmarks/README.md and the
                                          results table of docs/results.md
    python benchmarks/plot.py --tables    the tables alone
    python benchmarks/plot.py --curves runs/benchmarks/curves --out plots     unpinned curves

Thin lines are seeds, the bold one is their mean, both of evaluations. The authors' published
seeds are a gray band from the lowest to the highest, with their median. Dotted: random play and
people, where known.
"""

import argparse
import csv
import statistics
import sys
from pathlib import Path

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).parent))
import records

COLORS = {"dreamerv1": "tab:blue", "dreamerv2": "tab:orange"}
GROUPS = {
    "cpu": "On a CPU", "gpu": "On a GPU", "bfloat16": "With bfloat16, on a CPU",
    "fast": "With bfloat16, compiled steps and overlapped environments, on a CPU",
    "processes": "With two processes, on a CPU",
    "horizon": "Half and twice the horizon, on a CPU",
}  # fmt: skip
ABOUT = """# Learning curves

This file, the plots and the table of [results](../docs/results.md) are written by
`python benchmarks/plot.py` from the curves and cards in [`curves`](curves), the tasks in
[`tasks.yaml`](tasks.yaml) and [`published.csv`](published.csv), the authors' figures.
A card has the command of its curve, all hyperparameters, versions, hardware and hours.

```bash
python benchmarks/run.py TASK --seeds 1 2 3          # runs a task, or a group of them, again
python benchmarks/check.py runs/benchmarks/curves    # exit code 1 if worse than the pinned curves
python benchmarks/plot.py                            # this file and the plots
```

`check.py` says in its first lines by which statistics it judges, and how often it accuses the
innocent.

![All curves](plots/overview.png)
"""
STATISTICS = (records.tail, records.area)
FINDING = """\
Improvement survives a halved horizon on both tasks, where all seeds end as well as with the
preset's H or better; on CartPole the way there is longer. Twice the horizon ends as well, and on
Pendulum it learns in the fewest frames, each update at a higher cost in time."""


def published():
    """The authors' figures: (script, env_id) -> rows of numbers in the order of frames."""
    found = {}
    with open(records.ROOT / "benchmarks" / "published.csv", newline="") as file:
        for row in csv.DictReader(file):
            numbers = {k: float(row[k]) for k in ("min", "median", "max")}
            numbers |= {"env_frames": int(row["env_frames"]), "seeds": int(row["seeds"])}
            found.setdefault((row["script"], row["env_id"]), []).append(numbers)
    return found


def authors(task):
    """The authors' rows for a task, none where it is not the same task."""
    return published().get((task["script"], task["env_id"]), []) if task.get("published") else []


def pinned(folder):
    """Tasks with a curve in the folder, in the order of tasks.yaml, and their curves and cards."""
    for name, task in records.tasks().items():
        if (path := Path(folder) / f"{name}.csv").exists():
            card = yaml.safe_load(path.with_suffix(".yaml").read_text())
            yield task | {"curves": records.read_curve(path), "card": card}


def spelled(values):
    """1, 2, 3 if they differ, else 1."""
    return ", ".join(dict.fromkeys(map(str, values)))


def table(tasks, folder):
    """Markdown rows of what the tasks reached; `folder` leads from the text to benchmarks/.

    The authors' median (and range) over seeds lies on a line between their nearest two frames.
    """
    head = "task | env frames | return at the end, each seed | mean | authors | best known"
    head = f"| {head} | hours a seed | commit |"
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for task in tasks:
        runs = task["card"]["runs"]
        returns = [run["final_eval_return"] for run in runs]
        frames = min(run["env_frames"] for run in runs)
        text, rows = "-", authors(task)
        if rows and rows[0]["env_frames"] <= frames <= 1.05 * rows[-1]["env_frames"]:
            at = [row["env_frames"] for row in rows]
            row = {k: np.interp(frames, at, [r[k] for r in rows]) for k in ("min", "median", "max")}
            text = f"{row['median']:.0f} ({row['min']:.0f} to {row['max']:.0f})"
        hours = sorted(run["wall_hours"] for run in runs)
        hours = dict.fromkeys(f"{h:.2f}" for h in (hours[0], hours[-1]))
        link = f"[`{task['name']}`]({folder}curves/{task['name']}.yaml)"
        cells = [link, f"{frames:,}", ", ".join(map(records.shown, returns))]
        cells += [records.shown(statistics.mean(returns)), text, str(task.get("best", "-"))]
        cells += [" to ".join(hours), spelled(run["commit"] for run in runs)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def between(text, name, new=None):
    """The part of a text between the markers of a name, or the text with a new such part."""
    begin = f"<!-- {name}:begin -->\n"
    end = f"<!-- {name}:end -->"
    before, rest = text.split(begin)
    old, after = rest.split(end)
    return old if new is None else f"{before}{begin}{new}\n{end}{after}"


def by_horizon(tasks):
    """Lists of the tasks that differ in their horizon alone, in rising order."""
    worlds = {}
    for task in tasks:
        if base := task.get("horizon_of"):
            worlds.setdefault(base, [t for t in tasks if t["name"] == base]).append(task)
    for chosen in worlds.values():
        chosen.sort(key=lambda task: task["card"]["args"]["imag_horizon"])
    return worlds


def horizons(tasks):
    """What each horizon gives: a table of means over the seeds."""
    lines = ["| task | H | seeds | tail of the evaluations | area under the training curve |"]
    lines.append("|---|---|---|---|---|")
    for base, chosen in by_horizon(tasks).items():
        for task in chosen:
            seeds = task["curves"].values()
            frames = min(map(records.last_frame, seeds))
            facts = (statistics.mean(f(r, frames) for r in seeds) for f in STATISTICS)
            cells = [f"`{base}`", str(task["card"]["args"]["imag_horizon"]), str(len(seeds))]
            lines.append(f"| {' | '.join([*cells, *map(records.shown, facts)])} |")
    return "\n".join(lines)


def write_tables(tasks):
    """Writes benchmarks/README.md and the table of docs/results.md."""
    results = records.ROOT / "docs" / "results.md"
    main = [task for task in tasks if task["group"] in ("cpu", "gpu")]
    results.write_text(between(results.read_text(), "results", table(main, "../benchmarks/")))
    (records.ROOT / "benchmarks" / "README.md").write_text(report(tasks))


def report(tasks):
    """The text of benchmarks/README.md."""
    parts = [ABOUT]
    for group, title in GROUPS.items():
        chosen = [task for task in tasks if task["group"] == group]
        if not chosen:
            continue
        parts.append(f"## {title}\n\n{table(chosen, '')}\n")
        if group == "horizon":
            parts.append(f"![Horizons](plots/horizon.png)\n\n{horizons(tasks)}\n\n{FINDING}\n")
        for task in chosen:
            runs = task["card"]["runs"]
            parts.append(f"### {task['name']}\n\n```\n{task['card']['command']}\n```\n")
            parts.append(f"On {spelled(run['device'] for run in runs)}, ")
            parts[-1] += f"torch {spelled(run['versions']['torch'] for run in runs)}."
            parts[-1] += f" {task['note']}\n" if "note" in task else "\n"
            parts.append(f"![{task['name']}](plots/{task['name']}.png)\n")
    return "\n".join(parts)


def evaluations(rows):
    """Frames and returns of the evaluations."""
    evals = [row for row in rows if row["kind"] == "eval"]
    return [[row[k] for row in evals] for k in ("env_frames", "episode_return")]


def draw(axis, task, color, label=None, band=True):
    """Draws the seeds and the mean of a task, and the authors' band."""
    seeds = [evaluations(rows) for rows in task["curves"].values()]
    for frames, returns in seeds:
        axis.plot(frames, returns, color=color, alpha=0.35, linewidth=0.8)
    grid = np.linspace(max(x[0] for x, _ in seeds), min(x[-1] for x, _ in seeds), 200)
    mean = np.mean([np.interp(grid, *seed) for seed in seeds], 0)
    axis.plot(grid, mean, color=color, linewidth=2, label=label or task["script"])
    last = max(x[-1] for x, _ in seeds)
    rows = [row for row in authors(task) if row["env_frames"] <= 1.3 * last]
    if rows and band:
        x, low, high = ([row[k] for row in rows] for k in ("env_frames", "min", "max"))
        axis.fill_between(x, low, high, color="gray", alpha=0.25, linewidth=0)
        middle = [row["median"] for row in rows]
        axis.plot(x, middle, color="gray", linewidth=1, label=f"authors, {rows[-1]['seeds']} seeds")


def finish(axis, task):
    for key in ("random", "human"):
        if key in task:
            axis.axhline(task[key], color="black", linestyle=":", linewidth=0.8)
            axis.annotate(key, (0.99, task[key]), xycoords=("axes fraction", "data"), ha="right",
                          va="bottom", fontsize=7)  # fmt: skip
    axis.set_title(task["env_id"], fontsize=10)
    axis.set_xlabel("environment frames")
    axis.set_ylabel("return of evaluations")
    axis.legend(fontsize=7, loc="best")
    axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 3))


def write_plots(tasks, out):
    """A PNG for each task, one of all and one of the horizons."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def save(figure, name):
        figure.tight_layout()
        figure.savefig(out / f"{name}.png", dpi=120, metadata={"Software": None})
        pyplot.close(figure)

    out.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        figure, axis = pyplot.subplots(figsize=(5, 3.4))
        draw(axis, task, COLORS[task["script"]])
        finish(axis, task)
        save(figure, task["name"])

    worlds = {}
    for task in tasks:
        if task["group"] in ("cpu", "gpu"):
            pixels = task["card"]["args"]["observation"], task["card"]["args"]["pixels"]
            worlds.setdefault((task["env_id"], pixels), []).append(task)
    columns = min(3, len(worlds))
    figure, axes = pyplot.subplots(-(-len(worlds) // columns), columns, squeeze=False)
    figure.set_size_inches(4.2 * columns, 3.1 * len(axes))
    for axis in axes.flat[len(worlds) :]:
        axis.axis("off")
    for axis, chosen in zip(axes.flat, worlds.values(), strict=False):
        for task in chosen:
            draw(axis, task, COLORS[task["script"]])
        finish(axis, chosen[0])
    save(figure, "overview")

    if worlds := by_horizon(tasks):
        figure, axes = pyplot.subplots(1, len(worlds), squeeze=False)
        figure.set_size_inches(4.6 * len(worlds), 3.3)
        for axis, chosen in zip(axes.flat, worlds.values(), strict=True):
            for task, color in zip(chosen, ("tab:green", "tab:orange", "tab:red"), strict=False):
                draw(axis, task, color, f"H = {task['card']['args']['imag_horizon']}", band=False)
            finish(axis, chosen[0])
        save(figure, "horizon")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tables", action="store_true", help="write no plots")
    parser.add_argument("--curves", type=Path, default=records.CURVES)
    parser.add_argument("--out", type=Path, default=records.ROOT / "benchmarks" / "plots")
    args = parser.parse_args(argv)
    tasks = list(pinned(args.curves))
    if not tasks:
        sys.exit(f"error: there is no curve of a task in {args.curves}")
    if args.curves == records.CURVES:
        write_tables(tasks)
    if not args.tables:
        write_plots(tasks, args.out)


if __name__ == "__main__":
    main()
