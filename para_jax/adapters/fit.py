"""Checks that the tensors of a PEFT adapter match its config and the backbone, and finds the cause if they do not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from para_jax.adapters.method import OUTSIDE, BackboneShape
from para_jax.adapters.names import Names
from para_jax.errors import ParaJaxError

MERGE = "merge the adapter in peft and load the merged model as the backbone"
_OUTSIDE = re.compile(rf"(?:.*\.)?({'|'.join(OUTSIDE)})\..*")
_PARTS = re.compile(r".*\b(?:layers|h)\.\d+\.(?P<path>.+?)\.(?:lora_A\.weight|lora_B\.weight|ia3_l)")


class Case(NamedTuple):
    """The tensors of a file, the expected shapes by PEFT's names, and the backbone."""

    names: Names
    shapes: Mapping[str, tuple[int, ...]]
    made_for: str
    backbone: BackboneShape
    vocab_size: int | None

    @property
    def extra(self) -> list[str]:
        return [name for name in self.names.tensors if name not in self.shapes]

    @property
    def missing(self) -> list[str]:
        return [name for name in self.shapes if name not in self.names.tensors]

    @property
    def misshapen(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        there = {name: x.shape for name, x in self.names.tensors.items()}
        return {k: (there[k], here) for k, here in self.shapes.items() if k in there and there[k] != here}


def check_fits(path: Path, case: Case) -> None:
    """Raises ParaJaxError, listing all problems and the likely cause, unless every tensor is as expected."""
    in_file = case.names.in_file
    problems = [f"{name} {list(case.shapes[name])} is missing" for name in case.missing]
    problems += [f"{in_file[name]} is not expected" for name in case.extra]
    misshapen = case.misshapen.items()
    problems += [f"{in_file[name]} is {list(there)} and should be {list(here)}" for name, (there, here) in misshapen]
    if problems:
        why = next(filter(None, (cause(case) for cause in CAUSES)))
        raise ParaJaxError("\n  ".join([f"{path}: {why}", *problems]))


def _not_gathered(case: Case) -> str | None:
    flat = [k for k, x in case.names.tensors.items() if not x.size or (re.search(r"\.lora_[AB]\.", k) and x.ndim < 2)]
    if not flat:
        return None
    return (
        f"{len(flat)} of its tensors are empty or flat, as DeepSpeed ZeRO-3 and FSDP leave them in each process; "
        "gather the weights before they are saved (deepspeed.zero.GatheredParameters), or run zero_to_fp32.py on the "
        "checkpoint"
    )


def _has_embeddings(case: Case) -> str | None:
    found = {k: match[1] for k in case.extra if (match := _OUTSIDE.fullmatch(k))}
    if not found:
        return None
    if adapted := [module for name, module in found.items() if "lora_" in name]:
        modules = " and ".join(dict.fromkeys(adapted))
        return f"it adapts {modules}, which cannot be adapted here; {MERGE}, or tune again without it"
    modules = " and ".join(dict.fromkeys(found.values()))
    tokens = case.names.tensors[next(iter(found))].shape[:1]
    here = case.vocab_size
    without = "save the adapter without them: model.save_pretrained(folder, save_embedding_layers=False)"
    if here is None or not tokens or tokens[0] == here:
        shared = f"it contains the model's {modules}, which all tenants share here"
        return f"{shared}. If they were tuned, {MERGE}; if not, {without}"
    why = (
        f"it contains the model's {modules} of {tokens[0]} tokens, and the backbone has {here}: the model was resized "
        "to its tokenizer (resize_token_embeddings) before it was tuned, and PEFT saved them. "
    )
    merge = f"esize the base model in the same way, {MERGE}"
    return f"{why}R{merge}" if tokens[0] > here else f"{why}If they were not tuned, {without}; else r{merge}"


def _is_dora(case: Case) -> str | None:
    found = any("lora_magnitude_vector" in name for name in case.extra)
    return f"it has DoRA's magnitude vectors, which are not implemented here; {MERGE}" if found else None


def _is_model(case: Case) -> str | None:
    of_peft = re.compile(r".*\.(lora_\w+|ia3_l)(\..*)?")
    found = [k for k in case.extra if k.endswith((".weight", ".bias")) and not of_peft.fullmatch(k)]
    if not found:
        return None
    return (
        f"{len(found)} of its tensors are weights of the model itself, such as {case.names.in_file[found[0]]}: it is "
        "not an adapter but a state dict of the whole model. Save only the adapter: model.save_pretrained(folder)"
    )


def _other_method(case: Case) -> str | None:
    vectors, pairs = (any(part in k for k in case.extra) for part in (".ia3_l", ".lora_"))
    is_ia3 = any(".ia3_l" in k for k in case.shapes)
    if (vectors and not is_ia3) or (pairs and is_ia3):
        there, here = ("IA3", "LORA") if vectors else ("LORA", "IA3")
        return f"its tensors are those of peft_type {there}, and its config has {here}; use the config of the same run"
    return None


def _other_backbone(case: Case) -> str | None:
    def differs(name: str, there: tuple[int, ...], here: tuple[int, ...]) -> bool:
        if len(there) != 2:
            return True
        rank = _rank_axis(name)
        return (there[0] == 1) == (here[0] == 1) if rank is None else there[1 - rank] != here[1 - rank]

    misshapen = any(differs(name, *shapes) for name, shapes in case.misshapen.items())
    if not misshapen and _layers(case.shapes) == _layers(case.names.tensors):
        return None
    return f"it was made for another backbone ({case.made_for}); load the backbone it was tuned on, or tune it again"


def _other_size(case: Case) -> str | None:
    if any(_rank_axis(name) is not None for name in case.misshapen):
        return "r or rank_pattern in its config is not the rank of its tensors; correct it, and lora_alpha too"
    if case.misshapen:
        return "feedforward_modules in its config does not match the shapes of its tensors; correct it"
    return None


def _other_targets(case: Case) -> str | None:
    """Modules that are only in the config, or only in the file."""
    extra, missing = _paths(case.extra) - _paths(case.shapes), _paths(case.shapes) - _paths(case.names.tensors)
    sites = {site.path: name for name, site in case.backbone.sites.items()}
    if unknown := sorted(extra - set(sites)):
        return f"it adapts {', '.join(unknown)}, which is not a projection that can be adapted here; {MERGE}"
    wrong = [f"lacks {sites[path]}, which the file has: add it" for path in sorted(extra)]
    wrong += [f"has {sites[path]}, which the file lacks: take it out" for path in sorted(missing)]
    return f"target_modules in its config {' and '.join(wrong)}" if wrong else None


def _other_names(case: Case) -> str | None:
    if len(case.missing) < len(case.shapes) or not case.extra:
        return None
    return (
        f"its tensors have names of another kind of model, such as {case.names.in_file[case.extra[0]]}; names for this "
        f"backbone are like {case.missing[0]}. Load the backbone it was tuned on ({case.made_for})"
    )


def _incomplete(case: Case) -> str:
    if case.missing:
        return (
            f"it has {len(case.shapes) - len(case.missing)} of the {len(case.shapes)} tensors that its config needs: "
            "it is incomplete, or the part of one process; copy the whole adapter"
        )
    return "its tensors do not fit its config: remove what only target_modules or only the file has"


CAUSES: tuple[Callable[[Case], str | None], ...] = (
    _not_gathered, _has_embeddings, _is_dora, _is_model, _other_method, _other_names, _other_backbone, _other_size,
    _other_targets, _incomplete,
)  # fmt: skip


def _rank_axis(name: str) -> int | None:
    return {"lora_A": 0, "lora_B": 1}.get(name.split(".")[-2])


def _paths(names: Iterable[str]) -> set[str]:
    """The paths, within a layer, of the modules that these tensors belong to."""
    return {match["path"] for name in names if (match := _PARTS.fullmatch(name))}


def _layers(names: Iterable[str]) -> int:
    """The minimum number of layers of a backbone with modules of these names."""
    numbers = (re.search(r"\.(?:layers|h)\.(\d+)\.", name) for name in names)
    return max((int(number[1]) + 1 for number in numbers if number), default=0)
