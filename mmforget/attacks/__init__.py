"""Measurements that try to bring back what was forgotten."""
