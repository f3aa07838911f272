"""FanLoRA (Tian et al., EMNLP 2024 industry track): LoRA on only the most important modules of each layer.

`para_jax.importance` scores the modules once, on a LoRA adapter tuned on every linear module. The resulting adapter is
LoRA, and PEFT opens it as LoRA.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from para_jax.adapters.lora import LoraConfig, Module
from para_jax.adapters.method import BackboneShape, from_fields, site_path
from para_jax.config import read_json
from para_jax.errors import ParaJaxError, check_known, unknown
from para_jax.files import write_json

_PATH = re.compile(r"(?:.*\.)?(layers\.\d+(?:\.\w+)+)")


@dataclass(frozen=True)
class FanLoraConfig(LoraConfig):
    """A FanLoRA setting: LoRA's hyper-parameters, with different modules in each layer.

    `target_modules` holds only full paths, such as `layers.0.self_attn.q_proj`; a prefix before `layers` is removed.
    The other fields are those of `LoraConfig`. A saved adapter loads as LoRA on the same modules.

    Raises ParaJaxError for an empty target_modules, or a target that is not such a path.

    >>> from para_jax import BackboneConfig, tiny_backbone_path
    >>> shape = BackboneConfig.from_pretrained(tiny_backbone_path())
    >>> config = FanLoraConfig.of([["v_proj"], ["v_proj"], ["up_proj"], ["k_proj", "up_proj"]], shape, r=4)
    >>> config.kept(shape)[2:]
    (('up_proj',), ('k_proj', 'up_proj'))
    >>> config.target_modules[0], config.size(shape)
    ('layers.0.self_attn.v_proj', 12288)
    """

    method: ClassVar[str] = "fanlora"

    target_modules: str | tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.target_modules, list | tuple) or not self.target_modules:
            raise ParaJaxError(
                "a FanLoraConfig names the modules of each layer: target_modules is a list of paths such as "
                "'layers.0.self_attn.q_proj'. para-jax fanlora makes one, and FanLoraConfig.of takes names by layer"
            )
        super().__post_init__()
        found = [_PATH.fullmatch(entry) if isinstance(entry, str) else None for entry in self.target_modules]
        for entry, match in zip(self.target_modules, found, strict=True):
            if match is None:
                raise ParaJaxError(
                    f"target_modules of a FanLoraConfig has {entry!r}, which is not the path of one module, such as "
                    "'layers.0.self_attn.q_proj'; with names for all layers, the method is lora"
                )
        object.__setattr__(self, "target_modules", tuple(match[1] for match in found if match))

    @classmethod
    def of(cls, kept: Sequence[Sequence[str]], shape: BackboneShape, **options: Any) -> FanLoraConfig:
        """The setting that keeps these sites of each layer. `options` are the other fields.

        Raises ParaJaxError for an unknown site, or if `kept` does not have one entry for each layer.
        """
        if len(kept) != shape.num_hidden_layers:
            raise ParaJaxError(f"kept has entries for {len(kept)} layers; the backbone has {shape.num_hidden_layers}")
        for i, layer in enumerate(kept):
            check_known("module", layer, _linear_sites(shape, i))
        return cls(
            target_modules=tuple(site_path(i, s, shape) for i, layer in enumerate(kept) for s in layer), **options
        )

    def kept(self, shape: BackboneShape) -> tuple[tuple[str, ...], ...]:
        """The kept sites of each layer, in the backbone's order."""
        return tuple(tuple(layer) for layer in self.modules(shape))

    def modules(self, shape: BackboneShape) -> tuple[Mapping[str, Module], ...]:
        layers = shape.num_hidden_layers
        paths = {site_path(i, site, shape) for i in range(layers) for site in _linear_sites(shape, i)}
        for target in self.target_modules:
            if target not in paths:
                raise ParaJaxError(
                    f"{unknown('module of a FanLoRA setting', target, paths)}. The backbone has {layers} layers; a "
                    "setting is for the backbone that was scored, or one with the same layers"
                )
        return super().modules(shape)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Writes a JSON file with `"method": "fanlora"` and every field, atomically.

        Raises ParaJaxError if the file exists and `overwrite` is False, or it cannot be written.
        """
        path = Path(path)
        if path.exists() and not overwrite:
            raise ParaJaxError(f"{path} exists; choose another name, or pass overwrite")
        write_json(path, {"method": self.method, **dataclasses.asdict(self)})

    @classmethod
    def usual(cls, shape: BackboneShape) -> Mapping[str, LoraConfig]:
        """Two modules in each layer.

        The most important modules are known only after a run. Here layers take the modules in turn, so that the cost is
        an average over modules.
        """
        sites = [_linear_sites(shape, i) for i in range(shape.num_hidden_layers)]
        kept = [[own[(2 * i + j) % len(own)] for j in (0, 1)] for i, own in enumerate(sites)]
        return {"fanlora r=8, 2 modules a layer": cls.of(kept, shape, r=8)}

    @classmethod
    def load(cls, path: str | Path) -> FanLoraConfig:
        """Reads a file of `save`. Raises ParaJaxError for another kind of file, or an unknown option."""
        try:
            fields = read_json(Path(path))
        except OSError as error:
            raise ParaJaxError(
                f"{path} could not be read: {error}; give the fanlora.json of para-jax fanlora"
            ) from error
        if fields.pop("method", None) != cls.method:
            raise ParaJaxError(f'{path} is not a FanLoRA setting: it has no "method": "{cls.method}"')
        try:
            return from_fields(cls, fields)
        except (TypeError, ValueError) as error:  # ParaJaxError is a ValueError
            raise ParaJaxError(f"{path}: {error}") from error


def _linear_sites(shape: BackboneShape, layer: int) -> list[str]:
    return [name for name, site in shape.sites_of(layer).items() if site.linear]
