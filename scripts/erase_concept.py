r"""Erase a concept from a text-to-image model: the shortest way, from the shell or from Python.

From the shell, with a picture-by-picture check and a report::

    python scripts/erase_concept.py digit_world --concept seven --synonym 7 --keep one --keep red
    python scripts/erase_concept.py stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --concept 'Van Gogh' --kind style --keep Monet --keep Picasso \
        --clip hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K
    python scripts/erase_concept.py stabilityai/stable-diffusion-xl-base-1.0 --dtype float16 \
        --concept 'Grumpy Cat' --anchor 'a cat' --keep 'a dog' --method esd --set lora_rank=8 \
        --format lora --save grumpy-cat-lora

From Python, with a diffusers pipeline in and one out::

    import mmforget
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
    edited = mmforget.erase(pipe, "Van Gogh", kind="style", preserve=["Monet", "Picasso"])
    edited.save_pretrained("sd15-without-van-gogh")

`mmforget erase --help` lists every option.
"""

import sys

from mmforget.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["erase", *sys.argv[1:]]))
