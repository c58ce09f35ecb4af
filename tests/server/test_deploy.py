"""deploy/ as far as a machine without Docker and Kubernetes can check it: names, fields and commands are real ones."""

import importlib
import json
import re
from pathlib import Path

import pytest
import tyro
import yaml

from smalti.cli_arguments import COMMANDS
from smalti.serving.model_settings import ModelSettings
from smalti.serving.ray_app import RaySettings, _settings
from smalti.serving.server_settings import ServerSettings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def parsed(arguments):
    """The command that `smalti ARGUMENTS` means."""
    flags = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    return tyro.cli(COMMANDS[arguments[0]], args=arguments[1:], config=flags)


def test_the_image_is_built_of_files_that_are_there_and_starts_a_command_that_is():
    lines = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text()).splitlines()
    words = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    copied = [source for word, *rest in words if word == "COPY" for source in rest[:-1]]
    assert copied
    assert all((ROOT / source).exists() for source in copied)
    extras = next(line.partition("=")[2] for line in lines if line.startswith("ARG EXTRAS")).split(",")
    project = (ROOT / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in project for extra in extras)
    command = json.loads(next(line for line in lines if line.startswith("CMD")).removeprefix("CMD"))
    assert parsed(command).runs == ("/runs/mnist",)


def test_compose():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    services = compose["services"]
    assert set(services) == {"smalti", "postgres", "prometheus"}
    command = parsed([re.sub(r"\$\{WORKERS:-(\d)\}", r"\1", word) for word in services["smalti"]["command"]])
    assert command.store.startswith("postgresql://smalti:")
    assert (DEPLOY / services["smalti"]["build"]["context"] / services["smalti"]["build"]["dockerfile"]).is_file()
    for service in services.values():
        for volume in service.get("volumes", []):
            source = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", volume).split(":")[0]
            assert source in compose["volumes"] or source == "../runs" or (DEPLOY / source).is_file()
    scraped = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"][0]["static_configs"][0][
        "targets"
    ]
    assert scraped == ["smalti:8000"]


@pytest.fixture(scope="module")
def service():
    return yaml.safe_load((DEPLOY / "rayservice.yaml").read_text())


def test_the_ray_service_s_applications_can_be_built(service):
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    applications = {application["name"]: application for application in config["applications"]}
    for application in applications.values():
        module, name = application["import_path"].split(":")
        assert callable(getattr(importlib.import_module(module), name))
        _settings(application["args"]["ray"], RaySettings, "ray")
    api = applications.pop("smalti")["args"]
    assert set(api["engines"]) == set(applications)
    _settings(api.get("server", {}), ServerSettings, "server")
    for application in applications.values():
        assert application["route_prefix"] is None
        _settings(application["args"]["model"], ModelSettings, "model")


def test_ray_accepts_the_configuration(service):
    schema = pytest.importorskip("ray.serve.schema")
    from smalti.serving.ray_app import build_api, build_engine

    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert len(schema.ServeDeploySchema.model_validate(config).applications) == 3
    for application in config["applications"]:
        build = build_api if application["name"] == "smalti" else build_engine
        assert type(build(application["args"])).__name__ == "Application"


def test_the_ray_service_s_pods(service):
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    assert f"ray=={cluster['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())  # a number is refused
        pod = group["template"]["spec"]
        container = pod["containers"][0]
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["volumes"]}
        assert container["env"][0]["name"] == "SMALTI_API_KEYS"
        assert set(container["resources"]) == {"requests", "limits"}
