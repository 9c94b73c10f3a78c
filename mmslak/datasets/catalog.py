"""The data sets of the configs: which files they have, and where to get them."""

import os
from dataclasses import dataclass
from pathlib import Path

from mmslak.datasets.findings import of


@dataclass(frozen=True)
class Files:
    """Files of one kind in a folder.

    Args:
        folder: Below the root of the data set.
        suffix: How the files' names end.
        count: How many there are.
        classes: Number of folders that they are spread over; 0 if they lie in `folder` itself.
    """

    folder: str
    suffix: str
    count: int
    classes: int = 0

    def problems(self, root: Path) -> list[str]:
        """A line for each thing that is missing or too much."""
        top = root / self.folder
        if not top.is_dir():
            return [f'{top}: no such folder']
        folders = _subfolders(top) if self.classes else [top]
        found = []
        if self.classes and len(folders) != self.classes:
            found.append(f'{top}: {of(len(folders), "class folder")}, expected {self.classes}')
        count = sum(_count(folder, self.suffix) for folder in folders)
        if count != self.count:
            found.append(f'{top}: {of(count, "file")} *{self.suffix}, expected {self.count}')
        return found


@dataclass(frozen=True)
class Listing:
    """A list of names, one a line, and the files that each name stands for.

    Args:
        path: The list, below the root of the data set.
        count: How many names it has.
        files: Paths below the root, with {} for the name.
    """

    path: str
    count: int
    files: tuple[str, ...]

    def problems(self, root: Path) -> list[str]:
        """A line for each thing that is missing or too much."""
        listing = root / self.path
        if not listing.is_file():
            return [f'{listing}: no such file']
        names = listing.read_text().split()
        found = []
        if len(names) != self.count:
            found.append(f'{listing}: {of(len(names), "name")}, expected {self.count}')
        for file in self.files:
            missing = [name for name in names if not (root / file.format(name)).is_file()]
            if missing:
                first = root / file.format(missing[0])
                found.append(f'{listing}: {len(missing)} of its files are missing, first {first}')
        return found


@dataclass(frozen=True)
class Archive:
    """A file of the publisher, and what it contains.

    Args:
        url: Its address.
        checksum: As `mmslak.fileio.download.fetch` takes it.
        contents: What is on disk after it is unpacked.
        inside: Folder of the archive that becomes the root.
    """

    url: str
    checksum: str | None
    contents: tuple[Files | Listing, ...]
    inside: str = ''

    def problems(self, root: Path) -> list[str]:
        """A line for each thing that is missing or too much."""
        return [line for part in self.contents for line in part.problems(root)]


@dataclass(frozen=True)
class Dataset:
    """A data set.

    Args:
        title: Its name.
        root: Where the configs expect it.
        archives: What can be downloaded.
        contents: What is on disk, for a data set that cannot be downloaded.
        help: How to get such a data set, with {root} for its folder.
    """

    title: str
    root: str
    archives: tuple[Archive, ...] = ()
    contents: tuple[Files | Listing, ...] = ()
    help: str = ''

    def problems(self, root: str | Path | None = None) -> list[str]:
        """A line for each thing that is missing or too much below `root`."""
        root = Path(root or self.root)
        parts = [*self.archives, *self.contents]
        return list(dict.fromkeys(line for part in parts for line in part.problems(root)))


def _subfolders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return [Path(entry.path) for entry in entries if entry.is_dir()]


def _count(folder: Path, suffix: str) -> int:
    """Number of files with a suffix, without hidden ones (`._name.jpg`)."""
    with os.scandir(folder) as entries:
        return sum(e.name.endswith(suffix) and not e.name.startswith('.') for e in entries)


# host.robots.ox.ac.uk, the address in most papers, redirects here (pytorch/vision#9216).
VOC = 'https://thor.robots.ox.ac.uk/pascal/VOC'
COCO = 'http://images.cocodataset.org'


def _voc(year: int, name: str, md5: str, count: int) -> Archive:
    split, folder = name.partition('_')[0], f'VOC{year}'
    files = (f'{folder}/JPEGImages/{{}}.jpg', f'{folder}/Annotations/{{}}.xml')
    listing = Listing(f'{folder}/ImageSets/Main/{split}.txt', count, files)
    return Archive(f'{VOC}/voc{year}/VOC{name}.tar', f'md5:{md5}', (listing,), inside='VOCdevkit')


# The publishers of VOC, COCO and ADE20K name no checksums. These are the ones that other public
# code verifies: torchvision (VOC), PaddleDetection and MLCommons (COCO), the data set classes of
# several segmentation repositories (ADE20K).
DATASETS = {
    'ade20k': Dataset(
        'ADE20K',
        'data/ade/ADEChallengeData2016',
        archives=(
            Archive(
                'http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip',
                'md5:7328b3957e407ddae1d3cbf487f149ef',
                (
                    Files('images/training', '.jpg', 20210),
                    Files('annotations/training', '.png', 20210),
                    Files('images/validation', '.jpg', 2000),
                    Files('annotations/validation', '.png', 2000),
                ),
                inside='ADEChallengeData2016',
            ),
        ),
    ),
    'voc2007': Dataset(
        'PASCAL VOC 2007',
        'data/VOCdevkit',
        archives=(
            _voc(2007, 'trainval_06-Nov-2007', 'c52e279531787c972589f7e41ab4ae64', 5011),
            _voc(2007, 'test_06-Nov-2007', 'b6e924de25625d8de591ea690078ad9f', 4952),
        ),
    ),
    'voc2012': Dataset(
        'PASCAL VOC 2012',
        'data/VOCdevkit',
        archives=(_voc(2012, 'trainval_11-May-2012', '6cd6e144f989b92b3379bac3b3de84fd', 11540),),
    ),
    'coco': Dataset(
        'COCO 2017',
        'data/coco',
        archives=(
            Archive(
                f'{COCO}/annotations/annotations_trainval2017.zip',
                'md5:f4bbac642086de4f52a3fdda2de5fa2c',
                (
                    Files('annotations', 'instances_train2017.json', 1),
                    Files('annotations', 'instances_val2017.json', 1),
                ),
            ),
            Archive(
                f'{COCO}/zips/val2017.zip',
                'md5:442b8da7639aecaf257c1dceb8ba8c80',
                (Files('val2017', '.jpg', 5000),),
            ),
            Archive(
                f'{COCO}/zips/train2017.zip',
                'md5:cced6f7f71b7629ddf16f17bbcfab6b2',
                (Files('train2017', '.jpg', 118287),),
            ),
        ),
    ),
    'imagenet': Dataset(
        'ImageNet-1K',
        'data/imagenet',
        contents=(
            Files('train', '.JPEG', 1281167, classes=1000),
            Files('val', '.JPEG', 50000, classes=1000),
        ),
        help=(
            'ImageNet cannot be downloaded without a login. Get ILSVRC2012_img_train.tar,\n'
            'ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz (ILSVRC 2012, tasks 1 & 2)\n'
            'from https://image-net.org/download-images and put them into {root}.\n'
            'torchvision lays them out as {root}/{{train,val}}/CLASS/*.JPEG (needs scipy):\n'
            '  python -c "import mmslak; from torchvision.datasets import ImageNet; '
            "[ImageNet('{root}', s) for s in ('train', 'val')]\""
        ),
    ),
}
