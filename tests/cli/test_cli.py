"""Every verb as a new user runs it, and every mistake of theirs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from para_jax import BiasConfig, IA3Config, LoraConfig, ParaConfig, ParaJaxError, tiny_backbone_path
from para_jax.cli import main
from para_jax.cli.evaluate import with_choices
from para_jax.cli.finetune import method_configs
from para_jax.decoding import generate as generate_module


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
        "--log",
        "tensorboard",
        "--profile",
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
    assert all(verb in done.stdout for verb in ("quickstart", "finetune", "evaluate", "generate", "methods"))


def test_ignored_keys_are_one_plain_line(tmp_path):
    fields = json.loads(Path(tiny_backbone_path(), "config.json").read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**fields, "_model_name_or_path": "x", "unk_token_id": 3}))
    command = [sys.executable, "-m", "para_jax", "methods", "--model", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "para" in done.stdout
    reader = "transformers' LlamaForCausalLM"
    assert done.stderr == f"{path}: keys that {reader} does not read are ignored: _model_name_or_path, unk_token_id\n"


def test_finetune_writes_what_it_says(tuned):
    out, _ = tuned
    config = json.loads((out / "acme" / "adapter_config.json").read_text())
    assert config["peft_type"] == "PARA" and config["r"] == 4
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["lr"]["acme"] == pytest.approx(5 * lines[0]["lr"]["globex"])
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert set(json.loads((out / "report.json").read_text())["tenants"]) == {"acme", "globex"}
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    assert list((out / "tensorboard").iterdir())


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


def test_choices_that_would_be_none():
    """--choose makes choices of responses; where it cannot, it says so."""
    rows = [("a:1", {"prompt": "x", "response": "yes"}), ("a:2", {"prompt": "x", "response": "no", "choices": ["no"]})]
    made = [row["choices"] for _, row in with_choices("a", rows)]
    assert made == [["no", "yes"], ["no"]]
    for some, words in (
        (rows[1:], "--choose has no effect on a: all rows have choices already"),
        (
            [("a:1", {"prompt": "x", "completion": "yes"})],
            '--choose needs texts under "response", and no row of a has',
        ),
        ([(f"a:{i}", {"response": str(i)}) for i in range(51)], "a has 51 different responses, too many for --choose"),
    ):
        with pytest.raises(ParaJaxError, match=words):
            with_choices("a", some)


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
    assert "downloading it from the Hugging Face hub failed" in failure(
        capsys, "generate", "--model", "no/such", "--prompt", "x"
    )

    def finetune(*more):
        return failure(capsys, "finetune", "--out", tmp_path / "new", *more)

    one = ("--tenant", f"a={good}")
    assert "takes NAME=SOURCE" in finetune("--tenant", good)
    assert "names 'a' twice" in finetune(*one, *one)
    assert "did you mean 'para'?" in finetune(*one, "--method", "parra")
    assert "did you mean 'q_proj'?" in finetune(*one, "--target-modules", "q_porj")
    assert "did you mean 'mean'?" in finetune(*one, "--option", "pooling=meam")
    assert "unknown tenant in --lr 'b'" in finetune(*one, "--lr", "b=1")
    assert "cannot be a folder's name" in finetune("--tenant", f"../b={good}")
    assert "longer than 4 tokens" in finetune(*one, "--max-length", "4")
    assert not (tmp_path / "new").exists(), "nothing is written before everything is checked"
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    error = failure(capsys, "finetune", "--out", tmp_path / "precious", *one, "--overwrite")
    assert "holds no run.json" in error and (tmp_path / "precious" / "thesis.txt").read_text() == "years of work"


# Methods and their options


def method_mistake(*arguments):
    """What is wrong with these, for tenants a and b; before anything is read."""
    with pytest.raises(ParaJaxError) as error:
        method_configs(
            ["a", "b"], [m for k, m in arguments if k == "method"], [o for k, o in arguments if k != "method"]
        )
    return str(error.value)


def test_options_for_all_and_for_one_method(tmp_path):
    file = tmp_path / "lora.json"
    file.write_text(json.dumps({"method": "lora", "r": 2, "rank_pattern": {"q_proj": 4}, "target_modules": ["q_proj"]}))
    configs = method_configs(
        ["a", "b", "c", "d", "e"],
        ["lora", "a=para", "c=ia3", f"d={file}", "e=bias"],
        [
            *("target_modules=v_proj,down_proj", "para.normalize=false", "para.pooling=mean"),
            *("lora.r=4", 'lora.rank_pattern={"v_proj": 2}', "lora.use_rslora=True"),
        ],
    )
    assert configs["a"] == ParaConfig(target_modules=("v_proj", "down_proj"), normalize=False, pooling="mean")
    patterned = LoraConfig(r=4, target_modules=("v_proj", "down_proj"), rank_pattern={"v_proj": 2}, use_rslora=True)
    assert configs["b"] == patterned
    assert configs["c"] == IA3Config(target_modules=("v_proj", "down_proj"))
    assert configs["e"] == BiasConfig(target_modules=("v_proj", "down_proj"))
    assert configs["d"] == LoraConfig(r=2, rank_pattern={"q_proj": 4}, target_modules=("q_proj",))
    assert set(method_configs(["a", "b"], [], []).values()) == {ParaConfig()}
    every = method_configs(["a"], ["lora"], ["target_modules=all-linear"])["a"]
    regex = method_configs(["a"], ["lora"], [r"target_modules=.*layers\.(0|1)\.mlp.*"])["a"]
    assert (every.target_modules, regex.target_modules) == ("all-linear", r".*layers\.(0|1)\.mlp.*")


def test_mistakes_in_methods_and_options(tmp_path):
    assert "unknown method 'lroa'; did you mean 'lora'" in method_mistake(("method", "lroa"))
    assert "unknown tenant in --method 'c'" in method_mistake(("method", "c=lora"))
    assert "did you mean 'pooling'" in method_mistake(("option", "poling=mean"))
    assert "did you mean 'mean'" in method_mistake(("option", "pooling=meam"))
    assert "option of method 'ia3' 'r'" in method_mistake(("method", "b=ia3"), ("option", "r=4"))
    assert "unknown method in --option 'loar'; did you mean 'lora'" in method_mistake(
        ("method", "lora"), ("option", "loar.r=4")
    )
    assert "unknown method in --option 'ia3'. Known: para" in method_mistake(("option", "ia3.projection=4"))
    assert "--option takes KEY=VALUE" in method_mistake(("option", "r"))
    assert "--option takes KEY=VALUE" in method_mistake(("option", "r="))
    assert "--option gives r twice" in method_mistake(("option", "r=4"), ("option", "r=8"))
    assert "normalize must be true or false, not 'no'" in method_mistake(("option", "normalize=no"))
    file = tmp_path / "own.json"
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"r": 4}', 'has no "method"; write one of para'),
        ('{"method": "lora", "rr": 4}', "option of method 'lora' 'rr'"),
    ):
        file.write_text(text)
        assert message in method_mistake(("method", str(file)))
    file.write_text('{"method": "lora"}')
    assert "--option r=4 applies to no tenant" in method_mistake(("method", str(file)), ("option", "r=4"))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A run of four methods, and its arguments without --out."""
    folder = tmp_path_factory.mktemp("mixed")
    file = folder / "lora.json"
    file.write_text(json.dumps({"method": "lora", "r": 2, "rank_pattern": {"layers.0.self_attn.q_proj": 4}}))
    words = {"acme": ["house", "river"], "globex": ["day", "night"], "initech": ["dog", "cat"], "hooli": ["sun"]}
    tenants = [part for n, w in words.items() for part in ("--tenant", f"{n}={rows(folder, n, w)}")]
    methods = ["--method", f"acme={file}", "--method", "globex=ia3", "--method", "hooli=bias"]
    methods += ["--lr", "0.1", "--lr", "initech=0.01"]
    arguments = [*tenants, *methods, "--rows", "2", "--steps", "2", "--option", "para.r=3"]
    assert main(["finetune", *arguments, "--out", str(folder / "out")]) == 0
    return folder / "out", arguments, file


@pytest.mark.slow
def test_one_run_of_several_methods(mixed, capsys):
    """run.json has each tenant's method and options, and so a run with others is not taken for this one."""
    out, arguments, file = mixed
    run = json.loads((out / "run.json").read_text())["tenants"]
    methods = {"acme": "lora", "globex": "ia3", "initech": "para", "hooli": "bias"}
    assert {name: run[name]["method"] for name in run} == methods
    assert run["acme"]["rank_pattern"] == [["layers.0.self_attn.q_proj", 4]] and run["initech"]["r"] == 3
    assert run["acme"]["lr"] == 0.1 and run["initech"]["lr"] == 0.01
    types = {n: json.loads((out / n / "adapter_config.json").read_text())["peft_type"] for n in run}
    assert types == {name: method.upper() for name, method in methods.items()}
    assert main(["finetune", *arguments, "--out", str(out), "--resume"]) == 0
    capsys.readouterr()
    written = file.read_text()
    file.write_text(written.replace("4}", "3}"))
    error = failure(capsys, "finetune", *arguments, "--out", out, "--resume")
    file.write_text(written)
    assert "holds another run" in error and "tenants.acme.rank_pattern was" in error and "and is" in error


@pytest.mark.slow
def test_generate_with_adapter_weights(mixed, tmp_path, capsys):
    out, _, _ = mixed
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    tenants = ["acme", {"acme": 1.0}, None, {"acme": 0}, {}, {"globex": 0.5, "acme": -1, "hooli": 1}]
    source.write_text("".join(json.dumps({"tenant": t, "prompt": "The house is"}) + "\n" for t in tenants))
    arguments = ["generate", "--adapters", str(out), "--input", str(source), "--output", str(target), "--overwrite"]
    assert main([*arguments, "--max-new-tokens", "4"]) == 0
    answered = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["tenant"] for row in answered] == tenants
    texts = [row["text"] for row in answered]
    assert texts[0] == texts[1] and texts[2] == texts[3] == texts[4]
    for tenant, message in (
        ({"acme": 0.5, "globx": 1}, "did you mean 'globex'?"),
        ({"acme": "much"}, "in.jsonl:1: \"tenant\": the adapter weight of 'acme' must be a finite number, not 'much'"),
        (["acme"], "a row's tenant is a name, None, or a dict of names and adapter weights, not ['acme']"),
    ):
        source.write_text(json.dumps({"tenant": tenant, "prompt": "x"}) + "\n")
        assert message in failure(capsys, *arguments)


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

    assert parser().parse(["generate", "--prompt", "x"]).model is None
    assert tiny_backbone_path().endswith("tiny-books")


@pytest.mark.slow
def test_a_chat_template_is_kept_with_its_adapter(tmp_path, capsys, monkeypatch):
    """Rows of messages of one tenant go through its own template, when it is tuned, evaluated and served."""
    template = tmp_path / "shout.jinja"
    template.write_text("{% for m in messages %}{{ m.content | upper }} {% endfor %}")
    chat = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "captain"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(chat) + "\n")
    tenants = ["--tenant", f"a={tmp_path / 'rows.jsonl'}", "--tenant", f"b={tmp_path / 'rows.jsonl'}"]
    out = tmp_path / "out"
    options = ["--steps", "1", "--rows", "1", "--r", "2", "--out", out]
    missing = failure(capsys, "finetune", *tenants, "--chat-template", "b=nowhere.jinja", *options)
    assert "nowhere.jinja is not a file" in missing
    arguments = [*tenants, "--chat-template", f"b={template}", *options]
    assert main(["finetune", *map(str, arguments)]) == 0
    assert (out / "b" / "chat_template.jinja").read_text() == template.read_text()
    assert not (out / "a" / "chat_template.jinja").exists()

    seen = {}

    def complete(backbone, tokenizers, prompts, **options):
        texts = [tokenizer.decode(ids) for tokenizer, ids in zip(tokenizers, prompts, strict=True)]
        seen.update(zip(options["tenants"], texts, strict=True))
        return original(backbone, tokenizers, prompts, **options)

    original = generate_module.complete
    monkeypatch.setattr(generate_module, "complete", complete)
    rows = [{"tenant": tenant, "messages": chat["messages"][:1]} for tenant in ("b", None, "a")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "answers.jsonl")]
    assert main(["generate", "--adapters", str(out), *files, "--max-new-tokens", "2"]) == 0
    assert seen == {"b": "HELLO ", None: "User: hello\nAssistant:", "a": "User: hello\nAssistant:"}
    assert main(["evaluate", "--adapters", str(out), *tenants, "--max-new-tokens", "2"]) == 0


def test_weights_in_few_bits(tuned, capsys):
    out, _ = tuned
    arguments = ["--adapters", str(out), "--quantize", "int8", "--tenant", "acme", "--prompt", "The house is"]
    assert main(["generate", *arguments, "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.strip()
