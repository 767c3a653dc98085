"""The manifests fit the server, each other, and the fields that the APIs publish."""

import pathlib
import re

import pytest

from tests.experiments.commands import run
from tests.server.fake import FakeEngine
from tests.server.running import serving

yaml = pytest.importorskip("yaml")
DEPLOY = pathlib.Path(__file__).parents[2] / "deploy"
# What the endpoint picker scrapes: queue, batch, cache, and the sizes of its pages.
SCRAPED = (
    r"vllm:num_requests_waiting{.*} 0",
    r"vllm:num_requests_running{.*} 0",
    r"vllm:kv_cache_usage_perc{.*} 0",
    r'vllm:cache_config_info{block_size="16",.*num_gpu_blocks="1000".*} 1',
)
# inference.networking.k8s.io/v1 and gateway.networking.k8s.io/v1: what a spec may have.
POOL = {"selector": {"matchLabels": {"app": str}}, "targetPorts": [{"number": int}]} | {
    "endpointPickerRef": {"name": str, "port": {"number": int}, "failureMode": str}
}
ROUTE = {
    "parentRefs": [{"name": str}],
    "rules": [
        {
            "matches": [{"path": {"type": str, "value": str}}],
            "backendRefs": [{"group": str, "kind": str, "name": str}],
            "timeouts": {"request": str},
        }
    ],
}


def shape(value):
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    return [shape(each) for each in value] if isinstance(value, list) else type(value)


def documents(name):
    return list(yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text(encoding="utf-8")))


def test_the_pool_picks_the_servers_and_the_route_leads_to_it():
    (deployment,), (pool, route) = documents("server.yaml"), documents("gateway.yaml")
    assert (pool["apiVersion"], pool["kind"]) == ("inference.networking.k8s.io/v1", "InferencePool")
    assert (route["apiVersion"], route["kind"]) == ("gateway.networking.k8s.io/v1", "HTTPRoute")
    assert shape(pool["spec"]) == POOL and shape(route["spec"]) == ROUTE
    template = deployment["spec"]["template"]
    labels = pool["spec"]["selector"]["matchLabels"]
    assert template["metadata"]["labels"] == deployment["spec"]["selector"]["matchLabels"] == labels
    (backend,) = route["spec"]["rules"][0]["backendRefs"]
    group = pool["apiVersion"].partition("/")[0]
    name = pool["metadata"]["name"]
    assert backend == {"group": group, "kind": pool["kind"], "name": name}
    (server,) = template["spec"]["containers"]
    (target,) = pool["spec"]["targetPorts"]
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    assert ports["http"] == target["number"] and f"--port={target['number']}" in server["args"]
    assert any(f'"tcp://*:{ports["kv-events"]}"' in argument for argument in server["args"])
    assert server["args"][0] == "serve"
    ((code, _, error),) = run("serve", ["--only-read", *server["args"][1:]])
    assert code == 0, error
    (drain,) = (each for each in server["args"] if each.startswith("--shutdown_timeout="))
    pause = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    grace = template["spec"]["terminationGracePeriodSeconds"]
    assert grace > int(drain.partition("=")[2]) + pause
    with serving(FakeEngine(), api_keys=["secret"]) as running:
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            get = server[probe]["httpGet"]
            assert get["port"] == "http" and running.http.get(get["path"]).status_code == 200


def test_the_endpoint_picker_finds_its_metrics(toy_metrics):
    for pattern in SCRAPED:
        assert re.search(f"^{pattern}", toy_metrics, re.M), pattern


@pytest.fixture
def toy_metrics():
    with serving(FakeEngine()) as running:
        return running.http.get("/metrics").text


def test_the_configuration_of_ray_serve_is_one():
    """Fields of its arguments by Ray's own schema where Ray is there, and by name without it."""
    config = yaml.safe_load((DEPLOY / "ray_serve.yaml").read_text(encoding="utf-8"))
    (application,) = config["applications"]
    module, _, name = application["import_path"].partition(":")
    source = (DEPLOY.parent / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    assert f"def {name}(arguments: Arguments)" in source
    known = set(re.findall(r"^    (\w+): [\w\[\], ]+ = ", source, re.M))
    assert application["args"].keys() <= known and "engine" in known
    try:
        from ray.serve.schema import ServeDeploySchema
    except ImportError:
        return
    from deploy.ray_serve import Arguments

    ServeDeploySchema.parse_obj(config)
    Arguments(**application["args"])


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_replicas_come_and_go_by_ray_s_own_fields():
    pytest.importorskip("ray.serve")
    from deploy.ray_serve import Arguments, app

    config = yaml.safe_load((DEPLOY / "ray_serve.yaml").read_text(encoding="utf-8"))
    given = config["applications"][0]["args"]
    # Ray tells no other way what it has made of the options.
    bound = app(Arguments(**given))._bound_deployment
    scaling = bound._deployment_config.autoscaling_config
    names = {name for name in given if name.endswith(("replicas", "requests", "delay_s"))}
    assert len(names) == 5
    assert {name: getattr(scaling, name) for name in names} == {name: given[name] for name in names}
    with pytest.raises(ValueError, match="must be greater than or equal to min_replicas"):
        app(Arguments(min_replicas=3, max_replicas=2))
