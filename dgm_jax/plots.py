"""Pictures of data, densities, flows and training: PNG files in one style, by Matplotlib.

Matplotlib is imported when a picture is drawn, not before, and needs no display. Colours can be told apart by every
eye. On many hosts process 0 alone writes.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax.types import Array

__all__ = ["curve", "denoising", "density", "flow", "grid_points", "images", "samples"]

# Okabe and Ito's colours, apart to every eye.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GREY,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "image.cmap": "viridis",
}


@contextlib.contextmanager
def _figure(path: str | Path, rows: int, columns: int, size: tuple[float, float]) -> Iterator[tuple[Any, np.ndarray]]:
    """A figure and its axes ``[rows, columns]``, in the house style, saved on leaving; no display, no global state."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need Matplotlib: pip install 'dgm-jax[experiments]'.") from error
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.subplots(rows, columns, squeeze=False)
        if jax.process_index() == 0:
            path = Path(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)


def _as_pictures(images: Any, low: float, high: float) -> np.ndarray:
    """``[..., h, w]`` or ``[..., h, w, 3]`` in [0, 1], from ``[..., h, w, c]`` with c 1 or 3."""
    images = np.asarray(images, np.float64)
    if images.ndim < 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"images has shape {images.shape}, expected [..., height, width, channels] with 1 or 3 channels."
        )
    if not high > low:
        raise ValueError(f"high must be above low, got low={low} and high={high}.")
    images = np.clip((images - low) / (high - low), 0, 1)
    return images[..., 0] if images.shape[-1] == 1 else images


def _tiled(pictures: np.ndarray) -> np.ndarray:
    """``[rows, columns, h, w, ...]`` as one picture, with a line between."""
    rows, columns, height, width = pictures.shape[:4]
    gap = max(1, height // 14)
    whole = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap, *pictures.shape[4:]))
    for r in range(rows):
        for c in range(columns):
            top, left = r * (height + gap), c * (width + gap)
            whole[top : top + height, left : left + width] = pictures[r, c]
    return whole


def _bare(axes: Any) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def images(
    path: str | Path,
    images: Any,
    *,
    low: float = 0.0,
    high: float = 255.0,
    columns: int | None = None,
    title: str = "",
) -> None:
    """A grid of images.

    Args:
        path: the PNG file to write.
        images: ``[num, height, width, channels]``, 1 channel or 3.
        low: the value shown black.
        high: the value shown white.
        columns: of the grid; by default as many as rows.
        title: above it.

    Raises:
        ValueError: another shape.
    """
    pictures = _as_pictures(images, low, high)
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    blank = np.ones((rows * columns - len(pictures), *pictures.shape[1:]))
    whole = _tiled(np.concatenate([pictures, blank]).reshape(rows, columns, *pictures.shape[1:]))
    width = min(10.0, max(3.0, 0.75 * columns))
    with _figure(path, 1, 1, (width, width * whole.shape[0] / whole.shape[1] + 0.35 * bool(title))) as (_, axes):
        axes[0, 0].imshow(whole, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes[0, 0].set_title(title)
        _bare(axes[0, 0])


def denoising(
    path: str | Path, frames: Any, times: Any, *, low: float = 0.0, high: float = 255.0, title: str = ""
) -> None:
    """A strip for each sample: one image a time, from noise on the left to data on the right.

    Args:
        path: the PNG file to write.
        frames: ``[num, times, height, width, channels]``.
        times: ``[times]``, written below the columns.
        low: the value shown black.
        high: the value shown white.
        title: above it.

    Raises:
        ValueError: another shape, or as many times as frames not given.
    """
    pictures, times = _as_pictures(frames, low, high), np.asarray(times)
    if np.ndim(frames) != 5 or times.shape != pictures.shape[1:2]:
        raise ValueError(
            f"frames {np.shape(frames)} and times {times.shape}: expected [num, times, h, w, c] and [times]."
        )
    whole = _tiled(pictures)
    columns, _, width = pictures.shape[1:4]
    gap = max(1, pictures.shape[2] // 14)
    inches = min(12.0, max(4.0, 0.85 * columns))
    with _figure(path, 1, 1, (inches, inches * whole.shape[0] / whole.shape[1] + 0.8)) as (_, axes):
        panel = axes[0, 0]
        panel.imshow(whole, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        panel.set_title(title)
        _bare(panel)
        panel.set_xticks([c * (width + gap) + (width - 1) / 2 for c in range(columns)], [f"{t:.2g}" for t in times])
        panel.tick_params(length=0)
        panel.set_xlabel("time t (1: noise, 0: data)")


def curve(
    path: str | Path,
    history: Mapping[str, Any],
    name: str = "loss",
    *,
    label: str = "loss",
    reference: tuple[float, str] | None = None,
    log: bool = False,
    title: str = "",
) -> None:
    """One metric over the steps of training: every value faintly, and its mean over about a fiftieth of the run.

    Args:
        path: the PNG file to write.
        history: from ``train``.
        name: of the metric.
        label: of the vertical axis, with its unit: ``"negative log-likelihood (nats)"``.
        reference: a value and its name, drawn across: the best there is.
        log: whether the vertical axis is logarithmic.
        title: above it.

    Raises:
        KeyError: no such metric, with the names there are.
    """
    if name not in history:
        raise KeyError(f"history has no {name!r}, only {', '.join(history)}.")
    values = np.asarray(history[name], np.float64)
    steps = np.asarray(history["step"]) if "step" in history else np.arange(1, len(values) + 1)
    window = max(1, len(values) // 50)
    with _figure(path, 1, 1, (6.0, 3.6)) as (_, axes):
        panel = axes[0, 0]
        panel.plot(steps, values, color=_BLUE, alpha=0.25 if window > 1 else 1.0, linewidth=0.8)
        shown = values
        if window > 1:
            shown = np.convolve(values, np.full(window, 1 / window), mode="valid")
            panel.plot(steps[window - 1 :], shown, color=_BLUE, linewidth=1.8, label=f"mean over {window} steps")
        if reference is not None:
            panel.axhline(reference[0], color=_ORANGE, linestyle="--", linewidth=1.4, label=reference[1])
        if window > 1 or reference is not None:
            panel.legend()
        if log:
            panel.set_yscale("log")
        elif len(values) > 20:  # a few early or unlucky values must not flatten the rest
            low, high = np.quantile(values, [0.0, 0.98])
            low, high = min(low, reference[0] if reference else low), max(high, reference[0] if reference else high)
            if high > low:
                panel.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
        panel.grid()
        panel.set(xlabel="training step", ylabel=label, title=title)


def samples(
    path: str | Path,
    data: Any,
    samples: Any,
    *,
    extent: float | None = None,
    titles: tuple[str, str] = ("data", "samples"),
) -> None:
    """Points of the data beside points of the model, on equal axes.

    Args:
        path: the PNG file to write.
        data: ``[num, 2]``; of more columns the first two are shown.
        samples: ``[num, 2]``.
        extent: the axes run from -extent to extent; by default to 1.1 times the largest coordinate of the data.
        titles: of the two panels.

    Raises:
        ValueError: another shape.
    """
    data, samples = np.asarray(data), np.asarray(samples)
    for name, points in (("data", data), ("samples", samples)):
        if points.ndim != 2 or points.shape[1] < 2:
            raise ValueError(f"{name} has shape {points.shape}, expected [num, 2].")
    extent = float(1.1 * np.abs(data[:, :2]).max()) if extent is None else extent
    size = float(np.clip(8000 / max(len(data), len(samples)), 0.5, 8))
    with _figure(path, 1, 2, (8.0, 4.2)) as (_, axes):
        for panel, points, title, color in zip(axes[0], (data, samples), titles, (_GREY, _BLUE), strict=True):
            panel.scatter(points[:, 0], points[:, 1], s=size, color=color, alpha=0.6, linewidths=0, rasterized=True)
            panel.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal")
            panel.set(title=f"{title} ({len(points):,} points)", xlabel="$x_1$", ylabel="$x_2$")
            panel.grid()


def grid_points(extent: float, num: int) -> Array:
    """The points of a square grid over [-extent, extent]^2.

    Args:
        extent: half the side.
        num: points along a side, at least 2.

    Returns:
        Points ``[num, num, 2]`` in JAX's default float: row by x_2 from below, column by x_1 from the left.
    """
    if num < 2 or not extent > 0:
        raise ValueError(f"need num >= 2 points and extent > 0, got {num} and {extent}.")
    line = jnp.linspace(-extent, extent, num)
    return jnp.stack(jnp.meshgrid(line, line), axis=-1)


def density(
    path: str | Path,
    log_density: Any,
    *,
    extent: float,
    reference: Any = None,
    titles: tuple[str, str] = ("learned density", "true density"),
) -> None:
    """A density as a heat map, beside the true one where that is known, with one scale of colours.

    Args:
        path: the PNG file to write.
        log_density: ``[num, num]`` in nats, at ``grid_points(extent, num)``.
        extent: half the side of the square.
        reference: the same of the true density.
        titles: of the panels.

    Raises:
        ValueError: another shape.
    """
    maps = [np.asarray(log_density, np.float64)] + ([] if reference is None else [np.asarray(reference, np.float64)])
    for values in maps:
        if values.ndim != 2 or values.shape[0] != values.shape[1]:
            raise ValueError(f"log_density has shape {values.shape}, expected [num, num] at grid_points(extent, num).")
    maps = [np.exp(values) for values in maps]
    top = max(float(np.quantile(values, 0.999)) for values in maps)
    with _figure(path, 1, len(maps), (4.0 * len(maps) + 0.9, 4.0)) as (figure, axes):
        for panel, values, title in zip(axes[0], maps, titles, strict=False):
            shown = panel.imshow(values, origin="lower", extent=(-extent, extent) * 2, vmin=0, vmax=top)
            panel.set(title=title, xlabel="$x_1$", ylabel="$x_2$")
        figure.colorbar(shown, ax=list(axes[0]), label="probability per unit of area", shrink=0.85, extend="max")


def flow(path: str | Path, frames: Any, times: Any, *, every: int = 1, title: str = "") -> None:
    """The flow of a grid through time: one panel a time, its lines coloured by where they began.

    Args:
        path: the PNG file to write.
        frames: ``[times, num, num, 2]``: the points of ``grid_points``, carried along.
        times: ``[times]``, above the panels.
        every: draw one in so many lines, each through all of its points: smooth where the flow stretches them.
        title: above them all.

    Raises:
        ValueError: another shape.
    """
    frames, times = np.asarray(frames, np.float64), np.asarray(times)
    if frames.ndim != 4 or frames.shape[3] != 2 or times.shape != frames.shape[:1]:
        raise ValueError(f"frames {frames.shape} and times {times.shape}: expected [times, num, num, 2] and [times].")
    extent = 1.05 * float(min(np.abs(frames).max(), 1.5 * np.quantile(np.abs(frames), 0.995)))
    with _figure(path, 1, len(frames), (2.5 * len(frames), 3.2 + 0.3 * bool(title))) as (figure, axes):
        import matplotlib
        from matplotlib.collections import LineCollection

        colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(range(0, frames.shape[1], every))))
        for i, (panel, frame, t) in enumerate(zip(axes[0], frames, times, strict=True)):
            for lines in (frame[::every], frame.transpose(1, 0, 2)[::every]):
                panel.add_collection(LineCollection(list(lines), colors=colors, linewidths=0.7))
            panel.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal", title=f"t = {t:.2g}")
            panel.set(xlabel="$x_1$")
            if i == 0:
                panel.set_ylabel("$x_2$")
            else:
                panel.set_yticklabels([])
        if title:
            figure.suptitle(title)
