"""Every verb as a new user runs it, and every mistake of theirs."""

import json
import subprocess
import sys

import pytest

from para_jax import tiny_backbone_path
from para_jax.cli import main


def rows(tmp_path, name, words):
    path = tmp_path / f"{name}.jsonl"
    lines = [{"prompt": f"The {w} is", "response": words[(i + 1) % len(words)]} for i, w in enumerate(words)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Two tenants tuned for three steps, and their files."""
    folder = tmp_path_factory.mktemp("tuned")
    files = {n: rows(folder, n, w) for n, w in (("acme", ["house", "river", "horse"]), ("globex", ["day", "night"]))}
    tenants = [part for name, path in files.items() for part in ("--tenant", f"{name}={path}")]
    out = folder / "out"
    arguments = [
        "--rows",
        "2",
        "--steps",
        "3",
        "--lr",
        "0.1",
        "--lr",
        "globex=0.02",
        "--r",
        "4",
        "--out",
        str(out),
    ]
    assert main(["finetune", *tenants, *arguments]) == 0
    return out, tenants


def failure(capsys, *arguments):
    assert main([str(a) for a in arguments]) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_help_needs_nothing_heavy():
    code = (
        "import sys\nfrom para_jax.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'jax', 'numpy', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in ("quickstart", "finetune", "evaluate", "generate"))


def test_finetune_writes_what_it_says(tuned):
    out, _ = tuned
    config = json.loads((out / "acme" / "adapter_config.json").read_text())
    assert config["peft_type"] == "PARA" and config["r"] == 4
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["lr"]["acme"] == pytest.approx(5 * lines[0]["lr"]["globex"])
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate(tuned, tmp_path, capsys):
    out, tenants = tuned
    target, lines = tmp_path / "scores.json", tmp_path / "predictions.jsonl"
    arguments = [
        "--adapters",
        str(out),
        *tenants,
        "--json",
        str(target),
        "--max-new-tokens",
        "4",
        "--max-new-tokens",
        "acme=2",
    ]
    assert main(["evaluate", *arguments, "--choose", "acme", "--predictions", str(lines)]) == 0
    printed = capsys.readouterr().out
    scores = json.loads(target.read_text())["tenants"]
    assert scores["acme"]["rows"] == 3 and "choice_accuracy" not in scores["globex"]
    assert f"{scores['acme']['choice_accuracy']:.3f}" in printed
    predictions = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [p["tenant"] for p in predictions] == ["acme"] * 3 + ["globex"] * 2
    assert predictions[0]["choice"] in ("house", "river", "horse")
    assert "exists" in failure(capsys, "evaluate", *arguments)
    assert "unknown tenant in --choose" in failure(capsys, "evaluate", *tenants, "--choose", "initech")


def test_generate_rows_come_back_in_order(tuned, tmp_path):
    out, _ = tuned
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given = [
        {"tenant": "acme", "prompt": "The house is"},
        {"tenant": None, "prompt": "It was a dark and stormy night, and the"},
        {"tenant": "globex", "messages": [{"role": "user", "content": "Day?"}]},
        {"prompt": "The house is"},
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in given))
    arguments = ["generate", "--adapters", str(out), "--input", str(source), "--output", str(target)]
    assert main([*arguments, "--max-new-tokens", "6"]) == 0
    answered = [json.loads(line) for line in target.read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k not in ("text", "finish_reason")} for row in answered] == given
    assert {row["finish_reason"] for row in answered} <= {"stop", "length"}
    assert answered[0]["text"] != answered[3]["text"], "the tenant's adapter is at work"


def test_generate_one_prompt(tuned, capsys):
    out, _ = tuned
    prompt = ["generate", "--prompt", "The river is", "--max-new-tokens", "4"]
    assert main(prompt) == 0
    bare = capsys.readouterr().out
    assert main([*prompt, "--adapters", str(out), "--tenant", "acme"]) == 0
    assert capsys.readouterr().out != bare


def test_mistakes(tuned, tmp_path, capsys):
    out, tenants = tuned
    good = rows(tmp_path, "good", ["one", "two"])
    assert "did you mean 'acme'?" in failure(
        capsys, "generate", "--adapters", out, "--tenant", "acmee", "--prompt", "x"
    )
    assert "needs --adapters" in failure(capsys, "generate", "--tenant", "acme", "--prompt", "x")
    assert "either --prompt" in failure(capsys, "generate")
    assert "holds no adapters" in failure(capsys, "evaluate", "--adapters", tmp_path, *tenants)
    assert "no config.json" in failure(capsys, "generate", "--model", tmp_path, "--prompt", "x")
    assert "nor could it be had from the Hugging Face hub" in failure(
        capsys, "generate", "--model", "no/such", "--prompt", "x"
    )

    def finetune(*more):
        return failure(capsys, "finetune", "--out", tmp_path / "new", *more)

    one = ("--tenant", f"a={good}")
    assert "takes NAME=FILE" in finetune("--tenant", good)
    assert "names 'a' twice" in finetune(*one, *one)
    assert "did you mean 'para'?" in finetune(*one, "--method", "parra")
    assert "did you mean 'q_proj'?" in finetune(*one, "--target-modules", "q_porj")
    assert "did you mean 'mean'?" in finetune(*one, "--pooling", "meam")
    assert "unknown tenant in --lr 'b'" in finetune(*one, "--lr", "b=1")
    assert "takes int or NAME=int" in finetune(*one, "--steps", "many")
    assert "lr and max_grad_norm must be above 0" in finetune(*one, "--lr", "0")
    assert "cannot be split" in finetune(*one, "--rows", "3", "--micro-batches", "2")
    assert "cannot be a folder's name" in finetune("--tenant", f"../b={good}")
    assert "longer than 4 tokens" in finetune(*one, "--max-length", "4")
    assert not (tmp_path / "new").exists(), "nothing is written before everything is checked"
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    error = failure(capsys, "finetune", "--out", tmp_path / "precious", *one, "--overwrite")
    assert "holds no run.json" in error and (tmp_path / "precious" / "thesis.txt").read_text() == "years of work"


def test_another_backbones_adapter(tuned, tmp_path, capsys):
    out, _ = tuned
    config = json.loads((out / "acme" / "adapter_config.json").read_text())
    config["base_model"]["hidden_size"] = 512
    (tmp_path / "all" / "acme").mkdir(parents=True)
    (tmp_path / "all" / "acme" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "all" / "acme" / "adapter_model.safetensors").write_bytes(
        (out / "acme" / "adapter_model.safetensors").read_bytes()
    )
    error = failure(capsys, "generate", "--adapters", tmp_path / "all", "--tenant", "acme", "--prompt", "x")
    assert "made for another backbone" in error and "hidden_size 512 there and 256 here" in error


def test_the_tiny_backbone_is_the_default():
    from para_jax.cli import parser

    assert parser().parse_args(["generate", "--prompt", "x"]).model is None
    assert tiny_backbone_path().endswith("tiny-books")
