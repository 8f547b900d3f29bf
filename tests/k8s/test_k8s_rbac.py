"""Rights are minimal: each verb a Role grants is one that named code uses, and nothing has a wildcard."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

USES = {
    ("grpo-stages", "trainjobs", "create"): ("components/update", r"create_namespaced_custom_object\("),
    ("grpo-stages", "trainjobs", "get"): ("components/update", r"get_namespaced_custom_object\("),
    ("grpo-stages", "trainjobs", "delete"): ("components/update", r"delete_namespaced_custom_object\("),
    ("grpo-stages", "pods", "list"): ("components/update", r"list_namespaced_pod\("),
    ("grpo-stages", "pods/log", "get"): ("components/update", r"read_namespaced_pod_log\b"),
    ("grpo-stages", "events", "list"): ("components/update", r"list_namespaced_event\("),
    ("grpo-stages", "workflows", "get"): ("components/update", r"get_namespaced_custom_object\("),
    ("grpo-janitor", "trainjobs", "list"): ("pipeline/janitor", r"list_namespaced_custom_object\("),
    ("grpo-janitor", "trainjobs", "delete"): ("pipeline/janitor", r"delete_namespaced_custom_object\("),
    ("grpo-janitor", "workflows", "get"): ("pipeline/janitor", r"get_namespaced_custom_object\("),
}
"""(role, resource, verb): where the call that needs it is, and how it reads."""


def grants(objects: list[dict]) -> set[tuple[str, str, str]]:
    return {
        (role["metadata"]["name"], resource, verb)
        for role in objects
        if role["kind"] in ("Role", "ClusterRole")
        for rule in role["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def test_every_granted_verb_is_listed_with_its_use(objects: list[dict]) -> None:
    assert grants(objects) == USES.keys()


def test_nothing_is_granted_beyond_one_namespace(objects: list[dict]) -> None:
    assert not [item for item in objects if item["kind"] in ("ClusterRole", "ClusterRoleBinding")]
    for role, resource, verb in grants(objects):
        assert "*" not in (resource, verb), role
        assert resource not in ("secrets", "pods/exec", "roles", "rolebindings"), role


def source(place: str) -> str:
    """The Python code of a module or a package, without docstrings and comments."""
    module, package = ROOT / f"{place}.py", ROOT / place
    files = sorted(package.rglob("*.py")) if package.is_dir() else [module]
    trees = [ast.parse(path.read_text()) for path in files]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(None)
    return "\n".join(map(ast.unparse, trees))


@pytest.mark.parametrize(("grant", "use"), USES.items(), ids=lambda item: "-".join(item) if len(item) == 3 else "")
def test_the_use_is_in_the_code(grant: tuple[str, str, str], use: tuple[str, str]) -> None:
    place, call = use
    assert re.search(call, source(place)), f"{'/'.join(grant)} is granted, and {place} makes no call {call}"


def test_both_of_kubeflows_accounts_are_bound(objects: list[dict]) -> None:
    """Standalone KFP runs stages as one, multi-user KFP as the other."""
    (binding,) = [
        item for item in objects if item["kind"] == "RoleBinding" and item["metadata"]["name"] == "grpo-stages"
    ]
    assert {subject["name"] for subject in binding["subjects"]} == {"pipeline-runner", "default-editor"}
