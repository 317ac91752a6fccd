"""The kubernetes recipes: the manifests have what the dask operator requires, and fit one another."""

from __future__ import annotations

import inspect
import re
import shlex
from importlib import import_module
from typing import Any

import pytest
import yaml

from tests.command_lines import (
    IMAGE,
    check_words,
    fenced,
    here_documents,
    keywords,
    names_imported,
    text,
)
from tomocpt_stream import pick


def manifest(name: str) -> dict[str, Any]:
    (found,) = yaml.safe_load_all(text("kubernetes", name))
    return dict(found)


def pods() -> dict[str, dict[str, Any]]:
    cluster, job = manifest("cluster.yaml"), manifest("pick.yaml")
    return {
        "scheduler": cluster["spec"]["scheduler"]["spec"],
        "worker": cluster["spec"]["worker"]["spec"],
        "pick": job["spec"]["template"]["spec"],
    }


def test_the_cluster_has_what_the_operator_requires() -> None:
    cluster = manifest("cluster.yaml")
    assert (cluster["apiVersion"], cluster["kind"]) == ("kubernetes.dask.org/v1", "DaskCluster")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{,51}[a-z0-9])?", cluster["metadata"]["name"])
    spec = cluster["spec"]
    assert set(spec) == {"scheduler", "worker"}
    assert set(spec["worker"]) == {"replicas", "spec"}
    assert set(spec["scheduler"]) == {"spec", "service"}
    service = spec["scheduler"]["service"]
    labels = {"dask.org/cluster-name": cluster["metadata"]["name"], "dask.org/component": "scheduler"}
    assert service["selector"] == labels
    (container,) = spec["scheduler"]["spec"]["containers"]
    open_ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    # the operator asks for the ports by these names
    assert open_ports == {"tcp-comm": 8786, "http-dashboard": 8787}
    assert {port["targetPort"]: port["port"] for port in service["ports"]} == open_ports
    assert container["readinessProbe"]["httpGet"]["port"] in open_ports


@pytest.mark.parametrize("name", ["scheduler", "worker", "pick"])
def test_a_pod_runs_a_command_of_the_image_on_the_shared_volume(name: str) -> None:
    pod = pods()[name]
    (container,) = pod["containers"]
    assert container["image"] == IMAGE
    words = [*container["command"], *container["args"]]
    if words[:2] == ["sh", "-c"]:
        words = shlex.split(words[2])
        assert words[0] == "exec"
        words = words[1:]
    check_words(words)
    (volume,) = pod["volumes"]
    (claim,) = (yaml.safe_load(block) for block in here_documents(fenced(text("kubernetes"), "bash")[2]))
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": container["workingDir"]}]
    # the schema of the operator takes quantities as strings only
    quantities = [value for part in container["resources"].values() for value in part.values()]
    assert all(isinstance(value, str) for value in quantities)


def test_a_worker_has_a_gpu_its_name_and_the_memory_that_it_may_use() -> None:
    (container,) = pods()["worker"]["containers"]
    limits, words = container["resources"]["limits"], container["args"]
    assert limits["nvidia.com/gpu"] == "1"
    assert words[words.index("--memory-limit") + 1] == f"{limits['memory']}B"
    assert words[words.index("--name") + 1] == "$(DASK_WORKER_NAME)"


def test_the_job_finds_the_scheduler_and_is_tried_again() -> None:
    (container,) = pods()["pick"]["containers"]
    assert f"tcp://{manifest('cluster.yaml')['metadata']['name']}-scheduler:8786" in container["args"][0]
    assert "--scratch" in container["args"][0]
    job = manifest("pick.yaml")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert job["spec"]["backoffLimit"] >= 1
    assert pods()["pick"]["restartPolicy"] == "Never"


def test_the_lines_for_a_notebook() -> None:
    (block,) = fenced(text("kubernetes"), "python")
    assert all(hasattr(import_module(module), name) for module, name in names_imported(block))
    assert keywords(block, "pick") <= set(inspect.signature(pick).parameters)
    name = manifest("cluster.yaml")["metadata"]["name"]
    assert f'KubeCluster.from_name("{name}")' in block
    assert "/data" in block
