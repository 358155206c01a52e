# /// script
# requires-python = ">=3.11"
# dependencies = ["smoot-hf[recipes]"]
#
# [tool.uv.sources]
# smoot-hf = { path = "..", editable = true }
# ///
"""Train the paper's CNN on images of several digits, with a label for each of them; needs no network.

    accelerate launch recipes/train_several_digits.py [--method smoot|sgt|standard] [--preset recommended]
    python recipes/train_several_digits.py --dataset DIRECTORY [flags]  # the digits of MNIST in their place
    uv run recipes/train_several_digits.py [flags]  # installs first what it needs
    smoot-hf train --recipe several_digits [flags]  # the same from an installation, without this file

TIME
EXPECTED

Each image has up to three of scikit-learn's handwritten digits in two rows of two blocks, the others null: the planted
set `several` of smoot_hf/data/planted_evidence.py, 1,437 training and 360 test images of 16x16 pixels. The model has a
sigmoid output for each digit (`problem_type="multi_label_classification"`). Accuracy counts the images with all labels
right. recipes/draw_several.py draws the saliency map of each label.

Settings that differ from the library's defaults, and why:

  SETTINGS
"""

from smoot_hf.experiments.recipes import RECIPES
from smoot_hf.experiments.train import main

if __name__ == "__main__":
    main(RECIPES["several_digits"], description=__doc__)
