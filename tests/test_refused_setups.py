"""Set-ups that would train silently wrong are refused by name; those that merely look odd are not."""

import pytest
import torch
from conftest import TinyImages, build
from datasets import IterableDataset

from smoot_hf import SmootTrainer


class Altered(TinyImages):
    """Tiny images, one of whose samples is changed by a function of the item."""

    def __init__(self, change, at=0, **settings):
        super().__init__(**settings)
        self.change, self.at = change, at

    def __getitem__(self, i):
        item = super().__getitem__(i)
        return self.change(item) if i == self.at else item


def test_standard_training_takes_a_stream(quick_trainer):
    """A K per sample needs samples that can be counted; catches a refusal where there is no K."""
    items = [item | {"pixel_values": item["pixel_values"].tolist()} for item in TinyImages()]
    stream = IterableDataset.from_generator(lambda: iter(items))
    trainer = quick_trainer(train_dataset=stream.with_format("torch"), method="standard")
    trainer.train()
    assert trainer.state.global_step == 6


def test_images_of_several_sizes_are_refused(quick_trainer):
    """K counts the pixels of one size; catches a budget of the first image applied to all."""
    other = Altered(lambda i: i | {"pixel_values": torch.zeros(3, 72, 72)}, at=5, size=64)
    trainer = quick_trainer("resnet", train_dataset=other, per_device_train_batch_size=1, max_steps=24)
    with pytest.raises(ValueError, match=r"must have one size.* got \(72, 72\) after \(64, 64\)"):
        trainer.train()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"ddp_static_graph": True}, "ddp_static_graph=True is refused.*Leave it away"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True is refused.*Leave it away"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant.* is refused"),
    ],
    ids=lambda o: next(iter(o)) if isinstance(o, dict) else "",
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_silently_wrong_set_ups_are_refused_by_name(overrides, message, quick_trainer):
    """Each of these would train, and train something else."""
    with pytest.raises(ValueError, match=message):
        quick_trainer(**overrides)
    quick_trainer(method="standard", **overrides)


def test_data_parallel_is_refused(quick_args):
    """DataParallel loses the gradients of autograd.grad; catches a machine with several GPUs and no launcher."""
    args = quick_args()
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"DataParallel over 2 GPUs is refused.*accelerate launch"):
        SmootTrainer(build("vit"), args, train_dataset=TinyImages())


@pytest.mark.parametrize(("flag", "name"), [("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed")])
def test_sharding_engines_are_refused_by_name(flag, name, quick_args):
    """Catches a training with gradients that nobody has shown to be exact; standard training stays free to use them."""

    class Sharded(SmootTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            # What the Trainer sets for FSDP 1, FSDP 2 and any DeepSpeed configuration, by argument or by launcher.
            setattr(self, flag, True)

    with pytest.raises(ValueError, match=f"{name} is refused.*torchrun"):
        Sharded(build("vit"), quick_args(), train_dataset=TinyImages())


def test_a_loader_that_lost_the_index_is_refused(quick_args):
    """Catches K of sample 0 used for all, where a user replaced the loader."""

    class Replaced(SmootTrainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(self.train_dataset, batch_size=8, collate_fn=self.data_collator)

    trainer = Replaced(build("vit"), quick_args(), train_dataset=TinyImages())
    with pytest.raises(ValueError, match=r"no 'sample_idx'.* get_train_dataloader was replaced"):
        trainer.train()


def test_labels_of_any_integer_type_will_do(quick_trainer):
    """Catches int32 labels that reach the loss as they are."""
    narrow = Altered(lambda i: i)
    narrow.labels = torch.tensor(narrow.labels, dtype=torch.int32).numpy()
    quick_trainer(train_dataset=narrow, trainer_kwargs={"data_collator": collate_as_they_are}).train()


def collate_as_they_are(examples):
    return {
        "pixel_values": torch.stack([e["pixel_values"] for e in examples]),
        "labels": torch.tensor([e["labels"] for e in examples], dtype=torch.int32),
    }


def test_a_collator_that_drops_samples_is_refused(quick_trainer):
    """Catches K written to the neighbours of the samples that remained."""

    def drop_last(examples):
        kept = examples[: max(1, len(examples) - 1)]
        return {
            "pixel_values": torch.stack([e["pixel_values"] for e in kept]),
            "labels": torch.tensor([e["labels"] for e in kept]),
        }

    trainer = quick_trainer(trainer_kwargs={"data_collator": drop_last})
    with pytest.raises(ValueError, match="made 7 images of 8 samples"):
        trainer.train()


def test_a_weight_of_two_names_is_refused_where_it_would_be_saved(quick_trainer, tmp_path):
    """Catches CoaT of timm, which trains until its first checkpoint and fails there, in any Trainer."""

    def shared():
        model = build("resnet")
        stages = model.resnet.encoder.stages
        stages[1].extra = stages[0].layers[0].layer[0].convolution
        return model

    with pytest.raises(ValueError, match=r"stages.0.*convolution.weight and .*stages.1.extra.weight are one weight"):
        quick_trainer(shared(), save_strategy="steps", save_steps=2)
    with pytest.raises(RuntimeError, match="shared tensors"):
        shared().save_pretrained(tmp_path / "model")
    quick_trainer(shared())
