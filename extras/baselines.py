"""Static networks to compare with: those of other papers on torchvision's ResNets, and classic routes.

    network = StaticSegmenter("pspnet-r101", num_classes=19)    # behind the interface of the routed models
    route = read_route("u-net", layers=16)                      # bool [1 + nodes, 3], for a `FixedBackbone`
"""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18, resnet101
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.segmentation import deeplabv3_resnet101
from torchvision.ops import (
    Conv2dNormActivation, FeaturePyramidNetwork, FrozenBatchNorm2d, SqueezeExcitation,
)

from model import ROUTES, Detector, Initialized, InputError, SegmentationOutput, load_matching
from routing import Routes, at_least_float32, nodes_per_layer

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

# ============ behind the interface of the routed models ============


class StaticSegmenter(nn.Module):
    """One of `NETWORKS` behind the interface of `model.Segmenter`: no gates, one cost.

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


def resnet50_fpn(frozen: bool = False) -> nn.Module:
    """torchvision's ResNet-50 with FPN, the pyramid of r50-fpn.

    frozen: batch norm and the first two stages are fixed, as torchvision trains it from ImageNet weights.
    """
    options = dict(norm_layer=nn.BatchNorm2d, trainable_layers=5)
    if frozen:
        options = dict(norm_layer=FrozenBatchNorm2d, trainable_layers=3)
    return resnet_fpn_backbone(backbone_name="resnet50", weights=None, **options)


def initialize(model: nn.Module, weights: dict, path: Path | str) -> Initialized:
    """Starts the ResNet of a model from torchvision's weights of it, read from `path`; all else stays.

    Raises InputError where these are weights of another network.
    """
    detector = isinstance(model, Detector)
    body = model.pyramid.body if detector else model.network.backbone
    wanted = f"torchvision's weights of {'ResNet-50' if detector else model.resnet}"
    report = load_matching(body, weights)
    if report.missing:
        raise InputError(f"--init {path}: not {wanted}: no {report.missing[0]}")
    for name in report.left_over:
        if not name.startswith("fc."):  # the classifier
            raise InputError(f"--init {path}: not {wanted}: there is also {name}")
    return report


@functools.cache
def static_cost(build, height: int, width: int, elementwise: bool) -> Tensor:
    """`count_multiply_adds` of the network that `build` makes, for one image: int64 [1]."""
    with torch.device("meta"):  # shapes alone: nothing is allocated, nothing computed
        network, image = build().eval(), torch.empty(1, 3, height, width)
    return torch.tensor([count_multiply_adds(network, image, elementwise)])


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


# ============ classic networks as routes ============

AUTO_DEEPLAB = (0, 0, 0, 1, 2, 1, 2, 2, 3, 3, 2, 1)  # scales of its 12 cells (Liu et al., CVPR 2019)


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


def named_route(name: str, layers: int = 16) -> Tensor:
    """The route of a classic network, one of `ROUTES`: bool [1 + nodes, 3], in a grid of four scales.

    fcn-32s:       one cell per layer, a quarter of the layers at each stride, 4 to 32.
    deeplabv3:     the same down to stride 16; in the last quarter three branches at strides 8, 16 and 32 take
                   the place of its pyramid of dilated convolutions (of less than four layers: no branches).
    u-net:         down and up again, a scale every eighth of the layers; each scale runs from the way down to
                   the way up, where the two are added.
    hrnetv2:       every quarter of the layers a coarser scale joins; all run on, and every second layer
                   neighbours exchange their maps.
    auto-deeplab:  one cell per layer, at the scales of the network that was found for Cityscapes.
    """
    quarters = [4 * layer // layers for layer in range(layers)]
    grid, step = itertools.product(range(layers), range(4)), max(1, layers // 8)
    if name == "u-net":
        cells = {(layer, s) for layer, s in grid if step * s <= layer < layers - step * s}
    elif name == "hrnetv2":
        cells = {(layer, s) for layer, s in grid if s <= quarters[layer]}
    elif name == "auto-deeplab":
        cells = _chain([AUTO_DEEPLAB[12 * layer // layers] for layer in range(layers)])
    elif name == "fcn-32s":
        cells = _chain(quarters)
    else:
        cells = _chain([min(quarter, 2) for quarter in quarters])
        cells |= {(layer, s) for layer in range(layers - layers // 4, layers) for s in (1, 2, 3)}
    rows = [[False, True, False]]  # the init node keeps
    for layer, count in enumerate(nodes_per_layer(layers)):
        exchanges = name == "hrnetv2" and layer % 2 == 1
        for s in range(count):
            # A cell keeps where its scale goes on; it leads to one that begins, and up where its own ends.
            here, ends = (layer, s) in cells, (layer + 1, s) not in cells
            up = here and ((layer, s - 1) not in cells or ends or exchanges)
            down = here and ((layer, s + 1) not in cells or exchanges)
            keep = here and (layer == layers - 1 or not ends)
            rows.append([up and (layer + 1, s - 1) in cells, keep, down and (layer + 1, s + 1) in cells])
    return torch.tensor(rows)


def _chain(wanted: list[int]) -> set[tuple[int, int]]:
    """One cell (layer, scale) per layer, at the scale that is wanted, or one nearer to it than the last."""
    scales = [0]
    for scale in wanted[1:]:
        scales.append(scales[-1] + (scale > scales[-1]) - (scale < scales[-1]))
    return set(enumerate(scales))
