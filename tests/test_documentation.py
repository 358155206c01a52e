"""README.md and docs/: Python blocks run, shell blocks run or say why not, relative links lead to files.

A page is run from top to bottom in one namespace and in a folder of its own, without the network. Trainings are cut to
two steps. What a page takes from outside lies in that folder: photographs in `photos/`, and at the path of the Hub id
`facebook/deit-tiny-patch16-224` a tiny ViT, which `from_pretrained` finds there before it asks the Hub.

An HTML comment in the line above a block keeps it from being run, and must give the reason:

    <!-- not run: it installs 6 GB -->
"""

import importlib
import re
import shlex
import shutil
from pathlib import Path

import datasets
import matplotlib as mpl
import pytest
import torch
from PIL import Image
from sybil import Document
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

import smoot_hf
from smoot_hf import SmootTrainingArguments
from smoot_hf.experiments import command

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# A fence in another language would be looked at by no test.
LANGUAGES = {"python", "bash", "diff", "text", "yaml", "bibtex"}
HUB_ID = "facebook/deit-tiny-patch16-224"

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # of the Hub's client
    pytest.mark.filterwarnings("ignore::DeprecationWarning:matplotlib.*"),  # of tensors, given to the oldest
    pytest.mark.filterwarnings("ignore:Specifying null_placement:FutureWarning"),  # of pyarrow, to HF Datasets
]

# What stands right above a block; the reason is more than a word.
_COMMENT = re.compile(r"<!-- (not run): \S.{9,} -->\s*\Z")


def name_of(page):
    return str(page.relative_to(ROOT))


def parse(page, parser):
    """The blocks of a page, in order, each with what keeps it from being run: "not run" or `None`."""
    document = Document.parse(str(page), parser)
    comments = [_COMMENT.search(document.text[: example.region.start]) for example in document]
    return [(example, comment and comment[1]) for example, comment in zip(document, comments, strict=True)]


def shell_lines(block):
    """The command lines of a block, without comments, lines that go on joined."""
    joined = block.replace("\\\n", " ")
    return [words for words in (shlex.split(line, comments=True) for line in joined.splitlines()) if words]


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """A folder with everything that the pages take from elsewhere; photographs have several sizes."""
    folder = tmp_path_factory.mktemp("outside")
    generator = torch.Generator().manual_seed(0)
    for split, count in {"train": 8, "test": 4}.items():
        for label in ("cat", "dog"):
            photos = folder / "photos" / split / label
            photos.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 256, (200 + 16 * number, 240, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(photos / f"{number}.png")
    vit = ViTConfig(
        image_size=224,
        patch_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=1000,
    )
    ViTForImageClassification(vit).save_pretrained(folder / HUB_ID)
    ViTImageProcessor(size={"height": 224, "width": 224}).save_pretrained(folder / HUB_ID)
    return folder


@pytest.fixture(scope="module")
def shell(outside, tmp_path_factory):
    """The folder that the command lines of all pages run in, and those that have been run: the same line runs once."""
    return shutil.copytree(outside, tmp_path_factory.mktemp("shell"), dirs_exist_ok=True), []


@pytest.fixture
def workplace(outside, tmp_path, monkeypatch):
    """A folder to run a page in; trainings stop after two steps, and figures are drawn without a screen."""
    shutil.copytree(outside, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    mpl.use("Agg")
    post_init = SmootTrainingArguments.__post_init__

    def cut_short(args):
        args.max_steps, args.dataloader_pin_memory = 2, False
        post_init(args)

    monkeypatch.setattr(SmootTrainingArguments, "__post_init__", cut_short)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if parse(page, PythonCodeBlockParser())], ids=name_of)
def test_python_blocks_run(page, workplace, hub):
    for example, kept_back_by in parse(page, PythonCodeBlockParser()):
        if not kept_back_by:
            example.evaluate()


def to_run_in_a_shell(page):
    blocks = parse(page, CodeBlockParser("bash", lambda example: None))
    return [words for example, kept_back_by in blocks if not kept_back_by for words in shell_lines(example.parsed)]


@pytest.mark.parametrize("page", [page for page in PAGES if to_run_in_a_shell(page)], ids=name_of)
def test_shell_blocks_run_or_say_why_not(page, workplace, shell, monkeypatch):
    folder, done = shell
    monkeypatch.chdir(folder)
    for words in to_run_in_a_shell(page):
        if words not in done:
            run_line(words, monkeypatch)
            done.append(words)


def run_line(words, monkeypatch):
    """One command line, by the function that it would call; saves ten seconds of imports for each."""
    program, *argv = words
    if program == "smoot-hf":
        command.main(argv)
    elif program == "python" and argv[0].startswith("recipes/"):
        monkeypatch.syspath_prepend(ROOT / "recipes")
        importlib.import_module(Path(argv[0]).stem).main(argv[1:])
    else:
        pytest.fail(f"no way known to run {shlex.join(words)!r}: give its block a comment with the reason")


def flags_of_help(subcommand, capsys):
    with pytest.raises(SystemExit):
        command.main([subcommand, "--help"])
    return set(re.findall(r"--[a-z]\w*", capsys.readouterr().out))


def subcommand_of(words):
    """What a command line runs, be it by name, as a module under a launcher, or as a recipe; and its flags."""
    for place, word in enumerate(words):
        if word == "smoot-hf":
            return words[place + 1], words[place + 2 :]
        if word.startswith("smoot_hf.experiments."):
            return word.rpartition(".")[2], words[place + 1 :]
        if word.startswith(("recipes/train_", "recipes/finetune_")):
            return "train", words[place + 1 :]
    return None, []


def test_flags_exist_also_in_lines_that_are_not_run(capsys):
    known = {name: flags_of_help(name, capsys) for name in command.SUBCOMMANDS}
    known["compare"] |= known["train"]
    seen = set()
    for page in PAGES:
        for example, _ in parse(page, CodeBlockParser("bash", lambda example: None)):
            for words in shell_lines(example.parsed):
                subcommand, rest = subcommand_of(words)
                unknown = {word for word in rest if word.startswith("--")} - known.get(subcommand, set())
                assert not unknown, f"{name_of(page)}: {shlex.join(words)}"
                seen.add(subcommand)
    assert seen >= set(command.SUBCOMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_fence_names_a_language_that_is_looked_at(page):
    fences = re.findall(r"^ *```(.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(fences) % 2 == 0
    assert set(fences[::2]) <= LANGUAGES


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_to_files(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    relative = [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    missing = {target for target in relative if not (page.parent / target).exists()}
    assert missing == set()


def test_every_public_name_is_in_the_api_reference():
    reference = ROOT / "docs" / "api"
    front = (reference / "index.md").read_text(encoding="utf-8")
    assert not [name for name in smoot_hf.__all__ if f"`{name}`" not in front]
    for package in ("functional", "models", "data", "evaluation", "training"):
        page = (reference / f"{package}.md").read_text(encoding="utf-8")
        # A page names the whole package, or one object after the other.
        if f"::: smoot_hf.{package}\n" not in page:
            names = importlib.import_module(f"smoot_hf.{package}").__all__
            assert not [name for name in names if not re.search(rf"^::: \S+\.{name}$", page, re.MULTILINE)]


def test_readme_is_short_enough_to_be_read():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160


def make_targets():
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


def test_every_make_target_that_is_named_exists():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.MULTILINE))
    assert {"train", "test"} <= named
    assert named <= make_targets()


def test_a_broken_block_is_found(tmp_path):
    page = tmp_path / "page.md"
    first, kept_back, last = (f"```python\n{line}\n```\n" for line in ("x = 1", "1 / 0", "x / 0"))
    page.write_text("\n".join([first, f"<!-- not run: takes an hour -->\n{kept_back}", last]))
    examples = parse(page, PythonCodeBlockParser())
    assert [kept_back_by for _, kept_back_by in examples] == [None, "not run", None]
    examples[0][0].evaluate()
    with pytest.raises(ZeroDivisionError) as caught:
        examples[2][0].evaluate()
    assert caught.traceback[-1].lineno + 1 == 11
