"""The demo: its computation without the page, the page's endpoints, the Space, and the page in a real browser.

The browser is a headless Chromium through Playwright: the one that CHROMIUM names, Playwright's own (`playwright
install chromium`), or one on the PATH. Without any, the test in the browser alone is skipped.
"""

import base64
import dataclasses
import gc
import html
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import tomllib
import warnings
import zlib
from importlib.metadata import version
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from PIL import Image

from smoot_hf import InputPipeline, evaluate_faithfulness
from smoot_hf.experiments import checkpoint, demo, explanation, train
from smoot_hf.experiments import page as page_module
from smoot_hf.experiments import space as space_module
from smoot_hf.experiments.recipes import RECIPES

ROOT = Path(__file__).parents[2]
QUICK = ["--use_cpu", "--disable_tqdm", "true", "--max_train_samples", "300", "--max_eval_samples", "20"]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:matplotlib.*")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """A folder as `smoot-hf compare` leaves it: two methods on some digits."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        for method in ("smoot", "standard"):
            own = ["--method", method, "--output_dir", f"runs/{method}-seed0", "--num_train_epochs", "3"]
            train.main(RECIPES["digits"], argv=[*own, *QUICK])
        yield folder


@pytest.fixture(scope="module")
def test_images(comparison):
    return checkpoint.recorded_images(comparison / "runs" / "smoot-seed0", "test")


@pytest.fixture(scope="module")
def checkpoints(comparison, test_images):
    names = checkpoint.named_checkpoints([str(comparison)])
    return {name: checkpoint.load_checkpoint(path, test_images, "cpu") for name, path in names.items()}


# --- computation -------------------------------------------------------------------------------------------------


class Relabelled(torch.utils.data.Dataset):
    """Images whose label is what a model predicts, which is what an evaluation of the predicted class follows."""

    def __init__(self, images, rows):
        self.images, self.rows = images, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, place):
        return self.images[self.rows[place]]


@pytest.mark.parametrize(("fill", "attribution"), [("corner", "gradient"), ("mean", "gradient"), ("mean", "grad_cam")])
def test_curves_are_those_of_the_evaluation(checkpoints, test_images, fill, attribution):
    """Fault: another ranking, fill, class or fraction than the numbers of the tables rest on."""
    rows = [0, 7, 30]
    convention = dataclasses.replace(explanation.CONVENTION, fill=fill, attribution=attribution)
    for model, pipeline in checkpoints.values():
        found = [
            explanation.explain((model, pipeline), test_images[row]["pixel_values"], fill, attribution) for row in rows
        ]
        measured = evaluate_faithfulness(
            model, Relabelled(test_images, rows), convention=convention, curves=(), input_pipeline=pipeline
        )
        curve = 100 * torch.stack([one.probability for one in found]).double().mean(dim=0)
        # Batches of other sizes add up the same numbers in another order.
        assert torch.allclose(curve, measured.deletion_curve, atol=1e-3)
        assert torch.equal(found[0].fractions, measured.fractions)


def test_the_most_salient_pixels_go_first_and_only_they(checkpoints, test_images):
    """Fault: pictures of another step than the slider says, or in normalised units."""
    explain = explanation.explain
    pixels = test_images[5]["pixel_values"]
    one = explain(checkpoints["smoot"], pixels)
    image = pixels.permute(1, 2, 0).numpy()
    assert np.array_equal(one.pictures[0], image)
    assert np.all(one.pictures[-1] == image[0, 0])
    order = one.attribution.flatten().argsort(descending=True, stable=True)
    for step, fraction in enumerate(one.fractions.tolist()):
        removed = order[: round(fraction * 64)].numpy()
        expected = image.reshape(64, -1).copy()
        expected[removed] = image[0, 0]
        assert np.array_equal(one.pictures[step].reshape(64, -1), expected), step
    with torch.no_grad():
        pipeline = checkpoints["smoot"].pipeline
        logits = checkpoints["smoot"].model(pipeline.prepare_evaluation(pixels[None])).logits
    assert int(one.classes[0]) == int(logits.argmax())
    assert float(one.probability[0]) == pytest.approx(float(logits.softmax(1).max()), abs=1e-6)


def test_a_nan_prediction_is_no_class():
    """Fault: a model whose outputs are NaN once nothing of the image is left, said to predict the first class."""

    class Standardising(torch.nn.Module):
        def forward(self, images):
            flat = images.flatten(1)
            return ((flat - flat.mean(dim=1, keepdim=True)) / flat.std(dim=1, keepdim=True))[:, :3]

    pipeline = InputPipeline(mean=(0.5,), std=(0.25,))
    pixels = torch.arange(16, dtype=torch.uint8).reshape(1, 4, 4)
    one = explanation.explain(checkpoint.Checkpoint(Standardising(), pipeline), pixels)
    assert one.classes.tolist()[-1] == -1
    assert -1 not in one.classes.tolist()[:-1]
    assert float(one.probability[-1]) == 0
    labels = ["zero", "one", "two"]
    said = page_module.verdict(one, labels, len(one.classes) - 1)
    assert said.endswith("100 % removed: 0 %<br>now predicts <b>no class (NaN)</b>")
    assert f"<b>{labels[int(one.classes[0])]}</b>" in said


def test_of_an_image_with_known_evidence_the_page_says_how_much_saliency_lies_outside():
    """Catches the evidence of another example, and a share of the wrong pixels."""
    pixels = torch.arange(100, dtype=torch.uint8).reshape(1, 10, 10)
    evidence = torch.zeros(10, 10, dtype=torch.bool)
    evidence[:, :5] = True
    examples = [page_module.Example(pixels + 1, "a"), page_module.Example(pixels, "b", evidence)]
    assert page_module.evidence_of(pixels, examples) is evidence
    assert page_module.evidence_of(pixels + 1, examples) is None
    assert page_module.evidence_of(pixels + 2, examples) is None
    attribution = torch.zeros(10, 10)
    attribution[:7, 0], attribution[:3, 9] = 2.0, 1.0
    one = explanation.Explanation(
        attribution, torch.zeros(1), torch.ones(1), torch.zeros(1, dtype=torch.int64), np.zeros((1, 10, 10, 1))
    )
    said = page_module.verdict(one, ["a"], 0, evidence)
    assert said.endswith("30 % of the top 10 % pixels lie outside the evidence")
    assert "evidence" not in page_module.verdict(one, ["a"], 0)


def test_an_example_comes_back_from_the_page_unchanged():
    """Fault: enlarging for the screen changes what the model sees."""
    for channels in (1, 3):
        pixels = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
        shown = explanation.enlarged(pixels.permute(1, 2, 0).numpy())
        assert min(shown.size) >= 160
        assert torch.equal(explanation.as_pixels(shown, (channels, 5, 7)), pixels)


def test_dropped_images_of_any_kind_become_what_the_models_know():
    """Fault: a squeezed, sideways or transposed picture, and 16 bits cut to white without a word."""
    as_pixels = explanation.as_pixels
    left_half_red = Image.new("RGBA", (40, 20))  # the right half is transparent: the data's white shows
    left_half_red.paste((255, 0, 0, 255), (0, 0, 20, 20))
    square = as_pixels(left_half_red, (3, 8, 8))
    assert square.shape == (3, 8, 8)
    assert square[0].tolist() == [[255] * 8] * 8
    assert square[1].tolist() == square[2].tolist() == [[0] * 4 + [255] * 4] * 8
    sideways = Image.new("L", (20, 20))
    sideways.paste(255, (0, 0, 20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways.getexif().update(exif)
    assert as_pixels(sideways, (1, 4, 4))[0, 0].tolist() == [0, 0, 255, 255]
    with pytest.raises(ValueError, match="'I;16' have more than 8 bits"):
        as_pixels(Image.new("I;16", (8, 8)), (1, 8, 8))


def test_the_curve_has_its_point_where_the_slider_is(checkpoints, test_images):
    """Fault: the marker of one model on another's curve, or at the asked instead of the true fraction."""
    found = {name: explanation.explain(one, test_images[3]["pixel_values"]) for name, one in checkpoints.items()}
    axes = explanation.draw_fall(found, dict.fromkeys(found, "black"), 6).axes[0]
    points = [line.get_xydata()[0].tolist() for line in axes.lines if line.get_marker() == "o"]
    expected = [[100 * 19 / 64, 100 * float(one.probability[6])] for one in found.values()]
    assert points == [pytest.approx(point) for point in expected]


def test_checkpoints_are_called_by_their_method(comparison):
    """Fault: maps under the name of another model; a comparison's runs in the order of a folder listing."""
    named = checkpoint.named_checkpoints
    runs = [str(comparison / "runs" / name) for name in ("standard-seed0", "smoot-seed0")]
    assert named([str(comparison)]) == {"standard": runs[0], "smoot": runs[1]} == named(runs)
    assert list(named([str(comparison)])) == ["standard", "smoot"]
    assert named(["someone/a-model", runs[1]]) == {"a-model": "someone/a-model", "smoot": runs[1]}
    with pytest.raises(ValueError, match="two of the checkpoints are called 'smoot-seed0'"):
        named([runs[1], runs[1]])


def test_a_folder_named_by_dots_is_called_by_its_own_name(comparison, tmp_path, monkeypatch):
    """Fault: models called "" or "..", which tells nobody anything."""
    (tmp_path / "a-model" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a-model")
    assert list(checkpoint.named_checkpoints(["."])) == ["a-model"]
    assert list(checkpoint.named_checkpoints(["inside/.."])) == ["a-model"]


def bomb(path, side):
    """A PNG of side x side white pixels in a few kilobytes."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packed = zlib.compressobj(9)
    row = bytes([0]) + bytes([255]) * (side // 8)
    content = b"".join([*(packed.compress(row) for _ in range(side)), packed.flush()])
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", content) + chunk(b"IEND", b""))


@pytest.mark.parametrize("side", [8000, 13000, 20000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_small_file_of_very_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch, side):
    """Fault: 20 KB that take a gigabyte of memory. Pillow warns from 89 million pixels and refuses from 179 million."""
    bomb(tmp_path / "bomb.png", side)
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("the pixels were decoded"))
    with pytest.raises(ValueError, match=r"50 million .*make it smaller first") as refused:
        explanation.read_pixels(tmp_path / "bomb.png", (1, 8, 8))
    assert "\n" not in str(refused.value)


def test_files_that_are_no_images_are_one_error(tmp_path):
    """Fault: a page that says "Error" and nothing else; a reader of Pillow's that starts another program."""
    read_pixels = explanation.read_pixels
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "drawing.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    for name in ("text.png", "drawing.eps"):
        with pytest.raises(ValueError, match="no image of a known format: PNG, JPEG"):
            read_pixels(tmp_path / name, (1, 8, 8))
    Image.new("L", (64, 64), 200).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-30])
    with pytest.raises(ValueError, match="cannot be decoded"):
        read_pixels(tmp_path / "half.png", (1, 8, 8))
    assert torch.equal(read_pixels(tmp_path / "whole.png", (1, 8, 8)), torch.full((1, 8, 8), 200, dtype=torch.uint8))


def test_an_attribution_that_cannot_explain_a_model_is_one_clear_error(comparison, capsys):
    """Fault: a page that opens, and fails at its first image."""
    with pytest.raises(SystemExit):
        demo.main([str(comparison), "--attribution", "attention_rollout"])
    assert "attention_rollout cannot explain PaperCnn" in capsys.readouterr().err.splitlines()[-1]


def test_what_cannot_be_shown_is_one_clear_error(comparison, capsys):
    """Fault: a traceback for a misspelled folder."""
    for argv, message in (
        (["absent"], "absent has no run.json"),
        (["absent", "--dataset", "digits"], "cannot load the checkpoint 'absent'"),
    ):
        with pytest.raises(SystemExit) as stop:
            demo.main(argv)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


# --- page --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(checkpoints, test_images):
    """The page, served on the loopback address."""
    pytest.importorskip("gradio", reason="the page needs gradio: pip install 'smoot-hf[demo]'")
    page = page_module.make_page(checkpoints, page_module.choose_examples(test_images))
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **page_module.launch_settings())
    yield url
    page.close(verbose=False)
    # The event loops of gradio's server and client leave their sockets to the collector, which warns of each.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.mark.filterwarnings("ignore")
def test_endpoints_give_what_was_computed(checkpoints, test_images, address, tmp_path):
    """Fault: outputs in the wrong column, a slider that moves another image's curve, an upload that loses pixels."""
    from gradio_client import Client, handle_file

    pixels = test_images[9]["pixel_values"]
    explanation.enlarged(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "dropped.png")
    client = Client(address, verbose=False, download_files=str(tmp_path))
    for fill, removed in (("corner", 0), ("mean", 35)):
        shown = client.predict(handle_file(tmp_path / "dropped.png"), fill, removed, api_name="/explain")
        check_columns(shown, checkpoints, pixels, fill, removed)
    check_columns(client.predict(70, api_name="/show"), checkpoints, pixels, "mean", 70)


def check_columns(shown, checkpoints, pixels, fill, removed):
    step = round(removed / 5)
    for column, (name, model) in enumerate(checkpoints.items()):
        one = explanation.explain(model, pixels, fill)
        text, left, saliency = shown[3 * column : 3 * column + 3]
        assert text == page_module.verdict(one, [str(digit) for digit in range(10)], step), name
        for tag, picture in ((left, one.pictures[step]), (saliency, explanation.saliency_picture(one.attribution))):
            expected = np.asarray(explanation.enlarged(picture).convert("RGB"))
            assert np.array_equal(picture_in(tag), expected), name
    assert shown[-1]["plot"].startswith("data:image/png;base64,")


def picture_in(tag):
    """The pixels of an <img> that holds its own content."""
    content = re.fullmatch(r'<img class="picture" alt="[^"]*" src="data:image/png;base64,([^"]*)">', tag)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content.group(1)))).convert("RGB"))


@pytest.mark.filterwarnings("ignore")
def test_requests_leave_no_files_but_the_uploads_which_are_deleted(checkpoints, test_images, tmp_path, monkeypatch):
    """Fault: a Space whose disk fills with every picture that it has ever shown."""
    pytest.importorskip("gradio", reason="the page needs gradio: pip install 'smoot-hf[demo]'")
    from gradio_client import Client, handle_file

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(page_module, "_OLD", 1)
    monkeypatch.setattr(page_module, "_EVERY", 1)
    page = page_module.make_page(checkpoints, page_module.choose_examples(test_images))
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **page_module.launch_settings())

    def files():
        return {path for name in ("gradio", "temporary") for path in (tmp_path / name).rglob("*") if path.is_file()}

    client, before = Client(url, verbose=False), files()
    for row in range(12):
        path = tmp_path / f"{row}.png"
        explanation.enlarged(test_images[row]["pixel_values"].permute(1, 2, 0).numpy()).save(path)
        for removed in (0, 50, 100):
            client.predict(handle_file(path), "corner", removed, api_name="/explain")
    until = time.monotonic() + 30
    while files() != before and time.monotonic() < until:
        time.sleep(0.2)
    page.close(verbose=False)
    # The examples are still there, and nothing else is.
    assert files() == before
    assert len(before) >= 20
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.mark.filterwarnings("ignore")
def test_an_upload_that_cannot_be_shown_is_one_line_on_the_page(address, tmp_path):
    """Fault: a traceback in the log and "Error" on the page, or minutes of decoding."""
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    bomb(tmp_path / "bomb.png", 13000)
    with pytest.raises(AppError, match="the image has 13000x13000 pixels, at most 50 million are taken"):
        Client(address, verbose=False).predict(handle_file(tmp_path / "bomb.png"), "corner", 0, api_name="/explain")


@pytest.fixture
def space(comparison, tmp_path):
    pytest.importorskip("gradio", reason="a Space names the version of gradio")
    demo.main([str(comparison), "--space", str(tmp_path / "space")])
    return tmp_path / "space"


@pytest.mark.filterwarnings("ignore")
def test_a_space_holds_models_examples_and_code(comparison, space, checkpoints, test_images, monkeypatch, capsys):
    """Fault: another model or example than the page's, and a Space written over a folder in use."""
    readme = (space / "README.md").read_text()
    assert readme.startswith("---\n")
    metadata = yaml.safe_load(readme.split("---")[1])
    assert (metadata["sdk"], metadata["app_file"]) == ("gradio", "app.py")
    # Left away, it is 3.10, which has neither typing.Self nor tomllib.
    assert metadata["python_version"] == "{}.{}".format(*sys.version_info)
    assert {"app.py", "smoot_hf", "checkpoints", "examples"} <= {path.name for path in space.iterdir()}
    read = []
    monkeypatch.setattr(space_module, "make_page", lambda *given: read.append(given))
    assert 'read_page(Path(__file__).parent, "gradient")' in (space / "app.py").read_text()
    space_module.read_page(space, "grad_cam")
    models, examples, attribution = read[0]
    assert attribution == "grad_cam"
    assert list(models) == list(checkpoints)
    expected = page_module.choose_examples(test_images)
    assert [example.label for example in examples] == [example.label for example in expected]
    explain = explanation.explain
    for (pixels, *_), (theirs, *_) in zip(examples, expected, strict=True):
        assert torch.equal(pixels, theirs)
    for name, model in models.items():
        assert torch.equal(explain(model, pixels).probability, explain(checkpoints[name], pixels).probability)
    with pytest.raises(SystemExit):
        demo.main([str(comparison), "--space", str(space)])
    assert "must be a folder that is new or empty" in capsys.readouterr().err.splitlines()[-1]


def test_a_space_asks_for_the_versions_it_was_tried_with(space):
    """Fault: a Space that stops working with the next release of a package, or that lacks one."""
    lines = (space / "requirements.txt").read_text().splitlines()
    assert f"transformers=={version('transformers')}" in lines
    assert {line.partition("==")[0] for line in lines} >= {"torch", "torchvision", "datasets", "timm", "matplotlib"}
    assert all(re.fullmatch(r"[\w-]+==[\d.]+[\w.]*", line) for line in lines)


def test_a_space_takes_along_its_code_and_nothing_else(comparison, tmp_path, monkeypatch):
    """Fault: keys in a .env file, notes and old runs that lie beside the code are published."""
    pytest.importorskip("gradio", reason="a Space names the version of gradio")
    root = tmp_path / "site-packages"
    shutil.copytree(space_module.PACKAGE, root / "smoot_hf", ignore=shutil.ignore_patterns("__pycache__"))
    private = ["smoot_hf/.env", "smoot_hf/notes.txt", "smoot_hf/functional/old.py~", "smoot_hf/runs/key.json", ".env"]
    private += ["smoot_hf/runs/keys.py", "smoot_hf/.git/x", "other/__init__.py", "smoot_hf/evaluation/metrics/notes.md"]
    for name in private:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("secret")
    monkeypatch.setattr(space_module, "PACKAGE", root / "smoot_hf")
    demo.main([str(comparison), "--space", str(tmp_path / "space")])
    taken = {path for path in (tmp_path / "space").rglob("*") if path.is_file()}
    assert [
        path for path in taken if path.suffix not in (".json", ".safetensors") and b"secret" in path.read_bytes()
    ] == []
    assert {path.relative_to(tmp_path / "space").parts[0] for path in taken} == {
        *("README.md", "app.py", "checkpoints", "examples", "order.json", "requirements.txt", "smoot_hf"),
    }
    named = {str(path.relative_to(tmp_path / "space")) for path in taken}
    assert {f"smoot_hf/{name}" for name in ("experiments/page.py", "functional/__init__.py", "__init__.pyi")} <= named


def test_a_space_takes_what_a_wheel_takes():
    """Fault: a file that `pip install` brings, such as a template, and a Space has not."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert sorted(settings["package-data"].pop("smoot_hf")) == sorted(space_module.PACKAGE_DATA)
    assert settings["package-data"] == {}
    taken = {str(path) for path in space_module.package_files()}
    packages = [path.parent for path in (ROOT / "smoot_hf").rglob("__init__.py")]
    assert taken >= {str(path.relative_to(ROOT / "smoot_hf")) for folder in packages for path in folder.glob("*.py")}
    assert taken >= {"py.typed", "__init__.pyi", "evaluation/metrics/deletion_auc/deletion_auc.py"}


@pytest.mark.parametrize("method", ["../../outside", "/tmp/outside", "..", "a/b"])
def test_a_crafted_method_writes_nothing_outside_the_space(comparison, tmp_path, capsys, method):
    """Fault: the method of a downloaded run.json is the name of the folder that the model is written to."""
    pytest.importorskip("gradio", reason="a Space names the version of gradio")
    run = tmp_path / "downloads" / "run"
    shutil.copytree(comparison / "runs" / "smoot-seed0", run)
    content = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**content, "method": method}))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        demo.main([str(run), "--space", str(tmp_path / "space")])
    assert stop.value.code == 2
    assert "method must be one of" in capsys.readouterr().err.splitlines()[-1]
    assert set(tmp_path.rglob("*")) == before


def test_any_name_of_a_model_stays_inside_the_space(comparison, test_images, tmp_path):
    """Fault: a name that is a path, a heading, HTML or YAML."""
    pytest.importorskip("gradio", reason="a Space names the version of gradio")
    run = str(comparison / "runs" / "smoot-seed0")
    names = ["../../outside", "a\n# b", "<img src=x>", "[c](http://d)", "*e* `f` $g$ {h}", "ü"]
    examples = page_module.choose_examples(test_images)[:1]
    space_module.write_space(tmp_path / "space", dict.fromkeys(names, run), examples)
    assert [path.name for path in tmp_path.iterdir()] == ["space"]
    assert sorted(path.name for path in (tmp_path / "space/checkpoints").iterdir()) == [f"0{i}" for i in range(6)]
    head, _, text = (tmp_path / "space/README.md").read_text().removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(head)["sdk"] == "gradio"
    shown = markdown_text(text)
    assert "Saliency maps of ../../outside, a # b, <img src=x>, [c](http://d), *e* `f` $g$ {h}, ü, and" in shown


def markdown_text(text):
    """What a reader of Markdown sees as text: nothing in it may be a tag, a link or a heading."""
    page = MarkdownIt("commonmark").render(text)
    assert set(re.findall(r"<(/?\w+)", page)) <= {"p", "/p", "code", "/code"}
    return html.unescape(re.sub(r"</?\w+>", "", page))


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_space_is_published_by_one_command(space, hub):
    """Fault: a command in the recipe's header that the Hub's own program does not take, or that leaves files behind."""
    words = ["upload", "--repo-type", "space", "tester/smoot-demo", str(space)]
    hf = [sys.executable, "-c", "from huggingface_hub.cli.hf import main; main()"]
    done = subprocess.run([*hf, *words], capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "0"})
    assert done.returncode == 0, done.stderr
    arrived = set(hub.repository("spaces", "tester/smoot-demo").files()) - {".gitattributes"}
    assert arrived == {str(path.relative_to(space)) for path in space.rglob("*") if path.is_file()}
    assert hub.unknown == []


@pytest.mark.slow
def test_a_space_runs_with_nothing_but_its_folder(space):
    """Fault: a Space that needs a file, a model or a package of this repository."""
    look = (
        "import app, smoot_hf\n"
        "print(smoot_hf.__file__)\n"
        "print({d.api_name for d in app.demo.fns.values()} >= {'explain', 'show'})\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        [sys.executable, "-c", look], cwd=space, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    package, has_endpoints = ran.stdout.splitlines()[-2:]
    assert Path(package).is_relative_to(space)
    assert has_endpoints == "True"


def chromium(own):
    """Path of a browser, or `None` where there is none; `own` is where Playwright would have put its own."""
    named = os.environ.get("CHROMIUM")
    if named is not None:
        return named
    found = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    return own if Path(own).is_file() else next(filter(None, found), None)


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'smoot-hf[dev]'")
    with playwright.sync_playwright() as driver:
        path = chromium(driver.chromium.executable_path)
        if path is None:
            pytest.skip("no browser: run `playwright install chromium`, or let CHROMIUM name a Chromium")
        # A container has no user namespaces for the sandbox.
        opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.mark.filterwarnings("ignore")
def test_a_person_can_choose_drop_and_remove(checkpoints, test_images, address, browser, tmp_path):
    """Fault: events that are not wired, a page that needs the network, a column that stays empty."""
    examples = page_module.choose_examples(test_images)
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)

    def wait_for(pixels, removed):
        labels = [str(digit) for digit in range(10)]
        found = [explanation.explain(checkpoint, pixels) for checkpoint in checkpoints.values()]
        for name, one in zip(checkpoints, found, strict=True):
            text = page_module.verdict(one, labels, round(removed / 5)).replace("<b>", "").replace("</b>", "")
            page.wait_for_function(
                "([id, text]) => document.getElementById(id)?.innerText.trim() === text",
                arg=[f"verdict-{name}", text.replace("<br>", "\n")],
                timeout=20_000,
            )

    wait_for(examples[0].pixels, 0)
    before = page.locator("#curve img").get_attribute("src")
    slider = page.locator("#removed input[type=range]")
    slider.fill("30")
    wait_for(examples[0].pixels, 30)
    page.wait_for_function("old => document.querySelector('#curve img').src !== old", arg=before, timeout=20_000)
    # Choose another example; the slider stays where it is.
    page.locator("#examples button.thumbnail-item").nth(11).click()
    wait_for(examples[11].pixels, 30)
    # Drop one.
    dropped = test_images[40]["pixel_values"]
    explanation.enlarged(dropped.permute(1, 2, 0).numpy()).save(tmp_path / "dropped.png")
    page.get_by_label("Remove Image").click()
    page.wait_for_function("() => !document.querySelector('#verdict-smoot').innerText.trim()", timeout=20_000)
    page.locator("input[type=file]").first.set_input_files(tmp_path / "dropped.png")
    wait_for(dropped, 30)
    assert page.locator("img.picture").count() == 2 * len(checkpoints)
    assert all(page.locator("img.picture").evaluate_all("all => all.map(one => one.naturalWidth > 0)"))
    assert {url.split("/")[2] for url in asked if url.startswith("http")} == {address.split("/")[2]}
    page.close()
