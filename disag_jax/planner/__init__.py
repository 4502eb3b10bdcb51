"""Predicts a step's time and memory on hardware that is not there, and picks a split for it."""
