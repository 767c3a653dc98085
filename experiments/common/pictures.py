"""Pictures of a comparison: loss curves, and the fusion weights that a model has learned."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

import fusedkv_jax as fkv
from fusedkv_jax.layouts import KINDS

History = Sequence[Mapping[str, float]]


def fusion_weights(model: "fkv.Decoder") -> tuple[list[int], list[str], dict[str, np.ndarray]]:
    """Every layer's learned stream weights, averaged over heads and channels.

    Returns:
      (layers with such weights, columns such as "key of 0" or "value of itself",
      {"mean": mean, "magnitude": mean of the absolute values}); the arrays are
      [layers, columns], NaN where a layer does not read that stream. No layers for a layout
      without learned weights.
    """
    cells: dict[tuple[int, str, int], np.ndarray] = {}
    for (kind, layer), weights in model.mixing().items():
        stream = model.config.kv_layout.layers[layer].stream(kind)
        terms = [*stream.sources, layer] if stream.own else list(stream.sources)
        for source, weight in zip(terms, np.asarray(weights), strict=True):
            cells[layer, kind, -1 if source == layer else source] = weight
    layers = sorted({layer for layer, _, _ in cells})
    columns = sorted(
        {(kind, source) for _, kind, source in cells}, key=lambda c: (KINDS.index(c[0]), c[1])
    )
    nothing = np.array([np.nan])
    table = [[cells.get((layer, *column), nothing) for column in columns] for layer in layers]
    shape = (len(layers), len(columns))
    figures = {
        "mean": np.array([[w.mean() for w in row] for row in table]).reshape(shape),
        "magnitude": np.array([[abs(w).mean() for w in row] for row in table]).reshape(shape),
    }
    names = [f"{kind} of {'itself' if source == -1 else source}" for kind, source in columns]
    return layers, names, figures


def draw_fusion_weights(model: "fkv.Decoder", path: pathlib.Path) -> bool:
    """Write a heat map of `fusion_weights`; returns False, and writes nothing, without weights."""
    layers, columns, figures = fusion_weights(model)
    if not layers:
        return False
    limit = float(np.nanmax(figures["magnitude"]))
    panels = (
        ("magnitude", "mean |weight|", "viridis", 0.0),
        ("mean", "mean weight", "RdBu", -limit),
    )
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(3 + 1.3 * len(columns), 1.8 + 0.45 * len(layers)), layout="constrained"
    )
    for axes, (name, title, colors, low) in zip(figure.subplots(1, 2), panels, strict=True):
        image = axes.imshow(figures[name], cmap=colors, vmin=low, vmax=limit, aspect="auto")
        axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
        # Layer 0 is at the bottom of a model.
        axes.set_yticks(range(len(layers)), [f"layer {layer}" for layer in layers])
        axes.invert_yaxis()
        axes.set_title(title)
        for (row, column), value in np.ndenumerate(figures[name]):
            if not np.isnan(value):
                box = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1.5}
                style = {"ha": "center", "va": "center", "fontsize": 8, "bbox": box}
                axes.text(column, row, f"{value:.2f}", **style)
        figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=120)
    return True


def loss_curve(history: History, kind: str) -> tuple[list[float], list[float]]:
    """(steps, losses) of the lines that hold the loss of a `kind`, "train" or "eval"."""
    key = f"{kind}/loss"
    # A loss that was not finite is null in the file.
    lines = [line for line in history if line.get(key) is not None]
    return [line["step"] for line in lines], [line[key] for line in lines]


def draw_loss_curves(histories: Mapping[str, History], path: pathlib.Path) -> None:
    """Write training losses as lines and held-out losses as points, in nats per token.

    The axis is cut at the top, where the first steps are all alike.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    every = []
    for number, (name, history) in enumerate(histories.items()):
        color = f"C{number}"
        axes.plot(*loss_curve(history, "train"), color=color, alpha=0.8, label=name)
        axes.plot(*loss_curve(history, "eval"), "o--", color=color, label=f"{name}, held out")
        every += loss_curve(history, "train")[1] + loss_curve(history, "eval")[1]
    if every:
        axes.set_ylim(min(every) - 0.05, float(np.quantile(every, 0.95)) + 0.05)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def draw_losses_by_tokens(
    curves: Mapping[str, Sequence[Sequence[float]]], reference: float, path: pathlib.Path
) -> None:
    """Write losses as lists of (tokens, nats per token), and a line for what they should reach."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    groups = list(dict.fromkeys(name.partition(",")[0] for name in curves))
    styles = ("o-", "s--", "^:", "d-.")
    seen = dict.fromkeys(groups, 0)
    for name, curve in curves.items():
        group = name.partition(",")[0]
        tokens, losses = zip(*curve, strict=True)
        axes.plot(
            tokens,
            losses,
            styles[seen[group] % len(styles)],
            color=f"C{groups.index(group)}",
            markersize=3,
            label=name,
        )
        seen[group] += 1
    axes.axhline(reference, color="black", linewidth=1, label="the original")
    axes.set_xlabel("tokens of training")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
