"""The models: variants, segmentation networks, detectors, checkpoints, and what a command needs to start.

    model = build_model("divdr-a", "segmentation", num_classes=19)
    logits, A, cost, routes = model(images)         # images [B, 3, H, W], normalised; any H and W

    model = build_model("divdr-a", "detection", num_classes=80, masks=True)
    out = model(images, targets)                    # lists, as torchvision's detectors take them; out.losses
    out = model.eval()(images)                      # out.detections, out.A, out.routes

A *routed* model is a `RoutedBackbone` with a head. A *static* one is a `FixedBackbone` with a head, or a
network of extras/baselines.py, behind the same interface: one training loop and one evaluation serve all.

    fixed = model.cut(route)                        # the static network of a route, bool [1 + nodes, 3]
"""

from __future__ import annotations

import argparse
import copy
import csv
import ctypes
import importlib
import io
import math
import os
import re
import sys
import warnings
from collections import OrderedDict
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign
from tqdm import tqdm

from routing import (
    FixedBackbone, RoutedBackbone, Routes, at_least_float32, conv_bn, conv_cost, pad_to_stride, resize,
)


class InputError(ValueError):
    """What the user gave cannot be used. The message, one line, names the file or flag and what to do."""


def extra(name: str, flag: str):
    """The module extras/NAME.py, which `flag` needs. Raises InputError, which names what is missing."""
    try:
        return importlib.import_module(f"extras.{name}")
    except ModuleNotFoundError as error:
        words = f"the package {error.name}, which is not here; install it"
        if error.name in ("extras", f"extras.{name}"):
            words = f"extras/{name}.py, which is not here; copy it too"
        raise InputError(f"{flag}: needs {words}") from None


# ============ variants ============


@dataclass(frozen=True)
class Variant:
    """One row of the method's table: the weights of the loss terms and the kind of gate."""

    title: str  # in tables
    lambda1: float = 0.0  # weight of the cost loss
    budget: float = 0.0  # the share of the full cost that the cost loss aims at
    lambda2: float = 0.0  # weight of the clustering loss
    full_in_detection: bool = False  # its gates are full there
    static: str | None = None  # the one task of a network without gates; None: routed, for every task
    on_resnet: str | None = None  # the backbone of a network in extras/baselines.py, which has one size

    def gate(self, task: str) -> str | None:
        """The kind of gate, "full" or "small"; None of a static network."""
        if self.static:
            return None
        return "full" if self.full_in_detection and task == "detection" else "small"


# The DivDR paper compares at small gates, but for DR-R in detection, whose 38.2 G are those of full ones.
VARIANTS = {
    "dr-a": Variant("DR-A", lambda1=0.8, budget=0.1),
    "dr-b": Variant("DR-B", lambda1=0.5, budget=0.1),
    "dr-c": Variant("DR-C", lambda1=0.5, budget=0.2),
    "dr-raw": Variant("DR-Raw", full_in_detection=True),
    "divdr-a": Variant("DivDR-A", lambda1=0.8, budget=0.1, lambda2=0.1),
    "divdr-raw": Variant("DivDR-Raw", lambda2=0.1),
    "fixed-route": Variant("Fixed route", static="segmentation"),
    "bisenet-r18": Variant("BiSeNet", static="segmentation", on_resnet="ResNet-18"),
    "deeplabv3-r101": Variant("DeepLabV3", static="segmentation", on_resnet="ResNet-101-ASPP"),
    "semantic-fpn-r101": Variant("Semantic FPN", static="segmentation", on_resnet="ResNet-101-FPN"),
    "pspnet-r101": Variant("PSPNet", static="segmentation", on_resnet="ResNet-101-PSP"),
    "r50-fpn": Variant("R-CNN", static="detection", on_resnet="ResNet-50-FPN"),
}

# Classic networks that Dynamic Routing (section 4) places in the routing space, drawn in extras/baselines.py.
ROUTES = ("fcn-32s", "deeplabv3", "u-net", "hrnetv2", "auto-deeplab")


def variants_of(task: str) -> list[str]:
    """The names in `VARIANTS` that "segmentation" or "detection" can be trained with."""
    return [name for name, variant in VARIANTS.items() if variant.static in (None, task)]


def build_model(
    variant: str,
    task: str,
    num_classes: int,
    layers: int | None = None,
    width: int | None = None,
    gate: str | None = None,
    route: list | Tensor | None = None,
    **detector,
) -> nn.Module:
    """The network of a variant.

    Args:
        variant: a key of `VARIANTS`.
        task: "segmentation" or "detection".
        num_classes: in detection without the background.
        layers, width: size of a routed backbone, by default 64 wide with 16 layers, in detection with 17.
        gate: "full" or "small", by default the variant's.
        route: of "fixed-route", bool [1 + nodes, 3]; see `FixedBackbone`.
        detector: in detection, the arguments of `Detector`, all with defaults; pyramid, channels of the maps
            (256), the heads' widths follow; frozen (False), see `resnet50_fpn`.

    Raises InputError for a variant that is none of the task's, and for sizes that cannot be built.
    """
    if variant not in variants_of(task):
        names = ", ".join(variants_of(task))
        raise InputError(f"--variant {variant}: not a network for {task}; choose one of {names}")
    static, on_resnet = VARIANTS[variant].static, VARIANTS[variant].on_resnet
    channels, frozen = detector.pop("pyramid", None), detector.pop("frozen", False)
    for flag, value in dict(layers=layers, width=width, gate=gate, pyramid=channels).items():
        if on_resnet and value is not None:
            raise InputError(f"--{flag} {value}: {variant} is a network of one size; leave it out")
    if variant == "fixed-route" and route is None:
        raise InputError(f"--variant {variant}: say which with --route: {', '.join(ROUTES)}, or a json")
    if variant != "fixed-route" and route is not None:
        raise InputError(f"--variant {variant}: does not go with --route; leave one of them out")
    if route is not None and gate:
        raise InputError(f"--gate {gate}: a network of a fixed route has no gates; leave it out")
    if layers is None:
        layers = 16 if task == "segmentation" else 17
    size = (layers, 64 if width is None else width, gate or VARIANTS[variant].gate(task))
    baselines = extra("baselines", f"--variant {variant}") if on_resnet else None
    try:
        if task == "detection":
            pyramid = baselines.resnet50_fpn(frozen) if static else None
            if not static:
                pyramid = Pyramid(RoutedBackbone(*size, scales=5), channels or 256)
            model = Detector(num_classes, pyramid, **detector)
        elif on_resnet:
            model = baselines.StaticSegmenter(variant, num_classes)
        elif static:
            backbone = FixedBackbone(torch.as_tensor(route), *size)
            coarsest = max(s for s, filled in enumerate(backbone.filled) if filled)
            model = Segmenter(backbone, SegmentationHead(backbone.channels[: coarsest + 1], num_classes))
        else:
            backbone = RoutedBackbone(*size)
            model = Segmenter(backbone, SegmentationHead(backbone.channels, num_classes))
    except ValueError as error:
        raise InputError(f"--{error}") from None
    return model.to(memory_format=torch.channels_last)  # pointwise convolutions are matrix products on it


# ============ segmentation ============


class SegmentationOutput(NamedTuple):
    logits: Tensor  # [B, classes, H, W] at the size of the input
    A: Tensor  # [B, 3·nodes] gate activations; [B, 0] of a static model
    cost: Tensor  # [B] expected multiply-adds of cells and paths, differentiable; 0 of a static model
    routes: Routes


class SegmentationHead(nn.Module):
    """Features, fine to coarse, -> logits [B, classes, H, W], at least in float32.

    From the coarsest map down: conv1x1, double the size, add the next finer map.
    """

    def __init__(self, channels: list[int], num_classes: int):
        super().__init__()
        self.laterals = nn.ModuleList()
        for c, narrower in zip(channels, [channels[0]] + channels[:-1]):
            self.laterals.append(nn.Sequential(*conv_bn(c, narrower, kernel_size=1)))
        self.predictor = nn.Conv2d(channels[0], num_classes, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        nn.init.zeros_(self.predictor.bias)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Empties the list as it goes, so that a map is freed once it is added."""
        del features[len(self.laterals) :]  # a fixed route may leave the coarsest without a map
        y = self.laterals[-1](features.pop())
        for lateral in reversed(self.laterals[:-1]):
            y = lateral(resize(y, scale_factor=2) + features.pop())
        y = at_least_float32(self.predictor(y))  # classes differ by less than half precision
        return resize(y, scale_factor=4)

    def cost(self, height: int, width: int, stride: int, count: str) -> int:
        """Multiply-adds of an image; for `count` see `Grid.costs`.

        The paper count takes an H/4 x H/4 map. The others are of an image padded to `stride`.
        """
        if count != "paper":
            height, width = height + -height % stride, width + -width % stride
        h, w = height // 4, (height if count == "paper" else width) // 4
        total = conv_cost(self.predictor.in_channels, self.predictor.out_channels, h, w, k=3)
        per_element = 0 if count == "conv" else 3  # batch norm and ReLU
        for s, lateral in enumerate(self.laterals):
            c, narrower = lateral[0].in_channels, lateral[0].out_channels
            total += conv_cost(c, narrower, h // 2**s, w // 2**s)
            total += per_element * narrower * (h // 2**s) * (w // 2**s)
        return total


# What training and evaluation ask of a segmentation model, whatever its backbone:
#   forward(images [B, 3, H, W]) -> SegmentationOutput
#   dim: length of A(x); 0 means that there is nothing to cluster
#   counts: the names of its FLOP counts, first the one to report
#   real_cost(routes, height, width, count) -> {part: int64 [B], or [1] where all images cost the same}
# and where dim is not 0:
#   routes(images) -> Routes, and cut(route) -> the static network
#   backbone.all_nodes(), .nodes_per_layer and .costs(height, width), for the figures


class Segmenter(nn.Module):
    """A backbone, routed or of a fixed route, with the segmentation head; pads images of any size inside."""

    counts = ("paper", "exact")

    def __init__(self, backbone: RoutedBackbone | FixedBackbone, head: SegmentationHead):
        super().__init__()
        self.backbone, self.head, self.dim = backbone, head, backbone.dim

    def forward(self, images: Tensor, skip: bool | None = None) -> SegmentationOutput:
        """images: float [B, 3, H, W], normalised; logits come as [B, classes, H, W]. For `skip` see
        `RoutedBackbone.route`."""
        height, width = images.shape[-2:]
        features, routes = self.backbone.route(pad_to_stride(images, self.backbone.stride), skip)
        cost = self.backbone.expected_cost(routes, height, width)
        logits = self.head(features)[..., :height, :width]
        return SegmentationOutput(logits, routes.A, cost, routes)

    def routes(self, images: Tensor) -> Routes:
        """The routes alone: the head does not run."""
        return self.backbone.route(pad_to_stride(images, self.backbone.stride))[1]

    def cut(self, route: Tensor) -> Segmenter:
        """The static network of a route, with a copy of the weights that it uses; see `FixedBackbone`."""
        fixed = Segmenter(self.backbone.cut(route), copy.deepcopy(self.head)).train(self.training)
        return fixed.to(memory_format=torch.channels_last)

    def real_cost(self, routes: Routes, height: int, width: int, count: str = "paper") -> dict[str, Tensor]:
        """Multiply-adds of each image by part, int64 [B] or, of a fixed route, [1]: stem, cells, paths,
        gates, head. For `count` see `Grid.costs`."""
        cost = self.backbone.real_cost(routes, height, width, count)
        head = self.head.cost(height, width, self.backbone.stride, count)
        return cost | {"head": torch.full_like(cost["stem"], head)}


# ============ detection ============


class DetectionOutput(NamedTuple):
    losses: dict[str, Tensor]  # torchvision's, by its names; empty in evaluation
    detections: list[dict[str, Tensor]]  # torchvision's, in the images' own pixels; empty in training
    A: Tensor  # [B, 3·nodes] gate activations; [B, 0] of a static model
    cost: Tensor  # [B] expected multiply-adds of cells and paths, differentiable; 0 of a static model
    routes: Routes
    sizes: list[tuple[int, int]]  # height and width of each image as the backbone saw it, without padding
    padded: tuple[int, int]  # height and width of the batch


class Pyramid(nn.Module):
    """A backbone of five scales as the feature pyramid of torchvision's detectors: P2 to P6, each by a 1x1
    convolution."""

    def __init__(self, backbone: RoutedBackbone | FixedBackbone, channels: int):
        super().__init__()
        self.out_channels = channels  # a name that torchvision asks for
        self.backbone = backbone
        self.laterals = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in backbone.channels)
        for lateral in self.laterals:
            nn.init.kaiming_uniform_(lateral.weight, a=1)  # as torchvision starts its own pyramid
            nn.init.zeros_(lateral.bias)

    def forward(self, x: Tensor) -> tuple[OrderedDict[str, Tensor], Routes]:
        """Images [B, 3, H, W], H and W multiples of 64 -> five maps [B, channels, H/stride, W/stride] by
        level, "0" to "4", and the routes."""
        features, routes = self.backbone.route(x)
        maps = OrderedDict()
        for level, (lateral, feature) in enumerate(zip(self.laterals, features)):
            maps[str(level)] = lateral(feature)
        return maps, routes


class Detector(nn.Module):
    """torchvision's Faster or Mask R-CNN on a routed or fixed pyramid, or on its own ResNet-50-FPN.

    Resizing, RPN, RoI heads, losses, assignment of anchors and post-processing are torchvision's. Images of a
    batch are padded to a common size. The gates see the padding too, so an image has its own route only alone
    or with images of its size.

    Args:
        num_classes: without the background, which is label 0; the classes are labels 1 to num_classes.
        pyramid: the backbone; takes images whose sides are multiples of `stride`.
        masks: also segment instances (Mask R-CNN).
        short_sides, long_side: pixels. An image's short side becomes one of `short_sides` (drawn in training,
            the last in evaluation), its long side at most `long_side`.
        anchor: pixels, side of the anchors on the finest map, doubled on each coarser one. Boxes of 7 times
            that side are pooled from stride 16, others by the same scale (32: torchvision's 224).
        proposals: of the RPN per image in evaluation; twice as many in training.
        rois: regions per image that the box head is trained on.
    """

    counts = ("paper", "exact")

    def __init__(
        self, num_classes: int, pyramid: nn.Module, masks: bool = False,
        short_sides: tuple[int, ...] = (800,), long_side: int = 1333, anchor: int = 32,
        proposals: int = 1000, rois: int = 512,
    ):
        super().__init__()
        self.on_resnet = not isinstance(pyramid, Pyramid)
        self.stride = 32 if self.on_resnet else pyramid.backbone.stride
        channels = pyramid.out_channels
        anchors = AnchorGenerator(tuple((anchor * 2**level,) for level in range(5)), ((0.5, 1.0, 2.0),) * 5)
        options = dict(
            min_size=tuple(short_sides), max_size=long_side, size_divisible=self.stride,
            rpn_anchor_generator=anchors,
            rpn_pre_nms_top_n_train=2 * proposals, rpn_post_nms_top_n_train=2 * proposals,
            rpn_pre_nms_top_n_test=proposals, rpn_post_nms_top_n_test=proposals,
            box_batch_size_per_image=rois,
            box_roi_pool=roi_align(7, anchor),
            box_head=TwoMLPHead(channels * 7**2, 4 * channels),
            box_predictor=FastRCNNPredictor(4 * channels, num_classes + 1),
        )
        if masks:
            options |= dict(
                mask_roi_pool=roi_align(14, anchor),
                mask_head=MaskRCNNHeads(channels, (channels,) * 4, 1),
                mask_predictor=MaskRCNNPredictor(channels, channels, num_classes + 1),
            )
        self.rcnn = (MaskRCNN if masks else FasterRCNN)(pyramid, **options)
        # Boxes take the precision of what they are decoded from, and bfloat16 has steps of 4 pixels at 1000.
        for regresses in (self.rcnn.rpn.head, self.rcnn.roi_heads.box_predictor):
            regresses.register_forward_hook(_in_float32)

    @property
    def pyramid(self) -> nn.Module:
        """The part that has batch norm: images [B, 3, H, W] -> maps."""
        return self.rcnn.backbone

    @property
    def backbone(self) -> RoutedBackbone | FixedBackbone:
        return self.pyramid.backbone

    @property
    def dim(self) -> int:
        """Length of A(x)."""
        return 0 if self.on_resnet else self.backbone.dim

    def prepare(self, images: list[Tensor], targets: list[dict] | None = None):
        """images: list of [3, H, W] on 0..1. -> (ImageList of one tensor [B, 3, H, W], resized, normalised
        and padded; targets to match). In training the size of each image is drawn anew.

        Raises InputError for an image so narrow that nothing would be left of its short side.
        """
        for image in images:
            short, long = sorted(image.shape[-2:])
            if short * self.rcnn.transform.max_size < long:
                words = "too narrow to be resized; leave it out, or cut it into parts"
                raise InputError(f"an image of {image.shape[-1]}x{image.shape[-2]} pixels is {words}")
        images, targets = self.rcnn.transform(images, targets)
        images.tensors = images.tensors.contiguous(memory_format=torch.channels_last)
        return images, targets

    def forward(self, images: list[Tensor], targets: list[dict] | None = None) -> DetectionOutput:
        """images: list of [3, H, W] on 0..1, of any size. targets, in training: a list of dicts with
        boxes [n, 4] as x1 y1 x2 y2 in pixels, labels int64 [n] from 1, and with masks also masks
        uint8 [n, H, W]; n may be 0."""
        sizes = [tuple(image.shape[-2:]) for image in images]
        batch, targets = self.prepare(images, targets)
        padded = tuple(batch.tensors.shape[-2:])
        if self.on_resnet:
            maps, routes = self.pyramid(batch.tensors), Routes.none(len(images))
            cost = batch.tensors.new_zeros(len(images))
        else:
            maps, routes = self.pyramid(batch.tensors)
            cost = self.backbone.expected_cost(routes, *padded)
        proposals, losses = self.rcnn.rpn(batch, maps, targets)
        detections, roi_losses = self.rcnn.roi_heads(maps, proposals, batch.image_sizes, targets)
        detections = self.rcnn.transform.postprocess(detections, batch.image_sizes, sizes)
        losses = losses | roi_losses
        return DetectionOutput(losses, detections, routes.A, cost, routes, batch.image_sizes, padded)

    def routes(self, images: list[Tensor], sizes: list[tuple[int, int]] | None = None) -> Routes:
        """The routes alone: no heads run. sizes: what each image becomes, in place of what `prepare` says."""
        if sizes is None:
            return self.pyramid(self.prepare(images)[0].tensors)[1]
        resized = []
        for image, size in zip(images, sizes):
            resized.append(resize(self.rcnn.transform.normalize(image)[None], size=size)[0])
        batch = self.rcnn.transform.batch_images(resized, self.stride)
        return self.pyramid(batch.contiguous(memory_format=torch.channels_last))[1]

    def cut(self, route: Tensor) -> Detector:
        """The static detector of a route, with a copy of the weights that it uses; see `FixedBackbone`."""
        fixed = copy.deepcopy(self)
        fixed.pyramid.backbone = self.backbone.cut(route).train(self.training)
        return fixed.to(memory_format=torch.channels_last)

    def real_cost(self, routes: Routes, height: int, width: int, count: str = "paper") -> dict[str, Tensor]:
        """Multiply-adds of the backbone by part, int64 [B] or, static, [1]: what the papers' tables show."""
        if not self.on_resnet:
            return self.backbone.real_cost(routes, height, width, count)
        if count != "paper":
            height, width = height + -height % self.stride, width + -width % self.stride
        baselines = extra("baselines", "--variant r50-fpn")
        return {"network": baselines.static_cost(baselines.resnet50_fpn, height, width, count == "exact")}


def _in_float32(module: nn.Module, inputs, out):
    """A forward hook: casts what comes out, at any depth, to float32 where it is less."""
    if isinstance(out, Tensor):
        return out.float() if out.dtype in (torch.bfloat16, torch.float16) else out
    return type(out)(_in_float32(module, inputs, part) for part in out)


def roi_align(side: int, anchor: int) -> MultiScaleRoIAlign:
    """Regions of P2 to P5 as maps of side x side (P6 has none, as in torchvision).

    torchvision infers each map's scale from its first batch and keeps it; heavy padding makes that wrong. So
    it is shown one unpadded batch first.
    """
    levels = ["0", "1", "2", "3"]
    align = MultiScaleRoIAlign(levels, side, sampling_ratio=2, canonical_scale=7 * anchor)
    maps = OrderedDict((level, torch.zeros(1, 1, 64 // 2**i, 64 // 2**i)) for i, level in enumerate(levels))
    align(maps, [torch.tensor([[0.0, 0, 256, 256]])], [(256, 256)])
    return align


# ============ checkpoints ============


def save_checkpoint(path: Path, model: nn.Module, **contents) -> None:
    """Writes the model's weights and `contents`; raises InputError as `write_file` does.

    `load_checkpoint` needs "model_args" in `contents`, the arguments of `build_model`.
    """

    def write(file) -> None:
        torch.save({"weights": model.state_dict(), **contents}, file)
        file.flush()
        os.fsync(file.fileno())  # on the disk before it takes the place of the last one

    write_file(path, write)


def write_file(path: Path, write) -> None:
    """Calls `write` with a binary file, which becomes `path` at once or not at all.

    Raises InputError where it cannot be written, a full disk for one; what was there before is untouched.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's writer turns some of the former into the latter
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        reason = cause.strerror or str(cause)
        words = f"could not be written ({reason}); what was there is kept; make room, or write elsewhere"
        raise InputError(f"{path}: {words}") from None
    finally:  # also after Ctrl-C
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def make_folder(path: Path, flag: str) -> None:
    """Makes the folder that `flag` names, with its parents. Raises InputError where it cannot write there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{flag} {path}: no folder can be made there ({error.strerror})") from None
    if not os.access(path, os.W_OK):
        raise InputError(f"{flag} {path}: this folder cannot be written to; name another")


def load_checkpoint(path: Path | str, device: torch.device | str = "cpu") -> tuple[nn.Module, dict]:
    """A file of `save_checkpoint` -> the model in evaluation mode on `device`, and the contents.

    Nothing in the file is executed. Raises InputError where it is missing, unreadable or no checkpoint.
    """
    contents = read_file(path, "a checkpoint; training writes them to runs/NAME/last.pt")
    if not {"weights", "model_args"} <= contents.keys():
        raise InputError(f"{path}: not a checkpoint; give a file written by train_seg.py or train_det.py")
    try:
        model = build_model(**contents["model_args"])
        model.load_state_dict(contents["weights"])
    except (RuntimeError, TypeError, AttributeError):
        raise InputError(f"{path}: its weights do not fit the model that it says it holds") from None
    return model.to(device).eval(), contents


def read_file(path: Path | str, wanted: str) -> dict:
    """What `torch.save` wrote to a file, with tensors on the CPU. Nothing in the file is executed.

    Raises InputError, with what is `wanted` in it, where the file is missing, unreadable or holds no dict.
    """
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on a damaged file torch raises anything from KeyError to struct.error
        reasons = {FileNotFoundError: "no such file", IsADirectoryError: "a folder"}
        unreadable = "not a file of torch.save, or damaged, or it holds code, which is never run"
        reason = reasons.get(type(error), unreadable)
        raise InputError(f"{path}: {reason}; wanted is {wanted}") from None
    if not isinstance(contents, dict):
        raise InputError(f"{path}: holds a {type(contents).__name__}; wanted is {wanted}")
    return contents


def _numpy_globals() -> list:
    """What reading NumPy's numbers and arrays takes, under the names that NumPy 1 and 2 write."""
    scalar, array = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    named = []
    for core in ("core", "_core"):
        named.append((scalar, f"numpy.{core}.multiarray.scalar"))
        named.append((array, f"numpy.{core}.multiarray._reconstruct"))
    kinds = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")
    return [*named, np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in kinds)]


# ============ weights from elsewhere ============


class Initialized(NamedTuple):
    """What `load_matching` did with each tensor, by our names."""

    matched: list[str]
    missing: list[str]  # of the model: not in the file, or of another shape there
    left_over: list[str]  # of the file

    def __str__(self) -> str:
        words = f"{len(self.matched)} tensors matched"
        for names, what in ((self.missing, "missing"), (self.left_over, "left over")):
            words += f", {len(names)} {what}" + (f" ({names[0]}, ...)" if names else "")
        return words


def load_matching(model: nn.Module, found: dict[str, Tensor]) -> Initialized:
    """Loads what fits the model by name and shape; the rest of the model stays as it is."""
    state, fits = model.state_dict(), {}
    found = {name: weight for name, weight in found.items() if not name.endswith("num_batches_tracked")}
    for name, weight in found.items():
        if name in state and getattr(weight, "shape", None) == state[name].shape:
            fits[name] = weight
    missing = model.load_state_dict(fits, strict=False).missing_keys
    return Initialized(list(fits), missing, [name for name in found if name not in fits])


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """The weights in a file by name: in a checkpoint of ours, in one of Dynamic Routing's authors, whose
    names become ours, or of any network, alone in the file. Raises InputError where it cannot be read."""
    contents = read_file(path, "weights to start from, of the kinds that the README names")
    weights, theirs = contents.get("weights", contents), contents.get("model", contents)
    if isinstance(theirs, dict) and "backbone.stem.stem_1.weight" in theirs:
        weights = extra("published", f"--init {path}").weights_of(contents)
    return {str(name): weight for name, weight in weights.items()} if isinstance(weights, dict) else {}


def initialize(model: nn.Module, weights: dict[str, Tensor], path: Path | str) -> Initialized:
    """Starts a model from `read_weights` of a file.

    A model of the routing space takes those of another, for either task. Gates and head may be missing in it,
    as in the authors' ImageNet backbones "Fix". A network on a ResNet of torchvision's takes torchvision's
    ImageNet weights of that ResNet. Raises InputError, which names the file, where they do not fit.
    """
    if not isinstance(model, Segmenter) and not model.dim:
        return extra("baselines", "--init").initialize(model, weights, path)
    prefix = "rcnn.backbone." if isinstance(model, Detector) else ""  # of the same backbone's names
    found = {}
    for name, weight in weights.items():
        name = name.replace("rcnn.backbone.backbone.", "backbone.")
        found[prefix + name if name.startswith("backbone.") else name] = weight
    report = load_matching(model, found)
    if prefix + "backbone.stem.0.weight" not in report.matched:  # a few biases always fit
        words = "its weights do not fit the network; give a checkpoint of a routed one of the same --width"
        raise InputError(f"--init {path}: {words}")
    return report


# ============ what every command does ============


class Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and adds a flag's default where it has one."""

    def _get_help_string(self, action):
        nothing = any(action.default is value for value in (None, False, argparse.SUPPRESS))  # 0 is a default
        return action.help if nothing else f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """argparse that says what is wrong in one line, without the usage in front of it."""

    def __init__(self, description: str, **options):
        super().__init__(description=description, formatter_class=Help, allow_abbrev=False, **options)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def number(kind: type, least: float, most: float = math.inf):
    """A type for argparse: an int or float between `least` and `most`, both allowed; neither nan nor inf."""

    def convert(text: str):
        value = kind(text)
        if not (least <= value <= most and math.isfinite(value)):
            allowed = f"at least {least}" if most == math.inf else f"between {least} and {most}"
            raise argparse.ArgumentTypeError(f"{text}: must be {allowed}")
        return value

    convert.__name__ = kind.__name__  # argparse names it where the text is no number
    return convert


@contextmanager
def one_line_errors(*kinds: type[Exception]):
    """Inside it, an exception of `kinds` becomes one line on stderr and exit status 2; Ctrl-C, 130.

    A warning is one line too.
    """
    script = Path(sys.argv[0]).name
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names of files may be no text
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *place: print(f"{script}: {message}", file=sys.stderr)
            yield
    except (*kinds, KeyboardInterrupt) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        message = "interrupted" if interrupted else error
        for bar in list(getattr(tqdm, "_instances", ())):  # else they would be drawn again, after the line
            bar.close()
        print(f"{script}: {message}", file=sys.stderr)
        raise SystemExit(130 if interrupted else 2) from None


def three_digits(value: float) -> str:
    """A number with three digits that count, at the least: 0.00430, 5.94, 118.1."""
    return f"{value:.1f}" if value >= 100 else f"{value:#.3g}"


def table(rows: list[list], form: str = "text", left: int = 2) -> str:
    """Header and rows as "text", "markdown", "latex" or "csv"; the first `left` columns are flush left."""
    if form == "csv":
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows(rows)
        return file.getvalue().rstrip("\n")
    rows = [[str(cell) for cell in row] for row in rows]
    if form == "latex":
        marks = {"±": r"$\pm$", "λ1": r"$\lambda_1$", "λ2": r"$\lambda_2$", "–": "--"}
        marks |= {mark: "\\" + mark for mark in "_&%$#{}"}
        pattern = re.compile("|".join(map(re.escape, marks)))
        lines = []
        for row in rows:
            cells = [pattern.sub(lambda found: marks[found[0]], cell) for cell in row]
            lines.append(" & ".join(cells) + r" \\")
        top = r"\begin{tabular}{" + "l" * left + "r" * (len(rows[0]) - left) + "}"
        end = [r"\bottomrule", r"\end{tabular}"]
        return "\n".join([top, r"\toprule", lines[0], r"\midrule", *lines[1:], *end])
    widths = [max(3, *map(len, column)) for column in zip(*rows)]
    aligned = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        cells[:left] = [cell.ljust(width) for cell, width in zip(row, widths[:left])]
        aligned.append(cells)
    if form == "text":
        return "\n".join("  ".join(cells).rstrip() for cells in aligned)
    rule = ["-" * width for width in widths[:left]] + ["-" * (width - 1) + ":" for width in widths[left:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [aligned[0], rule, *aligned[1:]])


class Process(NamedTuple):
    """This process among those that work together; rank 0 is the one that writes and prints."""

    rank: int
    world: int
    device: torch.device


def start_process(device: str | None = None, workers: int = 0) -> Process:
    """Joins the process group where torchrun set one up, and picks the device: CUDA, else MPS, else the CPU.

    On a CPU, torch gets the cores that `workers` loader processes leave: a thread that shares its core with a
    loader holds up all others. Raises InputError where `device` is not to be had, where torchrun would not
    get over a restart, and where there are to be several processes without it.
    """
    rank, world, local = (of_torchrun(name, 0) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    left_behind = os.environ.get("WORLD_SIZE", "")
    if not dist.is_torchelastic_launched() and left_behind.strip() not in ("", "0", "1"):
        words = "but no torchrun started this process; start it with torchrun, or unset WORLD_SIZE"
        raise InputError(f"WORLD_SIZE: is {left_behind!r} in the environment, {words}")
    shared_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared_store and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        # torchrun keeps the store in which processes find each other, with the addresses of the dead.
        needed = "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, with --standalone or --rdzv_backend c10d"
        raise InputError(f"--max-restarts: processes that start again would look for dead ones; {needed}")
    world, gpus = max(world, 1), torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available() and world == 1  # gloo moves no MPS tensors
    here = ["cuda"] * (gpus > 0) + [f"cuda:{i}" for i in range(gpus)] + ["mps"] * mps + ["cpu"]
    device = device or here[0]
    if device not in here:
        raise InputError(f"--device {device}: not available here; there is {', '.join(here)}")
    if device.startswith("cuda") and world > 1:
        if local >= gpus:
            raise InputError(f"--nproc_per_node: more processes than the {gpus} GPUs of this machine")
        device = f"cuda:{local}"
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    if device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores_per_process() - workers))
    if device == "cpu":
        keep_freed_memory()
    if world > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return Process(rank, world, torch.device(device))


def keep_freed_memory() -> None:
    """Lets this process use the memory of freed tensors again; for the CPU, where glibc is there.

    By default glibc gives large blocks back to the system. The pages of the next one are then new, and to
    touch them takes as long as the convolutions.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no blocks of their own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is given back


def cores_per_process() -> int:
    """Processor cores for each process of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // of_torchrun("LOCAL_WORLD_SIZE", 1))


def of_torchrun(name: str, otherwise: int) -> int:
    """A number that torchrun put into the environment; `otherwise` where no torchrun started this process."""
    return int(os.environ[name]) if dist.is_torchelastic_launched() else otherwise
