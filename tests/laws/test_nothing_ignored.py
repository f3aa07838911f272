"""Law 9: what cannot be used is an error that names it, the nearest valid name, and what to do."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from para_jax import (
    AdapterBank,
    Backbone,
    BackboneConfig,
    BiasConfig,
    IA3Config,
    LoraConfig,
    ParaConfig,
    ParaJaxError,
    complete,
    load_adapter,
    save_adapter,
)
from para_jax.adapters.registry import config_from_dict
from para_jax.convert.checkpoint import save_backbone
from para_jax.evaluation.choices import choice_log_likelihoods
from tests.helpers import SMALL, random_adapter, random_backbone

TOKENS = jnp.zeros((2, 3), jnp.int32)


def says(*fragments: str):
    """An error whose message holds these, in this order."""
    return pytest.raises(ParaJaxError, match="(?s)" + ".*".join(re.escape(x) for x in fragments))


# Adapters and tenants


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return random_backbone()


@pytest.fixture(scope="module")
def bank(backbone: Backbone) -> AdapterBank:
    return AdapterBank.create({"acme": ParaConfig(r=2), "globex": ParaConfig(r=2)}, backbone.config)


def test_target_that_matches_nothing(backbone: Backbone) -> None:
    with says("target_modules", "'q_porj'", "did you mean 'q_proj'?", "Known:", "up_proj"):
        AdapterBank.create({"acme": ParaConfig(target_modules=("v_proj", "q_porj"))}, backbone.config)
    with says("target_modules is empty", "q_proj", "down_proj"):
        AdapterBank.create({"acme": ParaConfig(target_modules=())}, backbone.config)
    with says("q_proj more than once"):
        ParaConfig(target_modules=("q_proj", "v_proj", "q_proj"))
    with says("target_modules is a list of names; write ['q_proj']"):
        ParaConfig(target_modules="q_proj")


@pytest.mark.parametrize("config", [LoraConfig, IA3Config, BiasConfig])
def test_target_that_matches_nothing_in_other_methods(backbone: Backbone, config: type) -> None:
    options: dict = {"feedforward_modules": ()} if config is IA3Config else {}
    with says("target_modules", "'q_porj'", "did you mean 'q_proj'?", "Known:", "up_proj"):
        AdapterBank.create({"acme": config(target_modules=("v_proj", "q_porj"), **options)}, backbone.config)
    with says("target_modules 'q_proj'", "matches no module's full path", "model.layers.0", "['q_proj']"):
        AdapterBank.create({"acme": config(target_modules="q_proj", **options)}, backbone.config)
    with says("target_modules is empty", "choose among q_proj"):
        AdapterBank.create({"acme": config(target_modules=(), **options)}, backbone.config)


def test_a_pattern_that_fits_nothing(backbone: Backbone) -> None:
    for name in ("rank_pattern", "alpha_pattern"):
        with says(f"{name} has 'k_proj'", "no targeted module", "model.layers.0.self_attn.q_proj"):
            AdapterBank.create({"acme": LoraConfig(**{name: {"k_proj": 2}})}, backbone.config)


def test_unknown_option() -> None:
    with says("pooling 'lats'", "did you mean 'last'?", "attention, last, max, mean"):
        ParaConfig(pooling="lats")
    with says("activation 'swish'", "gelu, rational, relu, silu"):
        ParaConfig(activation="swish")
    with says("r must be a whole number from 1, not 0"):
        ParaConfig(r=0)
    with says("r must be a whole number from 1, not 4.5"):
        ParaConfig(r=4.5)
    with says("bias must be true or false, not 'false'"):
        ParaConfig(bias="false")
    with says("method 'praa'", "did you mean 'para'?"):
        config_from_dict("praa", {})
    with says("option of method 'para' 'poling'", "did you mean 'pooling'?"):
        config_from_dict("para", {"poling": "last"})


def test_unknown_tenant(backbone: Backbone, bank: AdapterBank) -> None:
    acts: list[Callable[[str], object]] = [
        lambda name: bank[name],
        lambda name: bank.remove(name),
        lambda name: bank.replace(name, bank["acme"]),
        lambda name: bank.rows([None, name]),
        lambda name: backbone(TOKENS, bank=bank, tenants=["acme", name]),
        # Among several, and where nothing of it is wanted.
        lambda name: bank.rows([{"acme": 0.5, name: 0.5}]),
        lambda name: bank.rows([{name: 0.0}]),
        lambda name: backbone(TOKENS, bank=bank, tenants=[None, {name: 0.0}]),
        lambda name: complete(backbone, None, [[2], [3]], bank=bank, tenants=[None, {"acme": 1, name: 0.0}]),
        lambda name: choice_log_likelihoods(backbone, [[2]], [[[3], [4]]], bank=bank, tenants=[{name: 1.0}]),
    ]
    for act in acts:
        with says("unknown tenant 'acne'", "did you mean 'acme'?", "Known: acme, globex"):
            act("acne")
    with says("unknown tenant ''. Known: acme, globex"):
        bank[""]


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1.0", True, None])
def test_adapter_weight_that_is_not_finite(backbone: Backbone, bank: AdapterBank, weight: object) -> None:
    with says("the adapter weight of 'acme' must be a finite number", repr(weight)):
        bank.rows([{"acme": weight}])
    with says("the adapter weight of 'acme'"):
        complete(backbone, None, [[2]], bank=bank, tenants=[{"acme": weight}])


def test_what_is_no_tenant(backbone: Backbone, bank: AdapterBank) -> None:
    with says("a row's tenant is a name, None, or a dict of names and adapter weights, not ('acme', 0.5)"):
        bank.rows([("acme", 0.5)])
    # One row's dict in the place of a list would be read as a list of its names.
    with says("tenants={'acme': 0.5, 'globex': 0.5}", "give a list"):
        backbone(TOKENS, bank=bank, tenants={"acme": 0.5, "globex": 0.5})
    with says("tenants is one dict, {'acme': 0.5}", "give a list"):
        complete(backbone, None, [[2]], bank=bank, tenants={"acme": 0.5})


def test_unknown_tenant_among_very_many() -> None:
    names = {f"tenant{i:04}": ParaConfig(r=1, target_modules=("k_proj",)) for i in range(30)}
    with pytest.raises(ParaJaxError, match=re.escape("did you mean 'tenant0007'?")) as error:
        AdapterBank.create(names, SMALL).rows(["tenant00077"])
    assert "(30 in total)" in str(error.value) and len(str(error.value)) < 400


def test_tenants_that_do_not_match_the_rows(backbone: Backbone, bank: AdapterBank) -> None:
    with says("2 rows", "['acme']", "a name or None for every row"):
        backbone(TOKENS, bank=bank, tenants=["acme"])
    with says("2 rows", "[None]"):
        backbone(TOKENS, bank=bank, tenants=[None])
    with says("2 rows", "'ab'"):
        backbone(TOKENS, bank=bank, tenants="ab")
    with says("tenants were given but no bank", "AdapterBank.load"):
        backbone(TOKENS, tenants=["acme", None])
    with says("a bank was given but no tenants", "None for every row"):
        backbone(TOKENS, bank=bank)
    mask = jnp.ones(TOKENS.shape, bool)
    with says("a batch of 2 rows was given the adapters of 3"):
        backbone.forward(TOKENS, mask, mask, bank.rows(["acme", None, "globex"]))
    with says("a batch of 2 rows was given the adapters of 4"):
        backbone.forward(TOKENS, mask, mask, bank.rows(["acme", None], repeats=2))


def test_cache_too_short(backbone: Backbone, bank: AdapterBank) -> None:
    with says("a cache of 2 columns cannot hold prompts of 3"):
        backbone.prefill(TOKENS, TOKENS == 0, bank.rows([None, None]), length=2)


# Adapter folders


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "acme"
    save_adapter(random_adapter(ParaConfig(r=2), SMALL, 0), folder, dataclasses.replace(SMALL, name="their/backbone"))
    return folder


def test_adapter_for_another_backbone(adapter_folder: Path) -> None:
    other = dataclasses.replace(SMALL, num_hidden_layers=3, intermediate_size=64)
    with says(
        "made for another backbone", "their/backbone", "num_hidden_layers 2 there and 3 here", "load the backbone"
    ):
        load_adapter(adapter_folder, other)
    with says("made for another backbone", "sites"):
        AdapterBank.load({"acme": adapter_folder}, dataclasses.replace(SMALL, head_dim=16))


def copy_with(folder: Path, to: Path, edit: Callable[[dict], object], name: str) -> Path:
    """A copy of a folder whose JSON file `name`, or tensors, `edit` has changed."""
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    if name.endswith(".json"):
        fields = json.loads((to / name).read_text())
        edit(fields)
        (to / name).write_text(json.dumps(fields))
    else:
        tensors = load_file(to / name)
        edit(tensors)
        save_file(tensors, to / name)
    return to


def test_adapter_of_an_unknown_method_or_option(adapter_folder: Path, tmp_path: Path) -> None:
    edits: list[tuple[Callable[[dict], object], tuple[str, ...]]] = [
        (lambda x: x.update(peft_type="PARAA"), ("unknown method 'paraa'", "did you mean 'para'?")),
        (lambda x: x.pop("peft_type"), ("has no peft_type",)),
        (lambda x: x.update(lora_alpha=16), ("option of method 'para' 'lora_alpha'",)),
        (lambda x: x.update(pooling="first"), ("pooling 'first'",)),
        (lambda x: x.update(target_modules=["qkv"]), ("entry of target_modules 'qkv'",)),
    ]
    for i, (edit, fragments) in enumerate(edits):
        folder = copy_with(adapter_folder, tmp_path / str(i), edit, "adapter_config.json")
        with says(*fragments):
            load_adapter(folder, SMALL)


def test_adapter_tensors_all_listed_at_once(adapter_folder: Path, tmp_path: Path) -> None:
    def edit(tensors: dict) -> None:
        tensors["upp"] = tensors.pop("up")
        tensors["down"] = tensors["down"][:, :, :1]

    folder = copy_with(adapter_folder, tmp_path / "a", edit, "adapter_model.safetensors")
    with says("up is missing", "upp is not expected", "down is float32[2, 32, 1], not float32[2, 32, 2]"):
        load_adapter(folder, SMALL)

    def halve(tensors: dict) -> None:
        tensors["up"] = tensors["up"].astype(np.float16)

    folder = copy_with(adapter_folder, tmp_path / "b", halve, "adapter_model.safetensors")
    with says("up is float16[2, 2, 96], not float32[2, 2, 96]"):
        load_adapter(folder, SMALL)


# Checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "llama"
    save_backbone(random_backbone(tie_word_embeddings=False), folder)
    return folder


CONFIGS: list[tuple[dict, tuple[str, ...]]] = [
    ({"model_type": "bloom"}, ("'bloom'", "not supported", "Supported: llama, mistral")),
    ({"model_type": "gemma3"}, ("gemma3 has no text_config", "gemma3_text")),
    ({"model_type": None}, ("None", "Supported: llama")),
    ({"hidden_act": "glu"}, ("hidden_act in config.json 'glu'", "gelu", "silu")),
    ({"quantization_config": {"bits": 4}}, ("quantization_config",)),
    ({"num_key_value_heads": 3}, ("4 attention heads", "3 key/value heads")),
    ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "liner"}}, ("'liner'", "did you mean 'linear'?", "llama3")),
    ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear"}}, ("not understood by", "'factor'")),
    (
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0, "beta_fast": 32}},
        ("'linear'", "not understood ['beta_fast']"),
    ),
    (
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}},
        ("partial_rotary_factor=0.5", "llama does not support"),
    ),
    # An option of another family, and one of transformers' caches.
    ({"sliding_window": 8}, ("sliding_window=8", "not implemented for LlamaForCausalLM", "take it out of config.json")),
    ({"attention_chunk_size": 8, "num_experts": 2}, ("attention_chunk_size=8, num_experts=2",)),
    ({"model_type": "gemma", "use_bidirectional_attention": True}, ("use_bidirectional_attention=True", "only False")),
    ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, ("decoder_sparse_step=2", "only 1")),
    ({"model_type": "qwen3", "layer_types": ["full_attention", "linear_attention"]}, ("linear_attention",)),
    ({"model_type": "smollm3", "no_rope_layers": [1]}, ("1 no_rope_layers for 2 layers",)),
    (
        {"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]},
        ("sliding_attention in layer_types, but no sliding_window",),
    ),
    ({"hidden_size": "wide"}, ("hidden_size='wide', which is not a whole number from 1",)),
    ({"num_key_value_heads": 0}, ("num_key_value_heads=0",)),
    ({"num_hidden_layers": 2.0}, ("num_hidden_layers=2.0",)),
    ({"model_type": "smollm3", "no_rope_layers": 3}, ("3 no_rope_layers for 2 layers",)),
    ({"rope_parameters": {"rope_theta": "large"}}, ("rope_theta='large', which is not a number above 0",)),
    ({"rope_parameters": {"rope_theta": 0}}, ("rope_theta=0, which is not a number above 0",)),
    ({"rms_norm_eps": "small"}, ("not understood by transformers", "rms_norm_eps")),
    ({"model_type": "phi3", "full_attn_mod": 2}, ("full_attn_mod=2", "only 1")),
    ({"model_type": "qwen3_moe", "use_qk_norm": False}, ("use_qk_norm=False", "only True")),
    ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor=0.5, which llama does not support",)),
]


@pytest.mark.parametrize(("fields", "fragments"), CONFIGS, ids=lambda x: "-".join(x))
def test_config_not_supported(checkpoint: Path, tmp_path: Path, fields: dict, fragments: tuple[str, ...]) -> None:
    folder = copy_with(checkpoint, tmp_path / "a", lambda x: x.update(fields), "config.json")
    for read in (BackboneConfig.from_pretrained, Backbone.from_pretrained):
        with says(*fragments):
            read(folder)


def test_what_cannot_matter_is_said_in_one_line(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = {"_model_name_or_path": "Llama", "unk_token_id": 0, "dim_model_base": 256, "_name_or_path": "x"}
    folder = copy_with(checkpoint, tmp_path / "a", lambda x: x.update(more), "config.json")
    line = (
        f"{folder}: keys that transformers' LlamaForCausalLM does not read are ignored: _model_name_or_path, "
        "unk_token_id, dim_model_base"
    )
    for read in (BackboneConfig.from_pretrained, Backbone.from_pretrained):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            read(folder)
        assert [record.getMessage() for record in caplog.records if record.name.startswith("para_jax")] == [line]
    caplog.clear()
    ours, plain = Backbone.from_pretrained(folder), Backbone.from_pretrained(checkpoint)
    assert np.array_equal(ours(TOKENS), plain(TOKENS))
    # What is written has the keys still.
    with caplog.at_level(logging.WARNING):
        save_backbone(ours, tmp_path / "out")
    assert len(caplog.records) == 1
    assert more.items() <= json.loads((tmp_path / "out" / "config.json").read_text()).items()


def test_config_lacks_sizes(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy_with(checkpoint, tmp_path / "a", lambda x: (x.pop("vocab_size"), x.pop("hidden_size")), "config.json")
    with says("lacks vocab_size, hidden_size"):
        BackboneConfig.from_pretrained(folder)


def test_checkpoint_tensors_all_listed_at_once(checkpoint: Path, tmp_path: Path) -> None:
    def edit(tensors: dict) -> None:
        del tensors["model.norm.weight"]
        del tensors["model.layers.1.self_attn.q_proj.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((3, 3), np.float32)
        tensors["score.weight"] = np.zeros((3,), np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros((4,), np.float32)  # known, and recomputed

    folder = copy_with(checkpoint, tmp_path / "a", edit, "model.safetensors")
    with pytest.raises(ParaJaxError) as error:
        Backbone.from_pretrained(folder)
    assert str(error.value).splitlines()[1:] == [
        "  model.norm.weight [32] is missing",
        "  model.layers.1.self_attn.q_proj.weight [32, 32] is missing",
        "  model.layers.2.mlp.up_proj.weight is not expected",
        "  score.weight is not expected",
        "  lm_head.weight is [60, 32] and should be [61, 32]",
    ]


def test_untied_head_is_not_ignored(checkpoint: Path, tmp_path: Path) -> None:
    """A head that a tied model does not read may be there only as a second copy of the embedding."""
    folder = copy_with(checkpoint, tmp_path / "a", lambda x: x.update(tie_word_embeddings=True), "config.json")
    with says("lm_head.weight differs from the embedding", "set tie_word_embeddings to false"):
        Backbone.from_pretrained(folder)
    copied = copy_with(
        folder,
        tmp_path / "b",
        lambda x: x.update({"lm_head.weight": x["model.embed_tokens.weight"]}),
        "model.safetensors",
    )
    assert Backbone.from_pretrained(copied).config.tie_word_embeddings


def test_tensor_of_another_dtype(checkpoint: Path, tmp_path: Path) -> None:
    def edit(tensors: dict) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)

    folder = copy_with(checkpoint, tmp_path / "a", edit, "model.safetensors")
    with says("model.norm.weight is I8", "supported: BF16, F16, F32"):
        Backbone.from_pretrained(folder)


def test_no_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with says("is not a checkpoint: it has no config.json"):
        Backbone.from_pretrained(tmp_path / "empty")
    with says("is not a folder", "or a hub id"):
        Backbone.from_pretrained(tmp_path / "nowhere")
    with says("nobody/nothing", "not a local folder", "Check the spelling"):
        Backbone.from_pretrained("nobody/nothing")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    with says("has no weights", "neither model.safetensors nor pytorch_model.bin"):
        Backbone.from_pretrained(tmp_path / "torch")
    with says("unknown dtype 'float64'", "did you mean 'float16'", "bfloat16, float16, float32"):
        Backbone.from_pretrained(checkpoint, dtype="float64")


DAMAGE: list[tuple[str, bytes, tuple[str, ...]]] = [
    ("config.json", b"{", ("config.json is not JSON",)),
    ("config.json", b"[]", ("config.json is not a JSON object",)),
    ("config.json", b"\xff\xfe", ("config.json is not JSON",)),
    ("generation_config.json", b"{", ("generation_config.json is not JSON",)),
    ("model.safetensors", b"", ("model.safetensors is damaged",)),
    ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", ("model.safetensors is damaged",)),
]


@pytest.mark.parametrize(("name", "content", "fragments"), DAMAGE)
def test_damaged_checkpoint(
    checkpoint: Path, tmp_path: Path, name: str, content: bytes, fragments: tuple[str, ...]
) -> None:
    folder = copy_with(checkpoint, tmp_path / "a", lambda x: None, "config.json")
    (folder / name).write_bytes(content)
    with says(*fragments):
        Backbone.from_pretrained(folder)


def test_truncated_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy_with(checkpoint, tmp_path / "a", lambda x: None, "config.json")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with says("model.safetensors is damaged"):
        Backbone.from_pretrained(folder)


def test_index(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy_with(checkpoint, tmp_path / "a", lambda x: None, "config.json")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text("{}")
    with says("index.json is damaged", "weight_map"):
        Backbone.from_pretrained(folder)
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": files}))
    with says("lacks model-00002-of-00002.safetensors"):
        Backbone.from_pretrained(folder)
    index.write_text(json.dumps({"weight_map": {"a": files["a"]}}))
    assert Backbone.from_pretrained(folder).config.hidden_size == 32


def test_stop_tokens_come_from_generation_config(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy_with(checkpoint, tmp_path / "a", lambda x: None, "config.json")
    assert BackboneConfig.from_pretrained(folder).eos_token_ids == (0,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    assert BackboneConfig.from_pretrained(folder).eos_token_ids == (3, 5)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    assert BackboneConfig.from_pretrained(folder).eos_token_ids == (0,)
