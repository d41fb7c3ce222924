"""Networks: the U-ViT, the autoencoder, feature extractors."""
