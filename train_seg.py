"""Train a routed network for semantic segmentation: alternate SGD and K-means over the gate activations.

    python train_seg.py --dataset shapes                            # made on the fly; a CPU is enough
    python train_seg.py --dataset folder --data DIR                 # your own images and label PNGs
    torchrun --nproc_per_node 8 train_seg.py --variant divdr-a      # Cityscapes, 8 GPUs

The step is in `main`; train_det.py has the same loop for detection. The weights of the loss terms come with
the variant, see VARIANTS in model.py.

A run writes to runs/NAME: config.json (the settings), log.jsonl (one line per event), last.pt and
best.pt. Stopped, it goes on with the same command and --resume; --resume auto also starts it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import itertools
import json
import math
import os
import re
import time
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

import data
import evaluate
from kmeans import ActivationBank, describe_collapse, inter_intra, intra_to_centre
from losses import budget_ramp, clustering_loss, cost_loss
from model import (
    ROUTES, VARIANTS, InputError, Parser, Process, build_model, cores_per_process, extra, initialize,
    make_folder, number, one_line_errors, read_file, read_weights, save_checkpoint, start_process,
    variants_of,
)
from routing import Gate, RoutedBackbone

# ============ settings ============

# Defaults that differ by data set; another takes CamVid's. Crop, scales and batch are in data.py.
RECIPES = {
    "cityscapes": dict(
        layers=16, width=64, iters=180_000, warmup=1000, lr=0.05, eval_every=5000, bn_batches=200),
    "camvid": dict(
        layers=16, width=64, iters=20_000, warmup=1000, lr=0.05, eval_every=1000, bn_batches=100),
    "shapes": dict(
        layers=4, width=16, iters=3000, warmup=50, lr=0.2, eval_every=3000, bn_batches=50, subsets=2,
        metric="views"),
}
# Dynamic Routing's recipe for a start from ImageNet features: the learning rate, and how many times as much
# that of the gates is, which start at random.
FROM_WEIGHTS = dict(lr=0.02, gate_lr=2.5)
VIEWS_EVERY = 4  # iterations from one second look at a batch to the next, --metric views


def settings(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of this script; `resolve` fills in the rest."""
    recipes = {}
    for name, info in data.SEGMENTATION.items():
        recipes[name] = RECIPES.get(name, RECIPES["camvid"]) | dict(
            data=info.root, crop=info.crop, short_sides=info.short_sides,
            batch=None if name == "folder" else info.batch)
    parser = shared_settings(argv, __doc__, "segmentation", recipes)
    add = parser.add_argument_group("segmentation").add_argument
    add("--crop", type=number(int, 32), help="side of the training crop, a multiple of 32")
    add("--route", metavar="NAME",
        help=f"one route for all images, without gates: {', '.join(ROUTES)}, or FILE:NAME of an experts.json")
    for split in ("train", "val"):
        add(f"--{split}-images", metavar="DIR", help=f"folder: images, by default images/{split} in --data")
        add(f"--{split}-labels", metavar="DIR", help=f"folder: their labels, by default labels/{split}")
        add(f"--{split}-list", metavar="FILE", help="folder: text file of the images to use, one to a line")
    add("--classes", metavar="FILE", help="folder: table of ids and names, by default classes.csv in --data")
    config = parse(parser, argv)
    if config.crop and config.crop % 32:
        parser.error(f"--crop {config.crop}: must be a multiple of 32, the coarsest stride")
    flags = [f"{split}_{what}" for split in ("train", "val") for what in ("images", "labels", "list")]
    given = [flag for flag in (*flags, "classes") if getattr(config, flag)]
    needed = [flag for flag in flags if flag not in given and not flag.endswith("list")]
    if given and config.dataset != "folder":
        parser.error(f"{as_flag(given[0])}: goes with --dataset folder alone")
    if needed and config.dataset == "folder" and not config.data:
        parser.error(f"--dataset folder: needs --data DIR, or else {as_flag(needed[0])} too")
    network = re.sub(r"[^\w.-]+", "-", config.route) if config.route else config.variant
    config.name = config.name or f"{config.dataset}-{network}-seed{config.seed}"
    return config


def as_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def shared_settings(argv, description: str, task: str, recipes: dict[str, dict]) -> Parser:
    """The settings of both training scripts, with the defaults of the --dataset and --variant in `argv`."""
    first = Parser(description, add_help=False)
    first.add_argument("--dataset", default=next(iter(recipes)))
    first.add_argument("--variant")
    first.add_argument("--route")
    chosen = first.parse_known_args(argv)[0]
    chosen.variant = chosen.variant or ("fixed-route" if chosen.route else "divdr-a")
    variant = VARIANTS.get(chosen.variant, VARIANTS["divdr-a"])
    defaults = dict(metric="plain") | recipes.get(chosen.dataset, {}) | dict(
        gate=variant.gate(task), lambda1=variant.lambda1, budget=variant.budget, lambda2=variant.lambda2,
        warmup=None, lr=None, clip=5.0)
    if variant.on_resnet:  # a network of fixed size, whose reference clips nothing
        defaults |= dict(layers=None, width=None, pyramid=None, clip=0.0)
    parser = Parser(description)
    parser.set_defaults(**defaults)

    add = parser.add_argument_group("run").add_argument
    add("--name", help="folder under --out; by default it tells data set, variant and seed")
    add("--out", default="runs", help="where run folders are made")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of weights, order, looks, K-means++")
    add("--resume", nargs="?", const="yes", choices=["yes", "auto"],
        help="go on with this run from where it was saved; auto: if there is one, else start it")
    add("--log-every", type=number(int, 1), default=50, help="iterations between lines of the log")
    add("--eval-every", type=number(int, 1), help="iterations between evaluations on val")
    add("--save-every", type=number(int, 1), default=500, help="iterations between checkpoints")

    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=list(recipes), default=chosen.dataset, help="data set; sets defaults of its own")
    add("--data", help="its folder; shapes needs none")
    add("--short-sides", type=number(int, 16), nargs="+",
        help="the short side becomes one of these, drawn at random; a detector is evaluated with the last")
    add("--subsets", type=number(int, 2, 4), help="shapes: known subsets among the images")
    add("--size", type=number(int, 32), help="shapes: side of the images, a multiple of 32")
    cores = cores_per_process()
    workers = min(4, cores if torch.cuda.is_available() else cores // 2)
    add("--workers", type=number(int, 0), default=workers, help="loader processes per training process")

    add = parser.add_argument_group("model").add_argument
    add("--variant", choices=variants_of(task), default=chosen.variant, help="row of the method's table")
    add("--layers", type=int, help="layers of the routed backbone")
    add("--width", type=int, help="channels at stride 4")
    add("--gate", choices=["full", "small"], help="gates see the whole map, or one shrunk to a quarter")
    add("--init", help="start from the weights in this file, see model.initialize")

    add = parser.add_argument_group("optimiser").add_argument
    add("--iters", type=number(int, 1), help="SGD steps")
    add("--batch", type=number(int, 1), help="images per step over all processes")
    add("--lr", type=number(float, 0),
        help=f"learning rate, by default the data set's, or {FROM_WEIGHTS['lr']} if --init has no gates")
    add("--warmup", type=number(int, 0),
        help="steps of linear warm-up from 0.001 x lr, by default the data set's, at most --iters / 10")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="momentum of SGD")
    add("--weight-decay", type=number(float, 0), default=1e-4, help="weight decay; norm weights have none")
    add("--clip", type=number(float, 0), help="largest gradient norm; 0: any")

    method = parser.add_argument_group("method (networks with gates)")
    add = method.add_argument
    add("--gate-lr", type=number(float, 0),
        help=f"factor of --lr for the gates, by default 1, or {FROM_WEIGHTS['gate_lr']} if --init has none")
    add("--lambda1", type=number(float, 0), help="weight of the cost loss")
    add("--budget", type=number(float, 0, 1), help="share of the full cost aimed at")
    add("--lambda2", type=number(float, 0), help="weight of the clustering loss")
    add("--margin", type=number(float, 0), default=5.0, help="its margin, alpha in eq. 2")
    add("--own", choices=["nearest", "bank"], default="nearest",
        help="the centre that pulls an image: nearest to its A(x), or of its cluster at the last K-means")
    add("--k", type=number(int, 2), help="clusters, that is experts; 4 by default, on shapes one per subset")
    add("--kmeans-every", type=number(int, 1), default=50, help="iterations between K-means updates")
    add("--kmeans-anneal", type=number(float, 1, 1e6), default=1.0,
        help="factor by which --kmeans-every has grown at the end")
    add("--kmeans-restarts", type=number(int, 0), default=0,
        help="K-means++ starts that an update tries beside the last centres")
    add("--activations", choices=["bank", "recompute"], default="bank",
        help="what K-means sees: the latest A(x) of each sample, or a pass over the training set")
    add("--bank-age", type=number(int, 1), default=2000,
        help="K-means sees what the last so many iterations saw")
    add("--metric", choices=["plain", "views"],
        help="distances of K-means: plain, the paper's, or views: what another look changes counts little")
    add("--oracle", action="store_true",
        help="shapes: clusters are the true subsets; sets --metric plain and --own bank")
    add("--gate-space", choices=["alpha", "logit"], default="alpha", help="cluster alpha, or its logit")
    parser.of_gates = [action.dest for action in method._group_actions]

    add = parser.add_argument_group("system").add_argument
    add("--device", help="cpu, cuda or mps; by default the best there is")
    add("--amp", action=argparse.BooleanOptionalAction, help="train in bfloat16; by default on GPUs with it")
    add("--compile", action="store_true", help="compile the network: a slow start, then faster; one process")
    add("--bn-batches", type=number(int, 1), help="batches to re-estimate batch norm on before evaluation")
    add("--eval-batch", type=number(int, 1), help="images at a time in evaluation, per process")
    return parser


def parse(parser: Parser, argv: list[str] | None) -> argparse.Namespace:
    """The command line; refuses settings that a network without gates never reads."""
    config = parser.parse_args(argv)
    for name in parser.of_gates if VARIANTS[config.variant].static else ():
        if getattr(config, name) != parser.get_default(name):
            parser.error(f"{as_flag(name)}: does not apply to {config.variant}, which has no gates")
    return config


def resolve(config, process: Process, recipe: dict, saved: dict | None, weights, info=None) -> None:
    """Fills in all settings that follow from others or from what is found; from here on they are only read.

    recipe: of the data set. saved: the checkpoint that the run goes on from. weights: of --init, by name.
    info: what the labels of --dataset folder say. Raises InputError for settings that do not go together.
    """
    variant, device = VARIANTS[config.variant], process.device
    for name in ("crop", "short_sides", "batch") if info else ():
        if getattr(config, name) is None:
            setattr(config, name, getattr(info, name))
    if config.k is None and not variant.static:
        config.k = config.subsets if config.dataset == "shapes" else 4
    if config.oracle:
        config.metric, config.own = "plain", "bank"
    if config.warmup is None:
        config.warmup = min(recipe["warmup"], config.iters // 10)
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    asked_for_amp = config.amp
    if config.amp is None:
        config.amp = on_gpu
    rates = dict(init=None, lr=recipe["lr"], gate_lr=1.0)
    if saved:  # these need not be repeated
        rates = {name: saved["config"][name] for name in rates}
    elif weights and variant.static:
        rates["lr"] = FROM_WEIGHTS["lr"]
    elif weights and not any(".gate." in name for name in weights):
        rates |= FROM_WEIGHTS
    for name, rate in rates.items():
        if getattr(config, name) is None:
            setattr(config, name, rate)

    route = vars(config).get("route")
    if route and config.variant != "fixed-route":
        raise InputError(f"--route {route}: trains without gates; leave --variant {config.variant} out")
    if config.lambda1 and not config.budget:
        raise InputError(f"--lambda1 {config.lambda1}: needs the share to aim at, with --budget")
    alone = device.type != "cuda" and config.batch // process.world == 1  # GPUs share their statistics
    if config.batch == 1 or alone:
        raise InputError(f"--batch {config.batch}: batch norm needs at least 2 images per process")
    if config.k and config.activations == "bank" and config.bank_age * config.batch < config.k:
        words = f"the bank keeps the images of so few iterations, --bank-age {config.bank_age}; give fewer"
        raise InputError(f"--k {config.k}: {words}")
    if config.compile and process.world > 1:
        words = "is for one process; shared batch norm would cut the compiled network at each of its layers"
        raise InputError(f"--compile: {words}")
    if asked_for_amp and not on_gpu and device.type != "cpu":
        raise InputError(f"--amp: {device} has no bfloat16; leave it out")


# ============ training ============


@one_line_errors(InputError, data.DataError, OSError)
def main(argv: list[str] | None = None) -> None:
    config = settings(argv)
    process = start_process(config.device, config.workers)
    rank, world, device = process
    torch.manual_seed(config.seed)
    folder = Path(config.out) / config.name
    saved = open_run(folder, config, process)  # the checkpoint to go on from; None: a new run
    weights = read_weights(config.init) if config.init and not saved else None

    # ============ data ============
    train_files = {"images": config.train_images, "labels": config.train_labels, "names": config.train_list}
    val_files = {"images": config.val_images, "labels": config.val_labels, "names": config.val_list}
    files, options, info = {"train": train_files, "val": val_files}, shapes_options(config), None
    if config.dataset == "folder":
        info = data.folder_info(config.data, files, config.classes)
    resolve(config, process, RECIPES.get(config.dataset, RECIPES["camvid"]), saved, weights, info)
    torch.backends.cudnn.benchmark = config.crop is not None  # all images of one size
    train_set = data.segmentation_dataset(
        config.dataset, config.data, "train", train=True, crop=config.crop, short_sides=config.short_sides,
        info=info, **train_files, **options)
    val_set = data.segmentation_dataset(
        config.dataset, config.data, "val", train=False, info=info, **val_files, **options)
    check_labels(train_set, val_set)
    loader = data.train_loader(train_set, config.batch, config.workers, config.seed, rank, world)
    eval_batch = config.eval_batch or val_set.eval_batch
    val_loader = data.pass_loader(val_set, eval_batch, config.workers, rank, world)
    classes = list(train_set.info.classes)

    # ============ network ============
    model_args = dict(
        variant=config.variant, task="segmentation", num_classes=len(classes), layers=config.layers,
        width=config.width, gate=config.gate)
    if saved:
        model_args = saved["model_args"]  # the json of --route need not be there any more
    elif config.route:
        baselines = extra("baselines", f"--route {config.route}")
        model_args["route"] = baselines.read_route(config.route, config.layers).tolist()
    model = make_model(model_args, config, process, saved, weights)
    optimizer = make_optimizer(model, config)

    def learning_rate(step: int) -> float:
        """Warm-up, and poly decay with power 0.9."""
        return warm_up(config, step) * (1 - step / config.iters) ** 0.9

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate)
    network = distribute(model, process, config.compile)
    bank = make_bank(model, config, train_set, device)

    # ============ resuming ============
    done, best, next_kmeans, log_bytes = 0, -math.inf, config.kmeans_every, 0
    if saved is not None:
        check_same(saved, config, train_set, classes)
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        bank.load_state_dict(saved["bank"])
        done, best = saved["iteration"], saved["best"]
        next_kmeans, log_bytes = saved["next_kmeans"], saved["log_bytes"]
        del saved
    log = Log(folder, config, process, train_set, done, log_bytes)
    # What evaluate.py needs to know:
    about = dict(
        model_args=model_args, task="segmentation", dataset=config.dataset, data=config.data,
        data_options=options, files=files, info=info and dataclasses.asdict(info), classes=classes,
        names=fingerprint(train_set), palette=[list(color) for color in train_set.info.palette],
        config=vars(config))

    # ============ the alternation ============
    precision = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=config.amp)
    batches = data.forever(loader, done)
    for iteration in range(done + 1, config.iters + 1):
        torch.manual_seed(data.mix_seeds(config.seed, rank, iteration))  # as in a run that was resumed
        network.train()
        evaluating = iteration % config.eval_every == 0 or iteration == config.iters
        saving = evaluating or iteration % config.save_every == 0
        logging = saving or iteration % config.log_every == 0
        images, masks, index = next(batches)
        pixels = images.to(device, non_blocking=True)  # uint8 [B, 3, H, W]
        images = data.normalize(pixels)
        masks = masks.to(device, non_blocking=True).long()
        index = index.to(bank.values.device, non_blocking=True)

        # (1) SGD on theta, centres fixed: L = L_task + lambda1 L_cost + lambda2 L_clustering (eq. 3). Each
        # term is a number, weighted already, of this rank's images; the log has it as loss_NAME.
        with precision():
            out = network(images)
        A = out.routes.activations(config.gate_space)  # [B, 3·nodes]
        terms = {"task": segmentation_loss(out.logits.float(), masks, world)}
        hinge = None  # the clustering loss of each image
        if config.lambda1:
            total = model.backbone.costs(*images.shape[-2:]).full  # C_all
            ramp = budget_ramp((iteration - 1) / config.iters, start=0.4, length=0.02)
            terms["cost"] = config.lambda1 * ramp * cost_loss(out.cost, total, config.budget)
        clusters = bank.clusters
        if config.lambda2 and clusters is not None:
            own = clusters.nearest(A.detach())[0] if config.own == "nearest" else clusters.labels[index]
            hinge = clustering_loss(
                A, clusters.centers, clusters.sigma2, config.margin, own, reduction="none")  # [B]
            terms["clustering"] = config.lambda2 * hinge.mean()
        optimizer.zero_grad(set_to_none=world == 1)  # see `distribute`
        sum(terms.values()).backward()
        gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)
        if config.k and config.metric == "views" and iteration % VIEWS_EVERY == 0:
            # The same images with another look: K-means counts little what that changes in A(x).
            with torch.no_grad(), precision():
                other = model.routes(data.normalize(data.change_look(pixels)))
            bank.update_views(A, other.activations(config.gate_space))
        lr = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        log.add(terms, gradient_norm, index)

        # (2) K-means, theta fixed, over the latest A(x) of the images that the last --bank-age iterations
        # saw. Without lambda2 no loss reads the clusters: they are for the log and for evaluation. A network
        # without gates has no --k.
        bank.update(index, A)
        due = iteration >= next_kmeans or iteration == config.iters
        if config.k and due and bank.count >= config.k:
            log.checked_means(iteration)  # K-means must not see what is not finite
            if config.activations == "recompute":
                full_pass = data.pass_loader(
                    train_set, config.batch // world, config.workers, rank, world, wrap=True,
                    seed=(config.seed, iteration))
                inputs = ((data.normalize(x.to(device)), which) for x, _, which in full_pass)
                with precision():
                    recompute_activations(model, bank, inputs, config.gate_space)
            if config.oracle:
                bank.cluster_known(train_set.subset, config.k)
            else:
                metric = bank.view_metric() if config.metric == "views" else None
                bank.cluster(
                    config.k, config.seed + iteration, restarts=config.kmeans_restarts, metric=metric)
            next_kmeans = iteration + kmeans_interval(config, iteration)
            log.clusters(iteration, bank)

        # ============ logging, evaluating, saving ============
        improved = False
        if logging:
            log.steps_line(iteration, lr, about_step(model, out, images.shape[-2:], hinge))
        if evaluating:
            bn_loader = data.train_loader(  # in another order than training
                train_set, config.batch, config.workers, config.seed + 1, rank, world)
            bn_batches = itertools.islice(data.forever(bn_loader), config.bn_batches)
            inputs = (data.normalize(x.to(device)) for x, _, _ in bn_batches)
            reestimate_batch_norm(model, inputs, world)
            del bn_loader, bn_batches, inputs  # and with them its processes
            result = evaluate.evaluate_segmentation(model, val_loader, len(classes), process)
            score = result.miou()
            improved = score > best
            best = score if improved else best
            log.evaluation(iteration, f"mIoU {100 * score:.2f}", result.flops, result.scores())
        if saving and rank == 0:
            contents = about | dict(
                bank=bank.state_dict(), optimizer=optimizer.state_dict(), schedule=schedule.state_dict(),
                iteration=iteration, best=best, next_kmeans=next_kmeans, log_bytes=log.bytes())
            for name in ["best.pt", "last.pt"] if improved else ["last.pt"]:
                save_checkpoint(folder / name, model, **contents)
    finish(folder, config, process, log)


def check_labels(train_set, val_set) -> None:
    """Raises InputError where nothing can be learned, or nothing evaluated: mIoU would be nan."""
    for split, dataset in (("train", train_set), ("val", val_set)):
        if not dataset.has_truth:
            words = f"as of every image of {split}, all pixels of its label are void; correct the ids"
            raise InputError(f"{dataset.image_name(0)}: {words}")


def shapes_options(config: argparse.Namespace) -> dict:
    """What the settings say of the shapes data set; of another, what does not apply to it."""
    return {key: getattr(config, key) for key in ("subsets", "size") if getattr(config, key)}


# ============ what both training loops share: the network ============


def make_model(model_args: dict, config, process: Process, saved: dict | None, weights) -> nn.Module:
    """The model on its device, with weights of the checkpoint `saved`, of --init, or random ones."""
    model = build_model(**model_args)
    if saved is not None:
        model.load_state_dict(saved["weights"])
    elif weights is not None:
        report = initialize(model, weights, config.init)
        if process.rank == 0:
            print(f"{config.init}: {report}")
    model = model.to(process.device)
    if process.world > 1 and process.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def distribute(model: nn.Module, process: Process, compile: bool = False) -> nn.Module:
    """The network to call in a training step; with several processes it averages gradients over them.

    Gradients are then views of the buckets that travel. They stay from step to step, and start laid out as
    the weights are: a new gradient of a 1x1 convolution can have other strides, and would be copied.
    """
    network = model
    if process.world > 1:
        devices = [process.device] if process.device.type == "cuda" else None
        known = inspect.signature(DistributedDataParallel).parameters
        of_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        network = DistributedDataParallel(  # from torch 2.14 on that has the first of these names
            model, device_ids=devices, gradient_as_bucket_view=True, **{of_buffers: False})
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    return torch.compile(network) if compile else network


def make_optimizer(model: nn.Module, config: argparse.Namespace) -> torch.optim.SGD:
    """SGD with momentum, in one pass over the weights.

    Norm layers have no weight decay; gates have --gate-lr times the learning rate.
    """
    gates = [module for module in model.modules() if isinstance(module, Gate)]
    in_gates = {id(part) for gate in gates for part in gate.modules()}
    weights: dict[tuple, list] = {(1.0, config.weight_decay): []}  # by factor of the rate, and weight decay
    for module in model.modules():
        factor = config.gate_lr if id(module) in in_gates else 1.0
        is_norm = isinstance(module, (_BatchNorm, nn.GroupNorm))
        group = weights.setdefault((factor, 0.0 if is_norm else config.weight_decay), [])
        group.extend(p for p in module.parameters(recurse=False) if p.requires_grad)
    groups = []
    for (factor, decay), parameters in weights.items():
        groups.append(dict(params=parameters, lr=factor * config.lr, weight_decay=decay))
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.SGD(groups, momentum=config.momentum, fused=fused)


def warm_up(config: argparse.Namespace, step: int) -> float:
    """Factor of the learning rate: linear from 0.001 to 1 over the first `warmup` steps."""
    return 0.001 + 0.999 * min(step / config.warmup, 1.0) if config.warmup else 1.0


def segmentation_loss(logits: Tensor, masks: Tensor, world: int) -> Tensor:
    """Cross-entropy [B, classes, H, W], [B, H, W] -> mean over the labelled pixels of all ranks, 0 if none.

    DistributedDataParallel averages gradients: so each rank returns world · its own sum / all pixels.
    """
    valid = (masks != data.IGNORE).sum()
    if world > 1:
        dist.all_reduce(valid)
    total = F.cross_entropy(logits, masks, ignore_index=data.IGNORE, reduction="sum")
    return total * world / valid.clamp(min=1)


def reestimate_batch_norm(network: nn.Module, batches, world: int) -> None:
    """Replaces the running statistics of batch norm by plain averages over `batches`, inputs of `network`.

    A node that no image reached saw zeros alone, and would amplify the first image that does reach it: its
    statistics become those of a new one, mean 0 and variance 1, as does any other variance of 0.
    """
    reached = []  # per batch: bool [1 + nodes]
    routed = isinstance(getattr(network, "backbone", None), RoutedBackbone)
    if routed:  # a routed network's output ends in the routes
        hook = network.register_forward_hook(lambda module, inputs, out: reached.append(out[-1].reached))
    update_bn(batches, network)
    if world > 1:  # without SyncBatchNorm, on CPUs, each rank saw its own images
        for name, buffer in network.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                dist.all_reduce(buffer)
                buffer /= world
    if routed:
        hook.remove()
        counts = torch.cat(reached).sum(0)  # [1 + nodes], images
        if world > 1:
            dist.all_reduce(counts)
        for node, count in zip(network.backbone.all_nodes(), counts.tolist()):
            for part in node.modules():
                if isinstance(part, _BatchNorm) and not count:
                    part.reset_running_stats()
    for name, buffer in network.named_buffers():
        if name.endswith("running_var"):
            buffer.masked_fill_(buffer == 0, 1.0)


# ============ what both training loops share: the clusters ============


def make_bank(model: nn.Module, config, train_set, device: torch.device) -> ActivationBank:
    """The bank of the training set. Raises InputError where it cannot have the --k clusters."""
    if config.k and config.k > len(train_set):
        words = f"the training set has only {len(train_set)} images; give fewer clusters"
        raise InputError(f"--k {config.k}: {words}")
    subsets = 0 if train_set.subset is None else int(train_set.subset.max()) + 1
    if config.oracle and config.k != subsets:
        raise InputError("--oracle: needs --dataset shapes, whose subsets are known, and --k as their number")
    place = "cpu" if device.type == "mps" else device  # K-means needs float64
    age = None if config.activations == "recompute" else config.bank_age
    return ActivationBank(len(train_set), model.dim, place, age)


def kmeans_interval(config: argparse.Namespace, iteration: int) -> int:
    """Iterations until the next K-means update; it grows by --kmeans-anneal until the end of training."""
    return round(config.kmeans_every * config.kmeans_anneal ** (iteration / config.iters))


@torch.no_grad()
def recompute_activations(model: nn.Module, bank: ActivationBank, batches, gate_space: str) -> None:
    """Fills the bank anew from one pass over the training set with frozen weights (figure 2 of the paper).

    batches: (input of the model, index). Batch norm uses the statistics of each batch, as in the steps whose
    loss will see the centres, and its running statistics stay as they are.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    for images, index in batches:
        bank.update(index, model.routes(images).activations(gate_space))
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


# ============ what both training loops share: the run ============


def open_run(folder: Path, config, process: Process) -> dict | None:
    """The checkpoint that the run goes on from, or None for a new run; every rank reads it.

    Raises InputError where there is nothing to resume, and for a run that would be overwritten.
    """
    path, saved = folder / "last.pt", None
    if config.resume is None and path.exists():
        words = f"{folder} holds a run already; go on with --resume, or choose another name"
        raise InputError(f"--name {config.name}: {words}")
    if not path.exists() and (folder / "best.pt").exists():
        words = f"{folder} has best.pt but no last.pt; copy it to that and --resume, or choose another name"
        raise InputError(f"--name {config.name}: {words}")
    if path.exists():
        saved = read_file(path, "a checkpoint of this run; put best.pt in its place, or remove both")
        if "log_bytes" not in saved or saved["config"].keys() != vars(config).keys():
            words = "no checkpoint that this script, in this version, can go on from; choose another --name"
            raise InputError(f"{path}: {words}")
    if process.world > 1:
        at = torch.tensor(saved["iteration"] if saved else 0, device=process.device)
        first = at.clone()
        dist.broadcast(first, 0)
        if at != first:
            raise InputError(f"--out {config.out}: must be one folder, on a disk that all machines share")
    if saved is None and config.resume == "yes":
        raise InputError(f"--resume: {folder} holds no run to go on with; start it without --resume")
    return saved


def check_same(saved: dict, config, train_set, classes: list) -> None:
    """Raises InputError where the run that goes on would be another: data, classes or a setting differ."""
    started = f"--resume: {config.name} was started with other"
    same_images = len(saved["bank"]["values"]) == len(train_set)
    if not same_images or saved.get("names", fingerprint(train_set)) != fingerprint(train_set):
        raise InputError(f"{started} data; choose another --name")
    if saved["classes"] != classes:
        raise InputError(f"{started} classes; choose another --name")
    if saved.get("info") and saved["info"]["label_ids"] != train_set.info.label_ids:
        raise InputError(f"{started} ids of the classes; repeat their table")
    for key, value in saved["config"].items():
        now = vars(config)[key]
        if key not in evaluate.INCIDENTAL and json.dumps(now) != json.dumps(value):
            was, shown = f"with {value}; repeat that", f"{as_flag(key)} {now}"
            if isinstance(value, bool) or value is None:
                was = "with it; repeat that" if value else "without it; leave it out"
                shown = as_flag(key) if isinstance(value, bool) else shown
            raise InputError(f"{shown}: {config.name} was started {was}, or choose another --name")


def fingerprint(dataset) -> int:
    """A number that differs for other images, and for another order, by which the bank knows them."""
    names = "\n".join(dataset.image_name(index) for index in range(len(dataset)))
    return zlib.crc32(names.encode(errors="surrogateescape"))


class Log:
    """log.jsonl, one json line per event, and the progress bar: both on the first process alone.

    Loss terms stay on the device until a line is due. Reading them then is when the loop waits for it.
    """

    def __init__(self, folder: Path, config, process: Process, train_set, done: int, log_bytes: int):
        if process.rank == 0:
            make_folder(folder, "--out")
        self.folder, self.config, self.process, self.train_set = folder, config, process, train_set
        self.values: dict[str, list[Tensor]] = {}  # since the last line
        self.started, self.index = time.perf_counter(), None
        self.bar = tqdm(
            total=config.iters, initial=done, desc=config.name, disable=process.rank > 0, dynamic_ncols=True)
        if process.rank == 0:
            resolved = vars(config) | {"device": str(process.device), "processes": process.world}
            (folder / "config.json").write_text(json.dumps(resolved, indent=2) + "\n")
            self.file = open(folder / "log.jsonl", "a", buffering=1)
            self.file.truncate(min(log_bytes, self.file.tell()))  # what came after the checkpoint comes again

    def bytes(self) -> int:
        """Length of the log, all of which is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.tell()

    def write(self, event: str, iteration: int, **values) -> None:
        if self.process.rank == 0:
            line = evaluate.as_json({"event": event, "iteration": iteration, **values})
            self.file.write(line + "\n")

    def add(self, terms: dict[str, Tensor], gradient_norm: Tensor, index: Tensor) -> None:
        """A step's loss terms, as they enter the sum; index: the images of the step."""
        values = {f"loss_{name}": term.detach() for name, term in terms.items()}
        for name, value in (values | {"gradient_norm": gradient_norm}).items():
            self.values.setdefault(name, []).append(value)
        self.index = index
        self.bar.update()

    def checked_means(self, iteration: int) -> dict[str, float]:
        """Means of what was added since the last line, over the steps that had it and over all ranks.

        Raises InputError, on all ranks, where one is not finite: nothing broken is saved.
        """
        values = torch.stack([torch.stack(added).float().mean() for added in self.values.values()])
        if self.process.world > 1:
            dist.all_reduce(values)
            values /= self.process.world
        means = dict(zip(self.values, values.tolist()))
        broken = [f"{name} is {value}" for name, value in means.items() if not math.isfinite(value)]
        if broken:
            images = ", ".join(self.train_set.image_name(i) for i in self.index.tolist())
            kept = f"; {self.folder}/last.pt is from before" if (self.folder / "last.pt").exists() else ""
            words = f"{', '.join(broken)}; the last images were {images}; try a lower --lr{kept}"
            raise InputError(f"iteration {iteration}: {words}")
        return means

    def steps_line(self, iteration: int, lr: float, of_last: dict[str, Tensor]) -> None:
        """A line about the steps since the last line, with more about the last step.

        Raises InputError as `checked_means` does.
        """
        steps = len(self.values["gradient_norm"])
        self.values |= {name: [value] for name, value in of_last.items()}
        means = {name: float(f"{value:.6g}") for name, value in self.checked_means(iteration).items()}
        speed = steps * self.config.batch / (time.perf_counter() - self.started)
        self.write("train", iteration, **means, lr=lr, images_per_second=speed)
        shown = {name: value for name, value in means.items() if name not in of_last}
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in (shown | {"images/s": speed}).items()})
        self.values, self.started = {}, time.perf_counter()

    def clusters(self, iteration: int, bank: ActivationBank) -> None:
        """Sizes, inter, intra and sigma2 after a K-means update; a collapse is said in words."""
        if self.process.rank > 0:
            return
        clusters = bank.clusters
        A = bank.values[bank.recent]
        labels = clusters.nearest(A)[0]
        inter, intra = inter_intra(A, labels, clusters.centers, max_samples=500)
        collapse = describe_collapse(clusters.sizes, inter, intra)
        health = dict(
            sizes=clusters.sizes, inter=inter, intra=intra, sigma2=clusters.sigma2,
            intra_to_centre=intra_to_centre(A, labels, clusters.centers))
        self.write("kmeans", iteration, **health, collapse=collapse)
        if collapse:
            self.bar.write(f"iteration {iteration}: {collapse}")

    def evaluation(self, iteration: int, words: str, flops: dict[str, Tensor], scores: dict) -> None:
        """Scores and cost on val."""
        self.started = time.perf_counter()  # the evaluation is no training step
        if self.process.rank == 0:
            gflops = {count: cost.double().mean().item() / 1e9 for count, cost in flops.items()}
            self.write("evaluation", iteration, **scores, gflops=gflops)
            costs = ", ".join(f"{value:.3g} ({count})" for count, value in gflops.items())
            self.bar.write(f"iteration {iteration}: {words} on val, GFLOPs per image {costs}")


def about_step(model: nn.Module, out, size: tuple[int, int], hinge: Tensor | None) -> dict[str, Tensor]:
    """Of the step just done: G multiply-adds per image, what ran and what alpha expects of cells and paths.

    hinge_active: the share of images that the clustering loss, `hinge` [B], moves; the others are beyond its
    margin, or, with --own bank, were not seen before the last K-means.
    """
    parts = model.real_cost(out.routes, *size, model.counts[0])
    real = sum(parts.values()).double().mean()
    routed = sum(parts[part].double().mean() for part in ("cells", "paths") if part in parts)
    costs = {"real": real, "expected": real - routed + out.cost.detach().cpu().double().mean()}
    found = {f"gflops_{name}": (cost.float() / 1e9).to(out.cost.device) for name, cost in costs.items()}
    return found if hinge is None else found | {"hinge_active": (hinge > 0).float().mean()}


def finish(folder: Path, config: argparse.Namespace, process: Process, log: Log) -> None:
    """Ends the run; on shapes, which are small enough, with the whole report."""
    log.bar.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    if process.rank == 0:
        if config.dataset == "shapes":
            evaluate.main([f"{folder}/last.pt"], Process(0, 1, process.device))
        else:
            print(f"{folder}/last.pt is done; evaluate it: python evaluate.py {folder}/last.pt")


if __name__ == "__main__":
    main()
