"""Build script. All metadata is in pyproject.toml; compiled extensions, once there are any, are listed here."""

from setuptools import setup

setup()
