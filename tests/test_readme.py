"""The README is true: its tables are held against the code."""

import math
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import dreamerv1
import dreamerv2

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = [dreamerv1, dreamerv2]
TORCHRUN = {
    "--max-restarts",
    "--rdzv-id",
    "--master-port",
}  # of torchrun's own flags, those in the text


def between(name):
    """What stands between the two markers of a name."""
    return README.split(f"<!-- {name}:begin -->")[1].split(f"<!-- {name}:end -->")[0]


def rows_of(name):
    """Cells of the table between the markers, the header first."""
    header, _, *rows = between(name).strip().splitlines()
    return [line.strip("| ").split(" | ") for line in (header, *rows)]


def value_of(text):
    if text in ("yes", "no"):
        return text == "yes"
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
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - {"--logdir", *TORCHRUN}


def names_in(text):
    """What a text names in parentheses, as in (`RSSM.observe`, `main`), without flags."""
    places = re.findall(r"\(((?:`[\w.-]+`(?:, )?)+)\)", text)
    return {name for place in places for name in re.findall(r"`([a-zA-Z][\w.]+)`", place)}


def exists(name, script):
    home = common if name.startswith("common.") else script
    for part in name.removeprefix("common.").split("."):
        if not hasattr(home, part):
            return False
        home = getattr(home, part)
    return True


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_table_of_presets_is_that_of_the_code(script):
    header, *rows = rows_of(f"presets-{script.__name__}")
    names, seen = [name.strip("`") for name in header[1:]], set()
    assert names == list(script.PRESETS)
    presets = {name: asdict(script.Args()) | script.PRESETS[name] for name in names}
    for flag, *values in rows:
        field = flag.strip("`-").replace("-", "_")
        seen.add(field)
        for name, text in zip(names, values, strict=True):
            assert value_of(text) == presets[name][field], (field, name)
    changed = {field for preset in script.PRESETS.values() for field in preset}
    assert changed <= seen, changed - seen

    after = README.split(f"<!-- presets-{script.__name__}:end -->")[1].strip().split("\n\n")[0]
    steps = re.search(r"The same in all four: replay of ([\d,]+) agent steps", after)[1]
    same = [("replay-size", steps), *re.findall(r"`--([a-z-]+) ([^`]+)`", after)]
    assert len(same) > 4
    for flag, text in same:
        values = {preset[flag.replace("-", "_")] for preset in presets.values()}
        assert values == {value_of(text)}, flag


def test_every_flag_that_the_readme_names_exists():
    both = [flags_of(script) for script in SCRIPTS]
    tools = (ROOT / "benchmarks").glob("*.py")
    tools = {f for t in tools for f in re.findall(r'argument\("(--[a-z-]+)', t.read_text())}
    flags = flags_in(README)
    assert flags <= set.union(*both, tools), flags - set.union(*both, tools)
    for script, fields in zip(SCRIPTS, both, strict=True):
        commands = re.findall(rf"python {script.__name__}\.py ([^`\n]+)", README)
        assert commands
        for command in commands:
            flags = flags_in(command.split("#")[0])
            assert flags <= fields, (script.__name__, flags - fields)


def test_what_the_readme_says_of_one_script_alone_names_its_flags():
    cells = [cell.strip() for line in README.splitlines() for cell in line.split(" | ")]
    for number, script in enumerate(SCRIPTS, 1):
        for cell in cells:
            if cell.startswith((f"V{number}:", f"V{number},")):
                flags = flags_in(cell.split(f"V{3 - number}:")[0])
                assert flags <= flags_of(script), cell
    differences = README.split("\n## Differences")[1].split("\n## ")[0]
    for script, name in zip(SCRIPTS, ("DreamerV1", "DreamerV2"), strict=True):
        flags = flags_in(differences.split(f"\n### {name}\n")[1].split("\n### ")[0])
        assert flags <= flags_of(script), flags - flags_of(script)


def test_every_function_that_the_details_name_exists():
    details = README.split("## Implementation details")[1].split("\n## ")[0]
    both, one, two = (part for part in re.split(r"\n### In .*\n", details)[1:])
    for text, scripts in ((both, SCRIPTS), (one, [dreamerv1]), (two, [dreamerv2])):
        names = names_in(text)
        assert len(names) >= 8
        for name in names:
            assert all(exists(name, script) for script in scripts), name
    assert flags_in(one) <= flags_of(dreamerv1)
    assert flags_in(two) <= flags_of(dreamerv2)


def test_every_function_that_the_equations_name_exists():
    rows = README.split("Where the papers' equations are:")[1].strip().split("\n\n")[0].splitlines()
    for *cells, where in (row.strip("| ").split(" | ") for row in rows[2:]):
        for part in where.split(";"):
            only = part.strip()[:2]  # V1 or V2, if one alone has it
            for name in set(re.findall(r"`([\w.]+)`", part)) - {"critic"}:
                name = {"WorldModel.reward": "Head", "WorldModel.discount": "Head"}.get(name, name)
                if only != "V2":
                    assert exists(name, dreamerv1), (cells, name)
                if only != "V1":
                    assert exists(name, dreamerv2), (cells, name)
    assert len(rows) > 15


def test_each_row_of_what_survives_what_has_tests_that_exist():
    text = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    header, *rows = rows_of("survives")
    assert len(rows) >= 20
    for row in rows:
        names = re.findall(r"`(test_\w+)`", row[header.index("test")])
        assert names, row[0]
        assert all(f"\ndef {name}(" in text for name in names), names


def test_the_numbers_of_parameters_are_those_of_the_networks():
    header, *rows = rows_of("parameters")
    assert len(rows) == 4
    for name, preset, *numbers in rows:
        script = {f"`{script.__name__}.py`": script for script in SCRIPTS}[name]
        args = script.Args(**script.PRESETS[preset.strip("`")])
        args.actor_dist = "onehot" if preset == "`atari`" else "tanh_normal"
        image = (1 if args.grayscale else 3, 64, 64)
        with torch.device("meta"):
            agent = script.make_agent({"image": image, "action": (6,)}, args)
        for module, number in zip(header[2:], numbers, strict=True):
            parameters = agent[module.replace(" ", "_")].parameters()
            assert sum(p.numel() for p in parameters) == value_of(number), (name, preset, module)


def test_ci_runs_the_line_that_the_readme_gives():
    block = re.search(r"<!-- test-command -->\n```bash\n(.*)\n```", README)[1]
    assert block == "python -m pytest -n 2 && python -m pytest -n 2 -m slow"
    assert "test-command" in (ROOT / ".ci" / "run").read_text()


WORLDS = {
    "V1, Atari, RGB, 6 actions": ("ALE/Pong-v5", {}),
    "V2, Atari, gray, 6 actions": ("ALE/Pong-v5", {"grayscale": True}),
    "V2, Atari, gray, 18 actions": ("ALE/Boxing-v5", {"grayscale": True}),
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
def test_a_row_of_the_replay_has_as_many_bytes_as_the_readme_says(name):
    env_id, options = WORLDS[name]
    options = {"observation": "auto", "action_repeat": 1, "time_limit": 0} | options
    envs = common.make_envs(1, False, env_id=env_id, seed=1, **options)
    size = sum(math.prod(s) * np.dtype(t).itemsize for s, t in envs.shapes.values())
    envs.close()
    (_, told, rows, disk), *_ = (row for row in rows_of("sizes") if row[0] == name)
    assert f"{size:,}" == told
    number, unit = disk.split()
    total = size * value_of(rows) / {"MB": 1e6, "GB": 1e9}[unit]
    assert total == pytest.approx(float(number), rel=0.05)
