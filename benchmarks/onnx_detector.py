"""Finds objects with an exported detector: onnxruntime, NumPy and OpenCV, without PyTorch.

Example:
    mmslak export my.py epoch_12.pth --to onnx --images photos --out detector.onnx
    python benchmarks/onnx_detector.py detector.onnx photos --scale 1333 800 --out found.json

Prepares pictures as the test pipelines of mmdet do: resized within the scale, normalised, and
padded with `pad_value` to a multiple of `size_divisor`. The JSON is as COCO's evaluation reads it,
with the file's name for `image_id` and the label, from 0, for `category_id`; masks are run lengths.
It is there to be copied from.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import onnxruntime


class Detector:
    """An exported detector.

    Args:
        path: The ONNX file.
        scale: Longer and shorter side that a picture is resized to fit in.
    """

    def __init__(self, path: str, scale: Sequence[int]) -> None:
        self.session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
        values = self.session.get_modelmeta().custom_metadata_map
        self.meta = {key: json.loads(value) for key, value in values.items()}
        self.scale = scale

    def __call__(self, picture: np.ndarray) -> list[dict]:
        """Objects in a picture (H, W, 3), BGR as OpenCV reads it."""
        inputs, ratio = self.prepare(picture)
        dets, labels, *masks = (output[0] for output in self.session.run(None, {'input': inputs}))
        height, width = picture.shape[:2]
        found = []
        for i in np.flatnonzero(dets[:, 4] > 0):  # the rest fills up
            box = dets[i, :4] / ratio
            x1, y1, x2, y2 = np.clip(box, 0, [width, height] * 2).tolist()
            entry = dict(category_id=int(labels[i]), score=float(dets[i, 4]))
            entry['bbox'] = [x1, y1, x2 - x1, y2 - y1]
            if masks:
                pasted = paste(masks[0][i], box, height, width) >= self.meta['mask_threshold']
                entry['segmentation'] = dict(size=[height, width], counts=run_lengths(pasted))
            found.append(entry)
        return found

    def prepare(self, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The graph's input (1, 3, H, W), and by how much its x1, y1, x2, y2 are larger."""
        height, width = picture.shape[:2]
        sides, scale = sorted((height, width)), sorted(self.scale)
        divisor = self.meta['size_divisor']
        factor = min(scale[0] / sides[0], scale[1] / sides[1])
        size = int(width * factor + 0.5), int(height * factor + 0.5)
        resized = cv2.resize(picture, size, interpolation=cv2.INTER_LINEAR).astype(np.float32)
        if self.meta['channels'] == 'RGB':
            resized = resized[..., ::-1]
        normal = (resized - np.float32(self.meta['mean'])) / np.float32(self.meta['std'])
        right, below = (-(-side // divisor) * divisor for side in size)
        padded = np.full((below, right, 3), self.meta['pad_value'], np.float32)
        padded[: size[1], : size[0]] = normal
        ratio = np.array([size[0] / width, size[1] / height] * 2)
        return np.ascontiguousarray(padded.transpose(2, 0, 1)[None]), ratio


def paste(mask: np.ndarray, box: np.ndarray, height: int, width: int) -> np.ndarray:
    """Probabilities (h, w) on a grid over a box, interpolated at the pixels (height, width).

    Linear in both directions, and 0 outside: a product with a matrix of weights for each.
    """
    x1, y1, x2, y2 = box
    weights = []
    for pixels, begin, end, cells in (
        (height, y1, y2, mask.shape[0]),
        (width, x1, x2, mask.shape[1]),
    ):
        places = (np.arange(pixels) + 0.5 - begin) / (end - begin) * cells - 0.5
        weights.append(np.maximum(0, 1 - np.abs(places[:, None] - np.arange(cells))))
    return weights[0] @ mask @ weights[1].T


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths of a mask: columns first, zeros first."""
    pixels = np.concatenate([[False], mask.ravel(order='F')])
    changes = np.flatnonzero(pixels[1:] != pixels[:-1])
    return np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('graph', help='what mmslak export has written')
    parser.add_argument('images', type=Path, help='folder of pictures')
    parser.add_argument('--scale', type=int, nargs=2, default=(1333, 800), help='[1333 800]')
    parser.add_argument('--out', type=Path, default=Path('found.json'), help='[found.json]')
    args = parser.parse_args(argv)
    detector, found = Detector(args.graph, args.scale), []
    for path in sorted(args.images.iterdir()):
        picture = cv2.imread(str(path))
        if picture is None:
            print(f'{path}: not a picture', file=sys.stderr)
            continue
        found += [dict(image_id=path.name, **entry) for entry in detector(picture)]
    args.out.write_text(json.dumps(found))
    print(f'{args.out}: {len(found)} objects; PyTorch loaded: {"torch" in sys.modules}')


if __name__ == '__main__':
    main()
