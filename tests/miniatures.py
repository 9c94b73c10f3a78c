"""Miniatures of real datasets: a few tiny pictures, each tree in its dataset's own on-disk format.

They stand where the real data would (`data_root` is all that a config needs to change), so the
configs that are tested are those that are shipped.
"""

import json
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np

VOC_CLASSES = ('aeroplane', 'person', 'tvmonitor')
# COCO numbers its 80 categories from 1 to 90, without these.
COCO_GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_USED = (1, 18, 90)  # person, dog, toothbrush
WORDNET_IDS = ('n01440764', 'n01443537', 'n01484850')


def _picture(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 of noise."""
    return rng.integers(0, 256, (*size, 3), dtype=np.uint8)


def _write(path: Path, content: np.ndarray | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content, encoding='utf-8')
    elif not cv2.imwrite(str(path), content):
        raise OSError(f'cannot write {path}')


def _boxes(rng: np.random.Generator, size: tuple[int, int], count: int = 2) -> np.ndarray:
    """(count, 4) of x, y, width, height; a third of the picture or more, so no filter drops one."""
    height, width = size
    sides = rng.integers([width // 3, height // 3], [width // 2, height // 2], (count, 2))
    corners = rng.integers(0, np.array([width, height]) - sides)
    return np.concatenate([corners, sides], axis=1)


def write_ade20k(
    root: Path, size: tuple[int, int] = (64, 80), train: int = 4, val: int = 2
) -> Path:
    """ADEChallengeData2016: images/*.jpg and annotations/*.png, 0 = other, 1 to 150 the classes.

    Args:
        root: Folder to write to; becomes `data_root`.
        size: Height and width of the pictures.
        train: Pictures in training.
        val: Pictures in validation.

    Returns:
        root
    """
    rng = np.random.default_rng(0)
    for split, short, count in (('training', 'train', train), ('validation', 'val', val)):
        for i in range(1, count + 1):
            name = f'ADE_{short}_{i:08d}'
            labels = np.zeros(size, np.uint8)
            for x, y, w, h in _boxes(rng, size, 3):
                labels[y : y + h, x : x + w] = rng.integers(1, 151)
            labels[-4:, -4:] = 150  # the last class, which an off-by-one would lose
            _write(root / f'images/{split}/{name}.jpg', _picture(rng, size))
            _write(root / f'annotations/{split}/{name}.png', labels)
    return root


def write_voc(
    root: Path, year: int = 2007, size: tuple[int, int] = (96, 128), count: int = 3
) -> Path:
    """VOCdevkit: VOC{year}/JPEGImages, Annotations (1-based corners) and ImageSets/Main.

    Args:
        root: Folder of the devkit; becomes `data_root`. Years may share one.
        year: 2007, which has a test set, or 2012, which has none.
        size: Height and width of the pictures.
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
        for _ in range(count):
            index += 1
            name = f'{index:06d}' if year == 2007 else f'{year}_{index:06d}'
            names[split].append(name)
            _write(base / f'JPEGImages/{name}.jpg', _picture(rng, size))
            _write(base / f'Annotations/{name}.xml', _voc_annotation(rng, name, year, size))
    names['trainval'] = names['train'] + names['val']
    for split, members in names.items():
        _write(base / f'ImageSets/Main/{split}.txt', ''.join(f'{name}\n' for name in members))
    return root


def _voc_annotation(rng: np.random.Generator, name: str, year: int, size: tuple[int, int]) -> str:
    annotation = ElementTree.Element('annotation')
    values = {'folder': f'VOC{year}', 'filename': f'{name}.jpg', 'segmented': 0}
    for key, value in values.items():
        ElementTree.SubElement(annotation, key).text = str(value)
    dimensions = ElementTree.SubElement(annotation, 'size')
    for key, value in zip(('width', 'height', 'depth'), (size[1], size[0], 3)):
        ElementTree.SubElement(dimensions, key).text = str(value)
    for x, y, w, h in _boxes(rng, size):
        thing = ElementTree.SubElement(annotation, 'object')
        kind = VOC_CLASSES[rng.integers(len(VOC_CLASSES))]
        for key, value in dict(name=kind, pose='Unspecified', truncated=0, difficult=0).items():
            ElementTree.SubElement(thing, key).text = str(value)
        box = ElementTree.SubElement(thing, 'bndbox')
        for key, value in dict(xmin=x + 1, ymin=y + 1, xmax=x + w, ymax=y + h).items():
            ElementTree.SubElement(box, key).text = str(value)
    return ElementTree.tostring(annotation, encoding='unicode')


def write_coco(root: Path, size: tuple[int, int] = (96, 128), train: int = 4, val: int = 2) -> Path:
    """COCO 2017: {train,val}2017/*.jpg, annotations/instances_{train,val}2017.json, polygons.

    Args:
        root: Folder to write to; becomes `data_root`.
        size: Height and width of the pictures.
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
        for i in range(1, count + 1):
            image_id = i + (1000 if split == 'val' else 0)
            file_name = f'{image_id:012d}.jpg'
            _write(root / f'{split}2017/{file_name}', _picture(rng, size))
            images.append(dict(id=image_id, file_name=file_name, height=size[0], width=size[1]))
            for x, y, w, h in _boxes(rng, size).tolist():
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=image_id,
                        category_id=int(rng.choice(COCO_USED)),
                        bbox=[x, y, w, h],
                        area=w * h,
                        iscrowd=0,
                        segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]],
                    )
                )
        content = dict(info={}, licenses=[], images=images, annotations=annotations)
        _write(
            root / f'annotations/instances_{split}2017.json',
            json.dumps(dict(content, categories=categories)),
        )
    return root


def write_imagenet(root: Path, size: tuple[int, int] = (64, 80), count: int = 3) -> Path:
    """ImageNet-1K: {train,val}/WORDNET_ID/*.JPEG; three of the thousand classes have pictures.

    mmpretrain wants every class to have its folder, so the others get an empty one.

    Args:
        root: Folder to write to; becomes `data_root`.
        size: Height and width of the pictures.
        count: Pictures per class and split.

    Returns:
        root
    """
    rng = np.random.default_rng(1000)
    for split in ('train', 'val'):
        for i in range(1000 - len(WORDNET_IDS)):
            (root / split / f'n9{i:07d}').mkdir(parents=True, exist_ok=True)
        for wordnet_id in WORDNET_IDS:
            for i in range(count):
                name = f'{wordnet_id}_{i}' if split == 'train' else f'ILSVRC2012_val_{i:08d}'
                _write(root / f'{split}/{wordnet_id}/{name}.JPEG', _picture(rng, size))
    return root
