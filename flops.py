"""What a network costs in multiply-adds, before it is trained, and in seconds.

    python flops.py                                      # the published networks, everything open
    python flops.py --variant divdr-a --size 1024 2048   # one network, part by part
    python flops.py --task detection --variant r50-fpn   # one detector: its backbone, and the whole
    python flops.py --route u-net                        # a static network of the routing space
    python flops.py speed                                # inference, by how much of the network is open
    python flops.py speed --compile --onnx               # also compiled, and by onnxruntime
    python flops.py speed --train --size 768 768 --batch 8 --device cuda --amp
    python flops.py kmeans --k 2 4 8                     # beside scikit-learn where it is installed

Two counts: "paper", as the published code of Dynamic Routing reports it, and "exact", what this code runs.
Both count multiply-adds, in G (10^9); with every gate open they are upper bounds of what an image costs.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import io
import math
import statistics
import sys
import time
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kmeans import kmeans
from model import (
    VARIANTS, Exportable, InputError, Parser, build_model, count_multiply_adds, number, one_line_errors,
    published_results, read_route, start_process,
)
from routing import DOWN, KEEP, OPEN, ROUTES, UP, RoutedBackbone, fuse, resize

# ============ multiply-adds ============

# Rows of the published tables: label, layers, scales, classes of the head or None, height, width.
PUBLISHED = [
    ("Layer16 + head", 16, 4, 19, 1024, 2048),
    ("Layer16 + head", 16, 4, 19, 768, 768),
    ("Layer33 + head", 33, 4, 19, 1024, 2048),
    ("Layer17", 17, 5, None, 800, 800),
]


def open_cost(layers, scales, classes: int | None, height: int, width: int, gate: str, count: str) -> int:
    """Multiply-adds of an image through a network 64 wide with every gate open; `classes` adds the head."""
    with torch.device("meta"):  # shapes alone: no weights are made
        if classes is None:
            network = backbone = RoutedBackbone(layers, gate=gate, scales=scales)
        else:
            network = build_model("dr-raw", "segmentation", classes, layers=layers, gate=gate)
            backbone = network.backbone
    return int(sum(network.real_cost(backbone.open_routes(), height, width, count).values()))


def print_published() -> None:
    kinds = [("full", "paper"), ("small", "paper"), ("full", "exact"), ("small", "exact")]
    print("G multiply-adds of an image, every gate open")
    print(f"{'network':16}{'input':>12}" + "".join(f"{f'{gate}, {count}':>14}" for gate, count in kinds))
    for label, layers, scales, classes, height, width in PUBLISHED:
        costs = [open_cost(layers, scales, classes, height, width, *kind) / 1e9 for kind in kinds]
        print(f"{label:16}{f'{height}x{width}':>12}" + "".join(f"{cost:14.3f}" for cost in costs))
    print("\nStatic networks, beside what is published of them; paper: convolutions and linear layers alone")
    titles = ("paper", "exact", "published", "difference")
    print(f"{'network':32}{'--variant':19}{'input':>9}" + "".join(f"{title:>11}" for title in titles))
    for row in published_results():
        if not row["gate"]:
            print_static(row)


def print_static(row: dict[str, str]) -> None:
    """A row of the papers' tables, and what that network costs here if it can be built."""
    variant, published = row["variant"], float(row["gflops"])
    task, classes, size = "detection", 80, (800, 800)
    if row["measure"] == "mIoU":
        task, classes, size = "segmentation", 19, (1024, 2048)
    line = f"{row['method'] + ', ' + row['backbone']:32}{variant or '-':19}{'x'.join(map(str, size)):>9}"
    if not variant:
        return print(f"{line}{'-':>11}{'-':>11}{published:11.1f}{'-':>11}")
    model = build_model(variant, task, classes)
    paper, exact = (model.real_cost(None, *size, count)["network"].item() / 1e9 for count in model.counts)
    percent = round(100 * (paper / published - 1), 1) + 0.0  # no -0.0
    print(f"{line}{paper:11.3f}{exact:11.3f}{published:11.1f}{f'{percent:+.1f} %':>11}")


def print_cost(argv: list[str]) -> None:
    """One network at one size: stem, cells, paths, gates, head, and their sum, in every count it has."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--variant", choices=list(VARIANTS), help="the network; without it, a table of the published ones")
    add("--route", metavar="NAME",
        help=f"a fixed route without gates: {', '.join(ROUTES)}, or FILE:NAME of a json that "
             "evaluate.py --experts wrote")
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
    if arguments.variant is None:
        if argv:
            parser.error(f"{argv[0]} describes one network: name it with --variant")
        return print_published()
    detection = arguments.task == "detection"
    height, width = arguments.size or ([800, 800] if detection else [1024, 2048])
    classes = arguments.classes or (80 if detection else 19)
    torch.manual_seed(0)
    options = dict(short_sides=(min(height, width),), long_side=max(height, width)) if detection else {}
    if arguments.route:
        options["route"] = read_route(arguments.route, arguments.layers or 16)
    model = build_model(
        arguments.variant, arguments.task, classes, arguments.layers, arguments.width, arguments.gate,
        **options)
    routes = model.backbone.open_routes() if model.dim else None
    costs = {count: model.real_cost(routes, height, width, count) for count in model.counts}
    parameters = sum(p.numel() for p in model.parameters())
    size = f"{height}x{width}, {classes} classes, {parameters:,} parameters"
    if routes is None:
        print(f"{arguments.route or arguments.variant}, {size}")
    else:
        print(f"{arguments.variant}, {size}; all gates open")
    print(f"{'G multiply-adds':16}" + "".join(f"{count:>12}" for count in costs))
    rows = {part: [cost[part].item() for cost in costs.values()] for part in costs[model.counts[0]]}
    rows["sum"] = [sum(parts) for parts in zip(*rows.values())]
    for part, numbers in rows.items():
        print(f"{part:16}" + "".join(f"{show(cost / 1e9):>12}" for cost in numbers))
    if detection:
        image = torch.rand(3, height, width)
        whole = show(count_multiply_adds(model.eval(), [image], elementwise=False) / 1e9)
        print(f"the whole detector on noise, convolutions and linear layers, by torch's counter: {whole}")
    if routes is not None:
        budgeted = show(model.budgeted_cost(height, width) / 1e9)
        print(f"the budget is a share of cells + paths (paper): {budgeted}")


def add_network(add) -> None:
    """The flags that say what network."""
    add("--layers", type=int, help="layers; by default 16, in detection 17")
    add("--width", type=int, help="channels at stride 4; by default 64")
    add("--gate", choices=["full", "small"], help="kind of gate; by default the variant's")


def show(value: float) -> str:
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
            decided = F.relu(torch.tanh(node.logits(x)))
            weight = decided if alpha is None else alpha[:, row]
            weight, row = weight[..., None, None, None], row + 1
            h = F.relu(node.cell.body(x) + x)
            closed = (weight.sum(1) < OPEN).to(x.dtype)
            y = {KEEP: F.relu(h) * weight[:, KEEP] + x * closed}
            if node.up is not None:
                up = node.up(F.relu(h))
                up = resize(up, scale_factor=2)
                y[UP] = up * weight[:, UP]
            if node.down is not None:
                down = F.conv2d(F.relu(h), node.down[0].weight, stride=2)
                y[DOWN] = node.down[1:](down) * weight[:, DOWN]
            for path, delivered in y.items():
                to = s + path - 1
                following[to] = following[to] + delivered if to in following else delivered
        arrived = [following[s] for s in sorted(following)]
    return model.head(arrived)


def mixed_routes(backbone: RoutedBackbone, height: int, width: int, openness: float) -> tuple[Tensor, float]:
    """A random route of which `openness` of the backbone's multiply-adds run.

    Returns alpha [1, 1 + nodes, 3], 0 for what is not reached, and the share that does run.
    """
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(1, 1 + backbone.num_nodes, 3, generator=generator)
    images = torch.zeros(1, 3, backbone.stride, backbone.stride)
    full = sum(backbone.real_cost(backbone.open_routes(), height, width, "exact").values()).item()

    def at(share: float) -> tuple[Tensor, float]:
        routes = backbone.route(images, skip=True, alpha=0.9 * (draws < share))[1]
        cost = sum(backbone.real_cost(routes, height, width, "exact").values())
        return routes.alpha, cost.double().mean().item() / full

    low, high = 0.0, 1.0
    for _ in range(8 if openness < 1 else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle)[1] < openness else (low, middle)
    return at(high)


@torch.no_grad()
def set_gates(backbone: RoutedBackbone, alpha: Tensor) -> None:
    """Makes gates say alpha [1 + nodes, 3], in [0, 1), whatever the image."""
    for node, row in zip(backbone.all_nodes(), alpha.tolist()):
        wanted = [row[path] for path in (KEEP, UP, DOWN) if node.exists[path]]
        node.gate.decide.weight.zero_()
        node.gate.decide.bias.copy_(torch.tensor([math.atanh(a) if a > 0 else -1.0 for a in wanted]))


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


def in_onnxruntime(network, images: Tensor):
    """A function that runs `network` in onnxruntime with torch's threads, and on what: "CPU" or "CUDA"."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would slow the others
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(network, (images,))
        converted = torch.onnx.export(program, (images,), dynamo=True, verbose=False)
    wanted = ["CUDAExecutionProvider"] * images.is_cuda + ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(
        converted.model_proto.SerializeToString(), options, providers=wanted)
    feed = {session.get_inputs()[0].name: images.cpu().numpy()}

    def run() -> Tensor:
        return torch.from_numpy(session.run(None, feed)[0])

    return run, session.get_providers()[0].removesuffix("ExecutionProvider")


def fixed_contenders(model: nn.Module, images: Tensor, compiled: bool, onnx: bool) -> dict:
    """Inference of the network of one route, all its ways. model: routed, all its images have that route."""
    route = model.backbone.route(images[:1], skip=True)[1].alpha[0] > OPEN
    network = Exportable(fuse(model.cut(route))).eval()
    contenders = {"fixed": lambda: network(images)}
    if compiled:
        with torch.no_grad(), torch._inductor.config.patch(freezing=True):  # weights become constants
            quick = torch.compile(network, dynamic=False)
            quick(images)
        contenders["fixed, compiled"] = lambda: quick(images)
    if onnx:
        run, place = in_onnxruntime(network, images)
        contenders[f"fixed, onnxruntime {place}"] = run
    if images.is_cuda:
        contenders["fixed, CUDA graph"] = in_cuda_graph(network, images)
    return contenders


def inference_contenders(
    model: nn.Module, images: Tensor, openness: list[float], compiled: bool, onnx: bool
) -> dict:
    """Inference of a routed network, all its ways: name -> a function that gives logits.

    At the shares of `openness` all images have one route. What has the same name up to the first comma
    computes the same.
    """
    published = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    host = copy.deepcopy(model.backbone).cpu()
    network = fuse(copy.deepcopy(model))
    arranged = images.contiguous(memory_format=torch.channels_last)

    def run(alpha: Tensor, skip: bool):
        return lambda: network.head(network.backbone.route(arranged, skip, alpha)[0])

    every = mixed_routes(host, *images.shape[-2:], openness=1.0)[0].to(images.device)
    every = every.expand(len(images), -1, -1)
    contenders = {"all open, as published": lambda: run_as_published(published, images, every)}
    contenders["all open, dense"] = run(every, skip=False)
    contenders["all open, skipping"] = run(every, skip=True)
    for share in sorted(set(openness), reverse=True):
        alpha, real = mixed_routes(host, *images.shape[-2:], share)
        if abs(real - share) > 0.05:
            words = f"the nearest here is {real:.2f}: stem and gates always run"
            raise InputError(f"--openness {share}: cannot be had; {words}")
        routed = copy.deepcopy(model)
        set_gates(routed.backbone, alpha[0])
        ways = {"skipping": functools.partial(run_skipping, fuse(copy.deepcopy(routed)), arranged)}
        ways |= fixed_contenders(routed, arranged, compiled, onnx)
        contenders |= {f"{100 * real:.3g} % open, {way}": call for way, call in ways.items()}
    return contenders


def run_skipping(network: nn.Module, images: Tensor) -> Tensor:
    """Logits of a routed segmentation network that runs image by image, without closed work."""
    return network.head(network.backbone.route(images, skip=True)[0])


def training_contenders(model: nn.Module, images: Tensor, amp: bool, compiled: bool) -> dict:
    """A training step, all its ways: forward, loss, backward and SGD."""
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

    network = torch.compile(model) if compiled else model
    name = "training, here" + ", bfloat16" * amp + ", compiled" * compiled
    return {
        "training, as published": step(published, lambda: run_as_published(published, images), amp=False),
        name: step(network, lambda: network(images).logits, amp, fused=True),
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
    add("--openness", type=number(float, 0.01, 1), nargs="+", default=[0.75, 0.5, 0.25],
        help="inference: shares of the backbone's multiply-adds that run")
    add("--train", action="store_true", help="a training step in place of inference")
    add("--amp", action="store_true", help="training in bfloat16")
    add("--compile", action="store_true",
        help="training with torch.compile; in inference also fixed routes compiled, a minute or two for each")
    add("--onnx", action="store_true",
        help="inference: also fixed routes by onnxruntime; needs onnx, onnxscript and onnxruntime")
    add("--runs", type=number(int, 1), default=5, help="runs of each, in turns")
    add("--device", help="cpu, cuda or mps; by default the best there is")
    arguments = parser.parse_args(argv)
    if arguments.train and min(arguments.batch) == 1 and min(arguments.size) < 256:
        parser.error("--batch 1: batch norm needs several values per channel; give a --size of at least 256")
    if arguments.amp and not arguments.train:
        parser.error("--amp: is of training; give --train too")
    if arguments.onnx and arguments.train:
        parser.error("--onnx: is of inference; leave --train out")
    for package in ("onnx", "onnxscript", "onnxruntime") if arguments.onnx else ():
        if importlib.util.find_spec(package) is None:
            parser.error(f"--onnx: needs the package {package}: pip install onnx onnxscript onnxruntime")
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
        torch._dynamo.reset()  # it compiles the same code for a few networks only
        with torch.inference_mode(not arguments.train):
            if arguments.train:
                contenders = training_contenders(model, images, arguments.amp, arguments.compile)
            else:
                contenders = inference_contenders(
                    model, images, arguments.openness, arguments.compile, arguments.onnx)
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
    first = statistics.median(next(iter(seconds.values())))
    print(f"  {'':34}{'median s':>10}{'min':>10}{'max':>10}{'ratio':>8}" + f"{'peak MiB':>10}" * bool(peaks))
    for name, times in seconds.items():
        median = statistics.median(times)
        numbers = "".join(f"{value:10.4f}" for value in (median, min(times), max(times)))
        peak = f"{peaks[name]:10.0f}" if name in peaks else ""
        print(f"  {name:34}{numbers}{median / first:8.2f}{peak}   {notes.get(name, '')}".rstrip())


@one_line_errors(InputError)
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    commands = {"speed": print_speed, "--speed": print_speed, "kmeans": print_kmeans}
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    print_cost(argv)


if __name__ == "__main__":
    main()
