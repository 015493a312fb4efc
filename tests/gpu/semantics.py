"""ttsem, as the tests use it: every kernel is read once, and programs that draw tickets are ordered by them.

A launch is executed from the IR that Triton's frontend makes of a kernel (TTIR). Reading that IR takes far longer than
executing it on a few numbers, so what was read is kept. ttsem takes programs as unordered when it looks for races. Here
an integer ticket orders them, if it is drawn by an atomic addition that both acquires and releases.
"""

import contextlib
import functools
import re
from collections.abc import Iterator

from ttsem import harness, mlir, pidraces, sanitize

ACQUIRE_RELEASE, WHOLE_DEVICE = r"\bsem = 4\b", r"\bscope = 1\b"  # as MLIR's generic form prints them
_find_any_race, _parse, _specialize = pidraces.find_race, mlir.parse, harness._specialize
_lowered: dict[tuple, str] = {}


def install(monkeypatch) -> None:
    monkeypatch.setattr(harness, "ir_for_launch", lambda record, stage, target: lowered(record, stage, target))
    monkeypatch.setattr(mlir, "parse", parsed)
    monkeypatch.setattr(pidraces, "find_race", find_race)
    monkeypatch.setattr(sanitize, "lookback_buffers", lambda *_: frozenset())
    monkeypatch.setenv("TTSEM_GRID_ORDER", "shuffle:1")


def lowered(record, stage: str, target) -> str:
    """The IR of a launch after a stage of the compiler, in MLIR's generic form."""
    options, signature, constexprs, attributes = _specialize(record.fn, record.args, record.kwargs, target)
    hints = None if stage == "ttir" else str(attributes)
    key = (record.fn, stage, str(target), str(signature), str(constexprs), hints, str(options))
    if key not in _lowered:
        mlir.enable_generic_printing()
        with without_alignment() if stage == "ttir" else contextlib.nullcontext():
            _lowered[key] = harness._stage_text(record, stage, target)
    return _lowered[key]


@contextlib.contextmanager
def without_alignment() -> Iterator[None]:
    """TTIR is made without the alignment of arguments, which later passes use: it is the same for more shapes."""

    def specialize(*arguments):
        return *_specialize(*arguments)[:3], {}

    harness._specialize = specialize
    try:
        yield
    finally:
        harness._specialize = _specialize


parsed = functools.lru_cache(maxsize=64)(_parse)


# ------------------------------------------------------------------------------------------------------------- tickets


def is_ticket(entry) -> bool:
    """Whether an access, as ttsem logs it, is an atomic update of one integer that orders programs."""
    _, kind, text, addresses, *_ = entry
    return kind == "a" and addresses.size == 1 and all(re.search(x, text) for x in (ACQUIRE_RELEASE, WHOLE_DEVICE))


def find_race(log):
    """A pair of accesses of two programs that nothing orders, one of them a store.

    What a program did before it drew from a ticket comes before what any program does that drew from it later. The
    log holds one order of the programs; races in other orders of drawing are found when those are run.
    """
    if not log:
        return None
    drawn: dict[object, tuple[int, int]] = {}  # program -> its ticket, and where in the log it drew
    for i, entry in enumerate(log):
        if is_ticket(entry):
            drawn.setdefault(entry[0], (int(entry[3][0]), i))

    def is_later(i, entry):
        return entry[0] in drawn and i > drawn[entry[0]][1]

    before = [entry for i, entry in enumerate(log) if not is_later(i, entry)]
    after = [entry for i, entry in enumerate(log) if is_later(i, entry)]
    if race := _find_any_race(before):
        return race
    for program in {entry[0] for entry in after}:
        ticket, place = drawn[program]
        earlier = {p for p, (t, i) in drawn.items() if t == ticket and i < place} | {program}
        own = [entry for entry in after if entry[0] == program]
        unordered = [entry for entry in before if entry[0] not in earlier]
        unordered += [entry for entry in after if entry[0] != program]
        if race := _find_any_race([("another", *entry[1:]) for entry in unordered] + own):
            return race
    return None
