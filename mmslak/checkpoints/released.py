"""The weights that the authors of SLaK released: their addresses and their names here.

The links are from https://github.com/VITA-Group/SLaK. The official code, mmseg 0.x and mmdet 2.x
wrote the files; `mmslak get-checkpoint` downloads and converts them.
"""

from dataclasses import dataclass

SURFDRIVE = 'https://surfdrive.surf.nl/files/index.php/s/{}/download'
GOOGLE_DRIVE = 'https://drive.google.com/file/d/'
FOLDER = 'checkpoints'  # where the configs look


@dataclass(frozen=True)
class Released:
    """Released weights.

    Args:
        file: Name of the clean file below `checkpoints/`.
        link: Where the released file is.
        backbone: Arguments of the backbone for these weights, without kernel_sizes.
        kernel_size: Side of the large kernels in the first stage. Where it is not 51, the paper
            does not give the sides in the other stages.
        config: The config that starts from these weights, or that tests them.
        head: Prefix of the head's weights in a segmentor or detector; '' for classifiers.
        family: 'SLaK', or 'ConvNeXt' for classifiers that learnt from a SLaK.
    """

    file: str
    link: str
    backbone: dict
    config: str
    kernel_size: int = 51
    head: str = ''
    family: str = 'SLaK'

    @property
    def google_drive_id(self) -> str | None:
        """Id of the file on Google Drive; None if the file is on another server."""
        is_there = self.link.startswith(GOOGLE_DRIVE)
        return self.link.removeprefix(GOOGLE_DRIVE) if is_there else None


TINY, SMALL, BASE = (dict(arch=arch) for arch in ('tiny', 'small', 'base'))
RELEASED = {
    'slak_tiny': Released(
        'slak_tiny_in1k.pth',
        f'{GOOGLE_DRIVE}1Iut2f5FMS_77jGPYoUJDQzDIXOsax1u4',
        TINY,
        'configs/upernet_slak_t_ade20k.py',
    ),
    'slak_small': Released(
        'slak_small_in1k.pth',
        f'{GOOGLE_DRIVE}1etM6KQbnlsgDAZ37adsQJ3UI8Bbv2AVe',
        SMALL,
        'configs/upernet_slak_s_ade20k.py',
    ),
    'slak_base': Released(
        'slak_base_in1k.pth',
        f'{GOOGLE_DRIVE}1duUxUD3RSblQ6eDHd0n-u0aulwGypf1j',
        BASE,
        'configs/upernet_slak_b_ade20k.py',
    ),
    'slak_tiny_120e': Released(
        'slak_tiny_120e_in1k.pth',
        SURFDRIVE.format('WiQYWNclJ9bW5XV'),
        TINY,
        'configs/upernet_slak_t_ade20k_80k.py',
    ),
    'slak_tiny_120e_k31': Released(
        'slak_tiny_120e_k31_in1k.pth',
        SURFDRIVE.format('VXzBxFXQdlAQ7h8'),
        TINY,
        'configs/upernet_slak_t_ade20k_80k.py',
        kernel_size=31,
    ),
    'slak_tiny_120e_k61': Released(
        'slak_tiny_120e_k61_in1k.pth',
        SURFDRIVE.format('VpR1te71NmVImJb'),
        TINY,
        'configs/upernet_slak_t_ade20k_80k.py',
        kernel_size=61,
    ),
    'upernet_slak_tiny': Released(
        'upernet_slak_tiny_ade20k.pth',
        SURFDRIVE.format('cc6Pqb7IZaecWMv'),
        TINY,
        'configs/upernet_slak_t_ade20k.py',
        head='decode_head.',
    ),
    'upernet_slak_small': Released(
        'upernet_slak_small_ade20k.pth',
        SURFDRIVE.format('HMLBXtKUDY6wyFF'),
        SMALL,
        'configs/upernet_slak_s_ade20k.py',
        head='decode_head.',
    ),
    'upernet_slak_base': Released(
        'upernet_slak_base_ade20k.pth',
        SURFDRIVE.format('JDZ6dMBMZDxUHQG'),
        BASE,
        'configs/upernet_slak_b_ade20k.py',
        head='decode_head.',
    ),
    'cascade_slak_tiny_1x': Released(
        'cascade_mask_rcnn_slak_tiny_coco_1x.pth',
        SURFDRIVE.format('2IvPyGgSTT2RvPu'),
        TINY,
        'configs/cascade_mask_rcnn_slak_t_coco_1x.py',
        head='roi_head.',
    ),
    'convnext_tiny_l2s': Released(
        'convnext_tiny_l2s_in1k.pth',
        SURFDRIVE.format('cR6KLvxjlUshUQA'),
        TINY,
        'configs/convnext_t_l2s_slak_t_imagenet.py',
        kernel_size=7,
        family='ConvNeXt',
    ),
    'convnext_small_l2s': Released(
        'convnext_small_l2s_in1k.pth',
        SURFDRIVE.format('PYqL3rVff3Nu2sP'),
        SMALL,
        'configs/convnext_s_l2s_slak_s_imagenet.py',
        kernel_size=7,
        family='ConvNeXt',
    ),
}


def name_of(file: str) -> str | None:
    """Gives the name by which `mmslak get-checkpoint` knows a file of `checkpoints/`, or None."""
    return next((name for name, entry in RELEASED.items() if entry.file == file), None)
