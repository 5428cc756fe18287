"""The Triton kernels without a GPU: what they compute, in Triton's interpreter, and that they compile for Hopper."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CASES = Path(__file__).parent / "triton_cases.py"
GROUPED_BY_TYPE = {
    "*bf16": ("x", "y", "z", "weight", "grad", "dx", "dy", "dz", "out", "values", "residual", "dvalues"),
    "*fp32": ("width", "mask", "dweight", "dwidth", "dmask"),
    "fp32": ("eps",),
}
TYPES = {name: kind for kind, names in GROUPED_BY_TYPE.items() for name in names}


def test_kernels_are_their_references_under_the_interpreter() -> None:
    """In a process of its own: Triton decides on import whether it interprets."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)],
        cwd=CASES.parents[3],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 10


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("module", ["triton_norm", "triton_gated_norm", "triton_masking"])
def test_kernels_compile(module: str, masked: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For compute capability 9.0: the interpreter takes more than the compiler does."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels: Any = importlib.import_module(f"megatron_elastic.ops.{module}")
    for kernel in (kernels._forward, kernels._backward):
        constants = {"BLOCK": 2048, "HAS_WIDTH": masked, "HAS_MASK": masked, "HAS_RESIDUAL": masked}
        constants |= {} if masked else {"width": None, "residual": None}
        constants |= {} if masked or module == "triton_masking" else {"mask": None}
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        types = {name: "constexpr" if name in constants else TYPES.get(name, "i32") for name in kernel.arg_names}
        source = ASTSource(kernel, signature=types, constexprs=constants)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
        assert made.asm["cubin"]
