"""What `mmslak app` shows of one model: predictions, what they cost, and what a place looks at."""

import logging
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.structures import BaseDataElement
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from mmslak.analysis import (
    THRESHOLDS,
    Area,
    Cost,
    complexity,
    contribution_scores,
    effective_receptive_field,
    high_contribution_area,
)
from mmslak.analysis.kernels import LayerKernels, large_kernel_layers, layer_kernels
from mmslak.apis.inference import Prediction, Predictor, prepare
from mmslak.apis.model import quiet, unpooled
from mmslak.cli.complexity import forward_of
from mmslak.datasets.samples import check_file
from mmslak.errors import UserError, reason

SIDE = 1280  # pixels of a picture's longer side; larger ones are made smaller
PIXELS = 80_000_000  # of a picture that is decoded at all
LOWEST = 0.05  # score of the detections that are kept
DECADES = 3  # below the largest contribution, which the logarithmic scale shows
REMEMBERED = 3  # pictures of which a model keeps what it found

# From contributions (H, W) to [0, 1]; where they are small, the papers' scale is nearly linear.
SCALES = {
    'log': lambda x: 1 + (x / x.max()).clamp_min(10.0**-DECADES).log10() / DECADES,
    'linear': lambda x: x / x.max(),
    'papers': contribution_scores,
}

_lock = threading.RLock()  # around all models: one computes at a time, with MMEngine's one scope


def alone(method):
    """Lets a method run while no other of any model does."""

    @wraps(method)
    def wrapper(*args, **kwargs):
        with _lock, quiet(logging.ERROR):  # MMEngine warns of each change of its scope
            return method(*args, **kwargs)

    return wrapper


class Field(NamedTuple):
    """The receptive field of a place, in pixels of the picture.

    Attributes:
        scores: (H, W) in [0, 1], which is the largest contribution.
        areas: Of `THRESHOLDS`, around the place, by the protocol, in what the model gets.
    """

    scores: np.ndarray
    areas: list[Area]


class Seen(NamedTuple):
    """A picture, and what a model found in it.

    Attributes:
        picture: (H, W, 3) uint8, BGR.
        sample: The library's data sample, without a segmentor's scores of all classes.
        certainty: (H, W) probability of the class of each pixel, of segmentors alone.
        milliseconds: From the picture to the sample.
    """

    picture: np.ndarray
    sample: BaseDataElement
    certainty: np.ndarray | None
    milliseconds: float


@dataclass(frozen=True)
class Geometry:
    """How a pipeline makes the model's input of a picture: it resizes, then crops or pads.

    Attributes:
        size: (height, width) of the picture.
        scale: Pixels of the input for one of the picture, down and across.
        offset: Pixels that are cut off at the top and at the left after resizing.
        shape: (height, width) of the input, without what is padded later.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[int, int]
    shape: tuple[int, int]

    @classmethod
    def of(cls, metainfo: dict, shape: Sequence[int]) -> 'Geometry':
        """By what the pipeline says of a picture and the shape that it has made of it.

        Crops of test pipelines are in the centre. Padding is at the bottom and at the right.
        """
        size = tuple(metainfo['ori_shape'][:2])
        scale = metainfo.get('scale_factor')
        # MMCV gives (width, height), at times more than once.
        scale = tuple(a / b for a, b in zip(shape, size)) if scale is None else scale[1::-1]
        resized = [round(length * s) for length, s in zip(size, scale, strict=True)]
        offset = tuple(max(0, round((a - b) / 2)) for a, b in zip(resized, shape, strict=True))
        return cls(size, tuple(map(float, scale)), offset, tuple(shape))

    def _input_of(self, positions: np.ndarray, axis: int) -> np.ndarray:
        """Rows (axis 0) or columns of the input that those of the picture are in."""
        return np.floor((positions + 0.5) * self.scale[axis]).astype(int) - self.offset[axis]

    def to_input(self, at: tuple[int, int]) -> tuple[int, int]:
        """The pixel of the input for a pixel of the picture.

        Raises:
            UserError: If the picture has no such pixel, or the pipeline cuts it off.
        """
        height, width = self.size
        if not (0 <= at[0] < height and 0 <= at[1] < width):
            raise UserError(
                f'row {at[0]}, column {at[1]}: the picture has {height} rows and {width} columns'
            )
        row, column = (int(self._input_of(np.array(p), axis)) for axis, p in enumerate(at))
        if not (0 <= row < self.shape[0] and 0 <= column < self.shape[1]):
            raise UserError(
                f'row {at[0]}, column {at[1]}: this model does not see the place, since its '
                'pipeline takes the centre of a picture alone'
            )
        return row, column

    def to_picture(self, values: np.ndarray) -> np.ndarray:
        """(H, W) over the picture of values (h, w) over the input; 0 where nothing is seen."""
        rows, columns = (self._input_of(np.arange(n), axis) for axis, n in enumerate(self.size))
        inside = [(i >= 0) & (i < n) for i, n in zip((rows, columns), self.shape, strict=True)]
        spread = values[np.ix_(*(i.clip(0, n - 1) for i, n in zip((rows, columns), self.shape)))]
        return spread * inside[0][:, None] * inside[1]


def load_picture(path: str | Path) -> np.ndarray:
    """Decodes a picture as the libraries' loaders do.

    Returns:
        (H, W, 3) uint8, BGR, upright; at most 1280 pixels on the longer side.

    Raises:
        UserError: If it is not a picture, damaged, or far too large.
    """
    import mmcv

    path = Path(path)
    try:
        check_file(str(path))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', Image.DecompressionBombWarning)
            with Image.open(path) as header:
                pixels = header.width * header.height
    except UserError as error:
        raise UserError(str(error).replace(str(path), path.name)) from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        pixels = 0  # OpenCV may know it
    except Image.DecompressionBombError:
        pixels = PIXELS + 1
    if pixels > PIXELS:
        raise UserError(f'{path.name}: more than {PIXELS // 1_000_000} million pixels')
    try:
        picture = mmcv.imread(str(path))
    except Exception as error:  # decoders raise what they like
        raise UserError(f'{path.name}: not a picture that can be read ({reason(error)})') from error
    if picture is None:
        raise UserError(f'{path.name}: not a picture that can be read')
    scale = SIDE / max(picture.shape)
    return mmcv.imrescale(picture, scale, interpolation='area') if scale < 1 else picture


class Viewer:
    """A model with what it found in the last pictures.

    Methods take the file of a picture. One runs at a time, of all models.

    Args:
        cfg: From `read_model_config`.
        checkpoint: File with all its weights; 'none' for random ones.
        device: Where it runs.

    Raises:
        UserError: See `Predictor`.
        CheckpointError: If the file cannot be read.
    """

    def __init__(self, cfg: Config, checkpoint: str, device: str = 'cpu') -> None:
        self.cfg, self.checkpoint, self.device = cfg, checkpoint, device
        self.predictor = Predictor(cfg, checkpoint, device)
        self.model = self.predictor.model.requires_grad_(False)
        self.layers = large_kernel_layers(self.model)
        self._seen: OrderedDict[str, Seen] = OrderedDict()
        self._costs: dict[tuple[int, int], Cost | None] = {}
        self._input = lru_cache(REMEMBERED)(self._input)  # each move of a slider asks for it

    @property
    def stages(self) -> list[str]:
        """Names of the feature maps that the backbone gives."""
        indices = getattr(self.backbone, 'out_indices', None)
        return [f'stage {i}' for i in indices] if indices else ['last']

    @property
    def backbone(self) -> nn.Module:
        """The backbone.

        Raises:
            UserError: If the model has none.
        """
        if not hasattr(self.model, 'backbone'):
            raise UserError(f'{type(self.model).__name__} has no backbone to look into')
        return self.model.backbone

    @alone
    def see(self, path: str) -> Seen:
        """What the model finds in a picture; of the last ones it is known.

        Raises:
            UserError: If it cannot be read, or the model does not run on it.
        """
        if path not in self._seen:
            picture = load_picture(path)
            start = time.perf_counter()
            sample = self.predictor.sample(picture)
            milliseconds = 1e3 * (time.perf_counter() - start)
            self._seen[path] = Seen(picture, *_compact(sample), milliseconds)
            while len(self._seen) > REMEMBERED:
                self._seen.popitem(last=False)
        self._seen.move_to_end(path)
        return self._seen[path]

    @alone
    def predict(
        self, path: str, threshold: float = 0.3, opacity: float | None = None
    ) -> Prediction:
        """The prediction over a picture.

        Args:
            path: Its file.
            threshold: Detections of a lower score are left out.
            opacity: See `Predictor.draw`.
        """
        seen = self.see(path)
        return self.predictor.draw(seen.picture[..., ::-1], seen.sample, threshold, opacity)

    @alone
    def cost(self, path: str) -> Cost | None:
        """What the model costs for the size of a picture; None where that cannot be counted."""
        shape = tuple(self._input(path)[0].shape[2:])
        if shape not in self._costs:
            forward = forward_of(self.model, shape, self.cfg.default_scope)
            try:
                self._costs[shape] = complexity(self.model, shape, forward).total
            except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError):
                self._costs[shape] = None  # some heads run on real pictures alone
        return self._costs[shape]

    @alone
    def there(
        self, path: str, at: tuple[int, int], threshold: float = 0.3
    ) -> tuple[str, float] | None:
        """The class that a place was given, and with what probability or score.

        Args:
            path: File of the picture.
            at: (row, column) in it.
            threshold: Detections of a lower score do not count.

        Returns:
            A segmentor's class of the pixel; the detection with the highest score that the pixel is
            in, or None; a classifier's class of the whole picture.
        """
        seen = self.see(path)
        if seen.certainty is not None:
            label, score = seen.sample.pred_sem_seg.data[0][at], seen.certainty[at]
        elif 'pred_instances' in seen.sample:
            found = seen.sample.pred_instances
            inside = _holds(found, *at) & (found.scores >= threshold)
            if not inside.any():
                return None
            best = int(torch.where(inside, found.scores, -1).argmax())
            label, score = found.labels[best], found.scores[best]
        else:
            score, label = seen.sample.pred_score.max(0)
        return self.predictor.class_name(int(label)), float(score)

    @alone
    def field(
        self, path: str, at: tuple[int, int], stage: int | None = None, scale: str = 'log'
    ) -> Field:
        """The effective receptive field of a place.

        Args:
            path: File of the picture.
            at: (row, column) in it.
            stage: Which of `stages`; None takes the last.
            scale: One of `SCALES`.

        Raises:
            UserError: If the model does not see the place, or nothing contributes.
        """
        backbone = self.backbone
        x, geometry = self._input(path)
        place = geometry.to_input(at)
        try:
            with unpooled(backbone):
                found = effective_receptive_field(backbone, [x], place, stage)
            height, width = geometry.shape
            matrix = found.matrix[:height, :width]  # without padding
            scores = contribution_scores(matrix)
            areas = high_contribution_area(scores, THRESHOLDS, place)
        except (RuntimeError, ValueError) as error:
            raise UserError(f'no receptive field: {reason(error)}') from error
        shown = SCALES[scale](matrix)
        return Field(geometry.to_picture(shown.numpy()), areas)

    @alone
    def kernels(self, layer: str) -> LayerKernels:
        """The kernels of one of `layers`."""
        return layer_kernels(self.layers[layer])

    def _input(self, path: str) -> tuple[Tensor, Geometry]:
        """A picture as the model's backbone gets it, (1, 3, h, w)."""
        data = prepare(self.model, self.see(path).picture)
        geometry = Geometry.of(data['data_samples'][0].metainfo, data['inputs'][0].shape[-2:])
        return self.model.data_preprocessor(data, False)['inputs'], geometry


def _compact(sample: BaseDataElement) -> tuple[BaseDataElement, np.ndarray | None]:
    """A sample without what is large and not shown, and the probability of its pixels' classes."""
    if 'pred_instances' in sample:
        found = sample.pred_instances
        sample.pred_instances = found[found.scores >= LOWEST]
    if 'pred_sem_seg' not in sample:
        return sample, None
    scores, labels = sample.seg_logits.data, sample.pred_sem_seg.data[0]
    del sample.seg_logits
    if len(scores) == 1:  # of two classes mmseg gives the probability of the second
        certainty = torch.where(labels == 1, scores[0], 1 - scores[0])
    else:
        certainty = scores.softmax(0).gather(0, labels[None].long())[0]
    return sample, certainty.numpy()


def _holds(found: BaseDataElement, row: int, column: int) -> Tensor:
    """Whether each detection has a pixel in its mask, or in its box if there are no masks."""
    if 'masks' in found:
        return torch.as_tensor(found.masks[:, row, column]).bool()
    left, top, right, bottom = found.bboxes.T
    return (left <= column) & (column < right) & (top <= row) & (row < bottom)
