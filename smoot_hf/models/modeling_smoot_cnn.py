"""The paper's convolutional network as a transformers model.

This file travels with every saved model, for machines without smoot_hf (`trust_remote_code=True`): it imports torch and
transformers alone, and nothing beside it.
"""

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput

_SMALLEST_CNN_IMAGE = 6


class PaperCnnConfig(PreTrainedConfig):
    """Configuration of the paper's network for MNIST and Fashion-MNIST (Section 4.1).

    Args:
        image_size: height and width in pixels, one integer where they agree; at least 6.
        num_channels: channels of the images.
        feature_dropout: rate after the convolutions.
        classifier_dropout: rate before the last layer.
        **kwargs: of `PreTrainedConfig`; `num_labels`, or `id2label` and `label2id`, set the classes.

    Raises:
        ValueError: images smaller than 6 pixels, or a rate outside [0, 1).
    """

    model_type = "smoot_cnn"

    image_size: int | list[int] | tuple[int, int] = 28
    num_channels: int = 1
    feature_dropout: float = 0.25
    classifier_dropout: float = 0.5

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if min(self.image_height_width) < _SMALLEST_CNN_IMAGE:
            raise ValueError(f"image_size must be at least {_SMALLEST_CNN_IMAGE} pixels, got {self.image_size}")
        for name in ("feature_dropout", "classifier_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")

    @property
    def image_height_width(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        return height, width


class PaperCnnForImageClassification(PreTrainedModel):
    """Two 3x3 convolutions (32 and 64 channels), 2x2 max pooling, two fully connected layers (128 units), dropout.

    The published network ends in a log-softmax; this one gives logits, as every model here does. The gradient of its
    output is `saliency_score="log_prob"`.
    """

    config_class = PaperCnnConfig
    main_input_name = "pixel_values"

    def __init__(self, config: PaperCnnConfig) -> None:
        super().__init__(config)
        height, width = config.image_height_width
        self.convolution_1 = nn.Conv2d(config.num_channels, 32, kernel_size=3)
        self.convolution_2 = nn.Conv2d(32, 64, kernel_size=3)
        self.feature_dropout = nn.Dropout(config.feature_dropout)
        # Each convolution takes two pixels off, pooling halves what is left.
        self.hidden = nn.Linear(64 * ((height - 4) // 2) * ((width - 4) // 2), 128)
        self.classifier_dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(128, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own initialisation, which the published network has; that of transformers is made for ViTs."""
        if isinstance(module, nn.Conv2d | nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(module.weight[0].numel())
            init.uniform_(module.bias, -bound, bound)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: (B, C, H, W) float, normalised, of the size that the configuration states.
            labels: (B,) int64 classes; when given, the output has the mean cross-entropy as `loss`. Of a configuration
                with `problem_type="multi_label_classification"` (B, num_labels) of 0 and 1, and the binary one.

        Returns:
            `logits` (B, num_labels) and, with labels, `loss`.

        Raises:
            ValueError: images of another shape.
        """
        expected = (self.config.num_channels, *self.config.image_height_width)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            found = tuple(pixel_values.shape)
            raise ValueError(
                f"pixel_values must be (B, C, H, W) with (C, H, W) = {expected}, got {found}: resize the images, or "
                "build the model with their image_size"
            )
        # Pooled before the ReLU, which is the same to the last bit, gradients included: a quarter of the work for it.
        features = F.max_pool2d(self.convolution_2(F.relu(self.convolution_1(pixel_values))), 2)
        features = self.feature_dropout(F.relu(features)).flatten(1)
        logits = self.classifier(self.classifier_dropout(F.relu(self.hidden(features))))
        loss = None if labels is None else self._loss(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.config.problem_type == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return F.cross_entropy(logits, labels)
