"""Formats of people's data, recognised from small literal folders."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmslak.datasets.formats import complete_splits, recognise
from mmslak.datasets.formats.description import Sample
from mmslak.datasets.formats.files import split_of
from mmslak.datasets.formats.label_maps import find_pairs, name_classes, parts
from mmslak.datasets.formats.split import divide
from mmslak.errors import UserError

SIZE = (96, 72)  # width, height


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob('*') if path.is_file()}


def save_picture(path: Path, size: tuple[int, int] = SIZE, mode: str = 'RGB') -> None:
    """A picture of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.name))
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def save_labels(path: Path, values: list[int], size: tuple[int, int] = SIZE) -> None:
    """A label map, each value in a row of its own; the first in all rows that are left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.full((size[1], size[0]), values[0], np.uint8)
    labels[1 : len(values)] = np.array(values[1:], np.uint8)[:, None]
    labels[-20:] = values[-1]
    Image.fromarray(labels).save(path)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')


# ---------------------------------------------------------------- the five formats, small


def write_label_maps(root: Path) -> dict[Path, bytes]:
    """Ten pictures of two suffixes and their masks, without a split."""
    for i in range(10):
        save_picture(root / f'images/site {i % 2}/Bild ä{i}{".JPG" if i % 3 else ".png"}')
        save_labels(root / f'masks/site {i % 2}/Bild ä{i}_mask.png', [0, 1])
    return contents(root)


def coco(count: int, classes: list[str], first: int = 0, masks: bool = True) -> dict:
    """A COCO file about COUNT pictures with an object of each class."""
    images = [
        dict(id=i, file_name=f'{i}.jpg', width=SIZE[0], height=SIZE[1])
        for i in range(first, first + count)
    ]
    annotations = []
    for image in images:
        for number, _ in enumerate(classes):
            x, y = 5 + 10 * number, 8
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=image['id'],
                    category_id=number + 1,
                    bbox=[x, y, 40, 50],
                    area=2000,
                    iscrowd=0,
                )
            )
            if masks:
                polygon = [x, y, x + 40, y, x + 40, y + 50, x, y + 50]
                annotations[-1]['segmentation'] = [polygon]
    categories = [dict(id=number, name=name) for number, name in enumerate(classes, 1)]
    return dict(images=images, annotations=annotations, categories=categories)


def write_coco_file(root: Path) -> dict[Path, bytes]:
    """One file for ten pictures, which are beside it in a folder."""
    for i in range(10):
        save_picture(root / f'pictures/{i}.jpg')
    write(root / 'labels.json', json.dumps(coco(10, ['hard hat', 'person'])))
    return contents(root)


def xml(name: str, things: list[tuple], size: tuple[int, int] = SIZE) -> str:
    """VOC's annotation of things (class, xmin, ymin, xmax, ymax)."""
    objects = ''.join(
        f'<object><name>{n}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax>'
        f'<ymax>{d}</ymax></bndbox></object>'
        for n, a, b, c, d in things
    )
    return (
        f'<annotation><filename>{name}</filename><size><width>{size[0]}</width>'
        f'<height>{size[1]}</height><depth>3</depth></size>{objects}</annotation>'
    )


def write_voc_folder(root: Path) -> dict[Path, bytes]:
    """JPEGImages and Annotations alone, with pictures of two suffixes."""
    for i in range(10):
        suffix = '.jpg' if i % 2 else '.JPG'
        save_picture(root / f'JPEGImages/{i}{suffix}')
        things = [('helmet', 6, 9, 45, 58), ('person', 16, 9, 55, 58)]
        write(root / f'Annotations/{i}.xml', xml(f'{i}{suffix}', things))
    return contents(root)


def write_yolo(root: Path) -> dict[Path, bytes]:
    """Boxes, with a split that the YAML file names as exports do, from beside its folder."""
    for split, numbers in (('train', range(8)), ('valid', range(8, 10))):
        for i in numbers:
            save_picture(root / f'{split}/images/{i}.jpg')
            write(root / f'{split}/labels/{i}.txt', '0 0.5 0.5 0.5 0.6\r\n1 0.4 0.5 0.5 0.5\r\n')
    names = 'names: {0: hard hat, 1: person}'
    write(root / 'data.yaml', f'train: ../train/images\nval: ../valid/images\n{names}\n')
    return contents(root)


def write_class_folders(root: Path) -> dict[Path, bytes]:
    """Two classes with ten pictures each."""
    for name in ('cats', 'big dogs'):
        for i in range(10):
            save_picture(root / f'{name}/{i}.jpeg')
    return contents(root)
