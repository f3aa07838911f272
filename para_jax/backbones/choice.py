"""Selects a backbone's attention kernel (kernels.py): the device's own if it compiles, else plain attention."""

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
# The row lengths that kernels are compiled with. Splash has one tile size for short rows and another for long rows.
LENGTHS = {"cudnn": (2 * TILE,), "splash": (2 * LANES, 2 * TILE)}


class Choice(NamedTuple):
    """The kernel that is used, and why.

    Attributes:
      refused: whether the device's own kernel failed to compile, so that `kernel` replaces it.
    """

    kernel: Kernel
    why: str
    refused: bool = False


def choose(name: str, config: BackboneConfig, dtype: jnp.dtype, device: Any = None) -> Choice:
    """The kernel with this name, or for "auto" the one that suits the device, by default JAX's first local device.

    To test a kernel, this compiles its forward and backward pass with the model's windows, heads and dtype, except on a
    CPU; `probing.refusal` caches the result. If the kernel of "auto" does not compile, or lacks a part of this
    backbone's attention, plain attention replaces it and `logging` gets a warning.

    Raises ParaJaxError for an unknown name, or if the named kernel does not support this backbone or device.
    """
    if name not in ("auto", *get_args(Kernel)):
        raise unknown("attention", name, ("auto", *get_args(Kernel)))
    device = jax.local_devices()[0] if device is None else device
    wanted = OWN.get(device.platform, "plain") if name == "auto" else cast(Kernel, name)
    unsupported = _unsupported(wanted, config, dtype, device)
    compiled = not unsupported and wanted != "plain" and device.platform != "cpu"
    failed = _compile_error(wanted, config, dtype, device) if compiled else ""
    if unsupported or failed:
        why = f"attention={wanted!r} {unsupported or failed}"
        if name != "auto":
            raise ParaJaxError(f"{why}; choose attention='plain' or 'auto'")
        if failed or _lacks(wanted, config):
            _warn(f"{why}; attention='plain' is used instead")
        return Choice("plain", why, bool(failed))
    if name != "auto":
        return Choice(wanted, "requested")
    return Choice(wanted, f"compiles for {device.device_kind}" if wanted != "plain" else "no other kernel for a CPU")


_warned: set[str] = set()


def _warn(line: str) -> None:
    """Logs a warning once per process, which may build a model several times."""
    if line not in _warned:
        _warned.add(line)
        logging.getLogger(__name__).warning("%s", line)


def _unsupported(kernel: Kernel, config: BackboneConfig, dtype: jnp.dtype, device: Any) -> str:
    """Why a kernel does not support this backbone or device, if that is known without compiling; else ""."""
    if kernel == "splash":
        return "runs on TPUs" if device.platform == "gpu" else ""
    if kernel == "plain":
        return ""
    if lacks := _lacks(kernel, config):
        return lacks
    if dtype != jnp.bfloat16:
        return f"supports bfloat16 only, not {dtype}"
    if device.platform != "gpu":
        return f"runs on NVIDIA GPUs, not on {device.platform}"
    capability = cuda_capability(device)
    if capability is None:
        return "runs on NVIDIA GPUs"
    if capability < (8, 0):
        return "needs an Ampere GPU or later"
    most = 256 if capability >= (9, 0) else 128
    fits = all(hd % 8 == 0 and hd <= most for _, _, hd in map(config.heads, config.layer_kinds))
    return "" if fits else f"supports heads of up to {most} features, in multiples of 8"


def _lacks(kernel: Kernel, config: BackboneConfig) -> str:
    """Which part of this backbone's attention a kernel does not compute; "" if it computes all."""
    parts = {"soft-capping": config.attn_logit_softcapping is not None, "attention sinks": config.attention_sinks}
    lacking = [part for part, needed in parts.items() if needed and kernel == "cudnn"]
    return f"has no {' and no '.join(lacking)}" if lacking else ""


def _compile_error(kernel: Kernel, config: BackboneConfig, dtype: jnp.dtype, device: Any) -> str:
    """The compiler's error for a kernel, with package versions; "" if it compiles."""
    about = {
        "windows": sorted({kind.window or 0 for kind in config.layer_kinds}),
        "heads": sorted({config.heads(kind) for kind in config.layer_kinds}),
        "softcap": config.attn_logit_softcapping,
        "sinks": config.attention_sinks,
        "dtype": str(dtype),
        "lengths": LENGTHS[kernel],
    }
    found = refusal(f"attention={kernel}", about, partial(_trace, kernel, config, dtype, device), device)
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    return found and f"does not compile for {device.device_kind} with {packages}: {found}"


def _trace(kernel: Kernel, config: BackboneConfig, dtype: jnp.dtype, device: Any) -> Traced:
    """One program with all of a backbone's kinds of attention, packed and not packed, with and without gradients."""
    softcap, heads = config.attn_logit_softcapping, list(dict.fromkeys(map(config.heads, config.layer_kinds)))
    kinds = dict.fromkeys((kind.window, config.heads(kind)) for kind in config.layer_kinds)
    # Splash treats every row as packed.
    forms = [(*kind, packed) for kind in kinds for packed in (False, True) if packed or kernel != "splash"]

    def loss(rows: list[dict[tuple[int, ...], tuple[Any, Any, Any]]], masks: list[tuple[Any, Any]]) -> Any:
        mixed = [
            prompt_attention(
                kernel,
                *qkv[of],
                Seen(valid, jnp.arange(valid.shape[1]), window, ids if packed else None),
                0.1,
                softcap,
                sinks_kg=jnp.zeros(of[:2], dtype) if config.attention_sinks else None,
            )
            for qkv, (valid, ids) in zip(rows, masks, strict=True)
            for window, of, packed in forms
        ]
        return sum(jnp.sum(x.astype(jnp.float32)) for x in mixed)

    def shaped(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    lengths = LENGTHS[kernel]
    rows = [
        {(k, g, hd): (shaped(dtype, 1, t, k, g, hd), *(shaped(dtype, 1, k, t, hd) for _ in "kv")) for k, g, hd in heads}
        for t in lengths
    ]
    masks = [(shaped(jnp.bool_, 1, t), shaped(jnp.int32, 1, t)) for t in lengths]
    return jax.jit(lambda *x: (loss(*x), jax.grad(loss)(*x))).trace(rows, masks)
