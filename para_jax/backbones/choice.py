"""Which attention kernel (kernels.py) a backbone uses: the device's own, if its compiler takes it."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from para_jax.backbones.attention import Seen
from para_jax.backbones.kernels import LANES, TILE, Kernel, prompt_attention
from para_jax.backbones.options import cuda_capability
from para_jax.errors import ParaJaxError, unknown
from para_jax.probing import refusal, versions

if TYPE_CHECKING:
    from jax.stages import Traced

    from para_jax.config import BackboneConfig

OWN: dict[str, Kernel] = {"gpu": "cudnn", "tpu": "splash"}
# Tokens of the rows that kernels are tried with: for splash, rows of small tiles and of large ones.
LENGTHS = {"cudnn": (2 * TILE,), "splash": (2 * LANES, 2 * TILE)}


class Choice(NamedTuple):
    """The kernel that is used, and why it is this one, in words.

    Attributes:
      refused: whether it stands in for a kernel that does not compile.
    """

    kernel: Kernel
    why: str
    refused: bool = False


def choose(name: str, config: BackboneConfig, dtype: jnp.dtype, device: Any = None) -> Choice:
    """The kernel of this name, or with "auto" the one for a device: by default the one that JAX runs on.

    A kernel is compiled before it is chosen, forward and backward, with this model's windows, heads and dtype
    (`probing.refusal` keeps the answer). With "auto" one that does not compile is replaced by plain attention, which a
    warning of `logging` says. On a CPU nothing is compiled.

    Raises ParaJaxError for an unknown name, or a kernel that cannot compute this backbone here.
    """
    if name not in ("auto", *get_args(Kernel)):
        raise unknown("attention", name, ("auto", *get_args(Kernel)))
    device = jax.local_devices()[0] if device is None else device
    wanted = OWN.get(device.platform, "plain") if name == "auto" else cast(Kernel, name)
    lacks = _lacks(wanted, config, dtype, device)
    failed = "" if lacks or wanted == "plain" or device.platform == "cpu" else _fails(wanted, config, dtype, device)
    if lacks or failed:
        why = f"attention={wanted!r} {lacks or failed}"
        if name != "auto":
            raise ParaJaxError(f"{why}; choose attention='plain' or 'auto'")
        if failed:
            _warn(f"{why}; attention='plain' is used instead")
        return Choice("plain", why, bool(failed))
    if name != "auto":
        return Choice(wanted, "asked for")
    return Choice(wanted, f"compiles for {device.device_kind}" if wanted != "plain" else "a CPU has no other")


_warned: set[str] = set()


def _warn(line: str) -> None:
    """Once: a process may build a model several times."""
    if line not in _warned:
        _warned.add(line)
        logging.getLogger(__name__).warning("%s", line)


def _lacks(kernel: Kernel, config: BackboneConfig, dtype: jnp.dtype, device: Any) -> str:
    """What keeps a kernel from computing this backbone on a device, as far as it is known; or nothing."""
    if kernel == "splash":
        return "runs on TPUs" if device.platform == "gpu" else ""
    if kernel == "plain":
        return ""
    if config.attn_logit_softcapping is not None:
        return "has no soft-capping"
    if dtype != jnp.bfloat16:
        return f"has no {dtype}, only bfloat16"
    if device.platform != "gpu":
        return f"runs on NVIDIA GPUs, not on {device.platform}"
    capability = cuda_capability(device)
    if capability is None:
        return "runs on NVIDIA GPUs"
    if capability < (8, 0):
        return "wants an Ampere GPU or a later one"
    most = 256 if capability >= (9, 0) else 128
    fits = config.head_dim % 8 == 0 and config.head_dim <= most
    return "" if fits else f"takes heads of up to {most} features, by eights"


def _fails(kernel: Kernel, config: BackboneConfig, dtype: jnp.dtype, device: Any) -> str:
    """What the device's compiler says of a kernel, with the versions; nothing, if it compiles."""
    about = {
        "windows": sorted({kind.window or 0 for kind in config.attention_kinds}),
        "heads": [config.num_key_value_heads, config.num_attention_heads],
        "head_dim": config.head_dim,
        "softcap": config.attn_logit_softcapping,
        "dtype": str(dtype),
        "lengths": LENGTHS[kernel],
    }
    found = refusal(f"attention={kernel}", about, partial(_trace, kernel, config, dtype, device), device)
    having = ", ".join(f"{name} {of}" for name, of in versions().items())
    return found and f"does not compile for {device.device_kind} with {having}: {found}"


def _trace(kernel: Kernel, config: BackboneConfig, dtype: jnp.dtype, device: Any) -> Traced:
    """One program with all kinds of attention of a backbone, of packed rows and others, alone and with gradients."""
    k, hd = config.num_key_value_heads, config.head_dim
    g, softcap = config.num_attention_heads // k, config.attn_logit_softcapping
    windows = dict.fromkeys(kind.window for kind in config.attention_kinds)
    # To splash every row is packed.
    forms = [(window, packed) for window in windows for packed in (False, True) if packed or kernel != "splash"]

    def loss(rows: list[tuple[Any, Any, Any]], masks: list[tuple[Any, Any]]) -> Any:
        mixed = [
            prompt_attention(
                kernel, *qkv, Seen(valid, jnp.arange(valid.shape[1]), window, segment if packed else None), 0.1, softcap
            )
            for qkv, (valid, segment) in zip(rows, masks, strict=True)
            for window, packed in forms
        ]
        return sum(jnp.sum(x.astype(jnp.float32)) for x in mixed)

    def shaped(of: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, of, sharding=SingleDeviceSharding(device))

    lengths = LENGTHS[kernel]
    rows = [(shaped(dtype, 1, t, k, g, hd), *(shaped(dtype, 1, k, t, hd) for _ in "kv")) for t in lengths]
    masks = [(shaped(jnp.bool_, 1, t), shaped(jnp.int32, 1, t)) for t in lengths]
    return jax.jit(lambda *x: (loss(*x), jax.grad(loss)(*x))).trace(rows, masks)
