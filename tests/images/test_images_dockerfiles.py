"""The Dockerfiles: what every image must have, read from the files that build them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = ("cpu", "rollout", "update", "tracking")


def instructions(name: str) -> list[tuple[str, str]]:
    """Instructions and their text, continued lines joined, comments left out."""
    lines = [line for line in (ROOT / f"images/{name}.Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split()[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def final(name: str) -> list[tuple[str, str]]:
    """Instructions of the stage that becomes the image."""
    found = instructions(name)
    last = max(index for index, (word, _) in enumerate(found) if word == "FROM")
    return found[last:]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_there_is_a_dockerfile_for_each_image() -> None:
    assert sorted(path.name for path in (ROOT / "images").glob("*.Dockerfile")) == sorted(
        f"{name}.Dockerfile" for name in NAMES
    )


def test_bases_are_arguments_pinned_by_release(name: str) -> None:
    arguments = [text for word, text in instructions(name) if word == "ARG" and "BASE=" in text]
    assert arguments
    for text in arguments:
        assert re.fullmatch(r"(BUILD_)?BASE=docker\.io/[\w./-]+:(?!latest)[\w.-]*\d[\w.-]*", text), text
    sources = {text.split()[0] for word, text in instructions(name) if word == "FROM"}
    assert sources <= {"${BASE}", "${BUILD_BASE}"}


def test_the_image_runs_as_a_number_above_zero(name: str) -> None:
    """A number, because `runAsNonRoot` cannot tell what a name stands for."""
    users = [text for word, text in final(name) if word == "USER"]
    assert users[-1] == "1000:1000"


def test_every_path_a_stage_writes_is_a_volume(name: str) -> None:
    (volumes,) = [text for word, text in final(name) if word == "VOLUME"]
    assert volumes == '["/work", "/cache", "/tmp"]'
    environment = " ".join(text for word, text in final(name) if word == "ENV")
    values = dict(re.findall(r"(\w+)=(\S+)", environment))
    for variable in ("HOME", "TMPDIR", "XDG_CACHE_HOME"):
        assert values[variable].startswith(("/work", "/cache", "/tmp"))
    for variable, value in values.items():
        if variable.endswith(("_HOME", "_DIR", "_ROOT")) and variable != "PYTHONPATH":
            assert value.startswith(("/work", "/cache", "/tmp")), f"{variable}={value}"


def test_labels_say_what_it_is_and_where_it_comes_from(name: str) -> None:
    labels = " ".join(text for word, text in final(name) if word == "LABEL")
    for key in ("title", "description", "licenses", "version", "revision", "created", "base.name"):
        assert f"org.opencontainers.image.{key}=" in labels, key


def test_the_import_check_is_the_last_step_and_runs_as_the_user(name: str) -> None:
    words = [word for word, _ in final(name)]
    last_run = len(words) - 1 - words[::-1].index("RUN")
    assert final(name)[last_run] == ("RUN", f'["python3", "/opt/check.py", "{name}"]')
    assert words.index("USER", words.index("WORKDIR")) < last_run
    assert set(words[last_run + 1 :]) <= {"CMD"}


def test_nothing_is_installed_but_what_a_lock_names(name: str) -> None:
    """Every pip call takes a lock without dependencies, builds our own package, or names an exact version."""
    for word, text in instructions(name):
        for call in re.findall(r"pip install ([^&;]+)", text) if word == "RUN" else []:
            locked = "--no-deps" in call and ("-r /build/" in call or "/build/src" in call)
            exact = all(
                re.search(r"==|\$\{|^wheel$|^ninja$", item) for item in call.split() if not item.startswith("-")
            )
            assert locked or exact, call


def test_locks_pin_every_package_and_name_no_place_to_get_it() -> None:
    for path in (ROOT / "requirements").glob("*.txt"):
        for line in path.read_text().splitlines():
            if line and not line.startswith("#"):
                assert re.fullmatch(r"[a-z0-9][a-z0-9._-]*(\[[\w,]+\])?==[\w.!]+", line), f"{path.name}: {line}"


def test_locks_agree_on_every_version_they_share() -> None:
    """All images and the local environment run the same code: a policy must not change with where it is read."""
    pins: dict[str, dict[str, str]] = {}
    for lock in ("local", "cpu", "update", "tracking"):
        for line in (ROOT / f"requirements/{lock}.txt").read_text().splitlines():
            if line and not line.startswith("#"):
                package, version = line.split("==")
                pins.setdefault(package, {})[lock] = version
    assert {package: found for package, found in pins.items() if len(set(found.values())) > 1} == {}
