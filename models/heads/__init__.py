"""Decoders and necks that mmdetection and mmsegmentation lack, as plain modules that read a backbone's maps."""
