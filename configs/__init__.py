"""YAML templates and the job schema, shipped as package data."""
