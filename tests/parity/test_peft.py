"""Parity with Hugging Face's PEFT: folders in and out, logits, merging, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from para_jax import (
    AdapterBank,
    Backbone,
    BackboneConfig,
    FanLoraConfig,
    IA3Config,
    LoraConfig,
    ParaConfig,
    ParaJaxError,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from para_jax.adapters.adapter import Adapter, abstract_layers, named_leaves
from para_jax.adapters.files import CONFIG, WEIGHTS
from para_jax.convert.checkpoint import save_backbone

# The installed peft calls this of the installed transformers; it has nothing to do with the folders.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 7))
IN_CAUSAL_LM: dict[str, Any] = {"task_type": "CAUSAL_LM"}

LORA: dict[str, dict[str, Any]] = {
    "names": {"r": 4, "lora_alpha": 16, "target_modules": ["v_proj", "q_proj"], "lora_dropout": 0.1},
    "all-linear, rank-stabilised": {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": "all-linear"},
    "regular expression": {"r": 2, "target_modules": r".*layers\.[01]\.(self_attn\.o_proj|mlp\.(gate|down)_proj)"},
    "patterns": {
        "r": 3,
        "target_modules": ["q_proj", "k_proj", "mlp.down_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 6, "k_proj": 2},
        "alpha_pattern": {r".*\.1\.mlp\.down_proj": 32, ".*_proj": 5, "q_proj": 1},
        "init_lora_weights": "gaussian",
    },
    "one layer": {
        "target_modules": ["gate_proj", "q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["h", "layers"],
    },
    "one layer, and a module by its path": {
        "target_modules": ["model.layers.0.self_attn.v_proj", "up_proj"],
        "layers_to_transform": 1,
    },
    "exclusions": {
        "target_modules": "all-linear",
        "exclude_modules": ["o_proj", "layers.0.mlp.down_proj", "lm_head"],
        "init_lora_weights": "orthogonal",
    },
    "excluded by a regular expression": {"target_modules": ["v_proj", "k_proj"], "exclude_modules": r".*0.*v_proj"},
    "other modules in each layer": {"target_modules": ["layers.1.mlp.up_proj", "layers.0.self_attn.q_proj"]},
}
IA3: dict[str, dict[str, Any]] = {
    "defaults": {},
    "q, k and up": {"target_modules": ["up_proj", "q_proj", "k_proj"], "feedforward_modules": []},
    "output of down": {"target_modules": ["down_proj", "o_proj"], "feedforward_modules": []},
    "input of down beside output of up": {
        "target_modules": ["mlp.down_proj", "up_proj"],
        "feedforward_modules": ["mlp.down_proj"],
    },
    "regular expressions": {
        "target_modules": r".*\.(v|down|gate)_proj",
        "feedforward_modules": r".*\.down_proj",
        "init_ia3_weights": False,
    },
    "exclusions": {
        "target_modules": ["v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
        "exclude_modules": ["layers.0.mlp.down_proj"],
    },
}
CASES = [
    pytest.param(kind, options, bool(i % 4), id=f"{kind.__name__[:-6]}: {name}")
    for kind, cases in ((peft.LoraConfig, LORA), (peft.IA3Config, IA3))
    for i, (name, options) in enumerate(cases.items())
]


@pytest.fixture(scope="module")
def backbones(base: Path) -> dict[bool, Backbone]:
    """With layers apart and stacked."""
    return {stacked: Backbone.from_pretrained(base, dtype="float32", stacked=stacked) for stacked in (False, True)}


@pytest.fixture
def make(base: Path, tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """Makes an adapter with PEFT, every weight random, and its folder."""

    def made(kind: type, seed: int = 0, **options: Any) -> tuple[Any, Path]:
        torch.manual_seed(seed)
        # Defaults that depend on the architecture are what PEFT takes.
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), kind(**IN_CAUSAL_LM, **options))
        for name, weight in model.named_parameters():
            if "lora_" in name or "ia3_" in name:
                torch.nn.init.normal_(weight, mean=float("ia3_" in name), std=0.5)
        model.save_pretrained(tmp_path / f"{kind.__name__}-{seed}")
        return model.eval(), tmp_path / f"{kind.__name__}-{seed}"

    return made


def opened(base: Path, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()


def drawn(config: Any, shape: BackboneConfig, scale: float = 0.3) -> Adapter:
    """A random adapter as `random_adapter` makes, with NumPy, so that nothing is compiled for its config."""
    rng = np.random.default_rng(0)
    leaves = []
    layers = abstract_layers(config, shape)
    for name, abstract in named_leaves(layers).items():
        half, _, site = name.partition(".")
        x = rng.normal(0, scale, abstract.shape).astype(np.float32)
        if half in ("down", "up") and isinstance(config, LoraConfig):
            for i, modules in enumerate(config.modules(shape)):
                (x[i] if half == "down" else x[i].T)[modules[site].rank if site in modules else 0 :] = 0
        if half == "vectors":
            x[[site not in modules for modules in config.modules(shape)]] = 1
        leaves.append(jnp.asarray(x))
    return Adapter(config, jax.tree.unflatten(jax.tree.structure(layers), leaves))


def theirs(model: Any, rows: slice = slice(None)) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS[rows])).logits.numpy()


def ours(backbone: Backbone, adapter: Any = None) -> np.ndarray:
    if adapter is None:
        return np.asarray(backbone(jnp.asarray(TOKENS)))
    bank = AdapterBank.stack({"a": adapter}, backbone.config)
    return np.asarray(backbone(jnp.asarray(TOKENS), bank=bank, tenants=["a"] * len(TOKENS)))


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference, relative to the largest entry."""
    return float(np.abs(a - b).max() / np.abs(b).max())


def same_files(a: Path, b: Path) -> None:
    """The same tensors, bit for bit, and configs that PEFT holds for equal."""
    x, y = load_file(a / WEIGHTS), load_file(b / WEIGHTS)
    assert x.keys() == y.keys()
    for name in x:
        assert x[name].dtype == y[name].dtype == torch.float32
        assert torch.equal(x[name], y[name]), name
    assert meaning(a) == meaning(b)


def meaning(folder: Path) -> dict[str, Any]:
    fields = peft.PeftConfig.from_pretrained(folder).to_dict()
    # One layer and a list of it are the same, as are no exclusions and one of a module that is not adapted anyway.
    if isinstance(fields.get("layers_to_transform"), int):
        fields["layers_to_transform"] = [fields["layers_to_transform"]]
    fields["exclude_modules"] = fields["exclude_modules"] or set()
    if isinstance(fields["exclude_modules"], set):
        fields["exclude_modules"] -= {"lm_head"}
    # The list of layers has one name in these models, and vectors that are loaded had no beginning here.
    return {k: v for k, v in fields.items() if k not in ("layers_pattern", "init_ia3_weights")}


@pytest.mark.parametrize(("kind", "options", "stacked"), CASES)
def test_both_ways(
    kind: type,
    options: dict[str, Any],
    stacked: bool,
    base: Path,
    backbones: dict[bool, Backbone],
    make: Callable[..., tuple[Any, Path]],
    tmp_path: Path,
) -> None:
    backbone = backbones[stacked]
    made, folder = make(kind, **options)
    adapter = load_adapter(folder, backbone.config)
    logits = theirs(made)
    bare = ours(backbone)
    assert apart(logits, bare) > 0.05, "the adapter does something"
    assert apart(ours(backbone, adapter), logits) < 1e-4

    save_adapter(adapter, tmp_path / "ours", backbone.config)
    same_files(folder, tmp_path / "ours")
    again = opened(base, tmp_path / "ours")
    assert np.array_equal(theirs(again), logits)
    saved = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert saved["base_model_name_or_path"] == str(base) and saved["inference_mode"] is True

    # Merged: by them and by us, and through a file.
    merged, merged_there = merge_adapter(backbone, adapter), again.merge_and_unload()
    assert apart(ours(merged), theirs(merged_there)) < 1e-5
    save_backbone(merged, tmp_path / "merged")
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, weight in merged_there.state_dict().items():
        assert apart(weights[name].numpy(), weight.numpy()) < 1e-5, name
    assert np.array_equal(ours(backbone), bare), "the backbone is as it was"

    # Made here with other weights.
    adapter = drawn(adapter.config, backbone.config)
    save_adapter(adapter, tmp_path / "new", backbone.config)
    assert apart(ours(backbone, adapter), theirs(opened(base, tmp_path / "new"))) < 1e-4


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=3, target_modules="all-linear", exclude_modules="model.layers.0.*"),
        FanLoraConfig(r=3, target_modules=("layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj")),
        IA3Config(target_modules="all-linear"),
        IA3Config(projection=3),  # whose vectors PEFT gets
    ],
    ids=["all-linear", "fanlora", "ia3 all-linear", "ia3 with a projection"],
)
def test_forms_of_ours(config: Any, base: Path, backbones: dict[bool, Backbone], tmp_path: Path) -> None:
    """Forms that PEFT never writes."""
    backbone = backbones[False]
    adapter = drawn(config, backbone.config)
    save_adapter(adapter, tmp_path / "a", backbone.config)
    logits = theirs(opened(base, tmp_path / "a"))
    assert apart(ours(merge_adapter(backbone, adapter)), logits) < 1e-4
    loaded = load_adapter(tmp_path / "a", backbone.config)
    assert apart(ours(merge_adapter(backbone, loaded)), logits) < 1e-4
    save_adapter(loaded, tmp_path / "b", backbone.config)
    same_files(tmp_path / "a", tmp_path / "b")


def test_one_batch_of_many(base: Path, backbones: dict[bool, Backbone], make: Callable[..., tuple[Any, Path]]) -> None:
    """A row for each of four adapters and one without: as each of them alone in PEFT."""
    backbone = backbones[False]
    made = [
        make(peft.LoraConfig, 0, **LORA["names"]),
        make(peft.LoraConfig, 1, **LORA["patterns"]),
        make(peft.IA3Config, 2),
        make(peft.LoraConfig, 3, **LORA["names"]),
    ]
    bank = AdapterBank.load({str(i): folder for i, (_, folder) in enumerate(made)}, backbone.config)
    assert len(bank.groups) == 3, "the order in which PEFT writes a set makes no difference"
    tokens = np.random.default_rng(1).integers(0, 61, (5, 7))
    mixed = np.asarray(backbone(jnp.asarray(tokens), bank=bank, tenants=["0", "1", None, "2", "3"]))
    models = [made[0][0], made[1][0], AutoModelForCausalLM.from_pretrained(base), made[2][0], made[3][0]]
    with torch.no_grad():
        alone = np.concatenate([m(torch.from_numpy(tokens[i : i + 1])).logits.numpy() for i, m in enumerate(models)])
    for row in range(5):
        assert apart(mixed[row], alone[row]) < 1e-4, row


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floats(
    dtype: torch.dtype, backbones: dict[bool, Backbone], make: Callable[..., tuple[Any, Path]], tmp_path: Path
) -> None:
    _, folder = make(peft.LoraConfig, **LORA["patterns"])
    tensors = {name: x.to(dtype) for name, x in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    save_adapter(load_adapter(folder, backbones[True].config), tmp_path / "a", backbones[True].config)
    for name, x in load_file(tmp_path / "a" / WEIGHTS).items():
        assert torch.equal(x, tensors[name].float())


def test_merged_in_bfloat16(base: Path, backbones: dict[bool, Backbone]) -> None:
    """Each weight is rounded once, from the float32 sum."""
    exact, half = backbones[False], Backbone.from_pretrained(base, dtype="bfloat16", stacked=True)
    adapter = drawn(LoraConfig(target_modules=["q_proj", "up_proj", "o_proj"]), exact.config, 0.1)
    merged = merge_adapter(half, adapter)
    # The same sums, from the same rounded weights, in float32.
    widened = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), merge_adapter(widened, adapter))
    changed = 0
    for x, y, old in zip(*map(jax.tree.leaves, (merged, expected, half)), strict=True):
        assert x.dtype == jnp.bfloat16 and np.array_equal(x, y)
        changed += not np.array_equal(x, old)
        assert x is old or not np.array_equal(x, old), "what is not targeted is shared"
    assert changed == 3


def test_para_cannot_be_merged(backbones: dict[bool, Backbone]) -> None:
    adapter = drawn(ParaConfig(r=2), backbones[False].config)
    with pytest.raises(ParaJaxError, match="para cannot be merged: its vectors depend on the prompt"):
        merge_adapter(backbones[False], adapter)


# What is refused


@pytest.fixture(scope="module")
def good(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each method as PEFT writes it."""
    folders = {}
    for kind, options in ((peft.LoraConfig, {"r": 4, "target_modules": ["q_proj", "v_proj"]}), (peft.IA3Config, {})):
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), kind(**IN_CAUSAL_LM, **options))
        folders[kind.__name__] = tmp_path_factory.mktemp("good") / "a"
        model.save_pretrained(folders[kind.__name__])
    return folders


def changed(folder: Path, place: Path, **options: Any) -> Path:
    """A copy with other options in its config."""
    shutil.copytree(folder, place / "changed")
    fields = json.loads((folder / CONFIG).read_text()) | options
    (place / "changed" / CONFIG).write_text(json.dumps(fields))
    return place / "changed"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("use_dora", True),
        ("task_type", "SEQ_CLS"),
        ("layer_replication", [[0, 2]]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("trainable_token_indices", [3]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("kasa_config", {"beta": 1e-4}),
        ("velora_config", {"num_groups": 64}),
        ("monteclora_config", {"num_samples": 8}),
        ("megatron_config", {"tp": 2}),
        ("ensure_weight_tying", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("loftq_config", {"loftq_bits": 4}),
        ("layers_pattern", ["h"]),
        ("an_option_of_tomorrow", 0),
    ],
)
def test_options_not_implemented(
    key: str, value: Any, good: dict[str, Path], backbones: dict[bool, Backbone], tmp_path: Path
) -> None:
    folder = changed(good["LoraConfig"], tmp_path, **{key: value})
    with pytest.raises(ParaJaxError) as caught:
        load_adapter(folder, backbones[True].config)
    assert f"{key}={value!r} is not implemented here; merge the adapter in peft and load" in str(caught.value)
    assert f"or tune again without {key}" in str(caught.value) and str(folder) in str(caught.value)


def test_all_options_at_once(good: dict[str, Path], backbones: dict[bool, Backbone], tmp_path: Path) -> None:
    folder = changed(good["IA3Config"], tmp_path, modules_to_save=["lm_head"], alora_invocation_tokens=[5])
    with pytest.raises(
        ParaJaxError, match=r"modules_to_save=\['lm_head'\] .*; alora_invocation_tokens=\[5\] is not imp"
    ):
        load_adapter(folder, backbones[True].config)


def test_what_means_nothing_passes(good: dict[str, Path], backbones: dict[bool, Backbone], tmp_path: Path) -> None:
    options = {
        "modules_to_save": [],
        "use_tomorrow": False,
        "tomorrow_config": None,
        "layers_to_transform": [],
        "rank_pattern": None,
        "revision": "main",
        "auto_mapping": {"base_model_class": "LlamaForCausalLM"},
    }
    folder = changed(good["LoraConfig"], tmp_path, **options)
    assert load_adapter(folder, backbones[True].config).config == LoraConfig(r=4)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("LoraConfig", {"target_modules": r".*c_attn"}, r"target_modules '\.\*c_attn' is a regular .* Write a list"),
        ("LoraConfig", {"target_modules": ["q_pro"]}, "unknown entry of target_modules 'q_pro'; did you mean 'q_proj'"),
        ("LoraConfig", {"target_modules": None}, "target_modules is missing.*write a list of names"),
        ("LoraConfig", {"rank_pattern": {"o_proj": 2}}, "rank_pattern has 'o_proj', which matches no targeted module"),
        ("LoraConfig", {"rank_pattern": {"(": 2}}, "is not a regular expression"),
        ("LoraConfig", {"layers_to_transform": [2]}, "layers_to_transform has layer 2; the backbone has layers 0 to 1"),
        ("LoraConfig", {"exclude_modules": 5}, "exclude_modules must be names of modules, not 5"),
        ("LoraConfig", {"target_modules": [5]}, "target_modules must be names of modules, not 5"),
        ("LoraConfig", {"r": None}, "r and the ranks of rank_pattern must be whole numbers from 1, not None"),
        ("LoraConfig", {"r": "4"}, "r and the ranks of rank_pattern must be whole numbers"),
        ("IA3Config", {"target_modules": ["k_proj"]}, "feedforward_modules has down_proj, which target_modules lacks"),
        ("IA3Config", {"feedforward_modules": None}, "feedforward_modules is missing.*write a list of names"),
        (
            "IA3Config",
            {"feedforward_modules": ["k_proj"]},
            "feedforward_modules has k_proj; only down_proj's input can be scaled. Take k_proj out of it",
        ),
        (
            "IA3Config",
            {"target_modules": ".*(k|v|down)_proj", "feedforward_modules": ["layers.1.mlp.down_proj"]},
            "feedforward_modules has down_proj in some of the targeted layers",
        ),
        ("LoraConfig", {"peft_type": "ADALORA"}, "unknown method 'adalora'"),
    ],
)
def test_configs_that_do_not_fit(
    method: str,
    options: dict[str, Any],
    message: str,
    good: dict[str, Path],
    backbones: dict[bool, Backbone],
    tmp_path: Path,
) -> None:
    with pytest.raises(ParaJaxError, match=message) as caught:
        load_adapter(changed(good[method], tmp_path, **options), backbones[True].config)
    assert str(tmp_path / "changed") in str(caught.value)


def test_rank_of_the_config_is_not_the_tensors(
    good: dict[str, Path], backbones: dict[bool, Backbone], tmp_path: Path
) -> None:
    with pytest.raises(ParaJaxError, match="r or rank_pattern in its config is not the rank of its") as caught:
        load_adapter(changed(good["LoraConfig"], tmp_path, r=8), backbones[True].config)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 8, "two layers, two modules, two tensors: all are listed"
    assert lines[0] == (
        "  base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight is [4, 32] and should be [8, 32]"
    )


def test_side_of_the_config_is_not_the_tensors(
    good: dict[str, Path], backbones: dict[bool, Backbone], tmp_path: Path
) -> None:
    with pytest.raises(
        ParaJaxError, match="feedforward_modules in its config does not match the shapes of its tensors"
    ) as caught:
        load_adapter(changed(good["IA3Config"], tmp_path, feedforward_modules=[]), backbones[True].config)
    assert "layers.1.mlp.down_proj.ia3_l is [1, 48] and should be [32, 1]" in str(caught.value)


@pytest.mark.parametrize("method", ["LoraConfig", "IA3Config"])
@pytest.mark.parametrize("size", [{"hidden_size": 64}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}], ids=str)
def test_another_base(
    method: str, size: dict[str, int], good: dict[str, Path], backbones: dict[bool, Backbone]
) -> None:
    other = dataclasses.replace(backbones[True].config, intermediate_size=64, head_dim=16, **size)
    with pytest.raises(ParaJaxError, match=r"made for another backbone \(.*base\); load the backbone it was tuned on"):
        load_adapter(good[method], other)


def test_tensors_missing_and_extra(good: dict[str, Path], backbones: dict[bool, Backbone], tmp_path: Path) -> None:
    folder = changed(good["LoraConfig"], tmp_path)
    tensors = load_file(folder / WEIGHTS)
    at = "base_model.model.model.layers.1.self_attn.q_proj"
    tensors[f"{at}.lora_C"] = tensors.pop(f"{at}.lora_A.weight")
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ParaJaxError, match="it has 7 of the 8 tensors that its config needs") as caught:
        load_adapter(folder, backbones[True].config)
    assert f"{at}.lora_A.weight [4, 32] is missing" in str(caught.value)
    assert f"{at}.lora_C is not expected" in str(caught.value)


def test_tensors_that_are_no_floats(good: dict[str, Path], backbones: dict[bool, Backbone], tmp_path: Path) -> None:
    folder = changed(good["LoraConfig"], tmp_path)
    save_file({name: x.to(torch.float8_e4m3fn) for name, x in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    with pytest.raises(ParaJaxError, match="is F8_E4M3; adapters are read in float32, float16 and bfloat16"):
        load_adapter(folder, backbones[True].config)


def test_weights_beyond_the_rank_are_not_lost(backbones: dict[bool, Backbone], tmp_path: Path) -> None:
    config = LoraConfig(r=2, rank_pattern={"layers.0.self_attn.q_proj": 4})
    adapter = drawn(config, backbones[True].config)
    save_adapter(adapter, tmp_path / "a", backbones[True].config)
    adapter = jax.tree.map(lambda x: x + 1, adapter)
    with pytest.raises(ParaJaxError, match="down has weights beyond a module's rank, which must be 0"):
        save_adapter(adapter, tmp_path / "b", backbones[True].config)
    assert not (tmp_path / "b").exists()
