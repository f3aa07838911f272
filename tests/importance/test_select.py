"""Which modules are kept, and the picture of it."""

from __future__ import annotations

import numpy as np
import pytest

from para_jax import FanLoraConfig, ParaJaxError
from para_jax.importance.select import keep_number, keep_within, plot_importance
from tests.helpers import SMALL

SITES = list(SMALL.sites)


def scored(*orders: list[str]) -> np.ndarray:
    """Scores by which each layer's sites are in this order, 0 for the others."""
    found = np.zeros((len(orders), len(SITES)))
    for layer, order in enumerate(orders):
        for place, site in enumerate(order):
            found[layer, SITES.index(site)] = 10 + layer - place
    return found


SCORES = scored(["up_proj", "k_proj", "v_proj"], ["v_proj", "down_proj", "q_proj"])


def test_a_number_of_each_layer() -> None:
    assert keep_number(SCORES, SMALL, 1) == (("up_proj",), ("v_proj",))
    assert keep_number(SCORES, SMALL, 2) == (("k_proj", "up_proj"), ("v_proj", "down_proj"))
    assert keep_number(SCORES, SMALL, 7) == (tuple(SITES),) * 2
    assert keep_number(-SCORES, SMALL, 1)[1] == ("k_proj",), "of equal ones the first"
    for number in (0, 8):
        with pytest.raises(ParaJaxError, match=f"a layer has 7 modules, so {number} cannot be kept"):
            keep_number(SCORES, SMALL, number)


@pytest.mark.parametrize("r", [1, 4])
@pytest.mark.parametrize("budget", range(140, 1100, 37))
def test_a_budget_is_spent_in_turns(budget: int, r: int) -> None:
    scores = np.random.default_rng(budget).normal(size=SCORES.shape)
    kept = keep_within(scores, SMALL, budget * r, r)
    assert FanLoraConfig.of(kept, SMALL, r=r).size(SMALL) <= budget * r
    numbers = [len(layer) for layer in kept]
    for layer, sites in enumerate(kept):
        order = [SITES[i] for i in np.argsort(-scores[layer])]
        assert set(sites) == set(order[: len(sites)]), "the beginning of the layer's order"
        # A layer has fewer than another only where its next module could not be paid for.
        if numbers[layer] < max(numbers):
            longer = [*kept[:layer], (*sites, order[len(sites)]), *kept[layer + 1 :]]
            assert FanLoraConfig.of(longer, SMALL, r=r).size(SMALL) > budget * r


def test_the_last_turn_goes_to_the_highest_scores() -> None:
    # One module of each layer, and one more: the second layer's scores are higher.
    cost = {site: s.inputs + s.outputs for site, s in SMALL.sites.items()}
    first = cost["up_proj"] + cost["v_proj"]
    assert keep_within(SCORES, SMALL, first, 1) == (("up_proj",), ("v_proj",))
    assert keep_within(SCORES, SMALL, first + cost["down_proj"], 1) == (("up_proj",), ("v_proj", "down_proj"))
    with pytest.raises(ParaJaxError, match=f"a budget of {first - 1} .* takes {first} in total at r=1"):
        keep_within(SCORES, SMALL, first - 1, 1)
    everything = FanLoraConfig.of([SITES] * 2, SMALL, r=1).size(SMALL)
    assert keep_within(SCORES, SMALL, 10 * everything, 1) == (tuple(SITES),) * 2


def test_scores_of_another_backbone_or_without_a_number() -> None:
    with pytest.raises(ParaJaxError, match=r"shape \(2, 7\) \(layers, sites\), not \(3, 7\)"):
        keep_number(np.zeros((3, 7)), SMALL, 1)
    with pytest.raises(ParaJaxError, match="finite"):
        keep_within(SCORES * np.nan, SMALL, 10**6, 1)


def test_the_picture_frames_what_is_kept(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k)))
    kept = keep_number(SCORES, SMALL, 2)
    plot_importance(SCORES, kept, SMALL, tmp_path / "map.png", "a title")
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
    assert [p.name for p in tmp_path.iterdir()] == ["map.png"]
    axes = drawn[0].axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), SCORES)
    middles = {(round(p.get_y() + p.get_height() / 2), round(p.get_x() + p.get_width() / 2)) for p in axes.patches}
    assert middles == {(layer, SITES.index(site)) for layer, sites in enumerate(kept) for site in sites}
    assert [label.get_text() for label in axes.get_xticklabels()] == SITES


def test_the_pictures_numbers_can_be_read(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many decimals everywhere as the range needs; dark on the light colours, light on the dark ones."""
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k)))
    for scores in (SCORES, SCORES / 1000, 0 * SCORES):
        label = "nats above the layer's least"
        plot_importance(scores, keep_number(scores, SMALL, 2), SMALL, tmp_path / "map.png", "a title", label)
    assert drawn[0].axes[1].get_ylabel() == label
    decimals = [{len(text.get_text().partition(".")[2]) for text in figure.axes[0].texts} for figure in drawn]
    assert decimals[1] == {next(iter(decimals[0])) + 3} and decimals[2] == {0}
    color = {float(text.get_text()): text.get_color() for text in drawn[0].axes[0].texts}
    assert color[min(color)] == "white" and color[max(color)] == "black", "viridis ends in yellow"
