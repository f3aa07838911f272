"""Selects the most important modules of each layer by their scores, and plots them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from para_jax.adapters.method import BackboneShape
from para_jax.annotations import Bool, Float
from para_jax.errors import ParaJaxError
from para_jax.training.metrics import save_figure

Kept = tuple[tuple[str, ...], ...]
MOST_NUMBERS = 16  # the maximum number of layers for which the plot shows the scores as numbers


def keep_number(scores_ls: Float[np.ndarray, "layers sites"], shape: BackboneShape, number: int) -> Kept:
    """The `number` most important sites of each layer; the first ones among ties.

    Raises ParaJaxError if a layer has fewer sites, or if the scores do not fit the backbone.

    >>> from para_jax import BackboneConfig, tiny_backbone_path
    >>> shape = BackboneConfig.from_pretrained(tiny_backbone_path())
    >>> keep_number(np.array([[3, 1, 2, 0, 0, 0, 0]] * 4), shape, 2)[0]
    ('q_proj', 'v_proj')
    """
    orders = _orders(scores_ls, shape)
    fewest = min(map(len, orders))
    if not 1 <= number <= fewest:
        raise ParaJaxError(f"a layer has {fewest} modules, so {number} cannot be kept")
    return _kept([order[:number] for order in orders], shape)


def keep_within(scores_ls: Float[np.ndarray, "layers sites"], shape: BackboneShape, budget: int, r: int) -> Kept:
    """The most important sites of each layer, with at most `budget` parameters in total at rank `r`.

    Modules are added in rounds: each round adds the next module, in order of importance, to every layer, so that layers
    have similar numbers of modules. In the last rounds the layers whose module scores highest come first. A layer whose
    next module does not fit is done, so a layer always keeps its most important modules.

    Raises ParaJaxError, with the smallest possible budget, if not every layer gets a module.

    >>> from para_jax import BackboneConfig, tiny_backbone_path
    >>> shape = BackboneConfig.from_pretrained(tiny_backbone_path())
    >>> [len(layer) for layer in keep_within(np.array([[3, 1, 2, 0, 0, 0, 0]] * 4), shape, 6000, r=2)]
    [2, 2, 1, 1]
    """
    orders = _orders(scores_ls, shape)
    names = list(shape.linear_sites)
    # Zero for the sites that a layer does not have, which are in no order.
    cost = [
        [r * sum(shape.sites_of(layer)[name][:2]) if name in shape.sites_of(layer) else 0 for name in names]
        for layer in range(len(orders))
    ]
    smallest = sum(cost[layer][order[0]] for layer, order in enumerate(orders))
    if budget < smallest:
        raise ParaJaxError(
            f"a budget of {budget:,} parameters leaves layers without a module; the most important module of every "
            f"layer takes {smallest:,} in total at r={r}. Raise the budget, or lower r"
        )
    kept: list[list[int]] = [[] for _ in orders]
    open_layers, left = list(range(len(orders))), budget
    for rank in range(len(names)):
        open_layers = [layer for layer in open_layers if rank < len(orders[layer])]
        for layer in sorted(open_layers, key=lambda layer: -scores_ls[layer, orders[layer][rank]]):
            site = orders[layer][rank]
            if cost[layer][site] <= left:
                kept[layer].append(site)
                left -= cost[layer][site]
            else:
                open_layers.remove(layer)
    return _kept(kept, shape)


def _orders(scores_ls: np.ndarray, shape: BackboneShape) -> list[list[int]]:
    size, has = (shape.num_hidden_layers, len(shape.linear_sites)), present(shape)
    if scores_ls.shape != size or not np.isfinite(scores_ls[has]).all():
        raise ParaJaxError(f"scores must be finite numbers of shape {size} (layers, sites), not {scores_ls.shape}")
    orders = np.argsort(-scores_ls, axis=1, kind="stable")
    return [[i for i in order if has[layer, i]] for layer, order in enumerate(orders.tolist())]


def present(shape: BackboneShape) -> Bool[np.ndarray, "layers sites"]:
    """Which of the backbone's linear sites each layer has."""
    return np.array(
        [[name in shape.sites_of(i) for name in shape.linear_sites] for i in range(shape.num_hidden_layers)]
    )


def _kept(indices: Sequence[Sequence[int]], shape: BackboneShape) -> Kept:
    names = list(shape.linear_sites)
    return tuple(tuple(names[i] for i in sorted(layer)) for layer in indices)


def plot_importance(
    scores_ls: np.ndarray, kept: Kept, shape: BackboneShape, path: str | Path, title: str, label: str = "importance"
) -> None:
    """Plots a layer x module heat map as a PNG. Kept modules have a frame.

    `label` is the label of the colour bar. Numbers have enough decimals for three digits of their range.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    names = list(shape.linear_sites)
    layers = len(scores_ls)
    few = layers <= MOST_NUMBERS
    figure = Figure(figsize=(7.5, 1.2 + (0.42 if few else 0.2) * layers), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(scores_ls, aspect="auto", cmap="viridis")
    figure.colorbar(image, label=label)
    spread = float(np.ptp(scores_ls[np.isfinite(scores_ls)]))
    decimals = max(0, 2 - math.floor(math.log10(spread))) if spread else 0
    for layer in range(layers):
        for i, name in enumerate(names):
            if few and np.isfinite(scores_ls[layer, i]):
                # White text on dark cells, by perceived brightness.
                red, green, blue, _ = image.cmap(image.norm(scores_ls[layer, i]))
                color = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
                number = f"{scores_ls[layer, i]:.{decimals}f}"
                axes.text(i, layer, number, ha="center", va="center", color=color, fontsize=8)
            if name in kept[layer]:
                frame = Rectangle((i - 0.46, layer - 0.44), 0.92, 0.88, fill=False, edgecolor="#e8442f", linewidth=2.2)
                axes.add_patch(frame)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(0, layers, 1 if few else 4))
    axes.set(ylabel="layer", title=title)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    save_figure(figure, Path(path))
