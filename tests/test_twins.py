"""dreamerv1.py and dreamerv2.py are twins: their diff is what the second paper changed.

dreamerv3.py keeps their order and names as far as the third paper left them.
"""

import ast
import re
import subprocess
from dataclasses import asdict
from pathlib import Path

import dreamerv1
import dreamerv2
import dreamerv3

ROOT = Path(__file__).parent.parent
ONE = (ROOT / "dreamerv1.py").read_text()
TWO = (ROOT / "dreamerv2.py").read_text()
THREE = (ROOT / "dreamerv3.py").read_text()
ONLY_ONE = {"explore"}
ONLY_TWO = {
    *("TwoHotHead", "TwoHotHead.__init__", "TwoHotHead.forward", "TwoHotHead.loss"),
    *("TruncNormal", "TruncNormal.__init__", "TruncNormal.rsample", "TruncNormal.log_prob"),
    *("TruncNormal.entropy", "WorldModel.kl_loss"),
}
# Definitions that both have and that differ; of a class, what stands outside its methods counts.
DIFFERENT = {
    *("Args", "DMC", "SMALL", "block", "Actor.forward", "RSSM", "RSSM.__init__", "RSSM.stats"),
    *("RSSM.dist", "RSSM.state", "RSSM.gru_step", "RSSM.observe", "RSSM.imagine", "RSSM.kl"),
    *("WorldModel.__init__", "WorldModel.loss", "lambda_return", "behavior_loss", "make_agent"),
    *("make_optimizers", "update", "resolve_auto", "updates_owed", "main"),
}


def spans(source):
    """Name -> first and last line of every top-level statement and method, in order.

    A class without its methods counts as a definition of its own, and so does the docstring.
    """
    found = {}

    def span(node):
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        return first, node.end_lineno

    for node in ast.parse(source).body:
        if isinstance(node, ast.Expr):
            found["docstring"] = span(node)
        elif isinstance(node, ast.Assign):
            found[node.targets[0].id] = span(node)
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = span(node)
        elif isinstance(node, ast.ClassDef):
            methods = [sub for sub in node.body if isinstance(sub, ast.FunctionDef)]
            first, last = span(node)
            if methods:
                last = span(methods[0])[0] - 1
            found[node.name] = first, last
            for method in methods:
                found[f"{node.name}.{method.name}"] = span(method)
        else:
            found[ast.unparse(node).splitlines()[0]] = span(node)
    return found


def definitions(source):
    """Name -> lines of every definition, in order, without the docstring."""
    lines = source.splitlines()
    found = {name: lines[first - 1 : last] for name, (first, last) in spans(source).items()}
    del found["docstring"]
    return found


def diff():
    command = ["diff", "dreamerv1.py", "dreamerv2.py"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout


def test_both_define_the_same_things_in_the_same_order():
    one = definitions(ONE)
    two = definitions(TWO)
    assert [k for k in one if k not in ONLY_ONE] == [k for k in two if k not in ONLY_TWO]


def test_what_the_second_paper_left_alone_has_the_same_source():
    one = definitions(ONE)
    two = definitions(TWO)
    different = {name for name in set(one) & set(two) if one[name] != two[name]}
    assert different - DIFFERENT == set()
    assert DIFFERENT - different == set()  # the list above is the truth


def changed(text):
    """Numbers of the lines that a diff takes out of the first file, and puts into the second."""
    out = []
    into = []
    for hunk in re.finditer(r"^(\d+)(?:,(\d+))?([acd])(\d+)(?:,(\d+))?$", text, re.M):
        first, last, kind, new_first, new_last = hunk.groups()
        if kind in "cd":
            out += range(int(first), int(last or first) + 1)
        if kind in "ac":
            into += range(int(new_first), int(new_last or new_first) + 1)
    return out, into


def test_every_hunk_of_the_diff_lies_in_a_definition_that_is_named():
    out, into = changed(diff())
    named = DIFFERENT | ONLY_ONE | ONLY_TWO | {"docstring"}
    for source, numbers in ((ONE, out), (TWO, into)):
        found = spans(source)
        inside = [found[name] for name in named if name in found]
        inside = {number for first, last in inside for number in range(first, last + 1)}
        lines = source.splitlines()
        # Blank lines around a definition that only one script has belong to none.
        unnamed = [(n, lines[n - 1]) for n in numbers if n not in inside and lines[n - 1]]
        assert unnamed == [], f"of {len(out) + len(into)} changed lines"


def test_the_diff_is_no_longer_than_a_list_of_changes():
    out, into = changed(diff())
    assert 100 < len(out) + len(into) <= 330, f"{len(out) + len(into)} changed lines"


def test_both_import_the_same():
    def imports(source):
        nodes = ast.parse(source).body
        return [ast.unparse(n) for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)]

    assert imports(ONE) == imports(TWO)
    assert imports(ONE)[-3:] == [
        "import common",
        "import runtime",
        "from runtime import Count, Rate, Share, UserError, Weight, Whole",
    ]


def test_args_have_the_same_groups_and_order():
    def lines(source, others):
        body = source[source.index("class Args") : source.index("\nDMC")]
        names = re.findall(r"^    (?:# --- (.+) ---|(\w+):)", body, re.M)
        return [a or b for a, b in names if (a or b) not in others]

    one = asdict(dreamerv1.Args())
    two = asdict(dreamerv2.Args())
    assert lines(ONE, set(one) - set(two)) == lines(TWO, set(two) - set(one))
    assert list(dreamerv1.PRESETS) == list(dreamerv2.PRESETS)


def test_the_docs_list_every_definition_and_flag_that_changed_and_no_other():
    text = (ROOT / "docs" / "v1-to-v2.md").read_text()
    table = text.split("<!-- changes:begin -->")[1].split("<!-- changes:end -->")[0]
    rows = [line.strip("| ").split(" | ") for line in table.strip().splitlines()[2:]]
    listed = [set(re.findall(r"`([^`]+)`", row[-1])) for row in rows]
    assert all(listed)

    one = asdict(dreamerv1.Args())
    two = asdict(dreamerv2.Args())
    flags = {name for name in set(one) | set(two) if one.get(name) != two.get(name)}
    flags -= {"env_id", "exp_name"}  # the example, and the name of the file
    flags = {f"--{name.replace('_', '-')}" for name in flags}
    names = DIFFERENT | ONLY_ONE | ONLY_TWO
    # The defaults count as flags, the methods of a new class as the class.
    names = {name for name in names if name not in ("Args", "DMC", "SMALL")}
    names = {name for name in names if not name.startswith(("TwoHotHead.", "TruncNormal."))}
    assert set.union(*listed) == names | flags


# DreamerV3


def changed_by_the_third_paper():
    """Definitions that only one of dreamerv2.py and dreamerv3.py has, or that differ."""
    two = definitions(TWO)
    three = definitions(THREE)
    return {name for name in set(two) | set(three) if two.get(name) != three.get(name)}


def test_the_third_script_keeps_the_order_of_what_it_keeps():
    two = definitions(TWO)
    three = definitions(THREE)
    assert [k for k in two if k in three] == [k for k in three if k in two]
    kept = set(two) & set(three)
    same = {name for name in kept if two[name] == three[name]}
    assert {"RSSM.initial", "RSSM.img_step", "RSSM.obs_step", "RSSM.kl", "OneHot.rsample"} <= same
    assert {"pixels", "stack", "detach", "policy"} <= same


def test_the_docs_list_what_the_third_paper_changed_and_nothing_else():
    text = (ROOT / "docs" / "v2-to-v3.md").read_text()
    text = " ".join(re.sub(r"```.*?```", "", text, flags=re.S).split())
    places = re.findall(r"\(((?:`[\w.-]+`(?:, )?)+)\)", text)
    listed = {name for place in places for name in re.findall(r"`([^`]+)`", place)}
    two = asdict(dreamerv2.Args())
    three = asdict(dreamerv3.Args())
    flags = {name for name in set(two) | set(three) if two.get(name) != three.get(name)}
    flags -= {"env_id", "exp_name"}
    flags = {f"--{name.replace('_', '-')}" for name in flags}
    names = changed_by_the_third_paper()
    new = {name for name in names if f"\nclass {name}(" in THREE and f"class {name}" not in TWO}
    old = {name for name in names if f"\nclass {name}" in TWO and f"class {name}(" not in THREE}
    whole = new | old  # the methods of a class that only one has count as the class
    names = {name for name in names if name.split(".")[0] not in whole or name in whole}
    names = {name for name in names if not name.startswith(("from ", "import "))}
    assert {name for name in listed if name.startswith("--")} == flags
    listed = {name for name in listed if not name.startswith("--")}
    assert {name for name in listed if not name.startswith(("common.", "runtime."))} == names


def test_the_diff_to_the_third_script_is_no_longer_than_what_the_paper_changed():
    command = ["diff", "dreamerv2.py", "dreamerv3.py"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    out, into = changed(text)
    assert 500 < len(out) + len(into) <= 770, f"{len(out) + len(into)} changed lines"
