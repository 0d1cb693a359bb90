"""Metrics of a run beside those of good runs, and the page that tells their ranges."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import health
import plot
import pytest
import records
import yaml

import dreamerv2

ROOT = Path(__file__).parent.parent
CARTPOLE = vars(dreamerv2.Args(**dreamerv2.PRESETS["other"])) | {"env_id": "CartPole-v1"}


def log(updates, **values):
    """A row of a run's log, after so many updates."""
    return {"frames": 5 * updates, "updates": updates} | values


def test_a_stage_is_the_median_of_what_was_logged_near_it():
    rows = [log(u, **{"losses/kl": u / 1000}) for u in range(200, 4200, 200)]
    found = health.stages(rows)
    assert found.keys() == {1000, 3000}  # 5,900 was not reached
    assert found[1000] == {"losses/kl": 1.0}  # of 800, 1,000 and 1,200
    assert found[3000] == {"losses/kl": 3.0}  # of 2,400 to 3,600


@pytest.mark.parametrize(
    ("value", "ret", "expected"), [(40.0, 50.0, -0.2), (-60.0, -50.0, -0.2), (0.3, 0.1, 0.2)]
)
def test_a_value_is_measured_by_the_return_that_it_is_trained_on(value, ret, expected):
    values = {"imag/value": value, "imag/return": ret, "imag/slow_value": value}
    row = health.with_differences(values)
    assert row["value - return"] == pytest.approx(expected)
    assert row["slow - value"] == 0


@pytest.fixture
def pinned(tmp_path, monkeypatch):
    """Four seeds of CartPole: three good ones, and one that lost what it had learned."""
    for folder in ("curves", "metrics"):
        (tmp_path / folder).mkdir()
    name = "dreamerv2-CartPole-v1"
    runs = {11: (500.0, 2.0, 20.0), 12: (480.0, 4.0, 30.0), 13: (90.0, 100.0, 900.0)}
    runs[14] = (490.0, 3.0, 25.0)
    curve = {}
    for seed, (ret, kl, grad) in runs.items():
        at = {"seed": seed, "wall_hours": 0, "env_id": "CartPole-v1"}
        curve[seed] = [
            at | {"env_frames": 20, "updates": 0, "episode_return": 20.0, "kind": "train"},
            at | {"env_frames": 5000, "updates": 1000, "episode_return": ret, "kind": "eval"},
        ]
        rows = [log(1000, **{"losses/kl": kl, "grad_norm/critic": grad})]
        records.add_metrics(rows, seed, tmp_path / "metrics" / f"{name}.csv")
    records.write_csv(tmp_path / "curves" / f"{name}.csv", curve, records.COLUMNS)
    (tmp_path / "curves" / f"{name}.yaml").write_text(yaml.safe_dump({"args": CARTPOLE}))
    folders = (tmp_path / "metrics", tmp_path / "curves")
    monkeypatch.setattr(health.good_runs, "__defaults__", folders)
    monkeypatch.setattr(health.task_like, "__defaults__", folders[1:])
    return tmp_path


def test_seeds_that_lost_what_they_had_learned_are_not_good(pinned):
    assert health.good_seeds("dreamerv2-CartPole-v1", pinned / "curves") == [11, 12, 14]
    good = health.good_runs("dreamerv2")["dreamerv2-CartPole-v1"]
    assert health.ranges(good.values())[1000] == {
        "losses/kl": (2.0, 4.0), "grad_norm/critic": (20.0, 30.0),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "kl", "grad", "said"),
    [
        ({}, 5.9, 44.0, []),  # within the width, or half of the larger end, of 2 to 4, 20 to 30
        ({"seed": 7}, 6.1, 46.0, ["losses/kl is 6.1", "grad_norm/critic is 46"]),
        ({}, -0.1, 1.0, ["losses/kl is -0.1"]),  # a small gradient is no concern
        ({"seed": 8}, 3.0, 29.0, []),
        # Both are others in another world or in a larger network.
        ({"env_id": "my_env:Corridor-v0"}, 6.1, 46.0, []),
        ({"pixels": True}, 6.1, 46.0, []),
        ({"deter": 600}, 6.1, 46.0, []),
    ],
)
def test_a_metric_outside_of_the_range_is_named_with_what_to_try(pinned, changes, kl, grad, said):
    rows = [log(1000, **{"losses/kl": kl, "grad_norm/critic": grad})]
    lines, compared = health.outside("dreamerv2", CARTPOLE | changes, rows)
    elsewhere = changes.keys() - {"seed"}
    assert compared.startswith("3 good runs of dreamerv2")
    assert ("on all tasks" in compared) == bool(elsewhere)
    assert [line.split(" after")[0] for line in lines] == said
    assert all(" 1,000 updates, good runs have " in line for line in lines)
    assert all(":" in line for line in lines)


@pytest.mark.parametrize(("value", "said"), [(10.0, 0), (10.4, 0), (10.6, 1), (9.4, 1)])
def test_values_are_compared_between_tasks_if_they_are_off_by_more_than_a_little(
    pinned, value, said
):
    good = log(1000, **{"losses/kl": 3.0, "imag/value": 10.0, "imag/return": 10.0})
    for seed in (11, 12, 14):
        records.add_metrics([good], seed, pinned / "metrics" / "dreamerv2-CartPole-v1.csv")
    other = CARTPOLE | {"env_id": "my_env:Corridor-v0"}
    lines, _ = health.outside("dreamerv2", other, [good | {"imag/value": value}])
    assert len(lines) == said
    assert all(line.startswith("value - return is") for line in lines)


def test_a_run_is_not_compared_with_itself_and_two_other_runs_make_no_range(pinned):
    _, compared = health.outside(
        "dreamerv2", CARTPOLE | {"seed": 11}, [log(1000, **{"losses/kl": 1.0})]
    )
    assert compared.startswith("3 good runs of dreamerv2 on all tasks, in value - return,")


@pytest.mark.parametrize(
    ("script", "rows", "reason"),
    [
        ("dreamerv2", [log(100, **{"losses/kl": 1.0})], "nothing was logged near 1,000 updates"),
        ("mine", [log(1000, **{"losses/kl": 1.0})], "no run of mine is pinned"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(pinned, script, rows, reason):
    with pytest.raises(ValueError, match=reason):
        health.outside(script, CARTPOLE, rows)


@pytest.mark.parametrize("tool", ["health.py", "inspect_run.py"])
def test_a_tool_finds_its_modules_when_it_is_started_by_its_path(tool, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / tool), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def test_a_changed_copy_is_compared_with_the_script_that_it_is_like(pinned, capsys):
    run = pinned / "run"
    run.mkdir()
    (run / "args.yaml").write_text(yaml.safe_dump(CARTPOLE | {"exp_name": "mine"}))
    (run / "metrics.jsonl").write_text(json.dumps(log(1000, **{"losses/kl": 9.0})) + "\n")
    assert health.main([str(run)]) == 2
    hint = "--like SCRIPT compares a copy of SCRIPT"
    assert capsys.readouterr().err == f"error: no run of mine is pinned; {hint}\n"
    assert health.main([str(run), "--like", "dreamerv2.py"]) == 1
    compared, said = capsys.readouterr().out.splitlines()
    assert compared == "compared with 3 good runs of dreamerv2-CartPole-v1, after 1,000 updates"
    assert said.startswith("losses/kl is 9 after 1,000 updates")


def test_a_run_folder_that_cannot_be_read_ends_in_one_line(tmp_path, capsys):
    for text in ("", "{a: [", "[]"):
        (tmp_path / "args.yaml").write_text(text)
        assert health.main([str(tmp_path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_each_flag_that_is_advised_is_one_of_the_script():
    for number in (1, 2, 3):
        module = records.load_script(ROOT / f"dreamerv{number}.py")
        meaning = health.meaning_of(f"dreamerv{number}")
        for runs in health.good_runs(f"dreamerv{number}").values():
            for tag in meaning.keys() & health.ranges(runs.values())[1000].keys():
                for advice in meaning[tag]:
                    for flag in re.findall(r"--[a-z-]+", advice):
                        name = flag[2:].replace("-", "_")
                        assert hasattr(module.Args, name), (number, tag, flag)


def test_each_metric_of_the_page_is_one_that_runs_log():
    logged = (ROOT / "docs" / "metrics.md").read_text()  # which a test compares with what is logged
    ours = {"value - return", "slow - value"}
    assert set(health.COMPARABLE) == ours
    assert all(f"`{tag}`" in logged for tag in (health.MEANING | health.MEANING_V3).keys() - ours)


def test_the_tables_of_the_pages_are_those_of_the_pinned_runs():
    page = (ROOT / "docs" / "health.md").read_text()
    assert plot.with_section(page, "meanings", health.meanings(health.MEANING)) == page
    assert plot.with_section(page, "meanings-v3", health.meanings(health.MEANING_V3)) == page
    page = (health.METRICS / "README.md").read_text()
    assert page == health.ranges_page()
    assert "## dreamerv2-CartPole-v1" in page


def test_a_good_run_leaves_the_range_of_the_others_in_one_metric_of_forty_at_most(monkeypatch):
    monkeypatch.setattr(health, "good_runs", functools.cache(health.good_runs))  # for speed
    for script in ("dreamerv1", "dreamerv2", "dreamerv3"):
        for name, seeds in health.good_runs(script).items():
            card = yaml.safe_load((records.CURVES / f"{name}.yaml").read_text())
            assert health.task_like(card["args"], [name]) == name
            logs = records.read_metrics(health.METRICS / f"{name}.csv")
            if len(seeds) > health.ENOUGH:
                said, metrics = 0, 0
                for seed, reached in seeds.items():
                    args = card["args"] | {"seed": seed}
                    lines, compared = health.outside(script, args, logs[seed])
                    assert compared.startswith(f"{len(seeds) - 1} good runs of {name}")
                    said += len(lines)
                    metrics += sum(map(len, reached.values()))
                assert metrics > 20 * len(seeds)  # seven or more after 1,000, 3,000, 5,900 updates
                assert said <= metrics / 40, name
