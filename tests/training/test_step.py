"""The loss and its gradient against transformers and finite differences, and the optimizer against torch's AdamW."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from para_jax import Backbone, BiasConfig, IA3Config, LoraConfig
from para_jax.adapters.bank import AdapterBank
from para_jax.adapters.para import ParaConfig
from para_jax.data.batches import make_batch
from para_jax.data.examples import Example
from para_jax.data.packing import Row, Shape
from para_jax.errors import ParaJaxError
from para_jax.families.architecture import Experts
from para_jax.training import loss as losses
from para_jax.training import optimizer, state, step
from para_jax.training.places import TenantLayout
from para_jax.training.programs import Parts, explain_out_of_memory
from para_jax.training.settings import Settings
from tests.helpers import METHODS, SMALL, random_adapter, random_backbone

ROWS = [
    [Example.of((5, 6, 7), (8, 9, 0)), Example.of((3, 4, 5, 6, 7, 8), (9, 0))],
    [Example.of((11,), (12, 13, 14, 0)), Example.of((2, 3), (0,))],
]


# Both rows of a tenant in one, and a row that is empty.
BATCH = make_batch(Shape(3, 16, 2, 12), [[Row(0, [0, 1]), Row(1, [0, 1])]], ROWS, np.array([[5, 5]], np.int32))


def loss(backbone, bank, batch, tenants, remat="none"):
    rows = bank.rows([tenants[i] if i < len(tenants) else None for i in batch.place[0]])
    (loss_n,) = losses.tenant_losses(backbone, rows, batch, remat=remat)
    return jnp.sum(loss_n), loss_n


def test_loss_is_transformers_on_response_tokens(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    backbone = Backbone.from_pretrained(tmp_path / "model", dtype="float32")
    bank = AdapterBank.create({"a": ParaConfig(r=2), "b": ParaConfig(r=2)}, backbone.config)
    _, ours = jax.jit(lambda bank: loss(backbone, bank, BATCH, ("a", "b")))(bank)
    for i, rows in enumerate(ROWS):
        total, count = 0.0, 0
        for e in rows:
            ids = torch.tensor([[*e.prompt_ids, *e.response_ids]])
            labels = torch.tensor([[-100] * len(e.prompt_ids) + list(e.response_ids)])
            with torch.inference_mode():
                total += float(model(ids, labels=labels).loss) * len(e.response_ids)
            count += len(e.response_ids)
        np.testing.assert_allclose(ours[i], total / count, rtol=1e-5)


def test_gradient_is_the_slope():
    backbone = random_backbone(stacked=True)
    config = ParaConfig(r=3, pooling="attention", activation="rational", bias=True)
    bank = AdapterBank.stack(
        {n: random_adapter(config, backbone.config, i, 0.1) for i, n in enumerate("ab")}, backbone.config
    )
    batch = BATCH
    f = jax.jit(lambda bank: loss(backbone, bank, batch, ("a", "b"))[0])
    gradient = jax.grad(f)(bank)
    direction = jax.tree.map(lambda g: g / optax_norm(gradient), gradient)
    size = 1e-2
    ahead, behind = (jax.tree.map(lambda x, d, s=s: x + s * d, bank, direction) for s in (size, -size))
    np.testing.assert_allclose((f(ahead) - f(behind)) / (2 * size), optax_norm(gradient), rtol=5e-3)


def optax_norm(tree):
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)))


@pytest.mark.slow
def test_remat_and_stacking_change_nothing():
    backbone, stacked = random_backbone(), random_backbone(stacked=True)
    bank = AdapterBank.stack(
        {n: random_adapter(ParaConfig(r=3), backbone.config, i, 0.1) for i, n in enumerate("ab")},
        backbone.config,
    )
    batch = BATCH
    gradients = [
        jax.jit(jax.grad(lambda bank, b=b, r=r: loss(b, bank, batch, ("a", "b"), r)[0]))(bank)
        for b, r in ((backbone, "none"), (backbone, "layers"), (backbone, "products"), (stacked, "layers"))
    ]
    for other in gradients[1:]:
        for x, y in zip(jax.tree.leaves(gradients[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-5)


def test_optimizer_is_torchs_adamw():
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((4, 3)).astype(np.float32)
    gradients = rng.standard_normal((5, 4, 3)).astype(np.float32)
    settings = Settings(steps=5, lr=1e-2, warmup_ratio=0.4, weight_decay=0.1, max_grad_norm=2.0)

    theirs = torch.nn.Parameter(torch.tensor(weights.copy()))
    adamw = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, eps=1e-8)
    ours, moments = jnp.asarray(weights), optimizer.init(jnp.asarray(weights))
    for i in range(5):
        rate = float(optimizer.learning_rate(settings, jnp.int32(i)))
        adamw.param_groups[0]["lr"] = rate
        theirs.grad = torch.tensor(gradients[i])
        norm = torch.nn.utils.clip_grad_norm_([theirs], 2.0)
        adamw.step()
        ours, moments, report = optimizer.update(settings, jnp.int32(i), ours, moments, jnp.asarray(gradients[i]))
        np.testing.assert_allclose(report["grad_norm"], norm, rtol=1e-6)
        np.testing.assert_allclose(report["lr"], rate, rtol=1e-6)
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "rest"),
    [
        (IA3Config(), 1.0),
        (IA3Config(projection=3), 0.0),
        (LoraConfig(r=2), 0.0),
        (BiasConfig(), 0.0),
        (ParaConfig(r=2, bias=True, activation="rational", pooling="attention"), 0.0),
    ],
    ids=["ia3", "ia3 with a projection", "lora", "bias", "para"],
)
def test_weight_decay_goes_to_the_identity(config, rest):
    """With no gradient, each step takes lr * weight_decay of the way to weights with which the adapter is nothing."""
    backbone = random_backbone()
    adapter = random_adapter(config, backbone.config, 0)
    settings = Settings(steps=10, lr=0.5, warmup_ratio=0.0, weight_decay=0.5)
    bank = AdapterBank.stack({"a": adapter}, backbone.config)
    before = [np.asarray(x) for x in jax.tree.leaves(bank)]
    nothing = jax.tree.map(jnp.zeros_like, adapter.layers)
    layers, _, _ = optimizer.update(
        settings, jnp.int32(0), adapter.layers, optimizer.init(adapter.layers), nothing, config.decays_to
    )
    for x, old in zip(jax.tree.leaves(layers), before, strict=True):
        np.testing.assert_allclose(x, rest + 0.75 * (old[0] - rest), rtol=1e-6, atol=1e-7)
    tokens = jnp.asarray([[5, 6, 7, 8]])
    at_rest = jax.tree.map(lambda x: jnp.full_like(x, config.decays_to), adapter)
    bank = AdapterBank.stack({"a": at_rest}, backbone.config)
    assert np.array_equal(backbone(tokens, bank=bank, tenants=["a"]), backbone(tokens))


def test_weight_decay_leaves_a_fresh_adapter_as_it_is():
    """In a step as a run takes it, without a gradient: vectors of one stay one, in layers that are targeted and not."""
    bank = AdapterBank.create({"a": IA3Config(("layers.0.self_attn.k_proj",), feedforward_modules=())}, SMALL)
    begun, settings = state.TrainState.create(bank), Settings(steps=9, lr=0.1, warmup_ratio=0.0, weight_decay=0.5)
    slots = TenantLayout.of(None, 1, 16).slots(bank, [["a"]])
    rules, sums = state.stack_settings(bank, {"a": settings}), state.Sums.create(bank, 1, 1)
    after, _, said = step.update(begun, rules, sums, slots)
    assert all(np.all(np.asarray(x) == 1) for x in jax.tree.leaves(after.bank)) and int(after.taken[0][0]) == 1
    np.testing.assert_allclose(said["lr"], 0.1, rtol=1e-6)


def test_bfloat16_backbone_trains_float32_adapters():
    """The gradient is that of the same weights in float32, but for a bfloat16's rounding (2**-9) in each operation."""
    backbone = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_backbone(stacked=True))
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), backbone)
    adapters = {n: random_adapter(ParaConfig(r=3), backbone.config, i, 0.1) for i, n in enumerate("ab")}
    bank = AdapterBank.stack(adapters, backbone.config)
    ours, theirs = (
        jax.jit(jax.grad(lambda bank, of=of: loss(of, bank, BATCH, ("a", "b"))[0]))(bank) for of in (backbone, exact)
    )
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert x.dtype == jnp.float32
        assert float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)) < 0.03


def test_float16_gradients_do_not_underflow():
    """Of a million response tokens, what a token gives a hidden state is less than 1e-6, where float16 has few bits."""
    configs = {"a": METHODS["para"], "b": METHODS["lora"]}
    bank = AdapterBank.stack({n: random_adapter(c, SMALL, i, 0.1) for i, (n, c) in enumerate(configs.items())}, SMALL)
    batch = dataclasses.replace(BATCH, count=np.full((1, 2), 10**6, np.int32))
    rules = state.stack_settings(bank, dict.fromkeys("ab", Settings()))
    taken, slots = state.TrainState.create(bank).taken, TenantLayout(None, 1, 1, 1).slots(bank, ["ab"])
    exact, half = (
        step.accumulate(
            jax.tree.map(lambda x, d=dtype: x.astype(d), random_backbone(stacked=True)), bank, taken, rules,
            state.Sums.create(bank, 1, 2), batch, slots,
        )
        for dtype in ("float32", "float16")
    )  # fmt: skip
    np.testing.assert_allclose(half.loss, exact.loss, rtol=2e-3)
    for x, y in zip(jax.tree.leaves(half.gradient), jax.tree.leaves(exact.gradient), strict=True):
        assert x.dtype == jnp.float32
        assert float(jnp.vdot(x, y) / (jnp.linalg.norm(x) * jnp.linalg.norm(y))) > 0.999
        np.testing.assert_allclose(jnp.linalg.norm(x), jnp.linalg.norm(y), rtol=1e-2)


@pytest.mark.slow
def test_logits_in_parts_change_nothing(monkeypatch):
    backbone = random_backbone()
    bank = AdapterBank.stack(
        {n: random_adapter(ParaConfig(r=3), backbone.config, i, 0.1) for i, n in enumerate("ab")}, backbone.config
    )
    batch = BATCH
    found = []
    for most in (losses.LOGITS, 4 * backbone.config.vocab_size, 1):
        monkeypatch.setattr(losses, "LOGITS", most)
        found.append(jax.jit(jax.value_and_grad(lambda bank: loss(backbone, bank, batch, ("a", "b"))[0]))(bank))
    for other in found[1:]:
        for x, y in zip(jax.tree.leaves(found[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-5)


def memory(backbone, shape, remat="none") -> int:
    """The temporary bytes of a micro-batch."""
    bank = AdapterBank.create({"a": ParaConfig(r=2)}, backbone.config)
    layout, sums = TenantLayout.of(None, 1, 16), state.Sums.create(bank, 1, 1)
    given = state.TrainState.create(bank), state.stack_settings(bank, {"a": Settings()}), sums
    parts = Parts(backbone, layout, *given, layout.slots(bank, [["a"]]), 1, [shape], False, remat, 0)
    return parts.calls()["micro-batch 0"]().lower().compile().memory_analysis().temp_size_in_bytes


def test_a_large_vocabulary_does_not_dominate():
    """2048 targets of 131,072 tokens are a gigabyte of logits; a step never holds more than a quarter of it, twice."""
    backbone = jax.eval_shape(lambda: random_backbone(vocab_size=131_072))
    assert memory(backbone, Shape(16, 128, 1, 2048)) < 2 * 4 * losses.LOGITS + 100e6 < 4 * 2048 * 131_072


@pytest.mark.parametrize(
    ("experts", "quantize"), [(None, "int8"), (Experts(count=8, per_token=2, width=1024, normalized=True), None)]
)
def test_weights_are_kept_as_they_are_stored(experts, quantize):
    """The backward pass finds no second copy of all layers' weights, in the form that their products read."""
    config = dataclasses.replace(SMALL, hidden_size=256, intermediate_size=1024, num_hidden_layers=8, experts=experts)
    backbone = jax.eval_shape(lambda: Backbone(config, jax.random.key(0), "float32", True, quantize))
    assert memory(backbone, Shape(1, 16, 1, 16)) < 0.4 * sum(4 * x.size for x in jax.tree.leaves(backbone.blocks))


def test_gradients_of_one_place_are_summed_and_no_others():
    """Whatever the number of entries, in a fixed order, and a NaN stays in its place."""
    place = np.array([[0, 0, 0, 1, 3, 3, 3, 3], [1, 2, 2, 2, 2, 2, 4, 4]], np.int32)
    x = np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32)
    x[3] = np.nan
    where, sums = jax.jit(step.sum_by_place, static_argnums=2)(jnp.asarray(x), jnp.asarray(place), 4)
    for g in range(2):
        for n in range(4):
            own = x.reshape(2, 8, 3)[g][place[g] == n]
            (found,) = np.nonzero(where[g] == n)
            assert len(found) == bool(len(own))
            for i in found:
                np.testing.assert_allclose(sums.reshape(2, 8, 3)[g, i], own.sum(0), rtol=1e-6)
        assert len(set(where[g].tolist())) == 8


def test_out_of_memory_says_what_to_try():
    bank = AdapterBank.create({"a": ParaConfig(r=2), "b": ParaConfig(r=2)}, SMALL)
    given = TenantLayout.of(None, 2, 8), state.TrainState.create(bank), (), state.Sums.create(bank, 1, 2), ()
    parts = Parts(random_backbone(), *given, 2, [Shape(4, 64, 2, 64)], False, "none", 0)
    words = r"a step does not .* \(17592186044416 bytes were requested\); try --remat layers.*--micro-batch-tokens 128"
    with pytest.raises(ParaJaxError, match=words), explain_out_of_memory(parts, "a step"):
        jnp.zeros((2**42,), jnp.float32).block_until_ready()
    with pytest.raises(ZeroDivisionError), explain_out_of_memory(parts, "a step"):
        _ = 1 / 0
