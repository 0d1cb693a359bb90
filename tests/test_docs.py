"""README and docs are true: links lead somewhere, tables are those of the code, and code blocks
and commands run as they are printed.
"""

import contextlib
import importlib.util
import itertools
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import check
import gymnasium as gym
import numpy as np
import plot
import pytest
import torch
from helpers.envs import make_envs
from helpers.processes import start
from helpers.runs import kept_process

import common
import dreamerv1
import dreamerv2
import dreamerv3
import runtime

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = {path: path.read_text() for path in [README, *sorted((ROOT / "docs").glob("*.md"))]}
DOCS = {path.name: text for path, text in PAGES.items()}
SCRIPTS = [dreamerv1, dreamerv2]
ALL = [*SCRIPTS, dreamerv3]
# Flags of torchrun and other programs that the text names.
FOREIGN_FLAGS = {"--max-restarts", "--logdir"}
# Networks and runs of a second or two, for either script.
SMALL = [
    *("--total-frames", "160", "--prefill", "64", "--train-every", "32", "--pretrain", "1"),
    *("--batch-size", "2", "--batch-length", "8", "--imag-horizon", "3", "--replay-size", "1000"),
    *("--deter", "8", "--hidden", "8", "--stoch", "4", "--units", "8", "--layers", "1"),
    *("--cnn-depth", "2", "--log-every", "64", "--eval-every", "0", "--eval-episodes", "1"),
    *("--video-every", "0", "--checkpoint-every", "0", "--time-limit", "100", "--threads", "1"),
]
SMALL_V1 = [*SMALL, "--train-steps", "1"]
SMALL_V2 = [*SMALL, "--classes", "4"]
GONE = {"--prefill", "--train-every", "--pretrain"}  # flags that V3 has not
SMALL_V3 = [
    *(word for i, word in enumerate(SMALL) if not GONE & {word, *SMALL[max(i - 1, 0) : i]}),
    *("--classes", "4", "--blocks", "2", "--train-ratio", "1", "--num-envs", "1"),
]


@contextlib.contextmanager
def skip_without_opengl():
    """dm_control's images need it."""
    try:
        yield
    except runtime.UserError as error:
        if "no OpenGL without a screen" in str(error):
            pytest.skip(str(error))
        raise


# Pages


def prose(text):
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def anchors(text):
    """What GitHub calls the headings of a page."""
    seen = []
    for heading in re.findall(r"^#+ (.+)$", prose(text), re.M):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")
        again = seen.count(slug)
        seen.append(slug)
        yield f"{slug}-{again}" if again else slug


def dead_links(path, text):
    """Links of a page to files or headings that are not there."""
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists():
            dead.append(link)
        elif anchor:
            there = text if target == path else target.read_text()
            if anchor not in anchors(there):
                dead.append(link)
    return dead


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_leads_to_a_file_or_a_heading(path):
    assert dead_links(path, PAGES[path]) == []


def test_a_link_to_a_missing_file_or_heading_is_found():
    text = "# Logged `metrics`, all\n[a](#metrics) [b](#logged-metrics-all) [c](nowhere.md)\n"
    text += "[d](docs/runs.md#exit-codes) [e](docs/runs.md#no-such-heading) [f](https://a.b/c#d)"
    assert dead_links(README, text) == ["#metrics", "nowhere.md", "docs/runs.md#no-such-heading"]


def test_the_second_heading_of_a_name_has_a_number():
    assert [*anchors("# A b\n## A b\n```\n# no\n```\n### C-d_e (f)")] == ["a-b", "a-b-1", "c-d_e-f"]


def test_every_page_of_the_docs_is_linked_from_the_readme():
    for path in PAGES:
        assert path == README or f"](docs/{path.name}" in PAGES[README], path.name


def test_the_readme_is_read_in_one_sitting():
    assert len(PAGES[README].splitlines()) < 200
    assert len(PAGES[README].encode()) < 15_000


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_is_short_and_its_lines_fit_a_screen(path):
    lines = PAGES[path].splitlines()
    assert len(lines) <= 250
    long = [line for line in lines if len(line) > 160 and not line.startswith("|")]
    assert long == []


def test_every_file_that_the_pages_name_exists():
    named = {name for text in DOCS.values() for name in re.findall(r"[\w/]*\w/\w+\.\w+\b", text)}
    ours = {name for name in named if name.startswith(("benchmarks/", "tests/", "docs/"))}
    assert len(ours) > 8
    assert {name for name in ours if not (ROOT / name).exists()} == set()


# Tables


def between(name):
    """What stands between the two markers of a name, on whichever page."""
    [text] = [text for text in DOCS.values() if f"<!-- {name}:begin -->" in text]
    return text.split(f"<!-- {name}:begin -->")[1].split(f"<!-- {name}:end -->")[0]


def cells(table):
    """Cells of a table, the header first."""
    header, _, *rows = table.strip().splitlines()
    return [[cell.strip() for cell in row[1:-1].split(" | ")] for row in (header, *rows)]


def value_of(text):
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


def flags_of(script):
    fields = {f"--{name.replace('_', '-')}" for name in asdict(script.Args())}
    return fields | {flag.replace("--", "--no-", 1) for flag in fields} | {"--help"}


def flags_in(text):
    """The flags that a text names, but for those in commands of the tools in benchmarks."""
    text = re.sub(r"(python benchmarks/\w+|`\w+)\.py .*", "", text)
    text = re.sub(r"#SBATCH .*|torchrun --(?:[^`\n]|\\\n)*?(?=`|dreamerv)", "", text)
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - FOREIGN_FLAGS


def exists(name, script):
    """Whether a name like RSSM.observe or common.Replay.sample is defined."""
    first, *rest = name.split(".")
    home = {"common": common, "runtime": runtime}.get(first)
    if home is None:
        home = script
        rest = [first, *rest]
    for part in rest:
        if not hasattr(home, part):
            return False
        home = getattr(home, part)
    return True


def names_in(text):
    """What a text names in parentheses, as in (`RSSM.observe`, `main`), without flags."""
    places = re.findall(r"\(((?:`[\w.-]+`(?:, )?)+)\)", " ".join(text.split()))
    return {name for place in places for name in re.findall(r"`([a-zA-Z][\w.]+)`", place)}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_flag_that_a_page_names_exists(path):
    tools = [tool.read_text() for tool in (ROOT / "benchmarks").glob("*.py")]
    known = {flag for text in tools for flag in re.findall(r'argument\("(--[a-z-]+)', text)}
    known |= set.union(*map(flags_of, ALL))
    text = PAGES[path]
    added = re.findall(r"^\+    (\w+): .*  # ", text, re.M)  # by the diffs that are printed
    known |= {f"--{name.replace('_', '-')}" for name in added}
    assert flags_in(text) - known == set()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_flags_of_a_tool_in_a_printed_command_are_its_own(path):
    for name, rest in re.findall(r"python benchmarks/(\w+)\.py ([^#`\n]*)", PAGES[path]):
        text = (ROOT / "benchmarks" / f"{name}.py").read_text()
        own = rest.split("dreamerv")[0]  # the rest belongs to a script
        for flag in re.findall(r"--[a-z-]+", own):
            assert f'argument("{flag}"' in text, (name, flag)


@pytest.mark.parametrize("script", ALL)
def test_what_is_said_of_one_script_alone_names_its_flags(script):
    number = script.__name__[-1]
    others = "[" + "123".replace(number, "") + "]"
    lines = [line for text in DOCS.values() for line in text.splitlines()]
    for cell in (cell.strip() for line in lines for cell in line.split(" | ")):
        if cell.startswith((f"V{number}:", f"V{number},")):
            flags = flags_in(re.split(rf"V{others}:", cell)[0])
            assert flags <= flags_of(script), cell
    section = DOCS["differences.md"].split(f"\n## DreamerV{number}\n")[1].split("\n## ")[0]
    assert flags_in(section) <= flags_of(script)


def test_every_function_that_the_details_name_exists():
    sections = re.split(r"\n## In .*\n", DOCS["details.md"])[1:]
    every, twins, one, two, three = sections
    of = (ALL, SCRIPTS, [dreamerv1], [dreamerv2], [dreamerv3])
    for text, scripts in zip(sections, of, strict=True):
        names = names_in(text)
        assert len(names) >= 8
        for name in names:
            assert all(exists(name, script) for script in scripts), name
    assert flags_in(one) <= flags_of(dreamerv1)
    assert flags_in(two) <= flags_of(dreamerv2)
    assert flags_in(three) <= flags_of(dreamerv3)
    assert flags_in(twins) <= flags_of(dreamerv1) | flags_of(dreamerv2)
    assert flags_in(every) <= set.intersection(*map(flags_of, ALL))


def test_the_details_are_numbered_and_counted():
    numbers = [int(n) for n in re.findall(r"^(\d+)\. \*\*", DOCS["details.md"], re.M)]
    assert numbers == [*range(1, len(numbers) + 1)]
    assert f"{len(numbers)} details" in DOCS["README.md"]


def test_every_function_that_the_equations_name_exists():
    section = DOCS["reading.md"].split("## Where the papers' equations are")[1]
    _, *rows = cells(section.strip().split("\n\n")[0])
    for *row, where in rows:
        for part in where.split(";"):
            # V3 alone, or V1 and V2, if not all have it
            said = re.match(r"\s*(V\d)(?: and (V\d))?", part)
            only = set(said.groups()) if said else {"V1", "V2", "V3"}
            for name in set(re.findall(r"`([\w.]+)`", part)) - {"critic"}:
                name = {"WorldModel.reward": "Head", "WorldModel.discount": "Head"}.get(name, name)
                for i, script in enumerate(ALL, 1):
                    assert f"V{i}" not in only or exists(name, script), (row, name, script)
    assert len(rows) > 15


def test_the_order_of_the_scripts_is_the_one_described():
    listed = DOCS["reading.md"].split("## Order")[1].split("\n\nEverything above")[0]
    for script in ALL:
        source = Path(script.__file__).read_text()
        names = [name for name in re.findall(r"`(\w+)`", listed) if hasattr(script, name)]
        wanted = {"Args", "RSSM", "WorldModel", "lambda_return", "opt_step", "policy", "main"}
        assert wanted <= set(names)
        text = re.sub(r"the `Actor` that.*", "the `Actor`", listed)
        groups = [re.findall(r"`(\w+)`", line) for line in re.split(r"\n\d\. ", text)]
        places = []
        for group in groups:
            defined = [re.search(rf"^(class |def )?{name}\b", source, re.M) for name in group]
            places.append([match.start() for match in defined if match])
        places = [group for group in places if group]
        assert len(places) == 8  # the docstring has no name
        assert all(max(a) < min(b) for a, b in itertools.pairwise(places))


def test_each_row_of_what_survives_what_has_tests_that_exist():
    text = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    _, *rows = cells(between("survives"))
    tests = (ROOT / "tests" / "survives.md").read_text()
    items = re.split(r"^(?=\d+\. )", tests, flags=re.M)[1:]
    assert len(rows) >= 20
    for row, item in zip(rows, items, strict=True):
        assert item.startswith(f"{row[0]}. ")
        names = re.findall(r"`(test_\w+)`", item)
        assert names, row
        assert all(f"def {name}(" in text for name in names), names


def test_the_numbers_of_parameters_are_those_of_the_networks():
    header, *rows = cells(between("parameters"))
    assert len(rows) == 6
    for name, preset, *numbers in rows:
        script = {f"`{script.__name__}.py`": script for script in [*SCRIPTS, dreamerv3]}[name]
        preset = preset.split("`")[1]
        args = script.Args(**script.PRESETS[preset])
        script.resolve_auto(args, torch.device("cpu"), discrete=preset == "atari")
        image = (1 if args.grayscale else 3, 64, 64)
        actions = 18 if preset == "atari" and args.full_action_space else 6
        with torch.device("meta"):
            agent = script.make_agent({"image": image, "action": (actions,)}, args)
        for module, number in zip(header[2:], numbers, strict=True):
            parameters = agent[module.replace(" ", "_")].parameters()
            assert sum(p.numel() for p in parameters) == value_of(number), (name, preset, module)


WORLDS = {
    "V1, Atari, RGB, 6 actions": ("ALE/Pong-v5", {}),
    "V2, Atari, gray, 6 actions": ("ALE/Pong-v5", {"grayscale": True}),
    "V2, Atari, gray, 18 actions": ("ALE/Boxing-v5", {"grayscale": True}),
    "V3, Atari, gray, 18 actions": ("ALE/Boxing-v5", {"grayscale": True}),
    "dm_control walker from pixels, 1M frames": ("dm_control/walker-walk-v0", {}),
    "dm_control walker from vectors, 1M frames": (
        "dm_control/walker-walk-v0",
        {"observation": "vector"},
    ),
    "CartPole-v1": ("CartPole-v1", {}),
    "CartPole-v1 `--pixels`": ("CartPole-v1", {"observation": "pixels"}),
    "Pendulum-v1": ("Pendulum-v1", {}),
}


@pytest.mark.parametrize("name", WORLDS)
def test_a_row_of_the_replay_has_as_many_bytes_as_the_table_says(name):
    env_id, options = WORLDS[name]
    with skip_without_opengl(), contextlib.closing(make_envs(1, env_id, **options)) as envs:
        size = common.row_bytes(envs.shapes)
    [(_, told, rows, disk)] = [row for row in cells(between("sizes")) if row[0] == name]
    assert f"{size:,}" == told
    number, unit = disk.split()
    total = size * value_of(rows) / {"MB": 1e6, "GB": 1e9}[unit]
    assert total == pytest.approx(float(number), rel=0.05)


def test_the_seconds_of_whole_runs_are_those_of_the_record():
    record = json.loads((ROOT / "benchmarks" / "speed" / "cpu-runs.json").read_text())
    table = cells(between("runs"))[1:]
    assert len(table) == len(record["reports"])
    for row, report in zip(table, record["reports"], strict=True):
        runs = report["runs"]
        seconds = [run["seconds"] for run in runs]
        assert [run["seed"] for run in runs] == list(range(1, len(runs) + 1))
        if (report["env_id"], report["precision"]) == ("CartPole-v1", "float32"):
            told = f"came after {min(seconds):.0f} to {max(seconds):.0f} seconds"
            assert (
                f"With seeds 1 to {len(runs)} the first evaluation above 475 {told}"
                in PAGES[README]
            )
        peer = [run["peer seconds"] for run in runs]
        parts = [sum(run["parts"].values()) - run["parts"]["evaluation"] for run in runs]
        ratios = [mine / theirs for mine, theirs in zip(parts, peer, strict=True)]
        assert row == [
            f"`{report['env_id']}`", report["precision"], ", ".join(f"{s:.0f}" for s in seconds),
            f"{statistics.median(seconds):.0f}", f"{report['of which evaluation']:.1f}",
            f"{statistics.median(peer):.0f}", f"{statistics.median(ratios):.3f}",
        ]  # fmt: skip


def test_the_hours_of_the_papers_tasks_are_updates_times_the_time_of_one():
    speed = cells(DOCS["results.md"].split("On an AMD EPYC:")[1].split("\n\n")[1])
    times = {}  # V1 or V2, precision -> milliseconds
    for version, first in (("V1", 1), ("V2", 3)):
        assert speed[first][0].startswith(version)
        for row in speed[first : first + 2]:
            times[version, row[1]] = float(row[2])
    _, *rows = cells(DOCS["machines.md"].split("## How long it takes")[1].split("\n\n")[2])
    frames = {"walker": 1e6, "10M": 10e6, "200M": 200e6}
    assert len(rows) == 5
    for row in rows[2:]:
        version = "V1" if "V1" in row[0] else "V2"
        [total] = [value for word, value in frames.items() if word in row[0]]
        args = dreamerv1.Args(**dreamerv1.DMC) if version == "V1" else dreamerv2.Args()
        if version == "V1":
            sets = (total - args.prefill) // args.train_every
            updates = args.pretrain + args.train_steps * sets
        else:
            steps = total / args.action_repeat - args.prefill
            updates = args.pretrain + 1 + steps // args.train_every
        assert value_of(row[1]) == pytest.approx(updates, rel=0.01)
        for precision, told in (("bfloat16", row[2]), ("float32", row[3])):
            days = updates * times[version, precision] / 1000 / 86400
            assert float(told.removesuffix(" days")) == pytest.approx(days, rel=0.05), row
        ms = gpu_report("W1" if version == "V1" else "W2", "graph", "bfloat16")["ours"]["ms"]
        agent_steps = total / args.action_repeat * (ms["policy"] + ms["environment"])
        hours = (updates * ms["update"] + agent_steps) / 3.6e6
        number, unit = row[4].split()
        told = float(number) * {"hours": 1, "days": 24}[unit]
        assert told == pytest.approx(hours, rel=0.05), row


def gpu_report(workload, mode, precision):
    """What speed.py reported on the GPU."""
    reports = json.loads((ROOT / "benchmarks" / "speed" / "h200.json").read_text())["reports"]
    wanted = {"workload": workload, "mode": mode, "precision": precision}
    return next((r for r in reports if wanted.items() <= r.items()), None)


def test_the_times_on_a_gpu_are_those_of_the_record():
    workloads = ("W2", "W2", "atari50", "dmc2", "W1", "W5")
    _, *rows = cells(between("gpu"))
    for row, workload in zip(rows, workloads, strict=True):
        known = gpu_report(workload, "eager", "bfloat16")["what"].replace(" x ", "x")
        name = row[0].replace("the same with `--compile`", "V2").replace(" x ", "x")
        parts = name.split(", ")
        assert [part for part in parts if part not in known] in ([], ["the same"], ["size 12m"])
        captured = "compile" if "--compile" in row[0] else "graph"
        eager = "none" if "--compile" in row[0] else "eager"
        modes = [(m, p) for p in ("bfloat16", "float32") for m in (captured, eager)]
        for told, (mode, precision) in zip(row[1:5], modes, strict=True):
            report = gpu_report(workload, mode, precision)
            if report is None:
                assert told in ("-", "not measured")
            else:
                assert float(told) == pytest.approx(report["ours"]["ms"]["update"], rel=0.01)
        report = gpu_report(workload, captured, "bfloat16")
        if report is None:
            assert row[5:] == ["-", "-"]
        else:
            assert float(row[6]) == pytest.approx(report["ours"]["peak MiB"] / 1024, abs=0.05)
            if captured == "graph":
                assert value_of(row[5]) == round(report["kernels"][0][2])


def test_the_papers_numbers_are_those_that_curves_are_compared_with():
    published = plot.published()
    compared = 0
    rows = re.findall(r"^\| `([a-z_]+-[a-z_]+)` \| (.*) \|$", DOCS["published.md"], re.M)
    assert len(rows) == 20
    frames = {"dreamerv1": (1e5, 5e5, 1e6, 5e6), "dreamerv2": (1e5, 5e5, 1e6, 2e6)}
    for name, cells in rows:
        medians = [float(cell.replace(",", "")) for cell in cells.split(" | ")]
        assert len(medians) == 11  # the last three are DreamerV3's
        for i, script in enumerate(frames):
            curve = published.get((script, f"dm_control/{name}-v0"), [])
            for at, median in zip(frames[script], medians[4 * i : 4 * i + 4], strict=True):
                edges = [row for row in curve if row["env_frames"] >= at]
                if edges:
                    assert median == pytest.approx(edges[0]["median"], abs=0.5)
                    compared += 1
    tables = DOCS["published.md"].split("\n## Atari")[1:]
    games, games_of_v3 = (
        re.findall(r"`([A-Z]\w+)` \|((?: [-\d.,]+ \|){4})", table) for table in tables
    )
    assert len(games) == 55
    assert len(games_of_v3) == 57
    assert all(f"ALE/{name}-v5" in gym.registry for name, _ in games_of_v3)
    for name, cells in games:
        assert f"ALE/{name}-v5" in gym.registry
        curve = published.get(("dreamerv2", f"ALE/{name}-v5"), [])
        for at, cell in zip((5e6, 10e6, 50e6, 200e6), cells.split(" |"), strict=False):
            edges = [row for row in curve if row["env_frames"] >= at]
            if edges:
                assert float(cell.replace(",", "")) == pytest.approx(edges[0]["median"], abs=0.5)
                compared += 1
    assert compared > 30


def test_the_papers_updates_are_those_of_the_presets():
    counts = []
    for script, preset, frames in (
        (dreamerv1, "dmc_pixels", 1_000_000), (dreamerv2, "dmc_pixels", 1_000_000),
        (dreamerv2, "atari", 200_000_000), (dreamerv3, "dmc_pixels", 1_200_000),
        (dreamerv3, "atari100k", 440_000), (dreamerv3, "atari", 204_000_000),
    ):  # fmt: skip
        args = script.Args(**script.PRESETS[preset])
        unit = 1 if script is dreamerv1 else args.action_repeat
        counts.append(f"{script.updates_owed(frames // unit, args):,}")
    assert re.findall(r": ([\d,]+) in", DOCS["published.md"]) == counts


def test_the_docs_repeat_what_the_readme_and_the_scripts_say():
    [change] = blocks("diff", [README])
    assert change in blocks("diff", [ROOT / "docs" / "changing.md"])
    [row_table] = [text for text in DOCS["reading.md"].split("```") if "is_terminal " in text]
    indented = row_table.strip("\n").replace("\n", "\n    ")
    assert all(indented in script.__doc__ for script in ALL)


def test_ci_runs_the_line_that_the_readme_gives():
    block = re.search(r"<!-- test-command -->\n```bash\n(.*)\n```", PAGES[README])[1]
    assert block == "python -m pytest -n 2 && python -m pytest -n 2 -m slow"
    assert "test-command" in (ROOT / ".ci" / "run").read_text()


# Code blocks


def blocks(language, paths=PAGES):
    return [
        block
        for path in paths
        for block in re.findall(rf"^```{language}\n(.*?)^```$", PAGES[path], re.M | re.S)
    ]


def train(script, flags):
    """A whole run of a module in this process -> exit code."""
    args = runtime.parse_args(script.Args, script.PRESETS, common.choose_preset, flags)
    with kept_process():
        return script.main(args)


def small(script):
    """Flags for a script or a copy of it."""
    if hasattr(script, "explore"):
        return SMALL_V1
    return SMALL_V3 if hasattr(script, "follow") else SMALL_V2


def rows_of(run):
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Run folders: those of a run of each script."""
    folder = tmp_path_factory.mktemp("docs") / "runs"
    for script in ALL:
        flags = ["--env-id", "CartPole-v1", "--resume", str(folder / script.__name__)]
        assert train(script, flags + small(script)) == 0
    return folder


@pytest.fixture
def my_env(runs):
    """The environment of the docs, in a module beside the runs."""
    Path("my_env.py").write_text(ENVIRONMENT)
    yield
    sys.modules.pop("my_env", None)
    gym.registry.pop("Corridor-v0", None)


@pytest.fixture
def runs(trained, tmp_path, monkeypatch):
    """A folder of one's own with the runs, in which the test goes on."""
    shutil.copytree(trained, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "runs"


def mine(source, monkeypatch):
    """A module of this source, as if it were a copy of a script in this folder."""
    Path("mine.py").write_text(source)
    spec = importlib.util.spec_from_file_location("mine", Path("mine.py").resolve())
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mine", module)
    spec.loader.exec_module(module)
    return module


def learnt(script, flags, *tags):
    """Trains; True if there were updates, finite losses, and rows with all of the tags."""
    assert train(script, [*flags, "--resume", "runs/new", *small(script)]) == 0
    rows = rows_of("runs/new")
    assert all(math.isfinite(value) for row in rows for value in row.values())
    return rows[-1]["updates"] > 1 and {"losses/model", *tags} <= set().union(*rows)


CARTPOLE = ["--env-id", "CartPole-v1"]
EITHER = [
    pytest.param(dreamerv2, id="dreamerv2"),
    pytest.param(dreamerv1, id="dreamerv1", marks=pytest.mark.slow),
]
ANY = [*EITHER, pytest.param(dreamerv3, id="dreamerv3", marks=pytest.mark.slow)]
# Of the Python blocks one is a module, one takes the place of a function; the others are programs.
[ENVIRONMENT] = [block for block in blocks("python") if "gym.register(" in block]
[NETWORK] = [block for block in blocks("python") if "\ndef mlp(" in block]
FROM_PYTHON = ROOT / "docs" / "python.md"
ACTING, HEADS, EXPORT, FROM_DATA = blocks("python", [FROM_PYTHON])
OTHERS = (ENVIRONMENT, NETWORK, ACTING, HEADS, EXPORT, FROM_DATA)
FROM_WEIGHTS, FROM_DATA_WITH_V3 = blocks("diff", [FROM_PYTHON])
PRINTING = [block for block in blocks("python") if block not in OTHERS]


def program(block, run):
    """Runs a block with the agent of a run, of either script -> its names."""
    code = block.replace("RUN", str(run)).replace("import dreamerv2 ", f"import {run.name} ")
    names = {"__name__": "block"}
    exec(compile(code, "block", "exec"), names)
    return names


@pytest.mark.parametrize("script", ANY)
@pytest.mark.parametrize("block", PRINTING, ids=lambda block: block.splitlines()[-1][:30])
def test_a_python_block_runs_as_printed(block, script, runs, capsys):
    program(block, runs / script.__name__)
    assert re.search(r"\d+\.\d", capsys.readouterr().out)  # they print returns


@pytest.mark.parametrize("script", ANY)
def test_a_run_is_used_from_python_in_25_lines(script, runs):
    assert len([line for line in ACTING.splitlines() if line]) <= 25
    names = program(ACTING, runs / script.__name__)
    feat_size = names["model"].rssm.feat_size
    assert names["feat"].shape == (32, 1, feat_size)
    assert names["dreamt"]["vector"].shape == (1, 4)
    assert names["total"] >= 8
    exec(HEADS, names)
    assert names["reward"].shape == names["value"].shape == names["discount"].shape == (1,)
    assert 0 < names["discount"] < 1
    assert names["action"].sum() == 1


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("script", ANY)
def test_the_exported_policy_computes_exactly_what_policy_does(script, env_id, runs):
    if env_id != "CartPole-v1":
        shutil.rmtree(runs / script.__name__)
        flags = ["--env-id", env_id, "--resume", str(runs / script.__name__)]
        assert train(script, flags + small(script)) == 0
    names = program(EXPORT, runs / script.__name__)
    step = torch.export.load("policy.pt2").module()
    replay = common.read_replay(runs / script.__name__)
    state = names["state"]
    for t in range(20):
        row = {key: torch.as_tensor(replay[key][t]) for key in ("vector", "action", "is_first")}
        with names["Draws"]() as draws:
            action, after = script.policy(names["agent"], row, state, sample=False)
        exported, state = step(row, state, draws.noted)
        assert torch.equal(exported, action)
        assert all(torch.equal(state[key], after[key]) for key in after)


def mixed_steps(rows, seed):
    """CartPole's rows under actions that are random, at times half of them: data.npz."""
    envs = make_envs(1, "CartPole-v1", seed=seed)
    rng = np.random.default_rng(seed)
    data = []
    action = np.zeros((1, 2), np.float32)
    while len(data) < rows:
        envs.send(torch.from_numpy(action))
        row, _ = envs.receive()
        data.append({key: value[0] for key, value in row.items()})
        if row["is_first"][0]:
            random = rng.choice([1.0, 0.7, 0.5])
        _, _, angle, velocity = row["vector"][0]
        upright = int(angle + 0.3 * velocity > 0)
        choice = rng.integers(2) if rng.random() < random else upright
        action = np.eye(2, dtype=np.float32)[[choice]]
    np.savez("data.npz", **{key: np.stack([row[key] for row in data]) for key in data[0]})
    return rows / sum(row["is_first"] for row in data)


@pytest.mark.slow
def test_a_policy_is_learned_from_random_and_mixed_steps(tmp_path, monkeypatch):
    assert len([line for line in FROM_DATA.splitlines() if line]) <= 40
    monkeypatch.chdir(tmp_path)
    assert mixed_steps(4000, seed=1) < 150  # the mean length of an episode
    code = FROM_DATA.replace("range(3000)", "range(1000)")
    last = "        torch.save"
    assert last in code
    code = code.replace(last, f"        if returns.mean() >= 200:\n            break\n{last}")
    returns = program(code, Path("dreamerv2"))["returns"]
    assert returns.mean() >= 200


@pytest.mark.parametrize("script", ANY)
def test_a_run_begins_from_the_weights_that_data_gave(script, place, monkeypatch):
    mixed_steps(300, seed=1)
    code = FROM_DATA.replace("range(3000)", "range(2)").replace("500 == 499", "2 == 1")
    if script is dreamerv3:
        code = apply(FROM_DATA_WITH_V3, code)
    weights = program(code, Path(script.__name__))["agent"].state_dict()
    loaded = torch.load("agent.pt")
    assert all(torch.equal(weights[key], loaded[key]) for key in weights)
    module = mine(apply(FROM_WEIGHTS, Path(script.__file__).read_text()), monkeypatch)
    flags = ["--env-id", "CartPole-v1", "--total-frames", "20", "--eval-episodes", "1"]
    assert train(module, [*flags, "--resume", "new"]) == 0  # ends before its first update
    began = runtime.load_agent(script, "new")[0].state_dict()
    assert all(torch.equal(weights[key], began[key]) for key in weights)


@pytest.mark.parametrize("script", ANY)
def test_the_environment_of_the_docs_is_learned_from(script, my_env):
    assert learnt(script, ["--env-id", "my_env:Corridor-v0"])


@pytest.mark.parametrize("script", ANY)
def test_the_network_of_the_docs_is_learned_with(script, runs, monkeypatch):
    source = Path(script.__file__).read_text()
    old = re.search(r"def mlp\(.*?\n\n\n", source, re.S)[0]
    network = NETWORK
    if script is dreamerv3:  # as its page says
        network = NETWORK.replace("), args)", "))")
        assert network != NETWORK
    module = mine(source.replace(old, network + "\n\n"), monkeypatch)
    assert learnt(module, [*CARTPOLE])
    assert module.Residual in map(type, module.mlp(4, 3, module.Args(units=8)).modules())


def apply(diff, source):
    """The source with the hunks of a diff, each of which fits one place."""
    for hunk in re.split(r"^@@.*\n", diff, flags=re.M)[1:]:
        lines = [(line[:1] or " ", line[1:]) for line in hunk.splitlines()]
        old = "".join(f"{text}\n" for sign, text in lines if sign in " -")
        new = "".join(f"{text}\n" for sign, text in lines if sign in " +")
        assert source.count(old) == 1, hunk
        source = source.replace(old, new)
    return source


CHANGING_V3 = ROOT / "docs" / "changing-v3.md"
OF_THE_TWINS = [page for page in PAGES if page not in (FROM_PYTHON, CHANGING_V3)]
DIFFS = [
    pytest.param(script.values[0], diff, id=f"{script.id}-{i}", marks=script.marks)
    for i, diff in enumerate(dict.fromkeys(blocks("diff", OF_THE_TWINS)))
    for script in EITHER
    if script.id == "dreamerv2" or not re.search("slow_critic|advantage", diff)  # V2's alone
]
DIFFS += [
    pytest.param(dreamerv3, diff, id=f"dreamerv3-{i}")
    for i, diff in enumerate(blocks("diff", [CHANGING_V3]))
]


@pytest.mark.parametrize(("script", "diff"), DIFFS)
def test_a_diff_applies_to_a_copy_of_the_script_which_then_updates(script, diff, runs, monkeypatch):
    module = mine(apply(diff, Path(script.__file__).read_text()), monkeypatch)
    tags = {f"losses/{name}" for name in re.findall(r'^\+.*losses(?:\["|/)(\w+)"\]', diff, re.M)}
    commands = re.findall(r"`python mine\.py ([^`]+)`", DOCS["changing.md"])
    flags = CARTPOLE
    if "reward_shift" in diff:
        [flags] = [command.split() for command in commands if "--reward-shift" in command]
        with pytest.raises(runtime.UserError, match="--reward-shift is -101"):
            train(module, [*CARTPOLE, "--reward-shift", "-101"])
    assert learnt(module, flags, *tags)
    args = runtime.read_args(module.Args, "runs/new")
    if "reward_shift" in diff:
        assert (args["reward_shift"], args["temperature"]) == (-0.5, -2.5)
        assert args["milestones"] == (10, 20, 30)
    assert train(module, ["--resume", "runs/new", "--total-frames", "200"]) == 0
    assert args["exp_name"] == "mine"


def test_no_diff_of_the_docs_is_wider_than_the_scripts():
    lines = [line for diff in blocks("diff") for line in diff.splitlines()]
    assert max(map(len, lines)) <= 101


# Commands


def commands():
    """Commands of the scripts, in blocks and in the text -> lists of words, without repetitions."""
    found = []
    for text in DOCS.values():
        lines = [line for block in re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S)
                 for line in block.replace("\\\n", " ").splitlines()]  # fmt: skip
        lines += re.findall(r"`([^`\n]*\bpython \w+\.py[^`\n]*)`", prose(text))
        for line in lines:
            if line.startswith("#SBATCH"):
                continue
            for command in " ".join(shlex.split(line.strip(), comments=True)).split(" && "):
                words = command.split()
                run_by_tool = "benchmarks/run.py" in words  # a test below runs those
                if scripts_in(words) and words[0] not in ("cp", "diff", "sed") and not run_by_tool:
                    found.append(words)
    return [words for words, _ in itertools.groupby(sorted(found))]


def scripts_in(words):
    return [word for word in words if re.fullmatch(r"(dreamerv[123]|mine)\.py", word)]


def split(words):
    """What starts the script, the module, its flags with what stands for a run put in."""
    [name] = scripts_in(words)
    at = words.index(name)
    script = {"dreamerv1.py": dreamerv1, "dreamerv3.py": dreamerv3}.get(name, dreamerv2)
    flags = [word.replace("$seed", "1") for word in words[at + 1 :]]
    flags = [f"runs/{script.__name__}" if word == "RUN" else word for word in flags]
    return words[:at], script, ["CartPole-v1" if word == "ID" else word for word in flags]


# Commands whose flags are parsed and that are not run here, with what they need.
ELSEWHERE = {
    "torchrun --nproc-per-node 8": "eight GPUs",
    "srun torchrun": "Slurm",
    "benchmarks.recipes:Crafter-v0": "pip install crafter",
    "benchmarks/kill_often.py": "minutes; tests/test_resume.py does the same",
    "benchmarks/soak.py": "half an hour",
    "benchmarks/smoke.py": "a minute; tests/test_smoke.py does the same",
    "--reward-shift": "a changed copy, which the test of the diff runs with these flags",
    "--help": "it ends before there is a run",
}
SLOW = ("torchrun", "walker-walk", "humanoid-walk", "cartpole-balance-v0")
COMMANDS = [
    pytest.param(
        words,
        id=" ".join(words),
        marks=[pytest.mark.slow] if any(word in " ".join(words) for word in SLOW) else [],
    )
    for words in commands()
]
RUN_HERE = [case for case in COMMANDS if not any(place in case.id for place in ELSEWHERE)]


def test_the_commands_of_the_pages_are_found():
    ids = {case.id for case in COMMANDS}
    assert len(ids) > 20
    assert ".venv/bin/python dreamerv2.py --env-id PongNoFrameskip-v4" in ids
    assert {f"python dreamerv{i}.py --env-id ID" for i in (1, 2)} <= ids
    for place in ELSEWHERE:
        assert any(place in name for name in ids), place


@pytest.mark.parametrize("words", [case.values[0] for case in COMMANDS], ids=" ".join)
def test_the_flags_of_a_printed_command_can_be_read(words, runs, monkeypatch):
    _, script, flags = split(words)
    if "--reward-shift" in flags:
        return  # the test of that diff reads them
    if "--help" in flags:
        with pytest.raises(SystemExit) as end:
            runtime.parse_args(script.Args, script.PRESETS, common.choose_preset, flags)
        assert end.value.code == 0
        return
    args = runtime.parse_args(script.Args, script.PRESETS, common.choose_preset, flags)
    for flag, value in itertools.pairwise(flags):
        if flag.startswith("--") and not value.startswith("--") and flag != "--resume":
            field = getattr(args, flag.removeprefix("--").replace("-", "_"))
            assert str(field) == value or field == pytest.approx(float(value))


def sized(script, flags):
    """The flags with those of a small run; one that exists takes its own sizes."""
    if "--evaluate" in flags:
        return [*flags, "--eval-episodes", "1"]
    if "--resume" in flags and Path(flags[flags.index("--resume") + 1]).exists():
        return [*flags, "--total-frames", "200", "--eval-episodes", "1"]
    return flags + small(script)


@pytest.mark.parametrize("words", RUN_HERE)
def test_a_printed_command_runs_with_flags_of_size_appended(words, runs, my_env):
    launcher, script, flags = split(words)
    if launcher[0] == "torchrun":
        options = " ".join(launcher[1:])
        name = f"{script.__name__}.py"
        process = start(name, " ".join(sized(script, flags)), runs.parent, torchrun=options)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert "2 processes share batches and frames" in out
    else:
        with skip_without_opengl():
            assert train(script, sized(script, flags)) == 0


CURVE_TOOLS = ("benchmarks/run.py", "benchmarks/check.py", "benchmarks/plot.py")
CURVE_BLOCKS = [
    block for block in blocks("bash") if any(f"python {tool}" in block for tool in CURVE_TOOLS)
]


@pytest.mark.slow
@pytest.mark.parametrize("block", CURVE_BLOCKS, ids=lambda block: block.split(" -")[0].strip())
def test_runs_are_made_compared_and_drawn_as_printed(block, trained, tmp_path):
    """With small runs, and with folders of runs that were begun by hand."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    for name, seed in itertools.product(("mine", "base"), (1, 2)):
        folder = tmp_path / "runs" / f"{name}-{seed}"
        shutil.copytree(trained / "dreamerv2", folder)
        text = (folder / "args.yaml").read_text()
        (folder / "args.yaml").write_text(text.replace("seed: 1\n", f"seed: {seed}\n"))
    environ = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    lines = block.replace("\\\n", " ").splitlines()
    lines = [line.split(" #")[0].strip() for line in lines]
    flags = shlex.join(SMALL_V2).replace("--imag-horizon 3 ", "")  # in which the variants differ
    printed = []
    for line in (line for line in lines if not line.startswith("tensorboard")):
        if "benchmarks/run.py" in line:
            line += f" {flags}" if " -- " in line else f" -- {flags}"
        done = subprocess.run(
            line, shell=True, cwd=tmp_path, env=environ, capture_output=True, text=True
        )
        may_fall_short = "benchmarks/check.py" in line  # after so few frames
        if line.endswith("runs/benchmarks/curves"):  # whose episodes are shorter than those pinned
            assert "differ in time_limit: 0, 100" in done.stderr
            continue
        assert done.returncode in ((0, 1) if may_fall_short else (0,)), done.stderr
        assert "Traceback" not in done.stderr
        if may_fall_short:
            printed += done.stdout.splitlines()
        if "--out" in line:
            assert (tmp_path / line.split()[-1]).exists()
    if "sed " in block:
        told = DOCS["results.md"].split("`check.py` prints\n\n```\n")[1].split("```")[0]
        assert [shape(line) for line in printed] == [shape(line) for line in told.splitlines()]


def shape(line):
    """A line of check.py without what differs in small runs, numbers and the verdict."""
    return re.sub(r"-?\d[\d,.]*", "0", re.split(", finds|, too few seeds", line)[0])


def test_the_loss_that_is_found_is_as_told_for_each_number_of_seeds():
    [seeds, losses] = cells(between("power"))
    for count, loss in zip(seeds[1:], losses[1:], strict=True):
        found = check.smallest_loss((1, 1), (int(count),) * 2, 1e-6, 0.05, check.welch_margin)
        assert f"{found:.1f}" == loss


def without_numbers(text):
    return re.sub(r"\d[\d,.]*", "0", text)


def test_the_readme_shows_what_a_run_prints(runs, capsys):
    words = next(w for w in commands() if w[-1] == "CartPole-v1" and "dreamerv2.py" in w)
    _, script, flags = split(words)
    flags = [*flags, *small(script)]
    assert train(script, flags) == 0
    said = [without_numbers(line) for line in capsys.readouterr().out.splitlines()]
    shown = PAGES[README].split("It prints")[1].split("```\n")[1].splitlines()
    assert len(shown) >= 4
    for line in shown[:-1]:  # the last one is the bar
        assert without_numbers(line).replace("minutes", "seconds") in said
    bar = r" *\d+%\|.*\| \d+/30000 \[.*, \d+ frames/s, \d+ updates, return=\d+\]"
    assert re.fullmatch(bar, shown[-1])


def test_the_readme_shows_what_an_evaluation_prints(runs, capsys):
    assert train(dreamerv2, ["--evaluate", str(runs / "dreamerv2")]) == 0
    told = re.search(r"[Tt]he last line says `([^`]+)`", PAGES[README])[1]
    assert without_numbers(told).rstrip("s") in without_numbers(capsys.readouterr().out)


# Metrics and run folders


def test_every_tag_that_a_run_logs_is_explained_and_no_other(trained):
    _, *rows = cells(between("tags"))
    tags = [row[0] for row in rows if "GIF" not in row[0]]
    told = {tag for cell in tags for tag in re.findall(r"`([^`]+)`", cell)}
    logged = set()
    for script in ALL:
        logged = logged.union(*rows_of(trained / script.__name__))
    assert logged - {"frames", "updates", "seconds"} == told - {"losses/image"}


def test_every_file_of_a_run_folder_is_explained(trained):
    section = DOCS["runs.md"].split("## A run folder")[1].split("```")[0]
    told = re.findall(r"^\| (.*?) \|", section, re.M)
    told = re.findall(r"`([^`]+)`", " ".join(told))
    for path in (trained / "dreamerv2").rglob("*"):
        if path.is_file():
            name = str(path.relative_to(trained / "dreamerv2"))
            assert any(Path(name).match(pattern) for pattern in told), name


def test_the_flags_that_may_change_are_those_of_the_code():
    text = DOCS["runs.md"].split("It can change ")[1].split(";")[0]
    told = {flag.removeprefix("--").replace("-", "_") for flag in re.findall(r"--[a-z-]+", text)}
    assert told == runtime.MAY_CHANGE - {"resume", "evaluate"}
