"""Files that services read: the workflow of continuous integration, pre-commit's hooks, and the citation."""

import re
import subprocess
import sys

import pytest
import yaml
from manual import ROOT


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def pinned(package):
    return re.search(rf"^{package}==(.*)$", text_of("constraints.txt"), re.MULTILINE)[1]


@pytest.mark.parametrize(
    ("schema", "file"),
    [
        ("vendor.github-workflows", ".github/workflows/ci.yml"),
        ("custom.github-workflows-require-timeout", ".github/workflows/ci.yml"),
        ("vendor.citation-file-format", "CITATION.cff"),
    ],
)
def test_files_follow_their_schemas(schema, file):
    pytest.importorskip("check_jsonschema", reason="the schemas are those of lightning-spectral[build]")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, ROOT / file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_jobs_are_targets_of_the_makefile_and_hold_those_of_the_local_run():
    jobs = yaml.safe_load(text_of(".github/workflows/ci.yml"))["jobs"]
    steps = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    called = {re.fullmatch(r"make ([\w-]+)( \w+=.*)?", step)[1] for step in steps}
    assert called == {"lint", "test", "test-oldest", "docs", "dist"}
    assert called <= set(re.findall(r"^([\w-]+):", text_of("Makefile"), re.MULTILINE))
    assert set(re.findall(r"^make ([\w-]+)$", text_of(".ci/run"), re.MULTILINE)) <= called


def test_every_python_that_the_package_names_is_tested():
    matrix = yaml.safe_load(text_of(".github/workflows/ci.yml"))["jobs"]["test"]["strategy"]["matrix"]
    tested = [*matrix["python"], *(job["python"] for job in matrix["include"])]
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text_of("pyproject.toml"))
    assert sorted(tested) == sorted(named)


def test_hooks_run_the_versions_of_the_constraints():
    repositories = yaml.safe_load(text_of(".pre-commit-config.yaml"))["repos"]
    revisions = {repository["repo"].rpartition("/")[2]: repository.get("rev", "") for repository in repositories}
    assert revisions["ruff-pre-commit"] == f"v{pinned('ruff')}"
    assert revisions["check-jsonschema"] == pinned("check-jsonschema")
