"""A program without m2d: loads exports by diffusers alone, draws, and saves pixels. `drawn.py OUT FOLDER...`."""

import sys
from pathlib import Path


class Refuse:
    """m2d is not installed here."""

    def find_spec(self, name: str, *_: object) -> None:
        if name.split(".")[0] == "m2d":
            raise ModuleNotFoundError(name)


def main() -> None:
    sys.meta_path.insert(0, Refuse())  # type: ignore[arg-type]
    import numpy as np
    import torch
    from diffusers import DiffusionPipeline
    from PIL import Image

    found = {}
    for folder in sys.argv[2:]:
        pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
        pipe.set_progress_bar_config(disable=True)
        ways = {"noise": {}, "image": {"image": Image.open(Path(folder).parent / "start.png"), "strength": 0.6}}
        for way, settings in ways.items():
            seeded = torch.Generator().manual_seed(5)
            images = pipe(["MEL", "df"], 3, num_inference_steps=5, generator=seeded, **settings).images
            found[f"{Path(folder).name}/{way}"] = np.stack([np.asarray(image) for image in images])
    narrow = DiffusionPipeline.from_pretrained(sys.argv[-1], trust_remote_code=True, torch_dtype=torch.bfloat16)
    narrow.to(torch.float16)
    assert narrow.unet.dtype == torch.float16
    assert narrow.conditioning.dtype == torch.float32
    assert "m2d" not in sys.modules
    np.savez(sys.argv[1], **found)


if __name__ == "__main__":
    main()
