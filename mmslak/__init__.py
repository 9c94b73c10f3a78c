"""mmslak: sparse large-kernel backbones for dense prediction on OpenMMLab.

Importing it loads no other library. It makes two things work that the installed libraries leave
open, at the moment at which these are imported: names of configs such as `mmslak::NAME` and
`mmseg::NAME` on every stack, and torchvision beside a torch without CUDA.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

__version__ = '0.1.0'

# A torch.library.Library must stay alive for as long as its schemas are to be known.
_libraries = []


def config_file(name: str | Path) -> str:
    """The path of a config: of `mmslak::NAME` in this package, of all else the name itself."""
    scope, separator, rest = str(name).partition('::')
    if scope != __name__ or not separator:
        return str(name)
    return str(Path(__file__).parent / '.mim/configs' / f'{rest.removesuffix(".py")}.py')


def _resolve_config_names(module: ModuleType) -> None:
    """Lets `_base_`, `Config.fromfile` and `mmengine.hub` find `mmslak::…`, `_base_` `mmseg::…`.

    MMEngine looks for the configs of mmseg in the distribution that OpenMMLab published, whatever
    the installed one is called, and takes no name without a folder.

    Args:
        module: mmengine.config.config
    """
    utils, config = sys.modules['mmengine.config.utils'], module.Config
    utils.MODULE2PACKAGE['mmseg'] = 'mmseg'
    split = utils._get_package_and_cfg_path
    of_base, fromfile = config._get_cfg_path, config.fromfile

    def get_cfg_path(cfg_path: str, filename: str) -> tuple[str, str | None]:
        own = config_file(cfg_path)
        return of_base(cfg_path, filename) if own == cfg_path else (own, None)

    def read(filename: str | Path, *args, **kwargs) -> object:
        return fromfile(config_file(filename), *args, **kwargs)

    def package_and_path(cfg_path: str) -> tuple[str, str]:
        scope, _, name = cfg_path.partition('::')
        return (scope, name) if scope == __name__ else split(cfg_path)

    utils._get_package_and_cfg_path = package_and_path  # where mmengine.hub takes it from
    config._get_cfg_path, config.fromfile = staticmethod(get_cfg_path), staticmethod(read)


def _declare_torchvision_ops(spec: ModuleSpec | None) -> None:
    """Declares the two operators whose absence stops `import torchvision` next to a CPU-only torch.

    PyPI's Linux build of torchvision is linked to CUDA: with a CPU-only torch its library cannot be
    loaded, and the import ends at `operator torchvision::nms does not exist`. Declared without a
    kernel, everything else works.
    """
    import torch

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


class _Mends(MetaPathFinder):
    """Finds nothing itself: mends a library when it is imported, and not before."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name == 'torchvision':
            _declare_torchvision_ops(PathFinder.find_spec(name, path))
        if name != 'mmengine.config.config':
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _resolve_config_names(module)

            spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Mends())
if 'mmengine.config.config' in sys.modules:
    _resolve_config_names(sys.modules['mmengine.config.config'])
