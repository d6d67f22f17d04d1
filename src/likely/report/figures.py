"""Figures of the report: charts as SVG drawn by matplotlib, grids of images as PNG, each as a ``data:`` address.

Charts carry numbers and plain words only; names that come from the user's data stand in the page, where a browser
sets every script.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from likely.contract import Space, Table, Tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT = "#1f2933", "#c5ced8"
REAL, SAMPLED, MODEL = "#8296ab", "#d4572a", "#1d4e89"
#: Colours of up to ten classes, told apart by readers of all kinds of colour vision (Petroff 2021, arXiv:2107.02270).
CLASSES = (
    "#3f90da",
    "#ffa90e",
    "#bd1f01",
    "#94a4a2",
    "#832db6",
    "#a96b59",
    "#e76300",
    "#b9ac70",
    "#717581",
    "#92dadd",
)
#: Pixels of one grid of images, at most: three grids of pure noise then stay under 3 MB.
PIXELS = 180_000
#: Longest side of one image of a grid; larger ones are shrunk.
SIDE = 128

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "likely",
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "grid.color": "#e6eaee",
    "grid.linewidth": 0.7,
}
_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@contextmanager
def _chart(width: float, height: float) -> Iterator[tuple[Figure, Axes, list[str]]]:
    """A figure of this size in inches; on leaving, the list holds its address."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    address: list[str] = []
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot(), address
        sink = io.StringIO()
        figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = sink.getvalue().replace("'DejaVu Sans'", _FONTS.replace('"', "'"))
    svg = svg[svg.index("<svg") :]
    address.append("data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode())


def learning_curve(history: Sequence[Any], dims: int) -> dict[str, str] | None:
    """Training loss and held-out bound over the steps, in nats per dimension, the best step marked.

    Args:
        history: lines of ``log.jsonl``: a ``step`` with its ``loss`` (nats per dimension), or with ``valid``, which
            holds ``nats`` (nats per example).
        dims: dimensions of an example.

    Returns:
        ``src``, ``alt`` and ``caption``, or None if there is nothing to draw.
    """
    train = [(line["step"], line["loss"]) for line in history if _is_number(line.get("loss"))]
    valid = [
        (line["step"], -line["valid"]["nats"] / dims)
        for line in history
        if _is_number(line.get("valid", {}).get("nats"))
    ]
    if len(train) + len(valid) < 2:
        return None
    with _chart(8.6, 3.2) as (_, axes, address):
        shown = [value for _, value in valid]
        if train:
            steps, losses = np.array(train).T
            axes.plot(steps, losses, color="#9aaabb", linewidth=1.0, label="training loss", zorder=1)
            shown += list(losses[int(0.05 * len(losses)) :])
        if valid:
            steps, bounds = np.array(valid).T
            axes.plot(steps, bounds, color=MODEL, linewidth=1.8, marker="o", markersize=2.6, label="held-out", zorder=2)
            best = min(valid, key=lambda point: point[1])
            axes.axvline(best[0], color=SAMPLED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
            axes.plot(*best, "o", color=SAMPLED, markersize=6, label="best held-out", zorder=3)
        low, high = min(shown), float(np.quantile(shown, 0.97))
        pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low - pad, high + 2 * pad)
        axes.set_xlabel("step")
        axes.set_ylabel("nats per dimension\n(lower is better)")
        axes.grid(axis="y")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.legend(frameon=False, loc="upper right", ncols=3)
    alt, caption = "Learning curve.", "Training loss of every logged stretch of steps"
    if valid:
        alt = (
            f"Learning curve: the held-out value goes from {valid[0][1]:.4g} nats per dimension at step "
            f"{valid[0][0]:,} to its best, {best[1]:.4g}, at step {best[0]:,}."
        )
        caption += " and held-out negative bound, the best marked; the weights of that step are kept"
    caption += (
        ". The loss may carry terms that only training has (warm-up, regularisation); the held-out value has none."
    )
    return {"src": address[0], "alt": alt, "caption": caption}


def histogram(real: np.ndarray, sampled: np.ndarray) -> str:
    """Histograms of two samples of numbers over the same bins, the outermost of which take in all beyond."""
    values = np.concatenate([real, sampled])
    distinct = np.unique(values)
    step = np.diff(distinct).min() if 1 < len(distinct) <= 25 else 0.0
    if step > 0 and distinct[-1] - distinct[0] <= 60 * step:  # few values on a grid: a bar each
        edges = np.arange(distinct[0] - step / 2, distinct[-1] + step, step)
    else:
        low, high = np.quantile(real, [0.005, 0.995])
        low, high = (low, high) if high > low else (values.min(), values.max())
        low, high = (low, high) if high > low else (low - 0.5, low + 0.5)
        edges = np.linspace(low, high, 31)
    with _chart(3.1, 1.35) as (_, axes, address):
        first, second = (
            np.histogram(np.clip(part, edges[0], edges[-1]), edges)[0] / max(1, len(part)) for part in (real, sampled)
        )
        axes.stairs(first, edges, fill=True, color=REAL, alpha=0.55, linewidth=0)
        axes.stairs(second, edges, color=SAMPLED, linewidth=1.3)
        axes.set_ylim(0, 1.08 * max(first.max(), second.max()))
        axes.yaxis.set_visible(False)
        axes.spines["left"].set_visible(False)
        axes.locator_params(axis="x", nbins=5)
        axes.ticklabel_format(axis="x", style="plain", useOffset=False)
        if max(abs(edges[0]), abs(edges[-1])) >= 1e5:
            axes.xaxis.set_major_formatter(lambda value, _: _short(value))
        axes.tick_params(axis="x", labelsize=8)
    return address[0]


def bands(real: np.ndarray, sampled: np.ndarray) -> dict[str, str]:
    """Median and central 90 % of every dimension, real beside sampled; arrays of shape ``(n, dims)``."""
    with _chart(8.6, 2.8) as (_, axes, address):
        place = np.arange(real.shape[1])
        for part, colour, label in ((real, REAL, "data"), (sampled, SAMPLED, "samples")):
            low, middle, high = np.nanquantile(part, [0.05, 0.5, 0.95], axis=0)
            axes.fill_between(place, low, high, color=colour, alpha=0.25, linewidth=0, step="mid")
            axes.step(place, middle, where="mid", color=colour, linewidth=1.2, label=label)
        axes.set_xlabel("dimension")
        axes.grid(axis="y")
        axes.legend(frameon=False, ncols=2, loc="upper right")
        axes.margins(x=0.01)
    alt = f"Median and central 90 % of each of {real.shape[1]:,} dimensions, for data and for samples."
    return {"src": address[0], "alt": alt, "caption": "Median (line) and central 90 % (band) of every dimension."}


def pair_matrix(pairs: Sequence[tuple[str, str, float, float]]) -> dict[str, str]:
    """Scores of pairs of columns as two triangles of one square: below sampled rows, above held-out rows.

    Args:
        pairs: names of two columns, score of the sampled rows, score of held-out rows; 1 is the best.
    """
    names = list(dict.fromkeys(name for pair in pairs for name in pair[:2]))
    place = {name: k for k, name in enumerate(names)}
    square = np.full((len(names), len(names)), np.nan)
    for first, second, sampled, real in pairs:
        low, high = sorted((place[first], place[second]))
        square[high, low], square[low, high] = sampled, real
    side = float(np.clip(0.34 * len(names) + 1.6, 3.2, 8.6))
    with _chart(side + 0.9, side) as (figure, axes, address):
        image = axes.imshow(square, cmap="viridis", vmin=min(0.5, float(np.nanmin(square))), vmax=1.0)
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        figure.colorbar(image, ax=axes, pad=0.02, shrink=0.8).outline.set_visible(False)
    first, second, sampled, real = min(pairs, key=lambda pair: pair[2] - pair[3])
    alt = (
        f"Scores of {len(pairs):,} pairs of columns; farthest below held-out rows is {first} with {second}: "
        f"{sampled:.2f} for sampled, {real:.2f} for held-out rows."
    )
    return {"src": address[0], "alt": alt, "caption": alt}


def scatter_pair(real: np.ndarray, sampled: np.ndarray) -> dict[str, str]:
    """Points of the plane, data beside samples, on the same axes; arrays of shape ``(n, 2)``."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    sink = io.BytesIO()
    low, high = np.nanquantile(real, [0.001, 0.999], axis=0)
    pad = 0.08 * np.where(high > low, high - low, 1.0)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.6, 4.2), layout="constrained")
        for axes, part, colour, title in zip(
            figure.subplots(1, 2, sharex=True, sharey=True), (real, sampled), (REAL, SAMPLED), ("data", "samples")
        ):
            axes.scatter(part[:5000, 0], part[:5000, 1], s=5, color=colour, alpha=0.5, linewidths=0)
            axes.set(xlim=(low[0] - pad[0], high[0] + pad[0]), ylim=(low[1] - pad[1], high[1] + pad[1]), title=title)
        figure.savefig(sink, format="png", dpi=170)
    alt = (
        f"Scatter of {min(5000, len(real)):,} data points beside {min(5000, len(sampled)):,} samples, on the same axes."
    )
    return {"src": _png_address(sink.getvalue()), "alt": alt, "caption": "Data and samples on the same axes."}


def embedding_map(points: np.ndarray, colours: Sequence[str] | np.ndarray | None, names: tuple[str, str]) -> str:
    """Scatter of points of shape ``(n, 2)``, each in its colour, or by a scale where the colours are numbers."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    sink = io.BytesIO()
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.6, 5.2), layout="constrained")
        axes = figure.add_subplot()
        size = float(np.clip(30_000 / len(points), 4, 22))
        options: dict[str, Any] = {"s": size, "alpha": 0.75, "linewidths": 0}
        if isinstance(colours, np.ndarray):
            low, high = np.nanquantile(colours, [0.01, 0.99])
            dots = axes.scatter(points[:, 0], points[:, 1], c=colours, cmap="viridis", vmin=low, vmax=high, **options)
            figure.colorbar(dots, ax=axes, pad=0.01, aspect=40).outline.set_visible(False)
        else:
            axes.scatter(points[:, 0], points[:, 1], color=MODEL if colours is None else list(colours), **options)
        axes.set(xlabel=names[0], ylabel=names[1])
        axes.set_aspect("equal", adjustable="datalim")
        figure.savefig(sink, format="png", dpi=170)
    return _png_address(sink.getvalue())


# --- images ---------------------------------------------------------------------------------------------------------


def image_shape(space: Space) -> tuple[int, int, int] | None:
    """``(channels, height, width)`` of a space whose examples can be shown as images, or None."""
    if isinstance(space, Table | Tokens):
        return None
    shape = space.shape
    if len(shape) == 2:
        shape = (1, *shape)
    if len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) >= 3:
        return shape[0], shape[1], shape[2]
    return None


class Tiles:
    """Puts images of one space on grids, all on the same scale of brightness.

    Args:
        shape: ``(channels, height, width)``.
        low, high: values that are black and white.
    """

    def __init__(self, shape: tuple[int, int, int], low: float, high: float) -> None:
        self._shape, self._low, self._range = shape, low, max(high - low, 1e-12)
        self._shrink = -(-max(shape[1:]) // SIDE)
        side = max(shape[1:]) // self._shrink
        self._enlarge = max(1, 40 // side)
        _, height, width = shape
        self.most = max(4, PIXELS // max(1, (height // self._shrink) * (width // self._shrink)))

    def pixels(self, images: np.ndarray) -> np.ndarray:
        """Bytes of shape ``(n, height, width, channels)``, shrunk by whole numbers where the images are large."""
        channels, height, width = self._shape
        scaled = np.nan_to_num(images.reshape(-1, channels, height, width).astype(np.float64), nan=self._low)
        scaled = np.clip((scaled - self._low) / self._range, 0, 1)
        s = self._shrink
        height, width = height // s, width // s
        blocks = scaled[:, :, : height * s, : width * s].reshape(-1, channels, height, s, width, s)
        return np.round(blocks.mean((3, 5)) * 255).astype(np.uint8).transpose(0, 2, 3, 1)

    def grid(self, images: np.ndarray, columns: int) -> dict[str, Any]:
        """A grid of images in the given order, ``columns`` in a row: ``src``, ``width`` and ``height`` in pixels."""
        from PIL import Image

        tiles = self.pixels(images).repeat(self._enlarge, 1).repeat(self._enlarge, 2)
        n, height, width, channels = tiles.shape
        gap = max(2, height // 20)
        rows = -(-n // columns)
        sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8)
        for i, tile in enumerate(tiles):
            top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
            sheet[top : top + height, left : left + width] = tile
        sink = io.BytesIO()
        Image.fromarray(sheet[..., 0] if channels == 1 else sheet).save(sink, "PNG", optimize=True)
        return {"src": _png_address(sink.getvalue()), "width": sheet.shape[1], "height": sheet.shape[0]}


def _png_address(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _short(value: float) -> str:
    """A large number in few characters: 250k, 1.5M."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
