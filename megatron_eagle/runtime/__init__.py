"""Processes: their groups, devices and libraries."""
