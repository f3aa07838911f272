"""The lookup of embeddings on a mesh: what it moves, and that the compiler never gives up and copies everything."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from para_jax import tiny_backbone_path
from para_jax.convert.checkpoint import save_backbone
from para_jax.parameters import VOCABULARY
from para_jax.sharding import embedded, make_mesh, row_sharding, spec, split_rows
from tests.helpers import random_backbone

MESHES = [
    "data=8", "fsdp=8", "tensor=8", "data=2,fsdp=4", "data=4,fsdp=2", "data=4,tensor=2", "fsdp=4,tensor=2",
    "fsdp=2,tensor=4", "data=2,fsdp=2,tensor=2",
]  # fmt: skip
COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(")
WIDTH, LENGTH = 32, 5


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(("rows", "vocabulary"), [(16, 64), (9, 61)])
def test_what_a_lookup_moves(mesh: str, rows: int, vocabulary: int, optimized, capfd) -> None:
    """Ids over `fsdp`, then features for rows; partial lookups over `tensor`. The table never moves."""
    on = make_mesh(mesh)
    rng = np.random.default_rng(0)
    embed = jnp.asarray(rng.standard_normal((vocabulary, WIDTH), np.float32))
    tokens = jnp.asarray(rng.integers(0, vocabulary, (rows, LENGTH), np.int32))
    there = jax.device_put(embed, NamedSharding(on, spec(VOCABULARY, embed.shape, on)))
    program = jax.jit(lambda embed, tokens: 2 * split_rows(embedded(embed, tokens, on), on)).lower(
        there, jax.device_put(tokens, row_sharding(on, rows))
    )
    compiled = program.compile()
    np.testing.assert_array_equal(compiled(there, tokens), 2 * embed[tokens])
    assert "rematerialization" not in capfd.readouterr().err

    data, fsdp, tensor = on.shape.values()
    divides, split = rows % (data * fsdp) == 0, vocabulary % tensor == 0
    at_once = rows // data if divides else rows
    expected = {}
    if fsdp > 1 and divides:
        expected = {"all-gather": at_once * LENGTH, "all-to-all": at_once // fsdp * LENGTH * WIDTH}
    elif fsdp > 1:
        expected = {"all-gather": rows * LENGTH * WIDTH}
    if tensor > 1 and split:
        expected["all-reduce"] = at_once * LENGTH * WIDTH // fsdp
    found = [m.groups() for line in compiled.as_text().splitlines() if (m := COLLECTIVE.search(line))]
    shapes = {kind: re.findall(r"(?:f|s)32\[([\d,]+)\]", made) for made, kind in found}
    assert len(found) == len(shapes)
    assert {k: sum(math.prod(map(int, x.split(","))) for x in of) for k, of in shapes.items()} == expected


COMMANDS = """
import json, sys
from para_jax.cli import main

model, out, meshes = json.loads(sys.argv[1])
for mesh in meshes:
    same = ["--model", model, "--mesh", mesh, "--compile-cache", "off"]
    rows, run = ["--tenant", f"a={out}/rows.jsonl"], f"{out}/{mesh}"
    several = [f"--tenant=t{i}={out}/rows.jsonl" for i in range(8)]
    tuning = ["--steps", "1", "--rows", "4"]
    for command in (
        ["finetune", *rows, "--dev", f"a={out}/rows.jsonl", "--eval-every", "1", *tuning, "--out", run],
        ["finetune", *several, *tuning, "--out", f"{run}-spread"],
        ["generate", "--adapters", run, "--tenant", "a", "--prompt", "The maid", "--max-new-tokens", "2"],
        ["generate", "--prompt", "The maid", "--num-beams", "2", "--max-new-tokens", "2"],
        ["evaluate", "--adapters", run, *rows, "--choose", "a", "--max-new-tokens", "2"],
    ):
        assert main([*command, *same]) == 0
"""


@pytest.mark.slow
def test_the_commands_say_nothing_of_it(tmp_path: Path) -> None:
    """XLA writes its complaints to the process's stderr, so these are commands in a process of its own."""
    model = tmp_path / "model"
    save_backbone(random_backbone(vocab_size=4096), model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tiny_backbone_path(), name), model / name)
    lines = [{"prompt": f"The maid runs to {i} towns.", "response": "prison" if i % 2 else "inn"} for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = json.dumps([str(model), str(tmp_path), ["data=2,fsdp=2,tensor=2"]])
    # Nothing may come from a cache: what is not compiled says nothing.
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"JAX_NUM_CPU_DEVICES": "8", "TF_CPP_MIN_LOG_LEVEL": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, given], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rematerialization" not in done.stderr and "spmd" not in done.stderr, done.stderr
