"""Jobs that turn images into shards, references and checks of both."""

import uvit_dist as uvit_dist  # first of all: it has commands tell where packages are missing
