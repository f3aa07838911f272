"""Law 3 for training: a tenant's loss, gradient, clipping and schedule do not depend on who trains beside it."""

import jax
import numpy as np
import pytest

from para_jax.adapters.bank import AdapterBank
from para_jax.adapters.para import ParaConfig
from para_jax.data.examples import Example
from para_jax.data.packing import Shape
from para_jax.training.places import TenantLayout
from para_jax.training.settings import Settings
from para_jax.training.state import Sums, TrainState, stack_settings
from tests.helpers import METHODS, random_adapter, random_backbone, take_step

NAMES = ("acme", "globex", "initech", "hooli", "umbrella", "stark")
SETTINGS = {
    "acme": Settings(steps=6, lr=1e-2, max_grad_norm=0.05),
    "globex": Settings(steps=3, lr=3e-3, weight_decay=0.1),
    "initech": Settings(steps=6, lr=2e-2, warmup_ratio=0.5),
    "hooli": Settings(steps=4, lr=1e-2, weight_decay=0.05),
    "umbrella": Settings(steps=6, lr=3e-2, max_grad_norm=0.1),
    "stark": Settings(steps=5, lr=2e-2, weight_decay=0.1, max_grad_norm=0.5),
}
CONFIGS = {
    "acme": ParaConfig(r=3),
    "globex": ParaConfig(r=3),
    "initech": ParaConfig(r=2, pooling="mean", bias=True, read="normed", scale="response"),
    "hooli": METHODS["patterned"],
    "umbrella": METHODS["group"],
    "stark": METHODS["bias"],
}


def examples(name: str, vocabulary: int) -> list[Example]:
    rng = np.random.default_rng(NAMES.index(name))

    def ids(low, high):
        return tuple(int(i) for i in rng.integers(1, vocabulary, rng.integers(low, high)))

    return [Example.of(ids(2, 12), (*ids(1, 6), 0)) for _ in range(9)]


# Rows of up to four sequences.
PACKED = (Shape(rows=3, length=40, segments=4, targets=60),)
SHAPES = {
    "a row for each sequence": (Shape(3, 20, 1, 30),),
    "two lengths": (Shape(2, 10, 2, 16), Shape(3, 24, 3, 60)),
    "two numbers of rows": (Shape(1, 32, 3, 24), Shape(4, 32, 3, 60)),
}


def tune(backbone, names, steps=6, shapes=PACKED, poison=None):
    adapters = {n: random_adapter(CONFIGS[n], backbone.config, NAMES.index(n), 0.1) for n in names}
    if poison:
        adapters[poison] = jax.tree.map(lambda x: x * np.float32("nan"), adapters[poison])
    bank = AdapterBank.stack(adapters, backbone.config)
    state, rules, sums = TrainState.create(bank), stack_settings(bank, SETTINGS), Sums.create(bank, 1, len(names))
    data = {n: examples(n, backbone.config.vocab_size) for n in names}
    layout = TenantLayout.of(None, len(names), rows=4)
    history = []
    for step in range(steps):
        rows = layout.step_rows([names], data, 3, dict.fromkeys(names, step))
        state, sums, said = take_step(backbone, state, sums, rules, layout, shapes, [names], rows)
        history.append(said)
    return state.bank, history


def leaves(bank, name):
    return {key: np.asarray(x) for key, x in bank[name].tensors().items()}


@pytest.fixture(scope="module")
def backbone():
    return random_backbone(stacked=True)


@pytest.fixture(scope="module")
def together(backbone):
    return tune(backbone, NAMES)


# acme's configuration is globex's.
@pytest.mark.parametrize("name", NAMES[1:])
def test_alone_or_together(backbone, together, name):
    bank, history = together
    alone, alone_history = tune(backbone, (name,))
    for step, (a, b) in enumerate(zip(history, alone_history, strict=True)):
        for key in ("loss", "grad_norm", "lr"):
            np.testing.assert_allclose(a[key][name], b[key][name], rtol=2e-4, err_msg=f"{key} of step {step}")
    for key, x in leaves(alone, name).items():
        # Adam divides by gradients that may be near zero, which widens what rounding leaves.
        np.testing.assert_allclose(leaves(bank, name)[key], x, rtol=1e-2, atol=2e-4, err_msg=key)


@pytest.mark.parametrize("broken", ["acme", "hooli", "umbrella", "stark"])
def test_bit_for_bit_at_one_plan(backbone, together, broken):
    """The others' weights turn to NaN; this tenant's numbers stay the same to the last bit."""
    bank, history = together
    poisoned, poisoned_history = tune(backbone, NAMES, poison=broken)
    assert np.isnan(poisoned_history[0]["loss"][broken])
    for name in NAMES:
        if name == broken:
            continue
        for key, x in leaves(bank, name).items():
            np.testing.assert_array_equal(leaves(poisoned, name)[key], x, err_msg=f"{name} {key}")
        assert [h["loss"][name] for h in history] == [h["loss"][name] for h in poisoned_history]


def test_own_schedule_and_end(together):
    _, history = together
    assert [float(h["lr"]["globex"]) > 0 for h in history] == [True] * 3 + [False] * 3
    rates = [float(h["lr"]["initech"]) for h in history]
    np.testing.assert_allclose(rates, [2e-2 / 3, 4e-2 / 3, 2e-2, 2e-2, 4e-2 / 3, 2e-2 / 3], rtol=1e-5)


def test_a_tenant_that_is_done_rests(backbone, together):
    after_three, _ = tune(backbone, NAMES, steps=3)
    for key, x in leaves(after_three, "globex").items():
        np.testing.assert_array_equal(leaves(together[0], "globex")[key], x)
    assert any((leaves(after_three, "acme")[k] != x).any() for k, x in leaves(together[0], "acme").items())


@pytest.mark.parametrize(
    "shapes", [pytest.param(name, marks=pytest.mark.whole if name == "two numbers of rows" else ()) for name in SHAPES]
)
def test_packing_changes_nothing(backbone, together, shapes):
    """Sequences of one row do not see each other, and micro-batches change how a gradient is computed, not what it is.

    Against the same rows one by one, in rows of two lengths, and in micro-batches of two sizes.
    """
    _, history = together
    names = NAMES[2:]
    _, parts = tune(backbone, names, shapes=SHAPES[shapes])
    for a, b in zip(history, parts, strict=True):
        for key in ("loss", "grad_norm"):
            for name in names:
                np.testing.assert_allclose(a[key][name], b[key][name], rtol=1e-3)


def test_the_backbone_is_untouched(backbone):
    """Law 5: training leaves every array of the backbone as it was, in place."""
    before = [(x.unsafe_buffer_pointer(), np.asarray(x).copy()) for x in jax.tree.leaves(backbone)]
    tune(backbone, NAMES, steps=2)
    for (pointer, values), x in zip(before, jax.tree.leaves(backbone), strict=True):
        assert x.unsafe_buffer_pointer() == pointer
        np.testing.assert_array_equal(np.asarray(x), values)
