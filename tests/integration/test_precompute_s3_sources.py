"""Sources behind s3://: a folder of classes, COCO, a webdataset and ImageNet's tars are what they are on a disk."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from data_tools.decode import FileReader
from data_tools.images import Address, BadImageError, source_fingerprint
from data_tools.sources import open_source
from tests.integration.s3_fixtures import BUCKET, credentials, proxy, s3_server  # noqa: F401 - fixtures
from tests.unit.test_sources import coco, data_config, save_image
from tests.unit.test_tar_sources import imagenet_train, tar_of
from uvit_dist import storage
from uvit_dist.config_data import StorageConfig
from uvit_dist.errors import ConfigError, MissingInputError

pytestmark = [
    pytest.mark.s3,
    pytest.mark.slow,
    # connections that the proxy has broken are left to the garbage collector, in its thread and in s3fs's
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def through_proxy(proxy, credentials):  # noqa: F811
    storage.configure(StorageConfig(endpoint=proxy.endpoint, retry_s=20.0, stall_s=0.7, region="us-east-1"))
    return proxy


def upload_tree(server, directory, prefix):
    client = server.client()
    for path in directory.rglob("*"):
        if path.is_file():
            client.put_file(str(path), f"{BUCKET}/{prefix}/{path.relative_to(directory)}")
    return f"s3://{BUCKET}/{prefix}"


def check_same(local, remote):
    assert source_fingerprint(remote) == source_fingerprint(local)
    assert (remote.name, remote.classes, remote.unusable) == (local.name, local.classes, local.unusable)
    for number in range(len(local.keys)):
        assert remote.address(number).path.startswith("s3://")
        assert np.array_equal(remote.load(number), local.load(number))


def test_folders_and_coco(through_proxy, s3_server, tmp_path):  # noqa: F811
    root = tmp_path / "folders"
    for name in ("n02/a.png", "n01/b.2.png", "n01/a.PNG"):
        save_image(root / name)
    (root / "n01" / "readme.txt").write_text("not an image")
    url = upload_tree(s3_server, root, "sources/folders")
    through_proxy.kinds, through_proxy.rate = ("503", "reset_before"), 0.2
    remote = open_source(data_config(source=url))
    check_same(open_source(data_config(source=root)), remote)
    assert remote.address(0) == Address(f"{url}/n01/a.PNG", 0, (root / "n01" / "a.PNG").stat().st_size)
    settings = coco(tmp_path / "coco")
    url = upload_tree(s3_server, tmp_path / "coco", "sources/coco")
    there = settings.model_copy(update={"source": f"{url}/pictures", "captions": f"{url}/captions.json"})
    check_same(open_source(settings), open_source(there))
    with pytest.raises(MissingInputError, match=r"data\.captions s3://.*none\.json: no such file"):
        open_source(there.model_copy(update={"captions": f"{url}/none.json"}))
    with pytest.raises(MissingInputError, match=r"data\.source s3://.*: no images"):
        open_source(data_config(source=f"s3://{BUCKET}/sources/nothing"))
    with pytest.raises(BadImageError, match="missing"):
        FileReader(32, "none").read(Address(f"{url}/none.png", 0, 100))
    with pytest.raises(ConfigError, match=r"data\.format celeba is read from local folders alone; copy it to one"):
        open_source(data_config(format="celeba", source=url))


@pytest.mark.parametrize("nested", [True, False])
def test_tars(through_proxy, s3_server, tmp_path, nested):  # noqa: F811
    imagenet_train(tmp_path / "imagenet", nested)
    url = upload_tree(s3_server, tmp_path / "imagenet", f"sources/{nested}/imagenet")
    scan_dir = f"s3://{BUCKET}/work/{nested}/scan"
    through_proxy.kinds, through_proxy.rate = ("503", "reset_before", "short"), 0.2
    settings = data_config(format="imagenet_tars", source=tmp_path / "imagenet")
    there = settings.model_copy(update={"source": url})
    check_same(open_source(settings), open_source(there, scan_dir=scan_dir))
    assert len(storage.sizes_in(scan_dir)) == 3 + nested
    before = storage.COUNTS.snapshot().bytes
    again = open_source(there, scan_dir=scan_dir, start=1)
    tables = sum(storage.sizes_in(scan_dir).values())
    assert len(again.keys) == 9
    assert storage.COUNTS.snapshot().bytes - before <= 1.5 * tables + 1000, "the tables, not the tars"


def test_webdataset(through_proxy, s3_server, tmp_path):  # noqa: F811
    root = tmp_path / "web"
    root.mkdir()
    for shard in range(3):
        save_image(tmp_path / "a.png")
        content = Path(tmp_path / "a.png").read_bytes()
        (root / f"{shard}.tar").write_bytes(tar_of({"a.png": content, "a.txt": b"text", "b.png": content}))
    shutil.copy(root / "0.tar", root / "not-a-tar.txt")
    url = upload_tree(s3_server, root, "sources/web")
    settings = data_config(format="webdataset", source=root)
    local, remote = open_source(settings), open_source(settings.model_copy(update={"source": url + "/"}))
    assert local.unusable == remote.unusable == {n: "no caption, where others have some" for n in (1, 3, 5)}
    assert source_fingerprint(local) == source_fingerprint(remote)
    assert all(np.array_equal(remote.load(n), local.load(n)) for n in (0, 2, 4))
