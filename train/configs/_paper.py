"""The tenants of the large configs: three tasks of the paper, each with rows of its own to learn, choose and score by.

They come from TensorFlow Datasets (`pip install 'para-jax[data]'`), by the templates that ship (docs/data.md).
"""

from configs import Tenant

TENANTS = {
    "boolq": Tenant(
        "tfds:super_glue/boolq:train[:95%]",
        "tfds:super_glue/boolq:train[95%:]",
        "tfds:super_glue/boolq:validation",
        max_new_tokens=4,
    ),
    "copa": Tenant(
        "tfds:super_glue/copa:train[:90%]",
        "tfds:super_glue/copa:train[90%:]",
        "tfds:super_glue/copa:validation",
        max_new_tokens=32,
    ),
    "squad": Tenant(
        "tfds:squad:train[:99%]",
        "tfds:squad:train[99%:]",
        "tfds:squad:validation",
        max_new_tokens=32,
    ),
}
