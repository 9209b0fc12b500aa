"""Targets: one YAML file each."""
