"""What a driver needs, imported once for all that are forked; no thread, no client, no server."""

# ruff: noqa: F401

import botocore.session
import obstore
import torch

import jobs.cli
import jobs.runner
import jobs.verify
import pipeline.graph
import pipeline.stages
import pipeline.storage.s3
import segformer3d.weights
import tests.jobs.crash_points
import tests.jobs.local_graph
