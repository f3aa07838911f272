"""What `generate`, `evaluate` and `convert` make of adapters' folders: the wrong one, NaN, tokenizers of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from transformers import AddedToken

from para_jax import LoraConfig, ParaConfig, save_adapter, tiny_backbone_path
from para_jax.adapters.weights import WEIGHTS
from para_jax.cli import main
from para_jax.cli.adapters import adapter_folders
from para_jax.convert.adapter_tokenizer import adapter_tokenizer
from para_jax.errors import ParaJaxError
from tests.helpers import random_adapter


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters, and one of NaN."""
    shape, folder = tiny[0].config, tmp_path_factory.mktemp("adapters") / "runs" / "first"
    for i, name in enumerate(("acme", "globex")):
        save_adapter(random_adapter(ParaConfig(r=2), shape, i, scale=0.1), folder / name, shape)
    broken = jax.tree.map(lambda x: x.at[..., 0].set(np.nan), random_adapter(LoraConfig(r=2), shape, 0))
    save_adapter(broken, folder / "nan", shape)
    return folder


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(a) for a in arguments]) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def answers(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


# Which folder is meant


def test_folders_that_hold_no_adapters(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    instead = "give the --out folder of para-jax finetune, or one with NAME/ for each tenant"
    for folder, message in (
        (
            runs / "acme",
            f"{runs / 'acme'} is an adapter itself; --adapters takes the folder that contains adapters: --adapters "
            f"{runs}, with acme as the tenant",
        ),
        (runs.parent, f"{runs.parent} holds no adapters, but the folders in it do; give --adapters {runs}"),
        (tmp_path / "empty", f"{tmp_path / 'empty'} holds no adapters; {instead}"),
        (tmp_path / "none", f"--adapters {tmp_path / 'none'} is not a folder; {instead}"),
        (runs / "acme" / WEIGHTS, f"{WEIGHTS} is a file; give the folder that {WEIGHTS} is in; {instead}"),
    ):
        with pytest.raises(ParaJaxError) as caught:
            adapter_folders(folder, ["acme"])
        assert str(caught.value).endswith(message)
    assert list(adapter_folders(runs)) == ["acme", "globex", "nan"]


def test_an_adapters_own_folder(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["generate", "--tenant", "acme", "--prompt", "x", "--adapters"]
    assert f"--adapters {runs}, with acme as the tenant" in failure(capsys, *given, runs / "acme")
    assert f"give --adapters {runs}" in failure(capsys, *given, runs.parent)
    assert f"give e.g. {runs / 'acme'}" in failure(capsys, "convert", "--check", "--adapter", runs)


# NaN


def test_nan_adapters(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "The house is", "response": "b", "choices": ["b", "a"]}) + "\n")
    generate = ["generate", "--adapters", runs, "--tenant", "nan", "--prompt", "The house is", "--max-new-tokens", "2"]
    evaluate = ["evaluate", "--adapters", runs, "--tenant", f"nan={rows}", "--max-new-tokens", "2"]
    evaluate += ["--json", tmp_path / "scores.json", "--predictions", tmp_path / "answers.jsonl"]
    convert = ["convert", "--adapter", runs / "nan", "--out", tmp_path / "merged"]
    for arguments in (generate, evaluate, convert, [*convert, "--check"]):
        error = failure(capsys, *arguments)
        assert f"{runs / 'nan' / WEIGHTS}: an adapter with NaN or infinite values gives useless answers" in error
        assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight has 2 NaN or infinite values" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]

    assert answers(capsys, *generate, "--allow-nan")
    assert "0.000" in answers(capsys, *evaluate, "--allow-nan")

    def no_nan(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    scores = json.loads((tmp_path / "scores.json").read_text(), parse_constant=no_nan)["tenants"]["nan"]
    assert scores["choice_accuracy"] == 0.0, "in whatever order the choices are"
    row = json.loads((tmp_path / "answers.jsonl").read_text(), parse_constant=no_nan)
    assert row["choice"] is None and row["log_likelihoods"] == [None, None]


def test_merged_weights_that_overflow(tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each file is finite, and what they make is not."""
    shape = tiny[0].config
    adapter = jax.tree.map(lambda x: x * 0 + 1e30, random_adapter(LoraConfig(r=2), shape, 0))
    save_adapter(adapter, tmp_path / "large", shape)
    given = ["convert", "--adapter", tmp_path / "large"]
    for more in (["--out", tmp_path / "out"], ["--out", tmp_path / "out", "--check"], ["--check"]):
        error = failure(capsys, *given, *more)
        assert (
            "cannot be merged: with it the weight of model.layers.0.self_attn.q_proj is NaN or beyond float32" in error
        )
    assert not (tmp_path / "out").exists()


# Tokenizers of their own


@pytest.fixture
def own(runs: Path, tiny, tmp_path: Path) -> Path:
    """A folder of adapters to save tokenizers in."""
    shutil.copytree(runs, tmp_path / "own")
    return tmp_path / "own"


def prompts_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path, rows: list, *more: object
) -> list:
    """The tokens that `generate` takes each row for, the tokens that end it, and what it answers."""
    from para_jax.decoding import generate as module

    seen: list[Any] = []

    def complete(backbone, tokenizers, prompts, **options):
        made = original(backbone, tokenizers, prompts, **options)
        seen.extend(zip(prompts, options["eos_token_id"], made, strict=True))
        return made

    original = module.complete
    monkeypatch.setattr(module, "complete", complete)
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--input", folder / "in.jsonl", "--output", folder / "out.jsonl", "--overwrite"]
    answers(capsys, "generate", "--adapters", folder, *files, "--max-new-tokens", "2", *more)
    return seen


CHAT = [{"role": "user", "content": "hello"}]


def test_a_chat_template_of_its_own(own: Path, tiny, capsys, monkeypatch) -> None:
    """As `tokenizer.save_pretrained` leaves it, and as older versions did."""
    tokenizer = type(tiny[1]).from_pretrained(tiny_backbone_path())
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }} {% endfor %}"
    tokenizer.save_pretrained(own / "acme")
    tokenizer.save_pretrained(own / "globex", save_jinja_files=False)
    assert (own / "acme" / "chat_template.jinja").is_file()
    assert "upper" in (own / "globex" / "tokenizer_config.json").read_text()
    rows = [{"tenant": name, "messages": CHAT} for name in ("acme", None, "globex")]
    rows.append({"tenant": {"acme": 0.5, "globex": 0.5}, "messages": CHAT})
    rows.append({"tenant": {"acme": 0.5, "nan": 0.0}, "prompt": "hello"})
    shutil.rmtree(own / "nan")
    shutil.copytree(own / "globex", own / "nan")
    seen = prompts_of(capsys, monkeypatch, own, rows)
    texts = [tiny[1].decode(tokens) for tokens, _, _ in seen]
    assert texts == ["HELLO ", "User: hello\nAssistant:", "HELLO ", "HELLO ", "hello"]
    assert {eos for _, eos, _ in seen} == {(0,)}


def test_the_backbones_own_tokenizer(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved beside an adapter it is the same one, and is not read; nor does how a run padded make it another."""
    tokenizer = type(tiny[1]).from_pretrained(tiny_backbone_path())
    tokenizer.save_pretrained(tmp_path / "saved")
    tokenizer.padding_side = "left"
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=9)
    tokenizer.save_pretrained(tmp_path / "padded")
    assert adapter_tokenizer(tiny[1], tmp_path / "padded", 4096) is tiny[1]
    (tmp_path / "saved" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    monkeypatch.setattr(type(tiny[1]), "from_pretrained", None)
    own = adapter_tokenizer(tiny[1], tmp_path / "saved", 4096)
    assert own.chat_template == "{{ messages[0].content }}" and own.backend_tokenizer is tiny[1].backend_tokenizer
    assert tiny[1].chat_template != own.chat_template


def test_added_tokens_in_other_places(tiny, tmp_path: Path) -> None:
    """A reserved token that was given another name is the adapter's own; what else there is has its place."""
    tokenizer = type(tiny[1]).from_pretrained(tiny_backbone_path())
    tokenizer.save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "tokenizer.json"
    path.write_text(path.read_text().replace("<|pad|>", "<|mail|>"))
    config = tmp_path / "a" / "tokenizer_config.json"
    config.write_text(config.read_text().replace("<|pad|>", "<|mail|>"))
    own = adapter_tokenizer(tiny[1], tmp_path / "a", 4096)
    ids = own("<|mail|>hello")["input_ids"]
    assert ids == [tiny[1].convert_tokens_to_ids("<|pad|>"), *tiny[1]("hello")["input_ids"]]


def test_several_templates_by_name(tiny, tmp_path: Path) -> None:
    tokenizer = type(tiny[1]).from_pretrained(tiny_backbone_path())
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "a")
    own = adapter_tokenizer(tiny[1], tmp_path / "a", 4096)
    assert own.chat_template == tokenizer.chat_template and own.backend_tokenizer is tiny[1].backend_tokenizer


def test_added_tokens_that_the_backbone_has(own: Path, tiny, tmp_path: Path, capsys, monkeypatch) -> None:
    """A tokenizer with fewer tokens than the backbone has rows, as Qwen's, and one beside the adapter with more."""
    model = tmp_path / "model"
    shutil.copytree(tiny_backbone_path(), model)
    fewer(model, 4090)
    tokenizer = type(tiny[1]).from_pretrained(model)
    assert len(tokenizer) == 4090
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mail|>"], "eos_token": "<|done|>"})
    tokenizer.chat_template = "{% for m in messages %}<|mail|>{{ m.content }}<|done|>{% endfor %}"
    tokenizer.save_pretrained(own / "acme")
    rows = [{"tenant": t, "prompt": "<|mail|>hello"} for t in ("acme", "globex", None)]
    seen = prompts_of(capsys, monkeypatch, own, [*rows, {"tenant": "acme", "messages": CHAT}], "--model", model)
    mail, done = tokenizer.convert_tokens_to_ids(["<|mail|>", "<|done|>"])
    assert {mail, done} == {4090, 4091}
    assert seen[0][0] == [mail, *tokenizer("hello")["input_ids"]]
    assert mail not in seen[1][0] and seen[1][0] == seen[2][0]
    assert seen[3][0] == [mail, *tokenizer("hello")["input_ids"], done]
    assert [eos for _, eos, _ in seen] == [(done, 0), (0,), (0,), (done, 0)]


def fewer(folder: Path, size: int) -> None:
    """Takes the last tokens out of a tokenizer."""
    fields = json.loads((folder / "tokenizer.json").read_text())
    vocab = {k: v for k, v in fields["model"]["vocab"].items() if v < size}
    merges = [m if isinstance(m, list) else m.split(" ") for m in fields["model"]["merges"]]
    fields["model"] |= {"vocab": vocab, "merges": [m for m in merges if {*m, "".join(m)} <= vocab.keys()]}
    (folder / "tokenizer.json").write_text(json.dumps(fields))


def test_added_tokens_that_the_backbone_lacks(own: Path, tiny, capsys, caplog, monkeypatch) -> None:
    """A token for padding does no harm; a row with a token that has no embedding is refused."""
    tokenizer = type(tiny[1]).from_pretrained(tiny_backbone_path())
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens([AddedToken("<|mail|>")])
    tokenizer.save_pretrained(own / "acme")
    seen = prompts_of(capsys, monkeypatch, own, [{"tenant": "acme", "prompt": "hello"}])
    assert seen[0][0] == tiny[1]("hello")["input_ids"]
    assert (
        "its tokenizer has 2 tokens for which the backbone, of 4096 tokens, has no embeddings: [PAD] (4096), "
        "<|mail|> (4097). Rows with these tokens are refused."
    ) in caplog.text
    given = ["generate", "--adapters", own, "--tenant", "acme", "--prompt", "<|mail|>hello"]
    error = failure(capsys, *given)
    assert "has token 4097, and the backbone's vocabulary has 4096; remove <|mail|> from the prompt" in error


def test_a_tokenizer_that_ends_every_text(own: Path, tiny, capsys, monkeypatch) -> None:
    tokenizer = type(tiny[1]).from_pretrained(tiny_backbone_path())
    tokenizer.add_eos_token = True
    assert tokenizer("hello")["input_ids"][-1] == 0
    tokenizer.save_pretrained(own / "acme")
    seen = prompts_of(capsys, monkeypatch, own, [{"tenant": "acme", "prompt": "hello"}])
    assert seen[0][0] == tiny[1]("hello")["input_ids"]


def test_tokenizers_of_other_models(own: Path, tiny, capsys, tmp_path: Path) -> None:
    given = ["generate", "--adapters", own, "--tenant", "acme", "--prompt", "hello"]
    shutil.copy(Path(tiny_backbone_path()) / "tokenizer.json", own / "acme" / "tokenizer.json")
    shutil.copy(Path(tiny_backbone_path()) / "tokenizer_config.json", own / "acme" / "tokenizer_config.json")
    path = own / "acme" / "tokenizer.json"
    fields = json.loads(path.read_text())
    vocab = fields["model"]["vocab"]
    a, b = sorted(vocab, key=vocab.get)[300:302]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    path.write_text(json.dumps(fields))
    message = failure(capsys, *given)
    assert f"the tokenizer in {own / 'acme'} has another vocabulary than the backbone's: 2 tokens differ" in message
    assert "load it as the backbone" in message
    path.write_text("{}")
    assert f"the tokenizer in {own / 'acme'} cannot be read with the backbone's tokenizer class" in failure(
        capsys, *given
    )
    path.unlink()
    (own / "acme" / "added_tokens.json").write_text('{"<|mail|>": 4096}')
    message = failure(capsys, *given)
    assert (
        "adds tokens that the backbone's tokenizer does not have, '<|mail|>' (4096), but has no tokenizer.json"
        in message
    )


def test_merged_with_its_tokenizer(tiny, tmp_path: Path, capsys) -> None:
    shape = tiny[0].config
    save_adapter(random_adapter(LoraConfig(r=2), shape, 0, scale=0.1), tmp_path / "a", shape)
    tokenizer = type(tiny[1]).from_pretrained(tiny_backbone_path())
    tokenizer.add_tokens(["<|mail|>"])
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path / "a")
    answers(capsys, "convert", "--adapter", tmp_path / "a", "--out", tmp_path / "out")
    again = type(tiny[1]).from_pretrained(tmp_path / "out")
    assert again.get_vocab() == tokenizer.get_vocab() and again.chat_template == tokenizer.chat_template
