"""The keys of a config.json: which are used, refused, or ignored with a warning.

transformers decides. Its config class reads a key that is a field or another attribute of the class or its bases, or a
string in their code, such as "rope_theta" in `kwargs.pop("rope_theta")`. A few more keys are read by its models. Other
keys cannot change what the model computes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import cache
from inspect import Parameter, signature, unwrap
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from para_jax.errors import ParaJaxError

# The keys that `architecture_from_hf` reads, for some families or all.
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
READ = {
    *SIZES, "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings",
    "bos_token_id", "eos_token_id", "hidden_act", "hidden_activation", "attention_bias", "mlp_bias", "rope_theta",
    "rope_scaling", "rope_parameters", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
    "no_rope_layers", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
    "num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
    "partial_rotary_factor",
}  # fmt: skip
# Keys that transformers' classes accept, or its models read, although they are not fields.
SPELLINGS = {"rope_theta", "rope_scaling", "head_dim", "partial_rotary_factor"}
# Origin, training and tokenizer of a checkpoint, and keys that only transformers' own code uses.
NEUTRAL = {
    "model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "initializer_range", "use_cache",
    "pad_token_id", "sep_token_id", "tokenizer_class", "attention_dropout", "pretraining_tp", "name_or_path",
    "_name_or_path", "_commit_hash", "_attn_implementation_autoset", "_attn_implementation",
    "_attn_implementation_internal", "attn_implementation", "_experts_implementation",
    "_experts_implementation_internal", "experts_implementation", "cache_implementation", "output_router_logits",
    "router_aux_loss_coef", "is_llama_config", "max_sequence_length", "torchscript", "gradient_checkpointing",
    "initializer_factor", "init_std", "unsloth_fixed", "unsloth_version", "transformers.js_config", "id2label",
    "label2id", "num_labels", "problem_type", "chunk_size_feed_forward", "return_dict", "use_return_dict",
    "output_hidden_states", "output_attentions", "distributed_config", "is_decoder", "_attn_was_changed",
    "prefix", "task_specific_params",
}  # fmt: skip
# Keys of all families with one supported setting.
ONLY = {"is_causal": True, "is_encoder_decoder": False}
# Keys that transformers' models, masks, caches and loaders read, but not its config classes.
OF_MODELS = {
    "attention_chunk_size", "kv_sharing_modes", "num_kv_shared_layers", "fusion_config", "transformers_weights",
    "alibi", "use_alibi",
}  # fmt: skip
# Keys that have an effect only with an option of `READ`. That option is refused if it is not implemented.
ONLY_WITH_OTHERS = {"max_window_layers"}
CODE = "auto_map"  # names the checkpoint's own code, which transformers runs only with trust_remote_code


class Keys(NamedTuple):
    """The sorted keys of a config.json, without neutral keys.

    Attributes:
      used: the arguments of transformers' class.
      refused: keys that may change what the model computes, but are not implemented.
      ignored: keys that cannot change it.
    """

    used: dict[str, Any]
    refused: dict[str, Any]
    ignored: tuple[str, ...]


def sort_keys(fields: Mapping[str, Any], made: Any, own: Collection[str], others: Collection[str]) -> Keys:
    """Sorts the keys of a config.json.

    Args:
      made: transformers' config class of the family.
      own: keys that are supported for this family and are not in `READ`.
      others: keys that are supported for other families.

    Raises ParaJaxError if two names of the same option disagree.
    """
    from transformers import GenerationConfig

    aliases = made.attribute_map  # from another name of an option to the one that transformers writes
    for first, second in aliases.items():
        if fields.get(first) is not None and fields.get(second) not in (None, fields[first]):
            raise ParaJaxError(
                f"config.json has {first}={fields[first]!r} and {second}={fields[second]!r}, which are two names of "
                "one option; take out the wrong one"
            )
    understood = READ & {*defaults(made), *aliases, *aliases.values(), *SPELLINGS} | {*own, *ONLY}
    # config.json of old checkpoints contains generation settings.
    known = understood | NEUTRAL | set(GenerationConfig().to_dict())
    matters = (READ | OF_MODELS | set(others)) - ONLY_WITH_OTHERS
    used, refused, ignored = {}, {}, []
    for key, value in fields.items():
        if key in understood:
            used[key] = value
        elif key not in known and key != CODE and (key in matters or reads(made, key)):
            if not _no_effect(made, key, value):
                refused[key] = value
        elif key not in known and value is not None and value is not False and value not in ("", [], {}):
            ignored.append(key)
    return Keys(used, refused, tuple(ignored))


def _no_effect(made: Any, key: str, value: Any) -> bool:
    """Whether a key has the default of its class, or disables (null, false, 0 or empty) what is disabled by default."""
    default = defaults(made).get(key)
    if key == "layer_types" and isinstance(value, list) and all(kind == "full_attention" for kind in value):
        return True
    return value == default or not (value or default)


def reads(made: Any, key: str) -> bool:
    """Whether the code of transformers' class reads a key of config.json."""
    return key in defaults(made) or hasattr(made, key) or key in made.attribute_map or key in _strings(made)


def rope_code_reads(key: str) -> bool:
    """Whether transformers' RoPE code reads a key of rope_parameters or rope_scaling, for any type."""
    return key in _rope_strings()


@cache
def _rope_strings() -> frozenset[str]:
    from transformers import modeling_rope_utils

    functions = [x for x in vars(modeling_rope_utils).values() if isinstance(x, FunctionType)]
    return frozenset(_constants(f.__code__ for f in functions)) | _strings(
        modeling_rope_utils.RotaryEmbeddingConfigMixin
    )


@cache
def defaults(made: type) -> dict[str, Any]:
    """The options of a class and its bases, with their defaults."""
    parameters: dict[str, Parameter] = {}
    for base in reversed(made.__mro__):
        if "__init__" in vars(base):
            parameters |= signature(vars(base)["__init__"]).parameters
    return {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY) and name != "self"
    }


@cache
def _strings(made: type) -> frozenset[str]:
    """The strings in the code of a class and its bases, which include the keys that it looks up."""
    members = [member for base in made.__mro__ for member in vars(base).values()]
    members += [accessor for x in members if isinstance(x, property) for accessor in (x.fget, x.fset)]
    functions = [unwrap(getattr(member, "__func__", member)) for member in members if member is not None]
    return frozenset(_constants(f.__code__ for f in functions if isinstance(f, FunctionType)))


def _constants(values: Iterable[Any]) -> set[str]:
    found: set[str] = set()
    for value in values:
        if isinstance(value, str):
            found.add(value)
        elif isinstance(value, CodeType):
            found |= _constants(value.co_consts)
        elif isinstance(value, tuple | frozenset):
            found |= _constants(value)
    return found
