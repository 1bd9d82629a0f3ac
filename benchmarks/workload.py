"""A stream of requests as Chameleon's evaluation draws them: arrival times, lengths and adapters.

Lengths come from a trace, or from a small model fitted to the Azure LLM inference trace 2023, conversation (Microsoft,
AzurePublicDataset, CC-BY 4.0). Popularity follows the paper (section 5): ranks of equal shares, a power law within each.
Independent draws have less temporal locality than real adapters do; `WorkloadSpec.locality` adds it.

Arrivals, lengths and adapters come from separate random streams: the i-th request has the same lengths and adapter
whatever the rate, and a change of locality leaves arrivals and lengths alone.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import gzip
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Any, TypeAlias

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from chameleon_jax.checks import require

ARRIVALS = ("poisson", "gamma", "trace")
SHAPES = ("flat", "diurnal", "spike")
TRACE_COLUMNS = (("arrival_s", "input_tokens", "output_tokens"), ("TIMESTAMP", "ContextTokens", "GeneratedTokens"))

# Azure LLM inference trace 2023, conversation: 19,366 requests. The quantile functions below are linear between these knots.
AZURE = {
    "input": {"mean": 1155.0, "p50": 1020.0, "p90": 2734.5, "p99": 4142.0},
    "output": {"mean": 211.0, "p50": 129.0, "p90": 424.0, "p99": 601.0},
}
AZURE_RPS, AZURE_GAP_CV, AZURE_CORRELATION = 5.53, 1.09, -0.11
QUANTILES = (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99, 0.999, 1)
INPUT_TOKENS = (2, 29, 181, 207, 387, 403, 703, 1020, 1071, 1099, 1130, 1315, 1876, 2734, 4083, 4142, 6179, 14050)
OUTPUT_TOKENS = (7, 16, 41, 54, 77, 91, 103, 129, 177, 217, 384, 400, 411, 424, 451, 601, 954, 1000)
# Long outputs belong to inputs of middling length: the input's quantile, folded at PEAK, and the output's are a Gaussian
# copula of this correlation. Fitted to the trace's median and mean output in each tenth of the inputs.
PEAK, FOLDED_CORRELATION = 0.58, 0.7

# A repeat copies the request `lag` places before: P(lag >= k) = k ** -LAG_EXPONENT, k = 1, 2, ...
LAG_EXPONENT = 0.8
# Hit rates of an LRU over a real LoRA trace (image generation, 874 adapters, popularity exponent about 0.9), by slots.
REAL_HIT_RATES = {8: 0.83, 32: 0.88, 128: 0.92}
REAL_HIT_RATES_SHUFFLED = {8: 0.10, 32: 0.29, 128: 0.61}

_cdf, _inverse_cdf = np.vectorize(NormalDist().cdf, otypes=[float]), np.vectorize(NormalDist().inv_cdf, otypes=[float])


Rps: TypeAlias = Annotated[float, typer.Option(help="Mean rate of arrivals, requests a second.")]
Duration: TypeAlias = Annotated[float, typer.Option("--duration", help="Time in which requests arrive, seconds.")]
Seed: TypeAlias = Annotated[int, typer.Option(help="Seed of the random workload; the same seed gives the same requests.")]
LengthFactor: TypeAlias = Annotated[
    float, typer.Option(help="Factor by which Azure's input and output lengths are multiplied.")
]
MaxInput: TypeAlias = Annotated[
    int | None, typer.Option(help="Longest input, tokens; longer ones are cut (default: no limit).")
]
MaxOutput: TypeAlias = Annotated[
    int | None, typer.Option(help="Longest output, tokens; longer ones are cut (default: no limit).")
]
NumAdapters: TypeAlias = Annotated[int, typer.Option(help="Adapters that requests name.")]
Ranks: TypeAlias = Annotated[str, typer.Option(help="Ranks of the adapters, comma-separated; adapters take them in turn.")]
AdapterExponent: TypeAlias = Annotated[
    float, typer.Option(help="Exponent of the popularity of adapters within a rank; 0 gives equal shares.")
]
Locality: TypeAlias = Annotated[
    float, typer.Option(help="Probability that a request names a recent request's adapter, 0 or more and below 1.")
]
Arrivals: TypeAlias = Annotated[str, typer.Option(help=f"Distribution of the gaps between arrivals: {', '.join(ARRIVALS)}.")]
Shape: TypeAlias = Annotated[str, typer.Option(help=f"Rate of arrivals over time: {', '.join(SHAPES)}.")]
PeakFactor: TypeAlias = Annotated[
    float, typer.Option(help="Highest rate of arrivals divided by the lowest, for diurnal and spike.")
]
SpikeShare: TypeAlias = Annotated[float, typer.Option(help="Share of each period that is busy, 0 to 1, for spike.")]
Trace: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="CSV or CSV.gz with Azure's columns, to take lengths from (default: lengths are drawn as Azure's).",
    ),
]


@dataclasses.dataclass(frozen=True)
class WorkloadSpec:
    """Parameters of a workload.

    Attributes:
        rps: Mean requests a second over the whole duration, whatever the shape.
        duration_s: Length in seconds; every arrival is below it.
        length_factor: Scale of input and output tokens, which stay at 1 at least. The paper scales Azure's by a factor that it
            does not give.
        max_input: Tokens to which longer inputs are cut after scaling. None cuts nothing.
        max_output: Tokens to which longer outputs are cut after scaling. None cuts nothing.
        ranks: Distinct ranks. Adapter i has rank ranks[i % len(ranks)], so each rank has an equal share of the adapters.
        rank_exponent: Popularity of the k-th smallest rank, k = 1, 2, ..., is k ** -rank_exponent.
        adapter_exponent: Popularity of the k-th adapter of a rank is k ** -adapter_exponent.
        locality: Probability that a request names the adapter of a recent one (see LAG_EXPONENT) instead of an independent
            draw. Expected popularity does not change with it; the popularity in one run scatters more. With 874 adapters of
            one rank, adapter_exponent 0.9 and 36,000 requests, an LRU that starts empty with 8, 32, 128 slots hits 83, 88,
            92 % at 0.84, as in the real trace, and shuffled 12, 31, 60 % (real: 10, 29, 61 %). At 0 it hits 12, 30, 54 %.
        arrivals: Gaps that are exponential ("poisson"), gamma-distributed ("gamma"), or the trace's, rescaled so that the
            trace's mean rate becomes rps ("trace").
        cv: Standard deviation of gamma gaps over their mean.
        shape: Rate over time, made by warping time: "flat", "diurnal" (a sinusoid, lowest at the ends of a period) or "spike"
            (the middle spike_share of each period is busy).
        peak_factor: Highest rate over lowest, for diurnal and spike.
        spike_share: Share of the time that is a spike.
        period_s: Seconds of one cycle. None takes the duration.
        trace: CSV or CSV.gz with the columns of one of TRACE_COLUMNS, the second being Azure's own. It gives lengths, in order
            from a random request on, and starts again at its end.
    """

    rps: float
    duration_s: float
    seed: int = 0
    length_factor: float = 1.0
    max_input: int | None = None
    max_output: int | None = None
    num_adapters: int = 100
    ranks: tuple[int, ...] = (8, 16, 32, 64, 128)
    rank_exponent: float = 0.0
    adapter_exponent: float = 1.0
    locality: float = 0.0
    arrivals: str = "poisson"
    cv: float = 1.0
    shape: str = "flat"
    peak_factor: float = 3.0
    spike_share: float = 0.1
    period_s: float | None = None
    trace: Path | None = None

    def __post_init__(self) -> None:
        for field in ("rps", "duration_s", "length_factor"):
            require(0 < getattr(self, field) < np.inf, field, getattr(self, field), "above 0")
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        for field in ("max_input", "max_output"):
            limit = getattr(self, field)
            require(limit is None or limit >= 1, field, limit, "1 or more, or None")
        require(self.num_adapters >= 1, "num_adapters", self.num_adapters, "1 or more")
        distinct = len(set(self.ranks)) == len(self.ranks) > 0
        require(distinct and min(self.ranks) >= 1, "ranks", self.ranks, "one or more distinct ranks of 1 or more")
        for field in ("rank_exponent", "adapter_exponent"):
            require(0 <= getattr(self, field) < np.inf, field, getattr(self, field), "0 or more")
        require(0 <= self.locality < 1, "locality", self.locality, "0 or more, below 1")
        require(self.arrivals in ARRIVALS, "arrivals", self.arrivals, ", ".join(ARRIVALS))
        require(0.01 <= self.cv <= 100, "cv", self.cv, "0.01 to 100")
        require(self.cv == 1 or self.arrivals == "gamma", "cv", self.cv, f"1 where arrivals is {self.arrivals!r}")
        require(self.shape in SHAPES, "shape", self.shape, ", ".join(SHAPES))
        require(1 <= self.peak_factor < np.inf, "peak_factor", self.peak_factor, "1 or more")
        require(0 < self.spike_share < 1, "spike_share", self.spike_share, "above 0, below 1")
        period = self.period_s
        require(period is None or 0 < period <= self.duration_s, "period_s", period, "above 0, at most duration_s, or None")
        require(self.arrivals != "trace" or self.trace is not None, "trace", self.trace, "a file where arrivals is 'trace'")


@dataclasses.dataclass(frozen=True)
class Workload:
    """Arrays of n requests in order of arrival.

    Attributes:
        arrival_s: `[n]` float64, ascending seconds from the start.
        input_tokens: `[n]` int64, 1 or more.
        output_tokens: `[n]` int64, 1 or more.
        adapter: `[n]` int64, index into `ranks`.
        ranks: `[num_adapters]` int64, rank of each adapter.
    """

    arrival_s: np.ndarray
    input_tokens: np.ndarray
    output_tokens: np.ndarray
    adapter: np.ndarray
    ranks: np.ndarray

    def __len__(self) -> int:
        return len(self.arrival_s)


def generate(spec: WorkloadSpec) -> Workload:
    """Draw a workload; the same spec gives the same one."""
    start_rng, gap_rng, length_rng, adapter_rng = np.random.default_rng(spec.seed).spawn(4)
    trace = None
    if spec.trace is not None:
        trace = read_trace(spec.trace)
        trace = np.roll(trace, -int(start_rng.integers(len(trace))), axis=0)
    arrival_s = _warp(spec, _unit_arrivals(spec, trace, gap_rng))
    lengths = _azure_lengths(len(arrival_s), length_rng) if trace is None else np.resize(trace[:, 1:], (len(arrival_s), 2))
    limits = [np.inf if limit is None else limit for limit in (spec.max_input, spec.max_output)]
    tokens = np.clip(np.rint(lengths * spec.length_factor), 1, limits).astype(np.int64)
    ranks = np.resize(np.array(spec.ranks, np.int64), spec.num_adapters)
    adapter = _adapters(spec, ranks, len(arrival_s), adapter_rng)
    return Workload(arrival_s, tokens[:, 0], tokens[:, 1], adapter, ranks)


def read_trace(path: Path) -> np.ndarray:
    """Read gaps and lengths of a trace, in the order of time.

    Returns:
        `[requests, 3]` float64: the gap to the request before, in mean gaps (the first is 1), input tokens, output tokens.

    Raises:
        ValueError: The file has other columns, gaps in its rows, or no two different times.
    """
    with gzip.open(path, "rt", newline="") if path.suffix == ".gz" else path.open(newline="") as file:
        reader = csv.DictReader(file)
        columns = next((c for c in TRACE_COLUMNS if set(c) <= set(reader.fieldnames or ())), None)
        allowed = " or ".join(",".join(names) for names in TRACE_COLUMNS)
        require(columns is not None, f"header of {path}", ",".join(reader.fieldnames or ()), f"one with {allowed}")
        rows = [[row[name] for name in columns or ()] for row in reader]
    whole = len({row[0] for row in rows}) > 1 and all(all(row) for row in rows)
    require(whole, f"content of {path}", f"{len(rows)} rows", "rows without a gap, of two or more different times")
    time, *tokens = zip(*rows, strict=True)
    if columns == TRACE_COLUMNS[1]:
        stamps = np.array([text.removesuffix("Z").removesuffix("+00:00") for text in time], "datetime64[ns]")
        seconds = (stamps - stamps[0]).astype(np.int64) / 1e9
    else:
        seconds = np.array(time, np.float64)
    order = np.argsort(seconds, kind="stable")
    gaps = np.diff(seconds[order])
    return np.column_stack([np.append(1, gaps / gaps.mean()), np.array(tokens, np.float64).T[order]])


def _unit_arrivals(spec: WorkloadSpec, trace: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """Arrival times of a process with one arrival a unit of time, `[n]` ascending, below rps * duration_s."""
    end = spec.rps * spec.duration_s
    count = int(end + 6 * spec.cv * end**0.5) + 16  # almost always enough
    arrivals = np.zeros(1)
    while arrivals[-1] < end:
        if spec.arrivals == "trace" and trace is not None:
            gaps = trace[:, 0]
        else:
            gaps = rng.gamma(spec.cv**-2, spec.cv**2, count)  # cv 1: exponential
        arrivals = np.append(arrivals, arrivals[-1] + np.cumsum(gaps))
    return arrivals[1 : np.searchsorted(arrivals, end)]


def _warp(spec: WorkloadSpec, unit: np.ndarray) -> np.ndarray:
    """Seconds at which the cumulative rate reaches `unit`, piecewise linear and exact for flat and spike."""
    period = spec.period_s or spec.duration_s
    if spec.shape == "diurnal":
        phase = np.linspace(0, 1, 257)
        swing = (spec.peak_factor - 1) / (spec.peak_factor + 1)
        area = phase - swing * np.sin(2 * np.pi * phase) / (2 * np.pi)
    elif spec.shape == "spike":
        phase = np.array([0, 0.5 - spec.spike_share / 2, 0.5 + spec.spike_share / 2, 1])
        area = phase + (spec.peak_factor - 1) * np.clip(phase - phase[1], 0, spec.spike_share)
    else:
        phase = area = np.array([0.0, 1.0])
    cycle = np.arange(np.ceil(spec.duration_s / period))[:, None]
    seconds = np.append((cycle + phase[:-1]) * period, len(cycle) * period)
    cumulative = np.append(cycle * area[-1] + area[:-1], len(cycle) * area[-1])
    total = np.interp(spec.duration_s, seconds, cumulative)
    return np.interp(unit * (total / (spec.rps * spec.duration_s)), cumulative, seconds)


def _azure_lengths(count: int, rng: np.random.Generator) -> np.ndarray:
    """Input and output tokens of the fitted model, `[count, 2]` float64."""
    uniform = np.clip(rng.random((count, 2)), 1e-12, 1 - 1e-12)
    folded = np.where(uniform[:, 0] < PEAK, uniform[:, 0] / PEAK, (1 - uniform[:, 0]) / (1 - PEAK))
    own = (1 - FOLDED_CORRELATION**2) ** 0.5
    output = _cdf(FOLDED_CORRELATION * _inverse_cdf(np.clip(folded, 1e-12, 1 - 1e-12)) + own * _inverse_cdf(uniform[:, 1]))
    return np.column_stack([np.interp(uniform[:, 0], QUANTILES, INPUT_TOKENS), np.interp(output, QUANTILES, OUTPUT_TOKENS)])


def _adapters(spec: WorkloadSpec, ranks: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Adapter of each request, `[count]` int64: an independent draw, or the adapter of the request `lag` places before."""
    uniform = rng.random((count, 3))
    cumulative = np.cumsum(popularity(spec, ranks))
    drawn = np.searchsorted(cumulative, uniform[:, 0] * cumulative[-1], side="right")
    index = np.arange(count)
    lag = np.minimum((1 - uniform[:, 1]) ** (-1 / LAG_EXPONENT), count).astype(np.int64)
    repeats = (uniform[:, 2] < spec.locality) & (lag <= index)
    origin = np.where(repeats, index - lag, index)
    while not np.array_equal(origin, origin[origin]):  # a copy of a copy: halves the chains each time
        origin = origin[origin]
    return drawn[origin]


def popularity(spec: WorkloadSpec, ranks: np.ndarray) -> np.ndarray:
    """Compute the expected share of each adapter's requests, `[num_adapters]` float64; the sum is 1."""
    share = np.empty(len(ranks))
    for place, rank in enumerate(np.unique(ranks)):
        own = np.arange(1, np.sum(ranks == rank) + 1) ** -float(spec.adapter_exponent)
        share[ranks == rank] = own / own.sum() * (place + 1) ** -float(spec.rank_exponent)
    return share / share.sum()


def lru_hit_rate(adapter: np.ndarray, slots: int) -> float:
    """Share of requests that find their adapter in an LRU cache of `slots` adapters that starts empty."""
    cache: collections.OrderedDict[int, None] = collections.OrderedDict()
    hits = 0
    for name in adapter.tolist():
        hits += name in cache
        cache[name] = None
        cache.move_to_end(name)
        if len(cache) > slots:
            cache.popitem(last=False)
    return hits / max(len(adapter), 1)


def _report(workload: Workload) -> Table:
    """Statistics of a workload beside the published ones."""
    table = Table("statistic", "workload", "published")
    gaps = np.diff(workload.arrival_s)
    table.add_row("requests/s", f"{1 / gaps.mean():.2f}", f"{AZURE_RPS}")
    table.add_row("gap CV", f"{gaps.std() / gaps.mean():.2f}", f"{AZURE_GAP_CV}")
    for name, tokens in (("input", workload.input_tokens), ("output", workload.output_tokens)):
        values = [tokens.mean(), *np.percentile(tokens, [50, 90, 99])]
        for (statistic, azure), value in zip(AZURE[name].items(), values, strict=True):
            table.add_row(f"{name} tokens {statistic}", f"{value:.0f}", f"{azure:.0f}")
    correlation = np.corrcoef(workload.input_tokens, workload.output_tokens)[0, 1]
    table.add_row("input-output correlation", f"{correlation:.2f}", f"{AZURE_CORRELATION}", end_section=True)
    for slots, real in REAL_HIT_RATES.items():
        table.add_row(f"LRU hits, {slots} slots", f"{lru_hit_rate(workload.adapter, slots):.1%}", f"{real:.0%}")
    table.caption = "Published: Azure 2023 conversation; hits: a real LoRA trace, 874 adapters"
    return table


def rank_list(text: str) -> tuple[int, ...]:
    """Ranks of a comma-separated list."""
    return tuple(int(rank) for rank in text.split(","))


def main(
    rps: Rps,
    duration_s: Duration,
    seed: Seed = 0,
    length_factor: LengthFactor = 1.0,
    max_input: MaxInput = None,
    max_output: MaxOutput = None,
    num_adapters: NumAdapters = 100,
    ranks: Ranks = "8,16,32,64,128",
    rank_exponent: Annotated[float, typer.Option(help="Exponent of the popularity of ranks; 0 gives equal shares.")] = 0.0,
    adapter_exponent: AdapterExponent = 1.0,
    locality: Locality = 0.0,
    arrivals: Arrivals = "poisson",
    cv: Annotated[float, typer.Option(help="Coefficient of variation of the gaps, 0.01 to 100, for gamma.")] = 1.0,
    shape: Shape = "flat",
    peak_factor: PeakFactor = 3.0,
    spike_share: SpikeShare = 0.1,
    period_s: Annotated[
        float | None,
        typer.Option("--period", help="Length of one cycle, seconds, for diurnal and spike (default: the duration)."),
    ] = None,
    trace: Trace = None,
) -> None:
    """Print the statistics of a workload beside the statistics of Azure's trace.

    Example: python -m benchmarks workload --rps 9 --duration 600 --locality 0.84
    """
    fields: dict[str, Any] = dict(locals())  # the options are the fields of the spec
    try:
        workload = generate(WorkloadSpec(**fields | {"ranks": rank_list(ranks)}))
        require(len(workload) > 1, "number of requests", len(workload), "2 or more: raise --rps or --duration")
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    Console().print(_report(workload))
