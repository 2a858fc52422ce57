"""Tiny data sets in the layouts of configs/_base_/datasets, drawn on the spot."""

import cv2
import mmengine
import numpy as np

NUTS = ('date', 'fig', 'hazelnut')
CAMVID_CLASSES = 11
HEIGHT, WIDTH = 96, 128
UNLABELLED = 255


def draw_nuts(root, num_images=4):
    """nuts_instance.py: images/*.jpg and trainval.json, in COCO's format."""
    (root / 'images').mkdir(parents=True)
    images, annotations = [], []
    for i in range(num_images):
        pixels = background(i)
        for category, outline in enumerate(outlines(i), start=1):
            cv2.fillPoly(pixels, [outline], colour(category))
            x, y, w, h = cv2.boundingRect(outline)
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=i + 1,
                    category_id=category,
                    bbox=[x, y, w, h],
                    area=cv2.contourArea(outline),
                    segmentation=[outline.flatten().tolist()],
                    iscrowd=0,
                )
            )
        write(root / 'images' / f'{i}.jpg', pixels)
        images.append(dict(id=i + 1, file_name=f'{i}.jpg', height=HEIGHT, width=WIDTH))
    categories = [dict(id=i, name=name) for i, name in enumerate(NUTS, start=1)]
    instances = dict(images=images, annotations=annotations, categories=categories)
    mmengine.dump(instances, root / 'trainval.json')
    return root


def draw_camvid(root, num_images=(('train', 4), ('val', 2))):
    """camvid.py: images/{train,val}/*.jpg and annotations/{train,val}/*.png, class indices."""
    for split, count in num_images:
        for folder in ('images', 'annotations'):
            (root / folder / split).mkdir(parents=True)
        for i in range(count):
            pixels = background(i)
            labels = np.full((HEIGHT, WIDTH), UNLABELLED, np.uint8)
            for row, top in enumerate(range(8, HEIGHT, 16)):
                category = (i + 2 * row) % CAMVID_CLASSES
                pixels[top : top + 16] = colour(category)
                labels[top : top + 16] = category
            for place, outline in enumerate(outlines(i)):
                category = (i + 5 + place) % CAMVID_CLASSES
                cv2.fillPoly(pixels, [outline], colour(category))
                cv2.fillPoly(labels, [outline], category)
            write(root / 'images' / split / f'{i}.jpg', pixels)
            write(root / 'annotations' / split / f'{i}.png', labels)
    return root


def outlines(seed):
    """A rectangle, an upright and a lying ellipse, side by side: (points, 2) each."""
    random = np.random.default_rng(seed)
    width = WIDTH // 3
    for i, axes in enumerate([None, (10, 24), (16, 10)]):
        x = i * width + width // 2 + random.integers(-4, 5)
        y = HEIGHT // 2 + random.integers(-16, 17)
        if axes is None:
            corners = [(x - 14, y - 20), (x + 14, y - 20), (x + 14, y + 20), (x - 14, y + 20)]
            yield np.array(corners, np.int32)
        else:
            yield cv2.ellipse2Poly((int(x), int(y)), axes, 0, 0, 360, 15)


def background(seed):
    return np.random.default_rng(seed).integers(90, 130, (HEIGHT, WIDTH, 3), np.uint8)


def colour(category):
    return tuple(np.random.default_rng(100 + category).integers(256, size=3).tolist())


def write(path, pixels):
    assert cv2.imwrite(str(path), pixels), path
