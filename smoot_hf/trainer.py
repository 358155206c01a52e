"""SmootTrainer: the Trainer of Hugging Face with the objective of SMOOT."""

from transformers import Trainer

from .mixin import SmootMixin


class SmootTrainer(SmootMixin, Trainer):
    """A `Trainer` that masks the least salient pixels and holds the prediction to what it was (Equations 1 to 6).

    Takes the place of `transformers.Trainer`; everything is said in `SmootMixin`, which does the same for a trainer
    class of one's own.
    """
