"""Decoders and necks that mmdetection and mmsegmentation lack, as plain modules on the maps of a net."""
