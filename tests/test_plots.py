"""Pictures, by the pixels that they show."""

import numpy as np
import pytest
from matplotlib.image import imread

from dgm_jax import plots


def ink(path):
    """How far each pixel is from white, and the shape."""
    return 1 - imread(path)[..., :3].min(axis=-1)


def test_image_grid_shows_the_pixels_it_is_given(tmp_path):
    images = np.full((3, 8, 8, 1), 16, np.uint8)
    images[1, :, :4] = 0  # the left half of the second image is black
    plots.images(tmp_path / "grid.png", images, high=16, columns=3)
    dark = ink(tmp_path / "grid.png") > 0.9
    columns = np.flatnonzero(dark.any(axis=0)) / dark.shape[1]
    assert 0.30 < columns.min() < columns.max() < 0.55
    with pytest.raises(ValueError, match=r"images has shape \(8, 8, 1\), expected"):
        plots.images(tmp_path / "x.png", images[0])
    with pytest.raises(ValueError, match="high must be above low"):
        plots.images(tmp_path / "x.png", images, low=1, high=1)


def test_density_map_is_the_right_way_up(tmp_path):
    points = np.asarray(plots.grid_points(4.0, 81))
    log_density = -2 * np.sum((points - [-2.0, 2.0]) ** 2, axis=-1)  # upper left
    plots.density(tmp_path / "density.png", log_density, extent=4.0)
    picture = imread(tmp_path / "density.png")
    yellow = (picture[..., 0] > 0.8) & (picture[..., 1] > 0.8) & (picture[..., 2] < 0.4)
    rows, columns = np.nonzero(yellow[:, : int(0.7 * yellow.shape[1])])  # the colour bar is on the right
    assert rows.mean() < 0.45 * yellow.shape[0]
    assert columns.mean() < 0.35 * yellow.shape[1]
    with pytest.raises(ValueError, match=r"expected \[num, num\]"):
        plots.density(tmp_path / "x.png", log_density[:5], extent=4.0)
    with pytest.raises(ValueError, match="need num >= 2"):
        plots.grid_points(4.0, 1)


def test_the_other_pictures(tmp_path):
    rng = np.random.default_rng(0)
    history = {"step": np.arange(1, 201), "loss": 1 + rng.random(200)}
    data = rng.standard_normal((200, 2))
    grid = np.asarray(plots.grid_points(2.0, 5))
    plots.curve(tmp_path / "new" / "loss.png", history, reference=(1.2, "entropy"))
    plots.samples(tmp_path / "samples.png", data, data)
    plots.flow(tmp_path / "flow.png", np.stack([grid, 2 * grid]), [0.0, 1.0], title="flow")
    plots.denoising(tmp_path / "strip.png", rng.random((2, 3, 4, 4, 3)), [1.0, 0.5, 0.0], high=1.0)
    for name in ("new/loss.png", "samples.png", "flow.png", "strip.png"):
        assert (ink(tmp_path / name) > 0.3).mean() > 0.01, name
    with pytest.raises(KeyError, match="history has no 'nll', only step, loss"):
        plots.curve(tmp_path / "x.png", history, "nll")
    with pytest.raises(ValueError, match=r"samples has shape \(200,\), expected \[num, 2\]"):
        plots.samples(tmp_path / "x.png", data, data[:, 0])
    with pytest.raises(ValueError, match=r"expected \[times, num, num, 2\] and \[times\]"):
        plots.flow(tmp_path / "x.png", grid[None], [0.0, 1.0])
    with pytest.raises(ValueError, match=r"expected \[num, times, h, w, c\] and \[times\]"):
        plots.denoising(tmp_path / "x.png", np.zeros((2, 3, 4, 4, 1)), [0.0])
