"""One hybrid parent model becomes a family of nested submodels, trained together with Megatron-Core."""

__version__ = "0.1.0"
