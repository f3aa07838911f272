"""A backbone that is read in the background."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from para_jax.backbones.decoder import Backbone
from para_jax.backbones.options import Attention, Dtype
from para_jax.convert.checkpoint import load_weights
from para_jax.quantization import Quantize

if TYPE_CHECKING:
    from jax.sharding import Mesh


class Loading:
    """A backbone that is being read in a thread, so that data is read and programs are compiled meanwhile.

    Attributes:
      shapes: the backbone with shapes in place of arrays.

    >>> from para_jax import tiny_backbone_path
    >>> loading = Loading(tiny_backbone_path(), stacked=True)
    >>> loading.shapes.embed.shape == loading.backbone().embed.shape
    True
    """

    def __init__(
        self,
        path_or_hub_id: str | Path,
        dtype: Dtype = "auto",
        stacked: bool | None = None,
        quantize: Quantize | None = None,
        attention: Attention = "auto",
        mesh: Mesh | None = None,
    ):
        """Begins to read; the arguments are those of `Backbone.from_pretrained`, and so are the errors."""
        folder, self.shapes = Backbone.opened(path_or_hub_id, dtype, stacked, quantize, attention, mesh)
        thread = ThreadPoolExecutor(1, "load")
        self._made = thread.submit(load_weights, folder, self.shapes)
        thread.shutdown(wait=False)

    def backbone(self) -> Backbone:
        """The backbone, as soon as it is read. Raises what reading raises."""
        return self._made.result()
