"""What is seen of long work: a bar that changes in place on a terminal, lines elsewhere."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from para_jax import progress

WORK = """
import sys, time
from para_jax import progress
progress.REDRAWN = 0.0
pace = progress.Pace("rows", progress.say)
for done in range(1, 4):
    pace(done, 3)
    if done == 2:
        progress.say("a line of its own")
        progress.to_stderr("another")
if len(sys.argv) > 1:
    progress.Pace("rows", progress.say)(1, 3)
    progress.end_bars()
progress.say("the end")
"""


def on_a_terminal(columns: int, *arguments: str) -> str:
    """What the work writes to a terminal of this width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    with subprocess.Popen([sys.executable, "-c", WORK, *arguments], stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        written = b""
        try:
            while part := os.read(ours, 4096):
                written += part
        except OSError:  # Linux raises it at the end
            pass
    os.close(ours)
    assert process.returncode == 0
    return written.decode()


def last_states(written: str) -> list[str]:
    """Each line as it stands in the end."""
    states = [[part for part in line.split("\r") if part.strip()] for line in written.split("\n")]
    return [parts[-1] for parts in states if parts]


def test_a_bar_changes_in_place_and_lines_stand_above_it():
    written = on_a_terminal(80)
    above, another, bar, end = last_states(written)
    assert (above.strip(), another.strip(), end.strip()) == ("a line of its own", "another", "the end")
    assert bar.startswith("100% |") and "3/3 rows" in bar
    assert "1/3 rows" in written and "\n" not in written.partition("1/3 rows")[2].partition("2/3 rows")[0]


def test_an_unfinished_bar_ends_before_what_follows():
    *_, bar, end = last_states(on_a_terminal(80, "unfinished"))
    assert bar.startswith(" 33% |") and end.strip() == "the end"


def test_a_terminal_without_a_width_has_lines():
    assert "%" not in on_a_terminal(0)


def test_lines_go_to_those_who_take_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    lines: list[str] = []
    pace = progress.Pace("rows", lines.append)
    for done in range(1, 4):
        pace(done, 3)
    assert lines[0] == "1/3 rows" and [line.split()[0] for line in lines] == ["1/3", "2/3", "3/3"]
    assert lines[1].endswith(" left") and "a second" in lines[1]
