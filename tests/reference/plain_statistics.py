"""The feature-statistics prior as its docstring tells it, slow and plain: loops over tokens, images and features."""

import math
from statistics import fmean


def statistics_prior(layers, positions, prefix, means, stds):
    """Distance of a batch's token statistics from the known ones.

    Args:
        layers: per layer, for each image, for each of its tokens a list of features.
        positions: for each image the places of its patches on the grid.
        prefix: tokens before the patches; they stand before all places.
        means, stds: per layer, for each place (prefix first) a list of features.

    Returns:
        The mean over layers of the mean over all tokens that are shown of the token's place's distance.
    """
    places = [[*range(prefix), *(prefix + position for position in own)] for own in positions]
    distances = []
    for layer, mean, std in zip(layers, means, stds, strict=True):
        unit = fmean(value**2 for row in std for value in row)
        tokens = [place for own in places for place in own]
        each = {place: distance_of_place(layer, places, place, mean[place], std[place]) for place in set(tokens)}
        distances.append(fmean(each[place] / unit for place in tokens))
    return fmean(distances)


def distance_of_place(layer, places, place, mean, std):
    """Squared differences of mean and deviation at one place, over the images that keep it; mean over features."""
    kept = [image[own.index(place)] for image, own in zip(layer, places, strict=True) if place in own]
    found = []
    for feature in range(len(mean)):
        values = [token[feature] for token in kept]
        middle = fmean(values)
        distance = (middle - mean[feature]) ** 2
        if len(values) > 1:
            deviation = math.sqrt(max(fmean((value - middle) ** 2 for value in values), 1e-8))
            distance += (deviation - std[feature]) ** 2
        found.append(distance)
    return fmean(found)
