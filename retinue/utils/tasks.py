"""Names of the tasks that belong together."""

# Tasks of a net with scores for a whole image; the other tasks have outputs for places in the image.
CLASSIFIERS = ("classification", "multi_label", "hashing")
# Task -> groups of the config whose choices for classification it takes.
TAKES_FROM_CLASSIFICATION = {"multi_label": ("recipe",), "hashing": ("recipe", "data", "head")}
