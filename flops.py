"""What a network costs in multiply-adds, before it is trained.

    python flops.py                                              # the published networks, everything open
    python flops.py --variant divdr-a --size 1024 2048           # one network, part by part
    python flops.py --variant dr-raw --size 360 480 --layers 8 --width 16 --classes 11
    python flops.py --task detection --variant r50-fpn           # one detector: backbone and, apart, the rest

Two counts: "paper", as the published code of Dynamic Routing reports it, and "exact", what this code runs. Both count
multiply-adds, in G (10^9); with every gate open they are upper bounds of what an image costs.
"""

from __future__ import annotations

import argparse

from model import VARIANTS, InputError, OneLineParser, build_model, one_line_errors
from routing import RoutedBackbone

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


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=list(VARIANTS), help="cost of this network, instead of the table")
    parser.add_argument("--task", choices=["segmentation", "detection"], help="what for (default: segmentation)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"),
                        help="height and width (default: 1024 2048, in detection 800 800)")  # fmt: skip
    parser.add_argument("--classes", type=int, help="classes of the head (default: 19, in detection 80)")
    parser.add_argument("--layers", type=int, help="layers (default: 16, in detection 17)")
    parser.add_argument("--width", type=int, help="channels at stride 4 (default: 64)")
    parser.add_argument("--gate", choices=["full", "small"], help="kind of gate (default: the variant's)")
    arguments = parser.parse_args()
    given = [name for name, value in vars(arguments).items() if value is not None and name != "variant"]
    if arguments.variant is None:
        if given:
            parser.error(f"--{given[0]} describes one network: name it with --variant")
        print_published()
        return
    arguments.task = arguments.task or "segmentation"
    detection = arguments.task == "detection"
    arguments.size = arguments.size or ([800, 800] if detection else [1024, 2048])
    arguments.classes = (80 if detection else 19) if arguments.classes is None else arguments.classes
    if min(arguments.size) < 32 or arguments.classes < 1:
        parser.error("--size takes two sides of at least 32 pixels, --classes a number of at least 1")
    with one_line_errors(InputError):
        print_breakdown(arguments)


if __name__ == "__main__":
    main()
