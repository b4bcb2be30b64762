"""Bundles behind a network: the Open Inference Protocol in front, one process or a Ray cluster behind.

Clients speak what `protocol/` answers; it asks a `Pool` (pool.py): detectors of this process (local.py), or replicas of
a Ray cluster (pool_ray.py).
"""
