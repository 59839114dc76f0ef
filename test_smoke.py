"""The test suite: `python -m pytest -q test_smoke.py`, a few minutes on two cores.

In the order of the paper: routes, cost, losses, K-means, alternation, data, detection, evaluation, resuming.
Each part opens with its oracle: the same thing written out plainly, which the code has to equal.
"""

import contextlib
import copy
import csv
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
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn import functional as F
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
REAL = Path(os.environ.get("REAL_DATA", HERE.parent / "shared" / "data"))  # camvid/ and coco-mini/, where there are
os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors: more threads only wait for each other
torch.set_num_threads(1)
CPU = model.Process(0, 1, torch.device("cpu"))


def call(main, *arguments):
    """A script's `main` as a person runs it -> (exit status, stdout, stderr)."""
    out, error, status = io.StringIO(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        status = stopped.code
    return status, out.getvalue(), error.getvalue()


def succeeds(main, *arguments) -> str:
    status, out, error = call(main, *arguments)
    assert status == 0, error
    return out + error


def refuses(action, *words):
    """Checks that an action ends in one line that has these words, a command also with exit status 2."""
    with pytest.raises((ValueError, SystemExit)) as caught:
        with contextlib.redirect_stderr(io.StringIO()) as error:
            action()
    message = str(caught.value)
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 2
        message = error.getvalue().strip()
    assert "\n" not in message and all(str(word) in message for word in words), message


def events(folder, kind=None):
    """The log of a run, all but the speed."""
    found = []
    for line in (folder / "log.jsonl").read_text().splitlines():
        event = json.loads(line)
        event.pop("images_per_second", None)
        if kind in (None, event["event"]):
            found.append(event)
    return found


# ============ fixtures: data and runs that several tests look at ============


def write_camvid(root, count=12, size=(64, 96), splits=("train", "val")):
    """A CamVid tree in which class 3 is dark and class 5 bright; the top of the label map is void."""
    rng = np.random.default_rng(0)
    for split in splits:
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir(parents=True)
        for i in range(count):
            label = np.full(size, 3, np.uint8)
            label[:, rng.integers(20, 70) :] = 5
            image = np.where(label == 3, 40, 200)[..., None] + rng.integers(-20, 20, (*size, 3))
            label[:4] = 11
            Image.fromarray(image.astype(np.uint8)).save(root / split / f"{i:02d}.png")
            Image.fromarray(label).save(root / f"{split}annot" / f"{i:02d}.png")


def write_coco(root, split="train", sizes=((60, 80), (80, 60), (64, 64), (60, 80), (50, 90)), seed=0):
    """A COCO 2017 tree: bright boxes of category 7 and dark ones of category 3 on grey. Image 0 has a box without
    width, image 3 a crowd and nothing else, image 4 no annotation at all. Returns the parsed json."""
    rng = np.random.default_rng(seed)
    (root / f"{split}2017").mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []

    def annotate(i, category, box, segmentation, area, crowd=0):
        annotations.append(dict(
            id=len(annotations) + 1, image_id=100 + 7 * i, category_id=category, bbox=box, area=area, iscrowd=crowd,
            segmentation=segmentation))

    for i, (height, width) in enumerate(sizes):
        picture = np.full((height, width, 3), 120, np.uint8)
        images.append(dict(id=100 + 7 * i, file_name=f"{i:012d}.jpg", width=width, height=height))
        for _ in range(0 if i in (3, 4) else 3):
            x, y = int(rng.integers(0, width - 30)), int(rng.integers(0, height - 30))
            w, h = (int(side) for side in rng.integers(12, 30, 2))
            category = int(rng.choice([3, 7]))
            picture[y : y + h, x : x + w] = {3: 20, 7: 230}[category]
            annotate(i, category, [x, y, w, h], [[x, y, x + w, y, x + w, y + h, x, y + h]], w * h)
        if i == 0:
            annotate(i, 3, [5, 5, 0, 9], [[5, 5, 5, 14, 5, 9]], 0)
        if i == 3:
            counts = [width * 10, height * 5, (width - 5) * height - width * 10]
            annotate(i, 7, [8, 0, 9, height], dict(size=[height, width], counts=counts), height * 5, crowd=1)
        Image.fromarray(picture).save(root / f"{split}2017" / f"{i:012d}.jpg", quality=95)
    categories = [dict(id=7, name="bright"), dict(id=3, name="dark")]
    contents = dict(images=images, annotations=annotations, categories=categories)
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(contents))
    return contents


COMMON = ["--layers", 4, "--width", 4, "--batch", 4, "--warmup", 2, "--bn-batches", 2, "--kmeans-every", 3, "--k", 2,
          "--log-every", 2, "--workers", 0, "--device", "cpu"]  # fmt: skip
TINY_SEG = ["--dataset", "camvid", "--data", "camvid", "--crop", 64, "--short-sides", 64, 80, *COMMON]
TINY_DET = ["--data", "coco", "--pyramid", 16, "--short-sides", 64, "--long-side", 128, "--anchor", 8, "--proposals", 40,
            "--rois", 16, *COMMON]  # fmt: skip
QUIET = ["--workers", 0, "--device", "cpu"]


@pytest.fixture
def camvid(tmp_path, monkeypatch):
    """A working folder with a CamVid tree."""
    write_camvid(tmp_path / "camvid")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def coco(tmp_path, monkeypatch):
    """A working folder with a COCO tree of 11 training images, 5 in val."""
    write_coco(tmp_path / "coco", "train", sizes=((60, 80),) * 3 + ((80, 60), (64, 64)) * 4)
    write_coco(tmp_path / "coco", "val", seed=1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def spawn(work, *arguments):
    """Runs work(rank, *arguments) in two processes that know each other as torchrun's do."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(on_rank, (port, work, *arguments), nprocs=2)


def on_rank(rank, port, work, *arguments):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    work(rank, *arguments)


def train_and_evaluate_both(rank, folder):
    os.chdir(folder)
    flags = "--variant divdr-a --iters 12 --eval-every 6 --name".split()
    for main, command in [
        (train_seg.main, [*TINY_SEG, *flags, "seg"]), (train_det.main, [*TINY_DET, "--masks", *flags, "det"]),
        (evaluate.main, ["runs/det/last.pt", *QUIET]),
    ]:  # fmt: skip
        main([str(word) for word in command])
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)  # the old one may still be open


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with camvid/, coco/, and runs/seg and runs/det, trained on two processes; runs/det is evaluated."""
    folder = tmp_path_factory.mktemp("trained")
    write_camvid(folder / "camvid")
    write_coco(folder / "coco", "train", sizes=((60, 80),) * 3 + ((80, 60), (64, 64)) * 4)
    write_coco(folder / "coco", "val", seed=1)
    spawn(train_and_evaluate_both, folder)
    return folder


# ============ routes ============


def reference_routes(backbone, image, alphas):
    """One image through the rules of routing, node by node in plain Python: features, gates that ran, cells that
    ran. `alphas[row]` are (up, keep, down) of node `row`, the init node first."""
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
            exists = {"up": node.up is not None, "keep": True, "down": node.down is not None}
            alpha = {name: float(alphas[row, n]) * exists[name] for n, name in enumerate(exists)}
            if sum(alpha.values()) < 1e-4:
                following.setdefault(s, []).append(x)
                continue
            h = torch.relu(node.cell.body(x) + x)
            if max(alpha.values()) > 1e-4:
                cells.add(row)
            outputs = {"keep": lambda: h, "down": lambda: node.down(h[..., ::2, ::2])}
            outputs["up"] = lambda: F.interpolate(node.up(h), scale_factor=2, mode="bilinear", align_corners=False)
            for name, shift in {"up": -1, "keep": 0, "down": 1}.items():
                if exists[name]:
                    weight = alpha[name] * (alpha[name] > 1e-4)
                    following.setdefault(s + shift, []).append(weight * outputs[name]())
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


@torch.no_grad()
def let_gates_decide(network):
    """Gates whose decision depends on the image: about half the paths get closed."""
    for module in network.modules():
        if isinstance(module, routing.Gate):
            module.decide.weight.mul_(3)
            module.decide.bias.normal_()


def test_the_network_has_the_published_parameters_nodes_and_gates():
    network = model.build_model("dr-raw", "segmentation", 19)
    below, head = (sum(p.numel() for p in part.parameters()) for part in (network.backbone, network.head))
    assert (below, head, network.backbone.num_nodes, network.dim) == (17_596_853, 188_115, 61, 183)
    assert sum(node.gate.decide.out_channels for layer in network.backbone.layers for node in layer) == 147
    features, A, cost = routing.RoutedBackbone(16, 2, "small").eval()(torch.zeros(1, 3, 64, 96))
    assert A.shape == (1, 183) and cost.shape == (1,)
    assert [tuple(f.shape[1:]) for f in features] == [(2, 16, 24), (4, 8, 12), (8, 4, 6), (16, 2, 3)]
    assert routing.nodes_per_layer(16) == [2, 3] + [4] * 14
    assert sum(routing.nodes_per_layer(17, scales=5)) == 66 and routing.nodes_per_layer(17, scales=5)[-1] == 5
    assert sum(p.numel() for p in routing.RoutedBackbone(33).parameters()) == 38_683_551


def test_sizes_that_cannot_be_built_or_run_are_refused():
    for arguments in (dict(layers=2), dict(width=7), dict(gate="tiny"), dict(scales=6)):
        refuses(lambda: routing.RoutedBackbone(**{"width": 4, **arguments}))
    refuses(lambda: routing.RoutedBackbone(4, 4)(torch.zeros(1, 3, 48, 64)), "multiples of 32")


def test_A_lists_up_keep_down_of_existing_paths_and_gates_start_open():
    backbone = routing.RoutedBackbone(4, 4).eval()
    for module in backbone.modules():
        if isinstance(module, routing.Gate):
            torch.nn.init.zeros_(module.decide.weight)
    entries = backbone(torch.rand(2, 3, 64, 64))[1][0].view(-1, 3)
    initial = math.tanh(1.5)
    assert entries[0].tolist() == pytest.approx([0, initial, initial])  # scale 0: no up
    assert entries[4].tolist() == pytest.approx([initial] * 3)  # layer 1, scale 2 of 3: all
    assert entries[-1].tolist() == pytest.approx([0, initial, 0])  # last layer: keep only


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
    alphas[3] = 0.7
    alphas[4, 5] = 5e-5  # a node that is not closed (the sum) and has no open path
    skipped, routes = backbone.route(images, skip=True, alpha=alphas)
    masked, masked_routes = backbone.route(images, skip=False, alpha=alphas)
    assert torch.equal(routes.reached, masked_routes.reached) and torch.equal(routes.alpha, masked_routes.alpha)
    assert not routes.reached[2, 2] and (routes.alpha[2, 2] == 0).all()
    costs, real = backbone.costs(64, 128, "exact"), backbone.real_cost(routes, 64, 128, "exact")
    for i in range(len(images)):
        expected, gates, cells = reference_routes(backbone, images[i : i + 1], alphas[i])
        for s, (a, b) in enumerate(zip(skipped, masked)):
            want = expected[s][0] if s in expected else torch.zeros_like(a[i])
            torch.testing.assert_close(a[i], want, atol=1e-10, rtol=1e-10)
            torch.testing.assert_close(b[i], want, atol=1e-10, rtol=1e-10)
        assert set(routes.reached[i].nonzero().flatten().tolist()) == gates
        assert real["gates"][i] == sum(costs.gate[row] for row in gates)
        assert real["cells"][i] == sum(costs.cell[row] for row in cells)
    assert all((feature[0] == 0).all() for feature in skipped[1:])


@pytest.mark.parametrize("gate", ["full", "small"])
@torch.no_grad()
def test_an_image_takes_its_route_whatever_else_is_in_the_batch(gate, monkeypatch):
    backbone = warmed_backbone(gate=gate).double()
    let_gates_decide(backbone)
    images = torch.randn(5, 3, 64, 64).double() * torch.linspace(0.3, 3, 5)[:, None, None, None]
    together, routes = backbone.route(images)  # so small a batch runs masked
    monkeypatch.setattr(routing, "LARGE", 1)
    one_by_one, same = backbone.route(images)
    assert 0.1 < (routes.A > 0).float().mean() < 0.75 and (routes.A.std(0) > 0).any()  # routes differ
    torch.testing.assert_close(same.A, routes.A, atol=1e-10, rtol=0)
    for i in range(len(images)):
        alone, route = backbone.route(images[i : i + 1])
        torch.testing.assert_close(route.A[0], routes.A[i], atol=1e-10, rtol=0)
        for a, b, c in zip(alone, together, one_by_one):
            torch.testing.assert_close(a[0], b[i], atol=1e-10, rtol=1e-10)
            torch.testing.assert_close(a[0], c[i], atol=1e-10, rtol=1e-10)


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
    skipped, masked = network.eval()(images, skip=True), network(images, skip=False)
    assert 0.1 < (skipped.A > 0).float().mean() < 0.75
    exact = copy.deepcopy(network).double()(images.double())  # sixteen layers of gates magnify rounding: so far
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


def test_the_gradient_of_a_path_weight_says_what_more_of_the_path_would_do():
    """Against differences of the loss when the alphas themselves are moved, closed paths among them."""
    backbone = warmed_backbone(layers=5, gate="small").double()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()
    alphas = torch.full((2, 1 + backbone.num_nodes, 3), 0.7).double()
    alphas[0, 4, routing.KEEP] = alphas[1, 7, routing.UP] = 0  # closed paths of open nodes
    alphas[1, 1] = 0  # a closed node
    alphas.requires_grad_()

    def loss(alphas):
        features, routes = backbone.route(images, skip=False, alpha=alphas)
        return sum((feature * feature).sum() for feature in features), routes

    total, routes = loss(alphas)
    metric = train_seg.TaskMetric(3 * backbone.num_nodes, torch.device("cpu"))
    metric.watch(routes)
    total.backward()
    gradient = torch.cat([weights.grad for weights in routes.weights], 1)
    for place in [(0, 0, routing.DOWN), (0, 4, routing.KEEP), (1, 7, routing.UP), (1, 9, routing.KEEP)]:
        moved = [alphas.detach().clone() for _ in range(2)]
        moved[0][place] += 2e-4  # at least OPEN, from 0 on
        moved[1][place] += 4e-4
        at = [loss(a)[0].item() for a in (alphas, *moved)]
        slope = (4 * at[1] - 3 * at[0] - at[2]) / 4e-4  # second order
        assert gradient[place].item() == pytest.approx(slope, rel=1e-4)
    assert gradient[0, 1, routing.UP] == 0  # a path that does not exist
    metric.update(routes, momentum=0.0)
    torch.testing.assert_close(metric.squares, gradient[:, 1:].flatten(1).square().mean(0).float())


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
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


def test_a_compiled_network_trains_as_the_network_does(monkeypatch):
    """Through the compiler's front end alone: its code generation takes minutes."""
    images, steps = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)), {}
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for compiled in (False, True):
        torch.manual_seed(0)
        network = model.build_model("divdr-a", "segmentation", 5, layers=3, width=2).train()
        out = train_seg.distribute(network, CPU, compiled)(images)
        (out.logits.square().mean() + out.cost.mean() / 1e9).backward()
        steps[compiled] = (out.logits, out.A, *(p.grad for p in network.parameters() if p.grad is not None))
    torch.testing.assert_close(steps[True], steps[False])


# ============ cost ============


def published_count(nodes, C, height, width, classes, small):
    """The published accounting once more, loop by loop, in multiply-adds."""

    def conv(c_in, c_out, h, w, k=1, groups=1):
        return k * k * c_in // groups * c_out * h * w

    def norm_relu(c, h, w):
        return 3 * c * h * w

    H, W = height // 2, width // 2
    total = conv(3, C, H, W, 3) + norm_relu(C, H, W)
    total += conv(C, C, H, W, 3, C) + conv(C, C, H, W) + norm_relu(C, H, W)
    H, W = H // 2, W // 2
    total += conv(C, C, H, W, 3, C) + conv(C, C, H, W) + norm_relu(C, H, W)
    total += C * H * W  # the init node's keep: one ReLU
    total += C * H * W + conv(C, 2 * C, H // 2, W // 2) + norm_relu(2 * C, H // 2, W // 2)  # and its down
    for layer, count in enumerate(nodes):
        last = layer + 1 == len(nodes)
        for s in range(count):
            c, h, w = C * 2**s, H // 2**s, W // 2**s
            up, down = s > 0 and not last, not last and s + 1 < nodes[layer + 1]
            total += 2 * conv(c, c, h, w, 3, c) + 2 * conv(c, c, h, w) + 5 * c * h * w
            total += 0 if last else c * h * w
            total += up * (c * h * w + conv(c, c // 2, h, w) + norm_relu(c // 2, h, w))
            total += down * (c * h * w + conv(c, 2 * c, h // 2, w // 2) + norm_relu(2 * c, h // 2, w // 2))
            gate_h, gate_w = (h // 4, w // 4) if small else (h, w)
            total += conv(c, c // 2, gate_h, gate_w) + 4 * (c // 2) * gate_h * gate_w + c // 2 * (1 + up + down)
    if classes:
        total += conv(C, classes, H, H, 3)
        for s in range(4):
            c, h, out = C * 2**s, H // 2**s, C * 2 ** max(s - 1, 0)
            total += conv(c, out, h, h) + norm_relu(out, h, h)
    return total


@pytest.mark.parametrize("layers, scales, classes, height, width, full, small", [
    (16, 4, 19, 1024, 2048, 118.085, 102.270), (16, 4, 19, 768, 768, 33.607, 29.159),
    (33, 4, 19, 1024, 2048, 244.622, None), (17, 5, None, 800, 800, 38.336, 33.110)])  # fmt: skip
def test_everything_open_costs_what_is_published(layers, scales, classes, height, width, full, small):
    for gate, published in (("full", full), ("small", small)):
        ours = flops.open_cost(layers, scales, classes, height, width, gate, "paper")
        nodes = routing.nodes_per_layer(layers, scales)
        assert ours == published_count(nodes, 64, height, width, classes, gate == "small")
        if published is not None:
            assert round(ours / 1e9, 3) == published


def test_the_parts_and_the_budget_cost_what_is_published():
    network = model.build_model("dr-raw", "segmentation", 19)
    parts = network.real_cost(network.backbone.open_routes(), 1024, 2048)
    millions = {part: round(cost.item() / 1e6, 3) for part, cost in parts.items()}
    assert millions == dict(stem=4194.304, cells=71189.922, paths=24425.005, gates=16869.507, head=1406.403)
    small = model.build_model("dr-a", "segmentation", 19).backbone
    assert round(small.real_cost(small.open_routes(), 1024, 2048)["gates"].item() / 1e6, 3) == 1054.360
    assert round(network.head.cost(1024, 2048, "exact") / 1e6, 3) == 2812.805
    assert round(network.budgeted_cost(768, 768) / 1e6, 1) == 26891.7


@pytest.mark.parametrize("gate", ["full", "small"])
@torch.no_grad()
def test_exact_convolutions_equal_torchs_flop_counter(gate):
    torch.manual_seed(2)
    network = model.RoutedSegmenter(5, layers=5, width=8, gate=gate).eval()
    alphas = random_alphas(8, network.backbone.num_nodes, torch.Generator().manual_seed(3))
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
    alphas = (random_alphas(4, backbone.num_nodes, torch.Generator().manual_seed(4)) > 0).float()
    alphas[0] = 1
    _, routes = backbone.route(torch.randn(4, 3, 64, 96), alpha=alphas)
    real, expected = backbone.real_cost(routes, 64, 96), backbone.expected_cost(routes, 64, 96)
    torch.testing.assert_close(expected.double(), (real["cells"] + real["paths"]).double(), rtol=1e-6, atol=0)
    assert expected[0].item() == pytest.approx(backbone.costs(64, 96).budgeted, rel=1e-6)


@torch.no_grad()
def test_a_static_network_counts_what_runs():
    network = model.build_model("deeplabv3-r101", "segmentation", 3)
    with FlopCounterMode(display=False) as counter:
        out = network.eval()(torch.zeros(1, 3, 64, 96))
    assert out.logits.shape == (1, 3, 64, 96) and out.A.shape == (1, 0)
    assert network.real_cost(None, 64, 96, "conv")["network"].item() * 2 == counter.get_total_flops()
    small = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.AdaptiveAvgPool2d(1))
    convolution, elements = 27 * 4 * 64, 4 * 64  # 10x10 -> 8x8 -> 4x4
    counted = model.count_multiply_adds(small.eval(), torch.zeros(1, 3, 10, 10))
    assert counted == convolution + 3 * elements + 64 + 64


def test_the_commands_of_flops_print_what_they_measured():
    table = succeeds(flops.main)
    assert all(number in table for number in ("118.085", "102.270", "244.622", "38.336", "88.381"))
    assert "the budget is a share" in succeeds(flops.main, "--variant", "divdr-a", "--size", 64, 64, "--layers", 4)
    out = succeeds(flops.main, "kmeans", "--n", 400, "--dim", 8, "--k", 2, 3, "--iters", 5, "--runs", 2)
    assert out.count("kmeans.py") == 4 and "noise, K = 3" in out
    small = ["--size", 64, 64, "--layers", 4, "--width", 4, "--runs", 1, "--device", "cpu"]
    out = succeeds(flops.main, "speed", *small, "--batch", 1, 2, "--openness", 0.5)
    differences = [float(word) for word in re.findall(r"difference (\S+)\n", out)]
    assert len(differences) == 6 and max(differences) < 1e-4
    assert "bfloat16" in succeeds(flops.main, "--speed", *small, "--batch", 2, "--train", "--amp")


@pytest.mark.parametrize("flags, words", [
    (["kmeans", "--n", 3, "--k", 4], ["--n"]), (["kmeans", "--device", "nowhere"], ["--device", "nowhere"]),
    (["--size", 64, 64], ["--size", "--variant"]), (["speed", "--amp"], ["--amp", "--train"]),
    (["speed", "--train", "--batch", 1, "--size", 64, 64], ["--batch", "--size"]),
    (["speed", "--openness", 1.5], ["--openness"]), (["speed", "--variant", "r50-fpn"], ["r50-fpn"]),
    (["speed", "--openness", 0.05, "--size", 64, 64, "--batch", 1, "--layers", 4], ["--openness", "stem"])])  # fmt: skip
def test_what_cannot_be_measured_is_said_in_one_line(flags, words):
    refuses(lambda: flops.main([str(flag) for flag in flags]), *words)


# ============ losses ============


def clustering_loss_by_hand(A, centers, sigma2, margin, own=None):
    """Equation (2) in plain Python."""
    terms = []
    for b, a in enumerate(A.tolist()):
        d = [math.sqrt(sum((p - q) ** 2 for p, q in zip(a, mu))) for mu in centers.tolist()]
        k = d.index(min(d)) if own is None or own[b] < 0 else own[b]
        others = math.log(sum(math.exp(-d[j] / (2 * sigma2)) for j in range(len(d)) if j != k))
        terms.append(max(0.0, margin + d[k] / (2 * sigma2) + others))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("B, K, D, sigma2, margin", [
    (5, 2, 3, 0.4, 1.0), (7, 4, 20, 0.7, 5.0), (1, 3, 1, 0.2, 0.0), (6, 8, 183, 2.0, 1.0)])  # fmt: skip
def test_the_clustering_loss_is_equation_2(B, K, D, sigma2, margin):
    g = torch.Generator().manual_seed(B * K)
    A, centers = torch.rand(B, D, generator=g).double(), torch.rand(K, D, generator=g).double()
    want = clustering_loss_by_hand(A, centers, sigma2, margin)
    assert losses.clustering_loss(A, centers, sigma2, margin).item() == pytest.approx(want, rel=1e-12, abs=1e-14)
    tensor = losses.clustering_loss(A, centers, torch.tensor(sigma2), margin)
    assert tensor.item() == pytest.approx(want, rel=1e-6, abs=1e-9)
    single = losses.clustering_loss(A.float(), centers.float(), sigma2, margin)
    assert single.item() == pytest.approx(want, rel=1e-5, abs=1e-6)
    own = torch.randint(-1, K, (B,), generator=g)  # -1: the nearest
    want = clustering_loss_by_hand(A, centers, sigma2, margin, own.tolist())
    assert losses.clustering_loss(A, centers, sigma2, margin, own).item() == pytest.approx(want, rel=1e-12)


def test_the_gradient_of_the_clustering_loss_is_right_on_centres_too():
    g = torch.Generator().manual_seed(0)
    centers = torch.rand(4, 6, generator=g).double()
    A = torch.rand(5, 6, generator=g).double()
    A[1] = centers[2]  # exactly on a centre
    A.requires_grad_()
    assert torch.autograd.gradcheck(lambda a: losses.clustering_loss(a, centers, 0.5, 5.0), (A,))
    centers[3] = centers[0]  # two centres at one place
    own = torch.tensor([0, 3, 1, 2, 0])
    assert torch.autograd.gradcheck(lambda a: losses.clustering_loss(a, centers, 0.5, 5.0), (A,))
    assert torch.autograd.gradcheck(lambda a: losses.clustering_loss(a, centers, 0.5, 9.0, own), (A,))
    on_both = centers[:1].clone().requires_grad_()  # on two coinciding centres at once
    losses.clustering_loss(on_both, centers, 0.5, 5.0).backward()
    assert on_both.grad.isfinite().all()


def test_the_clustering_loss_refuses_what_does_not_fit():
    A, centers = torch.rand(3, 4), torch.rand(3, 4)
    refuses(lambda: losses.clustering_loss(A, centers[:1], 0.5, 1.0), "K >= 2")
    for arguments in ((A[0], centers, 0.5, 1.0), (A[:0], centers, 0.5, 1.0), (A[:, :3], centers, 0.5, 1.0),
                      (A, centers, 0.5, -1.0), (A, centers, 0.5, 1.0, torch.zeros(2, dtype=torch.long))):  # fmt: skip
        refuses(lambda: losses.clustering_loss(*arguments))


def test_sigma2_has_a_floor_and_extremes_stay_finite():
    A, centers = torch.rand(3, 4), torch.rand(3, 4)
    at_floor = losses.clustering_loss(A, centers, losses.SIGMA2_FLOOR, 1.0)
    assert torch.equal(losses.clustering_loss(A, centers, 0.0, 1.0), at_floor)
    assert torch.allclose(losses.clustering_loss(A, centers, torch.tensor(0.0), 1.0), at_floor)
    want = losses.clustering_loss(A, centers, 0.3, 1.0)
    assert torch.equal(losses.clustering_loss(A, centers, 0.0, 1.0, sigma2_floor=0.3), want)
    # 1 / (2 sigma2) = 5e11: exp(-distance / ...) is 0 for every other centre, its logarithm is not.
    A.requires_grad_()
    loss = losses.clustering_loss(A, centers, 1e-12, 1.0, torch.tensor([0, 1, 2]), sigma2_floor=0.0)
    loss.backward()
    assert loss.isfinite() and A.grad.isfinite().all()


def test_the_clustering_loss_is_float32_under_autocast_and_its_centres_are_constants():
    A, centers = torch.rand(3, 4).bfloat16(), torch.rand(3, 4)
    mu, sigma2 = centers.clone().requires_grad_(), torch.tensor(0.5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = losses.clustering_loss(A.clone().requires_grad_(), mu, sigma2, 1.0)
    assert half.dtype == torch.float32 and torch.equal(half, losses.clustering_loss(A.float(), centers, 0.5, 1.0))
    half.backward()
    assert mu.grad is None and sigma2.grad is None
    middle, pair = torch.zeros(1, 2), torch.tensor([[1.0, 0.0], [-1.0, 0.0], [3.0, 0.0]])
    first = losses.clustering_loss(middle, pair, 0.5, 1.0, torch.tensor([0]))  # a tie goes to the first centre
    assert torch.equal(losses.clustering_loss(middle, pair, 0.5, 1.0), first)


def test_the_cost_loss_and_its_ramp():
    cost = torch.tensor([2.0, 5.0, 11.0], dtype=torch.float64, requires_grad=True)
    loss = losses.cost_loss(cost, 20.0, 0.1)
    assert loss.item() == pytest.approx((6 / 20 - 0.1) ** 2)
    loss.backward()
    torch.testing.assert_close(cost.grad, torch.full((3,), 2 * (6 / 20 - 0.1) / (20 * 3)).double())
    half = losses.cost_loss(torch.full((2,), 5e4).half(), 1e5, 0.2)  # 5e4 + 5e4 is inf in half precision
    assert half.item() == pytest.approx(0.09, rel=2e-3)
    for arguments in ((cost, 1.0, 1.5), (cost.mean(), 1.0, 0.5), (cost[:0], 1.0, 0.5)):
        refuses(lambda: losses.cost_loss(*arguments))
    values = [losses.budget_ramp(p) for p in (0.0, 0.39, 0.4, 0.41, 0.42, 0.43, 1.0)]
    assert values == pytest.approx([0, 0, 0, 0.5, 1, 1, 1])
    assert losses.budget_ramp(0.25, start=0.0, length=0.5) == 0.5
    assert [losses.budget_ramp(p, 0.4, 0.0) for p in (0.39, 0.4)] == [0, 1]


# ============ K-means ============


def lloyd_by_hand(x, centers, max_iter=100):
    """Lloyd's algorithm in numpy, float64, for starts that leave no cluster empty."""
    x, centers, labels = x.astype(np.float64), centers.astype(np.float64), None
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
    places = torch.rand(k, d, generator=g)[torch.randint(k, (n,), generator=g)]
    return places + spread * torch.randn(n, d, generator=g)


@pytest.mark.parametrize("n, d, k, offset", [
    (50, 2, 3, 0), (300, 183, 5, 0), (5000, 20, 8, 0), (30, 1, 2, 0), (400, 7, 4, 100)])  # fmt: skip
@pytest.mark.parametrize("max_iter", [1, 3, 100])
def test_kmeans_is_lloyds(n, d, k, offset, max_iter):
    x = blobs(n, d, k, seed=n) + offset
    init = x[torch.linspace(0, n - 1, k).long()]
    want_centers, want_labels, want_inertia = lloyd_by_hand(x.numpy(), init.numpy(), max_iter)
    for kind, near in ((torch.float32, 2e-6), (torch.float64, 1e-11)):
        centers, labels, inertia = kmeans.kmeans(x.to(kind), k, init.to(kind), max_iter)
        assert centers.dtype == kind and labels.dtype == torch.int64 and isinstance(inertia, float)
        np.testing.assert_allclose(centers.numpy(), want_centers, rtol=near, atol=near)
        np.testing.assert_array_equal(labels.numpy(), want_labels)
        assert inertia == pytest.approx(want_inertia, rel=(2e-4 if offset else 1e-5) if near > 1e-9 else 1e-10)


def test_kmeans_of_far_outliers_keeps_their_digits():
    """Their cluster begins with nearly all samples, whose sum is far larger than theirs."""
    x = torch.rand(118_287, 4, generator=torch.Generator().manual_seed(0))
    x[-3:] += 3e4
    x = x + 1000
    centers, labels, _ = kmeans.kmeans(x, 2, init=torch.tensor([1000.3, 1000.0])[:, None].expand(2, 4))
    assert labels.bincount().tolist() == [3, 118_284]
    for j in range(2):
        np.testing.assert_allclose(centers[j].numpy(), x[labels == j].double().mean(0).numpy(), rtol=1e-6)


def test_kmeans_plus_plus_starts_on_samples_and_depends_on_the_seed_alone():
    x = blobs(600, 10, 4, spread=0.02)
    first, again = kmeans.kmeans(x, 4, seed=3), kmeans.kmeans(x, 4, seed=3)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]) and first[2] == again[2]
    best = lloyd_by_hand(x.numpy(), torch.stack([x[first[1] == j].mean(0) for j in range(4)]).numpy())[2]
    for seed in range(10):  # four clear clouds: greedy K-means++ finds them from any seed
        assert kmeans.kmeans(x, 4, seed=seed)[2] == pytest.approx(best, rel=1e-4)
    drawn = torch.stack([kmeans._plus_plus(x, 4, seed) for seed in range(3)])
    assert (drawn[:, :, None] == x).all(-1).any(-1).all() and not torch.equal(drawn[0], drawn[1])
    warm = kmeans.kmeans(x, 4, init=first[0], max_iter=1)  # converged: nothing moves
    torch.testing.assert_close(warm[0], first[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kmeans.kmeans(x, 4, seed=3)[0], first[0])
    assert kmeans.kmeans(x.half(), 4)[0].dtype == torch.float32


def test_kmeans_of_few_samples_and_of_none_that_can_be_clustered():
    x = blobs(100, 5, 3)
    centers, labels, inertia = kmeans.kmeans(x, 1)
    torch.testing.assert_close(centers[0], x.mean(0))
    assert (labels == 0).all() and inertia == pytest.approx(((x - x.mean(0)) ** 2).sum().item(), rel=1e-5)
    centers, labels, inertia = kmeans.kmeans(x[:3], 3)  # each sample its own cluster
    assert inertia == 0 and sorted(labels.tolist()) == [0, 1, 2] and torch.equal(centers[labels], x[:3])
    for arguments in ((x[:2], 3), (x[:0], 1), (x, 0), (x, 2, x[:3]), (x[0], 1), (x.long(), 2),
                      (x, 2, torch.full((2, 5), torch.nan)), (x, 2, None, 0)):  # fmt: skip
        refuses(lambda: kmeans.kmeans(*arguments))
    for value in (torch.nan, torch.inf, -torch.inf):
        y = x.clone()
        y[7, 2] = value
        refuses(lambda: kmeans.kmeans(y, 2), "NaN or inf")


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
        assert (centers[:, None] - places).norm(dim=2).min(1).values.max() < 1e-6
        assert (sizes > 0).sum() == distinct and sizes.sum() == len(x)


def inter_intra_by_hand(A, labels, centers):
    def mean(points):
        pairs = [math.dist(p, q) for i, p in enumerate(points) for q in points[:i]]
        return sum(pairs) / len(pairs)

    clusters = [[a for a, label in zip(A.tolist(), labels.tolist()) if label == j] for j in range(len(centers))]
    intra = [mean(points) for points in clusters if len(points) > 1]
    return mean(centers.tolist()), sum(intra) / len(intra)


def test_inter_and_intra_are_mean_distances_over_pairs():
    A, centers = torch.rand(90, 5), torch.rand(5, 5)
    labels = torch.randint(3, (90,))
    labels[0] = 3  # one sample: no pair; cluster 4 is empty
    assert kmeans.inter_intra(A, labels, centers) == pytest.approx(inter_intra_by_hand(A, labels, centers), rel=1e-5)
    zeros = torch.zeros(90, dtype=torch.long)
    some = kmeans.inter_intra(A, zeros, centers[:1], max_samples=4)
    spaced = torch.pdist(A[[0, 22, 45, 67]]).mean().item()  # floor(i · 90 / 4)
    assert some == (0.0, pytest.approx(spaced, rel=1e-5))
    assert kmeans.inter_intra(A[:3], torch.arange(3), centers)[1] == 0.0
    big = torch.rand(6000, 3)  # more than one block
    got = kmeans.inter_intra(big, torch.zeros(6000, dtype=torch.long), centers[:, :3])[1]
    assert got == pytest.approx(torch.pdist(big.double()).mean().item(), rel=1e-5)


def test_assign_and_collapse():
    x, centers = torch.rand(50, 6), torch.rand(3, 6)
    labels, distances = kmeans.assign(x, centers)
    all_distances = (x[:, None] - centers).norm(dim=2)
    assert torch.equal(labels, all_distances.argmin(1))
    torch.testing.assert_close(distances, all_distances.min(1).values)
    labels, distances = kmeans.assign(centers[[2, 0]], torch.cat([centers, centers]))  # ties: the first
    assert labels.tolist() == [2, 0] and distances.tolist() == [0, 0]
    assert kmeans.describe_collapse([5, 7], 0.6, 0.2) is None and kmeans.describe_collapse([5, 7], 1.5, 1.5) is None
    assert "no sample" in kmeans.describe_collapse([5, 0, 7], 0.6, 0.2)
    assert "one architecture" in kmeans.describe_collapse([5, 7], 1e-4, 0.0)
    assert "one architecture" in kmeans.describe_collapse([5, 7], 0.05, 1.0)
    assert kmeans.describe_collapse([12], 0.0, 0.2) is None  # K = 1 has no pair of centres


def test_agreement_with_known_subsets():
    truth = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    assert kmeans.agreement((truth + 1) % 3, truth)[:2] == (1.0, 1.0)
    labels = torch.tensor([1, 1, 0, 0, 0, 0, 2, 2, 1])
    accuracy, rand, table, match = kmeans.agreement(labels, truth)
    assert accuracy == pytest.approx(7 / 9) and match == [1, 0, 2]
    assert table.tolist() == [[1, 2, 0], [3, 0, 0], [0, 1, 2]]

    def together(x):  # Hubert and Arabie's index from its definition: pairs in one part, against chance
        return {(i, j) for i in range(9) for j in range(i) if x[i] == x[j]}

    a, b = together(labels.tolist()), together(truth.tolist())
    expected = len(a) * len(b) / 36
    assert rand == pytest.approx((len(a & b) - expected) / ((len(a) + len(b)) / 2 - expected))
    accuracy, _, table, _ = kmeans.agreement(torch.arange(9) + 1, truth)  # more clusters than subsets
    assert accuracy == pytest.approx(3 / 9) and table.shape == (3, 10)
    accuracy, rand, _, match = kmeans.agreement(torch.zeros(9, dtype=torch.long), truth)  # one expert took all
    assert (accuracy, rand, match.count(-1)) == (pytest.approx(1 / 3), 0.0, 2)


# ============ the bank ============


def test_the_bank_keeps_the_latest_and_clusters_what_was_seen():
    bank = kmeans.ActivationBank(6, 3)
    A = torch.rand(6, 3, requires_grad=True)
    bank.update(torch.tensor([4, 1]), A[[4, 1]])
    bank.update(torch.tensor([1, 2, 5]), A[[0, 2, 5]])
    assert bank.count == 4 and bank.seen.tolist() == [False, True, True, False, True, True]
    values = bank.values[[1, 2, 4, 5]]
    assert torch.equal(values, A.detach()[[0, 2, 4, 5]]) and not values.requires_grad  # the latest of sample 1
    clusters = bank.cluster(2, seed=1)
    centers, labels, inertia = kmeans.kmeans(values, 2, seed=1)
    assert torch.equal(clusters.centers, centers) and clusters.sizes == torch.bincount(labels, minlength=2).tolist()
    assert clusters.sigma2 == inertia / 3 and clusters.labels[[1, 2, 4, 5]].tolist() == labels.tolist()
    assert clusters.labels[[0, 3]].tolist() == [-1, -1]  # not seen: of no cluster
    torch.testing.assert_close(bank.cluster(2, max_iter=1).centers, centers)  # starts where it was
    refuses(lambda: bank.cluster(5), "at least 5")
    refuses(lambda: bank.update(torch.tensor([1]), A[:2]))

    other = kmeans.ActivationBank(6, 3)
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.values, bank.values) and torch.equal(other.seen, bank.seen)
    assert torch.equal(other.clusters.labels, bank.clusters.labels) and other.clusters.sizes == bank.clusters.sizes
    refuses(lambda: kmeans.ActivationBank(7, 3).load_state_dict(bank.state_dict()))


def test_restarts_leave_a_bad_start():
    x = torch.cat([blobs(60, 5, 1, seed=s) + 10 * s for s in (1, 2, 3)])
    stuck = torch.stack([x[:120].mean(0), x[120:150].mean(0), x[150:].mean(0)])  # one centre for two blobs
    for restarts, sizes in ((0, [30, 30, 120]), (4, [60, 60, 60])):
        bank = kmeans.ActivationBank(180, 5)
        bank.update(torch.arange(180), x)
        bank.clusters = kmeans.Clusters(stuck, torch.zeros(180), 1.0, [])
        assert sorted(bank.cluster(3, restarts=restarts).sizes)[-1] == sizes[-1]


def test_the_bank_keeps_running_means_over_views():
    bank = kmeans.ActivationBank(3, 2, momentum=0.75)
    views = torch.rand(4, 2)
    for view in views:
        bank.update(torch.tensor([1]), view[None])
    expected = views[0]  # the first view counts in full
    for view in views[1:]:
        expected = 0.75 * expected + 0.25 * view
    torch.testing.assert_close(bank.values[1], expected)
    assert bank.values[0].tolist() == [0, 0] and bank.count == 1
    refuses(lambda: kmeans.ActivationBank(3, 2, momentum=1.0), "momentum")


def test_the_bank_clusters_in_a_metric_and_by_known_subsets():
    """Two groups in a column of small numbers, hidden behind noise in one of large numbers."""
    rng = np.random.default_rng(0)
    truth = torch.from_numpy(rng.integers(0, 2, 200))
    columns = [rng.normal(0, 1, 200), 0.1 * truth.numpy() + rng.normal(0, 0.01, 200)]
    A, metric = torch.from_numpy(np.stack(columns, 1)).float(), torch.tensor([0.01, 1.0])
    bank = kmeans.ActivationBank(200, 2)
    bank.update(torch.arange(200), A)
    accuracy = kmeans.agreement(bank.cluster(2, restarts=3).labels, truth)[0]
    bank.clusters = None
    weighted = bank.cluster(2, restarts=3, metric=metric)
    assert accuracy < 0.75 and kmeans.agreement(weighted.nearest(A)[0], truth)[0] == 1
    means = torch.stack([A[truth == k].mean(0) for k in range(2)])  # in the units of A
    torch.testing.assert_close(weighted.centers[weighted.centers[:, 1].argsort()], means, atol=1e-5, rtol=1e-5)
    spread = ((A - means[truth]) * metric).double().square().sum().item() / 199
    assert weighted.sigma2 == pytest.approx(spread, rel=1e-5)
    again = bank.cluster(2, max_iter=1, metric=metric)  # the start is in the units of A too
    torch.testing.assert_close(again.centers, weighted.centers)
    known = bank.cluster_known(truth, 2, metric)
    torch.testing.assert_close(known.centers, means, atol=1e-5, rtol=1e-5)
    assert known.sigma2 == pytest.approx(spread, rel=1e-5) and torch.equal(known.labels, truth)
    few = kmeans.ActivationBank(200, 2)
    few.update(torch.arange(4), A[:4])
    assert few.cluster_known(truth + 1, 4).centers[[0, 3]].tolist() == [[0, 0]] * 2  # nothing of it is seen


def gradients_of_a_global_batch(process):
    """Of all loss terms, on this process's half of eight images (or on all of them); batch norm frozen."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 64, 64, generator=generator)
    masks = torch.randint(0, 5, (8, 64, 64), generator=generator)
    masks[:3], masks[3, :40] = data.IGNORE, data.IGNORE  # the halves have different numbers of labelled pixels
    torch.manual_seed(0)
    network = model.build_model("divdr-a", "segmentation", 5, layers=4, width=8).eval()
    with torch.no_grad():
        A = network(images).A
    network.backbone.train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    mine = slice(process.rank, None, process.world)
    distributed = train_seg.distribute(network, process)
    out = distributed(images[mine])
    loss = train_seg.segmentation_loss(out.logits, masks[mine], process.world)
    share = train_seg.mean_over_ranks(out.cost.mean() / network.budgeted_cost(64, 64), process.world)
    loss = loss + losses.cost_loss(share[None], 1.0, 0.1)
    loss = loss + losses.clustering_loss(out.A, A[:2] + 0.1, 0.5, 5.0)
    loss.backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def bank_and_gradients(rank, folder):
    process = model.start_process("cpu")
    bank, A, out = kmeans.ActivationBank(9, 2), torch.arange(18.0).view(9, 2), {}
    for index in [[[0, 7], [3, 1]], [[8, 2], [5, 7]]]:
        bank.update(torch.tensor(index[rank]), A[index[rank]])
    bank.cluster(2, seed=rank)  # the first rank's counts
    refuses(lambda: bank.cluster(8), "at least 8")
    out["bank"] = bank.state_dict()
    # A rank whose images have no object to detect takes part in the step all the same.
    detector = train_seg.distribute(small_detector(masks=True), process)
    boxes, count = torch.tensor([[5.0, 5, 40, 50]])[: 1 - rank], 1 - rank
    target = dict(boxes=boxes, labels=torch.ones(count, dtype=torch.int64))
    target["masks"] = torch.ones(count, 64, 64, dtype=torch.uint8)
    sum(detector([torch.rand(3, 64, 64)] * 2, [target] * 2).losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in detector.parameters())
    out["gradients"] = gradients_of_a_global_batch(process)
    torch.save(out, f"{folder}/{rank}.pt")


def test_two_processes_have_one_bank_one_clustering_and_the_gradients_of_the_whole_batch(tmp_path):
    spawn(bank_and_gradients, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    whole, A = gradients_of_a_global_batch(CPU), torch.arange(18.0).view(9, 2)
    seen = torch.tensor([0, 1, 2, 3, 5, 7, 8])
    alone = kmeans.kmeans(A[seen], 2, seed=0)
    for rank in ranks:
        bank = rank["bank"]
        assert torch.equal(bank["seen"].nonzero().flatten(), seen) and torch.equal(bank["values"][seen], A[seen])
        assert torch.equal(bank["clusters"]["centers"], alone[0])
        assert torch.equal(bank["clusters"]["labels"][seen], alone[1]) and bank["clusters"]["sigma2"] == alone[2] / 6
        for name, gradient in whole.items():
            torch.testing.assert_close(rank["gradients"][name], gradient, atol=1e-5, rtol=1e-3, msg=name)
    assert sum(gradient.abs().sum() > 0 for gradient in whole.values()) > 100


# ============ the alternation ============


def seg(*flags):
    return train_seg.settings([str(flag) for flag in flags])


def test_variants_are_the_methods_table():
    table = {"dr-a": (0.8, 0.1, 0, "small"), "dr-b": (0.5, 0.1, 0, "small"), "dr-c": (0.5, 0.2, 0, "small"),
             "dr-raw": (0, 0, 0, "full"), "divdr-a": (0.8, 0.1, 0.2, "small"),
             "divdr-raw": (0, 0, 0.2, "small")}  # fmt: skip
    for name, row in table.items():
        config = seg("--variant", name)
        assert (config.lambda1, config.budget, config.lambda2, config.gate) == row
        assert (config.k, config.margin, config.kmeans_every, config.batch, config.crop) == (4, 5.0, 50, 8, 768)
        assert (config.iters, config.lr, config.warmup, config.clip) == (180_000, 0.05, 1000, 5.0)
    config = seg("--dataset", "shapes", "--subsets", 2, "--lr", 0.3)
    assert (config.k, config.lr, config.lambda2, config.own, config.layers) == (2, 0.3, 0.02, "bank", 4)
    assert seg("--dataset", "shapes", "--variant", "dr-a").lambda2 == 0
    det = train_det.settings(["--variant", "dr-raw"])
    assert (det.gate, det.layers, det.batch, det.iters, det.lr_steps) == ("full", 17, 16, 90_000, [60_000, 80_000])


def test_the_learning_rate_warms_up():
    config = seg("--warmup", 1000)
    factors = [train_seg.warm_up(config, step) for step in (0, 500, 1000, 90_000)]
    assert factors == pytest.approx([0.001, 0.001 + 0.999 / 2, 1, 1])
    assert seg("--iters", 50).warmup == 5 and train_seg.warm_up(seg("--warmup", 0), 0) == 1


def test_norm_weights_have_no_weight_decay():
    network = model.build_model("dr-a", "segmentation", 3, layers=4, width=4)
    decayed, free = train_seg.make_optimizer(network, seg("--lr", 0.1)).param_groups
    norms = {id(p) for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()}
    assert {id(p) for p in free["params"]} == norms
    assert (free["weight_decay"], decayed["weight_decay"]) == (0, 1e-4)
    assert len(decayed["params"]) + len(norms) == len(list(network.parameters()))


def test_the_segmentation_loss_ignores_255_and_survives_crops_without_labels():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    masks = torch.randint(0, 3, (2, 4, 4))
    masks[0, :2] = 255
    p, picked = logits.detach().double().softmax(1), []
    for b, y, x in (masks != 255).nonzero().tolist():
        picked.append(-math.log(p[b, masks[b, y, x], y, x]))
    assert train_seg.segmentation_loss(logits, masks, 1).item() == pytest.approx(sum(picked) / len(picked), rel=1e-5)
    nothing = train_seg.segmentation_loss(logits, torch.full_like(masks, 255), 1)
    nothing.backward()
    assert nothing.item() == 0 and (logits.grad == 0).all()


def test_batch_norm_is_reestimated_as_plain_averages():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, 3, 8, 8, generator=generator) * 3 + 1 for _ in range(3)]
    network = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    train_seg.reestimate_batch_norm(network, iter(batches), world=1)
    means = torch.stack([x.mean((0, 2, 3)) for x in batches]).mean(0)
    variances = torch.stack([x.var((0, 2, 3)) for x in batches]).mean(0)
    torch.testing.assert_close(network[0].running_mean, means)
    torch.testing.assert_close(network[0].running_var, variances)


def test_the_tasks_metric_is_the_root_mean_square_of_its_gradients():
    metric, rng = train_seg.TaskMetric(6, torch.device("cpu")), np.random.default_rng(0)
    gradients = torch.from_numpy(rng.normal(0, [3e-4, 1e-5, 0, 2e-4, 1e-4, 0], (4, 6))).float()
    assert metric.weights().tolist() == pytest.approx([0.01] * 6)  # before the first step: all alike
    weights = torch.ones(4, 3, 3, requires_grad=True)  # the init node is no part of A
    reached = torch.ones(4, 3, dtype=torch.bool)
    routes = routing.Routes(None, None, reached, [weights * 1.0])
    metric.watch(routes)
    gradient = torch.cat([torch.full((4, 1, 3), 9.0), gradients.view(4, 2, 3)], 1)
    (routes.weights[0] * gradient).sum().backward()
    metric.update(routes)
    rms = gradients.double().square().mean(0).sqrt()
    expected = (rms / rms[rms > 0].square().mean().sqrt()).clamp(min=0.01).float()
    torch.testing.assert_close(metric.weights(), expected)


@pytest.mark.parametrize("flags, word", [
    ("--k 1", "--k"), ("--lambda2 -1", "--lambda2"), ("--crop 100", "--crop"), ("--variant x", "--variant"),
    ("--dataset cityscapes --data nowhere", "nowhere"), ("--iters 0", "--iters"), ("--iters many", "--iters"),
    ("--dataset shapes --k 5000", "--k"), ("--device cuda:7", "--device"), ("--dataset shapes --data x", "x"),
    ("--variant deeplabv3-r101 --width 8 --dataset shapes", "--width"), ("--dataset shapes --lr nan", "--lr"),
    ("--dataset shapes --oracle --k 5", "--oracle"), ("--dataset shapes --batch 1", "--batch"),
    ("--budget 2", "--budget"), ("--variant dr-raw --lambda1 0.5", "--budget"), ("--subsets 1", "--subsets"),
    ("--dataset shapes --init x.pth", "x.pth"), ("--variant deeplabv3-r101 --init x.pth", "--init"),
    ("--dataset shapes --size 0", "size"), ("--dataset shapes --layers 0", "layers"), ("--size 64", "size"),
    ("--dataset shapes --width 7", "width"), ("--metric task --gate-space logit", "--metric"),
    ("--dataset shapes --resume --workers 0", "no run to go on with"), ("--metric task --compile", "--compile")])  # fmt: skip
def test_settings_that_cannot_work_end_in_one_line(flags, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuses(lambda: train_seg.main(flags.split()), word)
    assert not list(tmp_path.iterdir())


def test_two_processes_train_and_every_sample_enters_the_bank(trained):
    folder = trained / "runs" / "seg"
    assert {"best.pt", "config.json", "last.pt", "log.jsonl"} == {path.name for path in folder.iterdir()} - {
        "metrics.json", "experts.png", "overlays", "last.val.activations", "last.train.activations"}  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert (config["lambda1"], config["gate"], config["batch"], config["iters"]) == (0.8, "small", 4, 12)
    bank = model.load_checkpoint(folder / "last.pt")[1]["bank"]
    assert bank["seen"].all() and len(bank["seen"]) == 12 and (bank["values"].sum(1) > 0).all()
    assert [event["iteration"] for event in events(folder, "kmeans")] == [3, 6, 9, 12]
    assert [event["iteration"] for event in events(folder, "evaluation")] == [6, 12]
    steps = events(folder, "train")
    assert [event["iteration"] for event in steps] == [2, 4, 6, 8, 10, 12]
    keys = {"loss_task", "loss_cost", "loss_clustering", "gflops_real", "gflops_expected", "lr", "gradient_norm"}
    assert keys <= steps[-1].keys() and sum(events(folder, "kmeans")[-1]["sizes"]) == 12


@pytest.mark.parametrize("flags, clustered", [
    ("--variant divdr-raw --activations recompute --kmeans-anneal 4", [3, 8, 9]),  # 3 + round(3 · 4^(3/9)) = 8
    ("--variant divdr-raw --gate-space logit", [3, 6, 9]), ("--variant dr-raw --amp", [3, 6, 9]),
    ("--variant divdr-a --metric task --own bank --bank-momentum 0.7 --jitter --lambda2-start 0.4", [3, 6, 9]),
])  # fmt: skip
def test_one_process_trains_with(flags, clustered, camvid):
    command = [*TINY_SEG, "--iters", 9, "--eval-every", 100, "--name", "run", *flags.split()]
    succeeds(train_seg.main, *command)
    bank = model.load_checkpoint("runs/run/last.pt")[1]["bank"]
    assert bank["seen"].all() and bank["clusters"]["centers"].shape == (2, bank["values"].shape[1])
    assert (bank["values"].abs().max() > 1) == ("logit" in flags)
    assert (bank["clusters"]["metric"] is not None) == ("task" in flags)
    assert [event["iteration"] for event in events(Path("runs/run"), "kmeans")] == clustered
    assert events(Path("runs/run"), "evaluation")[-1]["iteration"] == 9
    refuses(lambda: train_seg.main([str(flag) for flag in command]), "holds a run already", "--resume")


@pytest.mark.parametrize("oracle", [False, True])
def test_shapes_end_with_the_recovered_subsets(oracle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--dataset shapes --size 32 --hard --subsets 2 --layers 4 --width 8 --iters 6 --kmeans-every 2 --name s"
    out = succeeds(train_seg.main, *flags.split(), "--bn-batches", 2, *QUIET, *["--oracle"] * oracle)
    metrics = json.loads(Path("runs/s/metrics.json").read_text())
    subsets = metrics["subsets"]["subset"]
    assert "recovered subsets" in out and list(subsets) == ["day", "rain"] and metrics["k"] == 2
    assert sum(sum(row["experts"]) for row in subsets.values()) == 300
    network, checkpoint = model.load_checkpoint("runs/s/last.pt")
    parts = network.real_cost(network.backbone.open_routes(), 32, 32)
    rest = sum(parts[part].item() for part in ("stem", "gates", "head")) / 1e9
    most = network.backbone.costs(32, 32).path[0].sum().item() / 1e9
    for row in subsets.values():  # what ran at the strides, and stem, gates and head, is what the whole cost
        init = row["gflops"] - rest - sum(row["gflops_by_stride"].values())
        assert -1e-9 <= init <= most + 1e-9
    assert Path("runs/s/experts.png").stat().st_size > 1000
    if oracle:
        dataset = data.segmentation_dataset("shapes", None, "train", train=False, size=32, hard=True, subsets=2)
        bank = checkpoint["bank"]
        for k in range(2):
            mine = bank["values"][bank["seen"] & (dataset.subset == k)]
            torch.testing.assert_close(bank["clusters"]["centers"][k], mine.mean(0), atol=1e-5, rtol=1e-5)


def test_a_diverging_run_stops_before_something_broken_is_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--dataset shapes --size 32 --layers 4 --width 4 --iters 20 --warmup 0 --lr 1e8 --clip 1e8 --variant dr-raw"
    status, _, error = call(train_seg.main, *flags.split(), "--save-every", 1, *QUIET)
    error = error.strip().splitlines()[-1]
    assert status == 2 and "try a lower --lr" in error and "last.pt is from before" in error
    assert "loss_task is" in error or "gradient_norm is" in error
    assert len(re.findall(r"shapes/train/\d{5}", error)) == 8
    network, checkpoint = model.load_checkpoint("runs/shapes-dr-raw-seed0/last.pt")
    assert checkpoint["iteration"] == int(re.search(r"iteration (\d+):", error)[1]) - 1
    assert all(p.isfinite().all() for p in network.parameters())
    assert all("NaN" not in line for line in Path("runs/shapes-dr-raw-seed0/log.jsonl").read_text().splitlines())


def test_a_static_baseline_runs_through_the_same_loop(camvid, monkeypatch):
    flags = "--variant deeplabv3-r101 --crop 64 --short-sides 64 --batch 2 --iters 1 --bn-batches 1 --name static"
    succeeds(train_seg.main, "--dataset", "camvid", "--data", "camvid", *flags.split(), *QUIET)
    figures = []  # without gates there are three
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, folder, name: figures.append((name, figure)))
    succeeds(evaluate.main, "runs/static/last.pt", "--figures", "drawn", "--format", "latex", *QUIET)
    assert [name for name, figure in figures if figure] == ["predictions-static", "training-static", "trade-off"]
    metrics = json.loads(Path("runs/static/metrics.json").read_text())
    assert list(metrics["gflops"]) == ["exact"] and "inter" not in metrics


# ============ data ============


def cityscapes_tree(root, split="train", names=("aachen/aachen_0_0", "bonn/bonn_3_0"), size=(24, 40), plate=255):
    """The published layout with random ids, all of the table among them; returns {name: (image, label ids)}."""
    rng, made = np.random.default_rng(0), {}
    for name in names:
        ids = rng.integers(0, 34, size).astype(np.uint8)
        ids.ravel()[:35] = [*range(34), plate]  # 255: the license plate's -1
        image = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        kinds = {"leftImg8bit": "leftImg8bit", "gtFine": "gtFine_labelIds"}
        for (part, ending), array in zip(kinds.items(), (image, ids)):
            path = root / part / split / f"{name}_{ending}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
        Image.fromarray(ids).save(path.with_name(path.name.replace("label", "instance")))
        made[name] = image, ids
    return made


def small_shapes(train=True, **options):
    return data.segmentation_dataset("shapes", None, "train", train=train, **{**dict(size=32, n_train=24), **options})


def test_cityscapes_ids_become_train_ids(tmp_path):
    from cityscapesscripts.helpers.labels import labels

    train_id = {label.id % 256: label.trainId for label in labels}
    made = cityscapes_tree(tmp_path)
    dataset = data.segmentation_dataset("cityscapes", str(tmp_path), "train", train=False)
    assert len(dataset) == 2 and dataset.subset is None
    for i, (name, (image, ids)) in enumerate(made.items()):
        got, mask, index = dataset[i]
        assert index == i and dataset.image_name(i) == f"leftImg8bit/train/{name}_leftImg8bit.png"
        assert got.dtype == mask.dtype == torch.uint8 and type(got) is type(mask) is torch.Tensor
        assert torch.equal(got, torch.from_numpy(image).permute(2, 0, 1))
        expected = [train_id[int(label)] for label in ids.ravel()]
        assert mask.flatten().tolist() == [data.IGNORE if label in (-1, 255) else label for label in expected]
    trained = {label.trainId: label for label in labels if 0 <= label.trainId < 255}
    assert dataset.info.classes == tuple(trained[i].name for i in range(19))
    assert dataset.info.palette == tuple(trained[i].color for i in range(19))


@pytest.mark.parametrize("ending, palette", [(".png", False), (".jpg", True), (".JPEG", False)])
def test_camvid_is_read_with_its_void_and_whatever_its_endings(tmp_path, ending, palette):
    ids = np.random.default_rng(1).integers(0, 12, (20, 32)).astype(np.uint8)
    for folder in ("train", "trainannot"):
        (tmp_path / folder).mkdir()
    image = np.broadcast_to(np.uint8([10, 90, 200]), (20, 32, 3))  # flat: survives JPEG
    Image.fromarray(image.copy()).save(tmp_path / "train" / f"0{ending}")
    label = Image.fromarray(ids)
    if palette:
        label.putpalette([255 - i % 256 for i in range(768)])  # same bytes, read as indices into a palette
    label.save(tmp_path / "trainannot" / "0.png")
    got, mask, _ = data.segmentation_dataset("camvid", str(tmp_path), "train", train=False)[0]
    assert (got.permute(1, 2, 0).int() - torch.tensor([10, 90, 200])).abs().max() <= 3
    assert np.array_equal(mask.numpy(), np.where(ids == 11, data.IGNORE, ids))


def test_real_camvid_is_read():
    root = REAL / "camvid"
    if not root.is_dir():
        pytest.skip(f"no CamVid at {root}; set REAL_DATA to the folder that holds camvid/")
    for split, count in (("train", 367), ("val", 101), ("test", 233)):
        dataset = data.segmentation_dataset("camvid", str(root), split, train=False)
        assert len(dataset) == count
    images, masks, _ = next(iter(data.pass_loader(dataset, 8)))
    assert images.shape == (8, 3, 360, 480) and masks.shape == (8, 360, 480)
    present = set(masks.unique().tolist())
    assert present <= {*range(11), data.IGNORE} and len(present) > 8
    assert data.segmentation_dataset("camvid", str(root), "train", train=True)[0][0].shape == (3, 352, 352)


def test_missing_files_are_named(tmp_path):
    def open_train(root=tmp_path):
        data.segmentation_dataset("cityscapes", str(root), "train", train=False)

    nowhere = tmp_path / "nowhere"
    refuses(lambda: open_train(nowhere), nowhere, "gtFine/train", "cityscapes-dataset.com", "--dataset shapes")
    camvid = dict(name="camvid", root=str(nowhere), split="val", train=False)
    refuses(lambda: data.segmentation_dataset(**camvid), nowhere, "valannot", "SegNet", "--dataset shapes")
    cityscapes_tree(tmp_path)
    label = tmp_path / "gtFine/train/bonn/bonn_3_0_gtFine_labelIds.png"
    image = tmp_path / "leftImg8bit/train/bonn/bonn_3_0_leftImg8bit.png"
    kept = label.read_bytes()
    label.unlink()
    refuses(open_train, image, "no label")
    label.write_bytes(kept)
    image.unlink()
    refuses(open_train, label, "no image")
    write_camvid(tmp_path / "twice", 1)
    shutil.copy(tmp_path / "twice/train/00.png", tmp_path / "twice/train/00.jpg")
    twice = dict(name="camvid", root=str(tmp_path / "twice"), split="train", train=False)
    refuses(lambda: data.segmentation_dataset(**twice), "00.jpg", "00.png")


def test_damaged_files_are_named(tmp_path):
    pixels, ids = cityscapes_tree(tmp_path)["aachen/aachen_0_0"]
    dataset = data.segmentation_dataset("cityscapes", str(tmp_path), "train", train=False)
    image, label = map(Path, dataset.pairs[0])
    for path in (image, label):
        whole = path.read_bytes()
        for length in (0, 10, len(whole) // 3, 2 * len(whole) // 3):
            path.write_bytes(whole[:length])
            refuses(lambda: dataset[0], path)
        path.write_bytes(whole)
    for array, words in ((ids[:, :-3], [image, label, "40x24", "37x24"]), (pixels, [label, "one channel"]),
                         (np.where(ids == 7, 77, ids).astype(np.uint8), [label, "77"])):  # fmt: skip
        Image.fromarray(array).save(label)
        for workers in (0, 1):  # a worker's error arrives as one line, too
            refuses(lambda: next(iter(data.pass_loader(dataset, 1, workers))), *words)


def test_arguments_that_do_not_go_together_are_refused():
    shapes = dict(name="shapes", root=None, split="train", train=True)
    for wrong, words in ((dict(name="ade20k"), ["ade20k", "camvid"]), (dict(split="dev"), ["dev"]),
                         (dict(root="here"), ["here"]), (dict(size=100), ["100", "32"]), (dict(subsets=5), ["5"]),
                         (dict(n_train=2), ["2 images"]), (dict(name="camvid", size=64), ["size", "shapes"])):  # fmt: skip
        refuses(lambda: data.segmentation_dataset(**{**shapes, **wrong}), *words)
    dataset = data.segmentation_dataset(**shapes, n_train=8)
    for make in (lambda: data.train_loader(dataset, 9), lambda: data.train_loader(dataset, 4, world=3),
                 lambda: data.pass_loader(dataset, 0)):  # fmt: skip
        refuses(make, "batch")


def test_augmentation_pads_crops_and_keeps_image_and_mask_aligned():
    torch.manual_seed(0)
    # Every label region is flat and large; its number is written into the picture.
    mask = (torch.arange(96)[:, None] // 24 * 8 + torch.arange(128) // 16).to(torch.uint8)  # ids 0..31
    image = torch.stack([mask * 7 + 20, mask * 3 + 40, 250 - mask * 5])
    padded = flipped = 0
    for _ in range(40):
        got, label = data.augmentation((48, 96, 192), 80)(tv_tensors.Image(image), tv_tensors.Mask(mask))
        assert got.shape == (3, 80, 80) and label.shape == (80, 80) and got.dtype == label.dtype == torch.uint8
        inside = label != data.IGNORE
        assert (got[:, ~inside] == 0).all() and (got[:, inside] > 0).all()
        assert set(label[inside].tolist()) <= set(range(32))  # nearest: no ids in between
        right = ((got[0].float() - 20) / 7 - label).abs() < 0.6
        assert right[inside].float().mean() > 0.85  # the rest: blended edges between regions
        if not inside.all():
            padded += 1
            rows = inside.any(1).nonzero()
            assert abs(int(rows[0] - (79 - rows[-1]))) <= 1  # padded in the middle
        first = label[inside.any(1)][0]
        first = first[first != data.IGNORE].int()
        flipped += int(first[0] > first[-1])
    assert 5 < padded < 25 and 10 < flipped < 30
    same = data.augmentation(None, None)(tv_tensors.Image(image), tv_tensors.Mask(mask))[1]
    assert torch.equal(same, mask) or torch.equal(same, mask.flip(1))


@pytest.mark.parametrize("short", [96, 224, 400])
def test_a_crop_shows_what_resizing_the_whole_image_shows_and_labels_stay_with_it(short):
    """On a picture whose brightness, and whose label, is the number of the row."""
    rows = torch.arange(160, dtype=torch.uint8)[:, None].expand(160, 320)
    whole = v2.functional.resize(rows[None], [short, 2 * short], antialias=True)[0].float()
    for seed in range(5):
        torch.manual_seed(seed)
        image, mask = data.ScaleAndCrop((short,), 64)(tv_tensors.Image(rows.expand(3, -1, -1)), tv_tensors.Mask(rows))
        side = round(64 * 160 / short)
        torch.manual_seed(seed)
        torch.randint(1, ())
        top = int(torch.randint(160 - side + 1, ()))
        first = round(top * short / 160)
        shown, step = image[0].float(), 160 / short
        assert (shown[4:60] - whole[first + 4 : first + 60, :64]).abs().max() <= 1 + step
        away = (mask.float() - shown)[4:60]
        assert away.abs().max() <= 0.5 + step / 2 and away.mean().abs() < 0.2  # not to one side


def test_normalize():
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    mean, std = (np.array(v).reshape(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    got = data.normalize(images)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), (images.numpy() / 255.0 - mean) / std, atol=1e-5)


def test_an_epoch_has_each_index_once_with_its_own_image():
    dataset, whole, first = small_shapes(), small_shapes(train=False), []
    for rank in range(2):
        loader = data.train_loader(dataset, 6, rank=rank, world=2)
        stream = data.forever(loader)
        rounds = [next(stream) for _ in range(8)]
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
    for item in [(0, 0), (0, 1), (1, 0), (2, 5)]:
        (image, mask, _), (other, other_mask, _) = plain[item], jittered[item]
        assert torch.equal(mask, other_mask) and other.dtype == torch.uint8 and other.shape == image.shape
        assert torch.equal(other, jittered[item][0]) and not torch.equal(image, other)
    assert torch.equal(small_shapes(train=False, jitter=True)[3][0], small_shapes(train=False)[3][0])


@pytest.mark.parametrize("workers", [0, 1])
def test_the_seed_decides_the_stream_from_anywhere_on(workers):
    def stream(seed, start=0, workers=workers):
        batches = data.forever(data.train_loader(small_shapes(), 6, workers, seed=seed), start)
        return [next(batches) for _ in range(6)]

    def same(one, other):
        return all(torch.equal(a, b) for left, right in zip(one, other) for a, b in zip(left, right))

    torch.manual_seed(workers)  # which decides nothing
    one = stream(3)
    assert same(one, stream(3)) and same(one, stream(3, workers=1 - workers))
    assert [batch[2].tolist() for batch in one] != [batch[2].tolist() for batch in stream(4)]
    for first in (1, 4, 5):  # four batches an epoch
        assert same(one[first:], stream(3, first))


def test_a_pass_counts_each_image_once_and_wraps_to_full_batches():
    dataset = small_shapes(train=False, n_train=11)
    for world in (1, 2, 3):
        wrapped = []
        for rank in range(world):
            part = torch.cat([batch[2] for batch in data.pass_loader(dataset, 4, rank=rank, world=world)]).tolist()
            assert part == list(range(rank, 11, world))
            wrapped.append([batch[2] for batch in data.pass_loader(dataset, 4, 0, rank, world, wrap=True)])
        assert len({len(batches) for batches in wrapped}) == 1
        assert all(len(index) == 4 for batches in wrapped for index in batches)
        assert {int(i) for batches in wrapped for index in batches for i in index} == set(range(11))


def test_images_of_two_sizes_cannot_share_a_batch(tmp_path):
    cityscapes_tree(tmp_path, names=("a/a_0",), size=(24, 40))
    cityscapes_tree(tmp_path, names=("b/b_0",), size=(24, 44))
    dataset = data.segmentation_dataset("cityscapes", str(tmp_path), "train", train=False)
    assert len(list(data.pass_loader(dataset, 1))) == 2
    refuses(lambda: list(data.pass_loader(dataset, 2)), "40x24", "44x24", "--eval-batch 1")


@pytest.mark.parametrize("subsets", [2, 3, 4])
def test_shapes_depend_on_seed_split_and_index_and_their_subsets_are_balanced(subsets):
    first, again = small_shapes(train=False, subsets=subsets), small_shapes(train=False, subsets=subsets)
    for i in (5, 0, 17):
        assert all(torch.equal(a, b) for a, b in zip(first.scene(i)[:5], again.scene(i)[:5]))
    assert not torch.equal(first[0][0], small_shapes(train=False, seed=1)[0][0])
    val = data.segmentation_dataset("shapes", None, "val", train=False, size=32, n_val=24)
    assert len({dataset[i][0].numpy().tobytes() for dataset in (first, val) for i in range(24)}) == 48
    many = small_shapes(subsets=subsets, n_train=240)
    assert many.subset.bincount().tolist() == [240 // subsets] * subsets
    in_order = (many.subset == torch.arange(240) % subsets).float().mean()
    assert abs(in_order - 1 / subsets) < 0.15


@pytest.mark.parametrize("hard", [False, True])
def test_shapes_instances_make_up_the_mask(hard):
    dataset, classes = small_shapes(train=False, size=96, hard=hard, subsets=4), set()
    for i in range(12):
        image, mask, masks, boxes, labels, subset = dataset.scene(i)
        assert image.shape == (3, 96, 96) and image.dtype == torch.uint8 and subset == dataset.subset[i]
        assert torch.equal(mask.long(), (masks * labels[:, None, None]).sum(0)) and masks.sum(0).max() == 1
        for instance, box in zip(masks, boxes):
            rows, columns = instance.nonzero().T
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert torch.equal(dataset[i][1], mask)
        classes |= set(labels.tolist())
    assert classes == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("hard", [False, True])
def test_subsets_of_shapes_differ_in_scale_and_in_hard_mode_in_nothing_else(hard):
    dataset = small_shapes(train=False, size=64, n_train=180, hard=hard)
    sides, light, background = ([[] for _ in range(3)] for _ in range(3))
    for i in range(180):
        scene = dataset.scene(i)
        x1, y1, x2, y2 = scene.boxes.T
        sides[scene.subset] += ((x2 - x1) * (y2 - y1)).sqrt().tolist()
        light[scene.subset].append(float(scene.image.float().mean()))
        background[scene.subset].append(float((scene.mask == 0).float().mean()))
    large, medium, small = (np.median(s) for s in sides)
    assert large > 1.5 * medium > 2.25 * small and (abs(np.mean(background, 1) - 0.675) < 0.03).all()
    light = np.array(light)
    means, error = light.mean(1), np.sqrt(light.var(1).mean() / light.shape[1])
    assert np.ptp(means) < 5 * error if hard else means[0] > means[1] + 20 > means[2] + 60


ALONE = {
    "routing.py": "import routing; print(routing.RoutedBackbone(4, 4)(torch.rand(2, 3, 64, 64))[1].shape)",
    "losses.py": "import losses; print(losses.clustering_loss(torch.rand(4, 6), torch.rand(3, 6), 0.5, 1.0))",
    "kmeans.py": "import kmeans; b = kmeans.ActivationBank(20, 4); b.update(torch.arange(20), torch.rand(20, 4)); "
                 "print(b.cluster(3))",
    "data.py": "import data; print(len(data.segmentation_dataset('shapes', None, 'train', train=True)[0]))",
}  # fmt: skip


@pytest.mark.parametrize("name", ALONE)
def test_a_file_works_alone_in_an_empty_folder(name, tmp_path):
    shutil.copy(HERE / name, tmp_path)
    code = f"import torch; {ALONE[name]}"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": ""})


# ============ detection ============


def small_detector(**arguments):
    sizes = dict(layers=4, width=4, pyramid=16, short_sides=(64,), long_side=128, anchor=8, proposals=50, rois=32)
    return model.build_model(arguments.pop("variant", "dr-raw"), "detection", 2, **sizes | arguments)


def as_found(target):
    """The truth of an image as a detector would give it."""
    found = dict(boxes=target["boxes"], labels=target["labels"], scores=torch.ones(len(target["labels"])))
    return found | {"masks": target["masks"][:, None].float()}


def check_truth_has_full_score(dataset):
    results = []
    for i in range(len(dataset)):
        results += evaluate.coco_results(dataset, i, as_found(dataset[i][1]))
    for kind in ("bbox", "segm"):
        scores, table = evaluate.average_precision(dataset, results, kind)
        assert scores["AP"] == scores["AP50"] == scores["AP75"] == pytest.approx(1.0) and "= 1.000" in table
    return results


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
        scores, _ = evaluate.average_precision(dataset, results, kind)
        assert list(scores.values()) == official.stats.tolist() and scores["AR 100"] >= 0


def test_the_detector_is_layer17_under_five_maps():
    detector = model.build_model("divdr-a", "detection", 80)
    assert (detector.dim, detector.backbone.num_nodes, detector.stride) == (198, 66, 64)
    maps, _ = detector.pyramid.eval()(torch.zeros(1, 3, 64, 128))
    assert [tuple(y.shape) for y in maps.values()] == [(1, 256, 16 // 2**s, 32 // 2**s) for s in range(5)]
    assert detector.rcnn.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert detector.rcnn.roi_heads.box_roi_pool.canonical_scale == 224
    refuses(lambda: model.build_model("deeplabv3-r101", "detection", 3), "deeplabv3-r101", "r50-fpn")


def test_the_static_detector_costs_what_others_publish():
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    detector = model.build_model("r50-fpn", "detection", 90).eval()  # torchvision's has 91, the background too
    assert detector.real_cost(None, 800, 800, "paper")["network"].item() / 1e9 == pytest.approx(88.381, abs=5e-4)
    proposals = [torch.tensor([[10.0, 10, 90, 90]] * 1000)]
    rpn = detector.rcnn.rpn.forward
    detector.rcnn.rpn.forward = lambda *args: (rpn(*args) and proposals, {})
    whole = model.count_multiply_adds(detector, [torch.rand(3, 800, 800)], elementwise=False)
    published = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["_ops"]
    assert whole / 1e9 == pytest.approx(published, abs=0.6)  # padded from 800 to 800: the same maps


def test_a_detector_is_torchvisions_in_both_modes():
    torch.manual_seed(0)
    detector = small_detector(variant="r50-fpn", layers=None, width=None, masks=True, pyramid=None)
    images = [torch.rand(3, 64, 90), torch.rand(3, 70, 64)]
    some = dict(boxes=torch.tensor([[5.0, 5, 40, 50]]), labels=torch.tensor([2]))
    none = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    some["masks"], none["masks"] = torch.ones(1, 64, 90).byte(), torch.zeros(0, 70, 64).byte()
    torch.manual_seed(1)
    ours = detector(images, [some, none]).losses
    torch.manual_seed(1)
    theirs = detector.rcnn(images, [some, none])
    assert ours.keys() == theirs.keys() and len(ours) == 5
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])
    nothing = detector(images[1:], [none]).losses
    assert all(loss.isfinite() for loss in nothing.values())
    assert nothing["loss_box_reg"] == nothing["loss_rpn_box_reg"] == nothing["loss_mask"] == 0
    detector.eval()
    with torch.no_grad():
        for mine, other in zip(detector(images).detections, detector.rcnn(images)):
            assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)


def test_padding_does_not_move_what_the_regions_see():
    """The first image decides nothing, though it is padded from 64x65 to 64x128."""
    torch.manual_seed(0)
    detector = small_detector(masks=True).eval()
    with torch.no_grad():
        detector([torch.rand(3, 65, 64)])
    for align in (detector.rcnn.roi_heads.box_roi_pool, detector.rcnn.roi_heads.mask_roi_pool):
        ramp = torch.arange(32.0).expand(1, 1, 32, 32) * 4  # a map of stride 4: how far right it is, in pixels
        maps = {str(i): ramp[..., :: 2**i, :: 2**i] for i in range(4)}
        regions = align(maps, [torch.tensor([[32.0, 8, 48, 24]])], [(65, 64)])
        assert regions.mean().item() == pytest.approx(40, abs=1e-3)  # the middle of the box


def test_each_image_of_a_batch_is_detected_as_if_alone():
    torch.manual_seed(0)
    detector = small_detector(masks=True).eval()
    let_gates_decide(detector.backbone)
    images = [torch.rand(3, 64, 128) for _ in range(3)]
    with torch.no_grad():
        together = detector(images)
        for b, image in enumerate(images):
            alone = detector([image])
            torch.testing.assert_close(alone.A[0], together.A[b], atol=1e-5, rtol=1e-5)
            boxes, others = alone.detections[0]["boxes"], together.detections[b]["boxes"]
            torch.testing.assert_close(boxes, others, atol=1e-2, rtol=1e-3)


def test_a_detector_in_bfloat16_has_boxes_in_float32():
    torch.manual_seed(0)
    detector, seen = small_detector(masks=True).train(), []
    detector.rcnn.rpn.register_forward_hook(lambda module, inputs, out: seen.extend(out[0]))
    detector.rcnn.roi_heads.box_predictor.register_forward_hook(lambda module, inputs, out: seen.extend(out))
    target = {"boxes": torch.tensor([[10.0, 12.0, 50.0, 40.0]]), "labels": torch.tensor([1])}
    target["masks"] = torch.ones(1, 64, 96, dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        out = detector([torch.rand(3, 64, 96)] * 2, [target] * 2)
    assert len(seen) == 4 and all(part.dtype == torch.float32 for part in seen)
    sum(out.losses.values()).backward()
    assert all(loss.isfinite() for loss in out.losses.values())


def test_coco_items_are_what_the_file_says(tmp_path):
    contents = write_coco(tmp_path)
    with pytest.warns(UserWarning, match="1 boxes, the first that of annotation 4"):
        whole = data.detection_dataset("coco", str(tmp_path), "train", train=False, masks=True)
    assert (whole.classes, whole.category_ids) == (["dark", "bright"], [3, 7])  # by id; ids have gaps
    assert whole.image_ids == [100, 107, 114, 121, 128] and whole.image_name(1) == "000000000001.jpg"
    for index in range(5):
        image, target, i = whole[index]
        mine = [a for a in contents["annotations"] if a["image_id"] == 100 + 7 * index]
        mine = [a for a in mine if not a["iscrowd"] and a["bbox"][2]]
        assert i == index and image.dtype == torch.uint8 and image.shape[1:] == target["masks"].shape[1:]
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in mine)]
        assert target["boxes"].tolist() == boxes
        assert target["labels"].tolist() == [{3: 1, 7: 2}[a["category_id"]] for a in mine]
        for (x1, y1, x2, y2), mask in zip(boxes, target["masks"]):
            assert mask.sum() == (x2 - x1) * (y2 - y1) and mask[y1:y2, x1:x2].all()


@pytest.mark.filterwarnings("ignore:.*no objects to learn from")
def test_coco_training_images_have_objects_and_are_flipped_with_their_boxes(tmp_path):
    write_coco(tmp_path)
    whole = data.detection_dataset("coco", str(tmp_path), "train", train=False)
    training = data.detection_dataset("coco", str(tmp_path), "train", train=True)
    assert training.image_ids == [100, 107, 114] and "masks" not in training[0][1]
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
    assert len(data.detection_dataset("coco", str(tmp_path), "train", train=True, limit=2)) == 2


def test_bad_coco_files_are_named_in_one_line(tmp_path):
    contents = write_coco(tmp_path)
    folder, first = tmp_path / "annotations", contents["annotations"][0]
    image = contents["images"][0]
    (tmp_path / "secret.jpg").write_bytes((tmp_path / "train2017" / image["file_name"]).read_bytes())

    def opened(file="bad.json", images="train2017", train=True):
        files = dict(annotations=str(folder / file), images=str(tmp_path / images))
        return data.detection_dataset("coco", None, "train", train, masks=True, **files)

    segmentations = ([], [[]], [[1, 2, 3, 4]], dict(size=[5, 5], counts=[25]), None)
    for word, changes in [
        ("images", dict(images=[dict(id=1)])), ("bad.json", dict(images="none")), ("bad.json", dict(images=[])),
        ("categories", dict(categories=[dict(id=9, name="x")])), ("object", dict(annotations=[])),
        ("no such image", dict(images=[*contents["images"], image | dict(id=9, file_name="gone.jpg")])),
        ("no such image", dict(images=[image | dict(file_name="../secret.jpg")])),
        ("no such image", dict(images=[image | dict(file_name=str(tmp_path / "secret.jpg"))])),
        ("annotation 1", dict(annotations=[first | dict(bbox=[1, 2, 3])])),
        ("annotation 1", dict(annotations=[first | dict(bbox=[1, 2, float("nan"), 4])])),
        *(("--masks", dict(annotations=[first | dict(segmentation=wrong)])) for wrong in segmentations),
        ("same id", dict(annotations=[first, first])), ("not list", dict(annotations=[first | dict(image_id=5)])),
        ("width", dict(images=[image | dict(width="wide")])),
    ]:  # fmt: skip
        (folder / "bad.json").write_text(json.dumps(contents | changes))
        refuses(opened, word)
    (folder / "bad.json").write_text("{")
    refuses(opened, "bad.json")
    refuses(lambda: opened("none.json"), "none.json")
    refuses(lambda: opened("instances_train2017.json", "nowhere"), "nowhere")
    Image.new("RGB", (31, 32)).save(tmp_path / "train2017" / "000000000001.jpg")
    with pytest.warns(UserWarning):
        refuses(lambda: opened("instances_train2017.json")[1], "000000000001.jpg", "31x32")


def test_batches_share_an_aspect_ratio_and_an_epoch_has_an_image_once():
    wide = (torch.rand(103, generator=torch.Generator().manual_seed(0)) < 0.7).tolist()

    def epoch(number, rank=0, world=1):
        batches = data.GlobalBatches(103, [1.5 if w else 0.7 for w in wide], 8, rank, world, seed=3)
        batches.seek(number)
        assert len(batches) == 12
        return [[index for e, index in batch if e == number] for batch in batches]

    first = epoch(0)
    seen = [i for batch in first for i in batch]
    assert len(set(seen)) == len(seen) == 96 and all(len(batch) == 8 for batch in first)
    assert sum(len({wide[i] for i in batch}) > 1 for batch in first) <= 1
    halves = [sorted(a + b) for a, b in zip(epoch(0, 0, 2), epoch(0, 1, 2))]
    assert halves == [sorted(batch) for batch in first]
    assert epoch(1) != first and {i for n in range(8) for batch in epoch(n) for i in batch} == set(range(103))


def test_the_truth_as_detections_has_full_score(tmp_path):
    contents = write_coco(tmp_path)
    contents["annotations"] = [a for a in contents["annotations"] if a["bbox"][2]]  # else nothing can be found
    for n, annotation in enumerate(contents["annotations"]):  # other tools count from 0 and leave things out
        annotation |= dict(id=n, area=None)
        if not annotation["iscrowd"]:
            del annotation["iscrowd"]
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(contents))
    check_truth_has_full_score(data.detection_dataset("coco", str(tmp_path), "train", train=False, masks=True))
    shapes = data.detection_dataset("shapes", None, "val", train=False, masks=True, n_val=12)
    check_truth_has_full_score(shapes)
    for i in range(12):  # against the scenes, by pycocotools' own decoder
        masks = [shapes.coco.annToMask(annotation) for annotation in shapes.coco.imgToAnns[i]]
        assert np.array_equal(np.array(masks, bool), shapes.scenes.scene(i).masks.numpy())


def test_scores_are_pycocotools(tmp_path):
    write_coco(tmp_path, sizes=((60, 80),) * 3 + ((64, 64),) * 12)
    with pytest.warns(UserWarning):
        dataset = data.detection_dataset("coco", str(tmp_path), "train", train=False, masks=True)
    rng, results = np.random.default_rng(0), []
    for i in range(len(dataset)):
        target = dict(dataset[i][1])
        noise = torch.from_numpy(rng.normal(0, 2, target["boxes"].shape)).float()
        target |= dict(boxes=target["boxes"] + noise, masks=target["masks"].roll(int(rng.integers(-2, 3)), 2))
        found = as_found(target) | {"scores": torch.from_numpy(rng.random(len(target["labels"]))).float()}
        results += evaluate.coco_results(dataset, i, found)
    annotations = str(tmp_path / "annotations" / "instances_train2017.json")
    compare_with_pycocotools(dataset, annotations, results, tmp_path)
    assert evaluate.average_precision(dataset, [], "bbox")[0]["AP"] == 0  # nothing found at all
    for result in results:  # the sizes of masks are the masks' own, whatever the boxes are
        result["bbox"] = [0.0, 0.0, 500.0, 500.0]
    compare_with_pycocotools(dataset, annotations, results, tmp_path)


def test_on_real_coco_truth_has_full_score_and_detections_score_as_with_pycocotools_alone(tmp_path):
    root = REAL / "coco-mini"
    if not root.is_dir():
        pytest.skip(f"no COCO at {root}; set REAL_DATA to the folder that holds coco-mini/")
    dataset = data.detection_dataset("coco", str(root), "val", train=False, masks=True, limit=40)
    rng = np.random.default_rng(0)
    results = check_truth_has_full_score(dataset)
    for result in results:  # a detector's mistakes
        result["bbox"] = [value + 4 * rng.normal() for value in result["bbox"]]
        result["score"] = rng.random()
    compare_with_pycocotools(dataset, str(root / "annotations" / "instances_val2017.json"), results, tmp_path)


def test_two_processes_train_a_detector(trained):
    folder = trained / "runs" / "det"
    network, checkpoint = model.load_checkpoint(folder / "last.pt")
    assert (checkpoint["classes"], checkpoint["category_ids"]) == (["dark", "bright"], [3, 7])
    bank = checkpoint["bank"]
    assert bank["seen"].all() and len(bank["seen"]) == 9 and bank["clusters"]["centers"].shape == (2, network.dim)
    assert [event["iteration"] for event in events(folder, "kmeans")] == [3, 6, 9, 12]
    assert all({"box", "mask"} <= event.keys() for event in events(folder, "evaluation"))
    terms = ("classifier", "box_reg", "mask", "objectness", "rpn_box_reg", "cost", "clustering")
    last = events(folder, "train")[-1]
    assert {f"loss_{term}" for term in terms} <= last.keys() and last["gflops_real"] > 0


@pytest.mark.filterwarnings("ignore:.*no objects to learn from")
@pytest.mark.parametrize("flags", [
    "--dataset shapes --size 64 --subsets 2 --masks",
    "--train-json coco/annotations/instances_train2017.json --train-images coco/train2017 --activations recompute "
    "--val-json coco/annotations/instances_train2017.json --val-images coco/train2017 --gate-space logit"])  # fmt: skip
def test_one_process_trains_a_detector_with(flags, coco):
    sizes = TINY_DET[2:]  # without --data
    succeeds(train_det.main, *sizes, *flags.split(), "--iters", 4, "--eval-every", 100, "--limit", 8, "--name", "one")
    bank = model.load_checkpoint("runs/one/last.pt")[1]["bank"]
    assert len(bank["seen"]) == 8 and bank["seen"].sum() >= 4
    if "recompute" in flags:
        assert bank["seen"].all() and bank["values"].abs().max() > 1
    else:
        subsets = json.loads(Path("runs/one/metrics.json").read_text())["subsets"]["subset"]
        assert sum(sum(row["experts"]) for row in subsets.values()) == 8


@pytest.mark.filterwarnings("ignore:.*no objects to learn from")
def test_a_static_detector_starts_from_a_file_and_runs_through_the_same_loop(coco):
    from torchvision.models import resnet50

    torch.manual_seed(0)
    resnet = resnet50(weights=None)
    torch.save(resnet.state_dict(), "resnet50.pth")
    flags = "--short-sides 64 --long-side 96 --proposals 40 --rois 16 --anchor 8 --variant r50-fpn --data coco --k 2"
    flags += " --batch 2 --iters 1 --bn-batches 1 --name static --workers 0 --device cpu --init"
    out = succeeds(train_det.main, *flags.split(), "resnet50.pth")
    assert "265 tensors matched" in out  # 53 convolutions, 53 norms of 4 numbers each
    network, checkpoint = model.load_checkpoint("runs/static/last.pt")
    body = network.pyramid.body.state_dict()
    assert torch.equal(body["layer1.0.conv1.weight"], resnet.layer1[0].conv1.weight)  # fixed, as torchvision does
    assert not torch.equal(body["layer3.0.conv1.weight"], resnet.layer3[0].conv1.weight)
    assert checkpoint["bank"]["clusters"] is None
    for file, word in (("runs/static/last.pt", "conv1.weight"), ("none.pth", "none.pth")):
        refuses(lambda: train_det.main([*flags.split(), file, "--name", "other"]), word)


@pytest.mark.parametrize("flags, word", [
    ("--data nowhere", "nowhere"), ("--train-json a.json", "a.json"), ("--variant deeplabv3-r101", "--variant"),
    ("--dataset shapes --init x.pth", "x.pth"), ("--dataset shapes --variant r50-fpn --pyramid 8", "--pyramid"),
    ("--dataset shapes --rois 0", "--rois"), ("--dataset shapes --limit 4", "--batch"),
    ("--dataset shapes --long-side 1", "--long-side"), ("--dataset shapes --layers 3", "layers"),
    ("--dataset shapes --train-json a --train-images b", "shapes")])  # fmt: skip
def test_settings_of_detection_that_cannot_work_end_in_one_line(flags, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuses(lambda: train_det.main(flags.split()), word)
    assert not list(tmp_path.iterdir())


# ============ checkpoints, ours and others' ============


def published_shapes(layers=16, C=64, classes=19):
    """Names and shapes of the weights as the authors' code writes them, from the description of its modules."""
    shapes = {}

    def conv(name, c_in, c_out, k=1, groups=1, norm=True, bias=False):
        shapes[f"{name}.weight"] = (c_out, c_in // groups, k, k)
        for part in ("weight", "bias", "running_mean", "running_var") if norm else ():
            shapes[f"{name}.norm.{part}"] = (c_out,)
        if bias:
            shapes[f"{name}.bias"] = (c_out,)

    def node(name, c, up, down):
        for i, k in enumerate((3, 1, 3, 1)):
            conv(f"{name}.cell_ops._ops.0.op.{i}", c, c, k, groups=c if k == 3 else 1, norm=k == 1)
        if up:
            conv(f"{name}.res_up.1", c, c // 2)
        if down:
            conv(f"{name}.res_down.1", c, 2 * c)
        conv(f"{name}.gate_conv_beta.0", c, c // 2)
        conv(f"{name}.gate_conv_beta.2", c // 2, 1 + up + down, norm=False, bias=True)

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
    conv("sem_seg_head.predictor", C, classes, 3, norm=False, bias=True)
    return shapes


def published_file(path, classes=19, gates=True, head=True):
    """Random weights in the authors' format, optimiser state and NumPy numbers among them; returns the weights."""
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, shape in published_shapes(4, 8, classes).items():
        if (gates or "gate_conv" not in name) and (head or not name.startswith("sem_seg")):
            scale = (2 / math.prod(shape[1:])) ** 0.5 if len(shape) == 4 else 0.2
            weights[name] = scale * torch.randn(shape, generator=generator) + (1 if len(shape) == 1 else 0)
            weights[name] = weights[name].abs() if name.endswith("running_var") else weights[name]
            if name.endswith("norm.weight"):
                weights[name.replace("norm.weight", "norm.num_batches_tracked")] = torch.tensor(7)
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(2), "step": np.int64(3)}}, "lr": np.float64(0.05)}
    torch.save({"model": weights, "optimizer": optimizer, "iteration": np.int64(12), "seen": np.arange(3.0)}, path)
    return weights


def without_counters(weights):
    return {name: weight for name, weight in weights.items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize("layers", [16, 33])
def test_every_published_name_is_one_of_ours_and_the_reverse(layers):
    network = model.build_model("dr-raw", "segmentation", 19, layers=layers)
    ours = {name: tuple(weight.shape) for name, weight in without_counters(network.state_dict()).items()}
    theirs = published_shapes(layers)
    renamed = {model.from_published_name(name): shape for name, shape in theirs.items()}
    assert len(renamed) == len(theirs) and renamed == ours


def test_published_input_becomes_ours(tmp_path):
    weights = published_file(tmp_path / "f.pth")
    network, _ = model.load_published(tmp_path / "f.pth", "dr-raw", "cpu")
    rgb = torch.randint(0, 256, (2, 3, 33, 41), dtype=torch.uint8)
    mean = torch.tensor([103.530, 116.280, 123.675])[:, None, None]
    theirs = F.conv2d(rgb.flip(1).double() - mean, weights["backbone.stem.stem_1.weight"].double(), stride=2)
    torch.testing.assert_close(network.backbone.stem[0](data.normalize(rgb)).double(), theirs, atol=1e-3, rtol=1e-4)


def test_a_published_checkpoint_is_read_whole_and_evaluated(camvid):
    weights = published_file("camvid.pth", classes=11)
    network, about = model.load_published("camvid.pth", "dr-a", "cpu")
    assert (network.backbone.gate, network.backbone.width, about["iteration"]) == ("small", 8, 12)
    state = network.state_dict()
    for name, weight in without_counters(weights).items():
        if "stem_1.weight" not in name:
            assert torch.equal(weight, state[model.from_published_name(name)])
    command = ["camvid.pth", "--variant", "dr-a", "--data", "camvid", *QUIET]
    succeeds(evaluate.main, *command, "--dataset", "camvid")
    metrics = json.loads(Path("metrics.json").read_text())
    assert metrics["images"] == 12 and metrics["variant"] == "dr-a" and metrics["gflops"]["paper"]["mean"] > 0
    refuses(lambda: evaluate.main([str(word) for word in command]), "11 classes")
    refuses(lambda: evaluate.main(["metrics.json", "--variant", "dr-a"]), "metrics.json")
    for missing in ("gates", "head"):
        published_file("partial.pth", **{missing: False})
        refuses(lambda: model.load_published("partial.pth", "dr-a", "cpu"), "--init")


def test_initialize_says_what_fits(tmp_path):
    weights = published_file(tmp_path / "fix.pth", gates=False, head=False)
    network = model.build_model("dr-a", "segmentation", 11, layers=4, width=8)
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    report = model.initialize(network, tmp_path / "fix.pth")
    assert len(report.matched) == len(without_counters(weights)) and not report.left_over
    assert all(".gate." in name or name.startswith("head.") for name in report.missing)
    assert all(torch.equal(network.state_dict()[name], before[name]) for name in report.missing)
    assert f"{len(report.matched)} tensors matched, {len(report.missing)} missing (" in str(report)
    published_file(tmp_path / "other.pth", classes=19)  # the head's classifier differs, all else fits
    report = model.initialize(network, tmp_path / "other.pth")
    assert report.missing == report.left_over == ["head.predictor.weight", "head.predictor.bias"]


def test_a_detector_starts_from_a_segmenter_and_the_reverse(tmp_path):
    network = model.build_model("dr-a", "segmentation", 11, layers=4, width=8)
    model.save_checkpoint(tmp_path / "ours.pt", network, model_args={})
    detector = small_detector(layers=5, width=8)  # the backbone's first layers are the same
    report = model.initialize(detector, tmp_path / "ours.pt")
    cell, other = (n.backbone.layers[2][1].cell.body[0].weight for n in (detector, network))
    assert torch.equal(cell, other) and "rcnn.rpn.head.conv.0.0.weight" in report.missing
    model.save_checkpoint(tmp_path / "detector.pt", detector, model_args={})
    again = model.build_model("dr-a", "segmentation", 11, layers=4, width=8)
    model.initialize(again, tmp_path / "detector.pt")
    assert torch.equal(again.backbone.stem[3].weight, network.backbone.stem[3].weight)
    stem = "backbone.stem.stem_1.weight"
    for number, contents in enumerate(({"model": {stem: 3}}, {"weights": 5}, {"model": {stem: torch.zeros(2)}})):
        torch.save(contents, tmp_path / f"{number}.pth")
        refuses(lambda: model.initialize(network, tmp_path / f"{number}.pth"), f"{number}.pth")
        refuses(lambda: model.load_published(tmp_path / f"{number}.pth", "dr-a", "cpu"), f"{number}.pth")
    narrow = model.build_model("dr-a", "segmentation", 11, layers=4, width=4)
    refuses(lambda: model.initialize(narrow, tmp_path / "ours.pt"), "do not fit the network")


class RunsCode:
    """A pickle that would write a file when loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_checkpoints_go_round_and_other_files_are_refused(tmp_path):
    args = dict(variant="dr-a", task="segmentation", num_classes=3, layers=4, width=4, gate=None)
    network = model.build_model(**args).eval()
    model.save_checkpoint(tmp_path / "a.pt", network, model_args=args, classes=["x", "y", "z"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]  # no temporary file stays
    again, contents = model.load_checkpoint(tmp_path / "a.pt")
    images = torch.randn(1, 3, 50, 70)  # any size
    assert network(images).logits.shape == (1, 3, 50, 70)
    assert torch.equal(network(images).logits, again(images).logits) and contents["classes"] == ["x", "y", "z"]
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"weights": RunsCode(tmp_path / "ran"), "model_args": {}}, tmp_path / "code.pt")
    torch.save({"something": 1}, tmp_path / "other.pt")
    torch.save({"weights": {}, "model_args": args}, tmp_path / "unfit.pt")
    for name in ("text.pt", "code.pt", "other.pt", "empty.pt", "unfit.pt", "cut.pt", "missing.pt", "."):
        refuses(lambda: model.load_checkpoint(tmp_path / name), tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_leaves_the_file_before_it(tmp_path):
    script = """
import resource, torch, model
from pathlib import Path
network = torch.nn.Linear(100, 100)
model.save_checkpoint(Path("last.pt"), network, iteration=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    model.save_checkpoint(Path("last.pt"), network, iteration=2)
except model.InputError as error:
    print(error)
"""
    command = [sys.executable, "-c", script]
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    out = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    assert "last.pt: could not be written (File too large)" in out and len(out.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert model.read_file(tmp_path / "last.pt", "")["iteration"] == 1


# ============ evaluation ============


def test_miou_equals_cityscapesscripts_on_the_written_predictions(tmp_path, monkeypatch):
    """A Cityscapes tree, a network's predictions written by evaluate.py, and the official evaluation of them."""
    from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official

    names = ("aachen/aachen_000000_000019", "bonn/bonn_000000_000019")  # the official script takes them apart
    cityscapes_tree(tmp_path / "cs", "val", names, (64, 128), plate=0)
    monkeypatch.chdir(tmp_path)
    info = data.SEGMENTATION["cityscapes"]
    args = dict(variant="dr-raw", task="segmentation", num_classes=19, layers=4, width=4)
    torch.manual_seed(0)
    network = model.build_model(**args)
    network.head.predictor.weight.data.mul_(50)  # many classes get predicted
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.fill_(0.1)
    about = dict(task="segmentation", dataset="cityscapes", data="cs", data_options={}, config={"k": 2}, iteration=1)
    model.save_checkpoint(tmp_path / "last.pt", network, model_args=args, classes=list(info.classes),
                          palette=[list(c) for c in info.palette], bank={"clusters": None}, **about)  # fmt: skip
    succeeds(evaluate.main, "last.pt", "--predictions", "out", *QUIET)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    truths, predictions = (sorted(map(str, Path(where).rglob(what))) for where, what in
                           (("cs/gtFine", "*labelIds.png"), ("out", "*.png")))  # fmt: skip
    official.args.quiet, official.args.JSONOutput, official.args.evalInstLevelScore = True, False, False
    official.args.evalPixelAccuracy = False
    result = official.evaluateImgLists(predictions, truths, official.args)
    assert len(predictions) == 2 and len({value for value in metrics["iou"].values() if value}) > 3
    assert metrics["miou"] / 100 == pytest.approx(result["averageScoreClasses"], abs=1e-9)
    for name, value in metrics["iou"].items():
        theirs = result["classScores"][name]
        assert value is None if math.isnan(theirs) else value / 100 == pytest.approx(theirs, abs=1e-9)


def test_evaluation_knows_the_run_and_shows_pictures(trained, monkeypatch):
    monkeypatch.chdir(trained)
    folder = Path("runs/seg")
    out = succeeds(evaluate.main, folder / "last.pt", *QUIET)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["images"] == 12 and sum(metrics["images_per_expert"]) == 12 and metrics["variant"] == "divdr-a"
    for count in ("paper", "exact"):
        gflops = metrics["gflops"][count]
        assert 0 < gflops["min"] <= gflops["mean"] <= gflops["max"]
    assert "IoU % val" in out and "\nexpert" in out and "\npaper  " in out
    during = events(folder, "evaluation")[-1]["miou"]  # one process counts what two counted
    assert metrics["miou"] == pytest.approx(100 * during, abs=1e-6)
    out = succeeds(evaluate.main, folder / "last.pt", "--image", "camvid/val", "--figures", "drawn", *QUIET)
    assert len(re.findall(r"expert [01] of 2", out)) == len(list((folder / "overlays").glob("*.png.png"))) == 12
    assert np.array(Image.open(folder / "overlays" / "00.png.png")).shape == (64, 96, 3)
    written = Path("drawn/route-00.png.pdf").read_bytes()
    assert b"/FontFile2" in written and b"/Type3" not in written
    for flags, word in (("--dataset shapes", "--dataset shapes"), ("--json x", "--json"), ("--limit 0", "--limit")):
        refuses(lambda: evaluate.main([str(folder / "last.pt"), *flags.split(), "--device", "cpu"]), word)


def test_a_detector_is_evaluated_alike_by_one_and_by_two_processes(trained, monkeypatch):
    monkeypatch.chdir(trained)
    folder = Path("runs/det")
    two, detections = (json.loads((folder / f"{name}.json").read_text()) for name in ("metrics", "detections"))
    out = succeeds(evaluate.main, folder / "last.pt", *QUIET)
    one, others = (json.loads((folder / f"{name}.json").read_text()) for name in ("metrics", "detections"))
    assert one["images"] == 5 and out.count("Average Precision") == 12
    assert list(one["gflops"]) == ["paper", "exact", "paper at 800x800"] and set(one["box"]) == set(one["mask"])
    for key in ("gflops", "images_per_expert"):
        assert one[key] == two[key]
    best = {}
    for found in (detections, others):  # rounding may let a weak box more or less through
        for result in found:
            key = (result["image_id"], found is others)
            best[key] = max(best.get(key, 0), result["score"])
    for image in {image for image, _ in best}:
        assert best[image, True] == pytest.approx(best[image, False], abs=1e-4)
    dataset = data.detection_dataset("coco", "coco", "val", train=False)
    scores, _ = evaluate.average_precision(dataset, others, "segm")
    assert one["mask"]["AP"] == pytest.approx(100 * scores["AP"]) and {d["category_id"] for d in others} <= {3, 7}


def test_detections_are_drawn_on_pictures(trained, monkeypatch):
    monkeypatch.chdir(trained)
    picture = "coco/val2017/000000000001.jpg"
    command = ["runs/det/last.pt", *map(str, QUIET)]
    out = succeeds(evaluate.main, *command, "--image", picture, "--min-score", 0.0, "--out", "boxes")
    assert "expert" in out and "GFLOPs" in out
    drawn = np.array(Image.open("boxes/000000000001.jpg.png"))
    assert drawn.shape == (80, 60, 3) and (drawn != np.array(Image.open(picture))).any()
    contents = json.loads(Path("coco/annotations/instances_val2017.json").read_text())
    for annotation in contents["annotations"]:
        del annotation["segmentation"]
    Path("boxes.json").write_text(json.dumps(contents))
    refuses(lambda: evaluate.main([*command, "--json", "boxes.json"]), "boxes.json", "--masks")
    refuses(lambda: evaluate.main([*command, "--predictions", "x"]), "--predictions")
    figures = {}
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, folder, name: figures.update({name: figure}))
    succeeds(evaluate.main, *command, "--limit", 1, "--figures", "drawn", "--min-score", 0)
    assert all(figures[f"{name}-det"] for name in ("routes", "experts", "training", "predictions"))
    image, truth, found = (np.array(ax.images[0].get_array()) for ax in figures["predictions-det"].axes)
    dataset = data.detection_dataset("coco", "coco", "val", train=False, masks=True)
    assert (image == dataset[0][0].permute(1, 2, 0).numpy()).all() and found.shape == image.shape
    inside = dataset[0][1]["masks"].bool().any(0).numpy()
    assert (truth != image).any(-1)[inside].mean() > 0.9


def made_up_run(name, miou, seed=0, variant="divdr-a", images=6, k=3, **config):
    """What evaluate.py knows of a run after a split, without the run."""
    network = model.build_model(variant, "segmentation", 2, layers=4, width=8)
    grid, generator = evaluate.grid_of(network), torch.Generator().manual_seed(seed)
    exists = torch.tensor([node.exists for node in network.backbone.all_nodes()[1:]]).flatten()
    centers = torch.rand(k, len(exists), generator=generator) * exists
    A = centers[torch.arange(images) % (k - 1)]  # the last cluster is empty
    A = (A + 0.01 * torch.rand(A.shape, generator=generator)) * exists
    cost = {"paper": torch.arange(images) * 1_000_000 + seed * 10_000_000 + 50_000_000}
    metrics = {"dataset": "shapes", "split": "val", "images": images, "miou": miou}
    metrics["gflops"] = {"paper": evaluate.spread(cost["paper"])}
    metrics |= evaluate.describe_experts(A, cost["paper"], centers, kmeans.assign(A, centers)[0])
    config = {"seed": seed, "k": k, "margin": 5.0, "lambda2": model.VARIANTS[variant].lambda2, "iters": 10} | config
    checkpoint = {"path": Path(f"runs/{name}/last.pt"), "task": "segmentation", "iteration": 10, "config": config,
                  "model_args": {"variant": variant, "width": 8}}  # fmt: skip
    result = evaluate.SplitResult(A, cost, (32, 32), {}, "")
    clusters = kmeans.Clusters(centers, torch.zeros(images), 0.1, [])
    return evaluate.RunResult(name, checkpoint, result, grid, clusters, metrics)


def test_seeds_of_one_configuration_are_one_row_with_mean_and_deviation():
    scores = {2: [61.0, 63.5, 60.0], 3: [64.0]}
    runs = [made_up_run(f"k{k}-{s}", score, s, k=k) for k in scores for s, score in enumerate(scores[k])]
    runs.append(made_up_run("dr", 58.25, variant="dr-a"))
    header, *rows = evaluate.make_table(runs, published=True)
    assert header == ["Method", "Backbone", "K", "mIoU val", "GFLOPs", "Inter", "Intra", "Seeds"]
    dr, two, three, *paper = rows
    gflops = [run.flops.double().mean().item() / 1e9 for run in runs[:3]]
    assert two[:3] == ["DivDR-A", "Layer4, width 8", "2"]
    for cell, values, places in ((two[3], scores[2], 2), (two[4], gflops, 4)):
        assert cell == f"{np.mean(values):.{places}f} ± {np.std(values, ddof=1):.{places}f}"
    assert (two[-1], dr[0], dr[3], three[2], three[3], three[-1]) == ("3", "DR-A", "58.25", "3", "64.00", "1")
    row = ["DivDR-A (DivDR Table 1)", "Layer16", "–", "73.5 ± 0.4", "57.7 ± 3.9", "–", "–", "–"]
    assert row in paper and all(len(row) == len(header) for row in paper)
    latex = evaluate.render([header, *rows], "latex").splitlines()
    assert latex[0] == r"\begin{tabular}{llrrrrrr}" and r"61.50 $\pm$ 1.80" in latex[5] and latex[5].endswith(r"\\")
    markdown = evaluate.render([header, *rows], "markdown").splitlines()
    assert set(markdown[1]) == set("|-: ") and len({len(line) for line in markdown}) == 1
    (label, along), = evaluate.find_sweep(runs, "k")
    assert [setting.config["k"] for setting in along] == [2, 3] and label == "DivDR-A"
    ax = evaluate.draw_ablations(runs).axes[0]
    assert ax.lines[0].get_ydata().tolist() == [np.mean(scores[2]), 64.0]
    points = [line for line in evaluate.draw_trade_off(runs, True).axes[0].lines if line.get_label()[0] != "_"]
    assert [line.get_markerfacecolor() == "white" for line in points] == [False] * 3 + [True] * 27
    assert points[1].get_xdata()[0] == pytest.approx(np.mean(gflops))


def test_the_published_rows_are_all_there():
    rows = list(csv.DictReader((HERE / "assets" / "published.csv").open()))
    count = {source: sum(row["source"] == source for row in rows) for source in {row["source"] for row in rows}}
    tables = {"DivDR Table 1": 13, "DivDR Table 2": 4, "DivDR Table 3": 8, "DivDR Table 4": 7, "DivDR Table 5": 7}
    assert count == tables | {"DR paper": 7, "DR repository": 7}
    for row in rows:
        assert 30 < float(row["score"]) < 85 and 15 < float(row["gflops"]) < 2100 and row["measure"] in (
            "mIoU", "box AP", "mask AP")  # fmt: skip


def test_routes_are_as_wide_as_alpha_and_stand_where_the_nodes_are():
    run, reference = made_up_run("divdr", 60.0), made_up_run("dr", 58.0, seed=1, variant="dr-a")
    assert run.metrics["images_per_expert"] == [3, 3, 0]
    run.clusters.centers[0, 4] = 0.0  # keep of the second node of the first layer is closed
    figure = evaluate.draw_routes(run, [run, reference], None)
    left = figure.axes[::2]
    titles = [ax.get_title() for ax in left]
    assert [title.split(":")[0] for title in titles[:4]] == ["expert 0", "expert 1", "expert 2", "all 6 images"]
    assert "no image" in titles[2] and titles[4].startswith("Dynamic Routing")
    for ax, values in zip(left, [*run.clusters.centers, run.result.A.mean(0), reference.result.A.mean(0)]):
        lines = next(c for c in ax.collections if c.get_label() == "more")
        drawn = {tuple(map(tuple, ends)): w for ends, w in zip(lines.get_segments(), lines.get_linewidths())}
        expected = {}
        for n, (layer, scale, _) in enumerate(run.grid):
            for path, alpha in enumerate(values[3 * n : 3 * n + 3].tolist()):
                if alpha > 1e-4:
                    expected[(layer, scale), (layer + 1, scale + path - 1)] = 0.5 + 3.5 * alpha
        assert drawn == pytest.approx(expected)
        nodes = next(c for c in ax.collections if c.get_label() == "nodes")
        assert nodes.get_offsets().tolist() == [[layer, scale] for layer, scale, _ in run.grid]
    ours, theirs = (next(c for c in figure.axes[1].collections if c.get_label() == name) for name in ("more", "less"))
    difference = run.clusters.centers[0] - run.clusters.centers[1:].mean(0)
    drawn = (len(ours.get_segments()), len(theirs.get_segments()))
    assert drawn == ((difference > 0.02).sum(), (difference < -0.02).sum())


def test_points_in_the_plane_are_the_images_and_the_centres(monkeypatch):
    run = made_up_run("one", 60.0, images=1)  # too few for t-SNE
    assert "PCA" in evaluate.draw_activation_space([run]).get_supxlabel()
    run = made_up_run("many", 60.0, images=24)
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)  # as where scikit-learn is not installed
    figure = evaluate.draw_activation_space([run, made_up_run("other", 60.0, seed=1, images=24)])
    assert "PCA" in figure.get_supxlabel() and len(figure.axes) == 3
    x = torch.cat([run.result.A, run.clusters.centers]).double()
    placed, how = evaluate.embed(x)
    values, vectors = np.linalg.eigh(np.cov(x.numpy().T))
    by_hand = (x - x.mean(0)).numpy() @ vectors[:, [-1, -2]]
    np.testing.assert_allclose(np.abs(placed.numpy()), np.abs(by_hand), atol=1e-9)
    assert f"{100 * values[-2:].sum() / values.sum():.0f} %" in how
    monkeypatch.setattr(evaluate, "EMBEDDED", 20)
    assert "20 of 48 images" in evaluate.draw_activation_space([run, run]).get_supxlabel()


def test_tables_and_figures_come_from_what_is_kept_beside_the_checkpoint(trained, monkeypatch):
    monkeypatch.chdir(trained)
    passes, figures, original = [], {}, evaluate.evaluate_segmentation
    monkeypatch.setattr(evaluate, "evaluate_segmentation", lambda *args: passes.append(1) or original(*args))
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, folder, name: figures.update({name: figure}))
    Path("runs/seg/last.val.activations").unlink(missing_ok=True)

    def count(*arguments):
        passes.clear()
        out = succeeds(evaluate.main, *arguments, *QUIET)
        return len(passes), out

    checkpoint, copied = Path("runs/seg/last.pt"), Path("runs/copy/last.pt")
    assert count(checkpoint)[0] == count(checkpoint)[0] == 1  # alone: always anew
    assert count(checkpoint, "--figures", "drawn")[0] == 0
    names = {f"{name}-seg" for name in ("routes", "experts", "training", "predictions")}
    assert {name for name, figure in figures.items() if figure} == names | {"activations", "trade-off"}
    assert count(checkpoint, "--format", "markdown", "--split", "train")[0] == 1
    assert count(checkpoint, "--format", "markdown", "--split", "train")[0] == 0
    assert count(checkpoint, "--format", "markdown", "--data", str(trained / "camvid"))[0] == 1  # other flags
    shutil.copytree(checkpoint.parent, copied.parent)
    contents = torch.load(checkpoint, weights_only=True)
    time.sleep(0.01)
    torch.save(contents | {"iteration": 11}, copied)  # newer than what is kept
    passed, out = count(checkpoint, copied)
    assert passed == 2 and "± 0.00" in out and out.splitlines()[1].endswith("2") and "iteration 11 of 12" in out
    copied.with_name("log.jsonl").write_text("{}\n{}\n")
    refuses(lambda: evaluate.main([str(copied), "--figures", "drawn", *map(str, QUIET)]), "log.jsonl")
    refuses(lambda: evaluate.main([str(checkpoint), str(copied), "--image", "camvid/val"]), "--image")
    with torch.no_grad():  # the nearest images, by hand
        network, contents = model.load_checkpoint(checkpoint)
        dataset = data.segmentation_dataset("camvid", "camvid", "val", train=False)
        A = torch.cat([network(data.normalize(dataset[i][0][None])).A for i in range(12)])
    distances, labels = torch.cdist(A, contents["bank"]["clusters"]["centers"]).min(1)
    axes = figures["experts-seg"].axes
    for k in range(2):
        nearest = distances[labels == k].sort().values[:5]
        shown = [ax.get_xlabel().split()[-1] for ax in axes[5 * k : 5 * k + 5] if ax.get_xlabel()]
        assert [float(word) for word in shown] == pytest.approx(nearest.tolist(), abs=0.0051)
    ticks = [line for line in figures["training-seg"].axes[0].lines if line.get_marker() == "|"]
    assert list(ticks[0].get_xdata()) == [3, 6, 9, 12]
    truth = np.array(figures["predictions-seg"].axes[1].images[0].get_array())
    assert (truth[:4] == 200).all() and truth.shape == (64, 96, 3)


# ============ resuming ============

SHORT = "--dataset shapes --size 32 --subsets 2 --width 4 --iters 16 --bn-batches 2 --kmeans-every 3 --log-every 4"
SHORT += " --eval-every 8 --save-every 1 --batch 4 --device cpu --workers 1"
SHORT_SEG = SHORT + " --layers 4 --metric task --own bank --bank-momentum 0.5 --jitter --lambda2-start 0.3"
SHORT_DET = SHORT + " --layers 5 --pyramid 8 --short-sides 32 48 --long-side 64 --proposals 20 --rois 8 --limit 30"
SHORT_DET += " --masks --activations recompute"


def what_came_out(folder):
    """Weights, centres, bank, momentum and log of a run."""
    saved = model.read_file(folder / "last.pt", "")
    bank = saved["bank"]
    tensors = saved["weights"] | {"centers": bank["clusters"]["centers"], "bank": bank["values"]}
    tensors |= {f"momentum {i}": state["momentum_buffer"] for i, state in saved["optimizer"]["state"].items()}
    return tensors, events(folder), (saved["iteration"], bank["clusters"]["sigma2"], saved["best"])


def same_outcome(one, other):
    (tensors, log, rest), (others, other_log, other_rest) = what_came_out(one), what_came_out(other)
    assert tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert log == other_log and rest == other_rest


@pytest.mark.parametrize("script, flags", [("train_seg", SHORT_SEG), ("train_det", SHORT_DET)])
def test_a_run_killed_at_any_moment_and_resumed_ends_as_the_one_that_nothing_stopped(
    script, flags, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    main, rng = {"train_seg": train_seg.main, "train_det": train_det.main}[script], np.random.default_rng()
    command, saved = [*flags.split(), "--resume", "auto"], tmp_path / "runs/parts/last.pt"
    for how in (signal.SIGKILL, signal.SIGTERM)[: 2 if script == "train_seg" else 1]:
        process = subprocess.Popen(
            [sys.executable, HERE / f"{script}.py", *command, "--name", "parts"], stderr=subprocess.DEVNULL)
        before = saved.stat().st_mtime_ns if saved.exists() else 0
        while process.poll() is None and (not saved.exists() or saved.stat().st_mtime_ns == before):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))  # in a step, in K-means, in an evaluation, while saving
        assert process.poll() is None, "the run was over before it was killed"
        process.send_signal(how)
        assert process.wait(timeout=60) == -how
    succeeds(main, *command, "--name", "parts")
    succeeds(main, *command, "--name", "whole")
    same_outcome(tmp_path / "runs/whole", tmp_path / "runs/parts")


def test_a_run_is_neither_overwritten_nor_resumed_as_another(camvid):
    command = [*map(str, TINY_SEG), "--iters", "4", "--name", "run"]
    succeeds(train_seg.main, *command)
    for flags, words in (("", ["holds a run already", "--resume"]), ("--resume --lr 0.3", ["--lr 0.3", "0.05"]),
                         ("--resume --name none", ["no run to go on with"])):  # fmt: skip
        refuses(lambda: train_seg.main([*command, *flags.split()]), *words)
    before = Path("runs/run/last.pt").read_bytes()
    succeeds(train_seg.main, *command, "--resume")  # nothing left to do
    (camvid / "camvid/train/00.png").unlink()
    (camvid / "camvid/trainannot/00.png").unlink()
    refuses(lambda: train_seg.main([*command, "--resume"]), "--resume", "other data")
    assert Path("runs/run/last.pt").read_bytes() == before
    Path("runs/run/last.pt").write_bytes(b"nothing")
    refuses(lambda: train_seg.main([*command, "--resume", "auto"]), "runs/run/last.pt")
