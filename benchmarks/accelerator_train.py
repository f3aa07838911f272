"""The training stage of `accelerator.py`: a step as `para_jax.training.loop.finetune` plans, compiles and runs it.

One tenant's four rows, or eight tenants' shorter ones, with each kind of remat. What keeps least comes first: a process
knows the highest memory that it ever held, so a run's peak is its own if it is above those before it. A run that does
not fit is repeated with as many layers as fit.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import common
from accelerator_stages import Context, Figures, backbone_shapes, compiled_side_by_side, config_of, drawn, rate, spread

REMATS = ("layers", "products", "none")  # by what they keep
ROOM = 0.97  # of the device's memory that a program may plan to use


class Case(NamedTuple):
    """What is trained: `rows` of `length` tokens of each tenant in a step, `response` of them learnt."""

    remat: str
    tenants: int
    rows: int
    length: int
    response: int

    @property
    def name(self) -> str:
        return f"{self.tenants} tenant{'s' if self.tenants > 1 else ''}, remat {self.remat}"


class Compiled(NamedTuple):
    """The programs of a case by name, or exceptions, and the seconds that they took."""

    programs: dict[str, Any]
    trace_s: float
    compile_s: dict[str, float]
    side_by_side: int

    def check(self) -> None:
        """Raises the exception of a program that was not compiled."""
        for program in self.programs.values():
            if isinstance(program, Exception):
                raise program

    def memory(self) -> float | None:
        """Bytes that the largest program holds while it runs; None if it was not compiled."""
        most = 0.0
        for program in self.programs.values():
            if isinstance(program, Exception):
                return None
            m = program.memory_analysis()
            own = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
            most = max(most, own)
        return most


def cases_of(quick: bool) -> list[Case]:
    """The same tokens and targets in all of them."""
    if quick:
        return [Case("layers", 1, 4, 64, 16), Case("none", 8, 1, 32, 8)]
    return [Case(remat, *sizes) for remat in REMATS for sizes in ((1, 4, 2048, 256), (8, 1, 1024, 128))]


def measure(context: Context) -> None:
    jax = context.jax()
    shape = "small" if context.quick else "llama2-7b"
    cases, layers = cases_of(context.quick), config_of(shape).num_hidden_layers
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    rest = run_all(context, shape, layers, cases, limit, last=False)
    if rest:
        fewer = min(rest.values())
        run_all(context, shape, fewer, list(rest), limit, last=True)


def run_all(
    context: Context, shape: str, layers: int, cases: list[Case], limit: int | None, last: bool
) -> dict[Case, int]:
    """Measures cases at a depth. Returns those that do not fit, and the layers that would; reports them, if `last`."""
    config = config_of(shape, layers)
    made, too_large = compile_cases(config, cases), {}
    backbone = None
    for case in cases:
        compiled = made.pop(case)
        need = compiled.memory()
        share = limit / need if limit and need else 0.6
        if not last and limit and need and need > ROOM * limit:
            too_large[case] = fewer_layers(layers, share)
            continue
        try:
            compiled.check()
            if backbone is None:
                backbone = drawn(backbone_shapes(config, stacked=True))
            found = figures(Running(config, case), backbone, compiled, context.quick)
            context.add(case.name, found | {"layers_of_the_model": config_of(shape).num_hidden_layers})
        except Exception as error:
            if last or "RESOURCE_EXHAUSTED" not in str(error):
                context.fail(case.name, error)
            else:
                too_large[case] = fewer_layers(layers, min(share, 0.8))
    return too_large


def fewer_layers(layers: int, share: float) -> int:
    """As many as fit if memory grows with them, and not all."""
    return max(1, min(layers - 1, math.floor(layers * share * 0.95)))


def compile_cases(config: Any, cases: list[Case]) -> dict[Case, Compiled]:
    """All programs side by side, from shapes alone; `update` is the same for every remat."""
    shapes = backbone_shapes(config, stacked=True)
    traced: dict[Case, float] = {}
    lowered: dict[Any, Any] = {}
    for case in cases:
        traced[case], programs = common.timed(lambda case=case: Running(config, case).lower(shapes))
        for name, program in programs.items():
            lowered.setdefault((name, case.tenants, "" if name == "update" else case.remat), program)
    made = compiled_side_by_side(lowered)
    found: dict[Case, Compiled] = {}
    for case in cases:
        mine = {(case.tenants, ""), (case.tenants, case.remat)}
        own = {name: x for (name, *of), x in made.items() if tuple(of) in mine}
        programs, seconds = ({name: x[i] for name, x in own.items()} for i in (1, 0))
        found[case] = Compiled(programs, traced[case], seconds, len(made))
    return found


class Running:
    """A run of a case, planned as `finetune` plans it, before its first step."""

    def __init__(self, config: Any, case: Case):
        import numpy as np

        from para_jax import AdapterBank, Example, ParaConfig, Settings
        from para_jax.training.places import Schedule, TenantLayout
        from para_jax.training.shapes import Device, plan_run
        from para_jax.training.state import Sums, TrainState, stack_settings

        names, draw = [f"tenant-{i}" for i in range(case.tenants)], np.random.default_rng(0)

        def example() -> Example:
            ids = draw.integers(0, config.vocab_size, case.length + 1)
            return Example.of(ids[: -case.response].tolist(), ids[-case.response :].tolist())

        examples = {name: [example() for _ in range(case.rows)] for name in names}
        settings = dict.fromkeys(names, Settings(steps=1000, lr=1e-3))
        self.config, self.case = config, case
        self.layout = TenantLayout.of(None, case.tenants, case.rows)
        bank = self.layout.shard_bank(AdapterBank.create(dict.fromkeys(names, ParaConfig(r=12)), config))
        schedule = Schedule(bank, settings, self.layout)
        self.plan = plan_run(examples, {}, settings, self.layout, schedule, 0, Device.of(config))
        step_tenants = schedule.step_tenants(dict.fromkeys(names, 0), ())
        assert step_tenants is not None
        rows = self.layout.step_rows(step_tenants, examples, 0, dict.fromkeys(names, 0))
        self.batches = list(self.layout.batches(step_tenants, rows, self.plan.shapes))
        self.rules, self.slots = stack_settings(bank, settings), self.layout.slots(bank, step_tenants)
        self.state = TrainState.create(bank)
        self.sums = Sums.create(bank, self.layout.groups, schedule.places)

    def lower(self, backbone: Any) -> dict[str, Any]:
        """The step's programs for a backbone of shapes."""
        from para_jax.training.step import accumulate, update

        first = {at: batch for at, batch in reversed(self.batches)}
        state, shared = self.state, (self.rules, self.sums)
        found = {
            f"micro-batch {at}": accumulate.lower(
                backbone, state.bank, state.taken, *shared, batch, self.slots, remat=self.case.remat, seed=0
            )
            for at, batch in first.items()
        }
        return found | {"update": update.lower(state, *shared, self.slots)}

    def step(self, backbone: Any, programs: dict[str, Any]) -> Any:
        """Takes a step; state and sums are donated and come back."""
        for at, batch in self.batches:
            self.sums = programs[f"micro-batch {at}"](
                backbone, self.state.bank, self.state.taken, self.rules, self.sums, batch, self.slots, seed=0
            )
        self.state, self.sums, values = programs["update"](self.state, self.rules, self.sums, self.slots)
        return values


def figures(run: Running, backbone: Any, compiled: Compiled, quick: bool) -> Figures:
    """Times steps, two at a time: the device does not wait for the host between them."""
    import jax

    warm_up, repeats = (1, 2) if quick else (2, 3)
    device, case = jax.local_devices()[0], run.case
    before = (device.memory_stats() or {}).get("peak_bytes_in_use")
    values: Any = None
    for _ in range(warm_up):
        values = jax.block_until_ready(run.step(backbone, compiled.programs))

    def two() -> Any:
        run.step(backbone, compiled.programs)
        return jax.block_until_ready(run.step(backbone, compiled.programs))

    seconds = [common.timed(two)[0] / 2 for _ in range(repeats)]
    loss = float(jax.numpy.mean(values["loss"]))
    if not math.isfinite(loss):
        raise RuntimeError(f"the loss is {loss}")
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    tokens = case.tenants * case.rows * case.length
    shapes = " and ".join(f"{shape.rows} x {shape.length}" for shape in run.plan.shapes)
    return {
        "tokens_per_s": rate(tokens, seconds),
        "step_s": spread(seconds),
        "peak_memory_gb": peak and peak / 1e9,
        "peak_memory_is_of_this_run": peak and peak > before,
        "program_memory_gb": (compiled.memory() or 0.0) / 1e9,
        "tokens_a_step": tokens,
        "response_tokens_a_step": case.tenants * case.rows * case.response,
        "tenants": case.tenants,
        "rows_a_tenant": case.rows,
        "row_tokens": case.length,
        "micro_batch": shapes,
        "micro_batches_a_step": len(run.batches),
        "method": "para r=12",
        "remat": case.remat,
        "attention": backbone.attention,
        "layers": run.config.num_hidden_layers,
        "first_loss": loss,
        "trace_s": compiled.trace_s,
        "compile_s": compiled.compile_s,
        "compiled_side_by_side": compiled.side_by_side,
    }
