"""The offline API, the benchmarks and the tests of the model run without the packages that the GPU machine lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HIDING = ROOT / "tests" / "gpu_machine"


def run_python(*arguments: object, path: tuple[Path, ...] = ()) -> str:
    """Standard output of a Python process from which the packages are hidden.

    Args:
        path: more folders for PYTHONPATH.
    """
    pythonpath = os.pathsep.join(map(str, (HIDING, *path)))
    command = [sys.executable, *map(str, arguments)]
    process = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": pythonpath}, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


PROBE = """
import importlib, importlib.metadata, importlib.util, json, subprocess, sys
from sitecustomize import MISSING

def imports(name):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert error.name == name
        return False
    return True

found = [name for name in MISSING if importlib.util.find_spec(name) or imports(name)]
found += [d.name for d in importlib.metadata.distributions() if d.name in MISSING.values()]
found += [name for name in ("numpy", "grpc", "typer.testing") if imports(name)]
if "child" not in sys.argv:
    found += json.loads(subprocess.check_output([sys.executable, "-c", sys.argv[1], sys.argv[1], "child"]))
print(json.dumps(found))
"""


def test_packages_are_hidden_from_a_process_and_its_child():
    assert json.loads(run_python("-c", PROBE, PROBE)) == ["numpy", "grpc", "typer.testing"] * 2


def test_the_sitecustomize_of_the_installation_runs(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.customized = True")
    assert run_python("-c", "import sys; print(sys.customized)", path=(tmp_path,)).strip() == "True"


PROGRAM = """
import contextlib, io, json, sys, traceback
from pathlib import Path

folder, outcomes = Path(sys.argv[1]), {}

def part(function):
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        try:
            result = function()
        except BaseException:
            result = traceback.format_exc()
    outcomes[function.__name__] = [result, told.getvalue()]

@part
def listing():
    from benchmarks.__main__ import main
    return main(["--help"])

@part
def imports():
    import importlib
    for module in ("device.command", "kernels.compile_h100", "kernels.ops", "serving.serve"):
        importlib.import_module(f"benchmarks.{module}")

@part
def dummy_model():
    from chameleon_jax import LLM, AsyncLLM, SamplingParams

    settings = dict(enable_lora=False, max_model_len=64, max_num_seqs=1, max_num_batched_tokens=32, compile_programs="lazy")
    with LLM("tiny", load_format="dummy", **settings) as llm:
        [output] = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True))
    return len(output.outputs[0].token_ids)

@part
def curve():
    from benchmarks.__main__ import main

    sizes = "--num-adapters 2 --ranks 8 --max-num-seqs 1 --max-num-batched-tokens 32 --num-pages 28 --lora-host-gib 1"
    traffic = "--system fifo --rps 8 --duration 0.5 --length-factor 0.05 --max-input 16 --max-output 4 --compile-programs lazy"
    words = ["serve-curve", "tiny", *sizes.split(), *traffic.split(), "--out", str(folder / "curve.json")]
    return [main(words), json.loads((folder / "curve.json").read_text())["table"]]

@part
def tests_of_the_model():
    import pytest
    return pytest.main(["tests/models", "-k", "page_layout or step_inputs", "-p", "no:cacheprovider"])

Path(folder / "outcomes.json").write_text(json.dumps(outcomes))
"""
"""Parts that run one after the other, in one process as importing JAX takes seconds."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Results of PROGRAM's parts, each with the printed text."""
    folder = tmp_path_factory.mktemp("gpu-machine")
    run_python("-c", PROGRAM, folder)
    return json.loads((folder / "outcomes.json").read_text())


def test_a_dummy_model_generates(outcomes):
    assert outcomes["dummy_model"][0] == 4


def test_serve_curve(outcomes):
    code, [row] = outcomes["curve"][0]
    assert code == 0 and row["requests"] > 0


def test_tests_of_the_model(outcomes):
    """Collect all of tests/models and run two cheap files. All of it takes minutes: `make test-models` runs that in CI."""
    code, printed = outcomes["tests_of_the_model"]
    assert code == 0 and " passed" in printed, printed


def test_benchmarks_are_imported(outcomes):
    assert outcomes["imports"][0] is None


def test_benchmarks_are_listed(outcomes):
    code, printed = outcomes["listing"]
    assert code == 0 and "serve-curve" in printed
