"""Pictures that `mmslak app` offers: photographs, scenes of the demo, a validation set."""

import tempfile
import warnings
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import mmcv
import numpy as np
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

from mmslak.analysis.thumbnails import thumbnail
from mmslak.cli.app_viewer import REMEMBERED, alone
from mmslak.cli.browse import SampleDrawer, labels_of
from mmslak.cli.config_checks import build_dataset, check_datasets
from mmslak.cli.erf import photographs
from mmslak.errors import UserError, reason

SCENES = Path('data/digit_scenes/ade/images/validation')  # of the demo
FEW = 8  # scenes of the demo, and pictures of a validation set, in the gallery
SIDE = 160  # pixels of a thumbnail
LOADER = 'val_dataloader'


class Example(NamedTuple):
    """A picture that is offered.

    Attributes:
        name: What it is called.
        path: Its file.
        index: Of a validation set, its place there.
    """

    name: str
    path: Path
    index: int | None = None

    def thumbnail(self) -> Image.Image | None:
        """A small picture; None if it cannot be read."""
        try:
            return thumbnail(str(self.path), side=SIDE)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None


class Validation:
    """The validation set of a config.

    Raises:
        UserError: If the config has none, or its data are not there.
    """

    @alone
    def __init__(self, cfg: Config) -> None:
        if not cfg.get(LOADER) or not cfg.get('visualizer'):
            raise UserError(f'config {cfg.filename} has no {LOADER} or no visualizer')
        init_default_scope(cfg.get('default_scope') or 'mmengine')
        check_datasets(cfg, [LOADER])
        self.cfg, self.dataset = cfg, build_dataset(cfg, LOADER)
        self._draw = SampleDrawer(cfg, self.dataset, f'app_{LOADER}_{id(self)}')
        self.truth = lru_cache(REMEMBERED)(self.truth)  # each move of a slider asks for it

    def __len__(self) -> int:
        return len(self.dataset)

    def example(self, index: int) -> Example:
        """A sample's picture.

        Raises:
            UserError: If there is no such sample, or it is not of one file.
        """
        if not 0 <= index < len(self):
            raise UserError(f'the validation set has pictures 0 to {len(self) - 1}, not {index}')
        path = self.dataset.get_data_info(index).get('img_path')
        if not isinstance(path, str):
            raise UserError(f'sample {index} of the validation set has no img_path')
        return Example(f'{index}: {Path(path).stem}', Path(path), index)

    def examples(self) -> list[Example]:
        """Some samples, spread evenly."""
        chosen = np.linspace(0, len(self) - 1, min(FEW, len(self))).round().astype(int)
        return [self.example(int(index)) for index in chosen]

    @alone
    def truth(self, index: int) -> np.ndarray | None:
        """A sample's picture with its labels, as `mmslak browse` draws it.

        Returns:
            (H, W, 3) uint8, RGB; None if it has no labels.

        Raises:
            UserError: If it cannot be loaded or drawn.
        """
        init_default_scope(self.cfg.get('default_scope') or 'mmengine')
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                packed = self.dataset[index]
            sample = packed['data_samples']
            if not labels_of(sample) and sample.get('gt_label') is None:
                return None
        except Exception as error:  # a pipeline is a program: it can raise anything
            raise UserError(f'sample {index} cannot be loaded ({reason(error)})') from error
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, 'truth.png')
            problem = self._draw(packed, file)
            if problem:
                raise UserError(f'sample {index} has no truth to show: {problem}')
            return mmcv.imread(str(file))[..., ::-1]


def examples() -> list[Example]:
    """The photographs of scikit-image, and test scenes of the demo, as far as they are here."""
    found = [Example(path.stem, path) for path in photographs()]
    return found + [Example(path.stem, path) for path in sorted(SCENES.glob('*.jpg'))[:FEW]]
