"""The rows of `benchmarks/real.py`: tenants' files, and a check that both sides make the same tokens of them."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import peft_loop

CHAT = "chat"  # the name of the tenant whose rows are chats
ANSWERS = (1, 6)  # of a chat: it has 2 to 12 turns

Row = dict[str, Any]


def rows_of_folder(folder: Path, names: Sequence[str], tenants: int, most: int) -> dict[str, list[Row]]:
    """The first rows of each NAME/train.jsonl; fewer tasks than tenants give later rows to further tenants."""
    there = sorted(path.parent.name for path in folder.glob("*/train.jsonl"))
    if missing := set(names) - set(there):
        raise SystemExit(f"{folder} has no {', '.join(sorted(missing))}; it has {', '.join(there)}")
    if not there:
        raise SystemExit(f"{folder} has no NAME/train.jsonl")
    found = {}
    for tenant, (turn, name) in zip(range(tenants), _turns(names or there), strict=False):
        lines = (folder / name / "train.jsonl").read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
        start = turn * most % len(rows)
        found[f"tenant{tenant}-{name}"] = (rows[start:] + rows[:start])[:most]
    return found


def made_rows(names: Sequence[str], tenants: int, most: int) -> dict[str, list[Row]]:
    """Rows of the quickstart's tenants. A prompt is one to eight stories, and the response is about the last one."""
    from para_jax import quickstart_rows
    from para_jax.data.quickstart import JOBS

    if unknown := set(names) - set(JOBS):
        raise SystemExit(f"no task is called {', '.join(sorted(unknown))}; there are {', '.join(JOBS)}")
    found = {}
    for tenant, (turn, name) in zip(range(tenants), _turns(names or tuple(JOBS)), strict=False):
        rows, draw = quickstart_rows(seed=turn, train=most)[0][name], random.Random(tenant)
        stories = [[rows[i - j]["prompt"] for j in range(draw.randint(0, 7), -1, -1)] for i in range(len(rows))]
        found[f"tenant{tenant}-{name}"] = [
            {"prompt": " ".join(told), "response": row["response"]} for told, row in zip(stories, rows, strict=True)
        ]
    return found


def _turns(names: Sequence[str]) -> Iterator[tuple[int, str]]:
    """The names again and again, each with how often it came before."""
    turn = 0
    while True:
        yield from ((turn, name) for name in names)
        turn += 1


def chats_of(rows: Sequence[Row]) -> list[Row]:
    """Consecutive rows joined into chats of mixed lengths.

    >>> [len(chat["messages"]) for chat in chats_of([{"prompt": "Who?", "response": "You."}] * 12)]
    [8, 8, 2, 6]
    """
    draw, waiting, chats = random.Random(0), list(rows), []
    while waiting:
        count = draw.randint(*ANSWERS)
        some, waiting = waiting[:count], waiting[count:]
        turns = (("user", "prompt"), ("assistant", "response"))
        messages = [{"role": role, "content": row[key].strip()} for row in some for role, key in turns]
        chats.append({"messages": messages})
    return chats


def preparing(model: str) -> dict[str, Any]:
    """What a worker does before anything is measured: it also imports what the commands will, so that Python's byte
    code is written."""
    import jax
    import peft  # noqa: F401
    from transformers import AutoTokenizer

    import para_jax.training.loop  # noqa: F401
    from para_jax import BackboneConfig, LoraConfig, ParaConfig, load_tokenizer, read_examples

    config, theirs = BackboneConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model)

    def write(path: str, rows: list[Row], longest: int) -> dict[str, Any]:
        """Writes the rows that are short enough, and says what they are in tokens."""
        _write(Path(path), rows)
        limit = min(longest, config.max_position_embeddings)
        lengths = [len(row.ids) for row in peft_loop.read(path, theirs)]
        _write(Path(path), [row for row, length in zip(rows, lengths, strict=True) if length <= limit])
        kept, tokenizer = peft_loop.read(path, theirs), load_tokenizer(model)
        ours = read_examples(
            path, tokenizer, config.eos_token_ids, one_pass=True
        )  # as LoRA, which has the chats, reads
        check(ours, kept)
        lengths = [len(row.ids) for row in kept]
        return {
            "rows": len(kept),
            "left_out": len(rows) - len(kept),
            "our_rows": len(ours),
            "tokens": {"least": min(lengths), "median": statistics.median(lengths), "most": max(lengths)},
            "targets": sum(label != peft_loop.NO_LOSS for row in kept for label in row.labels),
        }

    def facts() -> dict[str, Any]:
        para, sites = ParaConfig(), list(ParaConfig().target_modules)
        one = LoraConfig(r=1, target_modules=tuple(sites)).size(config)
        r = max(1, round(para.size(config) / one))
        return {
            "backend": jax.default_backend(),
            "devices": [device.device_kind for device in jax.local_devices()],
            "backbone": config.size,
            "parameters": {"para": para.size(config), "same-size": r * one, "r8": LoraConfig().size(config)},
            "same_size": {"r": r, "sites": sites},
        }

    return {"write": write, "facts": facts}


def _write(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def check(ours: Sequence[Any], theirs: Sequence[peft_loop.Row]) -> None:
    """Exits unless our examples of a file and peft's rows of it have the same ids, and the same targets.

    Our examples of one chat share its place in the file: each is a turn with all that is before it, or the whole chat.
    """
    places: dict[str, list[Any]] = {}
    for example in ours:
        places.setdefault(example.place, []).append(example)
    if len(places) != len(theirs):
        raise SystemExit(f"{len(places)} rows of ours, and {len(theirs)} of peft's")
    for (place, examples), row in zip(places.items(), theirs, strict=True):
        labels = [peft_loop.NO_LOSS] * len(row.ids)
        for ids, targets in map(learnt, examples):
            if row.ids[: len(ids)] != ids:
                raise SystemExit(f"{place}: not the same tokens")
            for i, target in targets.items():
                labels[i] = target
        if row.labels != labels:
            raise SystemExit(f"{place}: not the same targets")


def learnt(example: Any) -> tuple[list[int], dict[int, int]]:
    """The ids of one of our examples, and by place those that it learns."""
    ids, targets = [int(x) for x in example.ids], [int(x) for x in example.targets]
    return [*ids, targets[-1]], {i + 1: target for i, target in enumerate(targets) if target >= 0}
