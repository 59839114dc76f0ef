"""The routed backbone: stem, nodes with their cells and gates, per-image routes, and what a route costs.

    backbone = RoutedBackbone(layers=16, width=64, gate="full")
    features, A, cost = backbone(images)            # images [B, 3, H, W], H and W multiples of backbone.stride

A grid of layers x scales: layer l has up to four (detection: five) nodes, node s works at scale s, that is at stride
4·2^s with width·2^s channels. A node's *cell* transforms the sum of what arrives; its *gate* decides from the same
sum, for each image by itself, which *paths* carry the result on: up to scale s-1, keep at s, down to s+1. So every
image has an architecture of its own, described by its gate activations A(x).

The space is that of Dynamic Routing (Li et al., CVPR 2020); A(x) and its clustering are those of DivDR (section 3).
In evaluation the work behind closed gates is skipped, image by image; in training everything runs and is masked. Both
follow the same rules and give the same result. This file needs nothing but torch: copy it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

UP, KEEP, DOWN = 0, 1, 2  # the order of a node's three entries in A; a path leads from scale s to scale s + path - 1
OPEN = 1e-4  # a path is open where its alpha exceeds this, a node closed where its alphas sum to less
STRIP = 32  # output rows of the stem worked on at a time in inference
ALONE = 2**18  # numbers in an image's finest map from which on a CPU runs images one by one: no batch to gather


class Routes(NamedTuple):
    """What the gates decided. Row 0 of every field is the init node, the rest are the nodes by layer, then scale."""

    logits: Tensor  # [B, 1 + nodes, 3] before the non-linearity, 0 where a path does not exist or the node is not run
    alpha: Tensor  # [B, 1 + nodes, 3] in [0, 1): relu(tanh(logits))
    reached: Tensor  # [B, 1 + nodes] bool: something was delivered to the node, so its gate ran

    @property
    def A(self) -> Tensor:
        """Gate activations [B, 3·nodes], per node (up, keep, down); the init node is not part of it."""
        return self.alpha[:, 1:].flatten(1)


class Costs(NamedTuple):
    """Multiply-adds of one image of one size, part by part (int64, on the CPU). Row 0 is the init node."""

    stem: int
    cell: Tensor  # [1 + nodes]
    path: Tensor  # [1 + nodes, 3]
    gate: Tensor  # [1 + nodes]
    every_gate: bool  # whether a node's gate is charged also where nothing reaches the node

    @property
    def budgeted(self) -> int:
        """C_all of the budget: all cells and paths, open in full."""
        return int(self.cell.sum() + self.path.sum())


def nodes_per_layer(layers: int, scales: int = 4) -> list[int]:
    """Nodes of each layer: 2, 3, 4, 4, …, and `scales` in the last. (16) -> 61 nodes, (17, scales=5) -> 66.

    Raises ValueError where the grid is too shallow for its coarsest scale to be reached.
    """
    if scales not in (4, 5) or layers < scales - 1:
        raise ValueError(f"layers={layers}, scales={scales}: scales is 4 or 5, and layers at least scales - 1")
    return [min(l + 2, 4) for l in range(layers - 1)] + [scales]


def conv_bn(c_in: int, c_out: int, relu: bool = True, **conv) -> list[nn.Module]:
    """Convolution without bias, batch norm and, unless told otherwise, ReLU."""
    layers = [nn.Conv2d(c_in, c_out, bias=False, **conv), nn.BatchNorm2d(c_out)]
    return layers + [nn.ReLU(inplace=True)] if relu else layers


def separable_conv(c_in: int, c_out: int, relu: bool = True, stride: int = 1) -> list[nn.Module]:
    """Depthwise 3x3 and pointwise 1x1 convolution, then batch norm; no norm between the two."""
    depthwise = nn.Conv2d(c_in, c_in, 3, stride=stride, padding=1, groups=c_in, bias=False)
    return [depthwise, *conv_bn(c_in, c_out, relu, kernel_size=1)]


class Stem(nn.Sequential):
    """[B, 3, H, W] -> [B, width, H/4, W/4], H and W multiples of 4. The first convolution has no padding: 256 -> 127 -> 127 -> 64.

    Without gradients, in evaluation, it works on strips of `STRIP` output rows: its maps at half the image's size are the
    largest of the network, too large for a cache.
    """

    def __init__(self, width: int):
        super().__init__(
            *conv_bn(3, width, kernel_size=3, stride=2),
            *separable_conv(width, width),
            *separable_conv(width, width, stride=2),
        )

    def forward(self, x: Tensor) -> Tensor:
        rows, out = x.shape[-2] // 4, None
        if self.training or torch.is_grad_enabled() or rows <= STRIP:
            return super().forward(x)
        for first in range(0, rows, STRIP):
            end = min(first + STRIP, rows)
            above = min(first, 1)  # a row above and three pixels below are seen too; what padding made of them is left out
            strip = super().forward(x[..., 4 * (first - above) : 4 * end + 3, :])[..., above : above + end - first, :]
            if out is None:
                out = _empty((len(x), strip.shape[1], rows, strip.shape[3]), like=strip)
            out[..., first:end, :] = strip
        return out


class Cell(nn.Module):
    """Two stacked separable convolutions plus identity, then ReLU; shape is kept."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(*separable_conv(channels, channels), *separable_conv(channels, channels, relu=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).add_(x).relu_()


class Gate(nn.Module):
    """[B, C, h, w] -> one logit per existing path, [B, paths], in the order keep, up, down.

    It looks at the node's input. `small` shrinks that to a quarter of its height and width first, to 1 where less
    than one pixel would be left.
    """

    def __init__(self, channels: int, paths: int, small: bool):
        super().__init__()
        self.small = small
        self.features = nn.Sequential(*conv_bn(channels, channels // 2, kernel_size=1))
        self.decide = nn.Conv2d(channels // 2, paths, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.small:
            if min(x.shape[-2:]) >= 4:
                x = F.interpolate(x, scale_factor=0.25, mode="bilinear", align_corners=False)
            else:
                size = [max(n // 4, 1) for n in x.shape[-2:]]
                x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        x = F.adaptive_avg_pool2d(self.features(x), 1)
        return F.linear(x.flatten(1), self.decide.weight.flatten(1), self.decide.bias)  # a convolution costs more


class Node(nn.Module):
    """A cell, its gate, and the paths that leave it."""

    def __init__(self, channels: int, up: bool, down: bool, gate: str):
        super().__init__()
        self.channels = channels
        self.cell = Cell(channels)
        self.up = nn.Sequential(*conv_bn(channels, channels // 2, kernel_size=1)) if up else None
        self.down = nn.Sequential(*conv_bn(channels, channels * 2, kernel_size=1)) if down else None
        self.gate = Gate(channels, 1 + up + down, small=gate == "small")

    @property
    def paths(self) -> list[int]:
        """The existing paths, in the order in which A holds them."""
        return [UP] * (self.up is not None) + [KEEP] + [DOWN] * (self.down is not None)

    def logits(self, x: Tensor) -> Tensor:
        """Gate logits [B, 3] as (up, keep, down), 0 for a path that does not exist."""
        gate = self.gate(x)
        gate = gate.to(torch.promote_types(gate.dtype, torch.float32))  # half precision is too coarse for OPEN
        columns = [gate.new_zeros(len(gate))] * 3
        order = [KEEP] + [path for path in self.paths if path != KEEP]
        for path, column in zip(order, gate.unbind(1)):
            columns[path] = column
        return torch.stack(columns, 1)

    def carry(self, path: int, h: Tensor, weight: Tensor) -> Tensor:
        """What arrives at the other end of `path`, up or down, of the cell's output [B, C, h, w], times `weight` [B, 1, 1, 1]."""
        if path == UP:  # weighted while it is small
            return F.interpolate(_weighted(self.up(h), weight), scale_factor=2, mode="bilinear", align_corners=False)
        # The stride of down is taken here: oneDNN's strided 1x1 convolution, in channels_last and with fewer than 8
        # channels, writes past its buffers (seen with torch 2.15 on a CPU). Pooling 1x1, unlike h[..., ::2, ::2], has
        # gradients in channels_last.
        return _weighted(self.down(F.avg_pool2d(h, 1, stride=2)), weight)


class RoutedBackbone(nn.Module):
    """Images [B, 3, H, W] -> (features, A, cost); see `forward`.

    Args:
        layers: 16 gives the 61 nodes of Layer16, 33 those of Layer33; with `scales=5`, 17 gives the 66 of Layer17.
        width: channels at stride 4, doubled with every coarser scale; even.
        gate: "full", or "small": the gate sees its input shrunk to a quarter.
        scales: nodes of the last layer, 4 (segmentation, strides 4…32) or 5 (detection, strides 4…64).

    Attributes:
        nodes_per_layer, num_nodes, stride (the coarsest; H and W are multiples of it), channels (per output feature).
    """

    def __init__(self, layers: int = 16, width: int = 64, gate: str = "full", scales: int = 4):
        super().__init__()
        if gate not in ("full", "small"):
            raise ValueError(f"gate={gate!r}: a gate is 'full' or 'small'")
        if width < 2 or width % 2:
            raise ValueError(f"width={width}: the gates halve it, so it must be even")
        self.width, self.gate = width, gate
        self.nodes_per_layer = nodes_per_layer(layers, scales)
        self.num_nodes = sum(self.nodes_per_layer)
        self.stride = 4 * 2 ** (scales - 1)
        self.channels = [width * 2**s for s in range(scales)]

        self.stem = Stem(width)
        self.init = Node(width, up=False, down=True, gate=gate)
        self.layers = nn.ModuleList()
        for here, after in zip(self.nodes_per_layer, self.nodes_per_layer[1:] + [0]):  # 0: the last layer only keeps
            nodes = [Node(width * 2**s, up=s > 0 and after > 0, down=s + 1 < after, gate=gate) for s in range(here)]
            self.layers.append(nn.ModuleList(nodes))
        self._costs: dict[tuple, Costs] = {}

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if isinstance(module, Gate):
                nn.init.constant_(module.decide.bias, 1.5)  # every path starts open, tanh(1.5) = 0.905

    def all_nodes(self) -> list[Node]:
        """The init node, then the nodes by layer and scale: the rows of `Routes` and `Costs`."""
        return [self.init] + [node for layer in self.layers for node in layer]

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Images [B, 3, H, W] -> features, A, cost.

        features: one tensor [B, width·2^s, H/4/2^s, W/4/2^s] per scale, fine to coarse.
        A: gate activations [B, 3·nodes] in [0, 1), per node (up, keep, down), 0 where a path does not exist.
        cost: [B] expected multiply-adds of cells and paths (paper count), differentiable: what the budget loss sees.

        Raises ValueError where H or W is not a multiple of `stride`.
        """
        features, routes = self.route(x)
        return features, routes.A, self.expected_cost(routes, *x.shape[-2:])

    def route(
        self, x: Tensor, skip: bool | None = None, alpha: Tensor | None = None, probe: Tensor | None = None
    ) -> tuple[list[Tensor], Routes]:
        """`forward` in full: features and every decision of the gates.

        Args:
            skip: leave out the work behind closed gates, image by image; by default in evaluation. Costs one host
                sync per layer.
            alpha: [B, 1 + nodes, 3], used in place of what the gates say (they run all the same).
            probe: [B, 1 + nodes, 3], zeros that are added to the weight of each path: after a backward pass, their
                gradient says what the loss makes of more or less of it, closed ones too. Not with `skip`.
        """
        if x.shape[-2] % self.stride or x.shape[-1] % self.stride:
            raise ValueError(f"image of {x.shape[-2]}x{x.shape[-1]}: both must be multiples of {self.stride}")
        skip = not self.training if skip is None else skip
        if skip and probe is not None:
            raise ValueError("a probe needs skip=False: closed paths are not run")
        if skip and len(x) > 1 and x.device.type == "cpu" and self.width * x.shape[-2] * x.shape[-1] // 16 >= ALONE:
            alphas = [None] * len(x) if alpha is None else alpha.expand(len(x), -1, -1).split(1)
            features, routes = zip(*(self._run(*image, skip) for image in zip(x.split(1), alphas)))
            return [torch.cat(f) for f in zip(*features)], Routes(*(torch.cat(parts) for parts in zip(*routes)))
        return self._run(x, alpha, skip, probe)

    def _run(self, x: Tensor, alpha: Tensor | None, skip: bool, probe: Tensor | None = None) -> tuple[list[Tensor], Routes]:
        """`route`, layer by layer, for all images together."""
        arrived = [self.stem(x)]
        reached = torch.ones(len(x), 1, dtype=torch.bool, device="cpu" if skip else x.device)
        decided, first = [], 0
        for layer in [[self.init], *self.layers]:
            forced, probed = (None if given is None else given[:, first : first + len(layer)] for given in (alpha, probe))
            if skip:
                arrived, reached_next, logits, activations = self._skip_layer(layer, arrived, reached, forced)
            else:
                arrived, reached_next, logits, activations = self._mask_layer(layer, arrived, reached, forced, probed)
            decided.append(Routes(logits, activations, reached.to(x.device, non_blocking=True)))
            reached, first = reached_next, first + len(layer)
        return arrived, Routes(*(torch.cat(parts, 1) for parts in zip(*decided)))

    # Both ways of running a layer take what arrived at its nodes (per node [B, C, h, w]), which images it reached
    # [B, n], and alphas to use instead of the gates' [B, n, 3] or None. Both return what arrives at the next layer,
    # whom that reaches, and the layer's logits and alphas [B, n, 3].

    def _mask_layer(self, layer, arrived, reached, forced, probe=None):
        """Everything runs; what is closed is multiplied by zero. For training, and as the reference."""
        logits = torch.stack([node.logits(x) for node, x in zip(layer, arrived)], 1) * reached[..., None]
        alpha = _alpha(logits, layer, reached, forced)
        closed = alpha.sum(-1) < OPEN  # [B, n]
        weight = alpha * (alpha > OPEN)
        if probe is not None:
            weight = weight + probe * reached[..., None]
        weight = weight.to(arrived[0].dtype)[..., None, None, None]  # [B, n, 3, 1, 1, 1]

        following: list = [None] * _count_targets(layer)
        for s, (node, x) in enumerate(zip(layer, arrived)):
            h = node.cell(x)
            for path in node.paths:
                if path != KEEP:
                    _add(following, s + path - 1, node.carry(path, h, weight[:, s, path]))
            _add(following, s, h, weight[:, s, KEEP])
            _add(following, s, x, closed[:, s, None, None, None].to(x.dtype))  # a closed node delivers its input
        return following, _reached_next(layer, reached, closed), logits, alpha

    def _skip_layer(self, layer, arrived, reached, forced):
        """Only what is open runs, each node and path for its own images: gather, run, scatter."""
        batch, device = len(reached), arrived[0].device
        dtype = torch.promote_types(arrived[0].dtype, torch.float32)
        logits = torch.zeros(batch, len(layer), 3, device=device, dtype=dtype)
        arriving = [reached[:, s].nonzero().flatten().tolist() for s in range(len(layer))]
        for s, node in enumerate(layer):
            if arriving[s]:
                logits[_index(arriving[s], logits), s] = node.logits(_take(arrived[s], arriving[s]))
        alpha = _alpha(logits, layer, reached.to(device, non_blocking=True), forced)
        host = alpha.detach().cpu()  # the layer's one sync: what runs next depends on these numbers
        closed, opened = host.sum(-1) < OPEN, (host > OPEN).tolist()

        following: list = [None] * _count_targets(layer)
        _, channels, height, width = arrived[0].shape
        for s, node in enumerate(layer):
            x, arrived[s] = arrived[s], None  # no later node needs it
            running = [image for image in arriving[s] if any(opened[image][s])]
            passing = [image for image in arriving[s] if closed[image, s]]
            if running:
                h = node.cell(_take(x, running))
                for path in sorted(node.paths, key=lambda path: path == KEEP):  # keep last: it may write over h
                    using = [i for i, image in enumerate(running) if opened[image][s][path]]  # rows of h
                    if using:
                        images, y = [running[i] for i in using], _take(h, using)
                        weight = alpha[_index(images, alpha), s, path, None, None, None].to(y.dtype)
                        y = _weighted(y, weight) if path == KEEP else node.carry(path, y, weight)
                        _scatter(following, s + path - 1, y, images, batch)
                h = y = None  # the largest of what is held
            if passing:  # a closed node delivers its input
                _scatter(following, s, _take(x, passing), passing, batch)
        for s, y in enumerate(following):  # a node may get nothing, or nothing but zeros from closed paths
            if y is None:
                following[s] = _empty((batch, channels * 2**s, height // 2**s, width // 2**s), like=x).zero_()
        return following, _reached_next(layer, reached, closed), logits, alpha

    def costs(self, height: int, width: int, count: str = "paper") -> Costs:
        """Multiply-adds of every part for one image of `height` x `width` pixels.

        Args:
            count: "paper", what the published code of Dynamic Routing reports: nominal map sizes, rounded down; every
                gate, run or not; a ReLU with each path; nothing for the init node's cell and gate and for keep in the
                last layer. "exact", what this code runs (sizes padded to `stride`; without the 3 % of the stem that strips
                do twice). "conv", the convolutions of "exact" alone: half of what `torch.utils.flop_counter` counts.
        """
        key = (height, width, count)
        if key not in self._costs:
            if count not in ("paper", "exact", "conv"):
                raise ValueError(f"count={count!r}: known counts are 'paper', 'exact' and 'conv'")
            self._costs[key] = _count_costs(self, height, width, count)
        return self._costs[key]

    def expected_cost(self, routes: Routes, height: int, width: int) -> Tensor:
        """Multiply-adds [B] of cells and paths (paper count), each weighted by its alpha (a cell: its node's largest)."""
        costs, alpha = self.costs(height, width), routes.alpha
        cell, path = costs.cell.to(alpha, non_blocking=True), costs.path.to(alpha, non_blocking=True)
        return (alpha.amax(-1) * cell).sum(1) + (alpha * path).sum((1, 2))

    def real_cost(self, routes: Routes, height: int, width: int, count: str = "paper") -> dict[str, Tensor]:
        """Multiply-adds of each image by part: {"stem", "cells", "paths", "gates"} -> int64 [B], on the CPU."""
        costs = self.costs(height, width, count)
        opened = (routes.alpha > OPEN).cpu()
        gated = torch.ones_like(routes.reached) if costs.every_gate else routes.reached
        return {
            "stem": torch.full((len(opened),), costs.stem),
            "cells": (opened.any(-1) * costs.cell).sum(1),
            "paths": (opened * costs.path).sum((1, 2)),
            "gates": (gated.cpu() * costs.gate).sum(1),
        }

    def open_routes(self) -> Routes:
        """The routes of one image with everything open, every alpha 1: [1, 1 + nodes, …]."""
        alpha = torch.stack([_exists(node) for node in self.all_nodes()])[None].float()
        return Routes(alpha.clone(), alpha, torch.ones(alpha.shape[:2], dtype=torch.bool))


def _exists(node: Node) -> Tensor:
    """[3] bool: which of up, keep and down the node has."""
    return torch.tensor([path in node.paths for path in (UP, KEEP, DOWN)])


def _alpha(logits: Tensor, layer, reached: Tensor, forced: Tensor | None) -> Tensor:
    """Logits [B, n, 3] -> alpha = relu(tanh(logits)), 0 for what is not reached; or `forced`, under the same rules."""
    if forced is None:
        return F.relu(torch.tanh(logits)) * reached[..., None]
    return forced * torch.stack([_exists(node) for node in layer]).to(forced) * reached[..., None]


def _count_targets(layer) -> int:
    """How many nodes the next layer has, as far as this one leads to them; the last layer keeps, to the outputs."""
    return max(s + path for s, node in enumerate(layer) for path in node.paths)


def _reached_next(layer, reached: Tensor, closed: Tensor) -> Tensor:
    """[B, n] -> [B, n_next]: an open node delivers along each of its paths, a closed one along keep alone."""
    following = reached.new_zeros(len(reached), _count_targets(layer))
    for s, node in enumerate(layer):
        for path in node.paths:
            following[:, s + path - 1] |= reached[:, s] if path == KEEP else reached[:, s] & ~closed[:, s]
    return following


def _empty(shape, like: Tensor) -> Tensor:
    """A new map [B, C, h, w] in channels_last."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _index(images: list[int], rows_of: Tensor) -> Tensor | slice:
    """What takes `images` out of a tensor [B, …]; all of them: a slice, which copies nothing."""
    return slice(None) if len(images) == len(rows_of) else torch.tensor(images).to(rows_of.device, non_blocking=True)


def _flat(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, C·h·w], the same memory where x is channels_last: there images can be taken out and added up whole."""
    return x.permute(0, 2, 3, 1).flatten(1)


def _take(x: Tensor, images: list[int]) -> Tensor:
    """Some images [m, C, h, w] of x [B, C, h, w]; nothing is copied for all of them."""
    if len(images) == len(x):
        return x
    _, C, h, w = x.shape
    return _flat(x).index_select(0, _index(images, x)).view(-1, h, w, C).permute(0, 3, 1, 2)


def _weighted(y: Tensor, weight: Tensor) -> Tensor:
    """y times `weight`; without gradients written over y, which then nothing else may need."""
    return y * weight if torch.is_grad_enabled() else y.mul_(weight)


def _add(following: list, to: int, y: Tensor, weight: Tensor | None = None) -> None:
    """Adds y, or y times `weight`, to what node `to` of the next layer gets; without gradients in place."""
    total = following[to]
    into = None if torch.is_grad_enabled() else total
    if total is None:
        following[to] = y if weight is None else _weighted(y, weight)
    else:
        following[to] = torch.add(total, y, out=into) if weight is None else torch.addcmul(total, y, weight, out=into)


def _scatter(following: list, to: int, y: Tensor, images: list[int], batch: int) -> None:
    """`_add` for y [m, C, h, w] of some images of a batch."""
    if len(images) == batch:
        return _add(following, to, y)
    _, C, h, w = y.shape
    total = _flat(_empty((batch, C, h, w), like=y).zero_() if following[to] is None else following[to])
    into = None if torch.is_grad_enabled() else total
    total = torch.index_add(total, 0, _index(images, total), _flat(y), out=into)
    following[to] = total.view(-1, h, w, C).permute(0, 3, 1, 2)


def fuse(network: nn.Module) -> nn.Module:
    """For inference: folds batch norm into the convolution before it wherever an nn.Sequential of `network` has the two
    in a row, as all in this file do, and returns the network.

    The outputs stay the same to rounding. It cannot be trained afterwards, and its state dict is another.
    """
    for sequence in network.modules():
        if isinstance(sequence, nn.Sequential):
            layers = list(sequence)
            for i, (conv, norm) in enumerate(zip(layers[:-1], layers[1:])):
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.modules.batchnorm._BatchNorm):
                    sequence[i], sequence[i + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return network.requires_grad_(False)


def pad_to_stride(images: Tensor, stride: int) -> Tensor:
    """Pads [B, C, H, W] with zeros at the right and at the bottom to multiples of `stride`."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % stride, 0, -height % stride))


def conv_cost(c_in: int, c_out: int, h: int, w: int, k: int = 1, groups: int = 1) -> int:
    """Multiply-adds of a k x k convolution with an output map of h x w."""
    return k * k * (c_in // groups) * c_out * h * w


def _count_costs(backbone: RoutedBackbone, height: int, width: int, count: str) -> Costs:
    """The table behind `RoutedBackbone.costs`."""
    paper, C = count == "paper", backbone.width
    once = 0 if count == "conv" else 1  # per element: ReLU and pooling 1, batch norm 2
    if paper:
        halved = (height // 2, width // 2)
        quartered = (halved[0] // 2, halved[1] // 2)
    else:
        padded = [n + -n % backbone.stride for n in (height, width)]
        halved = tuple((n - 3) // 2 + 1 for n in padded)  # the first convolution is not padded
        quartered = tuple(n // 4 for n in padded)

    def norm_relu(channels, h, w, relu=1):
        return once * (2 + relu) * channels * h * w

    stem = conv_cost(3, C, *halved, k=3) + norm_relu(C, *halved)
    for size in (halved, quartered):
        stem += conv_cost(C, C, *size, k=3, groups=C) + conv_cost(C, C, *size) + norm_relu(C, *size)

    cells, paths, gates = [], [], []
    for node in backbone.all_nodes():
        c, scale = node.channels, node.channels // C
        h, w = quartered[0] // scale, quartered[1] // scale
        h_gate, w_gate = (max(h // 4, 1), max(w // 4, 1)) if node.gate.small else (h, w)
        relu = once * c * h * w  # published: one with each path; here: one, in the cell
        cell = 2 * (conv_cost(c, c, h, w, k=3, groups=c) + conv_cost(c, c, h, w)) + norm_relu(c, h, w)
        cell += norm_relu(c, h, w, relu=0) + (0 if paper else relu)
        up = conv_cost(c, c // 2, h, w) + norm_relu(c // 2, h, w)
        down = conv_cost(c, c * 2, h // 2, w // 2) + norm_relu(c * 2, h // 2, w // 2)
        path = (torch.tensor([up, 0, down]) + (relu if paper else 0)) * _exists(node)
        gate = conv_cost(c, c // 2, h_gate, w_gate) + norm_relu(c // 2, h_gate, w_gate)
        gate += once * c // 2 * h_gate * w_gate + c // 2 * len(node.paths)
        if paper and node is backbone.init:
            cell = gate = 0
        if paper and node in list(backbone.layers[-1]):
            path = path * 0
        cells.append(cell), paths.append(path), gates.append(gate)
    return Costs(stem, torch.tensor(cells), torch.stack(paths), torch.tensor(gates), every_gate=paper)
