"""FedAvg of a pretrained ViT, fine-tuned on folders of images."""
