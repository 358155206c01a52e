"""Set-ups that would train silently wrong are refused by name; those that merely look odd are not."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import ParallelismConfig
from conftest import TinyImages, build
from datasets import IterableDataset

from smoot_hf import SmootTrainer
from smoot_hf.training import parallelism


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


@pytest.mark.parametrize(
    ("flag", "plugin", "message"),
    [
        ("is_fsdp_enabled", SimpleNamespace(fsdp_version=1), "FSDP 1 is refused.*'version': 2.*torchrun"),
        ("is_fsdp_enabled", SimpleNamespace(fsdp_version=2), "fsdp is set, but accelerate runs NO here"),
    ],
)
def test_sharding_engines_are_refused_by_name(flag, plugin, message, quick_args):
    """Catches a training with gradients that nobody has shown to be exact; standard training stays free to use them.

    FSDP 2 that does shard is in test_fsdp.py.
    """

    class Sharded(SmootTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            # What the Trainer sets for FSDP 1 and FSDP 2, by argument or by launcher.
            setattr(self, flag, True)
            self.accelerator.state.fsdp_plugin = plugin

    with pytest.raises(ValueError, match=message):
        Sharded(build("vit"), quick_args(), train_dataset=TinyImages())


GATHERS = {"stage3_gather_16bit_weights_on_model_save": True}


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        ({"stage": 0}, {}, "ZeRO stage 0 is refused: it shards nothing.*torchrun"),
        ({"stage": 3} | GATHERS, {}, "stage 3 is refused with saliency_pass='shared'.*saliency_pass='eval'"),
        ({"stage": 3}, {"saliency_pass": "eval"}, "refused without 'stage3_gather_16bit_weights_on_model_save'"),
        ({"stage": 1}, {"max_grad_norm": 0.5}, "max_grad_norm=0.5, but DeepSpeed would clip by .*, 1.0"),
        ({"stage": 1}, {"masked_share": 0.5}, "DeepSpeed with masked_share below 1 is refused"),
        ({"stage": 1}, {"torch_compile": True}, "DeepSpeed with torch_compile is refused"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, {}, "DeepSpeed with offload_optimizer is refused"),
        ({"stage": 2, "zero_quantized_gradients": True}, {}, "DeepSpeed with zero_quantized_gradients is refused"),
    ],
)
def test_ways_of_deepspeed_that_are_not_known_to_be_exact_are_refused(config, overrides, message, quick_args):
    """Catches gradients that are off by 0.67, and gradients that are not clipped, without an error."""
    with pytest.raises(ValueError, match=message):
        refuse_deepspeed({"zero_optimization": config}, quick_args(**overrides))


@pytest.mark.parametrize("name", ["fp16", "optimizer", "scheduler", "zenflow", "compile"])
def test_parts_of_a_configuration_of_deepspeed_are_refused_by_name(name, quick_args):
    """Catches a part that nobody has tried; what is switched off passes, as a launcher writes it."""
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}}
    refuse_deepspeed(config | {"fp16": {"enabled": False}, "activation_checkpointing": {}}, quick_args())
    with pytest.raises(ValueError, match=f"DeepSpeed with {name} is refused"):
        refuse_deepspeed(config | {name: {"enabled": True}}, quick_args())


def refuse_deepspeed(config, args):
    """The check alone: with an engine, in two processes, it is in test_deepspeed.py."""
    config = {"gradient_clipping": 1.0} | config
    plugin = SimpleNamespace(deepspeed_config=config, zero_stage=config["zero_optimization"]["stage"])
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    parallelism._refuse_deepspeed(SimpleNamespace(args=args, accelerator=accelerator))


class Batches(torch.utils.data.Dataset):
    """The tiny images in batches made by the data set, which a loader without batches hands on."""

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return torch.utils.data.default_collate([TinyImages()[row] for row in range(8 * i, 8 * i + 8)])


OTHER_LOADERS = {
    "other rows": lambda data: torch.utils.data.DataLoader(torch.utils.data.Subset(data, range(16)), batch_size=8),
    "another data set": lambda _: torch.utils.data.DataLoader(TinyImages(), batch_size=8),
    "no batches": lambda _: torch.utils.data.DataLoader(Batches(), batch_size=None),
    "no loader": lambda data: [torch.utils.data.default_collate([data[row] for row in range(8)])],
}


@pytest.mark.parametrize("name", OTHER_LOADERS)
def test_a_loader_of_which_no_index_is_known_is_refused(name, quick_args):
    """Catches K of sample 0 used for all, or of row 0 of a subset, where a user replaced the loader."""

    class Replaced(SmootTrainer):
        def get_train_dataloader(self):
            return OTHER_LOADERS[name](self.train_dataset)

    trainer = Replaced(build("vit"), quick_args(), train_dataset=TinyImages())
    with pytest.raises(
        ValueError, match=r"no 'sample_idx'.* get_train_dataloader was replaced by .*self.train_dataset"
    ):
        trainer.train()


INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def with_labels_as(dtype):
    """A collator whose labels are of this type; those of bool are the first two classes."""

    def collate(examples):
        labels = torch.tensor([e["labels"] for e in examples])
        return {
            "pixel_values": torch.stack([e["pixel_values"] for e in examples]),
            "labels": (labels % 2 if dtype is torch.bool else labels).to(dtype),
        }

    return collate


@pytest.mark.parametrize("method", ["standard", "smoot"])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_labels_of_any_integer_type_are_trained_and_evaluated_alike(dtype, method, quick_args):
    """Catches a narrow label that training takes and that ends the run at its first evaluation."""
    results = []
    for labels in (torch.int64, dtype):
        data = TinyImages(classes=2)
        trainer = SmootTrainer(
            build("vit"), quick_args(method=method, max_steps=2, eval_strategy="steps", eval_steps=2),
            train_dataset=data, eval_dataset=data, data_collator=with_labels_as(labels),
            compute_metrics=lambda p: {"correct": int((p.predictions.argmax(1) == p.label_ids).sum())},
        )  # fmt: skip
        trainer.train()
        results.append(
            [
                log[name]
                for log in trainer.state.log_history
                for name in log
                if name in ("loss", "eval_loss", "eval_correct")
            ]
        )
    assert results[0] == results[1]
    assert len(results[0]) == 3


@pytest.mark.parametrize("method", ["standard", "smoot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_float_labels_are_refused_in_one_line_everywhere(dtype, method, quick_args):
    """Catches torch's own words about a Long, in training, evaluation, prediction and a stream's training."""
    line = rf"^'labels' must be one class index per sample, int64 \(B,\), .*got {dtype} \(8,\): convert .*long\(\)$"
    data, collator = TinyImages(), with_labels_as(dtype)
    trainer = SmootTrainer(build("vit"), quick_args(method=method), train_dataset=data)
    trainer.data_collator = collator
    for attempt in (trainer.train, lambda: trainer.evaluate(data), lambda: trainer.predict(data)):
        with pytest.raises(ValueError, match=line):
            attempt()
    if method == "standard":
        items = [item | {"pixel_values": item["pixel_values"].tolist()} for item in data]
        stream = IterableDataset.from_generator(lambda: iter(items)).with_format("torch")
        trainer = SmootTrainer(build("vit"), quick_args(method=method), train_dataset=stream, data_collator=collator)
        with pytest.raises(ValueError, match=line):
            trainer.train()


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


@pytest.fixture
def mesh():
    """A device mesh of this one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method", ["standard", "smoot"])
@pytest.mark.parametrize("how", ["tensor parallel", "fully sharded", "a model_init", "in a later training"])
def test_a_model_of_sharded_parameters_is_refused_by_what_it_is(how, method, mesh, quick_args):
    """Catches a doubled loss (tensor parallel) and a lost gradient (sharded), of which no argument says anything."""
    model = build("vit")

    def shard():
        if how == "fully sharded":
            torch.distributed.fsdp.fully_shard(model, mesh=mesh)
        else:
            layers = torch.distributed.tensor.parallel
            layers.parallelize_module(model.classifier, mesh, layers.ColwiseParallel())
        return model

    args, data = quick_args(method=method), TinyImages()

    def attempt():
        if how == "a model_init":
            SmootTrainer(model_init=shard, args=args, train_dataset=data)
        elif how == "in a later training":
            trainer = SmootTrainer(model, args, train_dataset=data)
            shard()
            trainer.train()
        else:
            SmootTrainer(shard(), args, train_dataset=data)

    with pytest.raises(ValueError, match=r"model parallelism is refused \(the DTensor .*whole model on each.*torchrun"):
        attempt()


@pytest.mark.parametrize("method", ["standard", "smoot"])
@pytest.mark.parametrize("size", ["tp_size", "cp_size", "sp_size", "dp_shard_size"])
def test_every_parallelism_that_shares_a_model_or_a_sample_is_refused_by_name(size, method, quick_args):
    """Catches one that is named in the arguments, in what a launcher has set, or by the model's own loading."""
    config = ParallelismConfig(**{size: 2})
    with pytest.raises(ValueError, match=rf"model parallelism is refused \({size}=2\)"):
        SmootTrainer(build("vit"), quick_args(method=method, parallelism_config=config), train_dataset=TinyImages())

    class Launched(SmootTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.state.parallelism_config = config

    with pytest.raises(ValueError, match=rf"model parallelism is refused \({size}=2\)"):
        Launched(build("vit"), quick_args(method=method), train_dataset=TinyImages())


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("_tp_size", 2, "model.tp_size=2"), ("_is_distributed_loading_by_transformers", True, "a distributed_config")],
)
def test_a_model_that_says_it_was_loaded_in_shards_is_refused(name, value, words, quick_trainer):
    """Catches shards of plain tensors (of experts), which no parameter shows."""
    model = build("vit")
    if name.startswith("_is_") and not hasattr(model, name.removeprefix("_")):
        pytest.skip("this version of transformers loads no model in shards")
    setattr(model, name, value)
    with pytest.raises(ValueError, match=f"model parallelism is refused .*{words}"):
        quick_trainer(model)
