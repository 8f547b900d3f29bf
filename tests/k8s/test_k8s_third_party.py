"""Everything of others is pinned by release, in one version wherever it is named."""

import re
from pathlib import Path

import yaml

THIRD_PARTY = Path(__file__).parents[2] / "k8s/third-party"
RELEASE = re.compile(r"v?\d+\.\d+(\.\d+)?(-[\w.]+)?$")


def versions() -> dict[str, str]:
    lines = (THIRD_PARTY / "versions.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def test_every_version_is_a_release() -> None:
    assert {name: version for name, version in versions().items() if not RELEASE.fullmatch(version)} == {}


def test_kustomizations_name_those_releases() -> None:
    known = versions()
    expected = {
        "kfp/cluster-scoped": known["KFP_VERSION"],
        "kfp": known["KFP_VERSION"],
        "trainer": known["TRAINER_VERSION"],
        "kueue": known["KUEUE_VERSION"],
    }
    found = {}
    for path in THIRD_PARTY.rglob("kustomization.yaml"):
        content = yaml.safe_load(path.read_text())
        (resource,) = content["resources"]
        assert resource.startswith("https://github.com/")
        (version,) = re.findall(r"\?ref=(\S+)$|/releases/download/([^/]+)/", resource)
        found[str(path.parent.relative_to(THIRD_PARTY))] = version[0] or version[1]
        assert all(image["newTag"] == found["trainer"] for image in content.get("images", []))
    assert found == expected


def test_the_database_is_the_pinned_one(objects: list[dict]) -> None:
    (database,) = [item for item in objects if item["kind"] == "StatefulSet"]
    image = database["spec"]["template"]["spec"]["containers"][0]["image"]
    assert image == f"docker.io/library/postgres:{versions()['POSTGRES_VERSION']}"


def test_kfp_is_the_version_the_client_is_locked_to() -> None:
    lock = (THIRD_PARTY.parents[1] / "requirements/cpu.txt").read_text()
    assert f"kfp=={versions()['KFP_VERSION']}\n" in lock
