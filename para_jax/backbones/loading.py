"""Reading a backbone in a background thread."""

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
    """A backbone that a thread reads while the caller reads data and compiles programs.

    Attributes:
      shapes: the abstract backbone (`Backbone.abstract`).

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
        """Starts reading. Arguments and errors are those of `Backbone.from_pretrained`."""
        folder, self.shapes = Backbone.opened(path_or_hub_id, dtype, stacked, quantize, attention, mesh)
        thread = ThreadPoolExecutor(1, "load")
        self._backbone = thread.submit(load_weights, folder, self.shapes)
        thread.shutdown(wait=False)

    @classmethod
    def of(cls, model: str | Path | Backbone | Loading) -> Loading:
        """Starts reading a folder or hub id for tuning on `default_mesh`; a Backbone or Loading is used as it is."""
        if isinstance(model, Loading):
            return model
        if not isinstance(model, Backbone):
            return cls(model, stacked=True, mesh=default_mesh(model))
        loaded = cls.__new__(cls)
        loaded.shapes, loaded._backbone = model, Future()
        loaded._backbone.set_result(model)
        return loaded

    def backbone(self) -> Backbone:
        """Waits for the backbone. Raises the errors of reading it."""
        return self._backbone.result()


def default_mesh(path_or_hub_id: str | Path, tuning: bool = True) -> Mesh | None:
    """A mesh over all devices that suits the model (`sharding.auto_mesh`), or None for one device.

    The devices of a CPU are simulated and not parallel, so they get a mesh only if there are several processes.
    """
    if jax.device_count() == 1 or (jax.default_backend() == "cpu" and jax.process_count() == 1):
        return None
    # Not BackboneConfig, whose warning about ignored keys is logged when the backbone is read.
    fields = read_json(checkpoint_folder(path_or_hub_id, [CONFIG]) / CONFIG)
    return make_mesh(auto_mesh(architecture_from_hf(fields, str(path_or_hub_id)), jax.device_count(), tuning))
