"""Train a routed network for semantic segmentation: alternate SGD and K-means over the gate activations.

    python train_seg.py --dataset shapes                                    # nothing to download, CPU is enough
    python train_seg.py --dataset camvid --data DIR --variant divdr-raw     # one process; CUDA, MPS or CPU, as found
    torchrun --nproc_per_node 8 train_seg.py --variant divdr-a              # one machine with 8 GPUs, Cityscapes
    torchrun --nnodes 2 --nproc_per_node 4 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train_seg.py

A run writes to runs/NAME: config.json (every resolved value), log.jsonl (one line per event), last.pt and best.pt. Stopped, it
goes on with the same command and --resume.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

import data
import kmeans
import losses
from model import (
    VARIANTS, InputError, Process, build_model, check_ranges, default_workers, initialize, leave_cores_to_loaders,
    one_line_errors, parse_settings, read_file, save_checkpoint, setting, start_process, variants_of,
)  # fmt: skip
from routing import fuse

# What differs by data set: a flag that is not given takes its value from here.
# lambda2, of the DivDR variants, is 0.2 in general; on CamVid and shapes 0.02 was measured to be better, see the README. On shapes
# warm starts alone can weld two subsets together early on; a few restarts find them again, and centres that an image keeps
# between two K-means updates carry the clusters through the start of the budget.
RECIPES = {
    "cityscapes": dict(layers=16, width=64, iters=180_000, warmup=1000, lr=0.05, eval_every=5000, bn_batches=200,
                       kmeans_restarts=0, own="nearest", bank_momentum=0.0),
    "camvid": dict(layers=16, width=64, iters=20_000, warmup=1000, lr=0.05, eval_every=1000, bn_batches=100,
                   kmeans_restarts=0, lambda2=0.02, own="nearest", bank_momentum=0.0),
    "shapes": dict(layers=4, width=16, iters=3000, warmup=50, lr=0.2, eval_every=3000, bn_batches=50,
                   kmeans_restarts=4, lambda2=0.02, own="bank", bank_momentum=0.5),
}  # fmt: skip
for name, recipe in RECIPES.items():
    info = data.SEGMENTATION[name]
    recipe |= dict(data=info.root, crop=info.crop, short_sides=info.short_sides, batch=info.batch, eval_batch=info.eval_batch)


@dataclass
class RunConfig:
    """The settings of every training script. Where the default is None, the recipe or the variant has it."""

    # run
    name: str | None = setting(None, "run", "folder under --out; by default DATASET-VARIANT-seedN", type=str)
    out: str = setting("runs", "run", "where run folders are made")
    seed: int = setting(0, "run", "seeds weights, data order, augmentation and K-means++", 0, 2**32)
    resume: str | None = setting(
        None, "run", "go on with the run of this name from where it was saved; auto: if there is one, else start it",
        type=str, nargs="?", const="yes", choices=["yes", "auto"])
    log_every: int = setting(50, "run", "iterations between log lines", 1)
    eval_every: int | None = setting(None, "run", "iterations between evaluations on val", 1, type=int)
    save_every: int = setting(500, "run", "iterations between checkpoints; each evaluation saves too", 1)
    # data
    dataset: str = setting("shapes", "data", "data set")
    data: str | None = setting(None, "data", "its folder; shapes needs none", type=str)
    short_sides: tuple | None = setting(
        None, "data", "short sides that a training image is resized to, drawn at random; in detection the last one "
        "is also that of evaluation", 16, type=int, nargs="+")
    subsets: int | None = setting(None, "data", "shapes: known subsets among the images, 2 to 4 (default: 3)", 2, 4, type=int)
    size: int | None = setting(None, "data", "shapes: side of the images, a multiple of 32", type=int)
    hard: bool = setting(False, "data", "shapes: the subsets differ in object scale alone")
    jitter: bool = setting(
        False, "data", "training images change their look at random: brightness, contrast, colour, negative, blur, noise")
    workers: int | None = setting(
        None, "data", "loader processes per training process (default: 4, or what the cores allow)", 0, type=int)
    # model
    variant: str = setting("divdr-a", "model", "row of the method's table")
    layers: int | None = setting(None, "model", "layers of the routed backbone", type=int)
    width: int | None = setting(None, "model", "channels at stride 4; 64 is the published width", type=int)
    gate: str | None = setting(None, "model", "what a gate looks at, by default the variant's", choices=["full", "small"])
    init: str | None = setting(
        None, "model", "start from the weights in this file: a checkpoint of ours or of Dynamic Routing's authors", type=str)
    # optimiser
    iters: int | None = setting(None, "optimiser", "SGD steps", 1, type=int)
    batch: int | None = setting(None, "optimiser", "images per step over all processes", 1, type=int)
    lr: float | None = setting(None, "optimiser", "learning rate after warm-up", 0, type=float)
    warmup: int | None = setting(
        None, "optimiser", "steps of linear warm-up from 0.001 x lr; by itself at most iters / 10", 0, type=int)
    momentum: float = setting(0.9, "optimiser", "momentum of SGD", 0, 1)
    weight_decay: float = setting(1e-4, "optimiser", "weight decay; norm weights have none", 0)
    clip: float = setting(5.0, "optimiser", "largest gradient norm", 0)
    # method
    lambda1: float | None = setting(None, "method", "weight of the cost loss, by default the variant's", 0, type=float)
    budget: float | None = setting(None, "method", "share of the full cost aimed at, by default the variant's", 0, 1, type=float)
    lambda2: float | None = setting(None, "method", "weight of the clustering loss, by default the variant's", 0, type=float)
    lambda2_start: float = setting(0.0, "method", "share of training that passes before the clustering loss begins", 0, 1)
    margin: float = setting(
        5.0, "method", "margin of the clustering loss (alpha in eq. 2), in units of distance / 2 sigma^2", 0)
    k: int | None = setting(
        None, "method", "clusters, that is experts (default: 4; shapes: as many as subsets)", 2, type=int)
    kmeans_every: int = setting(50, "method", "iterations between K-means updates", 1)
    kmeans_anneal: float = setting(1.0, "method", "factor by which that interval has grown at the end of training", 1, 1e6)
    kmeans_restarts: int | None = setting(
        None, "method", "K-means++ starts tried beside the last centres at each update", 0, type=int)
    activations: str = setting(
        "bank", "method", "what K-means sees: the latest A(x) of each sample, or a pass over the training set",
        choices=["bank", "recompute"])
    bank_momentum: float | None = setting(
        None, "method", "share of a sample's kept activations that stays when it is seen again: with augmentations, a "
        "running mean over its views", 0, 0.999, type=float)
    own: str | None = setting(
        None, "method", "the centre that an image is pulled to: the nearest to A(x) at each step, or, by bank, the one "
        "that its kept activations went to at the last K-means update", type=str, choices=["nearest", "bank"])
    metric: str = setting(
        "plain", "method", "distances between architectures: plain, or, by task, with each gate weighed by how much the "
        "task loss depends on it", choices=["plain", "task"])
    oracle: bool = setting(False, "method", "shapes: tell the method the true subsets: their means are the centres")
    gate_space: str = setting("alpha", "method", "cluster gates after or before their non-linearity", choices=["alpha", "logit"])
    # system
    device: str | None = setting(None, "system", "cpu, cuda or mps; by default the best there is", type=str)
    amp: bool | None = setting(
        None, "system", "forward pass in bfloat16 (default: on GPUs that have it)", action=argparse.BooleanOptionalAction)
    compile: bool = setting(False, "system", "compile the network first: minutes at the start, faster steps after")
    bn_batches: int | None = setting(
        None, "system", "training batches that batch norm is re-estimated on before evaluation", 1, type=int)
    eval_batch: int | None = setting(None, "system", "images at a time in evaluation", 1, type=int)

    def shapes_options(self) -> dict:
        """What the flags say about the shapes data set; empty for the others unless a flag does not apply."""
        options = {key: getattr(self, key) for key in ("subsets", "size") if getattr(self, key) is not None}
        return options | ({"hard": True} if self.hard else {})


@dataclass
class Config(RunConfig):
    """The settings of this script."""

    dataset: str = setting("cityscapes", "data", "data set", choices=list(RECIPES))
    variant: str = setting("divdr-a", "model", "row of the method's table", choices=variants_of("segmentation"))
    crop: int | None = setting(None, "data", "side of the square training crop, a multiple of 32", type=int)


def resolve(config: RunConfig, recipes: dict[str, dict], world: int) -> RunConfig:
    """Fills what the flags left open from the data set's recipe and the variant; InputError where flags cannot work."""
    recipe, variant = recipes[config.dataset], VARIANTS[config.variant]
    routed = variant.gate is not None
    lambda2 = variant.lambda2 and recipe.get("lambda2", variant.lambda2)
    defaults = recipe | dict(gate=variant.gate, lambda1=variant.lambda1, budget=variant.budget, lambda2=lambda2)
    if not routed:  # no size to choose
        defaults |= {key: None for key in ("layers", "width", "pyramid") if key in recipe}
    defaults["k"] = (config.subsets or 3) if config.dataset == "shapes" else 4
    defaults["workers"] = default_workers()
    defaults["name"] = f"{config.dataset}-{config.variant}-seed{config.seed}"
    defaults["warmup"] = min(defaults["warmup"], (config.iters or defaults["iters"]) // 10)
    changes = {key: value for key, value in defaults.items() if getattr(config, key) is None}
    config = dataclasses.replace(config, **changes)

    check_ranges(config)
    if config.batch // world == 1 and not torch.cuda.is_available() or config.batch == 1:
        raise InputError(f"--batch {config.batch}: batch norm needs at least 2 images per process")
    if config.lambda1 and not config.budget:
        raise InputError(f"--lambda1 {config.lambda1}: {config.variant} has no budget; give the share to aim at with --budget")
    if config.init and not routed and config.variant != "r50-fpn":
        raise InputError(f"--init {config.init}: starts routed networks, and r50-fpn; {config.variant} is none of them")
    if config.metric == "task" and config.gate_space == "logit":
        raise InputError("--metric task: weighs gate activations; it does not go with --gate-space logit")
    if not routed and (config.lambda1 or config.lambda2):
        raise InputError(f"--lambda1 and --lambda2 do not apply to {config.variant}, which has no gates")
    return config


def choose_precision(config: RunConfig, device: torch.device) -> RunConfig:
    """Fills in --amp; InputError where the device cannot."""
    has = device.type == "cpu" or device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if config.amp and not has:
        raise InputError(f"--amp: {device} has no bfloat16; leave it out")
    return dataclasses.replace(config, amp=has and device.type == "cuda") if config.amp is None else config


def warm_up(config: RunConfig, step: int) -> float:
    """Factor of the learning rate: linear from 0.001 to 1 over the first `warmup` steps."""
    return 0.001 + 0.999 * (min(step / config.warmup, 1.0) if config.warmup else 1.0)


def learning_rate_factor(config: Config):
    """Warm-up, and poly decay with power 0.9."""
    return lambda step: warm_up(config, step) * (1 - step / config.iters) ** 0.9


def make_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.SGD:
    """SGD with momentum; weight decay for everything but norm layers. On CPU and CUDA fused: one pass over the weights."""
    norm, rest = [], []
    for module in model.modules():
        is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        (norm if is_norm else rest).extend(p for p in module.parameters(recurse=False) if p.requires_grad)
    groups = [dict(params=rest, weight_decay=config.weight_decay), dict(params=norm, weight_decay=0.0)]
    fused = rest[0].device.type in ("cpu", "cuda")
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused)


def distribute(model: nn.Module, process: Process, compile: bool = False) -> nn.Module:
    """The network to call in a training step: with several processes, one that averages gradients over them."""
    if process.world > 1:
        model = DistributedDataParallel(model, device_ids=[process.device] if process.device.type == "cuda" else None)
    return torch.compile(model) if compile else model


@dataclass
class Evaluation:
    """What one pass over an evaluation set gave, on every process the same."""

    confusion: Tensor  # [classes, classes] int64 pixels, rows: truth, columns: prediction
    A: Tensor  # [N, D] gate activations, in the order of the data set
    flops: dict[str, Tensor]  # per count: [N] real multiply-adds of each image

    def iou(self) -> Tensor:
        """[classes] intersection over union in 0..1; nan for a class that is neither in the truth nor predicted."""
        hits = self.confusion.diag().double()
        return hits / (self.confusion.sum(0) + self.confusion.sum(1) - hits)

    def miou(self) -> float:
        return self.iou().nanmean().item()


@torch.no_grad()
def evaluate_segmentation(model, loader, num_classes: int, process: Process, mean, std, save=None) -> Evaluation:
    """Runs `model` over `loader` (this process's share) and gathers over processes; each image counts once.

    Args:
        mean, std: normalisation of the images, per channel, on 0..1.
        save: called with (index, prediction uint8 [H, W]) for every image.
    """
    network = fuse(copy.deepcopy(model).eval())
    confusion = torch.zeros(num_classes**2 + 1, dtype=torch.int64, device=process.device)  # last: pixels not labelled
    rows = []  # per batch: indices, A, and the cost by count
    for images, masks, index in tqdm(loader, "evaluating", disable=not process.first, leave=False):
        images, masks = images.to(process.device), masks.to(process.device)
        out = network(data.normalize(images, mean, std))
        prediction = out.logits.argmax(1)
        pairs = torch.where(masks == data.IGNORE, num_classes**2, masks.long() * num_classes + prediction)
        confusion += torch.bincount(pairs.flatten(), minlength=num_classes**2 + 1)
        costs = {count: sum(model.real_cost(out.routes, *images.shape[-2:], count).values()) for count in model.counts}
        rows.append((index, out.A.cpu(), {count: cost.expand(len(index)) for count, cost in costs.items()}))
        for i, labels in zip(index.tolist(), prediction.to(torch.uint8) if save else ()):
            save(i, labels)
    if process.world > 1:
        dist.all_reduce(confusion)
        shares = [None] * process.world
        dist.all_gather_object(shares, rows)
        rows = [row for share in shares for row in share]
    order = torch.cat([index for index, _, _ in rows]).argsort()
    flops = {count: torch.cat([cost[count] for _, _, cost in rows])[order] for count in model.counts}
    A = torch.cat([A for _, A, _ in rows])[order]
    return Evaluation(confusion[:-1].view(num_classes, num_classes).cpu(), A, flops)


def reestimate_batch_norm(network: nn.Module, batches, process: Process) -> None:
    """Replaces the running statistics of batch norm by plain averages over `batches`, inputs of `network`."""
    update_bn(batches, network)
    if process.world > 1:  # without SyncBatchNorm (on CPUs) each process saw its own images
        for name, buffer in network.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                dist.all_reduce(buffer)
                buffer /= process.world


@torch.no_grad()
def recompute_activations(model: nn.Module, bank: kmeans.ActivationBank, loader, activations) -> None:
    """Refills the bank from one pass over the training set with frozen weights (Figure 2 of the paper).

    activations: the loader's images -> their A(x). Batch norm uses the statistics of each batch, as in the steps whose
    loss will see the centres, and its running statistics stay as they are.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    for images, _, index in loader:
        bank.update(index, activations(images))
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


class Experts:
    """Step (2) of the alternation: the bank, the centres, and when K-means moves them.

    With --oracle the true subset of each training image takes the place of what K-means finds. dim: length of A(x),
    0 of a static network, which has no experts. Raises InputError where a flag does not fit the training set.

    metric: None, or [D], mean square 1: what A is multiplied by before distances are taken. By --metric task it is the
    root mean square, over recent images, of the task loss's gradient to the weight of each path: gates that the task
    does not depend on, where A varies with no more than the look of the image, count little.
    own: None, or by --own bank the centre [N] of each training sample.
    """

    def __init__(self, config: RunConfig, dim: int, train_set, device: torch.device):
        if dim and config.k > len(train_set):
            raise InputError(f"--k {config.k}: the training set has only {len(train_set)} images")
        if config.oracle and (train_set.subset is None or config.k != int(train_set.subset.max()) + 1):
            raise InputError("--oracle: needs --dataset shapes, whose subsets are known, and --k equal to their number")
        self.config, self.subset, self.device = config, train_set.subset if config.oracle else None, device
        place = "cpu" if device.type == "mps" else device  # see kmeans.py
        self.bank = kmeans.ActivationBank(len(train_set), dim, place, config.bank_momentum)
        self.clusters, self.next_update = None, config.kmeans_every
        self.metric, self.own = None, None
        self.probe, self.squares = None, torch.zeros(dim, device=device) if dim and config.metric == "task" else None

    def probes(self, batch: int) -> dict[str, Tensor]:
        """For the network's forward pass, beside its images: with --metric task, what `sense` will read."""
        if self.squares is None:
            return {}
        self.probe = torch.zeros(batch, 1 + len(self.squares) // 3, 3, device=self.device, requires_grad=True)
        return {"probe": self.probe}

    def sense(self, momentum: float = 0.98) -> None:
        """After the backward pass: how much the task loss depends on each gate, the same on every process. The other terms
        do not pass the probe."""
        if self.squares is not None:
            squares = self.probe.grad[:, 1:].flatten(1).square().mean(0)
            if dist.is_initialized():
                dist.all_reduce(squares)  # the sum does: only ratios count
            self.squares.lerp_(squares, 1 - momentum)

    def due(self, iteration: int) -> bool:
        late = iteration >= self.next_update or iteration == self.config.iters
        return late and self.bank.count >= self.config.k

    def pull(self, iteration: int) -> bool:
        """Whether the clustering loss takes part in this step."""
        config = self.config
        return bool(config.lambda2) and self.clusters is not None and iteration > config.lambda2_start * config.iters

    def loss(self, A: Tensor, index: Tensor) -> Tensor:
        """The clustering loss of a batch, eq. (2), with the centres as they are."""
        centers, own = self.clusters.centers, None
        if self.subset is not None:
            own = self.subset[index]
        elif self.own is not None:
            own = self.own[index.to(self.own.device, non_blocking=True)]
        if self.metric is not None:
            A, centers = A * self.metric.to(A.device), centers * self.metric
        return losses.clustering_loss(A, centers, self.clusters.sigma2, self.config.margin, own)

    def nearest(self, A: Tensor) -> Tensor:
        """The centre of each A [n, D] -> [n] int64."""
        centers = self.clusters.centers
        weight = 1.0 if self.metric is None else self.metric
        return kmeans.assign(A * weight, centers * weight)[0]

    def update(self, iteration: int) -> None:
        """Moves the centres, from where they are, to what the bank holds."""
        config, bank = self.config, self.bank
        if not bank.values.isfinite().all():  # on every process the same
            raise InputError(f"iteration {iteration}: gate activations are no longer finite; try a lower --lr")
        if self.squares is not None and self.squares.any():
            squares = self.squares.to(bank.values)
            rms = squares[squares > 0].mean().sqrt()
            self.metric = (squares.sqrt() / rms).clamp(min=0.01)  # paths that do not exist have no gradient
        if self.subset is None:
            start = self.clusters and self.clusters.centers
            self.clusters = bank.cluster(
                config.k, start, config.seed + iteration, restarts=config.kmeans_restarts, metric=self.metric)
        else:
            self.clusters = bank.group(self.subset.to(bank.values.device), config.k, self.metric)
        if config.own == "bank":
            self.own = self.nearest(bank.values)
        self.next_update = iteration + round(config.kmeans_every * config.kmeans_anneal ** (iteration / config.iters))

    def state(self) -> dict:
        """For the checkpoint: bank, centres and sigma2."""
        centers, sigma2 = (None, None) if self.clusters is None else (self.clusters.centers.cpu(), self.clusters.sigma2)
        clusters = self.clusters and {"sizes": self.clusters.sizes, "inertia": self.clusters.inertia}
        metric = None if self.metric is None else self.metric.cpu()
        return {"bank": self.bank.state_dict(), "centers": centers, "sigma2": sigma2, "clusters": clusters, "metric": metric,
                "own": self.own, "squares": self.squares, "next_update": self.next_update}  # fmt: skip

    def load_state(self, state: dict) -> None:
        """What `state` gave."""
        self.bank.load_state_dict(state["bank"])
        self.next_update = state["next_update"]
        place = self.bank.values.device
        if self.squares is not None:
            self.squares.copy_(state["squares"])
        if state["metric"] is not None:
            self.metric = state["metric"].to(place)
        if state["own"] is not None:
            self.own = state["own"].to(place)
        if state["clusters"] is not None:
            self.clusters = kmeans.Clusters(state["centers"].to(place), state["sigma2"], **state["clusters"])


def train(config: Config, process: Process) -> Path:
    """The whole run; returns its last checkpoint."""
    config = resolve(config, RECIPES, process.world)
    if config.crop is not None and (config.crop < 32 or config.crop % 32):
        raise InputError(f"--crop {config.crop}: must be a multiple of 32, the coarsest stride")
    folder = Path(config.out) / config.name
    device = process.device
    config = choose_precision(config, device)
    torch.manual_seed(config.seed)
    leave_cores_to_loaders(device, config.workers)

    # ============ building the network ============
    classes = data.SEGMENTATION[config.dataset].classes
    model_args = dict(
        variant=config.variant, task="segmentation", num_classes=len(classes), layers=config.layers,
        width=config.width, gate=config.gate, gate_space=config.gate_space)
    model = build_model(**model_args)
    if config.init and not Run.saved_in(folder):  # a run that goes on has its own weights
        report = initialize(model, config.init)
        if process.first:
            print(f"{config.init}: {report}")
    model = model.to(device)
    if process.world > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    network = distribute(model, process, config.compile)
    optimizer = make_optimizer(model, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(config))

    # ============ preparing data ============
    options = config.shapes_options()
    train_set = data.segmentation_dataset(
        config.dataset, config.data, "train", train=True, crop=config.crop, short_sides=config.short_sides,
        jitter=config.jitter, **options)
    val_set = data.segmentation_dataset(config.dataset, config.data, "val", train=False, **options)
    ranks = (process.rank, process.world)
    loader = data.train_loader(train_set, config.batch, config.workers, config.seed, *ranks)
    val_loader = data.pass_loader(val_set, config.eval_batch, config.workers, *ranks)

    # ============ opening the run folder ============
    experts = Experts(config, model.dim, train_set, device)
    about = dict(
        model_args=model_args, task="segmentation", dataset=config.dataset, data=config.data, data_options=options,
        classes=list(classes), palette=[list(color) for color in train_set.info.palette], mean=list(data.MEAN),
        std=list(data.STD), config=dataclasses.asdict(config))  # what evaluate.py needs to know
    run = Run(folder, config, process, about, model, optimizer, schedule, experts)

    def evaluate(iteration: int) -> None:
        seed_iteration(config.seed, process.rank, iteration)
        again = data.train_loader(train_set, config.batch, config.workers, config.seed + 1, *ranks, persistent=False)
        some = itertools.islice(data.forever(again), config.bn_batches)
        reestimate_batch_norm(model, (data.normalize(images.to(device)) for images, _, _ in some), process)
        result = evaluate_segmentation(model, val_loader, len(classes), process, data.MEAN, data.STD)
        iou = [None if math.isnan(value) else value for value in result.iou().tolist()]
        run.evaluated(iteration, result.miou(), f"mIoU {100 * result.miou():.2f}", result.flops, miou=result.miou(), iou=iou)

    # ============ the alternation ============
    if run.evaluation_due:  # a run that was stopped in the middle of it
        evaluate(run.iteration)
    batches = data.forever(loader, run.iteration)
    for iteration in run.iterations():
        network.train()
        images, masks, index = next(batches)
        seed_iteration(config.seed, process.rank, iteration)
        images, masks = data.normalize(images.to(device, non_blocking=True)), masks.to(device, non_blocking=True).long()

        # (1) a step on theta: L = L_task + lambda1 L_cost + lambda2 L_clustering, centres fixed (eq. 3)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
            out = network(images, **experts.probes(len(images)))
        terms = {"task": segmentation_loss(out.logits.float(), masks, process)}
        if config.lambda1:
            ramp = losses.budget_ramp((iteration - 1) / config.iters)
            total = model.budgeted_cost(*images.shape[-2:])
            cost = mean_over_processes(out.cost.mean(), process)
            terms["cost"] = config.lambda1 * ramp * losses.cost_loss(cost[None], total, config.budget)
        if experts.pull(iteration):
            terms["clustering"] = config.lambda2 * experts.loss(out.A, index)
        loss = sum(terms.values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        experts.sense()
        gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        run.check_step(iteration, terms, gradient_norm, train_set, index)
        lr = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()

        # (2) the bank keeps A(x) of every sample; now and then K-means moves the centres, theta fixed
        if model.dim:
            experts.bank.update(index, out.A)
            if experts.due(iteration):
                run.settle()
                if config.activations == "recompute":
                    once = data.pass_loader(
                        train_set, config.batch // process.world, config.workers, *ranks, wrap=True, seed=(config.seed, iteration))
                    recompute_activations(model, experts.bank, once, lambda images: model(data.normalize(images.to(device))).A)
                experts.update(iteration)
                run.log_clustering(iteration)
        run.log_step(iteration, terms, dict(lr=lr, gradient_norm=gradient_norm), out, images.shape[-2:])

        # ============ saving and evaluating ============
        due = iteration % config.eval_every == 0 or iteration == config.iters
        if due or iteration % config.save_every == 0 or run.stop_agreed:
            run.save(iteration, evaluation_due=due)  # before the evaluation, which may fail
        if due:
            evaluate(iteration)
    run.close()
    return folder / "last.pt"


def seed_iteration(seed: int, rank: int, iteration: int) -> None:
    """Makes what is random in a step (torchvision's choice of regions, image sizes) depend on these three alone, so that
    a resumed run draws what the uninterrupted one would."""
    torch.manual_seed(data.mix_seeds(seed, rank, iteration))


def mean_over_processes(value: Tensor, process: Process) -> Tensor:
    """Mean of a 0-dim tensor over all processes; its gradient is this process's share of it, times the number of
    processes, which is what DistributedDataParallel averages."""
    if process.world == 1:
        return value
    mean = value.detach().clone()
    dist.all_reduce(mean)
    return value + (mean / process.world - value.detach())


def segmentation_loss(logits: Tensor, masks: Tensor, process: Process) -> Tensor:
    """Cross-entropy [B, classes, H, W], [B, H, W] -> mean over the labelled pixels of all processes; 0 where there are none.

    Each process has its own pixels' share times the number of processes, which is what DistributedDataParallel averages.
    """
    valid = (masks != data.IGNORE).sum()
    if process.world > 1:
        dist.all_reduce(valid)
    return F.cross_entropy(logits, masks, ignore_index=data.IGNORE, reduction="sum") * process.world / valid.clamp(min=1)


class Stopped(Exception):
    """A signal ended the run, which has been saved."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status  # of the process


class Run:
    """A run and its folder: checkpoints, log.jsonl, and what the first process says.

    Opens the folder, and with `config.resume` takes up what is saved in it: model, optimiser, schedule, experts, best
    score, and the log as it was then. `about` goes into each checkpoint. Raises InputError where there is nothing to
    resume, a run that would be overwritten, or a run of other settings.

    iteration: the last one done. evaluation_due: whether its evaluation is not. stop_agreed: a signal came to one of the
    processes, and all know. All methods are for all processes to call.
    """

    # What may differ between a run and its continuation; all else decides what comes out.
    FREE = {"out", "name", "resume", "data", "workers", "device", "compile", "save_every", "eval_batch", "init",
            "train_json", "train_images", "val_json", "val_images"}  # fmt: skip

    def __init__(self, folder: Path, config: RunConfig, process: Process, about: dict, model, optimizer, schedule, experts: Experts):
        self.folder, self.config, self.process, self.about = folder, config, process, about
        self.model, self.optimizer, self.schedule, self.experts = model, optimizer, schedule, experts
        self.iteration, self.evaluation_due, self.best = 0, False, -math.inf
        self.sums: dict[str, tuple] = {}  # per loss term: its sum since the last log line, and of how many steps
        self.health = {}  # of the clustering
        self.started, self.steps = time.perf_counter(), 0
        self.stop_agreed, self._signal, self._signalled = False, 0, 0.0
        self.unread = None  # what `check_step` found in the last step, on its way from the GPU
        signal.signal(signal.SIGTERM, self._note_signal)
        signal.signal(signal.SIGINT, self._note_signal)
        saved = self._on_first(self._find_saved)
        if saved is not None:
            self._take_up(saved)
        self._on_first(lambda: self._open_log(0 if saved is None else saved["log"]["position"]))

    @staticmethod
    def saved_in(folder: Path) -> list[Path]:
        """The checkpoints in a run folder, the newest first."""
        return [folder / name for name in ("last.pt", "previous.pt") if (folder / name).exists()]

    def _on_first(self, action):
        """What `action` gives on the first process, on every one; what it raises of InputError and OSError, likewise."""
        result, error = None, None
        if self.process.first:
            try:
                result = action()
            except (InputError, OSError) as raised:
                error = str(raised)
        if self.process.world > 1:
            shared = [result, error]
            dist.broadcast_object_list(shared, device=self.process.device)
            result, error = shared
        if error is not None:
            raise InputError(error)
        return result

    def _note_signal(self, number: int, frame) -> None:
        """Schedulers may send SIGTERM several times; who presses Ctrl-C again a second later does not want to wait."""
        if self._signal and number == signal.SIGINT and time.monotonic() - self._signalled > 1:
            signal.default_int_handler(number, frame)
        if not self._signal:
            self._signal, self._signalled = number, time.monotonic()

    def _find_saved(self) -> dict | None:
        """The newest checkpoint of the folder that can be read; None where a new run is to start."""
        config, found = self.config, self.saved_in(self.folder)
        resume = config.resume
        if resume is None and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):  # torchrun --max-restarts
            with suppress(OSError, ValueError):
                if json.loads((self.folder / "config.json").read_text()).get("launcher") == _launcher():
                    resume = "auto"
        if resume is None:
            if found:
                raise InputError(f"--name {config.name}: {self.folder} holds a run already; go on with --resume, or choose another name")
            return None
        if not found:
            if resume == "auto":
                return None
            raise InputError(f"--resume: {self.folder} holds no run to go on with; start it without --resume")
        for path in found:
            try:
                saved = read_file(path, "a checkpoint of this run")
                if "next_update" not in saved:
                    raise InputError(f"{path}: not a checkpoint that a run can go on from")
                return saved
            except InputError as error:
                print(f"warning: {error}; trying the one before", file=sys.stderr)
                os.replace(path, path.with_name(path.name + ".damaged"))  # it must not become the one before
        raise InputError(f"--resume: no checkpoint in {self.folder} can be read; start another run with --name")

    def _open_log(self, position: int) -> None:
        """Takes the log up at `position`, bytes: what came after the checkpoint comes again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "log.jsonl"
        if position > (path.stat().st_size if path.exists() else 0):
            raise InputError(f"{path}: shorter than when the checkpoint was written; put it back, or start another run")
        resolved = dataclasses.asdict(self.config) | dict(
            device=str(self.process.device), processes=self.process.world, launcher=_launcher())
        (self.folder / "config.json").write_text(json.dumps(resolved, indent=2) + "\n")
        self.file = open(path, "a", buffering=1)
        self.file.truncate(position)
        self.file.seek(position)

    def _take_up(self, saved: dict) -> None:
        now = dataclasses.asdict(self.config)
        try:
            for key, value in saved["config"].items():
                if key not in self.FREE and now.get(key) != value:
                    flag = key.replace("_", "-")
                    raise InputError(f"--{flag} {now.get(key)}: {self.folder} was started with {value}; repeat that, or choose another --name")
            self.model.load_state_dict(saved["weights"])
            self.experts.load_state(saved)
            fused = self.optimizer.defaults["fused"]
            self.optimizer.load_state_dict(saved["optimizer"])
            for group in self.optimizer.param_groups:
                group["fused"] = fused  # of this device, not of the one that it was saved on
            self.schedule.load_state_dict(saved["schedule"])
            self.iteration, self.evaluation_due, self.best = saved["iteration"], saved["evaluation_due"], saved["best"]
            self.sums = {name: (total.to(self.process.device), steps) for name, (total, steps) in saved["log"]["sums"].items()}
            self.health = saved["log"]["health"]
        except InputError:
            raise
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"--resume: the checkpoint in {self.folder} does not fit ({reason}); is the data set another?") from None

    def save(self, iteration: int, evaluation_due: bool) -> None:
        """Writes last.pt, from which the run can go on. Raises Stopped if a signal came."""
        self.settle()
        self.iteration = iteration
        if self.process.world > 1 and self.sums:  # each process goes on from the mean, as it would from the checkpoint
            totals = torch.stack([total for total, _ in self.sums.values()])
            dist.all_reduce(totals)
            totals /= self.process.world
            self.sums = {name: (total, steps) for (name, (_, steps)), total in zip(self.sums.items(), totals)}
        self._on_first(lambda: self._write_checkpoint("last.pt", evaluation_due, keep="previous.pt"))
        if self.stop_agreed:
            name = signal.Signals(self._signal or signal.SIGTERM).name
            raise Stopped(f"{name} after iteration {iteration}: saved {self.folder}/last.pt; go on with --resume",
                          128 + (self._signal or signal.SIGTERM))  # fmt: skip

    def _write_checkpoint(self, name: str, evaluation_due: bool, keep: str | None = None) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        log = {"position": self.file.tell(), "health": self.health,
               "sums": {term: (total.cpu(), steps) for term, (total, steps) in self.sums.items()}}  # fmt: skip
        save_checkpoint(
            self.folder / name, self.model, keep=keep and self.folder / keep, **self.about, **self.experts.state(),
            optimizer=self.optimizer.state_dict(), schedule=self.schedule.state_dict(), iteration=self.iteration,
            evaluation_due=evaluation_due, best=self.best, log=log)

    def iterations(self):
        steps = range(self.iteration + 1, self.config.iters + 1)
        self.bar = tqdm(steps, self.config.name, disable=not self.process.first, dynamic_ncols=True,
                        initial=self.iteration, total=self.config.iters)  # fmt: skip
        return self.bar

    def check_step(self, iteration: int, terms: dict[str, Tensor], gradient_norm: Tensor, dataset, index: Tensor) -> None:
        """InputError, on all processes, before a step that would spoil the weights; and agrees on whether to stop.

        On a GPU nothing waits: the optimizer leaves out a step that is not finite, by a flag that stays on the device,
        and the flag is read, and the error raised, after the next step was queued, or before anything is kept.
        """
        terms = {f"loss {name}": term.detach() for name, term in terms.items()} | {"the gradient's norm": gradient_norm}
        values = torch.stack([value.float() for value in terms.values()])
        signalled = torch.full((), self._signal > 0, device=values.device)
        flags = torch.stack([~values.isfinite().all(), signalled]).float()
        if self.process.world > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        found = (iteration, list(terms), dataset, index)
        if not self.defers:
            return self._judge(torch.cat([flags, values]).tolist(), *found)
        self.optimizer.found_inf = flags[0]
        on_host = torch.cat([flags, values]).to("cpu", non_blocking=True)  # into pinned memory
        arrived = torch.cuda.Event()
        arrived.record()
        self.settle()
        self.unread = (arrived, on_host, *found)

    @property
    def defers(self) -> bool:
        """Whether `check_step` lets the device go on and reads later what it found."""
        return self.process.device.type == "cuda" and self.optimizer.defaults["fused"]

    def settle(self) -> None:
        """Reads what the last step's check found, if that is still to be done."""
        if self.unread is not None:
            (arrived, on_host, *found), self.unread = self.unread, None
            arrived.synchronize()
            self._judge(on_host.tolist(), *found)

    def _judge(self, numbers: list[float], iteration: int, names: list[str], dataset, index: Tensor) -> None:
        broken, signalled, *values = numbers
        self.stop_agreed = signalled > 0
        if broken:
            names = [f"{name} is {value}" for name, value in zip(names, values) if not math.isfinite(value)]
            images = ", ".join(dataset.image_name(i) for i in index.tolist())
            what = f"{', '.join(names)} on {images}" if names else "another process's loss is not finite"
            saved = f"; {self.folder}/last.pt is from before" if self.saved_in(self.folder) else ""
            raise InputError(f"iteration {iteration}: {what}; try a lower --lr{saved}")

    def write(self, event: str, iteration: int, **values) -> None:
        self.file.write(json.dumps({"event": event, "iteration": iteration, **values}) + "\n")

    def log_clustering(self, iteration: int) -> None:
        """Sizes, inter and intra after a K-means update; a collapse is said in words."""
        if not self.process.first:
            return
        clusters, bank = self.experts.clusters, self.experts.bank
        A = bank.values[bank.seen]
        labels = self.experts.nearest(A)
        inter, intra = kmeans.inter_intra(A, labels, clusters.centers, max_samples=500)
        self.health = dict(sizes=clusters.sizes, inter=inter, intra=intra, sigma2=clusters.sigma2)
        collapse = kmeans.describe_collapse(clusters.sizes, inter, intra)
        self.write("kmeans", iteration, **self.health, collapse=collapse)
        if collapse:
            self.bar.write(f"iteration {iteration}: {collapse}")

    def log_step(self, iteration: int, terms: dict, record: dict, out, size) -> None:
        """Adds up the loss terms on the device; every `log_every` steps reads them, with what else costs a sync."""
        for name, term in terms.items():
            total, steps = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + term.detach(), steps + 1)
        self.steps += 1
        if iteration % self.config.log_every and iteration != self.config.iters:
            return
        self.settle()
        # Real and expected cost in one count: stem, gates and head, and of cells and paths what is open, or alpha's share.
        model = self.model
        parts = {part: cost.double().mean() for part, cost in model.real_cost(out.routes, *size, model.counts[0]).items()}
        fixed = sum(cost for part, cost in parts.items() if part not in ("cells", "paths"))
        values = [torch.as_tensor(total / steps).cpu().double() for total, steps in self.sums.values()]
        values += [sum(parts.values()) / 1e9, (fixed + out.cost.detach().cpu().double().mean()) / 1e9]
        values = torch.stack(values).to(torch.float32)
        if self.process.world > 1:
            values = values.to(self.process.device)
            dist.all_reduce(values)
            values /= self.process.world
        names = [f"loss_{name}" for name in self.sums] + ["gflops_real", "gflops_expected"]
        means = {name: float(f"{value:.6g}") for name, value in zip(names, values.tolist())}
        now = time.perf_counter()
        speed = self.steps * self.config.batch / (now - self.started)
        self.sums, self.steps, self.started = {}, 0, now
        if self.process.first:
            record = {key: float(value) for key, value in record.items()}
            self.write("train", iteration, **means, **record, **self.health, images_per_second=speed)
            shown = means | {"images/s": speed} | {k: v for k, v in self.health.items() if k != "sigma2"}
            self.bar.set_postfix({k: f"{v:.3g}" if isinstance(v, float) else v for k, v in shown.items()})

    def evaluated(self, iteration: int, score: float, words: str, flops: dict[str, Tensor], **scores) -> None:
        """Logs scores and cost on the evaluation set, which the first process knows, and saves; the best also as best.pt."""
        self.started, self.steps = time.perf_counter(), 0  # the time it took counts as no training step's
        self.evaluation_due = False
        if self.process.first:
            gflops = {count: cost.double().mean().item() / 1e9 for count, cost in flops.items()}
            self.write("evaluation", iteration, **scores, gflops=gflops)
            costs = ", ".join(f"{value:.3f} ({count})" for count, value in gflops.items())
            tqdm.write(f"iteration {iteration}: {words} on val, GFLOPs per image {costs}")
        improved, self.best = score > self.best, max(score, self.best)
        self._on_first(lambda: improved and self._write_checkpoint("best.pt", evaluation_due=False))
        self.save(iteration, evaluation_due=False)

    def close(self) -> None:
        if self.process.first:
            self.file.close()
            print(f"wrote {self.folder}/last.pt; evaluate it: python evaluate.py {self.folder}/last.pt")


def _launcher() -> str | None:
    """What started this process, if torchrun did: the same for those that it starts again."""
    return f"{socket.gethostname()}:{os.getppid()}" if "TORCHELASTIC_RUN_ID" in os.environ else None


def launch(config: RunConfig, train) -> None:
    """What the training scripts do: start this process, train, and end with the right status."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with one_line_errors(InputError, data.DataError, OSError):
        process = start_process(config.device)
        try:
            checkpoint = train(config, process)
        except Stopped as stopped:
            if process.first:
                print(stopped, file=sys.stderr)
            sys.exit(stopped.status)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()
    if process.first and config.dataset == "shapes":  # small enough to end with the whole picture
        finish_with_evaluation(checkpoint, process.device.type)


def finish_with_evaluation(checkpoint: Path, device: str) -> None:
    """Runs evaluate.py on it as a process of its own, and exits as that does."""
    group = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    alone = {key: value for key, value in os.environ.items() if key not in group}
    command = [sys.executable, Path(__file__).with_name("evaluate.py"), checkpoint, "--device", device]
    sys.exit(subprocess.run(command, env=alone).returncode)


def main() -> None:
    launch(parse_settings(Config, __doc__, RECIPES), train)


if __name__ == "__main__":
    main()
