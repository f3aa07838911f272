"""config.json and tokenizer files that cannot be used: one line, the same from every verb and in Python."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from para_jax import Backbone, BackboneConfig, ParaJaxError, tiny_backbone_path
from para_jax.cli import main
from para_jax.convert.tokenizer import load_tokenizer
from para_jax.families.architecture import ACTIVATIONS
from para_jax.families.table import FAMILIES
from para_jax.families.wrappers import WRAPPERS
from tests.helpers import family_fields

WHOLE = "which is not a whole number from 1"
NO_TOKEN = "which is neither a token id nor a list of token ids"
DTYPES = "bfloat16, double, float, float16, float32, float64, float8_e4m3fn, float8_e5m2, half"
ABOVE = "which is not a number above 0"
# Changed fields of a small Llama's config.json, and what is said; a missing value is a key taken out.
MISSING = object()
CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"eos_token_id": "0"}, f"config.json has eos_token_id='0', {NO_TOKEN}"),
    ({"eos_token_id": [0, "1"]}, f"config.json has eos_token_id=[0, '1'], {NO_TOKEN}"),
    ({"eos_token_id": True}, f"config.json has eos_token_id=True, {NO_TOKEN}"),
    ({"eos_token_id": 1.0}, f"config.json has eos_token_id=1.0, {NO_TOKEN}"),
    ({"rms_norm_eps": -1e-5}, "config.json has rms_norm_eps=-1e-05, which is not a number from 0"),
    ({"rms_norm_eps": float("nan")}, "config.json has rms_norm_eps=nan, which is not a number from 0"),
    ({"hidden_size": 0}, f"config.json has hidden_size=0, {WHOLE}"),
    ({"vocab_size": -1}, f"config.json has vocab_size=-1, {WHOLE}"),
    ({"num_hidden_layers": 2.0}, f"config.json has num_hidden_layers=2.0, {WHOLE}"),
    ({"num_attention_heads": True}, f"config.json has num_attention_heads=True, {WHOLE}"),
    ({"intermediate_size": "48"}, f"config.json has intermediate_size='48', {WHOLE}"),
    ({"max_position_embeddings": 0}, f"config.json has max_position_embeddings=0, {WHOLE}"),
    ({"head_dim": -8}, f"config.json has head_dim=-8, {WHOLE}"),
    ({"num_key_value_heads": 3}, "config.json has 4 attention heads that 3 key/value heads do not divide"),
    ({"vocab_size": MISSING, "hidden_size": None}, "config.json lacks vocab_size, hidden_size"),
    ({"rope_theta": 0}, f"config.json has rope_theta=0, {ABOVE}"),
    ({"rope_theta": "large"}, f"config.json has rope_theta='large', {ABOVE}"),
    ({"dtype": "float99"}, f"unknown dtype in config.json 'float99'; did you mean 'float'? Known: {DTYPES}"),
    ({"torch_dtype": 16}, f"unknown torch_dtype in config.json 16. Known: {DTYPES}"),
    ({"hidden_act": "glu"}, "unknown hidden_act in config.json 'glu'; did you mean 'gelu'? Known: "
     f"{', '.join(sorted(ACTIVATIONS))}"),
    ({"rope_scaling": {"type": "dynamic", "factor": "2"}},
     f"RoPE scaling of type 'dynamic' in config.json has factor='2', {ABOVE}"),
    ({"rope_scaling": {"type": "linear", "factor": 0}},
     f"RoPE scaling of type 'linear' in config.json has factor=0, {ABOVE}"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0,
                       "original_max_position_embeddings": 64}},
     "RoPE scaling of type 'llama3' in config.json has high_freq_factor=1.0, which is not above low_freq_factor=1.0"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64.5}},
     f"RoPE scaling of type 'yarn' in config.json has original_max_position_embeddings=64.5, {WHOLE}"),
    ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 4,
                       "original_max_position_embeddings": 64}},
     "RoPE scaling of type 'longrope' in config.json has short_factor of a list of 1; it takes 4 numbers above 0, one "
     "for each pair of features"),
    ({"head_dim": 3}, "config.json makes RoPE of type 'default' rotate 3 features, not an even number from 2"),
    ({"model_type": ["llama"]}, "{folder} is of architecture ['llama'], which is not supported. Supported: "
     f"{', '.join([*FAMILIES, *WRAPPERS])}"),
]  # fmt: skip
# Those that transformers refuses, with its words.
THEIRS: list[tuple[dict[str, Any], str]] = [
    ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ({"bos_token_id": "1"}, "bos_token_id"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
    ({"attention_bias": 1}, "attention_bias"),
    ({"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": None}, "hidden size (32)"),
    ({"rope_scaling": {"type": "linear"}}, "'factor'"),
    ({"rope_scaling": "linear"}, ""),
    ({"rope_scaling": [2.0]}, ""),
]


def checkpoint(folder: Path, fields: dict[str, Any] | None = None) -> Path:
    """The tiny backbone's folder with these fields of config.json in the place of its own."""
    shutil.copytree(tiny_backbone_path(), folder)
    if fields is not None:
        (folder / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not MISSING}))
    return folder


def verbs(folder: Path, tmp_path: Path) -> dict[str, list[str]]:
    """How each verb is called with this folder as its model."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Who sat?", "response": "The cat."}) + "\n")
    model, out = ["--model", str(folder)], str(tmp_path / "out")
    return {
        "finetune": [*model, "--tenant", f"acme={rows}", "--steps", "1", "--out", out],
        "evaluate": [*model, "--tenant", f"acme={rows}"],
        "generate": [*model, "--prompt", "Who sat?"],
        "fanlora": [*model, "--adapter", str(tmp_path), "--score", "norm", "--keep", "1", "--out", out],
        "convert": [*model, "--check"],
        "methods": model,
        "plan": [*model, "--topology", "v5e:1x1"],
    }


def said_by_all(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that every verb and every reader in Python says."""
    lines = []
    for verb, arguments in verbs(folder, tmp_path).items():
        assert main([verb, *arguments]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"para-jax {verb}: ") and error.count("\n") == 1
        lines.append(error.removeprefix(f"para-jax {verb}: ").strip())
    for read in (BackboneConfig.from_pretrained, Backbone.from_pretrained, load_tokenizer):
        with pytest.raises(ParaJaxError) as error:
            read(folder)
        lines.append(str(error.value))
    assert len(set(lines)) == 1, lines
    assert not (tmp_path / "out").exists()
    return lines[0]


@pytest.mark.parametrize(("fields", "message"), CONFIGS, ids=lambda x: json.dumps(x, default=lambda _: "missing")[:60])
def test_a_config_that_no_model_can_have(
    fields: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint(tmp_path / "a", {**family_fields("llama"), **fields})
    assert said_by_all(folder, tmp_path, capsys) == message.replace("{folder}", str(folder))


@pytest.mark.parametrize(("fields", "message"), THEIRS, ids=lambda x: json.dumps(x, default=lambda _: "missing")[:60])
def test_a_config_that_transformers_refuses(
    fields: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint(tmp_path / "a", {**family_fields("llama"), **fields})
    said = said_by_all(folder, tmp_path, capsys)
    assert said.startswith("config.json is not understood by transformers: ") and message in said


# A file of the tokenizer, what it holds (None: it is taken away), and what is said.
TOKENIZERS: list[tuple[str, bytes | None, str]] = [
    ("tokenizer.json", b"{}", "{folder}: its tokenizer cannot be read: tokenizer.json has no vocabulary"),
    ("tokenizer.json", b"", "{folder}: its tokenizer cannot be read: {folder}/tokenizer.json is not JSON: "),
    ("tokenizer.json", b"[]", "{folder}: its tokenizer cannot be read: {folder}/tokenizer.json is not a JSON object"),
    ("tokenizer.json", b'{"model": {}}', "{folder}: its tokenizer cannot be read: tokenizer.json has no vocabulary"),
    ("tokenizer.json", b'{"model": {"type": "BPE", "merges": []}}',
     "{folder}: its tokenizer cannot be read: tokenizer.json has no vocabulary"),
    ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": 0}}}',
     "{folder}: its tokenizer cannot be read: tokenizer.json is damaged: "),
    ("tokenizer.json", b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}',
     "{folder}: its tokenizer cannot be read: tokenizer.json has no vocabulary"),
    ("tokenizer.json", b"\xff\xfe", "{folder}: its tokenizer cannot be read: {folder}/tokenizer.json is not JSON: "),
    ("tokenizer.json", None, "{folder}: it has no tokenizer, neither tokenizer.json nor tokenizer.model; copy the "
     "tokenizer's files into its folder"),
    ("tokenizer_config.json", b"{",
     "{folder}: its tokenizer cannot be read: {folder}/tokenizer_config.json is not JSON: "),
    ("tokenizer_config.json", b"[]",
     "{folder}: its tokenizer cannot be read: {folder}/tokenizer_config.json is not a JSON object"),
    ("tokenizer_config.json", b'{"eos_token": 5}', "{folder}: its tokenizer cannot be read: "),
    ("tokenizer_config.json", b'{"added_tokens_decoder": {"a": {}}}', "{folder}: its tokenizer cannot be read: "),
    ("special_tokens_map.json", b"no",
     "{folder}: its tokenizer cannot be read: {folder}/special_tokens_map.json is not JSON: "),
]  # fmt: skip


@pytest.mark.parametrize("of_llama", [False, True])
@pytest.mark.parametrize(("name", "content", "message"), TOKENIZERS)
def test_a_tokenizer_that_is_damaged(
    name: str, content: bytes | None, message: str, of_llama: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether transformers reads tokenizer.json itself, or a class of its makes the tokenizer from what is in it."""
    folder = checkpoint(tmp_path / "a")
    if of_llama:
        fields = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**fields, "tokenizer_class": "LlamaTokenizer"}))
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    lines = set()
    for verb in ("finetune", "evaluate", "generate", "fanlora"):
        assert main([verb, *verbs(folder, tmp_path)[verb]]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"para-jax {verb}: ") and error.count("\n") == 1
        lines.add(error.removeprefix(f"para-jax {verb}: ").strip())
    with pytest.raises(ParaJaxError) as error:
        load_tokenizer(folder)
    assert lines == {str(error.value)} and str(error.value).startswith(message.format(folder=folder))


def test_the_config_is_read_before_the_tokenizer(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a", {**family_fields("llama"), "hidden_size": 0})
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ParaJaxError, match="hidden_size=0"):
        load_tokenizer(folder)


def test_a_tokenizer_does_not_depend_on_keys_that_mean_nothing(tmp_path: Path) -> None:
    """transformers refuses these values of them."""
    fields = json.loads(Path(tiny_backbone_path(), "config.json").read_text())
    folder = checkpoint(tmp_path / "a", {**fields, "initializer_range": 2.0, "use_cache": "yes"})
    assert load_tokenizer(folder).decode([0]) == "<|endoftext|>"


@pytest.mark.parametrize(
    ("content", "reader", "packages"),
    [(b"\n\x0e\n\x05<unk>", "sentencepiece", "sentencepiece protobuf"), (b"IQ== 0\n", "tiktoken", "tiktoken")],
)
def test_a_tokenizer_model_alone(
    content: bytes, reader: str, packages: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "a")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(content)
    monkeypatch.setattr("para_jax.convert.tokenizer.find_spec", lambda name: None)
    with pytest.raises(ParaJaxError) as error:
        load_tokenizer(folder)
    assert str(error.value) == (
        f"{folder}: its tokenizer is only tokenizer.model, which {reader} reads; pip install {packages}"
    )


# Code that comes with a checkpoint


@pytest.mark.parametrize("known", [False, True])
def test_code_of_a_folder_is_never_run(
    known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor asked about. Where transformers has the class, that is taken."""
    folder = checkpoint(tmp_path / "a")
    ran = tmp_path / "ran"
    (folder / "code.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nclass X: pass\n")
    config, tokenizer = (json.loads((folder / name).read_text()) for name in ("config.json", "tokenizer_config.json"))
    own = {} if known else {"tokenizer_class": "OwnTokenizer"}
    code = {"AutoConfig": "code.X", "AutoTokenizer": ["code.X", "code.X"]}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": code}))
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "auto_map": code, **own}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    arguments = verbs(folder, tmp_path)["generate"]
    assert main(["generate", *arguments, "--max-new-tokens", "2"]) == (0 if known else 1)
    assert not ran.exists()
    if not known:
        assert capsys.readouterr().err == (
            f"para-jax generate: {folder}: its tokenizer is custom Python code (auto_map in "
            "tokenizer_config.json), which is never run; take auto_map out to use tokenizer.json\n"
        )
