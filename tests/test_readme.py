"""The README is true: its tables are held against the code."""

import re
from dataclasses import asdict
from pathlib import Path

import yaml

import common
import dreamerv2

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def value_of(text):
    if text in ("yes", "no"):
        return text == "yes"
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


def test_the_table_of_presets_is_that_of_the_code():
    table = README.split("<!-- presets:begin -->")[1].split("<!-- presets:end -->")[0]
    header, _, *rows = [line.strip("| ").split(" | ") for line in table.strip().splitlines()]
    names, seen = [name.strip("`") for name in header[1:]], set()
    assert names == list(dreamerv2.PRESETS)
    for flag, *values in rows:
        field = flag.strip("`-").replace("-", "_")
        seen.add(field)
        for name, text in zip(names, values, strict=True):
            ours = (asdict(dreamerv2.Args()) | dreamerv2.PRESETS[name])[field]
            assert value_of(text) == ours, (field, name)
    changed = {field for preset in dreamerv2.PRESETS.values() for field in preset}
    assert changed <= seen, changed - seen


def test_every_flag_that_the_readme_names_exists():
    fields = {f"--{name.replace('_', '-')}" for name in asdict(dreamerv2.Args())}
    fields |= {flag.replace("--", "--no-", 1) for flag in fields} | {"--help"}
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - {"--logdir"}
    assert flags <= fields, flags - fields


def test_every_function_that_the_details_name_exists():
    details = README.split("## Implementation details")[1].split("\n## ")[0]
    places = re.findall(r"\(((?:`[\w.-]+`(?:, )?)+)\)", details)
    names = {name for place in places for name in re.findall(r"`([\w.]+)`", place)} - {"main"}
    assert len(names) > 20
    for name in names:
        home = common if name.startswith("common.") else dreamerv2
        for part in name.removeprefix("common.").split("."):
            assert hasattr(home, part), name
            home = getattr(home, part)


def test_ci_runs_the_line_that_the_readme_gives():
    block = re.search(r"<!-- test-command -->\n```bash\n(.*)\n```", README)[1]
    assert block == "python -m pytest && python -m pytest -m slow"
    assert "test-command" in (ROOT / ".ci" / "run").read_text()


def test_the_results_are_those_of_the_run_cards():
    table = README.split("<!-- results:begin -->")[1].split("<!-- results:end -->")[0]
    rows = re.findall(r"\| `python (\w+)\.py --env-id (\S+)` \| ([\d,]+) \| ([^|]+) \|", table)
    assert rows
    for script, env_id, frames, returns in rows:
        name = f"{script}-{env_id.replace('/', '-')}"
        card = yaml.safe_load((ROOT / "benchmarks" / "curves" / f"{name}.yaml").read_text())
        assert [float(x) for x in returns.split(",")] == card["final_eval_return"], env_id
        assert int(frames.replace(",", "")) == card["args"]["total_frames"], env_id
