"""OpenMMLab's packages: the extra `dense` of pyproject.toml, which the heads of detection and segmentation need."""

from importlib.util import find_spec

# Modules of the packages. Those of the fork onedl (onedl-mmcv, onedl-mmdetection, ...) have the same names.
MODULES = ("mmcv", "mmdet", "mmengine", "mmseg")


def require_openmmlab(user: str) -> None:
    """Refuse to go on if a package of OpenMMLab is not installed.

    Args:
        user: The thing that needs the packages, such as `head=mask_rcnn`, for the error message.

    Raises:
        ValueError: A package is not installed.
    """
    missing = [name for name in MODULES if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{user} needs the OpenMMLab packages: pip install 'retinue[dense]' (not installed: {', '.join(missing)})"
        )
