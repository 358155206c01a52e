# /// script
# requires-python = ">=3.11"
# dependencies = ["smoot-hf[recipes]"]
#
# [tool.uv.sources]
# smoot-hf = { path = "..", editable = true }
# ///
"""Train DeiT-tiny on CIFAR-10 with SMOOT, SGT or in the standard way (Table 1).

    accelerate launch recipes/train_cifar10.py [--dataset DIRECTORY] [--model DIRECTORY] [--method smoot|sgt|standard]
    uv run recipes/train_cifar10.py [flags]  # installs first what it needs
    smoot-hf train --recipe cifar10 [flags]  # the same from an installation, without this file

Time: 4 minutes for 300 steps of the CNN on two CPU cores; the paper trains DeiT-tiny for 100 epochs on a GPU.
Expected, n = 1, 2,000 test images: the CNN (--model cnn --saliency_score log_prob) 24.3 % after 200 steps as below, and
56.0 % after 300 steps with --optimizer trainer --learning_rate 1e-3; K min/median/max 512 / 512 / 512 and
504 / 512 / 518 of 1,024 pixels. DeiT-tiny from pretrained weights: not measured yet.

Settings that differ from the library's defaults, and why:

  optimizer, learning_rate   Adadelta at 0.001, as in the paper (Section 4.1); not among the names of --optim.
  lr_scheduler_type          constant: the paper names no schedule, and the Trainer's own would decay to zero.
  max_grad_norm              0, no clipping: the paper names none, and the Trainer's own clips at 1.
  num_train_epochs           100, and 256 images a batch, as in the paper.
  rounding                   trunc: the floor of Equation 4 takes a pixel off for any negative delta, however small, and
                             the median of K leaves the value that the tables show.
  signed_saliency            true: as in train_mnist.py.

alpha 0.8, the gradient of the logit, step_size 10 pixels, kl_weight 1 and mask_ratio 0.5 are the library's own. The
mask lives on the 32x32 pixels of the data; resizing to the model's 224x224 comes after it.

Adadelta at 0.001 moves slowly. AdamW in its place:

    --optimizer trainer --learning_rate 1e-4 --weight_decay 0.05 --lr_scheduler_type cosine --max_grad_norm 1

Memory: of a pretrained model, which takes 224x224 pixels, 256 images at once need 20 GB (EfficientNet-lite0, standard)
or twice as much (smoot). The same 256 images in eight parts take an eighth:

    --per_device_train_batch_size 32 --gradient_accumulation_steps 8 --per_device_eval_batch_size 32

docs/costs.md has more that saves memory.

Other models: `--from_scratch --patch_size 4` trains DeiT-tiny on the 32x32 pixels from random weights; `--model cnn
--saliency_score log_prob` the CNN of the other recipes. Without network, --dataset and --model take local directories.
"""

from smoot_hf.experiments.recipes import RECIPES
from smoot_hf.experiments.train import main

if __name__ == "__main__":
    main(RECIPES["cifar10"], description=__doc__)
