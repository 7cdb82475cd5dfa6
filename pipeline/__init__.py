"""Stages over shards: sources, decode, annotate, encode, publish, and the graph that wires them."""
