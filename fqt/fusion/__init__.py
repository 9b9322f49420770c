"""Fusion: between two 1-bit layers no float activation is written."""
