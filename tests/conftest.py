"""Fixtures: tiny models built from a configuration and tiny data sets made in memory; no test touches the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from hypothesis import settings

# Deadlines measure the machine, not the code.
settings.register_profile("smoot", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("smoot")

torch.set_num_threads(1)
