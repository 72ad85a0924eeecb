"""The bridge to mmdetection and mmsegmentation."""
