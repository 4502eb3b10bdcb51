"""Devices: roles, submeshes, many-to-many transfers, packing; knows nothing of the model."""
