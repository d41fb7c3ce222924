"""Jobs that turn images into shards, references and checks of both."""
