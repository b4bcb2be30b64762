"""Operators of the inference path: torch and triton only, importable without the rest of the runtime."""
