"""What mmforget must know of each family of multimodal language models, one file each."""
