"""The tests of the ten files: `python -m pytest -q` runs them and those of extras/.

In the order of the paper: routes, cost, losses, K-means, alternation, data, detection, checkpoints,
evaluation, resuming. Each part opens with its oracle: the same thing written out plainly, which the code has
to equal.
"""

import atexit
import contextlib
import copy
import csv
import functools
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import unicodedata
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
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
from extras import shapes

HERE = Path(__file__).resolve().parent
# The folder of camvid/ and coco-mini/, where there are.
REAL = Path(os.environ.get("REAL_DATA", HERE.parent / "shared" / "data"))
os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors: more threads only wait for each other
torch.set_num_threads(1)
CPU = model.Process(0, 1, torch.device("cpu"))
# Of pycocotools with NumPy 2, and of what `write_coco` writes.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ impl", "ignore:.*none of these is learned from")
# Painting takes time: where nothing else is said, shapes are few here.
shapes.ShapesDataset.__init__ = functools.partialmethod(shapes.ShapesDataset.__init__, n_train=60, n_val=20)
# Other processes start as copies of one that has read this file, and finds it by this path.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["test_smoke"])
os.environ["PYTHONPATH"] = f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"


def run(main, *arguments):
    """Runs a script's `main`. A string may be several words of the command, other arguments are one each."""
    words = []
    for argument in arguments:
        words += argument.split() if isinstance(argument, str) else [str(argument)]
    main(words)


def succeeds(main, *arguments) -> str:
    """What a command that ends well prints."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        run(main, *arguments)
    return out.getvalue() + error.getvalue()


def refuses(action, *words):
    """Checks that an action ends in one line that has these words, a command also with exit status 2."""
    message, error = "", io.StringIO()
    try:
        with contextlib.redirect_stderr(error):
            action()
    except ValueError as stopped:
        message = str(stopped)
    except SystemExit as stopped:
        assert stopped.code == 2
        message = error.getvalue().strip()
    assert message and "\n" not in message and all(str(word) in message for word in words), message


def read_json(path):
    return json.loads(Path(path).read_text())


def events(folder, kind=None):
    """The log of a run, all but the speed."""
    found = []
    for line in (folder / "log.jsonl").read_text().splitlines():
        event = json.loads(line)
        event.pop("images_per_second", None)
        if kind in (None, event["event"]):
            found.append(event)
    return found


def iterations(folder, kind):
    """When events of a kind were logged."""
    return [event["iteration"] for event in events(folder, kind)]


def parts_of(network, *kinds):
    return [module for module in network.modules() if isinstance(module, kinds)]


# ============ data and runs that several tests look at ============


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_camvid(root="camvid", count=12, size=(64, 96)):
    """A CamVid tree in which class 3 is dark and class 5 bright; the top of the label map is void."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for folder in (split, f"{split}annot"):
            os.makedirs(f"{root}/{folder}")
        for i in range(count):
            label = np.full(size, 3, np.uint8)
            label[:, rng.integers(20, 70) :] = 5
            image = np.where(label == 3, 40, 200)[..., None] + rng.integers(-20, 20, (*size, 3))
            label[:4] = 11
            Image.fromarray(image.astype(np.uint8)).save(f"{root}/{split}/{i:02d}.png")
            Image.fromarray(label).save(f"{root}/{split}annot/{i:02d}.png")


def write_coco(split="train", sizes=((60, 80), (80, 60), (64, 64), (60, 80), (50, 90)), seed=0):
    """A COCO 2017 tree in coco/: bright boxes of category 7 and dark ones of category 3 on grey. Image 0 has
    a box without width, image 3 a crowd and nothing else, image 4 no annotation at all. Returns the json."""
    rng, images, annotations = np.random.default_rng(seed), [], []
    for folder in (f"{split}2017", "annotations"):
        os.makedirs(f"coco/{folder}", exist_ok=True)
    for i, (height, width) in enumerate(sizes):
        picture = np.full((height, width, 3), 120, np.uint8)
        objects = []  # category, box, segmentation
        for _ in range(3 * (i not in (3, 4))):
            x, y = rng.integers(0, (width - 30, height - 30)).tolist()
            w, h = rng.integers(12, 30, 2).tolist()
            category, brightness = ((3, 20), (7, 230))[rng.integers(2)]
            picture[y : y + h, x : x + w] = brightness
            objects.append((category, [x, y, w, h], [[x, y, x + w, y, x + w, y + h, x, y + h]]))
        if i == 0:
            objects.append((3, [5, 5, 0, 9], [[5, 5, 5, 14, 5, 9]]))
        if i == 3:
            counts = [width * 10, height * 5, (width - 5) * height - width * 10]
            objects.append((7, [8, 0, 9, height], dict(size=[height, width], counts=counts)))
        for category, box, segmentation in objects:
            annotations.append(dict(
                id=len(annotations) + 1, image_id=100 + 7 * i, category_id=category, bbox=box,
                area=box[2] * box[3], segmentation=segmentation, iscrowd=int(i == 3)))
        images.append(dict(id=100 + 7 * i, file_name=f"{i:012d}.jpg", width=width, height=height))
        Image.fromarray(picture).save(f"coco/{split}2017/{i:012d}.jpg", quality=95)
    categories = [dict(id=7, name="bright"), dict(id=3, name="dark")]
    contents = dict(images=images, annotations=annotations, categories=categories)
    Path(f"coco/annotations/instances_{split}2017.json").write_text(json.dumps(contents))
    return contents


def write_both_splits_of_coco():
    """11 training images, 9 of them with objects, and 5 in val."""
    write_coco("train", sizes=((60, 80),) * 3 + ((80, 60), (64, 64)) * 4)
    write_coco("val", seed=1)


QUIET = "--workers 0 --device cpu"
TINY = f"{QUIET} --layers 4 --width 4 --batch 4 --warmup 2 --bn-batches 2 --k 2 --kmeans-every 3"
TINY_SEG = f"{TINY} --dataset camvid --data camvid --crop 64 --short-sides 64 80"
TINY_DET = f"{TINY} --pyramid 16 --short-sides 64 --long-side 128 --anchor 8 --proposals 40 --rois 16"


def spawn(work, *arguments):
    """Runs work(rank, *arguments) in two processes that know each other as torchrun's do."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    arguments = (port, os.getcwd(), work, *arguments)
    torch.multiprocessing.start_processes(on_rank, arguments, nprocs=2, start_method="forkserver")


def on_rank(rank, port, folder, work, *arguments):
    os.chdir(folder)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2", TORCHELASTIC_RUN_ID="of a test")
    work(rank, *arguments)


def train_and_evaluate_both(rank):
    warnings.filterwarnings("error", "Grad strides")  # gradients that are not laid out as weights are
    flags = "--variant divdr-a --iters 12 --eval-every 6 --log-every 2 --name"
    for main, command in [
        (train_seg.main, f"{TINY_SEG} {flags} seg"),
        (train_det.main, f"{TINY_DET} --data coco --masks {flags} det"),
        (evaluate.main, f"runs/det/last.pt {QUIET}"),
    ]:
        run(main, command)
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)  # the old one may still be open


@functools.cache
def run_once():
    """A folder with camvid/, coco/, and what two processes trained: runs/seg and, evaluated too, runs/det."""
    folder, before = Path(tempfile.mkdtemp()), os.getcwd()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.chdir(folder)
    write_camvid()
    write_both_splits_of_coco()
    spawn(train_and_evaluate_both)
    os.chdir(before)
    return folder


@pytest.fixture
def trained():
    return run_once()


# ============ routes ============


def reference_routes(backbone, image, alphas):
    """One image through the rules of routing, node by node in plain Python: features, gates that ran, cells
    that ran. `alphas[row]` are (up, keep, down) of node `row`, the init node first."""
    arrived, gates, cells, row = {0: backbone.stem(image)}, set(), set(), -1
    for layer in [[backbone.init], *backbone.layers]:
        following = {}
        for s, node in enumerate(layer):
            row += 1
            if s not in arrived:
                continue
            gates.add(row)
            x = arrived[s]
            up, keep, down = alphas[row].tolist()
            up, down = up * (node.up is not None), down * (node.down is not None)
            if up + keep + down < 1e-4:
                following[s] = following.get(s, 0) + x
                continue
            if max(up, keep, down) > 1e-4:
                cells.add(row)
            h = torch.relu(node.cell.body(x) + x)
            following[s] = following.get(s, 0) + keep * (keep > 1e-4) * h
            if node.up is not None:
                larger = F.interpolate(node.up(h), scale_factor=2, mode="bilinear", align_corners=False)
                following[s - 1] = following.get(s - 1, 0) + up * (up > 1e-4) * larger
            if node.down is not None:
                smaller = node.down(h[..., ::2, ::2])
                following[s + 1] = following.get(s + 1, 0) + down * (down > 1e-4) * smaller
        arrived = following
    return arrived, gates, cells


def random_alphas(batch, nodes, seed):
    """Mixed routes: about half the paths closed, a quarter of the nodes closed altogether."""
    generator = torch.Generator().manual_seed(seed)
    alpha = torch.rand(batch, 1 + nodes, 3, generator=generator)
    alpha = alpha * (torch.rand(alpha.shape, generator=generator) < 0.5)
    return alpha * (torch.rand(batch, 1 + nodes, 1, generator=generator) < 0.75)


def warmed_backbone(layers=6, gate="full"):
    """A backbone in float64, where any difference is one of the rules. Its batch norms have seen data."""
    torch.manual_seed(0)
    backbone = routing.RoutedBackbone(layers, 8, gate)
    for _ in range(3):
        backbone(torch.randn(4, 3, 64, 128))
    return backbone.double().eval()


@torch.no_grad()
def let_gates_decide(network):
    """Gates whose decision depends on the image: about half the paths get closed."""
    for gate in parts_of(network, routing.Gate):
        gate.decide.weight.mul_(3)
        gate.decide.bias.normal_()


def test_the_networks_have_the_published_parameters_nodes_and_gates():
    network = model.build_model("dr-raw", "segmentation", 19)
    detector = model.build_model("divdr-a", "detection", 80)
    parts = [network.backbone, network.head, routing.RoutedBackbone(33)]
    assert [sum(map(torch.numel, part.parameters())) for part in parts] == [17_596_853, 188_115, 38_683_551]
    assert (network.backbone.num_nodes, network.dim) == (61, 183)
    assert (detector.backbone.num_nodes, detector.dim, detector.stride) == (66, 198, 64)
    assert sum(gate.decide.out_channels for gate in parts_of(network.backbone.layers, routing.Gate)) == 147
    maps = detector.pyramid.eval()(torch.zeros(1, 3, 64, 128))[0].values()
    assert [tuple(y.shape[1:]) for y in maps] == [(256, 16 // 2**s, 32 // 2**s) for s in range(5)]
    assert detector.rcnn.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert detector.rcnn.roi_heads.box_roi_pool.canonical_scale == 224


@torch.no_grad()
def test_A_lists_up_keep_down_of_existing_paths_and_gates_start_open():
    backbone = routing.RoutedBackbone(4, 4).eval()
    for gate in parts_of(backbone, routing.Gate):
        bias = gate.decide.bias
        assert (bias == 1.5).all()
        gate.decide.weight.zero_()
        bias.copy_(torch.tensor([0.1, 0.2, 0.3])[: len(bias)])  # of keep, up, down, as published
    entries = backbone(torch.rand(2, 3, 64, 64))[1][0].view(-1, 3).atanh()
    assert entries[0].tolist() == pytest.approx([0, 0.1, 0.2])  # scale 0: no up
    assert entries[4].tolist() == pytest.approx([0.2, 0.1, 0.3])  # layer 1, scale 2 of 3: all
    assert entries[-1].tolist() == pytest.approx([0, 0.1, 0])  # last layer: keep only


@pytest.mark.parametrize("gate", ["full", "small"])
@torch.no_grad()
def test_skipped_masked_and_plainly_written_routes_agree(gate):
    backbone = warmed_backbone(gate=gate)
    images, alphas = torch.randn(6, 3, 64, 128).double(), random_alphas(6, backbone.num_nodes, 1).double()
    alphas[0] = 0  # every gate closed: the stem's output arrives unchanged
    alphas[1, 0] = torch.tensor([0.0, 0.5, 0.0])  # init keeps only: zeros are delivered below
    alphas[2, 0] = 0  # init closed: nothing is delivered below it
    alphas[3] = 0.7
    alphas[4, 5] = 5e-5  # a node that is not closed (the sum) and has no open path
    let_gates_decide(backbone)
    for forced in (alphas, None):
        skipped, routes = backbone.route(images, skip=True, alpha=forced)
        masked, masked_routes = backbone.route(images, skip=False, alpha=forced)
        assert torch.equal(routes.reached, masked_routes.reached)
        torch.testing.assert_close(routes.alpha, masked_routes.alpha, atol=1e-10, rtol=0)
        costs, real = backbone.costs(64, 128, "exact"), backbone.real_cost(routes, 64, 128, "exact")
        for i, image in enumerate(images):
            expected, gates, cells = reference_routes(backbone, image[None], routes.alpha[i])
            for s, (a, b) in enumerate(zip(skipped, masked)):
                want = expected.get(s, torch.zeros_like(a[:1]))[0]
                torch.testing.assert_close(a[i], want, atol=1e-10, rtol=1e-10)
                torch.testing.assert_close(b[i], want, atol=1e-10, rtol=1e-10)
            assert set(routes.reached[i].nonzero().flatten().tolist()) == gates
            assert real["gates"][i] == costs.gate[list(gates)].sum()
            assert real["cells"][i] == costs.cell[list(cells)].sum()
    assert 0.1 < (routes.A > 0).float().mean() < 0.75 and (routes.A.std(0) > 0).any()  # routes differ


@torch.no_grad()
def test_folding_batch_norm_and_the_published_way_of_computing_change_nothing():
    torch.manual_seed(0)
    network = model.build_model("divdr-a", "segmentation", 5, layers=5, width=8)
    images = torch.randn(3, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    for _ in range(20):  # batch norms that have seen data
        network.train()(images)
    folded = routing.fuse(copy.deepcopy(network).eval())
    assert not parts_of(folded, torch.nn.BatchNorm2d)
    published = copy.deepcopy(network).eval().to(memory_format=torch.contiguous_format)
    network.eval()
    forced = random_alphas(1, network.backbone.num_nodes, 4)
    alpha = network.backbone.route(images[:1], alpha=forced)[1].alpha  # 0 in nodes that nothing reaches
    for skip in (True, False):
        want, got = network.eval()(images, skip), folded(images, skip)
        for a, b in zip(got[:3], want[:3]):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())
        other = flops.run_as_published(published, images)
        torch.testing.assert_close(other, want.logits, rtol=1e-4, atol=1e-4)
        got = folded.head(folded.backbone.route(images, skip, alpha)[0])
        other = flops.run_as_published(published, images, alpha)
        torch.testing.assert_close(other, got, rtol=1e-4, atol=1e-4)


def pretend_gpu(network):
    """Puts a network on a GPU that is not there. To be called, and the network used, in FakeTensorMode."""
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            there = torch.empty_strided(weight.shape, weight.stride(), device="cuda")
            module._parameters[name] = torch.nn.Parameter(there)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
    return network


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_a_step_on_a_gpu_mixes_no_devices_and_reads_no_number(task):
    """Tensors without contents know devices and types, and raise where a number is read off them. What a GPU
    waits for beyond that, such as copies from the host, only a GPU shows."""
    network = model.build_model("divdr-a", task, 3, layers=5, width=8)
    total, cuda = network.backbone.costs(64, 128).full, torch.device("cuda")
    types = []
    for node in network.backbone.all_nodes():
        node.cell.register_forward_pre_hook(lambda cell, inputs: types.append(inputs[0].dtype))
    with FakeTensorMode(allow_non_fake_inputs=True):
        pretend_gpu(network)
        images, index = torch.empty(4, 3, 64, 128, dtype=torch.uint8), torch.empty(4, dtype=torch.int64)
        bank = kmeans.ActivationBank(9, network.dim, cuda, age=7)
        centers, labels = torch.empty(2, network.dim, device=cuda), torch.empty(9, device=cuda).long()
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", True)  # torch.autocast asks whether there is a GPU
        try:
            if task == "segmentation":
                out = network(data.normalize(images.to(cuda)))
                assert out.logits.dtype == torch.float32
            else:  # torchvision's own parts around it draw sizes and choose regions, and wait
                maps, routes = network.pyramid(data.as_float(images.to(cuda)))
                cost = network.backbone.expected_cost(routes, 64, 128)
                out = model.DetectionOutput({}, [], routes.A, cost, routes, [], (64, 128))
                assert {y.dtype for y in maps.values()} == {torch.bfloat16}
        finally:
            torch.set_autocast_enabled("cuda", False)
        assert types == [torch.bfloat16] * len(types) and len(types) == len(network.backbone.all_nodes())
        clusters = kmeans.Clusters(centers, labels, 0.5, [], metric=torch.empty(network.dim, 9, device=cuda))
        for own in (clusters.labels[index.to(cuda)], clusters.nearest(out.A)[0], None):
            loss = losses.clustering_loss(out.A, centers, 0.5, 5.0, own)
        loss = loss + losses.cost_loss(out.cost, total, 0.1)
        if task == "segmentation":
            masks = torch.zeros(4, 64, 128, dtype=torch.int64, device=cuda)
            loss = loss + train_seg.segmentation_loss(out.logits, masks, 1)
        bank.update(index, out.A)
        assert {loss.device.type, out.A.device.type, bank.values.device.type} == {"cuda"}
        with pytest.raises(DataDependentOutputException):  # as anything that waits would
            loss.item()


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
            total += (not last) * c * h * w
            total += up * (c * h * w + conv(c, c // 2, h, w) + norm_relu(c // 2, h, w))
            total += down * (c * h * w + conv(c, 2 * c, h // 2, w // 2) + norm_relu(2 * c, h // 2, w // 2))
            if small:
                h, w = h // 4, w // 4
            total += conv(c, c // 2, h, w) + 4 * (c // 2) * h * w + c // 2 * (1 + up + down)
    if classes:
        total += conv(C, classes, H, H, 3)
        for s in range(4):
            c, h, out = C * 2**s, H // 2**s, C * 2 ** max(s - 1, 0)
            total += conv(c, out, h, h) + norm_relu(out, h, h)
    return total


@pytest.mark.parametrize("layers, scales, classes, height, width, full, small", [
    (16, 4, 19, 1024, 2048, 118.085, 102.270), (16, 4, 19, 768, 768, 33.607, 29.159),
    (33, 4, 19, 1024, 2048, 244.622, None), (17, 5, None, 800, 800, 38.336, 33.110)])
def test_everything_open_costs_what_is_published(layers, scales, classes, height, width, full, small):
    for gate, published in (("full", full), ("small", small)):
        ours = flops.open_cost(layers, scales, classes, height, width, gate)["paper"]
        nodes = routing.nodes_per_layer(layers, scales)
        assert ours == published_count(nodes, 64, height, width, classes, gate == "small")
        assert published in (None, round(ours / 1e9, 3))


def test_the_parts_and_the_budget_cost_what_is_published():
    network, small = (model.build_model("dr-raw", "segmentation", 19, gate=gate) for gate in ("full", None))
    millions = {}
    for part, cost in network.real_cost(network.backbone.open_routes(), 1024, 2048).items():
        millions[part] = round(cost.item() / 1e6, 3)
    assert millions == dict(stem=4194.304, cells=71189.922, paths=24425.005, gates=16869.507, head=1406.403)
    gates = small.real_cost(small.backbone.open_routes(), 1024, 2048)["gates"]
    assert round(gates.item() / 1e6, 3) == 1054.360
    assert round(network.head.cost(1024, 2048, 32, "exact") / 1e6, 3) == 2812.805
    assert round(network.backbone.costs(768, 768).full / 1e6, 1) == 26891.7


@pytest.mark.parametrize("gate", ["full", "small"])
@torch.no_grad()
def test_exact_convolutions_equal_torchs_flop_counter(gate):
    network = model.build_model("dr-a", "segmentation", 5, layers=5, width=8, gate=gate).eval()
    backbone = network.backbone
    alphas = random_alphas(8, backbone.num_nodes, 3)
    alphas[0], alphas[1] = 1, 0
    for alpha in alphas:  # padded from 90 x 120 to 96 x 128
        with FlopCounterMode(display=False) as counter:
            image = routing.pad_to_stride(torch.randn(1, 3, 90, 120), 32)
            features, routes = backbone.route(image, alpha=alpha[None])
            network.head(features)
        ours = sum(network.real_cost(routes, 90, 120, "conv").values()).item()
        assert counter.get_total_flops() == 2 * ours
    routes = backbone.route(torch.randn(8, 3, 64, 96), alpha=(alphas > 0).float())[1]
    real, expected = backbone.real_cost(routes, 64, 96), backbone.expected_cost(routes, 64, 96).double()
    torch.testing.assert_close(expected, (real["cells"] + real["paths"]).double(), rtol=1e-6, atol=0)
    assert expected[0].item() == pytest.approx(backbone.costs(64, 96).full, rel=1e-6)


def test_the_commands_of_flops_print_what_they_measured(monkeypatch):
    monkeypatch.setattr(flops, "PUBLISHED", flops.PUBLISHED[3:])
    assert len(re.findall(r"38\.336|33\.110", succeeds(flops.main))) == 2
    assert "the budget is a share" in succeeds(flops.main, "--variant divdr-a --size 64 64 --layers 4")
    out = succeeds(flops.main, "kmeans --n 400 --dim 8 --k 2 3 --iters 5 --runs 2")
    assert out.count("kmeans.py") >= 2 and "K = 3" in out
    small = "--size 64 64 --layers 4 --width 4 --runs 1 --device cpu"
    out = succeeds(flops.main, "speed", small, "--batch 1 2 --openness 0.5")
    differences = re.findall(r"difference (\S+)\n", out)
    assert len(differences) == 2 * 2 * 4 and max(map(float, differences)) < 1e-4
    fixed = succeeds(flops.main, "--route u-net --layers 4 --width 8 --size 64 64")
    assert "u-net" in fixed and re.search(r"gates +0\.000 +0\.000\n", fixed)
    assert "bfloat16" in succeeds(flops.main, "speed", small, "--batch 2 --train --amp")


# ============ fixed routes ============


@pytest.mark.parametrize("gate", ["full", "small"])
@torch.no_grad()
def test_outside_the_route_a_path_is_closed_and_so_is_a_node_left_without_one(gate):
    backbone, images = warmed_backbone(gate=gate), torch.randn(6, 3, 64, 128).double()
    let_gates_decide(backbone)
    route = random_alphas(1, backbone.num_nodes, 2)[0] > 0
    route &= torch.tensor([node.exists() for node in backbone.all_nodes()])
    route[0] = torch.tensor([False, True, True])
    fixed = backbone.cut(route)
    features = fixed(images)
    for i, image in enumerate(images.split(1)):
        alpha = torch.zeros_like(backbone.route(image)[1].alpha)
        for _ in backbone.nodes_per_layer + [0]:  # what is cut in a layer changes what later gates see
            routes = backbone.route(image, skip=False, alpha=alpha)[1]
            alpha = torch.relu(torch.tanh(routes.logits)) * routes.reached[..., None]
            alpha = alpha * (fixed.fixed_route | (alpha <= routing.OPEN))
        wanted = reference_routes(backbone, image, alpha[0])[0]
        for s, feature in enumerate(features):
            expected = wanted.get(s, torch.zeros(1, 1, 1, 1).double())
            got = feature[i : i + 1]
            torch.testing.assert_close(got, expected.expand_as(got), atol=1e-10, rtol=0)


def test_a_fixed_network_has_the_weights_that_it_uses_and_costs_what_it_runs():
    network = model.build_model("dr-a", "segmentation", 5, layers=5, width=8)
    route = random_alphas(1, network.backbone.num_nodes, 7)[0] > 0
    route &= torch.tensor([node.exists() for node in network.backbone.all_nodes()])
    route[0, routing.KEEP :] = True
    gateless = model.build_model("fixed-route", "segmentation", 5, layers=5, width=8, route=route.tolist())
    for fixed in (network.cut(route), gateless):
        fixed.train()(torch.randn(2, 3, 64, 96)).logits.square().mean().backward()
        assert not [name for name, weight in fixed.named_parameters() if weight.grad is None]
        assert len(list(fixed.parameters())) < len(list(network.parameters()))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            fixed.eval()(torch.zeros(1, 3, 90, 120))
        assert counter.get_total_flops() == 2 * sum(fixed.real_cost(None, 90, 120, "conv").values()).item()
        opened = fixed.backbone.fixed_route[None]
        routed = network.real_cost(routing.Routes(opened, opened.float(), opened.any(-1)), 90, 120)
        for part in ("stem", "cells", "paths"):
            assert routed[part].item() == fixed.real_cost(None, 90, 120)[part].item()


@pytest.mark.parametrize("channels", [1, 5])
@torch.no_grad()
def test_images_may_have_any_number_of_channels(channels):
    backbone = routing.RoutedBackbone(layers=4, width=4, in_channels=channels).double().eval()
    images = torch.randn(1, channels, 64, 96, dtype=torch.float64)
    routes = backbone.route(images)[1]
    with FlopCounterMode(display=False) as counter:
        features = backbone.route(images)[0]
    counted = sum(backbone.real_cost(routes, 64, 96, "conv").values()).item()
    assert counter.get_total_flops() == 2 * counted
    more = backbone.costs(64, 96).stem - routing.RoutedBackbone(layers=4, width=4).costs(64, 96).stem
    assert more == (channels - 3) * 9 * 4 * 32 * 48  # of the first convolution, at half the size
    fixed = backbone.cut(routes.alpha[0] > routing.OPEN).eval()
    for got, wanted in zip(fixed.from_stem(backbone.stem_map(images)), features, strict=True):
        torch.testing.assert_close(got, wanted)


def test_routes_of_another_grid_are_refused():
    route = torch.zeros(19, 3, dtype=torch.bool)
    refuses(lambda: routing.FixedBackbone(route, 6, 4, "small"), "route of shape", "(22, 3)")
    route[1, routing.UP] = True
    refuses(lambda: routing.FixedBackbone(route[:18], 5, 4, "small"), "row 1", "does not have")


# ============ losses ============


def clustering_loss_by_hand(A, centers, sigma2, margin, own=None):
    """Equation (2) in plain Python."""
    total = 0.0
    for b, a in enumerate(A.tolist()):
        d = [math.dist(a, mu) for mu in centers.tolist()]
        k = d.index(min(d)) if own is None else own[b]
        if k >= 0:
            others = sum(math.exp(-d[j] / (2 * sigma2)) for j in range(len(d)) if j != k)
            total += max(0.0, margin + d[k] / (2 * sigma2) + math.log(others))
    return total / len(A)


@pytest.mark.parametrize("B, K, D, sigma2, margin", [
    (5, 2, 3, 0.4, 1.0), (7, 4, 20, 0.7, 5.0), (1, 3, 1, 0.2, 0.0), (6, 8, 183, 2.0, 1.0)])
def test_the_clustering_loss_is_equation_2(B, K, D, sigma2, margin):
    g = torch.Generator().manual_seed(B * K)
    A, centers = torch.rand(B, D, generator=g).double(), torch.rand(K, D, generator=g).double()
    want = clustering_loss_by_hand(A, centers, sigma2, margin)
    loss = losses.clustering_loss(A, centers, sigma2, margin)
    assert loss.item() == pytest.approx(want, rel=1e-12, abs=1e-14)
    loss = losses.clustering_loss(A.float(), centers.float(), torch.tensor(sigma2), margin)
    assert loss.item() == pytest.approx(want, rel=1e-5, abs=1e-6)
    own = torch.randint(-1, K, (B,), generator=g)  # -1: of no cluster yet
    want = clustering_loss_by_hand(A, centers, sigma2, margin, own.tolist())
    assert losses.clustering_loss(A, centers, sigma2, margin, own).item() == pytest.approx(want, rel=1e-12)
    each = losses.clustering_loss(A, centers, sigma2, margin, own, reduction="none")  # 0 beyond the margin
    for b, loss in enumerate(each.tolist()):
        want = clustering_loss_by_hand(A[b : b + 1], centers, sigma2, margin, own[b : b + 1].tolist())
        assert loss == pytest.approx(want, rel=1e-12)


def test_the_gradient_of_the_clustering_loss_is_right_on_centres_too():
    g = torch.Generator().manual_seed(0)
    centers, A = torch.rand(4, 6, generator=g).double(), torch.rand(5, 6, generator=g).double()
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


def test_the_clustering_loss_has_a_floor_a_precision_and_constant_centres():
    A, centers = torch.rand(3, 4).bfloat16(), torch.rand(3, 4)
    want = losses.clustering_loss(A.float(), centers, 0.3, 1.0)
    assert torch.equal(losses.clustering_loss(A.float(), centers, 0.0, 1.0, sigma2_floor=0.3), want)
    mu, sigma2 = centers.clone().requires_grad_(), torch.tensor(0.3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = losses.clustering_loss(A.requires_grad_(), mu, sigma2, 1.0)
    assert half.dtype == torch.float32 and torch.equal(half, want)
    half.backward()
    assert mu.grad is None and sigma2.grad is None
    # 1 / (2 sigma2) = 5e11: exp(-distance / ...) is 0 for every other centre, its logarithm is not.
    A = A.detach().float().requires_grad_()
    loss = losses.clustering_loss(A, centers, 1e-12, 1.0, torch.tensor([0, 1, 2]), sigma2_floor=0.0)
    loss.backward()
    assert loss.isfinite() and A.grad.isfinite().all()
    middle, pair = torch.zeros(1, 2), torch.tensor([[1.0, 0.0], [-1.0, 0.0], [3.0, 0.0]])
    first = losses.clustering_loss(middle, pair, 0.5, 1.0, torch.tensor([0]))
    assert torch.equal(losses.clustering_loss(middle, pair, 0.5, 1.0), first)  # a tie: the first
    refuses(lambda: losses.clustering_loss(A, centers[:1], 0.5, 1.0), "K >= 2")


def test_the_cost_loss_holds_each_image_to_the_budget_and_ramps_up():
    cost = torch.tensor([2.0, 5.0, 11.0], dtype=torch.float64, requires_grad=True)
    loss = losses.cost_loss(cost, 20.0, 0.1)
    assert loss.item() == pytest.approx((0.0 + 0.15**2 + 0.45**2) / 3)
    loss.backward()
    torch.testing.assert_close(cost.grad, 2 / (3 * 20) * torch.tensor([0.0, 0.15, 0.45]).double())
    half = losses.cost_loss(torch.full((2,), 5e4).half(), 1e5, 0.2)  # 5e4 + 5e4 is inf in half precision
    assert half.item() == pytest.approx(0.09, rel=2e-3)
    values = [losses.budget_ramp(p) for p in (0.0, 0.39, 0.4, 0.41, 0.42, 0.43, 1.0)]
    assert values == pytest.approx([0, 0, 0, 0.5, 1, 1, 1])


# ============ K-means ============


def lloyd_by_hand(x, centers, max_iter=100):
    """Lloyd's algorithm in numpy, float64, for starts that leave no cluster empty."""
    x, centers = x.double().numpy(), centers.double().numpy().copy()
    for _ in range(max_iter):
        labels, before = ((x[:, None] - centers) ** 2).sum(2).argmin(1), centers.copy()
        for j in range(len(centers)):
            centers[j] = x[labels == j].mean(0)
        if (centers == before).all():
            break
    squares = ((x[:, None] - centers) ** 2).sum(2)
    return centers, squares.argmin(1), squares.min(1).sum()


def blobs(n, d, k, seed=0, spread=0.1):
    g = torch.Generator().manual_seed(seed)
    places = torch.rand(k, d, generator=g)[torch.randint(k, (n,), generator=g)]
    return places + spread * torch.randn(n, d, generator=g)


@pytest.mark.parametrize("n, d, k, offset", [
    (50, 2, 3, 0), (300, 183, 5, 0), (5000, 20, 8, 0), (30, 1, 2, 0), (400, 7, 4, 100)])
def test_kmeans_is_lloyds(n, d, k, offset):
    x = blobs(n, d, k, seed=n) + offset
    init = x[torch.linspace(0, n - 1, k).long()]
    for max_iter in (1, 3, 100):
        want_centers, want_labels, want_inertia = lloyd_by_hand(x, init, max_iter)
        for kind, near in ((torch.float32, 2e-6), (torch.float64, 1e-11)):
            centers, labels, inertia = kmeans.kmeans(x.to(kind), k, init.to(kind), max_iter)
            assert centers.dtype == kind
            np.testing.assert_allclose(centers.numpy(), want_centers, rtol=near, atol=near)
            np.testing.assert_array_equal(labels.numpy(), want_labels)
            assert inertia == pytest.approx(want_inertia, rel=near * 10 * (1 + offset))


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
    best = lloyd_by_hand(x, first[0])[2]
    for seed in range(10):  # four clear clouds: greedy K-means++ finds them from any seed
        assert kmeans.kmeans(x, 4, seed=seed)[2] == pytest.approx(best, rel=1e-4)
    drawn = torch.stack([kmeans._plus_plus(x, 4, seed) for seed in range(3)])
    assert (drawn[:, :, None] == x).all(-1).any(-1).all() and not torch.equal(drawn[0], drawn[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kmeans.kmeans(x, 4, seed=3)[0], first[0])


def test_empty_clusters_start_again_as_kmeans_plus_plus_would():
    # Two centres lie on two of four clear clouds, two where no sample is: these go to the other clouds.
    clouds = [torch.randn(50, 3, generator=torch.Generator().manual_seed(j)) + 40 * j for j in range(4)]
    x, away = torch.cat(clouds), torch.full((3,), 900.0)
    init = torch.stack([away, clouds[2].mean(0), -away, clouds[0].mean(0)])
    for seed in range(5):
        centers, labels, _ = kmeans.kmeans(x, 4, init=init, seed=seed)
        assert labels.bincount().tolist() == [50] * 4
        torch.testing.assert_close(centers[[1, 3]], torch.stack([clouds[2].mean(0), clouds[0].mean(0)]))
        others, drawn = init[[1, 3]], kmeans._plus_plus(x, 2, seed, init[[1, 3]])
        assert torch.equal(drawn, kmeans._plus_plus(x, 2, seed, others))  # samples, one of each other cloud
        assert (drawn[:, None] == x).all(-1).any(1).all()
        assert sorted((drawn.mean(1) / 40).round().tolist()) == [1, 3]
    # Equal samples: no two centres at one place while there are other places.
    x = torch.tensor([[0.0], [0.0], [0.0], [0.0], [8.0], [8.0], [-1.0]])
    centers, labels, inertia = kmeans.kmeans(x, 3, init=torch.tensor([[0.0], [900.0], [901.0]]))
    assert inertia == 0 and sorted(torch.bincount(labels).tolist()) == [1, 2, 4]
    # Run to the end, no cluster is empty while there are samples enough.
    x = blobs(200, 3, 5)
    init = torch.cat([x[:1], torch.full((4, 3), 50.0)])
    assert torch.bincount(kmeans.kmeans(x, 5, init=init)[1], minlength=5).min() > 0


@pytest.mark.parametrize("distinct", [1, 2, 3])
def test_few_or_equal_samples_are_clustered_and_broken_ones_are_refused(distinct):
    places = torch.rand(distinct, 4, generator=torch.Generator().manual_seed(1))
    x = places.repeat(10, 1)
    for init in (None, x[:5], torch.full((5, 4), 9.0)):
        centers, labels, inertia = kmeans.kmeans(x, 5, init=init)
        sizes = torch.bincount(labels, minlength=5)
        assert centers.isfinite().all() and inertia == pytest.approx(0, abs=1e-10)
        assert (centers[:, None] - places).norm(dim=2).min(1).values.max() < 1e-6
        assert (sizes > 0).sum() == distinct and sizes.sum() == len(x)
    centers, labels, inertia = kmeans.kmeans(places, distinct)  # each sample its own cluster
    assert inertia == 0 and torch.equal(centers[labels], places)
    refuses(lambda: kmeans.kmeans(places, 4), "4 clusters need at least 4 samples")
    for value in (torch.nan, torch.inf, -torch.inf):
        x[7, 2] = value
        refuses(lambda: kmeans.kmeans(x, 1), "NaN or inf")


def inter_intra_by_hand(A, labels, centers):
    def mean(points):
        pairs = [math.dist(p, q) for i, p in enumerate(points) for q in points[:i]]
        return sum(pairs) / len(pairs)

    intra, to_centre = [], []
    for j in range(len(centers)):
        members = A[labels == j].tolist()
        if len(members) > 1:
            intra.append(mean(members))
        if members:
            distances = [math.dist(p, centers[j].tolist()) for p in members]
            to_centre.append(sum(distances) / len(distances))
    return mean(centers.tolist()), sum(intra) / len(intra), sum(to_centre) / len(to_centre)


def test_inter_and_intra_are_mean_distances_over_pairs_and_tell_a_collapse():
    A, centers, labels = torch.rand(90, 5), torch.rand(5, 5), torch.randint(3, (90,))
    labels[0], labels[1] = 3, -1  # one sample: no pair; one that is left out; cluster 4 is empty
    *by_hand, to_centre = inter_intra_by_hand(A, labels, centers)
    assert kmeans.inter_intra(A, labels, centers) == pytest.approx(by_hand, rel=1e-5)
    assert kmeans.intra_to_centre(A, labels, centers) == pytest.approx(to_centre, rel=1e-5)
    some = kmeans.inter_intra(A, 0 * labels, centers[:1], max_samples=4)
    spaced = torch.pdist(A[[0, 22, 45, 67]]).mean().item()  # floor(i · 90 / 4)
    assert some == (0.0, pytest.approx(spaced, rel=1e-5))
    big = torch.rand(5000, 3)  # more than one block
    got = kmeans.inter_intra(big, torch.zeros(5000, dtype=torch.long), centers[:, :3])[1]
    assert got == pytest.approx(torch.pdist(big.double()).mean().item(), rel=1e-5)
    assert kmeans.describe_collapse([5, 7], 0.6, 0.2) is None
    assert "no sample" in kmeans.describe_collapse([5, 0, 7], 0.6, 0.2)
    assert "one architecture" in kmeans.describe_collapse([5, 7], 0.05, 1.0)


# ============ the bank ============


def test_the_bank_keeps_the_latest_and_clusters_what_was_seen():
    bank, A = kmeans.ActivationBank(6, 3), torch.rand(6, 3, requires_grad=True)
    bank.update(torch.tensor([4, 1]), A[[4, 1]])
    bank.update(torch.tensor([1, 2, 5]), A[[0, 2, 5]])  # the latest of sample 1
    assert bank.count == 4 and (bank.seen_at > 0).tolist() == [False, True, True, False, True, True]
    values = bank.values[[1, 2, 4, 5]]
    assert torch.equal(values, A.detach()[[0, 2, 4, 5]]) and not values.requires_grad
    clusters = bank.cluster(2, seed=1)
    centers, labels, inertia = kmeans.kmeans(values, 2, seed=1)
    assert torch.equal(clusters.centers, centers) and clusters.sigma2 == inertia / 3
    assert clusters.sizes == torch.bincount(labels, minlength=2).tolist()
    assert clusters.labels[[1, 2, 4, 5]].tolist() == labels.tolist()
    assert clusters.labels[[0, 3]].tolist() == [-1, -1]  # not seen: of no cluster
    again = bank.cluster(2, max_iter=1)  # starts where it was
    torch.testing.assert_close(again.centers, centers)
    refuses(lambda: bank.cluster(5), "at least 5")
    refuses(lambda: kmeans.ActivationBank(7, 3).load_state_dict(bank.state_dict()), "the state (6, 3)")


def test_kmeans_sees_what_was_seen_lately_and_older_samples_keep_a_cluster():
    old, new = torch.tensor([[0.0, 0], [0, 1], [9, 9]]), torch.tensor([[0.0, 0], [1, 0], [5, 5], [5, 6]])
    bank = kmeans.ActivationBank(8, 2, age=2)
    bank.update(torch.tensor([0, 1, 2]), old)
    bank.update(torch.tensor([3, 4]), new[:2])
    assert bank.count == 5
    bank.update(torch.tensor([5, 6]), new[2:])
    assert (bank.count, (bank.seen_at > 0).tolist()) == (4, [True] * 7 + [False])
    clusters = bank.cluster(2)
    centers = clusters.centers[clusters.centers[:, 0].argsort()]
    assert centers.tolist() == [[0.5, 0], [5, 5.5]] and clusters.sizes == [2, 2]
    assert clusters.sigma2 == pytest.approx(4 * 0.25 / 3)  # of the four alone
    a, b = clusters.labels[3].item(), clusters.labels[5].item()
    assert clusters.labels.tolist() == [a, a, b, a, a, b, b, -1]
    again = kmeans.ActivationBank(8, 2, age=2)
    again.load_state_dict(bank.state_dict())
    bank.update(torch.tensor([0]), old[:1])
    again.update(torch.tensor([0]), old[:1])
    assert bank.recent.tolist() == again.recent.tolist() == [True] + [False] * 4 + [True, True, False]


def test_restarts_leave_a_bad_start_and_clusters_keep_their_numbers():
    x = torch.cat([blobs(60, 5, 1, seed=s) + 10 * s for s in (1, 2, 3)])
    halves = [x[120:150].mean(0), x[150:].mean(0)]
    stuck = torch.stack([halves[0], x[:120].mean(0) + 1, halves[1]])  # one centre for two blobs
    for restarts, largest in ((0, 120), (4, 60)):
        bank = kmeans.ActivationBank(180, 5)
        bank.update(torch.arange(180), x)
        bank.clusters = kmeans.Clusters(stuck, torch.zeros(180), 1.0, [])
        assert max(bank.cluster(3, restarts=restarts).sizes) == largest
    for seed in range(6):  # whatever the starts draw: the blobs keep their numbers
        moved = torch.stack([x[60:120].mean(0), x[120:].mean(0), x[:60].mean(0)])
        bank.clusters = kmeans.Clusters(moved + 0.5, torch.zeros(180), 1.0, [])
        bank.clusters = bank.cluster(3, seed, restarts=4)
        torch.testing.assert_close(bank.clusters.centers, moved)
        assert bank.clusters.labels.tolist() == [2] * 60 + [0] * 60 + [1] * 60
    old, new = torch.tensor([[0.0], [10], [20]]), torch.tensor([[21.0], [1], [8]])
    assert kmeans._matched(old, new).tolist() == [1, 2, 0]


def test_where_gates_drift_the_bank_names_another_centre_than_the_nearest():
    """A has moved on since the bank saw it. The label is that of then; --own nearest asks what it is now."""
    g = torch.Generator().manual_seed(0)
    bank, first = kmeans.ActivationBank(40, 3), 0.1 * torch.randn(40, 3, generator=g)
    first[20:] += 2
    bank.update(torch.arange(40), first)
    clusters = bank.cluster(2)
    drifted = first.clone()
    drifted[:10] += 2  # these have crossed over
    nearest = clusters.nearest(drifted)[0]
    assert (nearest != clusters.labels).tolist() == [True] * 10 + [False] * 30
    for own in (None, nearest.tolist(), clusters.labels.tolist()):
        given = None if own is None else torch.tensor(own)
        loss = losses.clustering_loss(drifted.double(), clusters.centers, clusters.sigma2, 5.0, given)
        want = clustering_loss_by_hand(drifted.double(), clusters.centers.double(), clusters.sigma2, 5.0, own)
        assert loss.item() == pytest.approx(want, rel=1e-9)


def test_the_bank_clusters_in_a_metric_and_by_known_subsets():
    """Two groups in a column of small numbers, hidden behind noise in one of large numbers."""
    rng = np.random.default_rng(0)
    truth = torch.from_numpy(rng.integers(0, 2, 200))
    columns = [rng.normal(0, 1, 200), 0.1 * truth.numpy() + rng.normal(0, 0.01, 200)]
    A, metric = torch.from_numpy(np.stack(columns, 1)).float(), torch.diag(torch.tensor([0.01, 1.0]))
    bank = kmeans.ActivationBank(200, 2)
    bank.update(torch.arange(200), A)
    accuracy = shapes.agreement(bank.cluster(2).labels, truth)[0]
    bank.clusters = None
    weighted = bank.cluster(2, metric=metric)
    assert accuracy < 0.75 and shapes.agreement(weighted.nearest(A)[0], truth)[0] == 1
    means = torch.stack([A[truth == 0].mean(0), A[truth == 1].mean(0)])  # in the units of A
    centers = weighted.centers[weighted.centers[:, 1].argsort()]
    torch.testing.assert_close(centers, means, atol=1e-5, rtol=1e-5)
    spread = (A - means[truth]).double().square().sum().item() / 199
    assert weighted.sigma2 == pytest.approx(spread, rel=1e-5)
    again = bank.cluster(2, max_iter=1, metric=metric)  # the start is in the units of A too
    torch.testing.assert_close(again.centers, weighted.centers)
    known = bank.cluster_known(truth, 2)
    torch.testing.assert_close(known.centers, means, atol=1e-5, rtol=1e-5)
    assert known.sigma2 == pytest.approx(spread, rel=1e-5) and torch.equal(known.labels, truth)
    few = kmeans.ActivationBank(200, 2)
    few.update(torch.arange(4), A[:4])
    assert few.cluster_known(truth + 1, 4).centers[[0, 3]].tolist() == [[0, 0]] * 2  # nothing of it is seen


def test_what_views_of_one_image_differ_by_counts_little_in_the_metric():
    """Images of two kinds, and a change of look that moves A along a direction across all columns."""
    rng = np.random.default_rng(0)
    kinds, look = rng.integers(0, 2, 300), rng.normal(0, 1, 6)

    def views():
        """A [300, 6]: what the kind gives, in two columns, what the look of this view gives, and noise."""
        A = np.outer(rng.normal(0, 1, 300), look) + rng.normal(0, 0.02, (300, 6))
        A[:, :2] += 0.5 * kinds[:, None]
        return torch.from_numpy(A).float()

    bank, truth = kmeans.ActivationBank(300, 6), torch.from_numpy(kinds)
    assert bank.view_metric() is None
    bank.update_views(torch.ones(300, 6), torch.ones(300, 6))
    assert bank.view_metric() is None  # nothing differs
    one = views()
    bank.update(torch.arange(300), one)
    assert shapes.agreement(bank.cluster(2).labels, truth)[0] < 0.7
    within, between = np.zeros((6, 6)), np.zeros((6, 6))
    for call in range(2, 7):
        first, second = views(), views()
        bank.update_views(first, second, momentum=0.7)
        first, second = first.double().numpy(), second.double().numpy()
        weight = max(0.3, 1 / call)
        within += weight * (np.cov((first - second).T, bias=True) / 2 - within)
        across = np.cov(first.T, second.T, bias=True)[:6, 6:]
        between += weight * ((across + across.T) / 2 - between)
    np.testing.assert_allclose(bank.within.numpy(), within, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(bank.between.numpy(), between, rtol=1e-4, atol=1e-6)
    metric = bank.view_metric(ridge=0.01)
    root = np.linalg.cholesky(within + 0.01 * np.linalg.eigvalsh(within)[-1] * np.eye(6))  # another whitening
    signal, axes = np.linalg.eigh(np.linalg.inv(root) @ between @ np.linalg.inv(root).T)
    weighted = np.linalg.inv(root).T @ axes * (signal.clip(0) / (signal.clip(0) + 1))
    np.testing.assert_allclose((metric @ metric.T).numpy(), weighted @ weighted.T, rtol=1e-3, atol=1e-3)
    clusters = bank.cluster(2, metric=metric)
    assert shapes.agreement(clusters.labels, truth)[0] == 1
    assert shapes.agreement(clusters.nearest(views())[0], truth)[0] == 1
    for k in range(2):  # in the units of A
        torch.testing.assert_close(clusters.centers[k], one[clusters.labels == k].mean(0))
    other = kmeans.ActivationBank(300, 6)
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.view_metric(), bank.view_metric())
    assert torch.equal(other.clusters.metric, metric)


def test_another_look_leaves_objects_where_they_are_and_is_drawn_anew_for_each_image():
    picture = torch.zeros(3, 32, 32, dtype=torch.uint8)
    picture[:, 8:24, 8:24] = torch.tensor([200, 120, 60], dtype=torch.uint8)[:, None, None]
    torch.manual_seed(0)
    changed = data.change_look(picture.repeat(16, 1, 1, 1))
    assert changed.dtype == torch.uint8 and changed.shape == (16, 3, 32, 32)
    assert len({image.numpy().tobytes() for image in changed}) == 16
    inside, around = changed[:, :, 12:20, 12:20].float(), changed[:, :, :5].float()
    assert ((inside.mean((2, 3)) - around.mean((2, 3))).abs().amax(1) > 20).all()  # it is still seen
    for _ in range(20):
        data.change_look(torch.empty(2, 3, 32, 32, dtype=torch.uint8, device="meta"))  # waits for no device
    floats = data.change_look([picture / 255, torch.rand(3, 40, 24)])
    assert [image.shape for image in floats] == [(3, 32, 32), (3, 40, 24)]
    assert all(image.dtype == torch.float32 and 0 <= image.min() <= image.max() <= 1 for image in floats)


def gradients_of_a_global_batch(process):
    """Of all loss terms, on this process's half of eight images (or on all of them); batch norm frozen."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 64, 64, generator=generator)
    masks = torch.randint(0, 5, (8, 64, 64), generator=generator)
    masks[:3] = masks[3, :40] = data.IGNORE  # the halves have different numbers of labelled pixels
    torch.manual_seed(0)
    network = model.build_model("divdr-a", "segmentation", 5, layers=4, width=8).eval()
    centers = network(images).A[:2].detach() + 0.1
    network.backbone.training = True  # all gates run
    mine = slice(process.rank, None, process.world)
    distributed = train_seg.distribute(network, process)
    if process.world > 1:
        assert not distributed.will_sync_module_buffers() and distributed.gradient_as_bucket_view
    out = distributed(images[mine])
    loss = train_seg.segmentation_loss(out.logits, masks[mine], process.world)
    loss = loss + losses.cost_loss(out.cost, network.backbone.costs(64, 64).full, 0.1)
    loss = loss + losses.clustering_loss(out.A, centers, 0.5, 5.0)
    loss.backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def bank_and_gradients(rank):
    process = model.start_process("cpu")
    assert data.on_first_rank(lambda: rank) == 0
    refuses(lambda: open_coco(f"none{rank}"), "none0")  # the first one alone looks
    bank, A = kmeans.ActivationBank(9, 2), torch.arange(18.0).view(9, 2)
    for index in [[[0, 7], [3, 1]], [[8, 2], [5, 7]]]:
        bank.update(torch.tensor(index[rank]), A[index[rank]])
    bank.cluster(2, seed=rank)  # the first rank's counts
    # A rank whose images have no object to detect takes part in the step all the same.
    detector, count = train_seg.distribute(small_detector(masks=True), process), 1 - rank
    target = dict(boxes=torch.tensor([[5.0, 5, 40, 50]])[:count], labels=torch.ones(count, dtype=torch.int64))
    target["masks"] = torch.ones(count, 64, 64, dtype=torch.uint8)
    sum(detector([torch.rand(3, 64, 64)] * 2, [target] * 2).losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in detector.parameters())
    gradients = gradients_of_a_global_batch(process)
    torch.save(dict(bank=bank.state_dict(), gradients=gradients), f"{rank}.pt")


def test_two_processes_have_one_bank_one_clustering_and_the_gradients_of_the_whole_batch():
    spawn(bank_and_gradients)
    whole, A = gradients_of_a_global_batch(CPU), torch.arange(18.0).view(9, 2)
    seen = torch.tensor([0, 1, 2, 3, 5, 7, 8])
    centers, labels, inertia = kmeans.kmeans(A[seen], 2, seed=0)
    for rank in (0, 1):
        saved = torch.load(f"{rank}.pt", weights_only=True)
        bank, clusters = saved["bank"], saved["bank"]["clusters"]
        assert torch.equal(bank["seen_at"].nonzero().flatten(), seen)
        assert torch.equal(bank["values"][seen], A[seen])
        assert torch.equal(clusters["centers"], centers) and torch.equal(clusters["labels"][seen], labels)
        assert clusters["sigma2"] == inertia / 6
        for name, gradient in whole.items():
            torch.testing.assert_close(saved["gradients"][name], gradient, atol=1e-5, rtol=1e-3, msg=name)
    assert sum(gradient.abs().sum() > 0 for gradient in whole.values()) > 100


# ============ the alternation ============


def resolved(script, *flags, weights=None):
    """The settings of a command, all filled in."""
    config = script.settings(list(flags))
    recipe = script.RECIPES.get(config.dataset, script.RECIPES.get("camvid"))
    train_seg.resolve(config, CPU, recipe, None, weights)
    return config


def test_variants_are_the_methods_table():
    for name, row in {
        "dr-a": (0.8, 0.1, 0, "small"), "dr-b": (0.5, 0.1, 0, "small"), "dr-c": (0.5, 0.2, 0, "small"),
        "dr-raw": (0, 0, 0, "small"), "divdr-a": (0.8, 0.1, 0.1, "small"),
        "divdr-raw": (0, 0, 0.1, "small"),
    }.items():
        config = resolved(train_seg, "--variant", name)
        assert (config.lambda1, config.budget, config.lambda2, config.gate) == row
        assert (config.metric, config.own, config.kmeans_restarts) == ("plain", "nearest", 0)
        assert (config.activations, config.bank_age) == ("bank", 2000)
        assert (config.k, config.margin, config.kmeans_every) == (4, 5.0, 50)
        assert (config.iters, config.batch, config.crop, config.lr) == (180_000, 8, 768, 0.05)
        assert (config.warmup, config.clip) == (1000, 5.0)
    config = resolved(train_seg, *"--dataset shapes --subsets 2 --lr 0.3".split())
    assert (config.k, config.lr, config.lambda2, config.metric, config.layers) == (2, 0.3, 0.1, "views", 4)
    oracle = resolved(train_seg, *"--dataset shapes --oracle".split())
    assert (oracle.metric, oracle.own) == ("plain", "bank")
    assert resolved(train_det, *"--dataset shapes".split()).metric == "views"
    det = resolved(train_det, "--variant", "dr-raw")
    assert (det.gate, det.layers, det.batch, det.lr, det.k) == ("full", 17, 16, 0.02, 4)
    assert (det.iters, det.lr_steps) == (90_000, [60_000, 80_000])
    assert resolved(train_det, "--variant", "r50-fpn").clip == 0  # its reference clips nothing
    network = model.build_model("dr-a", "segmentation", 3, layers=4, width=4)
    images = data.segmentation_dataset("shapes", None, "train", True)
    for flags, age in (([], 2000), (["--bank-age", "7"], 7), (["--activations", "recompute"], None)):
        config = resolved(train_seg, "--dataset", "shapes", *flags)
        assert train_seg.make_bank(network, config, images, torch.device("cpu")).age == age


def test_learning_rates_depend_on_whether_init_starts_the_gates():
    network = model.build_model("dr-a", "segmentation", 11, layers=4, width=8)
    whole = network.state_dict()
    without = {name: weight for name, weight in whole.items() if ".gate." not in name}
    for flags, weights, lr, gate_lr in [
        ("", None, 0.05, 1), ("--init f", whole, 0.05, 1), ("--init f", without, 0.02, 2.5),
        ("--init f --lr 0.3 --gate-lr 2", without, 0.3, 2),
    ]:
        config = resolved(train_seg, *flags.split(), weights=weights)
        optimizer, rates = train_seg.make_optimizer(network, config), {}
        assert (config.lr, config.gate_lr) == (lr, gate_lr)
        for group in optimizer.param_groups:
            rates |= dict.fromkeys(group["params"], (group["lr"], group["weight_decay"]))
        gates = {weight for gate in parts_of(network, routing.Gate) for weight in gate.parameters()}
        norms = {weight for norm in parts_of(network, torch.nn.BatchNorm2d) for weight in norm.parameters()}
        for weight in network.parameters():
            decay = 0 if weight in norms else 1e-4
            assert rates.pop(weight) == (pytest.approx(lr * (gate_lr if weight in gates else 1)), decay)
        assert not rates


def test_the_segmentation_loss_ignores_255_and_survives_crops_without_labels():
    logits, masks = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randint(0, 3, (2, 4, 4))
    masks[0, :2] = 255
    p, picked = logits.detach().double().softmax(1), []
    for b, y, x in (masks != 255).nonzero().tolist():
        picked.append(-math.log(p[b, masks[b, y, x], y, x]))
    loss = train_seg.segmentation_loss(logits, masks, 1)
    assert loss.item() == pytest.approx(sum(picked) / len(picked), rel=1e-5)
    nothing = train_seg.segmentation_loss(logits, torch.full_like(masks, 255), 1)
    nothing.backward()
    assert nothing.item() == 0 and (logits.grad == 0).all()


def test_batch_norm_is_reestimated_as_plain_averages():
    batches = torch.randn(3, 4, 3, 8, 8) * 3 + 1
    network = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    train_seg.reestimate_batch_norm(network, iter(batches), world=1)
    torch.testing.assert_close(network[0].running_mean, batches.mean((0, 1, 3, 4)))
    torch.testing.assert_close(network[0].running_var, batches.var((1, 3, 4)).mean(0))
    batches[:, :, 1] = 0  # nothing reached it: what does so later passes as it is
    train_seg.reestimate_batch_norm(network, iter(batches), world=1)
    assert network[0].running_var[1] == 1 and network[0].running_var[0] != 1


def test_a_node_that_nothing_reached_is_as_new_after_batch_norm_is_reestimated():
    torch.manual_seed(0)
    network = model.build_model("dr-a", "segmentation", 3, layers=5, width=4, gate="full")
    for norm in parts_of(network, torch.nn.BatchNorm2d):
        torch.nn.init.normal_(norm.bias, std=0.2)
    for layer in [[network.backbone.init], *network.backbone.layers]:  # stride 4 is closed: nothing goes down
        torch.nn.init.constant_(layer[0].gate.decide.weight, 0)
        torch.nn.init.constant_(layer[0].gate.decide.bias, -3)
    train_seg.reestimate_batch_norm(network, iter(torch.randn(3, 4, 3, 64, 64)), world=1)
    for node, new in ((network.backbone.layers[2][0], False), (network.backbone.layers[2][2], True)):
        for norm in parts_of(node, torch.nn.BatchNorm2d):
            assert ((norm.running_var == 1).all() and (norm.running_mean == 0).all()) == new
    assert all((norm.running_var > 0).all() for norm in parts_of(network.head, torch.nn.BatchNorm2d))


def test_recomputing_leaves_nothing_of_old_activations():
    network = model.build_model("dr-a", "segmentation", 3, layers=4, width=4)
    images = torch.randn(6, 3, 32, 32)
    bank, batches = kmeans.ActivationBank(6, network.dim), [[0, 3, 1], [2, 5, 4]]
    bank.update(torch.arange(6), torch.ones(6, network.dim))
    before = {name: buffer.clone() for name, buffer in network.named_buffers() if "running" in name}
    inputs = ((images[index], torch.tensor(index)) for index in batches)
    train_seg.recompute_activations(network, bank, inputs, "alpha")
    after = {name: buffer.clone() for name, buffer in network.named_buffers()}
    for index in batches:
        torch.testing.assert_close(bank.values[index], network.routes(images[index]).A)
    assert all(torch.equal(buffer, after[name]) for name, buffer in before.items())


BAD = [  # script, flags, words of the one line
    (train_seg, "--k 1", "--k"), (train_seg, "--crop 100", "--crop"), (train_seg, "--lr nan", "--lr"),
    (train_seg, "--dataset shapes --k 5000", "--k"), (train_seg, "--dataset shapes --batch 1", "--batch"),
    (train_seg, "--data nowhere", "nowhere gtFine/train cityscapes-dataset.com --dataset shapes"),
    (train_seg, "--dataset camvid --data nowhere", "nowhere trainannot SegNet --dataset shapes"),
    (train_seg, "--dataset shapes --data x", "x"), (train_seg, "--dataset camvid --size 64", "size shapes"),
    (train_seg, "--device cuda:7", "--device"), (train_seg, f"--dataset shapes --out {__file__}", "--out"),
    (train_seg, "--dataset shapes --init x.pth", "x.pth"),
    (train_seg, "--dataset shapes --batch 2 --bank-age 1 --k 4", "--bank-age --k"),
    (train_seg, "--variant deeplabv3-r101 --width 8 --dataset shapes", "--width"),
    (train_seg, "--variant dr-raw --lambda1 0.5", "--budget"), (train_det, "--data nowhere", "nowhere"),
    (train_det, "--variant r50-fpn --gate-lr 2", "--gate-lr r50-fpn"),
    (train_seg, "--variant pspnet-r101 --margin 3", "--margin pspnet-r101"),
    (train_seg, "--route u-net --budget 0.2", "--budget fixed-route"),
    (train_seg, "--route u-net --k 3", "--k fixed-route"),
    (train_seg, "--dataset shapes --route v-net", "hrnetv2"),
    (train_seg, "--dataset shapes --route u-net --variant dr-a", "without gates"),
    (train_seg, "--dataset shapes --variant fixed-route", "--route"),
    (train_seg, "--dataset shapes --route u-net --gate full", "--gate"),
    (train_seg, "--dataset folder", "--dataset folder"),
    (train_seg, "--dataset folder --train-images x", "--data"),
    (train_seg, "--dataset camvid --train-images x", "--train-images"),
    (train_det, "--variant deeplabv3-r101", "r50-fpn"), (train_det, "--dataset shapes --limit 4", "--batch"),
    (train_det, "--dataset shapes --train-json a.json", "a.json"), (flops, "kmeans --n 3 --k 4", "--n"),
    (flops, "--size 64 64", "--size --variant"), (evaluate, "none.pt", "none.pt no such file"),
    (flops, "speed --openness 2", "--openness"),
    (evaluate, "a.pt b.pt --image x", "--image"), (evaluate, "a.pt --labels x", "--labels --images"),
    (evaluate, "a.pt --experts c --image x", "--image"), (evaluate, "a.pt --keep 0", "--keep --experts"),
    (evaluate, "a.pt --onnx", "--onnx --experts"), (evaluate, "a.pt --limit 0", "--limit"),
    (evaluate, "a.pt --image x --data y", "--image --data"),
    (flops, "--published --variant dr-a", "--published --variant")]


@pytest.mark.parametrize("script, flags, words", BAD)
def test_settings_that_cannot_work_end_in_one_line(script, flags, words):
    refuses(lambda: run(script.main, flags), *words.split())
    assert not os.listdir()


def test_settings_that_need_another_device_or_process_are_refused():
    config = train_seg.settings(["--compile"])
    two = model.Process(0, 2, torch.device("cpu"))
    refuses(lambda: train_seg.resolve(config, two, train_seg.RECIPES["cityscapes"], None, None), "--compile")


def test_two_processes_train_and_every_sample_enters_the_bank(trained):
    terms = {"seg": {"task"}, "det": {"classifier", "box_reg", "mask", "objectness", "rpn_box_reg"}}
    for name, images, scores in (("seg", 12, {"miou", "iou"}), ("det", 9, {"box", "mask"})):
        folder = trained / "runs" / name
        assert {"best.pt", "config.json", "last.pt", "log.jsonl"} <= set(os.listdir(folder))
        config = read_json(folder / "config.json")
        assert (config["lambda1"], config["gate"], config["batch"], config["iters"]) == (0.8, "small", 4, 12)
        network, checkpoint = model.load_checkpoint(folder / "last.pt")
        bank, clusters = checkpoint["bank"], checkpoint["bank"]["clusters"]
        assert (bank["seen_at"] > 0).tolist() == [True] * images and (bank["values"].sum(1) > 0).all()
        assert clusters["centers"].shape == (2, network.dim) and sum(clusters["sizes"]) == images
        assert iterations(folder, "kmeans") == [3, 6, 9, 12] and iterations(folder, "evaluation") == [6, 12]
        assert scores <= events(folder, "evaluation")[-1].keys()
        assert iterations(folder, "train") == [2, 4, 6, 8, 10, 12]
        last = events(folder, "train")[-1]
        assert {f"loss_{term}" for term in terms[name] | {"cost", "clustering"}} <= last.keys()
        assert {"gflops_expected", "lr", "gradient_norm"} <= last.keys() and last["gflops_real"] > 0
        assert 0 <= last["hinge_active"] <= 1
    assert (checkpoint["classes"], checkpoint["category_ids"]) == (["dark", "bright"], [3, 7])


OWN = "coco/annotations/instances_train2017.json"


@pytest.mark.parametrize("script, flags", [
    (train_seg, f"{TINY_SEG} --variant divdr-raw --activations recompute --kmeans-anneal 4"),
    (train_seg, f"{TINY_SEG} --variant divdr-raw --gate-space logit"),
    (train_seg, f"{TINY_SEG} --variant dr-raw --amp"),
    (train_seg, f"{TINY_SEG} --metric views --own bank --kmeans-restarts 2"),
    (train_det, f"{TINY_DET} --train-json {OWN} --train-images coco/train2017 --val-json {OWN} "
                "--val-images coco/train2017 --metric views --limit 8"),
    (train_det, f"{TINY_DET} --dataset shapes --size 64 --subsets 2 --masks --limit 8"),
    (train_det, f"{TINY_DET} --train-json {OWN} --train-images coco/train2017 --activations recompute "
                f"--val-json {OWN} --val-images coco/train2017 --gate-space logit --limit 8")])
def test_one_process_trains_with(script, flags, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    write_camvid()
    write_both_splits_of_coco()
    succeeds(script.main, flags, "--iters 9 --eval-every 100 --name run")
    assert torch.backends.cudnn.benchmark == (script is train_seg)  # of crops all are of one size
    network, checkpoint = model.load_checkpoint("runs/run/last.pt")
    bank = checkpoint["bank"]
    assert (bank["seen_at"] > 0).tolist() == [True] * (12 if script is train_seg else 8)
    assert bank["clusters"]["centers"].shape == (2, network.dim)
    assert (bank["values"].abs().max() > 1) == ("logit" in flags)
    views = "--metric views" in flags or "--dataset shapes" in flags
    assert (bank["clusters"]["metric"] is not None) == views
    second = 8 if "anneal" in flags else 6  # 3 + round(3 · 4^(3/9)) = 8
    assert iterations(Path("runs/run"), "kmeans") == [3, second, 9]
    assert iterations(Path("runs/run"), "evaluation") == [9]


def test_a_diverging_run_stops_before_something_broken_is_saved():
    flags = "--dataset shapes --size 32 --width 4 --iters 20 --warmup 0 --lr 1e8 --clip 1e8 --variant dr-raw"
    with pytest.raises(SystemExit, match="2"), contextlib.redirect_stderr(io.StringIO()) as error:
        run(train_seg.main, flags, "--name run --save-every 1", QUIET)
    error = error.getvalue().strip().splitlines()[-1]
    assert "try a lower --lr" in error and "last.pt is from before" in error
    assert "loss_task is" in error or "gradient_norm is" in error
    assert len(re.findall(r"shapes/train/\d{5}", error)) == 8
    network, checkpoint = model.load_checkpoint("runs/run/last.pt")
    assert checkpoint["iteration"] == int(re.search(r"iteration (\d+):", error)[1]) - 1
    assert all(p.isfinite().all() for p in network.parameters())
    assert "NaN" not in Path("runs/run/log.jsonl").read_text()


# ============ data ============


def write_cityscapes(split="train", names=("aachen/a_0", "bonn/b_0"), size=(24, 40), plate=255):
    """In cs/ the published layout with random ids, all of the table among them -> {name: (image, ids)}."""
    rng, made = np.random.default_rng(0), {}
    for name in names:
        ids = rng.integers(0, 34, size).astype(np.uint8)
        ids.ravel()[:35] = [*range(34), plate]  # 255: the license plate's -1
        image = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        for kind, array in (("leftImg8bit", image), ("gtFine_labelIds", ids), ("gtFine_color", ids)):
            path = Path("cs", kind.split("_")[0], split, f"{name}_{kind}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
        made[name] = image, ids
    return made


def small_shapes(train=True, **options):
    options = dict(size=32, n_train=24, n_val=24) | options
    return data.segmentation_dataset("shapes", None, options.pop("split", "train"), train, **options)


def open_files(name, root, split="train"):
    return data.segmentation_dataset(name, root, split, train=False)


def test_cityscapes_ids_become_train_ids():
    from cityscapesscripts.helpers.labels import labels

    made, train_id, trained = write_cityscapes(), {}, {}
    for label in labels:
        train_id[label.id % 256] = label.trainId % 256  # -1 is not trained either
        trained[label.trainId] = label
    dataset = open_files("cityscapes", "cs")
    assert len(dataset) == 2 and dataset.subset is None
    for i, (name, (image, ids)) in enumerate(made.items()):
        got, mask, index = dataset[i]
        assert index == i and dataset.image_name(i) == f"leftImg8bit/train/{name}_leftImg8bit.png"
        assert got.dtype == mask.dtype == torch.uint8 and type(got) is type(mask) is torch.Tensor
        assert torch.equal(got, torch.from_numpy(image).permute(2, 0, 1))
        assert mask.flatten().tolist() == [train_id[label] for label in ids.ravel().tolist()]
    for i, about in enumerate(zip(dataset.info.classes, dataset.info.palette, strict=True)):
        assert about == (trained[i].name, trained[i].color)


@pytest.mark.parametrize("ending, palette", [(".png", False), (".jpg", True), (".JPEG", False)])
def test_camvid_is_read_with_its_void_and_whatever_its_endings(ending, palette):
    ids = np.random.default_rng(1).integers(0, 12, (20, 32)).astype(np.uint8)
    os.mkdir("train")
    os.mkdir("trainannot")
    Image.new("RGB", (32, 20), (10, 90, 200)).save(f"train/0{ending}")  # flat: survives JPEG
    label = Image.fromarray(ids)
    if palette:
        label.putpalette([255 - i % 256 for i in range(768)])  # same bytes, read as indices into a palette
    label.save("trainannot/0.png")
    got, mask, _ = open_files("camvid", ".")[0]
    assert (got.permute(1, 2, 0).int() - torch.tensor([10, 90, 200])).abs().max() <= 3
    assert np.array_equal(mask.numpy(), np.where(ids == 11, data.IGNORE, ids))


def real(name):
    if not (REAL / name).is_dir():
        pytest.skip(f"no {name}/ in {REAL}; set REAL_DATA to the folder that holds it")
    return REAL / name


def test_real_camvid_is_read():
    for split, count in (("train", 367), ("val", 101), ("test", 233)):
        dataset = open_files("camvid", real("camvid"), split)
        assert len(dataset) == count
        image, mask, _ = dataset[count // 2]
        assert image.shape == (3, 360, 480) and mask.shape == (360, 480)
        assert len(mask.unique()) > 6 and set(mask.unique().tolist()) <= {*range(11), data.IGNORE}


def test_missing_and_damaged_files_are_named():
    pixels, ids = write_cityscapes()["aachen/a_0"]
    dataset = open_files("cityscapes", "cs")
    image, label = map(Path, dataset.pairs[0])
    for path, words in ((image, [label, "no image"]), (label, [image, "no label"])):
        whole = path.read_bytes()
        for length in (0, 10, len(whole) // 3, 2 * len(whole) // 3):
            path.write_bytes(whole[:length])
            refuses(lambda: dataset[0], path)
        path.unlink()
        refuses(lambda: open_files("cityscapes", "cs"), *words)
        path.write_bytes(whole)
    unknown = np.where(ids == 7, 77, ids).astype(np.uint8)
    for array, words in [
        (ids[:, :-3], [image, label, "40x24", "37x24"]), (pixels, ["one channel"]), (unknown, ["77"]),
    ]:
        Image.fromarray(array).save(label)
        refuses(lambda: dataset[0], label, *words)
    stream = iter(data.pass_loader(dataset, 1, workers=1))
    refuses(lambda: next(stream), label, "77")  # a worker's error arrives as one line, too
    stream._shutdown_workers()  # the garbage collector takes five seconds for it
    write_camvid()
    shutil.copy("camvid/train/00.png", "camvid/train/00.jpg")
    refuses(lambda: open_files("camvid", "camvid"), "00.jpg", "00.png")


def write_folder(images, labels, names, mode="L", classes=3, colours=None, ids=None, size=(48, 64), seed=0):
    """A picture and a label for each name; class i is a stripe of its own brightness, with the id ids[i], or
    painted in colours[i]. mode: of the label, as Pillow has it -> {name: uint8 [H, W] of classes}."""
    rng, made = np.random.default_rng(seed), {}
    ids = ids or list(range(classes))
    for name in names:
        mask = np.sort(rng.integers(0, classes, size), axis=1).astype(np.uint8)
        mask[0, :classes] = range(classes)
        picture = np.repeat((40 + 160 * mask / classes)[..., None], 3, axis=2).astype(np.uint8)
        for folder in (images, labels):
            Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(f"{images}/{name}.jpg")
        stored = np.array(colours if mode == "RGB" else ids, np.uint8)[mask]
        label = Image.fromarray(stored)
        if mode == "P":
            table = np.zeros((256, 3), np.uint8)
            table[ids] = colours
            label.putpalette(table.ravel().tolist())
        label.save(f"{labels}/{name}.png")
        made[name] = mask
    return made


def check_masks(dataset, made, void=()):
    """Each mask is what was made, classes `void` of it void."""
    assert len(dataset) == len(made)
    for i in range(len(dataset)):
        truth = made[Path(dataset.image_name(i)).stem].astype(int)
        for number, class_id in enumerate(void):
            truth[made[Path(dataset.image_name(i)).stem] == class_id] = data.IGNORE
        assert np.array_equal(dataset[i][1].numpy(), truth)


def test_a_folder_gives_the_very_numbers_of_the_data_set_that_it_holds():
    write_camvid()
    for split in ("train", "val"):
        shutil.copytree(f"camvid/{split}", f"own/images/{split}")
        shutil.copytree(f"camvid/{split}annot", f"own/labels/{split}")
    info = data.SEGMENTATION["camvid"]
    rows = ["ID,Name,Red,Green,Blue", "11,Ignore,,,"]
    for i, (name, colour) in enumerate(zip(info.classes, info.palette)):
        rows.append(", ".join(map(str, (i, name, *colour))))
    Path("own/classes.csv").write_text("\n".join(rows), "utf-8-sig")
    flags = f"{TINY} --iters 4 --eval-every 2 --crop 64 --short-sides 64 80 --log-every 1"
    for name, source in (("one", "--dataset camvid --data camvid"), ("two", "--dataset folder --data own")):
        succeeds(train_seg.main, flags, source, f"--name {name}")
        succeeds(evaluate.main, f"runs/{name}/last.pt --predictions {name}", QUIET)
    assert events(Path("runs/one")) == events(Path("runs/two"))
    one, two = (read_json(f"runs/{name}/metrics.json") for name in ("one", "two"))
    assert one["iou"] == two["iou"] and one["gflops"] == two["gflops"] and two["dataset"] == "folder"
    for i in range(12):
        same = [np.array(Image.open(f"{name}/{i:02d}.png")) for name in ("one/val", "two")]
        assert np.array_equal(*same)
    os.rename("own/images/train/00.png", "own/images/train/99.png")
    os.rename("own/labels/train/00.png", "own/labels/train/99.png")
    flags += " --dataset folder --data own --name two --resume"
    refuses(lambda: run(train_seg.main, flags), "--resume", "other data")  # the bank knows them by number
    shutil.rmtree("own/labels")  # the checkpoint knows the classes; a test split needs no labels
    os.rename("own/images/val", "own/images/test")
    out = succeeds(evaluate.main, "runs/two/last.pt --split test --predictions test", QUIET)
    assert "no labels" in out and len(os.listdir("test")) == 12
    os.mkdir("labels")
    for i in range(12):
        shutil.copy(f"camvid/valannot/{i:02d}.png", "labels")
    files = "--images camvid/val --labels labels"
    out = succeeds(evaluate.main, "runs/two/last.pt --out elsewhere", files, QUIET)
    assert read_json("elsewhere/metrics.json")["iou"] == two["iou"] and f"{two['miou']:.2f}" in out


VOC = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (224, 224, 192)]


def test_a_tree_like_vocs_is_read_by_lists_with_its_palette_and_255_void():
    folders = dict(images="VOC/JPEGImages", labels="VOC/SegmentationClass")
    made = write_folder(*folders.values(), "abcdef", "P", 4, VOC, ids=[0, 1, 2, 255])
    Image.new("RGB", (9, 9)).save("VOC/JPEGImages/unlabelled.jpg")
    refuses(lambda: data.folder_info(None, {"train": folders}), "unlabelled.jpg", "no label", "lists")
    Path("train.txt").write_text("a\nb\r\nc.jpg\n\nd\n")
    Path("val.txt").write_text("e\nf")
    files = {split: folders | {"names": f"{split}.txt"} for split in ("train", "val")}
    with pytest.warns(UserWarning, match="0, 1, 2; 255 is void"):
        info = data.folder_info(None, files)
    assert (info.classes, info.palette) == (("0", "1", "2"), tuple(VOC[:3]))
    for split, names in (("train", "abcd"), ("val", "ef")):
        opened = data.segmentation_dataset("folder", None, split, False, info=info, **files[split])
        check_masks(opened, {name: made[name] for name in names}, void=[3])
    flags = f"{TINY} --dataset folder --iters 2 --eval-every 2 --batch 2 --crop 32 --name voc"
    for split in ("train", "val"):
        flags += f" --{split}-images VOC/JPEGImages --{split}-labels VOC/SegmentationClass"
        flags += f" --{split}-list {split}.txt"
    assert "0, 1, 2; 255 is void" in succeeds(train_seg.main, flags)
    succeeds(evaluate.main, "runs/voc/last.pt --predictions out", QUIET)
    assert sorted(os.listdir("out")) == ["e.png", "f.png"]
    assert set(np.array(Image.open("out/e.png")).ravel()) <= {0, 1, 2}
    Path("other.csv").write_text("id,name\n0,0\n1,ignore\n2,1\n3,2\n")  # the same names for other ids
    refuses(lambda: run(train_seg.main, flags, "--resume --classes other.csv"), "--resume", "ids")
    Path("train.txt").write_text("a\nz\n")
    refuses(lambda: data.folder_info(None, files), "train.txt: line 2", "z")


def test_the_classes_of_a_folder_are_those_of_all_its_splits():
    for split, names in (("train", "ab"), ("val", "c")):
        write_folder(f"own/images/{split}", f"own/labels/{split}", names)
    Image.new("L", (64, 48), 7).save("own/labels/val/c.png")
    Image.new("RGB", (70, 48)).save("own/images/train/b.jpg")
    Image.new("L", (70, 48), 2).save("own/labels/train/b.png")
    with pytest.warns(UserWarning, match="0, 1, 2, 7;"):
        info = data.folder_info("own", {"train": {}, "val": {}})
    val = data.segmentation_dataset("folder", "own", "val", train=False, info=info)
    assert val.info.classes == ("0", "1", "2", "7") and (val[0][1] == 3).all()
    assert val.eval_batch == 8
    train = data.segmentation_dataset("folder", "own", "train", train=False, info=val.info)
    assert train.eval_batch == 1  # sizes differ


def test_a_tree_like_ade20ks_has_an_id_that_is_no_class():
    made = {}
    for split, names in (("training", "abcd"), ("validation", "ef")):
        made |= write_folder(f"ade/images/{split}", f"ade/annotations/{split}", names)
    Path("ade/classes.csv").write_text("id,name\n0,ignore\n1,wall\n2,sky\n")
    files = {}
    for split, folder in (("train", "training"), ("val", "validation")):
        files[split] = {"images": f"ade/images/{folder}", "labels": f"ade/annotations/{folder}"}
    info = data.folder_info("ade", files)
    assert info.classes == ("wall", "sky") and info.label_ids == {0: 255, 1: 0, 2: 1, 255: 255}
    opened = data.segmentation_dataset("folder", "ade", "train", False, info=info, **files["train"])
    for i, name in enumerate("abcd"):  # 0 becomes void, the others move down
        assert np.array_equal(opened[i][1].numpy(), made[name] - np.uint8(1))
    assert (info.crop, info.short_sides, info.batch) == (32, (24, 36, 48, 60, 72, 96), 4)
    for text, words in [
        ("id,name\n0,ignore\n1,a\n3,b\n", "has the ids 2"), ("number,name\n1,a\n", "id,name"),
        ("", "id,name"), ("id,name\n1,a\n1,b\n", "twice"), ("id,name\n1,a\n2,a\n", "name a"),
        ("id,name\n1,a\n", "1 classes"), ("id,name\n1,a\nx,b\n", "row 3"),
        ("id,name\n1,a\n256,b\n", "row 3"), ("id,name\n1,a\n2,\n", "row 3"),
        ("id,name,red,green,blue\n1,a,9,9,9\n2,b,9,9,9\n", "(9, 9, 9)"),
        ("id,name,rot\n1,a,9\n2,b,9\n", "rot"),
    ]:
        Path("ade/classes.csv").write_text(text)
        refuses(lambda: data.folder_info("ade", files), words)


def test_folders_are_read_as_labelling_tools_write_them():
    colours = [(164, 101, 10), (0, 0, 0), (60, 155, 244)]
    made = write_folder("cvat/JPEGImages", "cvat/SegmentationClass", "ab", "RGB", 3, colours)
    lines = "# label:color_rgb:parts:actions\napple:164,101,10::\nbackground:0,0,0::\npear:60,155,244::\n"
    Path("labelmap.txt").write_text(lines)
    own = dict(images="cvat/JPEGImages", labels="cvat/SegmentationClass")
    refuses(lambda: data.folder_info(None, {"train": own}), "a.png", "colour", "classes.csv")
    info = data.folder_info(None, {"train": own}, "labelmap.txt")
    assert (info.classes, info.palette) == (("apple", "background", "pear"), tuple(colours))
    check_masks(data.segmentation_dataset("folder", None, "train", False, info=info, **own), made)
    Image.new("RGB", (64, 48), (60, 155, 245)).save("cvat/SegmentationClass/b.png")
    refuses(lambda: data.folder_info(None, {"train": own}, "labelmap.txt"), "b.png", "(60, 155, 245)")

    made = write_folder("robo", "robo", "ab")  # Roboflow: masks beside the pictures, with a longer name
    for name in "ab":
        os.rename(f"robo/{name}.png", f"robo/{name}_mask.png")
    Path("robo/_classes.csv").write_text("Pixel Value, Class\n0, background\n1, apple\n2, pear")
    own = dict(images="robo", labels="robo")
    Image.open("robo/b.jpg").save("robo/b.png")
    os.remove("robo/b.jpg")
    info = data.folder_info(None, {"train": own}, "robo/_classes.csv")
    assert info.classes == ("background", "apple", "pear")
    check_masks(data.segmentation_dataset("folder", None, "train", False, info=info, **own), made)

    made = write_folder("super/img", "super/masks", "ab", "RGB", 3, [(i, i, i) for i in range(3)])
    own = dict(images="super/img", labels="super/masks")  # Supervisely: the id in each channel
    with pytest.warns(UserWarning, match="0, 1, 2"):
        info = data.folder_info(None, {"train": own})
    check_masks(data.segmentation_dataset("folder", None, "train", False, info=info, **own), made)


def quantized(ids, colours):
    """A label painted in the colours of its ids, saved again with a palette in an order of its own."""
    painted = Image.fromarray(np.array(colours, np.uint8)[ids]).quantize(16)
    assert (np.array(painted) != ids).any()
    return painted


def test_a_palette_in_another_order_goes_by_colour_or_is_refused():
    write_camvid()
    label, colours = Path("camvid/trainannot/00.png"), list(data.SEGMENTATION["camvid"].colours.values())
    ids = np.array(Image.open(label))
    truth = np.where(ids == 11, data.IGNORE, ids)
    quantized(ids, colours).save(label)
    assert np.array_equal(open_files("camvid", "camvid")[0][1].numpy(), truth)
    Image.fromarray(np.array(colours, np.uint8)[ids]).save(label)  # painted, without a palette
    assert np.array_equal(open_files("camvid", "camvid")[0][1].numpy(), truth)
    ids[50:] = 7
    quantized(ids, [*colours[:7], (1, 2, 3), *colours[8:]]).save(label)
    refuses(lambda: open_files("camvid", "camvid")[0], label, "palette")
    Image.fromarray(ids.astype(np.uint16)).save(label)  # 16 bits to an id are fine, ids of 16 bits are not
    assert (open_files("camvid", "camvid")[0][1][50:] == 7).all()
    Image.fromarray(ids.astype(np.uint16) + 300).save(label)
    refuses(lambda: open_files("camvid", "camvid")[0], label, "303")

    write_folder("own/images/train", "own/labels/train", "ab", "P", 3, VOC[:3])
    label = Path("own/labels/train/b.png")
    quantized(np.array(Image.open(label)), VOC).save(label)
    refuses(lambda: data.folder_info("own", {"train": {}}), label, "a.png", "palette")  # which is right?


def test_labels_that_cannot_hold_ids_are_refused_and_packed_ones_are_unpacked():
    write_camvid()
    label = Path("camvid/trainannot/00.png")
    ids = np.array(Image.open(label))
    rows = np.repeat(ids.astype(">u2")[..., None], 3, axis=2)  # 16 bits to a channel, the id in each
    scanlines = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", 96, 64, 16, 2, 0, 0, 0)
    for depth, kind, body in ((16, 2, scanlines), (4, 0, pack_bits(ids, 4)), (2, 0, pack_bits(ids & 3, 2))):
        header = struct.pack(">IIBBBBB", 96, 64, depth, kind, 0, 0, 0)
        write_png(label, header, body)
        if kind == 2:
            refuses(lambda: open_files("camvid", "camvid")[0], label, "16 bits")
        else:
            same = np.where(ids == 11, data.IGNORE, ids) if depth == 4 else ids & 3
            assert np.array_equal(open_files("camvid", "camvid")[0][1].numpy(), same)
    Image.fromarray(ids).save("inside.jpg")
    shutil.copy("inside.jpg", label)
    refuses(lambda: open_files("camvid", "camvid")[0], label, "JPEG")


def pack_bits(ids, bits):
    """Scanlines of a grey PNG with so many bits to a pixel."""
    planes = np.unpackbits(ids[..., None], axis=2)[..., 8 - bits :]
    return b"".join(b"\0" + row.tobytes() for row in np.packbits(planes.reshape(len(ids), -1), axis=1))


def write_png(path, header, scanlines):
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(scanlines)), (b"IEND", b""))
    written = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks:
        written += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    Path(path).write_bytes(written)


def test_files_pair_by_what_names_mean_and_links_end():
    made = write_folder("a/img", "a/lab", ["x_1", "y_1"])
    for path in Path("a/lab").iterdir():
        path.rename(path.with_stem(path.stem.replace("_1", "_7")))
    info = data._info_of({0: "a", 1: "b", 2: "c"}, {}, "here")
    own = dict(images="a/img", labels="a/lab")
    refuses(lambda: data.segmentation_dataset("folder", None, "train", False, info=info, **own), "no label")
    for path in Path("a/lab").iterdir():
        path.rename(path.with_stem(unicodedata.normalize("NFD", path.stem.replace("_7", "_é"))))
    for path in Path("a/img").iterdir():
        path.rename(path.with_stem(path.stem.replace("_1", "_é")))
    for folder in own.values():
        os.symlink(".", f"{folder}/again")
        Path(folder, ".hidden.png").write_text("")
        os.mkdir(f"{folder}/folder.png")
    opened = data.segmentation_dataset("folder", None, "train", False, info=info, **own)
    check_masks(opened, {name.replace("_1", "_é"): mask for name, mask in made.items()})


def test_labels_that_are_void_all_over_are_refused_before_training():
    write_camvid()
    for i in range(12):
        Image.new("L", (96, 64), 11).save(f"camvid/valannot/{i:02d}.png")
    refuses(lambda: run(train_seg.main, TINY_SEG, "--iters 2 --name void"), "val/00.png", "void")
    assert not os.path.exists("runs")
    text = evaluate.as_json({"miou": math.nan, "iou": [math.inf, 0.5]})
    assert json.loads(text) == {"miou": None, "iou": [None, 0.5]}


SEEN_TO_STORED = {  # by EXIF orientation: what a camera stores of a picture that is to be seen upright
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
    5: lambda a: np.swapaxes(a, 0, 1), 6: np.rot90, 7: lambda a: np.rot90(np.swapaxes(a, 0, 1), 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("ending", ["png", "webp", "tif"])
def test_pictures_and_labels_are_as_seen_whatever_their_exif_says(ending):
    seen = np.random.default_rng(0).integers(0, 255, (6, 9, 3)).astype(np.uint8)
    for orientation, stored in SEEN_TO_STORED.items():
        tag = Image.Exif()
        tag[0x0112] = orientation
        options = dict(tiffinfo={0x0112: orientation}) if ending == "tif" else dict(exif=tag)
        options |= dict(lossless=True) if ending == "webp" else {}
        Image.fromarray(np.ascontiguousarray(stored(seen))).save(f"turned.{ending}", **options)
        assert np.array_equal(data.read_image(f"turned.{ending}"), seen)
        assert data.image_size(f"turned.{ending}") == (6, 9)
        Image.fromarray(np.ascontiguousarray(stored(seen[..., 0]))).save("label.png", exif=tag)
        assert np.array_equal(data.read_label("label.png")[0], seen[..., 0])
    broken = bytearray(tag.tobytes())
    broken[10:14] = b"\xff\xff\xff\xff"  # no tag can be read
    Image.fromarray(seen).save("broken.png", exif=bytes(broken))
    assert np.array_equal(data.read_image("broken.png"), seen)


def test_boxes_and_masks_stay_on_the_object_of_a_turned_picture():
    contents = write_coco(sizes=((60, 80),) * 3)
    plain = open_coco()
    before = [plain[i] for i in range(3)]
    tag = Image.Exif()
    tag[0x0112] = 6
    for i in range(3):
        path = f"coco/train2017/{i:012d}.jpg"
        stored = np.ascontiguousarray(np.rot90(data.read_image(path)))
        Image.fromarray(stored).save(path, exif=tag, quality=100, subsampling=0)
        image, target, _ = plain[i]
        assert (image.int() - before[i][0].int()).abs().max() < 12
        assert torch.equal(target["masks"], before[i][1]["masks"])
    contents["images"][0] |= dict(height=80, width=60)  # as stored
    Path("coco/annotations/instances_train2017.json").write_text(json.dumps(contents))
    refuses(lambda: open_coco()[0], "80x60 pixels as seen", "60x80")


@pytest.mark.parametrize("ending", ["tif", "png", "webp"])
def test_of_several_pages_the_first_is_read_with_a_remark_and_labels_are_refused(ending):
    pages = [Image.new("RGB", (8, 6), colour) for colour in ("red", "green", "blue")]
    for name in ("a", "b"):
        pages[0].save(f"{name}.{ending}", save_all=True, append_images=pages[1:], lossless=True)
    with pytest.warns(UserWarning, match="^.: holds pictures of several pages.* the first alone is read"):
        assert data.image_size(f"a.{ending}") == (6, 8)
    with pytest.warns(UserWarning, match="^.: holds pictures of several pages.* the first alone is read"):
        assert (data.read_image(f"a.{ending}") == [255, 0, 0]).all()
    if ending != "webp":
        refuses(lambda: data.read_label(f"b.{ending}"), f"b.{ending}", "3 pages", "a file of its own")
    pages[0].save("photo.jpg", format="MPO", save_all=True, append_images=pages[1:2])  # and its preview
    with warnings.catch_warnings(action="error"):
        data.read_image("photo.jpg")


def test_pictures_with_too_many_bits_or_pixels_are_called_that(monkeypatch):
    grey = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (4, 1))
    big_endian = Image.frombytes("I;16B", (64, 4), grey.astype(">u2").tobytes())
    for picture, name in [
        (Image.fromarray(grey), "a.png"), (Image.fromarray(grey), "a.tif"), (big_endian, "b.tif"),
        (Image.fromarray(grey.astype(np.int32)), "c.tif"),
        (Image.fromarray(grey.astype(np.float32)), "d.tif"),
    ]:
        picture.save(name)
        refuses(lambda: data.read_image(name), name, "8 bits")
    Image.new("1", (400, 400)).save("large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 70_000)
    refuses(lambda: data.read_image("large.png"), "large.png", "140000 pixels")
    refuses(lambda: data.read_image("none.png"), "none.png", "No such file")


def test_augmentation_pads_crops_and_keeps_image_and_mask_aligned():
    torch.manual_seed(0)
    # Every label region is flat and large; its number is written into the picture.
    mask = (torch.arange(96)[:, None] // 24 * 8 + torch.arange(128) // 16).to(torch.uint8)  # ids 0..31
    image = torch.stack([mask * 7 + 20, mask * 3 + 40, 250 - mask * 5])
    padded = flipped = 0
    for _ in range(40):
        got, label = data.augmentation((48, 96, 192), 80)(tv_tensors.Image(image), tv_tensors.Mask(mask))
        assert got.shape == (3, 80, 80) and label.shape == (80, 80)
        assert got.dtype == label.dtype == torch.uint8
        inside = label != data.IGNORE
        assert (got[:, ~inside] == 0).all() and (got[:, inside] > 0).all()
        assert label[inside].max() < 32  # nearest: no ids in between
        right = ((got[0].float() - 20) / 7 - label).abs() < 0.6
        assert right[inside].float().mean() > 0.85  # the rest: blended edges between regions
        rows = inside.any(1).nonzero().flatten().tolist()
        assert abs(rows[0] - (79 - rows[-1])) <= 1  # padded in the middle
        shown = label[rows[0]][inside[rows[0]]].int()
        padded, flipped = padded + (len(rows) < 80), flipped + int(shown[0] > shown[-1])
    assert 5 < padded < 25 and 10 < flipped < 30


@pytest.mark.parametrize("short", [96, 224, 400])
def test_a_crop_shows_what_resizing_the_whole_image_shows_and_labels_stay_with_it(short):
    """On a picture whose brightness, and whose label, is the number of the row."""
    rows = torch.arange(160, dtype=torch.uint8)[:, None].expand(160, 320)
    whole = v2.functional.resize(rows[None], [short, 2 * short], antialias=True)[0].float()
    image_and_mask = tv_tensors.Image(rows.expand(3, -1, -1)), tv_tensors.Mask(rows)
    for seed in range(5):
        torch.manual_seed(seed)
        image, mask = data.ScaleAndCrop((short,), 64)(*image_and_mask)
        side = round(64 * 160 / short)
        torch.manual_seed(seed)
        torch.randint(1, ())
        first = round(int(torch.randint(160 - side + 1, ())) * short / 160)
        shown, step = image[0].float(), 160 / short
        assert (shown[4:60] - whole[first + 4 : first + 60, :64]).abs().max() <= 1 + step
        away = (mask.float() - shown)[4:60]
        assert away.abs().max() <= 0.5 + step / 2 and away.mean().abs() < 0.2  # not to one side


def test_an_epoch_has_each_index_once_with_its_own_image():
    dataset, whole, orders, looks = small_shapes(), small_shapes(train=False), [], set()
    for rank in range(2):
        stream, order = data.forever(data.train_loader(dataset, 6, rank=rank, world=2)), []
        for _ in range(8):
            images, masks, indices = next(stream)
            assert images.shape == (3, 3, 32, 32)
            order += indices.tolist()
            for image, mask, i in zip(images, masks, indices.tolist()):
                expected, label, _ = whole[i]
                straight = torch.equal(image, expected) and torch.equal(mask, label)
                assert straight or (torch.equal(image.flip(2), expected) and torch.equal(mask.flip(1), label))
                looks.add((i, straight))
        orders.append(order)
    assert 28 < len(looks) < 44  # some are flipped in one epoch and not in the other
    a, b = orders
    assert sorted(a[:12] + b[:12]) == sorted(a[12:] + b[12:]) == list(range(24)) and a[:12] != a[12:]


def test_processes_of_a_loader_start_once_for_all_its_epochs(monkeypatch):
    started, begin = [], torch.utils.data.dataloader._MultiProcessingDataLoaderIter.__init__
    monkeypatch.setattr(
        torch.utils.data.dataloader._MultiProcessingDataLoaderIter, "__init__",
        lambda self, loader: (started.append(loader.num_workers), begin(self, loader))[1])
    batches = data.forever(data.train_loader(small_shapes(), batch=8, workers=2))
    epoch = len(small_shapes()) // 8
    assert len([next(batches) for _ in range(3 * epoch)]) == 3 * epoch and started == [2]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_seed_decides_the_stream_from_anywhere_on(workers):
    def stream(seed, start=0, workers=workers):
        batches = data.forever(data.train_loader(small_shapes(), 6, workers, seed=seed), start)
        parts = zip(*(next(batches) for _ in range(6 - start)))
        return [torch.stack(part) for part in parts]

    torch.manual_seed(workers)  # which decides nothing
    one, other = stream(3), stream(4)
    assert not torch.equal(one[2], other[2])
    for start, same in ((0, stream(3, workers=1 - workers)), (1, stream(3, 1)), (5, stream(3, 5))):
        for whole, part in zip(one, same):  # four batches an epoch
            assert torch.equal(whole[start:], part)


def test_a_pass_counts_each_image_once_and_wraps_to_full_batches():
    dataset = small_shapes(train=False, n_train=11)
    for world in (1, 2, 3):
        wrapped = []
        for rank in range(world):
            part = [batch[2] for batch in data.pass_loader(dataset, 4, 0, rank, world)]
            assert torch.cat(part).tolist() == list(range(rank, 11, world))
            part = [batch[2] for batch in data.pass_loader(dataset, 4, 0, rank, world, wrap=True)]
            wrapped.append(torch.stack(part))  # full batches
        assert torch.stack(wrapped).unique().tolist() == list(range(11))  # as many on each rank


def test_batches_share_an_aspect_ratio_and_an_epoch_has_an_image_once():
    wide = torch.rand(103, generator=torch.Generator().manual_seed(0)) < 0.7
    ratios = torch.where(wide, 1.5, 0.7).tolist()

    def epoch(number, rank=0, world=1):
        batches = data.GlobalBatches(103, ratios, 8, rank, world, seed=3)
        batches.seek(number)
        return torch.tensor(list(batches))[..., 1]

    first, seen = epoch(0), set()
    assert first.shape == (12, 8) and len(first.unique()) == 96
    assert ((0 < wide[first].sum(1)) & (wide[first].sum(1) < 8)).sum() <= 1  # batches that mix
    halves = torch.cat([epoch(0, 0, 2), epoch(0, 1, 2)], 1)
    assert torch.equal(halves.sort(1).values, first.sort(1).values)
    for number in range(8):
        seen.update(epoch(number).flatten().tolist())
    assert not torch.equal(epoch(1), first) and seen == set(range(103))


ALONE = {
    "routing": "routing.RoutedBackbone(4, 4)(torch.rand(2, 3, 64, 64))",
    "losses": "losses.clustering_loss(torch.rand(4, 6), torch.rand(3, 6), 0.5, 1.0)",
    "kmeans": "kmeans.ActivationBank(20, 4).update(torch.arange(20), torch.rand(20, 4))",
    "data": "data.segmentation_dataset('camvid', 'camvid', 'train', True)[0]",
}


# What the README's example of copied files takes from the project that they are copied into.
AROUND_THE_EXAMPLE = """
import torch
device, dataset, steps = "cpu", range(8), 50
batches = [(torch.rand(2, 3, 60, 64), torch.tensor([step % 8, (step + 1) % 8])) for step in range(steps)]
task = lambda features: features[0].square().mean()
"""


def test_the_readmes_example_of_copied_files_trains_and_clusters():
    for name in ("routing", "losses", "kmeans"):
        shutil.copy(HERE / f"{name}.py", ".")
    example = re.search(r"```python\n(from kmeans.*?)```", (HERE / "README.md").read_text(), re.DOTALL)[1]
    example = example.replace("layers=16, width=64", "layers=4, width=4")
    example = example.replace("for step", "optimizer = torch.optim.SGD(backbone.parameters(), 0.1)\nfor step")
    example = example.replace("step % 50 == 49", "step % 10 == 9")
    code = AROUND_THE_EXAMPLE + example + "assert sum(bank.clusters.sizes) == 8 and len(expert) == 2\n"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": ""})


def test_files_work_alone_in_an_empty_folder():
    write_camvid()
    code = "import sys, torch\n"
    for name, work in ALONE.items():
        os.mkdir(name)
        shutil.copy(HERE / f"{name}.py", name)
        code += f"sys.path.insert(0, '{name}')\nimport {name}\n{work}\n"
        code += f"del sys.path[0], sys.modules['{name}']\n"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": ""})


def test_without_extras_a_network_trains_and_evaluates_and_flags_name_the_file_that_they_need():
    write_cityscapes("train", [f"aachen/{i}" for i in range(4)], (64, 96))
    write_cityscapes("val", [f"bonn/{i}" for i in range(2)], (64, 96))
    os.mkdir("copied")
    for file in HERE.glob("*.py"):
        if file.name != "test_smoke.py":
            shutil.copy(file, "copied")
    tiny = f"{TINY} --data cs --crop 64 --short-sides 64 --iters 3 --name run".split()
    needs = [  # flags of evaluate.py on that run, and what they need
        ("--figures f", "figures"), ("--image cs", "figures"), ("--experts e", "experts"),
        ("--published", "published"), ("--variant dr-a", "published")]
    code = f"""
import os, sys
import evaluate, flops, model, train_det, train_seg
assert not [name for name in sys.modules if name.startswith("extras") or name == "matplotlib"]
train_seg.main({tiny})
evaluate.main("runs/run/last.pt --workers 0 --device cpu".split())
assert not [name for name in sys.modules if name.startswith("extras") or name == "matplotlib"]
commands = [(evaluate.main, "runs/run/last.pt " + flags, name) for flags, name in {needs}]
commands += [(train.main, "--name x --dataset shapes", "shapes") for train in (train_seg, train_det)]
commands += [(train_seg.main, "--name x --batch 4 --data cs " + flags, "baselines")
             for flags in ("--variant pspnet-r101", "--route u-net")]
commands.append((flops.main, "--published", "published"))
for main, flags, name in commands:
    try:
        main(flags.split())
    except SystemExit as stopped:
        assert stopped.code == 2
    print("needed", flags, name, file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(Path("copied").resolve())},
        capture_output=True, text=True)
    assert done.returncode == 0 and "IoU % val" in done.stdout, done.stderr
    said = [line for line in done.stderr.splitlines() if "extras/" in line or line.startswith("needed")]
    for refusal, needed in zip(said[::2], said[1::2], strict=True):
        assert f"needs extras/{needed.split()[-1]}.py" in refusal
    assert read_json("runs/run/metrics.json")["images"] == 2


# ============ detection ============


def small_detector(variant="dr-raw", **arguments):
    options = dict(short_sides=(64,), long_side=128, anchor=8, proposals=50, rois=32)
    if variant == "dr-raw":
        options |= dict(layers=4, width=4, pyramid=16)
    return model.build_model(variant, "detection", 2, **options | arguments)


def open_coco(root="coco", split="train", train=False, masks=True, **files):
    return data.detection_dataset("coco", root, split, train, masks, **files)


def check_truth_has_full_score(dataset):
    """Scores the truth of each image, as a detector would give it -> the same in COCO's results format."""
    results = []
    for i in range(len(dataset)):
        found = dataset[i][1] | {"scores": torch.ones(len(dataset[i][1]["labels"]))}
        results += evaluate.coco_results(dataset, i, found | {"masks": found["masks"][:, None].float()})
    for kind in ("bbox", "segm"):
        scores, table = evaluate.average_precision(dataset, results, kind)
        assert scores["AP"] == scores["AP50"] == scores["AP75"] == pytest.approx(1.0) and "= 1.000" in table
    return results


def compare_with_pycocotools(dataset, annotations, results):
    """Worse results, scored by pycocotools alone, from files, as its documentation shows it."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rng = np.random.default_rng(0)
    for result in results:
        result["bbox"] = (result["bbox"] + rng.normal(0, 2, 4)).tolist()
        result["score"] = rng.random()
        if rng.random() < 0.3:
            result["category_id"] = int(rng.choice(dataset.category_ids))
    for kind, other in (("bbox", "segmentation"), ("segm", "bbox")):
        alone = [{key: value for key, value in result.items() if key != other} for result in results]
        Path("results.json").write_text(json.dumps(alone))
        truth = COCO(annotations)
        official = COCOeval(truth, truth.loadRes("results.json"), kind)
        official.params.imgIds = dataset.image_ids
        for step in (official.evaluate, official.accumulate, official.summarize):
            step()
        scores, _ = evaluate.average_precision(dataset, results, kind)
        assert list(scores.values()) == official.stats.tolist() and scores["AR 100"] >= 0
        for result in results:  # the sizes of masks are the masks' own, whatever the boxes are
            result["bbox"] = [0.0, 0.0, 500.0, 500.0]


def test_a_detector_is_torchvisions_in_both_modes():
    torch.manual_seed(0)
    detector = small_detector("r50-fpn", masks=True)
    images = [torch.rand(3, 64, 90), torch.rand(3, 70, 64)]
    some = dict(boxes=torch.tensor([[5.0, 5, 40, 50]]), labels=torch.tensor([2]))
    none = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    some["masks"], none["masks"] = torch.ones(1, 64, 90).byte(), torch.zeros(0, 70, 64).byte()
    torch.manual_seed(1)
    ours = detector(images, [some, none]).losses
    torch.manual_seed(1)
    torch.testing.assert_close(ours, dict(detector.rcnn(images, [some, none])))
    nothing = detector(images[1:], [none]).losses
    assert torch.stack(list(nothing.values())).isfinite().all() and len(nothing) == 5
    assert nothing["loss_box_reg"] == nothing["loss_rpn_box_reg"] == nothing["loss_mask"] == 0
    detector.eval()
    with torch.no_grad():
        torch.testing.assert_close(detector(images).detections, detector.rcnn(images), rtol=0, atol=0)


def test_the_second_look_of_a_detector_has_the_sizes_of_the_first():
    detector, seen = small_detector(short_sides=(48, 64, 96, 112), long_side=200).train(), []
    detector.pyramid.register_forward_pre_hook(lambda pyramid, inputs: seen.append(inputs[0]))
    images = [torch.rand(3, 60, 80), torch.rand(3, 80, 50), torch.rand(3, 40, 90)]
    target = dict(boxes=torch.tensor([[5.0, 5, 30, 35]]), labels=torch.ones(1, dtype=torch.int64))
    sizes = set()
    for _ in range(4):
        out = detector(images, [target] * 3)
        detector.routes(images, out.sizes)
        assert torch.equal(*seen[-2:])  # of the same look, pixel for pixel
        sizes |= {tuple(seen[-1].shape), *out.sizes}
    assert len(sizes) > 6


def test_padding_does_not_move_what_the_regions_see():
    """The first image decides nothing, though it is padded from 64x65 to 64x128."""
    detector = small_detector(masks=True).eval()
    with torch.no_grad():
        detector([torch.rand(3, 65, 64)])
    ramp = torch.arange(32.0).expand(1, 1, 32, 32) * 4  # a map of stride 4: how far right it is, in pixels
    maps = {str(i): ramp[..., :: 2**i, :: 2**i] for i in range(4)}
    for align in (detector.rcnn.roi_heads.box_roi_pool, detector.rcnn.roi_heads.mask_roi_pool):
        regions = align(maps, [torch.tensor([[32.0, 8, 48, 24]])], [(65, 64)])
        assert regions.mean().item() == pytest.approx(40, abs=1e-3)  # the middle of the box


def test_a_detector_in_bfloat16_has_boxes_and_gates_in_float32():
    detector, seen = small_detector(masks=True).train(), []
    detector.rcnn.rpn.register_forward_hook(lambda module, inputs, out: seen.extend(out[0]))
    detector.rcnn.roi_heads.box_predictor.register_forward_hook(lambda module, inputs, out: seen.extend(out))
    target = {"boxes": torch.tensor([[10.0, 12.0, 50.0, 40.0]]), "labels": torch.tensor([1])}
    target["masks"] = torch.ones(1, 64, 96, dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        out = detector([torch.rand(3, 64, 96)] * 2, [target] * 2)
    assert len(seen) == 4
    for part in (*seen, out.A, out.cost):
        assert part.dtype == torch.float32
    total = sum(out.losses.values())
    total.backward()
    assert total.isfinite()


def test_coco_items_are_what_the_file_says_and_are_flipped_with_their_boxes():
    contents, whole = write_coco(), open_coco()
    assert (whole.classes, whole.category_ids) == (["dark", "bright"], [3, 7])  # by id; ids have gaps
    assert whole.image_ids == [100, 107, 114, 121, 128] and whole.image_name(1) == "000000000001.jpg"
    found = []
    for index, id in enumerate(whole.image_ids):
        image, target, i = whole[index]
        assert i == index and image.dtype == torch.uint8 and image.shape[1:] == target["masks"].shape[1:]
        for box, label, mask in zip(target["boxes"].int().tolist(), target["labels"], target["masks"]):
            x, y, right, below = box
            assert mask.sum() == (right - x) * (below - y) and mask[y:below, x:right].all()
            found.append((id, whole.category_ids[label - 1], [x, y, right - x, below - y]))
    assert found == [
        (a["image_id"], a["category_id"], a["bbox"])
        for a in contents["annotations"] if a["bbox"][2] and not a["iscrowd"]]
    training = open_coco(train=True, masks=False)
    assert training.image_ids == [100, 107, 114] and "masks" not in training[0][1]  # those with objects
    (plain, truth, _), flipped = whole[1], 0
    x1, y1, x2, y2 = truth["boxes"].unbind(1)
    for _ in range(20):
        image, target, _ = training[1]
        if not torch.equal(image, plain):
            flipped += torch.equal(image, plain.flip(2))
            torch.testing.assert_close(target["boxes"], torch.stack([60 - x2, y1, 60 - x1, y2], 1))
    assert 3 < flipped < 17


def test_bad_coco_files_are_named_in_one_line():
    contents, secret = write_coco(), os.path.abspath("coco/secret.jpg")
    box, (image, *rest) = contents["annotations"][0], contents["images"]
    shutil.copy(f"coco/train2017/{image['file_name']}", secret)
    for part, value, word in [
        ("images", [dict(id=1)], "images"), ("images", "none", "bad.json"), ("images", [], "bad.json"),
        ("images", [image | dict(file_name="gone.jpg"), *rest], "no such image"),
        ("images", [image | dict(file_name="../secret.jpg"), *rest], "no such image"),
        ("images", [image | dict(file_name=secret), *rest], "no such image"),
        ("images", [image] * 2, "same id"),
        ("categories", [dict(id=9, name="x")], "category_id"), ("annotations", [], "object"),
        ("annotations", [box | dict(bbox=[1, 2, 3])], "annotation 1"), ("annotations", [box, box], "same id"),
        ("annotations", [box | dict(image_id="one")], "'one'"),
        ("annotations", [box | dict(segmentation=[["a"] * 6])], "--masks"),
        ("annotations", [box | dict(image_id=5)], "not list"),
        ("annotations", [box | dict(segmentation=[[1, 2, 3, 4, 5]])], "polygon"),
        ("annotations", [box | dict(segmentation=[])], "no segmentation"),
        ("annotations", [box | dict(segmentation=[[1, 2, 3, 4], []])], "2 polygons have fewer than three"),
    ]:
        Path("bad.json").write_text(json.dumps(contents | {part: value}))
        refuses(lambda: open_coco(train=True, annotations="bad.json"), word)
    box["segmentation"] += [[20.0, 20.0], []]  # what a stray click leaves behind, beside a good outline
    Path("stray.json").write_text(json.dumps(contents))
    with pytest.warns(UserWarning, match="2 polygons have fewer than three corners and are left out"):
        stray = open_coco(train=True, annotations="stray.json")
    for got, wanted in zip(stray.file.objects(0), open_coco().file.objects(0), strict=True):
        assert (got.mask(60, 80) == wanted.mask(60, 80)).all()
    Path("bad.json").write_text("{")
    for wrong in (dict(annotations="bad.json"), dict(annotations="no.json"), dict(images="nowhere")):
        refuses(lambda: open_coco(**wrong), *wrong.values())
    Image.new("RGB", (31, 32)).save("coco/train2017/000000000001.jpg")
    with pytest.warns(UserWarning, match="1 boxes, the first that of annotation 4"):
        whole = open_coco(train=True)
    refuses(lambda: whole[1], "000000000001.jpg", "31x32")


def read_annotations(contents, masks=False, **changes):
    """What becomes of a file's contents, with changes to all annotations: the file, and its objects."""
    annotations = [a | changes for a in contents["annotations"] if a["bbox"][2] and not a["iscrowd"]]
    Path("own.json").write_text(json.dumps(contents | dict(annotations=annotations)), "utf-8-sig")
    file = data.read_coco("own.json", masks)
    return file, [found for row in range(len(file.names)) for found in file.objects(row)]


@pytest.mark.parametrize("kind", [str, float, lambda n: f"6ba7b810-{n:012d}", lambda n: n + 0.5])
def test_ids_of_any_kind_find_their_records_and_are_given_back(kind):
    contents = write_coco("val", sizes=((60, 80),) * 12)
    expected = check_truth_has_full_score(open_coco(split="val"))
    plain = read_annotations(contents)[1]
    for image in contents["images"]:
        image["id"] = kind(image["id"] - 100)
    for category in contents["categories"]:
        category["id"] = kind(category["id"])
    for annotation in contents["annotations"]:
        annotation |= dict(
            id=kind(annotation["id"]), image_id=kind(annotation["image_id"] - 100),
            category_id=kind(annotation["category_id"]))
    file, objects = read_annotations(contents)
    assert file.image_ids == [kind(7 * i) for i in range(12)] and file.category_ids == [kind(3), kind(7)]
    assert objects == plain
    Path("coco/annotations/instances_val2017.json").write_text(json.dumps(contents))
    results = check_truth_has_full_score(open_coco(split="val"))
    for found, same in zip(results, expected, strict=True):
        assert found["image_id"] == kind(same["image_id"] - 100) and found["bbox"] == same["bbox"]
        assert found["category_id"] == kind(same["category_id"])


def test_numbers_may_be_text_and_boxes_end_with_their_image():
    contents = write_coco()
    plain, objects = read_annotations(contents)
    for image in contents["images"]:
        image |= dict(width=str(image["width"]), height=float(image["height"]))
    text = [a | dict(bbox=[*map(str, a["bbox"])], area=str(a["area"])) for a in contents["annotations"]]
    for iscrowd in ("0", 0.0, False, None):
        file, found = read_annotations(contents | dict(annotations=text), iscrowd=iscrowd)
        assert found == objects and torch.equal(file.sizes, plain.sizes)
    first = contents["annotations"][0]
    for box, kept in [
        ([-5, -5, 20, 20], [0, 0, 15, 15]), ([70, 50, 20, 20], [70, 50, 10, 10]),
        ([500, 500, 30, 30], None), ([-30, 5, 30, 9], None), ([5, 5, -4, 4], None), ([5, 5, 4, 0], None),
        ([5, 5, 4, 0.5], [5, 5, 4, 0.5]),
    ]:
        found = read_annotations(contents | dict(annotations=[first | dict(area=None)]), bbox=box)[1]
        assert [(one.box, one.area) for one in found] == ([(kept, kept[2] * kept[3])] if kept else [])
    for name, value in [("bbox", "1234"), ("bbox", [1, 2, "x", 4]), ("iscrowd", "no"), ("area", "nan"),
                        ("area", [1]), ("image_id", None), ("category_id", {}), ("bbox", None)]:
        refuses(lambda: read_annotations(contents, **{name: value}), "own.json: annotation 1 ")
    for area in (-1, 0, 1e300):  # no area of a mask in this box
        assert read_annotations(contents, area=area)[1] == objects
    for size in (0, "wide", None, 60.5, -3, 1e30, 10**30):
        images = [contents["images"][0] | dict(width=size), *contents["images"][1:]]
        refuses(lambda: read_annotations(contents | dict(images=images)), "image 100", "width")


def test_run_lengths_must_make_up_their_image():
    from pycocotools import mask as rle

    contents, rng = write_coco(), np.random.default_rng(0)
    contents["annotations"] = contents["annotations"][:1]
    for share in (0.0, 0.02, 0.5, 1.0):
        mask = np.asfortranarray(rng.random((60, 80)) < share).astype(np.uint8)
        mask[10:40, 10:60] = 1
        packed = rle.encode(np.asfortranarray(mask))
        text = packed["counts"].decode()
        changes = np.flatnonzero(np.diff(np.concatenate([[0], mask.ravel("F"), [2]])))
        lengths = np.diff(np.concatenate([[0], changes])).tolist()
        assert data._run_lengths(text).tolist() == lengths
        for counts in (text, lengths):
            found = read_annotations(contents, True, segmentation=dict(size=[60, 80], counts=counts))[1]
            assert np.array_equal(found[0].mask(60, 80), mask)
        for wrong in [
            lengths[:-1], [*lengths, 1], [-1, 1, *lengths], [*lengths[:-1], lengths[-1] - 700],
            ["x"], [[1]], 5, [4801], [2**70], [None], text[:-1], text + "1", text + "a", text + "o" * 9, "é",
            4800, [lengths], [lengths[0] + 0.5, lengths[1] - 0.5, *lengths[2:]], [math.inf], [math.nan],
        ]:
            segmentation = dict(size=[60, 80], counts=wrong)
            refuses(lambda: read_annotations(contents, True, segmentation=segmentation), "annotation 1 ")
    for nothing in ([4800], rle.encode(np.zeros((60, 80), np.uint8, "F"))["counts"].decode()):
        file, found = read_annotations(contents, True, segmentation=dict(size=[60, 80], counts=nothing))
        assert file.flat == [1] and not found
    corners = [5, 5, 30, 5, 30, 30]
    found = read_annotations(contents, True, segmentation=corners)[1]  # one without brackets of its own
    assert pickle.loads(found[0].outline) == [corners]
    endless = [9e4, 0, -9e4, 5] * 99  # each pixel of an outline takes memory
    for wrong in ([[5, 5, 9, 5, 9, math.nan]], [[5, 5, 1e9, 5, 9, 9]], [[5, 5, 9, "9", 5, 5]], [endless]):
        refuses(lambda: read_annotations(contents, True, segmentation=wrong), "annotation 1", "--masks")


def test_names_of_files_may_be_written_as_on_windows_or_with_other_folders_in_front():
    contents, file = write_coco(sizes=((60, 80), (64, 64))), Path("coco/annotations/instances_train2017.json")
    names = [image["file_name"] for image in contents["images"]]
    for front in ("train2017\\", "C:\\upload\\4\\", "images/"):
        for image, name in zip(contents["images"], names):
            image["file_name"] = front + name
        file.write_text(json.dumps(contents))
        for folder in ("coco/train2017", "coco")[: 1 + front.startswith("train")]:
            dataset = open_coco(images=folder)
            assert [Path(dataset.image_name(i)).name for i in range(2)] == names and len(dataset[0]) == 3
    contents["images"][0]["file_name"] = contents["images"][1]["file_name"].replace("images", "others")
    file.write_text(json.dumps(contents))
    refuses(open_coco, "others")  # two of one name, were it not for the folders
    contents["images"][0]["file_name"] = "images/gone.jpg"
    file.write_text(json.dumps(contents))
    refuses(open_coco, "images/gone.jpg")


def test_what_is_painted_as_a_crowd_is_said():
    contents = write_coco()
    for n, annotation in enumerate(contents["annotations"]):
        annotation["iscrowd"] = int(n % 2)
    Path("own.json").write_text(json.dumps(contents))
    with pytest.warns(UserWarning, match="4 of 10 annotations have iscrowd 1"):
        open_coco(train=True, annotations="own.json")
    assert open_coco(annotations="own.json").has_truth
    for annotation in contents["annotations"]:
        annotation["iscrowd"] = 1
    Path("own.json").write_text(json.dumps(contents))
    refuses(lambda: open_coco(train=True, annotations="own.json"), "no image has an object", "iscrowd 1")
    assert not open_coco(annotations="own.json").has_truth  # its AP would be -1


def test_pictures_too_narrow_for_a_detector_are_named(trained):
    write_both_splits_of_coco()
    contents = write_coco("val", sizes=(*[(60, 80)] * 4, (300, 2)))  # the last has no objects
    file = Path("coco/annotations/instances_val2017.json")
    refuses(lambda: run(train_det.main, TINY_DET, "--data coco --iters 1 --name narrow"), "000000000004.jpg")
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error), pytest.raises(SystemExit):
        run(evaluate.main, trained / "runs/det/last.pt", f"--image coco/val2017 --out drawn {QUIET}")
    assert "000000000004.jpg: an image of 2x300 pixels" in error.getvalue()
    assert "000000000001.jpg" in out.getvalue()
    contents["images"][1]["width"] = 81
    file.write_text(json.dumps(contents))
    refuses(lambda: open_coco(split="val"), "000000000001.jpg", "80x60", "81x60")


def test_the_truth_has_full_score_and_worse_results_score_as_by_pycocotools():
    contents = write_coco(sizes=((60, 80),) * 3 + ((64, 64),) * 12)
    file = "coco/annotations/instances_train2017.json"
    annotations = [a for a in contents["annotations"] if a["bbox"][2]]  # else nothing can be found
    Path(file).write_text(json.dumps(contents | dict(annotations=annotations)))
    compare_with_pycocotools(open_coco(), file, check_truth_has_full_score(open_coco()))
    assert evaluate.average_precision(open_coco(), [], "bbox")[0]["AP"] == 0  # nothing found at all
    for n, annotation in enumerate(annotations):  # other tools count from 0 or 2^70, or leave things out
        annotation |= dict(id=n if n < 20 else 2**70 + n, area=None)
        if not annotation["iscrowd"]:
            del annotation["iscrowd"]
    Path(file).write_text(json.dumps(contents | dict(annotations=annotations)))
    check_truth_has_full_score(open_coco())
    shapes = data.detection_dataset("shapes", None, "val", train=False, masks=True, n_val=12)
    check_truth_has_full_score(shapes)
    for i in range(12):  # against the scenes, by pycocotools' own decoder
        masks = [shapes.coco.annToMask(annotation) for annotation in shapes.coco.imgToAnns[i]]
        assert np.array_equal(np.array(masks, bool), shapes.scenes.scene(i).masks.numpy())


def test_on_real_coco_the_truth_has_full_score_and_worse_results_score_as_by_pycocotools():
    root = real("coco-mini")
    dataset = open_coco(str(root), "val", limit=20)
    results = check_truth_has_full_score(dataset)
    compare_with_pycocotools(dataset, root / "annotations" / "instances_val2017.json", results)


# ============ checkpoints ============


def test_a_network_starts_from_whatever_fits():
    other = model.build_model("dr-a", "segmentation", 19, layers=4, width=8)
    network = model.build_model("dr-a", "segmentation", 11, layers=4, width=8)
    before, given = copy.deepcopy(network.state_dict()), other.state_dict()
    report = model.initialize(network, {n: w for n, w in given.items() if ".gate." not in n}, "f")
    assert report.left_over == ["head.predictor.weight", "head.predictor.bias"]  # of other shapes
    for name, weight in network.state_dict().items():
        kept = ".gate." in name or name.startswith("head.predictor.")
        assert torch.equal(weight, before[name] if kept else given[name])
        assert (name in report.missing) == (kept and not name.endswith("num_batches_tracked"))
    assert f"{len(report.matched)} tensors matched, {len(report.missing)} missing (" in str(report)
    torch.save(given, "file.pth")  # weights alone
    assert not model.initialize(other, model.read_weights("file.pth"), "f").missing
    for weight in (3, torch.zeros(2)):
        torch.save({"model": {"backbone.stem.stem_1.weight": weight}}, "file.pth")
        refuses(lambda: model.initialize(network, model.read_weights("file.pth"), "file.pth"), "file.pth")


def test_a_detector_starts_from_a_segmenter_and_the_reverse():
    network = model.build_model("dr-a", "segmentation", 11, layers=4, width=8)
    narrow = model.build_model("dr-a", "segmentation", 11, layers=4, width=4)
    detector = small_detector(layers=5, width=8)
    for starts, other in ((detector, network), (network, detector)):
        for weight in other.parameters():
            torch.nn.init.normal_(weight)
        model.save_checkpoint(Path("file.pt"), other, model_args={})
        report = model.initialize(starts, model.read_weights("file.pt"), "file.pt")
        cell, same = (n.backbone.layers[2][1].cell.body[0].weight for n in (starts, other))
        assert torch.equal(cell, same) and report.missing  # the first layers of the backbone are the same
        refuses(lambda: model.initialize(narrow, model.read_weights("file.pt"), ""), "do not fit the network")


class RunsCode:
    """A pickle that would write a file when loaded."""

    def __reduce__(self):
        return open, ("ran", "w")


def test_checkpoints_go_round_and_other_files_are_refused():
    args = dict(variant="dr-a", task="segmentation", num_classes=3, layers=4, width=4, gate=None)
    network, path = model.build_model(**args).eval(), Path("a.pt")
    model.save_checkpoint(path, network, model_args=args, classes=["x", "y", "z"])
    assert os.listdir() == ["a.pt"]  # no temporary file stays
    again, contents = model.load_checkpoint(path)
    images = torch.randn(1, 3, 50, 70)  # any size
    assert network(images).logits.shape == (1, 3, 50, 70)
    assert torch.equal(network(images).logits, again(images).logits)
    assert contents["classes"] == ["x", "y", "z"]
    whole = path.read_bytes()
    Path("text.pt").write_text("hello")
    Path("cut.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"weights": RunsCode(), "model_args": {}}, "code.pt")
    torch.save({"something": 1}, "other.pt")
    torch.save({"weights": {}, "model_args": args}, "unfit.pt")
    for name in ("text.pt", "code.pt", "other.pt", "unfit.pt", "cut.pt", "missing.pt", "."):
        refuses(lambda: model.load_checkpoint(name), name)
    assert not Path("ran").exists()


def test_a_full_disk_leaves_the_file_before_it():
    network, path = torch.nn.Linear(100, 100), Path("last.pt")
    model.save_checkpoint(path, network, iteration=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        refuses(lambda: model.save_checkpoint(path, network, iteration=2), path, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir() == ["last.pt"] and model.read_file(path, "")["iteration"] == 1

    def interrupted(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.write_file(path, interrupted)
    assert os.listdir() == ["last.pt"] and model.read_file(path, "")["iteration"] == 1


# ============ evaluation ============


def test_miou_equals_cityscapesscripts_on_the_written_predictions():
    from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official

    names = ("aachen/aachen_000000_000019", "bonn/bonn_000000_000019")  # the official script takes them apart
    write_cityscapes("val", names, (64, 128), plate=0)
    torch.manual_seed(0)
    args = dict(variant="dr-raw", task="segmentation", num_classes=19, layers=4, width=4)
    network, info = model.build_model(**args), data.SEGMENTATION["cityscapes"]
    network.head.predictor.weight.data.mul_(50)  # many classes get predicted
    for norm in parts_of(network, torch.nn.BatchNorm2d):
        norm.running_var.fill_(0.1)
    model.save_checkpoint(
        Path("last.pt"), network, model_args=args, classes=list(info.classes), palette=info.palette,
        task="segmentation", dataset="cityscapes", data="cs", data_options={}, config={"k": 2}, iteration=1,
        bank={"clusters": None})
    succeeds(evaluate.main, "last.pt --predictions out", QUIET)
    metrics = read_json("metrics.json")
    truths, predictions = sorted(Path("cs").rglob("*labelIds.png")), sorted(Path("out").rglob("*.png"))
    official.args.quiet, official.args.JSONOutput, official.args.evalInstLevelScore = True, False, False
    official.args.evalPixelAccuracy = False
    result = official.evaluateImgLists(list(map(str, predictions)), list(map(str, truths)), official.args)
    assert len(predictions) == 2 and len(set(metrics["iou"].values())) > 4
    assert metrics["miou"] / 100 == pytest.approx(result["averageScoreClasses"], abs=1e-9)
    for name, ours in metrics["iou"].items():
        theirs = result["classScores"][name]
        assert (ours is None and math.isnan(theirs)) or ours / 100 == pytest.approx(theirs, abs=1e-9)


def test_one_process_evaluates_as_two_do(trained):
    os.chdir(trained)
    out = succeeds(evaluate.main, "runs/seg/last.pt", QUIET)
    assert "IoU % val" in out and "\nexpert" in out and "\npaper " in out
    metrics, during = read_json("runs/seg/metrics.json"), events(Path("runs/seg"), "evaluation")[-1]
    assert metrics["images"] == sum(metrics["images_per_expert"]) == 12 and metrics["variant"] == "divdr-a"
    assert metrics["miou"] == pytest.approx(100 * during["miou"], abs=1e-6)
    for count, gflops in metrics["gflops"].items():
        assert 0 < gflops["min"] <= gflops["mean"] <= gflops["max"]
        assert gflops["mean"] == pytest.approx(during["gflops"][count])

    two, detections = read_json("runs/det/metrics.json"), read_json("runs/det/detections.json")
    out = succeeds(evaluate.main, "runs/det/last.pt", QUIET)
    one, others = read_json("runs/det/metrics.json"), read_json("runs/det/detections.json")
    assert one["images"] == 5 and out.count("Average Precision") == 12 and set(one["box"]) == set(one["mask"])
    assert list(one["gflops"]) == ["paper", "exact", "paper at 800x800"]
    assert one["gflops"] == two["gflops"] and one["images_per_expert"] == two["images_per_expert"]
    best = [{}, {}]
    for found, scores in zip((detections, others), best):  # rounding may let a weak box more or less through
        for result in found:
            scores[result["image_id"]] = max(scores.get(result["image_id"], 0), result["score"])
    assert best[0] == pytest.approx(best[1], abs=1e-4)
    scores, _ = evaluate.average_precision(open_coco(split="val"), others, "segm")
    assert one["mask"]["AP"] == pytest.approx(100 * scores["AP"])


def test_what_cannot_be_written_costs_no_result(trained):
    shutil.copytree(trained / "runs" / "seg", "seg")
    Path("seg/metrics.json").unlink(missing_ok=True)
    Path("seg/metrics.json").mkdir()  # no file can take its place
    os.symlink(trained / "camvid", "camvid")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        refuses(lambda: run(evaluate.main, "seg/last.pt", QUIET), "seg/metrics.json", "--out DIR")
    assert "IoU % val" in out.getvalue() and "\nexpert" in out.getvalue()
    both = trained / "runs" / "seg" / "last.pt", "seg/last.pt"
    succeeds(evaluate.main, *both, QUIET, "--data camvid --out both")
    assert os.path.exists("both/seg/metrics.json") and os.path.exists("both/seg-2/metrics.json")
    os.makedirs("preds/val/03.png")
    refuses(lambda: run(evaluate.main, "seg/last.pt --out x --predictions preds", QUIET), "preds/val/03.png")
    assert len([path for path in Path("preds/val").iterdir() if path.is_file()]) == 11
    shutil.copytree("camvid", "own")
    for flags in ("--data own --predictions own", "--predictions camvid/trainannot"):
        refuses(lambda: run(evaluate.main, "seg/last.pt", flags, QUIET), "own files")


def test_a_table_takes_numbers_from_where_an_evaluation_left_them_while_they_are_newer(trained, monkeypatch):
    shutil.copytree(trained / "runs" / "seg", "seg")
    os.symlink(trained / "camvid", "camvid")
    passes, original = [], evaluate.evaluate_segmentation
    monkeypatch.setattr(evaluate, "evaluate_segmentation", lambda *args: passes.append(1) or original(*args))

    def count(*flags):
        passes.clear()
        out = succeeds(evaluate.main, "seg/last.pt", *flags, QUIET)
        return len(passes), out

    assert count()[0] == count()[0] == 1  # alone: always anew
    before = read_json("seg/metrics.json")
    assert count("--format markdown")[0] == 0
    assert count("--format csv --split train")[0] == 1 and count("--format csv --split train")[0] == 0
    assert read_json("seg/metrics.json") == before and read_json("seg/metrics-train.json")["split"] == "train"
    assert count("--format csv --data camvid")[0] == 1  # other flags
    assert count("--format csv --data camvid")[0] == 0 and count("--format csv")[0] == 1
    contents = torch.load("seg/last.pt", weights_only=True)
    torch.save(contents | {"iteration": 11}, "seg/last.pt")
    os.utime("seg/last.pt", (time.time() + 9,) * 2)  # newer than the numbers
    passed, out = count("--format text")
    assert passed == 1 and "iteration 11 of 12" in out


def made_up_run(name, miou, seed=0, variant="divdr-a", k=3, gate="small", **config):
    """What evaluate.py knows of a run after a split of 6 images, without the run."""
    network = model.build_model(variant, "segmentation", 2, layers=4, width=8, gate=gate)
    generator = torch.Generator().manual_seed(seed)
    exists = torch.tensor([node.exists() for node in network.backbone.all_nodes()[1:]]).flatten()
    centers = torch.rand(k, len(exists), generator=generator) * exists
    A = centers[torch.arange(6) % (k - 1)]  # the last cluster is empty
    A = (A + 0.01 * torch.rand(A.shape, generator=generator)) * exists
    flops = {"paper": torch.arange(6) * 1_000_000 + seed * 10_000_000 + 50_000_000}
    metrics = {"dataset": "shapes", "split": "val", "images": 6, "miou": miou}
    metrics["gflops"] = {"paper": evaluate.mean_min_max(flops["paper"])}
    metrics |= evaluate.describe_experts(A, flops["paper"], centers, kmeans.assign(A, centers)[0])
    checkpoint = dict(
        path=Path(f"runs/{name}/last.pt"), task="segmentation", iteration=10, classes=["a", "b"],
        config=dict(seed=seed, k=k, margin=5.0, iters=10, gate=gate, kmeans_every=50) | config,
        model_args=dict(variant=variant, layers=4, width=8, gate=gate))
    result = evaluate.Result(A, flops, torch.tensor([[32, 32]] * 6))
    clusters = kmeans.Clusters(centers, torch.zeros(6), 0.1, [])
    return evaluate.Run(name, checkpoint, metrics, clusters, result)


def test_seeds_of_one_configuration_are_one_row_with_mean_and_deviation():
    scores = {2: [61.0, 63.5, 60.0], 3: [64.0]}
    runs = [made_up_run(f"k{k}-{s}", score, s, k=k) for k in scores for s, score in enumerate(scores[k])]
    runs[1].checkpoint["config"] |= dict(name="other", data="elsewhere", workers=7)  # decide nothing
    runs.append(made_up_run("dr", 58.25, variant="dr-a"))
    rows = evaluate.make_table(runs, [])
    titles = ["Method", "Backbone", "K", "mIoU val", "GFLOPs", "Inter", "Intra", "To centre", "Seeds"]
    assert rows[0] == titles
    dr, two, three = rows[1:]
    gflops = [run.result.flops["paper"].double().mean().item() / 1e9 for run in runs[:3]]
    assert two[:3] == ["DivDR-A", "Layer4, width 8", "2"]
    assert two[3] == f"{np.mean(scores[2]):.2f} ± {np.std(scores[2], ddof=1):.2f}"
    assert two[4] == f"{np.mean(gflops):.4f} ± {np.std(gflops, ddof=1):.4f}"
    assert (two[-1], dr[0], dr[3], three[2], three[3], three[-1]) == (3, "DR-A", "58.25", "3", "64.00", 1)
    assert r"R\&D\_100\% & 61.50 $\pm$ 1.80" in model.table([["R&D_100%", "61.50 ± 1.80"]], "latex")
    for line in model.table(rows, "latex").splitlines():
        if line.endswith(r" \\"):  # as many cells as there are columns
            assert len(re.findall(r"(?<!\\)&", line)) == len(titles) - 1
    spread = [["GFLOPs", "mean", "min", "max"], ["paper", "0.00159", "8.64e-06", "3.10"]]
    assert [line.split() for line in model.table(spread, left=1).splitlines()] == spread
    listed = list(csv.DictReader(io.StringIO(model.table(evaluate.list_runs(runs), "csv"))))
    assert [row["run"] for row in listed] == ["k2-0", "k2-1", "k2-2", "k3-0", "dr"]
    for run, row in zip(runs, listed):
        assert float(row["mIoU"]) == run.metrics["miou"] and float(row["Inter"]) == run.metrics["inter"]
        assert (row["k"], row["seed"]) == tuple(str(run.checkpoint["config"][name]) for name in ("k", "seed"))
        assert sum(map(int, row["images per expert"].split())) == 6


def test_runs_on_other_folders_or_classes_are_other_settings():
    runs = [made_up_run(f"run{i}", 60.0 + i, seed=i, data=place) for i, place in enumerate("aabb")]
    for run in runs:
        run.metrics["dataset"] = "folder"
    header, one, two = evaluate.make_table(runs, [])
    assert header[2] == "data" and (one[2], one[-1], two[2], two[-1]) == ("a", 2, "b", 2)
    runs[0].checkpoint["classes"] = ["other"]  # classes of one name are no others
    assert [row[-1] for row in evaluate.make_table(runs, [])] == ["Seeds", 1, 1, 2]
    swept = [made_up_run(f"{value}", 60.0, lambda2=value) for value in (0.1, 0.5)]  # 0.1 is the variant's
    swept.append(made_up_run("other", 60.0, lambda2=0.5, train_list="own.txt"))
    header, *rows = evaluate.make_table(swept, [])
    assert header[2:4] == ["λ2", "train_list"]
    assert [row[2:4] for row in rows] == [["0.1", "–"], ["0.5", "–"], ["0.5", "own.txt"]]


# ============ resuming ============


SHORT = "--dataset shapes --size 32 --subsets 2 --width 4 --bn-batches 2 --kmeans-every 3 --log-every 4"
SHORT += " --batch 4 --save-every 1 --device cpu --workers 1 --resume auto"
SHORT_SEG = f"{SHORT} --iters 16 --eval-every 8"
SHORT_DET = f"{SHORT} --iters 10 --eval-every 5 --layers 5 --pyramid 8 --short-sides 32 48 --long-side 64"
SHORT_DET += " --rois 8 --proposals 20 --limit 12 --masks --activations recompute"


def what_came_out(folder):
    """Weights, centres, bank and momentum of a run, and its log and the rest."""
    saved = model.read_file(folder / "last.pt", "")
    bank = saved["bank"]
    tensors = saved["weights"] | {"centers": bank["clusters"]["centers"], "bank": bank["values"]}
    for i, state in saved["optimizer"]["state"].items():
        tensors[f"momentum {i}"] = state["momentum_buffer"]
    return tensors, (events(folder), saved["iteration"], bank["clusters"]["sigma2"], saved["best"])


def run_script(name, folder, flags):
    """In a process of its own: the script as a person runs it."""
    multiprocessing.set_start_method("fork", force=True)  # so its loader starts workers as it does there
    os.chdir(folder)
    sys.argv = [name, *flags.split()]
    runpy.run_path(HERE / name, run_name="__main__")


@pytest.mark.parametrize("script, flags, signals", [
    (train_seg, SHORT_SEG, [signal.SIGKILL, signal.SIGTERM]), (train_det, SHORT_DET, [signal.SIGKILL])])
def test_a_killed_run_that_is_resumed_ends_as_the_one_that_nothing_stopped(script, flags, signals):
    saved, rng = Path("runs/parts/last.pt"), np.random.default_rng()
    for how in signals:
        arguments = (f"{script.__name__}.py", os.getcwd(), f"{flags} --name parts")
        process = PROCESSES.Process(target=run_script, args=arguments)
        before = saved.exists() and saved.stat().st_mtime_ns
        process.start()
        while process.is_alive() and (saved.exists() and saved.stat().st_mtime_ns) == before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))  # in a step, in K-means, in an evaluation, while saving
        assert process.is_alive(), "the run was over before it was killed"
        os.kill(process.pid, how)
        process.join(60)
        assert process.exitcode == -how
    succeeds(script.main, flags, "--name parts")
    succeeds(script.main, flags, "--name whole")
    tensors, rest = what_came_out(Path("runs/whole"))
    others, other_rest = what_came_out(Path("runs/parts"))
    torch.testing.assert_close(tensors, others, rtol=0, atol=0)
    assert rest == other_rest


def test_a_run_is_neither_overwritten_nor_resumed_as_another():
    write_camvid()
    command = f"{TINY_SEG} --iters 4 --name run"
    succeeds(train_seg.main, command)
    for flags, words in (
        ("", ["holds a run already", "--resume"]), ("--resume --lr 0.3", ["--lr 0.3", "0.05"]),
        ("--resume --name none", ["no run to go on with"]), ("--resume --seed 3", ["--seed 3", "with 0"]),
    ):
        refuses(lambda: run(train_seg.main, command, flags), *words)
    refuses(lambda: run(train_seg.main, command, "--resume --init x.pt"), "--init x.pt", "leave it out")
    before = Path("runs/run/last.pt").read_bytes()
    started = f"{command}-2 --init runs/run/last.pt"
    succeeds(train_seg.main, started)
    succeeds(train_seg.main, started.split(" --init")[0], "--resume")
    config = read_json("runs/run-2/config.json")
    assert (config["init"], config["lr"], config["gate_lr"]) == ("runs/run/last.pt", 0.05, 1.0)
    succeeds(train_seg.main, command, "--resume --log-every 2 --eval-every 1")  # nothing left to do
    older = torch.load("runs/run-2/last.pt", weights_only=True)
    del older["config"]["own"]  # of before there was that setting
    torch.save(older, "runs/run-2/last.pt")
    refuses(lambda: run(train_seg.main, started, "--resume"), "runs/run-2/last.pt", "this version")
    Path("camvid/train/00.png").unlink()
    Path("camvid/trainannot/00.png").unlink()
    refuses(lambda: run(train_seg.main, command, "--resume"), "--resume", "other data")
    assert Path("runs/run/last.pt").read_bytes() == before
    Path("runs/run/last.pt").write_bytes(b"nothing")
    refuses(lambda: run(train_seg.main, command, "--resume auto"), "runs/run/last.pt")
    Path("runs/run/last.pt").unlink()
    for resume in ("", "--resume", "--resume auto"):
        refuses(lambda: run(train_seg.main, command, resume), "best.pt but no last.pt")


def torchrun(flags, **variables):
    """Starts two processes that run train_seg.py as `SHORT_SEG` says."""
    command = [sys.executable, "-m", "torch.distributed.run", *flags.split(), "--nproc_per_node", "2"]
    command += [str(HERE / "train_seg.py"), *SHORT_SEG.replace("--workers 1", "--workers 0").split()]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | variables)
    return subprocess.Popen([*command, "--name", "run"], **options)


def test_two_processes_go_on_after_one_was_killed():
    launcher = torchrun("--standalone --max-restarts 1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    while launcher.poll() is None and not Path("runs/run/last.pt").exists():
        time.sleep(0.01)
    children = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[0]), signal.SIGKILL)
    out, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 0 and "failed (exitcode: -9)" in out, out
    assert model.read_file("runs/run/last.pt", "")["iteration"] == 16
    assert iterations(Path("runs/run"), "kmeans") == [3, 6, 9, 12, 15, 16]


def test_environments_in_which_processes_would_hang_are_refused(monkeypatch):
    for value in ("2", "two"):  # left behind, and no torchrun: it would wait for others without end
        monkeypatch.setenv("WORLD_SIZE", value)
        refuses(lambda: model.start_process("cpu"), "WORLD_SIZE", value, "torchrun")
    for value in ("", "1"):
        monkeypatch.setenv("WORLD_SIZE", value)
        monkeypatch.setenv("LOCAL_RANK", "x")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "")
        assert model.start_process("cpu")[:2] == (0, 1) and model.cores_per_process() >= 1
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    refuses(lambda: model.start_process("cpu"), "--max-restarts", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
