"""The house rules, read off the syntax trees. PLANTED breaks each of them once, so that no rule can sleep."""

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ARROWS = {  # package -> the packages of ours that it may import
    "megatron_lite": {"megatron_lite"},
    "data_tools": {"data_tools", "megatron_lite"},
    "regmix_search": {"regmix_search", "megatron_lite"},
    "launch": {"launch", "regmix_search", "data_tools", "megatron_lite"},
    "benchmarks": {"benchmarks", "launch", "regmix_search", "data_tools", "megatron_lite"},
}
ARROWS_INSIDE = {("regmix_search", "data_tools")}  # only inside a function: fit and optimize need no corpus
ORDER = """
    schema
    config rng files process
    shape mesh data
    plan tally tensor_parallel attention recompute hf_config
    model optim
    engine checkpoint evaluate metrics hf speed
    weights resume
    run
    train
    testing __init__
"""  # a room imports only rooms above it
LEVEL = {room: i for i, cell in enumerate(ORDER.splitlines()) for room in cell.split()}
BARRED = {  # beyond ORDER: room of the core -> what it must not know
    "data": ("torch.distributed", "megatron_lite.mesh"),
    "model": ("megatron_lite.data", "megatron_lite.plan", "megatron_lite.mesh"),
}
NOT_IN_CORE = {"tokenizers", "sentencepiece", "tiktoken"}
# one file each, inside a function
LAZY = {"deepspeed", "transformers", "lightgbm", "ray", "submitit", "wandb", "lm_eval"}
UNSAFE = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "eval", "exec", "yaml.load", "torch.load"}
BAD_NAMES = {"utils", "common", "helpers", "manager", "misc"}
FILE, FUNCTION, LOOP = 300, 60, 100  # lines; LOOP is for train() in train.py alone
SIZES = {"megatron_lite": 4000, "megatron_lite/data": 2650}  # lines of Python in a house; data/ is one of its own
TEST_SUPPORT = "megatron_lite/testing.py"  # no run imports it: not counted
Found = Iterator[tuple[int, str]]  # line, what is wrong


def imports(node: ast.AST, package: list[str], inside: bool = False) -> Iterator[tuple[str, int, bool]]:
    """(dotted name, line, is it inside a function) of every import below a node."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        base = package[: len(package) + 1 - node.level] if getattr(node, "level", 0) else []
        parts = [*base, *filter(None, [getattr(node, "module", None)])]
        yield from ((".".join([*parts, alias.name]), node.lineno, inside) for alias in node.names)
    elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
        yield "torch.distributed", node.lineno, inside  # reached through a plain `import torch`
    for child in ast.iter_child_nodes(node):
        yield from imports(child, package, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def import_rules(name: str, tree: ast.Module, homes: dict[str, str]) -> Found:
    """Arrows between packages, order of the core's rooms, one lazy home for each heavy library."""
    package, room = name.removesuffix(".py").split("/")[:2]
    core = package == "megatron_lite"
    if core and room not in LEVEL:
        yield 1, f"the room {room} has no place in ORDER"
    for target, line, inside in imports(tree, name.split("/")[:-1]):
        top, second = [*target.split("."), "__init__"][:2]
        second = second if second in LEVEL else "__init__"  # a name that the package itself exports
        barred = core and (top in NOT_IN_CORE or f"{target}.".startswith(tuple(f"{b}." for b in BARRED.get(room, ()))))
        uphill = core and top == package and second != room and LEVEL[second] >= LEVEL.get(room, 0)
        stranger = top in ARROWS and top not in ARROWS[package] and not (inside and (package, top) in ARROWS_INSIDE)
        if barred or uphill or stranger:
            yield line, f"{package}/{room} may not import {target}"
        if top in LAZY and package != "benchmarks":
            if not inside:
                yield line, f"import {top} inside the function that needs it"
            if homes.setdefault(top, name) != name:
                yield line, f"{top} has its one file already: {homes[top]}"


def node_rules(name: str, tree: ast.Module) -> Found:
    """Function sizes, docstrings of public names, globals, and calls that run what they read."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            limit = LOOP if (name, node.name) == ("megatron_lite/train.py", "train") else FUNCTION
            if (size := (node.end_lineno or 0) - node.lineno + 1) > limit:
                yield node.lineno, f"{node.name} has {size} lines, at most {limit}"
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node in tree.body
        if named and not node.name.startswith("_") and not ast.get_docstring(node):
            yield node.lineno, f"{node.name} has no docstring"
        if isinstance(node, ast.Global):
            yield node.lineno, f"global {', '.join(node.names)}: pass it as an argument"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in UNSAFE:
            yield node.lineno, f"{ast.unparse(node.func)} runs what it reads"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            yield node.value.lineno, "allow_pickle runs what it reads"
    yield from ((line, f"{t} runs what it reads") for t, line, _ in imports(tree, []) if {t, t.split(".")[0]} & UNSAFE)


def text_rules(name: str, text: str, tree: ast.Module) -> Found:
    """File size and name, ASCII only, and a comment on every field of a config dataclass."""
    lines = text.splitlines()
    if len(lines) > FILE:
        yield FILE + 1, f"{len(lines)} lines, at most {FILE}"
    if BAD_NAMES & set(Path(name).with_suffix("").parts):
        yield 1, "the name says nothing: name the room after what it holds"
    yield from ((i, "not ASCII") for i, line in enumerate(lines, 1) if not line.isascii())
    if Path(name).name == "config.py":
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        said = {t.start[0]: t.string.strip("#: ") for t in tokens if t.type == tokenize.COMMENT}
        comments = {i for i, words in said.items() if words and not words.startswith(("noqa", "type:"))}
        comments |= {i + 1 for i in comments if lines[i - 1].lstrip().startswith("#:")}
        for node in (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)):
            for field in node.body if any("dataclass" in ast.unparse(d) for d in node.decorator_list) else ():
                if isinstance(field, ast.AnnAssign) and comments.isdisjoint(range(field.lineno, field.end_lineno + 1)):
                    yield field.lineno, f"{node.name}.{ast.unparse(field.target)} has no comment"


def offenders(root: Path) -> list[str]:
    """Every offence in the packages under root, as `file:line: what is wrong`."""
    found, homes, sizes = [], {}, dict.fromkeys(SIZES, 0)
    paths = [path for package in ARROWS for path in sorted((root / package).rglob("*"))]
    for path in (p for p in paths if p.suffix in {".py", ".cpp", ".h"}):
        name, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        tree = ast.parse(text if path.suffix == ".py" else "")
        if path.suffix == ".py" and name.startswith("megatron_lite/") and name != TEST_SUPPORT:
            house = "megatron_lite/data" if name.startswith("megatron_lite/data/") else "megatron_lite"
            sizes[house] += len(text.splitlines())
        rules = (import_rules(name, tree, homes), node_rules(name, tree), text_rules(name, text, tree))
        found += [f"{name}:{line}: {what}" for rule in rules for line, what in rule]
    too_big = [house for house, size in sizes.items() if size > SIZES[house]]
    return found + [f"{house}:0: {sizes[house]} lines, at most {SIZES[house]}: to add, remove" for house in too_big]


def test_the_house_is_in_order() -> None:
    found = offenders(ROOT)
    assert not found, "\n" + "\n".join(found)


def function(name: str, lines: int) -> str:
    """The text of a documented function of that many lines."""
    return f'def {name}():\n    """Doc."""\n' + "    x = 1\n" * (lines - 2)


HEAD = "from dataclasses import dataclass\n@dataclass\nclass A:\n    'Doc.'\n"
TIDY = {  # at every limit, and over none
    "megatron_lite/config.py": HEAD + "    a: int = 1  # steps\n    #: tokens\n    b: str = '#'\n",
    "megatron_lite/data/loader.py": "import torch\nfrom . import blend\nfrom megatron_lite.rng import draw\n"
    + "#\n" * 297,
    "megatron_lite/engine/deepspeed_engine.py": "def run():\n    'Doc.'\n    import deepspeed\n    run.module.eval()\n",
    "megatron_lite/mesh.py": "import torch\ntorch.distributed.barrier()\n" + function("build", FUNCTION),
    "megatron_lite/train.py": "from megatron_lite import checkpoint\n" + function("train", LOOP),
    "regmix_search/stages.py": "def corpus():\n    'Doc.'\n    import data_tools.local_corpus\n",
    "launch/pretrain.py": "from regmix_search.run import main\nimport data_tools\n",
    "benchmarks/peers.py": "import deepspeed\nimport transformers\n",
}
PLANTED = [  # (file, its text, the one offence that must be reported, without the file)
    ("regmix_search/x.py", "import data_tools\n", "1: regmix_search/x may not import data_tools"),
    ("data_tools/x.py", "import os\nimport regmix_search.run\n", "2: data_tools/x may not import regmix_search.run"),
    ("megatron_lite/model.py", "from megatron_lite.data import loader\n", "1: megatron_lite/model may not import"),
    ("megatron_lite/plan.py", "from megatron_lite import train\n", "1: megatron_lite/plan may not import"),
    ("megatron_lite/optim.py", "from megatron_lite import Config\n", "1: megatron_lite/optim may not import"),
    (
        "megatron_lite/plan.py",
        "def f():\n    'Doc.'\n    from .engine import E\n",
        "3: megatron_lite/plan may not import",
    ),
    ("megatron_lite/hf.py", "def _f():\n    import tokenizers\n", "2: megatron_lite/hf may not import tokenizers"),
    ("megatron_lite/data/x.py", "from torch import distributed\n", "1: megatron_lite/data may not import torch.dist"),
    ("megatron_lite/data/x.py", "import torch\ntorch.distributed.barrier()\n", "2: megatron_lite/data may not import"),
    ("megatron_lite/extra.py", "", "1: the room extra has no place"),
    ("regmix_search/x.py", "import lightgbm\n", "1: import lightgbm inside the function"),
    ("regmix_search/x.py", "def _f():\n    import deepspeed as d\n", "2: deepspeed has its one file already"),
    ("regmix_search/x.py", "\n" + function("f", FUNCTION + 1), "2: f has 61 lines, at most 60"),
    ("megatron_lite/train.py", function("train", LOOP + 1), "1: train has 101 lines, at most 100"),
    ("data_tools/x.py", "#\n" * (FILE + 1), "301: 301 lines, at most 300"),
    ("megatron_lite/data/csrc/x.cpp", "//\n" * (FILE + 1), "301: 301 lines, at most 300"),
    ("launch/x.py", "class A:\n    a = 1\n", "1: A has no docstring"),
    ("launch/x.py", "def _f():\n    global a\n", "2: global a"),
    ("launch/x.py", "a = 1\nb = eval('a')\n", "2: eval runs what it reads"),
    ("launch/x.py", "from pickle import loads\n", "1: pickle.loads runs what it reads"),
    ("launch/x.py", "import yaml\nyaml.load('a')\n", "2: yaml.load runs what it reads"),
    ("launch/x.py", "import torch\ntorch.load('a')\n", "2: torch.load runs what it reads"),
    ("launch/x.py", "import numpy as np\nnp.load('a', allow_pickle=True)\n", "2: allow_pickle runs what it reads"),
    ("data_tools/utils.py", "", "1: the name says nothing"),
    ("data_tools/x.py", "a = 1\nb = '\u00e9'\n", "2: not ASCII"),
    ("megatron_lite/data/csrc/x.h", "// \u00e9\n", "1: not ASCII"),
    ("regmix_search/config.py", HEAD + "    a: int = 1  # noqa: E741\n", "5: A.a has no comment"),
]


def plant(root: Path, files: dict[str, str]) -> list[str]:
    """Write the files under root, and report the offenders there."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return offenders(root)


def test_a_tidy_house_has_no_offenders(tmp_path: Path) -> None:
    assert plant(tmp_path, TIDY) == []


@pytest.mark.parametrize(("name", "text", "expected"), PLANTED)
def test_each_rule_catches_its_offender(tmp_path: Path, name: str, text: str, expected: str) -> None:
    found = plant(tmp_path, TIDY | {name: text})
    assert len(found) == 1 and found[0].startswith(f"{name}:{expected}"), found


def test_core_and_data_have_a_size(tmp_path: Path) -> None:
    files = {
        f"megatron_lite/{house}/x{i}.py": "#\n" * 50 for house, n in (("data", 53), ("engine", 80)) for i in range(n)
    }
    assert plant(tmp_path, files) == []
    assert plant(tmp_path, {"megatron_lite/rng.py": "#\n", "megatron_lite/data/blend.py": "#\n"}) == [
        "megatron_lite:0: 4001 lines, at most 4000: to add, remove",
        "megatron_lite/data:0: 2651 lines, at most 2650: to add, remove",
    ]
