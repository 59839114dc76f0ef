"""Train a detector on a routed network: alternate SGD and K-means over the gate activations.

    python train_det.py --dataset shapes                            # made on the fly; a CPU is enough
    torchrun --nproc_per_node 8 train_det.py --variant divdr-a      # COCO 2017, 8 GPUs; --masks
    # torchvision's ResNet-50-FPN through the same loop
    torchrun --nproc_per_node 8 train_det.py --variant r50-fpn --init resnet50-0676ba61.pth
    # your own data in COCO's format
    python train_det.py --train-json A.json --train-images DIR_A --val-json B.json --val-images DIR_B

A run writes to runs/NAME what train_seg.py does. What the two loops share is in train_seg.py.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
from pathlib import Path

import torch
from torch import Tensor, nn

import data
import evaluate
from losses import budget_ramp, clustering_loss, cost_loss
from model import (
    VARIANTS, InputError, number, one_line_errors, read_weights, save_checkpoint, start_process,
)
from train_seg import (
    VIEWS_EVERY, Log, about_step, check_same, distribute, fingerprint, finish, kmeans_interval, make_bank,
    make_model, make_optimizer, open_run, parse, recompute_activations,
    reestimate_batch_norm, resolve, shapes_options, shared_settings, warm_up,
)

# ============ settings ============

# Defaults that differ by data set.
RECIPES = {
    "coco": dict(
        data=data.COCO_ROOT, layers=17, width=64, pyramid=256, short_sides=(800,), long_side=1333, anchor=32,
        proposals=1000, rois=512, iters=90_000, batch=16, lr=0.02, warmup=1000, eval_every=10_000,
        bn_batches=200, eval_batch=1,
    ),
    "shapes": dict(
        layers=6, width=16, pyramid=64, short_sides=(128,), long_side=128, anchor=8, size=128, proposals=100,
        rois=64, iters=3000, batch=8, lr=0.05, warmup=50, eval_every=1000, bn_batches=50, eval_batch=10,
        subsets=2, metric="views",
    ),
}


def settings(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of this script; `resolve` fills in the rest."""
    parser = shared_settings(argv, __doc__, "detection", RECIPES)
    add = parser.add_argument_group("detection").add_argument
    add("--train-json", help="annotations to train on, in COCO's format, in place of those in --data")
    add("--train-images", help="folder of their images")
    add("--val-json", help="annotations to evaluate on, likewise")
    add("--val-images", help="folder of their images")
    add("--limit", type=number(int, 1), help="use only the first N images of each split")
    add("--masks", action="store_true", help="segment instances too (Mask R-CNN)")
    add("--long-side", type=number(int, 32), help="most that the long side becomes, in pixels")
    add("--pyramid", type=number(int, 1), help="channels of P2 to P6; the heads' widths follow")
    add("--anchor", type=number(int, 1), help="side of the anchors at stride 4, doubled from scale to scale")
    add("--proposals", type=number(int, 1), help="proposals per image in evaluation, half those of training")
    add("--rois", type=number(int, 1), help="regions per image that the box head is trained on")
    add("--lr-steps", type=number(int, 1), nargs="+",
        help="iterations after which the learning rate falls to a tenth; by default 2/3 and 8/9 of --iters")
    config = parse(parser, argv)
    kind = "masks" if config.masks else "boxes"
    config.name = config.name or f"{config.dataset}-{kind}-{config.variant}-seed{config.seed}"
    config.lr_steps = config.lr_steps or [round(config.iters * 2 / 3), round(config.iters * 8 / 9)]
    return config


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
    resolve(config, process, RECIPES[config.dataset], saved, weights)

    # ============ data ============
    options = shapes_options(config) | ({"limit": config.limit} if config.limit else {})
    files = {
        "train": {"annotations": config.train_json, "images": config.train_images},
        "val": {"annotations": config.val_json, "images": config.val_images},
    }
    train_set = data.detection_dataset(
        config.dataset, config.data, "train", train=True, masks=config.masks,
        **files["train"], **options)
    val_set = data.detection_dataset(
        config.dataset, config.data, "val", train=False, masks=config.masks, **files["val"], **options)
    check_annotations(config, train_set, val_set)
    loader = data.train_loader(train_set, config.batch, config.workers, config.seed, rank, world)
    val_loader = data.pass_loader(val_set, config.eval_batch, config.workers, rank, world)

    # ============ network ============
    static = VARIANTS[config.variant].static
    model_args = dict(
        variant=config.variant, task="detection", num_classes=len(train_set.classes), layers=config.layers,
        width=config.width, gate=config.gate, pyramid=config.pyramid, masks=config.masks,
        short_sides=config.short_sides, long_side=config.long_side, anchor=config.anchor,
        proposals=config.proposals, rois=config.rois, frozen=bool(static and config.init))
    model_args = saved["model_args"] if saved else model_args  # --init need not be repeated
    model = make_model(model_args, config, process, saved, weights)
    optimizer = make_optimizer(model, config)

    def learning_rate(step: int) -> float:
        """Warm-up, and a tenth after each of `lr_steps`."""
        return warm_up(config, step) * 0.1 ** sum(step >= drop for drop in config.lr_steps)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate)
    network = distribute(model, process, config.compile)
    bank = make_bank(model, config, train_set, device)

    # ============ resuming ============
    done, best, next_kmeans, log_bytes = 0, -math.inf, config.kmeans_every, 0
    if saved is not None:
        check_same(saved, config, train_set, train_set.classes)
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        bank.load_state_dict(saved["bank"])
        done, best = saved["iteration"], saved["best"]
        next_kmeans, log_bytes = saved["next_kmeans"], saved["log_bytes"]
        del saved
    log = Log(folder, config, process, train_set, done, log_bytes)
    # What evaluate.py needs to know:
    about = dict(
        model_args=model_args, task="detection", dataset=config.dataset, data=config.data,
        data_options=options, files=files, classes=train_set.classes, category_ids=train_set.category_ids,
        palette=[list(color) for color in train_set.palette], names=fingerprint(train_set),
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
        images, targets, index = next(batches)
        images, targets = to_device(images, targets, device)
        index = index.to(bank.values.device, non_blocking=True)

        # (1) SGD on theta, centres fixed: L = L_task + lambda1 L_cost + lambda2 L_clustering (eq. 3). Each
        # term is a number, weighted already, of this rank's images; the log has it as loss_NAME.
        with precision():
            out = network(images, targets)
        A = out.routes.activations(config.gate_space)  # [B, 3·nodes]
        terms = {name.removeprefix("loss_"): loss for name, loss in out.losses.items()}  # L_task, in parts
        hinge = None  # the clustering loss of each image
        if config.lambda1:
            total = model.backbone.costs(*out.padded).full  # C_all
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
                other = model.routes(data.change_look(images), out.sizes)
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
                inputs = ((to_device(x, [], device)[0], which) for x, _, which in full_pass)
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
            log.steps_line(iteration, lr, about_step(model, out, out.padded, hinge))
        if evaluating:
            bn_loader = data.train_loader(  # in another order than training
                train_set, config.batch, config.workers, config.seed + 1, rank, world)
            bn_batches = itertools.islice(data.forever(bn_loader), config.bn_batches)
            inputs = (to_device(x, [], device)[0] for x, _, _ in bn_batches)
            padded = (model.prepare(x)[0].tensors for x in inputs)
            reestimate_batch_norm(model.pyramid, padded, world)  # the heads have none
            del bn_loader, bn_batches, inputs, padded  # and with them its processes
            result = evaluate.evaluate_detection(model, val_loader, val_set, process)
        if evaluating and rank == 0:
            scores = result.scores(val_set, config.masks)
            score = scores["mask" if config.masks else "box"]["AP"]
            improved = score > best
            best = score if improved else best
            words = ", ".join(f"{kind} AP {100 * values['AP']:.2f}" for kind, values in scores.items())
            log.evaluation(iteration, words, result.flops, scores)
        if saving and rank == 0:
            contents = about | dict(
                bank=bank.state_dict(), optimizer=optimizer.state_dict(), schedule=schedule.state_dict(),
                iteration=iteration, best=best, next_kmeans=next_kmeans, log_bytes=log.bytes())
            for name in ["best.pt", "last.pt"] if improved else ["last.pt"]:
                save_checkpoint(folder / name, model, **contents)
    finish(folder, config, process, log)


def check_annotations(config: argparse.Namespace, train_set, val_set) -> None:
    """Raises InputError where nothing can be evaluated, or what is evaluated is not what is trained."""
    if not val_set.has_truth:
        where = config.val_json or config.data
        raise InputError(f"{where}: no annotations to evaluate on; give some with --val-json")
    if (train_set.classes, train_set.category_ids) != (val_set.classes, val_set.category_ids):
        files = config.train_json or config.data, config.val_json or config.data
        raise InputError("{}: its categories are not those of {}; give both the same".format(*files))
    for dataset in (train_set, val_set):
        for index, ratio in enumerate(dataset.aspect_ratios):
            if max(ratio, 1 / ratio) > config.long_side:
                words = f"with --long-side {config.long_side} nothing is left of its short side"
                raise InputError(f"{dataset.image_name(index)}: {words}; leave it out, or cut it into parts")


def to_device(images: list[Tensor], targets: list[dict], device: torch.device):
    """A batch as the detector takes it: (images, float on 0..1; targets)."""
    images = [data.as_float(image.to(device, non_blocking=True)) for image in images]
    moved = []
    for target in targets:
        moved.append({key: value.to(device, non_blocking=True) for key, value in target.items()})
    return images, moved


if __name__ == "__main__":
    main()
