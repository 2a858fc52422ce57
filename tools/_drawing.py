"""What the demo draws: coloured shapes on textured ground as COCO instances and label maps, and
predictions beside the truth."""

import itertools
import json

import cv2
import numpy as np
from mmengine.fileio import load
from pycocotools import mask as coco_mask

SIZE = 128


def ring(corners, inner=1.0):
    """The outline of a regular polygon of area 1, every second corner drawn in to ``inner``."""
    number = np.arange(corners)
    turn = 2 * np.pi * number / corners
    radius = np.where(number % 2, inner, 1.0)[:, None]
    points = (radius * np.stack([np.cos(turn), np.sin(turn)], axis=1)).astype(np.float32)
    return points / np.sqrt(cv2.contourArea(points))


#: Class: outline and the middle of its hues, of OpenCV's 180. With the shape alone, a small
#: network from scratch stays at background.
CLASSES = {
    'disc': (ring(32), 15),
    'square': (ring(4), 60),
    'triangle': (ring(3), 105),
    'star': (ring(10, 0.45), 150),
}
NAMES, OUTLINES, HUES = list(CLASSES), *zip(*CLASSES.values(), strict=True)
HUE_SPREAD = 12


# --- one scene -----------------------------------------------------------------------------------


def texture(random):
    """(SIZE, SIZE) of noise about 0, coarse to fine."""
    noise = np.zeros((SIZE, SIZE), np.float32)
    for cells in (4, 16, 64):
        grid = random.normal(size=(cells, cells)).astype(np.float32) / np.log2(cells)
        noise += cv2.resize(grid, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
    return noise


def place(outline, size, random):
    """The pixels of ``outline``, somewhere, turned, with an area of ``size`` squared."""
    turn = random.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    middle = random.uniform(0.12, 0.88, size=2) * SIZE
    mask = np.zeros((SIZE, SIZE), np.uint8)
    cv2.fillPoly(mask, [np.round(size * outline @ rotation + middle).astype(np.int32)], 1)
    return mask.astype(bool)


def paint(hsv, mask, hue, saturation, value, contrast, random):
    hsv[mask, 0], hsv[mask, 1] = hue, saturation
    hsv[mask, 2] = value + contrast * texture(random)[mask]


def draw_scene(random):
    """A BGR picture and its instances: [(number of the class from 1, visible pixels)]."""
    hsv = np.empty((SIZE, SIZE, 3), np.float32)
    ground = random.integers(180), 40, random.uniform(60, 180), random.uniform(10, 30)
    paint(hsv, np.ones((SIZE, SIZE), bool), *ground, random)
    for _ in range(random.integers(16)):  # clutter of all hues; it counts as ground
        mask = place(ring(3), random.uniform(3, 8), random)
        speck = random.integers(180), random.uniform(20, 200), random.uniform(80, 255), 15
        paint(hsv, mask, *speck, random)
    instances = []
    for _ in range(random.integers(2, 7)):
        i = random.integers(len(CLASSES))
        mask = place(OUTLINES[i], random.uniform(20, 50), random)
        # They may overlap, but none hides more than half of what is left of another.
        if all(2 * (visible & ~mask).sum() >= visible.sum() for _, visible in instances):
            hue = HUES[i] + random.uniform(-HUE_SPREAD, HUE_SPREAD)
            look = random.uniform(130, 230), random.uniform(120, 220), random.uniform(5, 25)
            paint(hsv, mask, hue, *look, random)
            instances = [(label, visible & ~mask) for label, visible in instances]
            instances.append((int(i) + 1, mask))
    hsv = np.clip(hsv, 0, (179, 255, 255)).astype(np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR), instances


# --- data sets -----------------------------------------------------------------------------------


def annotate(number, image_id, label, mask):
    """COCO's annotation of an instance's visible pixels."""
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return dict(
        id=number,
        image_id=image_id,
        category_id=label,
        bbox=coco_mask.toBbox(rle).tolist(),
        area=int(coco_mask.area(rle)),
        segmentation=dict(size=rle['size'], counts=rle['counts'].decode()),
        iscrowd=0,
    )


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), pixels):
        raise OSError(f'{path} cannot be written')


def draw_split(root, split, count, seed):
    """Writes images/SPLIT/*.png, annotations/SPLIT/*.png (0: background) and SPLIT.json."""
    random = np.random.default_rng(seed)
    images, annotations = [], []
    for i in range(count):
        name = f'{i:04}.png'
        picture, instances = draw_scene(random)
        labels = np.zeros((SIZE, SIZE), np.uint8)
        for label, mask in instances:
            labels[mask] = label
            annotations.append(annotate(len(annotations) + 1, i + 1, label, mask))
        save(root / 'images' / split / name, picture)
        save(root / 'annotations' / split / name, labels)
        images.append(dict(id=i + 1, file_name=name, width=SIZE, height=SIZE))
    categories = [dict(id=i, name=name) for i, name in enumerate(NAMES, start=1)]
    data = dict(images=images, annotations=annotations, categories=categories)
    (root / f'{split}.json').write_text(json.dumps(data))


# --- predictions beside the truth ----------------------------------------------------------------


def caption(canvas, text, place):
    for shade, shift in ((0, 1), (255, 0)):
        x, y = place[0] + shift, place[1] + shift
        cv2.putText(canvas, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (shade,) * 3)


def overlay(grey, instances):
    """The enlarged ``grey`` with (number of the class, pixels, text) upon it."""
    canvas, captions = grey.copy(), []
    for label, mask, text in instances:
        hsv = np.uint8([[[HUES[label - 1], 255, 255]]])
        colour = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0]
        mask = cv2.resize(np.uint8(mask), grey.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        canvas[mask > 0] = canvas[mask > 0] // 2 + colour // 2
        outlines, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(canvas, outlines, -1, colour.tolist(), 2)
        x, y, _, height = cv2.boundingRect(mask)
        captions.append((text, (x + 4, y + height // 2)))
    for text, corner in captions:  # none under a neighbour
        caption(canvas, text, corner)
    return canvas


def of_truth(data, image):
    for entry in data['annotations']:
        if entry['image_id'] == image['id']:
            yield entry['category_id'], coco_mask.decode(entry['segmentation']), ''


def of_labels(path):
    labels = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    for label in range(1, len(NAMES) + 1):
        yield label, labels == label, ''


def of_detections(found, least_score=0.5):
    """The surest last, on top."""
    found = zip(found['scores'], found['labels'], found['masks'], strict=True)
    for score, label, rle in reversed(list(found)):
        if score >= least_score:
            yield label + 1, coco_mask.decode(rle), f'{NAMES[label]} {score:.2f}'


def write_sheet(path, root, split, label_maps, detections, titles, num_images=4, zoom=3):
    """Pictures of ``split``, their truth, what mmseg (a folder) and mmdet (a pickle) predicted."""
    data = load(root / f'{split}.json')
    header = np.zeros((24, 4 * zoom * SIZE, 3), np.uint8)
    for i, title in enumerate(('picture', 'truth', *titles)):
        caption(header, title, (i * zoom * SIZE + 4, 17))
    rows = [header]
    scenes = zip(data['images'], load(detections), strict=True)
    for image, detected in itertools.islice(scenes, num_images):
        picture = cv2.imread(str(root / 'images' / split / image['file_name']))
        picture = cv2.resize(picture, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)
        grey = cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
        columns = (
            of_truth(data, image),
            of_labels(label_maps / image['file_name']),
            of_detections(detected['pred_instances']),
        )
        rows.append(np.hstack([picture, *(overlay(grey, column) for column in columns)]))
    save(path, np.vstack(rows))
