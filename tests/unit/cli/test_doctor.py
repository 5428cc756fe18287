"""`megatron-elastic doctor` against stand-ins for the packages, which come before the real ones."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_elastic.cli import features, probes

ROOT = Path(__file__).resolve().parents[3]

TORCH = """
class version: cuda = {cuda!r}
class cuda:
    class nccl: version = staticmethod(lambda: (2, 30, 4))
    is_available = staticmethod(lambda: {gpus} > 0)
    device_count = staticmethod(lambda: {gpus})
    get_device_name = staticmethod(lambda n: "NVIDIA H100")
    get_device_capability = staticmethod(lambda: {capability})
"""
# As megatron-core does: whatever is no ImportError ends the import.
CORE = """
try:
    import transformer_engine
except ImportError:
    pass
"""
BARE = 'raise RuntimeError("Found empty `transformer-engine` meta package installed. Install it with extensions")\n'
CUDNN = "libcudnn.so.9: cannot open shared object file"
FUSED = "class FusedAdam: pass\n"


class Site:
    """A folder of stand-in packages with their metadata."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.torch()
        self.add("megatron-core", "0.19.2", {"megatron/core/__init__.py": CORE, "megatron/training/__init__.py": ""})

    def add(self, name: str, version: str, files: dict[str, str]) -> None:
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        for path, text in {**files, f"{info.name}/METADATA": f"Name: {name}\nVersion: {version}\n"}.items():
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).write_text(text)

    def torch(self, gpus: int = 0, capability: tuple[int, int] = (9, 0), cuda: str = "13.0") -> None:
        self.add("torch", "2.13.0", {"torch.py": TORCH.format(cuda=cuda, gpus=gpus, capability=capability)})

    def gpu_packages(self) -> None:
        self.torch(gpus=8)
        files = {"transformer_engine/__init__.py": "", "transformer_engine/pytorch/__init__.py": ""}
        self.add("transformer-engine", "2.20.2", {**files, "transformer_engine/pytorch/optimizers.py": FUSED})
        for part in ("cu13", "torch"):
            self.add(f"transformer-engine-{part}", "2.20.2", {})
        ssd = "def mamba_chunk_scan_combined(): pass\n"
        self.add("mamba-ssm", "2.3.2", {"mamba_ssm/ops/triton/ssd_combined.py": ssd})
        conv = {"causal_conv1d/__init__.py": "def causal_conv1d_fn(): pass\n", "causal_conv1d_cuda.py": ""}
        self.add("causal-conv1d", "1.7.0", conv)
        self.add("triton", "3.7.0", {"triton/__init__.py": "", "triton/language.py": ""})

    def doctor(self, *words: str, status: int = 0) -> str:
        # -S and no user site: nothing but the stand-ins and the standard library is there.
        program = f"import sys; sys.path[:0] = [{str(self.folder)!r}, {str(ROOT)!r}]; "
        program += "from megatron_elastic.cli.main import main; sys.exit(main())"
        variables = {"PATH": str(self.folder / "bin"), "PYTHONPATH": str(self.folder), "PYTHONNOUSERSITE": "1"}
        variables["PYTHONDONTWRITEBYTECODE"] = "1"  # a rewritten stand-in may have the size and the second of the last
        # The probes are started with the interpreter alone: it must not see this environment's packages either.
        (self.folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
        (self.folder / "python").chmod(0o755)
        program = f"import sys; sys.executable = {str(self.folder / 'python')!r}; {program}"
        command = [sys.executable, "-S", "-c", program, "doctor", *words]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == status, done.stdout + done.stderr
        assert done.stderr == ""
        return done.stdout

    def found(self, status: int = 0) -> dict[str, Any]:
        text = self.doctor("--json", status=status)
        assert text.count("\n") == 1
        result: dict[str, Any] = json.loads(text)
        assert result["can_train"] is (status == 0)
        return result


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_a_machine_without_a_gpu_trains_on_its_cpu(site: Site) -> None:
    found = site.found()
    works = {name for name, verdict in found["features"].items() if verdict["works"]}
    assert works == {"train on CPU ranks"}
    assert found["faults"] == []
    assert found["packages"]["torch"] == {
        **{"version": "2.13.0", "state": "works", "error": ""},
        **{"cuda": "13.0", "gpus": [], "capability": None, "nccl": None},
    }
    assert found["packages"]["transformer-engine"]["state"] == "missing"
    assert "core_cu13,pytorch" in found["features"]["transformer_engine backend"]["remedy"]


def test_a_bare_transformer_engine_is_told_by_name(site: Site) -> None:
    site.add("transformer-engine", "2.20.2", {"transformer_engine/__init__.py": BARE})
    found = site.found(status=1)
    (fault,) = found["faults"]
    assert fault["what"].startswith("transformer-engine 2.20.2 is bare: its CUDA core is not installed")
    assert "import megatron.core` fails" in fault["what"]
    assert "'transformer-engine[core_cu13,pytorch]==2.20.2'" in fault["remedy"]
    assert "pip uninstall transformer-engine" in fault["remedy"]
    assert found["features"]["train on CPU ranks"]["why"] == fault["what"]
    site.torch(cuda="12.9")
    shown = site.doctor(status=1)
    assert "'transformer-engine[core_cu12,pytorch]==2.20.2'" in shown
    assert "In the way: transformer-engine 2.20.2 is bare" in shown
    assert shown.endswith("This machine cannot train.\n")


@pytest.mark.parametrize(
    ("error", "parts", "said"),
    [
        (CUDNN, {"cu13": "2.19.0", "torch": "2.20.2"}, "the parts of transformer-engine are of different versions"),
        (CUDNN, {"cu13": "2.20.2"}, "has no binding to torch"),
        (CUDNN, {"cu13": "2.20.2", "torch": "2.20.2"}, "cannot be imported: OSError: libcudnn.so.9"),
        ("x.so: undefined symbol: _ZN3c10", {"cu13": "2.20.2", "torch": "2.20.2"}, "compiled against another torch"),
    ],
)
def test_other_faults_of_transformer_engine(site: Site, error: str, parts: dict[str, str], said: str) -> None:
    site.add("transformer-engine", "2.20.2", {"transformer_engine/__init__.py": f"raise OSError({error!r})\n"})
    for part, version in parts.items():
        site.add(f"transformer-engine-{part}", version, {})
    (fault,) = site.found(status=1)["faults"]
    assert said in fault["what"]


def test_the_namesake_of_apex_is_not_nvidias(site: Site) -> None:
    site.add("apex", "0.9.10.dev0", {"apex/__init__.py": "import pyramid\n"})
    found = site.found()
    (fault,) = found["faults"]
    assert "another project of that name" in fault["what"]
    assert "pip uninstall apex" in fault["remedy"]
    site.add("apex", "0.1", {"apex/__init__.py": "", "apex/optimizers.py": FUSED})
    assert site.found()["faults"] == []


def test_a_gpu_machine_with_everything(site: Site) -> None:
    site.gpu_packages()
    programs = site.folder / "bin"
    programs.mkdir()
    for name in ("gcc", "srun", "sbatch", "scontrol", "scancel"):
        (programs / name).write_text("")
        (programs / name).chmod(0o755)
    found = site.found()
    works = {name for name, verdict in found["features"].items() if verdict["works"]}
    assert works == {
        *("train on CPU ranks", "train on GPUs, local backend", "transformer_engine backend", "FP8", "Mamba kernels"),
        *("Triton kernels", "fused optimizer", "SLURM jobs"),
    }
    (programs / "docker").write_text("#!/bin/sh\necho 28.1.1\n")
    (programs / "docker").chmod(0o755)
    assert site.found()["features"]["container"] == {"works": True, "why": "docker's engine 28.1.1", "remedy": ""}
    (programs / "docker").write_text("#!/bin/sh\necho; echo cannot connect >&2; exit 1\n")
    assert "no engine answers" in site.found()["features"]["container"]["why"]
    assert "blockwise; MXFP8 needs 10.0" in found["features"]["FP8"]["why"]
    assert found["features"]["train on GPUs, local backend"]["why"] == "8 x NVIDIA H100, NCCL 2.30.4"
    # A kernel that was compiled for another torch; the same packages on an older GPU, and on none.
    broken = {"causal_conv1d_cuda.py": "raise ImportError('x.so: undefined symbol: _ZN3c10')\n"}
    site.add("causal-conv1d", "1.7.0", broken)
    verdict = site.found()["features"]["Mamba kernels"]
    assert verdict["why"] == "causal-conv1d 1.7.0 was compiled against another torch"
    assert "--force-reinstall --no-deps --no-cache-dir causal-conv1d==1.7.0" in verdict["remedy"]
    site.torch(gpus=1, capability=(8, 0))
    assert "8.0: FP8 needs 8.9" in site.found()["features"]["FP8"]["why"]
    site.torch(gpus=0)
    verdict = site.found()["features"]["Mamba kernels"]
    assert not verdict["works"]
    assert "torch sees no GPU" in verdict["why"]


def test_a_package_that_crashes_is_a_finding(site: Site) -> None:
    site.add("wandb", "0.31.0", {"wandb/__init__.py": "import os\nos.abort()\n"})
    found = site.found()
    assert found["packages"]["wandb"]["state"] == "broken"
    assert found["packages"]["wandb"]["error"] == "killed by signal 6"


def test_another_core_cannot_train(site: Site) -> None:
    (site.folder / "megatron_core-0.19.2.dist-info" / "METADATA").write_text("Name: megatron-core\nVersion: 0.20.0\n")
    assert "0.19.x is supported" in site.found(status=1)["features"]["train on CPU ranks"]["why"]
    (site.folder / "torch.py").write_text("import nothing_of_this_name\n")
    assert "torch 2.13.0 fails" in site.found(status=1)["features"]["train on CPU ranks"]["why"]


def test_the_supported_core_is_the_packages() -> None:
    """Which imports torch, so that it is written twice."""
    text = (ROOT / "megatron_elastic" / "megatron_compat.py").read_text("utf-8")
    assert f'SUPPORTED_CORE = "{features.SUPPORTED_CORE}"\n' in text


def test_a_probe_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "PROBES", {"wandb": "import time; time.sleep(600)"})
    assert probes.run_probe("wandb", "1", timeout=0.5).error == "no answer within 0 s"


def test_nothing_heavy_is_imported_by_the_command_itself() -> None:
    program = "import sys; import megatron_elastic.cli.doctor, megatron_elastic.cli.features; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert not {"torch", "megatron", "numpy", "yaml", "wandb"} & set(done.stdout.split())
