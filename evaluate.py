"""Evaluate checkpoints of train_seg.py and train_det.py: scores, tables, figures; or show what one predicts.

    # scores, cost and experts; writes metrics.json and experts.png
    python evaluate.py runs/NAME/last.pt
    # every figure, as PDF and PNG
    python evaluate.py runs/NAME/last.pt --figures DIR
    # one table, mean ± std over seeds, with the papers' numbers beside them
    python evaluate.py runs/*/last.pt --published --format markdown
    # predictions as label PNGs, for a data set's own tools
    python evaluate.py runs/NAME/last.pt --split test --predictions DIR
    # pictures with what is predicted on them, and which expert took each
    python evaluate.py runs/NAME/last.pt --image FILE_OR_FOLDER
    # the experts as static networks of their own, exported, and what they are worth
    python evaluate.py runs/NAME/last.pt --experts DIR
    # pictures, each by the exported expert that takes it
    python evaluate.py DIR/experts.json --image FILE_OR_FOLDER
    # a checkpoint of Dynamic Routing's authors
    python evaluate.py FILE --variant dr-a
    # eight processes; each image counts once
    torchrun --nproc_per_node 8 evaluate.py runs/NAME/last.pt

The checkpoint knows its network, data set and classes; flags override what can differ. What is written beside
it, or in --out, names checkpoint and split where these are not last.pt and val: metrics-test.json,
experts-best.png. What a split gave is kept in NAME.SPLIT.activations: tables and figures take it from there.
The first command, one checkpoint and no figures, always computes anew. Results are printed before files are
written, but for --predictions; what cannot be written is named, and the rest goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import dataclasses
import functools
import importlib.util
import io
import itertools
import json
import math
import os
import re
import statistics
import sys
import time
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks
from tqdm import tqdm

import data
from kmeans import Clusters, agreement, describe_collapse, inter_intra, intra_to_centre, kmeans
from model import (
    VARIANTS, Dispatcher, Exportable, InputError, Parser, Process, cores_per_process, fit_dispatcher,
    load_checkpoint, load_published, make_folder, number, one_line_errors, published_results, read_file,
    start_process, write_file,
)
from routing import OPEN, Grid, fuse, nodes_per_layer, pad_to_stride


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    theirs = [name for name, variant in VARIANTS.items() if not variant.static and not variant.lambda2]
    datasets = list(dict.fromkeys([*data.SEGMENTATION, *data.DETECTION]))
    workers = min(4, cores_per_process() // 2)
    add = parser.add_argument
    add("checkpoint", type=Path, nargs="+",
        help="files of train_seg.py or train_det.py; several: one table; for --image also an experts.json")
    add("--variant", choices=theirs, help="the checkpoint is one of Dynamic Routing's authors, of this kind")

    add = parser.add_argument_group("data (by default as in training)").add_argument
    add("--dataset", choices=datasets, help="data set; its classes must be the checkpoint's")
    add("--data", metavar="DIR", help="its folder")
    add("--json", metavar="FILE", help="detection: annotations in COCO's format, in place of the split's")
    add("--images", metavar="DIR", help="their images; in segmentation of a folder, with --labels")
    add("--labels", metavar="DIR", help="segmentation: label PNGs of --images")
    add("--list", metavar="FILE", help="segmentation: text file of those --images to use, one to a line")
    add("--limit", type=number(int, 1), help="detection: use only the first so many images")
    add("--split", default="val", choices=data.SPLITS, help="which part of the data set")

    add = parser.add_argument_group("output").add_argument
    add("--figures", type=Path, metavar="DIR", help="draw every figure that the checkpoints allow")
    add("--published", action="store_true", help="put the papers' rows in the table and in the trade-off")
    add("--format", choices=["text", "markdown", "latex", "csv"],
        help="print a table, not the report; csv: a row for each checkpoint, with all digits")
    add("--image", type=Path,
        help="show this picture, or those in this folder; by default in overlays/ beside the checkpoint")
    add("--out", type=Path, metavar="DIR",
        help="folder for what is written, by default the checkpoint's; of several, one in it for each")
    add("--predictions", type=Path, metavar="DIR", help="segmentation: also write label PNGs")
    add("--min-score", type=number(float, 0, 1), default=0.5, help="detection: lowest score that is drawn")

    add = parser.add_argument_group("experts as static networks").add_argument
    add("--experts", type=Path, metavar="DIR",
        help="cut out the experts and one network for all, score them, export them to DIR (of several "
             "checkpoints: to a folder in it for each); with --figures draw routes, and scores over --keep")
    add("--keep", type=number(float, 0, 0.999),
        help="a path stays if more than this share of an expert's images open it; 0.01 by default")
    add("--cut-from", choices=data.SPLITS, help="the split whose images say what is open; train by default")
    add("--export-size", type=number(int, 32), nargs=2, metavar=("H", "W"),
        help="export for images of this size alone; by default for any size, multiples of 32, but where "
             "the data set's images are too small for that")
    add("--onnx", action="store_true", help="export to ONNX too; needs the packages onnx and onnxscript")

    add = parser.add_argument_group("system").add_argument
    add("--device", help="cpu, cuda or mps; by default the best there is")
    add("--workers", type=number(int, 0), default=workers, help="loader processes")
    add("--eval-batch", type=number(int, 1), help="images at a time; in segmentation of one size")
    arguments = parser.parse_args(argv)
    different = {}  # by what they are, however they are written
    for path in arguments.checkpoint:
        different.setdefault(path.resolve(), path)
    arguments.checkpoint = list(different.values())
    several = len(arguments.checkpoint) > 1
    if several and (arguments.image or arguments.predictions):
        parser.error("--image and --predictions take one checkpoint")
    for flag in ("labels", "list"):
        if getattr(arguments, flag) and not arguments.images:
            parser.error(f"--{flag}: goes with --images, the folder of the pictures")
    for flag in ("keep", "cut-from", "export-size", "onnx"):
        value = getattr(arguments, flag.replace("-", "_"))
        if value is not None and value is not False and not arguments.experts:
            parser.error(f"--{flag}: goes with --experts")
    if arguments.experts and (arguments.image or arguments.predictions or arguments.published):
        parser.error("--experts: does not go with --image, --predictions and --published")
    check_exported(parser, arguments)
    arguments.keep = 0.01 if arguments.keep is None else arguments.keep
    arguments.cut_from = arguments.cut_from or "train"
    arguments.table = several or arguments.published or arguments.format is not None
    return arguments


def check_exported(parser: Parser, arguments: argparse.Namespace) -> None:
    """What exported experts are for: --image alone."""
    for path in arguments.checkpoint:
        if path.suffix == ".pt2":
            parser.error(f"{path}: an exported network; give the experts.json beside it, with --image")
        if path.suffix == ".json" and (len(arguments.checkpoint) > 1 or not arguments.image):
            parser.error(f"{path}: a json is exported experts, which are for --image alone")
        of_data = ("variant", "dataset", "data", "json", "images", "labels", "list", "limit", "eval_batch")
        for flag in (*of_data, "predictions", "published", "format"):
            if path.suffix == ".json" and getattr(arguments, flag):
                parser.error(f"--{flag}: does not go with exported experts")


# ============ one pass over a split ============


@dataclass
class SegmentationResult:
    """What one pass over an evaluation set gave, the same on every process."""

    confusion: Tensor  # [classes, classes] int64 pixels, rows: truth, columns: prediction
    A: Tensor  # [N, D] what is clustered of each image, in the order of the data set
    flops: dict[str, Tensor]  # per count: [N] real multiply-adds of each image
    sizes: Tensor  # [N, 2] int64: height and width at which each image was run

    def iou(self) -> Tensor:
        """[classes] intersection over union in 0..1; nan for a class neither in the truth nor predicted."""
        hits = self.confusion.diag().double()
        return hits / (self.confusion.sum(0) + self.confusion.sum(1) - hits)

    def miou(self) -> float:
        return self.iou().nanmean().item()

    def scores(self) -> dict:
        """mIoU and IoU by class on 0..1, None for a class that does not occur."""
        iou = [None if math.isnan(value) else value for value in self.iou().tolist()]
        miou = self.miou()
        return {"miou": None if math.isnan(miou) else miou, "iou": iou}


@torch.no_grad()
def evaluate_segmentation(
    model, loader, num_classes: int, process: Process, gate_space: str = "alpha", save=None
) -> SegmentationResult:
    """Runs `model` over `loader` (this process's share) and gathers over processes; each image counts once.

    gate_space: what `SegmentationResult.A` holds, see `Routes.activations`. save: called with (index,
    prediction uint8 [H, W]) for every image.
    """
    network = fuse(copy.deepcopy(model).eval())
    # One more bin, for the pixels that are not labelled.
    confusion = torch.zeros(num_classes**2 + 1, dtype=torch.int64, device=process.device)
    rows = []  # per batch: indices, A, and the cost by count
    for images, masks, index in tqdm(loader, "evaluating", disable=process.rank > 0, leave=False):
        images, masks = images.to(process.device), masks.to(process.device)
        out = network(data.normalize(images))
        prediction = out.logits.argmax(1)
        pairs = torch.where(masks == data.IGNORE, num_classes**2, masks.long() * num_classes + prediction)
        confusion += torch.bincount(pairs.flatten(), minlength=num_classes**2 + 1)
        cost = {}
        for count in model.counts:
            parts = model.real_cost(out.routes, *images.shape[-2:], count)
            cost[count] = sum(parts.values()).expand(len(index))
        size = torch.tensor(images.shape[-2:]).expand(len(index), 2)
        rows.append((index, out.routes.activations(gate_space).cpu(), cost, size))
        if save:
            for i, labels in zip(index.tolist(), prediction.to(torch.uint8)):
                save(i, labels)
    if process.world > 1:
        dist.all_reduce(confusion)
    indices, A, costs, sizes = zip(*gather_rows(rows, process))
    order = torch.cat(indices).argsort()
    flops = {count: torch.cat([cost[count] for cost in costs])[order] for count in model.counts}
    confusion = confusion[:-1].view(num_classes, num_classes).cpu()
    return SegmentationResult(confusion, torch.cat(A)[order], flops, torch.cat(sizes)[order])


@dataclass
class DetectionResult:
    """What one pass over an evaluation set gave, the same on every process."""

    detections: list[dict]  # in COCO's results format
    A: Tensor  # [N, D] what is clustered of each image, in the order of the data set
    flops: dict[str, Tensor]  # per count: [N] real multiply-adds of each image's backbone
    sizes: Tensor  # [N, 2] int64: height and width at which each image was run

    def scores(self, dataset, masks: bool) -> dict[str, dict[str, float]]:
        """pycocotools' numbers on 0..1, of boxes and, with `masks`, of masks."""
        kinds = {"box": "bbox"} | ({"mask": "segm"} if masks else {})
        return {name: average_precision(dataset, self.detections, kind)[0] for name, kind in kinds.items()}


@torch.no_grad()
def evaluate_detection(
    model, loader, dataset, process: Process, gate_space: str = "alpha"
) -> DetectionResult:
    """Runs `model` over `loader` (this process's share) and gathers over processes; each image counts once.

    The backbone's cost is counted at the size to which each image was resized, and at 800x800 for the papers'
    tables. gate_space: what `DetectionResult.A` holds, see `Routes.activations`.
    """
    network = fuse(copy.deepcopy(model).eval())
    rows = []  # per image: index, detections, A, cost of the backbone by count
    for images, _, index in tqdm(loader, "evaluating", disable=process.rank > 0, leave=False):
        out = network([data.as_float(image.to(process.device)) for image in images])
        A = out.routes.activations(gate_space).cpu()
        for b, i in enumerate(index.tolist()):
            routes = out.routes.of_image(b)
            sizes = {count: (*out.sizes[b], count) for count in model.counts}
            sizes["paper at 800x800"] = (800, 800, "paper")
            cost = {name: sum(model.real_cost(routes, *size).values()).item() for name, size in sizes.items()}
            rows.append((i, coco_results(dataset, i, out.detections[b]), A[b], cost, out.sizes[b]))
    rows = sorted(gather_rows(rows, process), key=lambda row: row[0])
    _, detections, A, costs, sizes = zip(*rows)
    flops = {name: torch.tensor([cost[name] for cost in costs]) for name in costs[0]}
    detections = [found for image in detections for found in image]
    return DetectionResult(detections, torch.stack(A), flops, torch.tensor(sizes))


def gather_rows(rows: list, process: Process) -> list:
    """The rows of all processes."""
    if process.world == 1:
        return rows
    shares = [None] * process.world
    dist.all_gather_object(shares, rows)
    return [row for share in shares for row in share]


def coco_results(dataset, index: int, found: dict[str, Tensor]) -> list[dict]:
    """What the detector found in image `index`, boxes x1 y1 x2 y2 and masks [n, 1, H, W] on 0..1, in COCO's
    results format: boxes x y width height, the file's category ids, masks run-length encoded."""
    boxes, scores, labels = (found[key].cpu() for key in ("boxes", "scores", "labels"))
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
    results = []
    for box, score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist()):
        category = dataset.category_ids[label - 1]
        results.append(dict(image_id=dataset.image_ids[index], category_id=category, bbox=box, score=score))
    if "masks" in found and results:
        from pycocotools import mask as rle

        masks = (found["masks"][:, 0] > 0.5).to(torch.uint8).cpu().permute(1, 2, 0).numpy()
        for result, code in zip(results, rle.encode(np.asfortranarray(masks))):
            result["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
    return results


def average_precision(dataset, detections: list[dict], kind: str) -> tuple[dict[str, float], str]:
    """pycocotools' own evaluation of COCO results on the whole data set -> its twelve numbers, its table.

    kind: "bbox" or "segm". The numbers are on 0..1; -1 where there is nothing to measure.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    names = ["AP", "AP50", "AP75", "AP small", "AP medium", "AP large"]
    names += ["AR 1", "AR 10", "AR 100", "AR small", "AR medium", "AR large"]
    table = io.StringIO()
    row_of = dict(zip(dataset.image_ids, dataset.rows))
    label_of = {category: label for label, category in enumerate(dataset.category_ids, 1)}
    renumbered = []
    for found in detections:
        # With boxes beside the masks it would take the boxes' areas for the sizes.
        found = {key: value for key, value in found.items() if key != "bbox" or kind == "bbox"}
        found["image_id"], found["category_id"] = row_of[found["image_id"]], label_of[found["category_id"]]
        renumbered.append(found)
    with contextlib.redirect_stdout(io.StringIO()):
        if renumbered:
            results = dataset.coco.loadRes(renumbered)
        else:
            results = COCO()
            results.dataset = dataset.coco.dataset | {"annotations": []}
            results.createIndex()
        evaluator = COCOeval(dataset.coco, results, kind)
        evaluator.params.imgIds = dataset.rows
        evaluator.evaluate()
        evaluator.accumulate()
    with contextlib.redirect_stdout(table):
        evaluator.summarize()
    return dict(zip(names, evaluator.stats.tolist())), table.getvalue()


# ============ a checkpoint and its data ============


def open_checkpoint(arguments: argparse.Namespace, path: Path, process: Process):
    """-> the model, and what the file holds, with its "path" and its "clusters" (None where it has none)."""
    if arguments.variant:
        model, checkpoint = open_published(arguments, path, process)
    else:
        model, checkpoint = load_checkpoint(path, process.device)
    needed = {"task", "dataset", "data", "data_options", "classes", "palette", "config", "bank"}
    if not needed <= checkpoint.keys() or "clusters" not in checkpoint["bank"]:
        wanted = "give a file of this version's train_seg.py or train_det.py"
        raise InputError(f"{path}: no whole checkpoint; {wanted}")
    for flag in ("predictions", "labels", "list") if checkpoint["task"] == "detection" else ("json", "limit"):
        if getattr(arguments, flag):
            raise InputError(f"--{flag}: does not apply to {path}, a checkpoint for {checkpoint['task']}")
    clusters = checkpoint["bank"]["clusters"]
    return model, checkpoint | {"path": path, "clusters": clusters and Clusters(**clusters)}


def open_published(arguments: argparse.Namespace, path: Path, process: Process):
    """The model of a checkpoint of Dynamic Routing's authors, and what our own would say about it."""
    model, checkpoint = load_published(path, arguments.variant, process.device)
    info = data.SEGMENTATION.get(arguments.dataset, data.SEGMENTATION["cityscapes"])
    classes = checkpoint["model_args"]["num_classes"]
    if classes != len(info.classes):
        needed = f"{info.name} has {len(info.classes)}; give its --dataset"
        raise InputError(f"{path}: has {classes} classes, {needed}")
    about = dict(
        task="segmentation", dataset=info.name, data=None, data_options={}, classes=list(info.classes),
        palette=info.palette, config={"k": 4}, bank={"clusters": None})
    return model, checkpoint | about


def open_split(arguments: argparse.Namespace, checkpoint: dict, split: str | None = None):
    """The data set to evaluate on, by the flags and, where they are silent, as in training.

    split: another one than --split, of the same data.
    """
    if split not in (None, arguments.split):
        own = dict.fromkeys(("images", "labels", "list", "json"))
        arguments = argparse.Namespace(**vars(arguments) | own | {"split": split})
    name = arguments.dataset or checkpoint["dataset"]
    same = name == checkpoint["dataset"]
    root = arguments.data or (checkpoint["data"] if same else None)
    options = dict(checkpoint["data_options"]) if same else {}
    if same and name == "shapes" and "hard" in checkpoint["config"]:
        raise InputError(f"{checkpoint['path']}: trained on shapes of an earlier version; train it anew")
    trained_on = checkpoint.get("files", {}) if same and not arguments.data else {}
    trained_on = trained_on.get(arguments.split, {})
    if checkpoint["task"] == "segmentation":
        info = checkpoint.get("info") if same else None
        info = info and data.DatasetInfo(**info)
        own = {"images": arguments.images, "labels": arguments.labels, "names": arguments.list}
        files = own if arguments.images else trained_on
        if arguments.images and not arguments.labels:
            raise InputError(f"--images {arguments.images}: needs --labels, the folder of their label PNGs")
        if name == "folder" and not root and not files:
            words = "this run knows no such files; name them with --images and --labels"
            raise InputError(f"--split {arguments.split}: {words}")
        dataset = data.segmentation_dataset(
            name, root, arguments.split, train=False, info=info, **files, **options)
    else:
        options["annotations"] = arguments.json or trained_on.get("annotations")
        options["images"] = arguments.images or trained_on.get("images")
        if arguments.limit or arguments.json or arguments.data:
            options["limit"] = arguments.limit
        options["masks"] = checkpoint["model_args"]["masks"]
        dataset = data.detection_dataset(name, root, arguments.split, train=False, **options)
    check_table(arguments, checkpoint, dataset)
    classes = list(dataset.info.classes if checkpoint["task"] == "segmentation" else dataset.classes)
    if classes != checkpoint["classes"]:
        theirs = f"{len(checkpoint['classes'])} of {checkpoint['path']}, trained on {checkpoint['dataset']}"
        first, *_ = sorted(set(classes) ^ set(checkpoint["classes"])) or ["their order"]
        raise InputError(f"--dataset {name}: its {len(classes)} classes are not the {theirs}; see {first}")
    return dataset


def check_table(arguments: argparse.Namespace, checkpoint: dict, dataset) -> None:
    """Raises InputError where the folder's table of classes is another than that of training."""
    if checkpoint["task"] != "segmentation" or dataset.info.root or not checkpoint.get("info"):
        return
    of_training = checkpoint["config"].get("classes")
    usual = os.path.join(arguments.data or checkpoint["data"] or "", "classes.csv")
    table = of_training if of_training and not arguments.data else usual
    if os.path.exists(table):
        now = data.read_classes(table)
        if (now.label_ids, now.classes) != (dataset.info.label_ids, dataset.info.classes):
            raise InputError(f"{table}: other classes than {checkpoint['path']} was trained on; restore them")


# ============ what a split gave ============


@dataclass
class SplitResult:
    """A split, evaluated: what both tasks have in common for the report."""

    A: Tensor  # [N, D]
    flops: dict[str, Tensor]  # per count: [N] real multiply-adds of each image
    size: tuple[int, int]  # height and width at which the first image was run
    metrics: dict  # the task's own scores
    table: str  # the same, as text
    detections: list[dict] | None = None  # in COCO's results format, where they were computed now


def measure(arguments, model, checkpoint: dict, dataset, process: Process):
    """What `dataset` gives, and a function for `keep` that saves it; None where it had been kept.

    What is kept counts for the same files, unchanged, and the same flags; only one process alone takes it.
    """
    kept_in = kept_name(arguments, checkpoint["path"])
    names = ("variant", "dataset", "data", "json", "images", "labels", "list", "limit", "eval_batch")
    origin = {name: getattr(arguments, name) for name in names}
    for file in filter(None, [checkpoint["path"], arguments.json]):
        origin[str(file)] = os.stat(file).st_size, os.stat(file).st_mtime_ns
    origin = json.dumps(origin)
    wanted = (arguments.table or arguments.figures) and not arguments.predictions
    for folder in (arguments.folders[checkpoint["path"]], checkpoint["path"].parent):
        if wanted and process.world == 1 and (folder / kept_in).is_file():
            try:
                kept = read_file(folder / kept_in, "what an evaluation kept")
                if kept.get("origin") == origin:
                    return SplitResult(**kept["result"]), None
            except (InputError, KeyError, TypeError) as error:
                print(f"{error}; it is computed anew", file=sys.stderr)
    score = {"segmentation": score_segmentation, "detection": score_detection}[checkpoint["task"]]
    result = score(arguments, model, checkpoint, dataset, process)
    contents = {"origin": origin, "result": vars(result) | {"detections": None}}
    return result, lambda file: torch.save(contents, file)


def kept_name(arguments: argparse.Namespace, checkpoint: Path) -> str:
    return f"{checkpoint.stem}.{arguments.split}.activations"


def told_apart(name: str, checkpoint: Path, split: str) -> str:
    """The name of a file, with checkpoint and split in it where these are not last.pt and val."""
    stem, ending = name.split(".")
    told = [part for part in (checkpoint.stem, split) if part not in ("last", "val")]
    return "-".join([stem, *told]) + "." + ending


UNWRITTEN: list[Path] = []  # by this command, in this process


def keep(path: Path, write, say: bool = True) -> bool:
    """Writes a file as `write_file` does, and where it cannot says so: what was computed is worth more."""
    try:
        with contextlib.suppress(OSError):  # the file's own error names the file
            path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, write)
        return True
    except InputError as error:
        if say:
            print(error, file=sys.stderr)
        UNWRITTEN.append(path)
        return False


def as_json(content, indent: int | None = None) -> str:
    """json, in which what is not finite is null."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    try:
        return json.dumps(content, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(plain(content), indent=indent)


def json_writer(content, indent: int | None = None):
    """A function for `keep`."""
    return lambda file: file.write((as_json(content, indent) + "\n").encode())


def gate_space(checkpoint: dict) -> str:
    return checkpoint["config"].get("gate_space", "alpha")


def as_alpha(A: Tensor, checkpoint: dict) -> Tensor:
    """What was clustered -> alpha: the same unless gates were clustered before their non-linearity."""
    return F.relu(torch.tanh(A)) if gate_space(checkpoint) == "logit" else A


def score_segmentation(arguments, model, checkpoint: dict, dataset, process: Process) -> SplitResult:
    classes, split = checkpoint["classes"], arguments.split
    batch = arguments.eval_batch or dataset.eval_batch
    loader = data.pass_loader(dataset, batch, arguments.workers, process.rank, process.world)
    save = None
    if arguments.predictions:
        check_overwriting(arguments.predictions, dataset, checkpoint.get("files", {}))
        save = prediction_writer(arguments.predictions, dataset)
    result = evaluate_segmentation(model, loader, len(classes), process, gate_space(checkpoint), save)
    miou = 100 * result.miou() if result.confusion.any() else None  # a test split may have no labels
    width = max(map(len, classes)) + 2
    iou, lines = {}, [f"{'class':{width}}{f'IoU % {split}':>12}"]
    for name, value in zip(classes, result.scores()["iou"]):
        iou[name] = None if value is None else 100 * value
        lines.append(f"{name:{width}}{'absent' if value is None else f'{100 * value:.2f}':>12}")
    mean = "no labels" if miou is None else f"{miou:.2f}"
    lines.append(f"{'mean':{width}}{mean:>12}   over {len(result.A)} images")
    size = tuple(dataset[0][0].shape[-2:])
    return SplitResult(result.A, result.flops, size, {"miou": miou, "iou": iou}, "\n".join(lines))


def score_detection(arguments, model, checkpoint: dict, dataset, process: Process) -> SplitResult:
    batch = arguments.eval_batch or checkpoint["config"]["eval_batch"]
    loader = data.pass_loader(dataset, batch, arguments.workers, process.rank, process.world)
    result = evaluate_detection(model, loader, dataset, process, gate_space(checkpoint))
    metrics, tables = {"detections": len(result.detections)}, []
    for name, kind in (("box", "bbox"), ("mask", "segm"))[: 1 + checkpoint["model_args"]["masks"]]:
        metrics[name], table = None, "no labels\n"  # a test split has none
        if dataset.has_truth and process.rank == 0:
            scores, table = average_precision(dataset, result.detections, kind)
            metrics[name] = {key: 100 * value if value >= 0 else None for key, value in scores.items()}
        tables.append(f"{name}, {arguments.split}, by pycocotools, over {len(result.A)} images\n{table}")
    size = model.prepare([data.as_float(dataset[0][0]).to(process.device)])[0].image_sizes[0]
    table = "\n".join(tables)
    return SplitResult(result.A, result.flops, tuple(size), metrics, table, result.detections)


def check_overwriting(folder: Path, dataset, files: dict) -> None:
    """Raises InputError where predictions would lie among the images and labels of any split.

    files: by split, the folders that the run names.
    """
    own = [path for of_split in files.values() for path in of_split.values() if path]
    data_lie_in = [Path(path).resolve() for path in (*getattr(dataset, "folders", ()), *own)]
    written_to = {prediction_path(folder, dataset, index).parent for index in range(len(dataset))}
    for place in written_to:
        if any(place.resolve().is_relative_to(path) for path in data_lie_in):
            raise InputError(f"--predictions {folder}: the data set's own files lie there; name another")


def prediction_path(folder: Path, dataset, index: int) -> Path:
    return (folder / dataset.image_name(index)).with_suffix(".png")


def prediction_writer(folder: Path, dataset):
    """-> save(index, prediction uint8 [H, W]): a PNG of label ids under the image's own name."""
    label_of_class = torch.arange(256, dtype=torch.uint8)
    for label, class_id in dataset.info.label_ids.items():
        if class_id != data.IGNORE:
            label_of_class[class_id] = label

    def save(index: int, prediction: Tensor) -> None:
        path = prediction_path(folder, dataset, index)
        picture = Image.fromarray(label_of_class[prediction.cpu().long()].numpy())
        keep(path, lambda file: picture.save(file, "png"), say=not UNWRITTEN)  # one line for all

    return save


# ============ the report of one checkpoint ============


@dataclass
class RunResult:
    """A checkpoint and what a split gave: what tables and figures are made of."""

    name: str  # of the run
    checkpoint: dict  # its contents but for weights and the like
    result: SplitResult  # of experts that are cut out, what their task's evaluation gave
    grid: list[tuple[int, int, list[int]]]  # per node of A(x): layer, scale, paths; [] if static
    clusters: Clusters | None
    metrics: dict  # what metrics.json says

    @property
    def variant(self) -> str:
        return self.checkpoint["model_args"]["variant"]

    @property
    def task(self) -> str:
        return self.checkpoint["task"]

    @property
    def gate(self) -> str | None:
        """"full" or "small"; None of a static network."""
        return self.checkpoint["model_args"].get("gate")

    @property
    def alpha(self) -> Tensor:
        """[N, D] gate activations on 0..1, whatever was clustered."""
        return as_alpha(self.result.A, self.checkpoint)

    @property
    def labels(self) -> Tensor:
        """[N] the expert that takes each image."""
        return self.clusters.nearest(self.result.A)[0]

    @property
    def facts(self) -> dict:
        """The settings by which runs can differ; of data that lie in a folder, its path is one of them."""
        config = self.checkpoint["config"] | {"variant": self.variant, "data": None}
        if self.metrics["dataset"] == "folder" and self.checkpoint["config"].get("data"):
            config["data"] = os.path.abspath(self.checkpoint["config"]["data"])
        return {name: value for name, value in config.items() if value is not None}

    @property
    def flops(self) -> Tensor:
        """[N] multiply-adds of a routed network on each image at its own size, paper count."""
        return self.result.flops["paper"]

    @property
    def numbers(self) -> dict[str, float]:
        """What tables and figures show, by column."""
        return numbers_of(self.metrics)


def evaluate_checkpoint(arguments, path: Path, process: Process) -> RunResult:
    """Evaluates on a split; the first process reports, and then writes files."""
    model, checkpoint = open_checkpoint(arguments, path, process)
    dataset = open_split(arguments, checkpoint)
    result, save_result = measure(arguments, model, checkpoint, dataset, process)
    clusters = checkpoint["clusters"]
    if model.dim:
        clusters = clusters_of(checkpoint, result.A, arguments.split if process.rank == 0 else None)
    run = describe_run(arguments, checkpoint, model, result, clusters)
    run.metrics |= result.metrics
    run.metrics["gflops"] = {count: spread(flops) for count, flops in result.flops.items()}
    if clusters is not None:
        run.metrics |= describe_experts(result.A, run.flops, clusters.centers, run.labels)
        if dataset.subset is not None:
            run.metrics["subsets"] = recovery(model, dataset, run)
    if process.rank > 0:
        return run
    if arguments.table:
        scores = ", ".join(f"{column} {value:.4g}" for column, value in run.numbers.items())
        print(f"{path}: {scores}", file=sys.stderr)
    trouble = None
    try:
        if not arguments.table:
            print_report(run)
            sys.stdout.flush()
    except OSError as error:  # nobody reads on; the files still tell
        trouble = error
    folder, found = arguments.folders[path], result.detections
    result.detections = None  # of many checkpoints they would take a lot of memory
    files = {}  # name: a function for `keep`
    if found is not None:
        files["detections.json"] = json_writer(found)
    files["metrics.json"] = json_writer(run.metrics, indent=2)
    if clusters is not None and not arguments.table:
        viewer = Viewer(model, checkpoint, dataset, process, arguments.min_score)
        experts = functools.partial(draw_experts, run, [run], viewer)  # after the other files
        files["experts.png"] = lambda file: write_figure(experts(), file, "png", dpi=130)
    if save_result:
        keep(folder / kept_name(arguments, path), save_result)
    written = [arguments.predictions] if arguments.predictions else []
    for name, write in files.items():
        target = folder / told_apart(name, path, arguments.split)
        if keep(target, write):
            written.append(target)
    if trouble:
        raise trouble
    if written and not arguments.table:
        print("\n" + "\n".join(f"wrote {target}" for target in written))
    return run


def clusters_of(checkpoint: dict, A: Tensor, split: str | None) -> Clusters:
    """The clusters of a checkpoint or, where it has none, of A [N, D]; then a `split` is named on stderr."""
    if checkpoint["clusters"] is not None:
        return checkpoint["clusters"]
    if split:
        print(f"{checkpoint['path']}: has no centres: clustering {split} instead", file=sys.stderr)
    k = min(checkpoint["config"]["k"], len(A))
    centers, labels, _ = kmeans(A, k)
    return Clusters(centers, labels, 0.0, labels.bincount(minlength=k).tolist())


def describe_run(arguments, checkpoint: dict, model, result, clusters: Clusters | None) -> RunResult:
    """A run, without its scores."""
    path = checkpoint["path"]
    wanted = ("path", "task", "dataset", "data", "model_args", "config", "classes", "palette", "iteration")
    about = {key: checkpoint[key] for key in wanted}
    run = RunResult(name_of_run(path), about, result, grid_of(model), clusters, {})
    run.metrics = {
        "checkpoint": str(path), "variant": run.variant, "split": arguments.split,
        "dataset": arguments.dataset or checkpoint["dataset"], "iteration": checkpoint["iteration"],
        "images": len(result.A),
    }
    return run


def name_of_run(checkpoint: Path) -> str:
    return checkpoint.resolve().parent.name + ("" if checkpoint.stem == "last" else f"-{checkpoint.stem}")


def output_folders(arguments: argparse.Namespace, into: Path | None) -> dict[Path, Path]:
    """Where files go, by checkpoint: beside it, or in the folder `into`, with one in it for each of several.
    """
    folders = {}
    for path in arguments.checkpoint:
        folder = into or path.parent
        if into and len(arguments.checkpoint) > 1:
            names = (name_of_run(path) + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
            folder = next(f for f in map(into.joinpath, names) if f not in folders.values())
        folders[path] = folder
    return folders


def spread(flops: Tensor) -> dict[str, float]:
    """Multiply-adds [N] -> mean, min and max in G."""
    values = flops.double() / 1e9
    return {"mean": values.mean().item(), "min": values.min().item(), "max": values.max().item()}


def mean_gflops(flops: Tensor) -> float | None:
    return flops.double().mean().item() / 1e9 if len(flops) else None


def describe_experts(A: Tensor, flops: Tensor, centers: Tensor, labels: Tensor) -> dict:
    """A: [N, D]; flops: [N], paper count; centers: [K, D]; labels: [N]. Distances are in the units of A."""
    inter, intra = inter_intra(A, labels, centers)
    experts = range(len(centers))
    return {
        "k": len(centers), "inter": inter, "intra": intra,
        "intra_to_centre": intra_to_centre(A, labels, centers),
        "images_per_expert": [int((labels == k).sum()) for k in experts],
        "gflops_per_expert": [mean_gflops(flops[labels == k]) for k in experts],
    }


def recovery(model, dataset, run: RunResult) -> dict:
    """How well the experts recover the subsets that are known, and what each subset's images run.

    Per subset: GFLOPs (paper count), and by stride the G multiply-adds of the cells and paths that ran.
    """
    backbone, truth = model.backbone, dataset.subset
    accuracy, rand, table, match = agreement(run.labels, truth)
    table = F.pad(table, (0, len(run.clusters.centers) - table.shape[1]))
    costs = backbone.costs(*run.result.size)
    opened = run.alpha.view(len(truth), -1, 3) > OPEN  # [N, nodes, 3]
    spent = opened.any(-1) * costs.cell[1:] + (opened * costs.path[1:]).sum(-1)  # [N, nodes]
    scale = torch.tensor([s for _, s, _ in run.grid])
    subsets = {}
    for s, name in enumerate(dataset.subset_names):
        mine = truth == s
        if not mine.any():  # among so few images
            continue
        by_stride = {}
        for level in range(int(scale.max()) + 1):
            by_stride[4 * 2**level] = mean_gflops(spent[mine][:, scale == level].sum(1))
        subsets[name] = {
            "images": int(mine.sum()), "experts": table[s].tolist(), "matched": match[s],
            "gflops": mean_gflops(run.flops[mine]), "gflops_by_stride": by_stride,
        }
    return {"accuracy": 100 * accuracy, "adjusted_rand": rand, "subset": subsets}


def digits(values) -> int:
    """Digits after the point that show three digits of the smallest of some numbers."""
    smallest = min((abs(value) for value in values if value), default=1)
    return max(1, 2 - math.floor(math.log10(smallest)))


def print_report(run: RunResult) -> None:
    """Scores, cost, experts and, where they are known, recovered subsets."""
    metrics = run.metrics
    heading = ("checkpoint", "variant", "dataset", "split", "iteration")
    print(", ".join(f"{key} {metrics[key]}" for key in heading))
    print(f"\n{run.result.table}\n\n{'GFLOPs per image':20}{'mean':>10}{'min':>10}{'max':>10}")
    for count, values in metrics["gflops"].items():
        places = digits(values.values())
        print(f"{count:20}" + "".join(f"{value:10.{places}f}" for value in values.values()))
    if "k" not in metrics:
        return
    inter, intra, sizes = metrics["inter"], metrics["intra"], metrics["images_per_expert"]
    within = f"intra {intra:.3f} (pairs in a cluster), {metrics['intra_to_centre']:.3f} (to its centre)"
    print(f"\ninter {inter:.3f} (between the {metrics['k']} centres), {within}")
    print(f"{'expert':8}{'images':>8}{'share':>8}{'GFLOPs':>10}")
    places = digits(metrics["gflops_per_expert"])
    for k, (size, gflops) in enumerate(zip(sizes, metrics["gflops_per_expert"])):
        cost = "-" if gflops is None else f"{gflops:.{places}f}"
        print(f"{k:<8}{size:8d}{100 * size / metrics['images']:7.1f}%{cost:>10}")
    empty, collapse = sizes.count(0), describe_collapse(sizes, inter, intra)
    if empty:
        print(f"{empty} of {len(sizes)} experts get none of these {metrics['images']} images")
    elif collapse:
        print(collapse)
    if "subsets" in metrics:
        print_recovery(metrics["subsets"])


def print_recovery(recovered: dict) -> None:
    subsets = recovered["subset"]
    first = next(iter(subsets.values()))
    rand = f"adjusted Rand index {recovered['adjusted_rand']:.4f}"
    print(f"\nrecovered subsets: {recovered['accuracy']:.2f} % of images, one expert matched to each; {rand}")
    header = "".join(f"{f'expert {k}':>10}" for k in range(len(first["experts"])))
    strides = " ".join(f"{stride:>8}" for stride in first["gflops_by_stride"])
    print(f"{'subset':8}{header}{'GFLOPs':>10}   of them in cells and paths at stride {strides}")
    for name, row in subsets.items():
        counts = [f"{n}{'*' if k == row['matched'] else ' '}" for k, n in enumerate(row["experts"])]
        spent = " ".join(f"{gflops:8.3g}" for gflops in row["gflops_by_stride"].values())
        print(f"{name:8}" + "".join(f"{n:>10}" for n in counts) + f"{row['gflops']:10.3g}{'':39}{spent}")
    print("* matched to the subset")


# ============ experts cut out as static networks ============

COMMON = "one-for-all"
SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7)  # of --keep, where its figure has points
TIMED = 20  # images whose seconds are measured


@dataclass
class Score:
    """What networks gave that share a split: each image goes to one of them."""

    scores: dict[str, float]  # in %, by column
    flops: dict[str, Tensor]  # per count: [N] multiply-adds of each image
    sizes: Tensor  # [N, 2] int64: height and width at which each was run


@dataclass
class CutRun:
    """A run whose experts were cut out, and what they gave."""

    run: RunResult
    sizes: Tensor  # [N, 2] height and width at which each image was run
    routes: dict[str, Tensor]  # by name, expert-0 and so on, and one-for-all: bool [1 + nodes, 3]
    rows: dict[str, dict[str, float]]  # by network: the columns of the table
    experts: list[dict]  # of each: how many images, open paths, parameters, GFLOPs
    sweep: dict[str, list[dict]]  # scores and GFLOPs over SHARES; {} without --figures


class Bench:
    """A split to run networks on: on all of its images, or on those that go to an expert."""

    def __init__(self, arguments, checkpoint: dict, dataset, process: Process):
        self.arguments, self.checkpoint = arguments, checkpoint
        self.dataset, self.process = dataset, process
        self.segmentation = checkpoint["task"] == "segmentation"
        self.known: dict[bytes, Score] = {}  # by routes and images: cuts at other shares repeat them

    def loader(self, only: list[int] | None = None):
        usual = self.dataset.eval_batch if self.segmentation else 1  # the gates of a detector see padding
        batch = self.arguments.eval_batch or usual
        return data.pass_loader(self.dataset, batch, self.arguments.workers, only=only)

    def prepare(self, images):
        """A batch as the model takes it."""
        if self.segmentation:
            return data.normalize(images.to(self.process.device))
        return [data.as_float(image.to(self.process.device)) for image in images]

    @torch.no_grad()
    def look(self, model) -> tuple[Tensor, Tensor, Tensor]:
        """A pass without the head. Returns, per image: the open paths, bool [N, 1 + nodes, 3]; what is
        clustered, [N, D]; the mean of the stem's map, [N, C]."""
        network, opened, A, pooled = fuse(copy.deepcopy(model).eval()), [], [], []

        def pool(module, inputs, out):
            pooled.append(out.mean((2, 3)).cpu())

        network.backbone.stem.register_forward_hook(pool)
        for images, _, _ in tqdm(self.loader(), "looking at routes", leave=False):
            routes = network.routes(self.prepare(images))
            opened.append((routes.alpha > OPEN).cpu())
            A.append(routes.activations(gate_space(self.checkpoint)).cpu())
        return torch.cat(opened), torch.cat(A), torch.cat(pooled)

    @torch.no_grad()
    def dispatch(self, model, dispatcher: Dispatcher) -> Tensor:
        """[N] the expert that the dispatcher sends each image to."""
        dispatcher, sent = fuse(copy.deepcopy(dispatcher)), []
        for images, _, _ in tqdm(self.loader(), "dispatching", leave=False):
            sent.append(dispatcher(as_batch(model, self.prepare(images))).argmax(1).cpu())
        return torch.cat(sent)

    def evaluate(self, model, only: Tensor | None = None):
        """A pass of evaluation over the images whose indices are `only` [n], or over all."""
        loader, space = self.loader(None if only is None else only.tolist()), gate_space(self.checkpoint)
        if self.segmentation:
            return evaluate_segmentation(model, loader, len(self.checkpoint["classes"]), self.process, space)
        return evaluate_detection(model, loader, self.dataset, self.process, space)

    def evaluate_sent(self, networks: list, sent: Tensor) -> Score:
        """Each image by the network that `sent` [N] names."""
        routes = torch.stack([network.backbone.route for network in networks]).cpu()
        key = routes.numpy().tobytes() + sent.numpy().tobytes()
        if key in self.known:
            return self.known[key]
        results, flops, sizes = [], {}, torch.zeros(len(sent), 2, dtype=torch.int64)
        for j, network in enumerate(networks):
            index = (sent == j).nonzero().flatten()
            if len(index) == 0:
                continue
            results.append(self.evaluate(network, index))
            sizes[index] = results[-1].sizes
            for count, values in results[-1].flops.items():
                flops.setdefault(count, torch.zeros(len(sent), dtype=torch.int64))[index] = values.cpu()
        self.known[key] = Score(self.score(results), flops, sizes)
        return self.known[key]

    def score(self, results: list) -> dict[str, float]:
        """Scores in % of passes over parts of the split that make up the whole; {} without labels."""
        if self.segmentation:
            confusion = sum(result.confusion for result in results)
            whole = dataclasses.replace(results[0], confusion=confusion)
            return {"mIoU": 100 * whole.miou()} if confusion.any() else {}
        if not self.dataset.has_truth:
            return {}
        found = [detection for result in results for detection in result.detections]
        whole = dataclasses.replace(results[0], detections=found)
        scores = whole.scores(self.dataset, self.checkpoint["model_args"]["masks"])
        return {f"{kind} AP": 100 * values["AP"] for kind, values in scores.items() if values["AP"] >= 0}

    @torch.no_grad()
    def seconds(self, calls: dict) -> dict[str, float]:
        """Median seconds of an image alone, by name: calls are functions of its index and the input."""
        times = {name: [] for name in calls}
        count = min(TIMED, len(self.dataset))
        chosen = [n * len(self.dataset) // count for n in range(count)]
        for i in [*chosen, *chosen]:  # once to warm up
            image = self.dataset[i][0]
            x = self.prepare(image[None] if self.segmentation else [image])
            for name, call in calls.items():
                wait_for(self.process.device)
                start = time.perf_counter()
                call(i, x)
                wait_for(self.process.device)
                times[name].append(time.perf_counter() - start)
        return {name: statistics.median(values[count:]) for name, values in times.items()}


def wait_for(device: torch.device) -> None:
    """Returns when a GPU has done its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def as_batch(model, images) -> Tensor:
    """What `Bench.prepare` gives, as the stem sees it: [B, 3, H, W], padded."""
    if isinstance(images, Tensor):
        return pad_to_stride(images, model.backbone.stride)
    return model.prepare(images)[0].tensors


def cut_routes(opened: Tensor, labels: Tensor, k: int, share: float) -> dict[str, Tensor]:
    """The routes by name. A path is in that of an expert if more than a share of its images open it, and in
    that of all if more than a share of all do.

    opened: bool [N, 1 + nodes, 3]; labels: [N] experts. An expert that has no image gets the route of all.
    """
    common = opened.double().mean(0) > share
    routes = {}
    for j in range(k):
        own = opened[labels == j]
        routes[f"expert-{j}"] = own.double().mean(0) > share if len(own) else common
    return routes | {COMMON: common}


def cut_experts(arguments: argparse.Namespace, path: Path, process: Process, task: str | None) -> CutRun:
    """Cuts the experts of a checkpoint out, scores them beside the routed network, and exports them.

    task: that of the checkpoints before it, which must be its own.
    """
    model, checkpoint = open_checkpoint(arguments, path, process)
    if task not in (None, checkpoint["task"]):
        raise InputError(f"--experts: {path} is of another task than the checkpoints before it")
    if not model.dim:
        raise InputError(f"--experts: {path} is a static network, which has no experts to cut out")
    size = export_size(arguments, model.backbone.stride)
    bench = Bench(arguments, checkpoint, open_split(arguments, checkpoint), process)
    source = Bench(arguments, checkpoint, open_split(arguments, checkpoint, arguments.cut_from), process)
    opened, A, pooled = source.look(model)
    clusters = clusters_of(checkpoint, A, arguments.cut_from)
    k, labels = len(clusters.centers), clusters.nearest(A)[0]
    routes = cut_routes(opened, labels, k, arguments.keep)
    fixed = {name: model.cut(route) for name, route in routes.items()}
    dispatcher = Dispatcher(model.backbone.stem, fit_dispatcher(pooled, labels, k)).to(process.device).eval()

    routed = bench.evaluate(model)
    run = describe_run(arguments, checkpoint, model, routed, clusters)
    rows = compare_networks(bench, run, model, fixed, dispatcher)
    experts = []
    for j in range(k):
        network = fixed[f"expert-{j}"]
        experts.append({
            "images": int((run.labels == j).sum()), "images it was cut from": int((labels == j).sum()),
            "open paths": int(routes[f"expert-{j}"].sum()), "parameters": count_parameters(network),
            "gflops": network_gflops(network, routed.sizes[0].tolist()),
            "gflops_at": routed.sizes[0].tolist(),
        })
    cut = CutRun(run, routed.sizes, routes, rows, experts, {})
    if arguments.figures:
        cut.sweep = sweep_shares(bench, run, model, opened, labels)
    print_cut(arguments, cut)
    write_experts(arguments, cut, fixed, dispatcher, size)
    return cut


def compare_networks(
    bench: Bench, run: RunResult, model, fixed: dict, dispatcher: Dispatcher
) -> dict[str, dict[str, float]]:
    """The rows of the table, by network: scores, mean GFLOPs by count, parameters, seconds.

    run: what the routed `model` gave; fixed: the networks cut out of it.
    """
    experts = [network for name, network in fixed.items() if name != COMMON]
    own, sent, routed = run.labels, bench.dispatch(model, dispatcher), run.result
    together = sum(map(count_parameters, experts))
    of_routed = Score(bench.score([routed]), routed.flops, routed.sizes)
    of_common = bench.evaluate_sent([fixed[COMMON]], torch.zeros_like(own))
    by_A, dispatched = bench.evaluate_sent(experts, own), bench.evaluate_sent(experts, sent)
    flops = {}  # the dispatcher runs the stem too
    for count, values in dispatched.flops.items():
        flops[count] = values + stem_cost(model, dispatched.sizes, count)
    dispatched = dataclasses.replace(dispatched, flops=flops)
    calls = timed_calls(model, fixed[COMMON], experts, dispatcher, own)
    seconds, last, rows = bench.seconds(calls), f"{len(experts)} experts, dispatched", {}
    for name, result, parameters, call in [
        ("routed network", of_routed, count_parameters(model), "routed"),
        (COMMON, of_common, count_parameters(fixed[COMMON]), COMMON),
        (f"{len(experts)} experts, by A(x)", by_A, together, "by A"),
        (last, dispatched, together + count_parameters(dispatcher), "sent"),
    ]:
        gflops = {f"GFLOPs {count}": mean_gflops(values) for count, values in result.flops.items()}
        rows[name] = result.scores | gflops | {"parameters M": parameters / 1e6, "s/image": seconds[call]}
    rows[last]["as A(x) %"] = 100 * (sent == own).double().mean().item()
    return rows


def timed_calls(model, common, experts: list, dispatcher: Dispatcher, own: Tensor) -> dict:
    """For `Bench.seconds`: the four networks of the table, with batch norm folded."""
    model, common, dispatcher = (fuse(copy.deepcopy(net).eval()) for net in (model, common, dispatcher))
    experts = [fuse(copy.deepcopy(expert).eval()) for expert in experts]

    def send(i, x):
        return experts[dispatcher(as_batch(model, x)).argmax(1).item()](x)

    return {
        "routed": lambda i, x: model(x), COMMON: lambda i, x: common(x),
        "by A": lambda i, x: experts[own[i]](x), "sent": send,
    }


def count_parameters(network) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def stem_cost(model, sizes: Tensor, count: str) -> Tensor:
    """[N] multiply-adds of the stem on images of these sizes [N, 2]."""
    kind, *fixed_size = count.split(" at ")  # of detectors, also "paper at 800x800"
    at = [[800, 800]] * len(sizes) if fixed_size else sizes.tolist()
    return torch.tensor([model.backbone.costs(*size, kind).stem for size in at])


def network_gflops(network, size: list[int]) -> dict[str, float]:
    """Of a static network, on an image of `size`, height and width, by count."""
    costs = {count: network.real_cost(None, *size, count) for count in network.counts}
    return {count: sum(parts.values()).item() / 1e9 for count, parts in costs.items()}


def sweep_shares(
    bench: Bench, run: RunResult, model, opened: Tensor, labels: Tensor
) -> dict[str, list[dict]]:
    """Scores and GFLOPs of the experts, by A(x), and of the one for all, cut at each of SHARES.

    opened, labels: of the images that the routes are cut from, as in `cut_routes`.
    """
    sweep = {"experts": [], COMMON: []}
    for share in SHARES:
        routes = cut_routes(opened, labels, len(run.clusters.centers), share)
        fixed = {name: model.cut(route) for name, route in routes.items()}
        common = bench.evaluate_sent([fixed.pop(COMMON)], torch.zeros_like(run.labels))
        experts = bench.evaluate_sent([*fixed.values()], run.labels)
        for name, result in (("experts", experts), (COMMON, common)):
            gflops = mean_gflops(result.flops[table_count(result.flops)])
            sweep[name].append({"keep": share, "GFLOPs": gflops, **result.scores})
    return sweep


def print_cut(arguments: argparse.Namespace, cut: CutRun) -> None:
    """What each expert is."""
    run, (height, width) = cut.run, cut.sizes[0].tolist()
    words = f"cut from {arguments.cut_from}; GFLOPs at {width}x{height}"
    lines = [f"{run.checkpoint['path']}: {run.variant}, {words}"]
    counts = list(cut.experts[0]["gflops"])
    titles = "".join(f"{f'GFLOPs {count}':>16}" for count in counts)
    lines.append(f"{'':14}{'cut from':>10}{arguments.split:>8}{'paths':>8}{'parameters':>12}{titles}")
    places = digits(value for expert in cut.experts for value in expert["gflops"].values())
    for j, expert in enumerate(cut.experts):
        gflops = "".join(f"{expert['gflops'][count]:16.{places}f}" for count in counts)
        numbers = f"{expert['images it was cut from']:10d}{expert['images']:8d}{expert['open paths']:8d}"
        words = "" if expert["images it was cut from"] else "   no image to cut it from: the route of all"
        lines.append(f"{f'expert {j}':14}{numbers}{expert['parameters']:12,d}{gflops}{words}")
    print("\n".join(lines) + "\n", file=sys.stderr if arguments.format else sys.stdout)


def cut_table(cuts: list[CutRun]) -> list[list[str]]:
    """Header and rows as text: for each setting its four networks, mean ± deviation over seeds."""
    by_run = {id(cut.run): cut for cut in cuts}
    rows = []  # the first two cells, and the numbers of each seed
    for setting in group_runs([cut.run for cut in cuts]):
        mine = [by_run[id(run)] for run in setting.runs]
        for name in mine[0].rows:
            rows.append((setting.label, name, [cut.rows[name] for cut in mine if name in cut.rows]))
    columns = list(dict.fromkeys(column for _, _, seeds in rows for row in seeds for column in row))
    table = [["Method", "Network", *columns, "Seeds"]]
    places = {}
    for column in columns:
        values = [row[column] for _, _, seeds in rows for row in seeds if column in row]
        places[column] = 2 if column in SCORES else digits(values)
    for label, name, seeds in rows:
        cells = []
        for column in columns:
            values = [row[column] for row in seeds if column in row]
            cells.append(f"{statistics.mean(values):.{places[column]}f}" if values else "–")
            if len(values) > 1:
                cells[-1] += f" ± {statistics.stdev(values):.{places[column]}f}"
        table.append([label, name, *cells, str(len(seeds))])
    return table


# ---- exported ----


def export_size(arguments: argparse.Namespace, stride: int) -> tuple[int, int] | None:
    """--export-size, checked."""
    size = arguments.export_size
    if size and (size[0] % stride or size[1] % stride):
        raise InputError(f"--export-size {size[0]} {size[1]}: both must be multiples of {stride}")
    return size and tuple(size)


def write_experts(
    arguments, cut: CutRun, fixed: dict, dispatcher: Dispatcher, size: tuple[int, int] | None
) -> None:
    """Writes NAME.pt2 of each network, and with --onnx NAME.onnx, and experts.json."""
    run, backbone = cut.run, fixed[COMMON].backbone
    folder, stride = arguments.expert_folders[run.checkpoint["path"]], backbone.stride
    # torch.export takes a size of 1 for a constant: the smallest map that a gate sees must have two rows.
    least = (8 if backbone.gate == "small" else 2) * stride
    padded = cut.sizes + -cut.sizes % stride
    if size is None and padded.min() < least and (padded == padded[0]).all():
        size = tuple(padded[0].tolist())
    networks = {name: Exportable(network) for name, network in fixed.items()} | {"dispatcher": dispatcher}
    outputs = {"dispatcher": ["scores"]}
    if run.task == "segmentation":
        outputs |= {name: ["logits"] for name in fixed}
    written, files = 0, set()
    for name, network in tqdm(networks.items(), "exporting", leave=False):
        network = fuse(copy.deepcopy(network).cpu().eval())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch.export about itself
            program, example = export_program(network, stride, least, size)
            written += keep(folder / f"{name}.pt2", lambda file: torch.export.save(program, file))
            files.add(f"{name}.pt2")
            if arguments.onnx:
                write = functools.partial(write_onnx, program, example, outputs.get(name))
                written += keep(folder / f"{name}.onnx", write)
                files.add(f"{name}.onnx")
    for old in folder.glob("*"):  # of another export: they would not go with these
        known = re.fullmatch(rf"(expert-\d+|{COMMON}|dispatcher)\.(pt2|onnx)", old.name)
        if known and old.name not in files and old.is_file():
            with contextlib.suppress(OSError):
                old.unlink()
    contents = {
        "task": run.task, "run": run.name, "variant": run.variant, "split": arguments.split,
        "keep": arguments.keep, "cut_from": arguments.cut_from,
        "layers": len(backbone.nodes_per_layer), "stride": stride, "least": least, "size": size,
        "normalization": {"mean": data.MEAN, "std": data.STD}, "classes": run.checkpoint["classes"],
        "palette": run.checkpoint["palette"], "experts": cut.experts, "table": cut.rows,
        "routes": {name: route.int().tolist() for name, route in cut.routes.items()},
        "centers": run.clusters.centers.tolist(), "over_keep": cut.sweep,
    }
    written += keep(folder / "experts.json", json_writer(contents))
    if run.task == "detection":
        words = "torchvision's heads are not exported: a file is the pyramid, from images to P2 ... P6"
        print(words, file=sys.stderr)
    sizes = f"and any height and width that are multiples of {stride}, at least {least}"
    if size:
        why = "as asked for" if arguments.export_size else f"for all images have it, and a side below {least}"
        sizes = f"of {size[1]}x{size[0]} pixels alone, {why}; --export-size takes another"
    print(f"wrote {written} files to {folder}, for any batch {sizes}", file=sys.stderr)


def export_program(network, stride: int, least: int, size: tuple[int, int] | None):
    """torch.export of a network for any batch, and for `size` or all multiples of `stride` from `least` on.

    Returns the program, for the CPU, and an example of its input.
    """
    batch = torch.export.Dim("batch", min=1, max=4096)
    shape, shapes = (2, 3, *(size or (least, least + stride))), {0: batch}
    if size is None:
        names = ("height", "width")
        height, width = (torch.export.Dim(name, min=least // stride, max=4096) for name in names)
        shapes |= {2: stride * height, 3: stride * width}
    example = torch.zeros(shape)
    with torch.no_grad():
        program = torch.export.export(network, (example,), dynamic_shapes=(shapes,))
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            # Without stack traces, which hold our lines of code and this machine's paths.
            node.meta = {name: value for name, value in node.meta.items() if name == "val"}
    program._example_inputs = None
    return program, example


def write_onnx(program, example: Tensor, outputs: list[str] | None, file) -> None:
    """An exported program as ONNX, with names for its `outputs`."""
    names = dict(input_names=["images"], output_names=outputs)
    with contextlib.redirect_stdout(io.StringIO()):
        converted = torch.onnx.export(program, (example,), dynamo=True, verbose=False, **names)
    for node in converted.model_proto.graph.node:
        del node.metadata_props[:]  # where it came from
    file.write(converted.model_proto.SerializeToString())


# What lies in a .pt2 that holds a graph and tensors alone, by the formats of torch 2.6 and after.
HARMLESS = re.compile(
    r"(.*/)?(models/\w+\.json|data/(weights|constants)/((weight|tensor)_\d+|\w+_config\.json)|\w+\.json"
    r"|data/sample_inputs/\w+\.pt|serialized_\w+\.pt|version|byteorder|archive_\w+|\.data/\w+|\.format/\w+)")


def check_program(path: Path) -> None:
    """Raises InputError where a file is no exported network, or holds what torch would have to unpickle."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if len(set(names)) < len(names) or not all(map(HARMLESS.fullmatch, names)):
                raise ValueError
            for name in names:
                content = archive.read(name)
                if name.endswith(".pt") and content:  # where this fails torch would unpickle anything
                    torch.load(io.BytesIO(content), weights_only=True)
                if name.endswith("_config.json"):
                    entries = json.loads(content)["config"].values()
                    if any(entry.get("use_pickle") is not False for entry in entries):
                        raise ValueError
    except Exception as error:  # of damaged archives torch raises anything
        unreadable = "no exported network, or damaged, or with pickled objects, which are never read"
        reason = "no such file" if isinstance(error, FileNotFoundError) else unreadable
        raise InputError(f"{path}: {reason}; wanted is what evaluate.py --experts wrote") from None


# ============ pictures of predictions ============


@dataclass
class Viewer:
    """What it takes to show what a checkpoint predicts."""

    model: torch.nn.Module
    checkpoint: dict
    dataset: object
    process: Process
    min_score: float

    @torch.no_grad()
    def predict(self, image: Tensor, opacity: float = 0.5, names: bool = False):
        """One image uint8 [3, H, W] -> (the model's output, the image with what is predicted drawn over it).

        Segmentation: the classes' colours. Detection: boxes and masks of what scores at least `min_score`,
        with `names` also class and score.
        """
        checkpoint, device = self.checkpoint, self.process.device
        if checkpoint["task"] == "segmentation":
            if device.type == "cpu":
                # What the maps of a routed network and the logits take, by measurement: asked for at once it
                # is refused where there is less memory; bit by bit the system would kill the process.
                width = checkpoint["model_args"].get("width") or 64
                bytes_per_pixel = 60 + 2 * width + 4 * len(checkpoint["classes"])
                torch.empty(bytes_per_pixel * image[0].numel(), dtype=torch.uint8)
            colors = [tuple(color) for color in checkpoint["palette"]]
            out = self.model(data.normalize(image[None].to(device)))
            prediction = out.logits[0].argmax(0).cpu()
            masks = prediction == torch.arange(len(colors))[:, None, None]  # [classes, H, W]
            return out, draw_segmentation_masks(image, masks, alpha=opacity, colors=colors)
        out = self.model([data.as_float(image.to(device))])
        found = {key: value.cpu() for key, value in out.detections[0].items()}
        kept = found["scores"] >= self.min_score
        boxes, scores, classes = found["boxes"][kept], found["scores"][kept], found["labels"][kept] - 1
        masks = found["masks"][kept, 0] > 0.5 if "masks" in found else None
        image = draw_objects(checkpoint, image, boxes, classes, masks, opacity)
        if names:
            labels = zip(classes.tolist(), scores.tolist())
            texts = [f"{checkpoint['classes'][c]} {score:.2f}" for c, score in labels]
            image = write_on(image, texts, boxes[:, :2].tolist())
        return out, image

    def describe(self, image: Tensor) -> Shown:
        """One image uint8 [3, H, W], shown; see `predict`."""
        checkpoint, model = self.checkpoint, self.model
        out, overlay = self.predict(image, names=True)
        size = image.shape[-2:] if checkpoint["task"] == "segmentation" else out.sizes[0]
        gflops = sum(model.real_cost(out.routes, *size, model.counts[0]).values()).item() / 1e9
        words, clusters = f"{gflops:.3g} GFLOPs ({model.counts[0]})", checkpoint["clusters"]
        if clusters is not None:
            label, distance = clusters.nearest(out.routes.activations(gate_space(checkpoint)).cpu())
            expert = f"expert {label.item()}"
            words += f", {expert} of {len(clusters.centers)}, {distance.item():.3f} from its centre"
            overlay = write_on(overlay, [expert], [(2, 2)])
        return Shown(image, overlay, words, grid_of(model), out.A[0].cpu() if model.dim else None)


def read_experts(path: Path) -> dict:
    """What `write_experts` wrote about its files. Raises InputError for anything else."""
    try:
        about = json.loads(path.read_text())
        task, layers, size = about["task"], about["layers"], about["size"]
        names = {f"expert-{j}" for j in range(len(about["experts"]))} | {COMMON}
        scales = 4 if task == "segmentation" else 5
        layers = min(layers, 1000)  # a json may say anything
        shape = torch.Size([1 + sum(nodes_per_layer(layers, scales)), 3])
        routes = [torch.tensor(about["routes"][name]) for name in names]
        numbers = torch.tensor([about["normalization"][name] for name in ("mean", "std")])
        palette = torch.tensor(about["palette"], dtype=torch.uint8)
        fits = len(names) > 1 and about["routes"].keys() == names
        fits &= all(route.shape == shape for route in routes) and numbers.shape == (2, 3)
        fits &= palette.shape == (len(about["classes"]), 3) and about["stride"] >= 32 and about["least"] > 0
        fits &= size is None or [type(side) for side in size] == [int, int]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; evaluate.py --experts writes an experts.json") from None
    except Exception:  # a json can hold anything
        fits = False
    if not fits:
        raise InputError(f"{path}: no experts.json, as evaluate.py --experts writes it")
    if task != "segmentation":
        words = "of a detector, whose heads are not exported; --image takes its checkpoint"
        raise InputError(f"{path}: {words}")
    return about


class ExpertViewer:
    """Shows what exported experts predict: each image by the one that the dispatcher sends it to."""

    def __init__(self, arguments: argparse.Namespace, process: Process):
        path = arguments.checkpoint[0]
        self.device, self.about, self.files, self.loaded = process.device, read_experts(path), {}, {}
        with torch.device("meta"):
            self.grid = grid_of_backbone(Grid(self.about["layers"], width=2, gate=None))
        for name in ["dispatcher", *(f"expert-{j}" for j in range(len(self.about["experts"])))]:
            self.files[name] = path.with_name(f"{name}.pt2")
            check_program(self.files[name])

    def call(self, name: str, images: Tensor, wanted: tuple[int, ...]) -> Tensor:
        """What an exported network gives. Raises InputError where it is not of the shape that is wanted."""
        path = self.files[name]
        if name not in self.loaded:
            try:
                program = torch.export.load(path)
                if self.device.type != "cpu":
                    from torch.export.passes import move_to_device_pass

                    program = move_to_device_pass(program, str(self.device))
                self.loaded[name] = program.module()
            except Exception:  # whatever torch stumbles on
                raise InputError(f"{path}: cannot be loaded; export it with this torch") from None
        try:
            out = self.loaded[name](images)
        except RuntimeError as error:
            if re.search("out of memory|allocate memory", str(error)):
                raise
            out = None
        if getattr(out, "shape", None) != wanted:
            raise InputError(f"{path}: does not go with its experts.json; export both again")
        return out

    @torch.no_grad()
    def describe(self, image: Tensor) -> Shown:
        """One image uint8 [3, H, W], shown. Raises InputError for a size that the experts do not take."""
        about, (height, width) = self.about, image.shape[-2:]
        numbers = (about["normalization"][name] for name in ("mean", "std"))
        mean, std = (torch.tensor(channels, device=self.device)[:, None, None] for channels in numbers)
        padded = pad_to_stride((data.as_float(image[None].to(self.device)) - mean) / std, about["stride"])
        size, least = tuple(padded.shape[-2:]), about["least"]
        if about["size"] and size != tuple(about["size"]):
            rows, columns = about["size"]
            words = f"exported for {columns}x{rows} alone, see --export-size"
            raise InputError(f"{width}x{height} pixels; {words}")
        if not about["size"] and min(size) < least:
            raise InputError(f"{width}x{height} pixels; the experts take at least {least} a side")
        experts, classes = len(about["experts"]), len(about["classes"])
        expert = self.call("dispatcher", padded, (1, experts)).argmax(1).item()
        logits = self.call(f"expert-{expert}", padded, (1, classes, *size))[0, :, :height, :width]
        masks = logits.argmax(0).cpu() == torch.arange(classes)[:, None, None]
        colors = [tuple(color) for color in about["palette"]]
        overlay = draw_segmentation_masks(image, masks, alpha=0.5, colors=colors)
        overlay = write_on(overlay, [f"expert {expert}"], [(2, 2)])
        words = f"expert {expert} of {experts}, by the dispatcher"
        route = torch.tensor(about["routes"][f"expert-{expert}"])
        return Shown(image, overlay, words, self.grid, as_drawn(route))


def draw_objects(checkpoint: dict, image: Tensor, boxes, classes, masks=None, opacity: float = 0.5) -> Tensor:
    """Boxes [n, 4] and masks [n, H, W] in the colours of their classes [n], on an image uint8 [3, H, W]."""
    if not len(boxes):
        return image
    colors = [tuple(checkpoint["palette"][c]) for c in classes.tolist()]
    if masks is not None:
        image = draw_segmentation_masks(image, masks.bool(), alpha=opacity, colors=colors)
    return draw_bounding_boxes(image, boxes, colors=colors, width=max(1, min(image.shape[-2:]) // 120))


def write_on(image: Tensor, texts: list[str], places: list[tuple[float, float]]) -> Tensor:
    """Writes on an image uint8 [3, H, W] at places (x, y): white edged in black, to be read on any ground."""
    picture = Image.fromarray(to_rgb(image))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(max(10, min(picture.size) // 30))
    for text, (x, y) in zip(texts, places):
        draw.text((x + 3, y + 1), text, fill="white", font=font, stroke_width=1, stroke_fill="black")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def to_rgb(image: Tensor) -> np.ndarray:
    """uint8 [3, H, W] -> [H, W, 3]."""
    return image.permute(1, 2, 0).numpy()


def list_pictures(arguments: argparse.Namespace, written_to: list[Path]) -> tuple[list[Path], list[str]]:
    """The picture --image, or those in that folder: no hidden files, and nothing from where we write; and the
    folders in it that may not be read."""
    source, locked = arguments.image, []
    if source.is_file():
        return [source], locked
    inside = [folder.resolve() for folder in written_to if folder.resolve().is_relative_to(source.resolve())]
    if source.resolve() in inside:
        raise InputError(f"--image {source}: what is written would be read next time; name another --out")
    paths = []
    for path in map(Path, data.files_under(source, locked)):
        ours = any(path.resolve().is_relative_to(folder) for folder in inside)
        picture = path.suffix.lower() in data.PICTURES and path.is_file()
        if picture and not ours and not data.is_hidden(path, source):
            paths.append(path)
    if not paths and not locked:
        wanted = f"no picture, nor a folder with pictures in it ({' '.join(data.PICTURES)})"
        raise InputError(f"--image {source}: {wanted}")
    return paths, locked


def show(arguments: argparse.Namespace, viewer: Viewer | ExpertViewer) -> None:
    """Writes each picture of --image with its prediction and its expert, with --figures also its route.

    Raises InputError, at the end, where one could not be shown.
    """
    source, folder, failed = arguments.image, arguments.folders[arguments.checkpoint[0]], []
    if not arguments.out:
        folder = folder / "overlays"
    paths, locked = list_pictures(arguments, [path for path in (folder, arguments.figures) if path])
    for path in locked:
        print(f"{path}: cannot be read (Permission denied)", file=sys.stderr)
    for path in paths:
        try:
            shown = describe_picture(viewer, path)
        except InputError as error:
            if len(paths) == 1:
                raise
            print(error, file=sys.stderr)
            failed.append(path)
            continue
        inside = path.relative_to(source if source.is_dir() else path.parent)
        target = folder / inside.with_name(inside.name + ".png")
        print(f"{path}: {shown.words} -> {target}", flush=True)
        keep(target, lambda file: Image.fromarray(to_rgb(shown.overlay)).save(file, "png"))
        if arguments.figures and shown.grid:
            figure, ((left, right),) = new_figure(PAGE, 1.8, 1, 2, width_ratios=[1, 2])
            left.imshow(to_rgb(shown.image))
            left.axis("off")
            routes_panel(right, shown.grid, shown.route, COLORS[0], f"{path.name}: {shown.words}")
            right.set_ylabel("stride")  # which `label_outer` takes for that of the picture
            right.tick_params(labelleft=True)
            save_figure(figure, arguments.figures, f"route-{'-'.join(inside.parts)}")
    if failed or locked:
        which = ", ".join(map(str, (failed + locked)[:3])) + (" ..." if (failed + locked)[3:] else "")
        raise InputError(f"--image {source}: {len(failed)} of {len(paths)} pictures are not shown: {which}")


@dataclass
class Shown:
    """A picture with what is predicted for it."""

    image: Tensor  # uint8 [3, H, W]
    overlay: Tensor  # the same, with the prediction and the expert's number on it
    words: str  # its cost and its expert
    grid: list  # of the routing space; [] of a static network
    route: Tensor | None  # [D], as `routes_panel` draws it


def describe_picture(viewer: Viewer | ExpertViewer, path: Path) -> Shown:
    """Raises InputError, which names the path, where it cannot be read, is too narrow or needs too much
    memory."""
    try:
        return viewer.describe(torch.from_numpy(data.read_image(path)).permute(2, 0, 1))
    except data.DataError as error:
        raise InputError(error) from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        words = "needs more memory than there is; scale it down, or cut it into parts"
        raise InputError(f"{path}: {words}") from None


# ============ one table of many checkpoints ============

METHODS = {
    "dr-a": "DR-A", "dr-b": "DR-B", "dr-c": "DR-C", "dr-raw": "DR-Raw", "divdr-a": "DivDR-A",
    "divdr-raw": "DivDR-Raw", "fixed-route": "Fixed route", "bisenet-r18": "BiSeNet",
    "deeplabv3-r101": "DeepLabV3", "semantic-fpn-r101": "Semantic FPN", "pspnet-r101": "PSPNet",
    "r50-fpn": "R-CNN",
}
STATIC_BACKBONES = {
    "bisenet-r18": "ResNet-18", "deeplabv3-r101": "ResNet-101-ASPP", "semantic-fpn-r101": "ResNet-101-FPN",
    "pspnet-r101": "ResNet-101-PSP", "r50-fpn": "ResNet-50-FPN",
}
SCORES = ("mIoU", "box AP", "mask AP")
OF_PAPERS = "What has a source is of Cityscapes val or COCO val2017"
COLUMNS = (*SCORES, "GFLOPs", "Inter", "Intra", "To centre", "Recovered")  # the last: % of known subsets
SETTING_NAMES = {"k": "K", "lambda1": "λ1", "lambda2": "λ2", "kmeans_every": "K-means every"}
SWEPT = ("k", "margin", "lambda2", "kmeans_every")  # each has a column in the figure of ablations
# Settings that may differ on --resume, those that runs which are averaged may differ in, and those that the
# method's name tells.
OWN_FILES = {f"{split}_{kind}" for split in ("train", "val") for kind in ("json", "images", "labels", "list")}
OWN_FILES |= {"data", "classes"}
OTHER = {"out", "name", "resume", "workers", "device", "compile", "log_every", "eval_every", "save_every"}
FREE = OWN_FILES | OTHER | {"eval_batch"}
SAME_SETTING = OTHER | {"eval_batch", "seed"}
OF_VARIANT = {"lambda1", "budget", "lambda2"}


def published_of(runs: list[RunResult]) -> list[dict[str, str]]:
    """The rows of the papers' tables that are of the tasks of the runs, by the columns of published.csv."""
    tasks = {run.task for run in runs}
    of_task = {"mIoU": "segmentation", "box AP": "detection", "mask AP": "detection"}
    return [row for row in published_results() if of_task[row["measure"]] in tasks]


def table_count(counts) -> str:
    """Which of the counts stands in tables and figures: the papers', in detection at their 800x800."""
    return next(count for count in ("paper at 800x800", "paper", "exact") if count in counts)


def numbers_of(metrics: dict) -> dict[str, float]:
    """What tables and figures show of a run, by column: scores in %, GFLOPs per image, distances."""
    numbers = {
        "mIoU": metrics.get("miou"),
        "box AP": (metrics.get("box") or {}).get("AP"),
        "mask AP": (metrics.get("mask") or {}).get("AP"),
        "GFLOPs": metrics["gflops"][table_count(metrics["gflops"])]["mean"],
        "Inter": metrics.get("inter"),
        "Intra": metrics.get("intra"),
        "To centre": metrics.get("intra_to_centre"),
        "Recovered": metrics.get("subsets", {}).get("accuracy"),
    }
    return {column: number for column, number in numbers.items() if number is not None}


def columns_of(runs: list[RunResult], paper=()) -> list[str]:
    """The columns in which any of the runs has a number, and the scores that a row of the papers has."""
    found = {row["measure"] for row in paper}.union(*(run.numbers for run in runs))
    return [column for column in COLUMNS if column in found]


@dataclass
class Setting:
    """All seeds of one configuration."""

    runs: list[RunResult]
    differing: dict[str, object]  # the settings that tell it from the others beside it

    @property
    def config(self) -> dict:
        return self.runs[0].checkpoint["config"]

    @property
    def method(self) -> str:
        name = METHODS[self.runs[0].variant]
        if "route" in self.runs[0].checkpoint["model_args"]:
            name = Path(self.config["route"]).name
        if name == "R-CNN":
            name = ("Mask " if self.runs[0].checkpoint["model_args"]["masks"] else "Faster ") + name
        return name

    @property
    def label(self) -> str:
        told = [f"{setting_name(key)} {show_value(value)}" for key, value in self.differing.items()]
        return ", ".join([with_gate(self.method, self.runs[0].gate), *told])

    @property
    def backbone(self) -> str:
        run = self.runs[0]
        if run.variant in STATIC_BACKBONES:
            return STATIC_BACKBONES[run.variant]
        width = run.checkpoint["model_args"].get("width") or 64
        layers = run.grid[-1][0] + 1 if run.grid else run.checkpoint["model_args"]["layers"]
        return with_gate(f"Layer{layers}" + (f", width {width}" if width != 64 else ""), run.gate)

    def mean_std(self, column: str) -> tuple[float, float | None] | None:
        """Over the runs that have the number; the deviation, with n - 1, is None for a single run."""
        values = [run.numbers[column] for run in self.runs if column in run.numbers]
        if not values:
            return None
        return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def with_gate(words: str, gate: str | None) -> str:
    """The words, and where gates are full: their cost differs from that of small ones."""
    return f"{words}, full gates" if gate == "full" else words


def setting_name(key: str) -> str:
    return SETTING_NAMES.get(key, key.replace("_", " "))


def show_value(value) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return "/".join(Path(value).parts[-2:])  # of a path what tells most
    return f"{value:g}" if isinstance(value, float) else str(value)


def group_runs(runs: list[RunResult], apart_from: str | None = None) -> list[Setting]:
    """All seeds of one configuration together, and whatever the setting `apart_from` is, if one is named."""
    ignored = SAME_SETTING | {apart_from}
    groups: dict[str, Setting] = {}
    for run in runs:
        facts = {name: value for name, value in run.facts.items() if name not in ignored}
        key = json.dumps([facts, run.checkpoint.get("classes")], sort_keys=True)
        groups.setdefault(key, Setting([], {})).runs.append(run)
    settings = list(groups.values())

    names = [*SWEPT, *(name for setting in settings for name in setting.runs[0].facts)]
    for name in dict.fromkeys(names):
        if name in ignored | {"variant", "layers", "width", "gate", "route"}:  # the first columns tell these
            continue
        values = set()
        for setting in settings:
            decided_by = setting.runs[0].variant if name in OF_VARIANT else None
            values.add((decided_by, json.dumps(setting.runs[0].facts.get(name))))
        if len(values) > len({decided_by for decided_by, _ in values}):
            for setting in settings:
                setting.differing[name] = setting.runs[0].facts.get(name)

    def place(setting: Setting):
        numbers = [value if isinstance(value, (int, float)) else -1 for value in setting.differing.values()]
        return list(METHODS).index(setting.runs[0].variant), setting.backbone, numbers

    return sorted(settings, key=place)


def make_table(runs: list[RunResult], published: bool) -> list[list[str]]:
    """Header and rows as text: one for each setting, then the papers'. Empty columns are left out."""
    paper = published_of(runs) if published else []
    settings, columns, split = group_runs(runs), columns_of(runs, paper), runs[0].metrics["split"]
    told = list(settings[0].differing)
    if any(row["k"] for row in paper) and "k" not in told:
        told.append("k")
    places = dict.fromkeys(columns, 2) | {"GFLOPs": digits(run.numbers["GFLOPs"] for run in runs)}
    titles = [f"{name} {split}" if name in SCORES else name for name in columns]
    table = [["Method", "Backbone", *map(setting_name, told), *titles, "Seeds"]]
    for setting in settings:
        row = [setting.method, setting.backbone]
        row += [show_value(setting.config.get(name)) for name in told]
        for column in columns:
            mean, deviation = setting.mean_std(column) or (None, None)
            cell = "–" if mean is None else f"{mean:.{places[column]}f}"
            row.append(cell if deviation is None else f"{cell} ± {deviation:.{places[column]}f}")
        table.append([*row, str(len(setting.runs))])
    for row in paper:
        cells = {"k": row["k"], "Inter": row["inter"], "Intra": row["intra"]}
        for column, key in ((row["measure"], "score"), ("GFLOPs", "gflops")):
            cells[column] = f"{row[key]} ± {row[f'{key}_std']}" if row[f"{key}_std"] else row[key]
        numbers = [cells.get(name) or "–" for name in [*told, *columns]]
        backbone = with_gate(row["backbone"], row["gate"])
        table.append([f"{row['method']} ({row['source']})", backbone, *numbers, "–"])
    return table


def list_runs(runs: list[RunResult]) -> list[list]:
    """Header and a row for each run: all its numbers, and the settings by which the runs differ."""
    told = ["variant", "layers", "width", "seed"]
    for setting in group_runs(runs):
        told += [name for name in setting.differing if name not in [*told, "dataset"]]
    columns = columns_of(runs)
    table = [["run", "dataset", "split", "images", *told, *columns, "images per expert"]]
    for run in runs:
        where = [run.name, *(run.metrics[name] for name in ("dataset", "split", "images"))]
        settings = [run.facts.get(name, "") for name in told]
        experts = " ".join(map(str, run.metrics.get("images_per_expert", [])))
        table.append([*where, *settings, *(run.numbers.get(column, "") for column in columns), experts])
    return table


def render(rows: list[list], form: str) -> str:
    """Header and rows as "text", "markdown", "latex" or "csv", with the first two columns flush left."""
    if form == "csv":
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows(rows)
        return file.getvalue().rstrip("\n")
    if form == "latex":
        marks = {"±": r"$\pm$", "λ1": r"$\lambda_1$", "λ2": r"$\lambda_2$", "–": "--"}
        marks |= {mark: "\\" + mark for mark in "_&%$#{}"}
        pattern = re.compile("|".join(map(re.escape, marks)))
        lines = [pattern.sub(lambda found: marks[found[0]], " & ".join(row)) + r" \\" for row in rows]
        top, end = r"\begin{tabular}{ll" + "r" * (len(rows[0]) - 2) + "}", r"\end{tabular}"
        return "\n".join([top, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", end])
    widths = [max(3, *map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        cells[:2] = [cell.ljust(width) for cell, width in zip(row, widths[:2])]
        lines.append(cells)
    if form == "text":
        return "\n".join("  ".join(cells).rstrip() for cells in lines)
    rule = ["-" * width for width in widths[:2]] + ["-" * (width - 1) + ":" for width in widths[2:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [lines[0], rule, *lines[1:]])


def print_tables(arguments: argparse.Namespace, runs: list[RunResult]) -> None:
    """One table for each task, on stdout; what a reader should know about the runs, on stderr."""
    form = arguments.format or "text"
    tasks = dict.fromkeys(run.task for run in runs)
    if form == "csv":  # one list of all, and nothing else
        print(render(list_runs(runs), form))
        tasks = {}
    for task in tasks:
        mine = [run for run in runs if run.task == task]
        counts = dict.fromkeys(table_count(run.result.flops) for run in mine)
        where = dict.fromkeys(run.metrics["dataset"] for run in mine)
        print(render(make_table(mine, arguments.published), form))
        note = f"On {', '.join(where)} {arguments.split}; GFLOPs per image, count: {', '.join(counts)};"
        note += " ± is the standard deviation over seeds (n - 1)."
        if arguments.published:
            note += f" {OF_PAPERS}."
        print(("% " if form == "latex" else "\n") + note)
    for setting in group_runs(runs):
        seeds = [run.checkpoint["config"].get("seed") for run in setting.runs]
        if len(set(seeds)) < len(seeds):
            paths = ", ".join(str(run.checkpoint["path"]) for run in setting.runs)
            print(f"note: {paths}: of one setting, and a seed comes twice", file=sys.stderr)
    for run in runs:
        done, iters = run.checkpoint["iteration"], run.checkpoint["config"].get("iters")
        if iters and done < iters and run.checkpoint["path"].stem == "last":
            print(f"note: {run.checkpoint['path']}: at iteration {done} of {iters}", file=sys.stderr)


# ============ figures ============

# Okabe and Ito's colours, which also the colour-blind tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (3, 1)))
STYLE = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "legend.fontsize": 7, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.6, "axes.titlelocation": "left", "lines.linewidth": 1.2, "lines.markersize": 5,
    "pdf.fonttype": 42, "ps.fonttype": 42, "savefig.dpi": 200,
}
DASHES = (0, (1.2, 0.8))  # of what is less open
OF_STEM = dict(color="0.45", linewidth=0.5, linestyle=":")  # its gates are not in A
FAINT = "0.82"  # grey of what is closed or not spoken of
LEAST = 0.02  # a mean alpha, or a difference of two, that is drawn as a line
PAGE = 7.0  # inches, the width of a page's text
EMBEDDED = 5000  # images at most in the plane: t-SNE takes about half a minute for them on one core


def draw_figures(arguments: argparse.Namespace, runs: list[RunResult], process: Process) -> None:
    """Draws all that the runs allow: some figures of each, NAME-RUN, and some of all together, NAME."""
    for i, run in enumerate(runs):
        if run.name in [other.name for other in runs[:i]]:
            run.name = f"{run.name}-{i + 1}"
        model, checkpoint = open_checkpoint(arguments, run.checkpoint["path"], process)
        viewer = Viewer(model, checkpoint, open_split(arguments, checkpoint), process, arguments.min_score)
        for name, draw in FIGURES_OF_A_RUN.items():
            save_figure(draw(run, runs, viewer), arguments.figures, f"{name}-{run.name}")
    for name, draw in FIGURES_OF_ALL.items():
        save_figure(draw(runs, arguments.published), arguments.figures, name)


def save_figure(figure, folder: Path, name: str) -> None:
    """Writes a figure as PDF and PNG; None is one that has nothing to show of these runs."""
    if figure is None:
        return print(f"no {name}: these runs have nothing to show there", file=sys.stderr)
    path, options = folder / name, {"pdf": dict(metadata={"CreationDate": None}), "png": {}}
    written = True
    for form, more in options.items():
        target = path.with_name(f"{name}.{form}")
        written &= keep(target, lambda file: write_figure(figure, file, form, **more))
    if written:
        print(f"wrote {path}.pdf and .png", file=sys.stderr)


def write_figure(figure, file, form: str, **options) -> None:
    """Writes a matplotlib figure; a dollar in a name is a dollar, and no mathematics."""
    from matplotlib.text import Text

    axes = [axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)]
    ticks = {label for axis in axes for label in axis.get_ticklabels(which="both")}  # powers of ten
    for text in figure.findobj(Text):
        if text not in ticks:
            text.set_parse_math(False)
    figure.savefig(file, format=form, **options)


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """A figure of so many inches, and its axes [rows, columns]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def curve(ax, j: int, x, y, label: str, deviation=None, marks: bool = True) -> None:
    """The j-th line of a panel, told from the others by colour, dashes and marker."""
    marker = MARKERS[j % len(MARKERS)] if marks else None
    color, dashes = COLORS[j % len(COLORS)], LINES[j % len(LINES)]
    ax.errorbar(x, y, deviation, color=color, ls=dashes, marker=marker, label=label, capsize=2)


# ---- routes ----


def grid_of(model) -> list[tuple[int, int, list[int]]]:
    """Per node in the order of A(x): layer, scale, and the paths that it has; [] of a static network."""
    return grid_of_backbone(model.backbone) if model.dim else []


def grid_of_backbone(backbone: Grid) -> list[tuple[int, int, list[int]]]:
    grid, nodes = [], iter(backbone.all_nodes()[1:])
    for layer, count in enumerate(backbone.nodes_per_layer):
        grid += [(layer, s, next(nodes).paths) for s in range(count)]
    return grid


def routes_panel(ax, grid: list, values: Tensor, color: str, title: str, least: float = OPEN) -> None:
    """Nodes and paths of the routing grid, layers from left to right, strides from top to bottom.

    Paths are as wide as `values` [D], on -1..1, are far from 0, and nodes as large as their largest path.
    What is below 0 is drawn in the second colour, and its paths dashed; what is within `least` of 0 stays
    faint.
    """
    from matplotlib.collections import LineCollection

    faint, more, less, nodes = [], [], [], []
    for (layer, scale, paths), alphas in zip(grid, values.view(-1, 3).tolist()):
        for path in paths:
            segment, alpha = ((layer, scale), (layer + 1, scale + path - 1)), alphas[path]
            faint.append(segment)
            if abs(alpha) > least:
                (more if alpha > 0 else less).append((segment, line_width(abs(alpha))))
        largest, shade = max(alphas, key=abs), "white"
        if abs(largest) > least:
            shade = color if largest > 0 else COLORS[1]
        nodes.append((layer, scale, (2 + 4.4 * abs(largest)) ** 2, shade))
    ax.add_collection(LineCollection(faint, colors=FAINT, linewidths=0.5, zorder=1))
    for name, drawn, shade, dashes in (("more", more, color, "-"), ("less", less, COLORS[1], DASHES)):
        segments, widths = [segment for segment, _ in drawn], [width for _, width in drawn]
        style = dict(colors=shade, linewidths=widths, linestyles=[dashes], capstyle="butt")
        ax.add_collection(LineCollection(segments, label=name, zorder=2, **style))
    x, y, sizes, shades = zip(*nodes)
    edges = [FAINT if shade == "white" else "black" for shade in shades]
    ax.scatter(x, y, s=sizes, c=shades, edgecolors=edges, linewidths=0.5, label="nodes", zorder=3)
    ax.add_collection(LineCollection([((-1, 0), (0, 0)), ((-1, 0), (0, 1))], **OF_STEM, zorder=1))
    ax.scatter(-1, 0, s=16, marker="s", c="white", edgecolors=OF_STEM["color"], linewidths=0.6, zorder=3)

    layers, scales = grid[-1][0] + 1, 1 + max(scale for _, scale, _ in grid)
    shown = range(0, layers, 1 + layers // 9 + layers // 18)
    ax.set(xlim=(-1.5, layers + 0.3), ylim=(scales - 0.55, -0.6))
    ax.set(title=title, xlabel="layer", ylabel="stride")
    ax.set_xticks([-1, *shown], ["stem", *(str(1 + layer) for layer in shown)])
    ax.set_yticks(range(scales), [str(4 * 2**scale) for scale in range(scales)])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.label_outer()


def count_images(count: int) -> str:
    return f"{count or 'no'} image{'s' * (count != 1)}"


def line_width(alpha: float) -> float:
    """Points: what is just open is still a line."""
    return 0.5 + 3.5 * alpha


def average_router(run: RunResult, runs: list[RunResult]) -> RunResult | None:
    """Dynamic Routing to stand beside a run of DivDR: the first run of its grid without a clustering loss."""
    if not VARIANTS[run.variant].lambda2:
        return None
    others = (other for other in runs if other.grid == run.grid and not VARIANTS[other.variant].lambda2)
    return next(others, None)


def draw_routes(run: RunResult, runs: list[RunResult], viewer: Viewer):
    """Left each expert's centre, the average over all images and, if Dynamic Routing is among the runs, its
    average; right what tells each from the others."""
    from matplotlib.lines import Line2D

    if "route" in run.checkpoint["model_args"]:
        route, cost = viewer.model.backbone.route.cpu(), run.metrics["gflops"]["paper"]["mean"]
        panels = [(f"{int(route.sum())} paths, {cost:.3g} GFLOPs", route, COLORS[0])]
        return draw_fixed(panels, grid_of_backbone(viewer.model.backbone), run.name)
    if run.clusters is None:
        return None
    centers, reference = as_alpha(run.clusters.centers, run.checkpoint), average_router(run, runs)
    panels = []  # title, values, colour
    for k, center in enumerate(centers):
        size, cost = run.metrics["images_per_expert"][k], run.metrics["gflops_per_expert"][k]
        words = f"{count_images(size)}, {cost:.3g} GFLOPs" if size else "no image here"
        panels.append((f"expert {k}: centre; {words}", center, COLORS[k % len(COLORS)]))
        others = torch.cat([centers[:k], centers[k + 1 :]])
        difference = center - others.mean(0) if len(others) else 0 * center
        panels.append((f"expert {k} minus the mean of the others", difference, COLORS[0]))
    averages = {f"all {len(run.result.A)} images": run}
    if reference is not None:
        averages[with_gate("Dynamic Routing", reference.gate) + ", all images"] = reference
    for name, of in averages.items():
        cost = of.metrics["gflops"]["paper"]["mean"]
        panels.append((f"{name}: average, {cost:.3g} GFLOPs", of.alpha.mean(0), "0.25"))
        if of is run:
            farthest = centers.amax(0) - centers.amin(0)
            panels.append(("largest difference between two experts", farthest, "0.25"))
        else:
            difference = run.alpha.mean(0) - of.alpha.mean(0)
            panels.append(("average of DivDR minus Dynamic Routing's", difference, COLORS[0]))
    scales, rows = 1 + max(scale for _, scale, _ in run.grid), len(panels) // 2
    figure, axes = new_figure(PAGE, (0.35 + 0.24 * scales) * rows + 0.55, rows, 2, sharex=True, sharey=True)
    for ax, (title, values, color) in zip(axes.flat, panels):
        routes_panel(ax, run.grid, values, color, title, LEAST)
    lines = []
    for alpha in (1, 0.5, 0.1):
        lines.append(Line2D([], [], color="0.25", lw=line_width(alpha), label=f"α = {alpha:g}"))
    lines.append(Line2D([], [], color=FAINT, lw=0.5, label=f"below {LEAST:g}"))
    lines.append(Line2D([], [], **OF_STEM, label="from the stem: not in A"))
    lines.append(Line2D([], [], color=COLORS[0], lw=2, label="more open"))
    lines.append(Line2D([], [], color=COLORS[1], lw=2, ls=DASHES, label="less open"))
    close = dict(handlelength=2.4, columnspacing=1.4)
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), **close)
    figure.suptitle(with_gate(run.name, run.gate), fontsize=8, x=0.01, ha="left")
    return figure


def as_drawn(route: Tensor) -> Tensor:
    """A fixed route [1 + nodes, 3] as values for `routes_panel`, open paths as wide as an alpha of 0.4."""
    return 0.4 * route[1:].flatten().float()


def draw_fixed(panels: list[tuple], grid: list, title: str):
    """Fixed routes: panels are titles, routes bool [1 + nodes, 3] and colours."""
    columns, scales = min(2, len(panels)), 1 + max(scale for _, scale, _ in grid)
    rows = -(-len(panels) // columns)
    size = PAGE * columns / 2, (0.35 + 0.24 * scales) * rows + 0.35
    figure, axes = new_figure(*size, rows, columns, sharex=True, sharey=True)
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    for ax, (words, route, color) in zip(axes.flat, panels):
        routes_panel(ax, grid, as_drawn(route), color, words)
    figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    return figure


def draw_cut(cut: CutRun):
    """The route of each expert, and of the one for all."""
    panels = []
    for j, expert in enumerate(cut.experts):
        gflops = next(iter(expert["gflops"].values()))
        words = f"expert {j}: {count_images(expert['images'])}, {expert['open paths']} paths"
        words += f", {gflops:.3g} GFLOPs"
        panels.append((words, cut.routes[f"expert-{j}"], COLORS[j % len(COLORS)]))
    panels.append((f"one for all: {int(cut.routes[COMMON].sum())} paths", cut.routes[COMMON], "0.25"))
    words = "; a node without a path hands its input on"
    return draw_fixed(panels, cut.run.grid, with_gate(cut.run.name, cut.run.gate) + words)


def draw_keep(cuts: list[CutRun]):
    """Scores and GFLOPs over --keep: K experts by A(x), one network for all; mean ± deviation over seeds."""
    by_run = {id(cut.run): cut for cut in cuts}
    columns = [column for column in SCORES if any(column in row for row in cuts[0].sweep[COMMON])]
    columns.append("GFLOPs")
    figure, axes = new_figure(PAGE, 2.9, 1, len(columns))
    for ax, column in zip(axes.flat, columns):
        settings = group_runs([cut.run for cut in cuts])
        for j, setting in enumerate(settings):
            mine = [by_run[id(run)] for run in setting.runs]
            aside = 0.08 * (j - (len(settings) - 1) / 2)  # bars of several settings stand beside each other
            for name, dashes in (("experts", "-"), (COMMON, "--")):
                lines = [[row[column] for row in cut.sweep[name]] for cut in mine]
                mean = [statistics.mean(seeds) for seeds in zip(*lines)]
                deviation = [statistics.stdev(seeds) if len(seeds) > 1 else 0 for seeds in zip(*lines)]
                label = f"{setting.label}, {'K experts' if name == 'experts' else 'one for all'}"
                style = dict(color=COLORS[j % len(COLORS)], marker=MARKERS[j % len(MARKERS)], ls=dashes)
                x = [place + aside for place in range(len(SHARES))]
                ax.errorbar(x, mean, deviation, label=label, ms=3.5, capsize=2, elinewidth=0.8, **style)
        ax.set_xticks(range(len(SHARES)), [f"{100 * share:g}" for share in SHARES])
        where = f", {cuts[0].run.metrics['dataset']} {cuts[0].run.metrics['split']}"
        unit = f"{column} per image" if column == "GFLOPs" else f"{column}, %"
        ax.set(xlabel="keep, % of an expert's images", ylabel=unit + where)
        ax.grid(color="0.9", lw=0.5)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


# ---- activations ----


def embed(points: Tensor) -> tuple[Tensor, str]:
    """[N, D] -> [N, 2] and how: t-SNE where scikit-learn is installed and points are enough, else PCA."""
    centered = (points - points.mean(0)).double()
    with contextlib.suppress(ImportError):
        from sklearn.manifold import TSNE

        if len(points) >= 10 and centered.abs().max() > 1e-6:
            perplexity = min(30, (len(points) - 1) / 3)
            tsne = TSNE(perplexity=perplexity, init="pca", angle=0.7, random_state=0)
            placed = torch.from_numpy(tsne.fit_transform(centered.float().numpy()))
            return placed, f"t-SNE (scikit-learn), perplexity {perplexity:.3g}"
    _, singular, directions = torch.linalg.svd(centered, full_matrices=False)
    placed = F.pad(centered @ directions[:2].T, (0, 2 - len(directions[:2])))
    share = (singular[:2].square().sum() / singular.square().sum().clamp(min=1e-12)).item()
    return placed, f"PCA, first two components: {100 * share:.0f} % of the variance"


def draw_activation_space(runs: list[RunResult], published: bool = False):
    """A(x) of the evaluation set in the plane, runs of the first one's grid together (figure 4 of the paper).

    A panel for each run shows its points by expert, and its centres; one more shows several runs by setting.
    """
    routed = [run for run in runs if run.clusters is not None]
    runs = [run for run in routed if run.grid == routed[0].grid]
    if not runs:
        return None
    for run in routed:
        if run.grid != routed[0].grid:
            print(f"activations: without {run.name}, which has other nodes", file=sys.stderr)
    most = max(2, EMBEDDED // len(runs))
    points, labels = [], []  # per run: the images that are shown, then the centres; the images' experts
    for run in runs:
        count = min(most, len(run.result.A))
        chosen = torch.arange(count) * len(run.result.A) // count
        points.append(torch.cat([run.result.A[chosen], run.clusters.centers]).float())
        labels.append(run.labels[chosen])
    placed, how = embed(torch.cat(points))

    panels, images = [], {}  # title, groups of points by label, centres; the images by run
    for run, mine, own in zip(runs, placed.split([len(share) for share in points]), labels):
        images[id(run)], centers = mine[: len(own)], mine[len(own) :]
        groups = {}
        for k, size in enumerate(run.metrics["images_per_expert"]):
            groups[f"expert {k} ({size})"] = images[id(run)][own == k]
        panels.append((with_gate(run.name, run.gate), groups, centers.tolist()))
    if len(runs) > 1:
        groups = {}
        for setting in group_runs(runs):
            groups[setting.label] = torch.cat([images[id(run)] for run in setting.runs])
        panels.append(("all together", groups, []))

    columns = min(len(panels), 3)
    rows, width = -(-len(panels) // columns), PAGE if columns > 1 else 3.8
    figure, axes = new_figure(width, rows * (width / columns + 0.5), rows, columns)
    size = 12 if len(placed) < 500 else 6 if len(placed) < 2000 else 3  # square points
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    for ax, (title, groups, centers) in zip(axes.flat, panels):
        ax.scatter(*placed.T.numpy(), s=1, c=FAINT, linewidths=0)
        for label, where, color, marker in zip(groups, groups.values(), COLORS * 9, MARKERS * 9):
            ax.scatter(*where.T.numpy(), s=size, c=color, marker=marker, linewidths=0, alpha=0.8, label=label)
        for k, ((x, y), color) in enumerate(zip(centers, COLORS * 9)):
            ax.scatter(x, y, s=60, c="white", edgecolors=color, linewidths=0.8, zorder=3)
            ax.text(x, y, str(k), ha="center", va="center_baseline", fontsize=6, fontweight="bold", zorder=4)
        ax.set(title=title, xticks=[], yticks=[])
        ax.spines[:].set_visible(True)
        ax.margins(0.08)
        below = dict(loc="upper center", bbox_to_anchor=(0.5, 0), handletextpad=0.1)
        ncols = 1 if max(map(len, groups)) > 24 else 2
        ax.legend(markerscale=5 / math.sqrt(size), ncols=ncols, **below)
    shown, total = sum(map(len, labels)), sum(len(run.result.A) for run in runs)
    some = f"; {shown} of {total} images, evenly spaced" if shown < total else ""
    figure.supxlabel(f"numbers in rings: centres\n{how}{some}", fontsize=7)
    return figure


# ---- pictures ----


def draw_experts(run: RunResult, runs: list[RunResult], viewer: Viewer):
    """Per expert, the five images nearest to its centre, under each what is predicted for it, its GFLOPs and
    its distance (figure 5 of the paper)."""
    if run.clusters is None:
        return None
    columns, sizes = 5, run.metrics["images_per_expert"]
    labels, distances = run.clusters.nearest(run.result.A)
    height, width = viewer.dataset[0][0].shape[-2:]
    pair = 2 * (PAGE - 1) / columns * height / width + 0.35
    heights = [pair if size else 0.3 for size in sizes]
    figure, axes = new_figure(PAGE, sum(heights), len(sizes), columns, height_ratios=heights)
    for k, (row, size) in enumerate(zip(axes, sizes)):
        cost = f"\n{run.metrics['gflops_per_expert'][k]:.3g} GFLOPs" if size else ""
        words = f"expert {k}\n{count_images(size)}{cost}"
        row[0].set_ylabel(words, rotation=0, ha="right", va="center")
        for ax in row:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        members = (labels == k).nonzero().flatten()
        nearest = members[distances[members].argsort(stable=True)][:columns]
        for ax, i in zip(row, nearest.tolist()):
            image = viewer.dataset[i][0]
            overlay = viewer.predict(image, opacity=0.8)[1]
            gap = np.full((max(1, image.shape[1] // 40), image.shape[2], 3), 255, np.uint8)
            ax.imshow(np.concatenate([to_rgb(image), gap, to_rgb(overlay)]))
            cost = f"{run.flops[i].item() / 1e9:.3g} GFLOPs"
            ax.set_xlabel(f"{cost}\ndistance {distances[i].item():.2f}", fontsize=7)
    return figure


def draw_predictions(run: RunResult, runs: list[RunResult], viewer: Viewer, count: int = 4):
    """Image, truth, prediction and, in segmentation, where they differ, for images spaced over the split."""
    from matplotlib.patches import Patch

    dataset, classes, segmentation = viewer.dataset, run.checkpoint["classes"], run.task == "segmentation"
    count = min(count, len(dataset))
    titles = ["image", "truth", "prediction", "errors"]
    if not segmentation:
        titles = ["image", "truth", f"found, score ≥ {viewer.min_score:g}"]
    if not dataset.has_truth:
        titles = [titles[0], titles[2]]
    height, width = dataset[0][0].shape[-2:]
    cell = min(PAGE / len(titles), 1.75 * width / height)
    legend = 0.3 + 0.17 * -(-min(len(classes), 20) // 6)
    size = (cell * len(titles), (cell * height / width + 0.04) * count + legend)
    figure, axes = new_figure(*size, count, len(titles))
    for n, row in enumerate(axes):
        image, truth, _ = dataset[n * len(dataset) // count]
        if segmentation:
            pictures = [image, *segmentation_pictures(viewer, image, truth)]
        else:
            drawn = draw_objects(
                run.checkpoint, image, truth["boxes"], truth["labels"] - 1, truth.get("masks"))
            pictures = [image, drawn, viewer.predict(image)[1]]
        if not dataset.has_truth:
            pictures = [pictures[0], pictures[2]]
        for ax, picture, title in zip(row, pictures, titles):
            ax.imshow(to_rgb(picture), interpolation="nearest" if segmentation else None)
            ax.axis("off")
            ax.set_title(title if n == 0 else "", loc="center")
    named = list(zip(classes, run.checkpoint["palette"]))[:20]
    named += [("wrong", (180, 50, 0))] if "errors" in titles else []
    patches = [Patch(fc=[c / 255 for c in color], ec="0.4", lw=0.4, label=name) for name, color in named]
    if len(classes) > 20:
        patches.append(Patch(fc="none", label=f"... and {len(classes) - 20} more"))
    small = dict(handlelength=1.0, handleheight=1.0, handletextpad=0.4, columnspacing=1.0)
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 7), **small)
    return figure


def segmentation_pictures(viewer: Viewer, image: Tensor, truth: Tensor) -> list[Tensor]:
    """Truth, prediction, errors, uint8 [3, H, W]; an error is dark, what has no label grey."""
    palette = torch.full((256, 3), 200, dtype=torch.uint8)
    colors = torch.tensor(viewer.checkpoint["palette"], dtype=torch.uint8)
    palette[: len(colors)] = colors
    prediction = viewer.predict(image)[0].logits[0].argmax(0).cpu()
    errors = torch.tensor([[255, 255, 255], [180, 50, 0], [200, 200, 200]], dtype=torch.uint8)
    kind = torch.where(truth == data.IGNORE, 2, (prediction != truth).long())
    pictures = (palette[truth.long()], palette[prediction], errors[kind])
    return [picture.permute(2, 0, 1) for picture in pictures]


# ---- training ----


def read_log(path: Path) -> list[dict]:
    """The events of a run's log.jsonl, without a last line still being written; [] where it is missing."""
    events = []
    lines = path.read_text().splitlines() if path.exists() else []
    for n, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            events.append({"event": event["event"], "iteration": event["iteration"]} | event)
        except (ValueError, KeyError, TypeError):
            if n < len(lines):
                raise InputError(f"{path}: line {n} is no event of a run; mend or move the file") from None
    return events


def draw_training(run: RunResult, runs: list[RunResult], viewer: Viewer):
    """Loss terms, GFLOPs, inter and intra, sigma², cluster sizes and scores over iterations."""
    events = read_log(run.checkpoint["path"].with_name("log.jsonl"))
    updates = [event for event in events if event["event"] == "kmeans"]
    panels: dict[str, dict] = {}  # title: label -> points

    def line(title: str, label: str, *path, scale: int = 1) -> None:
        """Adds a curve: what the events hold under a key, or under keys one inside the other."""
        points = []
        for event in events:
            value = event
            with contextlib.suppress(KeyError, TypeError):  # not an event that has it
                for key in path:
                    value = value[key]
                points.append((event["iteration"], scale * value))
        if points:
            panels.setdefault(title, {})[label] = points

    for term in dict.fromkeys(key for event in events for key in event if key.startswith("loss_")):
        line("terms of the loss", term[5:].replace("_", " "), term)
    for term in ("task", "cost", "clustering"):
        line("gradient to A(x)", term, f"A_gradient_{term}")
    line("inside the margin, %", "hinge active", "hinge_active", scale=100)
    line("GFLOPs per image", "real", "gflops_real")
    line("GFLOPs per image", "expected", "gflops_expected")
    line("distances in A", "inter", "inter")
    line("distances in A", "intra, pairs", "intra")
    line("distances in A", "to centre", "intra_to_centre")
    line("σ²", "spread about the centres", "sigma2")
    for k in range(len(updates[0]["sizes"]) if updates else 0):
        line("images per cluster", f"expert {k}", "sizes", k)
    line("evaluation, %", "mIoU", "miou", scale=100)
    line("evaluation, %", "box AP", "box", "AP", scale=100)
    line("evaluation, %", "mask AP", "mask", "AP", scale=100)
    if not panels:
        return None
    rows = -(-len(panels) // 2)
    figure, axes = new_figure(PAGE, 1.9 * rows, rows, 2, sharex=True)
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    ticks = [event["iteration"] for event in updates]
    for ax, (title, lines) in zip(axes.flat, panels.items()):
        for j, (label, points) in enumerate(lines.items()):
            curve(ax, j, *zip(*points), label, marks=title == "evaluation, %" or len(points) == 1)
        along_x = ax.get_xaxis_transform()
        ax.plot(ticks, [0.012] * len(ticks), "|", color="0.45", ms=4, mew=0.6, transform=along_x)
        ax.set(ylabel=title, xlabel="iteration")
        ax.xaxis.set_tick_params(labelbottom=True)
        ax.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=3, columnspacing=0.8)
    axes.flat[0].set_yscale("symlog", linthresh=1e-3, linscale=0.3)
    note = "; ticks at the bottom: K-means updates" if updates else ""
    figure.suptitle(with_gate(run.name, run.gate) + note, fontsize=8, x=0.01, ha="left")
    return figure


# ---- comparisons ----


def trade_off_points(runs: list[RunResult], score: str, paper: list[dict[str, str]]) -> list[tuple]:
    """Per setting, and per published row: label, (GFLOPs, deviation), (score, deviation), colour, fill."""
    points, colors = [], COLORS[3:] if paper else COLORS  # the first three are of published rows
    for setting, color in zip(group_runs(runs), itertools.cycle(colors)):
        count = f" ({len(setting.runs)} runs)" if len(setting.runs) > 1 else ""
        place = setting.mean_std("GFLOPs"), setting.mean_std(score)
        points.append((setting.label + count, *place, color, color))
    for row in paper:
        if row["measure"] != score:
            continue
        color = COLORS[2] if row["source"].startswith("DR ") else COLORS[1]  # Dynamic Routing's own numbers
        if not row["gate"]:
            color = "0.4"
        elif row["method"].startswith("DivDR"):
            color = COLORS[0]
        x = float(row["gflops"]), float(row["gflops_std"] or 0)
        y = float(row["score"]), float(row["score_std"] or 0)
        label = with_gate(row["method"], row["gate"]) + (f", K {row['k']}" if row["k"] else "")
        points.append((f"{label} ({row['source']})", x, y, color, "white"))
    return points


def draw_trade_off(runs: list[RunResult], published: bool):
    """Score against GFLOPs, a point for each setting with its deviation over seeds (figure 8 of the paper).

    With `published` the papers' points are there too, as open markers: blue DivDR, orange Dynamic Routing in
    the DivDR paper, green Dynamic Routing's own numbers, grey static networks.
    """
    paper, panels = published_of(runs) if published else [], {}
    for score in [column for column in columns_of(runs, paper) if column in SCORES]:
        panels[score] = trade_off_points([run for run in runs if score in run.numbers], score, paper)
    if not panels:
        return None
    heights = [max(3.2, 0.18 * len(points)) for points in panels.values()]  # the legend has a line for each
    figure, axes = new_figure(PAGE, sum(heights), len(panels), height_ratios=heights)
    for ax, (score, points) in zip(axes.flat, panels.items()):
        for j, (label, (x, dx), (y, dy), color, fill) in enumerate(points):
            marker = MARKERS[(j + j // len(MARKERS)) % len(MARKERS)]
            ax.errorbar(x, y, dy or None, dx or None, color=color, ls="none", elinewidth=0.8, capsize=2)
            ax.plot(x, y, color=color, marker=marker, ms=6, ls="none", label=label, mfc=fill, zorder=3)
        low, high = ax.dataLim.intervalx
        if 0 < 8 * low < high:
            ax.set_xscale("log")
        else:
            ax.locator_params(axis="x", nbins=5)
        shown = next((run for run in runs if score in run.numbers), None)
        count = table_count((shown or runs[0]).result.flops)
        where = f"{shown.metrics['dataset']} {shown.metrics['split']}" if shown else "published"
        ax.set(xlabel=f"GFLOPs per image, count: {count}", ylabel=f"{score}, %, {where}")
        ax.margins(0.1)
        ax.grid(color="0.9", lw=0.5)
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    if published:
        figure.supxlabel(OF_PAPERS, fontsize=7)
    return figure


def find_sweep(runs: list[RunResult], name: str) -> list[tuple[str, list[Setting]]]:
    """Where runs differ in `name` and, seeds apart, in nothing else: a label, and the settings along it."""
    sweeps = []
    for rest in group_runs([run for run in runs if run.grid], apart_from=name):
        along = sorted(group_runs(rest.runs), key=lambda setting: setting.config.get(name) or 0)
        if len(along) > 1:
            sweeps.append((rest.label, along))
    return sweeps


def draw_ablations(runs: list[RunResult], published: bool = False):
    """Scores, GFLOPs, inter and intra against each swept setting (figures 6 and 7, table 3 of the paper)."""
    sweeps = {name: find_sweep(runs, name) for name in SWEPT}
    sweeps = {name: lines for name, lines in sweeps.items() if lines}
    if not sweeps:
        return None
    columns = columns_of(runs)
    width, legend = max(2.4 * len(sweeps), 3.2), 0.3 + 0.2 * max(map(len, sweeps.values()))
    size = (width, 1.35 * len(columns) + legend)
    figure, axes = new_figure(*size, len(columns), len(sweeps), sharex="col", sharey="row")
    for below, (name, lines) in zip(axes.T, sweeps.items()):
        values = sorted({setting.config[name] for _, along in lines for setting in along})
        for ax, column in zip(below, columns):
            for j, (label, along) in enumerate(lines):
                along = [setting for setting in along if setting.mean_std(column)]
                x = [values.index(setting.config[name]) for setting in along]
                mean = [setting.mean_std(column)[0] for setting in along]
                deviation = [setting.mean_std(column)[1] or 0 for setting in along]
                curve(ax, j, x, mean, label, deviation)
            ax.set_ylabel(f"{column}, %" if column in (*SCORES, "Recovered") else column)
            ax.grid(color="0.9", lw=0.5)
            ax.margins(x=0.12, y=0.15)
            ax.label_outer()
        ax.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        ax.set_xlabel(setting_name(name))
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.42))
    figure.align_ylabels()
    return figure


# A figure is a function and a line here; all of a kind take the same arguments, and None has nothing to draw.
FIGURES_OF_A_RUN = {
    "predictions": draw_predictions, "experts": draw_experts, "routes": draw_routes,
    "training": draw_training}
FIGURES_OF_ALL = {
    "activations": draw_activation_space, "trade-off": draw_trade_off, "ablations": draw_ablations}


@one_line_errors(InputError, data.DataError, OSError)
def main(argv: list[str] | None = None, process: Process | None = None) -> None:
    """The command; `process` where one has been started already."""
    os.environ["MPLBACKEND"] = "agg"  # figures become files; a backend for windows may not be there
    import matplotlib

    arguments = parse(argv)
    arguments.folders = output_folders(arguments, arguments.out)
    arguments.expert_folders = output_folders(arguments, arguments.experts)
    UNWRITTEN.clear()
    process = process or start_process(arguments.device, arguments.workers)
    for flag in ("figures", "predictions", "out", "experts"):  # before what takes long
        if getattr(arguments, flag):
            make_folder(getattr(arguments, flag), f"--{flag}")
    wanted = "a checkpoint; training writes them to runs/NAME/last.pt"
    if arguments.variant:
        wanted = "a checkpoint of Dynamic Routing's authors"
    for path in arguments.checkpoint:
        if not path.is_file() and path.suffix != ".json":
            read_file(path, wanted)  # says what is wrong
    with matplotlib.rc_context(STYLE):
        report(arguments, process)
    flags = ("figures", "predictions", "out", "image", "experts")
    asked_for = any(getattr(arguments, flag) for flag in flags)
    if UNWRITTEN and not asked_for:
        print("--out DIR writes elsewhere", file=sys.stderr)
    elif UNWRITTEN:
        raise InputError(f"{UNWRITTEN[0]}: could not be written ({len(UNWRITTEN)} such files)")


def report(arguments: argparse.Namespace, process: Process) -> None:
    """Evaluates all checkpoints, or shows --image; then tables and figures."""
    if arguments.experts:
        return report_experts(arguments, process)
    if arguments.checkpoint[0].suffix == ".json":
        return show(arguments, ExpertViewer(arguments, process))
    runs = []
    if not arguments.image:
        runs = [evaluate_checkpoint(arguments, path, process) for path in arguments.checkpoint]
    if dist.is_initialized():  # the first process does the rest alone, and answers for all
        UNWRITTEN[:] = gather_rows(UNWRITTEN, process)
        dist.destroy_process_group()
    if process.rank > 0:
        UNWRITTEN.clear()
        return
    if arguments.image:
        model, checkpoint = open_checkpoint(arguments, arguments.checkpoint[0], process)
        show(arguments, Viewer(model, checkpoint, None, process, arguments.min_score))
        return
    if arguments.table:
        print_tables(arguments, runs)
    if arguments.figures:
        draw_figures(arguments, runs, process)


def report_experts(arguments: argparse.Namespace, process: Process) -> None:
    """Cuts the experts of all checkpoints out; then one table, and figures."""
    if process.world > 1:
        raise InputError("--experts: runs in one process; start it without torchrun")
    if arguments.onnx:
        for package in ("onnx", "onnxscript"):
            if importlib.util.find_spec(package) is None:
                raise InputError(f"--onnx: needs the package {package}: pip install onnx onnxscript")
    cuts = []
    for path in arguments.checkpoint:
        cuts.append(cut_experts(arguments, path, process, cuts[0].run.task if cuts else None))
    print(render(cut_table(cuts), arguments.format or "text"))
    first = cuts[0].run.metrics
    note = f"On {first['dataset']} {arguments.split}, {first['images']} images; GFLOPs: mean per image, the "
    timed = min(TIMED, first["images"])
    note += f"dispatcher's stem counted; s/image: median of {timed} images, each alone, "
    note += f"on {process.device}; by A(x): the routed network that says where an image goes is not counted."
    if arguments.format != "csv":
        print(("% " if arguments.format == "latex" else "\n") + note)
    if arguments.figures:
        for i, cut in enumerate(cuts):
            if cut.run.name in [other.run.name for other in cuts[:i]]:
                cut.run.name = f"{cut.run.name}-{i + 1}"
            save_figure(draw_cut(cut), arguments.figures, f"cut-{cut.run.name}")
        save_figure(draw_keep(cuts), arguments.figures, "keep")


if __name__ == "__main__":
    main()
