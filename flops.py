"""What a network costs in multiply-adds, before it is trained, and in seconds.

    python flops.py                                              # the published networks, everything open
    python flops.py --variant divdr-a --size 1024 2048           # one network, part by part
    python flops.py --variant dr-raw --size 360 480 --layers 8 --width 16 --classes 11
    python flops.py --task detection --variant r50-fpn           # one detector: backbone and, apart, the rest
    python flops.py --speed                                      # seconds and memory, by how much of the network is open
    python flops.py --speed --train --variant divdr-a --size 768 768 --batch 8 --device cuda --amp

Two counts: "paper", as the published code of Dynamic Routing reports it, and "exact", what this code runs. Both count
multiply-adds, in G (10^9); with every gate open they are upper bounds of what an image costs.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import weakref

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kmeans import ActivationBank
from model import VARIANTS, InputError, OneLineParser, build_model, one_line_errors, start_process
from routing import DOWN, KEEP, OPEN, UP, RoutedBackbone, fuse

# (label, layers, scales, classes of the head or None, height, width): rows of the published tables
PUBLISHED = [
    ("Layer16 + head", 16, 4, 19, 1024, 2048),
    ("Layer16 + head", 16, 4, 19, 768, 768),
    ("Layer33 + head", 33, 4, 19, 1024, 2048),
    ("Layer17", 17, 5, None, 800, 800),
]


def open_cost(layers: int, scales: int, classes: int | None, height: int, width: int, gate: str, count: str) -> int:
    """Multiply-adds of one image through a network of width 64 with every gate open; the head only with `classes`."""
    if classes is None:
        network = RoutedBackbone(layers, gate=gate, scales=scales)
        routes = network.open_routes()
    else:
        network = build_model("dr-raw", "segmentation", classes, layers=layers, gate=gate)
        routes = network.backbone.open_routes()
    return int(sum(network.real_cost(routes, height, width, count).values()))


def print_published() -> None:
    print("G multiply-adds of an image, every gate open")
    print(f"{'network':16}{'input':>12}{'full gate':>12}{'small gate':>12}{'full, exact':>14}{'small, exact':>14}")
    for label, layers, scales, classes, height, width in PUBLISHED:
        size = (layers, scales, classes, height, width)
        paper = [open_cost(*size, gate, "paper") / 1e9 for gate in ("full", "small")]
        exact = [open_cost(*size, gate, "exact") / 1e9 for gate in ("full", "small")]
        print(f"{label:16}{f'{height}x{width}':>12}", *(f"{g:11.3f}" for g in paper), *(f"{g:13.3f}" for g in exact))
    static = build_model("r50-fpn", "detection", 80)
    paper, exact = (sum(static.real_cost(None, 800, 800, count).values()).item() / 1e9 for count in ("paper", "exact"))
    print(f"{'ResNet-50-FPN':16}{'800x800':>12}{paper:12.3f}{'-':>12}{exact:14.3f}{'-':>14}   (torchvision's; paper: convolutions alone)")


def print_breakdown(arguments: argparse.Namespace) -> None:
    """One network at one size: stem, cells, paths, gates, head, and their sum, in every count it has."""
    model = build_model(
        arguments.variant, arguments.task, arguments.classes, arguments.layers, arguments.width, arguments.gate,
        **({"masks": True} if arguments.task == "detection" else {})
    )  # fmt: skip
    height, width = arguments.size
    routes = model.backbone.open_routes() if model.dim else None
    costs = {count: model.real_cost(routes, height, width, count) for count in model.counts}
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{arguments.variant}, {height}x{width}, {arguments.classes} classes, {parameters:,} parameters; all gates open")
    print(f"{'G multiply-adds':16}" + "".join(f"{count:>12}" for count in costs))
    for part in next(iter(costs.values())):
        print(f"{part:16}" + "".join(f"{cost[part].item() / 1e9:12.3f}" for cost in costs.values()))
    print(f"{'sum':16}" + "".join(f"{sum(cost.values()).item() / 1e9:12.3f}" for cost in costs.values()))
    if arguments.task == "detection":
        rest = model.rest_cost(height, width, proposals=1000, detections=100)
        print("outside the backbone, exact, with 1000 proposals and the masks of 100 detections: "
              + ", ".join(f"{part} {cost / 1e9:.3f}" for part, cost in rest.items()))  # fmt: skip
    if routes is not None:
        print(f"the budget is a share of cells + paths (paper): {model.budgeted_cost(height, width) / 1e9:.3f}")


# ============ speed ============


def run_as_published(model: nn.Module, images: Tensor, alpha: Tensor | None = None) -> Tensor:
    """Logits of a routed segmentation network, computed the way the published code does: every node for every image,
    batch norm by itself, a ReLU of its own for each path, closed paths multiplied by zero. `model` is contiguous.

    alpha: [B, 1 + nodes, 3], in place of what the gates say (they run all the same), 0 for nodes that nothing reaches;
    None: the gates decide, and reach every node.
    """
    backbone, row = model.backbone, 0
    arrived = [nn.Sequential.forward(backbone.stem, images)]  # whole, not in strips
    for layer in [[backbone.init], *backbone.layers]:
        following: dict[int, Tensor] = {}
        for s, (node, x) in enumerate(zip(layer, arrived)):
            decided = F.relu(torch.tanh(node.logits(x)))
            weight, row = (decided if alpha is None else alpha[:, row])[..., None, None, None], row + 1
            h = F.relu(node.cell.body(x) + x)
            closed = (weight.sum(1) < OPEN).to(x.dtype)
            y = {KEEP: F.relu(h) * weight[:, KEEP] + x * closed}
            if node.up is not None:
                up = node.up(F.relu(h))
                y[UP] = F.interpolate(up, scale_factor=2, mode="bilinear", align_corners=False) * weight[:, UP]
            if node.down is not None:
                y[DOWN] = node.down[1:](F.conv2d(F.relu(h), node.down[0].weight, stride=2)) * weight[:, DOWN]
            for path, delivered in y.items():
                to = s + path - 1
                following[to] = following[to] + delivered if to in following else delivered
        arrived = [following[s] for s in sorted(following)]
    return model.head(arrived)


def mixed_routes(backbone: RoutedBackbone, batch: int, height: int, width: int, openness: float) -> tuple[Tensor, float]:
    """Random routes, another for each image, of which `openness` of the backbone's multiply-adds run, and the share that
    does: alpha [B, 1 + nodes, 3], 0 for what is not reached."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(batch, 1 + backbone.num_nodes, 3, generator=generator)
    small = torch.zeros(batch, 3, backbone.stride, backbone.stride)
    full = sum(backbone.real_cost(backbone.open_routes(), height, width, "exact").values()).item()

    def at(share: float):
        routes = backbone.route(small, skip=True, alpha=0.9 * (draws < share))[1]
        return routes.alpha, sum(backbone.real_cost(routes, height, width, "exact").values()).double().mean().item() / full

    low, high = 0.0, 1.0
    for _ in range(8 if openness < 1 else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle)[1] < openness else (low, middle)
    return at(high)


class PeakMemory(TorchDispatchMode):
    """Inside it, the most bytes that tensors made there hold at a time, in `peak`. On a GPU torch counts itself."""

    def __init__(self):
        super().__init__()
        self.held, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in before | self.known:
                storage = leaf.untyped_storage()
                self.known.add(storage._cdata)
                self.held += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.held)
        return result

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.held -= size


def peak_bytes(run, device: torch.device) -> int:
    """The most memory that `run` takes beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with PeakMemory() as memory:
        run()
    return memory.peak


def seconds_of(contenders: dict, runs: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each of `runs` runs, the contenders in turns, after one run of each to warm up."""
    seconds = {name: [] for name in contenders}
    for turn in range(runs + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            elif device.type == "mps":
                torch.mps.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def inference_contenders(model: nn.Module, images: Tensor, openness: list[float]) -> dict:
    """Inference of a routed network, all its ways: name -> a function that gives logits."""
    published = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    backbone, size = model.backbone, images.shape[-2:]
    host = copy.deepcopy(backbone).cpu()
    network = fuse(copy.deepcopy(model))
    arranged = images.contiguous(memory_format=torch.channels_last)

    def run(alpha: Tensor, skip: bool):
        return lambda: network.head(network.backbone.route(arranged, skip, alpha)[0])

    every = mixed_routes(host, len(images), *size, openness=1.0)[0].to(images.device)
    contenders = {"as published": lambda: run_as_published(published, images, every)}
    contenders |= {"all open, dense": run(every, skip=False), "all open, skipping": run(every, skip=True)}
    for share in sorted(set(openness), reverse=True):
        alpha, real = mixed_routes(host, len(images), *size, share)
        if abs(real - share) > 0.05:
            raise InputError(f"--openness {share}: cannot be had; the nearest here is {real:.2f}, the stem and gates always run")
        contenders[f"{100 * real:.0f} % open, skipping"] = run(alpha.to(images.device), skip=True)
    return contenders


def training_contenders(model: nn.Module, images: Tensor, amp: bool, compiled: bool) -> dict:
    """A training step, all its ways: forward, loss, backward and SGD."""
    published = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    kind = images.device.type

    def step(network, parameters, logits, amp: bool, **options):
        optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, **options)

        def run():
            network.train()
            with torch.autocast(kind, torch.bfloat16, enabled=amp):
                out = logits()
            optimizer.zero_grad(set_to_none=True)
            out.float().square().mean().backward()
            optimizer.step()
            return out.detach()

        return run

    network = torch.compile(model) if compiled else model
    contenders = {"as published": step(published, published.parameters(), lambda: run_as_published(published, images), False)}
    name = "training" + ", bfloat16" * amp + ", compiled" * compiled
    contenders[name] = step(network, model.parameters(), lambda: network(images).logits, amp, fused=True)
    return contenders


def alternation_seconds(model: nn.Module, images: Tensor, samples: int, runs: int, every: int = 50, k: int = 3) -> dict[str, float]:
    """What K-means every `every` steps adds to each of them with a training set of `samples` images: median seconds by
    what K-means sees. The activations are noise, a tenth of which has changed since the centres were found: dozens of
    iterations, where activations that have clusters take a few."""
    device = torch.device("cpu") if images.device.type == "mps" else images.device  # K-means needs float64
    bank = ActivationBank(samples, model.dim, device)
    generator = torch.Generator(device).manual_seed(0)
    bank.values.uniform_(generator=generator)
    bank.seen.fill_(True)
    centers = bank.cluster(k).centers
    bank.values.lerp_(torch.rand(bank.values.shape, generator=generator, device=device), 0.1)
    A, index, passes = bank.values[: len(images)].clone(), torch.arange(len(images)), samples / len(images)

    @torch.no_grad()
    def see_batch():
        model(images)

    parts = {"update": lambda: bank.update(index, A), "K-means": lambda: bank.cluster(k, centers), "batch": see_batch}
    seconds = {name: statistics.median(times) for name, times in seconds_of(parts, runs, images.device).items()}
    return {"bank": seconds["update"] + seconds["K-means"] / every,
            "recompute": (seconds["K-means"] + passes * (seconds["batch"] + seconds["update"])) / every}  # fmt: skip


def print_speed(arguments: argparse.Namespace) -> None:
    device = start_process(arguments.device).device
    torch.manual_seed(0)
    model = build_model(arguments.variant, "segmentation", arguments.classes, arguments.layers, arguments.width, arguments.gate)
    if not model.dim:
        raise InputError(f"--variant {arguments.variant}: has no routes; give one that has, such as divdr-a")
    model = model.to(device)
    for module in model.modules():  # statistics that keep the numbers in a common range: one batch's own
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(4, 3, 128, 128, device=device))
    model.eval()
    machine = {"cpu": f"CPU, {torch.get_num_threads()} threads", "mps": "MPS"}.get(device.type) or torch.cuda.get_device_name(device)
    height, width = (side + -side % model.backbone.stride for side in arguments.size)
    print(f"{arguments.variant}, {height}x{width}, {'training' if arguments.train else 'inference'}; torch {torch.__version__}, {machine}")
    print("difference: the largest of a logit, over the largest logit")
    print(f"{'batch':>5}  {'':24}{'median s':>10}{'min':>9}{'max':>9}{'ratio':>8}{'peak MiB':>10}{'difference':>12}")
    for batch in arguments.batch:
        images = torch.randn(batch, 3, height, width, device=device)
        with torch.inference_mode(not arguments.train):
            if arguments.train:
                contenders = training_contenders(model, images, arguments.amp, arguments.compile)
            else:
                contenders = inference_contenders(model, images, arguments.openness)
            outputs = {name: run() for name, run in contenders.items() if "skipping" not in name or "all" in name}
            peaks = {name: peak_bytes(run, device) for name, run in contenders.items()}
            seconds = seconds_of(contenders, arguments.runs, device)
        first = statistics.median(seconds["as published"])
        for name, times in seconds.items():
            median = statistics.median(times)
            reference = outputs["as published"]
            difference = ((outputs[name] - reference).abs().max() / reference.abs().max()).item() if name in outputs else None
            print(f"{batch:5}  {name:24}{median:10.3f}{min(times):9.3f}{max(times):9.3f}{median / first:8.2f}{peaks[name] / 2**20:10.0f}"
                  + ("" if difference is None else f"{difference:12.1e}"))  # fmt: skip
        if arguments.train:
            *_, ours = seconds.values()
            step = statistics.median(ours)
            extra = alternation_seconds(model, images, arguments.samples, arguments.runs)
            print(f"       K-means over {arguments.samples} images every 50 steps, of such a step: "
                  + ", ".join(f"--activations {kind} {100 * cost / step:.3g} %" for kind, cost in extra.items()))  # fmt: skip


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=list(VARIANTS), help="cost of this network, instead of the table")
    parser.add_argument("--task", choices=["segmentation", "detection"], help="what for (default: segmentation)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"),
                        help="height and width (default: 1024 2048; with --speed 512 1024; in detection 800 800)")  # fmt: skip
    parser.add_argument("--classes", type=int, help="classes of the head (default: 19, in detection 80)")
    parser.add_argument("--layers", type=int, help="layers (default: 16, in detection 17)")
    parser.add_argument("--width", type=int, help="channels at stride 4 (default: 64)")
    parser.add_argument("--gate", choices=["full", "small"], help="kind of gate (default: the variant's)")
    speed = parser.add_argument_group("speed", "measured here, with random weights; everything else is in --variant (default: divdr-a)")
    speed.add_argument("--speed", action="store_true", help="seconds and peak memory, beside the published way of computing the same")
    speed.add_argument("--train", action="store_true", help="a training step in place of inference")
    speed.add_argument("--batch", type=int, nargs="+", help="images at a time (default: 1 8; training: 8)")
    speed.add_argument("--openness", type=float, nargs="+", help="shares of the backbone's multiply-adds that run (default: 0.75 0.5 0.25)")
    speed.add_argument("--runs", type=int, help="runs of each, in turns (default: 5)")
    speed.add_argument("--device", help="cpu, cuda or mps; by default the best there is")
    speed.add_argument("--samples", type=int, help="training set of which to say what K-means costs (default: 2975, Cityscapes)")
    speed.add_argument("--amp", action="store_true", help="training in bfloat16")
    speed.add_argument("--compile", action="store_true", help="training with torch.compile")
    arguments = parser.parse_args()
    of_training = ("amp", "compile", "samples")
    measured = ("train", "batch", "openness", "runs", "device", *of_training)
    if arguments.speed:
        arguments.variant = arguments.variant or "divdr-a"
        arguments.batch = arguments.batch or ([8] if arguments.train else [1, 8])
        arguments.runs = 5 if arguments.runs is None else arguments.runs
        if arguments.task == "detection":
            parser.error("--speed measures segmentation networks; leave --task out")
        for name in of_training if not arguments.train else ():
            if getattr(arguments, name):
                parser.error(f"--{name} is of training: give --train too")
        arguments.samples = 2975 if arguments.samples is None else arguments.samples
        if arguments.train and arguments.samples < max(3, *arguments.batch):
            parser.error("--samples must be at least 3, and at least --batch")
        if arguments.train and arguments.openness:
            parser.error("--openness is of inference: leave out --train")
        arguments.openness = arguments.openness or [0.75, 0.5, 0.25]
        if min(*arguments.batch, arguments.runs) < 1 or not 0 < min(arguments.openness) <= max(arguments.openness) <= 1:
            parser.error("--batch and --runs take numbers of at least 1, --openness shares between 0 and 1")
    for name in measured:
        if not arguments.speed and getattr(arguments, name):
            parser.error(f"--{name} says how to measure: give --speed too")
    given = [name for name, value in vars(arguments).items() if value not in (None, False) and name != "variant"]
    if arguments.variant is None:
        if given:
            parser.error(f"--{given[0]} describes one network: name it with --variant")
        print_published()
        return
    arguments.task = arguments.task or "segmentation"
    detection = arguments.task == "detection"
    usual = [800, 800] if detection else [512, 1024] if arguments.speed else [1024, 2048]
    arguments.size = arguments.size or usual
    arguments.classes = (80 if detection else 19) if arguments.classes is None else arguments.classes
    if arguments.train and min(arguments.batch) == 1 and min(arguments.size) < 256:
        parser.error("--batch 1: in training batch norm needs several values per channel; use more images or a --size of at least 256")
    if min(arguments.size) < 32 or arguments.classes < 1:
        parser.error("--size takes two sides of at least 32 pixels, --classes a number of at least 1")
    with one_line_errors(InputError):
        (print_speed if arguments.speed else print_breakdown)(arguments)


if __name__ == "__main__":
    main()
