"""Bridge to mmdetection and mmsegmentation: their heads on any backbone of timm's registry."""
