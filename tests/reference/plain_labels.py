"""Labels of a student's tokens, pixel by pixel."""

import torch


def token_labels(sets, patch, classes, rows, expected, shift=None, partners=None):
    """Label (b, n, classes) of each token of images of 16 x 16 pixels.

    Args:
        sets, rows: the images of all sets, and which of them are shown.
        patch: side of the student's patches in pixels.
        expected: (b, classes) what the ensemble says of the images as they are shown.
        shift: (b, 2) by how many pixels each image is moved, cyclically.
        partners: share (b,) of each image and who has the rest (b,).
    """
    masks, targets = [], []
    for each in sets:
        ph, pw = each.patch_size
        for image in range(len(each)):
            masks.append([[bool(each.mask[image, y // ph, x // pw]) for x in range(16)] for y in range(16)])
            targets.append(int(each.targets[image]))
    side = 16 // patch
    labels = torch.zeros(len(rows), side**2, classes)
    for place in range(len(rows)):
        parts = [(1.0, place)]
        if partners is not None:
            parts = [(float(partners[0][place]), place), (1 - float(partners[0][place]), int(partners[1][place]))]
        for y in range(16):
            for x in range(16):
                for weight, other in parts:
                    down, right = (0, 0) if shift is None else shift[other].tolist()
                    image = int(rows[other])
                    kept = masks[image][(y - down) % 16][(x - right) % 16]
                    label = torch.eye(classes)[targets[image]] if kept else expected[place]
                    labels[place, (y // patch) * side + x // patch] += weight * label / patch**2
    return labels
