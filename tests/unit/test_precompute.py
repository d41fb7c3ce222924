"""Jobs that make shards of images: what is left out and told, what a restart does again, what several workers share."""

import json
import logging
import os
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from data_tools import decoding, status
from data_tools.pipeline import Times
from data_tools.precompute_latents import precompute
from data_tools.status import describe, jobs_in
from data_tools.units import ShardJob
from tests.systems import photographs
from tests.tiny import tiny_config
from uvit_dist import storage
from uvit_dist.config_data import StorageConfig
from uvit_dist.data.reader import SampleReader
from uvit_dist.data.shards import read_index, write_shard
from uvit_dist.errors import DataError, OutputError, UnavailableError

CPU = torch.device("cpu")
IMAGES = 23


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Photographs in two folders, as JPEG files."""
    root = tmp_path_factory.mktemp("pictures")
    for number, image in enumerate(photographs(IMAGES, 40, 60, seed=3)):
        folder = root / f"class{number % 2}"
        folder.mkdir(exist_ok=True)
        image.save(folder / f"{number:02d}.jpg", quality=95)
    return root


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """The output of one undisturbed worker."""
    out = tmp_path_factory.mktemp("whole")
    precompute(job_config(pictures, out), CPU)
    return out


def job_config(source, out, *more):
    return tiny_config(out, out, "data.format=folder", f"data.source={source}", "data.crop=adm", "data.mirror=true",
                       "data.samples_per_shard=8", "model.num_classes=3", "diffusion.null_label=2", *more)  # fmt: skip


def files(directory):
    """Name → bytes of the output, without what tells of the work."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def keys_in(path):
    with tarfile.open(path) as tar:
        return [name.removesuffix(".npy") for name in tar.getnames() if name.endswith(".npy")]


@pytest.fixture
def damaged(pictures, tmp_path):
    """The pictures, with two that cannot be read."""
    root = tmp_path / "damaged"
    for path in pictures.rglob("*.jpg"):
        copy = root / path.relative_to(pictures)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (root / "class0" / "04.jpg").write_bytes(b"")
    cut = root / "class1" / "07.jpg"
    cut.write_bytes(cut.read_bytes()[:400])
    return root


def test_bad_images_are_left_out_and_named_and_the_others_are_as_without_them(damaged, whole, tmp_path):
    config = job_config(damaged, tmp_path / "out", "precompute.bad_image_limit=0.1")
    precompute(config, CPU)
    lines = [json.loads(line) for line in (tmp_path / "out" / "bad_images.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["class0/04", "class1/07"]
    assert lines[0]["reason"] == "empty file"
    assert lines[1]["reason"].startswith(("truncated", "not an image", "damaged"))
    assert not (whole / "bad_images.jsonl").exists()

    index, clean = read_index(config.data.index), read_index(str(whole / "index.json"))
    assert index.provenance.samples == sum(index.counts) == 2 * (IMAGES - 2)
    assert index.provenance.class_counts == (22, 20)
    rows = {}
    for made in (index, clean):
        reader = SampleReader(made, 0)
        keys = [key for n in range(len(made.shards)) for key in keys_in(made.shard_path(n))]
        batch = reader.read_ids(np.arange(len(keys)))
        rows[made.path] = dict(zip(keys, zip(batch.labels.tolist(), batch.data.numpy(), strict=True), strict=True))
    ours, theirs = rows[index.path], rows[clean.path]
    assert theirs.keys() - ours.keys() == {"class0/04", "class0/04_m", "class1/07", "class1/07_m"}
    assert all(label == theirs[key][0] and np.array_equal(data, theirs[key][1]) for key, (label, data) in ours.items())


@pytest.mark.slow
def test_too_many_bad_images_end_the_job_and_a_higher_limit_goes_on(damaged, tmp_path):
    out = tmp_path / "out"
    config = job_config(damaged, out, "precompute.bad_image_limit=0.05")
    told = r"2 of 23 images cannot be used, and precompute\.bad_image_limit 0\.05 allows 1:\n  class0/04: empty file\n"
    with pytest.raises(DataError, match=told):
        precompute(config, CPU)
    assert len((out / "bad_images.jsonl").read_text().splitlines()) == 2
    assert not (out / "index.json").exists()
    assert not [name for name in storage.tree(str(out)) if ".lease-" in name or ".tmp-" in name]
    finished = {name: (out / name).stat().st_mtime_ns for name in files(out) if name.endswith(".tar")}
    with pytest.raises(DataError, match="2 of 23 images cannot be used"):
        precompute(config, CPU)
    precompute(job_config(damaged, out, "precompute.bad_image_limit=0.1"), CPU)
    assert read_index(config.data.index).provenance.samples == 42
    redone = {name for name, when in finished.items() if (out / name).stat().st_mtime_ns != when}
    assert len(redone) <= 4, "the two units with a bad image, which may have been mended"


@pytest.mark.slow
def test_mended_images_are_taken_in_when_the_job_is_started_again(damaged, pictures, whole, tmp_path):
    config = job_config(damaged, tmp_path / "out", "precompute.bad_image_limit=0.05")
    with pytest.raises(DataError, match="2 of 23 images cannot be used"):
        precompute(config, CPU)
    for name in ("class0/04.jpg", "class1/07.jpg"):
        (damaged / name).write_bytes((pictures / name).read_bytes())
    precompute(config, CPU)
    assert not (tmp_path / "out" / "bad_images.jsonl").exists()
    ours, theirs = files(tmp_path / "out"), files(whole)
    assert {n: d for n, d in ours.items() if n.endswith(".tar")} == {
        n: d for n, d in theirs.items() if n.endswith(".tar")
    }


@pytest.mark.slow
def test_the_reference_leaves_out_what_the_shards_leave_out(damaged, tmp_path):
    config = job_config(damaged, tmp_path / "out", "precompute.bad_image_limit=0.1", "precompute.reference=true",
                        "evaluate.neighbours=2")  # fmt: skip
    precompute(config, CPU)
    with np.load(config.evaluate.reference) as made:
        assert json.loads(str(made["provenance"]))["images"] == len(made["features"]) == 21


@pytest.mark.slow
def test_an_image_that_vanishes_after_the_listing_is_a_bad_image(damaged, tmp_path, monkeypatch):
    from data_tools import precompute_latents

    def listed_then_gone(config):
        source = open_images(config)
        (damaged / "class1" / "09.jpg").unlink()
        return source

    open_images = precompute_latents.open_images
    monkeypatch.setattr(precompute_latents, "open_images", listed_then_gone)
    precompute(job_config(damaged, tmp_path / "out", "precompute.bad_image_limit=0.2"), CPU)
    assert '{"key": "class1/09", "reason": "missing"}' in (tmp_path / "out" / "bad_images.jsonl").read_text()


def test_a_server_that_does_not_answer_is_no_bad_image(pictures, tmp_path, monkeypatch):
    from data_tools.decode import FileReader

    def silent(self, address):
        raise UnavailableError("s3://bucket/07.jpg: nothing came for 300 seconds")

    monkeypatch.setattr(FileReader, "read", silent)
    with pytest.raises(UnavailableError, match="nothing came"):
        precompute(job_config(pictures, tmp_path / "out", "precompute.bad_image_limit=0.9"), CPU)
    assert not (tmp_path / "out" / "bad_images.jsonl").exists()


@pytest.mark.slow
def test_each_shard_is_written_once_and_the_same_whatever_the_worker_did_before(pictures, whole, tmp_path, monkeypatch):
    written = []
    from data_tools import pipeline

    def write(directory, name, *rest):
        written.append(name)
        if len(written) == 4:
            raise OSError(28, "No space left on device")
        return write_shard(directory, name, *rest)

    again = job_config(pictures, tmp_path / "again")
    monkeypatch.setattr(pipeline, "write_shard", write)
    with pytest.raises(OSError, match="No space"):
        precompute(again, CPU)
    assert not (tmp_path / "again" / "index.json").exists()
    precompute(again, CPU)
    assert files(tmp_path / "again") == files(whole)
    redone = [name for name in set(written) if written.count(name) > 1]
    assert len(redone) <= 2 * (1 + pipeline.UNFINISHED), "no more than the units under way"


@pytest.mark.slow
def test_other_settings_make_other_shards_and_the_index_says_with_which(pictures, whole, tmp_path):
    out = tmp_path / "out"
    precompute(job_config(pictures, out, "precompute.batch_size=5"), CPU)
    assert json.loads(files(whole)["index.json"])["made_with"]["batch_size"] == 4
    assert json.loads((out / "index.json").read_bytes())["made_with"]["batch_size"] == 5
    precompute(job_config(pictures, out), CPU)
    assert files(out) == files(whole)


@pytest.mark.slow
def test_the_options_of_the_encoder_report_what_they_change(pictures, whole, tmp_path, caplog):
    options = ["precompute.precision=bf16", "precompute.channels_last=true"]
    with caplog.at_level(logging.INFO):
        precompute(job_config(pictures, tmp_path / "bf16", *options), CPU)
    (line,) = [record for record in caplog.records if "differ from plain fp32" in record.message]
    precision, layout, compiled, images, rms, largest, storage_alone = line.args
    assert (precision, layout, compiled, images) == ("bf16", True, False, 4)
    index, plain = (read_index(str(out / "index.json")) for out in (tmp_path / "bf16", whole))
    found, exact = (SampleReader(made, 0).read_ids(np.arange(46)).data[:, :4].float() for made in (index, plain))
    off = (found - exact).abs() * index.provenance.scale_factor
    assert 0 < rms < 0.05
    assert storage_alone < rms / 4, "bf16 costs more than storage in float16"
    assert rms / 3 < off.square().mean().sqrt() < 3 * rms, "what is told of the first images is so of all"
    assert off.max() < 5 * largest


@pytest.mark.slow
def test_the_status_is_told_from_the_directory_alone(pictures, tmp_path, monkeypatch, capsys):
    config = job_config(pictures, tmp_path / "out")
    seen = []
    mark = ShardJob._mark

    def look(self, unit, bad, facts):
        mark(self, unit, bad, facts)
        self.leases.show_life()
        seen.extend(describe(work, names) for work, names in jobs_in(str(tmp_path / "out")).items())

    monkeypatch.setattr(ShardJob, "_mark", look)
    precompute(config, CPU)
    assert len(seen) == 3
    assert "1 of 3 units" in seen[0]
    assert "images/s, unit-00000" in seen[0]
    assert "left" in seen[0]
    monkeypatch.setattr("sys.argv", ["status", str(tmp_path / "out"), "--watch", "60"])
    status.main()
    printed = capsys.readouterr().out
    assert "complete: 3 of 3 units, 23 of 23 images (100.0%), 0 images left out" in printed
    monkeypatch.setattr("sys.argv", ["status", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as ended:
        status.main()
    assert ended.value.code == 66
    assert "no job that writes shards has run here" in capsys.readouterr().err


@pytest.mark.parametrize(("slow", "named"), [
    ("waited_encoder", "the encoder's device"),
    ("waited_output", "the output's disk or network"),
])  # fmt: skip
def test_the_bottleneck_is_what_is_waited_for_most(slow, named):
    times = Times(images=10, waited_images=1.0, reading=5.0, decoding=5.0)
    assert times.summary()["bottleneck"] in ("the input's disk or network", "the host's processors")
    setattr(times, slow, 2.0)
    assert times.summary()["bottleneck"] == named
    times = Times(waited_images=2.0, waited_encoder=1.0, reading=9.0, decoding=1.0)
    assert times.summary()["bottleneck"] == "the input's disk or network"


def test_the_work_directory_is_no_part_of_the_output(whole):
    assert Path(whole, ".work").is_dir()
    assert set(storage.sizes_in(str(whole))) == set(files(whole))


class Killed(Dataset):
    """A decoding process that is killed at its first request."""

    def __getitems__(self, requests):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_decoding_process_that_is_killed_is_told(monkeypatch):
    monkeypatch.setattr(decoding, "Decoder", lambda reader, size: Killed())
    requests = [decoding.Request(0, 0, [None])] * 3
    with pytest.raises(OutputError, match=r"a decoding process ended \(DataLoader worker.*decode_processes to fewer"):
        list(decoding.decoded(requests, None, 8, 1, StorageConfig()))
