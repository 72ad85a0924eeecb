"""Names of the tasks that belong together."""

# Tasks whose nets read whole images as classifiers do; the other tasks have outputs for places in the image.
CLASSIFIERS = ("classification", "multi_label", "hashing", "supernet", "bossnas", "pretraining")
# Task -> groups of the config whose choices for classification it takes.
TAKES_FROM_CLASSIFICATION = {
    "multi_label": ("recipe",),
    "hashing": ("recipe", "data", "head"),
    "supernet": ("recipe", "data", "head"),
    "bossnas": ("recipe", "data", "head"),
    "pretraining": ("data",),
}
