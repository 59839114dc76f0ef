"""The tests of extras/: shapes, static networks, what others published, figures, experts."""

import contextlib
import csv
import functools
import io
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import data
import evaluate
import kmeans
import model
import routing
import train_det
import train_seg
from extras import baselines, experts, figures, published, shapes
from test_smoke import (
    CPU, HERE, QUIET, TINY_SEG, events, in_a_folder_of_its_own, let_gates_decide, made_up_run,
    open_coco, parts_of, pytestmark, random_alphas, read_json, reference_routes, refuses, run, run_once,
    small_shapes, succeeds, trained, warmed_backbone, write_both_splits_of_coco, write_camvid,
)

assert in_a_folder_of_its_own and trained and pytestmark  # pytest finds these by their names


# ============ shapes ============


@pytest.mark.parametrize("subsets", [2, 4])
def test_shapes_are_reproducible_and_their_instances_make_up_the_mask(subsets):
    options = dict(train=False, size=96, subsets=subsets)
    dataset, again, classes = small_shapes(**options), small_shapes(**options), set()
    for i in (5, 0, 17, 3, 8):
        scene = dataset.scene(i)
        image, mask, masks, boxes, labels, subset = scene
        for a, b in zip(scene[:5], again.scene(i)[:5]):
            assert torch.equal(a, b)
        assert image.shape == (3, 96, 96) and image.dtype == torch.uint8 and subset == dataset.subset[i]
        assert torch.equal(mask.long(), (masks * labels[:, None, None]).sum(0)) and masks.sum(0).max() == 1
        for instance, box in zip(masks, boxes):
            rows, columns = instance.nonzero().T
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert torch.equal(dataset[i][0], image) and torch.equal(dataset[i][1], mask)
        for other in (small_shapes(**options, seed=1), small_shapes(**options, split="val")):
            assert not torch.equal(other[i][0], image)
        classes |= set(labels.tolist())
    assert classes == {1, 2, 3, 4, 5}
    many = small_shapes(subsets=subsets, n_train=240).subset
    assert many.bincount().tolist() == [240 // subsets] * subsets
    in_order = (many == torch.arange(240) % subsets).float().mean()
    assert abs(in_order - 1 / subsets) < 0.15


def test_a_picture_is_painted_once_for_all_that_ask(monkeypatch):
    painted, paint = [], shapes.ShapesDataset._paint
    monkeypatch.setattr(shapes.ShapesDataset, "_paint", lambda self, i: painted.append(i) or paint(self, i))
    options = dict(size=32, n_train=20, seed=9)
    first = data.segmentation_dataset("shapes", None, "train", False, **options)
    whole = [first[i] for i in range(20)]
    again = data.segmentation_dataset("shapes", None, "train", False, **options)
    assert [int(batch[2]) for batch in data.pass_loader(again, 1, workers=1)] == list(range(20))
    assert painted == list(range(20))
    assert len(pickle.dumps(again)) < 10_000  # which is sent to processes that are not forked
    for (image, mask, _), (other, same, _) in zip(whole, again):
        assert torch.equal(image, other) and torch.equal(mask, same)


def test_agreement_with_known_subsets_is_matched():
    truth = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    assert shapes.agreement((truth + 1) % 3, truth)[0] == 1
    labels = torch.tensor([1, 1, 0, 0, 0, 0, 2, 2, 1])
    accuracy, table, match = shapes.agreement(labels, truth)
    assert accuracy == pytest.approx(7 / 9) and match == [1, 0, 2]
    assert table.tolist() == [[1, 2, 0], [3, 0, 0], [0, 1, 2]]
    accuracy, table, _ = shapes.agreement(torch.arange(9) + 1, truth)  # more clusters than subsets
    assert accuracy == pytest.approx(3 / 9) and table.shape == (3, 10)
    accuracy, _, match = shapes.agreement(0 * truth, truth)  # one expert took all
    assert (accuracy, match.count(-1)) == (pytest.approx(1 / 3), 2)


def test_shapes_end_with_the_recovered_subsets_and_the_oracles_centres():
    flags = "--dataset shapes --size 32 --width 8 --iters 6 --kmeans-every 2 --oracle"
    out = succeeds(train_seg.main, flags, "--bn-batches 2 --name s", QUIET)
    metrics = read_json("runs/s/metrics.json")
    subsets = metrics["subsets"]["subset"]
    assert "recovered subsets" in out and list(subsets) == ["large", "tiny"] and metrics["k"] == 2
    checkpoint = model.load_checkpoint("runs/s/last.pt")[1]
    assert all(sum(row["experts"]) == 10 for row in subsets.values())
    costs = [row["gflops"] for row in subsets.values()]
    assert metrics["gflops"]["paper"]["mean"] == pytest.approx(sum(costs) / 2)
    subset = data.segmentation_dataset("shapes", None, "train", False, size=32).subset
    bank = checkpoint["bank"]
    for k in range(2):
        mine = bank["values"][(bank["seen_at"] > 0) & (subset == k)]
        torch.testing.assert_close(bank["clusters"]["centers"][k], mine.mean(0), atol=1e-5, rtol=1e-5)


# ============ classic routes ============


# Each network of eight layers as a drawing: a row per stride, 4 to 32, a column per layer; at every cell the
# paths that leave it, of up, keep and down. The init node, which keeps, is left out.
DRAWN = {
    "fcn-32s": "k d . . . . . ., . . k d . . . ., . . . . k d . ., . . . . . . k k",
    "deeplabv3": "k d . . . . . ., . . k d . . k k, . . . . k ukd k k, . . . . . . k k",
    "u-net": "kd k k k k k k k, . kd k k k k u ., . . kd k k u . ., . . . k u . . .",
    "hrnetv2": "k kd k kd k kd k k, . . k ukd k ukd k k, . . . . k ukd k k, . . . . . . k k",
    "auto-deeplab": "k d . . . . . ., . . d . . . . ., . . . k k d . k, . . . . . . u .",
}


@pytest.mark.parametrize("name", DRAWN)
def test_classic_networks_are_drawn_in_the_routing_space(name):
    rows = [line.split() for line in DRAWN[name].split(",")]
    wanted = [[False, True, False]]
    for layer, count in enumerate([2, 3, 4, 4, 4, 4, 4, 4]):
        wanted += [[letter in rows[s][layer] for letter in "ukd"] for s in range(count)]
    assert baselines.named_route(name, 8).tolist() == wanted
    for layers in (3, 4, 5, 11, 16, 33):  # opens no path that is not there, and reaches all its cells
        route = baselines.named_route(name, layers)
        assert torch.equal(routing.FixedBackbone(route, layers, 2, None).fixed_route, route)


@torch.no_grad()
def test_without_gates_every_alpha_is_1():
    backbone, image = warmed_backbone(), torch.randn(1, 3, 64, 128).double()
    for name in model.ROUTES:
        route = baselines.named_route(name, 6)
        fixed = routing.FixedBackbone(route, 6, 8, gate=None).double().eval()
        fixed.load_state_dict({name: backbone.state_dict()[name] for name in fixed.state_dict()})
        wanted = reference_routes(backbone, image, route.double())[0]
        assert not parts_of(fixed, routing.Gate)
        for s, feature in enumerate(fixed(image)):
            expected = wanted.get(s, torch.zeros(1, 1, 1, 1).double())
            torch.testing.assert_close(feature, expected.expand_as(feature), atol=1e-10, rtol=0)
            assert fixed.filled[s] == bool(feature.any())


def test_routes_are_read_by_name_or_from_a_file():
    Path("a.json").write_text(json.dumps({"routes": {"one": [[0, 1, 1]] * 18, "two": [[1, 1, 1]]}}))
    Path("b.json").write_text("[1]")
    Path("c.json").write_text(json.dumps({"routes": {"one": [[0.5, 1, 1]] * 18}}))
    for text, word in [
        ("v-net", "hrnetv2"), ("a.json", "a.json:one"), ("a.json:three", "a.json:two"), ("b.json", "no json"),
        ("c.json:one", "no json"), ("a.json:one", "--layers"), ("a.json:two", "--layers"),
    ]:
        refuses(lambda: baselines.read_route(text, 6), f"--route {text.split(':')[0]}", word)
    assert baselines.read_route("a.json:one", 5).tolist() == [[False, True, True]] * 18


# ============ static networks of other papers ============


def test_a_static_network_counts_what_runs():
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 5)).eval()
    multiplied, elements = 27 * 4 * 64 + 4 * 5, 4 * 64  # 10x10 -> 8x8 -> 4x4
    image = torch.zeros(1, 3, 10, 10)
    assert baselines.count_multiply_adds(network, image) == multiplied + 3 * elements + 64 + 64
    assert baselines.count_multiply_adds(network, image, elementwise=False) == multiplied


OTHER_PAPERS = ("bisenet-r18", "semantic-fpn-r101", "pspnet-r101")


@pytest.fixture
def shallow_resnets(monkeypatch):
    """One block per stage: as wide, but quick to run and to write."""
    blocks = torchvision.models.resnet
    for name, block in (("resnet18", blocks.BasicBlock), ("resnet101", blocks.Bottleneck)):
        monkeypatch.setattr(baselines, name, functools.partial(shallow_resnet, block))


def shallow_resnet(block, weights, **options):
    return torchvision.models.ResNet(block, [1, 1, 1, 1], **options)


def logits_of_another_paper(variant, images, network):
    """The networks once more, function by function, from the maps of their ResNet, in evaluation."""
    weights, maps = network.state_dict(), [*network.backbone(images).values()]

    def conv(x, name, activation=F.relu, stride=1):
        """A convolution without bias, NAME.0, batch norm, NAME.1, and an activation."""
        w = weights[f"{name}.0.weight"]
        norm = [weights[f"{name}.1.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        mean, variance, scale, bias = (values[:, None, None] for values in norm)
        x = F.conv2d(x, w, stride=stride, padding=w.shape[-1] // 2)
        return activation((x - mean) / (variance + 1e-5).sqrt() * scale + bias)

    def plain(x, name):
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def at(x, like):
        return F.interpolate(x, like.shape[2:], mode="bilinear")

    if variant == "pspnet-r101":
        x = maps[3]
        pooled = [conv(F.adaptive_avg_pool2d(x, b), f"pools.{i}.1") for i, b in enumerate((1, 2, 3, 6))]
        y = conv(torch.cat([x, *(at(p, x) for p in pooled)], 1), "predictor.0")
        return at(plain(y, "predictor.2"), images)
    if variant == "semantic-fpn-r101":
        total = 0
        pyramid = network.pyramid(dict(enumerate(maps)))
        for level in range(4):
            x = pyramid[level]
            for i in range(max(level, 1)):
                name = f"branches.{level}.{i}"
                x = F.conv2d(x, weights[f"{name}.0.weight"], padding=1)
                x = F.group_norm(x, 32, weights[f"{name}.1.weight"], weights[f"{name}.1.bias"]).relu()
                if level:
                    x = F.interpolate(x, scale_factor=2, mode="bilinear")
            total = total + x
        return F.interpolate(plain(total, "predictor"), scale_factor=4, mode="bilinear")
    y = conv(maps[3].mean((2, 3), keepdim=True), "context.1")
    for i, stage in enumerate((3, 2)):
        x = conv(maps[stage], f"attend.{i}.conv")
        x = x * conv(x.mean((2, 3), keepdim=True), f"attend.{i}.weight.1", torch.sigmoid)
        y = conv(at(x + y, maps[stage - 1]), f"refine.{i}")
    x = images
    for i, stride in enumerate((2, 2, 2, 1)):
        x = conv(x, f"spatial.{i}", stride=stride)
    y = conv(torch.cat([x, y], 1), "fuse")
    y = y + y * plain(plain(y.mean((2, 3), keepdim=True), "select.fc1").relu(), "select.fc2").sigmoid()
    return at(plain(conv(y, "predictor.0"), "predictor.1"), images)


@pytest.mark.parametrize("variant", OTHER_PAPERS)
def test_the_networks_of_other_papers_compute_what_these_say(variant, shallow_resnets):
    network = model.build_model(variant, "segmentation", 3).network
    network.train()(torch.randn(4, 3, 64, 96))  # running statistics
    network.eval().double()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    logits = network(images)["out"]
    torch.testing.assert_close(logits, logits_of_another_paper(variant, images, network))
    sizes = [tuple(x.shape[1:]) for x in network.backbone(images).values()]
    strides = [64 // height for _, height, _ in sizes]
    assert strides == ([4, 8, 8, 8] if variant == "pspnet-r101" else [4, 8, 16, 32])
    assert network(images[..., :50, :70])["out"].shape == (2, 3, 50, 70)


def test_the_networks_of_other_papers_cost_what_others_counted():
    far = {"bisenet-r18": 1.055, "deeplabv3-r101": 1.085}  # the README says what makes the difference
    rows = [row for row in csv.DictReader((HERE / "assets" / "published.csv").open()) if row["variant"]]
    assert {row["variant"] for row in rows} == {*OTHER_PAPERS, "deeplabv3-r101", "r50-fpn"}
    for row in rows:
        task, classes, size = "detection", 80, (800, 800)
        if row["measure"] == "mIoU":
            task, classes, size = "segmentation", 19, (1024, 2048)
        network = model.build_model(row["variant"], task, classes)
        ratio = network.real_cost(None, *size, "paper")["network"].item() / 1e9 / float(row["gflops"])
        if row["variant"] in far:
            assert ratio == pytest.approx(far[row["variant"]], abs=0.001)
        else:
            assert ratio == pytest.approx(1, abs=0.05)


def test_the_networks_of_other_papers_run_through_the_same_loop(shallow_resnets):
    write_camvid(count=4, size=(50, 70))  # no multiples of any stride
    flags = "--dataset camvid --data camvid --crop 64 --short-sides 64 --batch 2 --iters 3 --bn-batches 1"
    flags += " --variant bisenet-r18"
    resnet = baselines.resnet18(weights=None)
    torch.save(resnet.state_dict(), "resnet.pth")
    out = succeeds(train_seg.main, flags, "--init resnet.pth --name static", QUIET)
    config = read_json("runs/static/config.json")
    assert (config["lr"], config["clip"]) == (0.02, 0)
    count = len(without_counters(resnet.state_dict())) - 2
    assert f"{count} tensors matched, 0 missing, 2 left over (fc.weight" in out
    trained = model.load_checkpoint("runs/static/last.pt")[0].network
    for name, weight in resnet.named_parameters():
        assert name.startswith("fc.") or not torch.equal(weight, trained.backbone.get_parameter(name))
    torch.save(resnet.state_dict() | {"layer1.1.conv1.weight": torch.zeros(1)}, "deeper.pth")
    torch.save({0: torch.zeros(1)} | resnet.state_dict(), "numbered.pth")
    for file in ("runs/static/last.pt", "deeper.pth", "numbered.pth"):
        refuses(lambda: run(train_seg.main, flags, f"--name other --init {file}", QUIET), "ResNet-18")
    succeeds(evaluate.main, "runs/static/last.pt --figures drawn --format latex", QUIET)
    drawn = {path.stem for path in Path("drawn").glob("*.png")}  # without gates there are three
    assert drawn == {"predictions-static", "training-static", "trade-off"}
    metrics = read_json("runs/static/metrics.json")
    whole = model.build_model("bisenet-r18", "segmentation", 11)
    cost = whole.real_cost(None, 50, 70, "exact")["network"].item() / 1e9
    assert metrics["gflops"]["exact"]["mean"] == pytest.approx(cost) and 0 <= metrics["miou"] <= 100


def test_a_static_detector_starts_from_a_file_and_runs_through_the_same_loop(monkeypatch):
    """A smaller one of torchvision's, whose checkpoints take less time to write."""
    build = baselines.resnet_fpn_backbone
    smaller = dict(backbone_name="resnet18")
    monkeypatch.setattr(baselines, "resnet_fpn_backbone", lambda **options: build(**options | smaller))
    write_both_splits_of_coco()
    resnet = torchvision.models.resnet18(weights=None)
    torch.save(resnet.state_dict(), "resnet.pth")
    flags = f"{QUIET} --short-sides 64 --long-side 96 --proposals 40 --rois 16 --anchor 8 --data coco"
    flags += " --variant r50-fpn --batch 2 --iters 1 --bn-batches 1 --name static --init"
    out = succeeds(train_det.main, flags, "resnet.pth")
    assert "100 tensors matched" in out  # 20 convolutions, 20 norms of 4 numbers each
    network, checkpoint = model.load_checkpoint("runs/static/last.pt")
    body, name = network.pyramid.body.state_dict(), "layer{}.0.conv1.weight"
    for stage, same in ((1, True), (3, False)):  # the first is fixed, as torchvision does
        assert torch.equal(body[name.format(stage)], resnet.state_dict()[name.format(stage)]) == same
    assert checkpoint["bank"]["clusters"] is None
    for file, word in (("runs/static/last.pt", "conv1.weight"), ("none.pth", "none.pth")):
        refuses(lambda: run(train_det.main, flags, file, "--name other"), word)


# ============ what others published ============


def published_shapes(layers=16, C=64, classes=19):
    """Names and shapes of the weights as the authors' code writes them, from what its modules are."""
    shapes = {}

    def conv(name, c_in, c_out, k=1, groups=1, norm=True, bias=False):
        shapes[f"{name}.weight"] = (c_out, c_in // groups, k, k)
        for part in ("weight", "bias", "running_mean", "running_var")[: 4 * norm]:
            shapes[f"{name}.norm.{part}"] = (c_out,)
        if bias:
            shapes[f"{name}.bias"] = (c_out,)

    def node(name, c, up, down):
        for i in (0, 2):
            conv(f"{name}.cell_ops._ops.0.op.{i}", c, c, 3, groups=c, norm=False)
            conv(f"{name}.cell_ops._ops.0.op.{i + 1}", c, c)
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
        inner = layer < layers - 1
        for s in range(nodes):
            node(f"backbone.all_cell_list.{layer}.{s}", C * 2**s, up=inner and s > 0, down=inner and s < 3)
    for s in range(4):
        conv(f"sem_seg_head.layer_decoder_list.{s}", C * 2**s, C * 2 ** max(s - 1, 0))
    conv("sem_seg_head.predictor", C, classes, 3, norm=False, bias=True)
    return shapes


def published_file(path, classes=19, without=()):
    """Random weights in the authors' format, optimiser state and NumPy numbers among them -> the weights."""
    weights = {}
    for name, shape in published_shapes(4, 8, classes).items():
        if not any(part in name for part in without):
            weights[name] = torch.rand(shape) / math.prod(shape[1:]) ** 0.5 + 0.1
            if name.endswith("norm.weight"):
                weights[name.replace("norm.weight", "norm.num_batches_tracked")] = torch.tensor(7)
    optimizer = dict(state={0: dict(momentum_buffer=torch.zeros(2), step=np.int64(3))}, lr=np.float64(0.05))
    contents = dict(model=weights, optimizer=optimizer, iteration=np.int64(12), seen=np.arange(3.0))
    torch.save(contents, path)
    return weights


def without_counters(weights):
    return {name: weight for name, weight in weights.items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize("layers", [16, 33])
def test_every_published_name_is_one_of_ours_and_the_reverse(layers):
    network, renamed = model.build_model("dr-raw", "segmentation", 19, layers=layers, gate="full"), {}
    for name, shape in published_shapes(layers).items():
        renamed[published.our_name(name)] = shape
    ours = {name: tuple(weight.shape) for name, weight in without_counters(network.state_dict()).items()}
    assert len(renamed) == len(published_shapes(layers)) and renamed == ours


def test_a_published_checkpoint_is_read_whole_and_evaluated():
    write_camvid()
    weights = published_file("camvid.pth", classes=11)
    network, about = published.load("camvid.pth", "dr-a", "cpu")
    assert (network.backbone.gate, network.backbone.width, about["iteration"]) == ("small", 8, 12)
    assert published.load("camvid.pth", "dr-raw", "cpu")[0].backbone.gate == "full"
    first = weights.pop("backbone.stem.stem_1.weight")
    for name, weight in without_counters(weights).items():
        assert torch.equal(weight, network.state_dict()[published.our_name(name)])
    rgb = torch.randint(0, 256, (2, 3, 33, 41), dtype=torch.uint8)
    bgr = rgb.flip(1).double() - torch.tensor([103.530, 116.280, 123.675])[:, None, None]
    ours = network.backbone.stem[0](data.normalize(rgb)).double()
    torch.testing.assert_close(ours, F.conv2d(bgr, first.double(), stride=2), atol=1e-3, rtol=1e-4)
    command = f"camvid.pth --variant dr-a --data camvid {QUIET}"
    succeeds(evaluate.main, command, "--dataset camvid")
    metrics = read_json("metrics-camvid.json")
    assert metrics["images"] == 12 and metrics["variant"] == "dr-a" and metrics["gflops"]["paper"]["mean"] > 0
    refuses(lambda: run(evaluate.main, command), "11 classes")
    refuses(lambda: run(evaluate.main, "metrics-camvid.json --variant dr-a"), "metrics-camvid.json")
    for contents in (5, torch.zeros(2)):
        torch.save({"model": contents}, "other.pth")
        refuses(lambda: published.load("other.pth", "dr-a", "cpu"), "other.pth")
    for missing in ("gate_conv", "sem_seg"):
        published_file("partial.pth", without=[missing])
        refuses(lambda: published.load("partial.pth", "dr-a", "cpu"), "--init")


def test_a_network_starts_from_a_published_backbone():
    weights = published_file("file.pth", without=["gate_conv", "sem_seg"])  # as their ImageNet backbones
    network = model.build_model("dr-a", "segmentation", 11, layers=4, width=8)
    found = model.read_weights("file.pth")
    assert not any(".gate." in name for name in found)
    report = model.initialize(network, found, "file.pth")
    assert len(report.matched) == len(without_counters(weights)) and not report.left_over
    assert all(".gate." in name or name.startswith("head.") for name in report.missing)


def test_beside_runs_stand_the_published_rows_of_their_tasks():
    count = {}
    for row in published.rows_of(("segmentation", "detection")):
        count[row["source"]] = count.get(row["source"], 0) + 1
        assert 30 < float(row["score"]) < 85 and 15 < float(row["gflops"]) < 2100
    assert count == {
        "DivDR Table 1": 13, "DivDR Table 2": 4, "DivDR Table 3": 8, "DivDR Table 4": 7, "DivDR Table 5": 7,
        "DR paper": 7, "DR repository": 7}
    run = made_up_run("run", 60.0)
    paper = published.rows_of({"segmentation"})
    header, _, *rows = evaluate.make_table([run], paper)
    row = ["DivDR-A (DivDR Table 1)", "Layer16", "73.5 ± 0.4", "57.7 ± 3.9"]
    assert [*row, *["–"] * 4] in rows and len(rows) == len(paper) == 31
    assert {len(row) for row in rows} == {8}
    full = {row[0] for row in rows if row[1].endswith(", full gates")}
    assert full == {row[0] for row in rows if row[0].startswith("Dynamic-Raw")} and len(full) == 6
    legend = figures.draw_trade_off([run], evaluate.group_runs, paper).axes[0].get_legend().get_lines()
    assert [line.get_markerfacecolor() == "white" for line in legend] == [False] + [True] * 31


# ============ figures ============


def test_every_figure_of_a_run_is_drawn_without_a_window(trained, monkeypatch):
    monkeypatch.chdir(trained)
    command = [sys.executable, HERE / "evaluate.py", "runs/seg/last.pt", *QUIET.split(), "--figures", "drawn"]
    variables = os.environ | {"MPLBACKEND": "a_window_that_is_not_there"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    drawn = {path.stem for path in Path("drawn").glob("*.png")}
    assert drawn == {
        "predictions-seg", "experts-seg", "routes-seg", "training-seg", "activations", "trade-off"}
    written = Path("drawn/routes-seg.pdf").read_bytes()
    assert b"/FontFile2" in written and b"/Type3" not in written
    network, checkpoint = model.load_checkpoint("runs/det/last.pt")
    viewer = figures.Viewer(network, checkpoint, open_coco(split="val"), CPU, 0.0)
    of_run = evaluate.Run("det", checkpoint, {})
    assert len(figures.draw_predictions(of_run, [], viewer).axes) == 4 * 3


def test_pictures_show_what_is_predicted(trained):
    os.chdir(trained)
    for name, picture in (("seg", "camvid/val/01.png"), ("det", "coco/val2017/000000000001.jpg")):
        folder, file = os.path.split(picture)
        command = f"runs/{name}/last.pt {QUIET} --min-score 0 --out {name} --image"
        out = succeeds(evaluate.main, command, folder)
        assert len(re.findall(r"expert [01] of 2", out)) == len(os.listdir(name)) == len(os.listdir(folder))
        assert (np.array(Image.open(f"{name}/{file}.png")) != np.array(Image.open(picture))).any()
    succeeds(evaluate.main, command, picture, "--figures drawn")
    assert os.path.exists(f"drawn/route-{file}.pdf")
    for flags in ("--dataset shapes", "--predictions x"):
        refuses(lambda: run(evaluate.main, "runs/det/last.pt --device cpu", flags), flags.split()[0])


def test_a_folder_of_pictures_is_done_but_for_those_that_cannot_be_read(trained):
    shutil.copytree(trained / "runs" / "seg", "seg")
    for name in ("a.png", "cut.jpg", "z.tif", "sub/b.PNG", ".hidden.png", "sub/._b.png", ".cache/c.png"):
        Path("in", name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((70, 64), 50).convert("RGB").save(f"in/{name}")
    Path("in/cut.jpg").write_bytes(Path("in/cut.jpg").read_bytes()[:400])
    Path("in/notes.txt").write_text("none")
    for times in range(2):  # the second time the folder holds what the first wrote
        out, error = io.StringIO(), io.StringIO()
        both = contextlib.redirect_stdout(out), contextlib.redirect_stderr(error)
        with both[0], both[1], pytest.raises(SystemExit) as stopped:
            run(evaluate.main, f"seg/last.pt {QUIET} --image in --out in/out --figures in/drawn")
        assert stopped.value.code == 2 and "1 of 4 pictures" in error.getvalue()
        assert "in/cut.jpg: cannot be read" in error.getvalue()
        assert out.getvalue().count("GFLOPs") == 3
        assert sorted(map(str, Path("in/out").rglob("*.png"))) == [
            "in/out/a.png.png", "in/out/sub/b.PNG.png", "in/out/z.tif.png"]
    succeeds(evaluate.main, f"seg/last.pt {QUIET} --image in/sub --out .")  # above the pictures is fine
    assert os.path.exists("b.PNG.png")
    for flags, word in [
        ("in/sub --out in/sub", "--out"), ("in/none", "no picture"), ("in/cut.jpg", "cut.jpg: cannot"),
    ]:
        refuses(lambda: run(evaluate.main, f"seg/last.pt {QUIET} --image", flags), word)


def test_a_dollar_in_a_name_is_no_mathematics():
    figure, ((ax,),) = figures.new_figure(2, 2)
    ax.set(title=r"road $\frac{$", yscale="log", ylim=(1, 1000))
    succeeds(lambda words: figures.save(figure, Path("figure")))
    assert len(Path("figure.pdf").read_bytes()) > 1000


def test_what_runs_differ_in_can_be_swept():
    runs = [made_up_run(f"{k}-{seed}", 60.0 + k + seed, seed, k=k) for k in (2, 3) for seed in (0, 1)]
    runs.append(made_up_run("seldom", 61.0, k=2, kmeans_every=200))
    axes = figures.draw_ablations(runs, evaluate.group_runs, []).axes
    by_k, by_interval = axes[:2]
    assert by_k.lines[0].get_ydata().tolist() == [62.5, 63.5]
    assert by_interval.lines[0].get_ydata().tolist() == [62.5, 61.0]
    assert [ax.get_xlabel() for ax in axes if ax.get_xlabel()] == ["K", "K-means every"]
    assert figures.draw_ablations(runs[:2], evaluate.group_runs, []) is None
    both = figures.draw_activations(runs[:4], evaluate.group_runs, [])
    assert [ax.get_title() for ax in both.axes[:5]] == ["2-0", "2-1", "3-0", "3-1", "all together"]


def test_routes_are_as_wide_as_alpha_and_stand_where_the_nodes_are():
    run, reference = made_up_run("divdr", 60.0), made_up_run("dr", 58.0, seed=1, variant="dr-a")
    centers, grid = run.clusters.centers, figures.grid_of_run(run)
    centers[0, 4] = 0.0  # keep of the second node of the first layer is closed
    figure = figures.draw_routes(run, [run, reference], None)
    shown = [*centers, run.result.A.mean(0), reference.result.A.mean(0)]
    titles = ("expert 0", "expert 1", "expert 2: centre; no image", "all 6 images", "Dynamic Routing")

    def collection(ax, label):
        return next(c for c in ax.collections if c.get_label() == label)

    for ax, values, title in zip(figure.axes[::2], shown, titles):
        lines, expected, drawn = collection(ax, "more"), {}, {}
        for ends, width in zip(lines.get_segments(), lines.get_linewidths()):
            drawn[tuple(ends.flatten().tolist())] = width
        for n, (layer, scale, _) in enumerate(grid):
            for path, alpha in enumerate(values[3 * n : 3 * n + 3].tolist()):
                if alpha > figures.LEAST:
                    expected[layer, scale, layer + 1, scale + path - 1] = 0.5 + 3.5 * alpha
        assert drawn == pytest.approx(expected) and ax.get_title().startswith(title)
    difference = centers[0] - centers[1:].mean(0)
    assert len(collection(figure.axes[1], "more").get_segments()) == (difference > 0.02).sum()
    assert len(collection(figure.axes[1], "less").get_segments()) == (difference < -0.02).sum()


# ============ experts cut out ============


@pytest.fixture(scope="module")
def cut_out():
    """The folder of `run_once`, in which runs/seg is cut by the images that it is evaluated on into cut/."""
    folder, before = run_once(), os.getcwd()
    os.chdir(folder)
    printed = succeeds(evaluate.main, f"runs/seg/last.pt {QUIET} --experts cut --keep 0 --cut-from val")
    Path("printed").write_text(printed)
    os.chdir(before)
    return folder


def test_cut_from_a_split_with_keep_0_experts_predict_there_what_the_routed_network_does(cut_out):
    os.chdir(cut_out)
    about, printed = read_json("cut/experts.json"), Path("printed").read_text()
    network, checkpoint = model.load_checkpoint("runs/seg/last.pt")
    clusters = kmeans.Clusters(**checkpoint["bank"]["clusters"])
    dataset = data.segmentation_dataset("camvid", "camvid", "val", train=False)
    routed, one, dispatched = about["table"].values()
    assert one["mIoU"] == routed["mIoU"] and printed.count(f"{routed['mIoU']:.2f}") >= 2
    assert dispatched["mIoU"] == pytest.approx(routed["mIoU"], abs=2)  # it may send an image elsewhere
    sizes, costs, counted = [0, 0], [], []
    stem = torch.export.load("cut/stem.pt2").module()
    networks = [torch.export.load(f"cut/expert-{j}.pt2").module() for j in range(2)]
    for image, _, _ in dataset:
        with torch.no_grad():
            out = network(data.normalize(image[None]))
            own = clusters.nearest(out.A)[0].item()
            with FlopCounterMode(display=False) as counter:  # of all that runs for an image that is sent
                features, expert = stem(data.normalize(image[None]))
                networks[expert](features)
            counted.append(counter.get_total_flops() // 2)
            sent = network.cut(torch.tensor(about["routes"][f"expert-{expert.item()}"]))
            costs.append([sum(sent.real_cost(None, 64, 96, of).values()).item() for of in ("conv", "exact")])
            fixed = network.cut(torch.tensor(about["routes"][f"expert-{own}"])).eval()
            assert torch.equal(fixed(data.normalize(image[None])).logits.argmax(1), out.logits.argmax(1))
        sizes[own] += 1
    assert [expert["images"] for expert in about["experts"]] == sizes
    decide = 2 * 4  # from the 4 channels of the stem's map to 2 experts
    assert counted == [convolutions + decide for convolutions, _ in costs]
    exact = [whole + decide + 4 * 16 * 24 for _, whole in costs]  # and the mean over that map
    assert dispatched["GFLOPs exact"] == pytest.approx(sum(exact) / len(exact) / 1e9)
    for j, expert in enumerate(about["experts"]):
        assert sum(map(sum, about["routes"][f"expert-{j}"])) == expert["open paths"]


@torch.no_grad()
def test_exported_experts_run_as_the_readme_says_and_hold_none_of_our_code(cut_out):
    shutil.copytree(cut_out / "cut", "DIR")
    picture = np.array(Image.open(cut_out / "camvid" / "val" / "02.png"))[:50]  # to be padded
    Image.fromarray(picture).save("picture.png")
    code = re.search(r"```python\n(import json.*?)```", (HERE / "README.md").read_text(), re.DOTALL)[1]
    code += "torch.save([expert.item(), logits], 'seen')\n"
    code += "import sys\nassert not {'routing', 'model', 'evaluate'} & sys.modules.keys()\n"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": ""})
    expert, logits = torch.load("seen", weights_only=True)
    network = model.load_checkpoint(cut_out / "runs" / "seg" / "last.pt")[0]
    route = torch.tensor(read_json("DIR/experts.json")["routes"][f"expert-{expert}"])
    image = data.normalize(torch.from_numpy(picture).permute(2, 0, 1)[None])
    torch.testing.assert_close(logits, network.cut(route).eval()(image).logits[0], rtol=1e-4, atol=1e-4)
    for path in Path("DIR").glob("*.pt2"):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                text = archive.read(name) if "weight" not in name else b""
                assert not re.search(rb"\.py\b|/home|/tmp|/work|routing|Backbone|__main__", text), name
    assert str(cut_out) not in Path("DIR/experts.json").read_text()


@pytest.mark.parametrize("gate", ["small", "full"])
@torch.no_grad()
def test_an_export_takes_any_batch_and_size_and_costs_what_is_counted(gate):
    from torch.export.passes import move_to_device_pass

    torch.manual_seed(0)
    network = model.build_model("dr-a", "segmentation", 4, layers=4, width=4, gate=gate)
    let_gates_decide(network)
    everything = network.backbone.open_routes().alpha[0] > 0
    fixed = network.cut(everything & (random_alphas(1, network.backbone.num_nodes, 4)[0] > 0)).eval()
    least = {"small": 256, "full": 64}[gate]
    decide = torch.nn.Linear(4, 3)
    first = experts.Stem(fixed.backbone.stem, decide)
    stem = experts.export_program(first, torch.zeros(2, 3, least, least + 32), 32, least)
    maps = torch.zeros(2, 4, least // 4, least // 4 + 8)
    rest = experts.export_program(experts.AfterStem(fixed), maps, 32, least)
    for shape in ((1, 3, least, least), (3, 3, 288, 320)):
        images, run, go_on = torch.randn(shape), stem.module(), rest.module()
        features, sent = run(images)
        before = features.clone()
        torch.testing.assert_close(go_on(features), fixed(images).logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(features, before)  # for another expert
        assert torch.equal(sent, decide(fixed.backbone.stem(images).mean((2, 3))).argmax(1))
        with FlopCounterMode(display=False) as counter:
            go_on(run(images[:1])[0])
        wanted = sum(fixed.real_cost(None, *shape[2:], "conv").values()).item()
        assert counter.get_total_flops() == 2 * (wanted + decide.weight.numel())
    elsewhere = move_to_device_pass(rest, "meta").module()
    assert elsewhere(torch.zeros(1, 4, 72, 80, device="meta")).shape == (1, 4, 288, 320)
    for shape in ((1, 3, 300, 320), (1, 3, least - 32, 320), (1, 4, 288, 320)):
        with pytest.raises(Exception, match="Expected input"):
            run(torch.zeros(shape))


def test_onnx_gives_the_same_result():
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    fixed = model.build_model("fixed-route", "segmentation", 4, 4, 4, route=baselines.named_route("u-net", 4))
    stem, images = experts.Stem(fixed.eval().backbone.stem, torch.nn.Linear(4, 2)), torch.randn(3, 3, 96, 64)
    got = {"images": images.numpy()}
    for network, example, inputs, outputs in [
        (stem, torch.zeros(2, 3, 64, 96), ["images"], ["features", "expert"]),
        (experts.AfterStem(fixed), torch.zeros(2, 4, 16, 24), ["features"], ["logits"]),
    ]:
        program, file = experts.export_program(network, example, 32, 64), io.BytesIO()
        experts.write_onnx(program, example, dict(input_names=inputs, output_names=outputs), file)
        session = onnxruntime.InferenceSession(file.getvalue())
        given = {name: got[name] for name in inputs}
        got |= zip(outputs, session.run(outputs, given))
    wanted = fixed(images).logits.detach()
    assert (torch.from_numpy(got["logits"]) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert got["expert"].tolist() == stem(images)[1].tolist()


def test_what_has_no_experts_is_refused(cut_out, monkeypatch):
    os.chdir(cut_out)
    command = f"runs/seg/last.pt {QUIET} --experts c"
    refuses(lambda: run(evaluate.main, command, "--export-size 100 64"), "multiples of 32")
    monkeypatch.setattr(experts.importlib.util, "find_spec", lambda name: None)
    refuses(lambda: run(evaluate.main, command, "--onnx"), "pip install onnx")


def test_experts_of_a_detector_find_what_it_finds_and_their_pyramids_are_exported(trained):
    os.chdir(trained)
    command = f"runs/det/last.pt {QUIET} --experts cut-det --keep 0 --cut-from val --export-size 128 192"
    os.makedirs("cut-det", exist_ok=True)
    for name in ("expert-7.pt2", "dispatcher.onnx", "mine.onnx"):
        Path("cut-det", name).write_text("of before")
    out = succeeds(evaluate.main, command)
    written = {f"{name}.pt2" for name in [*read_json("cut-det/experts.json")["routes"], "stem"]}
    assert set(os.listdir("cut-det")) == written | {"experts.json", "mine.onnx"}
    assert "box AP" in out and "mask AP" in out and "heads are not exported" in out
    routed, *rows = read_json("cut-det/experts.json")["table"].values()
    for row in rows:
        assert row["box AP"] == pytest.approx(routed["box AP"]) and row["GFLOPs exact"] > 0
    detector = model.load_checkpoint("runs/det/last.pt")[0]
    route = torch.tensor(read_json("cut-det/experts.json")["routes"]["one-for-all"])
    size = read_json("cut-det/experts.json")["size"]
    stem, exported = (torch.export.load(f"cut-det/{x}.pt2").module() for x in ("stem", "one-for-all"))
    images = torch.rand(2, 3, *size)
    fixed = detector.cut(route).eval()
    with torch.no_grad():
        for got, wanted in zip(exported(stem(images)[0]), fixed.pyramid(images)[0].values(), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        found = fixed([images[0]]).detections[0]
        assert {"boxes", "scores", "labels", "masks"} == found.keys()


def test_the_dispatcher_decides_by_gaussians_of_one_covariance():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    labels = labels.where(labels < 3, 0)  # class 3 has no sample, class 0 twice as many
    spread = torch.eye(6) + 0.3 * torch.randn(6, 6, generator=generator)
    means = 2 * torch.randn(3, 6, generator=generator)
    x = means[labels] + torch.randn(400, 6, generator=generator) @ spread
    scores = experts.fit_dispatcher(x, labels, 4)(x)
    centers = torch.stack([x[labels == k].mean(0) for k in range(3)]).double()
    covariance = torch.cov((x.double() - centers[labels]).T, correction=0)
    density = torch.distributions.MultivariateNormal(centers, covariance).log_prob(x[:, None].double())
    wanted = density + (labels.bincount() / 400).log()
    assert torch.equal(scores.argmax(1), wanted.argmax(1))
    torch.testing.assert_close(
        (scores[:, 1:3] - scores[:, :1]).double(), wanted[:, 1:] - wanted[:, :1], rtol=2e-2, atol=2e-2)


def test_a_fixed_route_trains_resumes_and_is_drawn(cut_out):
    os.symlink(cut_out / "camvid", "camvid")
    flags = f"{TINY_SEG} --iters 4 --eval-every 4".replace("--k 2", "").replace("--kmeans-every 3", "")
    routes = Path(shutil.copy(cut_out / "cut" / "experts.json", "routes.json"))
    succeeds(train_seg.main, flags, "--route u-net --init", cut_out / "runs" / "seg" / "last.pt")
    succeeds(train_seg.main, flags, "--name expert --route", f"{routes}:expert-1")
    network, checkpoint = model.load_checkpoint("runs/expert/last.pt")
    assert network.backbone.fixed_route.int().tolist() == read_json(routes)["routes"]["expert-1"]
    assert not parts_of(network, routing.Gate) and checkpoint["bank"]["clusters"] is None
    cost = sum(network.real_cost(None, 64, 64).values()).item() / 1e9
    assert events(Path("runs/expert"), "train")[-1]["gflops_real"] == pytest.approx(cost)
    refuses(lambda: run(train_seg.main, flags, "--name expert --resume --route u-net"), "--route u-net")
    runs = "runs/expert/last.pt runs/camvid-u-net-seed0/last.pt"
    out = succeeds(evaluate.main, runs, QUIET, "--figures drawn")
    assert re.search(r"u-net +Layer4, width 4", out) and "routes.json:expert-1" in out
    assert {"routes-expert.png", "routes-camvid-u-net-seed0.png"} <= set(os.listdir("drawn"))
    refuses(lambda: run(evaluate.main, "runs/expert/last.pt --experts c", QUIET), "static")
    os.remove("routes.json")  # what is resumed has its route
    assert "is done" in succeeds(train_seg.main, flags, "--name expert --resume --route routes.json:expert-1")
