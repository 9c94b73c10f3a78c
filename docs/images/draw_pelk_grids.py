"""Draws pelk_grids.png: which positions of a 51×51 and of a 101×101 kernel share a weight."""

from pathlib import Path

import matplotlib
import numpy as np

from mmslak.models import sharing_grid

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.colors import LogNorm

KERNELS = [(51, 5), (101, 7)]

figure, axes = plt.subplots(1, 2, figsize=(11, 5.2), layout='constrained')
for axis, (kernel_size, center) in zip(axes, KERNELS, strict=True):
    grid = sharing_grid(kernel_size, center)
    edges = np.cumsum([0, *grid]) - kernel_size / 2
    areas = np.outer(grid, grid)
    image = axis.pcolormesh(
        edges, edges, areas, norm=LogNorm(1, 17**2), cmap='viridis_r', edgecolors='white', lw=0.6
    )
    axis.set_aspect('equal')
    axis.set_title(
        f'{kernel_size}×{kernel_size}, centre {center}: {len(grid)}×{len(grid)} = {areas.size} '
        f'weights for {kernel_size**2:,} positions',
        fontsize=10,
    )
    axis.set_xlabel('offset in pixels of the map')
bar = figure.colorbar(image, ax=axes, ticks=[1, 4, 16, 64, 289], format='%d')
bar.set_label('positions that share the weight')
figure.savefig(Path(__file__).with_name('pelk_grids.png'), dpi=80)
