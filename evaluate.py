"""Evaluate checkpoints of train_seg.py and train_det.py: scores and tables; or show what one predicts.

    python evaluate.py runs/NAME/last.pt    # scores, cost and experts; writes metrics.json
    # one table, mean ± std over seeds, with the papers' numbers beside them
    python evaluate.py runs/*/last.pt --published --format markdown
    python evaluate.py runs/NAME/last.pt --image FILE_OR_FOLDER     # predictions, and which expert took each
    python evaluate.py runs/NAME/last.pt --figures DIR              # every figure (extras/figures.py)
    python evaluate.py runs/NAME/last.pt --experts DIR              # as static networks (extras/experts.py)
    torchrun --nproc_per_node 8 evaluate.py runs/NAME/last.pt       # eight processes; each image counts once

The checkpoint knows its network, data set and classes; flags override what can differ. What is written beside
it, or in --out, names checkpoint and split where these are not last.pt and val: metrics-test.json. A table
takes its numbers from there while the checkpoint is not newer; all else is computed anew.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import io
import itertools
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import data
from kmeans import Clusters, describe_collapse, inter_intra, intra_to_centre
from model import (
    VARIANTS, InputError, Parser, Process, cores_per_process, extra, load_checkpoint, make_folder, number,
    one_line_errors, read_file, start_process, table, three_digits, write_file,
)
from routing import Routes, fuse

# Flags on which the scores depend, with the checkpoint and the split.
OF_SCORES = ("variant", "dataset", "data", "json", "images", "labels", "list", "limit", "eval_batch")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    theirs = [name for name, variant in VARIANTS.items() if not variant.static and not variant.lambda2]
    datasets = list(dict.fromkeys([*data.SEGMENTATION, *data.DETECTION]))
    workers = min(4, cores_per_process() // 2)
    add = parser.add_argument
    add("checkpoint", type=Path, nargs="+", help="files of train_seg.py or train_det.py; several: one table")
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
    add("--format", choices=["text", "markdown", "latex", "csv"], help="a table; csv: a row for each run")
    add("--image", type=Path, help="show this picture, or those in this folder, in overlays/ or in --out")
    add("--out", type=Path, metavar="DIR", help="folder for what is written, by default the checkpoint's")
    add("--predictions", type=Path, metavar="DIR", help="segmentation: also write label PNGs")
    add("--min-score", type=number(float, 0, 1), default=0.5, help="detection: lowest score that is drawn")

    add = parser.add_argument_group("experts as static networks").add_argument
    add("--experts", type=Path, metavar="DIR", help="cut out the experts and one network for all")
    add("--keep", type=number(float, 0, 0.999),
        help="a path stays if more than this share of an expert's images open it; 0.01 by default")
    add("--cut-from", choices=data.SPLITS, help="the split whose images say what is open; train by default")
    add("--export-size", type=number(int, 32), nargs=2, metavar=("H", "W"),
        help="export for this size alone; by default for any, but where the images are too small for that")
    add("--onnx", action="store_true", help="export to ONNX too; needs the packages onnx and onnxscript")

    add = parser.add_argument_group("system").add_argument
    add("--device", help="cpu, cuda or mps; by default the best there is")
    add("--workers", type=number(int, 0), default=workers, help="loader processes")
    add("--eval-batch", type=number(int, 1), help="images at a time; in segmentation of one size")
    arguments = parser.parse_args(argv)

    different = {path.resolve(): path for path in arguments.checkpoint}  # however they are written
    arguments.checkpoint = list(different.values())
    several = len(arguments.checkpoint) > 1
    if several and (arguments.image or arguments.predictions):
        parser.error("--image and --predictions take one checkpoint")
    needs = dict.fromkeys(("labels", "list"), "images")
    needs |= dict.fromkeys(("keep", "cut_from", "export_size", "onnx"), "experts")
    for flag, other in needs.items():
        value = getattr(arguments, flag)
        if value is not None and value is not False and not getattr(arguments, other):
            parser.error(f"--{flag.replace('_', '-')}: goes with --{other}")
    idle = {"experts": ["image", "predictions", "published", "figures", "out"]}
    idle["image"] = [*OF_SCORES[2:-1], "predictions", "published", "format"]
    for flag, others in idle.items():
        for other in others if getattr(arguments, flag) else ():
            if getattr(arguments, other):
                parser.error(f"--{flag}: does not go with --{other}")
    arguments.keep = 0.01 if arguments.keep is None else arguments.keep
    arguments.cut_from = arguments.cut_from or "train"
    arguments.table = several or arguments.published or arguments.format is not None
    return arguments


# ============ one pass over a split ============


@dataclass
class Result:
    """What one pass over an evaluation set gave, the same on every process."""

    A: Tensor  # [N, D] what is clustered of each image, in the order of the data set
    flops: dict[str, Tensor]  # per count: [N] real multiply-adds of each image, of detectors the backbone's
    sizes: Tensor  # [N, 2] int64: height and width at which each image was run


@dataclass
class SegmentationResult(Result):
    confusion: Tensor  # [classes, classes] int64 pixels, rows: truth, columns: prediction

    def iou(self) -> Tensor:
        """[classes] intersection over union in 0..1; nan for a class neither in the truth nor predicted."""
        hits = self.confusion.diag().double()
        return hits / (self.confusion.sum(0) + self.confusion.sum(1) - hits)

    def miou(self) -> float:
        return self.iou().nanmean().item()

    def scores(self) -> dict:
        """mIoU and IoU by class on 0..1, nan for a class that does not occur."""
        return {"miou": self.miou(), "iou": self.iou().tolist()}


@torch.no_grad()
def evaluate_segmentation(
    model, loader, num_classes: int, process: Process, gate_space: str = "alpha", save=None
) -> SegmentationResult:
    """Runs `model` over `loader` (this process's share) and gathers over processes; each image counts once.

    gate_space: what `Result.A` holds, see `Routes.activations`. save: called with (index, prediction uint8
    [H, W]) for every image.
    """
    network = fuse(copy.deepcopy(model).eval())
    # One more bin, for the pixels that are not labelled.
    confusion = torch.zeros(num_classes**2 + 1, dtype=torch.int64, device=process.device)
    rows = []  # per batch: indices, A, sizes, and the cost by count
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
        rows.append((index, out.routes.activations(gate_space).cpu(), size, cost))
        if save:
            for i, labels in zip(index.tolist(), prediction.to(torch.uint8)):
                save(i, labels)
    if process.world > 1:
        dist.all_reduce(confusion)
    indices, A, sizes, costs = zip(*gather_rows(rows, process))
    order = torch.cat(indices).argsort()
    flops = {count: torch.cat([cost[count] for cost in costs])[order] for count in model.counts}
    confusion = confusion[:-1].view(num_classes, num_classes).cpu()
    return SegmentationResult(torch.cat(A)[order], flops, torch.cat(sizes)[order], confusion)


KINDS = (("box", "bbox"), ("mask", "segm"))  # of detections: our name and pycocotools'


@dataclass
class DetectionResult(Result):
    detections: list[dict]  # in COCO's results format

    def scores(self, dataset, masks: bool) -> dict[str, dict[str, float]]:
        """pycocotools' numbers on 0..1, of boxes and, with `masks`, of masks."""
        kinds = KINDS[: 1 + masks]
        return {name: average_precision(dataset, self.detections, kind)[0] for name, kind in kinds}


@torch.no_grad()
def evaluate_detection(
    model, loader, dataset, process: Process, gate_space: str = "alpha"
) -> DetectionResult:
    """Runs `model` over `loader` (this process's share) and gathers over processes; each image counts once.

    The backbone's cost is counted at the size to which each image was resized, and at 800x800 for the papers'
    tables. gate_space: what `Result.A` holds, see `Routes.activations`.
    """
    network = fuse(copy.deepcopy(model).eval())
    rows = []  # per image: index, A, cost of the backbone by count, size, detections
    for images, _, index in tqdm(loader, "evaluating", disable=process.rank > 0, leave=False):
        out = network([data.as_float(image.to(process.device)) for image in images])
        A = out.routes.activations(gate_space).cpu()
        for b, i in enumerate(index.tolist()):
            routes = Routes(*(part[b : b + 1] for part in out.routes))
            sizes = {count: (*out.sizes[b], count) for count in model.counts}
            sizes["paper at 800x800"] = (800, 800, "paper")
            cost = {name: sum(model.real_cost(routes, *size).values()).item() for name, size in sizes.items()}
            rows.append((i, A[b], cost, out.sizes[b], coco_results(dataset, i, out.detections[b])))
    rows = sorted(gather_rows(rows, process), key=lambda row: row[0])
    _, A, costs, sizes, found = zip(*rows)
    flops = {name: torch.tensor([cost[name] for cost in costs]) for name in costs[0]}
    return DetectionResult(torch.stack(A), flops, torch.tensor(sizes), list(itertools.chain(*found)))


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
    from pycocotools.cocoeval import COCOeval

    names = ["AP", "AP50", "AP75", "AP small", "AP medium", "AP large"]
    names += ["AR 1", "AR 10", "AR 100", "AR small", "AR medium", "AR large"]
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
            results = data.coco_of(dataset.coco.dataset["images"], [], dataset.classes)
        evaluator = COCOeval(dataset.coco, results, kind)
        evaluator.params.imgIds = dataset.rows
        evaluator.evaluate()
        evaluator.accumulate()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluator.summarize()
    return dict(zip(names, evaluator.stats.tolist())), printed.getvalue()


# ============ a checkpoint and its data ============


def open_checkpoint(arguments: argparse.Namespace, path: Path, process: Process):
    """-> the model, and what the file holds, with its "path" and its "clusters" (None where it has none)."""
    if arguments.variant:
        model, checkpoint = open_published(arguments, path, process)
    else:
        model, checkpoint = load_checkpoint(path, process.device)
    return model, describe_checkpoint(arguments, checkpoint, path)


def describe_checkpoint(arguments: argparse.Namespace, checkpoint: dict, path: Path) -> dict:
    """The contents of a checkpoint, with its "path" and "clusters". Raises InputError where one lacks, and
    for flags that do not go with its task."""
    needed = {"task", "dataset", "data", "data_options", "classes", "palette", "config", "bank"}
    if not needed <= checkpoint.keys() or "clusters" not in checkpoint["bank"]:
        raise InputError(f"{path}: no whole checkpoint; give one that this version's train_*.py wrote")
    for flag in ("predictions", "labels", "list") if checkpoint["task"] == "detection" else ("json", "limit"):
        if getattr(arguments, flag):
            raise InputError(f"--{flag}: does not apply to {path}, a checkpoint for {checkpoint['task']}")
    clusters = checkpoint["bank"]["clusters"]
    return checkpoint | {"path": path, "clusters": clusters and Clusters(**clusters)}


def open_published(arguments: argparse.Namespace, path: Path, process: Process):
    """The model of a checkpoint of Dynamic Routing's authors, and what our own would say about it."""
    published = extra("published", f"--variant {arguments.variant}")
    model, checkpoint = published.load(path, arguments.variant, process.device)
    info = data.SEGMENTATION.get(arguments.dataset, data.SEGMENTATION["cityscapes"])
    classes = checkpoint["model_args"]["num_classes"]
    if classes != len(info.classes):
        needed = f"{info.name} has {len(info.classes)}; give its --dataset"
        raise InputError(f"{path}: has {classes} classes, {needed}")
    about = dict(
        task="segmentation", dataset=info.name, data=None, data_options={}, classes=list(info.classes),
        palette=info.palette, config={"k": 4}, bank={"clusters": None})
    return model, checkpoint | about


@dataclass
class Split:
    """A split of a checkpoint's data, and how networks of its task run on it, or on some of its images."""

    name: str  # "train", "val" or "test"
    dataset: data.Dataset
    checkpoint: dict
    process: Process
    batch: int | None  # images at a time; None: as many as suits them
    workers: int

    @property
    def segmentation(self) -> bool:
        return self.checkpoint["task"] == "segmentation"

    @property
    def gate_space(self) -> str:
        """Which values of the gates are clustered."""
        return self.checkpoint["config"].get("gate_space", "alpha")

    def loader(self, only: list[int] | None = None):
        """Batches of this process's share of all images, or of those whose indices `only` lists."""
        usual = self.dataset.eval_batch if self.segmentation else self.checkpoint["config"]["eval_batch"]
        batch = self.batch or usual
        rank, world = self.process.rank, self.process.world
        return data.pass_loader(self.dataset, batch, self.workers, rank, world, only=only)

    def prepare(self, images):
        """A batch of the loader as the model takes it."""
        if self.segmentation:
            return data.normalize(images.to(self.process.device))
        return [data.as_float(image.to(self.process.device)) for image in images]

    def evaluate(self, model, only: list[int] | None = None, save=None) -> Result:
        """A pass of evaluation over all images, or over those whose indices `only` lists."""
        loader = self.loader(only)
        if self.segmentation:
            classes = len(self.checkpoint["classes"])
            return evaluate_segmentation(model, loader, classes, self.process, self.gate_space, save)
        return evaluate_detection(model, loader, self.dataset, self.process, self.gate_space)

    def scores(self, results: list[Result]) -> dict[str, float]:
        """Scores in % of passes over parts of the split that make up the whole; {} without labels."""
        if self.segmentation:
            whole = dataclasses.replace(results[0], confusion=sum(result.confusion for result in results))
            return {"mIoU": 100 * whole.miou()} if whole.confusion.any() else {}
        if not self.dataset.has_truth:
            return {}
        found = [detection for result in results for detection in result.detections]
        whole = dataclasses.replace(results[0], detections=found)
        scores = whole.scores(self.dataset, self.checkpoint["model_args"]["masks"])
        return {f"{kind} AP": 100 * values["AP"] for kind, values in scores.items() if values["AP"] >= 0}

    def report(self, result: Result) -> tuple[dict, str]:
        """Scores in %, as metrics.json has them, and as text. Those of a detector are the first process's."""
        if self.segmentation:
            miou, rows = 100 * result.miou(), [["class", f"IoU % {self.name}"]]
            iou = dict(zip(self.checkpoint["classes"], (100 * result.iou()).tolist()))
            for name, value in iou.items():
                rows.append([name, "absent" if math.isnan(value) else f"{value:.2f}"])
            rows.append(["mean", "no labels" if math.isnan(miou) else f"{miou:.2f}"])  # of a test split
            return {"miou": miou, "iou": iou}, f"{table(rows, left=1)}   over {len(result.A)} images"
        metrics, tables = {"detections": len(result.detections)}, []
        for name, kind in KINDS[: 1 + self.checkpoint["model_args"]["masks"]]:
            metrics[name], printed = None, "no labels\n"  # a test split has none
            if self.dataset.has_truth and self.process.rank == 0:
                scores, printed = average_precision(self.dataset, result.detections, kind)
                metrics[name] = {key: 100 * value if value >= 0 else None for key, value in scores.items()}
            tables.append(f"{name}, {self.name}, by pycocotools, over {len(result.A)} images\n{printed}")
        return metrics, "\n".join(tables)


def open_split(
    arguments: argparse.Namespace, checkpoint: dict, process: Process, name: str | None = None
) -> Split:
    """The data set to evaluate on, by the flags and, where they are silent, as in training.

    name: another split than --split, of the same data.
    """
    if name not in (None, arguments.split):
        own = dict.fromkeys(("images", "labels", "list", "json"))
        arguments = argparse.Namespace(**vars(arguments) | own | {"split": name})
    split, name = arguments.split, arguments.dataset or checkpoint["dataset"]
    same = name == checkpoint["dataset"]
    root = arguments.data or (checkpoint["data"] if same else None)
    options = dict(checkpoint["data_options"]) if same else {}
    trained_on = checkpoint.get("files", {}) if same and not arguments.data else {}
    trained_on = trained_on.get(split, {})
    if checkpoint["task"] == "segmentation":
        info = checkpoint.get("info") if same else None
        info = info and data.DatasetInfo(**info)
        own = {"images": arguments.images, "labels": arguments.labels, "names": arguments.list}
        files = own if arguments.images else trained_on
        if arguments.images and not arguments.labels:
            raise InputError(f"--images {arguments.images}: needs --labels, the folder of their label PNGs")
        if name == "folder" and info is None:
            raise InputError(f"--dataset folder: {checkpoint['path']} was trained on {checkpoint['dataset']}")
        if name == "folder" and not root and not files:
            words = "this run knows no such files; name them with --images and --labels"
            raise InputError(f"--split {split}: {words}")
        dataset = data.segmentation_dataset(name, root, split, train=False, info=info, **files, **options)
        classes = list(dataset.info.classes)
    else:
        options["annotations"] = arguments.json or trained_on.get("annotations")
        options["images"] = arguments.images or trained_on.get("images")
        if arguments.limit or arguments.json or arguments.data:
            options["limit"] = arguments.limit
        options["masks"] = checkpoint["model_args"]["masks"]
        dataset = data.detection_dataset(name, root, split, train=False, **options)
        classes = dataset.classes
    if classes != checkpoint["classes"]:
        theirs = f"{len(checkpoint['classes'])} of {checkpoint['path']}, trained on {checkpoint['dataset']}"
        first, *_ = sorted(set(classes) ^ set(checkpoint["classes"])) or ["their order"]
        raise InputError(f"--dataset {name}: its {len(classes)} classes are not the {theirs}; see {first}")
    return Split(split, dataset, checkpoint, process, arguments.eval_batch, arguments.workers)


# ============ the report of one checkpoint ============


@dataclass
class Run:
    """A checkpoint, its scores on a split and, where it was evaluated now, what the split gave."""

    name: str
    checkpoint: dict  # its contents but for weights and the like
    metrics: dict  # what metrics.json says
    clusters: Clusters | None = None
    result: Result | None = None

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
    def labels(self) -> Tensor:
        """[N] the expert that takes each image."""
        return self.clusters.nearest(self.result.A)[0]

    @property
    def facts(self) -> dict:
        """The settings by which runs can differ, but for those that the variant has anyway."""
        variant, config = VARIANTS[self.variant], self.checkpoint["config"]
        usual = dict(lambda1=variant.lambda1, budget=variant.budget, lambda2=variant.lambda2)
        facts = {}
        for name, value in config.items():
            of_data = name.startswith("train_")
            if (of_data or name not in INCIDENTAL) and value not in (None, usual.get(name)):
                facts[name] = value
        if self.metrics["dataset"] == "folder" and config.get("data"):  # the name of all that people bring
            facts["data"] = str(Path(config["data"]))
        return facts | {"variant": self.variant}

    @property
    def count(self) -> str:
        """Which count of FLOPs stands in tables and figures: the papers', in detection at their 800x800."""
        counts = self.metrics["gflops"]
        return next(name for name in ("paper at 800x800", "paper", "exact") if name in counts)

    @property
    def numbers(self) -> dict[str, float]:
        """What tables and figures show, by column: scores in %, GFLOPs per image, distances."""
        metrics = self.metrics
        numbers = {
            "mIoU": metrics.get("miou"),
            "box AP": (metrics.get("box") or {}).get("AP"),
            "mask AP": (metrics.get("mask") or {}).get("AP"),
            "GFLOPs": metrics["gflops"][self.count]["mean"],
            "Inter": metrics.get("inter"),
            "Intra": metrics.get("intra"),
            "To centre": metrics.get("intra_to_centre"),
            "Recovered": metrics.get("subsets", {}).get("accuracy"),
        }
        return {name: n for name, n in numbers.items() if n is not None and not math.isnan(n)}


def name_of_run(path: Path) -> str:
    return path.resolve().parent.name + ("" if path.stem == "last" else f"-{path.stem}")


def about_run(path: Path, checkpoint: dict, metrics: dict, **more) -> Run:
    """A run, of whose checkpoint the weights are not kept."""
    wanted = ("path", "task", "dataset", "data", "model_args", "config", "classes", "palette", "iteration")
    return Run(name_of_run(path), {key: checkpoint[key] for key in wanted}, metrics, **more)


def kept_run(arguments, path: Path) -> Run | None:
    """A run by the metrics.json of a checkpoint that is not newer, if it was written with the same flags."""
    file = arguments.folders[path] / output_name("metrics.json", path, arguments.split)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        metrics = json.loads(file.read_text())
        newer = path.stat().st_mtime_ns > file.stat().st_mtime_ns
        whole = {"dataset", "split", "images"} <= metrics.keys()
        if whole and not newer and metrics.get("flags", {}) == given_flags(arguments):
            checkpoint = describe_checkpoint(arguments, read_file(path, "a checkpoint"), path)
            run = about_run(path, checkpoint, metrics)
            return run if run.numbers else None
    return None


def given_flags(arguments) -> dict:
    """What --data and the like say; scores are of no other."""
    return {name: value for name in OF_SCORES if (value := getattr(arguments, name)) is not None}


def output_name(name: str, path: Path, split: str) -> str:
    """The name of a file, with checkpoint and split in it where these are not last.pt and val."""
    stem, ending = name.split(".")
    told = [part for part in (path.stem, split) if part not in ("last", "val")]
    return "-".join([stem, *told]) + "." + ending


def evaluate_checkpoint(arguments, path: Path, process: Process) -> Run:
    """Evaluates on a split; the first process reports, and then writes files."""
    model, checkpoint = open_checkpoint(arguments, path, process)
    split, save = open_split(arguments, checkpoint, process), None
    if arguments.predictions:
        save = prediction_writer(arguments, split)
    result = split.evaluate(model, save=save)
    scores, text = split.report(result)
    metrics = {
        "checkpoint": str(path), "variant": checkpoint["model_args"]["variant"], "split": arguments.split,
        "dataset": arguments.dataset or checkpoint["dataset"], "iteration": checkpoint["iteration"],
        "images": len(result.A), **scores,
    }
    metrics["gflops"] = {count: mean_min_max(flops) for count, flops in result.flops.items()}
    if given_flags(arguments):
        metrics["flags"] = given_flags(arguments)
    clusters = checkpoint["clusters"]
    if model.dim and clusters is None:
        if process.rank == 0:
            print(f"{path}: has no centres: clustering {arguments.split} instead", file=sys.stderr)
        clusters = Clusters.of(result.A, checkpoint["config"]["k"])
    run = about_run(path, checkpoint, metrics, clusters=clusters, result=result)
    if clusters is not None:
        metrics |= describe_experts(result.A, result.flops["paper"], clusters.centers, run.labels)
        if split.dataset.subset is not None:
            shapes = extra("shapes", "--dataset shapes")
            k, flops = metrics["k"], result.flops["paper"]
            metrics["subsets"] = shapes.recovery(run.labels, k, flops, split.dataset)
    if process.rank > 0:
        return run
    if arguments.table:
        shown = ", ".join(f"{column} {value:.4g}" for column, value in run.numbers.items())
        print(f"{path}: {shown}", file=sys.stderr)
    else:
        print_report(run, text)
    files = {"metrics.json": as_json(metrics, indent=2)}
    if not split.segmentation:
        files["detections.json"] = as_json(result.detections)
    for name, content in files.items():
        target = arguments.folders[path] / output_name(name, path, arguments.split)
        if write(arguments, target, lambda file: file.write(f"{content}\n".encode())) and not arguments.table:
            print(f"wrote {target}")
    return run


def write(arguments, path: Path, writer) -> bool:
    """Writes a file as `write_file` does; where that fails it is noted: what was computed is worth more."""
    try:
        with contextlib.suppress(OSError):  # the file's own error names the file
            path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, writer)
        return True
    except InputError as error:
        arguments.unwritten.append(str(error))
        return False


def as_json(content, indent: int | None = None) -> str:
    """json, in which what is not finite is null."""
    try:
        return json.dumps(content, indent=indent, allow_nan=False)
    except ValueError:
        finite = json.loads(json.dumps(content), parse_constant=lambda name: None)
        return json.dumps(finite, indent=indent)


def prediction_writer(arguments, split: Split):
    """-> save(index, prediction uint8 [H, W]): a PNG of label ids under the image's own name.

    Raises InputError where it would lie among the images and labels of any split.
    """
    folder, dataset = arguments.predictions, split.dataset

    def place(index: int) -> Path:
        return (folder / dataset.image_name(index)).with_suffix(".png")

    files = [path for own in split.checkpoint.get("files", {}).values() for path in own.values() if path]
    data_lie_in = [Path(path).resolve() for path in (*getattr(dataset, "folders", ()), *files)]
    for parent in {place(index).parent.resolve() for index in range(len(dataset))}:
        if any(parent.is_relative_to(path) for path in data_lie_in):
            raise InputError(f"--predictions {folder}: the data set's own files lie there; name another")
    label_of_class = torch.arange(256, dtype=torch.uint8)
    for label, class_id in dataset.info.label_ids.items():
        if class_id != data.IGNORE:
            label_of_class[class_id] = label

    def save(index: int, prediction: Tensor) -> None:
        picture = Image.fromarray(label_of_class[prediction.cpu().long()].numpy())
        write(arguments, place(index), lambda file: picture.save(file, "png"))

    return save


def mean_min_max(flops: Tensor) -> dict[str, float]:
    """Of multiply-adds [N], in G."""
    values = flops.double() / 1e9
    return {"mean": values.mean().item(), "min": values.min().item(), "max": values.max().item()}


def describe_experts(A: Tensor, flops: Tensor, centers: Tensor, labels: Tensor) -> dict:
    """A: [N, D]; flops: [N], paper count; centers: [K, D]; labels: [N]. Distances are in the units of A."""
    inter, intra = inter_intra(A, labels, centers)
    experts = range(len(centers))
    return {
        "k": len(centers), "inter": inter, "intra": intra,
        "intra_to_centre": intra_to_centre(A, labels, centers),
        "images_per_expert": [int((labels == k).sum()) for k in experts],
        "gflops_per_expert": [flops[labels == k].double().mean().item() / 1e9 for k in experts],
    }


def print_report(run: Run, scores: str) -> None:
    """Scores, as text, cost, experts and, where they are known, recovered subsets."""
    metrics = run.metrics
    heading = ("checkpoint", "variant", "dataset", "split", "iteration")
    print(", ".join(f"{key} {metrics[key]}" for key in heading) + f"\n\n{scores}\n")
    rows = [["GFLOPs per image", "mean", "min", "max"]]
    for count, values in metrics["gflops"].items():
        rows.append([count, *map(three_digits, values.values())])
    print(table(rows, left=1) + "   (multiply-adds, 10^9, as the papers count)")
    if "k" not in metrics:
        return
    inter, intra, sizes = metrics["inter"], metrics["intra"], metrics["images_per_expert"]
    within = f"intra {intra:.3f} (pairs in a cluster), {metrics['intra_to_centre']:.3f} (to its centre)"
    print(f"\ninter {inter:.3f} (between the {metrics['k']} centres), {within}")
    rows = [["expert", "images", "share", "GFLOPs"]]
    for k, (size, gflops) in enumerate(zip(sizes, metrics["gflops_per_expert"])):
        cost = three_digits(gflops) if size else "-"
        rows.append([k, size, f"{100 * size / metrics['images']:.1f}%", cost])
    print(table(rows, left=1))
    empty, collapse = sizes.count(0), describe_collapse(sizes, inter, intra)
    if empty:
        print(f"{empty} of {len(sizes)} experts get none of these {metrics['images']} images")
    elif collapse:
        print(collapse)
    if "subsets" in metrics:
        print(extra("shapes", "--dataset shapes").describe_recovery(metrics["subsets"]))
    sys.stdout.flush()


# ============ one table of many checkpoints ============

SCORES = ("mIoU", "box AP", "mask AP")
COLUMNS = (*SCORES, "GFLOPs", "Inter", "Intra", "To centre", "Recovered")  # the last: % of known subsets
SETTING_NAMES = {"k": "K", "lambda1": "λ1", "lambda2": "λ2", "kmeans_every": "K-means every"}
# Settings that decide nothing: names, paths, and what concerns the machine and the log. They may differ on
# --resume, and so they may, with the seed, between runs of which a table shows the mean.
INCIDENTAL = {
    "name", "out", "resume", "workers", "device", "compile", "eval_batch", "log_every", "eval_every",
    "save_every", "data", "classes",
    *(f"{split}_{files}" for split in ("train", "val") for files in ("json", "images", "labels", "list")),
}


@dataclass
class Setting:
    """All seeds of one configuration."""

    runs: list[Run]
    differing: dict[str, object]  # the settings that tell it from the others beside it

    @property
    def method(self) -> str:
        run = self.runs[0]
        route = run.checkpoint["config"].get("route")
        if run.variant == "r50-fpn":
            return "Mask R-CNN" if run.checkpoint["model_args"]["masks"] else "Faster R-CNN"
        return Path(route).name if route else VARIANTS[run.variant].title

    @property
    def label(self) -> str:
        told = [with_gate(self.method, self.runs[0].gate)]
        for name, value in self.differing.items():
            told.append(f"{SETTING_NAMES.get(name, name)} {format_value(value)}")
        return ", ".join(told)

    @property
    def backbone(self) -> str:
        run, args = self.runs[0], self.runs[0].checkpoint["model_args"]
        layers, width = args.get("layers") or (17 if run.task == "detection" else 16), args.get("width") or 64
        routed = f"Layer{layers}" + (f", width {width}" if width != 64 else "")
        return VARIANTS[run.variant].on_resnet or with_gate(routed, run.gate)

    def values(self, column: str) -> list[float]:
        """Of the runs that have the number."""
        return [run.numbers[column] for run in self.runs if column in run.numbers]


def format_numbers(column: str, values: list[float]) -> str:
    """Mean ± deviation; of GFLOPs and parameters three digits that count, else two after the point."""
    if not values:
        return "–"
    counted = column.startswith(("GFLOPs", "parameters"))
    show = three_digits if counted else "{:.2f}".format
    mean = show(statistics.mean(values))
    return f"{mean} ± {show(statistics.stdev(values))}" if len(values) > 1 else mean


def with_gate(words: str, gate: str | None) -> str:
    """The words, and where gates are full: their cost differs from that of small ones."""
    return f"{words}, full gates" if gate == "full" else words


def format_value(value) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return "/".join(Path(value).parts[-2:])  # of a path what tells most
    return f"{value:g}" if isinstance(value, float) else str(value)


def group_runs(runs: list[Run], apart_from: str | None = None) -> list[Setting]:
    """All seeds of one configuration together, and whatever the setting `apart_from` is, if one is named."""
    groups: dict[str, Setting] = {}
    for run in runs:
        facts = {name: value for name, value in run.facts.items() if name not in ("seed", apart_from)}
        key = json.dumps([facts, run.checkpoint.get("classes")], sort_keys=True)
        groups.setdefault(key, Setting([], {})).runs.append(run)
    settings = list(groups.values())
    told = {"seed", apart_from, "variant", "layers", "width", "gate", "route"}  # the first columns tell these
    names = dict.fromkeys(name for setting in settings for name in setting.runs[0].facts)
    for name in names:
        values = {json.dumps(setting.runs[0].facts.get(name)) for setting in settings}
        if name not in told and len(values) > 1:
            for setting in settings:  # the value also where the variant has it anyway
                run = setting.runs[0]
                setting.differing[name] = run.facts.get(name, run.checkpoint["config"].get(name))

    def place(setting: Setting):
        numbers = [value if isinstance(value, (int, float)) else -1 for value in setting.differing.values()]
        return list(VARIANTS).index(setting.runs[0].variant), setting.backbone, numbers

    return sorted(settings, key=place)


def columns_of(runs: list[Run], paper=()) -> list[str]:
    """The columns in which any of the runs has a number, and the scores that a row of the papers has."""
    found = {row["measure"] for row in paper}.union(*(run.numbers for run in runs))
    return [column for column in COLUMNS if column in found]


def make_table(runs: list[Run], paper: list[dict]) -> list[list[str]]:
    """Header and rows as text: one for each setting, then the papers'. Empty columns are left out."""
    settings, columns, split = group_runs(runs), columns_of(runs, paper), runs[0].metrics["split"]
    told = list(settings[0].differing)
    if any(row["k"] for row in paper) and "k" not in told:
        told.append("k")
    titles = [f"{name} {split}" if name in SCORES else name for name in columns]
    rows = [["Method", "Backbone", *(SETTING_NAMES.get(name, name) for name in told), *titles, "Seeds"]]
    for setting in settings:
        config = setting.runs[0].checkpoint["config"]
        values = [format_value(setting.differing.get(name, config.get(name))) for name in told]
        numbers = [format_numbers(column, setting.values(column)) for column in columns]
        rows.append([setting.method, setting.backbone, *values, *numbers, len(setting.runs)])
    for row in paper:
        cells = {"k": row["k"], "Inter": row["inter"], "Intra": row["intra"]}
        for column, key in ((row["measure"], "score"), ("GFLOPs", "gflops")):
            cells[column] = f"{row[key]} ± {row[f'{key}_std']}" if row[f"{key}_std"] else row[key]
        numbers = [cells.get(name) or "–" for name in [*told, *columns]]
        backbone = with_gate(row["backbone"], row["gate"])
        rows.append([f"{row['method']} ({row['source']})", backbone, *numbers, "–"])
    return rows


def list_runs(runs: list[Run]) -> list[list]:
    """Header and a row for each run: all its numbers, and the settings by which the runs differ."""
    told = ["variant", "layers", "width", "seed"]
    for setting in group_runs(runs):
        told += [name for name in setting.differing if name not in [*told, "dataset"]]
    columns = columns_of(runs)
    rows = [["run", "dataset", "split", "images", *told, *columns, "images per expert"]]
    for run in runs:
        where = [run.name, *(run.metrics[name] for name in ("dataset", "split", "images"))]
        settings = [run.facts.get(name, run.checkpoint["config"].get(name, "")) for name in told]
        experts = " ".join(map(str, run.metrics.get("images_per_expert", [])))
        rows.append([*where, *settings, *(run.numbers.get(column, "") for column in columns), experts])
    return rows


def print_tables(arguments, runs: list[Run]) -> None:
    """One table for each task, on stdout; what a reader should know about the runs, on stderr."""
    form = arguments.format or "text"
    if form == "csv":  # one list of all, and nothing else
        print(table(list_runs(runs), form))
    for task in dict.fromkeys(run.task for run in runs) if form != "csv" else ():
        mine = [run for run in runs if run.task == task]
        counts = dict.fromkeys(run.count for run in mine)
        where = dict.fromkeys(run.metrics["dataset"] for run in mine)
        print(table(make_table(mine, published_rows(arguments, mine)), form))
        note = f"On {', '.join(where)} {arguments.split}; GFLOPs per image, count: {', '.join(counts)};"
        note += " ± is the standard deviation over seeds (n - 1)."
        if arguments.published:
            note += " What has a source is of Cityscapes val or COCO val2017."
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


def published_rows(arguments, runs: list[Run]) -> list[dict]:
    """With --published the rows of the papers' tables that are of the tasks of the runs."""
    if not arguments.published:
        return []
    return extra("published", "--published").rows_of({run.task for run in runs})


# ============ the command ============


@one_line_errors(InputError, data.DataError, OSError)
def main(argv: list[str] | None = None, process: Process | None = None) -> None:
    """The command; `process` where one has been started already."""
    arguments = parse(argv)
    arguments.folders = output_folders(arguments.checkpoint, arguments.out)
    arguments.unwritten = []  # what could not be written, and why
    for flag, name in (("image", "figures"), ("figures",) * 2, ("published",) * 2, ("experts",) * 2):
        if getattr(arguments, flag):
            extra(name, f"--{flag}")  # says what is missing before what takes long
    process = process or start_process(arguments.device, arguments.workers)
    for flag in ("figures", "predictions", "out", "experts"):
        if getattr(arguments, flag):
            make_folder(getattr(arguments, flag), f"--{flag}")
    for path in arguments.checkpoint:
        if not path.is_file():
            read_file(path, "a checkpoint; training writes them to runs/NAME/last.pt")  # says what is wrong
    if arguments.experts:
        cut_experts(arguments, process)
    else:
        report(arguments, process)
    if arguments.unwritten:
        more = f" ({len(arguments.unwritten)} such files)" if arguments.unwritten[1:] else ""
        raise InputError(f"{arguments.unwritten[0]}{more}; --out DIR writes elsewhere")


def output_folders(paths: list[Path], into: Path | None) -> dict[Path, Path]:
    """Where files go, by checkpoint: beside it, or in the folder `into`; of several, in one each below it."""
    folders = {}
    for path in paths:
        folder = into or path.parent
        if into and len(paths) > 1:
            names = (name_of_run(path) + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
            folder = next(f for f in map(into.joinpath, names) if f not in folders.values())
        folders[path] = folder
    return folders


def report(arguments, process: Process) -> None:
    """Evaluates all checkpoints, or shows --image; then tables and figures."""
    runs = []
    for path in arguments.checkpoint if not arguments.image else ():
        kept = None
        if arguments.table and not (arguments.figures or arguments.predictions) and process.world == 1:
            kept = kept_run(arguments, path)
        runs.append(kept or evaluate_checkpoint(arguments, path, process))
    if dist.is_initialized():  # the first process does the rest alone, and answers for all
        arguments.unwritten = gather_rows(arguments.unwritten, process)
        dist.destroy_process_group()
    if process.rank > 0:
        arguments.unwritten = []
        return

    if arguments.table and runs:
        print_tables(arguments, runs)
    if arguments.image or arguments.figures:
        draw(arguments, runs, process)


def cut_experts(arguments, process: Process) -> None:
    """Cuts the experts of all checkpoints out; then one table."""
    experts = extra("experts", "--experts")
    experts.check(arguments, process.world)
    runs, rows, folders = [], {}, output_folders(arguments.checkpoint, arguments.experts)
    for path in arguments.checkpoint:
        model, checkpoint = open_checkpoint(arguments, path, process)
        if runs and checkpoint["task"] != runs[0].task:
            raise InputError(f"--experts: {path} is of another task than the checkpoints before it")
        split = open_split(arguments, checkpoint, process)
        source = open_split(arguments, checkpoint, process, arguments.cut_from)
        if arguments.cut_from == arguments.split:
            words = f"--cut-from {arguments.cut_from} --split {arguments.split}: routes and dispatcher"
            print(f"note: {words} have seen the images on which they are scored", file=sys.stderr)
        rows[path] = experts.cut(arguments, model, split, source, folders[path])
        where = {"dataset": arguments.dataset or checkpoint["dataset"]}
        runs.append(about_run(path, checkpoint, where))
    form = arguments.format or "text"
    print(table(experts.table_of(group_runs(runs), rows, format_numbers), form))
    where = f"{runs[0].metrics['dataset']} {arguments.split}"
    note = f"On {where}; GFLOPs: mean per image, of all that runs for it."
    if form != "csv":
        print(("% " if form == "latex" else "\n") + note)


def draw(arguments, runs: list[Run], process: Process) -> None:
    """Shows --image, or else draws --figures."""
    figures = extra("figures", "--image" if arguments.image else "--figures")

    def viewer(path: Path):
        model, checkpoint = open_checkpoint(arguments, path, process)
        dataset = None if arguments.image else open_split(arguments, checkpoint, process).dataset
        return figures.Viewer(model, checkpoint, dataset, process, arguments.min_score)

    if arguments.image:
        path = arguments.checkpoint[0]
        folder = arguments.out or path.parent / "overlays"
        figures.show(viewer(path), arguments.image, folder, arguments.figures)
    else:
        figures.draw_all(runs, arguments.figures, viewer, group_runs, published_rows(arguments, runs))


if __name__ == "__main__":
    main()
