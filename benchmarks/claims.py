"""What the package promises about its speed, each promise with its target and what was measured.

There is no verdict on a group whose two timings of one thing differ too much, nor on a failed candidate.
"""

import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from benchmarks.cases import NATIVE, PYTORCH
from benchmarks.forms import LOOP

MET, MISSED, VOID, ABSENT = "met", "MISSED", "void", "not measured"
SLOPE_RANGE = (0.9, 1.05)
MANY_QUERIES = 100_000


class Claim(NamedTuple):
    number: int
    what: str
    target: str
    measured: str
    verdict: str


def candidate(group: dict, name: str) -> dict | None:
    return next((c for c in group["candidates"] if c["candidate"] == name), None)


def median(group: dict, name: str) -> float | None:
    found = candidate(group, name)
    return found["seconds"]["median"] if found and "seconds" in found and found["status"] == "timed" else None


def timed(group: dict, wanted: Callable[[dict], bool]) -> list[dict]:
    return [c for c in group["candidates"] if wanted(c) and c["status"] == "timed" and "seconds" in c]


def fastest(group: dict, wanted: Callable[[dict], bool]) -> dict | None:
    """The fastest verified candidate among those that are ``wanted`` and compute the same thing."""
    found = timed(group, lambda c: wanted(c) and c["kind"] != "other job")
    return min(found, key=lambda c: c["seconds"]["median"], default=None)


def best_pytorch(group: dict) -> dict | None:
    return fastest(group, lambda c: c["kind"] in PYTORCH)


def ratio(group: dict, base: dict | None) -> float | None:
    """How many times faster than ``base`` the native kernel is."""
    own = median(group, NATIVE)
    return base["seconds"]["median"] / own if base and own else None


def slope(sizes: Iterable[float], seconds: Iterable[float]) -> float:
    """Of the straight line through the logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(second) for second in seconds]
    return statistics.linear_regression(x, y).slope


def verdict(ok: bool, void: bool) -> str:
    return VOID if void else MET if ok else MISSED


def at_least(number: int, what: str, group: dict | None, base: Callable[[dict], dict | None], least: float) -> Claim:
    """A claim that the native kernel is ``least`` times faster than ``base``."""
    target = f"≥ {least:g} ×"
    found = base(group) if group else None
    times = ratio(group, found) if group else None
    if times is None:
        return Claim(number, what, target, "–", ABSENT)
    measured = f"{times:.2f} × {found['candidate']} ({1e3 * found['seconds']['median']:.3g} ms)"
    return Claim(number, what, target, measured, verdict(times >= least, group["void"]))


def by_name(name: str) -> Callable[[dict], dict | None]:
    return lambda group: fastest(group, lambda c: c["candidate"] == name)


def containing(words: str, kinds: tuple[str, ...]) -> Callable[[dict], dict | None]:
    return lambda group: fastest(group, lambda c: words in c["candidate"] and c["kind"] in kinds)


def share(number: int, what: str, group: dict | None, key: str, least: float) -> Claim:
    found = candidate(group, NATIVE) if group else None
    if not found or key not in found:
        return Claim(number, what, f"≥ {least:.0%}", "–", ABSENT)
    return Claim(number, what, f"≥ {least:.0%}", f"{found[key]:.0%}", verdict(found[key] >= least, group["void"]))


def linear(data: dict, letter: str, operation: str) -> Claim:
    """The slope over all sizes whose group counts; void with fewer than five."""
    low, high = SLOPE_RANGE
    what, target = f"{operation}: cost over {letter}", f"slope {low} to {high}"
    points = [g for g in data["sweeps"] if (g["letter"], g["operation"]) == (letter, operation) and median(g, NATIVE)]
    if not points:
        return Claim(6, what, target, "–", ABSENT)
    counted = [(g["size"], median(g, NATIVE)) for g in points if not g["void"]]
    if len(counted) < 5:
        return Claim(6, what, target, f"{len(counted)} of {len(points)} sizes quiet", VOID)
    found = slope(*zip(*counted, strict=True))
    sizes = f"{counted[0][0]} … {counted[-1][0]}"
    return Claim(6, what, target, f"{found:.3f} over {letter} = {sizes}", verdict(low <= found <= high, False))


def below(what: str, most: float, unit: str, value: float | None) -> Claim:
    measured = "–" if value is None else f"{value:.1f} {unit}"
    return Claim(6, what, f"< {most:g} {unit}", measured, ABSENT if value is None else verdict(value < most, False))


def verdicts(data: dict[str, Any]) -> list[Claim]:
    """All promises, in order."""

    def group(operation: str, preset: str, batch: int = 16, queries: int = 32, gradient: bool = False) -> dict | None:
        wanted = (operation, gradient, preset, batch, "float32", queries)
        return next((g for g in data["groups"] if (g["operation"], g["gradient"], g["preset"]["name"], g["batch"],
                                                   g["dtype"], g["queries"]) == wanted), None)  # fmt: skip

    loop, claims = by_name(LOOP), []
    for preset in "SML":
        claims.append(at_least(1, f"write {preset}, B = 16, literal loop", group("write", preset), loop, 15))
        claims.append(at_least(1, f"write {preset}, B = 16, best PyTorch", group("write", preset), best_pytorch, 6))
    claims.append(at_least(1, "write S, B = 1, literal loop", group("write", "S", 1), loop, 20))
    for preset, least in (("S", 4), ("M", 2.5), ("L", 1.8)):
        found = group("update_posterior", preset)
        claims.append(at_least(2, f"update_posterior {preset}, B = 16, best PyTorch", found, best_pytorch, least))
    for preset in ("L", "XL"):
        what = f"update_posterior {preset}, B = 16, share of the matrix-product rate"
        claims.append(share(2, what, group("update_posterior", preset), "of_product", 0.6))
    factored_once = by_name("K-space, factored once")
    for preset in "SML":
        claims.append(at_least(3, f"read {preset}, n = 10, Q = 32, literal loop", group("read", preset), loop, 10))
        claims.append(
            at_least(3, f"read {preset}, n = 10, Q = 32, factored once", group("read", preset), factored_once, 3.5)
        )
    for preset in "SML":
        what = f"read {preset}, Q = 10⁵, one memory, share of the bound"
        claims.append(share(3, what, group("read", preset, 1, MANY_QUERIES), "of_bound", 0.6))
    linear_operator, closed = containing("linear_operator", ("peer",)), containing("closed form", PYTORCH)
    for operation in ("kl_memory", "logdet"):
        for preset in "SML":
            found = group(operation, preset)
            claims.append(at_least(4, f"{operation} {preset}, B = 16, linear_operator", found, linear_operator, 10))
            claims.append(at_least(4, f"{operation} {preset}, B = 16, closed form", found, closed, 3))
    for preset in "SM":
        found = group("write", preset, gradient=True)
        claims.append(at_least(5, f"write {preset}, B = 16, forward and backward, literal loop", found, loop, 12))
        found, block = group("update_posterior", preset, gradient=True), containing("block form", PYTORCH)
        claims.append(
            at_least(5, f"update_posterior {preset}, B = 16, forward and backward, block form", found, block, 2.5)
        )
    for letter, operations in (("B", ("write", "update_posterior", "read")), ("T", ("write", "update_posterior"))):
        claims += [linear(data, letter, operation) for operation in operations]
    calls = data["calls"]
    claims.append(below("import beyond torch's own", 150, "ms", calls["import_ms"]["median"] if calls else None))
    added = [r["call"] - r["operator"] for r in calls.get("overhead_us", ()) if r["given"] == "floats"]
    claims.append(below("overhead of a call, the worst of three", 5, "µs", max(added, default=None)))
    return claims
