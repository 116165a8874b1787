"""A contact sheet: a few images of each class beside the class's name, to see that data are what they should be."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from crdnd.data import ImageData
from crdnd.io import cannot_write

SIDE, GAP, MARGIN = 48, 4, 12  # pixels; smaller images are enlarged by a whole factor to about SIDE
THUMBNAIL = 96
"""Pixels along a side of what photographs of several sizes are brought to."""
ROWS = 25
"""Classes below each other; more stand in further columns."""
TEXT = 12


def contact_sheet(data: ImageData, per_class: int = 8) -> Image.Image:
    """The first images of every class, a row for each class with its name and number of images.

    Args:
        data: images with 1 or 3 channels; of other ones the first is shown in grey.
        per_class: how many of each class.

    Returns:
        An RGB picture.
    """
    factor = max(1, SIDE // max(data.shape[1:]))
    height, width = (size * factor for size in data.shape[1:])
    counts = data.y.cpu().bincount(minlength=data.num_classes).tolist()
    labels = [f"{name} ({count})" for name, count in zip(data.class_names, counts, strict=True)]
    font = ImageFont.load_default(size=TEXT)
    text = int(max(font.getlength(label) for label in labels)) + MARGIN
    row, column = max(height, TEXT) + GAP, text + per_class * (width + GAP) + MARGIN
    columns, rows = -(-len(labels) // ROWS), min(len(labels), ROWS)
    sheet = Image.new("RGB", (MARGIN + columns * column, 2 * MARGIN + rows * row), "white")
    draw = ImageDraw.Draw(sheet)
    for label, title in enumerate(labels):
        left, top = MARGIN + label // ROWS * column, MARGIN + label % ROWS * row
        draw.text((left, top + (row - GAP - TEXT) // 2), title, fill="black", font=font)
        ids = (data.y == label).nonzero()[:per_class, 0]
        if len(ids):
            for place, image in enumerate(data.batch(ids)[0]):
                picture = _picture(image).resize((width, height), Image.Resampling.NEAREST)
                sheet.paste(picture, (left + text + place * (width + GAP), top))
    return sheet


def write_contact_sheet(path: Path, data: ImageData, per_class: int = 8) -> None:
    """Write `contact_sheet` as a PNG."""
    try:
        contact_sheet(data, per_class).save(path, format="PNG")
    except OSError as error:
        raise cannot_write(path, error) from error


def _picture(image: torch.Tensor) -> Image.Image:
    levels = (image * 255).round().to(torch.uint8).cpu().numpy()
    return Image.fromarray(np.moveaxis(levels, 0, 2) if len(levels) == 3 else levels[0]).convert("RGB")
