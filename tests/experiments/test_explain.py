"""smoot-hf explain: heat maps over photographs; a file that cannot be read is told and costs the others nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_vit
from matplotlib import colormaps
from PIL import Image
from transformers import ViTImageProcessor, pipeline

from smoot_hf.evaluation.attributions import attribute
from smoot_hf.experiments import explain, overlay
from smoot_hf.experiments import explanation as one_class
from smoot_hf.experiments.checkpoint import read_checkpoint
from smoot_hf.experiments.explanation import read_photograph
from smoot_hf.models import LogitsModel

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:matplotlib.*")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny ViT for 8x8 pixels, whose processor resizes."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    model = tiny_vit()
    torch.nn.init.normal_(model.classifier.weight)
    model.config.id2label = dict(enumerate(["cat", "dog", "$owl", "fox"]))
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """Image files of several kinds in the current folder."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save("plain.png")
    image.convert("CMYK").save("ink.jpg")
    image.convert("RGBA").save("alpha.png")
    image.convert("P").save("palette.gif")
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save("turned.jpg", exif=exif)
    Path("inner").mkdir()
    image.save("inner/plain.png")
    return image


def run(capsys, *argv):
    """Exit code, lines of stderr."""
    code = 0
    try:
        explain.main([*argv, "--device", "cpu"])
    except SystemExit as exited:
        code = exited.code
    lines = capsys.readouterr().err.splitlines()
    return code, [line for line in lines if "error: " in line]


def test_every_photograph_has_its_picture_and_the_probabilities_of_a_pipeline(saved, photographs, capsys):
    """Catches another preprocessing than inference has, and two files of one name that share a picture."""
    files = ["plain.png", "inner/plain.png", "ink.jpg", "alpha.png", "palette.gif", "turned.jpg"]
    code, errors = run(capsys, saved, *files, "--attribution", "gradient", "attention_rollout", "--output", "out")
    assert (code, errors) == (0, [])
    found = json.loads(Path("out/explanations.json").read_text())
    assert [one["image"] for one in found["explained"]] == files
    assert [one["file"] for one in found["explained"]][:2] == ["plain_explained.png", "plain-2_explained.png"]
    assert found["not_read"] == []
    classify = pipeline("image-classification", model=saved, device="cpu")
    for file, one in zip(files, found["explained"], strict=True):
        with Image.open(Path("out") / one["file"]) as drawn:
            assert drawn.width > 600
        with Image.open(file) as image:
            expected = {guess["label"]: guess["score"] for guess in classify(image, top_k=4)}
        for guess in one["predictions"]:
            # torchvision and Pillow resize 8-bit images with up to two of the 256 grey values between them.
            assert guess["probability"] == pytest.approx(expected[guess["label"]], abs=0.02), file


def test_a_photograph_is_read_upright_and_on_white(photographs):
    """Catches an image that lies on its side, and transparency that becomes black."""
    assert read_photograph("turned.jpg", 3).shape == (3, 60, 40)
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save("clear.png")
    assert read_photograph("clear.png", 3).unique().tolist() == [255]
    assert read_photograph("plain.png", 1).shape == (1, 40, 60)


def test_wrong_files_are_one_line_each_and_the_others_are_explained(saved, photographs, capsys):
    """Catches a folder of a thousand photographs that ends at the first damaged one, or says nothing of it."""
    Path("text.jpg").write_text("no image")
    Path("half.png").write_bytes(Path("plain.png").read_bytes()[:2000])
    Image.new("I;16", (8, 8)).save("deep.png")
    files = ["none.png", "text.jpg", "plain.png", "half.png", "deep.png", "inner"]
    code, errors = run(capsys, saved, *files, "--attribution", "grad_cam", "--output", "out")
    assert code == 1
    for file, error in zip([file for file in files if file != "plain.png"], errors, strict=True):
        assert f"error: {file}: " in error
    assert "there is no such file" in errors[0]
    assert "no image of a known format" in errors[1]
    assert "more than 8 bits" in errors[3]
    found = json.loads(Path("out/explanations.json").read_text())
    assert [one["image"] for one in found["explained"]] == ["plain.png"]
    assert [one["image"] for one in found["not_read"]] == [file for file in files if file != "plain.png"]
    assert Path("out/plain_explained.png").is_file()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plain.png", "--attribution", "deep_lift"], "deep_lift cannot explain ViTForImageClassification"),
        (["plain.png", "--attribution", "saliency"], "invalid choice: 'saliency'"),
        ([], "the following arguments are required: IMAGE"),
        (["plain.png", "--output", "plain.png"], "plain.png"),
    ],
)
def test_a_wrong_command_line_is_one_line(saved, photographs, capsys, argv, message):
    """Catches a traceback, and an attribution that the model does not take told once for every image."""
    code, errors = run(capsys, saved, *argv)
    assert code == 2
    (line,) = errors
    assert message in line


def test_a_missing_checkpoint_is_one_line(photographs, capsys):
    """Catches a traceback of transformers."""
    code, (line,) = run(capsys, "nowhere", "plain.png")
    assert code == 2
    assert "cannot load the checkpoint 'nowhere'" in line


@pytest.mark.parametrize("name", ["gradient", "integrated_gradients", "grad_cam"])
def test_a_model_in_half_precision_is_explained(saved, photographs, name):
    """Catches float images for bfloat16 weights, and colours of a picture rounded to eight bits of mantissa."""
    checkpoint = read_checkpoint(saved, "cpu")
    pixels = read_photograph("plain.png", 3)
    expected = overlay.explain_photograph(checkpoint, pixels, [name])
    checkpoint.model.to(torch.bfloat16)
    found = overlay.explain_photograph(checkpoint, pixels, [name])
    assert np.array_equal(found.picture, expected.picture)
    # Bfloat16 rounds to 2^-9 of a number at each of some dozens of steps.
    assert found.predictions[0][1] == pytest.approx(expected.predictions[0][1], abs=0.05)
    (heat_map,) = found.maps
    assert heat_map.values.dtype == torch.float32
    assert overlay.heat_over(found.picture, heat_map.values).shape == (8, 8, 3)


def test_the_maps_are_those_of_the_attribution(saved, photographs):
    """Catches a map of another class or of another size than that of the picture it lies on."""
    checkpoint = read_checkpoint(saved, "cpu")
    pixels = read_photograph("plain.png", 3)
    found = overlay.explain_photograph(checkpoint, pixels, ["integrated_gradients"])
    images = checkpoint.pipeline.prepare_evaluation(pixels[None])
    scorer, row = LogitsModel(checkpoint.model), torch.zeros(1, dtype=torch.int64)
    target = scorer(images).argmax(dim=1)
    expected = attribute(scorer, images, target, row, method="integrated_gradients")[0]
    # The points of the path go through the network in blocks of eight instead of all at once.
    torch.testing.assert_close(found.maps[0].values, expected, rtol=1e-4, atol=1e-7)
    assert found.picture.shape == (8, 8, 3)
    assert found.predictions[0][0] == checkpoint.model.config.id2label[int(target)]


@pytest.fixture
def saved_with_labels(saved, tmp_path):
    """The same model with a sigmoid for each label, of which two are above one half for every image."""
    checkpoint = read_checkpoint(saved, "cpu")
    checkpoint.model.config.problem_type = "multi_label_classification"
    with torch.no_grad():
        checkpoint.model.classifier.bias.copy_(torch.tensor([-40.0, 40.0, 30.0, -40.0]))
    checkpoint.model.save_pretrained(tmp_path / "labels")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "labels")
    return str(tmp_path / "labels")


def test_every_predicted_label_has_a_map_of_its_own(saved_with_labels, photographs, capsys):
    """Catches a softmax over labels that are independent, and one map for all of them."""
    code, errors = run(capsys, saved_with_labels, "plain.png", "--attribution", "gradient", "--output", "out")
    assert (code, errors) == (0, [])
    (entry,) = json.loads(Path("out/explanations.json").read_text())["explained"]
    assert {one["label"] for one in entry["predictions"]} == {"dog", "$owl"}
    with Image.open("plain.png") as image:
        guesses = pipeline("image-classification", model=saved_with_labels, device="cpu")(image, top_k=2)
    expected = {guess["label"]: guess["score"] for guess in guesses}
    assert {one["label"]: one["probability"] for one in entry["predictions"]} == pytest.approx(expected, abs=1e-5)

    checkpoint = read_checkpoint(saved_with_labels, "cpu")
    pixels = read_photograph("plain.png", 3)
    found = overlay.explain_photograph(checkpoint, pixels, ["gradient", "grad_cam"])
    names = [label.replace("$", r"\$") for label, _ in found.predictions]
    assert [one.title for one in found.maps] == [f"{name}, {a}" for name in names for a in ("gradient", "grad cam")]
    images = checkpoint.pipeline.prepare_evaluation(pixels[None])
    images.requires_grad_()
    number = {"dog": 1, "$owl": 2}[found.predictions[1][0]]
    (slope,) = torch.autograd.grad(checkpoint.model(images).logits[0, number], images)
    torch.testing.assert_close(found.maps[2].values, slope[0].abs().mean(dim=0), rtol=1e-4, atol=1e-9)


def test_without_a_predicted_label_the_most_probable_one_is_explained(saved_with_labels, photographs):
    """Catches a picture without any map."""
    checkpoint = read_checkpoint(saved_with_labels, "cpu")
    with torch.no_grad():
        checkpoint.model.classifier.bias.sub_(80.0)
    found = overlay.explain_photograph(checkpoint, read_photograph("plain.png", 3), ["gradient"])
    assert len(found.predictions) == len(found.maps) == 1
    assert found.predictions[0][1] < 0.5


def test_what_follows_one_class_refuses_several_labels(saved_with_labels, photographs):
    """Catches a page that follows the softmax output of a model whose outputs are sigmoids."""
    with pytest.raises(ValueError, match="the one class of an image: a multi-label model is refused"):
        one_class.explain(read_checkpoint(saved_with_labels, "cpu"), read_photograph("plain.png", 3))


def test_a_heat_map_is_brightest_where_the_attribution_is():
    """Catches a map drawn upside down, a scale that one pixel decides, and a flat map that divides by zero."""
    picture = np.full((4, 5, 3), 128, dtype=np.uint8)
    values = torch.zeros(4, 5)
    values[1, 2] = 7.0
    heat = overlay.heat_over(picture, values)
    top, bottom = (np.array(colormaps["inferno"](share)[:3]) for share in (1.0, 0.0))
    np.testing.assert_allclose(heat[1, 2], 0.25 * 128 / 255 + 0.75 * top)
    np.testing.assert_allclose(heat[0, 0], 0.75 * 128 / 255 + 0.25 * bottom)
    assert np.isfinite(overlay.heat_over(picture, torch.zeros(4, 5))).all()
