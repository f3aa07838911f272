"""What a method has to provide; `adapters/registry.py` has the methods there are."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from para_jax.adjustment import Adjustment
from para_jax.errors import ParaJaxError, unknown
from para_jax.families.architecture import Axes, Site

if TYPE_CHECKING:
    from flax import nnx
    from jax import Array
    from jaxtyping import Bool, Float, Int


# Modules of a causal language model that are outside its layers.
OUTSIDE = ("embed_tokens", "lm_head")


class BackboneShape(Protocol):
    """What an adapter needs to know of a backbone; `BackboneConfig` is one."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def sites(self) -> Mapping[str, Site]: ...
    @property
    def linear_sites(self) -> Mapping[str, Site]: ...
    def __hash__(self) -> int: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompt:
    """What an adapter may read of a prompt at one layer, for one sequence or with a leading batch axis.

    Attributes:
      hidden_td: the layer's input, the residual stream.
      normed_td: the same behind the layer's first norm.
      mask_t: which tokens are the prompt's; the others may hold anything.
    """

    hidden_td: Float[Array, "*b t d"]
    normed_td: Float[Array, "*b t d"]
    mask_t: Bool[Array, "*b t"]


class AdapterLayer(Protocol):
    """One layer's trained weights of one tenant, a Flax module; stacked over layers and tenants by `vmap`."""

    def prepare(self, prompt: Prompt, layer: int | Int[Array, ""]) -> Adjustment:
        """Reads the prompt at layer number `layer`, which is a Python int where layers are unrolled."""
        ...


class MethodConfig(Protocol):
    """The hyper-parameters of a method: a frozen dataclass with PEFT's field names where PEFT has one.

    Attributes:
      reads_prompt: whether `prepare` reads the prompt. Where it does not, an adapter is the same for all prompts, and
        all turns of a chat are learnt in one pass.
      decays_to: what weight decay pulls weights to: with all of them there, the adapter is the identity.
      dropout: the share of a site's inputs that is dropped while training.
      peft_type: what PEFT calls the method, if it has it. Its config is then a `PeftMethod`.
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
        """The targeted sites of each layer, and what is particular to each.

        Raises ParaJaxError for a target that matches nothing.
        """
        ...

    def layer(self, shape: BackboneShape, rngs: nnx.Rngs, layer: Int[Array, ""]) -> AdapterLayer:
        """Fresh weights of layer number `layer`. Of an array's shape nothing depends on it."""
        ...

    def size(self, shape: BackboneShape) -> int:
        """The number of parameters of an adapter."""
        ...

    @classmethod
    def usual(cls, shape: BackboneShape) -> Mapping[str, MethodConfig]:
        """The settings that people use, by a name for people; `para-jax methods` prints what they cost."""
        ...

    def axes(self, name: str) -> Axes:
        """The logical axes of one of a layer's arrays, by its name, in front of which others may stand; (), if none of
        them is split."""
        ...

    def __hash__(self) -> int: ...


class Place(NamedTuple):
    """Where one of PEFT's tensors, and of which shape, is in an adapter's stacked weights."""

    leaf: str
    part: tuple[Any, ...]
    shape: tuple[int, int]


class Joint(NamedTuple):
    """A module of one layer that transformers has, and those of its sites that are adapted.

    Attributes:
      sites: what `PeftMethod.modules` says of each.
      rows: the outputs of each site among the module's.
      outputs: how many outputs the module has.
    """

    layer: int
    module: str
    sites: Mapping[str, Any]
    rows: Mapping[str, slice]
    outputs: int


# One module's tensors, by what PEFT's names have behind the module's path.
Tensors = Mapping[str, np.ndarray]


class PeftMethod(MethodConfig, Protocol):
    """A method that PEFT has too: how its adapters are written, read, merged, and joined where PEFT has one module.

    Attributes:
      peft_lacks: options that PEFT does not have.
      peft_requires: options that PEFT may leave out, and that have to be there.
      peft_choices: for an option, the values that are implemented.
    """

    peft_lacks: ClassVar[tuple[str, ...]]
    peft_requires: ClassVar[tuple[str, ...]]
    peft_choices: ClassVar[Mapping[str, tuple[Any, ...]]]

    def places(self, layer: int, site: str, shape: BackboneShape) -> dict[str, Place]:
        """PEFT's tensors of one module, by what their names have behind the module's path."""
        ...

    def in_peft(self, layers: Any, leaves: Tensors) -> tuple[PeftMethod, Tensors]:
        """The config and the weights by name of an adapter in the form that PEFT has for it."""
        ...

    def peft_options(self) -> dict[str, Any]:
        """Its part of adapter_config.json: PEFT's keys only."""
        ...

    def of_modules(self, modules: Sequence[Mapping[str, Any]], shape: BackboneShape) -> Any:
        """A config like this one of these modules of each layer: their names, or paths where layers differ."""
        ...

    def joined(self, joint: Joint, parts: Mapping[str, Tensors]) -> tuple[Any, Tensors]:
        """What `modules` says of a fused module, and its tensors, from those of its sites."""
        ...

    def cut(self, joint: Joint, tensors: Tensors) -> dict[str, Tensors] | None:
        """Each site's tensors from those of its fused module; None if they have not the form for it."""
        ...

    def merged(self, weight: np.ndarray, tensors: Tensors, module: Any) -> np.ndarray:
        """A projection's float32 weight (outputs, inputs), or its bias (outputs,), with the adapter in it."""
        ...


def sites_by_name(modules: Sequence[Mapping[str, Any]], shape: BackboneShape) -> tuple[str, ...]:
    """The names of the sites that all layers have, or the paths of all if layers differ."""
    sites = [site for site in shape.sites if any(site in own for own in modules)]
    if all(len(own) == len(sites) for own in modules):
        return tuple(sites)
    return tuple(site_path(i, site, shape) for i, own in enumerate(modules) for site in sites if site in own)


def of_layer(
    by_site: Mapping[str, Array], modules: Sequence[Collection[str]], layer: Int[Array, ""] | int
) -> dict[str, Array]:
    """Those of a layer's arrays that are of its own modules.

    Stacked layers have arrays for the same sites. Where they are scanned, and `layer` is traced, the array of a site
    that the layer does not target is zero.
    """
    found = {}
    for site, x in by_site.items():
        here = [site in own for own in modules]
        if not isinstance(layer, int):
            found[site] = x if all(here) else jnp.where(jnp.array(here)[layer], x, 0)
        elif here[layer]:
            found[site] = x
    return found


def site_path(layer: int, site: str, shape: BackboneShape) -> str:
    """The path of a site from the layers on."""
    return f"layers.{layer}.{shape.sites[site].path}"


M = TypeVar("M", bound=MethodConfig)


def as_targets(target_modules: Iterable[str], option: str = "target_modules") -> tuple[str, ...]:
    """The targets as a tuple. Raises ParaJaxError for a single string, whose letters nobody means, or a repeated name.

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
    """Raises ParaJaxError for a target that is no site of the backbone, or for no target at all."""
    if not target_modules:
        raise ParaJaxError(f"target_modules is empty; choose among {', '.join(shape.sites)}")
    for target in target_modules:
        if target not in shape.sites:
            raise no_site(target, shape)


def no_site(
    entry: str, shape: BackboneShape, option: str = "target_modules", paths: Iterable[str] = ()
) -> ParaJaxError:
    """For an entry of a list of modules that names none of the backbone's sites, or of these paths if it is one."""
    if entry.rpartition(".")[2] in OUTSIDE:
        return ParaJaxError(
            f"{option} has {entry}; embeddings and the output layer are the backbone's and not adapted. Take it out; "
            f"there are {', '.join(shape.sites)}"
        )
    known = paths if "." in entry and paths else shape.sites
    return ParaJaxError(f"{unknown(f'entry of {option}', entry, known)}. Take it out, or name one of these")


def from_fields(config: type[M], fields: Mapping[str, Any]) -> M:
    """A method's config with these fields as JSON has them. Raises ParaJaxError for an unknown option.

    >>> from para_jax import LoraConfig
    >>> from_fields(LoraConfig, {"r": 4, "rank_pattern": {"q_proj": 2}}).rank_pattern
    (('q_proj', 2),)
    """
    known = [f.name for f in dataclasses.fields(config)]
    for name in fields:
        if name not in known:
            raise unknown(f"option of method {config.method!r}", name, known)
    return config(**{name: _hashable(value) for name, value in fields.items()})


def _hashable(value: Any) -> Any:
    """JSON's lists as tuples, and its objects as tuples of pairs."""
    if isinstance(value, Mapping):
        value = value.items()
    elif not isinstance(value, list | tuple):
        return value
    return tuple(_hashable(item) for item in value)
