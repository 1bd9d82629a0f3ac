"""The headline's file: its content, and the systems that it compares."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from benchmarks.__main__ import main
from benchmarks.paper import headline, study
from benchmarks.paper.study import Point, Settings
from benchmarks.simulator.cost_model import PROFILES
from chameleon_jax.systems import SYSTEMS, get_system

TINY = Settings(seeds=(0, 1), duration_s=4.0, tolerance=0.6)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("headline")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "SLO_S", 0.5)  # of so short runs
        patch.setattr(headline, "FULL", TINY)
        patch.setattr(headline, "KNEES", TINY)
        patch.setattr(headline, "QUICK", TINY)
        patch.setattr(headline, "BATCH_TOKENS", headline.BATCH_TOKENS[:1])
        patch.setattr(headline, "S_LORA_LENGTH_FACTORS", (0.3,))
        kept = {name: headline.LADDER[name] for name in (*list(headline.LADDER)[:2], list(headline.LADDER)[-1])}
        patch.setattr(headline, "LADDER", kept)
        assert main(["paper", "--headline", "--out", str(folder), "--workers", "1"]) == 0
    return json.loads((folder / "headline.json").read_text()), (folder / "headline.md").read_text()


def test_every_system_is_compared_with_each_baseline_at_shares_of_its_knee(result):
    found, _ = result
    assert (found["kind"], found["duration_s"], found["seeds"]) == ("simulated", 4.0, [0, 1])
    assert set(found["systems"]) == set(headline.SETUPS)
    for base, rows in found["against"].items():
        knee = found["systems"][base]["knee_rps"]
        for name, row in rows.items():
            assert [load["at"] for load in row["loads"]] == list(headline.LOADS) and row["at"] == 1.045
            assert row["loads"][-1]["rps"] == pytest.approx(1.045 * knee, rel=1e-3)
            assert row["knee_ratio"] == pytest.approx(found["systems"][name]["knee_rps"] / knee, abs=2e-3)
            low, high = row["p99_interval"]
            assert low <= row["p99_change"] <= high
            if name == base:
                assert (row["p99_change"], row["p50_change"], row["knee_ratio"]) == (0, 0, 1)
            elif found["systems"][name]["profile"] != found["systems"][base]["profile"]:
                assert row["p99_change"] < 0
    assert set(found["against"][headline.PUBLISHED]) == set(headline.SETUPS)
    assert set(found["against"][headline.FAIR]) == {"s-lora", "chameleon", "chameleon-plus"}


def test_the_ladder_begins_at_its_baseline_and_ends_at_our_default(result):
    found, text = result
    first, *_, last = found["ladder"]
    assert first["p99_change"] == first["p50_change"] == 0
    published = found["against"][headline.PUBLISHED]
    assert last["p99_s"] == published["chameleon-plus"]["loads"][-1]["p99_s"]
    assert [row["length_factor"] for row in found["sweeps"]] == [0.25, 0.3]
    for row in found["sweeps"]:
        assert all(row[name] > 0 and math.isfinite(row[name]) for name in (headline.PUBLISHED, "chameleon-published"))
    for name in (*found["systems"], *(row["rung"] for row in found["ladder"])):
        assert f"| {name} |" in text


def test_a_single_seed_has_no_interval():
    values = dict.fromkeys(("ttft_p50", "ttft_p99", "tpot_p99", "worst_rank_queue", "adapter_wait_p99", "hit_rate"), 2.0)
    figures = headline._figures(Point([values | {"ttft_p99": 1.0}]), Point([values]))
    assert (figures["p99_change"], figures["p99_interval"], figures["p50_interval"]) == (-0.5, None, None)
    assert headline._percent(-0.5, None) == "-50.0%"
    assert headline._percent(-0.5, [-0.6, -0.4]) == "-50.0% [-60.0%, -40.0%]"


def test_each_rung_changes_the_system_or_the_profile():
    rungs = [(get_system(system), profile) for system, profile in headline.LADDER.values()]
    assert len(set(rungs)) == len(rungs)
    for (system, profile), (after, other) in zip(rungs, rungs[1:]):
        assert (system == after) != (profile == other)  # one of the two, or there is no telling which brought the change
    assert rungs[0] == (SYSTEMS["s-lora-published"], "a40-s-lora") and rungs[-1] == (SYSTEMS["chameleon-plus"], "a40-ours")
    assert rungs[2] == (SYSTEMS["chameleon-published"], "a40-s-lora")


def test_profiles_of_the_ladder_differ_in_what_the_rung_says():
    one, adapters, ours = (PROFILES[name] for name in (headline.ONE_PASS, headline.OUR_ADAPTERS, headline.OURS))
    assert dataclasses.replace(one, name="", passes=2) == dataclasses.replace(PROFILES[headline.S_LORA], name="")
    changed = {f.name for f in dataclasses.fields(one) if getattr(one, f.name) != getattr(adapters, f.name)}
    assert changed == {"name", "lora_overhead", "lora_token_rank", "lora_row"}
    assert adapters.lora_token_rank == ours.lora_token_rank < one.lora_token_rank
