"""Writes a small image folder, `photos/{train,val}/{cat,dog}/*.jpg`, of noise: python tests/make_photos.py"""

from pathlib import Path

import numpy as np
from PIL import Image

for split in ("train", "val"):
  for label, name in enumerate(("cat", "dog")):
    folder = Path("photos", split, name)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(1, 5):
      noise = np.random.default_rng((label, i)).integers(0, 256, (130, 150, 3), np.uint8)
      Image.fromarray(noise).save(folder / f"{i}.jpg")
