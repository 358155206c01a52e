"""SmootMixin gives SMOOT to any class that derives from Trainer, and takes nothing from it without a word."""

import datasets
import pytest
import torch
from conftest import QUICK, TinyImages, build, freeze_batch_statistics, largest_difference, parameters
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from transformers import Trainer, TrainingArguments

from smoot_hf import SmootMixin, SmootTrainer
from smoot_hf import functional as SF


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


class OwnLoader(TheirTrainer):
    """A loader of one's own, prepared by accelerate, as the Trainer's documentation invites to."""

    prepared = True

    def get_train_dataloader(self):
        data = self.train_dataset
        if isinstance(data, datasets.Dataset):
            data = self._remove_unused_columns(data, description="training")
        loader = DataLoader(
            data, self.args.per_device_train_batch_size, sampler=RandomSampler(data, generator=self.shuffle()),
            collate_fn=self.data_collator, num_workers=self.args.dataloader_num_workers,
        )  # fmt: skip
        return self.accelerator.prepare(loader) if self.prepared else loader

    def shuffle(self):
        return torch.Generator().manual_seed(7)


class OwnPlainLoader(OwnLoader):
    prepared = False


class Shuffled(TheirTrainer):
    """The same order, by the Trainer's own loader."""

    def _get_train_sampler(self, train_dataset=None):
        return RandomSampler(train_dataset, generator=torch.Generator().manual_seed(7))


def rows_with_a_note():
    data = TinyImages()
    columns = {"pixel_values": [i.tolist() for i in data.images], "labels": data.labels, "note": ["x"] * len(data)}
    return datasets.Dataset.from_dict(columns).with_format("torch")


@pytest.mark.parametrize("data", [TinyImages, rows_with_a_note])
@pytest.mark.parametrize(("method", "workers"), [("standard", 0), ("smoot", 0), ("smoot", 2)])
def test_a_loader_of_ones_own_trains_as_the_trainers_does(data, method, workers, quick_args, recorder):
    """Catches an index that is lost, or of other rows; over two epochs and two trainings."""
    settings = {"method": method, "step_size": 300, "dataloader_num_workers": workers}
    results = []
    for parent in (Shuffled, OwnLoader):
        mine = type("Mine", (SmootMixin, parent), {})
        trainer = mine(build("vit"), quick_args(**settings), train_dataset=data())
        trainer.train()
        first = parameters(trainer)
        trainer.train()
        results.append((first, parameters(trainer), trainer.mask_budget and trainer.mask_budget.k))
    for one, other in zip(results[0][:2], results[1][:2], strict=True):
        assert largest_difference(one, other) == 0
    if method != "standard":
        assert torch.equal(results[0][2], results[1][2])
        rows = TinyImages()
        for call in recorder.calls:
            assert torch.equal(rows.images[call["sample_idx"]], call["images"])


@pytest.mark.parametrize("data", [TinyImages, rows_with_a_note])
def test_a_loader_that_nobody_prepared_keeps_its_order(data, quick_args, tmp_path, recorder):
    """Catches a loader that is built anew: accelerate would shuffle it in another way. Its rows are the sampler's."""
    plain = OwnPlainLoader(build("vit"), TrainingArguments(str(tmp_path / "plain"), **QUICK), train_dataset=data())
    plain.train()
    mine = type("Mine", (SmootMixin, OwnPlainLoader), {})
    ours = mine(build("vit"), quick_args(method="standard"), train_dataset=data())
    ours.train()
    assert largest_difference(parameters(plain), parameters(ours)) == 0
    mine(build("vit"), quick_args(), train_dataset=data()).train()
    seen = [row for call in recorder.calls for row in call["sample_idx"].tolist()]
    assert seen[:24] == [*RandomSampler(range(24), generator=torch.Generator().manual_seed(7))]
    assert sorted(seen[24:]) == list(range(24))
    for call in recorder.calls:
        assert torch.equal(TinyImages().images[call["sample_idx"]], call["images"])


def test_a_loader_of_ones_own_resumes_where_it_was(quick_args):
    """Catches batches that are skipped past the index."""
    results = []
    mine = type("Mine", (SmootMixin, OwnLoader), {})
    for start in (None, 4):
        args = quick_args(step_size=300, save_strategy="steps", save_steps=4, lr_scheduler_type="constant")
        trainer = mine(build("vit"), args, train_dataset=TinyImages())
        trainer.train(start and f"{args.output_dir}/checkpoint-{start}")
        results.append((parameters(trainer), trainer.mask_budget.k))
    assert largest_difference(results[0][0], results[1][0]) == 0
    assert torch.equal(results[0][1], results[1][1])


def further(logits):
    """A term of the logits of the clean images, as people add it (a margin, a distillation)."""
    return 0.3 * logits.square().mean()


class AddsOfLogits(SmootTrainer):
    """A further term of the outputs, in a `compute_loss` of one's own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss + further(outputs.logits) / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


class AddsOfHooked(SmootTrainer):
    """The same term, of logits that a hook on the model has kept."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kept = []
        self.model.register_forward_hook(lambda _, __, outputs: self.kept.append(outputs.logits))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.kept.clear()
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # The clean images' pass comes first, the masked images' last; one in eval mode in between.
        return loss + further(self.kept[0]) / self.current_gradient_accumulation_steps


@pytest.mark.parametrize("kl_gradient", ["both", "masked"])
@pytest.mark.parametrize("saliency_score", ["logit", "log_prob"])
@pytest.mark.parametrize("saliency_pass", ["shared", "eval"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("name", "kind"), [("vit", AddsOfLogits), ("resnet", AddsOfLogits), ("vit", AddsOfHooked)])
def test_a_further_term_of_the_logits_has_its_gradient(
    name, kind, accumulation, saliency_pass, saliency_score, kl_gradient, quick_args, recorder
):
    """Catches a backward pass through a graph that is gone, and a term whose gradient is lost or counted twice.

    By hand: the loss in one expression, with the mask that the step has chosen, and one step of gradient descent.
    """
    options = {"kl_gradient": kl_gradient, "saliency_score": saliency_score, "saliency_pass": saliency_pass}
    args = quick_args(
        **options, kl_weight=0.7, max_steps=1, optim="sgd", learning_rate=0.1, max_grad_norm=0.0,
        gradient_accumulation_steps=accumulation, per_device_train_batch_size=8 // accumulation,
    )  # fmt: skip
    model, by_hand = build(name), build(name).train()
    for each in (model, by_hand):
        freeze_batch_statistics(each)
    kind(model, args, train_dataset=TinyImages()).train()

    assert len(recorder.calls) == accumulation
    for call in recorder.calls:
        images, labels, mask = call["images"], call["labels"], call["step"].is_masked
        leaf = images.clone().requires_grad_()
        score = SF.class_score(by_hand(pixel_values=leaf).logits, labels, saliency_score)
        (gradient,) = torch.autograd.grad(score.sum(), leaf)
        assert torch.equal(mask, SF.least_salient_mask(gradient.abs().mean(1), call["k"]))
        noise = SF.counter_uniform(args.seed, call["epoch"], call["sample_idx"], images.shape[1:])
        masked = torch.where(mask, SF.uniform_fill(images, mask, noise), images)
        logits, masked_logits = (by_hand(pixel_values=view).logits for view in (images, masked))
        log_p = logits.log_softmax(1)
        kl = torch.nn.functional.kl_div(
            masked_logits.log_softmax(1), log_p if kl_gradient == "both" else log_p.detach(), log_target=True,
            reduction="batchmean",
        )  # fmt: skip
        loss = torch.nn.functional.cross_entropy(logits, labels) + 0.7 * kl + further(logits)
        (loss / accumulation).backward()
    expected = {n: p.detach() - 0.1 * p.grad for n, p in by_hand.named_parameters()}
    for key, value in model.named_parameters():
        # One float32 step of at most a few hundredths.
        torch.testing.assert_close(value.detach(), expected[key], rtol=0, atol=2e-7, msg=key)
