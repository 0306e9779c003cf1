"""Metadata is in pyproject.toml.  The native code of csrc/ will be built from here; there is none yet."""

from setuptools import setup

setup()
