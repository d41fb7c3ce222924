"""Images and captions become shards of moments and contexts, by a small autoencoder and a small text encoder."""

import functools
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from open_clip.transformer import QuickGELU, TextTransformer
from PIL import Image

from data_tools.precompute_text import encode_captions, precompute
from tests.tiny import tiny_config
from uvit_dist import pretrained
from uvit_dist.data.reader import SampleReader
from uvit_dist.data.shards import EMPTY_CONTEXT, read_index
from uvit_dist.errors import ConfigError, DataError, MissingInputError
from uvit_dist.models import text
from uvit_dist.models.autoencoder import load_autoencoder

load_text_encoder = functools.cache(text.load_text_encoder)  # it takes half a second to read the tokenizer's words
CPU = torch.device("cpu")
CAPTIONS = {9: ["a dog", "Two dogs run!!"], 2: ["bread"], 5: ["кот", "a cat", "a dog"], 7: ["x " * 100], 1: ["", "b"]}


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    torch.manual_seed(0)
    tower = TextTransformer(width=32, heads=1, layers=1, pool_type="none", proj_type="none", act_layer=QuickGELU)
    path = tmp_path_factory.mktemp("text") / "tower.pt"
    torch.save({key: value for key, value in tower.state_dict().items() if key != "attn_mask"}, path)
    return path


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "load_text_encoder", load_text_encoder)
    draw = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for number in CAPTIONS:
        pixels = draw.integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{number}.png")
    tree = {
        "images": [{"id": number, "file_name": f"{number}.png"} for number in CAPTIONS],
        "annotations": [{"image_id": number, "caption": text} for number, texts in CAPTIONS.items() for text in texts],
    }
    (tmp_path / "captions.json").write_text(json.dumps(tree))
    return tmp_path / "pictures"


def text_config(pictures, tower, *more):
    tmp_path = pictures.parent
    return tiny_config(tmp_path / "out", tmp_path / "run", "data.format=coco", f"data.source={pictures}",
                       f"data.captions={tmp_path}/captions.json", "data.crop=coco", "data.mirror=false",
                       "data.samples_per_shard=3", "model.num_classes=-1", "diffusion.null_label=null",
                       "model.clip_dim=32", f"text.encoder={tower}", *more)  # fmt: skip


def contexts_in(index):
    """Key → (captions, contexts), from the tars themselves."""
    found = {}
    for shard in range(len(index.shards)):
        with tarfile.open(index.shard_path(shard)) as tar:
            for name in tar.getnames():
                if name.endswith(".json"):
                    key = name.removesuffix(".json")
                    captions = json.load(tar.extractfile(name))["captions"]
                    found[key] = captions, np.load(io.BytesIO(tar.extractfile(f"{key}.contexts.npy").read()))
    return found


def test_every_caption_has_its_context(pictures, tower):
    config = text_config(pictures, tower)
    precompute(config, CPU)
    index, encoder = read_index(config.data.index), load_text_encoder(tower)
    made, found = index.provenance, contexts_in(index)
    assert {int(key): captions for key, (captions, _) in found.items()} == CAPTIONS
    for captions, contexts in found.values():
        assert (contexts.shape, contexts.dtype) == ((len(captions), 77, 32), np.float16)
        assert np.allclose(contexts, encoder.encode(captions).numpy(), atol=5e-3)
        assert not np.allclose(contexts, encoder.encode(["a bird"]).numpy(), atol=5e-2), "the control"
    assert np.allclose(index.empty_context(), encoder.encode([""])[0].numpy(), atol=5e-3)
    assert (made.kind, made.classes, made.class_counts, made.samples) == ("moments", 0, (), 5)
    assert (made.text.encoder_fingerprint, made.text.dtype) == (encoder.fingerprint, "float16")
    assert made.text.shape == (77, 32)

    autoencoder = load_autoencoder(config.autoencoder.encoder)
    assert made.encoder_fingerprint == autoencoder.encoder_fingerprint
    batch = SampleReader(index, 0).read_ids(np.arange(5))
    for key, data in zip(found, batch.data, strict=True):
        image = Image.open(pictures / f"{key}.png").crop((5, 0, 45, 40)).resize((32, 32), Image.Resampling.LANCZOS)
        x0 = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1.0
        assert np.allclose(data, autoencoder.encode_moments(x0)[0].numpy(), atol=1e-2)


@pytest.mark.slow
def test_a_restart_keeps_what_is_done_and_notices_other_captions(pictures, tower):
    config = text_config(pictures, tower)
    precompute(config, CPU)
    directory = pictures.parent / "out"
    whole = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    for name in ("index.json", EMPTY_CONTEXT, "latents-000001.contexts.npy"):
        (directory / name).unlink()
    time = (directory / "latents-000000.tar").stat().st_mtime_ns
    precompute(config, CPU)
    assert {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()} == whole
    assert (directory / "latents-000000.tar").stat().st_mtime_ns == time
    captions = pictures.parent / "captions.json"
    captions.write_text(captions.read_text().replace("bread", "Bread"))
    precompute(config, CPU)
    assert contexts_in(read_index(config.data.index))["2"][0] == ["Bread"]


@pytest.mark.slow
def test_mirror_images_have_the_same_contexts(pictures, tower):
    config = text_config(pictures, tower, "data.mirror=true")
    precompute(config, CPU)
    found = contexts_in(read_index(config.data.index))
    assert len(found) == 10
    for number, captions in CAPTIONS.items():
        assert found[f"{number}_m"][0] == found[str(number)][0] == captions
        assert np.array_equal(found[f"{number}_m"][1], found[str(number)][1])


def test_the_bits_of_a_context_do_not_depend_on_its_companions(tower):
    encoder = load_text_encoder(tower)
    texts = [f"caption {number}" for number in range(11)]

    def encoded(captions):
        return dict(zip(captions, encode_captions(captions, encoder, "float32", 4), strict=True))

    whole, backwards, alone = encoded(texts), encoded(texts[::-1]), {t: encoded([t])[t] for t in texts}
    assert all(np.array_equal(whole[t], backwards[t]) and np.array_equal(whole[t], alone[t]) for t in texts)
    assert not np.array_equal(whole[texts[0]], whole[texts[1]])


@pytest.mark.slow
def test_what_cannot_be_encoded_is_said(pictures, tower, monkeypatch):
    with pytest.raises(MissingInputError, match=r"text\.encoder nowhere: no such file"):
        precompute(text_config(pictures, "nowhere"), CPU)
    with pytest.raises(DataError, match=r"text\.encoder_sha256 says aa"):
        precompute(text_config(pictures, tower, f"text.encoder_sha256={'a' * 64}"), CPU)
    with pytest.raises(ConfigError, match=r"not for data_tools\.precompute_text; use data_tools\.precompute_latents"):
        precompute(tiny_config(pictures.parent, pictures.parent), CPU)
    encoder = load_text_encoder(tower)
    monkeypatch.setattr(pretrained, "load_text_encoder", lambda path: encoder)
    monkeypatch.setattr(type(encoder), "encode", lambda self, texts: torch.full((len(texts), 77, 32), 1e6))
    with pytest.raises(DataError, match=r"contexts are not finite in float16; set data\.contexts_dtype float32"):
        precompute(text_config(pictures, tower), CPU)
    assert not (pictures.parent / "out" / "index.json").exists()
    precompute(text_config(pictures, tower, "data.contexts_dtype=float32"), CPU)
    assert read_index(str(pictures.parent / "out" / "index.json")).provenance.text.dtype == "float32"
