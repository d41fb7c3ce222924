"""The sections of the configuration on where the data come from: sources and shards, their making, servers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from uvit_dist.config_rules import raise_broken


class Section(BaseModel):
    """One section of the configuration: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


SPLITS = {
    "cifar10": ("train", "test"),
    "celeba": ("train", "validation", "test"),
    "imagenet_tars": ("train", "validation"),
}
"""Parts of the sources of images that have parts."""


class DataConfig(Section):
    """The training samples: how they are made, where they are, in which order they are read."""

    space: Literal["latents", "pixels"] = Field("latents", description="what the network is trained on")
    format: Literal["folder", "imagenet_tars", "webdataset", "cifar10", "celeba", "coco", "digits"] = Field(
        "folder",
        description="'folder': images, in one folder for each class or in one alone; 'imagenet_tars': ImageNet's own "
        "tar files; 'webdataset': tars of images with labels or captions, as img2dataset writes them; 'cifar10': its "
        "binary files; 'celeba': the folder of img_align_celeba and list_eval_partition.txt; 'coco': images named by "
        "data.captions; 'digits': scikit-learn's, no source needed",
    )
    source: str | None = Field(None, description="where the original images lie: a path or s3:// URL")
    split: Literal["train", "validation", "test"] = Field(
        "train", description="part of cifar10, celeba or imagenet_tars to read"
    )
    captions: str | None = Field(None, description="captions of COCO's images: its captions_*.json")
    image_size: int = Field(gt=0, description="side of the images after the crop, pixels")
    crop: Literal["none", "adm", "celeba", "coco"] = Field(
        "adm",
        description="'adm': centre crop of the ADM code; 'celeba': 128 pixels about the face; 'coco': centre square, "
        "LANCZOS; 'none': as they are",
    )
    mirror: bool = Field(
        True, description="latents: each image's mirror image is a sample of its own; pixels: mirrored at random"
    )
    moments_dtype: Literal["float16", "float32"] = Field("float16", description="type of the stored moments")
    contexts_dtype: Literal["float16", "float32"] = Field("float16", description="type of the stored text contexts")
    samples_per_shard: int = Field(4096, gt=0, description="samples in a shard")
    index: str = Field(description="path of the index of the shards")
    lanes: int = Field(gt=0, description="parallel reading lanes; divides the batch; valid world sizes divide it")
    block_size: int = Field(1024, gt=0, description="samples read and shuffled together within a lane")
    prefetch_blocks: int = Field(1, ge=0, description="blocks read ahead in each lane; changes nothing but time")
    read_threads: int = Field(
        4,
        ge=0,
        description="parts of shards read at once, per rank; 0: in the training thread; changes nothing but time",
    )
    quarantine_limit: float = Field(
        0.01,
        ge=0,
        lt=1,
        description="share of the shards that may prove damaged, and be replaced by substitutes, before the run fails",
    )
    check_shuffle: bool = Field(True, description="refuse shards that are sorted by class, before training starts")

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        raise_broken(
            [
                (self.format == "digits" or self.source is not None, f"source: missing; format {self.format} needs it"),
                (self.format != "coco" or self.captions is not None, "captions: missing; format coco needs it"),
                (
                    self.split == "train" or self.format in SPLITS,
                    f"split {self.split}: only {', '.join(SPLITS)} have parts; for others give another source",
                ),
                (
                    self.split in SPLITS.get(self.format, (self.split,)),
                    f"split {self.split}: {self.format} has {' and '.join(SPLITS.get(self.format, ()))} alone",
                ),
            ]
        )
        return self


class PrecomputeConfig(Section):
    """How images become shards. batch_size, precision, channels_last and compile change the bits of what is stored."""

    batch_size: int = Field(64, gt=0, description="images (or captions) in one forward pass of an encoder")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the autoencoder's encoder: fp32 without TF32, or bf16 autocast, whose error is reported"
    )
    channels_last: bool = Field(False, description="lay images out with channels last, for GPUs")
    compile: bool = Field(False, description="compile the encoder with torch.compile")
    decode_processes: int | None = Field(
        None,
        ge=0,
        description="processes of each worker that read and crop images; none: the machine's cores, shared by its "
        "workers; 0: in the worker itself; changes nothing but time",
    )
    bad_image_limit: float = Field(
        0.001, ge=0, lt=1, description="share of the images that may prove unusable, and be left out, before it fails"
    )
    exif_rotation: bool = Field(
        False, description="turn images as their EXIF orientation says; false: as stored, as the official code has them"
    )
    lease_s: float = Field(
        60.0, gt=0, description="seconds of silence after which another worker takes over a worker's unit of work"
    )
    reference: bool = Field(
        False, description="also make evaluate.reference of the same images, where there is none yet"
    )
    contact_sheet: int = Field(16, ge=0, description="images shown in contact_sheet.png, decoded and original; 0: none")


class StorageConfig(Section):
    """How s3:// is reached. What is not given is taken from the usual AWS variables and files."""

    endpoint: str | None = Field(None, description="URL of the S3 server; none: AWS_ENDPOINT_URL, or Amazon's")
    profile: str | None = Field(None, description="profile of ~/.aws; none: AWS_PROFILE")
    region: str | None = Field(None, description="region; none: AWS_DEFAULT_REGION, or the profile's")
    anonymous: bool = Field(False, description="send no credentials: for public buckets")
    retry_s: float = Field(300.0, gt=0, description="seconds of retries without progress before a request is given up")
    stall_s: float = Field(20.0, gt=0, description="seconds of silence after which a connection is dropped and retried")
    cache_dir: str | None = Field(None, description="local folder of read parts of shards, shared by a node's ranks")
    cache_gb: float | None = Field(None, gt=0, description="most that the cache may hold, 10^9 bytes; needs cache_dir")

    @model_validator(mode="after")
    def _check(self) -> StorageConfig:
        raise_broken(
            [
                (
                    (self.cache_dir is None) == (self.cache_gb is None),
                    "cache_dir and cache_gb: give both, or neither",
                ),
                (
                    self.endpoint is None or self.endpoint.startswith(("http://", "https://")),
                    f"endpoint {self.endpoint} must begin with http:// or https://",
                ),
                (not (self.anonymous and self.profile), "anonymous and profile exclude each other"),
            ]
        )
        return self
