"""Evaluate a checkpoint of train_seg.py or train_det.py, or show what it predicts.

    python evaluate.py runs/NAME/last.pt                             # scores, cost and experts; metrics.json, experts.png
    python evaluate.py runs/NAME/last.pt --split test --predictions DIR
    python evaluate.py FILE --variant dr-a                           # a checkpoint of Dynamic Routing's authors
    python evaluate.py runs/NAME/last.pt --image FILE_OR_FOLDER      # colour overlays, and which expert took each
    torchrun --nproc_per_node 8 evaluate.py runs/NAME/last.pt        # each image counts once

The checkpoint knows its network, data set, classes and normalisation; flags override what can differ.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

import data
import kmeans
from model import (
    VARIANTS, InputError, OneLineParser, Process, default_workers, leave_cores_to_loaders, load_checkpoint, load_published,
    one_line_errors, start_process,
)  # fmt: skip
from routing import OPEN
from train_det import average_precision, evaluate_detection
from train_seg import evaluate_segmentation

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a file written by train_seg.py or train_det.py")
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
    group.add_argument("--image", type=Path, help="show this picture, or the pictures in this folder, and do nothing else")
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
    return arguments


def spread(values: Tensor) -> dict[str, float]:
    """[N] -> mean, min and max."""
    values = values.double()
    return {"mean": values.mean().item(), "min": values.min().item(), "max": values.max().item()}


@dataclass
class Score:
    """A split, evaluated: what both tasks have in common for the report."""

    dataset: object
    A: Tensor  # [N, D]
    flops: dict[str, Tensor]  # per count: [N] real multiply-adds of each image
    size: tuple[int, int]  # height and width at which the first image was run
    metrics: dict  # the task's own scores
    table: str  # the same, as text


def score_segmentation(arguments: argparse.Namespace, model, checkpoint: dict, process: Process) -> Score:
    dataset = open_split(arguments, checkpoint, data.segmentation_dataset)
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
    return Score(dataset, result.A, result.flops, dataset[0][0].shape[-2:], metrics, "\n".join(lines))


def score_detection(arguments: argparse.Namespace, model, checkpoint: dict, process: Process) -> Score | None:
    """Also writes detections.json, in COCO's results format, beside the checkpoint. None on all processes but the first."""
    files = {"json": arguments.json, "images": arguments.images}
    trained_on = checkpoint["files"].get(arguments.split, {})
    if arguments.dataset in (None, checkpoint["dataset"]) and not arguments.data:
        files = {key: files[key] or trained_on.get(key) for key in files}
    limit = arguments.limit
    if limit is None and not (arguments.json or arguments.data):
        limit = checkpoint["data_options"].get("limit")
    masks = checkpoint["model_args"]["masks"]
    dataset = open_split(arguments, checkpoint, data.detection_dataset, masks=masks, limit=limit, **files)
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
    path = arguments.checkpoint.with_name("detections.json")
    path.write_text(json.dumps(result.detections) + "\n")
    tables.append(f"wrote {path}")
    rest = {part: spread(flops / 1e9) for part, flops in result.rest.items()}
    metrics["gflops_outside_backbone"] = rest
    tables.append("\nG multiply-adds per image outside the backbone (mean): "
                  + ", ".join(f"{part} {values['mean']:.3f}" for part, values in rest.items()))  # fmt: skip
    size = model.prepare([data.as_float(dataset[0][0]).to(process.device)])[0].image_sizes[0]
    return Score(dataset, result.A, result.flops, size, metrics, "\n".join(tables))


def open_split(arguments: argparse.Namespace, checkpoint: dict, open_dataset, **files):
    """The data set to evaluate on, by the flags and, where they are silent, as in training."""
    name = arguments.dataset or checkpoint["dataset"]
    same = name == checkpoint["dataset"]
    root = arguments.data or (checkpoint["data"] if same else None)
    options = checkpoint["data_options"] if same else {}
    dataset = open_dataset(name, root, arguments.split, train=False, **options | files)
    classes = list(dataset.classes if hasattr(dataset, "classes") else dataset.info.classes)
    if classes != checkpoint["classes"]:
        raise InputError(f"--dataset {name}: its {len(classes)} classes are not the {len(checkpoint['classes'])} "
                         f"of {arguments.checkpoint}, which was trained on {checkpoint['dataset']}")  # fmt: skip
    return dataset


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


def recovery(model, result: Score, centers: Tensor, labels: Tensor) -> dict:
    """How well the experts recover the subsets that are known, and what each subset's images run.

    Per subset: GFLOPs (paper count), and by stride the G multiply-adds of cells and paths that ran and the share of
    cells that ran.
    """
    dataset, backbone = result.dataset, model.backbone
    accuracy, rand, table, match = kmeans.agreement(labels, dataset.subset)
    costs = backbone.costs(*result.size)
    opened = result.A.view(len(labels), -1, 3) > OPEN  # [N, nodes, 3]
    spent = opened.any(-1) * costs.cell[1:] + (opened * costs.path[1:]).sum(-1)  # [N, nodes]
    scale = torch.tensor([s for nodes in backbone.nodes_per_layer for s in range(nodes)])
    subsets = {}
    for s, name in enumerate(dataset.subset_names):
        mine = dataset.subset == s
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


def score(arguments: argparse.Namespace, model, checkpoint: dict, process: Process) -> None:
    """Evaluates on a split, prints the table, and writes it as metrics.json and the experts as experts.png beside the
    checkpoint."""
    evaluate = {"segmentation": score_segmentation, "detection": score_detection}[checkpoint["task"]]
    result = evaluate(arguments, model, checkpoint, process)
    if not process.first:
        return
    described = {"checkpoint": str(arguments.checkpoint), "variant": checkpoint["model_args"]["variant"],
                 "dataset": arguments.dataset or checkpoint["dataset"], "split": arguments.split,
                 "iteration": checkpoint["iteration"]}  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in described.items()))
    print(f"\n{result.table}")
    metrics = described | {"images": len(result.A)} | result.metrics
    metrics["gflops"] = {count: spread(flops / 1e9) for count, flops in result.flops.items()}
    centers = checkpoint["centers"]
    if model.dim and centers is None:
        print("the checkpoint has no centres: clustering this split instead")
        centers = kmeans.kmeans(result.A, min(checkpoint["config"]["k"], len(result.A)))[0]
    if centers is not None:
        labels, distances = nearest(result.A, checkpoint, centers)
        metrics |= describe_experts(result.A, result.flops["paper"], centers, labels)
    print_cost_and_experts(metrics)
    if centers is not None and result.dataset.subset is not None:
        metrics["subsets"] = recovery(model, result, centers, labels)
        print_recovery(metrics["subsets"])
    path = arguments.checkpoint.with_name("metrics.json")
    path.write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"\nwrote {path}")
    if centers is not None:
        draw_experts(path.with_name("experts.png"), model, checkpoint, process, result, labels, distances, arguments.min_score)
        print(f"wrote {path.with_name('experts.png')}")


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
    colors = [tuple(color) for color in checkpoint["palette"]]
    if checkpoint["task"] == "segmentation":
        out = model(data.normalize(image[None].to(process.device), checkpoint["mean"], checkpoint["std"]))
        prediction = out.logits[0].argmax(0).cpu()
        masks = prediction == torch.arange(len(colors))[:, None, None]  # [classes, H, W]
        return out, draw_segmentation_masks(image, masks, alpha=opacity, colors=colors)
    out = model([data.as_float(image.to(process.device))])
    found = {key: value.cpu() for key, value in out.detections[0].items()}
    kept = found["scores"] >= min_score
    if not kept.any():
        return out, image
    boxes, scores, classes = found["boxes"][kept], found["scores"][kept], (found["labels"][kept] - 1).tolist()
    colors = [colors[c] for c in classes]
    if "masks" in found:
        image = draw_segmentation_masks(image, found["masks"][kept, 0] > 0.5, alpha=opacity, colors=colors)
    image = draw_bounding_boxes(image, boxes, colors=colors, width=max(1, min(image.shape[-2:]) // 120))
    if names:
        texts = [f"{checkpoint['classes'][c]} {score:.2f}" for c, score in zip(classes, scores.tolist())]
        image = write_on(image, texts, boxes[:, :2].tolist())
    return out, image


def write_on(image: Tensor, texts: list[str], places: list[tuple[float, float]]) -> Tensor:
    """Writes on an image uint8 [3, H, W] at places (x, y): white edged in black, to be read on any ground."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(max(10, min(picture.size) // 30))
    for text, (x, y) in zip(texts, places):
        draw.text((x + 3, y + 1), text, fill="white", font=font, stroke_width=1, stroke_fill="black")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def draw_experts(path: Path, model, checkpoint: dict, process: Process, result: Score, labels: Tensor,
                 distances: Tensor, min_score: float) -> None:  # fmt: skip
    """Per expert, the images nearest to its centre, and under each what is predicted for it (figure 5 of the paper)."""
    from matplotlib.figure import Figure

    experts = max(int(labels.max()) + 1, 1)
    columns, rows = 6, 2 * experts
    height, width = result.dataset[0][0].shape[-2:]
    figure = Figure(figsize=(1.4 * columns * width / height + 1.4, 1.4 * rows), dpi=100)  # inches
    left = 1.4 / figure.get_figwidth()
    axes = figure.subplots(
        rows, columns, squeeze=False,
        gridspec_kw=dict(left=left, right=0.995, bottom=0.005, top=0.995, wspace=0.03, hspace=0.03))
    for ax in axes.flat:
        ax.axis("off")
    for k in range(experts):
        members = (labels == k).nonzero().flatten()
        name = f"expert {k}\n{len(members)} images"
        if len(members):
            name += f"\n{result.flops['paper'][members].double().mean().item() / 1e9:.4f} GFLOPs"
        figure.text(left - 0.01, 1 - (2 * k + 1) / rows, name, ha="right", va="center", fontsize=9)
        for column, i in enumerate(members[distances[members].argsort()][:columns].tolist()):
            image = result.dataset[i][0]
            _, overlay = predict(model, checkpoint, process, image, 0.8, min_score, names=False)
            axes[2 * k, column].imshow(image.permute(1, 2, 0).numpy())
            axes[2 * k + 1, column].imshow(overlay.permute(1, 2, 0).numpy())
    figure.savefig(path)


@torch.no_grad()
def show(arguments: argparse.Namespace, model, checkpoint: dict, process: Process) -> None:
    """Writes each picture with its prediction and its expert drawn on it, and prints which expert took it."""
    source = arguments.image
    paths = [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.suffix.lower() in IMAGE_ENDINGS)
    if not paths:
        raise InputError(f"--image {source}: neither a picture nor a folder with pictures ({' '.join(IMAGE_ENDINGS)})")
    folder = arguments.out or arguments.checkpoint.with_name("overlays")
    for path in paths:
        image = torch.from_numpy(data.read_image(path)).permute(2, 0, 1)
        out, overlay = predict(model, checkpoint, process, image, min_score=arguments.min_score)
        size = image.shape[-2:] if checkpoint["task"] == "segmentation" else out.sizes[0]
        count = model.counts[0]
        gflops = sum(model.real_cost(out.routes, *size, count).values()).item() / 1e9
        line = f"{path}: {gflops:.3f} GFLOPs ({count})"
        if checkpoint["centers"] is not None:
            label, distance = nearest(out.A.cpu(), checkpoint, checkpoint["centers"])
            line += f", expert {label.item()} of {len(checkpoint['centers'])}, {distance.item():.3f} from its centre"
            overlay = write_on(overlay, [f"expert {label.item()}"], [(2, 2)])
        target = folder / path.relative_to(source if source.is_dir() else path.parent)
        target = target.with_name(target.name + ".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(overlay.permute(1, 2, 0).numpy()).save(target)
        print(f"{line} -> {target}")


def open_published(arguments: argparse.Namespace, process: Process):
    """The model of a checkpoint of Dynamic Routing's authors, and what our own checkpoints would say about it."""
    model, checkpoint = load_published(arguments.checkpoint, arguments.variant, process.device)
    info = data.SEGMENTATION[arguments.dataset if arguments.dataset in data.SEGMENTATION else "cityscapes"]
    classes = checkpoint["model_args"]["num_classes"]
    if classes != len(info.classes):
        raise InputError(f"{arguments.checkpoint}: has {classes} classes, {info.name} has {len(info.classes)}; give its --dataset")
    about = dict(task="segmentation", dataset=info.name, data=None, data_options={}, classes=list(info.classes),
                 palette=info.palette, mean=list(data.MEAN), std=list(data.STD), config={"k": 4}, centers=None)  # fmt: skip
    return model, checkpoint | about


def main() -> None:
    arguments = parse_arguments()
    with one_line_errors(InputError, data.DataError, OSError):
        process = start_process(arguments.device)
        leave_cores_to_loaders(process.device, arguments.workers)
        if arguments.variant:
            model, checkpoint = open_published(arguments, process)
        else:
            model, checkpoint = load_checkpoint(arguments.checkpoint, process.device)
        missing = {"task", "dataset", "data", "data_options", "classes", "palette", "mean", "std", "config", "centers"} - checkpoint.keys()
        if missing:
            raise InputError(f"{arguments.checkpoint}: holds no {sorted(missing)[0]}; give a file written by train_seg.py or train_det.py")
        checkpoint["mean"] = arguments.mean or checkpoint["mean"]
        checkpoint["std"] = arguments.std or checkpoint["std"]
        if checkpoint["task"] == "detection":
            model.rcnn.transform.image_mean, model.rcnn.transform.image_std = checkpoint["mean"], checkpoint["std"]
        for flag in ("predictions",) if checkpoint["task"] == "detection" else ("json", "images", "limit"):
            if getattr(arguments, flag):
                raise InputError(f"--{flag}: does not apply to {arguments.checkpoint}, a checkpoint for {checkpoint['task']}")
        if not arguments.image:
            score(arguments, model, checkpoint, process)
        elif process.first:
            show(arguments, model, checkpoint, process)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
