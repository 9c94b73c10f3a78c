"""Data that mmslak makes itself; plain files on disk, read by the stock dataset classes."""

from mmslak.datasets.digit_scenes import CLASSES, SEG_CLASSES, SEG_PALETTE, make_digit_scenes

__all__ = ['CLASSES', 'SEG_CLASSES', 'SEG_PALETTE', 'make_digit_scenes']
