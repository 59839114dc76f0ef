"""The test suite: `python -m pytest -q test_smoke.py`, a few minutes on two cores."""

import contextlib
import copy
import functools
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors
from torchvision.transforms import v2

import data
import evaluate
import flops
import kmeans
import losses
import model
import routing
import train_det
import train_seg

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


def run(*command, cwd=HERE, **env):
    """A command of the project as a person runs it -> (exit status, stdout, stderr)."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    result = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    return result.returncode, result.stdout, result.stderr


def run_here(main, *arguments, cwd):
    """The same of a script's `main`, in this process: without the seconds that importing torch takes."""
    out, error, status, before = io.StringIO(), io.StringIO(), 0, sys.argv
    sys.argv = [main.__module__, *map(str, arguments)]
    try:
        with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            main()
    except SystemExit as exit:
        status = exit.code
    finally:
        sys.argv = before
    return status, out.getvalue(), error.getvalue()


# ============ routing: structure ============


def test_parameters_nodes_and_gates():
    network = model.build_model("dr-raw", "segmentation", 19)
    below = sum(p.numel() for p in network.backbone.parameters())
    head = sum(p.numel() for p in network.head.parameters())
    assert (below, head) == (17_596_853, 188_115)
    backbone = network.backbone
    assert backbone.num_nodes == 61
    features, A, cost = routing.RoutedBackbone(16, 2, "small").eval()(torch.zeros(1, 3, 64, 96))
    assert A.shape == (1, 183) and cost.shape == (1,)
    assert [tuple(f.shape[1:]) for f in features] == [(2, 16, 24), (4, 8, 12), (8, 4, 6), (16, 2, 3)]
    gates = sum(node.gate.decide.out_channels for layer in backbone.layers for node in layer)
    assert gates == 147
    assert routing.nodes_per_layer(16) == [2, 3] + [4] * 14
    assert sum(routing.nodes_per_layer(17, scales=5)) == 66 and routing.nodes_per_layer(17, scales=5)[-1] == 5
    assert sum(p.numel() for p in routing.RoutedBackbone(33).parameters()) == 38_683_551


def test_backbone_refuses_what_it_cannot_build_or_run():
    for arguments in (dict(layers=2), dict(width=7), dict(gate="tiny"), dict(scales=6)):
        with pytest.raises(ValueError):
            routing.RoutedBackbone(**{"width": 4, **arguments})
    with pytest.raises(ValueError, match="multiples of 32"):
        routing.RoutedBackbone(4, 4)(torch.zeros(1, 3, 48, 64))


def test_A_lists_up_keep_down_of_existing_paths_and_gates_start_open():
    backbone = routing.RoutedBackbone(4, 4).eval()
    for module in backbone.modules():
        if isinstance(module, routing.Gate):
            torch.nn.init.zeros_(module.decide.weight)
    _, A, _ = backbone(torch.rand(2, 3, 64, 64))
    entries = A[0].view(-1, 3)
    initial = math.tanh(1.5)
    first, last = entries[0].tolist(), entries[-1].tolist()
    assert first == pytest.approx([0, initial, initial])  # scale 0: no up
    assert last == pytest.approx([0, initial, 0])  # last layer: keep only
    assert entries[2 + 3 - 1].tolist() == pytest.approx([initial] * 3)  # layer 1, scale 2 of 3: all


# ============ routing: routes ============


def reference_routes(backbone, image, alphas):
    """One image through the rules of SPEC-style routing, node by node with plain Python: features, gates that ran,
    cells that ran. `alphas[row]` are (up, keep, down) of node `row`, the init node first."""
    rows = iter(range(1 + backbone.num_nodes))
    arrived, gates, cells = {0: backbone.stem(image)}, set(), set()
    for layer in [[backbone.init], *backbone.layers]:
        following = {}
        for s, node in enumerate(layer):
            row = next(rows)
            if s not in arrived:
                continue
            gates.add(row)
            x = arrived[s]
            names = {"up": 0, "keep": 1, "down": 2}
            exists = {"up": node.up is not None, "keep": True, "down": node.down is not None}
            alpha = {name: float(alphas[row, names[name]]) if exists[name] else 0.0 for name in names}
            if sum(alpha.values()) < 1e-4:
                following.setdefault(s, []).append(x)
                continue
            h = torch.relu(node.cell.body(x) + x)
            if max(alpha.values()) > 1e-4:
                cells.add(row)
            shift = {"up": -1, "keep": 0, "down": 1}
            for name in names:
                if exists[name]:
                    y = {"up": node.up, "keep": torch.nn.Identity(), "down": node.down}[name](h[..., ::2, ::2] if name == "down" else h)
                    if name == "up":
                        y = torch.nn.functional.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)
                    following.setdefault(s + shift[name], []).append(alpha[name] * y * (alpha[name] > 1e-4))
        arrived = {s: sum(ys) for s, ys in following.items()}
    return arrived, gates, cells


def random_alphas(batch, nodes, generator):
    """Mixed routes: about half the paths closed, a quarter of the nodes closed altogether."""
    alpha = torch.rand(batch, 1 + nodes, 3, generator=generator)
    alpha = alpha * (torch.rand(alpha.shape, generator=generator) < 0.5)
    return alpha * (torch.rand(batch, 1 + nodes, 1, generator=generator) < 0.75)


def warmed_backbone(layers=6, width=8, gate="full", scales=4):
    """A backbone whose batch norms have seen data, so that no statistic is trivial."""
    torch.manual_seed(0)
    backbone = routing.RoutedBackbone(layers, width, gate, scales)
    for _ in range(3):
        backbone(torch.randn(4, 3, 64, 128))
    return backbone.eval()


@pytest.mark.parametrize("gate", ["full", "small"])
@torch.no_grad()
def test_skipped_masked_and_plainly_written_routes_agree(gate):
    backbone = warmed_backbone(gate=gate).double()  # in float64 any difference is one of the rules
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 3, 64, 128, generator=generator).double()
    alphas = random_alphas(6, backbone.num_nodes, generator).double()
    alphas[0] = 0  # every gate closed: the stem's output arrives unchanged
    alphas[1, 0] = torch.tensor([0.0, 0.5, 0.0])  # init keeps only: zeros are delivered below
    alphas[2, 0] = 0  # init closed: nothing is delivered below it
    alphas[3, :, :] = 0.7
    alphas[4, 5] = 5e-5  # a node that is not closed (the sum) and has no open path
    skipped, routes = backbone.route(images, skip=True, alpha=alphas)
    masked, routes_masked = backbone.route(images, skip=False, alpha=alphas)
    assert torch.equal(routes.reached, routes_masked.reached)
    torch.testing.assert_close(routes.alpha, routes_masked.alpha, atol=0, rtol=0)
    assert not routes.reached.all() and (routes.alpha[2, 2] == 0).all() and not routes.reached[2, 2]
    costs = backbone.costs(64, 128, "exact")
    for i in range(len(images)):
        expected, gates, cells = reference_routes(backbone, images[i : i + 1], alphas[i])
        for s, (a, b) in enumerate(zip(skipped, masked)):
            want = expected[s][0] if s in expected else torch.zeros_like(a[i])
            torch.testing.assert_close(a[i], want, atol=1e-10, rtol=1e-10)
            torch.testing.assert_close(b[i], want, atol=1e-10, rtol=1e-10)
        assert set(routes.reached[i].nonzero().flatten().tolist()) == gates
        real = backbone.real_cost(routes, 64, 128, "exact")
        assert real["gates"][i] == sum(costs.gate[row] for row in gates)
        assert real["cells"][i] == sum(costs.cell[row] for row in cells)
    torch.testing.assert_close(skipped[0][0], backbone.stem(images[:1])[0], atol=1e-5, rtol=1e-5)
    assert all((f[0] == 0).all() for f in skipped[1:])


def test_a_probe_tells_what_more_of_a_path_would_do():
    """Its gradient against differences of the loss when the alphas themselves are moved, closed paths among them."""
    backbone = warmed_backbone(layers=5, gate="small").double()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()
    alphas = torch.full((2, 1 + backbone.num_nodes, 3), 0.7).double()
    alphas[0, 4, routing.KEEP] = alphas[1, 7, routing.UP] = 0  # closed paths of open nodes, to nodes that others reach too
    alphas[1, 1] = 0  # a closed node, and below it, at scale 1, nothing but what comes from init

    def loss(alphas, **probed):
        features, _ = backbone.route(images, skip=False, alpha=alphas, **probed)
        return sum((feature * feature).sum() for feature in features)

    probe = torch.zeros_like(alphas, requires_grad=True)
    loss(alphas, probe=probe).backward()
    for place in [(0, 0, routing.DOWN), (0, 4, routing.KEEP), (1, 7, routing.UP), (0, 5, routing.DOWN), (1, 9, routing.KEEP)]:
        moved = [alphas.clone(), alphas.clone()]
        moved[0][place] += 2e-4  # at least OPEN, from 0 on
        moved[1][place] += 4e-4
        at = [loss(a).item() for a in (alphas, *moved)]
        slope = (4 * at[1] - 3 * at[0] - at[2]) / 4e-4  # second order
        assert probe.grad[place].item() == pytest.approx(slope, rel=1e-4)
    assert probe.grad[0, 1, routing.UP] == 0  # a path that does not exist
    with pytest.raises(ValueError, match="skip"):
        backbone.route(images, skip=True, probe=probe)


@torch.no_grad()
def let_gates_decide(network):
    """Gates whose decision depends on the image: about half the paths get closed."""
    for module in network.modules():
        if isinstance(module, routing.Gate):
            module.decide.weight.mul_(3)
            module.decide.bias.normal_()


@pytest.mark.parametrize("gate", ["full", "small"])
@torch.no_grad()
def test_an_image_takes_its_route_whatever_else_is_in_the_batch(gate):
    backbone = warmed_backbone(gate=gate).double()
    let_gates_decide(backbone)
    images = torch.randn(5, 3, 64, 64).double() * torch.linspace(0.3, 3, 5)[:, None, None, None]
    masked, together = backbone.route(images, skip=False)
    skipped, routes = backbone.route(images)
    A = routes.A
    assert 0.1 < (A > 0).float().mean() < 0.75 and (A.std(0) > 0).any()  # routes differ between the images
    torch.testing.assert_close(together.alpha, routes.alpha, atol=1e-10, rtol=0)
    for i in range(len(images)):
        alone, route = backbone.route(images[i : i + 1])
        torch.testing.assert_close(route.A[0], A[i], atol=1e-10, rtol=0)
        for a, b, c in zip(alone, skipped, masked):
            torch.testing.assert_close(a[0], b[i], atol=1e-10, rtol=1e-10)
            torch.testing.assert_close(a[0], c[i], atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_images_one_by_one_are_images_together(monkeypatch):
    backbone = warmed_backbone(gate="small").double()
    let_gates_decide(backbone)
    images = torch.randn(5, 3, 64, 96).double() * torch.linspace(0.3, 3, 5)[:, None, None, None]
    together, gathered = backbone.route(images)
    monkeypatch.setattr(routing, "ALONE", 1)
    with monkeypatch.context() as patch:
        patch.setattr(backbone, "_run", lambda x, *rest, run=backbone._run: run(x, *rest) if len(x) == 1 else pytest.fail("a batch"))
        alone, routes = backbone.route(images)
    for a, b in zip([*alone, *routes], [*together, *gathered]):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    forced, _ = backbone.route(images, alpha=routes.alpha)
    for a, b in zip(forced, together):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("strip", [1, 3, 8, 40])
def test_the_stem_in_strips_is_the_stem(monkeypatch, strip):
    stem = routing.Stem(4).double().eval()
    for height in (4, 32, 100, 356):
        images = torch.randn(2, 3, height, 32).double()
        want = stem(images)  # with gradients: whole
        monkeypatch.setattr(routing, "STRIP", strip)
        with torch.no_grad():
            torch.testing.assert_close(stem(images), want, atol=1e-12, rtol=1e-12)
    seen = []  # in training the whole image, for the statistics of batch norm
    stem[0].register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].shape[-2]))
    with torch.no_grad():
        stem.train()(images)
    assert seen == [356]


@pytest.mark.parametrize("gate", ["full", "small"])
@torch.no_grad()
def test_logits_of_the_published_depth_agree_in_float32(gate):
    torch.manual_seed(0)
    network = model.build_model("divdr-raw", "segmentation", 19, width=8, gate=gate)
    let_gates_decide(network)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # plain average over the next batches: activations of the usual size
    for _ in range(3):
        network(torch.randn(4, 3, 64, 128))
    images = torch.randn(6, 3, 60, 120)
    skipped, masked = network.eval()(images), network(images, skip=False)
    assert 0.1 < (skipped.A > 0).float().mean() < 0.75
    exact = copy.deepcopy(network).double()(images.double())  # sixteen layers of gates magnify rounding: to this extent
    rounding = (masked.A - exact.A).abs().max().item()
    assert rounding < 1e-3
    torch.testing.assert_close(skipped.A, masked.A, atol=1e-5 + 2 * rounding, rtol=0)
    torch.testing.assert_close(skipped.A, exact.A.float(), atol=1e-5 + 3 * rounding, rtol=0)
    scale = masked.logits.abs().max().item()
    torch.testing.assert_close(skipped.logits / scale, masked.logits / scale, atol=1e-4, rtol=0)


@torch.no_grad()
def test_folding_batch_norm_and_the_published_way_of_computing_change_nothing():
    torch.manual_seed(0)
    network = model.build_model("divdr-a", "segmentation", 5, layers=5, width=8)
    images = torch.randn(3, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    for _ in range(20):  # batch norms that have seen data
        network.train()(images)
    folded = routing.fuse(copy.deepcopy(network).eval())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    published = copy.deepcopy(network).eval().to(memory_format=torch.contiguous_format)
    for skip in (True, False):
        want, got = network.eval()(images, skip), folded(images, skip)
        for a, b in zip(got[:3], want[:3]):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())
        torch.testing.assert_close(flops.run_as_published(published, images), want.logits, rtol=1e-4, atol=1e-4)
    for openness in (1.0, 0.5):
        alpha, share = flops.mixed_routes(network.backbone, 3, 64, 96, openness)
        assert share == pytest.approx(openness, abs=0.05)
        for skip in (True, False):
            got = folded.head(folded.backbone.route(images, skip, alpha)[0])
            torch.testing.assert_close(got, flops.run_as_published(published, images, alpha), rtol=1e-4, atol=1e-4)


def test_training_mode_closes_nodes_and_passes_gradients():
    backbone = routing.RoutedBackbone(4, 4)
    images = torch.randn(4, 3, 64, 64)
    features, A, cost = backbone(images)
    (sum(f.sum() for f in features) + A.sum() + cost.sum() / 1e6).backward()
    assert all(p.grad is not None for p in backbone.parameters())
    with torch.no_grad():
        for module in backbone.modules():
            if isinstance(module, routing.Gate):
                module.decide.weight.zero_()
                module.decide.bias.fill_(-1.0)
        features, A, cost = backbone(images)
        torch.testing.assert_close(features[0], backbone.stem(images))  # identity, in training too
    assert (A == 0).all() and (cost == 0).all()


# ============ cost ============


def published_count(nodes, C, height, width, classes, small, scales=4):
    """The published accounting written out once more, loop by loop, in multiply-adds: stem, cells, paths, gates, head."""
    conv = lambda ci, co, h, w, k=1, g=1: k * k * ci // g * co * h * w
    bn_relu = lambda c, h, w: 3 * c * h * w
    H, W = height // 2, width // 2
    stem = conv(3, C, H, W, 3) + bn_relu(C, H, W)
    stem += conv(C, C, H, W, 3, C) + conv(C, C, H, W) + bn_relu(C, H, W)
    H, W = H // 2, W // 2
    stem += conv(C, C, H, W, 3, C) + conv(C, C, H, W) + bn_relu(C, H, W)
    cells = gates = 0
    paths = C * H * W  # the init node's keep: one ReLU
    paths += C * H * W + conv(C, 2 * C, H // 2, W // 2) + bn_relu(2 * C, H // 2, W // 2)
    for l, n in enumerate(nodes):
        for s in range(n):
            c, h, w = C * 2**s, H // 2**s, W // 2**s
            cells += 2 * conv(c, c, h, w, 3, c) + 2 * conv(c, c, h, w) + 5 * c * h * w
            ways = 1
            if l + 1 < len(nodes):
                paths += c * h * w
                if s > 0:
                    ways += 1
                    paths += c * h * w + conv(c, c // 2, h, w) + bn_relu(c // 2, h, w)
                if s + 1 < nodes[l + 1]:
                    ways += 1
                    paths += c * h * w + conv(c, 2 * c, h // 2, w // 2) + bn_relu(2 * c, h // 2, w // 2)
            gh, gw = (h // 4, w // 4) if small else (h, w)
            gates += conv(c, c // 2, gh, gw) + 4 * (c // 2) * gh * gw + c // 2 * ways
    head = 0
    if classes:
        head = conv(C, classes, H, H, 3)
        for s in range(scales):
            c, h = C * 2**s, H // 2**s
            out = c if s == 0 else c // 2
            head += conv(c, out, h, h) + bn_relu(out, h, h)
    return stem, cells, paths, gates, head


PUBLISHED_G = [  # layers, scales, classes, height, width, full gate, small gate: G multiply-adds, everything open
    (16, 4, 19, 1024, 2048, 118.085, 102.270),
    (16, 4, 19, 768, 768, 33.607, 29.159),
    (33, 4, 19, 1024, 2048, 244.622, None),
    (17, 5, None, 800, 800, 38.336, 33.110),
]


@pytest.mark.parametrize("layers, scales, classes, height, width, full, small", PUBLISHED_G)
def test_published_flops(layers, scales, classes, height, width, full, small):
    for gate, published in (("full", full), ("small", small)):
        ours = flops.open_cost(layers, scales, classes, height, width, gate, "paper")
        nodes = routing.nodes_per_layer(layers, scales)
        assert ours == sum(published_count(nodes, 64, height, width, classes, gate == "small"))
        if published is not None:
            assert round(ours / 1e9, 3) == published


def test_published_parts_and_budget():
    network = model.build_model("dr-raw", "segmentation", 19)
    parts = network.real_cost(network.backbone.open_routes(), 1024, 2048)
    millions = {part: round(cost.item() / 1e6, 3) for part, cost in parts.items()}
    assert millions == {"stem": 4194.304, "cells": 71189.922, "paths": 24425.005, "gates": 16869.507, "head": 1406.403}
    assert round(network.head.cost(1024, 2048, "exact") / 1e6, 3) == 2812.805
    assert round(network.budgeted_cost(768, 768) / 1e6, 1) == 26891.7


@pytest.mark.parametrize("gate", ["full", "small"])
@torch.no_grad()
def test_exact_convolutions_equal_torchs_flop_counter(gate):
    torch.manual_seed(2)
    network = model.RoutedSegmenter(5, layers=5, width=8, gate=gate).eval()
    generator = torch.Generator().manual_seed(3)
    alphas = random_alphas(8, network.backbone.num_nodes, generator)
    alphas[0], alphas[1] = 1, 0
    for alpha in alphas:  # padded from 90 x 120 to 96 x 128
        with FlopCounterMode(display=False) as counter:
            image = routing.pad_to_stride(torch.randn(1, 3, 90, 120), 32)
            features, routes = network.backbone.route(image, alpha=alpha[None])
            network.head(features)
        ours = sum(network.real_cost(routes, 90, 120, "conv").values()).item()
        assert counter.get_total_flops() == 2 * ours


@torch.no_grad()
def test_expected_cost_equals_real_cost_for_alphas_of_0_and_1():
    backbone = routing.RoutedBackbone(5, 4).eval()
    generator = torch.Generator().manual_seed(4)
    alphas = (random_alphas(4, backbone.num_nodes, generator) > 0).float()
    alphas[0] = 1
    _, routes = backbone.route(torch.randn(4, 3, 64, 96), alpha=alphas)
    real = backbone.real_cost(routes, 64, 96)
    expected = backbone.expected_cost(routes, 64, 96)
    torch.testing.assert_close(expected.double(), (real["cells"] + real["paths"]).double(), rtol=1e-6, atol=0)
    assert expected[0].item() == pytest.approx(backbone.costs(64, 96).budgeted, rel=1e-6)


@torch.no_grad()
def test_static_baseline_counts_what_runs():
    network = model.build_model("deeplabv3-r101", "segmentation", 3)
    with FlopCounterMode(display=False) as counter:
        out = network.eval()(torch.zeros(1, 3, 64, 96))
    assert out.logits.shape == (1, 3, 64, 96) and out.A.shape == (1, 0)
    assert network.real_cost(None, 64, 96, "conv")["network"].item() * 2 == counter.get_total_flops()
    small = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.AdaptiveAvgPool2d(1))
    convolution, elements = 27 * 4 * 64, 4 * 64  # 10x10 -> 8x8 -> 4x4
    assert model.count_multiply_adds(small.eval(), torch.zeros(1, 3, 10, 10)) == convolution + 3 * elements + 64 + 64


# ============ losses ============


def clustering_loss_by_hand(A, centers, sigma2, margin, own=None):
    """Equation (2) in plain Python."""
    terms = []
    for b, a in enumerate(A.tolist()):
        d = [math.sqrt(sum((p - q) ** 2 for p, q in zip(a, mu))) for mu in centers.tolist()]
        k = d.index(min(d)) if own is None else own[b]
        others = math.log(sum(math.exp(-d[j] / (2 * sigma2)) for j in range(len(d)) if j != k))
        terms.append(max(0.0, margin + d[k] / (2 * sigma2) + others))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("B,K,D,var,margin", [(5, 2, 3, 0.4, 1.0), (7, 4, 20, 0.7, 5.0), (1, 3, 1, 0.2, 0.0), (6, 8, 183, 2.0, 1.0)])
def test_clustering_loss_is_equation_2(B, K, D, var, margin):
    g = torch.Generator().manual_seed(B * K)
    A, centers = torch.rand(B, D, generator=g).double(), torch.rand(K, D, generator=g).double()
    want = clustering_loss_by_hand(A, centers, var, margin)
    assert losses.clustering_loss(A, centers, var, margin).item() == pytest.approx(want, rel=1e-12, abs=1e-14)
    assert losses.clustering_loss(A, centers, torch.tensor(var), margin).item() == pytest.approx(want, rel=1e-6, abs=1e-9)
    assert losses.clustering_loss(A.float(), centers.float(), var, margin).item() == pytest.approx(want, rel=1e-5, abs=1e-6)
    own = torch.randint(K, (B,), generator=g)
    want = clustering_loss_by_hand(A, centers, var, margin, own.tolist())
    assert losses.clustering_loss(A, centers, var, margin, own=own).item() == pytest.approx(want, rel=1e-12)


def test_clustering_loss_gradient():
    g = torch.Generator().manual_seed(0)
    centers = torch.rand(4, 6, generator=g).double()
    A = torch.rand(5, 6, generator=g).double()
    A[1] = centers[2]  # exactly on a centre
    A.requires_grad_()
    assert torch.autograd.gradcheck(lambda a: losses.clustering_loss(a, centers, 0.5, 5.0), (A,))
    centers[3] = centers[0]  # two centres at one place
    own = torch.tensor([0, 3, 1, 2, 0])
    assert torch.autograd.gradcheck(lambda a: losses.clustering_loss(a, centers, 0.5, 5.0), (A,))
    assert torch.autograd.gradcheck(lambda a: losses.clustering_loss(a, centers, 0.5, 9.0, own=own), (A,))
    on_both = centers[:1].clone().requires_grad_()  # on two coinciding centres at once
    losses.clustering_loss(on_both, centers, 0.5, 5.0).backward()
    assert on_both.grad.isfinite().all()


def test_clustering_loss_edges():
    A, centers = torch.rand(3, 4), torch.rand(3, 4)
    with pytest.raises(ValueError, match="K >= 2"):
        losses.clustering_loss(A, centers[:1], 0.5, 1.0)
    for bad in [
        lambda: losses.clustering_loss(A[0], centers, 0.5, 1.0),
        lambda: losses.clustering_loss(A[:0], centers, 0.5, 1.0),
        lambda: losses.clustering_loss(A[:, :3], centers, 0.5, 1.0),
        lambda: losses.clustering_loss(A, centers, torch.ones(3), 1.0),
        lambda: losses.clustering_loss(A, centers, 0.5, -1.0),
        lambda: losses.clustering_loss(A, centers, 0.5, 1.0, own=torch.zeros(2, dtype=torch.long)),
    ]:
        with pytest.raises(ValueError):
            bad()
    # The floor, for floats and tensors, and at another value.
    at_floor = losses.clustering_loss(A, centers, losses.SIGMA2_FLOOR, 1.0)
    assert at_floor.isfinite()
    assert torch.equal(losses.clustering_loss(A, centers, 0.0, 1.0), at_floor)
    assert torch.allclose(losses.clustering_loss(A, centers, torch.tensor(0.0), 1.0), at_floor)
    want = losses.clustering_loss(A, centers, 0.3, 1.0)
    assert torch.equal(losses.clustering_loss(A, centers, 0.0, 1.0, sigma2_floor=0.3), want)
    # 1 / (2 sigma2) = 5e11: exp(-distance / ...) is 0 for every other centre, its logarithm is not.
    B = A.clone().requires_grad_()
    loss = losses.clustering_loss(B, centers, 1e-12, 1.0, own=torch.tensor([0, 1, 2]), sigma2_floor=0.0)
    loss.backward()
    assert loss.isfinite() and B.grad.isfinite().all()
    # Half precision is worked on in float32; centres and sigma2 are constants.
    mu, var = centers.clone().requires_grad_(), torch.tensor(0.5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = losses.clustering_loss(A.bfloat16().requires_grad_(), mu, var, 1.0)
    assert half.dtype == torch.float32
    assert torch.equal(half, losses.clustering_loss(A.bfloat16().float(), centers, 0.5, 1.0))
    half.backward()
    assert mu.grad is None and var.grad is None
    # A tie goes to the first centre.
    middle, pair = torch.zeros(1, 2), torch.tensor([[1.0, 0.0], [-1.0, 0.0], [3.0, 0.0]])
    first = losses.clustering_loss(middle, pair, 0.5, 1.0, own=torch.tensor([0]))
    assert torch.equal(losses.clustering_loss(middle, pair, 0.5, 1.0), first)


def test_cost_loss_and_ramp():
    cost = torch.tensor([2.0, 5.0, 11.0], dtype=torch.float64, requires_grad=True)
    loss = losses.cost_loss(cost, 20.0, 0.1)
    assert loss.item() == pytest.approx((6 / 20 - 0.1) ** 2)
    loss.backward()
    assert torch.allclose(cost.grad, torch.full((3,), 2 * (6 / 20 - 0.1) / (20 * 3), dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda c: losses.cost_loss(c, torch.tensor(20.0).double(), 0.1), (cost,))
    assert losses.cost_loss(torch.full((2,), 5e4).half(), 1e5, 0.2).item() == pytest.approx(0.09, rel=2e-3)  # 5e4 + 5e4 is inf in half
    for bad in [lambda: losses.cost_loss(cost, 1.0, 1.5), lambda: losses.cost_loss(cost.mean(), 1.0, 0.5), lambda: losses.cost_loss(cost[:0], 1.0, 0.5)]:
        with pytest.raises(ValueError):
            bad()
    values = [losses.budget_ramp(p) for p in (0.0, 0.39, 0.4, 0.41, 0.42, 0.43, 1.0)]
    assert values == pytest.approx([0, 0, 0, 0.5, 1, 1, 1])
    assert losses.budget_ramp(0.25, start=0.0, length=0.5) == 0.5
    assert [losses.budget_ramp(p, 0.4, 0.0) for p in (0.39, 0.4)] == [0, 1]


# ============ K-means ============


def lloyd_by_hand(x, centers, max_iter=100):
    """Lloyd's algorithm in numpy, float64, for starts that leave no cluster empty."""
    x, centers = x.astype(np.float64), centers.astype(np.float64)
    labels = None
    for _ in range(max_iter):
        new = np.array([((row - centers) ** 2).sum(1).argmin() for row in x])
        if labels is not None and (new == labels).all():
            break
        labels = new
        centers = np.stack([x[labels == j].mean(0) for j in range(len(centers))])
    distances = np.stack([((x - c) ** 2).sum(1) for c in centers], 1)
    return centers, distances.argmin(1), distances.min(1).sum()


def blobs(n, d, k, seed=0, spread=0.1):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(k, d, generator=g)[torch.randint(k, (n,), generator=g)] + spread * torch.randn(n, d, generator=g)


@pytest.mark.parametrize(
    "n,d,k,offset", [(50, 2, 3, 0), (400, 7, 4, 0), (300, 183, 5, 0), (5000, 20, 8, 0), (30, 1, 2, 0), (400, 7, 4, 1000)]
)
@pytest.mark.parametrize("max_iter", [1, 3, 100])
def test_kmeans_is_lloyd(n, d, k, offset, max_iter):
    x = blobs(n, d, k, seed=n) + offset
    init = x[torch.linspace(0, n - 1, k).long()]
    centers, labels, inertia = kmeans.kmeans(x, k, init=init, max_iter=max_iter)
    want_centers, want_labels, want_inertia = lloyd_by_hand(x.numpy(), init.numpy(), max_iter)
    assert centers.dtype == torch.float32 and labels.dtype == torch.int64 and isinstance(inertia, float)
    np.testing.assert_allclose(centers.numpy(), want_centers, rtol=2e-6, atol=2e-6)
    np.testing.assert_array_equal(labels.numpy(), want_labels)
    assert inertia == pytest.approx(want_inertia, rel=2e-4 if offset else 1e-5)
    x, init = x.double(), init.double()
    centers, labels, inertia = kmeans.kmeans(x, k, init=init, max_iter=max_iter)
    np.testing.assert_allclose(centers.numpy(), want_centers, rtol=1e-11, atol=1e-11)
    np.testing.assert_array_equal(labels.numpy(), want_labels)
    assert inertia == pytest.approx(want_inertia, rel=1e-10)


def test_kmeans_of_far_outliers_keeps_their_digits():
    """Their cluster begins with nearly all samples, whose sum is far larger than theirs."""
    x = torch.rand(118_287, 4, generator=torch.Generator().manual_seed(0))
    x[-3:] += 3e4
    x = x + 1000
    centers, labels, _ = kmeans.kmeans(x, 2, init=torch.tensor([1000.3, 1000.0])[:, None].expand(2, 4))
    assert labels.bincount().tolist() == [3, 118_284]
    for j in range(2):
        np.testing.assert_allclose(centers[j].numpy(), x[labels == j].double().mean(0).numpy(), rtol=1e-6)


def test_kmeans_start_and_seed():
    x = blobs(600, 10, 4, spread=0.02)
    first, again = kmeans.kmeans(x, 4, seed=3), kmeans.kmeans(x, 4, seed=3)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]) and first[2] == again[2]
    best = lloyd_by_hand(x.numpy(), torch.stack([x[first[1] == j].mean(0) for j in range(4)]).numpy())[2]
    for seed in range(10):  # four clear clouds: greedy K-means++ finds them from any seed
        assert kmeans.kmeans(x, 4, seed=seed)[2] == pytest.approx(best, rel=1e-4)
    drawn = torch.stack([kmeans._plus_plus(x, 4, seed, None) for seed in range(3)])
    assert (drawn[:, :, None] == x).all(-1).any(-1).all()  # centres start on samples
    assert not torch.equal(drawn[0], drawn[1])
    warm = kmeans.kmeans(x, 4, init=first[0], max_iter=1)  # converged: nothing moves
    torch.testing.assert_close(warm[0], first[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kmeans.kmeans(x, 4, seed=3)[0], first[0])
    assert kmeans.kmeans(x.half(), 4)[0].dtype == torch.float32
    leaf = x.clone().requires_grad_()
    assert not kmeans.kmeans(leaf, 4)[0].requires_grad


def test_kmeans_small_cases():
    x = blobs(100, 5, 3)
    centers, labels, inertia = kmeans.kmeans(x, 1)
    torch.testing.assert_close(centers[0], x.mean(0))
    assert (labels == 0).all() and inertia == pytest.approx(((x - x.mean(0)) ** 2).sum().item(), rel=1e-5)
    centers, labels, inertia = kmeans.kmeans(x[:3], 3)  # each sample its own cluster
    assert inertia == 0 and sorted(labels.tolist()) == [0, 1, 2] and torch.equal(centers[labels], x[:3])
    for bad in [
        lambda: kmeans.kmeans(x[:2], 3),
        lambda: kmeans.kmeans(x[:0], 1),
        lambda: kmeans.kmeans(x, 0),
        lambda: kmeans.kmeans(x, 2, max_iter=0),
        lambda: kmeans.kmeans(x, 2, init=x[:3]),
        lambda: kmeans.kmeans(x[0], 1),
        lambda: kmeans.kmeans(x.long(), 2),
        lambda: kmeans.kmeans(x, 2, init=torch.full((2, 5), torch.nan)),
    ]:
        with pytest.raises(ValueError):
            bad()
    for value in (torch.nan, torch.inf, -torch.inf):
        y = x.clone()
        y[7, 2] = value
        with pytest.raises(ValueError, match="NaN or inf"):
            kmeans.kmeans(y, 2)


def test_empty_clusters_take_the_farthest_samples():
    # Own centre after the update: 10 / 6 for cluster 0. Farthest from it 6, then 0; cluster 1 holds one sample.
    x = torch.tensor([[0.0], [0.0], [0.0], [4.0], [6.0], [0.0], [100.0]])
    init = torch.tensor([[1.0], [100.0], [900.0], [-900.0]])
    centers, labels, _ = kmeans.kmeans(x, 4, init=init, max_iter=1)
    torch.testing.assert_close(centers, torch.tensor([[10 / 6], [100.0], [6.0], [4.0]]))
    assert labels.tolist() == [0, 0, 0, 3, 2, 0, 1]
    # The farthest sample twice: the second empty cluster takes another place.
    x = torch.tensor([[0.0], [0.0], [0.0], [0.0], [8.0], [8.0], [-1.0]])
    init = torch.tensor([[0.0], [900.0], [901.0]])
    centers, labels, _ = kmeans.kmeans(x, 3, init=init, max_iter=1)
    torch.testing.assert_close(centers, torch.tensor([[15 / 7], [8.0], [-1.0]]))
    centers, labels, inertia = kmeans.kmeans(x, 3, init=init)
    assert inertia == 0 and sorted(torch.bincount(labels).tolist()) == [1, 2, 4]
    # Run to the end, no cluster is empty while there are samples enough.
    x = blobs(200, 3, 5)
    init = torch.cat([x[:1], torch.full((4, 3), 50.0)])
    assert torch.bincount(kmeans.kmeans(x, 5, init=init)[1], minlength=5).min() > 0


@pytest.mark.parametrize("distinct", [1, 2, 3])
def test_fewer_distinct_samples_than_clusters(distinct):
    places = torch.rand(distinct, 4, generator=torch.Generator().manual_seed(1))
    x = places.repeat(10, 1)
    for init in (None, x[:5], torch.full((5, 4), 9.0)):
        centers, labels, inertia = kmeans.kmeans(x, 5, init=init)
        sizes = torch.bincount(labels, minlength=5)
        assert centers.isfinite().all() and inertia == pytest.approx(0, abs=1e-10)
        assert torch.cdist(centers, places, compute_mode="donot_use_mm_for_euclid_dist").min(1).values.max() < 1e-6
        assert (sizes > 0).sum() == distinct and sizes.sum() == len(x)


def test_assign():
    x, centers = torch.rand(50, 6), torch.rand(3, 6)
    labels, distances = kmeans.assign(x, centers)
    all_distances = (x[:, None] - centers).norm(dim=2)
    assert torch.equal(labels, all_distances.argmin(1))
    torch.testing.assert_close(distances, all_distances.min(1).values)
    labels, distances = kmeans.assign(centers[[2, 0]], torch.cat([centers, centers]))  # ties: the first
    assert labels.tolist() == [2, 0] and distances.tolist() == [0, 0]
    with pytest.raises(ValueError):
        kmeans.assign(x, centers[:, :5])


def inter_intra_by_hand(A, labels, centers):
    def mean(points):
        pairs = [math.dist(p, q) for i, p in enumerate(points) for q in points[:i]]
        return sum(pairs) / len(pairs)

    clusters = [[a for a, label in zip(A.tolist(), labels.tolist()) if label == j] for j in range(len(centers))]
    intra = [mean(points) for points in clusters if len(points) > 1]
    return mean(centers.tolist()), sum(intra) / len(intra)


def test_inter_intra():
    A, centers = torch.rand(90, 5), torch.rand(5, 5)
    labels = torch.randint(3, (90,))
    labels[0] = 3  # one sample: no pair; cluster 4 is empty
    assert kmeans.inter_intra(A, labels, centers) == pytest.approx(inter_intra_by_hand(A, labels, centers), rel=1e-5)
    assert kmeans.inter_intra(A, labels, centers, max_samples=1000) == kmeans.inter_intra(A, labels, centers)
    zeros = torch.zeros(90, dtype=torch.long)
    spaced = A[[0, 22, 45, 67]]  # floor(i · 90 / 4)
    some = kmeans.inter_intra(A, zeros, centers[:1], max_samples=4)
    assert some == (0.0, pytest.approx(torch.pdist(spaced).mean().item(), rel=1e-5))
    assert kmeans.inter_intra(A[:3], torch.arange(3), centers)[1] == 0.0
    big = torch.rand(6000, 3)  # more than one block
    got = kmeans.inter_intra(big, torch.zeros(6000, dtype=torch.long), centers[:, :3])[1]
    assert got == pytest.approx(torch.pdist(big.double()).mean().item(), rel=1e-5)
    for bad in [lambda: kmeans.inter_intra(A, labels[1:], centers), lambda: kmeans.inter_intra(A, labels, centers, max_samples=1)]:
        with pytest.raises(ValueError):
            bad()


def test_sigma2_and_collapse():
    assert kmeans.sigma2(12.0, 5) == 3.0 and kmeans.sigma2(0.0, 1) == 0.0 and kmeans.sigma2(0.0, 0) == 0.0
    assert torch.equal(kmeans.sigma2(torch.tensor(12.0), 5), torch.tensor(3.0))
    assert kmeans.describe_collapse([5, 7], 0.6, 0.2) is None
    assert kmeans.describe_collapse(torch.tensor([5, 7]), 1.5, 1.5) is None
    assert "no sample" in kmeans.describe_collapse(torch.tensor([5, 0, 7]), 0.6, 0.2)
    assert "one architecture" in kmeans.describe_collapse([5, 7], 1e-4, 0.0)
    assert "one architecture" in kmeans.describe_collapse([5, 7], 0.05, 1.0)
    assert kmeans.describe_collapse([12], 0.0, 0.2) is None  # K = 1 has no pair of centres


def test_bank():
    bank = kmeans.ActivationBank(6, 3)
    A = torch.rand(6, 3, requires_grad=True)
    bank.update(torch.tensor([4, 1]), A[[4, 1]])
    bank.update(torch.tensor([1, 2, 5]), A[[0, 2, 5]])
    assert bank.count == 4 and bank.seen.tolist() == [False, True, True, False, True, True]
    assert torch.equal(bank.values[[1, 2, 4, 5]], A.detach()[[0, 2, 4, 5]])  # the latest of sample 1
    assert not bank.values.requires_grad
    index, values = bank.shard()
    assert index.tolist() == [1, 2, 4, 5] and torch.equal(values, bank.values[index])

    clusters = bank.cluster(2, seed=1)
    centers, labels, inertia = kmeans.kmeans(values, 2, seed=1)
    assert torch.equal(clusters.centers, centers) and clusters.sizes == torch.bincount(labels, minlength=2).tolist()
    assert clusters.sigma2 == inertia / 3
    torch.testing.assert_close(bank.cluster(2, clusters.centers, max_iter=1).centers, centers)
    with pytest.raises(ValueError, match="at least 5"):
        bank.cluster(5)
    with pytest.raises(ValueError):
        bank.update(torch.tensor([1]), A[:2])

    other = kmeans.ActivationBank(6, 3)
    assert all(isinstance(value, torch.Tensor) for value in bank.state_dict().values())
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.values, bank.values) and torch.equal(other.seen, bank.seen)
    with pytest.raises(ValueError):
        kmeans.ActivationBank(7, 3).load_state_dict(bank.state_dict())


def test_agreement_with_known_subsets():
    truth = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    assert kmeans.agreement((truth + 1) % 3, truth)[:2] == (1.0, 1.0)
    labels = torch.tensor([1, 1, 0, 0, 0, 0, 2, 2, 1])
    accuracy, rand, table, match = kmeans.agreement(labels, truth)
    assert accuracy == pytest.approx(7 / 9) and match == [1, 0, 2]
    assert table.tolist() == [[1, 2, 0], [3, 0, 0], [0, 1, 2]]
    # Hubert and Arabie's index from its definition: pairs on which the two partitions agree, against chance.
    together = lambda x: {(i, j) for i in range(9) for j in range(i) if x[i] == x[j]}
    a, b = together(labels.tolist()), together(truth.tolist())
    expected = len(a) * len(b) / 36
    assert rand == pytest.approx((len(a & b) - expected) / ((len(a) + len(b)) / 2 - expected))
    accuracy, _, table, _ = kmeans.agreement(torch.arange(9) + 1, truth)  # more clusters than subsets
    assert accuracy == pytest.approx(3 / 9) and table.shape == (3, 10)
    accuracy, rand, _, match = kmeans.agreement(torch.zeros(9, dtype=torch.long), truth)  # one expert took all
    assert (accuracy, rand, match.count(-1)) == (pytest.approx(1 / 3), 0.0, 2)


def test_restarts_leave_a_bad_start():
    x = torch.cat([blobs(60, 5, 1, seed=s) + 10 * s for s in (1, 2, 3)])
    stuck = torch.stack([x[:120].mean(0), x[120:150].mean(0), x[150:].mean(0)])  # one centre for two blobs, two for one
    bank = kmeans.ActivationBank(180, 5)
    bank.update(torch.arange(180), x)
    assert sorted(bank.cluster(3, stuck).sizes)[-1] == 120
    assert bank.cluster(3, stuck, restarts=4).sizes == [60, 60, 60]


def test_bank_keeps_running_means_over_views():
    bank = kmeans.ActivationBank(3, 2, momentum=0.75)
    views = torch.rand(4, 2)
    for view in views:
        bank.update(torch.tensor([1]), view[None])
    expected = views[0]  # the first view counts in full
    for view in views[1:]:
        expected = 0.75 * expected + 0.25 * view
    torch.testing.assert_close(bank.values[1], expected)
    assert bank.values[0].tolist() == [0, 0] and bank.count == 1
    with pytest.raises(ValueError, match="momentum"):
        kmeans.ActivationBank(3, 2, momentum=1.0)


def test_bank_clusters_in_a_metric():
    """Two groups in a column of small numbers, hidden behind noise in one of large numbers."""
    rng = np.random.default_rng(0)
    truth = torch.from_numpy(rng.integers(0, 2, 200))
    A = torch.from_numpy(np.stack([rng.normal(0, 1, 200), 0.1 * truth + rng.normal(0, 0.01, 200)], 1)).float()
    bank, metric = kmeans.ActivationBank(200, 2), torch.tensor([0.01, 1.0])
    bank.update(torch.arange(200), A)
    plain, weighted = bank.cluster(2, restarts=3), bank.cluster(2, restarts=3, metric=metric)
    accuracy = [kmeans.agreement(kmeans.assign(A * w, c.centers * w)[0], truth)[0] for w, c in ((1, plain), (metric, weighted))]
    assert accuracy[0] < 0.75 and accuracy[1] == 1
    means = torch.stack([A[truth == k].mean(0) for k in range(2)])  # in the units of A
    torch.testing.assert_close(weighted.centers[weighted.centers[:, 1].argsort()], means, atol=1e-5, rtol=1e-5)
    spread = ((A - means[truth]) * metric).double().square().sum().item() / 199
    assert weighted.sigma2 == pytest.approx(spread, rel=1e-5)
    again = bank.cluster(2, weighted.centers, max_iter=1, metric=metric)  # the start is in the units of A too
    torch.testing.assert_close(again.centers, weighted.centers)
    known = bank.group(truth, 2, metric)
    torch.testing.assert_close(known.centers, means, atol=1e-5, rtol=1e-5)
    assert known.sigma2 == pytest.approx(spread, rel=1e-5)


def test_bank_groups_known_subsets():
    bank = kmeans.ActivationBank(6, 2)
    A = torch.tensor([[0.0, 1], [2, 1], [4, 4], [6, 4]])
    bank.update(torch.tensor([0, 2, 3, 5]), A)
    clusters = bank.group(torch.tensor([0, 0, 0, 1, 1, 1]), 3)
    assert clusters.centers.tolist() == [[1, 1], [5, 4], [0, 0]] and clusters.sizes == [2, 2, 0]
    assert clusters.sigma2 == pytest.approx(4 / 3)  # four samples at distance 1: sum 4, over N - 1


# ============ K-means and bank on two processes ============


def gradients_of_a_global_batch(process):
    """Of all loss terms, on this process's half of eight images (or on all of them); batch norm frozen."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 64, 64, generator=generator)
    masks = torch.randint(0, 5, (8, 64, 64), generator=generator)
    masks[:3], masks[3, :40] = data.IGNORE, data.IGNORE  # the halves have different numbers of labelled pixels
    torch.manual_seed(0)
    network = model.build_model("divdr-a", "segmentation", 5, layers=4, width=8).eval()
    with torch.no_grad():  # what skips in evaluation runs in training
        A = network(images).A
    network.backbone.train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    distributed = train_seg.distribute(network, process)
    mine = slice(process.rank, None, process.world)
    out = distributed(images[mine])
    loss = train_seg.segmentation_loss(out.logits, masks[mine], process)
    cost = train_seg.mean_over_processes(out.cost.mean(), process)
    loss = loss + losses.cost_loss(cost[None], network.budgeted_cost(64, 64), 0.1)
    loss = loss + losses.clustering_loss(out.A, A[:2] + 0.1, 0.5, 5.0)
    loss.backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def on_rank(rank, port, folder):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world = kmeans._world()
    assert world is None  # the value that callers pass before init_process_group works alone
    dist.init_process_group("gloo", rank=rank, world_size=2)
    world = kmeans._world()
    out = {}
    x = blobs(301, 6, 4, seed=5)
    for name, cut in [("uneven", 120), ("first empty", 0), ("last empty", 301)]:
        mine = x[:cut] if rank == 0 else x[cut:]
        out[name, "init"] = kmeans.kmeans(mine, 4, init=x[:4], group=world)
        out[name, "++"] = kmeans.kmeans(mine, 4, seed=2, group=world)
        out[name, "one step"] = kmeans.kmeans(mine, 4, init=x[:4], max_iter=1, group=world)
        far = torch.cat([x[:1], torch.full((3, 6), 50.0)])
        out[name, "empty clusters"] = kmeans.kmeans(mine, 4, init=far, group=world)
        same = torch.ones(len(mine), 6)
        out[name, "one place"] = kmeans.kmeans(same, 3, group=world)
    # The first rank's init counts.
    mine = x[:120] if rank == 0 else x[120:]
    out["init of rank 0"] = kmeans.kmeans(mine, 4, init=x[:4] + rank, group=world)
    # Errors on one rank are errors on both.
    bad = mine.clone()
    if rank == 1:
        bad[0, 0] = torch.nan
    bad_init = x[:4].clone()
    bad_init[0, 0] = torch.nan if rank == 1 else 0
    for args in [(bad, 4), (mine[:1], 4), (mine, 4, bad_init)]:
        with pytest.raises(ValueError):
            kmeans.kmeans(*args, group=world)
    # Alone although the group exists.
    out["alone"] = kmeans.kmeans(x, 4, init=x[:4])

    bank = kmeans.ActivationBank(9, 2)
    A = torch.arange(18.0).view(9, 2)
    for index in [[[0, 7], [3, 1]], [[8, 2], [5, 7]]]:
        bank.update(torch.tensor(index[rank]), A[index[rank]])
    out["bank"] = bank.state_dict()
    out["shard"] = bank.shard()
    out["clusters"] = tuple(bank.cluster(2))
    with pytest.raises(ValueError, match="at least 8"):
        bank.cluster(8)
    # One mean over both processes; averaged over them, the gradients are those of that mean.
    value = torch.tensor(float(rank), requires_grad=True)
    mean = train_seg.mean_over_processes(value, model.Process(rank, 2, torch.device("cpu")))
    (mean - 2.0).square().backward()
    out["mean"] = mean.item(), value.grad.item() / 2
    # A rank whose images have no object to detect takes part in the step all the same.
    detector = train_seg.distribute(small_detector(masks=True), model.Process(rank, 2, torch.device("cpu")))
    boxes = torch.tensor([[5.0, 5, 40, 50]])[: 1 - rank]
    target = dict(boxes=boxes, labels=torch.ones(1 - rank, dtype=torch.int64), masks=torch.ones(1 - rank, 64, 64, dtype=torch.uint8))
    terms = detector([torch.rand(3, 64, 64)] * 2, [target] * 2).losses
    sum(terms.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in detector.parameters())
    out["gradients"] = gradients_of_a_global_batch(model.Process(rank, 2, torch.device("cpu")))
    torch.save(out, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(on_rank, (port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]

    x = blobs(301, 6, 4, seed=5)
    far = torch.cat([x[:1], torch.full((3, 6), 50.0)])
    single = {
        "init": kmeans.kmeans(x, 4, init=x[:4]),
        "++": kmeans.kmeans(x, 4, seed=2),
        "one step": kmeans.kmeans(x, 4, init=x[:4], max_iter=1),
        "empty clusters": kmeans.kmeans(x, 4, init=far),
        "one place": kmeans.kmeans(torch.ones(301, 6), 3),
    }
    for name, cut in [("uneven", 120), ("first empty", 0), ("last empty", 301)]:
        for case, (centers, labels, inertia) in single.items():
            a, b = ranks[0][name, case], ranks[1][name, case]
            assert torch.equal(a[0], b[0]) and a[2] == b[2]
            torch.testing.assert_close(a[0], centers, rtol=1e-6, atol=1e-6)
            assert (len(a[1]), len(b[1])) == (cut, 301 - cut)
            assert torch.equal(torch.cat([a[1], b[1]]), labels)
            assert a[2] == pytest.approx(inertia, rel=1e-6, abs=1e-10)
    assert ranks[0]["mean"] == ranks[1]["mean"] == (0.5, 2 * (0.5 - 2.0) / 2)
    for r in ranks:
        torch.testing.assert_close(r["init of rank 0"][0], single["init"][0])
        torch.testing.assert_close(r["alone"][0], single["init"][0])

    A = torch.arange(18.0).view(9, 2)
    for r in ranks:
        seen = torch.tensor([0, 1, 2, 3, 5, 7, 8])
        assert r["bank"]["seen"].nonzero().flatten().tolist() == seen.tolist()
        assert torch.equal(r["bank"]["values"][seen], A[seen])
    assert torch.cat([r["shard"][0] for r in ranks]).tolist() == seen.tolist()
    assert torch.equal(torch.cat([r["shard"][1] for r in ranks]), A[seen])
    assert [len(r["shard"][0]) for r in ranks] == [4, 3]
    a, b = ranks[0]["clusters"], ranks[1]["clusters"]
    assert torch.equal(a[0], b[0]) and a[1:] == b[1:] and sum(a[2]) == 7
    whole = gradients_of_a_global_batch(model.Process(0, 1, torch.device("cpu")))
    for r in ranks:
        for name, gradient in whole.items():
            torch.testing.assert_close(r["gradients"][name], gradient, atol=1e-5, rtol=1e-3, msg=name)
    assert sum(gradient.abs().sum() > 0 for gradient in whole.values()) > 100


# ============ data ============


def save(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if mode == "P":                     # same bytes, read as indices into a palette
        image.putpalette([255 - i % 256 for i in range(768)])
    image.save(path)


def cityscapes_tree(root, split="train", names=("aachen/aachen_000000_000019", "bonn/bonn_000003_000019"), size=(24, 40)):
    """The published layout with random ids, all of the table among them; returns {name: (image, label ids)}."""
    rng, made = np.random.default_rng(0), {}
    for name in names:
        ids = rng.integers(0, 34, size).astype(np.uint8)
        ids.ravel()[:35] = [*range(34), 255]                    # 255: the license plate's -1
        image = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        save(root / "leftImg8bit" / split / f"{name}_leftImg8bit.png", image)
        save(root / "gtFine" / split / f"{name}_gtFine_labelIds.png", ids)
        save(root / "gtFine" / split / f"{name}_gtFine_instanceIds.png", ids)
        made[name] = image, ids
    return made


def camvid_tree(root, split="train", count=3, size=(20, 32), ending=".png", mode=None):
    rng = np.random.default_rng(1)
    made = {}
    for i in range(count):
        ids = rng.integers(0, 12, size).astype(np.uint8)
        image = np.broadcast_to(np.uint8([10 * i, 90, 200]), (*size, 3)).copy()     # flat: survives JPEG
        save(root / split / f"{i:04d}{ending}", image)
        save(root / f"{split}annot" / f"{i:04d}.png", ids, mode)
        made[f"{i:04d}"] = image, ids
    return made


def one_line(error, *words):
    message = str(error.value)
    assert "\n" not in message and all(str(word) in message for word in words), message


# ============ data: files ============

def test_cityscapes_ids_become_train_ids(tmp_path):
    labels = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    train_id = {label.id % 256: label.trainId for label in labels}
    made = cityscapes_tree(tmp_path)
    dataset = data.segmentation_dataset("cityscapes", str(tmp_path), "train", train=False)
    assert len(dataset) == 2 and dataset.subset is None
    for i, (name, (image, ids)) in enumerate(made.items()):
        got, mask, index = dataset[i]
        assert index == i and dataset.image_name(i) == os.path.join("leftImg8bit", "train", f"{name}_leftImg8bit.png")
        assert got.dtype == mask.dtype == torch.uint8 and type(got) is type(mask) is torch.Tensor
        assert torch.equal(got, torch.from_numpy(image).permute(2, 0, 1))
        for y in range(ids.shape[0]):
            for x in range(ids.shape[1]):
                expected = train_id[int(ids[y, x])]
                assert mask[y, x] == (data.IGNORE if expected in (-1, 255) else expected)
    trained = {label.trainId: label for label in labels if 0 <= label.trainId < 255}
    assert dataset.info.classes == tuple(trained[i].name for i in range(19))
    assert dataset.info.palette == tuple(trained[i].color for i in range(19))


@pytest.mark.parametrize("ending, mode", [(".png", None), (".jpg", "P"), (".JPEG", None)])
def test_camvid(tmp_path, ending, mode):
    made = camvid_tree(tmp_path, ending=ending, mode=mode)
    dataset = data.segmentation_dataset("camvid", str(tmp_path), "train", train=False)
    assert len(dataset) == 3 and len(dataset.info.classes) == len(dataset.info.palette) == 11
    for i, (image, ids) in enumerate(made.values()):
        got, mask, _ = dataset[i]
        assert (got.permute(1, 2, 0).int() - torch.from_numpy(image).int()).abs().max() <= (0 if ending == ".png" else 3)
        assert np.array_equal(mask.numpy(), np.where(ids == 11, data.IGNORE, ids))


def test_real_camvid():
    root = Path(os.environ.get("CAMVID", HERE / "../shared/data/camvid"))
    if not (root / "valannot").is_dir():
        pytest.skip(f"no CamVid at {root}; set CAMVID to its folder")
    for split, count in (("train", 367), ("val", 101), ("test", 233)):
        dataset = data.segmentation_dataset("camvid", str(root), split, train=False)
        assert len(dataset) == count
    loader = data.pass_loader(data.segmentation_dataset("camvid", str(root), "val", train=False), 8)
    images, masks, _ = next(iter(loader))
    assert images.shape == (8, 3, 360, 480) and masks.shape == (8, 360, 480)
    present = set(masks.unique().tolist())
    assert present <= {*range(11), data.IGNORE} and len(present) > 8
    train = data.segmentation_dataset("camvid", str(root), "train", train=True)
    assert train[0][0].shape == (3, 352, 352)


def test_bad_files_are_named_in_one_line(tmp_path):
    def fresh(name):
        root = tmp_path / name
        return root, cityscapes_tree(root)

    def open_train(root):
        return data.segmentation_dataset("cityscapes", str(root), "train", train=False)

    with pytest.raises(data.DataError) as error:
        open_train(tmp_path / "nowhere")
    one_line(error, tmp_path / "nowhere", "gtFine/train", "cityscapes-dataset.com", "--dataset shapes")
    with pytest.raises(data.DataError) as error:
        data.segmentation_dataset("camvid", str(tmp_path / "nowhere"), "val", train=False)
    one_line(error, tmp_path / "nowhere", "valannot", "SegNet", "--dataset shapes")

    root, _ = fresh("empty")
    shutil.rmtree(root / "gtFine/train")
    (root / "gtFine/train").mkdir()
    with pytest.raises(data.DataError) as error:
        open_train(root)
    one_line(error, root / "gtFine/train", "--dataset shapes")

    root, _ = fresh("no label")
    (root / "gtFine/train/bonn/bonn_000003_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(data.DataError) as error:
        open_train(root)
    one_line(error, root / "leftImg8bit/train/bonn/bonn_000003_000019_leftImg8bit.png", "no label")

    root, _ = fresh("no image")
    (root / "leftImg8bit/train/bonn/bonn_000003_000019_leftImg8bit.png").unlink()
    with pytest.raises(data.DataError) as error:
        open_train(root)
    one_line(error, root / "gtFine/train/bonn/bonn_000003_000019_gtFine_labelIds.png", "no image")

    root, made = fresh("damaged")
    image = root / "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png"
    label = root / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png"
    dataset = open_train(root)
    pixels, ids = made["aachen/aachen_000000_000019"]
    for path, array in ((image, pixels), (label, ids)):
        whole = path.read_bytes()
        for length in (0, 10, len(whole) // 3, len(whole) // 2, 2 * len(whole) // 3):
            path.write_bytes(whole[:length])
            with pytest.raises(data.DataError) as error:
                dataset[0]
            one_line(error, path)
        path.write_bytes(whole)
    save(label, ids[:, :-3])
    with pytest.raises(data.DataError) as error:
        dataset[0]
    one_line(error, image, label, "40x24", "37x24")
    save(label, np.where(ids == 7, 77, ids).astype(np.uint8))
    with pytest.raises(data.DataError) as error:
        dataset[0]
    one_line(error, label, "77")
    save(label, pixels)
    for workers in (0, 1):                                      # a worker's error arrives as one line, too
        with pytest.raises(data.DataError) as error:
            next(iter(data.pass_loader(dataset, 1, workers)))
        one_line(error, label, "one channel")

    root = tmp_path / "twice"
    camvid_tree(root)
    save(root / "train/0001.jpg", np.zeros((20, 32, 3), np.uint8))
    with pytest.raises(data.DataError) as error:
        data.segmentation_dataset("camvid", str(root), "train", train=False)
    one_line(error, root / "train/0001.jpg", root / "train/0001.png")


def test_bad_arguments():
    shapes = dict(name="shapes", root=None, split="train", train=True)
    for wrong, words in ((dict(name="ade20k"), ["ade20k", "camvid"]), (dict(split="dev"), ["dev"]),
                         (dict(root="here"), ["here"]), (dict(size=100), ["100", "32"]), (dict(subsets=5), ["5"]),
                         (dict(n_train=2), ["2 images"]), (dict(name="camvid", size=64), ["size", "shapes"])):
        with pytest.raises(data.DataError) as error:
            data.segmentation_dataset(**{**shapes, **wrong})
        one_line(error, *words)
    dataset = data.segmentation_dataset(**shapes, size=32, n_train=8)
    for make in (lambda: data.train_loader(dataset, 9), lambda: data.train_loader(dataset, 4, world=3),
                 lambda: data.pass_loader(dataset, 0)):
        with pytest.raises(data.DataError) as error:
            make()
        one_line(error, "batch")


# ============ data: transforms ============

def test_augmentation_pads_crops_and_keeps_image_and_mask_aligned():
    torch.manual_seed(0)
    # Every label region is flat and large; its number is written into the picture.
    mask = (torch.arange(96)[:, None] // 24 * 8 + torch.arange(128) // 16).to(torch.uint8)      # ids 0..31
    image = torch.stack([mask * 7 + 20, mask * 3 + 40, 250 - mask * 5])
    padded = flipped = 0
    sizes = set()
    for _ in range(40):
        got, label = data.augmentation((48, 96, 192), 80)(tv_tensors.Image(image), tv_tensors.Mask(mask))
        assert got.shape == (3, 80, 80) and label.shape == (80, 80) and got.dtype == label.dtype == torch.uint8
        inside = label != data.IGNORE
        assert (got[:, ~inside] == 0).all() and (got[:, inside] > 0).all()
        assert set(label[inside].tolist()) <= set(range(32))        # nearest: no ids in between
        shown = (got[0].float() - 20) / 7
        right = ((shown - label).abs() < 0.6)[inside].float().mean()
        assert right > 0.85                                         # the rest: blended edges between regions
        padded += int((~inside).any())
        first = label[inside.any(1)][0]
        first = first[first != data.IGNORE].int()
        flipped += int(first[0] > first[-1])
        sizes.add(int(inside.sum()))
    assert 5 < padded < 25 and 10 < flipped < 30 and len(sizes) > 1
    same = data.augmentation(None, None)(tv_tensors.Image(image), tv_tensors.Mask(mask))[1]
    assert torch.equal(same, mask) or torch.equal(same, mask.flip(1))


@pytest.mark.parametrize("size, sides, crop", [((256, 512), (128, 192, 256, 320, 384, 512), 192), ((90, 120), (45, 68, 90, 112, 180), 88)])
def test_resizing_only_what_the_crop_shows_gives_the_same_pixels(size, sides, crop):
    generator = torch.Generator().manual_seed(0)
    image = tv_tensors.Image(torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8))
    mask = tv_tensors.Mask(torch.randint(0, 19, size, generator=generator, dtype=torch.uint8))
    whole = v2.Compose([v2.RandomShortestSize(list(sides), antialias=True), data.random_crop(crop)])
    for seed in range(40):
        torch.manual_seed(seed)
        want, after = whole(image, mask), torch.rand(1)
        torch.manual_seed(seed)
        got = data.ShortestSizeCrop(sides, crop)(image, mask)
        assert torch.equal(torch.rand(1), after) and [type(part) for part in got] == [tv_tensors.Image, tv_tensors.Mask]
        assert torch.equal(got[1], want[1])
        assert (got[0].int() - want[0].int()).abs().max() <= 1


def test_cityscapes_training_items_have_the_recipe_size(tmp_path):
    cityscapes_tree(tmp_path)
    dataset = data.segmentation_dataset("cityscapes", str(tmp_path), "train", train=True, crop=64, short_sides=(20, 90))
    images, masks, indices = next(iter(data.train_loader(dataset, 2)))
    assert images.shape == (2, 3, 64, 64) and masks.shape == (2, 64, 64) and sorted(indices.tolist()) == [0, 1]
    assert images.dtype == masks.dtype == torch.uint8 and indices.dtype == torch.int64


def test_normalize():
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    got = data.normalize(images)
    mean, std = (np.array(v).reshape(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), (images.numpy() / 255.0 - mean) / std, atol=1e-5)


# ============ data: loaders ============

def small_shapes(train=True, **options):
    return data.segmentation_dataset("shapes", None, "train", train=train, **{**dict(size=32, n_train=24), **options})


def epochs(loader, batches):
    stream = data.forever(loader)
    return [next(stream) for _ in range(batches)]


def test_an_epoch_has_each_index_once_with_its_own_image():
    dataset, whole = small_shapes(), small_shapes(train=False)
    first = []
    for rank in range(2):
        loader = data.train_loader(dataset, 6, rank=rank, world=2)
        assert len(loader) == 4
        rounds = epochs(loader, 8)
        for images, masks, indices in rounds:
            assert images.shape == (3, 3, 32, 32)
            for image, mask, i in zip(images, masks, indices):
                expected, label, _ = whole[int(i)]
                straight = torch.equal(image, expected) and torch.equal(mask, label)
                assert straight or (torch.equal(image.flip(2), expected) and torch.equal(mask.flip(1), label))
        order = torch.cat([batch[2] for batch in rounds]).tolist()
        assert len(set(order[:12])) == len(set(order[12:])) == 12 and order[:12] != order[12:]
        first += order[:12]
    assert sorted(first) == list(range(24))


def test_jitter_changes_the_look_and_nothing_else():
    plain, jittered = (data.SeededItems(small_shapes(jitter=jitter), 3) for jitter in (False, True))
    changed = 0
    for item in [(0, 0), (0, 1), (1, 0), (2, 5)]:
        (image, mask, _), (other, other_mask, _) = plain[item], jittered[item]
        assert torch.equal(mask, other_mask) and other.dtype == torch.uint8 and other.shape == image.shape
        assert torch.equal(other, jittered[item][0])
        changed += not torch.equal(image, other)
    assert changed == 4
    assert torch.equal(small_shapes(train=False, jitter=True)[3][0], small_shapes(train=False)[3][0])
    box, detection_box = (data.detection_dataset("shapes", None, "train", True, jitter=jitter, size=32, n_train=6)[2][1]["boxes"]
                          for jitter in (False, True))  # fmt: skip
    assert box.shape == detection_box.shape


@pytest.mark.parametrize("workers", [0, 1])
def test_the_seed_decides_the_stream(workers):
    def stream(seed, start=0):
        batches = data.forever(data.train_loader(small_shapes(), 6, workers, seed=seed), start)
        return [next(batches) for _ in range(6)]

    torch.manual_seed(int(workers))  # which decides nothing
    one, two, other = stream(3), stream(3), stream(4)
    assert all(torch.equal(a, b) for left, right in zip(one, two) for a, b in zip(left, right))
    assert [b[2].tolist() for b in one] != [b[2].tolist() for b in other]
    for start in (1, 4, 5):                             # four batches an epoch: from anywhere on, the same go on
        later = stream(3, start)
        assert all(torch.equal(a, b) for left, right in zip(one[start:], later) for a, b in zip(left, right))
    elsewhere = data.forever(data.train_loader(small_shapes(), 6, 1 - workers, seed=3))     # whoever makes them
    assert all(torch.equal(a, b) for left in one for a, b in zip(left, next(elsewhere)))


KEPT_ITERATOR = """
import builtins, data, multiprocessing, subprocess, time
shapes = data.segmentation_dataset("shapes", None, "val", train=False, size=32, n_val=8)
builtins.kept = iter(data.pass_loader(shapes, 2, workers=1))
next(kept)
worker, = multiprocessing.active_children()
subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
subprocess.run(["kill", "-INT", str(worker.pid)], check=True)
time.sleep(0.5)
assert worker.is_alive()
print(len(list(kept)))
builtins.kept = iter(data.pass_loader(shapes, 2, workers=1))
"""


def test_workers_outlive_signals_from_elsewhere_and_end_with_their_process():
    """An iterator that is still referred to at exit (by a traceback, say) must not keep the process from ending."""
    status, out, error = run("-c", KEPT_ITERATOR)
    assert status == 0 and out.strip() == "3", error


def test_a_pass_counts_each_image_once_and_wraps_to_full_batches():
    dataset = small_shapes(train=False, n_train=11)
    for world in (1, 2, 3):
        parts = [torch.cat([batch[2] for batch in data.pass_loader(dataset, 4, rank=rank, world=world)]).tolist()
                 for rank in range(world)]
        assert all(part == list(range(rank, 11, world)) for rank, part in enumerate(parts))
        wrapped = [list(data.pass_loader(dataset, 4, rank=rank, world=world, wrap=True)) for rank in range(world)]
        assert len({len(batches) for batches in wrapped}) == 1
        assert all(len(batch[2]) == 4 for batches in wrapped for batch in batches)
        assert {int(i) for batches in wrapped for batch in batches for i in batch[2]} == set(range(11))


def test_images_of_two_sizes_cannot_share_a_batch(tmp_path):
    cityscapes_tree(tmp_path, names=("a/a_0",), size=(24, 40))
    cityscapes_tree(tmp_path, names=("b/b_0",), size=(24, 44))
    dataset = data.segmentation_dataset("cityscapes", str(tmp_path), "train", train=False)
    assert len(list(data.pass_loader(dataset, 1))) == 2
    for workers in (0, 1):
        with pytest.raises(data.DataError) as error:
            list(data.pass_loader(dataset, 2, workers))
        one_line(error, "40x24", "44x24", "--eval-batch 1")


# ============ data: shapes ============

def test_shapes_depend_on_seed_split_and_index_only():
    first, again = small_shapes(train=False), small_shapes(train=False)
    for i in (5, 0, 17):
        assert all(torch.equal(a, b) for a, b in zip(first.scene(i)[:5], again.scene(i)[:5]))
    assert not torch.equal(first[0][0], small_shapes(train=False, seed=1)[0][0])
    val = data.segmentation_dataset("shapes", None, "val", train=False, size=32, n_val=24)
    seen = {dataset[i][0].numpy().tobytes() for dataset in (first, val) for i in range(24)}
    assert len(seen) == 48
    assert first.image_name(3) != val.image_name(3)


@pytest.mark.parametrize("subsets", [2, 3, 4])
def test_shapes_subsets_are_balanced_and_not_in_order(subsets):
    dataset = small_shapes(subsets=subsets, n_train=240)
    assert dataset.subset.dtype == torch.int64
    assert dataset.subset.bincount().tolist() == [240 // subsets] * subsets
    agree = (dataset.subset == torch.arange(240) % subsets).float().mean()
    assert abs(agree - 1 / subsets) < 0.15


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("hard", [False, True])
def test_shapes_instances_make_up_the_mask(size, hard):
    dataset = small_shapes(train=False, size=size, hard=hard, subsets=4)
    classes = set()
    for i in range(12):
        image, mask, masks, boxes, labels, subset = dataset.scene(i)
        assert image.shape == (3, size, size) and image.dtype == torch.uint8 and subset == dataset.subset[i]
        assert masks.dtype == torch.bool and len(masks) == len(boxes) == len(labels) > 0
        assert torch.equal(mask.long(), (masks * labels[:, None, None]).sum(0)) and masks.sum(0).max() == 1
        for instance, box in zip(masks, boxes):
            rows, columns = instance.nonzero().T
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert torch.equal(dataset[i][1], mask)
        classes |= set(labels.tolist())
    assert classes == {1, 2, 3, 4, 5}


def test_shapes_subsets_differ_in_scale_and_in_hard_mode_in_nothing_else():
    def measure(hard):
        dataset = small_shapes(train=False, size=64, n_train=180, hard=hard)
        sides, light, background = ([[] for _ in range(3)] for _ in range(3))
        for i in range(180):
            scene = dataset.scene(i)
            x1, y1, x2, y2 = scene.boxes.T
            sides[scene.subset] += ((x2 - x1) * (y2 - y1)).sqrt().tolist()
            light[scene.subset].append(float(scene.image.float().mean()))
            background[scene.subset].append(float((scene.mask == 0).float().mean()))
        share = np.array([np.mean(b) for b in background])
        assert (abs(share - 0.675) < 0.03).all(), share
        return [np.median(s) for s in sides], np.array(light)

    for hard in (False, True):
        (large, medium, small), light = measure(hard)
        assert large > 1.5 * medium > 2.25 * small
        means, error = light.mean(1), np.sqrt(light.var(1).mean() / light.shape[1])
        if hard:
            assert np.ptp(means) < 5 * error, means
        else:
            assert means[0] > means[1] + 20 > means[2] + 60, means


# ============ data: alone ============


# ============ models and checkpoints ============


def test_any_image_size_and_logit_space():
    network = model.build_model("divdr-raw", "segmentation", 3, layers=4, width=4, gate_space="logit").eval()
    out = network(torch.randn(2, 3, 50, 70))
    assert out.logits.shape == (2, 3, 50, 70)
    torch.testing.assert_close(torch.relu(torch.tanh(out.A)), out.routes.A)


def test_checkpoint_round_trip(tmp_path):
    arguments = dict(variant="dr-a", task="segmentation", num_classes=3, layers=4, width=4, gate=None)
    network = model.build_model(**arguments).eval()
    model.save_checkpoint(tmp_path / "a.pt", network, model_args=arguments, classes=["x", "y", "z"])
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]  # no temporary file stays
    again, contents = model.load_checkpoint(tmp_path / "a.pt")
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(network(images).logits, again(images).logits) and contents["classes"] == ["x", "y", "z"]


class RunsCode:
    """A pickle that would write a file when loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_files_that_are_no_checkpoints_are_refused_in_one_line(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"weights": RunsCode(tmp_path / "ran"), "model_args": {}}, tmp_path / "code.pt")
    torch.save({"something": 1}, tmp_path / "other.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"weights": {}, "model_args": dict(variant="dr-a", task="segmentation", num_classes=2, layers=4, width=4)},
               tmp_path / "unfit.pt")  # fmt: skip
    whole = (tmp_path / "unfit.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    for name in ("text.pt", "code.pt", "other.pt", "empty.pt", "unfit.pt", "cut.pt", "missing.pt"):
        with pytest.raises(model.InputError) as caught:
            model.load_checkpoint(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


# ============ files copied out ============


ALONE = {
    "routing.py": "import torch, routing; f, A, c = routing.RoutedBackbone(4, 4)(torch.rand(2, 3, 64, 64)); print(A.shape, c)",
    "losses.py": "import torch, losses; print(losses.clustering_loss(torch.rand(4, 6), torch.rand(3, 6), 0.5, 1.0).item())",
    "kmeans.py": "import torch, kmeans; b = kmeans.ActivationBank(20, 4); b.update(torch.arange(20), torch.rand(20, 4)); print(b.cluster(3))",
    "data.py": "import data; print(next(iter(data.train_loader(data.segmentation_dataset('shapes', None, 'train', train=True), 4)))[0].shape)",
}  # fmt: skip


@pytest.mark.parametrize("name", ALONE)
def test_works_alone_in_an_empty_folder(name, tmp_path):
    shutil.copy(HERE / name, tmp_path)
    status, _, error = run("-c", ALONE[name], cwd=tmp_path, PYTHONPATH="")
    assert status == 0, error


# ============ published checkpoints of Dynamic Routing ============


def published_shapes(layers=16, C=64, classes=19):
    """Names and shapes of the weights as the authors' code writes them, spelled out from the description of its modules."""
    shapes = {}

    def conv(name, c_in, c_out, k=1, groups=1, norm=True):
        shapes[f"{name}.weight"] = (c_out, c_in // groups, k, k)
        for part in ("weight", "bias", "running_mean", "running_var") if norm else ():
            shapes[f"{name}.norm.{part}"] = (c_out,)

    def with_bias(name, c_in, c_out, k=1):
        conv(name, c_in, c_out, k, norm=False)
        shapes[f"{name}.bias"] = (c_out,)

    def node(name, c, up, down):
        for i, k in enumerate((3, 1, 3, 1)):
            conv(f"{name}.cell_ops._ops.0.op.{i}", c, c, k, groups=c if k == 3 else 1, norm=k == 1)
        if up:
            conv(f"{name}.res_up.1", c, c // 2)
        if down:
            conv(f"{name}.res_down.1", c, 2 * c)
        conv(f"{name}.gate_conv_beta.0", c, c // 2)
        with_bias(f"{name}.gate_conv_beta.2", c // 2, 1 + up + down)

    conv("backbone.stem.stem_1", 3, C, 3)
    for stage in ("stem_2", "stem_3"):
        conv(f"backbone.stem.{stage}.0", C, C, 3, groups=C, norm=False)
        conv(f"backbone.stem.{stage}.1", C, C)
    node("backbone.init_layer", C, up=False, down=True)
    for layer, nodes in enumerate([2, 3] + [4] * (layers - 2)):
        for s in range(nodes):
            last = layer == layers - 1
            node(f"backbone.all_cell_list.{layer}.{s}", C * 2**s, up=s > 0 and not last, down=s < 3 and not last)
    for s in range(4):
        conv(f"sem_seg_head.layer_decoder_list.{s}", C * 2**s, C * 2**s // (1 if s == 0 else 2))
    with_bias("sem_seg_head.predictor", C, classes, 3)
    return shapes


def published_file(path, layers=4, C=8, classes=19, gates=True, head=True):
    """Random weights in the authors' format, optimiser state and NumPy numbers among them; returns the weights."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in published_shapes(layers, C, classes).items():
        if (gates or "gate_conv" not in name) and (head or not name.startswith("sem_seg")):
            scale = (2 / math.prod(shape[1:])) ** 0.5 if len(shape) == 4 else 0.2
            weights[name] = scale * torch.randn(shape, generator=generator) + (1 if len(shape) == 1 else 0)
            weights[name] = weights[name].abs() if name.endswith("running_var") else weights[name]
            if name.endswith("norm.weight"):
                weights[name.replace("norm.weight", "norm.num_batches_tracked")] = torch.tensor(7)
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(2), "step": np.int64(3)}}, "lr": np.float64(0.05)}
    torch.save({"model": weights, "optimizer": optimizer, "iteration": np.int64(12), "seen": np.arange(3.0)}, path)
    return weights


@pytest.mark.parametrize("layers", [16, 33])
def test_every_published_name_is_one_of_ours_and_the_reverse(layers):
    network = model.build_model("dr-raw", "segmentation", 19, layers=layers)
    ours = {name: tuple(w.shape) for name, w in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    named = {model.published_name(name): shape for name, shape in ours.items()}
    assert len(named) == len(ours) and named == published_shapes(layers)
    below_head = sum(p.numel() for p in network.backbone.parameters())
    assert below_head == {16: 17_596_853, 33: 38_683_551}[layers]


def test_published_input_becomes_ours(tmp_path):
    weights = published_file(tmp_path / "f.pth")
    network, _ = model.load_published(tmp_path / "f.pth", "dr-raw")
    rgb = torch.randint(0, 256, (2, 3, 33, 41), dtype=torch.uint8)
    mean = torch.tensor([103.530, 116.280, 123.675])[:, None, None]
    theirs = torch.nn.functional.conv2d(rgb.flip(1).double() - mean, weights["backbone.stem.stem_1.weight"].double(), stride=2)
    ours = network.backbone.stem[0](data.normalize(rgb))
    torch.testing.assert_close(ours.double(), theirs, atol=1e-3, rtol=1e-4)


def test_published_checkpoint_is_read_whole_and_evaluated(tmp_path, monkeypatch, capsys):
    weights = published_file(tmp_path / "dr_a.pth")
    network, contents = model.load_published(tmp_path / "dr_a.pth", "dr-a")
    assert network.backbone.gate == "small" and network.backbone.width == 8 and contents["iteration"] == 12
    state = network.state_dict()
    for name, weight in state.items():
        if name != "backbone.stem.0.weight":
            assert torch.equal(weight, weights[model.published_name(name)]) or name.endswith("num_batches_tracked")
    write_camvid(tmp_path / "camvid")
    published_file(tmp_path / "camvid.pth", classes=11)
    monkeypatch.chdir(tmp_path)
    command = ["evaluate.py", "camvid.pth", "--variant", "dr-a", "--data", "camvid", "--workers", "0", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*command, "--dataset", "camvid"])
    evaluate.main()
    metrics = json.loads(Path("metrics.json").read_text())
    assert metrics["images"] == 12 and metrics["variant"] == "dr-a" and metrics["gflops"]["paper"]["mean"] > 0
    capsys.readouterr()
    for arguments, word in ((command, "11 classes"), (["evaluate.py", "metrics.json", "--variant", "dr-a"], "metrics.json")):
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stopped:
            evaluate.main()
        error = capsys.readouterr().err.strip()
        assert stopped.value.code == 2 and word in error and "\n" not in error
    published_file(tmp_path / "fix.pth", gates=False)
    with pytest.raises(model.InputError, match="--init"):
        model.load_published(tmp_path / "fix.pth", "dr-a")
    published_file(tmp_path / "imagenet.pth", head=False)
    with pytest.raises(model.InputError, match="--init"):
        model.load_published(tmp_path / "imagenet.pth", "dr-a")


def test_initialize_says_what_fits(tmp_path):
    weights = published_file(tmp_path / "fix.pth", gates=False, head=False)
    network = model.build_model("dr-a", "segmentation", 11, layers=4, width=8)
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    report = model.initialize(network, tmp_path / "fix.pth")
    assert len(report.matched) == len([n for n in weights if "tracked" not in n]) and not report.left_over
    assert all(".gate." in name or name.startswith("head.") for name in report.missing)
    for name in report.missing:
        assert torch.equal(network.state_dict()[name], before[name])
    assert f"{len(report.matched)} tensors matched, {len(report.missing)} missing (" in str(report)

    published_file(tmp_path / "other.pth", classes=19)  # the head's classifier differs, all else fits
    report = model.initialize(network, tmp_path / "other.pth")
    assert report.missing == ["head.predictor.weight", "head.predictor.bias"] and len(report.left_over) == 2

    model.save_checkpoint(tmp_path / "ours.pt", network, model_args={})
    detector = small_detector(layers=5, width=8)  # the backbone's first layers are the same
    report = model.initialize(detector, tmp_path / "ours.pt")
    assert torch.equal(detector.backbone.layers[2][1].cell.body[0].weight, network.backbone.layers[2][1].cell.body[0].weight)
    assert {n for n in report.left_over if not n.startswith("head.")} and "rcnn.rpn.head.conv.0.0.weight" in report.missing
    model.save_checkpoint(tmp_path / "detector.pt", detector, model_args={})
    again = model.build_model("dr-a", "segmentation", 11, layers=4, width=8)
    model.initialize(again, tmp_path / "detector.pt")
    assert torch.equal(again.backbone.stem[3].weight, network.backbone.stem[3].weight)

    for number, contents in enumerate(({"model": {"backbone.stem.stem_1.weight": 3}}, {"weights": 5}, {"weights": {"backbone.stem.0.weight": 1}},
                                       {"model": {"backbone.stem.stem_1.weight": torch.zeros(2)}})):  # fmt: skip
        torch.save(contents, tmp_path / f"{number}.pth")
        with pytest.raises(model.InputError, match=f"{number}.pth"):
            model.initialize(network, tmp_path / f"{number}.pth")
        with pytest.raises(model.InputError, match=f"{number}.pth"):
            model.load_published(tmp_path / f"{number}.pth", "dr-a")
    narrow = model.build_model("dr-a", "segmentation", 11, layers=4, width=4)
    with pytest.raises(model.InputError, match="do not fit the network"):
        model.initialize(narrow, tmp_path / "ours.pt")


# ============ the training recipe ============


def test_learning_rate_warms_up_and_decays():
    factor = train_seg.learning_rate_factor(train_seg.Config(iters=180_000, warmup=1000))
    assert factor(0) == pytest.approx(0.001)
    assert factor(500) == pytest.approx((0.001 + 0.999 / 2) * (1 - 500 / 180_000) ** 0.9)
    assert factor(90_000) == pytest.approx(0.5**0.9) and factor(180_000) == 0


def test_norm_weights_have_no_weight_decay():
    network = model.build_model("dr-a", "segmentation", 3, layers=4, width=4)
    decayed, free = train_seg.make_optimizer(network, train_seg.Config(lr=0.1)).param_groups
    norms = {id(p) for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()}
    assert {id(p) for p in free["params"]} == norms and free["weight_decay"] == 0 and decayed["weight_decay"] == 1e-4
    assert len(decayed["params"]) + len(norms) == len(list(network.parameters()))


def test_segmentation_loss_ignores_255_and_survives_crops_without_labels():
    alone = model.Process(0, 1, torch.device("cpu"))
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    masks = torch.randint(0, 3, (2, 4, 4))
    masks[0, :2] = 255
    p = logits.detach().double().softmax(1)
    picked = [-math.log(p[b, masks[b, y, x], y, x]) for b in range(2) for y in range(4) for x in range(4) if masks[b, y, x] != 255]
    assert train_seg.segmentation_loss(logits, masks, alone).item() == pytest.approx(sum(picked) / len(picked), rel=1e-5)
    nothing = train_seg.segmentation_loss(logits, torch.full_like(masks, 255), alone)
    nothing.backward()
    assert nothing.item() == 0 and (logits.grad == 0).all()


def test_variants_are_the_methods_table():
    table = {"dr-a": (0.8, 0.1, 0, "small"), "dr-b": (0.5, 0.1, 0, "small"), "dr-c": (0.5, 0.2, 0, "small"),
             "dr-raw": (0, 0, 0, "full"), "divdr-a": (0.8, 0.1, 0.2, "small"), "divdr-raw": (0, 0, 0.2, "small")}  # fmt: skip
    for name, (lambda1, budget, lambda2, gate) in table.items():
        config = train_seg.resolve(train_seg.Config(variant=name), train_seg.RECIPES, world=1)
        assert (config.lambda1, config.budget, config.lambda2, config.gate) == (lambda1, budget, lambda2, gate)
        assert (config.k, config.margin, config.kmeans_every, config.batch, config.crop) == (4, 5.0, 50, 8, 768)
        assert (config.iters, config.lr, config.warmup, config.clip) == (180_000, 0.05, 1000, 5.0)
    assert "deeplabv3-r101" in model.VARIANTS


@pytest.mark.parametrize("flags, word", [
    (["--k", "1"], "--k"), (["--lambda2", "-1"], "--lambda2"), (["--crop", "100"], "--crop"), (["--variant", "x"], "--variant"),
    (["--dataset", "cityscapes", "--data", "nowhere"], "nowhere"), (["--iters", "0"], "--iters"),
    (["--dataset", "shapes", "--k", "5000"], "--k"), (["--device", "cuda:7"], "--device"), (["--dataset", "shapes", "--data", "x"], "x"),
    (["--variant", "deeplabv3-r101", "--width", "8"], "--width"), (["--dataset", "shapes", "--oracle", "--k", "5"], "--oracle"),
    (["--dataset", "shapes", "--batch", "1"], "--batch"), (["--dataset", "shapes", "--lr", "nan"], "--lr"), (["--budget", "2"], "--budget"),
    (["--variant", "dr-raw", "--lambda1", "0.5"], "--budget"), (["--dataset", "shapes", "--init", "x.pth"], "x.pth"),
    (["--variant", "deeplabv3-r101", "--init", "x.pth"], "--init"),
    (["--dataset", "shapes", "--subsets", "1"], "--subsets"), (["--dataset", "shapes", "--size", "0"], "size"),
    (["--dataset", "shapes", "--layers", "0"], "layers"), (["--device", "cpu:abc"], "--device"), (["--width", "7", "--dataset", "shapes"], "width"),
])  # fmt: skip
def test_flags_that_cannot_work_end_in_one_line(flags, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_seg.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        train_seg.main()
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and word in error and "\n" not in error and not list(tmp_path.iterdir())


def test_missing_cityscapes_says_what_is_expected_and_what_needs_no_download(tmp_path):
    status, _, error = run(HERE / "train_seg.py", cwd=tmp_path)
    assert status == 2 and "Traceback" not in error
    for word in ("data/cityscapes", "leftImg8bit", "gtFine", "www.cityscapes-dataset.com", "--dataset shapes"):
        assert word in error


# ============ end to end ============


TINY = ["--dataset", "camvid", "--layers", "4", "--width", "4", "--crop", "64", "--short-sides", "64", "80", "--batch", "4",
        "--warmup", "2", "--bn-batches", "2", "--kmeans-every", "3", "--k", "2", "--log-every", "2", "--workers", "0"]  # fmt: skip


def write_camvid(root, n=12, size=(64, 96)):
    """A CamVid tree in which class 3 is dark and class 5 bright; the rest of the label map is void."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir(parents=True)
        for i in range(n):
            label = np.full(size, 3, np.uint8)
            label[:, rng.integers(20, 70) :] = 5
            image = np.where(label == 3, 40, 200)[..., None] + rng.integers(-20, 20, (*size, 3))
            label[:4] = 11
            Image.fromarray(image.astype(np.uint8)).save(root / split / f"{i:02d}.png")
            Image.fromarray(label).save(root / f"{split}annot" / f"{i:02d}.png")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data and a run on two processes: (folder, run folder)."""
    folder = tmp_path_factory.mktemp("end-to-end")
    write_camvid(folder / "camvid")
    status, out, error = run(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, HERE / "train_seg.py", *TINY, "--data", "camvid",
        "--variant", "divdr-a", "--iters", 12, "--eval-every", 6, "--name", "pair", "--device", "cpu", cwd=folder)  # fmt: skip
    assert status == 0, error
    return folder, folder / "runs" / "pair"


def test_two_processes_train_and_every_sample_enters_the_bank(trained):
    _, folder = trained
    assert sorted(p.name for p in folder.iterdir()) == ["best.pt", "config.json", "last.pt", "log.jsonl", "previous.pt"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["lambda1"], config["gate"], config["batch"], config["iters"]) == (0.8, "small", 4, 12)
    _, checkpoint = model.load_checkpoint(folder / "last.pt")
    assert checkpoint["bank"]["seen"].all() and len(checkpoint["bank"]["seen"]) == 12
    assert (checkpoint["bank"]["values"].sum(1) > 0).all()
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [e["iteration"] for e in events if e["event"] == "kmeans"] == [3, 6, 9, 12]
    assert [e["iteration"] for e in events if e["event"] == "evaluation"] == [6, 12]
    last = [e for e in events if e["event"] == "train"][-1]
    keys = {"loss_task", "loss_cost", "loss_clustering", "gflops_real", "gflops_expected", "sizes", "inter", "intra",
            "images_per_second", "lr", "gradient_norm", "sigma2"}  # fmt: skip
    assert keys <= last.keys() and sum(last["sizes"]) == 12


def test_evaluation_knows_the_run_and_shows_pictures(trained):
    folder, run_folder = trained
    status, out, error = run(HERE / "evaluate.py", "runs/pair/last.pt", "--workers", 0, "--device", "cpu", cwd=folder)
    assert status == 0, error
    metrics = json.loads((run_folder / "metrics.json").read_text())
    assert metrics["images"] == 12 and sum(metrics["images_per_expert"]) == 12 and metrics["variant"] == "divdr-a"
    for count in ("paper", "exact"):
        gflops = metrics["gflops"][count]
        assert 0 < gflops["min"] <= gflops["mean"] <= gflops["max"]
    assert "mean" in out and "expert" in out and "\npaper  " in out
    log = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    during = [e for e in log if e["event"] == "evaluation"][-1]["miou"]
    assert metrics["miou"] == pytest.approx(100 * during, abs=1e-6)  # one process counts what two counted

    status, out, error = run_here(evaluate.main, "runs/pair/last.pt", "--image", "camvid/val", "--device", "cpu", cwd=folder)
    assert status == 0, error
    assert len(list((run_folder / "overlays").glob("*.png.png"))) == 12
    assert len(re.findall(r"expert [01] of 2", out)) == 12
    overlay = np.array(Image.open(run_folder / "overlays" / "00.png.png"))
    assert overlay.shape == (64, 96, 3)

    status, _, error = run_here(evaluate.main, "runs/pair/last.pt", "--dataset", "shapes", "--device", "cpu", cwd=folder)
    assert status == 2 and "--dataset shapes" in error and error.count("\n") == 1


@pytest.mark.parametrize("flags", [
    ["--variant", "divdr-raw", "--activations", "recompute", "--kmeans-anneal", "4"],
    ["--variant", "divdr-raw", "--gate-space", "logit"],
    ["--variant", "dr-raw", "--amp"],
])  # fmt: skip
def test_one_process_trains_with(flags, tmp_path, monkeypatch):
    write_camvid(tmp_path / "camvid")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_seg.py", *TINY, "--data", "camvid", "--iters", "9", "--eval-every", "100",
                                      "--device", "cpu", "--name", "run", *flags])  # fmt: skip
    train_seg.main()
    _, checkpoint = model.load_checkpoint("runs/run/last.pt")
    assert checkpoint["bank"]["seen"].all() and checkpoint["centers"].shape == (2, checkpoint["bank"]["values"].shape[1])
    if "logit" in flags:
        assert checkpoint["bank"]["values"].abs().max() > 1
    events = [json.loads(line) for line in Path("runs/run/log.jsonl").read_text().splitlines()]
    clustered = [e["iteration"] for e in events if e["event"] == "kmeans"]
    assert clustered == ([3, 8, 9] if "--kmeans-anneal" in flags else [3, 6, 9])  # 3 + round(3 · 4^(3/9)) = 8
    with pytest.raises(SystemExit):  # the same name again: nothing written is lost
        train_seg.main()


def test_experts_in_the_metric_of_the_task_keep_their_images():
    """metric, centres, own and loss against the formulas written out; and what a checkpoint carries over."""
    train_set, rng = small_shapes(train=False, n_train=40), np.random.default_rng(0)
    config = train_seg.resolve(train_seg.Config(dataset="shapes", variant="divdr-raw", k=2, metric="task", own="bank", batch=4,
                                                kmeans_restarts=0), train_seg.RECIPES, world=1)  # fmt: skip
    experts = train_seg.Experts(config, 6, train_set, torch.device("cpu"))
    gradient = torch.from_numpy(rng.normal(0, [3e-4, 1e-5, 0, 2e-4, 1e-4, 0], (4, 6))).float()
    probe = experts.probes(4)["probe"]
    assert probe.shape == (4, 3, 3) and not probe.any() and not experts.pull(1)
    probe.grad = torch.cat([torch.full((4, 1, 3), 9.0), gradient.view(4, 2, 3)], 1)  # the init node is no part of A
    experts.sense()
    A = torch.from_numpy(rng.uniform(0, 1, (40, 6))).float()
    A[:, [2, 5]] = 0
    experts.bank.update(torch.arange(40), A)
    experts.update(50)
    rms = gradient.double().square().mean(0).sqrt()
    metric = (rms / rms[rms > 0].square().mean().sqrt()).clamp(min=0.01).float()
    torch.testing.assert_close(experts.metric, metric)
    centers = experts.clusters.centers
    distance = ((A[:, None] - centers) * metric).double().norm(dim=2)
    assert torch.equal(experts.own, distance.argmin(1)) and experts.pull(51)
    for k in range(2):
        torch.testing.assert_close(centers[k], A[experts.own == k].mean(0))
    # An image that has moved right to the other centre is still pulled to its own.
    index, sigma2 = torch.tensor([7, 30]), distance.amin(1).square().sum().item() / 39
    moved = centers[1 - experts.own[index]]
    apart = ((centers[0] - centers[1]) * metric).norm().item() / (2 * sigma2)
    assert experts.loss(moved, index).item() == pytest.approx(config.margin + apart, rel=1e-4)
    again = train_seg.Experts(config, 6, train_set, torch.device("cpu"))
    again.load_state(experts.state())
    assert torch.equal(again.metric, experts.metric) and torch.equal(again.own, experts.own) and torch.equal(again.squares, experts.squares)
    with pytest.raises(model.InputError, match="--metric task"):
        train_seg.resolve(train_seg.Config(dataset="shapes", metric="task", gate_space="logit"), train_seg.RECIPES, world=1)


@pytest.mark.parametrize("oracle", [[], ["--oracle"]])
def test_shapes_end_with_the_recovered_subsets(oracle, tmp_path):
    launch = [] if oracle else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    status, out, error = run(
        *launch, HERE / "train_seg.py", "--dataset", "shapes", "--size", 32, "--hard", "--subsets", 2, "--layers", 4, "--width", 8,
        "--iters", 6, "--warmup", 1, "--kmeans-every", 2, "--bn-batches", 2, "--workers", 0, "--device", "cpu", "--name", "s",
        *oracle, cwd=tmp_path)  # fmt: skip
    assert status == 0, error
    metrics = json.loads((tmp_path / "runs" / "s" / "metrics.json").read_text())
    subsets = metrics["subsets"]["subset"]
    assert "recovered subsets" in out and list(subsets) == ["day", "rain"] and metrics["k"] == 2
    assert sum(sum(row["experts"]) for row in subsets.values()) == 300
    for row in subsets.values():  # what ran at the strides, stem, gates and head aside, is what the whole cost
        fixed = model.build_model("divdr-a", "segmentation", 6, layers=4, width=8)
        parts = fixed.real_cost(fixed.backbone.open_routes(), 32, 32)
        rest = sum(parts[part].item() for part in ("stem", "gates", "head")) / 1e9
        init = row["gflops"] - rest - sum(level["gflops"] for level in row["by_stride"].values())
        assert -1e-9 <= init <= fixed.backbone.costs(32, 32).path[0].sum().item() / 1e9 + 1e-9
    assert (tmp_path / "runs" / "s" / "experts.png").stat().st_size > 1000
    _, checkpoint = model.load_checkpoint(tmp_path / "runs" / "s" / "last.pt")
    if oracle:
        dataset = data.segmentation_dataset("shapes", None, "train", train=False, size=32, hard=True, subsets=2)
        seen, values = checkpoint["bank"]["seen"], checkpoint["bank"]["values"]
        for k in range(2):
            mine = seen & (dataset.subset == k)
            torch.testing.assert_close(checkpoint["centers"][k], values[mine].mean(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("deferred", [False, True])
def test_a_diverging_run_stops_before_the_step_that_would_spoil_it(tmp_path, monkeypatch, capsys, deferred):
    monkeypatch.chdir(tmp_path)
    if deferred:  # as on a GPU
        monkeypatch.setattr(train_seg.Run, "defers", True)
        monkeypatch.setattr(torch.cuda, "Event", lambda: types.SimpleNamespace(record=lambda: None, synchronize=lambda: None))
    flags = ["--dataset", "shapes", "--size", "32", "--layers", "4", "--width", "4", "--iters", "20", "--warmup", "0", "--lr", "1e8",
             "--save-every", "1", "--workers", "0", "--device", "cpu", "--clip", "1e8", "--variant", "dr-raw"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train_seg.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        train_seg.main()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and "try a lower --lr" in error and "loss task is" in error
    at = int(re.search(r"iteration (\d+)", error)[1])
    assert len(re.findall(r"shapes/train/\d{5}", error)) == 8 and "last.pt is from before" in error
    network, checkpoint = model.load_checkpoint("runs/shapes-dr-raw-seed0/last.pt")
    assert checkpoint["iteration"] == at - 1 and all(p.isfinite().all() for p in network.parameters())


def test_a_compiled_network_trains_as_the_network_does(monkeypatch):
    """Through the compiler's front end alone: its code generation takes minutes."""
    images, steps = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)), {}
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for compiled in (False, True):
        torch.manual_seed(0)
        network = model.build_model("divdr-a", "segmentation", 5, layers=3, width=2).train()
        called = train_seg.distribute(network, model.Process(0, 1, torch.device("cpu")), compiled)
        out = called(images)
        (out.logits.square().mean() + out.cost.mean() / 1e9).backward()
        steps[compiled] = (out.logits, out.A, *(p.grad for p in network.parameters() if p.grad is not None))
    assert called is not network
    torch.testing.assert_close(steps[True], steps[False])


def test_bfloat16_changes_little_and_keeps_gates_in_float32():
    torch.manual_seed(0)
    network = model.build_model("divdr-a", "segmentation", 5, layers=4, width=8).train()
    images = torch.randn(4, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        half = network(images)
    full = network(images)
    assert half.logits.dtype == torch.bfloat16 and half.A.dtype == half.cost.dtype == torch.float32
    assert 0 < (half.A - full.A).abs().mean() < 0.02 and 0 < (half.cost / full.cost - 1).abs().max() < 0.05
    assert (half.logits - full.logits).abs().max() < 0.1 * full.logits.abs().max()
    half.logits.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


def test_the_optimizer_leaves_out_a_step_that_is_flagged():
    """What stands in for a sync on a GPU: `Run.check_step` sets the flag there."""
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    optimizer = train_seg.make_optimizer(network, train_seg.Config(lr=0.1))
    for flag, moves in ((0.0, True), (1.0, False), (0.0, True)):
        before = copy.deepcopy((network.state_dict(), [s["momentum_buffer"] for s in optimizer.state_dict()["state"].values()]))
        for p in network.parameters():
            p.grad = torch.full_like(p, torch.nan if flag else 1.0)
        optimizer.found_inf = torch.tensor(flag)
        optimizer.step()
        after = (network.state_dict(), [s["momentum_buffer"] for s in optimizer.state_dict()["state"].values()])
        assert torch.equal(before[0]["0.weight"], after[0]["0.weight"]) != moves
        assert moves or all(torch.equal(a, b) for a, b in zip(before[1], after[1]))


# ============ speed ============


def test_peak_memory_counts_what_is_held_at_a_time():
    def work():
        a = torch.zeros(1000)  # 4,000 bytes
        b = a + 1  # 8,000
        del a
        c = b.view(10, 100).t().contiguous()  # 8,000; a view takes none
        return c.sum()

    assert 8000 <= flops.peak_bytes(work, torch.device("cpu")) < 8100


def test_the_commands_that_measure_speed_print_what_they_measured(tmp_path):
    status, out, error = run_here(kmeans.main, "--n", 400, "--dim", 8, "--k", 2, 3, "--iters", 5, "--runs", 2, cwd=tmp_path)
    rows = [line.split() for line in out.splitlines()[2:]]
    assert status == 0, error
    assert [row[:2] for row in rows if "kmeans.py" in row] == [[kind, k] for kind in ("gates", "noise") for k in "23"]
    status, out, error = run_here(data.main, "--dataset", "coco", "--images", 2, "--runs", 1, cwd=tmp_path)
    assert status == 0, error
    assert [line.split()[1] for line in out.splitlines()[2:]] == ["torchvision's", "data.py", "decoding"]
    small = ["--speed", "--size", "64", "64", "--layers", "4", "--width", "4", "--batch", "1", "2", "--runs", "1", "--device", "cpu"]
    status, out, error = run_here(flops.main, *small, "--openness", "0.5", cwd=tmp_path)
    rows = [line.split() for line in out.splitlines()[3:]]
    assert status == 0 and len(rows) == 8, error
    assert all(float(row[-1]) < 1e-4 for row in rows if "all" in row)  # the difference from the published way
    status, out, error = run_here(flops.main, *small, "--batch", "2", "--train", "--amp", "--samples", "30", cwd=tmp_path)
    assert status == 0 and "bfloat16" in out and "--activations recompute" in out, error


@pytest.mark.parametrize("main, flags, words", [
    (kmeans.main, ["--n", "3", "--k", "4"], ["--n", "4"]),
    (kmeans.main, ["--device", "nowhere"], ["--device", "nowhere"]),
    (data.main, ["--data", "somewhere"], ["--data", "--dataset"]),
    (data.main, ["--dataset", "coco", "--data", "somewhere"], ["somewhere"]),
    (data.main, ["--images", "0"], ["--images"]),
    (flops.main, ["--runs", "3"], ["--runs", "--speed"]),
    (flops.main, ["--speed", "--amp"], ["--amp", "--train"]),
    (flops.main, ["--speed", "--train", "--batch", "1", "--size", "64", "64"], ["--batch", "--size"]),
    (flops.main, ["--speed", "--openness", "1.5"], ["--openness"]),
    (flops.main, ["--speed", "--task", "detection"], ["--task"]),
    (flops.main, ["--speed", "--variant", "deeplabv3-r101"], ["deeplabv3-r101", "routes"]),
])  # fmt: skip
def test_what_cannot_be_measured_is_said_in_one_line(tmp_path, main, flags, words):
    status, _, error = run_here(main, *flags, cwd=tmp_path)
    assert status == 2 and error.count("\n") == 1 and all(word in error for word in words), error


# ============ a run survives ============

SHORT = ["--size", "32", "--subsets", "2", "--layers", "4", "--width", "4", "--iters", "12", "--warmup", "2", "--bn-batches", "2",
         "--kmeans-every", "3", "--log-every", "4", "--eval-every", "6", "--save-every", "1", "--device", "cpu", "--batch", "4"]  # fmt: skip
SHORT_SEG = [HERE / "train_seg.py", "--dataset", "shapes", *SHORT, "--metric", "task", "--own", "bank", "--bank-momentum", "0.5",
             "--jitter", "--lambda2-start", "0.3"]  # fmt: skip
SHORT_DET = [HERE / "train_det.py", "--dataset", "shapes", *SHORT, "--pyramid", "8", "--short-sides", "32", "48", "--long-side", "64",
             "--proposals", "20", "--rois", "8", "--layers", "5", "--limit", "30", "--masks", "--activations", "recompute"]  # fmt: skip


def start(*command, cwd):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_iteration(process, folder, iteration):
    """Until the log or a checkpoint shows that the run is past `iteration`."""
    while process.poll() is None:
        path = folder / "last.pt"
        with contextlib.suppress(model.InputError, OSError):
            if path.exists() and model.read_file(path, "")["iteration"] >= iteration:
                return
        time.sleep(0.05)


def events(folder):
    """The log of a run, all but the speed."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in event.items() if key != "images_per_second"} for event in log]


def what_came_out(folder):
    """Weights, centres, bank, momentum and log of a run."""
    saved = model.read_file(folder / "last.pt", "")
    tensors = saved["weights"] | {"centers": saved["centers"], "bank": saved["bank"]["values"]}
    tensors |= {f"momentum {i}": state["momentum_buffer"] for i, state in saved["optimizer"]["state"].items()}
    return tensors, events(folder), (saved["iteration"], saved["sigma2"], saved["best"], saved["evaluation_due"])


def same_outcome(one, other):
    (tensors, log, rest), (others, other_log, other_rest) = what_came_out(one), what_came_out(other)
    assert tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert log == other_log and rest == other_rest


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    status, _, error = run(*SHORT_SEG, "--workers", 1, "--name", "whole", cwd=folder)
    assert status == 0, error
    return folder / "runs" / "whole"


@pytest.mark.parametrize("how", ["kill", "terminate", "interrupt"])
def test_a_stopped_run_goes_on_as_if_nothing_had_been(how, uninterrupted, tmp_path):
    command, folder = [*SHORT_SEG, "--workers", 1, "--name", "parts"], tmp_path / "runs" / "parts"
    process = start(*command, cwd=tmp_path)
    wait_for_iteration(process, folder, 3 if how == "kill" else 2)
    process.send_signal({"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT}[how])
    _, error = process.communicate(timeout=60)
    assert process.returncode == {"kill": -9, "terminate": 143, "interrupt": 130}[how]
    if how != "kill":
        assert "go on with --resume" in error.splitlines()[-1] and "Traceback" not in error
    if how == "kill":
        status, _, error = run(*command, cwd=tmp_path)  # by itself it overwrites nothing
        assert status == 2 and "--resume" in error.splitlines()[-1]
    status, _, error = run(*command, "--resume", *(["auto"] if how == "kill" else []), cwd=tmp_path)
    assert status == 0, error
    same_outcome(uninterrupted, folder)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(uninterrupted, tmp_path):
    command, folder = [*SHORT_SEG, "--workers", 0, "--name", "parts"], tmp_path / "runs" / "parts"
    status, _, error = run_here(train_seg.main, *command[1:], "--resume", cwd=tmp_path)
    assert status == 2 and "no run to go on with" in error
    process = start(*command, cwd=tmp_path)
    wait_for_iteration(process, folder, 5)
    process.kill(), process.communicate()
    contents = bytearray((folder / "last.pt").read_bytes())
    contents[len(contents) // 2] ^= 255  # one byte of a weight: the file opens, its checksum does not agree
    (folder / "last.pt").write_bytes(contents)
    status, _, error = run(*command, "--resume", cwd=tmp_path)
    assert status == 0 and "warning" in error and "last.pt" in error and (folder / "last.pt.damaged").exists()
    same_outcome(uninterrupted, folder)
    status, _, error = run_here(train_seg.main, *command[1:], "--resume", "--lr", 0.3, cwd=tmp_path)
    assert status == 2 and "--lr 0.3" in error.splitlines()[-1] and "0.2" in error
    for name in ("last.pt", "previous.pt"):
        (folder / name).write_bytes(b"nothing")
    status, _, error = run_here(train_seg.main, *command[1:], "--resume", cwd=tmp_path)
    assert status == 2 and "no checkpoint" in error.splitlines()[-1]


def test_a_full_disk_leaves_the_file_before_it(tmp_path):
    script = """
import resource, sys, torch, model
network = torch.nn.Linear(100, 100)
model.save_checkpoint("last.pt", network, iteration=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    model.save_checkpoint("last.pt", network, keep="previous.pt", iteration=2)
except model.InputError as error:
    print(error)
"""
    status, out, error = run("-c", script, cwd=tmp_path, PYTHONPATH=str(HERE))
    assert status == 0 and "last.pt: could not be written (File too large)" in out and len(out.splitlines()) == 1, error
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"] and model.read_file(tmp_path / "last.pt", "")["iteration"] == 1


def skip_unless_asked(request):
    if "long" not in (request.config.getoption("markexpr") or ""):
        pytest.skip("takes minutes: run it with -m long")


with warnings.catch_warnings():
    warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
    long = pytest.mark.long


@long
@pytest.mark.parametrize("command", [[*SHORT_SEG, "--iters", "300"], [*SHORT_DET, "--iters", "120"]], ids=["seg", "det"])
def test_twenty_kills_change_nothing(command, tmp_path, request):
    """Each at a random moment after the run has taken up again: in a step, in K-means, in an evaluation, while saving."""
    skip_unless_asked(request)
    command = [*command, "--workers", 1, "--eval-every", "20", "--save-every", "2", "--name"]
    status, _, error = run(*command, "whole", cwd=tmp_path)
    assert status == 0, error
    rng, saved, iterations = np.random.default_rng(0), tmp_path / "runs" / "parts" / "last.pt", []
    for _ in range(20):
        process = start(*command, "parts", "--resume", "auto", cwd=tmp_path)
        before = saved.stat().st_mtime_ns if saved.exists() else 0
        while process.poll() is None and (not saved.exists() or saved.stat().st_mtime_ns == before):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.6))
        assert process.poll() is None, "the run was over before the last kill: give it more iterations"
        process.kill(), process.communicate()
        iterations.append(max((event["iteration"] for event in events(saved.parent)), default=0))
    status, _, error = run(*command, "parts", "--resume", "auto", cwd=tmp_path)
    assert status == 0, error
    print(f"\n20 kills, the log then at iterations {iterations}")
    same_outcome(tmp_path / "runs" / "whole", tmp_path / "runs" / "parts")


@long
def test_torchrun_restarts_a_dead_rank_by_itself(tmp_path, request):
    skip_unless_asked(request)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "--max-restarts", 2, *SHORT_SEG, "--iters", "40",
               "--save-every", "2", "--workers", 0, "--name"]  # fmt: skip
    status, _, error = run(*command, "whole", cwd=tmp_path)
    assert status == 0, error
    process, folder = start(*command, "parts", cwd=tmp_path), tmp_path / "runs" / "parts"
    wait_for_iteration(process, folder, 6)
    listed = subprocess.run(["pgrep", "-f", f"{SHORT_SEG[0]}.*--name parts"], capture_output=True, text=True).stdout.split()
    ranks = [pid for pid in listed if "RANK=1\0" in Path(f"/proc/{pid}/environ").read_text()]
    os.kill(int(ranks[-1]), signal.SIGKILL)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    same_outcome(tmp_path / "runs" / "whole", folder)


def test_static_baseline_runs_through_the_same_loop(tmp_path, monkeypatch):
    write_camvid(tmp_path / "camvid", n=4)
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", "camvid", "--data", "camvid", "--variant", "deeplabv3-r101", "--crop", "64", "--short-sides", "64",
             "--batch", "2", "--iters", "1", "--bn-batches", "1", "--workers", "0", "--name", "static", "--device", "cpu", "--k", "2"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train_seg.py", *flags])
    train_seg.main()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "runs/static/last.pt", "--workers", "0", "--device", "cpu"])
    evaluate.main()
    metrics = json.loads(Path("runs/static/metrics.json").read_text())
    assert list(metrics["gflops"]) == ["exact"] and "inter" not in metrics
    figures = []  # without gates there are three
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, folder, name: figures.append(name))
    monkeypatch.setattr(sys, "argv", sys.argv + ["--figures", "drawn", "--latex"])
    evaluate.main()
    assert figures == ["predictions", "training", "trade-off"]


def test_batch_norm_is_reestimated_as_plain_averages():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, 3, 8, 8, generator=generator) * 3 + 1 for _ in range(3)]
    network = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    train_seg.reestimate_batch_norm(network, iter(batches), model.Process(0, 1, torch.device("cpu")))
    torch.testing.assert_close(network[0].running_mean, torch.stack([x.mean((0, 2, 3)) for x in batches]).mean(0))
    torch.testing.assert_close(network[0].running_var, torch.stack([x.var((0, 2, 3)) for x in batches]).mean(0))


# ============ detection ============


def write_coco(root, split="train", sizes=((60, 80), (80, 60), (64, 64), (60, 80), (50, 90)), seed=0):
    """A COCO 2017 tree: bright boxes of category 7 and dark ones of category 3 on grey; image 3 has a crowd and nothing
    else, image 4 no annotation at all, image 0 a box without width. Returns the parsed json."""
    rng = np.random.default_rng(seed)
    (root / f"{split}2017").mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for i, (height, width) in enumerate(sizes):
        picture = np.full((height, width, 3), 120, np.uint8)
        images.append(dict(id=100 + 7 * i, file_name=f"{i:012d}.jpg", width=width, height=height))
        common = dict(image_id=100 + 7 * i, iscrowd=0)
        for _ in range(0 if i in (3, 4) else 3):
            x, y, w, h = (int(v) for v in (rng.integers(0, width - 30), rng.integers(0, height - 30), *rng.integers(12, 30, 2)))
            category = int(rng.choice([3, 7]))
            picture[y : y + h, x : x + w] = {3: 20, 7: 230}[category]
            corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotations.append(common | dict(category_id=category, bbox=[x, y, w, h], area=w * h, segmentation=[corners]))
        if i == 0:
            annotations.append(common | dict(category_id=3, bbox=[5, 5, 0, 9], area=0, segmentation=[[5, 5, 5, 14, 5, 9]]))
        if i == 3:
            counts = [width * 10, height * 5, (width - 5) * height - width * 10]
            annotations.append(common | dict(category_id=7, bbox=[8, 0, 9, height], area=height * 5, iscrowd=1,
                                             segmentation=dict(size=[height, width], counts=counts)))  # fmt: skip
        Image.fromarray(picture).save(root / f"{split}2017" / f"{i:012d}.jpg", quality=95)
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    contents = dict(images=images, annotations=annotations, categories=[dict(id=7, name="bright"), dict(id=3, name="dark")])
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(contents))
    return contents


def small_detector(**arguments):
    sizes = dict(layers=4, width=4, pyramid=16, short_sides=(64,), long_side=128, anchor=8, proposals=50, rois=32)
    return model.build_model(arguments.pop("variant", "dr-raw"), "detection", 2, **sizes | arguments)


def test_detector_structure():
    detector = model.build_model("divdr-a", "detection", 80)
    assert (detector.dim, detector.backbone.num_nodes, detector.stride) == (198, 66, 64)
    maps, _ = detector.pyramid.eval()(torch.zeros(1, 3, 64, 128))
    assert [tuple(y.shape) for y in maps.values()] == [(1, 256, 16 // 2**s, 32 // 2**s) for s in range(5)]
    assert detector.rcnn.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert detector.rcnn.roi_heads.box_roi_pool.canonical_scale == 224
    for gate, published in (("full", 38.336), ("small", 33.110)):
        detector = model.build_model("divdr-a", "detection", 80, gate=gate)
        cost = detector.real_cost(detector.backbone.open_routes(), 800, 800, "paper")
        assert sum(cost.values()).item() / 1e9 == pytest.approx(published, abs=5e-4)


def test_a_detector_in_bfloat16_has_boxes_in_float32():
    torch.manual_seed(0)
    detector, seen = small_detector(masks=True).train(), []
    detector.rcnn.rpn.register_forward_hook(lambda module, inputs, out: seen.extend(out[0]))
    detector.rcnn.roi_heads.box_predictor.register_forward_hook(lambda module, inputs, out: seen.extend(out))
    boxes = torch.tensor([[10.0, 12.0, 50.0, 40.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1]), "masks": torch.ones(1, 64, 96, dtype=torch.uint8)}
    with torch.autocast("cpu", torch.bfloat16):
        out = detector([torch.rand(3, 64, 96)] * 2, [target] * 2)
    assert len(seen) == 4 and all(part.dtype == torch.float32 for part in seen)
    sum(out.losses.values()).backward()
    assert all(loss.isfinite() for loss in out.losses.values())


def test_static_detector_counts_what_others_publish():
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    detector = model.build_model("r50-fpn", "detection", 90)  # torchvision's has 91 classes, the background among them
    backbone = detector.real_cost(None, 800, 800, "paper")["network"].item()
    assert backbone / 1e9 == pytest.approx(88.381, abs=5e-4)  # the paper: 88.4
    rest = detector.rest_cost(800, 800, proposals=1000, detections=100)
    published = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["_ops"]
    assert (backbone + sum(rest.values())) / 1e9 == pytest.approx(published, abs=0.01)
    with pytest.raises(model.InputError, match="segmentation"):
        model.build_model("deeplabv3-r101", "detection", 3)


@pytest.mark.parametrize("masks", [False, True])
def test_detector_cost_equals_torchs_flop_counter(masks):
    torch.manual_seed(0)
    detector = small_detector(masks=masks).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = detector([torch.rand(3, 60, 100)])
    assert out.sizes == [(64, 106)] and out.padded == (64, 128) and out.proposals[0] > 0
    convolutions = sum(detector.real_cost(out.routes, *out.sizes[0], "conv").values()).item()
    rest = detector.rest_cost(*out.sizes[0], out.proposals[0], len(out.detections[0]["boxes"]))
    assert convolutions + sum(rest.values()) == counter.get_total_flops() // 2
    assert len(out.detections[0]["boxes"]) > 0 and (rest["mask head"] > 0) == masks


def test_detector_is_torchvisions(monkeypatch):
    """The static one against torchvision's own forward pass, in both modes; the losses of images without objects."""
    torch.manual_seed(0)
    detector = small_detector(variant="r50-fpn", layers=None, width=None, masks=True, pyramid=None)
    images = [torch.rand(3, 64, 90), torch.rand(3, 70, 64)]
    targets = [dict(boxes=torch.tensor([[5.0, 5, 40, 50]]), labels=torch.tensor([2]), masks=torch.ones(1, 64, 90, dtype=torch.uint8)),
               dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), masks=torch.zeros(0, 70, 64, dtype=torch.uint8))]  # fmt: skip
    torch.manual_seed(1)
    ours = detector(images, targets).losses
    torch.manual_seed(1)
    theirs = detector.rcnn(images, targets)
    assert ours.keys() == theirs.keys() and len(ours) == 5
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])
    nothing = detector(images[1:], targets[1:]).losses
    assert all(loss.isfinite() for loss in nothing.values())
    assert nothing["loss_box_reg"] == 0 and nothing["loss_rpn_box_reg"] == 0 and nothing["loss_mask"] == 0
    detector.eval()
    with torch.no_grad():
        for mine, other in zip(detector(images).detections, detector.rcnn(images)):
            assert mine.keys() == other.keys()
            assert all(torch.equal(mine[key], other[key]) for key in mine)


def test_padding_does_not_move_what_the_regions_see():
    """The first image decides nothing, though it is padded from 64x65 to 64x128."""
    torch.manual_seed(0)
    detector = small_detector(masks=True).eval()
    with torch.no_grad():
        detector([torch.rand(3, 65, 64)])
    for align in (detector.rcnn.roi_heads.box_roi_pool, detector.rcnn.roi_heads.mask_roi_pool):
        ramp = torch.arange(32.0).expand(1, 1, 32, 32) * 4  # a map of stride 4 that says how far right it is, in pixels
        maps = {str(i): ramp[..., :: 2**i, :: 2**i] for i in range(4)}
        regions = align(maps, [torch.tensor([[32.0, 8, 48, 24]])], [(65, 64)])
        assert regions.mean().item() == pytest.approx(40, abs=1e-3)  # the middle of the box


def test_each_image_of_a_batch_is_detected_as_if_alone():
    """Images of one size: whatever else is in the batch, skipped or masked."""
    torch.manual_seed(0)
    detector = small_detector(masks=True).eval()
    let_gates_decide(detector.backbone)
    images = [torch.rand(3, 64, 128) for _ in range(3)]
    with torch.no_grad():
        together = detector(images)
        for b, image in enumerate(images):
            alone = detector([image])
            torch.testing.assert_close(alone.A[0], together.A[b], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(alone.detections[0]["boxes"], together.detections[b]["boxes"], atol=1e-2, rtol=1e-3)


def test_coco_items(tmp_path):
    contents = write_coco(tmp_path)
    with pytest.warns(UserWarning, match="no objects to learn from"):
        whole = data.detection_dataset("coco", str(tmp_path), "train", train=False, masks=True)
    assert (whole.classes, whole.category_ids) == (["dark", "bright"], [3, 7])  # in the order of the ids, which have gaps
    assert whole.image_ids == [100, 107, 114, 121, 128] and len(whole) == 5 and whole.image_name(1) == "000000000001.jpg"
    for index in range(5):
        image, target, i = whole[index]
        mine = [a for a in contents["annotations"] if a["image_id"] == 100 + 7 * index and not a["iscrowd"] and a["bbox"][2]]
        assert i == index and image.dtype == torch.uint8 and image.shape[1:] == target["masks"].shape[1:]
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in mine)]
        assert target["boxes"].tolist() == boxes and target["labels"].tolist() == [{3: 1, 7: 2}[a["category_id"]] for a in mine]
        for (x1, y1, x2, y2), mask in zip(boxes, target["masks"]):
            assert mask.sum() == (x2 - x1) * (y2 - y1) and mask[y1:y2, x1:x2].all()
        assert target["boxes"].shape[1] == 4 and target["labels"].dtype == torch.int64
    with pytest.warns(UserWarning, match="1 boxes, the first that of annotation 4"):
        training = data.detection_dataset("coco", str(tmp_path), "train", train=True)
    assert training.image_ids == [100, 107, 114] and "masks" not in training[0][1]  # objects to learn from
    flipped = 0
    for _ in range(20):
        image, target, _ = training[1]
        plain, truth, _ = whole[1]
        if not torch.equal(image, plain):
            flipped += 1
            assert torch.equal(image.flip(2), plain)
            x1, y1, x2, y2 = truth["boxes"].unbind(1)
            torch.testing.assert_close(target["boxes"], torch.stack([60 - x2, y1, 60 - x1, y2], 1))
    assert 3 < flipped < 17
    with pytest.warns(UserWarning):
        assert len(data.detection_dataset("coco", str(tmp_path), "train", train=True, limit=2)) == 2


def test_bad_coco_files_are_named_in_one_line(tmp_path):
    def broken(word, **changes):
        (tmp_path / "annotations" / "bad.json").write_text(json.dumps(contents | changes))
        with pytest.raises(data.DataError) as error:
            data.detection_dataset("coco", None, "train", True, masks=True, json=str(tmp_path / "annotations" / "bad.json"),
                                   images=str(tmp_path / "train2017"))  # fmt: skip
        one_line(error, word)

    contents = write_coco(tmp_path)
    broken("images", images=[dict(id=1)])
    broken("bad.json", images="none")
    broken("bad.json", images=[])
    broken("categories", categories=[dict(id=9, name="x")])
    broken("no such image", images=contents["images"] + [dict(id=9, file_name="gone.jpg", width=9, height=9)])
    (tmp_path / "secret.jpg").write_bytes((tmp_path / "train2017" / "000000000000.jpg").read_bytes())
    broken("no such image", images=[dict(id=100, file_name="../secret.jpg", width=80, height=60)])
    broken("no such image", images=[dict(id=100, file_name=str(tmp_path / "secret.jpg"), width=80, height=60)])
    broken("object", annotations=[])
    first = contents["annotations"][0]
    broken(f"annotation {first['id']}", annotations=[first | dict(bbox=[1, 2, 3])])
    broken(f"annotation {first['id']}", annotations=[first | dict(bbox=[1, 2, float("nan"), 4])])
    for segmentation in ([], [[]], [[1, 2, 3, 4]], dict(size=[5, 5], counts=[25]), None):
        broken("--masks", annotations=[first | dict(segmentation=segmentation)])
    broken("same id", annotations=[first, first])
    broken("which it does not list", annotations=[first | dict(image_id=5)])
    broken("width", images=[contents["images"][0] | dict(width="wide")])
    (tmp_path / "annotations" / "bad.json").write_text("{")
    for json_file, images, word in (("bad.json", "train2017", "bad.json"), ("none.json", "train2017", "none.json"),
                                    ("instances_train2017.json", "nowhere", "nowhere")):  # fmt: skip
        with pytest.raises(data.DataError) as error:
            data.detection_dataset("coco", None, "train", True, json=str(tmp_path / "annotations" / json_file),
                                   images=str(tmp_path / images))  # fmt: skip
        one_line(error, word)
    Image.new("RGB", (31, 32)).save(tmp_path / "train2017" / "000000000001.jpg")
    with pytest.raises(data.DataError) as error:
        data.detection_dataset("coco", str(tmp_path), "train", True)[1]
    one_line(error, "000000000001.jpg")


def test_batches_share_an_aspect_ratio_and_an_epoch_has_an_image_once():
    generator = torch.Generator().manual_seed(0)
    wide = (torch.rand(103, generator=generator) < 0.7).tolist()
    ratios = [1.5 if w else 0.7 for w in wide]

    def epoch(number, rank=0, world=1):
        batches = data.GlobalBatches(103, ratios, 8, rank, world, seed=3)
        batches.seek(number)
        assert len(batches) == 12
        return [[index for e, index in batch if e == number] for batch in batches]

    first = epoch(0)
    assert len(first) == 12 and all(len(b) == 8 for b in first)
    seen = [i for b in first for i in b]
    assert len(set(seen)) == len(seen) == 96
    assert sum(len({wide[i] for i in b}) > 1 for b in first) <= 1
    assert [sorted(a + b) for a, b in zip(epoch(0, 0, 2), epoch(0, 1, 2))] == [sorted(b) for b in first]
    assert epoch(1) != first and {i for number in range(8) for b in epoch(number) for i in b} == set(range(103))


def as_found(target, score=1.0):
    """The truth of an image as a detector would give it."""
    found = dict(boxes=target["boxes"], labels=target["labels"], scores=torch.full((len(target["labels"]),), score))
    return found | ({"masks": target["masks"][:, None].float()} if "masks" in target else {})


def check_truth_has_full_score(dataset):
    results = [r for i in range(len(dataset)) for r in train_det.coco_results(dataset, i, as_found(dataset[i][1]))]
    for kind in ("bbox", "segm"):
        scores, table = train_det.average_precision(dataset, results, kind)
        assert scores["AP"] == scores["AP50"] == scores["AP75"] == pytest.approx(1.0) and "= 1.000" in table
    return results


def test_the_truth_as_detections_has_full_score(tmp_path):
    contents = write_coco(tmp_path)
    contents["annotations"] = [a for a in contents["annotations"] if a["bbox"][2]]  # without area nothing can be found
    for number, annotation in enumerate(contents["annotations"]):  # other tools count from 0 and leave things out
        annotation["id"] = number
        annotation["area"] = None
        if not annotation["iscrowd"]:
            del annotation["iscrowd"]
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(contents))
    check_truth_has_full_score(data.detection_dataset("coco", str(tmp_path), "train", train=False, masks=True))
    shapes = data.detection_dataset("shapes", None, "val", train=False, masks=True, n_val=12)
    check_truth_has_full_score(shapes)
    for i in range(12):  # against the scenes, by pycocotools' own decoder
        scene = shapes.scenes.scene(i)
        masks = [shapes.coco.annToMask(a) for a in shapes.coco.imgToAnns[i]]
        assert np.array_equal(np.array(masks, bool), scene.masks.numpy())


def test_real_coco_truth_has_full_score_and_detections_score_as_with_pycocotools_alone(tmp_path):
    root = HERE.parent / "shared" / "data" / "coco-mini"
    if not root.is_dir():
        pytest.skip("real COCO images are not here")
    dataset = data.detection_dataset("coco", str(root), "val", train=False, masks=True, limit=40)
    generator = torch.Generator().manual_seed(0)
    results = check_truth_has_full_score(dataset)
    for result in results:  # a detector's mistakes
        result["bbox"] = [v + 4 * torch.randn(1, generator=generator).item() for v in result["bbox"]]
        result["score"] = torch.rand(1, generator=generator).item()
    compare_with_pycocotools(dataset, str(root / "annotations" / "instances_val2017.json"), results, tmp_path)


def compare_with_pycocotools(dataset, annotations, results, folder):
    """pycocotools alone, from files, as its documentation shows it."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    for kind, other in (("bbox", "segmentation"), ("segm", "bbox")):
        alone = [{key: value for key, value in result.items() if key != other} for result in results]
        (folder / "results.json").write_text(json.dumps(alone))
        truth = COCO(annotations)
        official = COCOeval(truth, truth.loadRes(str(folder / "results.json")), kind)
        official.params.imgIds = dataset.image_ids
        official.evaluate(), official.accumulate(), official.summarize()
        scores, _ = train_det.average_precision(dataset, results, kind)
        assert list(scores.values()) == official.stats.tolist() and scores["AR 100"] >= 0


def test_scores_are_pycocotools(tmp_path):
    write_coco(tmp_path, sizes=((60, 80),) * 3 + ((64, 64),) * 12)
    dataset = data.detection_dataset("coco", str(tmp_path), "train", train=False, masks=True)
    rng, results = np.random.default_rng(0), []
    for i in range(len(dataset)):
        target = dict(dataset[i][1])
        target["boxes"] = target["boxes"] + torch.from_numpy(rng.normal(0, 2, target["boxes"].shape)).float()
        target["masks"] = target["masks"].roll(int(rng.integers(-2, 3)), 2)
        found = as_found(target)
        found["scores"] = torch.from_numpy(rng.random(len(target["labels"]))).float()
        results += train_det.coco_results(dataset, i, found)
    compare_with_pycocotools(dataset, str(tmp_path / "annotations" / "instances_train2017.json"), results, tmp_path)
    scores, _ = train_det.average_precision(dataset, [], "bbox")  # nothing found at all
    assert scores["AP"] == 0
    for result in results:  # the sizes of masks are the masks' own, whatever the boxes are
        result["bbox"] = [0.0, 0.0, 500.0, 500.0]
    compare_with_pycocotools(dataset, str(tmp_path / "annotations" / "instances_train2017.json"), results, tmp_path)


TINY_DETECTOR = ["--layers", "4", "--width", "4", "--pyramid", "16", "--short-sides", "64", "--long-side", "128", "--anchor", "8",
                 "--proposals", "40", "--rois", "16", "--batch", "4", "--warmup", "1", "--bn-batches", "2", "--kmeans-every", "3",
                 "--k", "2", "--log-every", "2", "--workers", "0", "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def detected(tmp_path_factory):
    """A folder with a COCO tree, 5 images in val, and a Mask R-CNN trained on two processes for a few steps."""
    folder = tmp_path_factory.mktemp("detection")
    write_coco(folder / "coco", "train", sizes=((60, 80),) * 3 + ((80, 60), (64, 64)) * 4)
    write_coco(folder / "coco", "val", seed=1)
    status, out, error = run(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, HERE / "train_det.py", *TINY_DETECTOR, "--masks",
        "--data", "coco", "--variant", "divdr-a", "--iters", 12, "--eval-every", 6, "--name", "pair", cwd=folder)  # fmt: skip
    assert status == 0, error
    return folder


def test_two_processes_train_a_detector(detected):
    folder = detected / "runs" / "pair"
    assert sorted(p.name for p in folder.iterdir()) == ["best.pt", "config.json", "last.pt", "log.jsonl", "previous.pt"]
    network, checkpoint = model.load_checkpoint(folder / "last.pt")
    assert (checkpoint["classes"], checkpoint["category_ids"], network.dim) == (["dark", "bright"], [3, 7], 3 * 14)
    assert checkpoint["bank"]["seen"].all() and len(checkpoint["bank"]["seen"]) == 9 and len(checkpoint["centers"]) == 2
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [e["iteration"] for e in events if e["event"] == "kmeans"] == [3, 6, 9, 12]
    assert all({"box", "mask"} <= e.keys() for e in events if e["event"] == "evaluation")
    last = [e for e in events if e["event"] == "train"][-1]
    terms = ("classifier", "box_reg", "mask", "objectness", "rpn_box_reg", "cost", "clustering")
    assert {f"loss_{term}" for term in terms} <= last.keys() and last["gflops_real"] > 0


def test_a_detector_is_evaluated_alike_by_one_and_by_two_processes(detected):
    """Five images, two processes: each counts once."""
    folder, found = detected / "runs" / "pair", []
    for launch in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]):
        status, out, error = run(
            *launch, HERE / "evaluate.py", "runs/pair/last.pt", "--workers", 0, "--device", "cpu", cwd=detected)
        assert status == 0, error
        metrics = json.loads((folder / "metrics.json").read_text())
        found.append((metrics, json.loads((folder / "detections.json").read_text())))
        assert metrics["images"] == 5 and sum(metrics["images_per_expert"]) == 5 and out.count("Average Precision") == 12
    (metrics, detections), (other, others) = found  # rounding may differ, and let one more weak box through
    for key in ("gflops", "images_per_expert", "inter"):
        assert metrics[key] == (pytest.approx(other[key]) if key == "inter" else other[key])
    for i in {d["image_id"] for d in detections} | {d["image_id"] for d in others}:
        mine, theirs = ([d for d in found if d["image_id"] == i] for found in (detections, others))
        assert abs(len(mine) - len(theirs)) <= 0.1 * len(mine)
        best, match = (max(found, key=lambda d: d["score"]) for found in (mine, theirs))
        assert best["score"] == pytest.approx(match["score"], abs=1e-4) and best["bbox"] == pytest.approx(match["bbox"], abs=0.1)
    assert list(metrics["gflops"]) == ["paper", "exact", "paper at 800x800"] and set(metrics["box"]) == set(metrics["mask"])
    assert metrics["gflops"]["paper"]["mean"] < metrics["gflops"]["paper at 800x800"]["mean"]
    assert {d["category_id"] for d in detections} <= {3, 7} and len(detections) == metrics["detections"]
    if detections:
        dataset = data.detection_dataset("coco", str(detected / "coco"), "val", train=False)
        scores, _ = train_det.average_precision(dataset, detections, "segm")
        assert metrics["mask"]["AP"] == pytest.approx(100 * scores["AP"])
    assert (folder / "experts.png").stat().st_size > 1000


def test_detections_are_drawn_on_pictures(detected):
    picture = detected / "coco" / "val2017" / "000000000001.jpg"
    status, out, error = run_here(evaluate.main, "runs/pair/last.pt", "--image", picture, "--min-score", 0.0, "--out", "drawn",
                             "--workers", 0, "--device", "cpu", cwd=detected)  # fmt: skip
    assert status == 0, error
    assert "expert" in out and "GFLOPs" in out
    drawn = np.array(Image.open(detected / "drawn" / "000000000001.jpg.png"))
    assert drawn.shape == (80, 60, 3) and (drawn != np.array(Image.open(picture))).any()
    contents = json.loads((detected / "coco/annotations/instances_val2017.json").read_text())
    for annotation in contents["annotations"]:
        del annotation["segmentation"]
    (detected / "boxes.json").write_text(json.dumps(contents))
    status, _, error = run_here(evaluate.main, "runs/pair/last.pt", "--json", "boxes.json", cwd=detected)
    assert status == 2 and "boxes.json" in error and "--masks" in error and "\n" not in error.strip()
    status, _, error = run_here(evaluate.main, "runs/pair/last.pt", "--predictions", "x", cwd=detected)
    assert status == 2 and "--predictions" in error and "\n" not in error.strip()


@pytest.mark.parametrize("flags", [
    ["--dataset", "shapes", "--size", "64", "--subsets", "2", "--masks"],
    ["--train-json", "coco/annotations/instances_train2017.json", "--train-images", "coco/train2017", "--activations", "recompute",
     "--val-json", "coco/annotations/instances_train2017.json", "--val-images", "coco/train2017", "--gate-space", "logit"],
])  # fmt: skip
def test_one_process_trains_a_detector_with(flags, detected, tmp_path, monkeypatch):
    os.symlink(detected / "coco", tmp_path / "coco")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_det.py", *TINY_DETECTOR, *flags, "--iters", "4", "--eval-every", "100", "--limit", "8",
                                      "--name", "one"])  # fmt: skip
    if "shapes" in flags:
        with pytest.raises(SystemExit) as stopped:  # ends as evaluate.py ends
            train_det.main()
        assert stopped.value.code == 0
        metrics = json.loads(Path("runs/one/metrics.json").read_text())
        assert sum(sum(row["experts"]) for row in metrics["subsets"]["subset"].values()) == 8
    else:
        train_det.main()
    _, checkpoint = model.load_checkpoint("runs/one/last.pt")
    assert len(checkpoint["bank"]["seen"]) == 8 and checkpoint["bank"]["seen"].sum() >= 4
    if "recompute" in flags:
        assert checkpoint["bank"]["seen"].all() and checkpoint["bank"]["values"].abs().max() > 1


def test_static_detector_starts_from_a_file_and_runs_through_the_same_loop(detected, tmp_path, monkeypatch, capsys):
    from torchvision.models import resnet50

    torch.manual_seed(0)
    resnet = resnet50(weights=None)
    torch.save(resnet.state_dict(), tmp_path / "resnet50.pth")
    monkeypatch.chdir(tmp_path)
    sizes = ["--short-sides", "64", "--long-side", "96", "--proposals", "40", "--rois", "16", "--anchor", "8"]
    sys_argv = ["train_det.py", *sizes, "--variant", "r50-fpn", "--data", str(detected / "coco"), "--init", "resnet50.pth", "--k", "2",
                "--batch", "2", "--iters", "1", "--bn-batches", "1", "--workers", "0", "--name", "static", "--device", "cpu"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", sys_argv)
    train_det.main()
    assert "265 tensors matched" in capsys.readouterr().out  # 53 convolutions, 53 norms of 4 numbers each
    network, checkpoint = model.load_checkpoint("runs/static/last.pt")
    body = network.pyramid.body.state_dict()
    assert torch.equal(body["layer1.0.conv1.weight"], resnet.layer1[0].conv1.weight)  # fixed, as torchvision trains it
    assert not torch.equal(body["layer3.0.conv1.weight"], resnet.layer3[0].conv1.weight)
    assert checkpoint["centers"] is None
    for file, word in (("runs/static/last.pt", "conv1.weight"), ("none.pth", "none.pth")):
        monkeypatch.setattr(sys, "argv", [*sys_argv, "--init", file, "--name", "other"])
        with pytest.raises(SystemExit) as stopped:
            train_det.main()
        error = capsys.readouterr().err.strip()
        assert stopped.value.code == 2 and word in error and "\n" not in error


@pytest.mark.parametrize("flags, word", [
    (["--data", "nowhere"], "nowhere"), (["--train-json", "a.json"], "--val-json"), (["--variant", "deeplabv3-r101"], "--variant"),
    (["--dataset", "shapes", "--init", "x.pth"], "x.pth"), (["--dataset", "shapes", "--variant", "r50-fpn", "--pyramid", "8"], "--pyramid"),
    (["--dataset", "shapes", "--rois", "0"], "--rois"),
    (["--dataset", "shapes", "--limit", "4"], "--batch"), (["--dataset", "shapes", "--long-side", "1"], "--long-side"),
    (["--dataset", "shapes", "--layers", "3"], "layers"),
    (["--dataset", "shapes", "--train-json", "a", "--train-images", "b", "--val-json", "c", "--val-images", "d"], "shapes"),
])  # fmt: skip
def test_detection_flags_that_cannot_work_end_in_one_line(flags, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_det.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        train_det.main()
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and word in error and "\n" not in error and not list(tmp_path.iterdir())


def test_detection_learning_rate_falls_at_its_steps():
    factor = train_det.learning_rate_factor(train_det.Config(lr_steps=(60_000, 80_000), warmup=1000))
    expected = {0: 0.001, 500: 0.001 + 0.999 / 2, 59_999: 1, 60_000: 0.1, 79_999: 0.1, 80_000: 0.01}
    assert {step: factor(step) for step in expected} == pytest.approx(expected)


# ============ mIoU ============


def test_miou_equals_cityscapesscripts_on_the_written_predictions(tmp_path, monkeypatch):
    """A Cityscapes tree, a network's predictions written through evaluate.py, and the official pixel-level evaluation."""
    from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official
    from cityscapesscripts.helpers.labels import labels

    rng = np.random.default_rng(5)
    ids = [label.id for label in labels if label.id >= 0]
    for city, n in (("aachen", 2), ("bonn", 1)):
        images, truths = (tmp_path / "cs" / kind / "val" / city for kind in ("leftImg8bit", "gtFine"))
        images.mkdir(parents=True), truths.mkdir(parents=True)
        for i in range(n):
            blocks = rng.choice(ids, (4, 8)).repeat(16, 0).repeat(16, 1).astype(np.uint8)
            Image.fromarray(rng.integers(0, 255, (64, 128, 3), np.uint8)).save(images / f"{city}_{i:06d}_000019_leftImg8bit.png")
            Image.fromarray(blocks).save(truths / f"{city}_{i:06d}_000019_gtFine_labelIds.png")

    info = data.segmentation_dataset("cityscapes", str(tmp_path / "cs"), "val", train=False).info
    arguments = dict(variant="dr-raw", task="segmentation", num_classes=19, layers=4, width=4)
    torch.manual_seed(0)
    network = model.build_model(**arguments)
    network.head.predictor.weight.data.mul_(50)  # many classes get predicted
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.fill_(0.1)
    (tmp_path / "run").mkdir()
    model.save_checkpoint(
        tmp_path / "run" / "last.pt", network, model_args=arguments, classes=list(info.classes), palette=[list(c) for c in info.palette],
        mean=list(data.MEAN), std=list(data.STD), task="segmentation", dataset="cityscapes", data=str(tmp_path / "cs"), data_options={}, config={"k": 2},
        iteration=1, centers=None)  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path / "run" / "last.pt"), "--predictions", str(tmp_path / "out"),
                                      "--workers", "0", "--device", "cpu"])  # fmt: skip
    evaluate.main()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())

    truths = sorted((tmp_path / "cs" / "gtFine").rglob("*labelIds.png"))
    predictions = sorted((tmp_path / "out").rglob("*.png"))
    assert len(predictions) == 3
    official.args.quiet, official.args.JSONOutput, official.args.evalInstLevelScore = True, False, False
    official.args.evalPixelAccuracy = False
    result = official.evaluateImgLists([str(p) for p in predictions], [str(t) for t in truths], official.args)
    assert len({v for v in metrics["iou"].values() if v}) > 3
    assert metrics["miou"] / 100 == pytest.approx(result["averageScoreClasses"], abs=1e-9)
    for name, value in metrics["iou"].items():
        theirs = result["classScores"][name]
        assert value is None if math.isnan(theirs) else value / 100 == pytest.approx(theirs, abs=1e-9)


# ============ tables and figures ============


def made_up_run(name, miou, seed=0, variant="divdr-a", images=6, k=3, **config):
    """What evaluate.py knows of a run after a split, without the run."""
    network = model.build_model(variant, "segmentation", 2, layers=4, width=8)
    grid = evaluate.grid_of(network)
    generator = torch.Generator().manual_seed(seed)
    exists = torch.cat([routing._exists(node) for node in network.backbone.all_nodes()[1:]])
    centers = torch.rand(k, 3 * len(grid), generator=generator) * exists
    A = (centers[torch.arange(images) % (k - 1)] + 0.01 * torch.rand(images, 3 * len(grid), generator=generator)) * exists  # the last: empty
    flops = {"paper": torch.arange(images) * 1_000_000 + seed * 10_000_000 + 50_000_000}
    metrics = {"dataset": "shapes", "split": "val", "images": images, "miou": miou, "gflops": {"paper": evaluate.spread(flops["paper"] / 1e9)}}
    metrics |= evaluate.describe_experts(A, flops["paper"], centers, kmeans.assign(A, centers)[0])
    config = {"seed": seed, "k": k, "margin": 5.0, "lambda2": model.VARIANTS[variant].lambda2, "iters": 10} | config
    checkpoint = {"path": Path(f"runs/{name}/last.pt"), "task": "segmentation", "iteration": 10, "config": config,
                  "model_args": {"variant": variant, "width": 8}}  # fmt: skip
    return evaluate.Evaluated(name, checkpoint, evaluate.Score(A, flops, (32, 32), {}, ""), metrics, grid, centers)


def test_runs_of_one_setting_are_one_row_with_mean_and_deviation():
    scores = {2: [61.0, 63.5, 60.0], 3: [64.0]}
    runs = [made_up_run(f"k{k}-{s}", score, s, k=k) for k in scores for s, score in enumerate(scores[k])]
    runs.append(made_up_run("dr", 58.25, variant="dr-a"))
    header, *rows = evaluate.make_table(runs, published=True)
    assert header == ["Method", "Backbone", "K", "mIoU", "GFLOPs", "Inter", "Intra", "Seeds"]
    dr, two, three, *paper = rows
    gflops = [run.result.flops["paper"].double().mean().item() / 1e9 for run in runs[:3]]
    inter = [torch.dist(*run.centers).item() for run in runs[:3]]
    assert two[:4] == ["DivDR-A", "Layer4, width 8", "2", f"{np.mean(scores[2]):.2f} ± {np.std(scores[2], ddof=1):.2f}"]
    assert two[4] == f"{np.mean(gflops):.4f} ± {np.std(gflops, ddof=1):.4f}"
    assert two[5] == f"{np.mean(inter):.2f} ± {np.std(inter, ddof=1):.2f}" and two[-1] == "3"
    assert (dr[0], dr[3], three[2], three[3], three[-1]) == ("DR-A", "58.25", "3", "64.00", "1")
    assert ["DivDR-A (paper, Table 1)", "Layer16", "–", "73.5 ± 0.4", "57.7 ± 3.9", "–", "–", "–"] in paper
    assert all(len(row) == len(header) for row in paper) and len(paper) == 11
    box = evaluate.published_rows("detection", masks=False)
    assert [row["box AP"] for row in box if (row["table"], row["Method"], row["K"]) == ("3", "DivDR-Raw", "4")] == ["38.1"]
    latex = evaluate.render([header, *rows], "latex").splitlines()
    assert latex[0] == r"\begin{tabular}{llrrrrrr}" and r"61.50 $\pm$ 1.80" in latex[5] and latex[5].endswith(r"\\")
    markdown = evaluate.render([header, *rows], "markdown").splitlines()
    assert set(markdown[1]) == set("|-: ") and markdown[1].count("--:") == 6 and len({len(line) for line in markdown}) == 1
    (label, along), = evaluate.find_sweep(runs, "k")
    assert [setting.runs[0].checkpoint["config"]["k"] for setting in along] == [2, 3] and label == "DivDR-A"
    assert not evaluate.find_sweep(runs, "margin")
    ax = evaluate.draw_ablations(runs, {"k": [(label, along)]}).axes[0]
    assert ax.lines[0].get_ydata().tolist() == [np.mean(scores[2]), 64.0]
    filled = [line for line in evaluate.draw_trade_off(runs, True).axes[0].lines if not line.get_label().startswith("_")]
    assert [line.get_markerfacecolor() == "white" for line in filled] == [False] * 3 + [True] * 7
    assert filled[1].get_xdata()[0] == pytest.approx(np.mean(gflops)) and filled[1].get_ydata()[0] == pytest.approx(np.mean(scores[2]))


def test_routes_are_as_wide_as_alpha_and_stand_where_the_nodes_are():
    run, reference = made_up_run("divdr", 60.0), made_up_run("dr", 58.0, seed=1, variant="dr-a")
    assert run.metrics["images_per_expert"] == [3, 3, 0]
    assert evaluate.average_router(run, [run, reference]) is reference
    run.centers[0, 4] = 0.0  # keep of the second node of the first layer is closed
    figure = evaluate.draw_routes(run, reference)
    left = figure.axes[::2]
    titles = [ax.get_title(loc="left") for ax in left]
    assert [title.split(":")[0] for title in titles] == ["expert 0", "expert 1", "expert 2", "all 6 images", "DR-A, all images"]
    assert "no image" in titles[2]
    for ax, values in zip(left, [*run.centers, run.result.A.mean(0), reference.result.A.mean(0)]):
        drawn = {}
        lines = next(c for c in ax.collections if c.get_label() == "more")
        for (start, end), width in zip(lines.get_segments(), lines.get_linewidths()):
            drawn[tuple(start), tuple(end)] = width
        expected = {}
        for n, (layer, scale, _) in enumerate(run.grid):
            for path, alpha in enumerate(values[3 * n : 3 * n + 3].tolist()):
                if alpha > 1e-4:
                    expected[(layer, scale), (layer + 1, scale + path - 1)] = 0.5 + 3.5 * alpha
        assert drawn == pytest.approx(expected)
        nodes = next(c for c in ax.collections if c.get_label() == "nodes")
        assert nodes.get_offsets().tolist() == [[layer, scale] for layer, scale, _ in run.grid]
    assert ((0, 1), (1, 1)) not in {tuple(map(tuple, s)) for s in left[0].collections[1].get_segments()}
    ours, theirs = (next(c for c in figure.axes[1].collections if c.get_label() == name) for name in ("more", "less"))
    difference = run.centers[0] - run.centers[1:].mean(0)
    assert (len(ours.get_segments()), len(theirs.get_segments())) == ((difference > 0.02).sum(), (difference < -0.02).sum())


def test_points_in_the_plane_are_the_images_and_the_centres(monkeypatch):
    run = made_up_run("one", 60.0, images=1)  # too few for t-SNE
    assert "PCA" in evaluate.draw_activation_space([run]).get_supxlabel()
    run = made_up_run("many", 60.0, images=24)
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)  # as where scikit-learn is not installed
    figure = evaluate.draw_activation_space([run, made_up_run("other", 60.0, seed=1, images=24)])
    assert "PCA" in figure.get_supxlabel() and len(figure.axes) == 3
    x = torch.cat([run.result.A, run.centers]).double()
    same, how = evaluate.embed(x)
    values, vectors = np.linalg.eigh(np.cov(x.numpy().T))
    by_hand = (x - x.mean(0)).numpy() @ vectors[:, [-1, -2]]
    np.testing.assert_allclose(np.abs(same.numpy()), np.abs(by_hand), atol=1e-9)
    assert f"{100 * values[-2:].sum() / values.sum():.0f} %" in how
    monkeypatch.setattr(evaluate, "EMBEDDED", 20)
    assert "20 of 48 images" in evaluate.draw_activation_space([run, run]).get_supxlabel()


def test_figures_come_from_what_is_kept_beside_the_checkpoint(trained, monkeypatch, capsys):
    folder, run_folder = trained
    passes, figures = [], {}
    original, save_figure = evaluate.evaluate_segmentation, evaluate.save_figure
    monkeypatch.setattr(evaluate, "evaluate_segmentation", lambda *args: passes.append(1) or original(*args))
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, folder, name: figures.update({name: figure}))
    monkeypatch.chdir(folder)

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments), "--workers", "0", "--device", "cpu"])
        evaluate.main()
        return len(passes)

    checkpoint, copy = Path("runs/pair/last.pt"), Path("runs/copy/last.pt")
    first = main(checkpoint) - 1  # alone: always anew
    assert first == 0 and main(checkpoint, "--figures", "drawn") == first + 1
    assert set(figures) == {"routes", "activations", "experts", "trade-off", "training", "predictions"}
    assert main(checkpoint, "--markdown", "--split", "train") == main(checkpoint, "--markdown", "--split", "train") == first + 2
    assert main(checkpoint, "--markdown") == first + 2
    assert main(checkpoint, "--markdown", "--mean", 0.5, 0.5, 0.5) == first + 3
    contents = torch.load(checkpoint, weights_only=True)
    copy.parent.mkdir()
    for name in ("last.val.activations", "log.jsonl"):
        shutil.copy(checkpoint.with_name(name), copy.with_name(name))
    torch.save(contents | {"iteration": 11}, copy)
    capsys.readouterr()
    assert main(checkpoint, copy) == first + 5  # what was kept is of another checkpoint, or of another --mean
    out, error = capsys.readouterr()
    assert "± 0.00" in out and out.rstrip().splitlines()[1].endswith("2") and "a seed comes twice" in error and "iteration 11 of 12" in error

    with torch.no_grad():  # the nearest images, by hand
        network, contents = model.load_checkpoint(checkpoint)
        dataset = data.segmentation_dataset("camvid", "camvid", "val", train=False)
        A = torch.cat([network(data.normalize(dataset[i][0][None])).A for i in range(12)])
    distances, labels = torch.cdist(A, contents["centers"]).min(1)
    axes = figures["experts"].axes
    for k in range(2):
        nearest = distances[labels == k].sort().values[:5]
        shown = [title.split()[-1] for ax in axes[5 * k : 5 * k + 5] if (title := ax.get_title())]
        assert [float(word) for word in shown] == pytest.approx(nearest.tolist(), abs=0.0051)
    ticks = [line for line in figures["training"].axes[0].lines if line.get_marker() == "|"]
    assert ticks[0].get_xdata().tolist() == [3, 6, 9, 12]
    truth = torch.from_numpy(np.array(figures["predictions"].axes[1].images[0].get_array()))
    assert (truth[:4] == 200).all() and truth.shape == (64, 96, 3)

    monkeypatch.setattr(evaluate, "save_figure", save_figure)
    main(checkpoint, "--image", "camvid/val/00.png", "--figures", "drawn")
    written = Path("drawn/route-00.png.pdf").read_bytes()
    assert b"/FontFile2" in written and b"/Type3" not in written and Path("drawn/route-00.png.png").stat().st_size > 1000
    copy.with_name("log.jsonl").write_text("{}\n{}\n")
    for arguments, word in ((["--figures", "drawn"], "log.jsonl"), ([checkpoint, "--image", "camvid/val"], "--image takes one")):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(copy, *arguments)
        assert stopped.value.code == 2 and word in capsys.readouterr().err.splitlines()[-1]


def test_figures_of_one_image_with_objects(detected, monkeypatch):
    figures = {}
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, folder, name: figures.update({name: figure}))
    monkeypatch.chdir(detected)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "runs/pair/last.pt", "--limit", "1", "--figures", "drawn", "--min-score", "0",
                                      "--workers", "0", "--device", "cpu"])  # fmt: skip
    evaluate.main()
    assert {"routes", "activations", "experts", "training", "predictions"} <= set(figures)
    image, truth, found = (np.array(ax.images[0].get_array()) for ax in figures["predictions"].axes)
    dataset = data.detection_dataset("coco", "coco", "val", train=False, masks=True)
    assert (image == dataset[0][0].permute(1, 2, 0).numpy()).all()
    inside = dataset[0][1]["masks"].bool().any(0).numpy()
    assert (truth != image).any(-1)[inside].mean() > 0.9 and truth.shape == found.shape == image.shape
