"""What was saved or imported by the names of version 0.1.0 still works."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import QUICK, TinyImages, build
from transformers import AutoImageProcessor, AutoModelForImageClassification

from smoot_hf import MaskBudget, SmootTrainer, SmootTrainingArguments
from smoot_hf.former_places import FORMER_PLACES

SAVED = Path(__file__).parent / "fixtures" / "saved_before_packages"
EXPECTED = json.loads((SAVED / "expected.json").read_text())


@pytest.mark.parametrize("former", FORMER_PLACES)
def test_a_former_name_imports_the_module_of_today(former):
    """Catches a saved pickle or a script that names a module which has moved."""
    assert importlib.import_module(former) is importlib.import_module(FORMER_PLACES[former])


def test_a_former_name_can_be_imported_first():
    """Catches a former name that works only after the module of today has been imported."""
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        "from smoot_hf.training_args import SmootTrainingArguments as A\n"
        "from smoot_hf import SmootTrainingArguments as B\n"
        "assert A is B, (A.__module__, B.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_former_name_hides_a_public_one():
    """Catches `import smoot_hf.X` that would put a module in the place of the function `smoot_hf.X`."""
    import smoot_hf

    assert not {name.removeprefix("smoot_hf.") for name in FORMER_PLACES} & set(smoot_hf.__all__)


def test_the_arguments_of_an_earlier_run_load():
    """Catches a `training_args.bin` that names a module of 0.1.0, or a class that cannot take its values."""
    args = torch.load(SAVED / "checkpoint-4" / "training_args.bin", weights_only=False)
    assert type(args) is SmootTrainingArguments
    assert (args.method, args.step_size, args.rounding) == ("smoot", EXPECTED["step_size"], "trunc")
    assert args.settings.step_size == EXPECTED["step_size"]


def test_k_of_an_earlier_run_loads():
    """Catches a format of the K file that 0.1.0 did not write."""
    budget = MaskBudget.load(SAVED / "checkpoint-4" / "mask_budget.safetensors")
    assert budget.k.tolist() == EXPECTED["k"]


def test_an_earlier_checkpoint_resumes(tmp_path):
    """Catches weights or K of 0.1.0 that a training of today cannot take up."""
    args = SmootTrainingArguments(
        str(tmp_path / "run"),
        **QUICK
        | {"max_steps": 4, "step_size": 4000.0, "rounding": "trunc", "learning_rate": 0.1, "signed_saliency": True},
    )
    trainer = SmootTrainer(build("vit"), args, train_dataset=TinyImages())
    trainer.train(resume_from_checkpoint=str(SAVED / "checkpoint-4"))
    assert trainer.state.global_step == 4
    assert trainer.mask_budget.k.tolist() == EXPECTED["k"]
    with torch.no_grad():
        logits = trainer.model.eval()(pixel_values=TinyImages().images[:2]).logits
    # Another build of torch adds in another order.
    torch.testing.assert_close(logits, torch.tensor(EXPECTED["vit_logits"]), rtol=1e-4, atol=1e-5)


def test_an_earlier_pushed_model_loads():
    """Catches a published model whose type, code or processor no longer loads beside this package."""
    import smoot_hf.models  # noqa: F401 - makes the paper's CNN known to the Auto classes

    model = AutoModelForImageClassification.from_pretrained(SAVED / "pushed").eval()
    processor = AutoImageProcessor.from_pretrained(SAVED / "pushed", trust_remote_code=True)
    images = torch.randint(0, 256, (12, 1, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(12))[:2]
    pixels = processor(images=list(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model(pixel_values=pixels).logits
    torch.testing.assert_close(logits, torch.tensor(EXPECTED["cnn_logits"]), rtol=1e-4, atol=1e-5)
