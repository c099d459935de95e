"""The page's figures: vector charts whose colours follow the page's theme, and strips of frames as PNG.

Charts are drawn by Matplotlib with stand-in colours, which become the page's CSS variables afterwards: one drawing
serves light, dark and print. Text stays text, in the page's font.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .facts import Accuracy, Similarity

Curve = tuple[np.ndarray, np.ndarray]  # steps [n], values [n]

# Stand-ins, replaced in the SVG by var(--name).
THEME = {
    "ink": "#010101",
    "muted": "#020202",
    "line": "#030303",
    "paper": "#040404",
    "untrained-student": "#050505",
    "image-teacher": "#060606",
    "video-teacher": "#070707",
    "student": "#080808",
}
# Light to dark in one direction, so it reads in grey and for every kind of colour vision.
HEAT = LinearSegmentedColormap.from_list("heat", ["#f4efe2", "#c9d9c8", "#6fb0b0", "#2b6f97", "#1c2f5c"])
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mvd-fast",  # same input, same bytes
    "font.size": 12,
    "text.color": THEME["ink"],
    "axes.edgecolor": THEME["line"],
    "axes.labelcolor": THEME["muted"],
    "axes.labelsize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.linewidth": 1.0,
    "grid.color": THEME["line"],
    "grid.linewidth": 0.6,
    "xtick.color": THEME["line"],
    "ytick.color": THEME["line"],
    "xtick.labelcolor": THEME["muted"],
    "ytick.labelcolor": THEME["muted"],
    "legend.frameon": False,
    "legend.fontsize": 12,
    "legend.handlelength": 1.4,
}
# What a masked patch looks like: a calm grey that is no pixel value of the data's black and white.
MASKED = (148, 152, 160)
GAP = 2  # pixels of the clip between two frames of a strip
ZOOM = 4


def color(network: str) -> str:
    return THEME[network.replace(" ", "-")]


def svg(draw: Callable[[Axes], None], name: str, alt: str, width: float, height: float) -> Markup:
    """An inline SVG of what `draw` puts on the axes; `name` keeps ids unique on the page; size in CSS pixels."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        draw(figure.subplots())
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True)
    return Markup(_inline(stream.getvalue(), name, alt))


def _inline(text: str, name: str, alt: str) -> str:
    """From a file of its own to an element of the page."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]+)"', text).group(1)
    head = f'<svg viewBox="{box}" role="img" aria-label="{html.escape(alt)}">'
    text = re.sub(r"<svg[^>]*>", lambda _: head, text, count=1)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text).replace("xlink:href", "href")
    for variable, stand_in in THEME.items():
        text = text.replace(stand_in, f"var(--{variable})")
    return text.strip()


# ---- charts ----


def probe_bars(label: str, table: dict[str, dict[str, Accuracy]], chance: float | None) -> Markup:
    """One bar per network with its standard error, and chance as a dashed line."""
    rows = {network: row[label] for network, row in table.items() if label in row}

    def draw(ax: Axes) -> None:
        for place, (network, accuracy) in enumerate(rows.items()):
            top = accuracy.value + (accuracy.error or 0.0)
            ax.bar(place, accuracy.value, width=0.62, color=color(network))
            if accuracy.error is not None:
                ax.errorbar(place, accuracy.value, accuracy.error, color=THEME["ink"], capsize=3.5, linewidth=1.1)
            ax.annotate(_percent(accuracy.value), (place, top), (0, 4), textcoords="offset points", ha="center")
        if chance is not None:
            ax.axhline(chance, color=THEME["ink"], linewidth=1.1, linestyle=(0, (4, 3)))
            ax.annotate(f"chance\n{_percent(chance)}", (1, chance), (4, 0), xycoords=ax.get_yaxis_transform(),
                        textcoords="offset points", color=THEME["ink"], va="center")  # fmt: skip
        highest = max(accuracy.value for accuracy in rows.values())
        ax.set_ylim(0, min(1.12, max(1.18 * highest, 2 * (chance or 0.0))))
        ax.set_xticks(range(len(rows)), [network.replace(" ", "\n") for network in rows], color=THEME["ink"])
        ax.set_xlim(-0.55, len(rows) - 0.45)
        ax.tick_params(axis="both", length=0)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        ax.grid(axis="y")
        ax.spines["left"].set_visible(False)

    values = ", ".join(f"{network} {_percent(accuracy.value)}" for network, accuracy in rows.items())
    floor = f"; chance {_percent(chance)}" if chance is not None else ""
    return svg(draw, f"probe-{label}", f"Bar chart of {label} accuracy: {values}{floor}.", 460, 270)


def loss_curves(network: str, curves: dict[str, tuple[Curve, str]], rate: Curve) -> Markup:
    """Losses over steps, each raw (faint) and smoothed, with the learning rate thin behind them.

    `curves`: name -> (curve, network whose colour it has).
    """

    def draw(ax: Axes) -> None:
        for name, ((steps, values), owner) in curves.items():
            ax.plot(steps, values, color=color(owner), alpha=0.35, linewidth=0.8)
            ax.plot(steps, smooth(values), color=color(owner), linewidth=1.9, label=name)
        everything = np.concatenate([values for (_, values), _ in curves.values()])
        ax.set_ylim(0 if everything.min() >= 0 else None, _ceiling(everything))
        ax.set_xlabel("step")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(5))
        ax.tick_params(length=3)
        ax.grid(axis="y")
        handles, labels = ax.get_legend_handles_labels()
        if len(rate[0]):
            handles += _draw_rate(ax, rate)
            labels += ["learning rate"]
        ax.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, columnspacing=1.2)

    ends = "; ".join(f"{name} from {v[0]:.3g} to {v[-1]:.3g}" for name, ((_, v), _) in curves.items())
    return svg(draw, f"loss-{network.replace(' ', '-')}", f"Loss of the {network} over steps: {ends}.", 340, 270)


def _draw_rate(ax: Axes, rate: Curve) -> list:
    twin = ax.twinx()
    twin.set_zorder(ax.get_zorder() - 1)
    ax.patch.set_visible(False)
    line = twin.plot(*rate, color=THEME["muted"], linewidth=0.9, linestyle=(0, (2, 2)))
    twin.set_ylim(0, 1.08 * max(rate[1].max(), 1e-12))
    twin.set_yticks([0, rate[1].max()], ["0", f"{rate[1].max():.2g}"])
    twin.tick_params(length=0)
    return line


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over about a twentieth of the curve; cut off at both ends."""
    half = len(values) // 40
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    first, last = np.maximum(place - half, 0), np.minimum(place + half + 1, len(values))
    return (total[last] - total[first]) / (last - first)


def _ceiling(values: np.ndarray) -> float | None:
    """Leaves out a steep start that would press the rest of the curve flat."""
    top = float(values.max())
    usual = float(np.quantile(values, 0.97))
    return 1.08 * (usual if top > 2.5 * usual > 0 else top) or None


def similarity_range(found: list[Similarity]) -> tuple[float, float]:
    """One scale for all matrices: from the lowest value, rounded down to a tenth, to 1."""
    lowest = min(float(item.matrix.min()) for item in found)
    return min(np.floor(10 * lowest + 1e-9) / 10, 0.9), 1.0


def similarity_matrix(item: Similarity, limits: tuple[float, float]) -> Markup:
    names = [str(slice_ + 1) for slice_ in range(len(item.matrix))]

    def draw(ax: Axes) -> None:
        _heat(ax, item.matrix, limits, lambda value: f"{value:.2f}")
        ax.set_xticks(np.arange(len(names)) + 0.5, names)
        ax.set_yticks(np.arange(len(names)) + 0.5, names)
        ax.set_xlabel("time slice")
        ax.set_ylabel("time slice")

    name = f"similarity-{item.network.replace(' ', '-')}"
    alt = f"Cosine similarity between the time slices of the {item.network}'s features; mean {item.mean:.2f}."
    return svg(draw, name, alt, 320, 310)


def confusion_matrix(label: str, counts: np.ndarray, names: list[str]) -> Markup:
    """Rows: the truth; columns: what the probe read; shares of the row in percent."""
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)

    def draw(ax: Axes) -> None:
        _heat(ax, shares, (0.0, 100.0), lambda value: f"{value:.0f}" if value >= 0.5 else "")
        long = max(map(len, names)) > 3
        turn = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if long else {}
        ax.set_xticks(np.arange(len(names)) + 0.5, names, **turn)
        ax.set_yticks(np.arange(len(names)) + 0.5, names)
        ax.set_xlabel("read as")
        ax.set_ylabel("truth")

    right = ", ".join(f"{name} {share:.0f} %" for name, share in zip(names, np.diag(shares), strict=True))
    alt = f"Confusion matrix of the student's {label} probe; read correctly: {right}."
    return svg(draw, f"confusion-{label}", alt, 460, 440)


def _heat(ax: Axes, values: np.ndarray, limits: tuple[float, float], text: Callable[[float], str]) -> None:
    low, high = limits
    ax.pcolormesh(values, cmap=HEAT, vmin=low, vmax=high, edgecolors=THEME["paper"], linewidth=1.5)
    size = 12 if len(values) <= 5 else 10
    for (row, column), value in np.ndenumerate(values):
        level = (value - low) / (high - low)
        ink = "#ffffff" if level > 0.58 else "#14202b"
        ax.text(column + 0.5, row + 0.5, text(value), ha="center", va="center", color=ink, fontsize=size)
    ax.set_aspect("equal")
    ax.invert_yaxis()
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)


def heat_gradient() -> str:
    """The colour scale as a CSS gradient."""
    return f"linear-gradient(to right, {', '.join(to_hex(HEAT(x)) for x in np.linspace(0, 1, 9))})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


# ---- strips of frames ----


def masked_frames(frames: np.ndarray, mask: np.ndarray, tubelet: int, patch: int) -> np.ndarray:
    """Greys the masked tubes of a clip: frames uint8 [T, H, W, 3], mask bool [N] over tubes of tubelet x patch x patch.

    Raises ValueError where the mask does not cover the clip.
    """
    time, height, width, _ = frames.shape
    grid = (time // tubelet, height // patch, width // patch)
    if mask.size != np.prod(grid):
        raise ValueError(f"a mask of {mask.size} tokens for a clip of {' x '.join(map(str, grid))} tubes")
    tubes = mask.astype(bool).reshape(grid)
    pixels = tubes.repeat(tubelet, axis=0).repeat(patch, axis=1).repeat(patch, axis=2)
    return np.where(pixels[..., None], np.array(MASKED, dtype=np.uint8), frames)


def strip(frames: np.ndarray) -> str:
    """Frames uint8 [T, H, W, 3] side by side, enlarged without blur, as a PNG data URL."""
    time, height, width, _ = frames.shape
    row = np.zeros((height, time, width + GAP, 4), dtype=np.uint8)  # transparent between frames
    row[:, :, :width, :3] = frames.transpose(1, 0, 2, 3)
    row[:, :, :width, 3] = 255
    image = row.reshape(height, -1, 4)[:, :-GAP].repeat(ZOOM, axis=0).repeat(ZOOM, axis=1)
    stream = io.BytesIO()
    imsave(stream, np.ascontiguousarray(image), format="png", metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
