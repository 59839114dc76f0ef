"""The models: variants, segmentation networks, checkpoints, and what a command needs to start one.

    model = build_model("divdr-a", "segmentation", num_classes=19)
    logits, A, cost, routes = model(images)         # images [B, 3, H, W], normalised; any H and W

A *routed* model is a `RoutedBackbone` with a head; a *static* one is torchvision's, behind the same interface, so that
one training loop and one evaluation serve both.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.segmentation import deeplabv3_resnet101

from routing import RoutedBackbone, Routes, conv_bn, conv_cost, pad_to_stride


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line that names the file or flag and says what to do."""


@dataclass(frozen=True)
class Variant:
    """One row of the method's table: the weights of the loss terms and the kind of gate (None: no gates)."""

    gate: str | None
    lambda1: float = 0.0  # weight of the cost loss
    budget: float = 0.0  # the share of the full cost that the cost loss aims at
    lambda2: float = 0.0  # weight of the clustering loss


VARIANTS = {
    "dr-a": Variant("small", lambda1=0.8, budget=0.1),
    "dr-b": Variant("small", lambda1=0.5, budget=0.1),
    "dr-c": Variant("small", lambda1=0.5, budget=0.2),
    "dr-raw": Variant("full"),
    "divdr-a": Variant("small", lambda1=0.8, budget=0.1, lambda2=0.2),
    "divdr-raw": Variant("small", lambda2=0.2),
    "deeplabv3-r101": Variant(None),
}


class SegmentationOutput(NamedTuple):
    logits: Tensor  # [B, classes, H, W] at the size of the input
    A: Tensor  # [B, 3·nodes] gate activations, what is clustered; [B, 0] of a static model
    cost: Tensor  # [B] expected multiply-adds of cells and paths, differentiable; 0 of a static model
    routes: Routes | None


class SegmentationHead(nn.Module):
    """Features, fine to coarse, -> logits [B, classes, H, W]: from the coarsest down, conv1x1, x2, add the next finer."""

    def __init__(self, channels: list[int], num_classes: int):
        super().__init__()
        narrower = [channels[0]] + channels[:-1]
        self.laterals = nn.ModuleList(
            nn.Sequential(*conv_bn(c, c_out, kernel_size=1)) for c, c_out in zip(channels, narrower)
        )
        self.predictor = nn.Conv2d(channels[0], num_classes, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        nn.init.zeros_(self.predictor.bias)

    def forward(self, features: list[Tensor]) -> Tensor:
        y = self.laterals[-1](features[-1])
        for lateral, feature in zip(reversed(self.laterals[:-1]), reversed(features[:-1])):
            y = lateral(F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False) + feature)
        return F.interpolate(self.predictor(y), scale_factor=4, mode="bilinear", align_corners=False)

    def cost(self, height: int, width: int, count: str) -> int:
        """Multiply-adds; for `count` see `RoutedBackbone.costs`. The paper count takes a map of H/4 x H/4."""
        h, w = height // 4, (height if count == "paper" else width) // 4
        total = conv_cost(self.predictor.in_channels, self.predictor.out_channels, h, w, k=3)
        for s, lateral in enumerate(self.laterals):
            size, c_out = (h // 2**s, w // 2**s), lateral[0].out_channels
            total += conv_cost(lateral[0].in_channels, c_out, *size)
            total += 0 if count == "conv" else 3 * c_out * size[0] * size[1]  # batch norm and ReLU
        return total


class RoutedSegmenter(nn.Module):
    """A routed backbone with the segmentation head; images of any size, padded inside.

    Args:
        gate_space: "alpha", A(x) as defined; "logit", its values before the non-linearity, for the ablation of the
            supplement (7.2) only.
    """

    counts = ("paper", "exact")

    def __init__(self, num_classes: int, layers: int, width: int, gate: str, gate_space: str = "alpha"):
        super().__init__()
        self.gate_space = gate_space
        self.backbone = RoutedBackbone(layers, width, gate)
        self.head = SegmentationHead(self.backbone.channels, num_classes)

    @property
    def dim(self) -> int:
        """Length of A(x)."""
        return 3 * self.backbone.num_nodes

    def forward(self, images: Tensor, skip: bool | None = None) -> SegmentationOutput:
        height, width = images.shape[-2:]
        images = pad_to_stride(images, self.backbone.stride).contiguous(memory_format=torch.channels_last)
        features, routes = self.backbone.route(images, skip)
        logits = self.head(features)[..., :height, :width]
        A = routes.A if self.gate_space == "alpha" else routes.logits[:, 1:].flatten(1)
        return SegmentationOutput(logits, A, self.backbone.expected_cost(routes, height, width), routes)

    def budgeted_cost(self, height: int, width: int) -> int:
        """C_all of the budget: `SegmentationOutput.cost` with everything open."""
        return self.backbone.costs(height, width).budgeted

    def real_cost(self, routes: Routes, height: int, width: int, count: str = "paper") -> dict[str, Tensor]:
        """Multiply-adds of each image by part, int64 [B]: stem, cells, paths, gates, head. For `count` see
        `RoutedBackbone.costs`."""
        cost = self.backbone.real_cost(routes, height, width, count)
        stride = 1 if count == "paper" else self.backbone.stride
        head = self.head.cost(height + -height % stride, width + -width % stride, count)
        return cost | {"head": torch.full_like(cost["stem"], head)}


class StaticSegmenter(nn.Module):
    """A torchvision segmentation network behind the interface of the routed ones: no gates, no choice, one cost."""

    counts = ("exact",)
    dim = 0

    def __init__(self, build, num_classes: int):
        super().__init__()
        self.build = lambda: build(weights=None, weights_backbone=None, num_classes=num_classes, aux_loss=False)
        self.network = self.build()
        self._costs: dict[tuple, int] = {}

    def forward(self, images: Tensor) -> SegmentationOutput:
        logits = self.network(images)["out"]
        return SegmentationOutput(logits, logits.new_zeros(len(images), 0), logits.new_zeros(len(images)), None)

    def real_cost(self, routes: None, height: int, width: int, count: str = "exact") -> dict[str, Tensor]:
        """Multiply-adds of an image, int64 [1]: every image costs the same."""
        key = (height, width, count)
        if key not in self._costs:
            with torch.device("meta"):  # shapes alone: nothing is allocated, nothing computed
                twin, image = self.build().eval(), torch.empty(1, 3, height, width)
            self._costs[key] = count_multiply_adds(twin, image, elementwise=count != "conv")
        return {"network": torch.tensor([self._costs[key]])}


def count_multiply_adds(network: nn.Module, image: Tensor, elementwise: bool = True) -> int:
    """Multiply-adds of one forward pass as the papers count: convolutions and linear layers, and (`elementwise`)
    2 per element of batch norm, 1 of ReLU and of pooling; resizing and additions are not counted."""
    per_element = {nn.BatchNorm2d: 2, nn.ReLU: 1, nn.MaxPool2d: 1, nn.AdaptiveAvgPool2d: 1}
    total = 0

    def add(module, inputs, output):
        nonlocal total
        pooled = inputs[0] if isinstance(module, nn.AdaptiveAvgPool2d) else output  # every input element is summed once
        total += per_element[type(module)] * pooled.numel()

    hooks = [m.register_forward_hook(add) for m in network.modules() if elementwise and type(m) in per_element]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)
    for hook in hooks:
        hook.remove()
    return total + counter.get_total_flops() // 2  # it counts a multiply-add as two


def build_model(
    variant: str,
    task: str,
    num_classes: int,
    layers: int | None = None,
    width: int | None = None,
    gate: str | None = None,
    gate_space: str = "alpha",
) -> nn.Module:
    """The network of a variant.

    Args:
        variant: a key of `VARIANTS`.
        task: "segmentation".
        layers, width: size of a routed backbone, by default 16 and 64.
        gate: "full" or "small", by default the variant's.
        gate_space: see `RoutedSegmenter`.

    Raises InputError on an unknown variant or task, and on sizes that cannot be built or do not apply.
    """
    if variant not in VARIANTS:
        raise InputError(f"--variant {variant}: unknown; choose one of {', '.join(VARIANTS)}")
    if task != "segmentation":
        raise InputError(f"task {task!r}: unknown; known is 'segmentation'")
    if VARIANTS[variant].gate is None:
        if any(value is not None for value in (layers, width, gate)):
            raise InputError(f"--layers, --width and --gate do not apply to {variant}, a network of fixed size")
        return StaticSegmenter(deeplabv3_resnet101, num_classes)
    try:
        layers, width = 16 if layers is None else layers, 64 if width is None else width
        model = RoutedSegmenter(num_classes, layers, width, gate or VARIANTS[variant].gate, gate_space)
    except ValueError as error:
        raise InputError(f"--{error}") from None
    return model.to(memory_format=torch.channels_last)  # pointwise convolutions are matrix products on it


def save_checkpoint(path: Path | str, model: nn.Module, **contents) -> None:
    """Writes the model's weights and `contents` (tensors, numbers, strings, lists and dicts of these) at once or not
    at all: into a temporary file beside `path`, which then takes its place.

    `load_checkpoint` needs `contents` to hold "model_args", the arguments of `build_model`.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save({"weights": model.state_dict(), **contents}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: Path | str, device: torch.device | str = "cpu") -> tuple[nn.Module, dict]:
    """A file of `save_checkpoint` -> the model in evaluation mode on `device`, and the contents.

    Nothing in the file is executed. Raises InputError where it is missing, unreadable or no checkpoint.
    """
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except IsADirectoryError:
        raise InputError(f"{path}: a folder; give a checkpoint in it, such as {path}/last.pt") from None
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint; training writes them to runs/NAME/last.pt") from None
    except Exception:  # torch's reader raises anything from KeyError to struct.error on a damaged file
        raise InputError(f"{path}: not a checkpoint, or damaged, or it holds code, which is never run") from None
    if not isinstance(contents, dict) or not {"weights", "model_args"} <= contents.keys():
        raise InputError(f"{path}: holds no weights and model_args; give a file written by train_seg.py")
    try:
        model = build_model(**contents["model_args"])
        model.load_state_dict(contents["weights"])
    except (RuntimeError, TypeError, AttributeError):
        raise InputError(f"{path}: its weights do not fit the model it says it holds ({contents['model_args']})") from None
    return model.to(device).eval(), contents


def setting(default, group: str, help: str, **argument):
    """A field of a settings dataclass: its default, its group in --help, its meaning, and argparse's own keywords."""
    return dataclasses.field(default=default, metadata={"group": group, "help": help, **argument})


def parse_settings(settings, description: str, arguments: list[str] | None = None):
    """The command line -> an instance of the dataclass `settings`, each of whose fields was made by `setting`.

    Underscores become dashes. Prints one line and exits with 2 where the flags are wrong.
    """
    parser = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {}
    for field in dataclasses.fields(settings):
        argument = dict(field.metadata)
        title, text = argument.pop("group"), argument.pop("help")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        if isinstance(field.default, bool):
            argument["action"] = argparse.BooleanOptionalAction
        elif "action" not in argument:
            argument.setdefault("type", type(field.default))
        if field.default is not None and not isinstance(field.default, bool):
            text += f" (default: {field.default})"
        groups[title].add_argument(f"--{field.name.replace('_', '-')}", default=field.default, help=text, **argument)
    return settings(**vars(parser.parse_args(arguments)))


class OneLineParser(argparse.ArgumentParser):
    """argparse, without the usage in front of an error."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}; see --help\n")


@contextmanager
def one_line_errors(*kinds: type[Exception]):
    """Inside it, an exception of `kinds` becomes one line on stderr and exit status 2."""
    try:
        yield
    except kinds as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


class Process(NamedTuple):
    """This process among those that work together."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def start_process(device: str | None = None) -> Process:
    """Joins the process group where torchrun set one up, and picks the device: CUDA, else MPS, else the CPU.

    Raises InputError where `device` is not to be had.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    mps = torch.backends.mps.is_available() and world == 1  # gloo moves no MPS tensors
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": mps}
    if device is None:
        device = "cuda" if available["cuda"] else "mps" if mps else "cpu"
    kind, _, number = device.partition(":")
    if not available.get(kind) or number and not (kind == "cuda" and number.isdigit() and int(number) < torch.cuda.device_count()):
        raise InputError(f"--device {device}: not available here; there is {', '.join(d for d in available if available[d])}")
    if world == 1:
        return Process(0, 1, torch.device(device))
    if kind == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise InputError(f"--nproc_per_node: more processes than the {torch.cuda.device_count()} GPUs of this machine")
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return Process(dist.get_rank(), world, torch.device(device))


def cores() -> int:
    """Processor cores for each process of this machine."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return mine // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def default_workers() -> int:
    """Loader processes for each process: up to 4; without a GPU they share the cores with the network itself."""
    return min(4, cores() if torch.cuda.is_available() else cores() // 2)


def leave_cores_to_loaders(device: torch.device, workers: int) -> None:
    """On a CPU, no more threads than the loaders leave cores: a thread that shares its core with a loader holds up all
    the others. OMP_NUM_THREADS overrides."""
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores() - workers))
