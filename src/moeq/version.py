"""The version of moeq."""

__version__ = "0.1.0"
