"""The level set "trellis": its tables, and what codes stand for."""
