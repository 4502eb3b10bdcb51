"""Model mathematics on one device; knows nothing of meshes or schedules."""
