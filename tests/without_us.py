"""Run in a process of its own, where smoot_hf cannot be imported: what somebody does with a published model.

    python without_us.py ANSWERS < {"repo": ..., "trust_remote_code": bool, "images": [paths], "card": path or null}...

One JSON object a line on stdin. Writes, for each repository, the probabilities of every image by `pipeline` and by the
Auto classes, and runs the code of the card.
"""

# ruff: noqa: E402 - smoot_hf is blocked before anything is imported
import json
import os
import re
import sys
from pathlib import Path

sys.modules["smoot_hf"] = None

import matplotlib

matplotlib.use("Agg")

import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline


def probabilities(repo, images, **trust):
    """By pipeline and by the Auto classes, in the order of the classes: two lists of (classes,)."""
    classify = pipeline("image-classification", repo, **trust)
    names = [classify.model.config.id2label[i] for i in range(classify.model.config.num_labels)]
    found = [{entry["label"]: entry["score"] for entry in classify(path, top_k=len(names))} for path in images]
    processor = AutoImageProcessor.from_pretrained(repo, **trust)
    model = AutoModelForImageClassification.from_pretrained(repo, **trust).eval()
    with torch.no_grad():
        pixels = [processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"] for path in images]
        by_hand = model(torch.cat(pixels)).logits.softmax(dim=1)
    return [[one[name] for name in names] for one in found], by_hand.tolist()


answers = {}
for line in sys.stdin:
    asked = json.loads(line)
    trust = {"trust_remote_code": True} if asked["trust_remote_code"] else {}
    by_pipeline, by_hand = probabilities(asked["repo"], asked["images"], **trust)
    answers[asked["repo"]] = {"pipeline": by_pipeline, "by_hand": by_hand}
    card = Path(hf_hub_download(asked["repo"], "README.md")).read_text()
    Image.open(asked["images"][0]).save("photo.png")
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(code, {})
    answers[asked["repo"]]["drew"] = os.path.getsize("saliency.png")
    os.remove("saliency.png")
with open(sys.argv[1], "w") as file:
    json.dump(answers, file)
