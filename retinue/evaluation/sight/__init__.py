"""What a net looks at: receptive fields, attention maps, class activation, and statistics of its features by depth."""
