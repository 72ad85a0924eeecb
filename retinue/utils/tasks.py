"""Names of the tasks that belong together."""

# Tasks of a net with one score per class for a whole image; the other tasks have outputs for places in the image.
CLASSIFIERS = ("classification", "multi_label")
