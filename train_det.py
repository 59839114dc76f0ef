"""Train a detector on a routed network: alternate SGD and K-means over the gate activations.

    python train_det.py --dataset shapes                                    # nothing to download, CPU is enough
    python train_det.py --data DIR --variant divdr-raw --masks              # one process; CUDA or CPU, as found
    torchrun --nproc_per_node 8 train_det.py --variant divdr-a              # one machine with 8 GPUs, COCO 2017
    torchrun --nproc_per_node 8 train_det.py --variant r50-fpn --init resnet50-0676ba61.pth     # torchvision's baseline
    python train_det.py --train-json A.json --train-images DIR_A --val-json B.json --val-images DIR_B    # your own data

--masks adds instance segmentation (Mask R-CNN in place of Faster R-CNN). A run writes to runs/NAME: config.json (every
resolved value), log.jsonl (one line per event), last.pt and best.pt. What this loop shares with the one for
segmentation is in train_seg.py.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import data
import losses
from model import (
    VARIANTS, InputError, Process, build_model, initialize, leave_cores_to_loaders, load_resnet50, parse_settings,
    setting, variants_of,
)  # fmt: skip
from routing import Routes, fuse
from train_seg import (
    Experts, Run, RunConfig, choose_precision, distribute, launch, make_optimizer, mean_over_processes, recompute_activations,
    reestimate_batch_norm, resolve, seed_iteration, warm_up,
)  # fmt: skip

# What differs by data set: a flag that is not given takes its value from here.
RECIPES = {
    "coco": dict(data=data.COCO_ROOT, layers=17, width=64, pyramid=256, short_sides=(800,), long_side=1333, anchor=32,
                 proposals=1000, rois=512, iters=90_000, batch=16, lr=0.02, warmup=1000, eval_every=10_000,
                 bn_batches=200, eval_batch=1, kmeans_restarts=0, own="nearest", bank_momentum=0.0),
    "shapes": dict(layers=6, width=16, pyramid=32, short_sides=(128,), long_side=128, anchor=8, size=128,
                   proposals=100, rois=64, iters=1000, batch=8, lr=0.05, warmup=50, eval_every=1000,
                   bn_batches=50, eval_batch=10, kmeans_restarts=4, lambda2=0.1, own="bank", bank_momentum=0.5),
}  # fmt: skip


@dataclass
class Config(RunConfig):
    """The settings of this script."""

    # data
    dataset: str = setting("coco", "data", "data set", choices=list(RECIPES))
    train_json: str | None = setting(None, "data", "annotations to train on, in COCO's format, in place of those in --data", type=str)
    train_images: str | None = setting(None, "data", "folder of their images", type=str)
    val_json: str | None = setting(None, "data", "annotations to evaluate on, likewise", type=str)
    val_images: str | None = setting(None, "data", "folder of their images", type=str)
    limit: int | None = setting(None, "data", "take the first N images of each split alone, to overfit on purpose", 1, type=int)
    long_side: int | None = setting(None, "data", "what the long side is at most resized to", 32, type=int)
    # model
    variant: str = setting("divdr-a", "model", "row of the method's table", choices=variants_of("detection"))
    masks: bool = setting(False, "model", "segment instances too (Mask R-CNN)")
    pyramid: int | None = setting(None, "model", "channels of P2 to P6; the heads' widths follow", 1, type=int)
    anchor: int | None = setting(None, "model", "side of the anchors at stride 4 in pixels, doubled from scale to scale", 1, type=int)
    proposals: int | None = setting(None, "model", "proposals per image in evaluation; twice as many in training", 1, type=int)
    rois: int | None = setting(None, "model", "regions per image that the box head is trained on", 1, type=int)
    init: str | None = setting(
        None, "model", "start from the weights in this file: a checkpoint of ours or of Dynamic Routing's authors, for either "
        "task; r50-fpn: torchvision's ImageNet weights of ResNet-50", type=str)
    # optimiser
    lr_steps: tuple | None = setting(
        None, "optimiser", "iterations after which the learning rate falls to a tenth (default: 2/3 and 8/9 of --iters)",
        1, type=int, nargs="+")


def learning_rate_factor(config: Config):
    """Warm-up, and a tenth after each of `lr_steps`."""
    return lambda step: warm_up(config, step) * 0.1 ** sum(step >= drop for drop in config.lr_steps)


@dataclass
class Evaluation:
    """What one pass over an evaluation set gave, on the first process."""

    detections: list[dict]  # in COCO's results format
    A: Tensor  # [N, D] gate activations, in the order of the data set
    flops: dict[str, Tensor]  # per count: [N] real multiply-adds of each image's backbone
    rest: dict[str, Tensor]  # per part outside the backbone: [N] likewise


@torch.no_grad()
def evaluate_detection(model, loader, dataset, process: Process) -> Evaluation | None:
    """Runs `model` over `loader` (this process's share) and gathers on the first process; each image counts once.

    The backbone's cost is counted at the size to which each image was resized, and at 800x800 for the papers' tables.
    """
    network = fuse(copy.deepcopy(model).eval())
    rows = []  # per image: index, detections, A, cost of the backbone by count, cost of the rest by part
    for images, _, index in tqdm(loader, "evaluating", disable=not process.first, leave=False):
        out = network([data.as_float(image.to(process.device)) for image in images])
        A = out.A.cpu()
        for b, i in enumerate(index.tolist()):
            found, routes = out.detections[b], out.routes and Routes(*(part[b : b + 1] for part in out.routes))
            costs = {count: sum(model.real_cost(routes, *out.sizes[b], count).values()).item() for count in model.counts}
            costs["paper at 800x800"] = sum(model.real_cost(routes, 800, 800, "paper").values()).item()
            rest = model.rest_cost(*out.sizes[b], out.proposals[b], len(found["boxes"]))
            rows.append((i, coco_results(dataset, i, found), A[b], costs, rest))
    if process.world > 1:
        shares = [None] * process.world if process.first else None
        dist.gather_object(rows, shares)
        if not process.first:
            return None
        rows = [row for share in shares for row in share]
    _, detections, A, costs, rest = zip(*sorted(rows, key=lambda row: row[0]))
    flops, rest = ({name: torch.tensor([cost[name] for cost in many]) for name in many[0]} for many in (costs, rest))
    return Evaluation([found for image in detections for found in image], torch.stack(A), flops, rest)


def coco_results(dataset, index: int, found: dict[str, Tensor]) -> list[dict]:
    """What the detector found in image `index`, boxes x1 y1 x2 y2 and masks [n, 1, H, W] on 0..1, in COCO's results
    format: boxes x y width height, the file's category ids, masks run-length encoded."""
    boxes, scores, labels = (found[key].cpu() for key in ("boxes", "scores", "labels"))
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
    results = [
        {"image_id": dataset.image_ids[index], "category_id": dataset.category_ids[label - 1], "bbox": box, "score": score}
        for box, score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist())
    ]
    if "masks" in found and results:
        from pycocotools import mask as rle

        masks = (found["masks"][:, 0] > 0.5).to(torch.uint8).cpu().permute(1, 2, 0).numpy()
        for result, code in zip(results, rle.encode(np.asfortranarray(masks))):
            result["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
    return results


def average_precision(dataset, detections: list[dict], kind: str) -> tuple[dict[str, float], str]:
    """pycocotools' own evaluation of COCO results on all images of the data set -> its twelve numbers, its table.

    kind: "bbox" or "segm". The numbers are on 0..1; -1 where there is nothing to measure, such as no small objects.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    names = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large",
             "AR 1", "AR 10", "AR 100", "AR small", "AR medium", "AR large")  # fmt: skip
    table = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()):
        if detections:
            detections = copy.deepcopy(detections)  # it writes into what it is given
            if kind == "segm":  # with boxes beside the masks it would take the boxes' areas for the sizes
                for found in detections:
                    del found["bbox"]
            results = dataset.coco.loadRes(detections)
        else:
            results = COCO()
            results.dataset = dataset.coco.dataset | {"annotations": []}
            results.createIndex()
        evaluator = COCOeval(dataset.coco, results, kind)
        evaluator.params.imgIds = dataset.image_ids
        evaluator.evaluate()
        evaluator.accumulate()
    with contextlib.redirect_stdout(table):
        evaluator.summarize()
    return dict(zip(names, evaluator.stats.tolist())), table.getvalue()


def to_device(images: list[Tensor], targets: list[dict], device: torch.device) -> tuple[list[Tensor], list[dict]]:
    """A batch as the detector takes it: images float on 0..1."""
    images = [data.as_float(image.to(device, non_blocking=True)) for image in images]
    return images, [{key: value.to(device, non_blocking=True) for key, value in target.items()} for target in targets]


def train(config: Config, process: Process) -> Path:
    """The whole run; returns its last checkpoint."""
    own_data = any((config.train_json, config.train_images, config.val_json, config.val_images))
    if own_data and not (config.data or all((config.train_json, config.train_images, config.val_json, config.val_images))):
        raise InputError("--train-json, --train-images, --val-json and --val-images: give all four, or --data for the rest")
    config = resolve(config, RECIPES, process.world)
    if config.lr_steps is None:
        config = dataclasses.replace(config, lr_steps=(round(config.iters * 2 / 3), round(config.iters * 8 / 9)))
    static = VARIANTS[config.variant].gate is None
    folder = Path(config.out) / config.name
    device = process.device
    config = choose_precision(config, device)
    torch.manual_seed(config.seed)
    leave_cores_to_loaders(device, config.workers)

    # ============ preparing data ============
    options = config.shapes_options() | ({"limit": config.limit} if config.limit else {})
    files = {"train": {"json": config.train_json, "images": config.train_images},
             "val": {"json": config.val_json, "images": config.val_images}}  # fmt: skip
    train_set = data.detection_dataset(
        config.dataset, config.data, "train", train=True, masks=config.masks, jitter=config.jitter, **files["train"],
        **options)
    val_set = data.detection_dataset(
        config.dataset, config.data, "val", train=False, masks=config.masks, **files["val"], **options)
    if not val_set.coco.anns:
        raise InputError(f"{config.val_json or config.data}: the annotations to evaluate on are none; give some with --val-json")
    if (train_set.classes, train_set.category_ids) != (val_set.classes, val_set.category_ids):
        raise InputError(f"--val-json {config.val_json}: its categories are not those of the training annotations")
    ranks = (process.rank, process.world)
    loader = data.train_loader(train_set, config.batch, config.workers, config.seed, *ranks)
    val_loader = data.pass_loader(val_set, config.eval_batch, config.workers, *ranks)

    # ============ building the network ============
    model_args = dict(
        variant=config.variant, task="detection", num_classes=len(train_set.classes), layers=config.layers,
        width=config.width, gate=config.gate, gate_space=config.gate_space, pyramid=config.pyramid, masks=config.masks,
        short_sides=config.short_sides, long_side=config.long_side, anchor=config.anchor, proposals=config.proposals,
        rois=config.rois, frozen=static and config.init is not None)
    model = build_model(**model_args)
    if config.init and not Run.saved_in(folder):  # a run that goes on has its own weights
        report = (load_resnet50 if static else initialize)(model, config.init)
        if process.first:
            print(f"{config.init}: {report}")
    model = model.to(device)
    if process.world > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    network = distribute(model, process, config.compile)
    optimizer = make_optimizer(model, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(config))

    # ============ opening the run folder ============
    experts = Experts(config, model.dim, train_set, device)
    about = dict(
        model_args=model_args, task="detection", dataset=config.dataset, data=config.data, data_options=options, files=files,
        classes=train_set.classes, category_ids=train_set.category_ids, palette=[list(color) for color in train_set.palette],
        mean=list(data.MEAN), std=list(data.STD), config=dataclasses.asdict(config))  # what evaluate.py needs to know
    run = Run(folder, config, process, about, model, optimizer, schedule, experts)

    def evaluate(iteration: int) -> None:
        seed_iteration(config.seed, process.rank, iteration)
        again = data.train_loader(train_set, config.batch, config.workers, config.seed + 1, *ranks, persistent=False)
        some = itertools.islice(data.forever(again), config.bn_batches)
        inputs = (model.prepare(to_device(images, [], device)[0])[0].tensors for images, _, _ in some)
        reestimate_batch_norm(model.pyramid, inputs, process)  # the heads have none
        result = evaluate_detection(model, val_loader, val_set, process)
        if not process.first:
            return run.evaluated(iteration, 0.0, "", {})
        kinds = {"box": "bbox"} | ({"mask": "segm"} if config.masks else {})
        scores = {name: average_precision(val_set, result.detections, kind)[0] for name, kind in kinds.items()}
        words = ", ".join(f"{name} AP {100 * score['AP']:.2f}" for name, score in scores.items())
        best_by = next(reversed(scores.values()))["AP"]  # of masks, where there are any
        run.evaluated(iteration, best_by, words, result.flops, **scores)

    # ============ the alternation ============
    if run.evaluation_due:  # a run that was stopped in the middle of it
        evaluate(run.iteration)
    batches = data.forever(loader, run.iteration)
    for iteration in run.iterations():
        network.train()
        images, targets, index = next(batches)
        seed_iteration(config.seed, process.rank, iteration)
        images, targets = to_device(images, targets, device)

        # (1) a step on theta: L = L_task + lambda1 L_cost + lambda2 L_clustering, centres fixed (eq. 3)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
            out = network(images, targets, **experts.probes(len(images)))
        terms = {name.removeprefix("loss_"): term for name, term in out.losses.items()}  # L_task, as torchvision splits it
        if config.lambda1:
            ramp = losses.budget_ramp((iteration - 1) / config.iters)
            share = mean_over_processes((out.cost / model.budgeted_cost(*out.padded)).mean(), process)
            terms["cost"] = config.lambda1 * ramp * losses.cost_loss(share[None], 1.0, config.budget)
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
                    recompute_activations(
                        model, experts.bank, once, lambda images: model.activations(to_device(images, [], device)[0]))
                experts.update(iteration)
                run.log_clustering(iteration)
        run.log_step(iteration, terms, dict(lr=lr, gradient_norm=gradient_norm), out, out.padded)

        # ============ saving and evaluating ============
        due = iteration % config.eval_every == 0 or iteration == config.iters
        if due or iteration % config.save_every == 0 or run.stop_agreed:
            run.save(iteration, evaluation_due=due)  # before the evaluation, which may fail
        if due:
            evaluate(iteration)
    run.close()
    return folder / "last.pt"


def main() -> None:
    launch(parse_settings(Config, __doc__, RECIPES), train)


if __name__ == "__main__":
    main()
