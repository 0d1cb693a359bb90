"""Draws curves: the pinned ones, with the tables of results, or any runs side by side.

    python benchmarks/plot.py             benchmarks/plots/*.png, benchmarks/README.md and the
                                          tables of results in docs/results.md and the README
    python benchmarks/plot.py --tables    the tables alone
    python benchmarks/plot.py --curves runs/benchmarks/curves --out plots     tasks, unpinned
    python benchmarks/plot.py runs/mine-* runs/base-* --out mine.png          any runs

Runs are run folders, CSV files of benchmarks/run.py, or folders with either. Each environment has
an axis, and each label on it a color. The label is the name of the folder without the seed at its
end, or the name of the CSV file.

Thin lines are the evaluations of seeds, the bold one is their mean, as far as all of them have
come. Where the authors published a curve, a gray band goes from their lowest to their highest
seed, with a dashed line for the median. Ours is then the mean in each of its bins, and thin lines
are evaluations or training episodes, as theirs are. Dotted: random play and people, where known.
"""

import argparse
import csv
import itertools
import sys
from pathlib import Path

import numpy as np
import yaml
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent))
import records

COLORS = {
    "dreamerv1": "tab:blue", "dreamerv2": "tab:orange", "dreamerv3": "tab:green",
    "benchmarks/without_memory": "tab:gray",
}  # fmt: skip
COLUMNS = {  # of the README's table
    "dreamerv1": "DreamerV1", "dreamerv2": "DreamerV2", "dreamerv3": "DreamerV3",
    "benchmarks/without_memory": "without memory",
}  # fmt: skip
KINDS = {"eval": "evaluations", "train": "training episodes"}
GROUPS = {"cpu": "On a CPU", "long": "On a CPU, for hours", "gpu": "On a GPU"}
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

A seed's `held` is the mean of its evaluations in the last third of the frames, `worst` the lowest
of them. `check.py` judges by `held` and by the area under the curve; its first lines say how, how
often it accuses the innocent, and how small a loss it finds.

| file | what it is for |
|---|---|
| `run.py` | runs grids of scripts, environments and seeds, and records their curves |
| `check.py` | compares curves, two variants or new ones with the pinned |
| `plot.py` | draws curves and writes the tables |
| `records.py` | how runs become curves and cards, and the statistics of a curve |
| `tasks.yaml` | the tasks, with the command and the notes of each |
| `speed.py` | times updates and their parts, beside sheeprl if asked |
| `speed_sheeprl.py` | the part of it that runs in an environment with sheeprl |
| `speed_run.py` | times whole runs until their task is solved, for `speed.py --run` |
| `health.py` | says where a run's metrics leave those of good runs |
| `inspect_run.py` | writes a page that says how far a run's imagination can be trusted |
| `instruments.py` | what is measured for that page |
| `smoke.py` | trains a script for a minute and fails unless it learned |
| `without_memory.py` | DreamerV2 that forgets, to compare with where a task needs memory |
| `kill_often.py` | kills a run again and again and checks what must survive |
| `soak.py` | runs for long and reports whether memory or open files grow |
| `recipes.py` | other people's worlds as environments: Crafter, MiniGrid, ... |
| `environments.py` | tries every world that the docs name |

![All curves](plots/overview.png)

The papers' tasks alone, Pong with small networks:

![The papers' tasks](plots/papers.png)
"""


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


def binned(task):
    """Our mean in each bin of the authors' curve that all seeds fill -> pairs of its end, mean.

    Of evaluations or of training episodes, as theirs is: the mean over seeds of a seed's mean.
    """
    pairs = []
    ends = [row["env_frames"] for row in authors(task)]
    last = min(records.last_frame(rows) for rows in task["curves"].values())
    for before, end in itertools.pairwise([0, *ends]):
        seeds = []
        for rows in task["curves"].values():
            seen = zip(*points(rows, task["published"]), strict=True)
            seeds.append([ret for frames, ret in seen if before < frames <= end])
        if end <= last and all(seeds):
            pairs.append((end, float(np.mean([np.mean(seed) for seed in seeds]))))
    return pairs


def pinned(folder):
    """Tasks with a curve in the folder, in the order of tasks.yaml, and their curves and cards."""
    for name, task in records.tasks().items():
        if (path := Path(folder) / f"{name}.csv").exists():
            card = yaml.safe_load(path.with_suffix(".yaml").read_text())
            yield task | {"curves": records.read_curve(path), "card": card}


def spelled(values):
    """1, 2, 3 if they differ, else 1."""
    return ", ".join(dict.fromkeys(map(str, values)))


def cells(task, folder):
    """What is told of a task in a table: {column: text}.

    folder: leads from the text to benchmarks/. Where the authors have a curve: our mean in the last
    of its bins that ours fills, and their median (and range) over seeds.
    """
    runs = task["card"]["runs"]
    frames = min(run["env_frames"] for run in runs)
    seeds = [(rows, records.last_frame(rows)) for rows in task["curves"].values()]
    each = {
        "held": [records.held(rows, last) for rows, last in seeds],
        "worst": [records.worst(rows, last) for rows, last in seeds],
        "at the end": [run["final_eval_return"] for run in runs],
    }
    reported = "-"
    if bins := binned(task):
        last, ours = bins[-1]
        row = next(row for row in authors(task) if row["env_frames"] == last)
        reported = f"{ours:.0f}, authors {row['median']:.0f} ({row['min']:.0f} to {row['max']:.0f})"
    hours = sorted(run["wall_hours"] for run in runs)
    return {
        "task": f"[`{task['name']}`]({folder}curves/{task['name']}.yaml)",
        "env frames": f"{frames:,}",
        **{f"{k}, each seed": ", ".join(map(records.shown, v)) for k, v in each.items()},
        "last full bin, authors'": reported,
        "best known": str(task.get("best", "-")),
        "hours a seed": " to ".join(dict.fromkeys(f"{h:.2f}" for h in (hours[0], hours[-1]))),
        "commit": spelled(run["commit"] for run in runs),
    }


def table(tasks, folder):
    """Markdown rows of what the tasks reached."""
    rows = [cells(task, folder) for task in tasks]
    return markdown(list(rows[0]), [list(row.values()) for row in rows])


def summary(tasks):
    """The README's table: a row for each environment, a column for each script."""
    rows = {}
    for task in tasks:
        _, env = task["name"].split("-", 1)
        frames = min(run["env_frames"] for run in task["card"]["runs"])
        row = rows.setdefault((env, frames), {"best": str(task.get("best", "-"))})
        seeds = [(curve, records.last_frame(curve)) for curve in task["curves"].values()]
        held = ", ".join(records.shown(records.held(*seed)) for seed in seeds)
        worst = records.shown(min(records.worst(*seed) for seed in seeds))
        row[task["script"]] = f"[{held}](benchmarks/curves/{task['name']}.yaml) ({worst})"
    columns = ["task", "env frames", *COLUMNS.values(), "best known"]
    return markdown(columns, [
        [f"`{env}`", f"{frames:,}", *(row.get(script, "-") for script in COLUMNS), row["best"]]
        for (env, frames), row in rows.items()
    ])  # fmt: skip


def markdown(columns, rows):
    """A table with a header, of lists of texts."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_section(text, name, section):
    """The text with another section between the markers of a name."""
    begin = f"<!-- {name}:begin -->\n"
    end = f"<!-- {name}:end -->"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}{section}\n{end}{after}"


def write_tables(tasks):
    """Writes benchmarks/README.md and the tables of docs/results.md and of the README."""
    pages = {
        records.ROOT / "README.md": summary(tasks),
        records.ROOT / "docs" / "results.md": table(tasks, "../benchmarks/"),
    }
    for page, text in pages.items():
        page.write_text(with_section(page.read_text(), "results", text))
    (records.ROOT / "benchmarks" / "README.md").write_text(report(tasks))


def report(tasks):
    """The text of benchmarks/README.md."""
    parts = [ABOUT]
    for group, title in GROUPS.items():
        chosen = [task for task in tasks if task["group"] == group]
        if not chosen:
            continue
        parts.append(f"## {title}\n\n{table(chosen, '')}\n")
        for task in chosen:
            runs = task["card"]["runs"]
            parts.append(f"### {task['name']}\n\n```\n{task['card']['command']}\n```\n")
            parts.append(f"On {spelled(run['device'] for run in runs)}, ")
            parts[-1] += f"torch {spelled(run['versions']['torch'] for run in runs)}."
            parts[-1] += f" {task['note']}\n" if "note" in task else "\n"
            parts.append(f"![{task['name']}](plots/{task['name']}.png)\n")
    return "\n".join(parts)


def points(rows, kind="eval"):
    """Frames and returns of the evaluations, or of the training episodes."""
    rows = [row for row in rows if row["kind"] == kind]
    return [[row[k] for row in rows] for k in ("env_frames", "episode_return")]


def draw_seeds(axis, seeds, color, label):
    """Draws frames and returns of each seed as a thin line, and their mean as a bold one."""
    for frames, returns in seeds:
        axis.plot(frames, returns, color=color, alpha=0.35, linewidth=0.8)
    grid = np.linspace(max(x[0] for x, _ in seeds), min(x[-1] for x, _ in seeds), 200)
    mean = np.mean([np.interp(grid, *seed) for seed in seeds], 0)
    axis.plot(grid, mean, color=color, linewidth=2, label=label)


def draw(axis, task):
    """Draws a task's seeds and mean; where the authors have a curve, means in its bins."""
    color = COLORS[task["script"]]
    kind = task.get("published", "eval")
    seeds = [points(rows, kind) for rows in task["curves"].values()]
    bins = binned(task)
    if not bins:
        draw_seeds(axis, seeds, color, task["script"])
        return
    for seed in seeds:
        axis.plot(*seed, color=color, alpha=0.35, linewidth=0.8)
    ends, means = zip(*bins, strict=True)
    axis.plot(ends, means, color=color, marker="o", label=f"{task['script']}, {KINDS[kind]}")
    rows = [row for row in authors(task) if row["env_frames"] <= ends[-1]]
    x, low, high, middle = (
        [row[k] for row in rows] for k in ("env_frames", "min", "max", "median")
    )
    axis.fill_between(x, low, high, color="gray", alpha=0.25, linewidth=0)
    label = f"its authors, {rows[-1]['seeds']} seeds"
    axis.plot(x, middle, color=color, marker="o", linestyle="--", linewidth=1, label=label)


def finish(axis, tasks):
    """Draws what is known of the environment that the tasks share, and names the axes."""
    task = tasks[0]
    for key in ("random", "human"):
        if key in task:
            axis.axhline(task[key], color="black", linestyle=":", linewidth=0.8)
            axis.annotate(key, (0.99, task[key]), xycoords=("axes fraction", "data"), ha="right",
                          va="bottom", fontsize=7)  # fmt: skip
    axis.set_title(task["env_id"], fontsize=10)
    axis.set_xlabel("environment frames")
    kinds = {task.get("published", "eval") for task in tasks}
    axis.set_ylabel(f"return of {KINDS[kinds.pop()]}" if len(kinds) == 1 else "return")
    axis.legend(fontsize=7, loc="best")
    axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 3))


def panels(count):
    """A figure with so many axes, up to three in a row -> figure, axes."""
    columns = min(3, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.2 * columns, 3.1 * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[count:]:
        axis.axis("off")
    return figure, axes.flat[:count]


def save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})


def draw_runs(paths):
    """A figure of run folders and CSV files, an axis for each environment.

    Raises ValueError, a line for people, if they cannot be drawn.
    """
    groups = {}  # (env_id, label): curves
    for curve in records.find_curves(paths):
        if not any(row["kind"] == "eval" for row in curve.rows):
            raise ValueError(f"{curve.source} has no evaluation yet")
        groups.setdefault((curve.rows[0]["env_id"], curve.label), []).append(curve)
    labels = list(dict.fromkeys(label for _, label in groups))
    env_ids = list(dict.fromkeys(env_id for env_id, _ in groups))
    figure, axes = panels(len(env_ids))
    for (env_id, label), curves in groups.items():
        records.refuse_repeated_seeds(curves)
        seeds = [points(curve.rows) for curve in curves]
        # matplotlib has ten colors, C0 to C9, and begins again.
        draw_seeds(axes[env_ids.index(env_id)], seeds, f"C{labels.index(label)}", label)
    for axis, env_id in zip(axes, env_ids, strict=True):
        finish(axis, [{"env_id": env_id}])
    return figure


def write_plots(tasks, out):
    """A PNG for each task, one of all, and one of the papers' tasks."""
    for task in tasks:
        figure = Figure(figsize=(5, 3.4))
        axis = figure.subplots()
        draw(axis, task)
        finish(axis, [task])
        save(figure, out / f"{task['name']}.png")

    worlds = {}  # what follows the script in a task's name: tasks
    for task in tasks:
        worlds.setdefault(task["name"].split("-", 1)[1], []).append(task)
    save(draw_together(worlds.values()), out / "overview.png")
    if papers := [chosen for chosen in worlds.values() if chosen[0]["group"] in ("long", "gpu")]:
        save(draw_together(papers), out / "papers.png")


def draw_together(groups):
    """A figure with an axis for each list of tasks."""
    figure, axes = panels(len(groups))
    for axis, tasks in zip(axes, groups, strict=True):
        for task in tasks:
            draw(axis, task)
        finish(axis, tasks)
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", help="run folders, CSV files; none: what is pinned")
    parser.add_argument("--tables", action="store_true", help="write no plots")
    parser.add_argument("--curves", type=Path, default=records.CURVES)
    parser.add_argument("--out", type=Path, help="of runs: a PNG; else: a folder of them")
    args = parser.parse_args(argv)
    if args.runs:
        if args.out is None or args.out.suffix != ".png":
            parser.error("runs need --out FILE.png")
        try:
            save(draw_runs(args.runs), args.out)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0
    ours = args.curves.resolve() == records.CURVES
    if not ours and (args.tables or args.out is None):
        parser.error("curves that are not pinned need --out FOLDER, and have no tables")
    try:
        tasks = list(pinned(args.curves))
    except (KeyError, ValueError, OSError, yaml.YAMLError) as error:
        sys.exit(f"error: {args.curves} cannot be read, {' '.join(str(error).split())}")
    if not tasks:
        sys.exit(f"error: there is no curve of a task in {args.curves}")
    if ours:
        write_tables(tasks)
    if not args.tables:
        write_plots(tasks, args.out or records.ROOT / "benchmarks" / "plots")
    return 0


if __name__ == "__main__":
    sys.exit(main())
