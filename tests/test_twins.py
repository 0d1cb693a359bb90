"""dreamerv1.py and dreamerv2.py are twins: their diff is what the second paper changed."""

import ast
import difflib
import re
import subprocess
from dataclasses import asdict
from pathlib import Path

import dreamerv1
import dreamerv2

ROOT = Path(__file__).parent.parent
ONE, TWO = ((ROOT / f"dreamerv{i}.py").read_text() for i in (1, 2))
README = (ROOT / "README.md").read_text()
ONLY_ONE = {"explore"}
ONLY_TWO = {
    *("TwoHotHead", "TwoHotHead.__init__", "TwoHotHead.forward", "TwoHotHead.loss"),
    *("TruncNormal", "TruncNormal.__init__", "TruncNormal.rsample", "TruncNormal.log_prob"),
    *("TruncNormal.entropy", "WorldModel.kl_loss"),
}
# Definitions that both have and that differ; of a class, what stands outside its methods counts.
DIFFERENT = set(
    """Args DMC SMALL block Actor.forward RSSM RSSM.__init__ RSSM.stats RSSM.dist
    RSSM.state RSSM.gru_step RSSM.observe RSSM.imagine RSSM.kl WorldModel.__init__ WorldModel.loss
    lambda_return behavior_loss make_agent make_optimizers update main""".split()
)


def definitions(source):
    """Name -> source of every top-level statement and method, in order; a class without methods."""
    lines, found = source.splitlines(), {}

    def text(node):
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        return lines[first - 1 : node.end_lineno]

    for node in ast.parse(source).body[1:]:  # without the docstring
        if isinstance(node, ast.Assign):
            found[node.targets[0].id] = text(node)
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = text(node)
        elif isinstance(node, ast.ClassDef):
            methods = [sub for sub in node.body if isinstance(sub, ast.FunctionDef)]
            own, first = text(node), min([s.lineno for s in methods], default=None)
            found[node.name] = own if first is None else lines[node.lineno - 1 : first - 1]
            found |= {f"{node.name}.{sub.name}": text(sub) for sub in methods}
        else:
            found[ast.unparse(node).splitlines()[0]] = text(node)
    return found


def changed_lines():
    """Lines taken out and lines put in, as `diff` counts them."""
    command = ["diff", "dreamerv1.py", "dreamerv2.py"]
    diff = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    return len(re.findall(r"^[<>]", diff, re.M))


def test_both_define_the_same_things_in_the_same_order():
    one, two = definitions(ONE), definitions(TWO)
    assert [k for k in one if k not in ONLY_ONE] == [k for k in two if k not in ONLY_TWO]


def test_what_the_second_paper_left_alone_has_the_same_source():
    one, two = definitions(ONE), definitions(TWO)
    different = {name for name in set(one) & set(two) if one[name] != two[name]}
    assert different - DIFFERENT == set()
    assert DIFFERENT - different == set()  # the list above is the truth


def test_the_diff_has_at_most_300_changed_lines():
    assert 100 < changed_lines() <= 300


def test_the_diff_touches_no_code_that_is_not_a_definition():
    def header(source):  # the imports and what follows them, without the docstring
        return source[source.index("\nimport time") : source.index("@dataclass")]

    assert header(ONE) == header(TWO)
    assert header(ONE).endswith("\nimport common\n\n\n")
    assert ONE[ONE.index("\nif __name__") :] == TWO[TWO.index("\nif __name__") :]


def test_args_have_the_same_groups_and_order():
    def lines(source, others):
        body = source[source.index("class Args") : source.index("\nDMC")]
        names = re.findall(r"^    (?:# --- (.+) ---|(\w+):)", body, re.M)
        return [a or b for a, b in names if (a or b) not in others]

    one, two = asdict(dreamerv1.Args()), asdict(dreamerv2.Args())
    assert lines(ONE, set(one) - set(two)) == lines(TWO, set(two) - set(one))
    assert list(dreamerv1.PRESETS) == list(dreamerv2.PRESETS)


def readme_changes():
    """Rows of the README's list of changes: (first cell, names in the last cell)."""
    table = README.split("<!-- changes:begin -->")[1].split("<!-- changes:end -->")[0]
    rows = [line.strip("| ").split(" | ") for line in table.strip().splitlines()[2:]]
    return [(row[0], set(re.findall(r"`([^`]+)`", row[-1]))) for row in rows]


def test_the_readme_lists_every_definition_and_flag_that_changed_and_no_other():
    one, two = asdict(dreamerv1.Args()), asdict(dreamerv2.Args())
    flags = {name for name in set(one) | set(two) if one.get(name) != two.get(name)}
    flags -= {"env_id", "exp_name"}  # the example, and the name of the file
    flags = {f"--{name.replace('_', '-')}" for name in flags}
    listed = set().union(*(names for _, names in readme_changes()))
    wanted = {n for n in DIFFERENT | ONLY_ONE | ONLY_TWO if n not in ("Args", "DMC", "SMALL")}
    wanted = {n for n in wanted if n.split(".")[0] not in ("TwoHotHead", "TruncNormal")}
    wanted |= {"TwoHotHead", "TruncNormal"}
    assert wanted | flags <= listed, (wanted | flags) - listed
    assert listed <= wanted | flags, listed - (wanted | flags)
    assert all(names for _, names in readme_changes())


def test_the_readme_shows_the_diff_of_behavior_loss():
    one, two = definitions(ONE)["behavior_loss"], definitions(TWO)["behavior_loss"]
    shown = README.split("<!-- behavior-loss:begin -->\n```diff\n")[1].split("\n```")[0]
    diff = list(difflib.unified_diff(one, two, n=100, lineterm=""))[3:]
    assert shown.splitlines() == [line.rstrip() for line in diff]
