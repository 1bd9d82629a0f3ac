"""All figures by the name that the command line knows them by."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.paper import cache_figures, extra_figures, hardware_figures, load_figures, scheduler_figures
from benchmarks.paper.study import Study
from benchmarks.paper.tables import Outcome

FIGURES: dict[str, Callable[[Study], Outcome]] = {
    "2": cache_figures.idle_ttft,
    "4": cache_figures.number_of_adapters,
    "8": cache_figures.spikes,
    "11": load_figures.ttft_p99,
    "12": load_figures.tbt,
    "13": load_figures.ttft_p50,
    "14": load_figures.critical_path,
    "15": load_figures.over_time,
    "16": load_figures.queueing,
    "17": cache_figures.policies,
    "18": cache_figures.prefetch,
    "19": scheduler_figures.predictor_accuracy,
    "20": cache_figures.many_adapters,
    "21": scheduler_figures.other_traces,
    "22": scheduler_figures.static_levels,
    "23": hardware_figures.models,
    "24": hardware_figures.memory,
    "25": hardware_figures.tensor_parallel,
    "plus": extra_figures.plus,
    "locality": extra_figures.locality,
    "calibration": extra_figures.calibration,
}
