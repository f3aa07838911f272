"""`para-jax plan` from the command line: what it prints, writes and returns."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from para_jax.cli import main
from tests.planning.test_plan import LLAMA_3_8B


@pytest.mark.slow
def test_it_fits(tmp_path, capsys) -> None:
    """The tiny backbone, compiled for CPUs that stand for GPUs."""
    out = tmp_path / "plan.json"
    arguments = [
        "plan",
        "--topology",
        "gpu:h100x2",
        "--mesh",
        "fsdp=2",
        "--tenants",
        "2",
        "--rows",
        "4",
        "--json",
        str(out),
    ]
    assert main([*arguments, "--length", "64", "--option", "r=4"]) == 0
    made = json.loads(out.read_text())
    assert made["fits"] and made["model"] == "tiny-books" and made["method"] == "para"
    assert made["plan"]["mesh"] == "fsdp=2" and made["devices"] == 2 and made["estimated"]
    micro_batch, update = made["plan"]["programs"]
    assert micro_batch["name"] == "micro_batch" and micro_batch["peak"] > micro_batch["arguments"] > 0
    assert micro_batch["collectives"]["all-gather"]["bytes"] > 0
    assert update["name"] == "update" and made["plan"]["step"]["micro_batches"] == 1
    printed = capsys.readouterr()
    for words in (
        "tuning 2 x 4 rows of 64 tokens in a micro-batch of 2 x 128 tokens a device, remat layers",
        "bfloat16, fsdp=2: fits gpu:h100x2",
        "Compiled for CPUs: arguments are exact",
        "micro_batch: all-gather",
        "A step takes ",
        "989 TFLOP/s x 0.6",
    ):
        assert words in printed.out
    assert "compiling for fsdp=2: 4 rows in a micro-batch of 2 x 128" in printed.err
    assert main([*arguments, "--length", "64"]) == 1
    assert f"{out} exists; choose another --json or pass --overwrite" in capsys.readouterr().err


@pytest.mark.slow
def test_it_does_not_fit(tmp_path, capsys) -> None:
    """Llama 3 8B in bfloat16 on a chip of 16 GB: the compiler's figure, and a change that suffices. JSON is written."""
    config, out = tmp_path / "config.json", tmp_path / "plan.json"
    config.write_text(json.dumps(LLAMA_3_8B))
    arguments = ["--model", str(config), "--topology", "v5e:1x1", "--mode", "decode", "--rows", "8", "--tries", "1"]
    assert main(["plan", *arguments, "--json", str(out)]) == 1
    made = json.loads(out.read_text())
    assert not made["fits"] and made["plan"]["tokens_per_second"] is None
    (prefill,) = made["plan"]["programs"]
    assert prefill["problem"].startswith("Ran out of memory") and prefill["peak"] > made["hbm"]
    assert [way["change"] for way in made["remedies"]] == ["--quantize int8"]
    printed = capsys.readouterr().out
    assert "does not fit v5e:1x1, 18." in printed and "What would make it fit:\n  --quantize int8: " in printed


@pytest.mark.slow
def test_a_kernel_that_does_not_compile(tmp_path, capsys, monkeypatch) -> None:
    """Heads that the chip's vector memory has no room for: planned with plain attention, and said."""
    wide = {"model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    wide |= {"num_attention_heads": 1, "head_dim": 512, "max_position_embeddings": 2048}
    (tmp_path / "config.json").write_text(json.dumps(wide))
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=5120")
    arguments = ["--model", str(tmp_path), "--topology", "v5e:1x1", "--mode", "decode", "--rows", "1", "--length", "64"]
    out = tmp_path / "plan.json"
    assert main(["plan", *arguments, "--new-tokens", "16", "--dtype", "float32", "--json", str(out)]) == 0
    made = json.loads(out.read_text())
    assert made["attention"]["kernel"] == "plain" and made["dtype"] == "float32", "which was named"
    assert made["attention"]["refused"].startswith("attention='splash' does not compile for TPU v5 lite with jax ")
    assert f"{made['attention']['refused']}; planned with attention='plain' instead.\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v5x:2x2"], "unknown chip 'v5x'; did you mean"),
        (["--topology", "gpu:h100x1", "--method", "loar"], "unknown method 'loar'; did you mean 'lora'?"),
        (["--topology", "gpu:h100x1", "--option", "target_modules=q_porj"], "unknown entry of target_modules 'q_porj'"),
        (
            ["--topology", "gpu:h100x1", "--rows", "4,many"],
            "--rows must be a whole number from 1 to 2147483647, not 'many'; separate several values with commas",
        ),
        (["--topology", "gpu:h100x1", "--tries", "0"], "--tries must be a whole number from 1 to 2147483647, not '0'"),
        (
            ["--topology", "gpu:h100x1", "--new-tokens", "8"],
            "--new-tokens is for --mode decode, and has no effect in --mode train",
        ),
        (["--topology", "gpu:h100x1", "--mode", "decode", "--remat", "none"], "--remat is for --mode train"),
        (
            ["--topology", "gpu:h100x1", "--micro-batch-tokens", "0"],
            "--micro-batch-tokens must be a whole number from 1 to",
        ),
        (["--topology", "gpu:h100x1", "--mode", "decode", "--new-tokens", "900"], "exceed the backbone's context of"),
        (["--topology", "gpu:h100x1", "--length", "100000"], "exceed the backbone's context of"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys) -> None:
    assert main(["plan", *arguments]) == 1
    said = capsys.readouterr().err
    assert said.startswith("para-jax plan: ") and message in said and "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "mesh", "message"),
    [
        ("v5e:3x3", "", "v5e:3x3 is not an existing slice"),
        ("gpu:h100x2", "fsdp=4", "a mesh of fsdp=4 has 4 devices; there are 2"),
    ],
)
def test_mistakes_that_show_with_the_devices(topology: str, mesh: str, message: str, capsys) -> None:
    test_mistakes(["--topology", topology, *(["--mesh", mesh] if mesh else [])], message, capsys)


@pytest.mark.whole
def test_two_at_once() -> None:
    """Compilers for TPUs do not keep each other out."""
    arguments = ["--topology", "v5e:1x1", "--mode", "decode", "--rows", "2", "--length", "16", "--new-tokens", "16"]
    command = [sys.executable, "-m", "para_jax", "plan", *arguments]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
        for _ in range(2)
    ]
    for process in both:
        printed, said = process.communicate()
        assert process.returncode == 0 and "fits v5e:1x1" in printed, said


@pytest.mark.slow
def test_devices_of_this_machine_are_left_alone(tmp_path) -> None:
    """The command starts no backend in its own process: it would take the accelerator, or look for one.

    A T4 computes in float16, as `compute_dtype` chooses for it, unless another is named.
    """
    code = (
        "import sys; from para_jax.cli import main; from jax._src import xla_bridge\n"
        "assert main(sys.argv[1:]) == 0 and not xla_bridge.backends_are_initialized()"
    )
    arguments = ["plan", "--topology", "gpu:t4x1", "--mode", "decode", "--rows", "1", "--length", "16"]
    command = [sys.executable, "-c", code, *arguments, "--new-tokens", "16", "--json", str(tmp_path / "plan.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "plan.json").read_text())["dtype"] == "float16"
