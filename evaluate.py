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
import os
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torchvision.utils import draw_segmentation_masks

import data
import kmeans
from model import InputError, OneLineParser, Process, load_checkpoint, one_line_errors, start_process
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
    group.add_argument("--out", type=Path, metavar="DIR", help="where --image writes (default: overlays, beside the checkpoint)")
    group.add_argument("--predictions", type=Path, metavar="DIR",
                       help="also write each prediction as a PNG of label ids, as the data set's own tools read it")  # fmt: skip
    group = parser.add_argument_group("system")
    group.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    group.add_argument("--workers", type=int, default=min(4, os.cpu_count()), help="loader processes (default: %(default)s)")
    group.add_argument("--eval-batch", type=int, help="images at a time; more than 1 needs equal sizes")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------ scores


def spread(values: Tensor) -> dict[str, float]:
    """[N] -> mean, min and max."""
    values = values.double()
    return {"mean": values.mean().item(), "min": values.min().item(), "max": values.max().item()}


def summarize(result: Evaluation, classes: list[str], centers: Tensor | None) -> dict:
    """What metrics.json holds: IoU in percent, cost in G multiply-adds, distances in the units of A."""
    percent = [None if math.isnan(value) else 100 * value for value in result.iou().tolist()]
    metrics = {
        "miou": 100 * result.miou(),
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
    print(f"{'mean':{width}}{metrics['miou']:8.2f}   over {metrics['images']} images")
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


def score(arguments: argparse.Namespace, model, checkpoint: dict, process: Process) -> None:
    """Evaluates on a split, prints the table, and writes it as metrics.json and the experts as experts.png beside the
    checkpoint."""
    name = arguments.dataset or checkpoint["dataset"]
    root = arguments.data or (checkpoint["data"] if name == checkpoint["dataset"] else None)
    dataset = data.segmentation_dataset(name, root, arguments.split, train=False)
    if list(dataset.info.classes) != checkpoint["classes"]:
        raise InputError(f"--dataset {name}: its {len(dataset.info.classes)} classes are not the {len(checkpoint['classes'])} "
                         f"of {arguments.checkpoint}, which was trained on {checkpoint['dataset']}")  # fmt: skip
    batch = arguments.eval_batch or dataset.info.eval_batch
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
    print(", ".join(f"{key} {value}" for key, value in described.items()))
    print_metrics(metrics)
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


# ------------------------------------------------------------------------------------------------ pictures


@torch.no_grad()
def predict(model, checkpoint: dict, process: Process, image: Tensor):
    """One image uint8 [3, H, W] -> (the model's output, the image with the predicted classes laid over it)."""
    colors = [tuple(color) for color in checkpoint["palette"]]
    out = model(data.normalize(image[None].to(process.device), checkpoint["mean"], checkpoint["std"]))
    prediction = out.logits[0].argmax(0).cpu()
    masks = prediction == torch.arange(len(colors))[:, None, None]  # [classes, H, W]
    return out, draw_segmentation_masks(image, masks, alpha=0.5, colors=colors)


def draw_experts(path: Path, model, checkpoint: dict, process: Process, dataset, result: Evaluation, centers: Tensor) -> None:
    """Per expert, the images nearest to its centre, and under each what is predicted for it (figure 5 of the paper)."""
    from matplotlib.figure import Figure

    columns = 6
    labels, distances = kmeans.assign(result.A, centers)
    height, width = dataset[0][0].shape[-2:]
    panel = (1.3 * width / height, 1.3)  # inches
    figure = Figure(figsize=(columns * panel[0] + 1.2, 2 * len(centers) * panel[1]), dpi=110, layout="constrained")
    axes = figure.subplots(2 * len(centers), columns, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for k in range(len(centers)):
        members = (labels == k).nonzero().flatten()
        name = f"expert {k}\n{len(members)} images"
        if len(members):
            name += f"\n{result.flops['paper'][members].double().mean().item() / 1e9:.3f} GFLOPs"
        axes[2 * k, 0].text(-0.08, 0.0, name, transform=axes[2 * k, 0].transAxes, ha="right", va="center", fontsize=9)
        for column, i in enumerate(members[distances[members].argsort()][:columns].tolist()):
            image = dataset[i][0]
            _, overlay = predict(model, checkpoint, process, image)
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
        target = (folder / path.relative_to(source if source.is_dir() else path.parent)).with_suffix(".png")
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
    with one_line_errors(InputError, data.DataError):
        process = start_process(arguments.device)
        model, checkpoint = load_checkpoint(arguments.checkpoint, process.device)
        checkpoint["mean"] = arguments.mean or checkpoint["mean"]
        checkpoint["std"] = arguments.std or checkpoint["std"]
        (show if arguments.image else score)(arguments, model, checkpoint, process)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
