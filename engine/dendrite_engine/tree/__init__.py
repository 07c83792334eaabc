"""Branches: handles to paths of the live tree."""
