"""torch is hidden from what only looks whether it is there, and found by what needs it."""

import subprocess
import sys
from pathlib import Path

import pytest

SEEN = """
import sys
import para_jax.cli
from para_jax.torch_files import as_numpy, read_torch

para_jax.cli.main = lambda: 0
try:
    para_jax.cli.command()
except SystemExit:
    pass
from transformers import AutoTokenizer, LlamaConfig
assert not any(name.startswith("torch.") for name in sys.modules), "torch was imported"
print(as_numpy(read_torch(sys.argv[1], ("bfloat16",))["x"]).tolist())
"""


@pytest.mark.slow
def test_the_command_line_imports_torch_for_its_files_alone(tmp_path: Path) -> None:
    import torch

    torch.save({"x": torch.arange(3, dtype=torch.bfloat16)}, tmp_path / "x.bin")
    made = subprocess.run([sys.executable, "-c", SEEN, str(tmp_path / "x.bin")], capture_output=True, text=True)
    assert made.stdout == "[0.0, 1.0, 2.0]\n", made.stderr
