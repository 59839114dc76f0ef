"""The models: variants, segmentation networks, detectors, checkpoints, and what a command needs to start one.

    model = build_model("divdr-a", "segmentation", num_classes=19)
    logits, A, cost, routes = model(images)         # images [B, 3, H, W], normalised; any H and W

    model = build_model("divdr-a", "detection", num_classes=80, masks=True)
    out = model(images, targets)                    # lists, as torchvision's detectors take them; out.losses
    out = model.eval()(images)                      # out.detections, out.A, out.routes

A *routed* model is a `RoutedBackbone` with a head; a *static* one is torchvision's, behind the same interface, so that
one training loop and one evaluation serve both.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import re
import sys
import zipfile
from collections import OrderedDict
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.segmentation import deeplabv3_resnet101
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

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
    task: str | None = None  # the one task of a static network; None: every task


VARIANTS = {
    "dr-a": Variant("small", lambda1=0.8, budget=0.1),
    "dr-b": Variant("small", lambda1=0.5, budget=0.1),
    "dr-c": Variant("small", lambda1=0.5, budget=0.2),
    "dr-raw": Variant("full"),
    "divdr-a": Variant("small", lambda1=0.8, budget=0.1, lambda2=0.2),
    "divdr-raw": Variant("small", lambda2=0.2),
    "deeplabv3-r101": Variant(None, task="segmentation"),
    "r50-fpn": Variant(None, task="detection"),
}


def variants_of(task: str) -> list[str]:
    """The names in `VARIANTS` that "segmentation" or "detection" can be trained with."""
    return [name for name, variant in VARIANTS.items() if variant.task in (None, task)]


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
        """Empties the list as it goes: beside the logits nothing else needs to be in memory."""
        y = self.laterals[-1](features.pop())
        for lateral in reversed(self.laterals[:-1]):
            y = lateral(F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False) + features.pop())
        y = self.predictor(y)
        return F.interpolate(y, scale_factor=4, mode="bilinear", align_corners=False)

    def cost(self, height: int, width: int, count: str) -> int:
        """Multiply-adds; for `count` see `RoutedBackbone.costs`. The paper count takes a map of H/4 x H/4."""
        h, w = height // 4, (height if count == "paper" else width) // 4
        total = conv_cost(self.predictor.in_channels, self.predictor.out_channels, h, w, k=3)
        for s, lateral in enumerate(self.laterals):
            size, c_out = (h // 2**s, w // 2**s), lateral[0].out_channels
            total += conv_cost(lateral[0].in_channels, c_out, *size)
            total += 0 if count == "conv" else 3 * c_out * size[0] * size[1]  # batch norm and ReLU
        return total


def clustered(routes: Routes, gate_space: str) -> Tensor:
    """What K-means sees, [B, 3·nodes]: A(x), or with "logit" its values before the non-linearity (supplement, 7.2)."""
    return routes.A if gate_space == "alpha" else routes.logits[:, 1:].flatten(1)


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

    def forward(self, images: Tensor, skip: bool | None = None, probe: Tensor | None = None) -> SegmentationOutput:
        """For `skip` and `probe` see `RoutedBackbone.route`."""
        height, width = images.shape[-2:]
        images = pad_to_stride(images, self.backbone.stride).contiguous(memory_format=torch.channels_last)
        features, routes = self.backbone.route(images, skip, probe=probe)
        logits = self.head(features)[..., :height, :width]
        A = clustered(routes, self.gate_space)
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


class DetectionOutput(NamedTuple):
    losses: dict[str, Tensor]  # torchvision's, by its names; empty in evaluation
    detections: list[dict[str, Tensor]]  # torchvision's, in the images' own pixels; empty in training
    A: Tensor  # [B, 3·nodes] gate activations; [B, 0] of a static model
    cost: Tensor  # [B] expected multiply-adds of cells and paths, differentiable; 0 of a static model
    routes: Routes | None
    sizes: list[tuple[int, int]]  # height and width of each image as the backbone saw it, without padding
    padded: tuple[int, int]  # height and width of the batch
    proposals: list[int]  # regions of each image that the box head looked at


class RoutedPyramid(nn.Module):
    """Layer17 as the feature pyramid of torchvision's detectors: P2 to P6, strides 4 to 64, by a 1x1 convolution each."""

    def __init__(self, layers: int, width: int, gate: str, channels: int):
        super().__init__()
        self.out_channels = channels  # a name that torchvision asks for
        self.backbone = RoutedBackbone(layers, width, gate, scales=5)
        self.laterals = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in self.backbone.channels)
        for lateral in self.laterals:
            nn.init.kaiming_uniform_(lateral.weight, a=1)  # as torchvision starts its own pyramid
            nn.init.zeros_(lateral.bias)

    def forward(self, x: Tensor, probe: Tensor | None = None) -> tuple[OrderedDict[str, Tensor], Routes]:
        """Images [B, 3, H, W], H and W multiples of 64 -> five maps [B, channels, H/stride, W/stride], and the routes.
        For `probe` see `RoutedBackbone.route`."""
        features, routes = self.backbone.route(x, probe=probe)
        maps = [lateral(feature) for lateral, feature in zip(self.laterals, features)]
        return OrderedDict((str(level), y) for level, y in enumerate(maps)), routes


def _in_float32(module: nn.Module, inputs, out):
    """A forward hook: what comes out, at any depth, in float32 where it is in less."""
    if isinstance(out, Tensor):
        return out.float() if out.dtype in (torch.bfloat16, torch.float16) else out
    return type(out)(_in_float32(module, inputs, part) for part in out)


class Detector(nn.Module):
    """torchvision's Faster or Mask R-CNN on a routed pyramid or, static, on its own ResNet-50-FPN.

    Resizing, RPN, RoI heads, losses, assignment of anchors and post-processing are torchvision's. Images of a batch are
    padded to a common size, of which the gates see the whole: to have an image's own route, run it alone or among its like.

    Args:
        num_classes: without the background, which is label 0; the classes are labels 1 to num_classes.
        pyramid: the backbone; takes images whose sides are multiples of `stride`.
        masks: also segment instances (Mask R-CNN).
        short_sides, long_side: pixels; each image is resized so that its short side is one of `short_sides` (drawn in
            training, the last in evaluation) and its long side at most `long_side`.
        anchor: pixels, side of the anchors on the finest map, doubled on each coarser one. Boxes of 7 times that side
            are pooled from stride 16 and others from the map by the same scale (32 gives torchvision's 224).
        proposals: of the RPN per image in evaluation; twice as many in training.
        rois: regions per image that the box head is trained on.
        gate_space: see `RoutedSegmenter`.
    """

    counts = ("paper", "exact")

    def __init__(self, num_classes: int, pyramid: nn.Module, masks: bool, short_sides: list[int], long_side: int,
                 anchor: int, proposals: int, rois: int, gate_space: str = "alpha"):  # fmt: skip
        super().__init__()
        self.gate_space = gate_space
        self.routed = isinstance(pyramid, RoutedPyramid)
        self.stride = pyramid.backbone.stride if self.routed else 32
        channels = pyramid.out_channels
        options = dict(
            min_size=tuple(short_sides), max_size=long_side, size_divisible=self.stride,
            rpn_anchor_generator=AnchorGenerator(tuple((anchor * 2**i,) for i in range(5)), ((0.5, 1.0, 2.0),) * 5),
            rpn_pre_nms_top_n_train=2 * proposals, rpn_post_nms_top_n_train=2 * proposals,
            rpn_pre_nms_top_n_test=proposals, rpn_post_nms_top_n_test=proposals, box_batch_size_per_image=rois,
            box_roi_pool=roi_align(7, anchor),
            box_head=TwoMLPHead(channels * 7**2, 4 * channels),
            box_predictor=FastRCNNPredictor(4 * channels, num_classes + 1),
        )  # fmt: skip
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
        self._costs: dict[tuple, int] = {}

    @property
    def pyramid(self) -> nn.Module:
        """The part that has batch norm: images [B, 3, H, W] -> maps."""
        return self.rcnn.backbone

    @property
    def backbone(self) -> RoutedBackbone:
        return self.pyramid.backbone

    @property
    def dim(self) -> int:
        """Length of A(x)."""
        return 3 * self.backbone.num_nodes if self.routed else 0

    def prepare(self, images: list[Tensor], targets: list[dict] | None = None):
        """-> (ImageList of one tensor [B, 3, H, W], resized, normalised and padded; targets to match)."""
        images, targets = self.rcnn.transform(images, targets)
        images.tensors = images.tensors.contiguous(memory_format=torch.channels_last)
        return images, targets

    def forward(
        self, images: list[Tensor], targets: list[dict] | None = None, probe: Tensor | None = None
    ) -> DetectionOutput:
        """images: list of [3, H, W] on 0..1, of any size. targets, in training: a list of dicts with boxes [n, 4] as
        x1 y1 x2 y2 in pixels, labels int64 [n] from 1, and with masks also masks uint8 [n, H, W]; n may be 0.
        For `probe` see `RoutedBackbone.route`."""
        sizes = [tuple(image.shape[-2:]) for image in images]
        batch, targets = self.prepare(images, targets)
        if self.routed:
            maps, routes = self.pyramid(batch.tensors, probe)
            A, cost = clustered(routes, self.gate_space), self.backbone.expected_cost(routes, *batch.tensors.shape[-2:])
        else:
            maps, routes = self.pyramid(batch.tensors), None
            A, cost = batch.tensors.new_zeros(len(images), 0), batch.tensors.new_zeros(len(images))
        proposals, losses = self.rcnn.rpn(batch, maps, targets)
        detections, roi_losses = self.rcnn.roi_heads(maps, proposals, batch.image_sizes, targets)
        detections = self.rcnn.transform.postprocess(detections, batch.image_sizes, sizes)
        return DetectionOutput(losses | roi_losses, detections, A, cost, routes, batch.image_sizes,
                               tuple(batch.tensors.shape[-2:]), [len(p) for p in proposals])  # fmt: skip

    def activations(self, images: list[Tensor]) -> Tensor:
        """A(x) alone, [B, 3·nodes]: no heads run."""
        return clustered(self.pyramid(self.prepare(images)[0].tensors)[1], self.gate_space)

    def budgeted_cost(self, height: int, width: int) -> int:
        """C_all of the budget: `DetectionOutput.cost` with everything open."""
        return self.backbone.costs(height, width).budgeted

    def real_cost(self, routes: Routes | None, height: int, width: int, count: str = "paper") -> dict[str, Tensor]:
        """Multiply-adds of the backbone by part, int64 [B] or, static, [1]: what the papers' tables show.

        Of a static backbone "paper" counts the convolutions alone, as they do: 88.4 G for ResNet-50-FPN at 800x800.
        """
        if self.routed:
            return self.backbone.real_cost(routes, height, width, count)
        if count != "paper":
            height, width = height + -height % self.stride, width + -width % self.stride
        key = (height, width, count)
        if key not in self._costs:
            with torch.device("meta"):
                twin, image = resnet50_fpn(frozen=False).eval(), torch.empty(1, 3, height, width)
            self._costs[key] = count_multiply_adds(twin, image, elementwise=count == "exact")
        return {"network": torch.tensor([self._costs[key]])}

    def rest_cost(self, height: int, width: int, proposals: int, detections: int) -> dict[str, int]:
        """Multiply-adds of an image outside the backbone, convolutions and linear layers, at the padded size.

        {"laterals", "rpn", "box head", "mask head"}: the 1x1 convolutions to P2…P6 (a static backbone has its own
        inside), the RPN, and the heads for so many proposals and detections.
        """
        channels = self.pyramid.out_channels
        height, width = height + -height % self.stride, width + -width % self.stride
        maps = [(-(-height // stride), -(-width // stride)) for stride in (4, 8, 16, 32, 64)]
        inputs = self.backbone.channels if self.routed else []
        return {
            "laterals": sum(conv_cost(c, channels, h, w) for c, (h, w) in zip(inputs, maps)),
            "rpn": sum(h * w for h, w in maps) * self._unit_costs["rpn"],
            "box head": proposals * self._unit_costs["box head"],
            "mask head": detections * self._unit_costs["mask head"],
        }

    @cached_property
    def _unit_costs(self) -> dict[str, int]:
        """Multiply-adds of the RPN for one place, of the heads for one region."""
        heads, x = self.rcnn.roi_heads, torch.empty(1, self.pyramid.out_channels, 1, 1, device="meta")
        parts = {
            "rpn": (self.rcnn.rpn.head, [x]),
            "box head": (nn.Sequential(heads.box_head, heads.box_predictor), x.expand(-1, -1, 7, 7)),
            "mask head": (nn.Sequential(heads.mask_head, heads.mask_predictor), x.expand(-1, -1, 14, 14)),
        }
        if not heads.has_mask():
            parts["mask head"] = (nn.Identity(), x)
        return {name: count_multiply_adds(copy.deepcopy(part).to("meta"), map_, elementwise=False)
                for name, (part, map_) in parts.items()}  # fmt: skip


def roi_align(side: int, anchor: int) -> MultiScaleRoIAlign:
    """Regions of P2 to P5 as maps of side x side (P6 has none, as in torchvision).

    torchvision guesses the scale of each map from the first images that it sees and keeps it, and guesses wrong where
    these are padded by 41 % or more, as small ones can be: so the first that it sees here has no padding.
    """
    levels = ["0", "1", "2", "3"]
    align = MultiScaleRoIAlign(levels, side, sampling_ratio=2, canonical_scale=7 * anchor)
    maps = OrderedDict((level, torch.zeros(1, 1, 64 // 2**i, 64 // 2**i)) for i, level in enumerate(levels))
    align(maps, [torch.tensor([[0.0, 0, 256, 256]])], [(256, 256)])
    return align


def resnet50_fpn(frozen: bool) -> nn.Module:
    """torchvision's ResNet-50 with FPN. frozen: batch norm and the first two stages fixed, as torchvision trains it from
    ImageNet weights; otherwise everything learns."""
    return resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d if frozen else nn.BatchNorm2d,
        trainable_layers=3 if frozen else 5)  # fmt: skip


def load_resnet50(model: Detector, path: Path | str) -> str:
    """Starts a static detector from a file of torchvision's ResNet-50 ImageNet weights; returns what it did, in words.

    Raises InputError where the file is missing, is no such file, or lacks one of the weights.
    """
    weights = read_file(path, "torchvision's weights of ResNet-50")
    body = model.pyramid.body.state_dict()
    lacking = [name for name in body if getattr(weights.get(name), "shape", None) != body[name].shape]
    if lacking:
        raise InputError(f"--init {path}: has no {lacking[0]} of the right shape; give torchvision's weights of ResNet-50")
    model.pyramid.body.load_state_dict({name: weights[name] for name in body})
    return f"{len(body)} tensors matched"


def count_multiply_adds(network: nn.Module, image: Tensor, elementwise: bool = True) -> int:
    """Multiply-adds of one forward pass as the papers count: convolutions and linear layers, and (`elementwise`)
    2 per element of batch norm, 1 of ReLU and of pooling; resizing and additions are not counted."""
    per_element = {nn.BatchNorm2d: 2, FrozenBatchNorm2d: 2, nn.ReLU: 1, nn.MaxPool2d: 1, nn.AdaptiveAvgPool2d: 1}
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
    **detector,
) -> nn.Module:
    """The network of a variant.

    Args:
        variant: a key of `VARIANTS`.
        task: "segmentation" or "detection".
        num_classes: of detection, without the background.
        layers, width: size of a routed backbone, by default 64 wide with 16 layers, in detection 17.
        gate: "full" or "small", by default the variant's.
        gate_space: see `RoutedSegmenter`.
        detector: of detection alone: pyramid (channels of the maps, 256; the heads' widths follow), masks (False),
            short_sides ((800,)), long_side (1333), anchor (32), proposals (1000), rois (512), see `Detector`; frozen
            (False), see `resnet50_fpn`.

    Raises InputError on an unknown variant or task, and on sizes that cannot be built or do not apply.
    """
    if variant not in VARIANTS:
        raise InputError(f"--variant {variant}: unknown; choose one of {', '.join(VARIANTS)}")
    if task not in ("segmentation", "detection"):
        raise InputError(f"task {task!r}: unknown; known are 'segmentation' and 'detection'")
    if VARIANTS[variant].task not in (None, task):
        raise InputError(f"--variant {variant}: a network for {VARIANTS[variant].task}; choose one of {', '.join(variants_of(task))}")
    static = VARIANTS[variant].gate is None
    if static and any(value is not None for value in (layers, width, gate, detector.get("pyramid"))):
        raise InputError(f"--layers, --width, --gate and --pyramid do not apply to {variant}, a network of fixed size")
    width, gate = 64 if width is None else width, gate or VARIANTS[variant].gate
    try:
        if task == "detection":
            model = _build_detector(static, num_classes, 17 if layers is None else layers, width, gate, gate_space, **detector)
        elif static:
            model = StaticSegmenter(deeplabv3_resnet101, num_classes, **detector)
        else:
            model = RoutedSegmenter(num_classes, 16 if layers is None else layers, width, gate, gate_space, **detector)
    except ValueError as error:
        raise InputError(f"--{error}") from None
    return model.to(memory_format=torch.channels_last)  # pointwise convolutions are matrix products on it


def _build_detector(static, num_classes, layers, width, gate, gate_space, pyramid=None, masks=False, short_sides=(800,),
                    long_side=1333, anchor=32, proposals=1000, rois=512, frozen=False) -> Detector:  # fmt: skip
    body = resnet50_fpn(frozen) if static else RoutedPyramid(layers, width, gate, 256 if pyramid is None else pyramid)
    return Detector(num_classes, body, masks, short_sides, long_side, anchor, proposals, rois, gate_space)


def save_checkpoint(path: Path | str, model: nn.Module, keep: Path | str | None = None, **contents) -> None:
    """Writes the model's weights and `contents` (tensors, numbers, strings, lists and dicts of these) at once or not
    at all: into a temporary file beside `path`, which then takes its place; the file before it becomes `keep`, if given.

    `load_checkpoint` needs `contents` to hold "model_args", the arguments of `build_model`. Raises InputError where it
    cannot be written, a full disk for one; what was there is untouched.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"weights": model.state_dict(), **contents}, file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's writer turns some of the former into the latter
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or getattr(error.__context__, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"{path}: could not be written ({reason}); what was there is kept; make room and go on with --resume") from None


def load_checkpoint(path: Path | str, device: torch.device | str = "cpu") -> tuple[nn.Module, dict]:
    """A file of `save_checkpoint` -> the model in evaluation mode on `device`, and the contents.

    Nothing in the file is executed. Raises InputError where it is missing, unreadable or no checkpoint.
    """
    contents = read_file(path, "a checkpoint; training writes them to runs/NAME/last.pt")
    if not {"weights", "model_args"} <= contents.keys():
        raise InputError(f"{path}: holds no weights and model_args; give a file written by train_seg.py or train_det.py")
    try:
        model = build_model(**contents["model_args"])
        model.load_state_dict(contents["weights"])
    except (RuntimeError, TypeError, AttributeError):
        raise InputError(f"{path}: its weights do not fit the model it says it holds ({contents['model_args']})") from None
    return model.to(device).eval(), contents


# Checkpoints of Dynamic Routing's authors: our names of the parts -> theirs, in this order.
PUBLISHED_NAMES = [
    (r"^backbone\.stem\.0\.", "backbone.stem.stem_1."),
    (r"^backbone\.stem\.1\.", "backbone.stem.stem_1.norm."),
    (r"^backbone\.stem\.3\.", "backbone.stem.stem_2.0."),
    (r"^backbone\.stem\.4\.", "backbone.stem.stem_2.1."),
    (r"^backbone\.stem\.5\.", "backbone.stem.stem_2.1.norm."),
    (r"^backbone\.stem\.7\.", "backbone.stem.stem_3.0."),
    (r"^backbone\.stem\.8\.", "backbone.stem.stem_3.1."),
    (r"^backbone\.stem\.9\.", "backbone.stem.stem_3.1.norm."),
    (r"^backbone\.init\.", "backbone.init_layer."),
    (r"^backbone\.layers\.", "backbone.all_cell_list."),
    (r"\.cell\.body\.0\.", ".cell_ops._ops.0.op.0."),
    (r"\.cell\.body\.1\.", ".cell_ops._ops.0.op.1."),
    (r"\.cell\.body\.2\.", ".cell_ops._ops.0.op.1.norm."),
    (r"\.cell\.body\.4\.", ".cell_ops._ops.0.op.2."),
    (r"\.cell\.body\.5\.", ".cell_ops._ops.0.op.3."),
    (r"\.cell\.body\.6\.", ".cell_ops._ops.0.op.3.norm."),
    (r"\.(up|down)\.0\.", r".res_\1.1."),
    (r"\.(up|down)\.1\.", r".res_\1.1.norm."),
    (r"\.gate\.features\.0\.", ".gate_conv_beta.0."),
    (r"\.gate\.features\.1\.", ".gate_conv_beta.0.norm."),
    (r"\.gate\.decide\.", ".gate_conv_beta.2."),
    (r"^head\.laterals\.(\d)\.0\.", r"sem_seg_head.layer_decoder_list.\1."),
    (r"^head\.laterals\.(\d)\.1\.", r"sem_seg_head.layer_decoder_list.\1.norm."),
    (r"^head\.predictor\.", "sem_seg_head.predictor."),
]


def published_name(name: str) -> str:
    """The name that a weight of `RoutedSegmenter` has in the checkpoints of Dynamic Routing's authors."""
    for ours, theirs in PUBLISHED_NAMES:
        name = re.sub(ours, theirs, name)
    return name


def published_weights(contents: dict) -> dict[str, Tensor] | None:
    """The weights in a checkpoint of Dynamic Routing's authors, by their names; None of any other file.

    The first convolution is made to fit our input. Theirs is BGR on 0..255 with the mean taken off, ours RGB on 0..1 with
    the mean taken off and divided by the deviation, which is a permutation and a factor: that convolution pads nothing.
    """
    weights = contents.get("model", contents)
    first = "backbone.stem.stem_1.weight"
    if not isinstance(weights, dict) or first not in weights:
        return None
    weights = {name: torch.as_tensor(value) for name, value in weights.items() if isinstance(value, (Tensor, np.ndarray))}
    if first not in weights or weights[first].dim() != 4 or weights[first].shape[1] != 3:
        return None
    deviation = 255 * weights[first].new_tensor([0.229, 0.224, 0.225])  # ImageNet's, RGB
    return weights | {first: weights[first].flip(1) * deviation[:, None, None]}


class Initialized(NamedTuple):
    """What `initialize` did with each tensor, by our names and by those in the file."""

    matched: list[str]
    missing: list[str]  # of the model: not in the file, or of another shape there
    left_over: list[str]  # of the file

    def __str__(self) -> str:
        words = f"{len(self.matched)} tensors matched"
        for names, what in ((self.missing, "missing"), (self.left_over, "left over")):
            words += f", {len(names)} {what}" + (f" ({names[0]}{', …' if len(names) > 1 else ''})" if names else "")
        return words


def initialize(model: nn.Module, path: Path | str) -> Initialized:
    """Starts a routed model from the weights of a file: a checkpoint of ours, for either task, or one of Dynamic
    Routing's authors. What the file does not have, or has in another shape, stays as it is: the gates, for one, with
    their ImageNet backbones "Fix", and the head with another number of classes.

    Raises InputError where the file cannot be read or not even its first convolution fits.
    """
    contents = read_file(path, "a checkpoint of train_seg.py, train_det.py or of Dynamic Routing's authors")
    found, rename = published_weights(contents), published_name
    if found is None:
        found, rename = contents.get("weights"), lambda name: name
        found = {_shared_name(name): weight for name, weight in found.items()} if isinstance(found, dict) else {}
    return _take(model, found, rename, f"--init {path}")


def _take(model: nn.Module, found: dict[str, Tensor], rename, what: str) -> Initialized:
    """Loads into the model what fits of `found`, whose names are `rename` of ours."""
    found = {name: weight for name, weight in found.items() if not name.endswith("num_batches_tracked")}
    state = {name: weight for name, weight in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    theirs = {name: rename(_shared_name(name)) for name in state}
    matched = [name for name in state if getattr(found.get(theirs[name]), "shape", None) == state[name].shape]
    if not any(_shared_name(name) == "backbone.stem.0.weight" for name in matched):  # a few biases always fit
        raise InputError(f"{what}: its weights do not fit the network; give a checkpoint of a routed one of the same --width")
    model.load_state_dict({name: found[theirs[name]] for name in matched}, strict=False)
    used = {theirs[name] for name in matched}
    return Initialized(matched, [n for n in state if n not in set(matched)], [n for n in found if n not in used])


def _shared_name(name: str) -> str:
    """A weight of a detector's backbone by the name that it has in a segmentation network."""
    return name.removeprefix("rcnn.backbone.") if name.startswith("rcnn.backbone.backbone.") else name


def load_published(path: Path | str, variant: str, device: torch.device | str = "cpu") -> tuple[nn.Module, dict]:
    """A segmentation checkpoint of Dynamic Routing's authors -> the model in evaluation mode, and the file's contents.

    The variant says which gate it has, "full" or "small", which their files do not. Raises InputError where the file is
    none of theirs or lacks a weight.
    """
    contents = read_file(path, "a checkpoint of train_seg.py, train_det.py or of Dynamic Routing's authors")
    weights = published_weights(contents)
    if weights is None:
        raise InputError(f"{path}: --variant is for checkpoints of Dynamic Routing's authors; this is none of them")
    if "sem_seg_head.predictor.weight" not in weights:
        raise InputError(f"{path}: a backbone without a head, which has nothing to evaluate; train from it with --init")
    layers = 1 + max([int(layer) for layer in re.findall(r"backbone\.all_cell_list\.(\d{1,3})\.", " ".join(weights))], default=0)
    width, classes = len(weights["backbone.stem.stem_1.weight"]), len(weights["sem_seg_head.predictor.weight"])
    args = dict(variant=variant, task="segmentation", num_classes=classes)
    model = build_model(**args, layers=layers, width=width)
    missing = _take(model, weights, published_name, str(path)).missing
    if missing:
        raise InputError(f"{path}: lacks {published_name(missing[0])}, and with it {len(missing)} weights of {variant}; "
                         "train from it with --init")  # fmt: skip
    return model.to(device).eval(), {"model_args": args, "iteration": int(contents.get("iteration", 0))}


def _numpy_globals() -> list:
    """What NumPy's numbers and arrays need to be read from a file, under the names that NumPy 1 and 2 write."""
    makers = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.zeros(0).__reduce__()[0]}
    named = [(maker, f"numpy.{core}.multiarray.{name}") for name, maker in makers.items() for core in ("core", "_core")]
    kinds = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")]
    return [*named, np.ndarray, np.dtype, *kinds]


def read_file(path: Path | str, wanted: str) -> dict:
    """What `torch.save` wrote to a file, with tensors on the CPU. Nothing in the file is executed; NumPy numbers may be in it.

    Raises InputError, with what is `wanted` in it, where the file is missing, unreadable or holds no dict.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:  # torch does not look at the checksums
                    raise ValueError("a record is damaged")
        with torch.serialization.safe_globals(_numpy_globals()):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except IsADirectoryError:
        raise InputError(f"{path}: a folder; give a file in it, such as {path}/last.pt") from None
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; wanted is {wanted}") from None
    except Exception:  # torch's reader raises anything from KeyError to struct.error on a damaged file
        raise InputError(f"{path}: not a file of torch.save, or damaged, or it holds code, which is never run; wanted is {wanted}") from None
    if not isinstance(contents, dict):
        raise InputError(f"{path}: holds a {type(contents).__name__}; wanted is {wanted}")
    return contents


def setting(default, group: str, help: str, least: float | None = None, most: float | None = None, **argument):
    """A field of a settings dataclass: its default, its group in --help, its meaning, the range that `check_ranges`
    holds it to (both ends allowed), and argparse's own keywords."""
    metadata = {"group": group, "help": help, "least": least, "most": most, "argument": argument}
    return dataclasses.field(default=default, metadata=metadata)


def parse_settings(settings, description: str, recipes: dict[str, dict], arguments: list[str] | None = None):
    """The command line -> an instance of the dataclass `settings`, each of whose fields was made by `setting`.

    Underscores become dashes. recipes: per data set, the values of fields whose default is None, for --help.
    Prints one line and exits with 2 where the flags are wrong.
    """
    parser = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {}
    for field in dataclasses.fields(settings):
        title, text, argument = field.metadata["group"], field.metadata["help"], dict(field.metadata["argument"])
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        by_data_set = [f"{name} {recipe[field.name]}" for name, recipe in recipes.items() if recipe.get(field.name) is not None]
        if isinstance(field.default, bool):
            argument["action"] = argparse.BooleanOptionalAction
        elif "action" not in argument:
            argument.setdefault("type", type(field.default))
        if field.default is not None and not isinstance(field.default, bool):
            text += f" (default: {field.default})"
        elif by_data_set:
            text += f" (default: {', '.join(by_data_set)})"
        groups[title].add_argument(f"--{field.name.replace('_', '-')}", default=field.default, help=text, **argument)
    return settings(**vars(parser.parse_args(arguments)))


def check_ranges(settings) -> None:
    """InputError for the first field, or number in a field, outside the range of its `setting`."""
    for field in dataclasses.fields(settings):
        least, most, value = field.metadata["least"], field.metadata["most"], getattr(settings, field.name)
        for number in value if isinstance(value, (tuple, list)) else [value]:
            if least is not None and number is not None and not least <= number <= (1e9 if most is None else most):  # nan fails
                allowed = f"at least {least}, and finite" if most is None else f"between {least} and {most}"
                raise InputError(f"--{field.name.replace('_', '-')} {number}: must be {allowed}")


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
        if number:
            torch.cuda.set_device(int(number))
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
