"""Digit scenes: real handwritten digits on real photographs, small enough to learn from on a CPU.

The digits are scikit-learn's `load_digits` (1797 samples of 8×8 pixels, the test part of the UCI
set "Optical Recognition of Handwritten Digits"); the photographs are ones that ship inside
scikit-image's wheel, so nothing is downloaded. Digits are split by sample and photographs by
photograph: no digit and no photograph of a test image is ever seen in training. (The digit set does
not say who wrote what, so a writer may be on both sides.)

The same scenes are written as four trees, each in the on-disk format of a real dataset:

    cls/{train,val}/CLASS/*.png                     image folders, one digit per image
    ade/images/{training,validation}/*.jpg          ADE20K: in the label images 0 is 'unlabelled'
    ade/annotations/{training,validation}/*.png     and not used, 1 the background, 2 to 11 the
                                                    digits 0 to 9
    voc/VOCdevkit/VOC2007/{Annotations,ImageSets/Main,JPEGImages}     trainval.txt and test.txt
    coco/{train,val}2017/*.jpg                      COCO, with polygons
    coco/annotations/instances_{train,val}2017.json

Images differ in size and aspect, as photographs do, around the size that is asked for; digits
differ with them. Digits are bright and backgrounds dimmed: with little contrast a small network
does not start to learn within minutes.
"""

import hashlib
import json
import shutil
import tempfile
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = tuple('0123456789')
SEG_CLASSES = ('background', *CLASSES)
SEG_PALETTE = (
    *((0, 0, 0), (230, 25, 75), (60, 180, 75), (255, 225, 25), (67, 99, 216), (245, 130, 49)),
    *((145, 30, 180), (66, 212, 244), (240, 50, 230), (191, 239, 69), (250, 190, 212)),
)

# No photograph here shows a digit of its own (scikit-image's clock, coins, page and text do).
PHOTOGRAPHS = {
    'train': (
        *('astronaut', 'chelsea', 'stereo_motorcycle', 'immunohistochemistry', 'gravel', 'brick'),
    ),
    'test': ('coffee', 'rocket', 'camera', 'grass'),
}
MANIFEST = 'digit_scenes.json'
# Factor on the photographs' pixels, and range of each colour of a digit.
DIMMING = (0.1, 0.4)
BRIGHTNESS = (200, 255)
# Ranges of an image's longer side over the size that is asked for, and of the shorter one over it.
LONGER = (0.75, 1.25)
ASPECT = dict(scenes=(0.6, 1.0), digits=(0.8, 1.0))
# Raise this when the pixels or the files change, so that trees of an older version are made anew.
VERSION = 2


@dataclass(frozen=True)
class Source:
    """What the images of one split are made from.

    Attributes:
        digits: (N, 8, 8), uint8.
        labels: (N,), 0 to 9.
        samples: (N,), the digits' numbers in `load_digits`.
        photographs: (H, W, 3) each, uint8.
    """

    digits: np.ndarray
    labels: np.ndarray
    samples: np.ndarray
    photographs: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Instance:
    """One digit in an image.

    Attributes:
        label: 0 to 9.
        sample: The digit's number in `load_digits`.
        mask: (H, W), bool; true on its pixels.
    """

    label: int
    sample: int
    mask: np.ndarray

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The mask's bounding box x1, y1, x2, y2 in pixels; x2 and y2 are exclusive."""
        columns, rows = (np.flatnonzero(self.mask.any(axis)) for axis in (0, 1))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def load_source(split: str) -> Source:
    """Loads the digits and photographs of one split.

    Args:
        split: 'train' or 'test'. It depends on no seed, so a network that was trained on any
            training images has seen no test digit.
    """
    from skimage import data
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    numbers = np.arange(len(digits.target))
    train, test = train_test_split(numbers, test_size=0.2, random_state=0, stratify=digits.target)
    samples = np.sort(train if split == 'train' else test)

    photographs = []
    for name in PHOTOGRAPHS[split]:
        photograph = getattr(data, name)()
        if isinstance(photograph, tuple):  # the stereo pair comes with its disparity map
            photograph = photograph[0]
        photographs.append(np.asarray(Image.fromarray(photograph).convert('RGB')))
    # The digits hold 0 to 16.
    images = np.round(digits.images[samples] * (255 / 16)).astype(np.uint8)
    return Source(images, digits.target[samples], samples, tuple(photographs))


def draw_size(size: int, aspect: tuple[float, float], rng: np.random.Generator) -> tuple[int, int]:
    """Height and width of an image, in pixels, one in two upright.

    Args:
        size: What the longer side is on average.
        aspect: Range of the shorter side over the longer one.
        rng: Source of randomness.
    """
    longer = size * rng.uniform(*LONGER)
    sides = round(longer * rng.uniform(*aspect)), round(longer)
    return sides if rng.random() < 0.5 else sides[::-1]


def _background(source: Source, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A random, dimmed piece of a random photograph as (*size, 3) floats in 0..255."""
    photograph = source.photographs[rng.integers(len(source.photographs))]
    height, width = photograph.shape[:2]
    largest = min(height / size[0], width / size[1], 3)
    scale = rng.uniform(min(largest, 1), largest)
    rows, columns = (int(side * scale) for side in size)
    top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
    piece = Image.fromarray(photograph[top : top + rows, left : left + columns]).resize(
        size[::-1], Image.BICUBIC
    )
    if rng.random() < 0.5:
        piece = piece.transpose(Image.FLIP_LEFT_RIGHT)
    return np.asarray(piece, dtype=np.float64) * rng.uniform(*DIMMING)


def _glyph(digit: np.ndarray, height: int, rng: np.random.Generator) -> np.ndarray:
    """The digit about `height` pixels high, stretched and turned a little and cut to its ink.

    Returns:
        Opacity (h, w) in 0..1; where it is at least a half, a pixel belongs to the digit.
    """
    width = round(height * rng.uniform(0.85, 1.1))
    image = Image.fromarray(digit).resize((width, height), Image.BICUBIC)
    image = image.rotate(rng.uniform(-10, 10), Image.BICUBIC, expand=True)
    opacity = np.asarray(image, dtype=np.float64) / 255
    ink = opacity >= 0.5
    rows, columns = (np.flatnonzero(ink.any(axis)) for axis in (1, 0))
    return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def render(
    source: Source,
    indices: list[int],
    size: tuple[int, int],
    heights: tuple[int, int],
    rng: np.random.Generator,
) -> tuple[np.ndarray, list[Instance]]:
    """Draws one image.

    Args:
        source: Digits and photographs to draw from.
        indices: Which of the source's digits to paste. Digits keep two pixels of distance; one that
            finds no free place in fifty attempts is left out.
        size: Height and width of the image in pixels.
        heights: Least and greatest height of a digit in pixels, before it is turned.
        rng: The only source of randomness.

    Returns:
        The image (*size, 3) as uint8, and its instances.
    """
    image = _background(source, size, rng)
    taken = np.zeros(size, dtype=bool)
    instances = []
    for index in indices:
        opacity = _glyph(source.digits[index], int(rng.integers(heights[0], heights[1] + 1)), rng)
        height, width = opacity.shape
        for _ in range(50):
            top, left = rng.integers(size[0] - height + 1), rng.integers(size[1] - width + 1)
            if not taken[
                max(top - 2, 0) : top + height + 2, max(left - 2, 0) : left + width + 2
            ].any():
                break
        else:
            continue
        place = np.s_[top : top + height, left : left + width]
        taken[place] = True
        image[place] += opacity[..., None] * (rng.uniform(*BRIGHTNESS, size=3) - image[place])
        mask = np.zeros(size, dtype=bool)
        mask[place] = opacity >= 0.5
        instances.append(Instance(int(source.labels[index]), int(source.samples[index]), mask))
    return np.round(image).astype(np.uint8), instances


def polygons(mask: np.ndarray) -> list[list[float]]:
    """Outlines of a mask's parts as COCO polygons [x, y, x, y, …], on the pixels' outer edges.

    COCO's polygons know no holes, so the hole of a zero belongs to it there, as in COCO itself.
    """
    from scipy.ndimage import binary_fill_holes
    from skimage.measure import find_contours

    # The margin closes outlines at the image's border and shifts them by one; COCO puts the centre
    # of the first pixel at 0.5, find_contours at 0.
    filled = np.pad(binary_fill_holes(mask), 1)
    outlines = find_contours(filled.astype(float), 0.5, fully_connected='high')
    return [(outline[:-1, ::-1] - 0.5).ravel().tolist() for outline in outlines]


def _save(image: np.ndarray, path: Path) -> None:
    """Writes an image by its suffix; JPEG without colour subsampling, which blurs small digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = dict(quality=95, subsampling=0) if path.suffix == '.jpg' else {}
    Image.fromarray(image).save(path, **options)


def digit_heights(side: int) -> tuple[int, int]:
    """Range of digit heights in a scene with that longer side, all in pixels."""
    return side // 4, side * 13 // 40


def _write_cls(
    root: Path, split: str, source: Source, count: int, size: int, rng: np.random.Generator
) -> None:
    """One digit per image of about two fifths of a scene's side.

    File names hold the sample's number, so that anyone can check the split.
    """
    folder = root / ('train' if split == 'train' else 'val')
    order = rng.permutation(len(source.labels))
    # Class by class in turn: any number of images from ten on has every class about equally often.
    turn = np.zeros(len(order), dtype=int)
    for label in range(len(CLASSES)):
        turn[source.labels[order] == label] = np.arange((source.labels == label).sum())
    order = order[np.argsort(turn, kind='stable')]
    for number in range(count):
        index = order[number % len(order)]
        sides = draw_size(size * 2 // 5, ASPECT['digits'], rng)
        heights = digit_heights(min(sides) * 5 // 2)  # as large in it as in a part of a scene
        image, (instance,) = render(source, [index], sides, heights, rng)
        _save(
            image,
            folder / CLASSES[instance.label] / f'{number:05d}_sample{instance.sample:04d}.png',
        )


def _voc_annotation(name: str, size: tuple[int, int], instances: list[Instance]) -> bytes:
    """VOC's XML of one image; its boxes count pixels from one and include the last."""
    root = ET.Element('annotation')

    def add(parent: ET.Element, **texts: object) -> None:
        for tag, text in texts.items():
            ET.SubElement(parent, tag).text = str(text)

    add(root, folder='VOC2007', filename=name)
    add(ET.SubElement(root, 'source'), database='mmslak digit scenes')
    add(ET.SubElement(root, 'size'), width=size[1], height=size[0], depth=3)
    add(root, segmented=0)
    for instance in instances:
        x1, y1, x2, y2 = instance.box
        node = ET.SubElement(root, 'object')
        add(node, name=CLASSES[instance.label], pose='Unspecified', truncated=0, difficult=0)
        add(ET.SubElement(node, 'bndbox'), xmin=x1 + 1, ymin=y1 + 1, xmax=x2, ymax=y2)
    ET.indent(root)
    return ET.tostring(root, encoding='utf-8') + b'\n'


def _coco_annotation(number: int, image_id: int, instance: Instance) -> dict:
    """COCO's entry of one digit.

    `digit_sample` is an addition of ours for checking the split; COCO's readers ignore it.
    """
    x1, y1, x2, y2 = instance.box
    outlines = polygons(instance.mask)
    area = 0.0
    for outline in outlines:
        x, y = np.reshape(outline, (-1, 2)).T
        area += abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2
    return dict(
        id=number,
        image_id=image_id,
        category_id=instance.label + 1,
        segmentation=outlines,
        area=area,
        bbox=[x1, y1, x2 - x1, y2 - y1],
        iscrowd=0,
        digit_sample=instance.sample,
    )


def _write_scenes(
    root: Path,
    split: str,
    source: Source,
    first: int,
    count: int,
    size: int,
    rng: np.random.Generator,
) -> None:
    """The same scenes, numbered from `first`, in the ADE20K, the VOC and the COCO tree."""
    ade_split, ade_prefix, voc_split, coco_split = {
        'train': ('training', 'ADE_train', 'trainval', 'train2017'),
        'test': ('validation', 'ADE_val', 'test', 'val2017'),
    }[split]
    voc = root / 'voc/VOCdevkit/VOC2007'
    coco = dict(
        info=dict(description='mmslak digit scenes', version=str(VERSION)),
        licenses=[],
        images=[],
        annotations=[],
        categories=[dict(id=i, name=c, supercategory='digit') for i, c in enumerate(CLASSES, 1)],
    )
    voc_names = []
    for number in range(1, count + 1):
        indices = rng.choice(len(source.labels), size=rng.integers(2, 5), replace=False)
        sides = draw_size(size, ASPECT['scenes'], rng)
        image, instances = render(source, indices, sides, digit_heights(max(sides)), rng)
        image_id = first + number - 1

        labels = np.ones(sides, dtype=np.uint8)
        for instance in instances:
            labels[instance.mask] = instance.label + 2
        _save(labels, root / f'ade/annotations/{ade_split}/{ade_prefix}_{number:08d}.png')

        jpg = root / f'ade/images/{ade_split}/{ade_prefix}_{number:08d}.jpg'
        _save(image, jpg)
        voc_jpg = voc / f'JPEGImages/{image_id:06d}.jpg'
        coco_jpg = root / f'coco/{coco_split}/{image_id:012d}.jpg'
        for copy in (voc_jpg, coco_jpg):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(jpg, copy)

        annotation = voc / f'Annotations/{voc_jpg.stem}.xml'
        annotation.parent.mkdir(exist_ok=True)
        annotation.write_bytes(_voc_annotation(voc_jpg.name, sides, instances))
        voc_names.append(voc_jpg.stem)

        coco['images'].append(
            dict(id=image_id, file_name=coco_jpg.name, height=sides[0], width=sides[1])
        )
        for instance in instances:
            coco['annotations'].append(
                _coco_annotation(len(coco['annotations']) + 1, image_id, instance)
            )

    lists = voc / 'ImageSets/Main'
    lists.mkdir(parents=True, exist_ok=True)
    (lists / f'{voc_split}.txt').write_text('\n'.join(voc_names) + '\n')
    instances_json = root / f'coco/annotations/instances_{coco_split}.json'
    instances_json.parent.mkdir(parents=True, exist_ok=True)
    instances_json.write_text(json.dumps(coco))


def tree_digest(root: Path) -> str:
    """SHA-256 over the names and bytes of all files below `root` but the manifest."""
    digest = hashlib.sha256()
    files = (path for path in root.rglob('*') if not path.is_dir())
    for path in sorted(path for path in files if path != root / MANIFEST):
        digest.update(path.relative_to(root).as_posix().encode() + b'\0')
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def make_digit_scenes(
    out: str | Path,
    seed: int = 0,
    train: int = 600,
    test: int = 150,
    size: int = 160,
    train_digits: int = 3000,
    test_digits: int = 360,
) -> bool:
    """Writes the four trees to `out`; the same arguments give the same bytes.

    Args:
        out: Folder to write to. It must be missing, empty, or an untouched result of this function,
            which is kept if the arguments are the same and made anew otherwise.
        seed: Seed of everything random but the train/test split, which is fixed.
        train: Number of training scenes.
        test: Number of test scenes.
        size: Longer side of a scene in pixels, 80 to 256, on average: sides are 3/4 to 5/4 of it,
            and the shorter one is 3/5 of the longer one or more. Single digits come on images of
            two fifths of that, with digits of the same size.
        train_digits: Number of training images with a single digit.
        test_digits: Number of test images with a single digit; up to 360, each is another sample.

    Returns:
        Whether something was written.

    Raises:
        ValueError: If a number is out of range.
        FileExistsError: If `out` holds anything else; nothing is changed then.
    """
    given = {name: value for name, value in locals().items() if name != 'out'}
    settings = dict(version=VERSION, **given)
    if seed < 0 or min(train, test) < 1 or min(train_digits, test_digits) < len(CLASSES):
        raise ValueError(
            'needed: a seed of at least 0, one scene and ten single digits, for training and for '
            f'test, got {settings}'
        )
    if not 80 <= size <= 256:
        raise ValueError(f'size must be 80 to 256 pixels, got {size}')

    out = Path(out).resolve()
    if out.exists() and not out.is_dir():
        raise FileExistsError(f'{out} is a file: give a folder that is new or empty')
    if out.is_dir() and any(out.iterdir()):
        try:
            made = json.loads((out / MANIFEST).read_text())
            digest, made_with = made['digest'], made['settings']
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            raise FileExistsError(
                f'{out} holds something else than digit scenes: give a folder that is new or empty'
            ) from None
        if digest != tree_digest(out):
            raise FileExistsError(
                f'{out} was changed since the digit scenes in it were made: '
                'move it away or give another folder'
            )
        if made_with == settings:
            return False

    out.parent.mkdir(parents=True, exist_ok=True)
    # Made beside the final place and moved there when whole: an interrupted run leaves nothing.
    with tempfile.TemporaryDirectory(prefix=f'.{out.name}-', dir=out.parent) as scratch:
        root = Path(scratch) / out.name
        parts = ('train', 1, train, train_digits), ('test', train + 1, test, test_digits)
        for split, first, scenes, digits in parts:
            source = load_source(split)
            # A generator per part: the number of images in one does not change those of another.
            rngs = [np.random.default_rng([seed, split == 'test', part]) for part in range(2)]
            _write_cls(root / 'cls', split, source, digits, size, rngs[0])
            _write_scenes(root, split, source, first, scenes, size, rngs[1])
        (root / MANIFEST).write_text(
            json.dumps(dict(settings=settings, digest=tree_digest(root)), indent=2) + '\n'
        )
        if out.is_dir():
            out.rename(Path(scratch) / 'replaced')
        root.rename(out)
    return True
