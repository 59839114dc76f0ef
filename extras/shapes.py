"""The data set that is made on the fly, in kinds of scene that are known: --dataset shapes.

    dataset = ShapesDataset("train", size=96, subsets=2)
    image, mask, index = dataset[0]              # uint8 [3, H, W], uint8 [H, W], int
    dataset.scene(0)                             # and all that is known about it: a `Scene`
"""

from __future__ import annotations

import functools
import itertools
import math
import mmap
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from data import (
    SEGMENTATION, SPLITS, DataError, augmented_item, coco_of, detection_item, detection_transforms, rgb_of,
)
from model import table, three_digits


class Look(NamedTuple):
    """What a kind of scene looks like: a (low, high) range for each trait, from which each image draws one
    value, of `radius` one per object. Lengths are fractions of the image's side, intensities on 0..1."""

    radius: tuple[float, float]  # of the objects
    brightness: tuple[float, float]  # of the background
    hue: tuple[float, float]  # of the background, in turns: 0 red, -1/6 yellow
    tint: tuple[float, float]  # of the background: 0 grey
    contrast: tuple[float, float]  # of the objects against the background, at most 0.5
    colour: tuple[float, float]  # of the objects: 0 grey
    gradient: tuple[float, float]  # change of brightness across the background
    ripple: tuple[float, float]  # waves in the background
    streaks: tuple[float, float]  # rain
    blur: tuple[float, float]
    noise: tuple[float, float]


#             radius    brightness  hue         tint        contrast    colour      gradient
ALIKE = Look((0, 0), (.20, .80), (.00, 1.0), (.00, .10), (.30, .48), (.00, .25), (.00, .15),
             ripple=(.00, .05), streaks=(.00, .12), blur=(.000, .004), noise=(.005, .040))
# Kinds of scene; they differ in the size of the objects alone.
KINDS = {
    "large":  ALIKE._replace(radius=(.280, .360)),
    "tiny":   ALIKE._replace(radius=(.050, .062)),
    "medium": ALIKE._replace(radius=(.120, .160)),
    "small":  ALIKE._replace(radius=(.080, .095)),
}
COVERAGE = (0.25, 0.40)  # share of an image under objects, the same for all subsets


class Scene(NamedTuple):
    """One image of `ShapesDataset` with all that is known about it."""

    image: Tensor  # uint8 [3, H, W]
    mask: Tensor  # uint8 [H, W], class ids, 0 background
    masks: Tensor  # bool [n, H, W], the visible part of each object; none overlap, none is empty
    boxes: Tensor  # float32 [n, 4], x1 y1 x2 y2 of that part in pixels, x2 and y2 one past the last
    classes: Tensor  # int64 [n], 1..5
    subset: int


class ShapesDataset(Dataset):
    """Discs, squares, triangles, rings and crosses on a background, in `subsets` known kinds of scene.

    The subsets differ in the size of the objects alone, `KINDS`. By default there are two: objects so large
    that no more than parts of two or three are seen, and tiny ones. Objects cover the same share of every
    image: the larger they are, the fewer. Within a subset all else varies: the number, classes, places,
    rotation, colours and overlaps of the objects; hue, brightness, gradient and waves of the background;
    rain, blur and noise. Colour says nothing about the class. The order of the subsets is drawn; each has the
    same number of images, within one.

    Image i of a split depends on (seed, split, i) and the options only, so it is the same in every epoch,
    worker and process (for a given NumPy, whose random streams may change between versions). It is painted
    once, by the process that asks first, and kept for all that were forked from this one.

    size: side in pixels, a multiple of 32; everything scales with it. subsets: 2 to 4. n_train, n_val,
    n_test: images in the splits. seed: 0 or more.
    """

    def __init__(
        self, split: str, augment: v2.Compose | None = None, size: int = 96, subsets: int = 2,
        n_train: int = 1200, n_val: int = 300, n_test: int = 300, seed: int = 0,
    ):
        if size < 32 or size % 32:
            raise DataError(f"--dataset shapes: size {size} is not a multiple of 32")
        self.info, self.split, self.augment = SEGMENTATION["shapes"], split, augment
        self.eval_batch, self.has_truth = self.info.eval_batch, True
        self.size, self.seed = size, seed
        self.subset_names = tuple(KINDS)[:subsets]
        self.looks = [KINDS[name] for name in self.subset_names]
        count = {"train": n_train, "val": n_val, "test": n_test}[split]
        self.subset = torch.from_numpy(self._rng(0).permutation(np.arange(count) % subsets))
        self.drawn_from = (split, size, subsets, count, seed)
        _memory(*self.drawn_from)  # before others start from this process

    def _rng(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, SPLITS.index(self.split), stream])

    def __len__(self) -> int:
        return len(self.subset)

    def image_name(self, index: int) -> str:
        return f"shapes/{self.split}/{index:05d}"

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        image, mask, _ = self._pictures(index)
        return augmented_item(image, mask, index, self.augment)

    def _pictures(self, index: int) -> tuple[Tensor, Tensor, np.ndarray]:
        """Image uint8 [3, H, W], semantic mask uint8 [H, W], and the object of each pixel, 0 for none."""
        painted, kept = _memory(*self.drawn_from)
        if not painted[index]:
            kept[index] = self._paint(index)
            painted[index] = 1
        image, mask, instance = np.split(kept[index], [3, 4], axis=2)
        image = torch.from_numpy(image.copy()).permute(2, 0, 1)
        return image, torch.from_numpy(mask[..., 0].copy()), instance[..., 0]

    def _paint(self, index: int) -> np.ndarray:
        """uint8 [H, W, 5]: red, green, blue, class, object."""
        look = self.looks[int(self.subset[index])]
        rng = self._rng(1 + int(index))  # stream 0 drew the subsets
        drawn = Look(*(rng.uniform(*trait) for trait in look))  # this image's traits, one number each
        canvas = _background(rng, drawn, self.size)
        instance, classes = _paint_objects(rng, look.radius, drawn, rng.uniform(*COVERAGE), canvas)
        return np.dstack([_weather(rng, drawn, canvas), classes[instance], instance])

    def scene(self, index: int) -> Scene:
        """Image `index`, not augmented, with its semantic mask, instances and subset."""
        image, mask, instance = self._pictures(index)
        seen = np.flatnonzero(np.bincount(instance.ravel()))[1:]  # without 0; a hidden object is no instance
        masks = torch.from_numpy(instance == seen[:, None, None].astype(np.uint8))  # [n, H, W]
        boxes = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])
        classes = (masks * mask).flatten(1).amax(1).long()  # all pixels of an object are of its class
        return Scene(image, mask, masks, boxes, classes, int(self.subset[index]))


@functools.cache
def _memory(split: str, size: int, subsets: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of `count` images are painted, uint8 [N], and the images, uint8 [N, H, W, 5].

    The memory is shared with processes that are forked from this one. (That of torch's own shared tensors
    lies in /dev/shm, which is small in containers.)
    """
    painted = np.frombuffer(mmap.mmap(-1, count), np.uint8)
    kept = np.frombuffer(mmap.mmap(-1, count * size * size * 5), np.uint8)
    return painted, kept.reshape(count, size, size, 5)


def _background(rng: np.random.Generator, drawn: Look, size: int) -> np.ndarray:
    """float32 [3, H, W]: a tint with a gradient and waves, each in a direction of its own."""
    y, x = np.mgrid[:size, :size].astype(np.float32) / size - 0.5
    slope, wave, phase = rng.uniform(0, 2 * math.pi, 3).tolist()
    gradient = drawn.gradient * (x * math.cos(slope) + y * math.sin(slope))
    ripple = drawn.ripple * np.sin(rng.uniform(25, 50) * (x * math.cos(wave) + y * math.sin(wave)) + phase)
    return rgb_of(drawn.brightness, drawn.hue, drawn.tint) + gradient + ripple


def _paint_objects(
    rng: np.random.Generator, radii: tuple[float, float], drawn: Look, coverage: float, canvas: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Paints objects on the canvas [3, H, W], later ones on top, until `coverage` of it is under them.

    Returns the object of each pixel, uint8 [H, W], 0 for none, and the class of each object, uint8; with the
    smallest radius and the largest coverage there are some 60 objects.
    """
    size = canvas.shape[1]
    instance = np.zeros((size, size), dtype=np.uint8)
    classes, placed, area = [0], [], 0
    while True:
        radius = rng.uniform(*radii) * size
        # Stopping half an object early or late makes the mean coverage the same for small and large objects.
        if placed and area + 0.5 * 2.6 * radius ** 2 > coverage * size ** 2:
            return instance, np.array(classes, dtype=np.uint8)
        shape, angle = int(rng.integers(1, 6)), rng.uniform(0, 2 * math.pi)
        # Of a few random places, the one with most room: some overlap, but nothing vanishes.
        places = rng.uniform(0.3 * radius, size - 0.3 * radius, (2, 8, 1))
        others = np.array(placed or [(0, 0, 0)]).T  # x, y, radius
        room = np.hypot(*(places - others[:2, None])) - others[2]  # [8, others]
        x, y = places[:, room.min(1).argmax(), 0].tolist()
        placed.append((x, y, radius))
        brightness = drawn.brightness + drawn.contrast * (1 if rng.random() > drawn.brightness else -1)
        if not 0 <= brightness <= 1:
            brightness = 2 * drawn.brightness - brightness
        colour = rgb_of(brightness, rng.random(), drawn.colour)

        reach = 1.4 * radius + 1
        edges = (x - reach, y - reach, x + reach, y + reach)
        x0, y0, x1, y1 = (min(max(round(edge), 0), size) for edge in edges)
        across = np.arange(x0, x1, dtype=np.float32) + (0.5 - x)
        down = np.arange(y0, y1, dtype=np.float32)[:, None] + (0.5 - y)
        u = across * math.cos(angle) + down * math.sin(angle)
        v = down * math.cos(angle) - across * math.sin(angle)
        outside = _outside(shape, u, v, radius)
        under, before = canvas[:, y0:y1, x0:x1], instance[y0:y1, x0:x1]  # views
        under += (0.5 - outside).clip(0, 1) * (colour - under)  # the share of a pixel inside: smooth edges
        inside = outside < 0
        area += np.count_nonzero(inside & (before == 0))
        before[inside] = len(classes)
        classes.append(shape)


def _outside(shape: int, u: np.ndarray, v: np.ndarray, r: float) -> np.ndarray:
    """Pixels from the outline of class `shape`, negative inside; u, v: pixels along its axes, r: its radius.

    The proportions give the five shapes about the same area, 2.4 to 3.1 r².
    """
    if shape == 1:  # disc
        return np.hypot(u, v) - r
    if shape == 2:  # square
        return np.maximum(abs(u), abs(v)) - 0.82 * r
    if shape == 3:  # triangle
        return np.maximum(abs(u) * 0.75 ** 0.5 + v / 2, -v) - 0.675 * r
    if shape == 4:  # ring
        return abs(np.hypot(u, v) - 0.72 * r) - 0.28 * r
    return np.minimum(np.maximum(abs(u) - 1.05 * r, abs(v) - 0.35 * r),  # cross
                      np.maximum(abs(v) - 1.05 * r, abs(u) - 0.35 * r))


def _weather(rng: np.random.Generator, drawn: Look, canvas: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3]: the canvas under rain, out of focus, and with the camera's noise."""
    size = canvas.shape[1]
    length = size // 8
    y, x = np.mgrid[:size, :size].astype(np.int32)
    column = (x + (rng.uniform(-0.6, 0.6) * y).astype(np.int32)) % size  # where a slanting streak starts
    streak = (y + rng.integers(0, length, size, dtype=np.int32)[column]) // length
    wet = rng.random((size // length + 2, size), dtype=np.float32)[streak, column] > 0.94
    canvas = ((canvas + drawn.streaks * wet) * 255 + 0.5).clip(0, 255).astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(canvas.transpose(1, 2, 0)))
    picture = np.asarray(picture.filter(ImageFilter.GaussianBlur(drawn.blur * size)))  # [H, W, 3]
    grain = rng.standard_normal(picture.shape, dtype=np.float32) * (drawn.noise * 255)
    return (picture + grain + 0.5).clip(0, 255).astype(np.uint8)


class ShapesDetection(Dataset):
    """`ShapesDataset` for detection: visible instances as boxes and masks; see `data.detection_dataset`."""

    has_truth = True

    def __init__(self, split: str, train: bool, masks: bool, limit: int | None, **options):
        self.scenes = ShapesDataset(split, **options)
        self.count = min(len(self.scenes), limit or len(self.scenes))
        self.masks, self.transforms = masks, detection_transforms(train)
        self.classes = list(self.scenes.info.classes[1:])  # without the background
        self.palette = self.scenes.info.palette[1:]
        self.category_ids = list(range(1, len(self.classes) + 1))
        self.image_ids = self.rows = list(range(self.count))
        self.aspect_ratios = [1.0] * self.count
        self.subset, self.subset_names = self.scenes.subset[:self.count], self.scenes.subset_names

    def __len__(self) -> int:
        return self.count

    def image_name(self, index: int) -> str:
        return self.scenes.image_name(index)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor], int]:
        scene = self.scenes.scene(index)
        boxes = tv_tensors.BoundingBoxes(scene.boxes, format="XYXY", canvas_size=tuple(scene.mask.shape))
        target = {"boxes": boxes, "labels": scene.classes}
        if self.masks:
            target["masks"] = tv_tensors.Mask(scene.masks.to(torch.uint8))
        return detection_item(scene.image, target, index, self.transforms)

    @cached_property
    def coco(self):
        """The truth as pycocotools has it."""
        from pycocotools import mask as rle

        images, annotations = [], []
        for i in self.image_ids:
            scene = self.scenes.scene(i)
            height, width = scene.mask.shape
            images.append(dict(id=i, file_name=self.image_name(i), width=width, height=height))
            masks = rle.encode(np.asfortranarray(scene.masks.numpy().transpose(1, 2, 0).astype(np.uint8)))
            for (x1, y1, x2, y2), label, mask in zip(scene.boxes.tolist(), scene.classes.tolist(), masks):
                annotation = dict(id=len(annotations) + 1, image_id=i, category_id=label, iscrowd=0)
                annotation["bbox"] = [x1, y1, x2 - x1, y2 - y1]
                annotation["area"] = float(rle.area(mask))
                annotation["segmentation"] = mask
                annotations.append(annotation)
        return coco_of(images, annotations, self.classes)


# ============ how well clusters recover the known subsets ============


def agreement(labels: Tensor, truth: Tensor) -> tuple[float, Tensor, list[int]]:
    """How well clusters recover known subsets: labels, truth [n] int64 >= 0 -> (accuracy, table, match).

    table [subsets, clusters] counts images. match[s] is the cluster that the best one-to-one matching gives
    to subset s, -1 for none. accuracy in 0..1 is the share of images in that matching.
    """
    subsets, clusters = int(truth.max()) + 1, int(labels.max()) + 1
    table = torch.bincount(truth * clusters + labels, minlength=subsets * clusters).view(subsets, clusters)
    # Every way to match is tried, for known subsets are few. No subset needs a cluster that is not among its
    # best so many, and nobody wants the columns that are added.
    padded = [row + [0] * (subsets - clusters) for row in table.tolist()]
    best = table.topk(min(subsets, clusters)).indices.unique().tolist()
    ways = itertools.permutations([*best, *range(clusters, subsets)], subsets)
    match = max(ways, key=lambda way: sum(row[column] for row, column in zip(padded, way)))
    hits = sum(row[column] for row, column in zip(padded, match))
    return hits / len(labels), table, [column if column < clusters else -1 for column in match]


def recovery(labels: Tensor, k: int, flops: Tensor, dataset) -> dict:
    """How well k experts recover the subsets of `dataset`. labels: [N] experts; flops: [N] multiply-adds."""
    truth = dataset.subset
    accuracy, counts, match = agreement(labels, truth)
    subsets = {}
    for s, name in enumerate(dataset.subset_names):
        mine = truth == s
        if mine.any():  # else there are so few images
            experts = counts[s].tolist() + [0] * (k - counts.shape[1])
            subsets[name] = {
                "images": int(mine.sum()), "experts": experts, "matched": match[s],
                "gflops": flops[mine].double().mean().item() / 1e9,
            }
    return {"accuracy": 100 * accuracy, "subset": subsets}


def describe_recovery(recovered: dict) -> str:
    """What `recovery` found, as text."""
    subsets = recovered["subset"]
    experts = range(len(next(iter(subsets.values()))["experts"]))
    rows = [["subset", *(f"expert {k}" for k in experts), "GFLOPs"]]
    for name, row in subsets.items():
        counts = [f"{n}{'*' if k == row['matched'] else ' '}" for k, n in enumerate(row["experts"])]
        rows.append([name, *counts, three_digits(row["gflops"])])
    words = f"recovered subsets: {recovered['accuracy']:.2f} % of images, one expert matched to each (*)"
    return f"\n{words}\n{table(rows, left=1)}"
