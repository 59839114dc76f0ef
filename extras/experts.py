"""Experts cut out as static networks, dispatched, exported: evaluate.py --experts DIR.

An expert is what more than a share of the images of its cluster open; its gates go on weighing what is left,
image by image. All experts share the stem. It runs once for an image, and the mean of its map says which
expert takes the image: that is the dispatcher. `split` and `source` are evaluate.py's `Split`: the images to
score on, and those that say what is open.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib.util
import io
import json
import re
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
from kmeans import Clusters
from model import Detector, InputError, Segmenter, write_file
from routing import OPEN, fuse

COMMON = "one-for-all"


def check(arguments: argparse.Namespace, world: int) -> None:
    """Raises InputError for what --experts cannot be asked for."""
    if world > 1:
        raise InputError("--experts: runs in one process; start it without torchrun")
    for package in ("onnx", "onnxscript") if arguments.onnx else ():
        if importlib.util.find_spec(package) is None:
            raise InputError(f"--onnx: needs the package {package}: pip install onnx onnxscript")


def cut(arguments: argparse.Namespace, model, split, source, folder: Path) -> dict[str, dict[str, float]]:
    """Cuts the experts of a checkpoint out, scores them beside the routed network, and exports them.

    Returns the rows of the table, by network: scores, mean GFLOPs by count, parameters.
    """
    checkpoint, stride = split.checkpoint, getattr(getattr(model, "backbone", None), "stride", 0)
    size = tuple(arguments.export_size or ()) or None
    if not model.dim:
        words = "is a static network, which has no experts to cut out"
        raise InputError(f"--experts: {checkpoint['path']} {words}")
    if size and (size[0] % stride or size[1] % stride):
        raise InputError(f"--export-size {size[0]} {size[1]}: both must be multiples of {stride}")
    opened, A, pooled = route_images(model, source)
    clusters = checkpoint["clusters"]
    if clusters is None:
        print(f"{checkpoint['path']}: has no centres: clustering {source.name} instead", file=sys.stderr)
        clusters = Clusters.of(A, checkpoint["config"]["k"])
    k, labels = len(clusters.centers), clusters.nearest(A)[0]
    routes = cut_routes(opened, labels, k, arguments.keep)
    fixed = {name: model.cut(route) for name, route in routes.items()}
    decide = fit_dispatcher(pooled, labels, k)

    routed = split.evaluate(model)
    own = clusters.nearest(routed.A)[0]
    rows = compare(split, model, fixed, decide, routed, own)
    experts, at = [], routed.sizes[0].tolist()
    for j in range(k):
        network = fixed[f"expert-{j}"]
        costs = {count: network.real_cost(None, *at, count) for count in network.counts}
        experts.append({
            "images": int((own == j).sum()), "images it was cut from": int((labels == j).sum()),
            "open paths": int(routes[f"expert-{j}"].sum()), "parameters": count_parameters(network),
            "gflops": {count: sum(parts.values()).item() / 1e9 for count, parts in costs.items()},
            "gflops_at": at,  # the stem among them
        })
    about = {
        "task": checkpoint["task"], "run": checkpoint["path"].resolve().parent.name,
        "variant": checkpoint["model_args"]["variant"], "split": split.name, "keep": arguments.keep,
        "cut_from": source.name, "layers": len(model.backbone.nodes_per_layer),
        "normalization": {"mean": data.MEAN, "std": data.STD}, "classes": checkpoint["classes"],
        "palette": checkpoint["palette"], "experts": experts, "table": rows,
        "routes": {name: route.int().tolist() for name, route in routes.items()},
        "centers": clusters.centers.tolist(),
    }
    networks = {"stem": Stem(model.backbone.stem, decide)}
    networks |= {name: AfterStem(network) for name, network in fixed.items()}
    export(arguments, about, networks, model.backbone, routed.sizes, size, folder)
    return rows


@torch.no_grad()
def route_images(model, source) -> tuple[Tensor, Tensor, Tensor]:
    """A pass without the head. Returns, per image: the open paths, bool [N, 1 + nodes, 3]; what is clustered,
    [N, D]; the mean of the stem's map, [N, C]."""
    network, opened, A, pooled = fuse(copy.deepcopy(model).eval()), [], [], []

    def pool(module, inputs, out):
        pooled.append(out.mean((2, 3)).cpu())

    network.backbone.stem.register_forward_hook(pool)
    for images, _, _ in tqdm(source.loader(), "looking at routes", leave=False):
        routes = network.routes(source.prepare(images))
        opened.append((routes.alpha > OPEN).cpu())
        A.append(routes.activations(source.gate_space).cpu())
    return torch.cat(opened), torch.cat(A), torch.cat(pooled)


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


def fit_dispatcher(pooled: Tensor, labels: Tensor, k: int) -> nn.Linear:
    """Linear discriminant analysis, in closed form: the means of the stem's maps, pooled [N, C], and labels
    [N] in [0, k) -> scores [., k] of such means.

    A score is log(share of the class · its Gaussian density), without the terms that all classes have in
    common; the Gaussians share their covariance. A class without samples always scores lowest.
    """
    x, sizes = pooled.double(), labels.bincount(minlength=k)
    middle = x.mean(0)
    x = x - middle  # else scores would be small differences of large numbers
    means = x.new_zeros(k, x.shape[1]).index_add_(0, labels, x) / sizes.clamp(min=1)[:, None]
    away = x - means[labels]
    covariance = away.T @ away / len(x)
    ridge = 1e-4 * covariance.diagonal().mean() + 1e-12  # channels can be constant, or fewer than images
    covariance += ridge * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(covariance, means.T).T  # [k, C], 0 of a class without samples
    bias = (sizes / len(x)).log() - (weight * means).sum(1) / 2 - weight @ middle
    decide = nn.Linear(x.shape[1], k)
    with torch.no_grad():
        decide.weight.copy_(weight)
        decide.bias.copy_(bias.clamp(min=-1e30))  # log(0): no image goes there
    return decide


# ============ what they are worth ============


def compare(split, model, fixed: dict, decide: nn.Linear, routed, own: Tensor) -> dict[str, dict]:
    """The rows of the table, by network, with the cost of all that runs for an image. routed: what the routed
    `model` gave; own: [N] the expert of each image by its A(x)."""
    experts = [network for name, network in fixed.items() if name != COMMON]
    shared = (len(experts) - 1) * count_parameters(model.backbone.stem)
    together = sum(map(count_parameters, experts)) - shared + count_parameters(decide)
    sent = decide(route_images(model, split)[2]).argmax(1)
    dispatched = evaluate_sent(split, experts, sent)
    for count in dispatched[1]:
        dispatched[1][count] += dispatch_cost(decide, model.backbone.stride, routed.sizes, count)
    of_common = evaluate_sent(split, [fixed[COMMON]], torch.zeros_like(own))
    rows = {}
    for name, (scores, by_count), parameters in [
        ("routed network", (split.scores([routed]), routed.flops), count_parameters(model)),
        (COMMON, of_common, count_parameters(fixed[COMMON])),
        (f"{len(experts)} experts, dispatched", dispatched, together),
    ]:
        gflops = {f"GFLOPs {count}": flops.double().mean().item() / 1e9 for count, flops in by_count.items()}
        rows[name] = scores | gflops | {"parameters M": parameters / 1e6}
    rows[name]["as A(x) %"] = 100 * (sent == own).double().mean().item()  # of the last
    return rows


def evaluate_sent(split, networks: list, sent: Tensor) -> tuple[dict, dict[str, Tensor]]:
    """Each image by the network that `sent` [N] names: scores in %, and, per count, multiply-adds [N]."""
    results, flops = [], {}
    for j, network in enumerate(networks):
        index = (sent == j).nonzero().flatten()
        if len(index) == 0:
            continue
        results.append(split.evaluate(network, index.tolist()))
        for count, values in results[-1].flops.items():
            flops.setdefault(count, torch.zeros(len(sent), dtype=torch.int64))[index] = values.cpu()
    return split.scores(results), flops


def count_parameters(network) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def dispatch_cost(decide: nn.Linear, stride: int, sizes: Tensor, count: str) -> Tensor:
    """[N] multiply-adds of saying which expert takes images of these sizes [N, 2], next to nothing: the mean
    of the stem's map and the linear layer."""
    if count == "paper at 800x800":  # of detectors
        sizes = torch.full_like(sizes, 800)
    if count == "exact":
        sizes = sizes + -sizes % stride
    return decide.in_features * (sizes // 4).prod(1) + decide.weight.numel()


def table_of(settings: list, rows_of: dict, format_numbers) -> list[list]:
    """Header and rows: for each setting its three networks, mean ± deviation over seeds.

    settings: of evaluate.group_runs; rows_of: by the path of a checkpoint, what `cut` gave.
    """
    cuts = []  # the first two cells, and the numbers of each seed
    for setting in settings:
        mine = [rows_of[run.checkpoint["path"]] for run in setting.runs]
        for name in mine[0]:
            cuts.append((setting.label, name, [rows[name] for rows in mine if name in rows]))
    columns = list(dict.fromkeys(column for _, _, seeds in cuts for row in seeds for column in row))
    table = [["Method", "Network", *columns, "Seeds"]]
    for label, name, seeds in cuts:
        row = [label, name]
        for column in columns:
            row.append(format_numbers(column, [numbers[column] for numbers in seeds if column in numbers]))
        table.append([*row, len(seeds)])
    return table


# ============ exported ============


class Stem(nn.Module):
    """What runs first. Takes normalised images [B, 3, H, W], sides multiples of the stride. Gives the stem's
    map [B, C, H/4, W/4], and the expert that takes each image, int64 [B]."""

    def __init__(self, stem: nn.Module, decide: nn.Linear):
        super().__init__()
        self.stem, self.decide = stem, decide

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        first = self.stem(images)
        return first, self.decide(first.mean((2, 3))).argmax(1)


class AfterStem(nn.Module):
    """What is left of a static network: takes the stem's map [B, C, H/4, W/4]. Gives logits
    [B, classes, H, W], or of a detector the maps P2 to P6."""

    def __init__(self, network: Segmenter | Detector):
        super().__init__()
        self.network = network if isinstance(network, Segmenter) else network.pyramid

    def forward(self, first: Tensor) -> Tensor | list[Tensor]:
        features = self.network.backbone.from_stem(first)
        if isinstance(self.network, Segmenter):
            return self.network.head(features)
        return [lateral(feature) for lateral, feature in zip(self.network.laterals, features)]


def export(
    arguments, about: dict, networks: dict, backbone, sizes: Tensor, size: tuple | None, folder: Path
) -> None:
    """Writes NAME.pt2 of each network, and with --onnx NAME.onnx, and experts.json: what is known of them.

    networks: a `Stem` and `AfterStem`s, by name; backbone: the routed one that they are from.
    sizes: [N, 2] of the images; size: the one to export for, None for any, or that of images that are small.
    """
    # torch.export takes a size of 1 for a constant: the smallest map that a gate sees must have two rows.
    stride, least = backbone.stride, (8 if backbone.gate == "small" else 2) * backbone.stride
    padded = sizes + -sizes % stride
    if size is None and padded.min() < least and (padded == padded[0]).all():
        size = tuple(padded[0].tolist())
    about |= {"stride": stride, "least": least, "size": size}
    taken, files = size or (least, least + stride), set()
    folder.mkdir(parents=True, exist_ok=True)
    for name, network in tqdm(networks.items(), "exporting", leave=False):
        network = fuse(copy.deepcopy(network).cpu().eval())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch.export about itself
            if name == "stem":
                example, inputs, outputs = torch.zeros(2, 3, *taken), ["images"], ["features", "expert"]
            else:
                example = torch.zeros(2, backbone.width, taken[0] // 4, taken[1] // 4)
                inputs, outputs = ["features"], ["logits"] if about["task"] == "segmentation" else None
            program = export_program(network, example, None if size else stride, least)
            write_file(folder / f"{name}.pt2", lambda file: torch.export.save(program, file))
            files.add(f"{name}.pt2")
            if arguments.onnx:
                names = dict(input_names=inputs, output_names=outputs)
                writer = functools.partial(write_onnx, program, example, names)
                write_file(folder / f"{name}.onnx", writer)
                files.add(f"{name}.onnx")
    ours = re.compile(rf"(expert-\d+|{COMMON}|stem|dispatcher)\.(pt2|onnx)")
    for old in folder.glob("*"):  # of another export: they would not go with these
        if ours.fullmatch(old.name) and old.name not in files:
            old.unlink()
    content = json.dumps(about)
    write_file(folder / "experts.json", lambda file: file.write(f"{content}\n".encode()))
    if about["task"] == "detection":
        words = "torchvision's heads are not exported: the files end at the pyramid, P2 ... P6"
        print(words, file=sys.stderr)
    said = f"and any height and width that are multiples of {stride}, at least {least}"
    if size:
        said = f"of {size[1]}x{size[0]} pixels alone; --export-size takes another"
    print(f"wrote {len(files) + 1} files to {folder}, for any batch {said}", file=sys.stderr)


def export_program(network, example: Tensor, stride: int | None, least: int):
    """torch.export of a network, for the CPU, and for any batch of the example [2, C, h, w] of its input.

    stride: of the images; they may then have all sides that are its multiples from `least` pixels on. None:
    that of the example alone.
    """
    shapes = {0: torch.export.Dim("batch", min=1, max=4096)}
    if stride:
        step = stride * example.shape[2] // least  # of images; of the stem's map a quarter
        names = ("height", "width")
        height, width = (torch.export.Dim(name, min=least // stride, max=4096) for name in names)
        shapes |= {2: step * height, 3: step * width}
    with torch.no_grad():
        program = torch.export.export(network, (example,), dynamic_shapes=(shapes,))
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            # Without stack traces, which hold our lines of code and this machine's paths.
            node.meta = {name: value for name, value in node.meta.items() if name == "val"}
    program._example_inputs = None
    return program


def write_onnx(program, example: Tensor, names: dict, file) -> None:
    """An exported program as ONNX, with `names` of inputs and outputs."""
    with contextlib.redirect_stdout(io.StringIO()):
        converted = torch.onnx.export(program, (example,), dynamo=True, verbose=False, **names)
    for node in converted.model_proto.graph.node:
        del node.metadata_props[:]  # where it came from
    file.write(converted.model_proto.SerializeToString())
