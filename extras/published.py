"""What others published: the papers' numbers, and the checkpoints of Dynamic Routing's authors.

Their files are listed on github.com/yanwei-li/DynamicRouting: ImageNet backbones (Layer16-Fix, Layer33-Fix),
for --init, and Cityscapes checkpoints (Dynamic-A, -B, -C, -Raw), which evaluate.py takes with --variant.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from model import InputError, build_model, load_matching, read_file

ROWS = Path(__file__).resolve().parents[1] / "assets" / "published.csv"
MEASURES = {"mIoU": "segmentation", "box AP": "detection", "mask AP": "detection"}  # and their tasks
FIRST = "backbone.stem.0.weight"

# Checkpoints of Dynamic Routing's authors: their names of the convolutions -> ours. A norm is theirs with
# ".norm" behind the convolution's name; ours has the next number.
PUBLISHED_NAMES = {
    r"\.stem_1\.": ".0.",
    r"\.stem_2\.0\.": ".3.",
    r"\.stem_2\.1\.": ".4.",
    r"\.stem_3\.0\.": ".7.",
    r"\.stem_3\.1\.": ".8.",
    r"\.init_layer\.": ".init.",
    r"\.all_cell_list\.": ".layers.",
    r"\.cell_ops\._ops\.0\.op\.([01])\.": r".cell.body.\1.",
    r"\.cell_ops\._ops\.0\.op\.2\.": ".cell.body.4.",
    r"\.cell_ops\._ops\.0\.op\.3\.": ".cell.body.5.",
    r"\.res_(up|down)\.1\.": r".\1.0.",
    r"\.gate_conv_beta\.0\.": ".gate.features.0.",
    r"\.gate_conv_beta\.2\.": ".gate.decide.",
    r"^sem_seg_head\.layer_decoder_list\.(\d)\.": r"head.laterals.\1.0.",
    r"^sem_seg_head\.": "head.",
}


def rows_of(tasks) -> list[dict[str, str]]:
    """The rows of the papers' tables that are of some tasks, by the columns of assets/published.csv.

    `variant` is the network here that is the row's, of static ones alone; `gate` is empty of static ones.
    """
    with open(ROWS, newline="") as file:
        return [row for row in csv.DictReader(file) if MEASURES[row["measure"]] in tasks]


def our_name(name: str) -> str:
    """A weight's name in the authors' checkpoints -> its name in `model.Segmenter`."""
    for theirs, ours in PUBLISHED_NAMES.items():
        name = re.sub(theirs, ours, name)
    return re.sub(r"\.(\d+)\.norm\.", lambda number: f".{int(number[1]) + 1}.", name)


def weights_of(contents: dict) -> dict[str, Tensor] | None:
    """The weights in a checkpoint of the authors, by our names; None of any other file.

    Their input is BGR on 0..255 with the mean taken off, ours RGB on 0..1 with the mean taken off and divided
    by the deviation. That is a permutation and a factor in the first convolution, which pads nothing.
    """
    weights, found = {}, contents.get("model", contents)
    for name, value in found.items() if isinstance(found, dict) else ():
        if isinstance(value, (Tensor, np.ndarray)):
            weights[our_name(str(name))] = torch.as_tensor(value)
    first = weights.get(FIRST)
    if first is None or "backbone.stem.stem_1.weight" not in found or first.shape[1:2] != (3,):
        return None
    deviation = 255 * first.new_tensor([0.229, 0.224, 0.225])  # ImageNet's, RGB
    return weights | {FIRST: first.flip(1) * deviation[:, None, None]}


def load(path: Path | str, variant: str, device: torch.device) -> tuple[nn.Module, dict]:
    """A segmentation checkpoint of the authors -> the model in evaluation mode, and about it.

    The variant says which gate it has, which their files do not: Dynamic-Raw's are full. Raises InputError
    where the file is none of theirs or lacks a weight.
    """
    contents = read_file(path, "a checkpoint of Dynamic Routing's authors")
    weights = weights_of(contents)
    if weights is None:
        raise InputError(f"{path}: none of Dynamic Routing's authors' checkpoints, which --variant is for")
    if "head.predictor.weight" not in weights:
        raise InputError(f"{path}: a backbone without a head; train from it with --init")
    numbers = [int(name.split(".")[2]) for name in weights if re.match(r"backbone\.layers\.\d{1,3}\.", name)]
    args = dict(
        variant=variant, task="segmentation", num_classes=len(weights["head.predictor.weight"]),
        layers=1 + max(numbers, default=0), width=len(weights[FIRST]),
        gate="full" if variant == "dr-raw" else "small")
    model = build_model(**args)
    missing = load_matching(model, weights).missing
    if missing:
        lacking = f"lacks {len(missing)} weights of {variant}, the first {missing[0]}"
        raise InputError(f"{path}: {lacking}; train from it with --init")
    return model.to(device).eval(), {"model_args": args, "iteration": int(contents.get("iteration", 0))}
