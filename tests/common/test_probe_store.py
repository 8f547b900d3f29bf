"""The capability probe tells a careful server from a careless one."""

from pathlib import Path

from components.common.probe import probe
from components.common.store import FileStore, Store, open_store


class Careless(FileStore):
    """Takes a condition and ignores it, as some servers do."""

    def put_bytes(self, data: bytes, key: str, *, if_absent: bool = False) -> bool:
        return super().put_bytes(data, key)


def test_a_real_server_can_do_everything(rgw_store: Store) -> None:
    found = {one.name: one.good for one in probe(rgw_store)}
    assert found == dict.fromkeys(
        ["write, read, delete", "list after write", "conditional writes", "checksums", "ranges", "resumable uploads"],
        True,
    )
    assert list(rgw_store.list("")) == []


def test_a_folder_can_do_what_a_folder_needs(tmp_path: Path) -> None:
    assert all(one.good for one in probe(FileStore(tmp_path)))


def test_a_server_that_ignores_conditions_is_found_out(tmp_path: Path) -> None:
    (missing,) = [one for one in probe(Careless(tmp_path)) if not one.good]
    assert missing.name == "conditional writes" and missing.needed
    assert "8 racing writers had [8, 8, 8, 8, 8] winners" in missing.detail


def test_a_server_that_ignores_checksums_is_found_out(moto_endpoint: str) -> None:
    found = {one.name: one.good for one in probe(open_store(f"s3://grpo/probe?endpoint={moto_endpoint}"))}
    assert found["conditional writes"]
    assert not found["checksums"]
