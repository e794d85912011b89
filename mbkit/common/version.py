"""The package's version, in a file of its own: to import the package for it would be a circle."""

__version__ = "0.1.0"
