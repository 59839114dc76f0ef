"""The models: variants, segmentation networks, detectors, checkpoints, and what a command needs to start.

    model = build_model("divdr-a", "segmentation", num_classes=19)
    logits, A, cost, routes = model(images)         # images [B, 3, H, W], normalised; any H and W

    model = build_model("divdr-a", "detection", num_classes=80, masks=True)
    out = model(images, targets)                    # lists, as torchvision's detectors take them; out.losses
    out = model.eval()(images)                      # out.detections, out.A, out.routes

A *routed* model is a `RoutedBackbone` with a head. A *static* one is torchvision's, or a `FixedBackbone` with
a head, behind the same interface: one training loop and one evaluation serve all.

    fixed = model.cut(route)                        # the static network of a route, bool [1 + nodes, 3]
"""

from __future__ import annotations

import argparse
import copy
import csv
import ctypes
import functools
import json
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
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18, resnet101
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.segmentation import deeplabv3_resnet101
from torchvision.ops import (
    Conv2dNormActivation, FeaturePyramidNetwork, FrozenBatchNorm2d, MultiScaleRoIAlign, SqueezeExcitation,
)
from tqdm import tqdm

from routing import (
    ROUTES, FixedBackbone, RoutedBackbone, Routes, at_least_float32, conv_bn, conv_cost, named_route,
    nodes_per_layer, pad_to_stride, resize,
)


class InputError(ValueError):
    """What the user gave cannot be used. The message, one line, names the file or flag and what to do."""


# ============ variants ============


@dataclass(frozen=True)
class Variant:
    """One row of the method's table: the weights of the loss terms and the kind of gate."""

    lambda1: float = 0.0  # weight of the cost loss
    budget: float = 0.0  # the share of the full cost that the cost loss aims at
    lambda2: float = 0.0  # weight of the clustering loss
    static: str | None = None  # the one task of a network without gates; None: routed, for every task
    full_in_detection: bool = False  # its gates are full there
    on_resnet: bool = False  # a ResNet of torchvision's with a head: of one size

    def gate(self, task: str) -> str | None:
        """The kind of gate, "full" or "small"; None of a static network."""
        if self.static:
            return None
        return "full" if self.full_in_detection and task == "detection" else "small"


# The DivDR paper compares at small gates, but for DR-R in detection, whose 38.2 G are those of full ones.
VARIANTS = {
    "dr-a": Variant(lambda1=0.8, budget=0.1),
    "dr-b": Variant(lambda1=0.5, budget=0.1),
    "dr-c": Variant(lambda1=0.5, budget=0.2),
    "dr-raw": Variant(full_in_detection=True),
    "divdr-a": Variant(lambda1=0.8, budget=0.1, lambda2=0.1),
    "divdr-raw": Variant(lambda2=0.1),
    "fixed-route": Variant(static="segmentation"),
    "bisenet-r18": Variant(static="segmentation", on_resnet=True),
    "deeplabv3-r101": Variant(static="segmentation", on_resnet=True),
    "semantic-fpn-r101": Variant(static="segmentation", on_resnet=True),
    "pspnet-r101": Variant(static="segmentation", on_resnet=True),
    "r50-fpn": Variant(static="detection", on_resnet=True),
}


def variants_of(task: str) -> list[str]:
    """The names in `VARIANTS` that "segmentation" or "detection" can be trained with."""
    return [name for name, variant in VARIANTS.items() if variant.static in (None, task)]


def published_results() -> list[dict[str, str]]:
    """The rows of the papers' tables, from assets/published.csv, by its columns.

    `variant` is the network here that is the row's, of static ones alone; `gate` is empty of static ones.
    """
    with open(Path(__file__).with_name("assets") / "published.csv", newline="") as file:
        return list(csv.DictReader(file))


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
    try:
        if task == "detection":
            pyramid = resnet50_fpn(frozen) if static else RoutedPyramid(*size, channels or 256)
            model = Detector(num_classes, pyramid, **detector)
        elif on_resnet:
            model = StaticSegmenter(variant, num_classes)
        elif static:
            backbone = FixedBackbone(torch.as_tensor(route), layers, size[1], gate=None)
            coarsest = max(s for s, filled in enumerate(backbone.filled) if filled)
            head = SegmentationHead(backbone.channels[: coarsest + 1], num_classes)
            model = FixedSegmenter(backbone, head)
        else:
            model = RoutedSegmenter(num_classes, *size)
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
#   routes(images) -> Routes, budgeted_cost(height, width) -> C_all, and cut(route) -> the static network
#   backbone.all_nodes(), .nodes_per_layer and .costs(height, width), for the figures


class RoutedSegmenter(nn.Module):
    """A routed backbone with the segmentation head; images of any size, padded inside."""

    counts = ("paper", "exact")

    def __init__(self, num_classes: int, layers: int, width: int, gate: str):
        super().__init__()
        self.backbone = RoutedBackbone(layers, width, gate)
        self.head = SegmentationHead(self.backbone.channels, num_classes)
        self.dim = 3 * self.backbone.num_nodes

    def forward(self, images: Tensor, skip: bool | None = None) -> SegmentationOutput:
        """For `skip` see `RoutedBackbone.route`."""
        height, width = images.shape[-2:]
        features, routes = self.backbone.route(pad_to_stride(images, self.backbone.stride), skip)
        cost = self.backbone.expected_cost(routes, height, width)
        logits = self.head(features)[..., :height, :width]
        return SegmentationOutput(logits, routes.A, cost, routes)

    def routes(self, images: Tensor) -> Routes:
        """The routes alone: the head does not run."""
        return self.backbone.route(pad_to_stride(images, self.backbone.stride))[1]

    def cut(self, route: Tensor) -> FixedSegmenter:
        """The static network of a route, with a copy of the weights that it uses; see `FixedBackbone`."""
        fixed = FixedSegmenter(self.backbone.cut(route), copy.deepcopy(self.head)).train(self.training)
        return fixed.to(memory_format=torch.channels_last)

    def budgeted_cost(self, height: int, width: int) -> int:
        """C_all of the budget: `SegmentationOutput.cost` with everything open."""
        return self.backbone.costs(height, width).budgeted

    def real_cost(self, routes: Routes, height: int, width: int, count: str = "paper") -> dict[str, Tensor]:
        """Multiply-adds of each image by part, int64 [B]: stem, cells, paths, gates, head.

        For `count` see `Grid.costs`.
        """
        cost = self.backbone.real_cost(routes, height, width, count)
        head = self.head.cost(height, width, self.backbone.stride, count)
        return cost | {"head": torch.full_like(cost["stem"], head)}


class FixedSegmenter(nn.Module):
    """A backbone with one route for all images and the segmentation head; images of any size, padded inside.
    """

    counts = ("paper", "exact")
    dim = 0

    def __init__(self, backbone: FixedBackbone, head: SegmentationHead):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> SegmentationOutput:
        height, width = images.shape[-2:]
        logits = self.predict(pad_to_stride(images, self.backbone.stride))
        routes = Routes.none(len(images))
        return SegmentationOutput(
            logits[..., :height, :width], routes.A, logits.new_zeros(len(images)), routes)

    def predict(self, images: Tensor) -> Tensor:
        """[B, 3, H, W], H and W multiples of the stride -> logits [B, classes, H, W]; see `Exportable`."""
        features = self.backbone(images)
        del features[len(self.head.laterals) :]  # the head begins at the coarsest map that the route fills
        return self.head(features)

    def real_cost(self, routes: Routes, height: int, width: int, count: str = "paper") -> dict[str, Tensor]:
        """Multiply-adds of any image by part, int64 [1]: stem, cells, paths, gates, head."""
        cost = self.backbone.real_cost(height, width, count)
        head = self.head.cost(height, width, self.backbone.stride, count)
        return cost | {"head": torch.full_like(cost["stem"], head)}


class StaticSegmenter(nn.Module):
    """One of `NETWORKS` behind the interface of the routed models: no gates, one cost.

    The paper count is of convolutions and linear layers alone, as the papers count such networks.
    """

    counts = ("paper", "exact")
    dim = 0

    def __init__(self, variant: str, num_classes: int):
        super().__init__()
        self.resnet = "ResNet-" + variant.rpartition("-r")[2]
        self.build = functools.partial(NETWORKS[variant], num_classes)
        self.network = self.build()

    def forward(self, images: Tensor) -> SegmentationOutput:
        logits = self.network(images)["out"]
        routes = Routes.none(len(images))
        return SegmentationOutput(logits, routes.A, logits.new_zeros(len(images)), routes)

    def real_cost(self, routes: Routes, height: int, width: int, count: str = "paper") -> dict[str, Tensor]:
        """Multiply-adds of an image, int64 [1]: every image costs the same."""
        return {"network": static_cost(self.build, height, width, elementwise=count == "exact")}


def read_route(text: str, layers: int) -> Tensor:
    """A name of `ROUTES`, or FILE:NAME of a json of evaluate.py --experts -> the route, bool [1 + nodes, 3].

    Raises InputError, which says what to do, where it is neither, or of a grid with another number of layers.
    """
    try:
        grid = 1 + sum(nodes_per_layer(layers))
    except ValueError as error:
        raise InputError(f"--{error}") from None
    if text in ROUTES:
        return named_route(text, layers)
    path, _, name = (text, "", "") if Path(text).is_file() else text.rpartition(":")
    if not Path(path).is_file():
        raise InputError(f"--route {text}: no such file, and none of {', '.join(ROUTES)}")
    try:
        contents = json.loads(Path(path).read_text())
        routes = {known: torch.tensor(rows) for known, rows in contents["routes"].items()}
        if any(rows.dtype not in (torch.bool, torch.int64) or rows.dim() != 2 for rows in routes.values()):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        words = "no json with routes, as evaluate.py --experts writes it"
        raise InputError(f"--route {path}: {words}") from None
    if name not in routes:
        raise InputError(f"--route {text}: choose one of {', '.join(f'{path}:{known}' for known in routes)}")
    if routes[name].shape != (grid, 3):
        has = f"{len(routes[name])} rows, and a grid of {layers} layers has {grid}"
        raise InputError(f"--route {text}: has {has}; give the --layers of the run that it was cut from")
    return routes[name].bool()


class Dispatcher(nn.Module):
    """Which expert takes an image: images [B, 3, H, W] -> scores [B, K], linear in the mean of the stem map.

    The stem is a copy of the routed network's, which all experts share.
    """

    def __init__(self, stem: nn.Module, decide: nn.Linear):
        super().__init__()
        self.stem, self.decide = copy.deepcopy(stem), decide

    def forward(self, images: Tensor) -> Tensor:
        return self.decide(self.stem(images).mean((2, 3)))


def fit_dispatcher(pooled: Tensor, labels: Tensor, k: int) -> nn.Linear:
    """Linear discriminant analysis, in closed form: pooled [N, C], labels [N] in [0, k) -> scores [., k].

    A score is log(share of the class · its Gaussian density), without the terms that all classes have in
    common; the Gaussians share their covariance. A class without samples always scores lowest.
    """
    x, sizes = pooled.double(), labels.bincount(minlength=k)
    middle = x.mean(0)
    x = x - middle  # else scores would be small differences of large numbers
    means = x.new_zeros(k, x.shape[1]).index_add_(0, labels, x) / sizes.clamp(min=1)[:, None]
    away = x - means[labels]
    covariance = away.T @ away / len(x)
    ridge = 1e-4 * covariance.diagonal().mean() + 1e-12  # channels can be constant, or fewer than images
    covariance += ridge * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(covariance, means.T).T  # [k, C], 0 of a class without samples
    bias = (sizes / len(x)).log() - (weight * means).sum(1) / 2 - weight @ middle
    decide = nn.Linear(x.shape[1], k)
    with torch.no_grad():
        decide.weight.copy_(weight)
        decide.bias.copy_(bias.clamp(min=-1e30))  # log(0): no image goes there
    return decide


# ============ segmentation networks of other papers ============

# As torchvision's: images [B, 3, H, W] of any size -> {"out": logits [B, classes, H, W]}, and a `backbone`
# that takes torchvision's weights of its ResNet. None has the auxiliary classifiers that some of the papers
# train with: the loss is that of all other models.


def resnet_stages(build, dilated: bool = False) -> nn.Module:
    """A ResNet of torchvision without its classifier: images -> {"1": map, ..., "4": map}, one of each stage.

    Their strides are 4, 8, 16 and 32; dilated, the last two stay at 8.
    """
    resnet = build(weights=None, replace_stride_with_dilation=(False, dilated, dilated))
    return IntermediateLayerGetter(resnet, {f"layer{stage}": str(stage) for stage in range(1, 5)})


def enlarge(x: Tensor, like: Tensor) -> Tensor:
    """x [B, C, h, w] at the height and width of `like`, bilinear."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


def deeplabv3(num_classes: int) -> nn.Module:
    """torchvision's, on ResNet-101 with stride 8."""
    return deeplabv3_resnet101(weights=None, weights_backbone=None, num_classes=num_classes, aux_loss=False)


class SemanticFPN(nn.Module):
    """ResNet-101-FPN with the semantic segmentation branch of Kirillov et al., Panoptic Feature Pyramid
    Networks, section 3.1."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.backbone = resnet_stages(resnet101)
        self.pyramid = FeaturePyramidNetwork([256, 512, 1024, 2048], 256)
        self.branches = nn.ModuleList()  # of each level: a convolution for each doubling, at least one
        group_norm = functools.partial(nn.GroupNorm, 32)
        for level in range(4):
            widths = [256] + [128] * max(level, 1)
            convs = [Conv2dNormActivation(*pair, norm_layer=group_norm) for pair in zip(widths, widths[1:])]
            self.branches.append(nn.ModuleList(convs))
        self.predictor = nn.Conv2d(128, num_classes, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = list(self.pyramid(self.backbone(images)).values())
        total = 0
        for level, (x, branch) in enumerate(zip(maps, self.branches)):
            for i, conv in enumerate(branch):
                x = enlarge(conv(x), maps[max(level - 1 - i, 0)])  # the next finer level; level 0 stays
            total = total + x
        logits = at_least_float32(self.predictor(total))
        return {"out": enlarge(logits, images)}


class PSPNet(nn.Module):
    """ResNet-101 with stride 8 and the pyramid pooling of Zhao et al., Pyramid Scene Parsing Network, section
    3.2."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.backbone = resnet_stages(resnet101, dilated=True)
        self.pools = nn.ModuleList()
        for bins in (1, 2, 3, 6):
            pool = nn.Sequential(nn.AdaptiveAvgPool2d(bins), Conv2dNormActivation(2048, 512, 1))
            self.pools.append(pool)
        self.predictor = nn.Sequential(
            Conv2dNormActivation(2 * 2048, 512, 3), nn.Dropout2d(0.1), nn.Conv2d(512, num_classes, 1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.backbone(images)["4"]
        pooled = [enlarge(pool(x), x) for pool in self.pools]
        logits = at_least_float32(self.predictor(torch.cat([x, *pooled], 1)))
        return {"out": enlarge(logits, images)}


class AttentionRefinement(nn.Module):
    """Of BiSeNet: a 3x3 convolution to 128 channels, each then weighted by what the whole map says."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2dNormActivation(channels, 128, 3)
        sigmoid = dict(activation_layer=nn.Sigmoid, inplace=None)
        self.weight = nn.Sequential(nn.AdaptiveAvgPool2d(1), Conv2dNormActivation(128, 128, 1, **sigmoid))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * self.weight(x)


class BiSeNet(nn.Module):
    """Yu et al., BiSeNet: Bilateral Segmentation Network for Real-time Semantic Segmentation, on ResNet-18.

    Layers and channels are those of the authors' code, which has more convolutions than section 3 names.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.backbone = resnet_stages(resnet18)
        self.spatial = nn.Sequential(
            Conv2dNormActivation(3, 64, 7, stride=2), Conv2dNormActivation(64, 64, 3, stride=2),
            Conv2dNormActivation(64, 64, 3, stride=2), Conv2dNormActivation(64, 128, 1))
        self.context = nn.Sequential(nn.AdaptiveAvgPool2d(1), Conv2dNormActivation(512, 128, 1))
        self.attend = nn.ModuleList([AttentionRefinement(512), AttentionRefinement(256)])
        self.refine = nn.ModuleList(Conv2dNormActivation(128, 128, 3) for _ in range(2))
        self.fuse = Conv2dNormActivation(2 * 128, 256, 1)
        self.select = SqueezeExcitation(256, 256)
        self.predictor = nn.Sequential(Conv2dNormActivation(256, 64, 3), nn.Conv2d(64, num_classes, 1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        _, stride8, stride16, stride32 = self.backbone(images).values()
        y = self.context(stride32)  # [B, 128, 1, 1]
        y = self.refine[0](enlarge(self.attend[0](stride32) + y, stride16))
        y = self.refine[1](enlarge(self.attend[1](stride16) + y, stride8))
        y = self.fuse(torch.cat([self.spatial(images), y], 1))
        logits = at_least_float32(self.predictor(y + self.select(y)))
        return {"out": enlarge(logits, images)}


NETWORKS = {
    "bisenet-r18": BiSeNet,
    "deeplabv3-r101": deeplabv3,
    "semantic-fpn-r101": SemanticFPN,
    "pspnet-r101": PSPNet,
}


# ============ detection ============


class DetectionOutput(NamedTuple):
    losses: dict[str, Tensor]  # torchvision's, by its names; empty in evaluation
    detections: list[dict[str, Tensor]]  # torchvision's, in the images' own pixels; empty in training
    A: Tensor  # [B, 3·nodes] gate activations; [B, 0] of a static model
    cost: Tensor  # [B] expected multiply-adds of cells and paths, differentiable; 0 of a static model
    routes: Routes
    sizes: list[tuple[int, int]]  # height and width of each image as the backbone saw it, without padding
    padded: tuple[int, int]  # height and width of the batch


class RoutedPyramid(nn.Module):
    """Layer17 as the feature pyramid of torchvision's detectors: P2 to P6, each by a 1x1 convolution."""

    def __init__(self, layers: int, width: int, gate: str, channels: int):
        super().__init__()
        self.out_channels = channels  # a name that torchvision asks for
        self.backbone = RoutedBackbone(layers, width, gate, scales=5)
        self.laterals = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in self.backbone.channels)
        for lateral in self.laterals:
            nn.init.kaiming_uniform_(lateral.weight, a=1)  # as torchvision starts its own pyramid
            nn.init.zeros_(lateral.bias)

    def forward(self, x: Tensor) -> tuple[OrderedDict[str, Tensor], Routes]:
        """Images [B, 3, H, W], H and W multiples of 64 -> five maps [B, channels, H/stride, W/stride],
        routes."""
        features, routes = self.backbone.route(x)
        maps = OrderedDict()
        for level, (lateral, feature) in enumerate(zip(self.laterals, features)):
            maps[str(level)] = lateral(feature)
        return maps, routes


class FixedPyramid(nn.Module):
    """A `RoutedPyramid` with one route for all images."""

    def __init__(self, backbone: FixedBackbone, laterals: nn.ModuleList):
        super().__init__()
        self.out_channels = laterals[0].out_channels
        self.backbone, self.laterals = backbone, laterals

    def predict(self, x: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W], H and W multiples of 64 -> five maps [B, channels, H/stride, W/stride]."""
        return [lateral(feature) for lateral, feature in zip(self.laterals, self.backbone(x))]

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """The maps of `predict` by level, "0" to "4"."""
        return OrderedDict((str(level), y) for level, y in enumerate(self.predict(x)))


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
        self.routed = isinstance(pyramid, RoutedPyramid)
        self.stride = pyramid.backbone.stride if self.routed else 32
        self.dim = 3 * pyramid.backbone.num_nodes if self.routed else 0
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

    def prepare(self, images: list[Tensor], targets: list[dict] | None = None):
        """-> (ImageList of one tensor [B, 3, H, W], resized, normalised and padded; targets to match).

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
        if self.routed:
            maps, routes = self.pyramid(batch.tensors)
            cost = self.backbone.expected_cost(routes, *padded)
        else:
            maps, routes = self.pyramid(batch.tensors), Routes.none(len(images))
            cost = batch.tensors.new_zeros(len(images))
        proposals, losses = self.rcnn.rpn(batch, maps, targets)
        detections, roi_losses = self.rcnn.roi_heads(maps, proposals, batch.image_sizes, targets)
        detections = self.rcnn.transform.postprocess(detections, batch.image_sizes, sizes)
        losses = losses | roi_losses
        return DetectionOutput(losses, detections, routes.A, cost, routes, batch.image_sizes, padded)

    def cut(self, route: Tensor) -> Detector:
        """The static detector of a route, with a copy of the weights that it uses; see `FixedBackbone`."""
        fixed, pyramid = copy.deepcopy(self), self.pyramid
        backbone, laterals = pyramid.backbone.cut(route), copy.deepcopy(pyramid.laterals)
        fixed.rcnn.backbone = FixedPyramid(backbone, laterals).train(self.training)
        fixed.routed, fixed.dim = False, 0
        return fixed.to(memory_format=torch.channels_last)

    def routes(self, images: list[Tensor]) -> Routes:
        """The routes alone: no heads run."""
        return self.pyramid(self.prepare(images)[0].tensors)[1]

    def budgeted_cost(self, height: int, width: int) -> int:
        """C_all of the budget: `DetectionOutput.cost` with everything open."""
        return self.backbone.costs(height, width).budgeted

    def real_cost(self, routes: Routes, height: int, width: int, count: str = "paper") -> dict[str, Tensor]:
        """Multiply-adds of the backbone by part, int64 [B] or, static, [1]: what the papers' tables show.

        Of a static backbone "paper" counts the convolutions alone, as they do: 88.4 G for ResNet-50-FPN.
        """
        if self.routed:
            return self.backbone.real_cost(routes, height, width, count)
        if isinstance(self.pyramid, FixedPyramid):
            return self.backbone.real_cost(height, width, count)
        if count != "paper":
            height, width = height + -height % self.stride, width + -width % self.stride
        return {"network": static_cost(resnet50_fpn, height, width, elementwise=count == "exact")}


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


def resnet50_fpn(frozen: bool = False) -> nn.Module:
    """torchvision's ResNet-50 with FPN.

    frozen: batch norm and the first two stages are fixed, as torchvision trains it from ImageNet weights.
    """
    options = dict(norm_layer=nn.BatchNorm2d, trainable_layers=5)
    if frozen:
        options = dict(norm_layer=FrozenBatchNorm2d, trainable_layers=3)
    return resnet_fpn_backbone(backbone_name="resnet50", weights=None, **options)


class Exportable(nn.Module):
    """The part of a static network that can be exported.

    Takes normalised images [B, 3, H, W], sides multiples of the stride. Gives logits [B, classes, H, W], or
    of a detector the maps P2 to P6.
    """

    def __init__(self, network: FixedSegmenter | Detector):
        super().__init__()
        self.network = network.pyramid if isinstance(network, Detector) else network

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        return self.network.predict(images)


# ============ cost of static networks ============

_static_costs: dict[tuple, Tensor] = {}


def static_cost(build, height: int, width: int, elementwise: bool) -> Tensor:
    """`count_multiply_adds` of the network that `build` makes, for one image: int64 [1]."""
    key = (build, height, width, elementwise)
    if key not in _static_costs:
        with torch.device("meta"):  # shapes alone: nothing is allocated, nothing computed
            network, image = build().eval(), torch.empty(1, 3, height, width)
        _static_costs[key] = torch.tensor([count_multiply_adds(network, image, elementwise)])
    return _static_costs[key]


def count_multiply_adds(network: nn.Module, image, elementwise: bool = True) -> int:
    """Multiply-adds of one forward pass as the papers count: convolutions and linear layers, and, where
    `elementwise`, 2 per element of batch and group norm, 1 of ReLU and of pooling; not resizing, sigmoids,
    sums and products of maps."""
    per_element = {nn.BatchNorm2d: 2, FrozenBatchNorm2d: 2, nn.GroupNorm: 2}
    per_element |= {nn.ReLU: 1, nn.MaxPool2d: 1, nn.AdaptiveAvgPool2d: 1}
    total = 0

    def add(module, inputs, output):
        nonlocal total
        # Of adaptive pooling every input element is summed once.
        counted = inputs[0] if isinstance(module, nn.AdaptiveAvgPool2d) else output
        total += per_element[type(module)] * counted.numel()

    hooks = []
    for module in network.modules():
        if elementwise and type(module) in per_element:
            hooks.append(module.register_forward_hook(add))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)
    for hook in hooks:
        hook.remove()
    return total + counter.get_total_flops() // 2  # it counts a multiply-add as two


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

# Checkpoints of Dynamic Routing's authors: their names of the convolutions -> ours. A norm is theirs with
# ".norm" behind the convolution's name; ours has the next number.
PUBLISHED_NAMES = {
    r"\.stem_1\.": ".0.",
    r"\.stem_2\.0\.": ".3.",
    r"\.stem_2\.1\.": ".4.",
    r"\.stem_3\.0\.": ".7.",
    r"\.stem_3\.1\.": ".8.",
    r"\.init_layer\.": ".init.",
    r"\.all_cell_list\.": ".layers.",
    r"\.cell_ops\._ops\.0\.op\.([01])\.": r".cell.body.\1.",
    r"\.cell_ops\._ops\.0\.op\.2\.": ".cell.body.4.",
    r"\.cell_ops\._ops\.0\.op\.3\.": ".cell.body.5.",
    r"\.res_(up|down)\.1\.": r".\1.0.",
    r"\.gate_conv_beta\.0\.": ".gate.features.0.",
    r"\.gate_conv_beta\.2\.": ".gate.decide.",
    r"^sem_seg_head\.layer_decoder_list\.(\d)\.": r"head.laterals.\1.0.",
    r"^sem_seg_head\.": "head.",
}
ANY_CHECKPOINT = "a checkpoint of train_seg.py, train_det.py or of Dynamic Routing's authors"
FIRST = "backbone.stem.0.weight"


def from_published_name(name: str) -> str:
    """A weight's name in the checkpoints of Dynamic Routing's authors -> its name in `RoutedSegmenter`."""
    for theirs, ours in PUBLISHED_NAMES.items():
        name = re.sub(theirs, ours, name)
    return re.sub(r"\.(\d+)\.norm\.", lambda number: f".{int(number[1]) + 1}.", name)


def published_weights(contents: dict) -> dict[str, Tensor] | None:
    """The weights in a checkpoint of Dynamic Routing's authors, by our names; None of any other file.

    Their input is BGR on 0..255 with the mean taken off, ours RGB on 0..1 with the mean taken off and divided
    by the deviation. That is a permutation and a factor in the first convolution, which pads nothing.
    """
    found = contents.get("model", contents)
    if not isinstance(found, dict) or "backbone.stem.stem_1.weight" not in found:
        return None
    weights = {}
    for name, value in found.items():
        if isinstance(value, (Tensor, np.ndarray)):
            weights[from_published_name(str(name))] = torch.as_tensor(value)
    first = weights.get(FIRST)
    if first is None or first.dim() != 4 or first.shape[1] != 3:
        return None
    deviation = 255 * first.new_tensor([0.229, 0.224, 0.225])  # ImageNet's, RGB
    return weights | {FIRST: first.flip(1) * deviation[:, None, None]}


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
    state = model.state_dict()
    found = {str(name): weight for name, weight in found.items()}  # a file may have numbers as names
    found = {name: weight for name, weight in found.items() if not name.endswith("num_batches_tracked")}
    fits = {}
    for name, weight in found.items():
        if name in state and getattr(weight, "shape", None) == state[name].shape:
            fits[name] = weight
    missing = model.load_state_dict(fits, strict=False).missing_keys
    return Initialized(list(fits), missing, [name for name in found if name not in fits])


def initialize(model: nn.Module, path: Path | str) -> Initialized:
    """Starts a model from the weights of a file.

    A model of the routing space takes a checkpoint of ours, for either task, or its weights alone, or one of
    Dynamic Routing's authors. Gates and head may be missing in it, as in the authors' ImageNet backbones
    "Fix". A network on a ResNet of torchvision's takes torchvision's ImageNet weights of that ResNet. Raises
    InputError where the file cannot be read or does not fit.
    """
    if not model.dim and not isinstance(model, FixedSegmenter):
        detector = isinstance(model, Detector)
        body = model.pyramid.body if detector else model.network.backbone
        wanted = f"torchvision's weights of {'ResNet-50' if detector else model.resnet}"
        report = load_matching(body, read_file(path, wanted))
        if report.missing:
            raise InputError(f"--init {path}: not {wanted}: no {report.missing[0]}")
        for name in report.left_over:
            if not name.startswith("fc."):  # the classifier
                raise InputError(f"--init {path}: not {wanted}: there is also {name}")
        return report
    contents = read_file(path, ANY_CHECKPOINT)
    weights = published_weights(contents) or contents.get("weights", contents)
    weights = weights if isinstance(weights, dict) else {}
    prefix = "rcnn.backbone." if isinstance(model, Detector) else ""  # of the same backbone's names
    found = {}
    for name, weight in weights.items():
        name = str(name)
        if name.startswith("rcnn.backbone.backbone."):
            name = name.removeprefix("rcnn.backbone.")
        found[prefix + name if name.startswith("backbone.") else name] = weight
    report = load_matching(model, found)
    if prefix + FIRST not in report.matched:  # a few biases always fit
        words = "its weights do not fit the network; give a checkpoint of a routed one of the same --width"
        raise InputError(f"--init {path}: {words}")
    return report


def load_published(path: Path | str, variant: str, device: torch.device) -> tuple[nn.Module, dict]:
    """A segmentation checkpoint of Dynamic Routing's authors -> the model in evaluation mode, and about it.

    The variant says which gate it has, which their files do not: Dynamic-Raw's are full. Raises InputError
    where the file is none of theirs or lacks a weight.
    """
    contents = read_file(path, ANY_CHECKPOINT)
    weights = published_weights(contents)
    if weights is None:
        raise InputError(f"{path}: none of Dynamic Routing's authors' checkpoints, which --variant is for")
    if "head.predictor.weight" not in weights:
        raise InputError(f"{path}: a backbone without a head; train from it with --init")
    numbers = [int(name.split(".")[2]) for name in weights if re.match(r"backbone\.layers\.\d{1,3}\.", name)]
    args = dict(
        variant=variant, task="segmentation", num_classes=len(weights["head.predictor.weight"]),
        layers=1 + max(numbers, default=0), width=len(weights[FIRST]),
        gate="full" if variant == "dr-raw" else "small")
    model = build_model(**args)
    missing = load_matching(model, weights).missing
    if missing:
        lacking = f"lacks {len(missing)} weights of {variant}, the first {missing[0]}"
        raise InputError(f"{path}: {lacking}; train from it with --init")
    return model.to(device).eval(), {"model_args": args, "iteration": int(contents.get("iteration", 0))}


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
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started us
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):
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


class Process(NamedTuple):
    """This process among those that work together; rank 0 is the one that writes and prints."""

    rank: int
    world: int
    device: torch.device


def start_process(device: str | None = None, workers: int = 0) -> Process:
    """Joins the process group where torchrun set one up, and picks the device: CUDA, else MPS, else the CPU.

    On a CPU, torch gets the cores that `workers` loader processes leave: a thread that shares its core with a
    loader holds up all others. Raises InputError where `device` is not to be had, or where torchrun would not
    get over a restart.
    """
    rank, world, local = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
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
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
