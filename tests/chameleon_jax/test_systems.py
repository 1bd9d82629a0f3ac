from __future__ import annotations

import dataclasses

import pytest

from chameleon_jax.config import EngineConfig
from chameleon_jax.memory.eviction import POLICIES
from chameleon_jax.systems import ORDERS, SIZES, SYSTEMS, System, get_system


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_preset_sets_up_an_engine(name):
    assert EngineConfig(system=name).system == name
    assert get_system(name) is SYSTEMS[name]
    assert EngineConfig(system=SYSTEMS[name]).system is SYSTEMS[name]
    hash(EngineConfig(system=SYSTEMS[name]))


def test_systems_differ_from_one_another():
    assert len(set(SYSTEMS.values())) == len(SYSTEMS)


@pytest.mark.parametrize(
    "name,field,value",
    [
        ("chameleon-no-sched", "order", "fifo"),
        ("chameleon-lru", "eviction", "lru"),
        ("chameleon-fairshare", "eviction", "fairshare"),
        ("chameleon-gdsf", "eviction", "gdsf"),
        ("chameleon-prefetch", "prefetch_predicted", True),
        ("output-only", "size", "output"),
        ("static", "equal_levels", True),
    ],
)
def test_an_ablation_turns_one_field_of_the_paper_s_system(name, field, value):
    assert SYSTEMS[name] == dataclasses.replace(SYSTEMS["chameleon"], **{field: value})


def test_the_paper_s_baselines():
    s_lora = SYSTEMS["s-lora"]
    assert (s_lora.order, s_lora.keep_idle) == ("fifo", False)
    assert SYSTEMS["sjf"] == dataclasses.replace(s_lora, order="sjf")
    published = dataclasses.replace(s_lora, reserve="peak", cycles=True, transfers_per_load=2)
    assert SYSTEMS["s-lora-published"] == published
    published = dataclasses.replace(SYSTEMS["chameleon"], cycles=True, limit_prompts=False, transfers_per_load=2)
    assert SYSTEMS["chameleon-published"] == published
    assert SYSTEMS["chameleon-published-no-sched"] == dataclasses.replace(published, order="fifo")
    assert SYSTEMS["chameleon-published-no-cache"] == dataclasses.replace(published, eviction="lru", keep_idle=False)


def test_s_lora_s_loop_has_no_bounded_steps_and_loads_that_hold_the_device():
    for field, value, allowed in (
        ("order", "boost", "fifo, sjf, multilevel with cycles"),
        ("overlap_loads", True, "False with cycles"),
        ("bound_stalls", True, "False with cycles"),
    ):
        with pytest.raises(ValueError) as error:
            dataclasses.replace(SYSTEMS["s-lora-published"], **{field: value})
        assert str(error.value) == f"{field} is {value!r}; allowed: {allowed}"


@pytest.mark.parametrize(
    "field,value,allowed",
    [
        ("order", "lifo", ", ".join(ORDERS)),
        ("size", "input", ", ".join(SIZES)),
        ("eviction", "mru", ", ".join(POLICIES)),
        ("reserve", "all", "predicted, max_tokens, peak"),
        ("reserve", "peak", "predicted, max_tokens; peak with cycles alone"),
        ("limit_prompts", False, "True; False with cycles alone"),
        ("transfers_per_load", 0, "1 or more"),
    ],
)
def test_a_system_names_what_is_wrong(field, value, allowed):
    with pytest.raises(ValueError) as error:
        System(**{field: value})
    assert str(error.value) == f"{field} is {value!r}; allowed: {allowed}"


def test_an_unknown_system_is_named_with_those_there_are():
    for make in (get_system, lambda name: EngineConfig(system=name)):
        with pytest.raises(ValueError) as error:
            make("orca")
        assert str(error.value) == f"system is 'orca'; allowed: {', '.join(SYSTEMS)}"
