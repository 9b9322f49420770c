"""Converted models in other libraries' training loops: transformers' Trainer, accelerate, Lightning.

A converted model trains in all of them as it is. What stands here carries a precision policy through their loops, and the
speed-up into their logs. One file a library, which imports it; `pip install 'fqt[integrations]'` brings all three.
"""
