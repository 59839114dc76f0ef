"""What a network costs in multiply-adds, before it is trained, and in seconds.

    python flops.py                                      # the routed networks of the papers, everything open
    python flops.py --published                          # and the static ones, beside what is published
    python flops.py --variant divdr-a --size 1024 2048   # one network, part by part; or --route u-net
    python flops.py speed                                # inference, or --train: a training step
    python flops.py kmeans --k 2 4 8                     # beside scikit-learn where it is installed

Two counts: "paper", as the published code of Dynamic Routing reports it, and "exact", what this code runs.
Both count multiply-adds, in G (10^9), which the papers call GFLOPs; with every gate open they are upper
bounds of what an image costs.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import statistics
import sys
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from kmeans import kmeans
from model import (
    ROUTES, VARIANTS, InputError, Parser, build_model, extra, number, one_line_errors, start_process, table,
)
from routing import DOWN, KEEP, OPEN, UP, RoutedBackbone, fuse, resize

# ============ multiply-adds ============

# Rows of the published tables: label, layers, scales, classes of the head or None, height, width.
PUBLISHED = [
    ("Layer16 + head", 16, 4, 19, 1024, 2048),
    ("Layer16 + head", 16, 4, 19, 768, 768),
    ("Layer33 + head", 33, 4, 19, 1024, 2048),
    ("Layer17", 17, 5, None, 800, 800),
]
GATES = ("full", "small")


def open_cost(layers, scales, classes: int | None, height: int, width: int, gate: str) -> dict[str, int]:
    """Multiply-adds, by count, of an image through a network 64 wide with every gate open; `classes` adds the
    head."""
    if classes is None:
        network = backbone = RoutedBackbone(layers, gate=gate, scales=scales)
    else:
        network = build_model("dr-raw", "segmentation", classes, layers=layers, gate=gate)
        backbone = network.backbone
    routes = backbone.open_routes()
    return {c: int(sum(network.real_cost(routes, height, width, c).values())) for c in ("paper", "exact")}


def print_published(static: bool) -> None:
    """The routed networks of the papers and, if asked for, the static ones that they compare with."""
    papers = extra("published", "--published").rows_of(("segmentation", "detection")) if static else []
    rows = [["network", "input", *(f"{gate}, {count}" for count in ("paper", "exact") for gate in GATES)]]
    for label, layers, scales, classes, height, width in PUBLISHED:
        costs = [open_cost(layers, scales, classes, height, width, gate) for gate in GATES]
        shown = [three_places(cost[count] / 1e9) for count in ("paper", "exact") for cost in costs]
        rows.append([label, f"{height}x{width}", *shown])
    print(f"G multiply-adds of an image, every gate open\n{table(rows)}")
    if not static:
        return
    rows = [["network", "--variant", "input", "paper", "exact", "published", "difference"]]
    for row in papers:
        if row["gate"]:
            continue
        task, classes, size = "detection", 80, (800, 800)
        if row["measure"] == "mIoU":
            task, classes, size = "segmentation", 19, (1024, 2048)
        cells, published = ["-", "-", row["gflops"], "-"], float(row["gflops"])
        if row["variant"]:
            model = build_model(row["variant"], task, classes)
            paper, exact = (model.real_cost(None, *size, c)["network"].item() / 1e9 for c in model.counts)
            percent = round(100 * (paper / published - 1), 1) + 0.0  # no -0.0
            cells = [three_places(paper), three_places(exact), row["gflops"], f"{percent:+.1f} %"]
        name = f"{row['method']}, {row['backbone']}"
        rows.append([name, row["variant"] or "-", "x".join(map(str, size)), *cells])
    words = "Static networks, beside what is published of them; paper: convolutions and linear layers alone"
    print(f"\n{words}\n{table(rows)}")


def print_cost(argv: list[str]) -> None:
    """One network at one size: stem, cells, paths, gates, head, and their sum, in every count it has."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--published", action="store_true", help="list the static networks of the papers' tables too")
    add("--variant", choices=list(VARIANTS), help="the network; without it, a table of the papers' own")
    add("--route", metavar="NAME",
        help=f"a fixed route without gates: {', '.join(ROUTES)}, or FILE:NAME of an experts.json")
    add("--task", choices=["segmentation", "detection"], default="segmentation", help="what for")
    add("--size", type=number(int, 32), nargs=2, metavar=("H", "W"),
        help="height and width; by default 1024 2048, in detection 800 800")
    add("--classes", type=number(int, 1), help="classes of the head; by default 19, in detection 80")
    add_network(add)
    arguments = parser.parse_args(argv)
    if arguments.route and arguments.task == "detection":
        parser.error("--route: is of segmentation; leave --task out")
    if arguments.route and arguments.variant is None:
        arguments.variant = "fixed-route"
    if arguments.variant and arguments.published:
        parser.error("--published: lists networks without --variant and --route; leave it out")
    if arguments.variant is None:
        others = [flag for flag in argv if flag != "--published"]
        if others:
            parser.error(f"{others[0]} describes one network: name it with --variant")
        return print_published(arguments.published)
    detection = arguments.task == "detection"
    height, width = arguments.size or ([800, 800] if detection else [1024, 2048])
    classes = arguments.classes or (80 if detection else 19)
    torch.manual_seed(0)
    options = dict(short_sides=(min(height, width),), long_side=max(height, width)) if detection else {}
    if arguments.route:
        baselines = extra("baselines", f"--route {arguments.route}")
        options["route"] = baselines.read_route(arguments.route, arguments.layers or 16)
    model = build_model(
        arguments.variant, arguments.task, classes, arguments.layers, arguments.width, arguments.gate,
        **options)
    routes = model.backbone.open_routes() if model.dim else None
    costs = {count: model.real_cost(routes, height, width, count) for count in model.counts}
    parameters = sum(p.numel() for p in model.parameters())
    gates = "; all gates open" if model.dim else ""
    name = arguments.route or arguments.variant
    print(f"{name}, {height}x{width}, {classes} classes, {parameters:,} parameters{gates}")
    parts = {part: [cost[part].item() for cost in costs.values()] for part in costs[model.counts[0]]}
    parts["sum"] = [sum(of_part) for of_part in zip(*parts.values())]
    rows = [["G multiply-adds", *costs]]
    rows += [[part, *(three_places(cost / 1e9) for cost in of_part)] for part, of_part in parts.items()]
    print(table(rows, left=1))
    if detection:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()([torch.rand(3, height, width)])
        whole = three_places(counter.get_total_flops() / 2 / 1e9)
        print(f"the whole detector on noise, convolutions and linear layers, by torch's counter: {whole}")
    if model.dim:
        full = three_places(model.backbone.costs(height, width).full / 1e9)
        print(f"the budget is a share of cells + paths (paper): {full}")


def add_network(add) -> None:
    """The flags that say what network."""
    add("--layers", type=int, help="layers; by default 16, in detection 17")
    add("--width", type=int, help="channels at stride 4; by default 64")
    add("--gate", choices=GATES, help="kind of gate; by default the variant's")


def three_places(value: float) -> str:
    """Three digits after the point, or, of small numbers, three that count."""
    return f"{value:.3f}" if value >= 1 or value == 0 else f"{value:.3g}"


# ============ speed ============


def run_as_published(model: nn.Module, images: Tensor, alpha: Tensor | None = None) -> Tensor:
    """Logits of a routed segmentation network, computed the way the published code does: every node for every
    image, batch norm by itself, a ReLU of its own for each path, closed paths multiplied by zero.

    model: contiguous. alpha: [B, 1 + nodes, 3], in place of what the gates say (they run all the same), 0 for
    nodes that nothing reaches; None: the gates decide, and reach every node.
    """
    backbone, row = model.backbone, 0
    arrived = [backbone.stem(images)]
    for layer in [[backbone.init], *backbone.layers]:
        following: dict[int, Tensor] = {}
        for s, (node, x) in enumerate(zip(layer, arrived)):
            decided = F.relu(torch.tanh(node.gate(x)))
            weight = decided if alpha is None else alpha[:, row]
            weight, row = weight[..., None, None, None], row + 1
            h = F.relu(node.cell.body(x) + x)
            closed = (weight.sum(1) < OPEN).to(x.dtype)
            y = {KEEP: F.relu(h) * weight[:, KEEP] + x * closed}
            if node.up is not None:
                y[UP] = resize(node.up(F.relu(h)), scale_factor=2) * weight[:, UP]
            if node.down is not None:
                down = F.conv2d(F.relu(h), node.down[0].weight, stride=2)
                y[DOWN] = node.down[1:](down) * weight[:, DOWN]
            for path, delivered in y.items():
                to = s + path - 1
                following[to] = following[to] + delivered if to in following else delivered
        arrived = [following[s] for s in sorted(following)]
    return model.head(arrived)


@torch.no_grad()
def close_gates(backbone: RoutedBackbone, share: float) -> None:
    """Makes gates say the same for every image: about `share` of the paths, drawn at random, are open."""
    generator = torch.Generator().manual_seed(0)
    for node in backbone.all_nodes():
        node.gate.decide.weight.zero_()
        opened = torch.rand(len(node.paths), generator=generator) < share
        node.gate.decide.bias.copy_(opened * 2.5 - 1)


def in_cuda_graph(network, images: Tensor):
    """A function that runs `network` on images of this size as one graph of kernels."""
    static, side = images.clone(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # nothing may be set up while the graph is recorded
        for _ in range(3):
            network(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = network(static)

    def run() -> Tensor:
        static.copy_(images)
        graph.replay()
        return out

    return run


def inference_contenders(model: nn.Module, images: Tensor, opened: list[float]) -> dict:
    """Inference of a routed network with such shares of its paths open, in all ways: name -> a function that
    gives logits. What has the same name up to the first comma computes the same."""
    arranged, contenders = images.contiguous(memory_format=torch.channels_last), {}

    def run(network, skip: bool) -> Tensor:
        return network.head(network.backbone.route(arranged, skip)[0])

    for share in sorted({1.0, *opened}, reverse=True):
        routed = copy.deepcopy(model)
        close_gates(routed.backbone, share)
        routes = routed.backbone.route(arranged[:1])[1]
        size, everything = images.shape[-2:], routed.backbone.open_routes()
        costs = [routed.backbone.real_cost(which, *size, "exact") for which in (routes, everything)]
        real, full = (sum(parts.values()).item() for parts in costs)
        name, alpha = f"{100 * real / full:.3g} % open", routes.alpha.expand(len(images), -1, -1)
        published = copy.deepcopy(routed).to(memory_format=torch.contiguous_format)
        fixed, network = fuse(routed.cut(routes.alpha[0] > OPEN)).eval(), fuse(routed)
        contenders[f"{name}, as published"] = functools.partial(run_as_published, published, images, alpha)
        contenders[f"{name}, dense"] = functools.partial(run, network, skip=False)
        contenders[f"{name}, skipping"] = functools.partial(run, network, skip=True)
        contenders[f"{name}, its route fixed"] = lambda fixed=fixed: fixed(arranged).logits
        if images.is_cuda:
            contenders[f"{name}, fixed, CUDA graph"] = in_cuda_graph(lambda x: fixed(x).logits, arranged)
    return contenders


def training_contenders(model: nn.Module, images: Tensor, amp: bool) -> dict:
    """A training step, both its ways: forward, loss, backward and SGD."""
    published = copy.deepcopy(model).to(memory_format=torch.contiguous_format)

    def step(network, logits, amp: bool, **options):
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, **options)

        def run():
            network.train()
            with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
                out = logits()
            optimizer.zero_grad(set_to_none=True)
            out.float().square().mean().backward()
            optimizer.step()
            return out.detach()

        return run

    return {
        "training, as published": step(published, lambda: run_as_published(published, images), amp=False),
        "training, here" + ", bfloat16" * amp: step(model, lambda: model(images).logits, amp, fused=True),
    }


def print_speed(argv: list[str]) -> None:
    """Seconds, and on a GPU peak memory, beside the published way of computing the same; random weights."""
    parser = Parser("Measure inference or training of a segmentation network here.")
    add = parser.add_argument
    routed = [name for name, variant in VARIANTS.items() if not variant.static]
    add("--variant", choices=routed, default="divdr-a", help="the network")
    add("--size", type=number(int, 32), nargs=2, metavar=("H", "W"), default=[512, 1024], help="of images")
    add("--classes", type=number(int, 1), default=19, help="classes of the head")
    add_network(add)
    add("--batch", type=number(int, 1), nargs="+", default=[1, 8], help="images at a time")
    add("--openness", type=number(float, 0, 1), nargs="+", default=[0.5, 0.3, 0.15],
        help="inference: shares of paths that are open; the share of multiply-adds that runs is printed")
    add("--train", action="store_true", help="a training step in place of inference")
    add("--amp", action="store_true", help="training in bfloat16")
    add("--runs", type=number(int, 1), default=5, help="runs of each, in turns")
    add("--device", help="cpu, cuda or mps; by default the best there is")
    arguments = parser.parse_args(argv)
    if arguments.train and min(arguments.batch) == 1 and min(arguments.size) < 256:
        parser.error("--batch 1: batch norm needs several values per channel; give a --size of at least 256")
    if arguments.amp and not arguments.train:
        parser.error("--amp: is of training; give --train too")
    device = start_process(arguments.device).device
    torch.backends.cudnn.benchmark = arguments.train  # as train_seg.py does
    torch.manual_seed(0)
    sizes = (arguments.layers, arguments.width, arguments.gate)
    model = build_model(arguments.variant, "segmentation", arguments.classes, *sizes).to(device)
    for module in model.modules():  # one batch's statistics keep the numbers in a common range
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(4, 3, 128, 128, device=device))
    model.eval()
    height, width = (side + -side % model.backbone.stride for side in arguments.size)
    work = "training" if arguments.train else "inference"
    print(f"{arguments.variant}, {height}x{width}, {work}; {machine(device)}")
    for batch in arguments.batch:
        images = torch.randn(batch, 3, height, width, device=device)
        print(f"batch {batch}; difference: the largest of a logit, over the largest logit")
        with torch.inference_mode(not arguments.train):
            if arguments.train:
                contenders = training_contenders(model, images, arguments.amp)
            else:
                contenders = inference_contenders(model, images, arguments.openness)
            notes = describe_differences(contenders)
            seconds, peaks = time_in_turns(contenders, arguments.runs, device)
        print_seconds(seconds, peaks, notes)


def describe_differences(contenders: dict) -> dict[str, str]:
    """By name, how far each is from the first whose name is the same up to the first comma."""
    references, notes = {}, {}
    for name, run in contenders.items():
        output = run().cpu()
        reference = references.setdefault(name.split(",")[0], output)
        difference = (output - reference).abs().max() / reference.abs().max()
        notes[name] = f"difference {difference.item():.1e}"
    return notes


# ============ K-means ============


def example(n: int, dim: int) -> Tensor:
    """Data like gate activations, [n, dim] in [0, 1): relu(tanh(·)) of logits in 16 overlapping groups."""
    generator = torch.Generator().manual_seed(0)
    groups, factors = torch.randn(16, 12, generator=generator), torch.randn(12, dim, generator=generator)
    place = groups[torch.randint(16, (n,), generator=generator)]
    place += 0.6 * torch.randn(n, 12, generator=generator)
    noise = 0.1 * torch.randn(n, dim, generator=generator)
    return (place @ factors / 12**0.5 + noise + 0.5).tanh_().relu_()


def print_kmeans(argv: list[str]) -> None:
    """Seconds of K-means from its first K samples, beside scikit-learn's, which runs on the CPU."""
    parser = Parser("Measure K-means here, beside scikit-learn's Lloyd where that is installed.")
    add = parser.add_argument
    add("--n", type=number(int, 1), default=118_287, help="samples; by default COCO's training set")
    add("--dim", type=number(int, 1), default=198, help="their length; by default that of Layer17's A(x)")
    add("--k", type=number(int, 1), nargs="+", default=[2, 4, 8], help="clusters")
    add("--iters", type=number(int, 1), default=20, help="iterations at most")
    add("--runs", type=number(int, 1), default=5, help="runs of each, in turns")
    add("--device", default="cpu", help="where kmeans.py runs; not mps, which has no float64")
    arguments = parser.parse_args(argv)
    n, iters = arguments.n, arguments.iters
    if n < max(arguments.k):
        parser.error(f"--n {n}: must be at least --k")
    device = start_process(arguments.device).device
    print(f"K-means, N = {n}, D = {arguments.dim}, at most {iters} iterations; {machine(device)}")
    x = example(n, arguments.dim).to(device)
    for k in arguments.k:
        init = x[:k].clone()
        contenders = {"kmeans.py": lambda: kmeans(x, k, init, iters)[2]}  # reads a number, so it has finished
        with contextlib.suppress(ImportError):
            from sklearn.cluster import KMeans

            theirs = KMeans(k, init=init.cpu().numpy(), n_init=1, max_iter=iters, tol=0, algorithm="lloyd")
            contenders["scikit-learn, CPU"] = lambda: theirs.fit(x.cpu().numpy()).inertia_
        print(f"K = {k}")
        notes = {name: f"inertia {run():.6g}" for name, run in contenders.items()}
        print_seconds(time_in_turns(contenders, arguments.runs, device)[0], {}, notes)


# ============ measuring ============


def machine(device: torch.device) -> str:
    names = {"cpu": f"CPU, {torch.get_num_threads()} threads", "mps": "MPS"}
    return f"torch {torch.__version__}, {names.get(device.type) or torch.cuda.get_device_name(device)}"


def time_in_turns(contenders: dict, runs: int, device: torch.device) -> tuple[dict, dict]:
    """By name: seconds of each of `runs` runs, after one to warm up; on CUDA the peak MiB above the start."""
    seconds, peaks = {name: [] for name in contenders}, {}
    for turn in range(runs + 1):
        for name, run in contenders.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                peaks[name] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
            elif device.type == "mps":
                torch.mps.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds, peaks


def print_seconds(seconds: dict[str, list], peaks: dict[str, float], notes: dict[str, str]) -> None:
    """One row per contender: median, min and max, and the ratio of its median to the first one's."""
    rows = [["", "median s", "min", "max", "ratio", *["peak MiB"] * bool(peaks), ""]]
    first = statistics.median(next(iter(seconds.values())))
    for name, times in seconds.items():
        median = statistics.median(times)
        numbers = [f"{value:.4f}" for value in (median, min(times), max(times))]
        peak = [f"{peaks[name]:.0f}"] if peaks else []
        rows.append([name, *numbers, f"{median / first:.2f}", *peak, notes.get(name, "")])
    print(table(rows, left=1))


@one_line_errors(InputError)
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    commands = {"speed": print_speed, "kmeans": print_kmeans}
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    print_cost(argv)


if __name__ == "__main__":
    main()
