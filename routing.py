"""The routed backbone: stem, nodes with their cells and gates, per-image routes, and what a route costs.

    backbone = RoutedBackbone(layers=16, width=64, gate="full")
    features, A, cost = backbone(images)     # images [B, 3, H, W], H and W multiples of backbone.stride
    features = backbone.cut(route)(images)   # static: the paths of `route` alone, bool [1 + nodes, 3]

The network is a grid of layers x scales. Node s of a layer works at scale s: stride 4·2^s, width·2^s
channels. Its *cell* transforms the sum of what arrives. Its *gate* looks at the same sum and gives each
*path* a weight alpha: up to scale s-1, keep at s, down to s+1. The gates decide for each image by itself, so
every image has an architecture of its own, A(x). Four words say what runs for an image:

    open       A path is open where its alpha exceeds OPEN.
    closed     A node is closed where its alphas sum to less than OPEN.
    delivered  An open node delivers along each of its paths: its cell's output times alpha, or zeros where
               the path is not open. A closed node delivers its input, as it is, along keep alone.
    reached    A node is reached where something is delivered to it. Other nodes do not run; their A is 0.

Training runs everything and multiplies by zero what is closed. Evaluation can skip closed work, image by
image. Both follow these rules and give the same result: a trained network's in float32 within 1e-5 of the
largest value; where convolutions run in TF32, torch's default on GPUs that have it, within 3e-3, and a gate
at its threshold may decide otherwise.

A *route* is a choice of paths for all images. Paths outside it do not exist, and a node without a path has no
cell and hands its input on: what is left is a static network, a `FixedBackbone`.

The space is that of Dynamic Routing (Li et al., CVPR 2020), A(x) that of DivDR, section 3. Needs torch alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

UP, KEEP, DOWN = 0, 1, 2  # a node's three entries in A; a path leads from scale s to scale s + path - 1
OPEN = 1e-4
LARGE = 2**18  # numbers in an image's finest map; from here on a CPU evaluates a batch image by image


class Routes(NamedTuple):
    """What the gates decided. Row 0 is the init node; the others are the nodes by layer, then by scale."""

    logits: Tensor  # [B, 1 + nodes, 3] before the non-linearity; 0 without a path and in nodes not reached
    alpha: Tensor  # [B, 1 + nodes, 3] in [0, 1): relu(tanh(logits))
    reached: Tensor  # [B, 1 + nodes] bool

    @property
    def A(self) -> Tensor:
        """Gate activations [B, 3·nodes], per node (up, keep, down), without the init node."""
        return self.alpha[:, 1:].flatten(1)

    def activations(self, space: str = "alpha") -> Tensor:
        """A(x), or for "logit" its values before the non-linearity (DivDR, supplement 7.2)."""
        return self.A if space == "alpha" else self.logits[:, 1:].flatten(1)

    @classmethod
    def none(cls, images: int, device: torch.device | str = "cpu") -> Routes:
        """What a static network has: the rows of no node, A is [images, 0]."""
        nothing = torch.zeros(images, 1, 3, device=device)
        return cls(nothing, nothing, nothing[..., 0] > 0)


class Costs(NamedTuple):
    """Multiply-adds of one image of one size, part by part (int64, on the CPU). Row 0 is the init node."""

    stem: int
    cell: Tensor  # [1 + nodes]
    path: Tensor  # [1 + nodes, 3]
    gate: Tensor  # [1 + nodes]
    every_gate: bool  # whether the gate of a node that is not reached counts too
    full: int  # C_all of the budget: all cells and paths, fully open


def nodes_per_layer(layers: int, scales: int = 4) -> list[int]:
    """Nodes of each layer: 2, 3, 4, 4, ..., `scales` in the last. (16) has 61 in all, (17, scales=5) has 66.

    Raises ValueError if the grid is too shallow to reach its coarsest scale.
    """
    if scales not in (4, 5):
        raise ValueError(f"scales={scales}: there are 4 or 5")
    if layers < scales - 1:
        raise ValueError(f"layers={layers}: {scales} scales take at least {scales - 1}")
    return [min(layer + 2, 4) for layer in range(layers - 1)] + [scales]


def conv_bn(c_in: int, c_out: int, relu: bool = True, **conv) -> list[nn.Module]:
    """Convolution without bias, batch norm and, by default, ReLU."""
    layers = [nn.Conv2d(c_in, c_out, bias=False, **conv), nn.BatchNorm2d(c_out)]
    if relu:
        layers.append(nn.ReLU(inplace=True))
    return layers


def separable_conv(c_in: int, c_out: int, relu: bool = True, stride: int = 1) -> list[nn.Module]:
    """Depthwise 3x3 and pointwise 1x1 convolution, then batch norm; there is no norm between the two."""
    depthwise = nn.Conv2d(c_in, c_in, 3, stride=stride, padding=1, groups=c_in, bias=False)
    return [depthwise, *conv_bn(c_in, c_out, relu, kernel_size=1)]


def stem(in_channels: int, width: int) -> nn.Sequential:
    """[B, in_channels, H, W] -> [B, width, H/4, W/4]. The first convolution is not padded: 256 -> 127 -> 127
    -> 64."""
    return nn.Sequential(
        *conv_bn(in_channels, width, kernel_size=3, stride=2),
        *separable_conv(width, width),
        *separable_conv(width, width, stride=2),
    )


def resize(x: Tensor, **size) -> Tensor:
    """Bilinear, in the precision of x [B, C, h, w]; size or scale_factor as in `F.interpolate`.

    Autocast on a GPU would turn x into float32, and all later sums with it. So it is off here.
    """
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return F.interpolate(x, mode="bilinear", align_corners=False, **size)
    return F.interpolate(x, mode="bilinear", align_corners=False, **size)


def at_least_float32(x: Tensor) -> Tensor:
    """x, in float32 if it is in half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class Cell(nn.Module):
    """Two stacked separable convolutions plus identity, then ReLU; the shape stays."""

    def __init__(self, channels: int):
        super().__init__()
        first = separable_conv(channels, channels)
        second = separable_conv(channels, channels, relu=False)
        self.body = nn.Sequential(*first, *second)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).add_(x).relu_()


class Gate(nn.Module):
    """A node's input [B, C, h, w] -> logits [B, 3] as (up, keep, down), 0 for a path that does not exist.

    `small`: the input is first shrunk to a quarter of its height and width, but to no less than one pixel.
    Logits are in float32 at least, for half precision cannot tell OPEN.
    """

    def __init__(self, channels: int, paths: tuple[int, ...], small: bool):
        super().__init__()
        self.small = small
        self.order = [path for path in (KEEP, UP, DOWN) if path in paths]  # as in published checkpoints
        self.features = nn.Sequential(*conv_bn(channels, channels // 2, kernel_size=1))
        self.decide = nn.Conv2d(channels // 2, len(paths), 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.small and min(x.shape[-2:]) >= 4:
            x = resize(x, scale_factor=0.25)
        elif self.small:
            x = resize(x, size=[max(side // 4, 1) for side in x.shape[-2:]])
        pooled = F.adaptive_avg_pool2d(self.features(x), 1).flatten(1)  # [B, C/2]
        # On one pixel a linear layer does what the 1x1 convolution does, in less time.
        logits = at_least_float32(F.linear(pooled, self.decide.weight.flatten(1), self.decide.bias))
        column = dict(zip(self.order, logits.unbind(1)))
        nothing = logits.new_zeros(logits.shape[0])  # not len(): an exported network would be fixed to it
        return torch.stack([column.get(path, nothing) for path in (UP, KEEP, DOWN)], 1)


class Node(nn.Module):
    """A cell, its gate (None: no gate), and the paths that leave it."""

    def __init__(self, channels: int, up: bool, down: bool, gate: str | None):
        super().__init__()
        self.channels = channels
        self.paths = (UP,) * up + (DOWN,) * down + (KEEP,)
        self.cell = Cell(channels)
        self.up = nn.Sequential(*conv_bn(channels, channels // 2, kernel_size=1)) if up else None
        self.down = nn.Sequential(*conv_bn(channels, channels * 2, kernel_size=1)) if down else None
        self.gate = Gate(channels, self.paths, small=gate == "small") if gate else None

    def exists(self) -> list[bool]:
        """Which of up, keep and down it has."""
        return [path in self.paths for path in (UP, KEEP, DOWN)]

    def restrict(self, row: list[bool]) -> None:
        """Leaves the paths (up, keep, down) that `row` opens; without any, cell and gate go too."""
        self.paths = tuple(path for path in self.paths if row[path])
        if not self.paths:
            self.cell = self.gate = None
        self.up = self.up if row[UP] else None
        self.down = self.down if row[DOWN] else None

    def carry(self, path: int, h: Tensor, weight: Tensor | None) -> Tensor:
        """Sends the cell's output [B, C, h, w] up or down one scale, times `weight` [B, 1, 1, 1] if given."""
        if path == UP:
            return resize(_weighted(self.up(h), weight), scale_factor=2)
        # Pooling takes the stride: a strided 1x1 convolution of few channels in channels_last writes past its
        # buffers (oneDNN in torch 2.15). Unlike h[..., ::2, ::2], pooling has a gradient in channels_last.
        return _weighted(self.down(F.avg_pool2d(h, 1, stride=2)), weight)


class Grid(nn.Module):
    """Stem and nodes of the routing space, and what each part costs.

    Args:
        layers: 16 gives the 61 nodes of Layer16, 33 those of Layer33; with `scales=5`, 17 gives Layer17's 66.
        width: channels at stride 4, doubled with every coarser scale; even.
        gate: "full", or "small": the gate sees its input shrunk to a quarter; None: no gates.
        scales: nodes of the last layer, 4 (segmentation, strides 4...32) or 5 (detection, strides 4...64).
        in_channels: of the images.

    Attributes: nodes_per_layer, num_nodes, channels (of each output), stride (the coarsest; H and W are
    multiples of it). Raises ValueError for sizes that cannot be built.
    """

    def __init__(
        self, layers: int = 16, width: int = 64, gate: str | None = "full", scales: int = 4,
        in_channels: int = 3,
    ):
        super().__init__()
        if gate not in ("full", "small", None):
            raise ValueError(f"gate={gate!r}: a gate is 'full' or 'small', or None for no gates")
        if width < 2 or width % 2:
            raise ValueError(f"width={width}: must be even, for gates halve it, and at least 2")
        self.width, self.gate, self.in_channels = width, gate, in_channels
        self.nodes_per_layer = nodes_per_layer(layers, scales)
        self.num_nodes = sum(self.nodes_per_layer)
        self.stride = 4 * 2 ** (scales - 1)
        self.channels = [width * 2**s for s in range(scales)]

        self.stem = stem(in_channels, width)
        self.init = Node(width, up=False, down=True, gate=gate)
        self.layers = nn.ModuleList()
        for here, after in zip(self.nodes_per_layer, self.nodes_per_layer[1:] + [0]):
            layer = nn.ModuleList()  # the last one, which has no layer after it, only keeps
            for s in range(here):
                layer.append(Node(width * 2**s, up=s > 0 and after > 0, down=s + 1 < after, gate=gate))
            self.layers.append(layer)
        self._costs: dict[tuple, Costs] = {}

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if isinstance(module, Gate):
                nn.init.constant_(module.decide.bias, 1.5)  # every path starts open: tanh(1.5) = 0.905

    def all_nodes(self) -> list[Node]:
        """The init node, then the nodes by layer and scale: the rows of `Routes` and `Costs`."""
        return [self.init] + [node for layer in self.layers for node in layer]

    def _layers(self):
        """The layers, the init node's first, each with the rows of its nodes in `Routes`, and with how many
        nodes the next layer has; after the last one, how many outputs there are."""
        first, layers = 0, [[self.init], *self.layers]
        for layer, after in zip(layers, [*layers[1:], layers[-1]]):
            yield layer, slice(first, first + len(layer)), len(after)
            first += len(layer)

    def stem_map(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> the stem's map [B, width, H/4, W/4].

        Raises ValueError if H or W is not a multiple of `stride`.
        """
        height, width = x.shape[-2:]
        if height % self.stride or width % self.stride:
            words = f"both must be multiples of {self.stride}, see pad_to_stride"
            raise ValueError(f"image of {height}x{width}: {words}")
        return self.stem(x)

    def _run(
        self, first: Tensor, forced: Tensor | None = None, skip: bool = False
    ) -> tuple[list[Tensor], Routes | None]:
        """The stem's map through the layers -> features, and, where there are gates, the routes. Without
        gradients it works in place: the caller must not use the map afterwards.

        forced: [B, 1 + nodes, 3], alpha in place of what the gates say. skip: an image, B = 1, runs without
        what is closed for it; else all runs, and what is closed is multiplied by zero.
        """
        arrived = [first]  # per node of the layer: [B, C, h, w], or None where nothing is delivered
        place = "cpu" if skip else first.device  # of all that decides what runs
        reached = torch.ones(first.shape[0], 1, dtype=torch.bool, device=place)  # [B, n]
        decided = []
        for layer, rows, targets in self._layers():
            for s, node in enumerate(layer):
                if arrived[s] is None and node.cell is not None and (not skip or reached[0, s]):
                    arrived[s] = _zeros_at(s, first)  # closed paths of an open node deliver zeros
            runs, weight = [node.paths for node in layer], None
            passes = [node.cell is None for node in layer]  # whether, or times what, the input goes on
            if self.gate:
                here = reached.to(first.device, non_blocking=True)
                logits, alpha = self._decide(layer, rows, arrived, here, forced)  # [B, n, 3]
                decided.append((logits, alpha, here))
                weight = (alpha * (alpha > OPEN)).to(first.dtype)[..., None, None, None]  # [B, n, 3, 1, 1, 1]
                if skip:
                    alpha = alpha.detach().cpu()  # the layer's one wait for the device
                    opened = (alpha[0] > OPEN).tolist()
                    runs = [[path for path in paths if opened[s][path]] for s, paths in enumerate(runs)]
                closed = alpha.sum(-1) < OPEN  # [B, n]
                reached = _reached_next(reached, closed, targets)
                if skip:
                    passes = closed[0].tolist()
                else:
                    for s, of_node in enumerate(closed.to(first.dtype)[..., None, None, None].unbind(1)):
                        passes[s] = passes[s] or of_node  # [B, 1, 1, 1]
            arrived = _deliver(layer, arrived, runs, weight, passes, targets)
        features = [_zeros_at(s, first) if y is None else y for s, y in enumerate(arrived)]
        if not self.gate:
            return features, None
        return features, Routes(*(torch.cat(parts, 1) for parts in zip(*decided)))

    def _decide(
        self, layer, rows: slice, arrived: list, reached: Tensor, forced: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What the gates of a layer say: logits, and alpha = relu(tanh(logits)) or `forced`, each [B, n, 3].

        Both are 0 in nodes that are not `reached` [B, n], and for paths that do not exist.
        """
        like = next(y for y in arrived if y is not None)
        nothing = at_least_float32(like.new_zeros(like.shape[0], 3))
        logits = []
        for node, y in zip(layer, arrived):
            logits.append(nothing if node.gate is None or y is None else node.gate(y))
        logits = torch.stack(logits, 1) * reached[..., None]
        if forced is None:
            return logits, F.relu(torch.tanh(logits))
        exists = torch.tensor([node.exists() for node in layer]).to(forced)
        return logits, forced[:, rows] * exists * reached[..., None]

    def costs(self, height: int, width: int, count: str = "paper") -> Costs:
        """Multiply-adds of every part for one image of `height` x `width` pixels.

        Args:
            count: "paper" is what the published code of Dynamic Routing reports: map sizes rounded down;
                every gate, run or not; a ReLU with each path; nothing for the init node's cell and gate, nor
                for keep in the last layer. "exact" is what runs here, at sizes padded to `stride`. "conv" is
                the convolutions of "exact" alone: half of what `torch.utils.flop_counter` counts.
        """
        if count not in ("paper", "exact", "conv"):
            raise ValueError(f"count={count!r}: known counts are 'paper', 'exact' and 'conv'")
        key = (height, width, count)
        if key not in self._costs:
            self._costs[key] = _count_costs(self, height, width, count)
        return self._costs[key]

    def _sum_costs(self, costs: Costs, opened: Tensor, gated: Tensor) -> dict[str, Tensor]:
        """Multiply-adds [B] by part, of the paths that are `opened` [B, 1 + nodes, 3] and the gates that
        count, `gated` [B, 1 + nodes], both on the CPU."""
        return {
            "stem": torch.full((len(opened),), costs.stem),
            "cells": (opened.any(-1) * costs.cell).sum(1),
            "paths": (opened * costs.path).sum((1, 2)),
            "gates": (gated * costs.gate).sum(1),
        }


class RoutedBackbone(Grid):
    """A grid whose gates route each image: images [B, 3, H, W] -> (features, A, cost); see `forward`.

    Arguments and attributes are those of `Grid`, and dim, the length of A.
    """

    def __init__(
        self, layers: int = 16, width: int = 64, gate: str = "full", scales: int = 4, in_channels: int = 3
    ):
        if gate is None:
            raise ValueError("gate=None: a routed network has gates, 'full' or 'small'")
        super().__init__(layers, width, gate, scales, in_channels)
        self.dim = 3 * self.num_nodes

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Images [B, 3, H, W] -> features, A, cost.

        features: one tensor [B, width·2^s, H/4/2^s, W/4/2^s] per scale, fine to coarse.
        A: gate activations [B, 3·nodes] in [0, 1), per node (up, keep, down), 0 where there is no path.
        cost: [B] expected multiply-adds of cells and paths (paper count), differentiable; a budget is a share
            of `costs(H, W).full`, what it is with everything open.

        Raises ValueError if H or W is not a multiple of `stride`.
        """
        features, routes = self.route(x)
        return features, routes.A, self.expected_cost(routes, *x.shape[-2:])

    def route(
        self, x: Tensor, skip: bool | None = None, alpha: Tensor | None = None
    ) -> tuple[list[Tensor], Routes]:
        """`forward` in full: features and every decision of the gates.

        Args:
            skip: run image by image, each without its closed work; waits for the device once per layer. By
                default in evaluation of single images, and on a CPU of large ones: a batch of small images
                takes less time together, and so does any batch on a GPU.
            alpha: [B, 1 + nodes, 3] in place of what the gates say; they run all the same.
        """
        batch, _, height, width = x.shape
        if skip is None:
            large = self.width * height * width // 16 >= LARGE
            one_by_one = batch == 1 or large and x.device.type == "cpu"
            skip = one_by_one and not self.training
        if not skip or batch == 1:
            return self._run(self.stem_map(x), alpha, skip)
        alphas = [None] * batch if alpha is None else alpha.expand(batch, -1, -1).split(1)
        maps = map(self.stem_map, x.split(1))
        runs = [self._run(first, forced, skip=True) for first, forced in zip(maps, alphas)]
        features, routes = zip(*runs)
        features = [torch.cat(maps) for maps in zip(*features)]
        return features, Routes(*map(torch.cat, zip(*routes)))

    def expected_cost(self, routes: Routes, height: int, width: int) -> Tensor:
        """Multiply-adds [B] (paper count), a path's times alpha, a cell's times its node's largest alpha."""
        costs, alpha = self.costs(height, width), routes.alpha
        cell = costs.cell.to(alpha, non_blocking=True)
        path = costs.path.to(alpha, non_blocking=True)
        return (alpha.amax(-1) * cell).sum(1) + (alpha * path).sum((1, 2))

    def real_cost(self, routes: Routes, height: int, width: int, count: str = "paper") -> dict[str, Tensor]:
        """Multiply-adds of each image by part: stem, cells, paths, gates, each int64 [B] on the CPU."""
        costs = self.costs(height, width, count)
        gated = torch.ones_like(routes.reached) if costs.every_gate else routes.reached
        return self._sum_costs(costs, (routes.alpha > OPEN).cpu(), gated.cpu())

    def open_routes(self) -> Routes:
        """The routes of one image with everything open, every alpha 1: [1, 1 + nodes, ...]."""
        alpha = torch.tensor([node.exists() for node in self.all_nodes()])[None].float()
        return Routes(alpha.clone(), alpha, torch.ones(alpha.shape[:2], dtype=torch.bool))

    def cut(self, route: Tensor) -> FixedBackbone:
        """The static network of a route, bool [1 + nodes, 3], with a copy of the weights that it uses."""
        scales = len(self.channels)
        size = (len(self.nodes_per_layer), self.width, self.gate, scales, self.in_channels)
        fixed = FixedBackbone(route, *size)
        fixed.to(self.stem[0].weight).train(self.training)
        weights = self.state_dict()
        fixed.load_state_dict({name: weights[name] for name in fixed.state_dict()})
        return fixed


class FixedBackbone(Grid):
    """The static network of one route: images [B, 3, H, W] -> features.

    Every image runs the same operations. Paths outside the route do not exist, nor do their weights; a node
    without a path in the route is closed for every image. Gates go on weighing the paths that are left, and
    closing nodes, image by image. On an image whose own open paths all lie in the route, and whose other
    nodes are closed, the features are the routed network's. Without gates every alpha is 1.

    Args:
        route: bool [1 + nodes, 3], the init node first, as (up, keep, down). Nodes that it does not reach are
            closed.
        layers, width, gate, scales, in_channels: as in `Grid`.

    Attributes: fixed_route, without what is not reached; rows, the same as lists, to branch on without
    waiting for the device; filled, for each output whether it can be anything but 0; dim, 0, the length of A.
    Raises ValueError for a route of another grid.
    """

    dim = 0

    def __init__(
        self, route: Tensor, layers: int, width: int, gate: str | None, scales: int = 4, in_channels: int = 3
    ):
        super().__init__(layers, width, gate, scales, in_channels)
        exists = torch.tensor([node.exists() for node in self.all_nodes()])
        if route.shape != exists.shape:
            shapes = f"{tuple(route.shape)}, with {layers} layers it is {tuple(exists.shape)}"
            raise ValueError(f"route of shape {shapes}: a row of up, keep, down for each node")
        route = route.cpu().bool()
        if (route & ~exists).any():
            row = (route & ~exists).any(1).nonzero()[0].item()
            raise ValueError(f"route: row {row} opens a path that its node does not have")
        route, self.filled = self._reached_part(route)
        self.register_buffer("fixed_route", route, persistent=False)
        self.rows = route.tolist()
        for node, row in zip(self.all_nodes(), self.rows):
            node.restrict(row)

    def _reached_part(self, route: Tensor) -> tuple[Tensor, list[bool]]:
        """Returns the route without the paths of nodes that it never reaches, and for each output whether a
        map arrives there that is not all zeros."""
        route, reached, arrives = route.clone(), torch.ones(1, 1, dtype=torch.bool), [True]
        for _, rows, targets in self._layers():
            route[rows] &= reached[0, :, None]
            reached = _reached_next(reached, ~route[None, rows].any(-1), targets)
            following = [False] * targets
            for s, row in enumerate(route[rows].tolist()):
                if not any(row) or self.gate:  # closed nodes hand their input on; a gate may close any node
                    following[s] |= arrives[s]
                for path in (UP, KEEP, DOWN):
                    if row[path]:
                        following[s + path - 1] = True
            arrives = following
        return route, arrives

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] -> one tensor [B, width·2^s, H/4/2^s, W/4/2^s] per scale, fine to coarse.

        Raises ValueError if H or W is not a multiple of `stride`.
        """
        return self._run(self.stem_map(x))[0]

    def from_stem(self, first: Tensor) -> list[Tensor]:
        """`forward` from the stem's map [B, width, H/4, W/4] on, which stays as it is."""
        return self._run(first.clone())[0]

    def route(self, x: Tensor, skip: bool | None = None) -> tuple[list[Tensor], Routes]:
        """The features, and routes without a row: nothing is left to decide, and nothing to skip."""
        return self.forward(x), Routes.none(len(x), x.device)

    def _decide(self, layer, rows, arrived, reached, forced):
        """As in `Grid`, but alpha is 0 where a path outside the route would be open.

        What is up to OPEN stays there too: it counts in whether a node is closed.
        """
        logits, alpha = super()._decide(layer, rows, arrived, reached, forced)
        return logits, alpha.masked_fill(~self.fixed_route[rows] & (alpha > OPEN), 0)

    def expected_cost(self, routes: Routes, height: int, width: int) -> Tensor:
        """What the budget sees: nothing, [B]."""
        return routes.alpha.new_zeros(len(routes.alpha))

    def real_cost(self, routes: Routes, height: int, width: int, count: str = "paper") -> dict[str, Tensor]:
        """Multiply-adds of any image by part: stem, cells, paths, gates, each int64 [1] on the CPU."""
        opened = torch.tensor([self.rows])  # not from the buffer: a GPU would be waited for
        return self._sum_costs(self.costs(height, width, count), opened, opened.any(-1))


def _zeros_at(s: int, first: Tensor) -> Tensor:
    """Zeros [B, C·2^s, H/2^s, W/2^s] of scale s, for a stem's map `first` [B, C, H, W]."""
    B, C, H, W = first.shape
    y = first.new_zeros(B, C * 2**s, H // 2**s, W // 2**s)
    return y.contiguous(memory_format=torch.channels_last)


def _deliver(layer, arrived: list, runs: list, weight: Tensor | None, passes: list, targets: int) -> list:
    """What a layer hands to the `targets` nodes of the next: per node [B, C, h, w], None where nothing comes.

    arrived: likewise, of this layer; emptied as it goes, for no later node needs a map. Per node, runs: the
    paths by which the cell's output goes on, times its `weight` [B, n, 3, 1, 1, 1], None for 1. passes: the
    factor [B, 1, 1, 1] of the input that goes on by keep; True for 1, False for 0.
    """
    following = [None] * targets
    for s, node in enumerate(layer):
        y, arrived[s] = arrived[s], None
        if y is None:
            continue
        h = node.cell(y) if runs[s] else None
        for path in runs[s]:
            alpha = None if weight is None else weight[:, s, path]  # [B, 1, 1, 1]
            if path == KEEP:
                _add(following, s, h, alpha)
            else:
                _add(following, s + path - 1, node.carry(path, h, alpha))
        if passes[s] is not False:
            _add(following, s, y, None if passes[s] is True else passes[s])
    return following


def _reached_next(reached: Tensor, closed: Tensor, targets: int) -> Tensor:
    """[B, n] -> [B, targets]: a reached node delivers along keep and, if not closed, along up and down.

    After the last layer, which only keeps, the answer does not matter.
    """
    more = targets - reached.shape[1]
    delivers = reached & ~closed
    keep = F.pad(reached, (0, more))
    up = F.pad(delivers[:, 1:], (0, more + 1))
    down = F.pad(delivers, (1, more - 1))
    return keep | up | down


def _weighted(y: Tensor, weight: Tensor | None) -> Tensor:
    """y times `weight`; without gradients in place: the caller must not use y afterwards."""
    if weight is None:
        return y
    return y * weight if torch.is_grad_enabled() else y.mul_(weight)


def _add(following: list, to: int, y: Tensor, weight: Tensor | None = None) -> None:
    """Adds y [B, C, h, w], or y times `weight` [B, 1, 1, 1], to the input of the next layer's node `to`.

    Without gradients it does so in place: the caller must not use y afterwards.
    """
    total = following[to]
    if total is None:
        following[to] = _weighted(y, weight)
        return
    in_place = not torch.is_grad_enabled()
    if weight is None:
        following[to] = total.add_(y) if in_place else total + y
    else:  # one pass over the maps
        following[to] = total.addcmul_(y, weight) if in_place else torch.addcmul(total, y, weight)


# ============ what else it takes ============


def fuse(network: nn.Module) -> nn.Module:
    """For inference: folds batch norm into the convolution before it, in every nn.Sequential of `network`.

    Returns the network. Its outputs stay the same to rounding, but it can no longer be trained.
    """
    for sequence in network.modules():
        if not isinstance(sequence, nn.Sequential):
            continue
        for i in range(len(sequence) - 1):
            conv, norm = sequence[i], sequence[i + 1]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.modules.batchnorm._BatchNorm):
                sequence[i], sequence[i + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return network.requires_grad_(False)


def pad_to_stride(images: Tensor, stride: int) -> Tensor:
    """Pads [B, C, H, W] with zeros at the right and at the bottom to multiples of `stride`; channels_last."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (0, -width % stride, 0, -height % stride))
    return padded.contiguous(memory_format=torch.channels_last)


def conv_cost(c_in: int, c_out: int, h: int, w: int, k: int = 1, groups: int = 1) -> int:
    """Multiply-adds of a k x k convolution with an output map of h x w."""
    return k * k * (c_in // groups) * c_out * h * w


def _count_costs(backbone: Grid, height: int, width: int, count: str) -> Costs:
    """The table behind `Grid.costs`."""
    C, paper = backbone.width, count == "paper"
    counted = 0 if count == "conv" else 1  # per element: batch norm 2, ReLU and pooling 1

    def norm(c, h, w):
        return 2 * counted * c * h * w

    def relu(c, h, w):
        return counted * c * h * w

    def separable(c, h, w):
        return conv_cost(c, c, h, w, k=3, groups=c) + conv_cost(c, c, h, w) + norm(c, h, w)

    if paper:
        half = (height // 2, width // 2)
        quarter = (half[0] // 2, half[1] // 2)
    else:
        height, width = (side + -side % backbone.stride for side in (height, width))
        half = ((height - 3) // 2 + 1, (width - 3) // 2 + 1)  # the first convolution is not padded
        quarter = (height // 4, width // 4)
    stem = conv_cost(backbone.in_channels, C, *half, k=3) + norm(C, *half) + relu(C, *half)
    stem += separable(C, *half) + relu(C, *half)
    stem += separable(C, *quarter) + relu(C, *quarter)

    cells, paths, gates = [], [], []
    last = list(backbone.layers[-1])
    for node in backbone.all_nodes():
        c = node.channels
        h, w = quarter[0] * C // c, quarter[1] * C // c
        cell = 2 * separable(c, h, w) + relu(c, h, w)
        per_path = relu(c, h, w)  # the published code has a ReLU with each path
        if not paper:  # here there is one, at the end of the cell
            cell, per_path = cell + per_path, 0
        up = conv_cost(c, c // 2, h, w) + norm(c // 2, h, w) + relu(c // 2, h, w)
        down = conv_cost(c, c * 2, h // 2, w // 2) + norm(c * 2, h // 2, w // 2) + relu(c * 2, h // 2, w // 2)
        path = [up + per_path, per_path, down + per_path]
        if backbone.gate == "small":
            h, w = max(h // 4, 1), max(w // 4, 1)
        gate = conv_cost(c, c // 2, h, w) + norm(c // 2, h, w) + relu(c // 2, h, w)
        decisions = 0 if node.gate is None else node.gate.decide.out_channels
        gate += relu(c // 2, h, w) + c // 2 * decisions  # pooling first
        if paper and node is backbone.init:
            cell = gate = 0
        if node.gate is None:
            gate = 0
        if paper and node in last:
            path = [0, 0, 0]
        cells.append(cell)
        paths.append([cost * exists for cost, exists in zip(path, node.exists())])
        gates.append(gate)
    tables = [torch.tensor(costs) for costs in (cells, paths, gates)]
    return Costs(stem, *tables, every_gate=paper, full=sum(cells) + sum(map(sum, paths)))
