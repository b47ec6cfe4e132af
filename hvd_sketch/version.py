"""The version of this package; setup.cfg names the same."""

__version__ = "0.1.0"
