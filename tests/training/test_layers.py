"""The four layers of the trainer, and what they override of `Trainer` without being promised that it exists."""

import inspect

import pytest
import transformers
from transformers import Trainer

from smoot_hf import SmootMixin, SmootTrainer
from smoot_hf.training.checkpoints import CheckpointTrainer
from smoot_hf.training.checks import PRIVATE_METHODS, check_private_methods
from smoot_hf.training.indexing import IndexingTrainer
from smoot_hf.training.publishing import PublishingTrainer

LAYERS = (SmootMixin, IndexingTrainer, PublishingTrainer, CheckpointTrainer)


def test_a_trainer_has_four_layers_of_ours():
    """Catches a layer that is stacked by the order of several bases, where no one sees who calls whom."""
    assert SmootTrainer.__mro__[:6] == (SmootTrainer, *LAYERS, Trainer)


def test_every_private_method_that_is_overridden_is_in_the_list():
    """Catches an override of a private method whose disappearance nobody would notice, and a stale entry."""
    own = {name for layer in LAYERS for name in vars(layer) if name.startswith("_") and not name.startswith("__")}
    calls_super = {name for name in own if f"super().{name}(" in "".join(map(inspect.getsource, LAYERS))}
    assert {name for name in own if callable(getattr(Trainer, name, None))} | calls_super == set(PRIVATE_METHODS)


@pytest.mark.parametrize("name", PRIVATE_METHODS)
def test_a_private_method_that_is_gone_is_one_clear_error(name, monkeypatch):
    """Catches K that is silently not saved, or never moves, with a later release of transformers."""
    monkeypatch.delattr(Trainer, name)
    with pytest.raises(ImportError, match=f"overrides {name} of .* transformers {transformers.__version__}"):
        check_private_methods()


def test_the_check_runs_at_import():
    """Catches a check that is there and never called."""
    source = inspect.getsource(inspect.getmodule(SmootTrainer))
    assert source.rstrip().splitlines()[-1] == "check_private_methods()"


def test_the_arguments_of_the_trainer_are_in_the_signature():
    """Catches arguments of `Trainer` that an editor cannot show, and one that is given another place or default."""
    theirs = inspect.signature(Trainer.__init__).parameters
    ours = inspect.signature(SmootTrainer.__init__).parameters
    assert [*ours][: len(theirs)] == [*theirs]
    assert {name: ours[name].default for name in theirs} == {name: p.default for name, p in theirs.items()}
    assert [*ours][len(theirs) :] == ["input_pipeline", "of_newer_trainers"]
