"""How long the command line and the package take to start: medians of fresh processes.

    python benchmarks/startup.py

Goals: `para-jax --help` under 0.5 s, `import para_jax` under 1.2 s. The package imports its parts on first use, so
`from para_jax import Backbone`, which brings in JAX and Flax, is held to 1.2 s, too. An empty Python process is part of
all of them.
"""

from __future__ import annotations

import subprocess
import sys

import common

COMMANDS = {
    "python, nothing else": ["-c", "pass"],
    "para-jax --help": ["-m", "para_jax", "--help"],
    "import para_jax": ["-c", "import para_jax"],
    "from para_jax import Backbone": ["-c", "from para_jax import Backbone"],
}
GOALS = {"para-jax --help": 0.5, "import para_jax": 1.2, "from para_jax import Backbone": 1.2}


def main() -> None:
    parser = common.parser(__doc__, rounds=11)
    args = parser.parse_args()
    environment = common.environment()

    def start(words: list[str]) -> float:
        run = [sys.executable, *words]
        seconds, done = common.timed(lambda: subprocess.run(run, capture_output=True, text=True))
        if done.returncode:
            raise SystemExit(f"{' '.join(run)} ended with exit code {done.returncode}:\n{done.stderr}")
        return seconds

    # Once unmeasured: byte code is written, and files come into the page cache.
    for words in COMMANDS.values():
        start(words)
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(args.rounds):
        for name, words in COMMANDS.items():
            seconds[name].append(start(words))

    results = {name: common.spread(values) for name, values in seconds.items()}
    rows = [(name, common.shown(value)) for name, value in results.items()]
    common.print_table("start of a fresh process", ("", "seconds"), rows)
    goals = [common.goal(f"{name}, seconds", results[name], at_most=limit) for name, limit in GOALS.items()]
    common.print_goals(goals)
    common.write_json(args.json, "startup", {"environment": environment, "seconds": results, "goals": goals})


if __name__ == "__main__":
    main()
