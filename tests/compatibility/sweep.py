"""The sweep: whether an architecture trains with SMOOT, checked end to end on a tiny model of it.

    PYTHONPATH=tests python tests/compatibility/sweep.py --output docs/models.md   # all, most of an hour
    PYTHONPATH=tests python tests/compatibility/sweep.py --only vit swin timm/resnet

Each check is a function of a `Case` and of the trainer that has trained it, and raises `Failure` in one line. Here the
checks become the rows of a table; `tests/compatibility/test_sweep.py` asks for those rows.
"""

import argparse
import copy
import gc
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import architectures
import captum
import timm
import timm_families
import torch
import torch.nn.functional as F
import transformers
from architectures import CLASSES, Case
from conftest import QUICK, TinyImages
from transformers import PrinterCallback, TrainerCallback

from smoot_hf import SmootTrainer, SmootTrainingArguments, evaluate_faithfulness
from smoot_hf import functional as SF
from smoot_hf.evaluation.attributions import attribute, captum_methods
from smoot_hf.models.logits import LogitsModel

SETTINGS = [("standard", "shared"), ("sgt", "shared"), ("smoot", "shared"), ("sgt", "eval"), ("smoot", "eval")]

# Five steps of two micro-batches of three: 30 of the 33 samples are visited, each once. K moves by 5,000 pixels for a
# delta of 1, so that nearly every visit shows.
ARGUMENTS = QUICK | {
    "max_steps": 5, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1, "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 3, "per_device_eval_batch_size": 4, "kl_weight": 0.7, "max_grad_norm": 0.0,
    "learning_rate": 1e-2, "step_size": 5e3, "step_unit": "pixels",
}  # fmt: skip
SAMPLES, VISITED, MASK_RATIO, RATIO_MIN, RATIO_MAX = 33, 30, 0.5, 0.2, 0.8

# The largest error of a parameter's gradient, relative to its own largest entry. In float64 1e-8 leaves room for what
# batch normalisation over three samples amplifies; in float32, where a model has float32 inside, 1e-3 does.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}


class Failure(AssertionError):
    """A check that does not hold, in one line."""


class MicroBatch(NamedTuple):
    """What one call of `compute_loss` was given; the images that it showed the model, and the logits that came back."""

    images: torch.Tensor
    labels: torch.Tensor
    sample_idx: torch.Tensor
    k: torch.Tensor | None
    random_state: torch.Tensor
    shown: list[torch.Tensor]
    logits: list[torch.Tensor]


class Recorder(SmootTrainer):
    """Keeps what every micro-batch of the training was given, and the gradients of the first step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.batches: list[MicroBatch] = []
        self.gradients: dict[str, torch.Tensor | None] = {}
        super().__init__(*args, **kwargs)
        self.add_callback(KeepsGradients(self.gradients))
        self.remove_callback(PrinterCallback)

    def compute_loss(self, model, inputs, *args, **kwargs):
        if not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        k = None if self.mask_budget is None else self.mask_budget.read(inputs["sample_idx"])
        given = (inputs["pixel_values"], inputs["labels"], inputs["sample_idx"], k, torch.get_rng_state())
        self.batches.append(MicroBatch(*given, [], []))
        hook = self.model.register_forward_hook(self._keep, with_kwargs=True)
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            hook.remove()

    def _keep(self, _, __, inputs, outputs):
        self.batches[-1].shown.append(inputs["pixel_values"].detach().clone())
        self.batches[-1].logits.append(outputs.logits.detach().clone())


class KeepsGradients(TrainerCallback):
    """Copies the accumulated gradients before the first step of the optimizer."""

    def __init__(self, gradients: dict[str, torch.Tensor | None]) -> None:
        self.gradients = gradients

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.gradients:
            for name, weight in model.named_parameters():
                self.gradients[name] = None if weight.grad is None else weight.grad.clone()


def fresh(case: Case, dtype: torch.dtype) -> torch.nn.Module:
    """The model of a case, the same at every call."""
    torch.manual_seed(0)
    return case.build().to(dtype).train()


def images_of(case: Case, length: int, dtype: torch.dtype) -> TinyImages:
    """Noise images of the size that the case takes."""
    data = TinyImages(length, CLASSES, case.side)
    data.images = data.images.to(dtype)
    return data


def trainer_of(
    case: Case, method: str, saliency_pass: str, folder: Path, dtype: torch.dtype, **others: Any
) -> Recorder:
    """A trainer of the fresh model."""
    settings = {"method": method, "saliency_pass": saliency_pass, "output_dir": str(folder)} | others
    args, data = SmootTrainingArguments(**ARGUMENTS | settings), images_of(case, SAMPLES, dtype)
    return Recorder(fresh(case, dtype), args, train_dataset=data, eval_dataset=images_of(case, 5, dtype))


def trained(case: Case, method: str, saliency_pass: str, folder: Path, dtype: torch.dtype) -> Recorder:
    """The same after its five steps."""
    trainer = trainer_of(case, method, saliency_pass, folder, dtype)
    trainer.train()
    return trainer


def widest_dtype(case: Case) -> torch.dtype:
    """float64 where the architecture lets us, so that what is compared differs by next to nothing; else float32."""
    try:
        return fresh(case, torch.float64)(pixel_values=images_of(case, 3, torch.float64).images).logits.dtype
    except RuntimeError:
        return fresh(case, torch.float32)(pixel_values=images_of(case, 3, torch.float32).images).logits.dtype


def require(holds: Any, message: str) -> None:
    """Fail with the message unless it holds."""
    if not bool(holds):
        raise Failure(message)


# --- the checks of a training that has ended ------------------------------------------------------------------------


def check_loss(case: Case, trainer: Recorder) -> None:
    """The loss of every step is finite, and cross-entropy + kl_weight * KL."""
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    require(len(logs) == 5, f"{len(logs)} steps were logged of 5")
    for entry in logs:
        total = entry["ce_loss"] + 0.7 * entry.get("kl_loss", 0.0)
        require(abs(entry["loss"] - total) <= 1e-4 * abs(total), f"loss {entry['loss']} is not {total}, ce + 0.7 kl")
        require(entry.get("kl_loss", 0.0) >= -1e-6, f"kl_loss is {entry.get('kl_loss')}")


def check_pixels(case: Case, trainer: Recorder) -> None:
    """The model saw the images as they are, and at last with exactly K positions replaced and no other touched."""
    standard = trainer.args.method == "standard"
    passes = 1 if standard else 3 if trainer.args.saliency_pass == "eval" else 2
    for batch in trainer.batches:
        require(len(batch.shown) == passes, f"{len(batch.shown)} forward passes instead of {passes}")
        clean = batch.shown if standard else batch.shown[:-1]
        require(all(torch.equal(images, batch.images) for images in clean), "the clean pass saw other images")
        if not standard:
            replaced = (batch.shown[-1] != batch.images).any(dim=1).sum(dim=(1, 2)).tolist()
            require(replaced == batch.k.tolist(), f"{replaced} pixels were replaced, K is {batch.k.tolist()}")


def check_budget(case: Case, trainer: Recorder) -> None:
    """K of every visited sample moved as its two predictions say (smoot), and no other moved."""
    if trainer.args.method == "standard":
        return
    visited = torch.cat([batch.sample_idx for batch in trainer.batches])
    require(len(visited.unique()) == VISITED, f"{len(visited.unique())} samples were visited instead of {VISITED}")
    initial = int(MASK_RATIO * case.side**2)
    expected = torch.full((SAMPLES,), initial, dtype=torch.int32)
    if trainer.args.method == "smoot":
        for batch in trainer.batches:
            expected[batch.sample_idx] = torch.tensor(moved(batch, trainer.args), dtype=torch.int32)
        require((expected[visited] != initial).sum() > VISITED / 2, "the predictions do not change under the mask")
    # In float32 the product of step_size and delta may fall on the other side of a whole number.
    slack = 0 if trainer.batches[0].images.dtype == torch.float64 else 1
    errors = (trainer.mask_budget.k - expected).abs()
    require(errors.max() <= slack, f"K of {int((errors > slack).sum())} of {SAMPLES} samples moved otherwise")


def moved(batch: MicroBatch, args: SmootTrainingArguments) -> list[int]:
    """Equations 1 to 4, image by image, from the logits of both views; all classes are among the highest n."""
    positions, result = batch.images[0, 0].numel(), []
    views = (logits.double().softmax(1) for logits in (batch.logits[0], batch.logits[-1]))
    for budget, clean, masked in zip(batch.k.tolist(), *views, strict=True):
        change = (masked.sort(descending=True).values - clean.sort(descending=True).values).tolist()
        delta = args.alpha * change[0] + (1 - args.alpha) * sum(change[1:]) / (CLASSES - 1)
        target = budget + math.floor(args.step_size * delta)
        result.append(min(max(target, int(RATIO_MIN * positions)), int(RATIO_MAX * positions)))
    return result


def check_evaluation(case: Case, trainer: Recorder) -> None:
    """`evaluate` judges the weights that were trained: its loss is that of a new model that was given them."""
    dtype = trainer.batches[0].images.dtype
    data, model = images_of(case, 5, dtype), fresh(case, dtype)
    model.load_state_dict(trainer.model.state_dict())
    with torch.no_grad():
        expected = F.cross_entropy(model.eval()(pixel_values=data.images).logits, torch.tensor(data.labels)).item()
    loss = trainer.evaluate()["eval_loss"]
    require(abs(loss - expected) <= 1e-5 * abs(expected), f"eval_loss is {loss}, that of the same weights {expected}")


def check_gradients(case: Case, trainer: Recorder) -> None:
    """The masked images and the accumulated gradients of the first step are those of the plain formulation.

    A gradient is absent in both, or equal up to rounding (where it is tiny, that of the largest of all).
    """
    window = trainer.batches[:2]
    model = fresh(case, window[0].images.dtype)
    for batch in window:
        loss, masked = plain_loss(model, batch, trainer.args)
        (loss / sum(len(each.images) for each in window)).backward()
        if masked is not None:
            is_same = torch.equal(masked != batch.images, batch.shown[-1] != batch.images)
            require(is_same, "other pixels were masked than those of least saliency by captum")
            require((masked - batch.shown[-1]).abs().max() < 1e-5, "the fill is another")
    plain = {name: weight.grad for name, weight in model.named_parameters()}
    require(trainer.gradients.keys() == plain.keys(), "the parameters have other names")
    largest = max(float(gradient.abs().max()) for gradient in plain.values() if gradient is not None)
    require(0 < largest < float("inf"), f"the largest gradient is {largest}")
    for name, gradient in plain.items():
        ours = trainer.gradients[name]
        require((gradient is None) == (ours is None), f"one of the gradients of {name} is missing")
        if gradient is not None:
            error = float((ours - gradient).abs().max())
            allowed = TOLERANCE[gradient.dtype] * max(float(gradient.abs().max()), 1e-4 * largest)
            require(error <= allowed, f"the gradient of {name} differs by {error:.1e}, allowed {allowed:.1e}")


def plain_loss(model: torch.nn.Module, batch: MicroBatch, args: SmootTrainingArguments):
    """Equation 5 written down once more, pass by pass and image by image; the saliency is captum's.

    Returns:
        The sum over the batch, and the masked images (`None` in standard training).
    """
    network = copy.deepcopy(model)
    torch.set_rng_state(batch.random_state)
    logits = model(pixel_values=batch.images).logits
    ce = F.cross_entropy(logits, batch.labels, reduction="sum")
    if args.method == "standard":
        return ce, None
    if args.saliency_pass == "eval":
        # After the clean pass, which has updated the batch statistics.
        network = copy.deepcopy(model).eval()
    torch.set_rng_state(batch.random_state)
    gradient = captum_saliency(LogitsModel(network), batch.images, batch.labels, abs=True)
    noise = SF.counter_uniform(args.seed, 0, batch.sample_idx, tuple(batch.images.shape[1:])).to(batch.images.dtype)
    masked = batch.images.clone()
    for i, k in enumerate(batch.k.tolist()):
        lowest = torch.sort(gradient[i].flatten(), stable=True).indices[:k]
        remaining = torch.ones(gradient[i].numel(), dtype=torch.bool).index_fill_(0, lowest, False)
        for channel, values in zip(masked[i].flatten(1), noise[i].flatten(1), strict=True):
            low, high = channel[remaining].min(), channel[remaining].max()
            channel[lowest] = low + (high - low) * values[lowest]
    torch.set_rng_state(batch.random_state)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    masked_logits = model(pixel_values=masked).logits
    for name, buffer in model.named_buffers():
        buffer.data.copy_(before[name])  # running statistics are those of the clean images
    # F.kl_div(input, target) is KL(target || input), both as logarithms.
    kl = F.kl_div(masked_logits.log_softmax(1), logits.log_softmax(1), reduction="sum", log_target=True)
    return ce + args.kl_weight * kl, masked


def captum_saliency(model, images, target, abs: bool) -> torch.Tensor:
    """`captum.attr.Saliency`, meant over the channels: (B, H, W)."""
    leaf = images.clone().requires_grad_()
    return captum_methods().Saliency(model).attribute(leaf, target=target, abs=abs).mean(dim=1)


def check_resumed(case: Case, whole: Recorder) -> None:
    """Resumed at step 3, a training ends where the uninterrupted one did: weights, buffers and K, bit for bit."""
    args, folder = whole.args, Path(whole.args.output_dir)
    dtype = whole.batches[0].images.dtype
    resumed = trainer_of(case, args.method, args.saliency_pass, folder, dtype, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    require(len(resumed.batches) == 4, f"{len(resumed.batches)} micro-batches were trained after resuming, not 4")
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(resumed.model, kind)()), dict(getattr(whole.model, kind)())
        other = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
        require(not other, f"{len(other)} of {len(theirs)} {kind[6:]} differ after resuming, {', '.join(other[:2])}")
    if whole.mask_budget is not None:
        require(torch.equal(resumed.mask_budget.k, whole.mask_budget.k), "K differs after resuming")


def check_attribution(case: Case, trainer: Recorder) -> None:
    """Our gradient is captum's, alone and within an evaluation, whose numbers are finite."""
    model = trainer.model.eval()
    data, adapter = images_of(case, 4, trainer.batches[0].images.dtype), LogitsModel(model)
    labels = torch.tensor(data.labels)
    theirs = captum_saliency(adapter, data.images, labels, abs=False)
    ours = attribute(adapter, data.images, labels, torch.arange(4), signed=True)
    scale = float(theirs.abs().max())
    require(0 < scale < float("inf"), f"the largest saliency is {scale}")
    require(float((ours - theirs).abs().max()) <= 1e-5 * scale, "the saliency is not captum's")

    def by_captum(model, images, target):
        return captum_saliency(model, images, target, abs=True)

    settings = {"steps": 3, "curves": ("insertion",), "batch_size": 4}
    found, expected = (evaluate_faithfulness(model, data, how, **settings) for how in (None, by_captum))
    for curve in ("deletion_curve", "insertion_curve"):
        require(torch.isfinite(getattr(found, curve)).all(), f"the {curve} is not finite")
        require(torch.equal(getattr(found, curve), getattr(expected, curve)), f"the {curve} is not that of captum")


# --- the table -----------------------------------------------------------------------------------------------------

COLUMNS = ("shared", "eval", "resume", "captum")


class Row(NamedTuple):
    """What became of a case: a mark for every column, and what there is to say."""

    name: str
    kind: str
    parameters: int | None
    marks: dict[str, str]
    note: str
    seconds: float

    @property
    def passes(self) -> bool:
        return set(self.marks.values()) == {"yes"}

    @property
    def is_refused(self) -> bool:
        return set(self.marks.values()) == {"refused"}


def refusal(case: Case) -> str | None:
    """Why the model cannot be built or the trainer does not take it; `None` where it does."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            trainer_of(case, "smoot", "shared", Path(folder), torch.float32)
        except (ImportError, ValueError) as error:
            return first_line(error)
    return None


def row_of(case: Case) -> Row:
    """Every check of one case."""
    start = time.perf_counter()
    try:
        model = fresh(case, torch.float32)
        kind, parameters = type(model).__name__, sum(weight.numel() for weight in model.parameters())
    except ImportError:
        kind, parameters = "", None
    except Exception as error:
        return Row(case.name, "", None, dict.fromkeys(COLUMNS, "no"), f"not built: {first_line(error)}", 0.0)
    reason = refusal(case)
    if reason is not None:
        return Row(case.name, kind, parameters, dict.fromkeys(COLUMNS, "refused"), reason, 0.0)
    notes: list[str] = []
    marks = dict.fromkeys(COLUMNS, "yes")

    def attempt(column: str, check: Callable, *args: Any) -> Any:
        try:
            return check(*args)
        except Exception as error:
            marks[column] = "no"
            notes.append(f"{column}: {first_line(error)}")

    dtype = attempt("shared", widest_dtype, case)
    if dtype is torch.float32:
        notes.append("compared in float32: it has float32 inside")
    for method, saliency_pass in SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            trainer = attempt(saliency_pass, trained, case, method, saliency_pass, Path(folder), dtype)
            if trainer is None:
                marks |= {saliency_pass: "no", "resume": "no", "captum": "no"}
                continue
            for check in (check_loss, check_pixels, check_budget, check_gradients, check_evaluation):
                attempt(saliency_pass, check, case, trainer)
            attempt("resume", check_resumed, case, trainer)
            if (method, saliency_pass) == ("smoot", "shared"):
                attempt("captum", check_attribution, case, trainer)
    return Row(case.name, kind, parameters, marks, "; ".join(dict.fromkeys(notes)), time.perf_counter() - start)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    line = lines[0].partition(". You can")[0] if lines else ""
    return line if isinstance(error, Failure | ValueError) else f"{type(error).__name__}: {line}"


def table(rows: Iterable[Row]) -> str:
    """The rows as Markdown, with the versions and the date."""
    versions = {"transformers": transformers, "timm": timm, "torch": torch, "captum": captum}
    stamp = ", ".join(f"{name} {module.__version__}" for name, module in versions.items())
    lines = ["# Models", "", f"Written by `tests/compatibility/sweep.py`, {date.today():%Y-%m-%d}; {stamp}.", ""]
    header = ("architecture", "class", "parameters", *COLUMNS, "note")
    lines += [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for row in rows:
        parameters = "" if row.parameters is None else f"{row.parameters:,}"
        cells = (row.name, row.kind, parameters, *(row.marks[column] for column in COLUMNS), row.note)
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def all_cases() -> Iterator[Case]:
    """Everything that the table has a row for."""
    yield from architectures.cases()
    yield from (Case(*row) for row in timm_families.rows())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a tiny model of every architecture with SMOOT")
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    parser.add_argument("--only", nargs="*", help="names of architectures")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    # Every training collects garbage: two thirds of the time, were it to look at all that is imported.
    gc.freeze()
    rows = []
    for case in all_cases():
        if options.only and case.name not in options.only and case.name.partition("/")[0] not in options.only:
            continue
        rows.append(row_of(case))
        row = rows[-1]
        sys.stderr.write(f"{row.seconds:6.1f} s  {row.name}: {' '.join(row.marks.values())} {row.note}\n")
    sys.stdout.write(table(rows))
    if options.output:
        options.output.write_text(table(rows))
    sys.exit(any(not row.passes and not row.is_refused for row in rows))


if __name__ == "__main__":
    main()
