"""Which modules a target means, against the functions with which PEFT decides."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig as PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from para_jax import BackboneConfig, ParaJaxError
from para_jax.adapters.targets import first_match, module_path, resolve

# Twelve layers, so that layers.1 is the beginning of layers.10 and the end of no other.
SHAPE = BackboneConfig(16, 8, 12, 12, 2, 2, 4)
PATHS = {(i, site): module_path(i, site, SHAPE) for i in range(12) for site in SHAPE.sites}

LISTS = [
    ("q_proj",),
    ("q_proj", "down_proj"),
    ("self_attn.q_proj", "mlp.up_proj"),
    ("1.self_attn.q_proj",),
    ("layers.1.self_attn.q_proj", "model.layers.10.mlp.down_proj"),
    tuple(SHAPE.sites),
]
EXPRESSIONS = [
    r".*\.q_proj",
    r".*(q|v)_proj",
    r"model\.layers\.[0-3]\..*",
    r".*\.1\.self_attn\.k_proj",
    r".*layers.(2|5|11).*(up|down)_proj",
    r".*_proj",
    "model.layers.0.self_attn.q_proj",
]


def ours(target: str | tuple[str, ...], **options) -> set[tuple[int, str]]:
    try:
        layers = resolve(target, SHAPE, **options)
    except ParaJaxError:
        return set()
    return {(i, site) for i, sites in enumerate(layers) for site in sites}


def theirs(target: str | tuple[str, ...], exclude: object = None, layers: object = None) -> set[tuple[int, str]]:
    config = PeftConfig(target_modules=target if isinstance(target, str) else list(target))
    config.exclude_modules, config.layers_to_transform = exclude, layers
    return {key for key, path in PATHS.items() if check_target_module_exists(config, path)}


def test_module_paths_are_those_of_transformers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 12, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
    linear = {name for name, module in model.named_modules() if type(module).__name__ == "Linear"}
    assert set(PATHS.values()) == linear - {"lm_head"}


@pytest.mark.parametrize("target", [*LISTS, *EXPRESSIONS], ids=str)
def test_lists_and_expressions_mean_what_they_mean_in_peft(target: str | tuple[str, ...]) -> None:
    chosen = ours(target)
    assert chosen == theirs(target) and chosen


@pytest.mark.parametrize("exclude", [("v_proj",), ("layers.1.mlp.up_proj",), r".*layers\.[1-9]\..*"], ids=str)
@pytest.mark.parametrize("target", [LISTS[1], LISTS[-1], EXPRESSIONS[5]], ids=["some", "all", "expression"])
def test_exclusions_mean_what_they_mean_in_peft(target, exclude) -> None:
    assert ours(target, exclude=exclude) == theirs(target, exclude if isinstance(exclude, str) else list(exclude))


@pytest.mark.parametrize("layers", [(0,), (1, 11), (10,)])
def test_layers_to_transform_mean_what_they_mean_in_peft(layers: tuple[int, ...]) -> None:
    chosen = ours(("q_proj", "up_proj"), layers=layers)
    assert chosen == theirs(("q_proj", "up_proj"), layers=list(layers))
    assert {layer for layer, _ in chosen} == set(layers)


PIECES = ["q_proj", "v_proj", "_proj", "proj", "mlp", "self_attn", "layers", "model", "1", "11", "0", ".", ".*", r"\."]
patterns = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(pattern=patterns)
def test_any_expression_and_any_entry(pattern: str) -> None:
    """Those that match nothing are errors here; they must be the ones that match nothing there."""
    assert ours(pattern) == theirs(pattern)
    assert ours((pattern,)) == theirs((pattern,))


@settings(derandomize=True, deadline=None, max_examples=150)
@given(keys=st.lists(patterns, min_size=1, max_size=4, unique=True), path=st.sampled_from(sorted(PATHS.values())))
def test_patterns_of_rank_and_alpha(keys: list[str], path: str) -> None:
    theirs = get_pattern_key(keys, path)
    matched = first_match([(key, key) for key in keys], path)
    # PEFT answers with the path itself when nothing matches, or when that is the key.
    assert (path if matched is None else matched) == theirs


def test_all_linear_is_every_projection() -> None:
    assert ours("all-linear") == set(PATHS)
    excluded = ours("all-linear", exclude=("o_proj",), layers=(3,))
    assert excluded == {(3, site) for site in SHAPE.sites if site != "o_proj"}


def test_layers_and_sites_come_in_the_models_order() -> None:
    layers = resolve(("up_proj", "q_proj"), SHAPE, layers=(2, 0))
    assert layers[:3] == (("q_proj", "up_proj"), (), ("q_proj", "up_proj")) and set(layers[3:]) == {()}


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (("q_proj", "v_porj"), {}, "unknown entry of target_modules 'v_porj'; did you mean 'v_proj'?"),
        (("layers.12.self_attn.q_proj",), {}, "did you mean 'model.layers.2.self_attn.q_proj'"),
        (("layers.11.mlp.q_proj",), {}, "did you mean 'model.layers.11.mlp.up_proj'"),
        ("q_proj", {}, r"matches no module's full path; they are like 'model.layers.0.self_attn.q_proj'. Write a list"),
        ("(q_proj", {}, "target_modules '(q_proj' is not a regular expression"),
        (("q_proj",), {"exclude": ("q_porj",)}, "unknown entry of exclude_modules 'q_porj'; did you mean 'q_proj'?"),
        (("q_proj",), {"exclude": ("q_proj",)}, "leaves no module"),
        (("q_proj",), {"layers": (12,)}, "layers_to_transform has layer 12; the backbone has layers 0 to 11"),
        (("q_proj",), {"layers": (-1,)}, "layer -1"),
        ((), {}, "target_modules is empty; choose among q_proj, k_proj"),
    ],
)
def test_what_matches_nothing_is_an_error(target, options, message: str) -> None:
    with pytest.raises(ParaJaxError, match=message if "\\" in message else re.escape(message)):
        resolve(target, SHAPE, **options)
