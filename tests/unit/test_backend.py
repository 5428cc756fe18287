import sys
import types

import pytest

from megatron_elastic import backend
from megatron_elastic.errors import RecipeError
from megatron_elastic.flags import flag_faults
from megatron_elastic.schedule import BACKEND_FLAGS, ENGINE_BACKEND_FLAGS, LOCAL_BACKEND_FLAGS

ASKED = {"transformer-impl": "transformer_engine"}


@pytest.fixture
def imports(monkeypatch):
    """What `import transformer_engine.pytorch` ends in: None for success."""

    def end_in(error):
        class Broken(types.ModuleType):
            def __getattr__(self, name):
                raise AttributeError(name)

        def load(name):
            if error is not None:
                raise error
            return Broken(name)

        monkeypatch.setattr(backend.importlib, "import_module", load)
        backend._import_fault.cache_clear()

    yield end_in
    backend._import_fault.cache_clear()


def test_absent_is_what_there_is(imports):
    imports(None)
    assert backend.chosen_backend({}, cuda=True) == "transformer_engine"
    assert backend.chosen_backend({}, cuda=False) == "local"
    imports(ImportError("no module"))
    assert backend.chosen_backend({}, cuda=True) == "local"


@pytest.mark.parametrize("error", [ImportError("none"), OSError("lib"), AssertionError("core"), RuntimeError("x")])
def test_asked_for_and_not_there_is_one_fault_by_name(imports, error):
    imports(error)
    with pytest.raises(RecipeError, match=f"megatron.transformer-impl: .*{type(error).__name__}: {error}") as caught:
        backend.chosen_backend(ASKED, cuda=True)
    assert len(caught.value.faults) == 1
    assert backend.available_backend(ASKED, cuda=True) == "local"
    with pytest.raises(RecipeError, match="no CUDA device"):
        backend.chosen_backend(ASKED, cuda=False)


def test_asked_for_and_there(imports):
    imports(None)
    assert backend.chosen_backend(ASKED, cuda=True) == "transformer_engine"
    assert backend.chosen_backend({"transformer-impl": "local"}, cuda=True) == "local"


def test_another_error_is_not_hidden(imports):
    imports(KeyError("odd"))
    with pytest.raises(KeyError):
        backend.chosen_backend({}, cuda=True)


def test_a_third_implementation_is_refused():
    assert not [fault for fault in flag_faults(ASKED) if "transformer-impl" in fault]
    assert [fault for fault in flag_faults({"transformer-impl": "inference_optimized"}) if "transformer-impl" in fault]


def test_backends_differ_in_the_attention_alone():
    assert set(BACKEND_FLAGS) == set(backend.BACKENDS)
    changed = {flag for flag in LOCAL_BACKEND_FLAGS if LOCAL_BACKEND_FLAGS[flag] != ENGINE_BACKEND_FLAGS.get(flag)}
    assert changed == {"transformer-impl", "attention-backend"}
    assert "transformer_engine" not in sys.modules
