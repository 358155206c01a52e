"""SmootMixin gives SMOOT to any class that derives from Trainer, and takes nothing from it without a word."""

import pytest
import torch
from conftest import TinyImages, build, largest_difference, parameters
from torch.utils.data import SequentialSampler
from transformers import Trainer

from smoot_hf import SmootMixin, SmootTrainer


class TheirTrainer(Trainer):
    """A trainer as people have them: an argument, a sampler, an optimizer and a log entry of its own."""

    def __init__(self, *args, decay=0.5, **kwargs):
        super().__init__(*args, **kwargs)
        self.decay = decay

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def create_optimizer(self, *_):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.args.learning_rate, weight_decay=self.decay)
        return self.optimizer

    def log(self, logs, *args, **kwargs):
        super().log(logs | {"decay": self.decay}, *args, **kwargs)


class Mine(SmootMixin, TheirTrainer):
    pass


class TurnedRound(TheirTrainer, SmootMixin):
    pass


class Composed(TheirTrainer, SmootTrainer):
    pass


class Adds(SmootMixin, TheirTrainer):
    """A further term of the loss, as `compute_loss` is overridden in a Trainer."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss + 0 * sum(weight.square().sum() for weight in model.parameters())


@pytest.mark.parametrize("method", ["standard", "sgt", "smoot"])
@pytest.mark.parametrize("kind", [Mine, TurnedRound, Composed, Adds])
def test_both_parents_do_their_part(kind, method, quick_args, recorder):
    """Catches a parent that is passed over: its arguments, its hooks, or the masking."""
    args = {"method": method, "step_size": 300}
    trainer = kind(model=build("vit"), args=quick_args(**args), train_dataset=TinyImages(), decay=0.25)
    trainer.train()
    model = build("vit")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, weight_decay=0.25)
    plain = SmootTrainer(model, quick_args(**args), train_dataset=TinyImages(), optimizers=(optimizer, None))
    plain._get_train_sampler = lambda *_: SequentialSampler(plain.train_dataset)
    plain.train()
    assert largest_difference(parameters(trainer), parameters(plain)) == 0
    assert trainer.state.log_history[0]["decay"] == 0.25
    assert "ce_loss" in trainer.state.log_history[0]
    if method != "standard":
        assert torch.equal(trainer.mask_budget.k, plain.mask_budget.k)
        assert recorder.calls[0]["sample_idx"].tolist() == list(range(8))


@pytest.mark.parametrize("name", ["compute_loss", "create_model_card", "push_to_hub"])
def test_a_method_that_would_never_run_is_refused(name):
    """Catches a loss of the user's that SMOOT's replaces without a word."""
    theirs = type("Weighted", (TheirTrainer,), {name: lambda *_: None})
    with pytest.raises(TypeError, match=rf"Weighted.{name} would never run in Mine.*super\(\).{name}"):
        type("Mine", (SmootMixin, theirs), {})
    # In the other order it does run; and a class of one's own may override it.
    type("Mine", (theirs, SmootMixin), {})
    type("Mine", (SmootMixin, TheirTrainer), {name: lambda *_: None})


@pytest.mark.parametrize("method", ["sgt", "smoot"])
def test_a_loss_that_never_masks_is_refused(method, quick_args):
    """Catches a compute_loss that does not call on: plain training under the name of SMOOT."""

    class Forgets(SmootMixin, TheirTrainer):
        def compute_loss(self, model, inputs, **_):
            inputs.pop("sample_idx")
            return model(**inputs).loss

    trainer = Forgets(build("vit"), quick_args(method=method), train_dataset=TinyImages())
    with pytest.raises(RuntimeError, match=rf"method='{method}', but no image of this step was masked: a compute_loss"):
        trainer.train()
    assert Forgets(build("vit"), quick_args(method="standard"), train_dataset=TinyImages()).train().global_step == 6
