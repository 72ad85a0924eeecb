"""LightningModules that train and evaluate nets: classification, detection and segmentation."""
