"""Adapter folders that are damaged, in the way, or cut off while they are written."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from para_jax import AdapterBank, BiasConfig, LoraConfig, ParaConfig, ParaJaxError, load_adapter, save_adapter
from para_jax.adapters.adapter import Adapter
from para_jax.adapters.files import CONFIG, WEIGHTS
from para_jax.adapters.method import MethodConfig, ShapeView
from para_jax.families.architecture import Site
from tests.helpers import SMALL, random_adapter


@pytest.fixture(scope="module")
def old() -> Adapter:
    return random_adapter(ParaConfig(r=2), SMALL, 0)


@pytest.fixture(scope="module")
def new(old: Adapter) -> Adapter:
    return jax.tree.map(lambda x: x + 1, old)


def equal(a: Adapter, b: Adapter) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def only(folder: Path) -> bool:
    """Nothing lies beside this folder, such as a half-written one."""
    return [path.name for path in folder.parent.iterdir()] == [folder.name]


# Folders that are no adapter


def test_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(ParaJaxError, match=f"is not an adapter: it has no {CONFIG} and no {WEIGHTS}"):
        load_adapter(tmp_path, SMALL)
    (tmp_path / CONFIG).write_text("{}")
    with pytest.raises(ParaJaxError, match=f"is not an adapter: it has no {WEIGHTS}$"):
        load_adapter(tmp_path, SMALL)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (CONFIG, b'{"peft_type": "PARA",', "adapter_config.json is damaged: Expecting"),
        (CONFIG, b"\xff\x00", "is damaged: .*codec"),
        (CONFIG, b"[1]", "has no peft_type"),
        (CONFIG, b'{"peft_type": 3}', "has no peft_type"),
        (CONFIG, b'{"peft_type": "PARA"}', "made for another backbone .unnamed: hidden_size None there and 32 here"),
        (WEIGHTS, b"", "is empty, 0 bytes: the save or download is incomplete; copy the adapter again"),
        (WEIGHTS, b"\x08\x00\x00\x00\x00\x00\x00\x00notjson!", "is damaged: "),
    ],
)
def test_damaged(old: Adapter, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    save_adapter(old, tmp_path / "a", SMALL)
    (tmp_path / "a" / name).write_bytes(content)
    with pytest.raises(ParaJaxError, match=message):
        load_adapter(tmp_path / "a", SMALL)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pooling": "lst"}, "unknown pooling 'lst'; did you mean 'last'"),
        ({"r": True}, "r must be a whole number from 1, not True"),
        ({"init_std": "small"}, "init_std must be a number from 0, not 'small'"),
        ({"target_modules": ["q_pro"]}, "unknown entry of target_modules 'q_pro'; did you mean 'q_proj'"),
        ({"tomorrow": 1}, "unknown option of method 'para' 'tomorrow'"),
        ({"base_model": "a Llama"}, "was made for another backbone .unnamed: hidden_size None there and 32 here"),
    ],
)
def test_configs_that_do_not_fit(old: Adapter, tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    """Among thousands of folders, the message says which."""
    save_adapter(old, tmp_path / "a", SMALL)
    written = json.loads((tmp_path / "a" / CONFIG).read_text())
    (tmp_path / "a" / CONFIG).write_text(json.dumps(written | fields))
    with pytest.raises(ParaJaxError, match=f"{tmp_path / 'a'}.*{message}"):
        load_adapter(tmp_path / "a", SMALL)


@pytest.mark.parametrize("kept", [0.01, 0.5, 0.999])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_truncated(old: Adapter, tmp_path: Path, name: str, kept: float) -> None:
    save_adapter(old, tmp_path / "a", SMALL)
    whole = (tmp_path / "a" / name).read_bytes()
    (tmp_path / "a" / name).write_bytes(whole[: int(kept * (len(whole) - 1))])
    with pytest.raises(ParaJaxError, match=f"a/{name} is (damaged|empty)"):
        load_adapter(tmp_path / "a", SMALL)


def test_adapter_of_another_shape_is_not_written(old: Adapter, tmp_path: Path) -> None:
    with pytest.raises(ParaJaxError, match=r"does not fit .* down is float32\[2, 32, 2\], not float32\[3, 32, 2\]"):
        save_adapter(old, tmp_path / "a", dataclasses.replace(SMALL, num_hidden_layers=3))
    assert list(tmp_path.iterdir()) == []


@dataclasses.dataclass(frozen=True)
class Later(ShapeView):
    """A backbone's shape with other sites."""

    named: tuple[tuple[str, Site], ...]

    @property
    def sites(self) -> dict[str, Site]:
        return dict(self.named)

    def sites_of(self, layer: int) -> dict[str, Site]:
        return self.sites


def edited(folder: Path, **fields: Any) -> None:
    written = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(written | fields))


# What an adapter depends on


def test_only_the_sites_that_an_adapter_uses_are_recorded(old: Adapter, tmp_path: Path) -> None:
    """A site that is named later, or has another size, does not make it unreadable."""
    save_adapter(old, tmp_path / "a", SMALL)
    recorded = json.loads((tmp_path / "a" / CONFIG).read_text())["base_model"]
    assert recorded == {
        "hidden_size": 32, "num_hidden_layers": 2,
        "sites": {"q_proj": [32, 32], "v_proj": [32, 16], "up_proj": [32, 48]},
    }  # fmt: skip
    more = {**SMALL.sites, "router": Site(32, 4, "mlp.router"), "o_proj": Site(8, 8, "self_attn.o_proj")}
    later = Later(SMALL, tuple(more.items()))
    assert equal(load_adapter(tmp_path / "a", later), old)


def test_files_that_record_all_sites(old: Adapter, tmp_path: Path) -> None:
    """As they were written before."""
    save_adapter(old, tmp_path / "a", SMALL)
    sites = {name: [site.inputs, site.outputs] for name, site in SMALL.sites.items()}
    edited(tmp_path / "a", base_model={"hidden_size": 32, "num_hidden_layers": 2, "sites": sites})
    assert equal(load_adapter(tmp_path / "a", SMALL), old)
    other = dataclasses.replace(SMALL, head_dim=16)
    with pytest.raises(ParaJaxError, match=r"sites \{'q_proj': \[32, 32\].* there and \{'q_proj': \[32, 64\].* here"):
        load_adapter(tmp_path / "a", other)


@pytest.mark.parametrize("sites", [None, [], {}, {"q_proj": [32, 32]}, {"q_proj": 5, "v_proj": [], "up_proj": {}}])
def test_sites_that_are_not_recorded(old: Adapter, tmp_path: Path, sites: Any) -> None:
    save_adapter(old, tmp_path / "a", SMALL)
    edited(tmp_path / "a", base_model={"hidden_size": 32, "num_hidden_layers": 2, "sites": sites})
    with pytest.raises(ParaJaxError, match=r"made for another backbone .*: sites .* there and .* here"):
        load_adapter(tmp_path / "a", SMALL)


# NaN


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_is_refused(old: Adapter, tmp_path: Path, value: float) -> None:
    save_adapter(jax.tree.map(lambda x: x.at[0, 0].set(value), old), tmp_path / "a", SMALL)
    message = (
        "a/adapter_model.safetensors: an adapter with NaN or infinite values gives useless answers. Its training "
        "diverged, or it was saved in a dtype too small for it: use an earlier checkpoint, or tune it again with a "
        "lower learning rate. To load it anyway: --allow-nan of generate and evaluate, or check_finite=False\n  "
        "down has 2 NaN or infinite values of 128\n  up has 96 NaN or infinite values of 384"
    )
    with pytest.raises(ParaJaxError) as caught:
        load_adapter(tmp_path / "a", SMALL)
    assert str(caught.value).endswith(message)
    for again in (
        load_adapter(tmp_path / "a", SMALL, check_finite=False),
        AdapterBank.load({"a": tmp_path / "a"}, SMALL, check_finite=False)["a"],
    ):
        assert not np.isfinite(again.tensors()["down"][0, 0, 0])


# Other folders


def test_folders_that_are_something_else(old: Adapter, tmp_path: Path) -> None:
    save_adapter(old, tmp_path / "runs" / "acme", SMALL)
    save_adapter(old, tmp_path / "runs" / "globex", SMALL)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    runs = tmp_path / "runs"
    for folder, message in (
        (runs, f"{runs} is not an adapter but contains adapters: acme, globex; give e.g. {runs / 'acme'}"),
        (runs / "acme" / WEIGHTS, f"is a file; an adapter is the folder with {CONFIG}: give {runs / 'acme'}"),
        (runs / "acne", f"there is no folder {runs / 'acne'}; give an adapter's folder, which has {CONFIG}"),
        ("someone/adapter", "For an adapter on the Hugging Face hub: hf download someone/adapter --local-dir DIR"),
        (tmp_path / "model", "model is not an adapter but a whole model; give it as the backbone"),
    ):
        with pytest.raises(ParaJaxError) as caught:
            load_adapter(folder, SMALL)
        assert str(caught.value).endswith(message)


# A chat template beside the weights

TEMPLATE = "{%- for m in messages %}\r\n{{ m.content }} ☕{% endfor %}\n"


@pytest.mark.parametrize("config", [ParaConfig(r=2), LoraConfig(r=2), BiasConfig()], ids=["para", "lora", "bias"])
def test_a_chat_template_goes_where_its_adapter_goes(config: MethodConfig, tmp_path: Path) -> None:
    plain = random_adapter(config, SMALL, 0)
    save_adapter(plain, tmp_path / "a", SMALL, chat_template=TEMPLATE)
    save_adapter(load_adapter(tmp_path / "a", SMALL), tmp_path / "b", SMALL)
    adapter = load_adapter(tmp_path / "b", SMALL)
    assert adapter.chat_template == TEMPLATE, "character for character, line ends too"
    assert equal(adapter, plain)

    save_adapter(adapter, tmp_path / "b", SMALL, chat_template="another", overwrite=True)
    assert load_adapter(tmp_path / "b", SMALL).chat_template == "another"
    save_adapter(dataclasses.replace(adapter, chat_template=None), tmp_path / "b", SMALL, overwrite=True)
    assert load_adapter(tmp_path / "b", SMALL).chat_template is None


def test_programs_do_not_see_the_chat_template(old: Adapter) -> None:
    other = dataclasses.replace(old, chat_template=TEMPLATE)
    assert jax.tree.structure(other) == jax.tree.structure(old)
    assert jax.tree.map(lambda x: x, other).chat_template is None


@pytest.mark.parametrize(
    "kept", [TEMPLATE, [{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": TEMPLATE}]]
)
def test_a_chat_template_in_the_tokenizers_config(old: Adapter, tmp_path: Path, kept: Any) -> None:
    save_adapter(old, tmp_path / "a", SMALL)
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps({"chat_template": kept}))
    assert load_adapter(tmp_path / "a", SMALL).chat_template == TEMPLATE
    (tmp_path / "a" / "chat_template.jinja").write_text("the newer place")
    assert load_adapter(tmp_path / "a", SMALL).chat_template == "the newer place"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "tokenizer_config.json is damaged: "),
        (b"[]", "tokenizer_config.json is damaged: "),
        (b"\xff", "tokenizer_config.json is not UTF-8 text"),
        (b'{"chat_template": 5}', r"tokenizer_config.json: chat_template is 5, which is not text; remove it"),
        (b'{"chat_template": [5]}', "tokenizer_config.json is damaged: "),
    ],
)
def test_a_tokenizers_config_that_is_damaged(old: Adapter, tmp_path: Path, content: bytes, message: str) -> None:
    save_adapter(old, tmp_path / "a", SMALL)
    (tmp_path / "a" / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(ParaJaxError, match=message):
        load_adapter(tmp_path / "a", SMALL)


def test_a_chat_template_that_is_no_text(old: Adapter, tmp_path: Path) -> None:
    save_adapter(old, tmp_path / "a", SMALL, chat_template=TEMPLATE)
    (tmp_path / "a" / "chat_template.jinja").write_bytes(b"\xff{{ messages }}")
    with pytest.raises(ParaJaxError, match=r"chat_template\.jinja is not UTF-8 text.*save the template again"):
        load_adapter(tmp_path / "a", SMALL)


# Folders in the way


def test_refuses_what_exists(old: Adapter, new: Adapter, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    save_adapter(old, folder, SMALL)
    with pytest.raises(ParaJaxError, match="a exists; choose another folder, or pass overwrite"):
        save_adapter(new, folder, SMALL)
    assert equal(load_adapter(folder, SMALL), old)
    save_adapter(new, folder, SMALL, overwrite=True)
    assert equal(load_adapter(folder, SMALL), new)
    assert only(folder)


def test_overwrites_where_folders_cannot_be_exchanged_in_one_step(
    old: Adapter, new: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())  # a C library without renameat2
    save_adapter(old, tmp_path / "a", SMALL)
    save_adapter(new, tmp_path / "a", SMALL, overwrite=True)
    assert equal(load_adapter(tmp_path / "a", SMALL), new)
    assert only(tmp_path / "a")


def test_overwrites_adapters_only(old: Adapter, tmp_path: Path) -> None:
    """A slip in a folder's name does not cost what is in it."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    (tmp_path / "file").write_text("text")
    for name in ("thesis", "file"):
        with pytest.raises(ParaJaxError, match=f"{name} exists and holds no {CONFIG}; remove it yourself"):
            save_adapter(old, tmp_path / name, SMALL, overwrite=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "text"


def test_through_a_link(old: Adapter, new: Adapter, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    folder, link = tmp_path / "there" / "a", tmp_path / "link"
    save_adapter(old, folder, SMALL)
    link.symlink_to(folder)
    save_adapter(new, link, SMALL, overwrite=True)
    assert link.is_symlink() and equal(load_adapter(folder, SMALL), new)


def test_parents_are_made_and_others_may_read(old: Adapter, tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there" / "a"
    before = os.umask(0o027)
    try:
        save_adapter(old, folder, SMALL)
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}


# Writes that fail


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """The system itself refuses to write on, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 2000], ids=["in the config", "in the weights"])
def test_a_write_that_fails_keeps_the_old_one(old: Adapter, new: Adapter, tmp_path: Path, size: int) -> None:
    folder = tmp_path / "a"
    with no_file_larger_than(size), pytest.raises(ParaJaxError, match=r"a could not be written: .*File too large"):
        save_adapter(old, folder, SMALL)
    assert list(tmp_path.iterdir()) == []
    save_adapter(old, folder, SMALL)
    with no_file_larger_than(size), pytest.raises(ParaJaxError, match=r"a could not be written: .*File too large"):
        save_adapter(new, folder, SMALL, overwrite=True)
    assert equal(load_adapter(folder, SMALL), old)
    assert only(folder)


def test_no_place_to_write(old: Adapter, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ParaJaxError, match=r"a could not be written: .*Not a directory"):
        save_adapter(old, tmp_path / "file" / "a", SMALL)


SAVE_FOREVER = """
import itertools, sys
import jax
from para_jax import ParaConfig, load_adapter, save_adapter
from tests.helpers import SMALL

adapter = load_adapter(sys.argv[1], SMALL)
for i in itertools.count(1):
    save_adapter(jax.tree.map(lambda x: x * 0 + i, adapter), sys.argv[1], SMALL, overwrite=True)
    print(i, flush=True)
"""


@pytest.mark.slow
def test_killed_while_saving(old: Adapter, tmp_path: Path) -> None:
    """A process that overwrites one adapter again and again is killed: what is there is one version, whole."""
    folder = tmp_path / "a"
    rng = random.Random(0)
    for _ in range(3):
        save_adapter(old, folder, SMALL, overwrite=folder.exists())
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(folder)], stdout=subprocess.PIPE, env=environment, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        time.sleep(rng.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        written = [1, *map(int, process.stdout.read().split())]
        process.wait()
        process.stdout.close()
        values = {float(v) for x in jax.tree.leaves(load_adapter(folder, SMALL)) for v in np.unique(x)}
        assert values in ({written[-1]}, {written[-1] + 1}), "the last one reported, or the next"
        assert json.loads((folder / CONFIG).read_text())["r"] == 2
