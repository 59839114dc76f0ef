"""Evaluate a checkpoint, or show what it predicts.

    python evaluate.py runs/NAME/last.pt                             # scores, cost and experts; metrics.json, experts.png
    python evaluate.py runs/NAME/last.pt --split test --predictions DIR
    python evaluate.py runs/NAME/last.pt --image FILE_OR_FOLDER      # colour overlays, and which expert took each
    torchrun --nproc_per_node 8 evaluate.py runs/NAME/last.pt        # each image counts once

The checkpoint knows its network, data set, classes and normalisation; flags override what can differ.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torchvision.utils import draw_segmentation_masks

import data
import kmeans
from model import (
    InputError, OneLineParser, Process, default_workers, leave_cores_to_loaders, load_checkpoint, one_line_errors,
    start_process,
)  # fmt: skip
from routing import OPEN
from train_seg import Evaluation, evaluate_segmentation

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a file written by train_seg.py")
    group = parser.add_argument_group("data (by default as in training)")
    group.add_argument("--dataset", choices=list(data.SEGMENTATION), help="data set; its classes must be the checkpoint's")
    group.add_argument("--data", metavar="DIR", help="its folder")
    group.add_argument("--split", default="val", choices=data.SPLITS, help="default: val")
    group.add_argument("--mean", type=float, nargs=3, metavar=("R", "G", "B"), help="of the normalisation, on 0..1")
    group.add_argument("--std", type=float, nargs=3, metavar=("R", "G", "B"), help="likewise")
    group = parser.add_argument_group("output")
    group.add_argument("--image", type=Path, help="show this picture, or the pictures in this folder, and do nothing else")
    group.add_argument("--out", type=Path, metavar="DIR", help="where --image writes (default: overlays beside the checkpoint)")
    group.add_argument("--predictions", type=Path, metavar="DIR",
                       help="also write each prediction as a PNG of label ids, as the data set's own tools read it")  # fmt: skip
    group = parser.add_argument_group("system")
    group.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    group.add_argument("--workers", type=int, default=default_workers(), help="loader processes (default: %(default)s)")
    group.add_argument("--eval-batch", type=int, help="images at a time; more than 1 needs equal sizes")
    arguments = parser.parse_args()
    if arguments.workers < 0:
        parser.error("--workers takes a number of at least 0")
    if arguments.std and min(arguments.std) <= 0:
        parser.error("--std takes numbers above 0")
    return arguments


def spread(values: Tensor) -> dict[str, float]:
    """[N] -> mean, min and max."""
    values = values.double()
    return {"mean": values.mean().item(), "min": values.min().item(), "max": values.max().item()}


def summarize(result: Evaluation, classes: list[str], centers: Tensor | None) -> dict:
    """What metrics.json holds: IoU in percent, cost in G multiply-adds, distances in the units of A."""
    percent = [None if math.isnan(value) else 100 * value for value in result.iou().tolist()]
    metrics = {
        "miou": None if result.confusion.sum() == 0 else 100 * result.miou(),  # a test split has no labels
        "iou": dict(zip(classes, percent)),
        "images": len(result.A),
        "gflops": {count: spread(flops / 1e9) for count, flops in result.flops.items()},
    }
    if centers is not None:
        labels, _ = kmeans.assign(result.A, centers)
        inter, intra = kmeans.inter_intra(result.A, labels, centers)
        sizes = torch.bincount(labels, minlength=len(centers))
        metrics |= {"k": len(centers), "inter": inter, "intra": intra, "images_per_expert": sizes.tolist()}
        metrics["gflops_per_expert"] = [
            result.flops["paper"][labels == k].double().mean().item() / 1e9 if sizes[k] else None for k in range(len(centers))
        ]
    return metrics


def print_metrics(metrics: dict) -> None:
    width = max(len(name) for name in metrics["iou"]) + 2
    print(f"\n{'class':{width}}{'IoU %':>8}")
    for name, value in metrics["iou"].items():
        print(f"{name:{width}}{'absent' if value is None else f'{value:.2f}':>8}")
    mean = "no labels" if metrics["miou"] is None else f"{metrics['miou']:.2f}"
    print(f"{'mean':{width}}{mean:>8}   over {metrics['images']} images")
    print(f"\n{'GFLOPs per image':18}{'mean':>10}{'min':>10}{'max':>10}")
    for count, values in metrics["gflops"].items():
        print(f"{count + ' count':18}" + "".join(f"{values[key]:10.3f}" for key in ("mean", "min", "max")))
    if "k" in metrics:
        print(f"\ninter {metrics['inter']:.3f} (between the {metrics['k']} centres), intra {metrics['intra']:.3f} (within clusters)")
        print(f"{'expert':8}{'images':>8}{'share':>8}{'GFLOPs':>10}")
        for k, (size, gflops) in enumerate(zip(metrics["images_per_expert"], metrics["gflops_per_expert"])):
            cost = "-" if gflops is None else f"{gflops:.3f}"
            print(f"{k:<8}{size:8d}{100 * size / metrics['images']:7.1f}%{cost:>10}")
        collapse = kmeans.describe_collapse(torch.tensor(metrics["images_per_expert"]), metrics["inter"], metrics["intra"])
        if collapse:
            print(collapse)


def recovery(model, result: Evaluation, centers: Tensor, dataset) -> dict:
    """How well the experts recover the subsets that are known, and what each subset's images run.

    Per subset: GFLOPs (paper count), and by stride the G multiply-adds of cells and paths that ran and the share of
    cells that ran.
    """
    labels, _ = kmeans.assign(result.A, centers)
    accuracy, rand, table, match = kmeans.agreement(labels, dataset.subset)
    backbone = model.backbone
    costs = backbone.costs(*dataset[0][0].shape[-2:])
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
    name = arguments.dataset or checkpoint["dataset"]
    root = arguments.data or (checkpoint["data"] if name == checkpoint["dataset"] else None)
    options = checkpoint["data_options"] if name == checkpoint["dataset"] else {}
    dataset = data.segmentation_dataset(name, root, arguments.split, train=False, **options)
    if list(dataset.info.classes) != checkpoint["classes"]:
        raise InputError(f"--dataset {name}: its {len(dataset.info.classes)} classes are not the {len(checkpoint['classes'])} "
                         f"of {arguments.checkpoint}, which was trained on {checkpoint['dataset']}")  # fmt: skip
    batch = dataset.info.eval_batch if arguments.eval_batch is None else arguments.eval_batch
    loader = data.pass_loader(dataset, batch, arguments.workers, process.rank, process.world)
    save = prediction_writer(arguments.predictions, dataset) if arguments.predictions else None
    result = evaluate_segmentation(
        model, loader, len(checkpoint["classes"]), process, checkpoint["mean"], checkpoint["std"], save)
    if not process.first:
        return
    centers = checkpoint["centers"]
    if model.dim and centers is None:
        print("the checkpoint has no centres yet (it stopped before the first K-means): clustering this split instead")
        centers = kmeans.kmeans(result.A, min(checkpoint["config"]["k"], len(result.A)))[0]
    described = {"checkpoint": str(arguments.checkpoint), "variant": checkpoint["model_args"]["variant"],
                 "dataset": name, "split": arguments.split, "iteration": checkpoint["iteration"]}  # fmt: skip
    metrics = described | summarize(result, checkpoint["classes"], centers)
    if centers is not None and dataset.subset is not None:
        metrics["subsets"] = recovery(model, result, centers, dataset)
    print(", ".join(f"{key} {value}" for key, value in described.items()))
    print_metrics(metrics)
    if "subsets" in metrics:
        print_recovery(metrics["subsets"])
    path = arguments.checkpoint.with_name("metrics.json")
    path.write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"\nwrote {path}")
    if centers is not None:
        draw_experts(path.with_name("experts.png"), model, checkpoint, process, dataset, result, centers)
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
def predict(model, checkpoint: dict, process: Process, image: Tensor, opacity: float = 0.5):
    """One image uint8 [3, H, W] -> (the model's output, the image with the predicted classes' colours over it)."""
    colors = [tuple(color) for color in checkpoint["palette"]]
    out = model(data.normalize(image[None].to(process.device), checkpoint["mean"], checkpoint["std"]))
    prediction = out.logits[0].argmax(0).cpu()
    masks = prediction == torch.arange(len(colors))[:, None, None]  # [classes, H, W]
    return out, draw_segmentation_masks(image, masks, alpha=opacity, colors=colors)


def draw_experts(path: Path, model, checkpoint: dict, process: Process, dataset, result: Evaluation, centers: Tensor) -> None:
    """Per expert, the images nearest to its centre, and under each what is predicted for it (figure 5 of the paper)."""
    from matplotlib.figure import Figure

    columns, rows = 6, 2 * len(centers)
    labels, distances = kmeans.assign(result.A, centers)
    height, width = dataset[0][0].shape[-2:]
    figure = Figure(figsize=(1.4 * columns * width / height + 1.4, 1.4 * rows), dpi=100)  # inches
    left = 1.4 / figure.get_figwidth()
    axes = figure.subplots(
        rows, columns, squeeze=False,
        gridspec_kw=dict(left=left, right=0.995, bottom=0.005, top=0.995, wspace=0.03, hspace=0.03))
    for ax in axes.flat:
        ax.axis("off")
    for k in range(len(centers)):
        members = (labels == k).nonzero().flatten()
        name = f"expert {k}\n{len(members)} images"
        if len(members):
            name += f"\n{result.flops['paper'][members].double().mean().item() / 1e9:.4f} GFLOPs"
        figure.text(left - 0.01, 1 - (2 * k + 1) / rows, name, ha="right", va="center", fontsize=9)
        for column, i in enumerate(members[distances[members].argsort()][:columns].tolist()):
            image = dataset[i][0]
            _, overlay = predict(model, checkpoint, process, image, opacity=0.8)
            axes[2 * k, column].imshow(image.permute(1, 2, 0).numpy())
            axes[2 * k + 1, column].imshow(overlay.permute(1, 2, 0).numpy())
    figure.savefig(path)


@torch.no_grad()
def show(arguments: argparse.Namespace, model, checkpoint: dict, process: Process) -> None:
    """Writes each picture with its prediction laid over it, and prints which expert took it."""
    source = arguments.image
    paths = [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.suffix.lower() in IMAGE_ENDINGS)
    if not paths:
        raise InputError(f"--image {source}: neither a picture nor a folder with pictures ({' '.join(IMAGE_ENDINGS)})")
    folder = arguments.out or arguments.checkpoint.with_name("overlays")
    for path in paths:
        image = torch.from_numpy(data.read_image(path)).permute(2, 0, 1)
        out, overlay = predict(model, checkpoint, process, image)
        target = folder / path.relative_to(source if source.is_dir() else path.parent)
        target = target.with_name(target.name + ".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(overlay.permute(1, 2, 0).numpy()).save(target)
        count = model.counts[0]
        gflops = sum(model.real_cost(out.routes, *image.shape[-2:], count).values()).item() / 1e9
        line = f"{path}: {gflops:.3f} GFLOPs ({count})"
        if checkpoint["centers"] is not None:
            label, distance = kmeans.assign(out.A.cpu(), checkpoint["centers"])
            line += f", expert {label.item()} of {len(checkpoint['centers'])}, {distance.item():.3f} from its centre"
        print(f"{line} -> {target}")


def main() -> None:
    arguments = parse_arguments()
    with one_line_errors(InputError, data.DataError, OSError):
        process = start_process(arguments.device)
        leave_cores_to_loaders(process.device, arguments.workers)
        model, checkpoint = load_checkpoint(arguments.checkpoint, process.device)
        missing = {"dataset", "data", "data_options", "classes", "palette", "mean", "std", "config", "centers"} - checkpoint.keys()
        if missing:
            raise InputError(f"{arguments.checkpoint}: holds no {sorted(missing)[0]}; give a file written by train_seg.py")
        checkpoint["mean"] = arguments.mean or checkpoint["mean"]
        checkpoint["std"] = arguments.std or checkpoint["std"]
        if not arguments.image:
            score(arguments, model, checkpoint, process)
        elif process.first:
            show(arguments, model, checkpoint, process)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
