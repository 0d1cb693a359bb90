"""The tools around the curves: run.py, check.py and plot.py."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import check
import numpy as np
import plot
import pytest
import records
import run
import scipy.stats
import torch
import yaml
from helpers.processes import started, wait_until

import common
import dreamerv2
import dreamerv3
import runtime

ROOT = Path(__file__).parent.parent
TINY = [
    "--batch-size", "3", "--batch-length", "7", "--deter", "16", "--hidden", "16", "--units", "16",
    "--stoch", "3", "--cnn-depth", "2", "--imag-horizon", "3", "--prefill", "100",
    "--pretrain", "2", "--replay-size", "1000", "--eval-episodes", "1", "--threads", "1",
    "--log-every", "100",
]  # fmt: skip


def rows_of_a_seed(value, frames=10_000, untrained=20.0):
    """Rows of a seed that plays 100-frame episodes, is evaluated 10 times and ends at `value`."""
    for frame in range(100, frames + 1, 100):
        point = {"env_frames": frame, "updates": max(0, frame - 1000), "wall_hours": 0.1}
        point["episode_return"] = untrained if frame <= 1000 else value
        yield point | {"kind": "train"}
        if frame % 1000 == 0:
            yield point | {"kind": "eval"}


def write_curve(path, seeds, **options):
    """A curve of seeds, {seed: return at the end}."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, records.COLUMNS)
        writer.writeheader()
        for seed, value in seeds.items():
            point = {"script": "dreamerv2", "commit": "abc", "env_id": "CartPole-v1", "seed": seed}
            writer.writerows(point | row for row in rows_of_a_seed(value, **options))
    return path


def write_run(path, value, seed, **args):
    """A run folder with as much of it as check.py and plot.py read."""
    path.mkdir(parents=True)
    args = {"env_id": "CartPole-v1", "seed": seed, "eval_episodes": 20, "actor_lr": 3e-4} | args
    (path / "args.yaml").write_text(yaml.safe_dump(args))
    with open(path / "metrics.jsonl", "w") as file:
        for row in rows_of_a_seed(value):
            logged = {"frames": row["env_frames"], "updates": row["updates"], "seconds": 360}
            tag = "eval" if row["kind"] == "eval" else "charts"
            logged[f"{tag}/episodic_return"] = row["episode_return"]
            file.write(json.dumps(logged) + "\n")
    return str(path)


def write_runs(folder, name, values, **args):
    """Run folders of seeds 1, 2, ... that end at these returns."""
    return [
        write_run(folder / f"{name}-{seed}", value, seed, **args)
        for seed, value in enumerate(values, 1)
    ]


def curves_of(path):
    return [*records.read_curve(path).values()]


# Statistics


def test_held_is_the_mean_of_the_evaluations_in_the_last_third_and_worst_the_lowest():
    returns = {300: 3.0, 600: 6.0, 700: 9.0, 800: 1.0, 905: 5.0}
    evals = [{"kind": "eval", "env_frames": f, "episode_return": r} for f, r in returns.items()]
    train = [{"kind": "train", "env_frames": f, "episode_return": -9.0} for f in range(1000)]
    assert records.held(evals + train, 900) == np.mean([9, 1, 5])  # the last is an episode late
    assert records.worst(evals + train, 900) == 1
    assert records.held(evals + train, 800) == np.mean([6, 9, 1])
    assert records.held(evals[:1] + train, 900) == 3  # the last one before
    assert records.held(evals + train, 900, "train") == -9
    assert records.evaluated(evals, 300)
    assert not records.evaluated(evals, 200)


def test_the_area_weighs_an_episode_by_its_frames():
    rows = [(10, 1.0, "train"), (40, 2.0, "train"), (40, 99.0, "eval"), (100, 3.0, "train")]
    keys = ["env_frames", "episode_return", "kind"]
    rows = [dict(zip(keys, row, strict=True)) for row in rows]
    assert records.area(rows, 100) == pytest.approx((10 * 1 + 30 * 2 + 60 * 3) / 100)
    assert records.area(rows, 50) == pytest.approx((10 * 1 + 30 * 2) / 40)
    rows[1:1] = [rows[0] | {"episode_return": 7.0}]  # of a second environment
    assert records.area(rows, 50) == pytest.approx((10 * 4 + 30 * 2) / 40)


def test_the_limit_is_that_of_the_formula(tmp_path):
    pinned = curves_of(write_curve(tmp_path / "a.csv", {1: 300.0, 2: 400.0, 3: 500.0}))
    new = curves_of(write_curve(tmp_path / "b.csv", {1: 10.0, 2: 30.0}))
    held, area = check.compare(pinned, new, alpha=0.1)
    assert (held["old"], held["spread"], held["new"]) == (400, 100, 20)
    # Student's 95 % quantile for 2 degrees of freedom is 2.9200.
    assert held["limit"] == pytest.approx(400 - 2.92 * 100 * (1 / 3 + 1 / 2) ** 0.5, abs=0.01)
    assert held["short"]
    assert not held["blind"]
    assert area["old"] == pytest.approx(0.9 * 400 + 0.1 * 20)


def test_the_margin_of_two_variants_is_that_of_welchs_test():
    old, new = np.array([300.0, 400.0, 510.0]), np.array([350.0, 390.0, 370.0, 372.0])
    test = scipy.stats.ttest_ind(new, old, equal_var=False)
    interval = test.confidence_interval(0.95)
    margin = check.welch_margin(old, new, 1e-6, 0.05)
    assert margin == pytest.approx((interval.high - interval.low) / 2)


def test_the_spread_is_at_least_a_twentieth_of_what_was_gained(tmp_path):
    pinned = curves_of(write_curve(tmp_path / "a.csv", {1: 500.0, 2: 500.0, 3: 500.0}))
    for own_spreads in (False, True):
        held, _ = check.compare(pinned, pinned, 0.01, own_spreads)
        assert held["spread"] == pytest.approx(0.05 * 480)
        assert held["margin"] > held["spread"]


def test_a_shorter_curve_is_compared_with_the_beginning_of_the_pinned_ones(tmp_path):
    pinned = curves_of(write_curve(tmp_path / "a.csv", {1: 500.0, 2: 500.0}))
    new = curves_of(write_curve(tmp_path / "b.csv", {1: 0.0}, frames=1000))
    held, area = check.compare(pinned, new)
    assert held["frames"] == 1000
    assert held["old"] == held["new"] == area["old"] == 20


MARGINS = [
    (check.pinned_margin, 3, 1), (check.pinned_margin, 3, 3), (check.welch_margin, 5, 5),
    (check.welch_margin, 3, 6),
]  # fmt: skip


@pytest.mark.parametrize(("margin", "before", "after"), MARGINS)
def test_an_unchanged_algorithm_is_accused_in_no_more_than_alpha_of_the_tasks(
    margin, before, after
):
    random = np.random.default_rng(1)
    old, new = random.normal(400, 60, (20_000, before)), random.normal(400, 60, (20_000, after))
    short = new.mean(-1) < old.mean(-1) - margin(old, new, 1e-6, 0.05)
    assert short.mean() < 0.05 / 2 + 0.005  # of one of two statistics; 4 standard errors


@pytest.mark.parametrize(("margin", "before", "after"), MARGINS)
def test_the_loss_that_is_found_is_found_in_95_percent_of_comparisons(margin, before, after):
    spreads = (60, 60) if margin is check.pinned_margin else (60, 30)
    loss = check.smallest_loss(spreads, (before, after), 1e-6, 0.05, margin)
    random = np.random.default_rng(1)
    old = random.normal(400, spreads[0], (20_000, before))
    new = random.normal(400 - loss, spreads[1], (20_000, after))
    short = new.mean(-1) < old.mean(-1) - margin(old, new, 1e-6, 0.05)
    assert short.mean() == pytest.approx(0.95, abs=0.01)
    if margin is check.pinned_margin:
        t = scipy.stats.t.ppf(0.975, before - 1)
        shift = loss / (60 * np.sqrt(1 / before + 1 / after))
        assert scipy.stats.nct.sf(t, before - 1, shift) == pytest.approx(0.95, abs=0.005)


def test_check_ends_with_1_and_names_the_task_that_fell_short_and_by_how_much(tmp_path, capsys):
    for name in ("good", "bad"):
        write_curve(tmp_path / "pinned" / f"{name}.csv", {1: 490.0, 2: 500.0, 3: 495.0})
        value = {"good": 492.0, "bad": 25.0}[name]
        write_curve(tmp_path / "new" / f"{name}.csv", {1: value, 2: value})
    pinned = ["--pinned", str(tmp_path / "pinned")]
    assert check.main([str(tmp_path / "new" / "good.csv"), *pinned]) == 0
    assert check.main([str(tmp_path / "new"), *pinned]) == 1
    out, err = capsys.readouterr()
    assert err.strip() == "fell short: bad"
    (line,) = [line for line in out.splitlines() if line.startswith("bad") and "held" in line]
    limit, finds = (float(line.split(f"{word} ")[1].split(":")[0].split(",")[0])
                    for word in ("limit", "finds a loss of"))  # fmt: skip
    assert float(line.split("SHORT by ")[1]) == pytest.approx(limit - 25, abs=0.11)
    assert 495 - limit < finds < 495


def test_check_says_where_it_cannot_tell(tmp_path, capsys):
    write_curve(tmp_path / "pinned" / "a.csv", {1: 100.0, 2: 500.0})
    new = write_curve(tmp_path / "a.csv", {1: 20.0})
    assert check.main([str(new), "--pinned", str(tmp_path / "pinned")]) == 0
    out = capsys.readouterr().out
    assert "too few seeds to find any loss: cannot tell, random play with 20.0 would pass" in out


def test_curves_are_cut_to_the_shortest_and_like_is_compared_with_like(tmp_path):
    pinned = curves_of(write_curve(tmp_path / "a.csv", {1: 500.0, 2: 500.0}))
    long = curves_of(write_curve(tmp_path / "b.csv", {1: 400.0}, frames=30_000))
    assert check.compare(pinned, long)[0]["frames"] == 10_000
    without = [[row for row in rows if row["kind"] == "train"] for rows in long]
    for row in (row for rows in pinned for row in rows if row["kind"] == "eval"):
        row["episode_return"] = 9999.0  # which no training episode has
    assert check.compare(pinned, long)[0]["old"] == 9999
    assert check.compare(pinned, without)[0]["old"] == 500


def test_what_cannot_be_compared_is_named_and_the_rest_is_checked(tmp_path, capsys):
    write_curve(tmp_path / "pinned" / "a.csv", {1: 490.0})
    write_curve(tmp_path / "pinned" / "c.csv", {1: 490.0, 2: 491.0})
    pinned = write_curve(tmp_path / "pinned" / "d.csv", {1: 490.0, 2: 491.0})
    for name in "abcd":
        new = write_curve(tmp_path / "new" / f"{name}.csv", {1: 490.0})
    for path, limit in ((pinned, 0), (new, 7)):
        path.with_suffix(".yaml").write_text(yaml.safe_dump({"args": {"time_limit": limit}}))
    assert check.main([str(tmp_path / "new"), "--pinned", str(tmp_path / "pinned")]) == 2
    out, err = capsys.readouterr()
    assert "a.csv cannot be checked: a spread takes two seeds, the old side has 1" in err
    assert "b.csv cannot be checked: there is no pinned curve" in err
    assert "d.csv differ in time_limit: 0, 7" in err
    assert [line[:2] for line in out.splitlines()] == ["c ", "c "]
    assert check.main(["--pinned", str(tmp_path / "new" / "nowhere")]) == 1


# What was measured with faults put in by hand (tests/test_learning.py): frames and return.
FAULTS = [
    ("dreamerv2-CartPole-v1", 9_000, 62.1, True),  # an imagined discount that ignores the head
    ("dreamerv2-CartPole-v1", 9_000, 9.4, True),  # an actor's loss of the wrong sign
    ("dreamerv2-CartPole-v1", 9_000, 209.2, True),  # a prior that is not trained
    ("dreamerv2-CartPole-v1", 15_000, 499.7, False),  # later it passes here
    ("dreamerv2-Pendulum-v1", 12_000, -876.7, True),  # and is found here
]


@pytest.mark.parametrize(("name", "frames", "value", "found"), FAULTS)
def test_the_known_faults_of_one_seed_are_found(name, frames, value, found):
    pinned = curves_of(records.CURVES / f"{name}.csv")
    new = [row for row in pinned[0] if row["env_frames"] <= frames]
    new = [row | {"episode_return": value} if row["kind"] == "eval" else row for row in new]
    assert check.compare(pinned, [new])[0]["short"] == found


# Two variants


@pytest.mark.parametrize(
    ("values", "code", "words"),
    [
        ([100.0, 110.0, 90.0], 1, "FALLS SHORT by "),
        ([488.0, 500.0, 495.0], 0, ": no difference found"),
        ([988.0, 999.0, 990.0], 0, ": better"),
    ],
)
def test_a_variant_is_compared_with_another(values, code, words, tmp_path, capsys):
    base = write_runs(tmp_path, "base", [490.0, 500.0, 495.0])
    mine = write_runs(tmp_path, "mine", values, actor_lr=1e-4, new_flag=True)
    assert check.main([*mine, "--against", *base]) == code
    first, lr, new, held, area, worst = capsys.readouterr().out.splitlines()
    assert first == "mine (3 seeds) against base (3 seeds), CartPole-v1 to 10,000 frames"
    assert (lr, new) == ("differs: actor_lr 0.0003 -> 0.0001", "differs: new_flag nothing -> True")
    assert held.startswith(f"held  {np.mean(values):.1f} against 495.0: difference ")
    assert "95 % interval" in held
    assert words in held
    assert words.split(" by")[0] in area
    assert worst == f"worst {np.mean(values):.1f} against 495.0: not judged"


def test_sides_may_be_curves_and_folders_with_runs(tmp_path, capsys):
    base = write_curve(tmp_path / "base.csv", {1: 490.0, 2: 500.0})
    for seed in (1, 2):
        write_run(tmp_path / "mine-CartPole-v1" / f"seed-{seed}" / f"mine-{seed}", 495.0, seed)
    assert check.main([str(tmp_path / "mine-CartPole-v1"), "--against", str(base)]) == 0
    first, flags, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("mine (2 seeds) against base (2 seeds)")
    assert flags == f"flags are not compared: {base} has no card"


@pytest.mark.parametrize(
    ("args", "seeds", "words"),
    [
        ({"env_id": "Acrobot-v1"}, 2, "differ in env_id: CartPole-v1, Acrobot-v1"),
        ({"eval_episodes": 5}, 2, "differ in eval_episodes: 20, 5"),
        ({"env_kwargs": '{"g": 5}'}, 2, 'differ in env_kwargs: {}, {"g": 5}'),
        ({}, 1, "a spread takes two seeds, the new side has 1"),
        ({}, 0, "a spread takes two seeds, the new side has 0"),
    ],
)
def test_variants_that_cannot_be_compared_are_refused_in_one_line(
    args, seeds, words, tmp_path, capsys
):
    base = write_runs(tmp_path, "base", [490.0, 500.0], env_kwargs="{}")
    mine = write_runs(tmp_path, "mine", [490.0] * seeds, **{"env_kwargs": "{}"} | args)
    assert check.main([*mine, "--against", *base]) == 2
    _, err = capsys.readouterr()
    assert words in err
    assert err.count("\n") == 1


def test_a_seed_that_is_there_twice_does_not_count_twice(tmp_path, capsys):
    base = write_runs(tmp_path, "base", [490.0, 500.0])
    assert check.main([*base, base[0], "--against", *base]) == 2
    assert "seed 1 of base is there twice" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["missing.csv", ".", "run"])
@pytest.mark.parametrize("against", [[], ["--against", str(records.CURVES)]])
def test_check_of_nothing_is_refused_in_one_line(what, against, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.yaml").write_text("seed: 1\n")
    assert check.main([str(tmp_path / what), *against]) == 2
    _, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert str(tmp_path) in err


# What is pinned


def test_the_pinned_curves_are_whole_and_as_their_cards_say(tmp_path):
    assert check.main([]) == 0
    for path in records.CURVES.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    name = "dreamerv2-CartPole-v1"
    card = yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
    card["runs"][1]["final_eval_return"] += 1
    (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(card))
    (tmp_path / "dreamerv1-Acrobot-v1.csv").write_bytes((tmp_path / f"{name}.csv").read_bytes())
    (tmp_path / "dreamerv1-Acrobot-v1.yaml").unlink(missing_ok=True)
    wrong = check.check_pinned(tmp_path)
    assert len(wrong) == 2
    assert "dreamerv1-Acrobot-v1: a curve or a card is missing" in wrong
    assert f"{name} seed {card['runs'][1]['seed']}: the curve ends with" in wrong[1]


def args_of(task):
    script = records.load_script(ROOT / f"{task['script']}.py")
    argv = task["command"].split()[1:]
    return runtime.parse_args(script.Args, script.PRESETS, common.choose_preset, argv)


def test_each_card_has_the_hyperparameters_of_its_task():
    for task in plot.pinned(records.CURVES):
        told, args = task["card"]["args"], args_of(task)
        module = records.load_script(ROOT / f"{task['script']}.py")
        precision = args.precision  # kept as given: a run may move to a GPU
        module.resolve_auto(args, torch.device("cpu"), told["actor_dist"] == "onehot")
        args = vars(args) | {"precision": precision}
        assert len(set(told) & set(args)) > 50  # of older commits, some flags are gone or lacking
        differing = {k for k in set(told) & set(args) if told[k] != args[k]}
        assert not differing, task["name"]
        assert task["card"]["command"].startswith(f"python {task['script']}.py ")


def test_the_tables_of_results_are_those_of_the_curves():
    tasks = list(plot.pinned(records.CURVES))
    assert tasks
    readme = (ROOT / "README.md").read_text()
    assert plot.with_section(readme, "results", plot.summary(tasks)) == readme
    results = (ROOT / "docs" / "results.md").read_text()
    table = plot.table(tasks, "../benchmarks/")
    assert plot.with_section(results, "results", table) == results
    assert (ROOT / "benchmarks" / "README.md").read_text() == plot.report(tasks)


def test_every_plot_that_is_shown_is_drawn_and_committed(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "save", lambda figure, path: path.touch())  # another test draws
    tasks = list(plot.pinned(records.CURVES))
    plot.write_plots(tasks, tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn >= {f"{task['name']}.png" for task in tasks} | {"overview.png"}
    shown = {line.split("plots/")[1][:-1] for line in plot.report(tasks).splitlines()
             if line.startswith("![")}  # fmt: skip
    assert shown == drawn
    assert all((ROOT / "benchmarks" / "plots" / name).exists() for name in shown)


def test_a_curve_beside_the_authors_is_averaged_in_their_bins_as_far_as_it_fills_them():
    def row(kind, frames, ret):
        return {"kind": kind, "env_frames": frames, "episode_return": ret}

    curve = [row("train", at, at / 1000) for at in range(1000, 62_000, 1000)]
    curve += [row("eval", 10_000, -1.0), row("eval", 60_000, -2.0)]
    task = {
        "script": "dreamerv2", "env_id": "dm_control/cartpole-balance-v0", "published": "train",
        "curves": {1: curve},
    }  # fmt: skip
    assert plot.binned(task) == [(30_000, 15.5), (60_000, 45.5)]
    assert plot.binned(task | {"published": "eval"}) == [(30_000, -1.0), (60_000, -2.0)]
    other = [row("train", 20_000, 1.5), row("train", 50_000, 5.5), row("train", 90_000, 7.5)]
    both = plot.binned(task | {"curves": {1: curve, 2: other}})
    assert both == [(30_000, 8.5), (60_000, 25.5)]  # each seed counts alike
    del task["published"]
    assert plot.binned(task) == []


def test_the_authors_figures_have_a_source_and_lie_between_their_extremes():
    with open(ROOT / "benchmarks" / "published.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(float(r["min"]) <= float(r["median"]) <= float(r["max"]) for r in rows)
    assert all(r["source"].startswith("danijar/") and ".json" in r["source"] for r in rows)
    known = {(r["script"], r["env_id"]) for r in rows}
    for task in records.tasks().values():
        assert not task.get("published") or (task["script"], task["env_id"]) in known, task["name"]


@pytest.mark.parametrize(
    ("folder", "label"),
    [
        ("runs/mine-12", "mine"),
        ("runs/mine_12", "mine"),
        ("runs/mine-112", "mine-112"),
        ("runs/CartPole-v1__mine__12__1795859953000", "CartPole-v1__mine"),
        ("runs/benchmarks/mine-CartPole-v1/seed-12/mine-CartPole-v1-12", "mine-CartPole-v1"),
    ],
)
def test_the_label_of_a_run_is_its_name_without_the_seed(folder, label):
    assert records.label_of_run(folder, 12) == label


def test_runs_are_drawn_side_by_side(tmp_path, capsys):
    runs = write_runs(tmp_path, "mine", [300.0, 400.0]) + write_runs(tmp_path, "base", [400.0] * 3)
    other = write_runs(tmp_path, "mine-pendulum", [400.0], env_id="Pendulum-v1")
    figure = plot.draw_runs([*runs, *other])
    cartpole, pendulum = figure.axes
    assert len(cartpole.lines) == 2 + 1 + 3 + 1  # seeds and means
    assert len(pendulum.lines) == 1 + 1
    assert [text.get_text() for text in cartpole.get_legend().get_texts()] == ["mine", "base"]
    mean = cartpole.lines[2]
    assert mean.get_ydata()[-1] == 350
    assert mean.get_color() != cartpole.lines[-1].get_color()
    assert plot.main([*runs, "--out", str(tmp_path / "new" / "a.png")]) == 0
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert plot.main([str(tmp_path / "nowhere"), "--out", "a.png"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# Runs


def test_a_dry_run_prints_scripts_times_ids_times_seeds(tmp_path, capsys):
    ids = ["CartPole-v1", "dm_control/walker-walk-v0"]
    argv = ["--scripts", "dreamerv1", "dreamerv2", "--env-ids", *ids, "--seeds", "1", "5"]
    argv += ["--dry-run"]
    assert run.main([*argv, "--out", str(tmp_path), "--", "--units", "32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert len(set(lines)) == 8
    assert all(line.endswith(("--units 32 --seed 1", "--units 32 --seed 5")) for line in lines)
    assert not list(tmp_path.iterdir())


def test_each_task_is_a_command_that_its_script_accepts():
    for task in records.tasks().values():
        assert args_of(task).env_id == task["env_id"]
        assert task["group"] in plot.GROUPS


def grid(tmp_path, *more, script="dreamerv2", seeds=("1", "2"), env="CartPole-v1", frames=400):
    argv = ["--scripts", script, "--env-ids", env, "--seeds", *seeds, "--jobs", "2"]
    argv += ["--out", str(tmp_path), *more, "--", *TINY, "--total-frames", str(frames)]
    return [sys.executable, str(ROOT / "benchmarks" / "run.py"), *argv]


@pytest.mark.slow
def test_a_grid_runs_once_and_records_a_curve_and_a_card_of_all_seeds(tmp_path):
    first = subprocess.run(grid(tmp_path), capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    path = tmp_path / "curves" / "dreamerv2-CartPole-v1.csv"
    curves, card = records.read_curve(path), yaml.safe_load(path.with_suffix(".yaml").read_text())
    assert list(curves) == [1, 2] == [entry["seed"] for entry in card["runs"]]
    for entry, rows in zip(card["runs"], curves.values(), strict=True):
        last = [row for row in rows if row["kind"] == "eval"][-1]
        assert last["env_frames"] == entry["env_frames"] == 400
        assert records.rounded(last["episode_return"]) == entry["final_eval_return"]
        assert entry["commit"].rstrip("+") == records.commit(ROOT / "dreamerv2.py").rstrip("+")
    assert card["command"].startswith("python dreamerv2.py --env-id CartPole-v1 --total-frames 400")
    assert card["command"].endswith("--seed SEED")
    assert "--units 16" in card["command"]
    before = path.read_bytes()
    again = subprocess.run(grid(tmp_path), capture_output=True, text=True)
    assert again.returncode == 0
    assert "2 of 2 runs are finished" in again.stdout
    assert "begins" not in again.stdout
    assert path.read_bytes() == before
    for file in path.parent.iterdir():
        file.unlink()
    elsewhere = {"device": "another", "versions": {"torch": "2.11.0"}}
    machine = tmp_path / "dreamerv2-CartPole-v1" / "seed-2" / "machine.yaml"
    machine.write_text(json.dumps(elsewhere))
    assert subprocess.run(grid(tmp_path), capture_output=True).returncode == 0
    assert path.read_bytes() == before  # recorded from the run folders, without a run
    told = yaml.safe_load(path.with_suffix(".yaml").read_text())["runs"]
    assert told == [card["runs"][0], card["runs"][1] | elsewhere]
    other = subprocess.run(grid(tmp_path, frames=500), capture_output=True, text=True)
    assert other.returncode == 1
    assert "--total-frames 400 --seed 1, choose another --out" in other.stderr


def test_a_finished_run_is_recorded_again_only_to_be_pinned(tmp_path, monkeypatch):
    recorded = []
    monkeypatch.setattr(run.Job, "record", lambda job: recorded.append(job.seed))
    monkeypatch.setattr(run, "run_here", lambda jobs, count: [])
    monkeypatch.setattr(records, "CURVES", tmp_path / "curves")
    write_curve(tmp_path / "curves" / "dreamerv2-CartPole-v1.csv", {1: 500.0})
    folder = tmp_path / "dreamerv2-CartPole-v1" / "seed-1"
    folder.mkdir(parents=True)
    (folder / "finished").touch()
    argv = ["dreamerv2-CartPole-v1", "--seeds", "1", "--out", str(tmp_path)]
    assert run.main(argv) == 0
    assert recorded == []
    assert run.main([*argv, "--pin"]) == 0
    assert recorded == [1]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A changed copy of a script in a folder of its own, in which the test goes on."""
    for name in ("common.py", "runtime.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    source = (ROOT / "dreamerv2.py").read_text()
    assert source.count('"imag_horizon": 20') == 1
    path = tmp_path / "mine.py"
    path.write_text(source.replace('"imag_horizon": 20', '"imag_horizon": 4'))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # which an import of the copy adds to
    return path


@pytest.mark.slow
def test_a_script_of_ones_own_is_run_and_recorded(mine):
    command = grid(mine.parent / "out", script="mine.py", seeds=("1",), frames=200)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    path = mine.parent / "out" / "curves" / "mine-CartPole-v1.csv"
    card = yaml.safe_load(path.with_suffix(".yaml").read_text())
    assert card["command"].startswith("python mine.py --env-id CartPole-v1 --total-frames 200")
    assert card["args"]["exp_name"] == "mine"
    assert {row["script"] for row in curves_of(path)[0]} == {"mine"}
    with open(mine, "a") as file:
        file.write("# changed\n")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ran another mine.py, remove it or choose another --out" in done.stderr


def test_the_command_of_a_card_has_what_differs_from_the_presets_of_its_own_script(mine):
    args = vars(runtime.parse_args(
        dreamerv2.Args, dreamerv2.PRESETS, common.choose_preset, ["--env-id", "CartPole-v1"]
    ))  # fmt: skip
    # What "auto" became is no flag that anyone gave.
    args |= {"exp_name": "mine", "actor_dist": "onehot", "actor_grad": "reinforce"}
    expected = "python mine.py --env-id CartPole-v1"
    assert records.command(mine, args) == f"{expected} --imag-horizon 20"
    args["imag_horizon"] = 4
    assert records.command(mine, args) == expected
    args |= {"env_kwargs": '{"g": 5}', "actor_grad": "both"}
    words = shlex.split(records.command(mine, args))
    assert words == [*expected.split(), "--env-kwargs", '{"g": 5}', "--actor-grad", "both"]


def test_the_command_of_a_card_has_the_size_and_not_the_widths_that_follow_from_it():
    line = ["--env-id", "CartPole-v1", "--size", "1m", "--units", "32"]
    args = runtime.parse_args(dreamerv3.Args, dreamerv3.PRESETS, common.choose_preset, line)
    dreamerv3.resolve_auto(args, torch.device("cpu"), discrete=True)
    args = vars(args) | {"precision": "auto"}  # kept as given
    said = records.command(records.ROOT / "dreamerv3.py", args).split()
    assert sorted(said) == sorted(["python", "dreamerv3.py", *line])


def test_the_commit_of_a_script_has_a_plus_unless_it_is_as_committed(mine):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *identity, *words], check=True, capture_output=True)

    git("init")
    assert records.commit(mine) == "unknown+"
    git("add", "common.py", "runtime.py")
    git("commit", "-m", "without the script")
    assert records.commit(mine).endswith("+")  # untracked
    Path(".gitignore").write_text("mine.py\n")
    assert records.commit(mine).endswith("+")  # untracked and ignored
    git("add", "--force", "mine.py")
    git("commit", "-m", "with the script")
    assert not records.commit(mine).endswith("+")
    with open("common.py", "a") as file:
        file.write("# changed\n")
    assert records.commit(mine).endswith("+")


def test_the_commit_of_a_script_that_imports_another_has_a_plus_if_that_has_changed(mine):
    shutil.copytree(ROOT, "repo", ignore=shutil.ignore_patterns(".*", "runs", "venv", "wandb"))
    code = "import records; print(records.commit(records.ROOT / 'benchmarks/without_memory.py'))"

    def commit():
        done = subprocess.run(
            [sys.executable, "-c", code], cwd="repo/benchmarks", capture_output=True, text=True
        )
        return done.stdout.strip()

    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init"], ["add", "."], [*identity, "commit", "-m", "all"]):
        subprocess.run(["git", *words], cwd="repo", check=True, capture_output=True)
    assert re.fullmatch("[0-9a-f]{7,}", commit())
    with open("repo/dreamerv2.py", "a") as file:
        file.write("# changed\n")
    assert commit().endswith("+")


def test_the_scripts_of_the_repository_may_change_between_the_runs_of_a_grid(tmp_path):
    scripts = {ROOT / f"{task['script']}.py" for task in records.tasks().values()}
    assert scripts <= set(run.OWN)
    assert all(path.is_file() for path in run.OWN)
    job = job_of(tmp_path, ["true"])
    job.folder.mkdir(parents=True)
    (job.folder / job.script.name).write_text("# another version\n")
    job.check()  # of our own scripts no other --out is asked for


def test_a_script_is_looked_for_where_the_command_was_typed_and_then_here(mine):
    assert records.find_script("mine.py") == records.find_script("mine") == mine
    assert records.find_script("dreamerv1") == ROOT / "dreamerv1.py"
    shadow = mine.with_name("dreamerv1.py")
    shadow.touch()
    assert records.find_script("dreamerv1.py") == shadow


@pytest.mark.slow
def test_a_run_that_fails_is_named_with_its_log_and_the_others_go_on(tmp_path):
    command = grid(tmp_path, seeds=("1",))
    command.insert(command.index("CartPole-v1") + 1, "NoSuch-v7")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("failed: dreamerv2-NoSuch-v7 seed 1 (2), log ")
    assert "no NoSuch-v7" in Path(line.split("log ")[1]).read_text()
    assert (tmp_path / "curves" / "dreamerv2-CartPole-v1.csv").exists()


@pytest.mark.slow
def test_an_interrupted_grid_saves_its_runs_and_goes_on_where_it_stopped(tmp_path):
    command = grid(tmp_path, seeds=("3",), frames=1500)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started.append(process)
    log = tmp_path / "dreamerv2-CartPole-v1" / "seed-3"
    wait_until(lambda: any("losses" in p.read_text() for p in log.glob("*/metrics.jsonl")))
    os.kill(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "seed 3" in err
    assert (log / "dreamerv2-CartPole-v1-3" / "checkpoint.pt").exists()
    assert subprocess.run(command, capture_output=True).returncode == 0
    lines = (log / "log.txt").read_text().splitlines()
    began = [line for line in lines if line.startswith("$")]
    assert len(began) == 2
    assert began[0] == began[1]  # one command begins the run and goes on with it
    assert "a new run begins in dreamerv2-CartPole-v1-3" in lines
    assert "the run in dreamerv2-CartPole-v1-3 goes on" in lines
    curves = records.read_curve(tmp_path / "curves" / "dreamerv2-CartPole-v1.csv")
    assert records.last_frame(curves[3]) == 1500
    frames = [row["env_frames"] for row in curves[3] if row["kind"] == "train"]
    assert frames == sorted(set(frames))


@pytest.mark.slow
def test_submitit_launches_the_same_grid(tmp_path):
    command = grid(tmp_path, "--cluster", "local", "--cluster-options", "timeout_min=5")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "submitit").glob("*_log.out"))
    curves = records.read_curve(tmp_path / "curves" / "dreamerv2-CartPole-v1.csv")
    assert list(curves) == [1, 2]


def job_of(tmp_path, command):
    args = SimpleNamespace(curves=tmp_path, out=tmp_path, jobs=1, cluster=None)
    job = run.Job("a", ROOT / "dreamerv2.py", ["--env-id", "CartPole-v1"], 1, args)
    job.command = lambda: command
    return job


def test_a_seed_with_other_flags_than_another_seed_of_its_task_is_refused_at_once(tmp_path):
    job = job_of(tmp_path, ["true"])
    other = job.folder.with_name("seed-2")
    other.mkdir(parents=True)
    (other / "flags").write_text("dreamerv2.py --env-id CartPole-v1 --seed 2")
    job.check()
    (other / "flags").write_text("dreamerv2.py --env-id CartPole-v1 --total-frames 9 --seed 2")
    with pytest.raises(SystemExit, match=r"seed-2 ran dreamerv2\.py .* 9 .*choose another --out"):
        job.check()


@pytest.mark.parametrize(("tool", "flags", "said"), [
    (run, "dreamerv2-CartPole-v1 --seeds 1 1 --dry-run", "error: --seeds 1 1 has one twice"),
    (run, "dreamerv2-CartPole-v1 --cluster-options a", "error: --cluster-options a is not KEY="),
    (plot, "--curves .", "curves that are not pinned need --out FOLDER"),
    (plot, "--curves . --out plots", "error: there is no curve of a task in "),
])  # fmt: skip
def test_a_mistake_is_told_in_one_line(tool, flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        tool.main(flags.split())
    assert said in str(end.value) + capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_a_job_that_submitit_stops_from_a_signal_handler_is_queued_again(tmp_path):
    job, again = job_of(tmp_path, ["sleep", "60"]), []
    handler = signal.signal(signal.SIGUSR2, lambda *_: again.append(job.checkpoint()))

    def interrupt():
        wait_until(lambda: job.process)
        time.sleep(0.1)  # until it is waited for
        os.kill(os.getpid(), signal.SIGUSR2)

    threading.Thread(target=interrupt).start()
    began = time.monotonic()
    try:
        assert job() != 0
    finally:
        signal.signal(signal.SIGUSR2, handler)
    assert time.monotonic() - began < 30
    assert again[0].function is job
    assert (job.process, job.stopped) == (None, False)


def test_a_stop_before_the_process_has_begun_is_not_lost(tmp_path):
    job = job_of(tmp_path, ["sleep", "60"])
    job.stop()
    began = time.monotonic()
    assert job() != 0
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("saved", ["checkpoint.pt", "checkpoint.old.pt", None])
def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(tmp_path, saved):
    job = job_of(tmp_path, ["true"])
    job.record = lambda: None
    job.run.mkdir(parents=True)
    (job.run / "args.yaml").touch()
    (job.run / "checkpoint.new.pt").touch()  # half written
    if saved:
        (job.run / saved).touch()
    assert job() == 0
    assert job.run.exists() == (saved is not None)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["nonsense"], "no task nonsense"),
        ([], "name a task, a group"),
        (["cpu", "--jobs", "0"], "--jobs is 0"),
        (["cpu", "--out", "empty.py"], "empty.py is no folder"),
        (["--scripts", "dreamerv1", "--env-ids", "dm_control/cartpole-swingup-v0"], "of its own"),
        (["--scripts", "nowhere.py", "--env-ids", "CartPole-v1"], "no script nowhere.py"),
        (["--scripts", "empty.py", "--env-ids", "CartPole-v1"], "empty.py has no Args and PRESETS"),
        (
            ["--scripts", "wrong.py", "--env-ids", "CartPole-v1"],
            "wrong.py cannot be imported",
        ),
        (["--scripts", "sub/mine.py", "mine.py", "--env-ids", "A-v1"], "have the same name"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(argv, text, mine):
    Path("empty.py").touch()
    Path("wrong.py").write_text("a = (\n")
    Path("sub").mkdir()
    Path("sub/mine.py").write_text(mine.read_text())
    with pytest.raises(SystemExit) as exit_:
        run.main(argv)
    assert text in str(exit_.value)
    assert "\n" not in str(exit_.value)
