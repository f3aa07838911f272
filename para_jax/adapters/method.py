"""What a method implements (`MethodConfig`, `AdapterLayer`), and the view of a backbone that it gets (`BackboneShape`).

`adapters/registry.py` lists the methods.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from para_jax.adjustment import Adjustment
from para_jax.annotations import Array, Bool, Float, Int
from para_jax.errors import ParaJaxError, check_known, unknown
from para_jax.families.architecture import Axes, Site, Stack

if TYPE_CHECKING:
    from flax import nnx

# The modules of a causal language model outside its layers.
OUTSIDE = ("embed_tokens", "lm_head", "wte", "wpe", "embed_in", "embed_out", "embed_positions")


class BackboneShape(Protocol):
    """The sizes of a backbone that adapters depend on. `BackboneConfig` implements it.

    Attributes:
      layers_path: the path of the list of layers, with which the names of modules begin.
    """

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def stacks(self) -> tuple[Stack, ...]: ...
    @property
    def layers_path(self) -> str: ...
    @property
    def sites(self) -> Mapping[str, Site]: ...
    @property
    def linear_sites(self) -> Mapping[str, Site]: ...
    def sites_of(self, layer: int) -> Mapping[str, Site]: ...
    def __hash__(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class ShapeView:
    """A backbone's shape with something else about it; subclasses say what."""

    shape: BackboneShape

    @property
    def hidden_size(self) -> int:
        return self.shape.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return self.shape.num_hidden_layers

    @property
    def layers_path(self) -> str:
        return self.shape.layers_path

    @property
    def sites(self) -> Mapping[str, Site]:
        return self.shape.sites

    @property
    def stacks(self) -> tuple[Stack, ...]:
        return self.shape.stacks

    @property
    def linear_sites(self) -> Mapping[str, Site]:
        return {name: site for name, site in self.sites.items() if site.linear}

    def sites_of(self, layer: int) -> Mapping[str, Site]:
        return self.shape.sites_of(layer)


@dataclasses.dataclass(frozen=True)
class StackShape(ShapeView):
    """The shape of a backbone, for the layers of one stack: `sites` are theirs."""

    stack: Stack

    @property
    def sites(self) -> Mapping[str, Site]:
        return self.shape.sites_of(self.stack.layers[0])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompt:
    """The hidden states of a prompt at one layer, for one sequence or with a leading batch axis.

    Attributes:
      hidden_td: the layer's input, the residual stream.
      normed_td: the layer's input after its first norm.
      mask_t: True for the prompt's tokens; all others may hold any values.
    """

    hidden_td: Float[Array, "*b t d"]
    normed_td: Float[Array, "*b t d"]
    mask_t: Bool[Array, "*b t"]


class AdapterLayer(Protocol):
    """One layer's trained weights of one tenant, a Flax module. `vmap` stacks it over layers and tenants."""

    def prepare(self, prompt: Prompt, layer: int | Int[Array, ""]) -> Adjustment:
        """Reads the prompt at layer number `layer`, a Python int if layers are unrolled."""


class MethodConfig(Protocol):
    """The hyper-parameters of a method: a frozen dataclass. Fields that PEFT has too have PEFT's names.

    Attributes:
      reads_prompt: whether `prepare` reads the prompt. If not, an adapter is the same for all prompts, and all turns of
        a chat are trained in one pass.
      decays_to: the value that weight decay pulls weights to. With all weights at this value, the adapter is the
        identity.
      dropout: the dropout rate of a site's inputs in training.
      peft_type: PEFT's name of the method, or "". If PEFT has the method, its config is a `PeftMethod`.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    method: ClassVar[str]
    reads_prompt: ClassVar[bool]
    peft_type: ClassVar[str]

    @property
    def decays_to(self) -> float: ...
    @property
    def dropout(self) -> float: ...

    def modules(self, shape: BackboneShape) -> tuple[Mapping[str, Any], ...]:
        """The targeted sites of each layer, each with its own settings.

        Raises ParaJaxError for a target that matches nothing.
        """

    def layer(self, shape: BackboneShape, rngs: nnx.Rngs, layer: Int[Array, ""]) -> AdapterLayer:
        """Fresh weights of layer number `layer`, for the sites of `shape`. Array shapes do not depend on `layer`.

        If layers have different shapes, `shape` is a `StackShape`.
        """

    def size(self, shape: BackboneShape) -> int:
        """The number of parameters of an adapter."""

    @classmethod
    def usual(cls, shape: BackboneShape) -> Mapping[str, MethodConfig]:
        """Common settings, by a readable name. `para-jax methods` prints their costs."""

    def axes(self, name: str) -> Axes:
        """The logical axes of one of a layer's arrays, by its name; () if none is sharded.

        The array may have further leading axes.
        """

    def __hash__(self) -> int: ...


class Place(NamedTuple):
    """Where one of PEFT's tensors is in an adapter's stacked weights, and its shape."""

    leaf: str
    part: tuple[Any, ...]
    shape: tuple[int, int]

    def in_stack(self, shape: BackboneShape) -> Place:
        """The place if each stack of layers has its own arrays; `part` begins with the number of the layer."""
        layer, *rest = self.part
        stack = next(stack for stack in shape.stacks if layer in stack.layers)
        leaf = f"{stack.name}.{self.leaf}" if stack.name else self.leaf
        return self._replace(leaf=leaf, part=(stack.layers.index(layer), *rest))


class Joint(NamedTuple):
    """One of transformers' modules in one layer, and its adapted sites.

    Attributes:
      sites: the adapted sites with their settings, as `PeftMethod.modules` returns them.
      rows: the numbers of each site's outputs among those of the module.
      outputs: the number of outputs of the module.
    """

    layer: int
    module: str
    sites: Mapping[str, Any]
    rows: Mapping[str, np.ndarray]
    outputs: int


# One module's tensors, by the part of PEFT's names after the module's path.
Tensors = Mapping[str, np.ndarray]


class PeftMethod(MethodConfig, Protocol):
    """A method that PEFT has too: how its adapters are written, read, merged, and joined for fused projections.

    Attributes:
      peft_lacks: options that PEFT does not have.
      peft_requires: options that are optional in PEFT and required here.
      peft_choices: for an option, the values that are implemented.
    """

    peft_lacks: ClassVar[tuple[str, ...]]
    peft_requires: ClassVar[tuple[str, ...]]
    peft_choices: ClassVar[Mapping[str, tuple[Any, ...]]]

    def places(self, layer: int, site: str, shape: BackboneShape) -> dict[str, Place]:
        """PEFT's tensors of one module, by the part of their names after the module's path."""

    def in_peft(self, layers: Any, leaves: Tensors) -> tuple[PeftMethod, Tensors]:
        """The config of an adapter in PEFT's form, and its weights by name."""

    def peft_options(self) -> dict[str, Any]:
        """The method's options in adapter_config.json: PEFT's keys only."""

    def of_modules(self, modules: Sequence[Mapping[str, Any]], shape: BackboneShape) -> Any:
        """A config like this one that targets these modules of each layer: by name, or by path if layers differ."""

    def joined(self, joint: Joint, parts: Mapping[str, Tensors]) -> tuple[Any, Tensors]:
        """The settings and the tensors of a fused module, from the tensors of its sites."""

    def cut(self, joint: Joint, tensors: Tensors) -> dict[str, Tensors] | None:
        """Each site's tensors, from those of its fused module; None if they cannot be split into these sites."""

    def merged(self, weight: np.ndarray, tensors: Tensors, module: Any) -> np.ndarray:
        """A projection's float32 weight (outputs, inputs) or bias (outputs,), with the adapter merged into it."""


def sites_by_name(modules: Sequence[Mapping[str, Any]], shape: BackboneShape) -> tuple[str, ...]:
    """The names of the targeted sites if all layers have the same ones, else their paths."""
    sites = [site for site in shape.sites if any(site in layer for layer in modules)]
    if all(len(layer) == sum(site in shape.sites_of(i) for site in sites) for i, layer in enumerate(modules)):
        return tuple(sites)
    return tuple(site_path(i, site, shape) for i, layer in enumerate(modules) for site in sites if site in layer)


def targeted_arrays(
    by_site: Mapping[str, Array], modules: Sequence[Collection[str]], layer: Int[Array, ""] | int
) -> dict[str, Array]:
    """The arrays of the sites that a layer targets.

    Stacked layers have arrays for the same sites. If `layer` is traced, the arrays of sites that the layer does not
    target are zero.
    """
    arrays = {}
    for site, x in by_site.items():
        targeted = [site in sites for sites in modules]
        if not isinstance(layer, int):
            arrays[site] = x if all(targeted) else jnp.where(jnp.array(targeted)[layer], x, 0)
        elif targeted[layer]:
            arrays[site] = x
    return arrays


def site_path(layer: int, site: str, shape: BackboneShape) -> str:
    """The path of a site, starting at the list of layers."""
    return f"{shape.layers_path.rpartition('.')[2]}.{layer}.{shape.sites_of(layer)[site].path}"


M = TypeVar("M", bound=MethodConfig)


def as_targets(target_modules: Iterable[str], option: str = "target_modules") -> tuple[str, ...]:
    """The targets as a tuple. Raises ParaJaxError for a single string or a repeated name.

    >>> as_targets(["q_proj", "v_proj"])
    ('q_proj', 'v_proj')
    """
    if isinstance(target_modules, str):
        raise ParaJaxError(f"{option} is a list of names; write [{target_modules!r}]")
    targets = tuple(target_modules) if isinstance(target_modules, Iterable) else (target_modules,)
    for target in targets:
        if not isinstance(target, str):
            raise ParaJaxError(f"{option} must be names of modules, not {target!r}")
    repeated = sorted({target for target in targets if targets.count(target) > 1})
    if repeated:
        raise ParaJaxError(f"{option} names {', '.join(repeated)} more than once")
    return targets


def check_targets(target_modules: tuple[str, ...], shape: BackboneShape) -> None:
    """Raises ParaJaxError if there is no target, or a target is not a site of the backbone."""
    if not target_modules:
        raise ParaJaxError(f"target_modules is empty; choose among {', '.join(shape.sites)}")
    known = {site for layer in range(shape.num_hidden_layers) for site in shape.sites_of(layer)}
    for target in target_modules:
        if target not in known:
            raise no_site(target, shape)


def no_site(
    entry: str, shape: BackboneShape, option: str = "target_modules", paths: Iterable[str] = ()
) -> ParaJaxError:
    """The error for an entry that matches none of the backbone's sites; a dotted one is compared with `paths`."""
    if entry.rpartition(".")[2] in OUTSIDE:
        return ParaJaxError(
            f"{option} has {entry}; embeddings and the output layer cannot be adapted. Take it out; "
            f"there are {', '.join(shape.sites)}"
        )
    known = paths if "." in entry and paths else shape.sites
    return ParaJaxError(f"{unknown(f'entry of {option}', entry, known)}. Take it out, or name one of these")


def from_fields(config: type[M], fields: Mapping[str, Any]) -> M:
    """A method's config from JSON fields. Raises ParaJaxError for an unknown option.

    >>> from para_jax import LoraConfig
    >>> from_fields(LoraConfig, {"r": 4, "rank_pattern": {"q_proj": 2}}).rank_pattern
    (('q_proj', 2),)
    """
    known = [f.name for f in dataclasses.fields(config)]
    check_known(f"option of method {config.method!r}", fields, known)
    return config(**{name: _hashable(value) for name, value in fields.items()})


def _hashable(value: Any) -> Any:
    """Converts JSON lists to tuples, and JSON objects to tuples of pairs."""
    if isinstance(value, Mapping):
        value = value.items()
    elif not isinstance(value, list | tuple):
        return value
    return tuple(_hashable(item) for item in value)
