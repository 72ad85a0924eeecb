"""Published strengths of the corruptions of Hendrycks and Dietterich (ICLR 2019, arXiv:1903.12261).

The source is the authors' repository github.com/hendrycks/robustness: `make_imagenet_c.py` for images of 224 px and
`make_cifar_c.py` for images of 32 px. Lengths are in pixels of these sizes.
"""

# The corruptions of ImageNet-C, over which the mean corruption error is the mean, and those kept for validation.
BENCHMARK = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
SEVERITIES = (1, 2, 3, 4, 5)
# Corruptions of the places in an image, by Naseer et al. (NeurIPS 2021, arXiv:2105.10497), for images of any size.
PATCHES = {
    # Share of the cells of a grid of 14 x 14 that become black
    "occlusion": (0.1, 0.25, 0.5, 0.75, 0.9),
    # Cells along a side of the grid whose cells are shuffled
    "patch_shuffle": (2, 3, 4, 8, 14),
}
NAMES = (*BENCHMARK, *EXTRA, *PATCHES)

# Name -> values of the severities 1 to 5, for images of 224 px. The comment names the values.
IMAGENET = {
    # Standard deviation
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    # Photons of a white pixel
    "shot_noise": (60, 25, 12, 5, 3),
    # Share of the values
    "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),
    # Standard deviation, as a share of the value
    "speckle_noise": (0.15, 0.2, 0.35, 0.45, 0.6),
    # Deviation of the kernel
    "gaussian_blur": (1, 2, 3, 4, 6),
    # Radius of the disk, and deviation of the kernel that smooths its edge
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    # Deviation of the blur before and after, largest displacement, passes
    "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    # Radius and deviation of the kernel
    "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    # End and step of the zoom factors, which start at 1
    "zoom_blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    # Mean and deviation of the noise, size of a flake, threshold, radius and deviation of the motion, share of image
    "snow": (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    # Weight of the image and of the frost
    "frost": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    # Weight of the fog, and decay of its heights
    "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    # Mean and deviation of the noise, deviation of its blur, threshold, strength (water) or blur (mud), is mud
    "spatter": (
        (0.65, 0.3, 4, 0.69, 0.6, False),
        (0.65, 0.3, 3, 0.68, 0.6, False),
        (0.65, 0.3, 2, 0.68, 0.5, False),
        (0.65, 0.3, 1, 0.65, 1.5, True),
        (0.67, 0.4, 1, 0.65, 1.5, True),
    ),
    # Summand of the HSV value
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    # Factor on the distance from the mean
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    # Factor and summand of the HSV saturation
    "saturate": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
    # Quality
    "jpeg_compression": (25, 18, 15, 10, 7),
    # Factor of the size
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
    # Largest displacement before its blur, deviation of this blur, largest displacement of a corner
    "elastic_transform": (
        (488, 170.8, 24.4),
        (488, 19.52, 48.8),
        (12.2, 2.44, 4.88),
        (17.08, 2.44, 4.88),
        (29.28, 2.44, 4.88),
    ),
}

# The same for images of 32 px.
CIFAR = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "shot_noise": (500, 250, 100, 75, 50),
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
    "speckle_noise": (0.06, 0.1, 0.12, 0.16, 0.2),
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    "zoom_blur": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "spatter": (
        (0.62, 0.1, 0.7, 0.7, 0.5, False),
        (0.65, 0.1, 0.8, 0.7, 0.5, False),
        (0.65, 0.3, 1, 0.69, 0.5, False),
        (0.65, 0.1, 0.7, 0.69, 0.6, True),
        (0.65, 0.1, 0.5, 0.68, 0.6, True),
    ),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    "jpeg_compression": (80, 65, 58, 50, 40),
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
    "elastic_transform": ((0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, 0.96, 0.96)),
}
