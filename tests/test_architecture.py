"""Who may import whom: one allow-list of arrows between the packages, read from the imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "smoot_hf"

# Single modules that every package but functional may import, and that import nothing of ours.
LEAVES = {"errors", "fingerprint", "markup", "presets"}
# Package (or top-level module) -> the packages of ours that it may import beside the leaves.
ALLOWED = {
    "functional": set(),
    "models": {"functional"},
    "data": {"functional", "models"},
    "evaluation": {"functional", "models"},
    "publishing": {"functional", "models", "data", "evaluation"},
    "training": {"functional", "models", "data", "evaluation", "publishing"},
    "experiments": {"functional", "models", "data", "evaluation", "publishing", "training"},
    "former_places": set(),
} | {leaf: set() for leaf in LEAVES}
# Packages of others that a package of ours must not import. "torch!" allows torch and the standard library alone.
HEAVY = {"matplotlib", "sklearn", "gradio", "scipy"}
FUNCTIONAL_IMPORTS = {"torch"}
# The modules that draw figures or read the digits, inside their functions.
MAY_IMPORT = {
    "publishing/figures.py": {"matplotlib"},
    "data/dataset.py": {"sklearn"},
    "data/sample_photos.py": {"sklearn"},
}
# What travels with a saved model, to machines without smoot_hf.
TRAVELLING = ["modeling_smoot_cnn.py", "grey_image_processor.py"]


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


def room_of(path):
    """The package, or the top-level module, that a file of smoot_hf belongs to."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def arrows(room, source, package):
    """The rooms of ours, other than `room` itself, that a source imports. Public names stand for their packages."""
    found = set()
    for name in imported_modules(source, package):
        first, _, rest = name.partition(".")
        if first == "smoot_hf":
            found.add(rest.partition(".")[0])
        elif first in ("recipes", "tests"):
            found.add(first)
    return found - {room}


def files():
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p.parent != PACKAGE or p.stem != "__init__"]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_arrow_is_allowed(path):
    """Catches the trainer loading data, the judge knowing the trainer, and a library that imports its recipes."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    room = room_of(path)
    leaves = set() if room == "functional" else LEAVES
    # The version is the only name that a module takes from the package itself.
    assert arrows(room, path.read_text(), package) <= ALLOWED[room] | leaves | {"__version__"}


def test_the_test_of_arrows_can_fail():
    """It sees relative, nested, aliased and top-level imports."""
    source = "from ..training import trainer\ndef f():\n    import smoot_hf.data.dataset as d\nfrom smoot_hf import X\n"
    assert arrows("evaluation", source, "smoot_hf.evaluation") == {"training", "data", "X"}
    assert arrows("evaluation", "from .convention import Y", "smoot_hf.evaluation") == set()
    assert arrows("models", "import recipes.train", "smoot_hf.models") == {"recipes"}


def test_every_room_of_the_house_is_in_the_list():
    """Catches a package that is added without saying whom it may import, and one that is gone but still listed."""
    assert {room_of(path) for path in files()} == ALLOWED.keys()


def others_imported(path):
    names = imported_modules(path.read_text(), ".".join(path.relative_to(ROOT).parent.parts))
    return {name.partition(".")[0] for name in names}


def test_the_pure_functions_import_torch_alone():
    """Catches NumPy, transformers or a data library in the numerics."""
    for path in (PACKAGE / "functional").glob("*.py"):
        assert others_imported(path) - set(sys.stdlib_module_names) - {"smoot_hf"} <= FUNCTIONAL_IMPORTS, path.name


def test_figures_and_digits_are_imported_where_they_are_drawn_and_read():
    """Catches matplotlib or scikit-learn becoming a requirement of training."""
    for path in files():
        if room_of(path) != "experiments":
            allowed = MAY_IMPORT.get(str(path.relative_to(PACKAGE)), set()) | {"scipy"}
            assert others_imported(path) & HEAVY <= allowed, path.name


def test_importing_the_package_imports_nothing_heavy():
    """Catches an import that makes `smoot-hf --help` wait for torch."""
    code = "import sys, smoot_hf; print({'torch', 'transformers', 'datasets', 'matplotlib'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", TRAVELLING)
def test_what_travels_with_a_model_needs_nothing_of_ours(name):
    """Catches an import that a machine without smoot_hf cannot follow."""
    modules = imported_modules((PACKAGE / "models" / name).read_text(), "smoot_hf.models")
    assert {module.partition(".")[0] for module in modules} <= {"math", "typing", "torch", "transformers"}


def test_long_files_raise_an_alarm():
    """A file that passes 500 lines probably holds more than one noun; raise the bound only with a reason."""
    assert not {p.name: n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 500}
