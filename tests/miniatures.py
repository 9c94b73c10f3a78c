"""Miniatures of real datasets: a few tiny pictures, each tree in its dataset's own on-disk format.

They stand where the real data would (`data_root` is all that a config needs to change), so the
configs that are tested are those that are shipped. By default they are as data from the field are:
pictures differ in size, aspect and form, larger and smaller than every scale that the tests leave
in the pipelines (64 to 256 pixels), and annotations have what one meets in real ones. With a `size`
all pictures have that one, are plain, and hold ordinary objects.
"""

import json
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import cv2
import numpy as np
from PIL import Image

VOC_CLASSES = ('aeroplane', 'person', 'tvmonitor')
# COCO numbers its 80 categories from 1 to 90, without these.
COCO_GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_USED = (1, 18, 90)  # person, dog, toothbrush
WORDNET_IDS = ('n01440764', 'n01443537', 'n01484850')
ORIENTATION = 0x0112  # EXIF's tag; 6 says that the picture is to be turned clockwise


class Kind(NamedTuple):
    """A picture as its readers see it.

    Attributes:
        size: Height and width; of a picture with EXIF's orientation, those after it is turned.
        form: How it is stored: plain, grey, cmyk, exif, png (whatever its name says), palette,
            alpha, deep (16 bits per channel) or deep grey.
        annotated: Whether it has objects.
    """

    size: tuple[int, int]
    form: str = 'plain'
    annotated: bool = True


# By data set and split; a split of more pictures begins again. The first picture of a training set
# is a plain one, and the first ones of COCO are JPEGs, as all of the real ones are.
ADE20K = dict(
    training=(
        Kind((64, 80)),
        Kind((200, 330), 'cmyk'),
        Kind((150, 100), 'exif'),
        Kind((48, 132)),
        Kind((40, 30), 'grey'),
        Kind((90, 90), annotated=False),
    ),
    validation=(
        Kind((210, 150), 'exif'),
        Kind((140, 280), 'cmyk'),
        Kind((40, 56), 'grey'),
        Kind((70, 110), annotated=False),
    ),
)
VOC = dict(
    train=(Kind((90, 120)), Kind((70, 50), 'grey'), Kind((60, 240))),
    val=(Kind((180, 300), 'cmyk'), Kind((210, 140), 'exif'), Kind((80, 100), annotated=False)),
    test=(Kind((250, 150), 'exif'), Kind((44, 60), 'grey', False), Kind((180, 300), 'cmyk')),
)
COCO = dict(
    train=(
        Kind((90, 120)),
        Kind((70, 50), 'grey'),
        Kind((180, 300), 'cmyk'),
        Kind((210, 140), 'exif'),
        Kind((150, 100), 'alpha'),
        Kind((60, 240), 'palette'),
        Kind((120, 170), 'deep'),
        Kind((80, 100), annotated=False),
        Kind((100, 80), 'deep grey'),
    ),
    val=(
        Kind((210, 140), 'exif'),
        Kind((80, 100), 'grey', False),
        Kind((60, 240), 'alpha'),
        Kind((180, 300), 'cmyk'),
        Kind((44, 60), 'palette'),
        Kind((120, 170), 'deep'),
    ),
)
# ImageNet has grey and CMYK pictures, cameras' orientations, and a PNG that is called .JPEG.
IMAGENET = (
    Kind((64, 80)),
    Kind((40, 30), 'grey'),
    Kind((150, 220), 'cmyk'),
    Kind((210, 100), 'exif'),
    Kind((60, 60), 'png'),
)
SUFFIXES = dict.fromkeys(('png', 'palette', 'alpha', 'deep', 'deep grey'), '.png')


def _kinds(kinds: tuple[Kind, ...], size: tuple[int, int] | None, count: int) -> list[Kind]:
    """The kinds of `count` pictures."""
    return list(islice(cycle(kinds), count)) if size is None else [Kind(size)] * count


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')


def write_picture(path: Path, rng: np.random.Generator, kind: Kind) -> None:
    """Writes a picture of noise.

    Args:
        path: The file; its name does not decide the format.
        rng: Source of the noise.
        kind: What picture it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 256, (*kind.size, 3), dtype=np.uint8)
    if kind.form.startswith('deep'):  # Pillow writes no colour of 16 bits
        deep = pixels.astype(np.uint16) * 257
        encoded = cv2.imencode('.png', deep[..., 0] if kind.form == 'deep grey' else deep)[1]
        path.write_bytes(encoded.tobytes())
        return
    modes = dict(grey='L', cmyk='CMYK', palette='P', alpha='RGBA')
    options = {}
    if kind.form == 'exif':
        pixels = np.rot90(pixels)  # counter-clockwise: readers turn it back
        options['exif'] = Image.Exif()
        options['exif'][ORIENTATION] = 6
    picture = Image.fromarray(pixels).convert(modes.get(kind.form, 'RGB'))
    if kind.form == 'alpha':
        picture.putalpha(Image.fromarray(pixels[..., 0]))
    picture.save(path, 'PNG' if kind.form in SUFFIXES else 'JPEG', **options)


def _write_labels(path: Path, labels: np.ndarray, palette: bool = False) -> None:
    """A label map as a PNG of (H, W) indices, grey or with a palette."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(labels)
    if palette:
        colours = np.random.default_rng(0).permutation(256)  # that a reader must not take for them
        picture.putpalette(np.repeat(colours, 3).astype(np.uint8).tobytes())
    picture.save(path)


def _boxes(rng: np.random.Generator, size: tuple[int, int], count: int = 2) -> np.ndarray:
    """(count, 4) of x, y, width, height; a third of the picture or more, so no filter drops one."""
    height, width = size
    sides = rng.integers([width // 3, height // 3], [width // 2, height // 2], (count, 2))
    corners = rng.integers(0, np.array([width, height]) - sides)
    return np.concatenate([corners, sides], axis=1)


def write_ade20k(
    root: Path, size: tuple[int, int] | None = None, train: int = 4, val: int = 2
) -> Path:
    """ADEChallengeData2016: images/*.jpg and annotations/*.png, 0 = other, 1 to 150 the classes.

    Args:
        root: Folder to write to; becomes `data_root`.
        size: Height and width of all pictures; None for pictures as in the field.
        train: Pictures in training.
        val: Pictures in validation.

    Returns:
        root
    """
    rng = np.random.default_rng(0)
    for split, short, count in (('training', 'train', train), ('validation', 'val', val)):
        for i, kind in enumerate(_kinds(ADE20K[split], size, count), 1):
            name = f'ADE_{short}_{i:08d}'
            labels = np.zeros(kind.size, np.uint8)
            if kind.annotated:
                for x, y, w, h in _boxes(rng, kind.size, 3):
                    labels[y : y + h, x : x + w] = rng.integers(1, 151)
                labels[-4:, -4:] = 150  # the last class, which an off-by-one would lose
            write_picture(root / f'images/{split}/{name}.jpg', rng, kind)
            _write_labels(root / f'annotations/{split}/{name}.png', labels)
    return root


def write_voc(
    root: Path, year: int = 2007, size: tuple[int, int] | None = None, count: int = 3
) -> Path:
    """VOCdevkit: VOC{year}/JPEGImages, Annotations (1-based corners) and ImageSets/Main.

    As in the field there are SegmentationClass and ImageSets/Segmentation as well, label maps with
    a palette in which 0 is the background and 255 the border of things.

    Args:
        root: Folder of the devkit; becomes `data_root`. Years may share one.
        year: 2007, which has a test set, or 2012, which has none.
        size: Height and width of all pictures; None for pictures as in the field.
        count: Pictures in each set.

    Returns:
        root
    """
    rng = np.random.default_rng(year)
    base, index = root / f'VOC{year}', 0
    sets = ('train', 'val', 'test') if year == 2007 else ('train', 'val')
    names = {}
    for split in sets:
        names[split] = []
        for kind in _kinds(VOC[split], size, count):
            index += 1
            name = f'{index:06d}' if year == 2007 else f'{year}_{index:06d}'
            names[split].append(name)
            boxes = _boxes(rng, kind.size) if kind.annotated else np.zeros((0, 4), int)
            things = [_voc_thing(rng, (x + 1, y + 1, x + w, y + h)) for x, y, w, h in boxes]
            if size is None:
                if kind.annotated:
                    things += _odd_voc_things(rng, kind.size)
                labels = np.zeros(kind.size, np.uint8)
                for label, (x, y, w, h) in enumerate(boxes, 14):
                    labels[y : y + h, x : x + w] = 255
                    labels[y + 1 : y + h - 1, x + 1 : x + w - 1] = label
                _write_labels(base / f'SegmentationClass/{name}.png', labels, palette=True)
            write_picture(base / f'JPEGImages/{name}.jpg', rng, kind)
            annotation = _voc_annotation(name, year, kind.size, things)
            _write(base / f'Annotations/{name}.xml', annotation)
    names['trainval'] = names['train'] + names['val']
    for split, members in names.items():
        for folder in ('Main', 'Segmentation')[: 2 if size is None else 1]:
            text = ''.join(f'{name}\n' for name in members)
            _write(base / f'ImageSets/{folder}/{split}.txt', text)
    return root


def _voc_thing(
    rng: np.random.Generator, corners: tuple, difficult: int | None = 0
) -> ElementTree.Element:
    """An object at xmin, ymin, xmax, ymax; `difficult` None leaves that element out."""
    thing = ElementTree.Element('object')
    kind = VOC_CLASSES[rng.integers(len(VOC_CLASSES))]
    values = dict(name=kind, pose='Unspecified', truncated=0)
    if difficult is not None:
        values['difficult'] = difficult
    for key, value in values.items():
        ElementTree.SubElement(thing, key).text = str(value)
    _voc_box(thing, corners)
    return thing


def _voc_box(parent: ElementTree.Element, corners: tuple) -> None:
    box = ElementTree.SubElement(parent, 'bndbox')
    for key, value in zip(('xmin', 'ymin', 'xmax', 'ymax'), corners, strict=True):
        ElementTree.SubElement(box, key).text = str(value)


def _odd_voc_things(rng: np.random.Generator, size: tuple[int, int]) -> list[ElementTree.Element]:
    """One small and without `difficult`, a person with its head as a part, one that is difficult,
    one over the border, and one below a pixel; most of them with fractional corners.

    VOCDataset cuts corners to whole pixels. The last one becomes a pixel wide by that; one without
    any width would make the loss nan, since detectors sample the truth as proposals, too.
    """
    height, width = size
    small = _voc_thing(rng, ('5.70', '6.20', '20.10', '18.90'), difficult=None)
    person = _voc_thing(rng, ('3.5', '2', width - 2, f'{height - 2}.3'))
    person.find('name').text = 'person'
    part = ElementTree.SubElement(person, 'part')
    ElementTree.SubElement(part, 'name').text = 'head'
    _voc_box(part, (4, 3, 14, 13))
    return [
        small,
        person,
        _voc_thing(rng, (2, 3, width // 2, height // 2), difficult=1),
        _voc_thing(rng, (width // 2, height // 2, width + 7, height + 5)),
        _voc_thing(rng, ('9.80', '9.70', '10.30', '10.20')),
    ]


def _voc_annotation(
    name: str, year: int, size: tuple[int, int], things: list[ElementTree.Element]
) -> str:
    annotation = ElementTree.Element('annotation')
    values = {'folder': f'VOC{year}', 'filename': f'{name}.jpg', 'segmented': 0}
    for key, value in values.items():
        ElementTree.SubElement(annotation, key).text = str(value)
    dimensions = ElementTree.SubElement(annotation, 'size')
    for key, value in zip(('width', 'height', 'depth'), (size[1], size[0], 3)):
        ElementTree.SubElement(dimensions, key).text = str(value)
    annotation.extend(things)
    return ElementTree.tostring(annotation, encoding='unicode')


def write_coco(
    root: Path, size: tuple[int, int] | None = None, train: int = 4, val: int = 2
) -> Path:
    """COCO 2017: {train,val}2017/*.jpg, annotations/instances_{train,val}2017.json, polygons.

    As in the field, pictures after the first four and two are PNGs at times, as in data of one's
    own.

    Args:
        root: Folder to write to; becomes `data_root`.
        size: Height and width of all pictures; None for pictures as in the field.
        train: Pictures in train2017.
        val: Pictures in val2017.

    Returns:
        root
    """
    from mmdet.datasets import CocoDataset

    numbers = [i for i in range(1, 91) if i not in COCO_GAPS]
    categories = [
        dict(id=number, name=name, supercategory='thing')
        for number, name in zip(numbers, CocoDataset.METAINFO['classes'], strict=True)
    ]
    rng = np.random.default_rng(2017)
    for split, count in (('train', train), ('val', val)):
        images, annotations = [], []
        for i, kind in enumerate(_kinds(COCO[split], size, count), 1):
            image_id = i + (1000 if split == 'val' else 0)
            file_name = f'{image_id:012d}{SUFFIXES.get(kind.form, ".jpg")}'
            write_picture(root / f'{split}2017/{file_name}', rng, kind)
            height, width = kind.size
            images.append(dict(id=image_id, file_name=file_name, height=height, width=width))
            if not kind.annotated:
                continue
            boxes = _boxes(rng, kind.size).tolist()
            if size is None:  # a small one, one over the border, one below a pixel
                boxes += [[5.7, 6.25, 14.5, 12.75], [width // 2, height // 2, width, height]]
                boxes += [[9.25, 9.25, 0.5, 0.5]]
            for x, y, w, h in boxes:
                polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
                annotations.append(dict(bbox=[x, y, w, h], iscrowd=0, segmentation=[polygon]))
            if size is None:
                annotations.append(_crowd(kind.size))
            for annotation in annotations:
                if 'image_id' not in annotation:
                    category, area = int(rng.choice(COCO_USED)), np.prod(annotation['bbox'][2:])
                    annotation.update(image_id=image_id, category_id=category, area=float(area))
        for i, annotation in enumerate(annotations, 1):
            annotation['id'] = i
        content = dict(info={}, licenses=[], images=images, annotations=annotations)
        _write(
            root / f'annotations/instances_{split}2017.json',
            json.dumps(dict(content, categories=categories)),
        )
    return root


def _crowd(size: tuple[int, int]) -> dict:
    """An annotation of the left third as a crowd: its mask is in runs, down the columns."""
    height, width = size
    here = width // 3 * height
    runs = dict(size=[height, width], counts=[0, here, height * width - here])
    return dict(bbox=[0, 0, width // 3, height], iscrowd=1, segmentation=runs)


def write_imagenet(root: Path, size: tuple[int, int] | None = None, count: int = 3) -> Path:
    """ImageNet-1K: {train,val}/WORDNET_ID/*.JPEG; three of the thousand classes have pictures.

    mmpretrain wants every class to have its folder, so the others get an empty one.

    Args:
        root: Folder to write to; becomes `data_root`.
        size: Height and width of all pictures; None for pictures as in the field.
        count: Pictures per class and split.

    Returns:
        root
    """
    rng = np.random.default_rng(1000)
    for split in ('train', 'val'):
        for i in range(1000 - len(WORDNET_IDS)):
            (root / split / f'n9{i:07d}').mkdir(parents=True, exist_ok=True)
        kinds = iter(_kinds(IMAGENET, size, count * len(WORDNET_IDS)))
        for wordnet_id in WORDNET_IDS:
            for i, kind in enumerate(islice(kinds, count)):
                name = f'{wordnet_id}_{i}' if split == 'train' else f'ILSVRC2012_val_{i:08d}'
                write_picture(root / f'{split}/{wordnet_id}/{name}.JPEG', rng, kind)
    return root
