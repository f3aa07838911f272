"""Reads and prepares TensorFlow Datasets, without TensorFlow."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from para_jax.data.table import Table, check_split
from para_jax.data.templates import shipped
from para_jax.distributed import broadcast, is_main_process
from para_jax.errors import ParaJaxError, check_known, unknown

# Modules whose builders register themselves only when imported.
MORE_BUILDERS = ("text", "question_answering", "summarization", "translate", "text_simplification")


def table(source: str, data_dir: str | Path | None = None) -> Table:
    """The rows of NAME[/CONFIG][:SPLIT]. The split defaults to train, and may be sliced: train[:90%].

    Data that is not in `data_dir` is downloaded and prepared there. Raises ParaJaxError if TFDS is not installed or
    does not load, for an unknown name, config or split, and if the data cannot be downloaded.
    """
    tfds = _import_tfds(source)
    name, _, split = source.partition(":")
    split = split or "train"
    root = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    builder = builder_of(name, root)
    # The main process prepares the data, and all processes raise its error.
    problem = b""
    if is_main_process() and not builder.data_path.exists():
        try:
            _prepare(builder, name)
        except ParaJaxError as error:
            problem = str(error).encode()
    if message := broadcast(problem).decode():
        raise ParaJaxError(message)
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise ParaJaxError(
            f"{builder.data_path} was prepared as {builder.info.file_format.value}, but only array_record is read; "
            "remove it, and it is prepared again, or choose another --data-dir"
        )
    check_split(split, builder.info.splits, f"tfds:{name}")
    try:
        rows = builder.as_data_source(split=split)
    except ValueError as error:
        raise ParaJaxError(f"tfds:{source} has no such rows: {str(error).splitlines()[-1]}") from None
    features = builder.info.features

    def rows_with_places() -> Iterator[tuple[str, dict[str, Any]]]:
        for i in range(len(rows)):
            yield f"tfds:{name}:{split} row {i}", _plain(rows[i])

    labels = tuple(key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel))
    return Table(tuple(features), rows_with_places(), labels, name, tuple(builder.info.splits))


def _import_tfds(source: str) -> Any:
    """The tensorflow_datasets module with all builders of text data sets."""
    # TFDS logs tracebacks of failed imports; one line is raised below instead.
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        import tensorflow_datasets as tfds

        for module in MORE_BUILDERS:
            importlib.import_module(f"tensorflow_datasets.{module}")
    except ImportError as error:
        raise ParaJaxError(f"tfds:{source} needs TensorFlow Datasets: pip install 'para-jax[data]' ({error})") from None
    except Exception as error:  # protobuf raises its own exceptions on Colab's CPU and GPU images
        raise ParaJaxError(
            f"tfds:{source} needs TensorFlow Datasets, which does not load: {str(error).partition('. ')[0]}. If its "
            "tensorflow-metadata is too new for this protobuf: pip install 'tensorflow-metadata<1.18'"
        ) from error
    finally:
        logger.setLevel(level)
    return tfds


def builder_of(name: str, root: Path) -> Any:
    """The builder of NAME[/CONFIG], with its data in `root`. Raises ParaJaxError if there is no such builder."""
    tfds = _import_tfds(name)
    dataset, _, config = name.partition("/")
    known = tfds.list_builders(with_community_datasets=False)
    if dataset not in known:
        try:
            return tfds.builder(name, data_dir=root)  # prepared already, by code that is not installed here
        except ValueError:
            raise unknown("TFDS data set", dataset, known) from None
    try:
        kind = tfds.builder_cls(dataset)
        _stand_in_for_tensorflow(kind)
        configs = kind.builder_configs
        check_known(f"config of {dataset}", [config] if config else [], configs)
        # The first config is the default only if a template has the name of the data set: squad, but not glue.
        if not config and len(configs) > 1 and dataset not in shipped():
            raise ParaJaxError(f"{dataset} has several configs; write tfds:{dataset}/CONFIG: {', '.join(configs)}")
        return tfds.builder(name, data_dir=root)
    except ImportError as error:
        raise ParaJaxError(f"tfds:{name} needs a package that is not installed: {error}") from error


def _prepare(builder: Any, name: str) -> None:
    import tensorflow_datasets as tfds

    if not sys.stderr.isatty():  # its progress bars would fill a log file
        tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(try_download_gcs=False)  # GCS has files for TensorFlow only
    try:
        builder.download_and_prepare(download_config=config, file_format="array_record")
    except Exception as error:  # builders may raise anything
        reason = str(error).strip().partition("\n")[0]
        folder = builder.data_path
        raise ParaJaxError(
            f"tfds:{name} is not in {folder.parents[1 + bool(builder.builder_config)]}, and could not be downloaded "
            f"and prepared ({type(error).__name__}: {reason}). Prepare it on a machine with a network, with "
            f"--data-dir, and copy {folder} from there; or give the --data-dir that has it"
        ) from error


def _stand_in_for_tensorflow(builder_cls: Any) -> None:
    """Gives a builder a stand-in for the parts of TensorFlow that text builders use: opening files, and dtypes.

    TFDS reads and writes array_record without TensorFlow, but unpacks archives with tf.io.gfile, and super_glue uses
    tf.int32. If TensorFlow is installed, nothing is replaced.
    """
    if find_spec("tensorflow") is not None:
        return
    from tensorflow_datasets.core.download import extractor

    gfile = SimpleNamespace(GFile=open, Open=open, exists=lambda path: Path(path).exists())
    dtypes = {x: getattr(np, x) for x in ("int32", "int64", "float32", "float64", "uint8")}
    stand_in = SimpleNamespace(
        io=SimpleNamespace(gfile=gfile), compat=SimpleNamespace(as_text=str), string=np.str_, bool=np.bool_, **dtypes
    )
    for module in (extractor, sys.modules[builder_cls.__module__]):
        if hasattr(module, "tf"):
            vars(module)["tf"] = stand_in


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    return [_plain(x) for x in value] if isinstance(value, list) else value
