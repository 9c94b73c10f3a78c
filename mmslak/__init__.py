"""mmslak: sparse large-kernel backbones for dense prediction on OpenMMLab.

Importing it loads no model. It makes two things work that the installed libraries leave open:
`mmseg::` bases in configs on every stack, and torchvision beside a torch without CUDA.
"""

import importlib.util
from pathlib import Path

import torch

__version__ = '0.1.0'

# A torch.library.Library must stay alive for as long as its schemas are to be known.
_libraries = []


def _resolve_mmseg_bases() -> None:
    """Lets `_base_ = 'mmseg::…'` find mmseg, whatever its distribution is called."""
    try:
        from mmengine.config import utils
    except ImportError:  # mmslak.ops and mmslak.sparsity are of use without MMEngine
        return
    utils.MODULE2PACKAGE['mmseg'] = 'mmseg'


def _declare_torchvision_ops() -> None:
    """Declares the two operators whose absence stops `import torchvision` next to a CPU-only torch.

    PyPI's Linux build of torchvision is linked to CUDA: with a CPU-only torch its library cannot be
    loaded, and the import ends at `operator torchvision::nms does not exist`. Declared without a
    kernel, everything else works.
    """
    spec = importlib.util.find_spec('torchvision')
    if spec is None or spec.origin is None or torch.version.cuda is not None:
        return
    version = Path(spec.origin).with_name('version.py')
    built_for_cuda = version.is_file() and 'cuda = None' not in version.read_text()
    if not built_for_cuda or hasattr(torch.ops.torchvision, 'nms'):
        return
    library = torch.library.Library('torchvision', 'DEF')
    library.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
    library.define('qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
    _libraries.append(library)


_resolve_mmseg_bases()
_declare_torchvision_ops()
