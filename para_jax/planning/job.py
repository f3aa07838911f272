"""`Job`: what a plan is made for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from para_jax.adapters.method import MethodConfig
from para_jax.backbones.options import Remat
from para_jax.config import BackboneConfig
from para_jax.errors import ParaJaxError, check_known
from para_jax.quantization import QUANTIZED
from para_jax.training.shapes import Device

MODES = ("train", "decode")


@dataclass(frozen=True)
class Job:
    """A tuning step, or decoding of a batch.

    Attributes:
      tenants: the number of tenants that are tuned together, or in the bank while decoding.
      rows: the number of rows of each tenant in a tuning step, or of all tenants together while decoding.
      length: tokens of a row while tuning, half of which are the response; tokens of a prompt while decoding.
      new_tokens: the maximum number of new tokens of a row while decoding.
      micro_batch_tokens: the maximum number of token slots of a micro-batch on a device, as in `finetune`.
      remat: what the backward pass recomputes (`Backbone.forward`).
      quantize, dtype: the format of the backbone's weights.

    Raises ParaJaxError for invalid sizes.
    """

    config: BackboneConfig
    method: MethodConfig
    mode: Literal["train", "decode"] = "train"
    tenants: int = 1
    rows: int = 16
    length: int = 2048
    new_tokens: int = 256
    micro_batch_tokens: int | None = None
    remat: Remat = "layers"
    quantize: Literal["int8", "int4"] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"

    def __post_init__(self) -> None:
        check_known("mode", [self.mode], MODES)
        check_known("remat", [self.remat], get_args(Remat))
        check_known("quantize", [] if self.quantize is None else [self.quantize], QUANTIZED)
        least = {"tenants": 1, "rows": 1, "length": 2 if self.mode == "train" else 1, "new_tokens": 1}
        for name, size in least.items():
            if getattr(self, name) < size:
                raise ParaJaxError(f"{name} must be at least {size}, not {getattr(self, name)}")
        context = self.config.max_position_embeddings
        tokens = self.length + (self.new_tokens if self.mode == "decode" else 0)
        if tokens > context:
            raise ParaJaxError(f"rows of {tokens} tokens exceed the backbone's context of {context}; make them shorter")
        self.device("tpu")  # raises for an invalid limit

    def device(self, kind: Literal["tpu", "gpu"]) -> Device:
        return Device.of(self.config, self.micro_batch_tokens, kind)

    @property
    def passes(self) -> int:
        """The number of passes of a micro-batch over the weights: forward, backward, and another forward for remat."""
        return 3 if self.remat == "layers" else 2

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"tenant-{i}" for i in range(self.tenants))
