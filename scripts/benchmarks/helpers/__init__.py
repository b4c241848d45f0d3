"""Helpers of the benchmarks: measurements, and the published algorithms written plainly.

A script's own folder is on Python's path, so ``from helpers.plain_language import ...`` works in
the scripts beside this folder. Nothing here is installed, and no model depends on it.
"""
