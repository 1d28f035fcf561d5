"""The weight task on a real local Ray."""

from __future__ import annotations

import json

import pytest
import ray

from deployments.hydrate import hydrate
from model_core.errors import DownloadError
from model_core.weights.folder import Marker, record_files, write_marker
from model_core.weights.progress import SilentProgress
from model_core.weights.source import ModelSource


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=1, include_dashboard=False, configure_logging=False, log_to_driver=False,
             runtime_env={"env_vars": {"HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}})
    yield
    ray.shutdown()


def test_hydrate_on_a_busy_node_then_a_clear_failure_without_retries(cluster, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"a": 1}))
    write_marker(folder, Marker("org/model", "main", "0" * 40, record_files(folder, ["config.json"], SilentProgress())))

    @ray.remote(num_cpus=1)
    class Busy:
        def ready(self) -> bool:
            return True

    busy = Busy.remote()
    assert ray.get(busy.ready.remote())

    found = hydrate(ModelSource("org/model"), str(tmp_path))
    assert (found.path, found.name, found.source) == (folder, "org/model", "disk")

    with pytest.raises(DownloadError, match="node .*127.0.0.1:9 cannot be reached.*HF_ENDPOINT") as caught:
        hydrate(ModelSource("org/absent"), str(tmp_path))
    assert type(caught.value) is DownloadError
