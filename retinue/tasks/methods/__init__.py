"""Methods of self-supervised pretraining, one file each; `conf/method/*.yaml` names their classes."""
