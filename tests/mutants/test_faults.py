"""The list of planted faults does not rot: each still has its one place in the code, and the tests it names exist."""

from mutants.__main__ import check
from mutants.catalogue import FAULTS
from mutants.fault import PLACES, as_pattern, switched
from mutants.trees import little_optimised


def test_every_fault_has_one_place_and_its_tests_exist():
    assert not check()


def test_the_build_of_faults_finds_its_optimisation():
    assert '"-O1"' in little_optimised()


def test_there_are_faults_everywhere():
    assert len(FAULTS) >= 66
    assert {fault.place for fault in FAULTS} == set(PLACES)


def test_whitespace_does_not_count():
    import re

    assert re.fullmatch(as_pattern("f(a, b) + 1;"), "f(\n  a,\n  b)+1;")
    assert not re.fullmatch(as_pattern("int x"), "intx")


def test_statements_and_expressions_get_their_switch():
    fault = next(fault for fault in FAULTS if fault.place == "cpu")
    assert switched(fault._replace(after="b"), "a") == f"(fastkm_fault<{fault.number}> ? (b) : (a))"
    assert switched(fault._replace(after="b;"), "a;").startswith("{ if (")
