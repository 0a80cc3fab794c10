"""Timings as ratios to a floor measured alternately in the same process; never part of the tests."""
