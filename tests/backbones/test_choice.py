"""Which kernel is chosen, and what its compiler has to say first: real compilers, for TPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from para_jax import Backbone, BackboneConfig, ParaJaxError, compile_cache
from para_jax.backbones.choice import choose
from para_jax.planning.chips import parse_topology
from para_jax.planning.topology import environment
from tests.helpers import SMALL, family_fields

BFLOAT16, FLOAT32 = jnp.dtype("bfloat16"), jnp.dtype("float32")


def test_the_choice() -> None:
    assert choose("auto", SMALL, FLOAT32).kernel == "plain"  # on a CPU
    with pytest.raises(ParaJaxError, match=r"unknown attention 'flash'; did you mean 'splash'\?"):
        choose("flash", SMALL, FLOAT32)
    with pytest.raises(ParaJaxError, match=r"'cudnn' supports bfloat16 only, not float32; choose attention='plain'"):
        choose("cudnn", SMALL, FLOAT32)
    with pytest.raises(ParaJaxError, match="runs on NVIDIA GPUs, not on cpu"):
        choose("cudnn", SMALL, BFLOAT16)
    for family, part in (("gemma2", "soft-capping"), ("gpt_oss", "attention sinks")):
        with pytest.raises(ParaJaxError, match=f"'cudnn' has no {part}; choose attention='plain' or 'auto'"):
            choose("cudnn", BackboneConfig.from_hf(family_fields(family)), BFLOAT16)


def test_plain_for_a_part_that_the_kernel_lacks(caplog: pytest.LogCaptureFixture) -> None:
    """On a GPU "auto" says which, in one line."""
    gpu: Any = SimpleNamespace(platform="gpu")
    config = BackboneConfig.from_hf(family_fields("gpt_oss"))
    for _ in range(2):
        assert choose("auto", config, BFLOAT16, gpu) == ("plain", "attention='cudnn' has no attention sinks", False)
    assert caplog.messages == ["attention='cudnn' has no attention sinks; attention='plain' is used instead"]


def kept(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("kernel-*.json"))]


def test_a_cpu_compiles_nothing_to_choose() -> None:
    """Neither for "auto" nor for a kernel that is interpreted here; a start is as quick as before."""
    folder = compile_cache.folder()
    assert folder is not None
    before, compiled = kept(folder), []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
    try:
        assert choose("auto", SMALL, BFLOAT16)[0] == "plain" and choose("splash", SMALL, BFLOAT16)[0] == "splash"
    finally:
        jax.monitoring.clear_event_listeners()
    assert compiled == [] and kept(folder) == before


CHOOSE = """
import json, logging, sys
import jax, jax.numpy as jnp

from para_jax import BackboneConfig, ParaJaxError
from para_jax.backbones.attention import Seen
from para_jax.backbones.choice import choose
from para_jax.families.architecture import LayerKind
from para_jax.planning.chips import parse_topology
from para_jax.planning.topology import devices

compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
)
kinds = (LayerKind(), LayerKind(window=300))
config = BackboneConfig(61, 32, 48, 2, 4, 2, 64, layer_kinds=kinds, kind_of_layer=(0, 1))
device = devices(parse_topology("v5e:1x1"))[0]
found = jax.eval_shape(lambda: jnp.zeros(len(choose("auto", config, jnp.dtype("bfloat16"), device).kernel)))
assert choose("auto", config, jnp.dtype("bfloat16"), device).kernel == {6: "splash", 5: "plain"}[found.size]
try:
    named = choose("splash", config, jnp.dtype("bfloat16"), device).kernel
except ParaJaxError as error:
    named = str(error)
print(json.dumps([*choose("auto", config, jnp.dtype("bfloat16"), device), named, len(compiled)]))
"""
NO_ROOM = {"LIBTPU_INIT_ARGS": "--xla_tpu_scoped_vmem_limit_kib=640"}


def chosen(
    folder: Path | str, python: Path | str = sys.executable, **more: str
) -> tuple[str, str, bool, str, int, str]:
    """Of a process that compiles for a v5e chip: the choice, what it says of the kernel's name, how many programs it
    compiled, and what it says on stderr."""
    # JAX says there which compiler it found, to all processes that it starts.
    inherited = {name: value for name, value in os.environ.items() if name != "TPU_LIBRARY_PATH"}
    for_chip = environment(parse_topology("v5e:1x1"))
    given = {**inherited, **for_chip, **more, "JAX_COMPILATION_CACHE_DIR": str(folder)}
    done = subprocess.run([python, "-c", CHOOSE], capture_output=True, text=True, env=given)
    assert done.returncode == 0, done.stderr[-3000:]
    return (*json.loads(done.stdout.splitlines()[-1]), done.stderr)


@pytest.mark.slow
def test_a_kernel_that_compiles_is_tried_once(tmp_path: Path) -> None:
    """All its forms in one program; the next process has the answer, unless its file is damaged."""
    splash = ("splash", "compiles for TPU v5 lite", False, "splash")
    assert chosen(tmp_path) == (*splash, 1, "")
    (answer,) = kept(tmp_path)
    assert answer["refusal"] == "" and answer["of"]["windows"] == [0, 300] and answer["of"]["lengths"] == [256, 1024]
    assert answer["of"]["libtpu"] and answer["of"]["device"] == "TPU v5 lite"
    assert chosen(tmp_path) == (*splash, 0, "")
    (file,) = tmp_path.glob("kernel-*.json")
    file.write_text(json.dumps({"of": {}, "refusal": "of another kernel"}))
    assert chosen(tmp_path)[:5] == (*splash, 1) and kept(tmp_path) == [answer]


@pytest.mark.slow
def test_a_kernel_that_does_not_compile(tmp_path: Path) -> None:
    """The compiler has less of the chip's vector memory to give than the kernel's blocks take."""
    kernel, why, refused, named, compiled, said = chosen(tmp_path, **NO_ROOM)
    assert (kernel, refused, compiled) == ("plain", True, 1)
    assert why.startswith("attention='splash' does not compile for TPU v5 lite with jax ")
    assert "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom: Ran out of memory in memory space vmem" in why
    assert why.endswith("it needs more of the chip's vector memory than there is, which no upgrade changes")
    assert named == f"{why}; choose attention='plain' or 'auto'"
    assert said == f"{why}; attention='plain' is used instead\n", "one line, once"
    (answer,) = kept(tmp_path)
    assert answer["refusal"] and why.endswith(f": {answer['refusal']}")
    assert chosen(tmp_path, **NO_ROOM) == (kernel, why, refused, named, 0, said)
    # With all of its memory it is another question.
    assert chosen(tmp_path)[0] == "splash" and len(kept(tmp_path)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["off", "a file"])
def test_answers_that_cannot_be_kept(folder: str, tmp_path: Path) -> None:
    off = {"JAX_ENABLE_COMPILATION_CACHE": "false"} if folder == "off" else {}
    (tmp_path / "a file").write_text("")
    assert chosen(tmp_path / folder, **off, **NO_ROOM)[0] == "plain"
    assert [path.name for path in tmp_path.iterdir()] == ["a file"]


def check_the_stock_pair_of_colab(python: Path, tmp_path: Path) -> None:
    """jax 0.7.2 with libtpu 0.0.21.1 compiles no Pallas kernel: what is said, and which upgrade is named.

    tests/colab/test_install.py has the environment.
    """
    here = str(Path(compile_cache.__file__).parents[1])
    kernel, why, refused, named, _, said = chosen(tmp_path / "cache", python, PYTHONPATH=here)
    assert (kernel, refused) == ("plain", True)
    assert why == (
        "attention='splash' does not compile for TPU v5 lite with jax 0.7.2, jaxlib 0.7.2, libtpu 0.0.21.1: INTERNAL: "
        "Failed to deserialize the Mosaic module: INTERNAL: Unsupported version: expected <= 7 but got 8; jax 0.10.2 "
        "with libtpu 0.0.42.1 compiles it"
    )
    assert named == f"{why}; choose attention='plain' or 'auto'"
    assert said == f"{why}; attention='plain' is used instead\n"


def test_a_backbone_has_what_was_chosen() -> None:
    made = jax.eval_shape(lambda: Backbone(SMALL, jax.random.key(0), "float32"))
    assert made.attention == choose("auto", SMALL, FLOAT32).kernel
