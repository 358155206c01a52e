"""Who may import whom: the arrows of the house, read from the imports."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "smoot_hf"

# Room -> what it must not import. A module stands for itself and everything below it.
FORBIDDEN = {
    "smoot_hf/functional": ["smoot_hf!functional", "transformers", "datasets", "numpy", "accelerate"],
    "smoot_hf/evaluation.py": ["smoot_hf.trainer", "smoot_hf.mixin"],
    "smoot_hf/mixin.py": ["smoot_hf.data"],
    "smoot_hf/trainer.py": ["smoot_hf.data"],
    "smoot_hf/model_card.py": ["smoot_hf.trainer", "smoot_hf.mixin", "smoot_hf.data"],
    "smoot_hf": ["recipes", "matplotlib", "sklearn", "tests"],
}


def imported_modules(source, package):
    """Absolute names of every module that `source`, a module of `package`, imports, wherever in the file."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def offends(name, rule):
    """`a!b`: anything of `a` but `a.b`; otherwise `rule` and everything below it."""
    outer, _, allowed = rule.partition("!")
    below = lambda module: name == module or name.startswith(module + ".")  # noqa: E731
    return below(outer) and not (allowed and below(f"{outer}.{allowed}"))


def offences(path, rules):
    package = ".".join(path.relative_to(ROOT).parent.parts)
    return [(path.name, n, r) for n in imported_modules(path.read_text(), package) for r in rules if offends(n, r)]


# sklearn ships the digits that the loader embeds, matplotlib draws a card: imported when they are asked for.
ALLOWED = {("stored_splits.py", "sklearn"), ("card_figures.py", "matplotlib")}
# What travels with a saved model, to machines without smoot_hf.
TRAVELLING = ["modeling_smoot_cnn.py", "grey_image_processor.py"]


@pytest.mark.parametrize("room", FORBIDDEN)
def test_no_room_imports_what_it_must_not(room):
    """Catches the trainer knowing the data, the judge knowing the trainer, and a figure library at import."""
    place = ROOT / room
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place]
    assert files
    found = [o for path in files for o in offences(path, FORBIDDEN[room])]
    assert [o for o in found if (o[0], o[2]) not in ALLOWED] == []


def test_the_test_above_can_fail():
    """It sees relative, nested and aliased imports."""
    source = "from . import trainer\nfrom .trainer import X\ndef f():\n    import matplotlib.pyplot as plt\n"
    assert imported_modules(source, "smoot_hf") == ["smoot_hf.trainer", "smoot_hf.trainer.X", "matplotlib.pyplot"]
    assert offends("smoot_hf.trainer.X", "smoot_hf.trainer")
    assert not offends("smoot_hf.training_args", "smoot_hf.train")
    assert offends("smoot_hf.mask_budget", "smoot_hf!functional")
    assert not offends("smoot_hf.functional.masking", "smoot_hf!functional")
    assert imported_modules("from ..trainer import X", "smoot_hf.functional") == ["smoot_hf.trainer.X"]


@pytest.mark.parametrize("name", TRAVELLING)
def test_what_travels_with_a_model_needs_nothing_of_ours(name):
    """Catches an import that a machine without smoot_hf cannot follow."""
    modules = imported_modules((PACKAGE / name).read_text(), "smoot_hf")
    assert {module.partition(".")[0] for module in modules} <= {"math", "typing", "torch", "transformers"}


def test_files_stay_small():
    """Catches a file that holds more than one noun: an alarm, at 500 lines."""
    long = {p.name: n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 500}
    assert long == {}
