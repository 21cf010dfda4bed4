"""What Ray shows an engine's actor of a node's GPUs. They are made up: Ray counts them, and nothing here computes on them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

_TWO_ENGINES = """
import json, os
import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from engine.cluster.ray.application import engine_options
from engine.config import ClusterSettings

ray.init(address="local", num_cpus=4, num_gpus=4, include_dashboard=False, object_store_memory=100 * 1024 * 1024)
options = engine_options(ClusterSettings(ray="auto", cpus=1, gpus=2), 1, 1)

class Engine:
    def gpus(self):
        return os.environ["CUDA_VISIBLE_DEVICES"]

seen = []
for _ in range(2):
    group = placement_group(options["placement_group_bundles"], strategy=options["placement_group_strategy"])
    place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)  # as Serve places a replica
    seen.append(ray.remote(Engine).options(scheduling_strategy=place, **options["ray_actor_options"]).remote())
print(json.dumps([ray.get(one.gpus.remote()) for one in seen]))
"""


def test_an_engine_sees_its_own_gpus_and_all_of_them() -> None:
    """Two engines of two GPUs share a node of four without one in common: their processes inherit what the actor sees."""
    pytest.importorskip("ray")
    done = subprocess.run([sys.executable, "-c", _TWO_ENGINES], capture_output=True, text=True, timeout=100, check=True)
    first, second = (set(seen.split(",")) for seen in json.loads(done.stdout.splitlines()[-1]))
    assert len(first) == len(second) == 2
    assert not first & second
