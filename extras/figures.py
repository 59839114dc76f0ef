"""All figures (evaluate.py --figures DIR), and pictures with what is predicted for them (--image).

A figure is a function that returns a matplotlib figure, or None where it has nothing to show. Those of a run
take (run, runs, viewer), those of all runs together (runs, group_runs, paper). `Run`, `Setting` and
`group_runs` are evaluate.py's; `paper` are rows of the papers' tables.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # figures become files; a backend for windows may not be there

import matplotlib
import numpy as np
import torch
from matplotlib import cycler
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

import data
from model import VARIANTS, InputError, Process, write_file
from routing import OPEN, Grid

# Okabe and Ito's colours, which also the colour-blind tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (3, 1)))
STYLE = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "legend.fontsize": 7, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.6, "axes.titlelocation": "left", "lines.linewidth": 1.2, "lines.markersize": 5,
    "axes.prop_cycle": cycler(color=COLORS, ls=LINES, marker=MARKERS), "errorbar.capsize": 2,
    "pdf.fonttype": 42, "ps.fonttype": 42, "savefig.dpi": 200,
}
FAINT = "0.82"  # grey of what is closed or not spoken of
LEAST = 0.02  # a mean alpha, or a difference of two, that is drawn as a line
PAGE = 7.0  # inches, the width of a page's text
SCORES = ("mIoU", "box AP", "mask AP")


def draw_all(runs: list, folder: Path, viewer, group_runs, paper: list[dict]) -> None:
    """Draws all that the runs allow: some figures of each, NAME-RUN, and some of all together, NAME.

    viewer: makes the `Viewer` of a checkpoint's path.
    """
    with matplotlib.rc_context(STYLE):
        for i, run in enumerate(runs):
            if run.name in [other.name for other in runs[:i]]:
                run.name = f"{run.name}-{i + 1}"
            of_run = viewer(run.checkpoint["path"])
            for name, draw in FIGURES_OF_A_RUN.items():
                save(draw(run, runs, of_run), folder / f"{name}-{run.name}")
        for name, draw in FIGURES_OF_ALL.items():
            save(draw(runs, group_runs, paper), folder / name)


def save(figure: Figure | None, path: Path) -> None:
    """Writes a figure as PDF and PNG; a dollar in a name is a dollar, and no mathematics."""
    if figure is None:
        return print(f"no {path.name}: these runs have nothing to show there", file=sys.stderr)
    axes = [axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)]
    ticks = {label for axis in axes for label in axis.get_ticklabels(which="both")}  # powers of ten
    for text in figure.findobj(Text):
        if text not in ticks:
            text.set_parse_math(False)
    for form, options in (("pdf", dict(metadata={"CreationDate": None})), ("png", {})):
        target = path.with_name(f"{path.name}.{form}")
        write_file(target, lambda file: figure.savefig(file, format=form, **options))
    print(f"wrote {path}.pdf and .png", file=sys.stderr)


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """A figure of so many inches, and its axes [rows, columns]."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def mean_and_deviation(setting, column: str) -> tuple[float, float]:
    """Over the seeds of a setting; the deviation of a single one is 0."""
    values = setting.values(column)
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def title_of(run) -> str:
    return f"{run.name}, full gates" if run.gate == "full" else run.name


# ============ pictures of predictions ============


@dataclass
class Viewer:
    """What it takes to show what a checkpoint predicts."""

    model: torch.nn.Module
    checkpoint: dict
    dataset: data.Dataset | None
    process: Process
    min_score: float  # of what a detector found and is drawn

    @torch.no_grad()
    def predict(self, image: Tensor, opacity: float = 0.5) -> tuple:
        """One image uint8 [3, H, W] -> (the model's output, the image with what is predicted over it)."""
        if self.checkpoint["task"] == "segmentation":
            out = self.model(data.normalize(image[None].to(self.process.device)))
            return out, self.draw_classes(image, out.logits[0].argmax(0).cpu(), opacity)
        out = self.model([data.as_float(image.to(self.process.device))])
        found = {key: value.cpu() for key, value in out.detections[0].items()}
        kept = found["scores"] >= self.min_score
        masks = found["masks"][kept, 0] > 0.5 if "masks" in found else None
        return out, self.draw_objects(image, found["boxes"][kept], found["labels"][kept], masks, opacity)

    def draw_classes(self, image: Tensor, classes: Tensor, opacity: float = 0.5) -> Tensor:
        """Classes [H, W] in their colours on an image uint8 [3, H, W]; what has no label stays as it is."""
        colors = [tuple(color) for color in self.checkpoint["palette"]]
        masks = classes == torch.arange(len(colors))[:, None, None]  # [classes, H, W]
        return draw_segmentation_masks(image, masks, alpha=opacity, colors=colors)

    def draw_objects(self, image: Tensor, boxes, labels, masks=None, opacity: float = 0.5) -> Tensor:
        """Boxes [n, 4] with their classes' names, and masks [n, H, W], on an image uint8 [3, H, W]."""
        if not len(boxes):
            return image
        colors = [tuple(self.checkpoint["palette"][label - 1]) for label in labels.tolist()]
        names = [self.checkpoint["classes"][label - 1] for label in labels.tolist()]
        if masks is not None:
            image = draw_segmentation_masks(image, masks.bool(), alpha=opacity, colors=colors)
        image = draw_bounding_boxes(image, boxes, colors=colors, width=max(1, min(image.shape[-2:]) // 120))
        return write_on(image, names, boxes[:, :2].tolist())

    def describe(self, path: Path) -> tuple[Tensor, Tensor, str, Tensor]:
        """A picture -> (image uint8 [3, H, W], the same with the prediction and the expert's number on it,
        its cost and its expert in words, A(x) [D])."""
        checkpoint, model = self.checkpoint, self.model
        image = torch.from_numpy(data.read_image(path)).permute(2, 0, 1)
        out, overlay = self.predict(image)
        size = image.shape[-2:] if checkpoint["task"] == "segmentation" else out.sizes[0]
        gflops = sum(model.real_cost(out.routes, *size, model.counts[0]).values()).item() / 1e9
        words, clusters = f"{gflops:.3g} GFLOPs ({model.counts[0]})", checkpoint["clusters"]
        if clusters is not None:
            A = out.routes.activations(checkpoint["config"].get("gate_space", "alpha")).cpu()
            label, distance = clusters.nearest(A)
            expert = f"expert {label.item()}"
            words += f", {expert} of {len(clusters.centers)}, {distance.item():.3f} from its centre"
            overlay = write_on(overlay, [expert], [(2, 2)])
        return image, overlay, words, out.A[0].cpu()


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


def list_pictures(source: Path, written_to: list[Path]) -> list[Path]:
    """The picture `source`, or those in that folder: no hidden files, and nothing from where we write."""
    if source.is_file():
        return [source]
    inside = [folder.resolve() for folder in written_to if folder.resolve().is_relative_to(source.resolve())]
    if source.resolve() in inside:
        raise InputError(f"--image {source}: what is written would be read next time; name another --out")
    paths = []
    for path in map(Path, data.files_under(source)):
        ours = any(path.resolve().is_relative_to(folder) for folder in inside)
        if path.suffix.lower() in data.PICTURES and not ours:
            paths.append(path)
    if not paths:
        wanted = f"no picture, nor a folder with pictures in it ({' '.join(data.PICTURES)})"
        raise InputError(f"--image {source}: {wanted}")
    return paths


def show(viewer: Viewer, source: Path, folder: Path, routes: Path | None) -> None:
    """Writes each picture of `source` to a folder with its prediction and expert, and to `routes` its route.

    Raises InputError, at the end, where one could not be shown.
    """
    failed, paths = [], list_pictures(source, [path for path in (folder, routes) if path])
    for path in paths:
        try:
            image, overlay, words, A = viewer.describe(path)
        except (data.DataError, InputError, torch.OutOfMemoryError, MemoryError) as error:
            memory = "needs more memory than there is; scale it down, or cut it"
            words = str(error) if isinstance(error, ValueError) else memory
            failed.append(words if str(path) in words else f"{path}: {words}")
            if len(paths) > 1:
                print(failed[-1], file=sys.stderr)
            continue
        inside = path.relative_to(source if source.is_dir() else path.parent)
        target = folder / inside.with_name(inside.name + ".png")
        print(f"{path}: {words} -> {target}", flush=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_file(target, lambda file: Image.fromarray(to_rgb(overlay)).save(file, "png"))
        if routes and viewer.model.dim:
            with matplotlib.rc_context(STYLE):
                figure, ((left, right),) = new_figure(PAGE, 1.8, 1, 2, width_ratios=[1, 2])
                left.imshow(to_rgb(image))
                left.axis("off")
                backbone = viewer.model.backbone
                grid = grid_of(len(backbone.nodes_per_layer), len(backbone.channels))
                routes_panel(right, grid, A, COLORS[0], f"{path.name}: {words}")
                right.set_ylabel("stride")  # which `label_outer` takes for that of the picture
                right.tick_params(labelleft=True)
                save(figure, routes / f"route-{'-'.join(inside.parts)}")
    if failed:
        count = f"{len(failed)} of {len(paths)} pictures"
        raise InputError(f"--image {source}: {count} are not shown: {failed[0]}")


def draw_experts(run, runs, viewer: Viewer):
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
        row[0].set_ylabel(f"expert {k}\n{count_images(size)}{cost}", rotation=0, ha="right", va="center")
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
            cost = f"{run.result.flops['paper'][i].item() / 1e9:.3g} GFLOPs"
            ax.set_xlabel(f"{cost}\ndistance {distances[i].item():.2f}", fontsize=7)
    return figure


def draw_predictions(run, runs, viewer: Viewer, count: int = 4):
    """Image, truth and prediction of images spaced over the split."""
    dataset, count = viewer.dataset, min(count, len(viewer.dataset))
    height, width = dataset[0][0].shape[-2:]
    cell = min(PAGE / 3, 1.75 * width / height)
    figure, axes = new_figure(3 * cell, (cell * height / width + 0.04) * count + 0.8, count, 3)
    for n, row in enumerate(axes):
        image, truth, _ = dataset[n * len(dataset) // count]
        if run.task == "segmentation":
            drawn = viewer.draw_classes(image, truth, opacity=0.8)
        else:
            drawn = viewer.draw_objects(image, truth["boxes"], truth["labels"], truth.get("masks"))
        found = viewer.predict(image, opacity=0.8)[1]
        for ax, picture, title in zip(row, (image, drawn, found), ("image", "truth", "prediction")):
            ax.imshow(to_rgb(picture))
            ax.axis("off")
            ax.set_title(title if n == 0 else "", loc="center")
    patches = []
    for name, color in list(zip(run.checkpoint["classes"], run.checkpoint["palette"]))[:20]:
        patches.append(Patch(fc=[c / 255 for c in color], ec="0.4", lw=0.4, label=name))
    small = dict(handlelength=1.0, handleheight=1.0, handletextpad=0.4, columnspacing=1.0)
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 7), **small)
    return figure


# ============ routes ============


def grid_of(layers: int, scales: int) -> list[tuple[int, int, tuple[int, ...]]]:
    """Per node in the order of A(x): layer, scale, and the paths that it has."""
    with torch.device("meta"):
        network = Grid(layers, 2, None, scales)
    return [(i, s, node.paths) for i, layer in enumerate(network.layers) for s, node in enumerate(layer)]


def grid_of_run(run) -> list[tuple[int, int, list[int]]]:
    """Of a run whose network lies in the routing space."""
    layers = run.checkpoint["model_args"]["layers"]
    return grid_of(layers or 16, 4) if run.task == "segmentation" else grid_of(layers or 17, 5)


def routes_panel(ax, grid: list, values: Tensor, color: str, title: str, least: float = OPEN) -> None:
    """Nodes and paths of the routing grid, layers from left to right, strides from top to bottom.

    Paths are as wide as `values` [D], on -1..1, are far from 0, and nodes as large as their largest path.
    What is below 0 is drawn in the second colour, and its paths dashed; what is within `least` of 0 stays
    faint.
    """
    lines, nodes = {"closed": [], "more": [], "less": []}, []
    for (layer, scale, paths), alphas in zip(grid, values.view(-1, 3).tolist()):
        for path in paths:
            segment, alpha = ((layer, scale), (layer + 1, scale + path - 1)), alphas[path]
            lines["closed"].append((segment, 0.5))
            if abs(alpha) > least:
                lines["more" if alpha > 0 else "less"].append((segment, line_width(abs(alpha))))
        largest, shade = max(alphas, key=abs), "white"
        if abs(largest) > least:
            shade = color if largest > 0 else COLORS[1]
        nodes.append((layer, scale, (2 + 4.4 * abs(largest)) ** 2, shade))
    looks = {"closed": (FAINT, "-"), "more": (color, "-"), "less": (COLORS[1], (0, (1.2, 0.8)))}
    for order, (name, (shade, dashes)) in enumerate(looks.items()):
        segments, widths = [segment for segment, _ in lines[name]], [width for _, width in lines[name]]
        style = dict(colors=shade, linewidths=widths, linestyles=[dashes], capstyle="butt", zorder=order)
        ax.add_collection(LineCollection(segments, label=name, **style))
    x, y, sizes, shades = zip(*nodes)
    edges = [FAINT if shade == "white" else "black" for shade in shades]
    ax.scatter(x, y, s=sizes, c=shades, edgecolors=edges, linewidths=0.5, label="nodes", zorder=3)
    ax.add_collection(LineCollection([((-1, 0), (0, 0)), ((-1, 0), (0, 1))], colors="0.45", linewidths=0.5,
                                     linestyles=":", zorder=1))  # from the stem: its gates are not in A
    ax.scatter(-1, 0, s=16, marker="s", c="white", edgecolors="0.45", linewidths=0.6, zorder=3)
    layers, scales = grid[-1][0] + 1, 1 + max(scale for _, scale, _ in grid)
    shown = range(0, layers, 1 + layers // 9 + layers // 18)
    ax.set(xlim=(-1.5, layers + 0.3), ylim=(scales - 0.55, -0.6))
    ax.set(title=title, xlabel="layer", ylabel="stride")
    ax.set_xticks([-1, *shown], ["stem", *(str(1 + layer) for layer in shown)])
    ax.set_yticks(range(scales), [str(4 * 2**scale) for scale in range(scales)])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.label_outer()


def line_width(alpha: float) -> float:
    """Points: what is just open is still a line."""
    return 0.5 + 3.5 * alpha


def count_images(count: int) -> str:
    return f"{count or 'no'} image{'s' * (count != 1)}"


def alpha_of(A: Tensor, run) -> Tensor:
    """What was clustered -> alpha: the same unless gates were clustered before their non-linearity."""
    in_logits = run.checkpoint["config"].get("gate_space") == "logit"
    return F.relu(torch.tanh(A)) if in_logits else A


def draw_routes(run, runs, viewer: Viewer | None):
    """Left each expert's centre, the average over all images and, if Dynamic Routing is among the runs, its
    average; right what tells each from the others. Of a fixed route that route."""
    if "route" in run.checkpoint["model_args"]:
        route, cost = viewer.model.backbone.fixed_route.cpu(), run.metrics["gflops"]["paper"]["mean"]
        words = f"{title_of(run)}: {int(route.sum())} paths, {cost:.3g} GFLOPs"
        figure, ((ax,),) = new_figure(PAGE / 2, 1.8)
        routes_panel(ax, grid_of_run(run), 0.4 * route[1:].flatten().float(), COLORS[0], words)
        return figure
    if run.clusters is None:
        return None
    centers, panels = alpha_of(run.clusters.centers, run), []  # panels: title, values, colour
    for k, center in enumerate(centers):
        size, cost = run.metrics["images_per_expert"][k], run.metrics["gflops_per_expert"][k]
        words = f"{count_images(size)}, {cost:.3g} GFLOPs" if size else "no image here"
        others = torch.cat([centers[:k], centers[k + 1 :]]).mean(0)
        panels.append((f"expert {k}: centre; {words}", center, COLORS[k % len(COLORS)]))
        panels.append((f"expert {k} minus the mean of the others", center - others, COLORS[0]))
    mean = alpha_of(run.result.A, run).mean(0)
    cost = f"average, {run.metrics['gflops']['paper']['mean']:.3g} GFLOPs"
    panels.append((f"all {len(run.result.A)} images: {cost}", mean, "0.25"))
    panels.append(("largest difference between two experts", centers.amax(0) - centers.amin(0), "0.25"))
    grid, reference = grid_of_run(run), None  # Dynamic Routing, to stand beside a run of DivDR
    if VARIANTS[run.variant].lambda2:
        others = [other for other in runs if other.clusters and not VARIANTS[other.variant].lambda2]
        reference = next((other for other in others if grid_of_run(other) == grid), None)
    if reference is not None:
        theirs = alpha_of(reference.result.A, reference).mean(0)
        gates = ", full gates" if reference.gate == "full" else ""
        cost = f"average, {reference.metrics['gflops']['paper']['mean']:.3g} GFLOPs"
        panels.append((f"Dynamic Routing{gates}, all images: {cost}", theirs, "0.25"))
        panels.append(("average of DivDR minus Dynamic Routing's", mean - theirs, COLORS[0]))
    scales, rows = 1 + max(scale for _, scale, _ in grid), len(panels) // 2
    figure, axes = new_figure(PAGE, (0.35 + 0.24 * scales) * rows + 0.55, rows, 2, sharex=True, sharey=True)
    for ax, (title, values, color) in zip(axes.flat, panels):
        routes_panel(ax, grid, values, color, title, LEAST)
    lines = [Line2D([], [], color="0.25", lw=line_width(a), label=f"α = {a:g}") for a in (1, 0.5, 0.1)]
    lines.append(Line2D([], [], color=FAINT, lw=0.5, label=f"below {LEAST:g}"))
    lines.append(Line2D([], [], color="0.45", lw=0.5, ls=":", label="from the stem: not in A"))
    lines.append(Line2D([], [], color=COLORS[0], lw=2, label="more open"))
    lines.append(Line2D([], [], color=COLORS[1], lw=2, ls=(0, (1.2, 0.8)), label="less open"))
    close = dict(handlelength=2.4, columnspacing=1.4)
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), **close)
    figure.suptitle(title_of(run), fontsize=8, x=0.01, ha="left")
    return figure


# ============ activations ============


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


def draw_activations(runs, group_runs, paper):
    """A(x) of the evaluation set in the plane, runs of the first one's grid together (figure 4 of the paper).

    A panel for each run shows its points by expert, and its centres; one more shows several runs by setting.
    """
    routed = [run for run in runs if run.clusters is not None]
    runs = [run for run in routed if grid_of_run(run) == grid_of_run(routed[0])]
    if not runs:
        return None
    points = [torch.cat([run.result.A, run.clusters.centers]).float() for run in runs]
    placed, how = embed(torch.cat(points))
    panels, everyone = [], {}  # title, groups of points by label, centres; the images by setting
    for run, mine in zip(runs, placed.split([len(share) for share in points])):
        images, centers = mine[: len(run.result.A)], mine[len(run.result.A) :]
        groups = {}
        for k, size in enumerate(run.metrics["images_per_expert"]):
            groups[f"expert {k} ({size})"] = images[run.labels == k]
        panels.append((title_of(run), groups, centers.tolist()))
        label = next(setting.label for setting in group_runs(runs) if any(run is r for r in setting.runs))
        everyone[label] = torch.cat([everyone.get(label, images[:0]), images])
    if len(runs) > 1:
        panels.append(("all together", everyone, []))

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
    figure.supxlabel(f"numbers in rings: centres\n{how}", fontsize=7)
    return figure


# ============ training ============

# Panels of the training figure: title -> curves as (label, where in an event of the log), and a factor.
PANELS = {
    "inside the margin, %": [("hinge active", "hinge_active")],
    "GFLOPs per image": [("real", "gflops_real"), ("expected", "gflops_expected")],
    "distances in A": [("inter", "inter"), ("intra, pairs", "intra"), ("to centre", "intra_to_centre")],
    "σ²": [("spread about the centres", "sigma2")],
    "evaluation, %": [("mIoU", "miou"), ("box AP", "box", "AP"), ("mask AP", "mask", "AP")],
}


def read_log(path: Path) -> list[dict]:
    """The events of a run's log.jsonl, but for a line still being written; [] where it is missing."""
    events = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    return events


def draw_training(run, runs, viewer: Viewer):
    """Loss terms, GFLOPs, inter and intra, sigma², cluster sizes and scores over iterations."""
    events = read_log(run.checkpoint["path"].with_name("log.jsonl"))
    updates = [event for event in events if event["event"] == "kmeans"]
    terms = dict.fromkeys(key for event in events for key in event if key.startswith("loss_"))
    wanted = {"terms of the loss": [(term[5:].replace("_", " "), term) for term in terms], **PANELS}
    experts = range(len(updates[0]["sizes"])) if updates else ()
    wanted["images per cluster"] = [(f"expert {k}", "sizes", k) for k in experts]
    panels: dict[str, dict] = {}  # title: label -> points
    for title, curves in wanted.items():
        for label, *keys in curves:
            points = []
            for event in events:
                value = event
                with contextlib.suppress(KeyError, TypeError):  # not an event that has it
                    for key in keys:
                        value = value[key]
                    points.append((event["iteration"], 100 * value if title.endswith("%") else value))
            if points:
                panels.setdefault(title, {})[label] = points
    if not panels:
        return None
    rows = -(-len(panels) // 2)
    figure, axes = new_figure(PAGE, 1.9 * rows, rows, 2, sharex=True)
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    ticks = [event["iteration"] for event in updates]
    for ax, (title, curves) in zip(axes.flat, panels.items()):
        for label, points in curves.items():
            marker = None if title == "evaluation, %" or len(points) == 1 else "none"
            ax.errorbar(*zip(*points), label=label, marker=marker)
        along_x = ax.get_xaxis_transform()
        ax.plot(ticks, [0.012] * len(ticks), "|", color="0.45", ms=4, mew=0.6, transform=along_x)
        ax.set(ylabel=title, xlabel="iteration")
        ax.xaxis.set_tick_params(labelbottom=True)
        ax.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=3, columnspacing=0.8)
    axes.flat[0].set_yscale("symlog", linthresh=1e-3, linscale=0.3)
    note = "; ticks at the bottom: K-means updates" if updates else ""
    figure.suptitle(title_of(run) + note, fontsize=8, x=0.01, ha="left")
    return figure


# ============ comparisons ============


def draw_trade_off(runs, group_runs, paper):
    """Score against GFLOPs, a point for each setting with its deviation over seeds (figure 8 of the paper).

    The papers' points, if any, are open markers: blue DivDR, orange Dynamic Routing, grey static networks.
    """
    panels = {}  # score: label, (GFLOPs, deviation), (score, deviation), colour, fill of each point
    for setting, color in zip(group_runs(runs), itertools.cycle(COLORS[2:])):
        for score in SCORES:
            if setting.values(score):
                x, y = mean_and_deviation(setting, "GFLOPs"), mean_and_deviation(setting, score)
                label = setting.label + f" ({len(setting.runs)} runs)" * (len(setting.runs) > 1)
                panels.setdefault(score, []).append((label, x, y, color, color))
    for row in paper:
        color = COLORS[0] if row["method"].startswith("DivDR") else COLORS[1] if row["gate"] else "0.4"
        x = float(row["gflops"]), float(row["gflops_std"] or 0)
        y = float(row["score"]), float(row["score_std"] or 0)
        label = row["method"] + ", full gates" * (row["gate"] == "full") + f" ({row['source']})"
        panels.setdefault(row["measure"], []).append((label, x, y, color, "white"))
    if not panels:
        return None
    heights = [max(3.2, 0.18 * len(points)) for points in panels.values()]  # the legend has a line each
    figure, axes = new_figure(PAGE, sum(heights), len(panels), height_ratios=heights)
    for ax, (score, points) in zip(axes.flat, panels.items()):
        for j, (label, (x, dx), (y, dy), color, fill) in enumerate(points):
            marker = MARKERS[(j + j // len(MARKERS)) % len(MARKERS)]
            ax.errorbar(x, y, dy or None, dx or None, color=color, ls="none", elinewidth=0.8, capsize=2)
            ax.plot(x, y, color=color, marker=marker, ms=6, ls="none", label=label, mfc=fill, zorder=3)
        low, high = ax.dataLim.intervalx
        if 0 < 8 * low < high:
            ax.set_xscale("log")
        where = f"{runs[0].metrics['dataset']} {runs[0].metrics['split']}"
        ax.set(xlabel=f"GFLOPs per image, count: {runs[0].count}", ylabel=f"{score}, %, {where}")
        ax.margins(0.1)
        ax.grid(color="0.9", lw=0.5)
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    if paper:
        figure.supxlabel("What has a source is of Cityscapes val or COCO val2017", fontsize=7)
    return figure


SWEPT = {"k": "K", "margin": "margin", "lambda2": "λ2", "kmeans_every": "K-means every"}


def draw_ablations(runs, group_runs, paper):
    """Scores, GFLOPs, inter and intra against each setting of `SWEPT` in which runs differ and, seeds apart,
    in nothing else (figures 6 and 7, table 3 of the paper)."""
    sweeps = {}  # setting: label -> the settings along it
    for name in SWEPT:
        for rest in group_runs([run for run in runs if run.clusters is not None], apart_from=name):
            along = {}
            for setting in group_runs(rest.runs):
                along[setting.runs[0].checkpoint["config"].get(name) or 0] = setting
            if len(along) > 1:
                sweeps.setdefault(name, {})[rest.label] = dict(sorted(along.items()))
    if not sweeps:
        return None
    found = set().union(*(run.numbers for run in runs))
    columns = [name for name in (*SCORES, "GFLOPs", "Inter", "Intra", "Recovered") if name in found]
    width, legend = max(2.4 * len(sweeps), 3.2), 0.3 + 0.2 * max(map(len, sweeps.values()))
    size = (width, 1.35 * len(columns) + legend)
    figure, axes = new_figure(*size, len(columns), len(sweeps), sharex="col", sharey="row")
    for below, (name, lines) in zip(axes.T, sweeps.items()):
        values = sorted({value for along in lines.values() for value in along})
        for ax, column in zip(below, columns):
            for label, along in lines.items():
                x = [values.index(value) for value, setting in along.items() if setting.values(column)]
                y = [mean_and_deviation(along[values[place]], column) for place in x]
                ax.errorbar(x, *zip(*y), label=label)
            ax.set_ylabel(f"{column}, %" if column in (*SCORES, "Recovered") else column)
            ax.grid(color="0.9", lw=0.5)
            ax.margins(x=0.12, y=0.15)
            ax.label_outer()
        ax.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        ax.set_xlabel(SWEPT[name])
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.42))
    figure.align_ylabels()
    return figure


FIGURES_OF_A_RUN = {
    "predictions": draw_predictions, "experts": draw_experts, "routes": draw_routes,
    "training": draw_training}
FIGURES_OF_ALL = {"activations": draw_activations, "trade-off": draw_trade_off, "ablations": draw_ablations}
