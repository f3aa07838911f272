"""A backbone that is read in the background."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from para_jax.backbones.decoder import Backbone
from para_jax.backbones.options import Attention, Dtype
from para_jax.config import CONFIG, checkpoint_folder, read_json
from para_jax.convert.checkpoint import load_weights
from para_jax.families.reading import architecture_from_hf
from para_jax.quantization import Quantize
from para_jax.sharding import auto_mesh, make_mesh

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

    @classmethod
    def of(cls, model: str | Path | Backbone | Loading) -> Loading:
        """A folder or hub id, read for tuning on `default_mesh`; a backbone that is there, or being read, as it is."""
        if isinstance(model, Loading):
            return model
        if not isinstance(model, Backbone):
            return cls(model, stacked=True, mesh=default_mesh(model))
        there = cls.__new__(cls)
        there.shapes, there._made = model, Future()
        there._made.set_result(model)
        return there

    def backbone(self) -> Backbone:
        """The backbone, as soon as it is read. Raises what reading raises."""
        return self._made.result()


def default_mesh(path_or_hub_id: str | Path, tuning: bool = True) -> Mesh | None:
    """A mesh over all accelerators that suits the model (`sharding.auto_mesh`); None for one device.

    A CPU's devices are simulated and take turns, so they get a mesh only where there are several processes.
    """
    if jax.device_count() == 1 or (jax.default_backend() == "cpu" and jax.process_count() == 1):
        return None
    # Reading the backbone says which keys of config.json are ignored, so it is not said here.
    fields = read_json(checkpoint_folder(path_or_hub_id, [CONFIG]) / CONFIG)
    return make_mesh(auto_mesh(architecture_from_hf(fields, str(path_or_hub_id)), jax.device_count(), tuning))
