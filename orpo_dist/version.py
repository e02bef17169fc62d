"""The version, in a module that imports nothing: pyproject.toml and every report read it here."""

__version__ = "0.1.0"
