"""Evaluate checkpoints of train_seg.py and train_det.py: scores, tables, figures; or show what one predicts.

    python evaluate.py runs/NAME/last.pt                             # scores, cost and experts; metrics.json, experts.png
    python evaluate.py runs/NAME/last.pt --figures DIR               # every figure, as PDF and PNG
    python evaluate.py runs/*/last.pt                                # one table, mean ± std over seeds; --markdown, --latex
    python evaluate.py runs/*/last.pt --published --figures DIR      # with the paper's numbers beside them
    python evaluate.py runs/NAME/last.pt --split test --predictions DIR
    python evaluate.py FILE --variant dr-a                           # a checkpoint of Dynamic Routing's authors
    python evaluate.py runs/NAME/last.pt --image FILE_OR_FOLDER      # colour overlays, and which expert took each
    torchrun --nproc_per_node 8 evaluate.py runs/NAME/last.pt        # each image counts once

The checkpoint knows its network, data set, classes and normalisation; flags override what can differ. What a split gave is
kept beside the checkpoint, in NAME.SPLIT.activations: tables and figures take it from there while checkpoint, split and data
options are the same. The first command, one checkpoint and no figures, always computes anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

import data
import kmeans
from model import (
    VARIANTS, InputError, OneLineParser, Process, default_workers, leave_cores_to_loaders, load_checkpoint, load_published,
    one_line_errors, read_file, start_process,
)  # fmt: skip
from routing import OPEN
from train_det import average_precision, evaluate_detection
from train_seg import Run, evaluate_segmentation

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="+",
                        help="files written by train_seg.py or train_det.py; several come in one table")  # fmt: skip
    parser.add_argument("--variant", choices=[name for name, row in VARIANTS.items() if row.gate],
                        help="the checkpoint is one of Dynamic Routing's authors, of this kind; its data set is Cityscapes")  # fmt: skip
    group = parser.add_argument_group("data (by default as in training)")
    group.add_argument("--dataset", choices=list(dict.fromkeys([*data.SEGMENTATION, *data.DETECTION])),
                       help="data set; its classes must be the checkpoint's")  # fmt: skip
    group.add_argument("--data", metavar="DIR", help="its folder")
    group.add_argument("--json", metavar="FILE", help="detection: annotations in COCO's format, in place of the split's")
    group.add_argument("--images", metavar="DIR", help="detection: the folder of their images")
    group.add_argument("--limit", type=int, help="detection: take the first so many images alone (default: as in training)")
    group.add_argument("--split", default="val", choices=data.SPLITS, help="default: val")
    group.add_argument("--mean", type=float, nargs=3, metavar=("R", "G", "B"), help="of the normalisation, on 0..1")
    group.add_argument("--std", type=float, nargs=3, metavar=("R", "G", "B"), help="likewise")
    group = parser.add_argument_group("output")
    group.add_argument("--figures", type=Path, metavar="DIR", help="draw every figure that the checkpoints allow, as PDF and PNG")
    group.add_argument("--published", action="store_true", help="put the paper's rows in the table, its points in the trade-off")
    form = group.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="the table in Markdown")
    form.add_argument("--latex", action="store_true", help="the table in LaTeX, for the package booktabs")
    group.add_argument("--image", type=Path,
                       help="show this picture, or the pictures in this folder, and do nothing else; with --figures also each one's route")  # fmt: skip
    group.add_argument("--out", type=Path, metavar="DIR", help="where --image writes (default: overlays beside the checkpoint)")
    group.add_argument("--predictions", type=Path, metavar="DIR",
                       help="segmentation: also write each prediction as a PNG of label ids, as the data set's own tools read it")  # fmt: skip
    group.add_argument("--min-score", type=float, default=0.5,
                       help="detection: what is drawn has at least this score (default: %(default)s)")  # fmt: skip
    group = parser.add_argument_group("system")
    group.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    group.add_argument("--workers", type=int, default=default_workers(), help="loader processes (default: %(default)s)")
    group.add_argument("--eval-batch", type=int, help="images at a time; above 1, images should be of equal size")
    arguments = parser.parse_args()
    if arguments.workers < 0:
        parser.error("--workers takes a number of at least 0")
    if arguments.limit is not None and arguments.limit < 1:
        parser.error("--limit takes a number of at least 1")
    if not 0 <= arguments.min_score <= 1:
        parser.error("--min-score takes a number between 0 and 1")
    if arguments.std and min(arguments.std) <= 0:
        parser.error("--std takes numbers above 0")
    arguments.checkpoint = list(dict.fromkeys(arguments.checkpoint))
    if len(arguments.checkpoint) > 1 and (arguments.image or arguments.predictions):
        parser.error(f"--{'image' if arguments.image else 'predictions'} takes one checkpoint")
    arguments.table = len(arguments.checkpoint) > 1 or arguments.published or arguments.markdown or arguments.latex
    return arguments


# ============ evaluating a checkpoint ============


def spread(values: Tensor) -> dict[str, float]:
    """[N] -> mean, min and max."""
    values = values.double()
    return {"mean": values.mean().item(), "min": values.min().item(), "max": values.max().item()}


@dataclass
class Score:
    """A split, evaluated: what both tasks have in common for the report."""

    A: Tensor  # [N, D]
    flops: dict[str, Tensor]  # per count: [N] real multiply-adds of each image
    size: tuple[int, int]  # height and width at which the first image was run
    metrics: dict  # the task's own scores
    table: str  # the same, as text


def open_split(arguments: argparse.Namespace, checkpoint: dict):
    """The data set to evaluate on, by the flags and, where they are silent, as in training."""
    name = arguments.dataset or checkpoint["dataset"]
    same = name == checkpoint["dataset"]
    root = arguments.data or (checkpoint["data"] if same else None)
    options = checkpoint["data_options"] if same else {}
    if checkpoint["task"] == "segmentation":
        dataset = data.segmentation_dataset(name, root, arguments.split, train=False, **options)
    else:
        files = {"json": arguments.json, "images": arguments.images}
        trained_on = checkpoint["files"].get(arguments.split, {})
        if same and not arguments.data:
            files = {key: files[key] or trained_on.get(key) for key in files}
        files["limit"] = image_limit(arguments, checkpoint)
        masks = checkpoint["model_args"]["masks"]
        dataset = data.detection_dataset(name, root, arguments.split, train=False, **options | files, masks=masks)
    classes = list(dataset.classes if hasattr(dataset, "classes") else dataset.info.classes)
    if classes != checkpoint["classes"]:
        raise InputError(f"--dataset {name}: its {len(classes)} classes are not the {len(checkpoint['classes'])} "
                         f"of {checkpoint['path']}, which was trained on {checkpoint['dataset']}")  # fmt: skip
    return dataset


def image_limit(arguments: argparse.Namespace, checkpoint: dict) -> int | None:
    """Detection: how many images are taken, None for all."""
    if arguments.limit is None and not (arguments.json or arguments.data):
        return checkpoint["data_options"].get("limit")
    return arguments.limit


def score_segmentation(arguments: argparse.Namespace, model, checkpoint: dict, dataset, process: Process) -> Score:
    classes = checkpoint["classes"]
    batch = dataset.info.eval_batch if arguments.eval_batch is None else arguments.eval_batch
    loader = data.pass_loader(dataset, batch, arguments.workers, process.rank, process.world)
    save = prediction_writer(arguments.predictions, dataset) if arguments.predictions else None
    result = evaluate_segmentation(model, loader, len(classes), process, checkpoint["mean"], checkpoint["std"], save)
    percent = [None if math.isnan(value) else 100 * value for value in result.iou().tolist()]
    miou = None if result.confusion.sum() == 0 else 100 * result.miou()  # a test split has no labels
    width = max(map(len, classes)) + 2
    lines = [f"{'class':{width}}{'IoU %':>8}"]
    lines += [f"{name:{width}}{'absent' if value is None else f'{value:.2f}':>8}" for name, value in zip(classes, percent)]
    lines += [f"{'mean':{width}}{'no labels' if miou is None else f'{miou:.2f}':>8}   over {len(result.A)} images"]
    metrics = {"miou": miou, "iou": dict(zip(classes, percent))}
    return Score(result.A, result.flops, tuple(dataset[0][0].shape[-2:]), metrics, "\n".join(lines))


def score_detection(arguments: argparse.Namespace, model, checkpoint: dict, dataset, process: Process) -> Score | None:
    """Also writes detections.json, in COCO's results format, beside the checkpoint. None on all processes but the first."""
    masks, limit = checkpoint["model_args"]["masks"], image_limit(arguments, checkpoint)
    batch = checkpoint["config"]["eval_batch"] if arguments.eval_batch is None else arguments.eval_batch
    loader = data.pass_loader(dataset, batch, arguments.workers, process.rank, process.world)
    result = evaluate_detection(model, loader, dataset, process)
    if result is None:
        return None
    metrics, tables = {"detections": len(result.detections)}, []
    if limit:
        tables.append(f"the first {limit} images alone, by --limit\n")
    for name, kind in {"box": "bbox", "mask": "segm"}.items():
        if name == "box" or masks:
            labelled = bool(dataset.coco.anns)  # a test split has no labels
            scores, table = average_precision(dataset, result.detections, kind) if labelled else (None, "no labels\n")
            metrics[name] = scores and {key: 100 * value if value >= 0 else None for key, value in scores.items()}
            tables.append(f"{name}, by pycocotools, over {len(result.A)} images\n{table}")
    path = checkpoint["path"].with_name("detections.json")
    path.write_text(json.dumps(result.detections) + "\n")
    tables.append(f"wrote {path}")
    rest = {part: spread(flops / 1e9) for part, flops in result.rest.items()}
    metrics["gflops_outside_backbone"] = rest
    tables.append("\nG multiply-adds per image outside the backbone (mean): "
                  + ", ".join(f"{part} {values['mean']:.3f}" for part, values in rest.items()))  # fmt: skip
    size = model.prepare([data.as_float(dataset[0][0]).to(process.device)])[0].image_sizes[0]
    return Score(result.A, result.flops, tuple(size), metrics, "\n".join(tables))


def cache_key(arguments: argparse.Namespace, checkpoint: dict, dataset) -> str:
    """All that a score depends on, as far as it can be told without opening the images."""
    names, annotations = hashlib.sha256(), getattr(dataset, "json", None)
    for i in range(len(dataset)):
        names.update(dataset.image_name(i).encode() + b"\n")
    about = {
        "checkpoint": hashlib.sha256(checkpoint["path"].read_bytes()).hexdigest(),
        "names": names.hexdigest(),
        "annotations": annotations and [os.stat(annotations).st_size, os.stat(annotations).st_mtime_ns],
        "mean and std": [checkpoint["mean"], checkpoint["std"]],
    }
    flags = ("variant", "dataset", "data", "json", "images", "limit", "split", "eval_batch")
    return json.dumps(about | {flag: getattr(arguments, flag) for flag in flags})


def measure(arguments: argparse.Namespace, model, checkpoint: dict, dataset, process: Process) -> Score | None:
    """The score on `dataset`: what is kept beside the checkpoint, if it is of the same checkpoint, split and data options,
    else computed and kept there. None on processes other than the first, in detection or where nothing was computed."""
    score = {"segmentation": score_segmentation, "detection": score_detection}[checkpoint["task"]]
    path = checkpoint["path"].with_name(f"{checkpoint['path'].stem}.{arguments.split}.activations")
    kept, key = None, None
    if process.first:
        key = cache_key(arguments, checkpoint, dataset)
        if path.exists() and (arguments.table or arguments.figures) and not arguments.predictions:
            try:
                kept = read_file(path, "kept activations")
            except InputError:
                pass  # damaged: it is written anew
    found = [kept is not None and kept.get("key") == key]
    if process.world > 1:
        dist.broadcast_object_list(found, device=process.device)
    if found[0]:
        return Score(**kept["score"]) if process.first else None
    result = score(arguments, model, checkpoint, dataset, process)
    if process.first:
        temporary = path.with_name(path.name + ".tmp")
        torch.save({"key": key, "score": vars(result)}, temporary)
        os.replace(temporary, path)
    return result


def nearest(A: Tensor, checkpoint: dict, centers: Tensor) -> tuple[Tensor, Tensor]:
    """The expert [n] of each A [n, D] and the distance [n] to its centre, in the metric that it was trained with."""
    metric = checkpoint.get("metric")
    weight = 1.0 if metric is None else metric
    return kmeans.assign(A * weight, centers * weight)


def describe_experts(A: Tensor, flops: Tensor, centers: Tensor, labels: Tensor) -> dict:
    """What metrics.json says about the experts. A: [N, D]; flops: [N], paper count; labels: [N]; distances in the units
    of A."""
    inter, intra = kmeans.inter_intra(A, labels, centers)
    sizes = torch.bincount(labels, minlength=len(centers))
    mean = [flops[labels == k].double().mean().item() / 1e9 if sizes[k] else None for k in range(len(centers))]
    return {"k": len(centers), "inter": inter, "intra": intra, "images_per_expert": sizes.tolist(), "gflops_per_expert": mean}


def print_cost_and_experts(metrics: dict) -> None:
    print(f"\n{'GFLOPs per image':20}{'mean':>10}{'min':>10}{'max':>10}")
    for count, values in metrics["gflops"].items():
        print(f"{count:20}" + "".join(f"{values[key]:10.3f}" for key in ("mean", "min", "max")))
    if "k" in metrics:
        print(f"\ninter {metrics['inter']:.3f} (between the {metrics['k']} centres), intra {metrics['intra']:.3f} (within clusters)")
        print(f"{'expert':8}{'images':>8}{'share':>8}{'GFLOPs':>10}")
        for k, (size, gflops) in enumerate(zip(metrics["images_per_expert"], metrics["gflops_per_expert"])):
            cost = "-" if gflops is None else f"{gflops:.3f}"
            print(f"{k:<8}{size:8d}{100 * size / metrics['images']:7.1f}%{cost:>10}")
        collapse = kmeans.describe_collapse(torch.tensor(metrics["images_per_expert"]), metrics["inter"], metrics["intra"])
        if collapse:
            print(collapse)


def recovery(model, dataset, result: Score, centers: Tensor, labels: Tensor) -> dict:
    """How well the experts recover the subsets that are known, and what each subset's images run.

    Per subset: GFLOPs (paper count), and by stride the G multiply-adds of cells and paths that ran and the share of
    cells that ran.
    """
    backbone = model.backbone
    accuracy, rand, table, match = kmeans.agreement(labels, dataset.subset)
    costs = backbone.costs(*result.size)
    opened = result.A.view(len(labels), -1, 3) > OPEN  # [N, nodes, 3]
    spent = opened.any(-1) * costs.cell[1:] + (opened * costs.path[1:]).sum(-1)  # [N, nodes]
    scale = torch.tensor([s for nodes in backbone.nodes_per_layer for s in range(nodes)])
    subsets = {}
    for s, name in enumerate(dataset.subset_names):
        mine = dataset.subset == s
        if not mine.any():  # among so few images
            continue
        by_stride = {}
        for level in range(max(backbone.nodes_per_layer)):
            here = scale == level
            by_stride[4 * 2**level] = {
                "gflops": spent[mine][:, here].sum(1).double().mean().item() / 1e9,
                "cells_run": opened.any(-1)[mine][:, here].double().mean().item(),
            }
        subsets[name] = {
            "images": int(mine.sum()),
            "experts": table[s].tolist() + [0] * (len(centers) - table.shape[1]),
            "matched": match[s],
            "gflops": result.flops["paper"][mine].double().mean().item() / 1e9,
            "by_stride": by_stride,
        }
    return {"accuracy": 100 * accuracy, "adjusted_rand": rand, "subset": subsets}


def print_recovery(metrics: dict) -> None:
    subsets = metrics["subset"]
    experts = range(len(next(iter(subsets.values()))["experts"]))
    strides = list(next(iter(subsets.values()))["by_stride"])
    print(f"\nrecovered subsets: {metrics['accuracy']:.2f} % of images under the best one-to-one matching, "
          f"adjusted Rand index {metrics['adjusted_rand']:.4f}")  # fmt: skip
    header = "".join(f"{f'expert {k}':>10}" for k in experts) + f"{'GFLOPs':>10}"
    print(f"{'subset':8}{header}   of them in cells and paths at stride " + " ".join(f"{s:>8}" for s in strides))
    for name, row in subsets.items():
        counts = "".join(f"{str(n) + ('*' if k == row['matched'] else ' '):>10}" for k, n in enumerate(row["experts"]))
        spent = " ".join(f"{row['by_stride'][s]['gflops']:8.4f}" for s in strides)
        print(f"{name:8}{counts}{row['gflops']:10.4f}{'':39}{spent}")
    print("* matched to the subset")


@dataclass
class Evaluated:
    """A checkpoint and what a split gave: what tables and figures are made of."""

    name: str  # of the run
    checkpoint: dict  # its contents but for weights and the like
    result: Score
    metrics: dict  # what metrics.json says
    grid: list[tuple[int, int, list[int]]]  # per node of A(x): layer, scale and the paths that it has; [] of a static network
    centers: Tensor | None  # [K, D]

    @property
    def variant(self) -> str:
        return self.checkpoint["model_args"]["variant"]

    @property
    def alpha(self) -> Tensor:
        """[N, D] gate activations on 0..1, whatever was clustered."""
        return as_alpha(self.result.A, self.checkpoint)

    @property
    def labels(self) -> Tensor:
        """[N] the expert that takes each image."""
        return nearest(self.result.A, self.checkpoint, self.centers)[0]

    @property
    def flops(self) -> Tensor:
        """[N] multiply-adds of a routed network on each image at its own size, paper count."""
        return self.result.flops["paper"]


def as_alpha(A: Tensor, checkpoint: dict) -> Tensor:
    """What was clustered -> alpha: the same unless gates were clustered before their non-linearity."""
    return F.relu(torch.tanh(A)) if checkpoint["model_args"].get("gate_space") == "logit" else A


def table_count(counts: Iterable[str]) -> str:
    """Which of the counts stands in tables and figures: the papers', in detection at their 800x800."""
    return next(count for count in ("paper at 800x800", "paper", "exact") if count in counts)


def evaluate_checkpoint(arguments: argparse.Namespace, path: Path, process: Process) -> Evaluated | None:
    """Evaluates on a split and writes metrics.json beside the checkpoint; where it is the only one and no table is asked for,
    also prints the report and draws experts.png there. None on processes other than the first."""
    model, checkpoint = open_checkpoint(arguments, path, process)
    dataset = open_split(arguments, checkpoint)
    result = measure(arguments, model, checkpoint, dataset, process)
    if not process.first:
        return None
    described = {"checkpoint": str(path), "variant": checkpoint["model_args"]["variant"],
                 "dataset": arguments.dataset or checkpoint["dataset"], "split": arguments.split,
                 "iteration": checkpoint["iteration"]}  # fmt: skip
    metrics = described | {"images": len(result.A)} | result.metrics
    metrics["gflops"] = {count: spread(flops / 1e9) for count, flops in result.flops.items()}
    centers = checkpoint["centers"]
    if model.dim and centers is None:
        print(f"{path}: has no centres: clustering this split instead", file=sys.stderr)
        centers = kmeans.kmeans(result.A, min(checkpoint["config"]["k"], len(result.A)))[0]
    if centers is not None:
        labels, _ = nearest(result.A, checkpoint, centers)
        metrics |= describe_experts(result.A, result.flops["paper"], centers, labels)
        if dataset.subset is not None:
            metrics["subsets"] = recovery(model, dataset, result, centers, labels)
    path.with_name("metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    if not arguments.table:
        print(", ".join(f"{key} {value}" for key, value in described.items()))
        print(f"\n{result.table}")
        print_cost_and_experts(metrics)
        if "subsets" in metrics:
            print_recovery(metrics["subsets"])
        print(f"\nwrote {path.with_name('metrics.json')}")
    wanted = ("path", "task", "dataset", "data", "model_args", "config", "classes", "palette", "mean", "std", "iteration")
    about = {key: checkpoint[key] for key in wanted} | {"metric": checkpoint.get("metric")}
    name = path.resolve().parent.name + ("" if path.stem == "last" else f"-{path.stem}")
    run = Evaluated(name, about, result, metrics, grid_of(model), centers)
    if not arguments.table and centers is not None:
        draw_experts(run, model, dataset, process, arguments.min_score).savefig(path.with_name("experts.png"), dpi=130)
        print(f"wrote {path.with_name('experts.png')}")
    return run


def prediction_writer(folder: Path, dataset):
    """-> save(index, prediction uint8 [H, W]): a PNG under the image's own name, with the data set's label ids."""
    label_of_class = torch.zeros(256, dtype=torch.uint8)
    for label, class_id in dataset.info.label_ids.items() or enumerate(range(len(dataset.info.classes))):
        if class_id != data.IGNORE:
            label_of_class[class_id] = label

    def save(index: int, prediction: Tensor) -> None:
        path = (folder / dataset.image_name(index)).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(label_of_class[prediction.cpu().long()].numpy()).save(path)

    return save


@torch.no_grad()
def predict(model, checkpoint: dict, process: Process, image: Tensor, opacity: float = 0.5, min_score: float = 0.5,
            names: bool = True):  # fmt: skip
    """One image uint8 [3, H, W] -> (the model's output, the image with what is predicted drawn over it).

    Segmentation: the classes' colours. Detection: boxes and masks of what scores at least `min_score`, with `names` also
    class and score.
    """
    if checkpoint["task"] == "segmentation":
        colors = [tuple(color) for color in checkpoint["palette"]]
        out = model(data.normalize(image[None].to(process.device), checkpoint["mean"], checkpoint["std"]))
        prediction = out.logits[0].argmax(0).cpu()
        masks = prediction == torch.arange(len(colors))[:, None, None]  # [classes, H, W]
        return out, draw_segmentation_masks(image, masks, alpha=opacity, colors=colors)
    out = model([data.as_float(image.to(process.device))])
    found = {key: value.cpu() for key, value in out.detections[0].items()}
    kept = found["scores"] >= min_score
    boxes, scores, classes = found["boxes"][kept], found["scores"][kept], found["labels"][kept] - 1
    masks = found["masks"][kept, 0] > 0.5 if "masks" in found else None
    image = draw_objects(checkpoint, image, boxes, classes, masks, opacity)
    if names:
        texts = [f"{checkpoint['classes'][c]} {score:.2f}" for c, score in zip(classes.tolist(), scores.tolist())]
        image = write_on(image, texts, boxes[:, :2].tolist())
    return out, image


def draw_objects(checkpoint: dict, image: Tensor, boxes: Tensor, classes: Tensor, masks: Tensor | None, opacity: float = 0.5) -> Tensor:
    """Boxes [n, 4] and masks [n, H, W] in the colours of their classes [n], on an image uint8 [3, H, W]."""
    if not len(boxes):
        return image
    colors = [tuple(checkpoint["palette"][c]) for c in classes.tolist()]
    if masks is not None:
        image = draw_segmentation_masks(image, masks.bool(), alpha=opacity, colors=colors)
    return draw_bounding_boxes(image, boxes, colors=colors, width=max(1, min(image.shape[-2:]) // 120))


def write_on(image: Tensor, texts: list[str], places: list[tuple[float, float]]) -> Tensor:
    """Writes on an image uint8 [3, H, W] at places (x, y): white edged in black, to be read on any ground."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(max(10, min(picture.size) // 30))
    for text, (x, y) in zip(texts, places):
        draw.text((x + 3, y + 1), text, fill="white", font=font, stroke_width=1, stroke_fill="black")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@torch.no_grad()
def show(arguments: argparse.Namespace, model, checkpoint: dict, process: Process) -> None:
    """Writes each picture with its prediction and its expert drawn on it, and prints which expert took it; with --figures
    also its route."""
    source = arguments.image
    paths = [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.suffix.lower() in IMAGE_ENDINGS)
    if not paths:
        raise InputError(f"--image {source}: neither a picture nor a folder with pictures ({' '.join(IMAGE_ENDINGS)})")
    folder = arguments.out or checkpoint["path"].with_name("overlays")
    for path in paths:
        image = torch.from_numpy(data.read_image(path)).permute(2, 0, 1)
        out, overlay = predict(model, checkpoint, process, image, min_score=arguments.min_score)
        size = image.shape[-2:] if checkpoint["task"] == "segmentation" else out.sizes[0]
        count = model.counts[0]
        gflops = sum(model.real_cost(out.routes, *size, count).values()).item() / 1e9
        words = f"{gflops:.3g} GFLOPs ({count})"
        if checkpoint["centers"] is not None:
            label, distance = nearest(out.A.cpu(), checkpoint, checkpoint["centers"])
            words += f", expert {label.item()} of {len(checkpoint['centers'])}, {distance.item():.3f} from its centre"
            overlay = write_on(overlay, [f"expert {label.item()}"], [(2, 2)])
        inside = path.relative_to(source if source.is_dir() else path.parent)
        target = folder / inside.with_name(inside.name + ".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(overlay.permute(1, 2, 0).numpy()).save(target)
        print(f"{path}: {words} -> {target}")
        if arguments.figures and model.dim:
            alpha = as_alpha(out.A[0].cpu(), checkpoint)
            figure = draw_image_route(image, grid_of(model), alpha, f"{path.name}\n{words}")
            save_figure(figure, arguments.figures, f"route-{'-'.join(inside.parts)}")


def open_checkpoint(arguments: argparse.Namespace, path: Path, process: Process):
    """-> the model, and what the file holds, with its "path" and the normalisation that the flags ask for."""
    if arguments.variant:
        model, checkpoint = open_published(arguments, path, process)
    else:
        model, checkpoint = load_checkpoint(path, process.device)
    missing = {"task", "dataset", "data", "data_options", "classes", "palette", "mean", "std", "config", "centers"} - checkpoint.keys()
    if missing:
        raise InputError(f"{path}: holds no {sorted(missing)[0]}; give a file written by train_seg.py or train_det.py")
    for flag in ("predictions",) if checkpoint["task"] == "detection" else ("json", "images", "limit"):
        if getattr(arguments, flag):
            raise InputError(f"--{flag}: does not apply to {path}, a checkpoint for {checkpoint['task']}")
    checkpoint["path"] = path
    checkpoint["mean"] = arguments.mean or checkpoint["mean"]
    checkpoint["std"] = arguments.std or checkpoint["std"]
    if checkpoint["task"] == "detection":
        model.rcnn.transform.image_mean, model.rcnn.transform.image_std = checkpoint["mean"], checkpoint["std"]
    return model, checkpoint


def open_published(arguments: argparse.Namespace, path: Path, process: Process):
    """The model of a checkpoint of Dynamic Routing's authors, and what our own checkpoints would say about it."""
    model, checkpoint = load_published(path, arguments.variant, process.device)
    info = data.SEGMENTATION[arguments.dataset if arguments.dataset in data.SEGMENTATION else "cityscapes"]
    classes = checkpoint["model_args"]["num_classes"]
    if classes != len(info.classes):
        raise InputError(f"{path}: has {classes} classes, {info.name} has {len(info.classes)}; give its --dataset")
    about = dict(task="segmentation", dataset=info.name, data=None, data_options={}, classes=list(info.classes),
                 palette=info.palette, mean=list(data.MEAN), std=list(data.STD), config={"k": 4}, centers=None)  # fmt: skip
    return model, checkpoint | about


# ============ one table of many checkpoints ============

METHODS = {"dr-a": "DR-A", "dr-b": "DR-B", "dr-c": "DR-C", "dr-raw": "DR-Raw", "divdr-a": "DivDR-A", "divdr-raw": "DivDR-Raw",
           "deeplabv3-r101": "DeepLabV3", "r50-fpn": "R-CNN"}  # fmt: skip
STATIC_BACKBONES = {"deeplabv3-r101": "ResNet-101", "r50-fpn": "ResNet-50-FPN"}
SCORES = {"segmentation": ("mIoU",), "detection": ("box AP", "mask AP")}
MEASURES = ("GFLOPs", "Inter", "Intra", "Recovered")  # the last: % of images, of subsets that are known
SETTING_NAMES = {"k": "K", "lambda1": "λ1", "lambda2": "λ2"}
SAME_SETTING = Run.FREE | {"seed", "log_every", "eval_every"}  # may differ between runs that are averaged
OF_VARIANT = {"gate", "lambda1", "budget", "lambda2"}  # the method's name tells them

# The paper's rows: table, method, backbone, K, score, its value, GFLOPs, inter, intra. Tables 1 and 2 are of Cityscapes
# val, 3 to 5 of COCO val2017. Table 3 has Dynamic Routing, the best of three runs, without a K.
PUBLISHED = """
1   DeepLabV3     ResNet-101-ASPP   –   mIoU      78.5         1778.7       –     –
1   DR-A          Layer16           –   mIoU      72.7 ± 0.6   58.7 ± 3.1   –     –
1   DR-B          Layer16           –   mIoU      72.6 ± 1.3   61.1 ± 3.3   –     –
1   DR-C          Layer16           –   mIoU      74.2 ± 0.6   68.1 ± 2.5   –     –
1   DR-Raw        Layer16           –   mIoU      75.2 ± 0.5   99.2 ± 2.5   –     –
1   DivDR-A       Layer16           –   mIoU      73.5 ± 0.4   57.7 ± 3.9   –     –
1   DivDR-Raw     Layer16           –   mIoU      75.4 ± 1.6   95.7 ± 0.9   –     –
2   DR-A          Layer16           –   mIoU      72.7         58.7         0.4   0.3
2   DivDR-A       Layer16           –   mIoU      72.0         49.9         0.6   0.2
2   DR-Raw        Layer16           –   mIoU      75.2         99.2         1.5   1.5
2   DivDR-Raw     Layer16           –   mIoU      75.7         98.3         1.2   0.5
3   DR-A          Layer17           –   box AP    34.6         23.2         0.2   0.3
3   DivDR-A       Layer17           2   box AP    35.1         21.9         1.1   0.4
3   DivDR-A       Layer17           3   box AP    35.0         19.2         0.8   0.3
3   DivDR-A       Layer17           4   box AP    34.9         20.0         0.6   0.1
3   DR-Raw        Layer17           –   box AP    37.8         38.2         0.5   0.7
3   DivDR-Raw     Layer17           2   box AP    36.5         31.0         0.6   0.5
3   DivDR-Raw     Layer17           3   box AP    37.4         32.6         1.2   0.5
3   DivDR-Raw     Layer17           4   box AP    38.1         32.8         0.7   0.2
4   Faster R-CNN  ResNet-50-FPN     –   box AP    37.9         88.4         –     –
4   DR-A          Layer17           –   box AP    32.1 ± 5.0   20.9 ± 2.1   –     –
4   DR-B          Layer17           –   box AP    36.5 ± 0.2   24.4 ± 1.2   –     –
4   DR-C          Layer17           –   box AP    37.1 ± 0.2   26.7 ± 0.4   –     –
4   DR-Raw        Layer17           –   box AP    37.7 ± 0.1   38.2 ± 0.0   –     –
4   DivDR-A       Layer17           –   box AP    35.4 ± 0.2   19.8 ± 1.0   –     –
4   DivDR-Raw     Layer17           –   box AP    38.1 ± 0.0   32.9 ± 0.1   –     –
5   Mask R-CNN    ResNet-50-FPN     –   mask AP   35.2         88.4         –     –
5   DR-A          Layer17           –   mask AP   31.8 ± 3.1   23.7 ± 4.2   –     –
5   DR-B          Layer17           –   mask AP   33.9 ± 0.4   25.2 ± 2.3   –     –
5   DR-C          Layer17           –   mask AP   34.3 ± 0.2   28.9 ± 0.7   –     –
5   DR-Raw        Layer17           –   mask AP   35.1 ± 0.2   38.2 ± 0.1   –     –
5   DivDR-A       Layer17           –   mask AP   33.4 ± 0.2   24.5 ± 2.3   –     –
5   DivDR-Raw     Layer17           –   mask AP   35.1 ± 0.1   32.9 ± 0.2   –     –
"""


def published_rows(task: str, masks: bool = True) -> list[dict[str, str]]:
    """The paper's rows for a task, by column: table, Method, Backbone, K, the score's name, GFLOPs, Inter, Intra."""
    rows = []
    for line in PUBLISHED.strip().splitlines():
        table, method, backbone, k, score, value, *measures = re.split(r"\s{3,}", line)
        if score in SCORES[task] and (masks or score != "mask AP"):
            row = {"table": table, "Method": method, "Backbone": backbone, "K": k, score: value}
            rows.append(row | dict(zip(MEASURES, measures)))
    return rows


def measured(run: Evaluated, column: str) -> float | None:
    """A number of the tables: a score or recovered subsets in %, GFLOPs per image, inter or intra; None where there is none."""
    metrics = run.metrics
    if column == "mIoU":
        return metrics.get("miou")
    if column in ("box AP", "mask AP"):
        return (metrics.get(column.split()[0]) or {}).get("AP")
    if column == "Recovered":
        return metrics.get("subsets", {}).get("accuracy")
    return metrics["gflops"][table_count(metrics["gflops"])]["mean"] if column == "GFLOPs" else metrics.get(column.lower())


@dataclass
class Setting:
    """Runs that differ in nothing but their seed, and in `group_runs` what it leaves out."""

    runs: list[Evaluated]
    told: dict[str, object]  # the settings that tell it from the others beside it

    @property
    def method(self) -> str:
        name = METHODS[self.runs[0].variant]
        masks = self.runs[0].checkpoint["model_args"].get("masks")
        return f"{'Mask' if masks else 'Faster'} {name}" if name == "R-CNN" else name

    @property
    def label(self) -> str:
        return ", ".join([self.method] + [f"{SETTING_NAMES.get(key, key.replace('_', ' '))} {show_value(value)}"
                                          for key, value in self.told.items()])  # fmt: skip

    @property
    def backbone(self) -> str:
        run = self.runs[0]
        if not run.grid:
            return STATIC_BACKBONES[run.variant]
        layers, width = run.grid[-1][0] + 1, run.checkpoint["model_args"].get("width")
        return f"Layer{layers}" + (f", width {width}" if width not in (None, 64) else "")

    def mean_std(self, column: str) -> tuple[float, float | None] | None:
        """Over the runs; the deviation, with n - 1, is None for a single run."""
        values = [value for run in self.runs if (value := measured(run, column)) is not None]
        return (statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None) if values else None


def show_value(value) -> str:
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def group_runs(runs: list[Evaluated], apart_from: str | None = None) -> list[Setting]:
    """Runs of one setting together, whatever their seed and, if one is named, the setting `apart_from`."""
    groups: dict[str, list[Evaluated]] = {}
    ignored = SAME_SETTING | {apart_from}
    facts = {id(run): run.checkpoint["config"] | {"variant": run.variant} for run in runs}
    for run in runs:
        key = {name: value for name, value in facts[id(run)].items() if name not in ignored}
        groups.setdefault(json.dumps(key, sort_keys=True), []).append(run)

    firsts = [facts[id(group[0])] for group in groups.values()]
    told = []
    names = dict.fromkeys(["k", "margin", "lambda2", *(name for fact in firsts for name in fact)])
    for name in [name for name in names if name not in ignored | {"variant", "layers", "width"}]:
        values = {(name in OF_VARIANT and fact["variant"], json.dumps(fact.get(name))) for fact in firsts}
        if len(values) > len({variant for variant, _ in values}):
            told.append(name)
    order = list(METHODS)
    settings = [Setting(group, {name: fact.get(name) for name in told}) for group, fact in zip(groups.values(), firsts)]
    numbers = lambda setting: [v if isinstance(v, (int, float)) else -1 for v in setting.told.values()]  # noqa: E731
    return sorted(settings, key=lambda setting: (order.index(setting.runs[0].variant), setting.backbone, numbers(setting)))


def make_table(runs: list[Evaluated], published: bool) -> list[list[str]]:
    """Header and rows, one for each setting, then the paper's, as text; columns without a number are left out."""
    task, settings = runs[0].checkpoint["task"], group_runs(runs)
    scores = [name for name in SCORES[task] if any(setting.mean_std(name) for setting in settings)]
    columns = scores + [name for name in MEASURES if any(setting.mean_std(name) for setting in settings)]
    told = [SETTING_NAMES.get(name, name.replace("_", " ")) for name in settings[0].told]
    paper = published_rows(task, "mask AP" in scores) if published else []
    if any(row["K"] != "–" for row in paper) and "K" not in told:
        told.append("K")
    stats = {name: [setting.mean_std(name) for setting in settings] for name in columns}
    rows = [["Method", "Backbone", *told, *columns, "Seeds"]]
    for i, setting in enumerate(settings):
        config = setting.runs[0].checkpoint["config"]
        values = {SETTING_NAMES.get(name, name.replace("_", " ")): show_value(value) for name, value in setting.told.items()}
        values = {"K": show_value(config.get("k") if setting.runs[0].grid else None)} | values
        cells = [mean_and_std(stats[name][i], decimals(name, stats[name])) for name in columns]
        rows.append([setting.method, setting.backbone, *(values[name] for name in told), *cells, str(len(setting.runs))])
    for row in paper:
        cells = [row.get(name, "–") for name in [*told, *columns]]
        rows.append([f"{row['Method']} (paper, Table {row['table']})", row["Backbone"], *cells, "–"])
    return rows


def decimals(column: str, stats: list[tuple | None]) -> int:
    """Digits after the point: 2, and of GFLOPs as many as show three digits of the smallest."""
    smallest = min((stat[0] for stat in stats if stat and stat[0] > 0), default=1)
    return max(1, 2 - math.floor(math.log10(smallest))) if column == "GFLOPs" else 2


def mean_and_std(stat: tuple[float, float | None] | None, digits: int) -> str:
    if stat is None:
        return "–"
    return f"{stat[0]:.{digits}f}" + (f" ± {stat[1]:.{digits}f}" if stat[1] is not None else "")


def render(rows: list[list[str]], form: str) -> str:
    """Header and rows as "text", "markdown" or "latex"; the first two columns to the left, the others to the right."""
    if form == "latex":
        marks = {"±": r"$\pm$", "λ1": r"$\lambda_1$", "λ2": r"$\lambda_2$", "–": "--", "%": r"\%", "_": r"\_", "&": r"\&"}
        escaped = [" & ".join(re.sub("|".join(marks), lambda m: marks[m[0]], cell) for cell in row) + r" \\" for row in rows]
        body = [r"\begin{tabular}{ll" + "r" * (len(rows[0]) - 2) + "}", r"\toprule", escaped[0], r"\midrule", *escaped[1:]]
        return "\n".join([*body, r"\bottomrule", r"\end{tabular}"])
    widths = [max(3, *map(len, column)) for column in zip(*rows)]
    lines = [[cell.ljust(w) if c < 2 else cell.rjust(w) for c, (cell, w) in enumerate(zip(row, widths))] for row in rows]
    if form == "markdown":
        rule = ["-" * w if c < 2 else "-" * (w - 1) + ":" for c, w in enumerate(widths)]
        return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])
    return "\n".join("  ".join(line).rstrip() for line in lines)


def print_tables(arguments: argparse.Namespace, runs: list[Evaluated]) -> None:
    """One table for each task, on stdout; what a reader should know about the runs, on stderr."""
    for task in dict.fromkeys(run.checkpoint["task"] for run in runs):
        mine = [run for run in runs if run.checkpoint["task"] == task]
        form = "latex" if arguments.latex else "markdown" if arguments.markdown else "text"
        counts = dict.fromkeys(table_count(run.result.flops) for run in mine)
        where = dict.fromkeys(f"{run.metrics['dataset']} {arguments.split}" for run in mine)
        note = f"On {', '.join(where)}; GFLOPs per image, count: {', '.join(counts)}; ± is the standard deviation over seeds (n - 1)."
        print(render(make_table(mine, arguments.published), form) + ("\n% " if form == "latex" else "\n\n") + note)
    for setting in group_runs(runs):
        seeds = [run.checkpoint["config"].get("seed") for run in setting.runs]
        if len(set(seeds)) < len(seeds):
            warn(f"{', '.join(str(run.checkpoint['path']) for run in setting.runs)}: of one setting, and a seed comes twice")
    for run in runs:
        done, iters = run.checkpoint["iteration"], run.checkpoint["config"].get("iters")
        if iters and done < iters and run.checkpoint["path"].stem == "last":
            warn(f"{run.checkpoint['path']}: at iteration {done} of {iters}")


def warn(message: str) -> None:
    print(f"note: {message}", file=sys.stderr)


# ============ figures ============

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")  # Okabe and Ito's
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (3, 1)))
STYLE = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7,
    "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "lines.linewidth": 1.2,
    "lines.markersize": 5, "pdf.fonttype": 42, "ps.fonttype": 42, "savefig.dpi": 200,
}  # fmt: skip
FAINT = "0.82"  # grey of what is closed or not spoken of
DIFFERENCE = 0.02  # of alpha, below which two routes are drawn as the same
PAGE = 7.0  # inches, the width of a page's text
EMBEDDED = 5000  # images at most in the plane: t-SNE takes about half a minute for them on one core


def new_figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")  # inches


def save_figure(figure, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
    figure.savefig(folder / f"{name}.png")
    print(f"wrote {folder / name}.pdf and .png", file=sys.stderr)


def draw_figures(arguments: argparse.Namespace, runs: list[Evaluated], process: Process) -> None:
    """All that the checkpoints allow: some for each, under its name where there are several, and some of all together."""
    folder, several = arguments.figures, len(runs) > 1
    names = [run.name for run in runs]
    for i, run in enumerate(runs):
        suffix = f"-{run.name}" + (f"-{1 + names[:i].count(run.name)}" if names.count(run.name) > 1 else "") if several else ""
        model, checkpoint = open_checkpoint(arguments, run.checkpoint["path"], process)
        dataset = open_split(arguments, checkpoint)
        save_figure(draw_predictions(run, model, dataset, process, arguments.min_score), folder, f"predictions{suffix}")
        if run.grid:
            save_figure(draw_experts(run, model, dataset, process, arguments.min_score), folder, f"experts{suffix}")
            save_figure(draw_routes(run, average_router(run, runs)), folder, f"routes{suffix}")
        else:
            warn(f"{run.checkpoint['path']}: {run.variant} has no gates, so no routes, experts and activation space")
        events = read_log(run.checkpoint["path"].with_name("log.jsonl"))
        if any(event["event"] == "train" for event in events):
            save_figure(draw_training(run, events), folder, f"training{suffix}")
        else:
            warn(f"{run.checkpoint['path'].with_name('log.jsonl')}: nothing of the training in it, so no training figure")
    sizes = dict.fromkeys(len(run.grid) for run in runs if run.grid)
    for nodes in sizes:  # A of another length is another space
        figure = draw_activation_space([run for run in runs if len(run.grid) == nodes])
        save_figure(figure, folder, "activations" + (f"-{nodes}-nodes" if len(sizes) > 1 else ""))
    tasks = dict.fromkeys(run.checkpoint["task"] for run in runs)
    for task in tasks:
        mine, suffix = [run for run in runs if run.checkpoint["task"] == task], f"-{task}" if len(tasks) > 1 else ""
        if any(measured(run, score) is not None for run in mine for score in SCORES[task]):
            save_figure(draw_trade_off(mine, arguments.published), folder, f"trade-off{suffix}")
        sweeps = {name: lines for name in ("k", "margin", "lambda2") if (lines := find_sweep(mine, name))}
        if sweeps:
            save_figure(draw_ablations(mine, sweeps), folder, f"ablations{suffix}")
        elif several:
            warn("no two checkpoints differ in K, margin or lambda2 alone, so no ablations")


def grid_of(model) -> list[tuple[int, int, list[int]]]:
    """Per node in the order of A(x): layer, scale, and the paths that it has; [] of a static network."""
    if not model.dim:
        return []
    backbone = model.backbone
    places = [(layer, s) for layer, nodes in enumerate(backbone.nodes_per_layer) for s in range(nodes)]
    return [(*place, node.paths) for place, node in zip(places, backbone.all_nodes()[1:])]


def draw_grid(ax, grid: list, values: Tensor, color: str, least=OPEN, place=lambda layer, scale: (layer, scale), line=4.0,
              faint=FAINT) -> None:  # fmt: skip
    """Nodes and paths of the routing grid: lines as wide, and nodes as large, as `values` [D] in -1..1 are far from 0.

    What is below 0 is drawn in the second colour, and its paths dashed; what is within `least` of 0 stays faint. A node is
    as large as the largest of its paths is wide. place: layer and scale -> x and y; line: points, width of a path of 1.
    """
    from matplotlib.collections import LineCollection

    values = values.view(-1, 3)
    paths = [(n, path) for n, (_, _, paths) in enumerate(grid) for path in paths]
    ends = [(place(*grid[n][:2]), place(grid[n][0] + 1, grid[n][1] + path - 1)) for n, path in paths]
    alpha = torch.stack([values[n, path] for n, path in paths])
    stem = [(place(-1, 0), place(0, s)) for s in (0, 1)]
    ax.add_collection(LineCollection(stem + ends, colors=faint, linewidths=0.5, zorder=1))
    signs = {"more": (alpha > least, color, "-"), "less": (alpha < -least, COLORS[1], (0, (1.2, 0.8)))}
    for name, (chosen, shade, style) in signs.items():
        segments = [end for end, use in zip(ends, chosen.tolist()) if use]
        widths = line_width(alpha[chosen].abs(), line).tolist()
        ax.add_collection(LineCollection(segments, colors=shade, linewidths=widths, linestyles=[style], zorder=2, label=name,
                                         capstyle="butt"))  # fmt: skip
    largest = torch.stack([values[n].gather(0, values[n].abs().argmax(0, keepdim=True))[0] for n in range(len(grid))])
    x, y = zip(*(place(layer, scale) for layer, scale, _ in grid))
    diameters = 2 + 1.1 * line * largest.abs()  # points
    shades = [color if v > least else COLORS[1] if v < -least else "white" for v in largest.tolist()]
    edges = ["black" if abs(v) > least else faint for v in largest.tolist()]
    ax.scatter(x, y, s=diameters.square().tolist(), c=shades, edgecolors=edges, linewidths=0.5, zorder=3, label="nodes")
    ax.scatter(*place(-1, 0), s=16, marker="s", c="white", edgecolors="0.5", linewidths=0.6, zorder=3)


def line_width(alpha, line: float = 4.0):
    """Points: what is just open is still a line."""
    return 0.5 + (line - 0.5) * alpha


def routes_panel(ax, grid: list, values: Tensor, color: str, title: str, least: float = OPEN) -> None:
    """`draw_grid` with axes: layers from left to right, strides from top to bottom."""
    draw_grid(ax, grid, values, color, least)
    layers, scales = grid[-1][0] + 1, 1 + max(scale for _, scale, _ in grid)
    ax.set(xlim=(-1.5, layers + 0.3), ylim=(scales - 0.55, -0.6))
    ax.set_title(title, loc="left", pad=3)
    step = 1 if layers <= 8 else 2 if layers <= 17 else 4
    ax.set_xticks([-1, *range(0, layers, step)], ["stem", *map(str, range(1, layers + 1, step))])
    ax.set_yticks(range(scales), [str(4 * 2**s) for s in range(scales)])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def average_router(run: Evaluated, runs: list[Evaluated]) -> Evaluated | None:
    """Dynamic Routing to stand beside a run of DivDR: the first run of the same grid without a clustering loss."""
    if VARIANTS[run.variant].lambda2:
        return next((r for r in runs if r.grid == run.grid and not VARIANTS[r.variant].lambda2), None)
    return None


def draw_routes(run: Evaluated, reference: Evaluated | None):
    """Left each expert's centre, the average over all images and, if given, Dynamic Routing's; right what tells it from the
    others."""
    centers, mean = as_alpha(run.centers, run.checkpoint), run.alpha.mean(0)
    sizes, costs = run.metrics["images_per_expert"], run.metrics["gflops_per_expert"]
    rows = []
    for k, center in enumerate(centers):
        others = torch.cat([centers[:k], centers[k + 1 :]])
        name = f"expert {k}: centre; " + (f"{sizes[k]} images, {costs[k]:.3g} GFLOPs" if sizes[k] else "no image here")
        difference = center - others.mean(0) if len(others) else center * 0
        rows.append((name, center, COLORS[k % len(COLORS)], f"expert {k} minus the mean of the others", difference))
    cost = run.metrics["gflops"]["paper"]["mean"]
    spread_title = "largest difference between two experts"
    rows.append((f"all {len(run.result.A)} images: average, {cost:.3g} GFLOPs", mean, "0.25", spread_title,
                 centers.amax(0) - centers.amin(0)))  # fmt: skip
    if reference is not None:
        theirs, cost = reference.alpha.mean(0), reference.metrics["gflops"]["paper"]["mean"]
        rows.append((f"{METHODS[reference.variant]}, all images: average, {cost:.3g} GFLOPs", theirs, "0.25",
                     f"{METHODS[run.variant]}'s average minus {METHODS[reference.variant]}'s", mean - theirs))  # fmt: skip
    scales = 1 + max(scale for _, scale, _ in run.grid)
    figure = new_figure(PAGE, (0.35 + 0.24 * scales) * len(rows) + 0.55)
    axes = figure.subplots(len(rows), 2, squeeze=False)
    for (left, right), (name, center, color, title, difference) in zip(axes, rows):
        routes_panel(left, run.grid, center, color, name)
        routes_panel(right, run.grid, difference, "0.25" if title == spread_title else COLORS[0], title, least=DIFFERENCE)
        left.set_ylabel("stride")
    for ax in axes[-1]:
        ax.set_xlabel("layer")
    routes_legend(figure)
    return figure


def routes_legend(figure) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color="0.25", lw=line_width(alpha), label=f"α = {alpha:g}") for alpha in (1, 0.5, 0.1)]
    lines.append(Line2D([], [], color=FAINT, lw=0.5, label="closed, or no difference"))
    lines.append(Line2D([], [], color=COLORS[0], lw=2, label="more open"))
    lines.append(Line2D([], [], color=COLORS[1], lw=2, ls=(0, (1.2, 0.8)), label="less open"))
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), handlelength=2.4)


def to_rgb(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def draw_image_route(image: Tensor, grid: list, alpha: Tensor, title: str):
    """The route of one picture [3, H, W] over the picture itself, which is paled; alpha: [D]."""
    height, width = image.shape[-2:]
    layers, scales = grid[-1][0] + 1, 1 + max(scale for _, scale, _ in grid)
    size = max(5 * min(1, width / height), 3.5)
    figure = new_figure(size, size * height / width + 0.4)
    ax = figure.subplots()
    pale = 0.4 * to_rgb(image) / 255 + 0.6
    ax.imshow(pale, extent=(0, width, height, 0))
    ax.axis("off")

    def place(layer, scale):
        return (layer + 1.7) / (layers + 2.2) * width, (scale + 0.5) / scales * height

    draw_grid(ax, grid, alpha, COLORS[0], place=place, line=5.0, faint="0.55")
    for scale in range(scales):
        ax.text(*place(-1.3, scale), f"{4 * 2**scale}", ha="right", va="center", fontsize=8)
    ax.text(*place(-1.3, -0.35), "stride", ha="center", va="center", fontsize=8)
    ax.set(xlim=(0, width), ylim=(height, 0))
    ax.set_title(title, loc="left")
    return figure


def embed(points: Tensor) -> tuple[Tensor, str]:
    """[N, D] -> [N, 2] and how: t-SNE where scikit-learn is installed and there are enough points, else PCA."""
    centered = (points - points.mean(0)).double()
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        TSNE = None
    if TSNE is not None and len(points) >= 10 and centered.abs().max() > 1e-6:
        perplexity = min(30, (len(points) - 1) / 3)
        placed = TSNE(perplexity=perplexity, init="pca", angle=0.7, random_state=0).fit_transform(centered.float().numpy())
        return torch.from_numpy(placed), f"t-SNE (scikit-learn), perplexity {perplexity:.3g}"
    _, singular, directions = torch.linalg.svd(centered, full_matrices=False)
    placed = F.pad(centered @ directions[:2].T, (0, 2 - len(directions[:2])))
    share = (singular[:2].square().sum() / singular.square().sum().clamp(min=1e-12)).item()
    return placed, f"PCA, first two components: {100 * share:.0f} % of the variance"


def draw_activation_space(runs: list[Evaluated]):
    """A(x) of the evaluation set in the plane, all runs laid out together: for each run its points by expert, with the
    centres, and of several runs also all by run (figure 4 of the paper)."""
    most = max(2, EMBEDDED // len(runs))
    chosen = [torch.arange(min(most, len(run.result.A))) * len(run.result.A) // min(most, len(run.result.A)) for run in runs]
    points = [torch.cat([run.result.A[rows], run.centers]).float() for run, rows in zip(runs, chosen)]
    placed, how = embed(torch.cat(points))
    shares = placed.split([len(p) for p in points])
    panels = len(runs) + (len(runs) > 1)
    columns = min(panels, 3)
    rows = -(-panels // columns)
    width = PAGE if columns > 1 else 3.8
    figure = new_figure(width, rows * (width / columns) + 0.3 * rows + (0.4 if len(runs) == 1 else 0.2 * -(-len(runs) // 3)))
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    size = 12 if len(placed) < 500 else 6 if len(placed) < 2000 else 3  # square points
    ring, below = (40 if len(runs) > 1 else 90), dict(loc="upper center", bbox_to_anchor=(0.5, 0), handletextpad=0.1, columnspacing=0.8,
                                                      markerscale=5 / math.sqrt(size))  # fmt: skip

    def dots(ax, points: Tensor, j: int, label: str) -> None:
        ax.scatter(*points.T.numpy(), s=size, c=COLORS[j % len(COLORS)], marker=MARKERS[j % len(MARKERS)], linewidths=0, alpha=0.8,
                   label=label)  # fmt: skip

    for ax, run, rows, mine in zip(axes, runs, chosen, shares):
        if len(runs) > 1:
            ax.scatter(*placed.T.numpy(), s=1, c=FAINT, linewidths=0)
        labels = run.labels[rows]
        for k, count in enumerate(run.metrics["images_per_expert"]):
            dots(ax, mine[: len(rows)][labels == k], k, f"expert {k} ({count})")
        for k, (x, y) in enumerate(mine[len(rows) :].tolist()):
            ax.scatter(x, y, s=ring, c="white", edgecolors=COLORS[k % len(COLORS)], linewidths=ring / 80, zorder=3)
            ax.text(x, y, str(k), ha="center", va="center_baseline", fontsize=4 + ring / 30, fontweight="bold", zorder=4)
        ax.set_title(run.name, loc="left")
        ax.legend(ncols=2, **below)
    if len(runs) > 1:
        ax = axes[len(runs)]
        for j, setting in enumerate(group_runs(runs)):
            mine = [share[: len(rows)] for run, share, rows in zip(runs, shares, chosen) if run in setting.runs]
            dots(ax, torch.cat(mine), j, setting.label)
        ax.set_title("all together", loc="left")
        ax.legend(ncols=2 if len(setting.label) < 16 else 1, **below)
    for ax in axes[:panels]:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(True)
        ax.margins(0.08)
    for ax in axes[panels:]:
        ax.axis("off")
    shown = sum(map(len, chosen))
    total = sum(len(run.result.A) for run in runs)
    figure.supxlabel("numbers in rings: centres\n" + how + (f"; {shown} of {total} images, evenly spaced" if shown < total else ""), fontsize=7)
    return figure


def draw_experts(run: Evaluated, model, dataset, process: Process, min_score: float):
    """Per expert, the five images nearest to its centre, under each what is predicted for it, its GFLOPs and its distance
    (figure 5 of the paper)."""
    columns, experts = 5, len(run.centers)
    labels, distances = nearest(run.result.A, run.checkpoint, run.centers)
    height, width = dataset[0][0].shape[-2:]
    left, below = 1.15, 0.36  # inches, for words
    pair = 2 * (PAGE - left) / columns * height / width
    rows = [pair if size else 0.2 for size in run.metrics["images_per_expert"]]
    total = sum(rows) + experts * below
    figure = new_figure(PAGE, total)
    figure.set_layout_engine("none")
    axes = figure.subplots(experts, columns, squeeze=False, gridspec_kw=dict(
        left=left / PAGE, right=0.995, bottom=below / total, top=1 - 0.03 / total, wspace=0.03,
        height_ratios=rows, hspace=below * experts / sum(rows)))  # fmt: skip
    for k in range(experts):
        members = (labels == k).nonzero().flatten()
        cost = f"\n{run.flops[members].double().mean().item() / 1e9:.3g} GFLOPs" if len(members) else ""
        place = axes[k, 0].get_position()
        figure.text((left - 0.08) / PAGE, (place.y0 + place.y1) / 2, f"expert {k}\n{len(members) or 'no'} images{cost}",
                    ha="right", va="center")  # fmt: skip
        for ax in axes[k]:
            ax.axis("off")
        for ax, i in zip(axes[k], members[distances[members].argsort(stable=True)][:columns].tolist()):
            image = dataset[i][0]
            _, overlay = predict(model, run.checkpoint, process, image, 0.8, min_score, names=False)
            gap = np.full((max(1, image.shape[1] // 40), image.shape[2], 3), 255, np.uint8)
            ax.imshow(np.concatenate([to_rgb(image), gap, to_rgb(overlay)]))
            ax.set_title(f"{run.flops[i].item() / 1e9:.3g} GFLOPs\ndistance {distances[i].item():.2f}", fontsize=7, y=0, pad=-3, va="top")
    return figure


@torch.no_grad()
def draw_predictions(run: Evaluated, model, dataset, process: Process, min_score: float, count: int = 4):
    """Image, truth, prediction and, of segmentation, where they differ, for images evenly spaced over the split."""
    chosen = [i * len(dataset) // min(count, len(dataset)) for i in range(min(count, len(dataset)))]
    segmentation = run.checkpoint["task"] == "segmentation"
    titles = ["image", "truth", "prediction", "errors"] if segmentation else ["image", "truth", f"found, score ≥ {min_score:g}"]
    height, width = dataset[0][0].shape[-2:]
    cell = min(PAGE / len(titles), 1.75 * width / height)
    classes = run.checkpoint["classes"]
    legend_rows = -(-min(len(classes), 20) // 6)
    figure = new_figure(cell * len(titles), (cell * height / width + 0.04) * len(chosen) + 0.3 + 0.17 * legend_rows)
    axes = figure.subplots(len(chosen), len(titles), squeeze=False)
    for title, ax in zip(titles, axes[0]):
        ax.set_title(title)
    for row, i in zip(axes, chosen):
        image, truth = dataset[i][:2]
        if segmentation:
            pictures = segmentation_pictures(run, model, process, image, truth)
        else:
            found = predict(model, run.checkpoint, process, image, 0.5, min_score, names=False)[1]
            pictures = [image, draw_objects(run.checkpoint, image, truth["boxes"], truth["labels"] - 1, truth.get("masks")), found]
        for ax, picture in zip(row, pictures):
            ax.imshow(to_rgb(picture), interpolation="nearest" if segmentation else None)
            ax.axis("off")
    class_legend(figure, run.checkpoint, segmentation)
    return figure


def segmentation_pictures(run: Evaluated, model, process: Process, image: Tensor, truth: Tensor) -> list[Tensor]:
    """Image, truth, prediction and errors, uint8 [3, H, W]. Errors: white is right, dark is wrong, grey has no label."""
    palette = torch.zeros(256, 3, dtype=torch.uint8)
    palette[: len(run.checkpoint["palette"])] = torch.tensor(run.checkpoint["palette"], dtype=torch.uint8)
    palette[data.IGNORE] = 200
    out = model(data.normalize(image[None].to(process.device), run.checkpoint["mean"], run.checkpoint["std"]))
    prediction = out.logits[0].argmax(0).cpu()
    errors = torch.tensor([[255, 255, 255], [180, 50, 0], [200, 200, 200]], dtype=torch.uint8)
    kind = torch.where(truth == data.IGNORE, 2, (prediction != truth).long())
    return [image, *(table[index.long()].permute(2, 0, 1) for table, index in ((palette, truth), (palette, prediction), (errors, kind)))]


def class_legend(figure, checkpoint: dict, segmentation: bool) -> None:
    """The classes' colours below a figure of predictions, and those of errors."""
    from matplotlib.patches import Patch

    named = list(zip(checkpoint["classes"], checkpoint["palette"]))[:20]
    patches = [Patch(facecolor=[c / 255 for c in color], edgecolor="0.4", lw=0.4, label=name) for name, color in named]
    if len(checkpoint["classes"]) > 20:
        patches.append(Patch(facecolor="none", label=f"… and {len(checkpoint['classes']) - 20} more"))
    if segmentation:
        patches.append(Patch(facecolor="#B43200", edgecolor="0.4", lw=0.4, label="wrong"))
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 7), handlelength=1.0, handleheight=1.0,
                  handletextpad=0.4, columnspacing=1.0)  # fmt: skip


def read_log(path: Path) -> list[dict]:
    """The events of a run's log.jsonl; [] where there is none. A last line that is still being written is left out."""
    events = []
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            events.append({"event": event["event"], "iteration": event["iteration"]} | event)
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise InputError(f"{path}: line {number} is no event of a run; restore the file, or move it away to do without it") from None
    return events


def draw_training(run: Evaluated, events: list[dict]):
    """Loss terms, GFLOPs, inter and intra, sigma², cluster sizes and scores over iterations; K-means updates as ticks."""
    steps = [event for event in events if event["event"] == "train"]
    updates = [event for event in events if event["event"] == "kmeans"]
    scored = [event for event in events if event["event"] == "evaluation"]
    figure = new_figure(PAGE, 5.6 if updates else 4.0)
    axes = list(figure.subplots(3 if updates else 2, 2, sharex=True).flat)

    def curves(what: str, rows: list[dict], names: dict[str, str], marks: bool = False, scale=lambda value: value):
        ax = axes.pop(0)
        ax.set_ylabel(what)
        for j, (key, label) in enumerate(names.items()):
            points = [(row["iteration"], scale(value)) for row in rows if (value := dig(row, key)) is not None]
            ax.plot(*zip(*points), color=COLORS[j % len(COLORS)], ls=LINES[j % len(LINES)], label=label,
                    marker=MARKERS[j % len(MARKERS)] if marks else None)  # fmt: skip
        ax.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=3, columnspacing=0.8, handlelength=2.2)
        return ax

    terms = dict.fromkeys(key for event in steps for key in event if key.startswith("loss_"))
    ax = curves("terms of the loss", steps, {key: key[5:].replace("_", " ") for key in terms})
    ax.set_yscale("symlog", linthresh=1e-3, linscale=0.3)
    curves("GFLOPs per image", steps, {"gflops_real": "real", "gflops_expected": "expected"})
    if updates:
        curves("distances in A", updates, {"inter": "inter, between centres", "intra": "intra, within clusters"})
        curves("σ²", updates, {"sigma2": "σ², spread about the centres"})
        curves("images per cluster", updates, {("sizes", k): f"expert {k}" for k in range(len(updates[0]["sizes"]))})
    names = {("miou",): "mIoU", ("box", "AP"): "box AP", ("mask", "AP"): "mask AP"}
    names = {key: name for key, name in names.items() if any(dig(event, key) is not None for event in scored)}
    if names:
        curves("evaluation, %", scored, names, marks=True, scale=lambda value: 100 * value)
    for ax in axes:
        ax.axis("off")
    for ax in figure.axes:
        if updates and ax.axison:
            ax.plot([event["iteration"] for event in updates], [0.012] * len(updates), "|", color="0.45", ms=4, mew=0.6,
                    transform=ax.get_xaxis_transform(), zorder=0)  # fmt: skip
        ax.xaxis.set_tick_params(labelbottom=True)
        ax.set_xlabel("iteration" if ax.axison else "")
    figure.suptitle(f"{run.name}" + ("; ticks at the bottom: K-means updates" if updates else ""), fontsize=8, x=0.01, ha="left")
    return figure


def dig(event: dict, key) -> float | None:
    """The value under a key, or under keys one inside the other."""
    for part in (key,) if isinstance(key, str) else key:
        event = None if event is None else event[part] if isinstance(event, list) else event.get(part)
    return event


def number_in(text: str) -> tuple[float, float]:
    """"72.7 ± 0.6" -> (72.7, 0.6); without a deviation it is 0."""
    mean, _, deviation = text.partition("±")
    return float(mean), float(deviation or 0)


def draw_trade_off(runs: list[Evaluated], published: bool):
    """Score against GFLOPs, a point for each setting with its deviation over seeds (figure 8 of the paper); with `published`
    the paper's as open markers."""
    task, settings = runs[0].checkpoint["task"], group_runs(runs)
    scores = [name for name in SCORES[task] if any(setting.mean_std(name) for setting in settings)]
    figure = new_figure(PAGE, 3.2 * len(scores))
    for ax, score in zip(figure.subplots(len(scores), 1, squeeze=False).flat, scores):

        def point(x: tuple, y: tuple, label: str, color: str, marker: str, **open_marker) -> None:
            (x, dx), (y, dy) = x, y
            ax.errorbar(x, y, yerr=dy or None, xerr=dx or None, color=color, ls="none", elinewidth=0.8, capsize=2, zorder=2)
            ax.plot(x, y, color=color, marker=marker, ms=6, ls="none", label=label, zorder=3, **open_marker)

        for j, setting in enumerate(settings):
            if setting.mean_std(score):
                count = f" ({len(setting.runs)} runs)" if len(setting.runs) > 1 else ""
                point(setting.mean_std("GFLOPs"), setting.mean_std(score), setting.label + count,
                      COLORS[j % len(COLORS)], MARKERS[(j + j // len(MARKERS)) % len(MARKERS)])  # fmt: skip
        rows = [row for row in published_rows(task) if score in row and row["table"] in "145"] if published else []
        for j, row in enumerate(rows):
            color = COLORS[0] if row["Method"].startswith("DivDR") else COLORS[1] if row["Method"].startswith("DR") else "0.4"
            point(number_in(row["GFLOPs"]), number_in(row[score]), f"{row['Method']} (paper, Table {row['table']})", color,
                  MARKERS[j % len(MARKERS)], mfc="white")  # fmt: skip
        low, high = (pick(ax.dataLim.intervalx) for pick in (min, max))
        if low > 0 and high > 8 * low:
            ax.set_xscale("log")
        else:
            ax.locator_params(axis="x", nbins=5)
        ax.margins(0.1)
        where = f"{runs[0].metrics['dataset']} {runs[0].metrics['split']}"
        ax.set(xlabel=f"GFLOPs per image, count: {table_count(runs[0].result.flops)}", ylabel=f"{score}, %, {where}")
        ax.grid(color="0.9", lw=0.5)
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def find_sweep(runs: list[Evaluated], name: str) -> list[tuple[str, list[Setting]]]:
    """Where runs differ in the setting `name` and, seeds apart, in nothing else: a label and the settings along it."""
    sweeps = []
    for rest in group_runs([run for run in runs if run.grid], apart_from=name):
        along = sorted(group_runs(rest.runs), key=lambda setting: setting.runs[0].checkpoint["config"].get(name) or 0)
        if len(along) > 1:
            sweeps.append((rest.label, along))
    return sweeps


def draw_ablations(runs: list[Evaluated], sweeps: dict[str, list]):
    """Score, GFLOPs, inter and intra against each swept setting, a line for each of what else there is (figures 6 and 7,
    table 3 of the paper)."""
    task = runs[0].checkpoint["task"]
    measures = [name for name in (*SCORES[task], *MEASURES) if any(measured(run, name) is not None for run in runs)]
    figure = new_figure(max(2.4 * len(sweeps), 3.2), 1.35 * len(measures) + 0.2 * max(map(len, sweeps.values())) + 0.3)
    axes = figure.subplots(len(measures), len(sweeps), squeeze=False, sharex="col", sharey="row")
    for column, (name, lines) in zip(axes.T, sweeps.items()):
        values = sorted({setting.runs[0].checkpoint["config"][name] for _, along in lines for setting in along})
        for ax, column_name in zip(column, measures):
            for j, (label, along) in enumerate(lines):
                points = [(values.index(setting.runs[0].checkpoint["config"][name]), setting.mean_std(column_name)) for setting in along]
                points = [(x, mean, deviation or 0) for x, (mean, deviation) in ((x, stat) for x, stat in points if stat)]
                if points:
                    x, mean, deviation = zip(*points)
                    ax.errorbar(x, mean, yerr=deviation if any(deviation) else None, color=COLORS[j % len(COLORS)],
                                marker=MARKERS[j % len(MARKERS)], ls=LINES[j % len(LINES)], capsize=2, elinewidth=0.8, label=label)  # fmt: skip
            ax.grid(color="0.9", lw=0.5)
            ax.margins(x=0.12, y=0.15)
        ax.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        ax.set_xlabel({"k": "K", "margin": "margin", "lambda2": "λ2"}[name])
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.42))
    for ax, name in zip(axes[:, 0], measures):
        ax.set_ylabel(f"{name}, %" if name in SCORES[task] else name)
    return figure


def main() -> None:
    arguments = parse_arguments()
    with one_line_errors(InputError, data.DataError, OSError):
        process = start_process(arguments.device)
        leave_cores_to_loaders(process.device, arguments.workers)
        if arguments.figures and process.first:
            arguments.figures.mkdir(parents=True, exist_ok=True)  # before what takes long
        for path in arguments.checkpoint:
            if not path.is_file():
                open_checkpoint(arguments, path, process)  # says what is wrong
        if arguments.image:
            if process.first:
                with drawing_style():
                    show(arguments, *open_checkpoint(arguments, arguments.checkpoint[0], process), process)
        else:
            with drawing_style():
                runs = [evaluate_checkpoint(arguments, path, process) for path in arguments.checkpoint]
                if process.first and arguments.table:
                    print_tables(arguments, runs)
                if process.first and arguments.figures:
                    draw_figures(arguments, runs, process)
    if dist.is_initialized():
        dist.destroy_process_group()


def drawing_style():
    """Inside it, figures have `STYLE`."""
    import matplotlib

    return matplotlib.rc_context(STYLE)


if __name__ == "__main__":
    main()
