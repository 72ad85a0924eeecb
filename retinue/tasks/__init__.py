"""What a net is trained for: the LightningModules."""
